"""The report of a run: the verdict and everything behind it in one HTML file, without scripts or network.

It only shows what other stages have written; nothing is computed here.
"""

import polars as pl

from tda import charts
from tda.artifacts import Workspace, existing, read_json, read_table
from tda.charts import number, power_of_ten, scaled, times_power
from tda.config import SECTIONS_OF_NO_RESULT, Config
from tda.page import both, document_card, flat, label, percent, render, signed, visible
from tda.provenance import provenance

METHOD_NAMES = {
    "source": "SOURCE",
    "averaged_influence": "Averaged influence",
    "ekfac_influence": "EK-FAC influence",
    "gradient_dot": "Gradient dot product",
    "gradient_cosine": "Gradient cosine",
    "bm25": "BM25",
    "random": "Random",
}
OUTCOMES = {
    "dropped": "Among the most harmful, within every limit.",
    "kept, predicted to help": "Its score is not negative. Such a document is never dropped, whatever the share to drop.",
    "kept, above the threshold": "Its score is not below curation.threshold.",
    "kept, past the limit": "Predicted to harm, but curation.drop was used up by more harmful ones.",
    "kept, cap of its source": "Predicted to harm, but curation.max_share_per_source of its source was reached.",
    "kept, no score": "Its score is not a finite number, so nothing is known against it.",
    "reweighted": "Its weight follows the rank of its score.",
}
PREPARATION = [  # title, place in prepare.json
    ("Rows read", "read.rows"),
    ("Quarantined as malformed", "quarantined"),
    ("Too short", "too_short"),
    ("Exact duplicates", "exact_duplicates"),
    ("Near duplicates", "near_duplicates"),
    ("Training rows", "tokens.documents.documents"),
    ("Training tokens", "tokens.documents.total"),
    ("Damaged on purpose", "damaged"),
    ("Target rows", "tokens.targets.documents"),
    ("Held-out rows", "tokens.heldout.documents"),
    ("Vocabulary", "vocabulary"),
]
SOURCES_SHOWN = 12


def build_report(workspace: Workspace, config: Config) -> str:
    """The page of a finished run; a missing artifact is an error that names the stage that makes it."""
    manifest = read_table(workspace.manifest, stage="curation")
    verdict = read_json(workspace.verdict, stage="evaluation")
    metrics = read_json(workspace.metrics, stage="evaluation")
    counts = read_json(workspace.curation, stage="curation")
    training = read_json(workspace.training, stage="train")
    histogram = _plot(workspace, "scores_by_source")
    examples, exponent = _examples(workspace, config, manifest)
    axis = power_of_ten([*histogram["low"], *histogram["high"]])
    return render(
        "report.html.j2",
        title=config.report.title,
        config=config,
        verdict=verdict,
        metrics=metrics,
        counts=counts,
        training=training,
        tiles=_tiles(verdict, metrics, counts, config),
        confidence=_confidence(verdict),
        retraining=_retraining(workspace, verdict),
        curves=_training_curves(workspace, training),
        histogram=both(lambda width: charts.histogram(histogram, width=width, unit=times_power(axis), exponent=axis))
        if len(histogram)
        else "",
        sources=_sources(counts, histogram),
        outcomes=[
            (name, count, OUTCOMES.get(name, "")) for name, count in sorted(counts["outcomes"].items(), key=lambda item: -item[1])
        ],
        examples=examples,
        score_unit=times_power(exponent),
        damage=_damage(workspace, metrics, config),
        preparation=_preparation(read_json(workspace.preparation, stage="prepare")),
        limits=_limits(config, training, verdict),
        parameters=flat(config.model_dump(exclude=SECTIONS_OF_NO_RESULT)),
        stores=[read_json(workspace.gradients(index), stage="gradients") for index in config.train.checkpoints],
        made=provenance(workspace.root),
        method=method_name(config.curation.method),
        sources_shown=SOURCES_SHOWN,
    )


# Parts of the page


def method_name(method: str) -> str:
    """A scoring method as people call it."""
    return METHOD_NAMES.get(method, label(method))


def _confidence(verdict: dict) -> str:
    """As a percentage, all its digits: 99.5% is not 100%."""
    return f"{100 * verdict['confidence']:.6g}%"


def _plot(workspace: Workspace, name: str) -> pl.DataFrame:
    text = [] if name == "recall_curve" else ["source", "doc_id", "kind"]  # there, columns are methods, such as source
    path = existing(workspace.plots / f"{name}.csv", stage="evaluation")
    return pl.read_csv(path, schema_overrides=dict.fromkeys(text, pl.String), infer_schema_length=None)


