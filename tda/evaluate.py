"""The verdict, from retrained models; and the positive control: how much of the planted damage each method finds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jaxtyping import Bool, Float
from scipy.stats import rankdata, t

from tda.artifacts import Workspace, whole, write_json
from tda.config import Evaluation as Rule

MEASURES = ["target_loss", "general_loss"]
COMPARISONS = [  # arm, control, measure; the first three decide
    ("curated", "all", "target_loss"),
    ("curated", "random", "target_loss"),
    ("curated", "all", "general_loss"),
    ("curated", "random", "general_loss"),
    ("random", "all", "target_loss"),
    ("random", "all", "general_loss"),
]
CURVE_POINTS = 101
HISTOGRAM_BINS = 40
HISTOGRAM_TAIL = 0.01  # share of scores on either side that goes into the outermost bin


@dataclass(frozen=True)
class Evaluation:
    """The verdict, the metrics that `dvc metrics show` prints, and the tables that `dvc plots show` draws."""

    verdict: dict
    metrics: dict
    plots: dict[str, pl.DataFrame]


def evaluate(
    runs: pl.DataFrame,
    *,
    scores: pl.DataFrame,
    manifest: pl.DataFrame,
    trajectory: pl.DataFrame,
    truth: pl.DataFrame,
    target_sources: Sequence[str],
    rule: Rule,
) -> Evaluation:
    """The evaluation of one decision; `truth` (id, damaged, kind) marks nothing when nothing was planted."""
    comparisons = [paired_comparison(runs, *pair, confidence=rule.confidence) for pair in COMPARISONS]
    verdict = decide(comparisons, rule=rule, changed=bool((manifest["weight"] != 1).any()))
    arms = runs.group_by("arm").agg(pl.col(MEASURES).mean()).sort("arm")
    metrics = {
        "accepted": int(verdict["accepted"]),
        "curation": {
            "num_documents": len(manifest),
            "num_dropped": int((~manifest["keep"]).sum()),
            "num_harmful": int((manifest["score"].is_finite() & (manifest["score"] < 0)).sum()),
        },
        "retraining": {row["arm"]: {measure: row[measure] for measure in MEASURES} for row in arms.to_dicts()},
        "difference": _nested_differences(comparisons),
    }
    histogram = score_histogram(manifest)
    plots = {
        "retraining": runs.sort("arm").pivot("arm", index="seed", values=MEASURES).sort("seed"),
        "training_loss": trajectory.select("step", "stage", "loss", "learning_rate").sort("step"),
        "score_histogram": histogram.group_by("low", "high").agg(pl.col("documents", "dropped").sum()).sort("low"),
        "scores_by_source": histogram,
    }
    if truth["damaged"].any():
        found, curve, planted = find_damage(scores, manifest=manifest, truth=truth, target_sources=target_sources)
        metrics["damage"] = found
        plots |= {"recall_curve": curve, "planted": planted}
    return Evaluation(verdict, metrics, plots)


def write_evaluation(evaluation: Evaluation, workspace: Workspace) -> None:
    """Write `verdict.json`, `metrics.json`, its summary and the folder of CSV files."""
    with whole(workspace.plots) as part:
        part.mkdir()
        for name, table in evaluation.plots.items():
            table.write_csv(part / f"{name}.csv")
    write_json(workspace.metrics, evaluation.metrics)
    write_json(workspace.summary, summarise(evaluation.metrics))
    write_json(workspace.verdict, evaluation.verdict)


def summarise(metrics: dict) -> dict:
    """What fits one screen of `dvc metrics show`: verdict, counts, gains, and how well each method finds the damage."""
    damage = metrics.get("damage", {}).get("methods", {})
    return {
        "accepted": metrics["accepted"],
        "dropped": metrics["curation"]["num_dropped"],
        "target": {name: ends["target_loss"]["mean"] for name, ends in metrics["difference"].items()},
        "general": {name: ends["general_loss"]["mean"] for name, ends in metrics["difference"].items()},
        "damage_auc": {method: found["auc"] for method, found in damage.items()},
    }


# The verdict


def paired_comparison(runs: pl.DataFrame, arm: str, control: str, measure: str, *, confidence: float) -> dict:
    """Mean over the seeds of `arm` minus `control`, in nats per token, with its t interval.

    Raises:
        ValueError: the two arms were not trained with the same seeds, with fewer than two, or a loss is not finite.
    """
    pairs = (
        runs.filter(arm=arm).join(runs.filter(arm=control), on="seed", how="full", suffix="_control", coalesce=True).sort("seed")
    )
    differences = pairs.select(pl.col(measure) - pl.col(f"{measure}_control")).to_series()
    unpaired = pairs.filter(differences.is_null() | ~differences.is_finite().fill_null(value=False))["seed"].to_list()
    if unpaired or len(pairs) < 2 or pairs["seed"].n_unique() != len(pairs):
        raise ValueError(
            f"evaluation: expected one finite {measure} of arms {arm} and {control} for each of at least two seeds; "
            f"got {len(pairs)} pairs, without a value in both: seeds {unpaired}; run `dvc repro --single-item --force retraining`"
        )
    low, high = t_interval(differences.to_numpy(), confidence=confidence)
    return {
        "name": f"{arm} minus {control}",
        "arm": arm,
        "control": control,
        "measure": measure,
        "mean_difference": float(differences.mean()),
        "low": low,
        "high": high,
        "num_seeds": len(pairs),
        "per_seed": {str(seed): value for seed, value in zip(pairs["seed"], differences, strict=True)},
    }


def t_interval(values: Float[np.ndarray, " seed"], *, confidence: float) -> tuple[float, float]:
    """The interval that holds the mean with the given confidence if the values are normal; a point if all are equal."""
    half = t.ppf((1 + confidence) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


@dataclass(frozen=True)
class Condition:
    """One condition of the verdict, on a comparison's interval, and what is said if it does not hold."""

    text: str
    comparison: dict
    bound: float
    holds: bool
    uncertain: str  # if the interval reaches above the bound
    refuted: str  # if it lies above it

    @property
    def failure(self) -> str:
        """What is said if the condition does not hold."""
        return self.refuted if self.comparison["low"] > self.bound else self.uncertain


