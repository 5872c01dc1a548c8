"""`tda evaluate removal`: remove the rows that a method finds most helpful for a query, retrain, and measure the query again.

The protocol is that of SOURCE's appendix B.3 (Bae et al. 2024), after the brittleness test of Ilyas et al. (2022):

- queries that are classified correctly in each of several runs on all rows (if there are classes);
- several numbers of rows to remove, and several retrainings for each;
- as the control, rows removed at random: of the query's class if there are classes, of any class for all queries together.

A query is flipped if it is correct in less than half of the retrainings. Reported too is the rise of its cost, compared with
runs on all rows from the same initial weights.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from tda.bank import Bank
from tda.bank_scores import RunStore
from tda.bank_training import FULL, REMOVAL, Job
from tda.evaluate_lds import describe, with_interval
from tda.lds import CONFIDENCE, interval_words, mean_over_queries
from tda.make_bank import retrain
from tda.text_table import text_table
from tda.variants import Variant

FULL_SEEDS = 5  # runs on all rows in which a query has to be correct
SHARES = (0.005, 0.01, 0.02, 0.04, 0.08)  # of the rows, to be removed by default


@dataclass(frozen=True)
class Removal:
    """What to remove and how often to retrain."""

    counts: tuple[int, ...]  # rows to remove
    num_queries: int = 10
    num_retrainings: int = 3
    together: bool = False  # remove for all the queries at once, by their summed scores
    seed: int = 0


def default_counts(num_rows: int) -> tuple[int, ...]:
    """Numbers of rows to remove from `num_rows`."""
    return tuple(sorted({max(1, round(share * num_rows)) for share in SHARES}))


def evaluate_removal(
    bank: Bank, variants: Sequence[Variant], seeds: Sequence[int], removal: Removal, *, store: RunStore, name: str
) -> dict:
    """Everything that was found, ready for JSON; scores are the mean over the runs of `seeds`.

    Raises:
        ValueError: more rows are to be removed than there are, or no query is fit for it.
    """
    if not removal.counts or min(removal.counts) < 1 or max(removal.counts) >= bank.data.num_rows:
        raise ValueError(
            f"--remove: {', '.join(map(str, removal.counts)) or 'nothing'}; expected numbers of rows from 1 to "
            f"{bank.data.num_rows - 1}, the bank has {bank.data.num_rows}"
        )
    full = [Job(np.arange(bank.data.num_rows), (FULL, removal.seed, run)) for run in range(FULL_SEEDS)]
    chosen = choose_queries(_retrain(full, "runs on all rows", bank, store)[1], removal, bank=bank)
    scored = store.scores(variants, seeds)
    scores = {label: np.mean([one.values for one in runs], axis=0) for label, runs in scored.items()}
    orders = {label: [np.argsort(-values[query], kind="stable") for query in chosen] for label, values in scores.items()}
    if removal.together:
        orders = {label: [np.argsort(-scores[label][chosen].sum(axis=0), kind="stable")] * len(chosen) for label in scores}
    control = control_name(bank, together=removal.together)
    orders[control] = random_orders(bank, chosen, removal)
    costs, right = _outcomes(orders, chosen, removal, bank=bank, store=store)
    return {
        "bank": describe(bank, name),
        "queries": chosen.tolist(),
        "together": removal.together,
        "counts": list(removal.counts),
        "runs": list(seeds),
        "retrainings": removal.num_retrainings,
        "control": control,
        "interval": interval_words(len(chosen)),
        "methods": {label: _curve(costs[label], right[label]) for label in orders},
    }


def choose_queries(right: np.ndarray, removal: Removal, *, bank: Bank) -> np.ndarray:
    """Some of the queries, at random, of those that are right in every run of `right` (run, query), where there are classes.

    Raises:
        ValueError: there is none.
    """
    fit = np.flatnonzero(np.isnan(right).all(axis=0) | (right == 1).all(axis=0))
    if not len(fit):
        raise ValueError(
            f"removal: no query is classified rightly in all of {len(right)} runs on all rows; expected at least one, the test "
            f"is whether it stays right; the bank has {bank.data.num_queries} queries, give it others"
        )
    return np.sort(np.random.default_rng(removal.seed).permutation(fit)[: removal.num_queries])


def control_name(bank: Bank, *, together: bool) -> str:
    """What the control removes, in words; for queries together rows of any class, since these are of several."""
    return "random, same class" if bank.recipe.loss == "cross_entropy" and not together else "random rows"


def random_orders(bank: Bank, chosen: np.ndarray, removal: Removal) -> list[np.ndarray]:
    """For every query the rows in random order, those of its own class first; one order for all of them together."""
    rows, orders = np.arange(bank.data.num_rows), []
    for query in chosen:
        order = np.random.default_rng([removal.seed, int(query)]).permutation(rows)
        if bank.recipe.loss == "cross_entropy":
            other = bank.data.y_train[order] != bank.data.y_query[query]
            order = order[np.argsort(other, kind="stable")]
        orders.append(order)
    return [np.random.default_rng(removal.seed).permutation(rows)] * len(chosen) if removal.together else orders


def _outcomes(
    orders: dict[str, list[np.ndarray]], chosen: np.ndarray, removal: Removal, *, bank: Bank, store: RunStore
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By arm, the rise in cost, and how often queries are right, (count, query), means over retrainings."""
    jobs: dict[bytes, list[Job]] = {}  # by the rows that are removed: arms that agree are trained once

    def places(removed: np.ndarray) -> bytes:
        key = np.sort(removed).tobytes()
        kept = np.setdiff1d(np.arange(bank.data.num_rows), removed)
        jobs.setdefault(key, [Job(kept, (REMOVAL, removal.seed, run)) for run in range(removal.num_retrainings)])
        return key

    nothing = places(np.arange(0))
    keys = {label: [[places(order[:count]) for order in held] for count in removal.counts] for label, held in orders.items()}
    values, right = _retrain([job for held in jobs.values() for job in held], "retraining without the top rows", bank, store)
    shape = (len(jobs), removal.num_retrainings, bank.data.num_queries)
    costs = bank.recipe.cost_sign * values.reshape(shape).mean(axis=1)
    right = right.reshape(shape).mean(axis=1)
    place = {key: number for number, key in enumerate(jobs)}

    def of(found: np.ndarray, label: str) -> np.ndarray:
        return np.array([[found[place[key], query] for key, query in zip(row, chosen, strict=True)] for row in keys[label]])

    before = costs[place[nothing], chosen]
    return {label: of(costs, label) - before for label in keys}, {label: of(right, label) for label in keys}


