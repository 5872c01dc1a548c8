"""Recorded runs on all rows of a bank, and methods' scores of them, both cached in files.

A run is cached under the digest of data, recipe and the code that trains, scores under that of all the code. If one of these
changes, they are made again.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from tda.artifacts import only_run, read_json, whole, write_json
from tda.bank_data import BankData
from tda.bank_training import ATTRIBUTED, initial_model, retrained_by_recipe, train_run
from tda.data import Data
from tda.make_bank import num_processes
from tda.parallel import worker_pool
from tda.recipe import Recipe
from tda.run_files import load_run, read_run_facts, save_run
from tda.scores import ensemble
from tda.trajectory import Run
from tda.usage import Usage, in_turn, measured
from tda.variants import DATAMODEL, RETRAININGS, Variant

NUM_CHECKPOINTS = 6
TRAINING_CODE = (  # all that the numbers of a run depend on
    "bank_data.py",
    "bank_training.py",
    "counterfactual.py",
    "data.py",
    "losses.py",
    "means.py",
    "model_stack.py",
    "task.py",
    "trajectory.py",
)


@dataclass(frozen=True)
class Scored:
    """A method's scores of one run, and what computing them took."""

    values: np.ndarray  # (query, row), or (row) of rows for themselves
    usage: Usage