def decide(comparisons: Sequence[dict], *, rule: Rule, changed: bool) -> dict:
    """The verdict on comparisons in the order of `COMPARISONS`; `changed` says whether the curated data differ at all."""
    against_all, against_random, general = comparisons[:3]
    percent = f"{100 * rule.confidence:.6g}%"
    limit = rule.max_general_loss_increase
    conditions = [
        _lower(against_all, "all data"),
        _lower(against_random, "the random control", detail=" of the same size"),
        Condition(
            f"General loss is at most {limit:g} nats per token above that with all data",
            general,
            bound=limit,
            holds=general["high"] <= limit,
            uncertain="the general loss may rise by more than is allowed",
            refuted="the general loss rises by more than is allowed",
        ),
    ]
    accepted = changed and all(condition.holds for condition in conditions)
    seeds = against_all["num_seeds"]
    interval = f"{percent} interval {{low:+.4f}} to {{high:+.4f}}"
    effect = (
        f"Over {seeds} paired seeds, curation changed the loss on unseen targets by "
        f"{against_all['mean_difference']:+.4f} nats per token against all data ({interval.format_map(against_all)}) and by "
        f"{against_random['mean_difference']:+.4f} against the random control ({interval.format_map(against_random)}); "
        f"the general loss changed by {general['mean_difference']:+.4f} ({interval.format_map(general)}, limit {limit:+g})."
    )
    if accepted:
        answer = "The curated data are better for the targets than all data, and better than the same change made at random."
    elif not changed:
        answer = "Nothing was dropped or reweighted, so there is nothing to accept."
    else:
        failures = [condition.failure for condition in conditions if not condition.holds]
        answer = f"Not shown to be better: {'; '.join(failures)}."
    return {
        "accepted": accepted,
        "rule": (
            f"Accept if, over paired seeds, the whole {percent} interval of the change in loss on the unseen half of the targets "
            "is below zero against both all data and the random control of the same size, and the upper end of the interval "
            f"of the change in general held-out loss against all data is at most {limit:g} nats per token."
        ),
        "summary": f"{answer} {effect}",
        "answer": answer,
        "effect": effect,
        "conditions": [{"text": condition.text, "holds": condition.holds} for condition in conditions],
        "confidence": rule.confidence,
        "max_general_loss_increase": limit,
        "comparisons": list(comparisons),
    }


def _lower(comparison: dict, control: str, *, detail: str = "") -> Condition:
    """That the loss on unseen targets is lower than with `control`."""
    return Condition(
        f"Loss on unseen targets is lower than with {control}{detail}",
        comparison,
        bound=0.0,
        holds=comparison["high"] < 0,
        uncertain=f"the gain against {control} is not certain",
        refuted=f"the loss is higher than with {control}",
    )


def _nested_differences(comparisons: Sequence[dict]) -> dict:
    nested: dict = {}
    for comparison in comparisons:
        ends = {"mean": comparison["mean_difference"], "low": comparison["low"], "high": comparison["high"]}
        nested.setdefault(comparison["name"].replace(" ", "_"), {})[comparison["measure"]] = ends
    return nested


# The positive control