def _tiles(verdict: dict, metrics: dict, counts: dict, config: Config) -> list[dict]:
    """The key numbers, each with what it means."""
    against_all, against_random, general = verdict["comparisons"][:3]
    confidence = _confidence(verdict)

    def change(c: dict, title: str, good: bool, also: str = "") -> dict:
        note = f"{confidence} interval {signed(c['low'])} to {signed(c['high'])}{also}"
        return _tile(title, signed(c["mean_difference"]), unit="nats per token", note=note, good=good)

    base = metrics["retraining"]["all"]["target_loss"]
    relative = f" ({number(100 * against_all['mean_difference'] / base, 2, sign=True)}%)" if base else ""
    tiles = [
        change(against_all, "Loss on unseen targets, against all data", against_all["high"] < 0, relative),
        change(against_random, "Loss on unseen targets, against the random control", against_random["high"] < 0),
        change(general, "General held-out loss, against all data", general["high"] <= verdict["max_general_loss_increase"]),
    ]
    total, dropped = counts["num_documents"], counts["num_dropped"]
    if config.curation.action == "drop":
        tiles.append(_tile("Documents dropped", f"{dropped:,}", unit=f"of {total:,}", note=percent(dropped / total)))
    else:
        note = f"weights from {config.curation.min_weight:g} to {config.curation.max_weight:g}, mean 1"
        tiles.append(_tile("Documents reweighted", f"{total:,}", note=note))
    harmful = percent(counts["num_harmful"] / total)
    tiles.append(_tile("Predicted to harm", harmful, unit="of documents", note="score below zero"))
    found = metrics.get("damage", {}).get("methods", {}).get(config.curation.method)
    if found:
        note = f"{metrics['damage']['num_damaged']:,} planted; 0.5 is chance, 1 is perfect"
        tiles.append(_tile("Planted damage, ROC AUC", f"{found['auc']:.3f}", note=note))
    return tiles


def _tile(title: str, value: str, *, note: str, unit: str = "", good: bool | None = None) -> dict:
    """A key number; `good` says whether it speaks for the curated data, if it speaks at all."""
    return {"title": title, "value": value, "unit": unit, "note": note, "good": good}


def _retraining(workspace: Workspace, verdict: dict) -> dict:
    runs = read_table(workspace.retraining, stage="retraining")
    parts = []
    for measure, title in (("target_loss", "Loss on unseen targets"), ("general_loss", "General held-out loss")):
        of_measure = [c for c in verdict["comparisons"] if c["measure"] == measure]
        limit = verdict["max_general_loss_increase"] if measure == "general_loss" else None
        parts.append({
            "title": title,
            "arms": charts.arms(runs, measure, title=title),
            "intervals": charts.intervals(of_measure, title=title, limit=limit),
            "comparisons": of_measure,
        })
    arms = runs.group_by("arm").agg(
        pl.col("num_documents").mean().round().cast(pl.Int64), pl.col("steps").max(), pl.len().alias("models")
    )
    return {
        "parts": parts,
        "arms": arms.sort("arm").to_dicts(),
        "same_steps": runs["steps"].n_unique() == 1,
        "arm_names": charts.ARMS,
    }


def _training_curves(workspace: Workspace, training: dict) -> dict:
    trajectory = read_table(workspace.trajectory, stage="train", columns=["step", "loss", "learning_rate"])
    segments = read_json(workspace.segments, stage="segments")["segments"]
    steps = training["checkpoint_steps"]
    return {"chart": both(lambda width: charts.training(trajectory, segments, steps, width=width)), "segments": segments}


def _sources(counts: dict, histogram: pl.DataFrame) -> list[dict]:
    """A row per source, the largest first."""
    x_range = (float(histogram["low"].min()), float(histogram["high"].max())) if len(histogram) else (0.0, 1.0)
    rows = []
    for name, of_source in sorted(counts["sources"].items(), key=lambda item: (-item[1]["num_documents"], item[0])):
        bins = histogram.filter(source=name)
        strip = charts.strip(bins, source=visible(name), x_range=x_range) if len(bins) else ""
        rows.append({
            "name": name,
            **of_source,
            "capped": of_source["outcomes"].get("kept, cap of its source", 0),
            "strip": strip,
        })
    return rows


def _examples(workspace: Workspace, config: Config, manifest: pl.DataFrame) -> tuple[list[dict], int]:
    """The most harmful and the most helpful documents with their text, and the power of ten in which their scores are shown."""
    ranked = manifest.filter(pl.col("score").is_finite()).sort("rank")
    count = config.report.num_examples
    harmful = ranked.filter(pl.col("score") < 0).head(count)
    helpful = ranked.filter(pl.col("score") > 0).tail(count).reverse()
    chosen = pl.concat([harmful, helpful])["doc_id"]
    exponent = power_of_ten(pl.concat([harmful, helpful])["score"].to_numpy())
    texts = dict(
        read_table(workspace.documents, stage="prepare", columns=["id", "text"])
        .filter(pl.col("id").is_in(chosen.implode()))
        .rows()
    )
    planted = (
        dict(_plot(workspace, "planted").select("doc_id", "kind").rows()) if (workspace.plots / "planted.csv").exists() else {}
    )
    affected = _affected_targets(workspace, config, chosen)

    def cards(part: pl.DataFrame) -> list[dict]:
        return [
            row
            | document_card(texts.get(row["doc_id"], ""))
            | {"shown_score": scaled(row["score"], exponent, sign=True), "planted": planted.get(row["doc_id"], "")}
            | {"targets": affected.get(row["doc_id"])}
            for row in part.to_dicts()
        ]

    groups = [
        {"id": "harmful", "title": "Most harmful documents", "verb": "harms", "cards": cards(harmful)},
        {"id": "helpful", "title": "Most helpful documents", "verb": "helps", "cards": cards(helpful)},
    ]
    return groups, exponent