@dataclass(frozen=True)
class RunStore:
    """Recorded runs and scores of one bank below `folder`."""

    data: BankData
    recipe: Recipe
    folder: Path
    num_checkpoints: int = NUM_CHECKPOINTS
    workers: int = 0  # 0: one per core

    @functools.cached_property
    def _train(self) -> Data:
        return self.data.train(self.recipe)

    @functools.cached_property
    def _queries(self) -> Data:
        return self.data.queries(self.recipe)

    def _key(self, *more: str) -> str:
        digest = xxhash.xxh3_64(self.data.digest(self.recipe).encode())
        for part in (str(self.num_checkpoints), *more):
            digest.update(part.encode())
        return digest.hexdigest()

    def _run_folder(self, seed: int) -> Path:
        return self.folder / "runs" / f"{self._key(code_digest(TRAINING_CODE))}-{seed}"

    def _scores_path(self, kind: str, variant: Variant, seed: int) -> Path:
        return self.folder / "scores" / f"{kind}{variant.method}-{self._key(code_digest(), variant.label)}-{seed}.npy"

    def run(self, seed: int) -> Run:
        """The run of `seed`, which `train` has made."""
        return load_run(self._run_folder(seed), initial_model(self.recipe, (ATTRIBUTED, seed, 0)))

    def training_seconds(self, seed: int) -> float:
        """Processor time that the run of `seed` took."""
        return read_run_facts(self._run_folder(seed))["facts"]["cpu_seconds"]

    def train(self, seeds: Sequence[int]) -> None:
        """Make the runs that are not there yet, in parallel."""
        missing = [seed for seed in seeds if not self._run_folder(seed).exists()]
        data = self._train

        def work(seed: int) -> None:
            with measured() as usage:
                run = train_run(
                    data,
                    self.recipe,
                    rows=np.arange(len(data)),
                    seed=(ATTRIBUTED, seed, 0),
                    num_checkpoints=self.num_checkpoints,
                )
            save_run(self._run_folder(seed), run, cpu_seconds=usage.cpu_seconds)

        self._each(work, missing, "training the models to attribute", "run")

    def scores(self, variants: Sequence[Variant], seeds: Sequence[int]) -> dict[str, list[Scored]]:
        """By variant, its (query, row) scores of every seed's run. Missing scores and runs are made.

        Parts that several variants share are computed once, and the usage of a variant is that of its parts. Combining them is
        not counted (for a datamodel with a hundred queries and retrainings and 6,000 rows it takes .3 s).
        """
        leaves = {leaf.label: leaf for variant in variants for leaf in self._leaves(variant)}
        made = self._made("", list(leaves.values()), seeds, self._score)
        by_seed = {seed: {label: scored[place] for label, scored in made.items()} for place, seed in enumerate(seeds)}
        return {variant.label: [self._put_together(variant, seed, by_seed[seed]) for seed in seeds] for variant in variants}

    def _score(self, run: Run, variant: Variant, settings: dict) -> np.ndarray:
        from tda.attribute import attribute
        from tda.datamodel import retrain_on_halves
        from tda.fitted import Fitted, Settings

        task, train, queries = self.recipe.task, self._train, self._queries
        if variant.method != RETRAININGS:
            return attribute(variant.method, run, task, train, queries, **settings).values
        retrain = functools.partial(retrained_by_recipe, recipe=self.recipe, data=train)
        return retrain_on_halves(Fitted(run, task, train, queries, Settings.of(**settings), retrain=retrain))[1]

    def _parts(self, variant: Variant) -> list[Variant]:
        return variant.parts(self.recipe.task, self._train)

    def _leaves(self, variant: Variant) -> list[Variant]:
        """The parts of the variant, and parts of these, that have no parts themselves: what has to be computed."""
        return [leaf for part in self._parts(variant) for leaf in self._leaves(part)] or [variant]

    def _put_together(self, variant: Variant, seed: int, made: dict[str, Scored]) -> Scored:
        from tda.datamodel import half_signs, posterior

        parts = [self._put_together(part, seed, made) for part in self._parts(variant)]
        if not parts:
            return made[variant.label]
        values = [part.values for part in parts]
        if variant.method == DATAMODEL:
            prior, differences = values
            signs = half_signs(self.data.num_rows, len(differences), seed=_settings(variant, seed)["seed"])
            together = posterior(prior, signs, differences)
        else:
            together = ensemble(values)
        return Scored(together, in_turn([part.usage for part in parts]))

    def self_scores(self, variants: Sequence[Variant], seeds: Sequence[int]) -> dict[str, list[Scored]]:
        """By variant, the (row,) score of every row for itself, of every seed's run."""
        from tda.fitted import Fitted, Settings
        from tda.self_influence import self_scores

        train = self._train

        def work(run: Run, variant: Variant, settings: dict) -> np.ndarray:
            return self_scores(variant.method, Fitted(run, self.recipe.task, train, train, Settings.of(**settings)))

        return self._made("self-", variants, seeds, work)

    def _made(self, kind: str, variants: Sequence[Variant], seeds: Sequence[int], score: Callable) -> dict[str, list[Scored]]:
        self.train(seeds)

        def work(item: tuple[Variant, int]) -> None:
            variant, seed = item
            run, path = self.run(seed), self._scores_path(kind, variant, seed)
            with contextlib.redirect_stderr(_NoTerminal(sys.stderr)), measured() as usage:
                values = score(run, variant, _settings(variant, seed))
            write_json(path.with_suffix(".json"), asdict(usage))
            with whole(path) as part, part.open("wb") as file:
                np.save(file, values)

        pairs = [(variant, seed) for seed in seeds for variant in variants]
        self._each(work, [pair for pair in pairs if not self._scores_path(kind, *pair).exists()], "scoring", "run")
        return {variant.label: [self._read(self._scores_path(kind, variant, seed)) for seed in seeds] for variant in variants}

    def _read(self, path: Path) -> Scored:
        return Scored(np.load(path), Usage(**read_json(path.with_suffix(".json"), stage="evaluate")))

    def _each(self, work: Callable, items: Sequence, description: str, unit: str) -> None:
        with (
            only_run(self.folder / f"{self._key()}.lock"),
            worker_pool(work, workers=min(self.workers or num_processes(), len(items))) as call,
        ):
            for _done in call(items, description, unit):
                pass


def _settings(variant: Variant, seed: int) -> dict:
    """The variant's settings, and draws of its own for every run."""
    return {"seed": 1000 * seed} | variant.settings


class _NoTerminal:
    """A stream that is no terminal, so that methods draw no progress bars into ours."""

    def __init__(self, stream: Any):
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@functools.cache
def code_digest(names: tuple[str, ...] | None = None) -> str:
    """A digest of this package's modules, of all or of those in `names`; the same for as long as the process lives."""
    digest = xxhash.xxh3_64()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if names is None or path.name in names:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
