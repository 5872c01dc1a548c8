"""From scores to a decision on every document: keep, drop or weight it, with the reason in words."""

import math

import numpy as np
import polars as pl
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import rankdata

from tda.config import Curation

MANIFEST = ["doc_id", "content_hash", "source", "score", "rank", "keep", "weight", "reason"]
CURATED = ["id", "source", "part", "text", "prompt", "completion", "weight"]


def curate(scores: pl.DataFrame, config: Curation) -> pl.DataFrame:
    """The manifest, a row per document of `scores` (doc_id, content_hash, source, score), most harmful first.

    `rank` counts from 1; equal scores are ranked by id, and a document without a finite score comes last and is kept with
    weight 1. What stands in `reason` before the first colon is one of a few outcomes that `count_decisions` counts.

    Raises:
        ValueError: there are no documents, an id comes twice, or the settings contradict each other.
    """
    if scores.is_empty():
        raise ValueError("curation: no documents to decide on; expected at least one row in scores; run `dvc repro scores`")
    if scores["doc_id"].n_unique() != len(scores):
        twice = scores.filter(pl.col("doc_id").is_duplicated())["doc_id"].min()
        raise ValueError(
            f"curation: document {twice} has several scores; expected one row per id; run "
            "`dvc repro --single-item --force scores`"
        )
    score = pl.col("score").cast(pl.Float64)
    ranked = (
        scores
        .with_columns(score.fill_null(math.nan).alias("score"))
        .with_columns(scored=pl.col("score").is_finite())
        .sort("scored", pl.when("scored").then("score"), "doc_id", descending=[True, False, False])
        .with_row_index("rank", offset=1)
        .with_columns(pl.col("rank").cast(pl.Int64))
    )
    decided = _drop(ranked, config) if config.action == "drop" else _reweight(ranked, config)
    return decided.select(MANIFEST)


def drop_limit(num_documents: int, drop: float) -> int:
    """How many documents `curation.drop` lets go: a share of all below 1, from 1 a count."""
    if drop < 1:
        return math.floor(drop * num_documents + 1e-9)  # 0.1 of 30 is 3, whatever the floating point says
    return min(int(drop), num_documents)


def _drop(ranked: pl.DataFrame, config: Curation) -> pl.DataFrame:
    """The most harmful documents out: below the line, within their source's cap, up to the limit."""
    limit = drop_limit(len(ranked), config.drop)
    line = 0.0 if config.threshold is None else config.threshold
    share = config.max_share_per_source
    below = pl.col("scored") & (pl.col("score") < line)
    cap = (pl.len().over("source") * share + 1e-9).floor()
    place = _place(len(ranked))
    outcome = (
        pl
        .when("dropped")
        .then(pl.concat_str(pl.lit("dropped: "), place))
        .when(~pl.col("scored"))
        .then(pl.lit("kept, no score: its score is not a finite number"))
        .when(~pl.col("below"))
        .then(
            pl.concat_str(pl.lit(f"kept, {'predicted to help' if config.threshold is None else 'above the threshold'}: "), place)
        )
        .when(~pl.col("within_cap") & pl.col("open"))
        .then(
            pl.concat_str(
                pl.lit("kept, cap of its source: "), place, pl.lit(f"; {share:.0%} of source "), "source", pl.lit(" reached")
            )
        )
        .otherwise(pl.concat_str(pl.lit("kept, past the limit: "), place, pl.lit(f"; {limit} may be dropped")))
    )
    return (
        ranked
        .with_columns(below=below)
        .with_columns(within_cap=pl.col("below").cum_sum().over("source", order_by="rank") <= cap)
        .with_columns(candidate=pl.col("below") & pl.col("within_cap"))
        .with_columns(dropped=pl.col("candidate") & (pl.col("candidate").cum_sum() <= limit))
        .with_columns(open=pl.col("dropped").cum_sum() < limit)  # but for its source's cap, the document would go
        .with_columns(keep=~pl.col("dropped"), weight=(~pl.col("dropped")).cast(pl.Float64), reason=outcome)
    )