def _affected_targets(workspace: Workspace, config: Config, doc_ids: pl.Series) -> dict[str, dict]:
    """By SOURCE, which scores every target: how many of them each document harms, and the two it changes most."""
    if config.curation.method not in {"source", "averaged_influence"}:
        return {}
    queries = read_json(workspace.scoring, stage="scores")["query_ids"]
    table = read_table(workspace.query_scores, stage="scores").filter(pl.col("doc_id").is_in(doc_ids.implode()))
    affected = {}
    for doc_id, values in table.rows():
        order = sorted(range(len(queries)), key=lambda place: (values[place], place))
        affected[doc_id] = {
            "harmed": sum(value < 0 for value in values),
            "helped": sum(value > 0 for value in values),
            "total": len(queries),
            "most_harmed": queries[order[0]],
            "most_helped": queries[order[-1]],
        }
    return affected


def _preparation(stats: dict) -> dict:
    """The counts of `prepare` in the order of its work, its documents by source, and everything it counted."""

    def count(path: str) -> int | None:
        value = stats
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return sum(value.values()) if isinstance(value, dict) else value

    groups = [(name, stats.get(name, {})) for name in ("documents", "targets", "heldout")]
    names = sorted({source for _, group in groups for source in group})
    return {
        "counts": [(title, found) for title, path in PREPARATION if (found := count(path)) is not None],
        "sources": [(source, *(sum(group.get(source, {}).values()) for _, group in groups)) for source in names],
        "everything": flat(stats),
    }


def _damage(workspace: Workspace, metrics: dict, config: Config) -> dict | None:
    """The positive control; None when nothing was planted."""
    if "damage" not in metrics:
        return None
    damage = metrics["damage"]
    methods = sorted(damage["methods"], key=lambda method: (method != config.curation.method, -damage["methods"][method]["auc"]))
    styles = charts.method_styles(methods, decided_by=config.curation.method)
    total = metrics["curation"]["num_documents"]
    return damage | {
        "chart": charts.recall(_plot(workspace, "recall_curve"), styles=styles, share_damaged=damage["num_damaged"] / total),
        "rows": [
            {
                "name": method_name(method),
                "key": charts.key(styles[method]),
                "decides": method == config.curation.method,
                **damage["methods"][method],
            }
            for method in methods
        ],
        "share": damage["num_damaged"] / total,
    }


def _limits(config: Config, training: dict, verdict: dict) -> list[tuple[str, str]]:
    """What is approximated in this run, and what its verdict does not say."""
    seeds = verdict["comparisons"][0]["num_seeds"]
    control = "when the planted damage is found no better than by chance, " if config.prepare.damage else ""
    limits = [
        (
            "Scores are first-order predictions.",
            "They say what leaving out one document would do. Many documents leaving together can do less or more; that is why "
            "the verdict comes from retraining and not from the scores.",
        ),
        (
            "Curvature is approximated.",
            "EK-FAC treats layers as independent and each layer's curvature as diagonal in a Kronecker basis, and a training "
            "segment's curvature and gradients as constant.",
        ),
        (
            "Gradients are projected.",
            f"Each side of a layer's gradient is projected to at most rank {config.gradients.rank} "
            f"({config.gradients.projection}) and stored as {config.gradients.dtype}; what lies outside is not seen. "
            "Embeddings and normalisation layers are not tracked.",
        ),
    ]
    if training["optimizer"] == "adamw":
        limits.append(_adam_limit(config.curvature.adam))
    if config.prepare.damage:
        limits.append((
            "The planted damage is part of the result.",
            f"{config.prepare.damage:.0%} of the training documents were damaged on purpose, and dropping them may be all that "
            "helped. To judge your own corpus alone, set prepare.damage: 0 and run again.",
        ))
    limits += [
        (
            "The verdict is about this model and this recipe.",
            f"It rests on {seeds} seeds of a model with {training['num_parameters']:,} parameters. The t interval assumes "
            "that paired differences are roughly normal; it does not cover the choice of targets or of the split of the data.",
        ),
        (
            "Do not trust the scores",
            f"when the training loss has not settled or diverged, {control}or when the target set does not look like what the "
            "model is for.",
        ),
    ]
    return limits


def _adam_limit(adam: str) -> tuple[str, str]:
    if adam == "none":
        return (
            "The optimizer is ignored.",
            "The run used AdamW, and curvature.adam is none: scores are as if it had been plain gradient descent.",
        )
    how = "one number per layer" if adam == "scalar" else "its symmetric form"
    return "The optimizer is approximated.", f"AdamW's preconditioner enters as {how}, constant over a segment."
