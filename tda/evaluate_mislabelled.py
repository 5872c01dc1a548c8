"""`tda evaluate mislabelled`: how early rows that are known to be bad are found when the most suspect are inspected first.

Suspicion is either harm to the queries (minus the summed score), or self-influence (Koh and Liang 2017, section 5.4): a wrong
label can only be learned from its own row, so leaving the row out raises its own cost a great deal.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tda.bank import Bank
from tda.bank_data import BankData
from tda.bank_scores import RunStore
from tda.data import batches
from tda.evaluate import roc_auc
from tda.evaluate_lds import describe
from tda.text_table import text_table
from tda.variants import Variant

RANKINGS = {"queries": "harm to the queries", "self": "self-influence"}
SHARES = (0.1, 0.2, 0.4)  # of the rows, looked at first
CURVE_POINTS = 101
TRAINING_LOSS, CHANCE = "training loss", "random"


def read_bad_rows(path: Path | None, data: BankData) -> np.ndarray:
    """(row,) which rows are bad: those numbered in the text file `path`, or those that the bank names.

    Raises:
        ValueError: neither names any, the file holds other than row numbers, or all rows are bad.
    """
    if path is None:
        bad = data.flipped
        if bad is None:
            raise ValueError(
                "mislabelled: the bank does not say which rows are bad (it has no array `flipped`); give --bad FILE, a row "
                "number (from 0) on every line"
            )
    else:
        words = path.read_text(encoding="utf-8").split()
        wrong = [word for word in words if not word.isdigit() or int(word) >= data.num_rows]
        if wrong:
            raise ValueError(f"{path}: expected row numbers from 0 to {data.num_rows - 1}; got {', '.join(wrong[:3])}")
        bad = np.isin(np.arange(data.num_rows), np.array(words, dtype=np.int64))
    if not bad.any() or bad.all():
        raise ValueError(f"mislabelled: {int(bad.sum())} of {len(bad)} rows are bad; expected some, not all")
    return bad


def evaluate_mislabelled(
    bank: Bank, bad: np.ndarray, variants: Sequence[Variant], seeds: Sequence[int], *, by: str, store: RunStore, name: str
) -> dict:
    """Everything that was found, ready for JSON; every method's suspicion is the mean over the runs of `seeds`."""
    scored = store.scores(variants, seeds) if by == "queries" else store.self_scores(variants, seeds)
    sign = -1 if by == "queries" else 1
    suspicion = {
        label: sign * np.mean([one.values.sum(axis=0) if by == "queries" else one.values for one in runs], axis=0)
        for label, runs in scored.items()
    }
    suspicion[TRAINING_LOSS] = np.mean([_losses(store, seed) for seed in seeds], axis=0)
    suspicion[CHANCE] = np.random.default_rng(0).random(len(bad))
    return {
        "bank": describe(bank, name),
        "bad": int(bad.sum()),
        "runs": list(seeds),
        "ranked_by": RANKINGS[by],
        "methods": {label: found(values, bad) for label, values in suspicion.items()},
    }


def _losses(store: RunStore, seed: int) -> np.ndarray:
    """Every row's loss at the end of a run: the plainest suspicion there is."""
    run, data = store.run(seed), store.data.train(store.recipe)
    model, losses = run.at(len(run.checkpoints) - 1), np.empty(len(data))
    for batch in batches(data, batch_tokens=4096):
        losses[batch.rows] = store.recipe.task.losses(model, batch)[1].numpy() / batch.sizes.numpy()
    return losses


def found(suspicion: np.ndarray, bad: np.ndarray) -> dict:
    """AUC, recall among the most suspect, and the recall curve; equally suspect rows are inspected in their order."""
    order = np.argsort(-suspicion, kind="stable")
    recall = np.concatenate([[0], np.cumsum(bad[order])]) / bad.sum()
    inspected = np.linspace(0, len(bad), CURVE_POINTS).round().astype(int)
    return {
        "auc": roc_auc(suspicion, bad),
        "recall_at": {f"{share:.0%}": float(recall[round(share * len(bad))]) for share in SHARES},
        "share_inspected": (inspected / len(bad)).tolist(),
        "recall": recall[inspected].tolist(),
    }


def render_mislabelled(result: dict) -> str:
    """The result as a table for a terminal."""
    bank = result["bank"]
    ranked = sorted(result["methods"].items(), key=lambda item: -item[1]["auc"])
    rows = [[label, f"{method['auc']:.3f}", *(f"{at:.1%}" for at in method["recall_at"].values())] for label, method in ranked]
    header = [f"by {result['ranked_by']}", "AUC", *(f"in worst {share:.0%}" for share in SHARES)]
    title = f"{bank['name']}: {result['bad']} of {bank['rows']} rows are bad; mean of {len(result['runs'])} runs"
    return f"{title}\n\n{text_table(header, rows)}"


def mislabelled_curves(result: dict) -> tuple[dict[str, dict], dict]:
    """What to plot of the result: curves by method, and the plot's words."""
    curves = {
        label: {"x": [100 * share for share in method["share_inspected"]], "mean": method["recall"]}
        for label, method in result["methods"].items()
    }
    words = {
        "title": f"Finding the {result['bad']} bad rows of {result['bank']['name']}",
        "subtitle": f"the most suspect of {result['bank']['rows']} rows first, by {result['ranked_by']}; "
        f"mean of {len(result['runs'])} runs",
        "x_label": "rows inspected (%)",
        "y_label": "bad rows found",
        "baselines": [CHANCE, TRAINING_LOSS],
        "percent": True,
        "markers": False,
    }
    return curves, words
