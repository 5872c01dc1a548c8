"""`attribute`: scores of training rows for queries, of any model, by any method."""

from collections.abc import Sequence
from dataclasses import replace

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
    """Scores of `train` for `queries` by `method`, one of `METHODS` or several joined by +; of several runs, their mean.

    Positive: training on the row is predicted to lower the query's cost (`task.costs`). `settings` are those of `Settings`.

    `retrain` is for `datamodel`, where training starts from random weights: of a sequence of (row numbers, seed) it gives a model
    trained on each, its initial weights drawn by the seed. Without it every retraining starts from the run's own initial weights.

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
    values = sum(
        score(Fitted(run, task, train, queries, replace(chosen, seed=chosen.seed + number), retrain=retrain))  # own draws
        for number, run in enumerate(runs)
    ) / len(runs)
    return Scores(values, queries.ids, train.ids)
