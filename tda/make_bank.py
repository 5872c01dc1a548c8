"""Making banks: models are retrained on random subsets, in parallel, in chunks that a killed run finds again."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Float

from tda.artifacts import only_run, remove, whole
from tda.bank import Bank, load_bank, save_bank
from tda.bank_data import BankData, check_data
from tda.bank_training import FULL, SUBSET, Job, models_at_once, outcomes
from tda.counterfactual import random_halves
from tda.parallel import worker_pool
from tda.recipe import Recipe, parse_recipe

FULL_RUNS = 10  # on all rows, as the shared banks have


def num_processes() -> int:
    """Processes of one thread each: `TDA_WORKERS` of the environment, or one per core."""
    return int(os.environ.get("TDA_WORKERS", 0)) or len(os.sched_getaffinity(0))


def make_bank(
    data: BankData, recipe: Recipe, *, num_subsets: int, repeats: int, seed: int, out: Path, workers: int | None = None
) -> Bank:
    """The bank of `num_subsets` random halves of the rows, each retrained `repeats` times; written to `out`.

    Finished chunks are kept in the folder `OUT.runs` until the bank is whole. A run that was killed resumes from there and
    makes the same bytes, whatever the number of workers. A finished bank is not made again.

    Raises:
        ValueError: the data do not fit the recipe, there are too few rows or subsets, a training diverges, or `out` is another
            bank.
    """
    check_data(data, recipe, origin=str(out))
    if num_subsets < 3 or repeats < 1 or data.num_rows < 2:
        raise ValueError(
            f"{out}: {num_subsets} subsets, {repeats} repeats and {data.num_rows} rows asked for; expected at least 3 subsets (a "
            "rank correlation of fewer says nothing), 1 repeat and 2 rows"
        )
    masks = half_subsets(data.num_rows, num_subsets, seed=seed)
    if out.exists():
        return _finished(out, data, recipe, masks=masks, repeats=repeats)
    jobs = [
        Job(np.flatnonzero(mask), (SUBSET, seed, subset * repeats + repeat))
        for subset, mask in enumerate(masks)
        for repeat in range(repeats)
    ]
    jobs += [Job(np.arange(data.num_rows), (FULL, seed, run)) for run in range(FULL_RUNS)]
    folder = out.with_name(out.name + ".runs")
    values, _correct = retrain(jobs, data, recipe, folder=folder, description=f"retraining for {out.name}", workers=workers)
    measurements = values[:-FULL_RUNS].reshape(num_subsets, repeats, data.num_queries)
    bank = Bank(masks, measurements.astype(np.float32), values[-FULL_RUNS:].astype(np.float32), data, recipe)
    save_bank(out, bank)
    remove(folder)
    return bank


def _finished(out: Path, data: BankData, recipe: Recipe, *, masks: np.ndarray, repeats: int) -> Bank:
    """The bank in `out`, if it is the one of these data and settings.

    Raises:
        ValueError: it is another bank, or none.
    """
    try:
        bank = load_bank(out)
    except ValueError as error:
        raise ValueError(
            f"{out}: is no bank, and would be overwritten; give another name for the bank, or remove {out}"
        ) from error
    read = parse_recipe(recipe.to_json(), origin=str(out))
    same_extras = bank.data.extras.keys() == data.extras.keys() and all(
        np.array_equal(bank.data.extras[name], values) for name, values in data.extras.items()
    )
    same_settings = np.array_equal(bank.masks, masks) and bank.measurements.shape[1] == repeats
    if not (same_settings and same_extras and bank.data.digest(bank.recipe) == data.digest(read)):
        subsets, held, _queries = bank.measurements.shape
        raise ValueError(
            f"{out}: is another bank ({subsets} subsets x {held} repeats of {bank.data.num_rows} rows), of other data, recipe or "
            f"settings than asked for; give another name for the new one, or remove {out}"
        )
    return bank


def half_subsets(num_rows: int, num_subsets: int, *, seed: int) -> np.ndarray:
    """(subset, row) uniform random halves, True = kept."""
    return random_halves(num_rows, num_subsets, np.random.default_rng([seed, num_rows]))


def retrain(
    jobs: Sequence[Job], data: BankData, recipe: Recipe, *, folder: Path, description: str, workers: int | None = None
) -> Float[np.ndarray, "2 job query"]:
    """Every query's measurement after each job, and whether it was classified rightly; finished chunks are kept in `folder`.

    Chunks of other jobs, data or recipes in `folder` are not mistaken for these: each has a folder of their digest. A second
    process at the same work is refused.
    """
    size = models_at_once(recipe)
    chunks = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    folder = folder / _digest(jobs, data, recipe)
    paths = [folder / f"{number:06d}.npy" for number in range(len(chunks))]
    with only_run(folder / "lock"):
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        train, queries = data.train(recipe), data.queries(recipe)

        def work(number: int) -> None:
            found = np.stack(outcomes(chunks[number], recipe, train=train, queries=queries))
            with whole(paths[number]) as part, part.open("wb") as file:
                np.save(file, found)

        if len(missing) < len(chunks):
            description = f"{description} ({len(missing)} of {len(chunks)} left)"
        with worker_pool(work, workers=min(workers or num_processes(), len(missing))) as call:
            for _done in call(missing, description, "model" if size == 1 else f"{size} models"):
                pass
    return np.concatenate([np.load(path) for path in paths], axis=1)


def _digest(jobs: Sequence[Job], data: BankData, recipe: Recipe) -> str:
    digest = xxhash.xxh3_128(data.digest(recipe).encode())
    for job in jobs:
        digest.update(np.array([*job.seed, len(job.rows), *job.rows], dtype=np.int64).tobytes())
    return digest.hexdigest()