def find_damage(
    scores: pl.DataFrame, *, manifest: pl.DataFrame, truth: pl.DataFrame, target_sources: Sequence[str]
) -> tuple[dict, pl.DataFrame, pl.DataFrame]:
    """How much of the damage every `score_METHOD` and the decision find; recall curves by method; the planted documents.

    `auc_target_sources` is among documents of the targets' own sources only, where damage can be told from documents that
    merely do not help the targets.

    Raises:
        ValueError: the scores or the truth are not of the manifest's documents.
    """
    table = scores.join(truth.select(doc_id="id", damaged="damaged", kind="kind"), on="doc_id").join(
        manifest.select("doc_id", "rank", "keep"), on="doc_id"
    )
    if not len(table) == len(scores) == len(manifest):
        raise ValueError(
            f"evaluation: {len(scores)} scores, {len(manifest)} decisions and {len(truth)} rows of truth have {len(table)} "
            "documents in common; expected the truth and the decision of every scored document; run `dvc repro evaluation`"
        )
    table = table.sort("doc_id")
    damaged, kinds = table["damaged"].to_numpy(), table["kind"].to_numpy()
    num_damaged, num_dropped = int(damaged.sum()), int((~table["keep"]).sum())
    near = table["source"].is_in(list(target_sources)).to_numpy()
    inspected = np.linspace(0, len(table), CURVE_POINTS).round().astype(int)
    methods, curves = {}, {"share_inspected": inspected / len(table)}
    for column in (name for name in table.columns if name.startswith("score_")):
        method = column.removeprefix("score_")
        harm = -table[column].cast(pl.Float64).fill_null(math.nan).to_numpy()
        harm = np.where(np.isfinite(harm), harm, -np.inf)  # without a score: inspected last
        order = np.argsort(-harm, kind="stable")  # equal scores by id
        recall = np.concatenate([[0], np.cumsum(damaged[order])]) / num_damaged  # after inspecting so many documents
        methods[method] = _found_by(harm, order, damaged, kinds) | {"recall_at_damaged": float(recall[num_damaged])}
        if 0 < damaged[near].sum() < near.sum():
            methods[method]["auc_target_sources"] = roc_auc(harm[near], damaged[near])
        if num_dropped:
            methods[method]["recall_at_dropped"] = float(recall[num_dropped])
        curves[method] = recall[inspected]
    planted = table.filter("damaged").sort("rank").select("doc_id", "source", "kind", "rank", "keep")
    counts = {
        "num_damaged": num_damaged,
        "num_damaged_dropped": int((~planted["keep"]).sum()),
        "kinds": {kind: int((kinds[damaged] == kind).sum()) for kind in sorted(set(kinds[damaged]))},
        "methods": methods,
    }
    return counts, pl.DataFrame(curves), planted


def _found_by(harm: np.ndarray, order: np.ndarray, damaged: np.ndarray, kinds: np.ndarray) -> dict:
    """The AUC of one method in all and by kind of damage, and by kind the recall after inspecting as many as are damaged."""
    first = kinds[order[: int(damaged.sum())]]
    by_kind = {}
    for kind in sorted(set(kinds[damaged])):
        these = ~damaged | (kinds == kind)  # with the undamaged ones
        recall = float((first == kind).sum() / (kinds[damaged] == kind).sum())
        by_kind[kind] = {"auc": roc_auc(harm[these], damaged[these]), "recall_at_damaged": recall}
    return {"auc": roc_auc(harm, damaged), "kinds": by_kind}


def roc_auc(harm: Float[np.ndarray, " document"], damaged: Bool[np.ndarray, " document"]) -> float:
    """Chance that a damaged document has more harm than an undamaged one, a tie counting half (Mann and Whitney).

    Raises:
        ValueError: all or none are damaged, so there is nothing to compare.
    """
    num_damaged = int(damaged.sum())
    num_pairs = num_damaged * (len(damaged) - num_damaged)
    if not num_pairs:
        raise ValueError(f"evaluation: AUC needs damaged and undamaged documents; got {num_damaged} damaged of {len(damaged)}")
    above = rankdata(harm)[damaged].sum() - num_damaged * (num_damaged + 1) / 2
    return float(above / num_pairs)


def score_histogram(manifest: pl.DataFrame) -> pl.DataFrame:
    """Documents and dropped ones per source and bin of the score: equal widths, an edge at zero, the outermost bins open."""
    scored = manifest.filter(pl.col("score").is_finite())
    if scored.is_empty():
        return pl.DataFrame(
            schema={"source": pl.String, "low": pl.Float64, "high": pl.Float64, "documents": pl.Int64, "dropped": pl.Int64}
        )
    low, high = (float(scored["score"].quantile(q)) for q in (HISTOGRAM_TAIL, 1 - HISTOGRAM_TAIL))
    if low == high:
        low, high = low - 0.5, high + 0.5
    width = (high - low) / HISTOGRAM_BINS
    first, last = math.floor(low / width), math.ceil(high / width) - 1
    place = (pl.col("score") / width).floor().clip(first, max(first, last))
    return (
        scored
        .group_by("source", place.alias("bin"))
        .agg(documents=pl.len().cast(pl.Int64), dropped=(~pl.col("keep")).sum().cast(pl.Int64))
        .sort("source", "bin")
        .select("source", low=pl.col("bin") * width, high=(pl.col("bin") + 1) * width, documents="documents", dropped="dropped")
    )