def _reweight(ranked: pl.DataFrame, config: Curation) -> pl.DataFrame:
    """A weight for every document by its score's place among all."""
    weights = np.ones(len(ranked))
    scored = ranked["scored"].to_numpy()
    weights[scored] = rank_weights(
        ranked.filter("scored")["score"].to_numpy(), min_weight=config.min_weight, max_weight=config.max_weight
    )
    place = _place(len(ranked))
    return ranked.with_columns(weight=pl.Series(weights), keep=pl.lit(value=True)).with_columns(
        reason=pl
        .when(~pl.col("scored"))
        .then(pl.lit("kept, no score: its score is not a finite number, weight 1"))
        .otherwise(pl.concat_str(pl.lit("reweighted: "), place, pl.lit(", weight "), pl.col("weight").round(3)))
    )


def rank_weights(
    scores: Float[np.ndarray, " document"], *, min_weight: float, max_weight: float
) -> Float[np.ndarray, " document"]:
    """Weights between the bounds, rising with the score, with mean 1 over the documents.

    `min + (max - min) u^p`, where u in (0, 1) is the score's rank as a share (equal scores share theirs) and the power p is
    what makes the mean 1. Ranks, because a few documents' scores are far larger than the rest and would use up the bounds.
    """
    if len(scores) == 0 or min_weight == 1 or max_weight == 1:
        return np.ones(len(scores))
    share = (rankdata(scores) - 0.5) / len(scores)

    def weights(log_power: float) -> np.ndarray:
        return min_weight + (max_weight - min_weight) * share ** np.exp(log_power)

    def excess(log_power: float) -> float:
        return float(weights(log_power).mean()) - 1

    log_power = brentq(excess, -50.0, 50.0, xtol=1e-14) if excess(-50.0) * excess(50.0) < 0 else -50.0
    return np.clip(weights(log_power), min_weight, max_weight)


def _place(num_documents: int) -> pl.Expr:
    score = pl.col("score").map_elements(lambda value: f"{value:.3g}", return_dtype=pl.String)
    return pl.concat_str(pl.lit("rank "), "rank", pl.lit(f" of {num_documents}, score "), score)


def count_decisions(manifest: pl.DataFrame) -> dict:
    """Counts of the decision, of its outcomes and of every source, for `curation.json` and the report."""
    outcome = pl.col("reason").str.extract(r"^([^:]*)", 1)
    table = manifest.with_columns(outcome=outcome, harmful=pl.col("score").is_finite() & (pl.col("score") < 0))

    def counts(part: pl.DataFrame) -> dict:
        return {
            "num_documents": len(part),
            "num_harmful": int(part["harmful"].sum()),
            "num_dropped": int((~part["keep"]).sum()),
            "mean_weight": float(part["weight"].mean()),
            "outcomes": dict(sorted(part["outcome"].value_counts().iter_rows())),
        }

    sources = table.partition_by("source", as_dict=True)
    return {**counts(table), "sources": {name: counts(part) for (name,), part in sorted(sources.items())}}


def curated_documents(documents: pl.DataFrame, manifest: pl.DataFrame) -> pl.DataFrame:
    """The kept documents with their weights, in the order of `documents`.

    Raises:
        ValueError: the manifest does not decide on exactly these documents with this content, or nothing is kept.
    """
    decided = manifest.select("doc_id", "content_hash", "keep", "weight")
    joined = documents.join(decided, left_on=["id", "content_hash"], right_on=["doc_id", "content_hash"], maintain_order="left")
    if not len(joined) == len(documents) == len(manifest):
        raise ValueError(
            f"curation: the manifest decides on {len(manifest)} documents, documents.parquet has {len(documents)}, "
            f"{len(joined)} agree in id and content; expected the same ones; run `dvc repro curation`"
        )
    kept = joined.filter("keep").select(CURATED)
    if kept.is_empty():
        raise ValueError("curation: every document is dropped; expected some to be kept; lower curation.drop in params.yaml")
    return kept