def _retrain(jobs: Sequence[Job], description: str, bank: Bank, store: RunStore) -> np.ndarray:
    return retrain(
        jobs, bank.data, bank.recipe, folder=store.folder / "removal", description=description, workers=store.workers or None
    )


def _curve(rises: np.ndarray, right: np.ndarray) -> dict:
    """Cost rise and share of flipped queries at every count, with intervals; `flipped` is None without classes."""
    flipped = None if np.isnan(right).any() else [asdict(mean_over_queries((at < 0.5).astype(float))) for at in right]
    return {"cost_rise": [asdict(mean_over_queries(at)) for at in rises], "flipped": flipped, "by_query": rises.tolist()}


def render_removal(result: dict) -> str:
    """The result as a table for a terminal."""
    bank, classes = result["bank"], _has_classes(result)
    lines = [
        f"{bank['name']}: {len(result['queries'])} queries; mean of {result['retrainings']} retrainings without the top rows "
        f"{'for all queries together' if result['together'] else 'for each query'}; scores: mean of {len(result['runs'])} runs",
        f"{'flipped: right in less than half of the retrainings; ' if classes else ''}intervals: {result['interval']}",
    ]
    for kind, words in (("flipped", "share flipped"), ("cost_rise", f"rise in cost ({_cost_words(bank)})")):
        if kind == "flipped" and not classes:
            continue
        rows = [[label, *map(with_interval, method[kind])] for label, method in result["methods"].items()]
        lines += ["", text_table([words, *(f"{count} removed" for count in result["counts"])], rows)]
    return "\n".join(lines)


def _has_classes(result: dict) -> bool:
    return all(method["flipped"] for method in result["methods"].values())


def _cost_words(bank: dict) -> str:
    return f"-{bank['measurement']}" if bank["measurement"] in ("margin", "log_probability") else bank["measurement"]


def removal_curves(result: dict) -> tuple[dict[str, dict], dict]:
    """What to plot of the result: curves by method, and the plot's words."""
    classes = _has_classes(result)
    kind = "flipped" if classes else "cost_rise"
    curves = {
        label: {
            "x": [0, *result["counts"]],
            **{end: [0.0, *(at[end] for at in method[kind])] for end in ("mean", "low", "high")},
        }
        for label, method in result["methods"].items()
    }
    words = {
        "title": f"Removing the most helpful rows of {result['bank']['name']}",
        "subtitle": f"{len(result['queries'])} queries, mean of {result['retrainings']} retrainings; "
        f"band: {CONFIDENCE:.0%} interval over queries",
        "x_label": "rows removed",
        "y_label": "queries flipped" if classes else f"rise in cost ({_cost_words(result['bank'])})",
        "baselines": [result["control"]],
        "percent": classes,
    }
    return curves, words
