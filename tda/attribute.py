"""`attribute`: scores of training rows for queries, for any model and by any method."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from tda.counterfactual import Retrain
from tda.data import Data
from tda.fitted import Fitted, Settings
from tda.methods import named
from tda.scores import Scores
from tda.task import Task
from tda.trajectory import Run


def attribute(
    method: str,
    runs: Run | Sequence[Run],
    task: Task,
    train: Data,
    queries: Data,
    *,
    retrain: Retrain | None = None,
    **settings: object,
) -> Scores:
    """Scores (query, row) of the training rows `train` for `queries`.

    A positive score means that training on the row is predicted to lower the query's cost (`task.costs`).

    `method` is one of `METHODS`, or several joined by + for their ensemble. Of several `runs`, which differ in their seed, the
    scores are averaged. `settings` are the fields of `fitted.Settings`.

    `retrain` is only for `datamodel`, and only needed if training starts from random weights. It takes a sequence of (row
    numbers, seed) and yields a model trained on each, its initial weights drawn from the seed. Without it, every retraining
    starts from the run's own initial weights.

        def retrain(trainings):
            for rows, seed in trainings:
                torch.manual_seed(seed)
                yield fit(make_model(), rows)

    Raises:
        ValueError: the method or a setting is unknown, or run and data do not go together.
    """
    score = named(method, where="attribute")
    runs = [runs] if isinstance(runs, Run) else list(runs)
    if not runs:
        raise ValueError("attribute: no run; expected one or more")
    chosen = Settings.of(**settings)
    with _every_layer_called():
        values = sum(
            score(Fitted(run, task, train, queries, replace(chosen, seed=chosen.seed + number), retrain=retrain))  # own draws
            for number, run in enumerate(runs)
        ) / len(runs)
    return Scores(values, queries.ids, train.ids)


@contextlib.contextmanager
def _every_layer_called() -> Iterator[None]:
    """Inside the block, what is compiled runs uncompiled, and torch's encoder layers run layer by layer.

    Code that was compiled before there were hooks does not call them. Neither does the fused form of an encoder layer, in whose
    nested tensors examples cannot be told apart either.
    """
    compiled = "torch._dynamo" in sys.modules  # where it is not loaded nothing is, and loading it takes a second
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
