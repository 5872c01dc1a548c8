"""An audit: documents' scores compared with limits and with the previous audit; a verdict, a dated page, and a history."""

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from tda import charts
from tda.artifacts import Workspace, whole, write_json, write_table
from tda.charts import power_of_ten, scaled, times_power
from tda.config import Audit, Config
from tda.page import both, document_card, render
from tda.provenance import provenance

PASSED, FAILED, NO_EARLIER, NOTHING_SHARED = "passed", "failed", "no earlier audit", "nothing in common"
CHECKS = {
    "share_unscored": "share of documents without a finite score",
    "share_harmful": "share of documents predicted to harm",
    "share_crossed": "share of documents that crossed the line",
    "source_shift": "largest shift of a source",
}
NUM_CROSSED_SHOWN = 20
MIN_SHIFT_DOCUMENTS = 20  # of a source, now and before; with fewer, chance alone moves the mean by a quarter of a deviation


@dataclass(frozen=True)
class Check:
    """One limit and its outcome; `value` and `previous` are None if there is nothing to measure."""

    name: str
    value: float | int | None
    limit: float | int
    previous: float | int | None  # the same value in the audit before
    status: str  # passed, failed, or why there was nothing to check


@dataclass(frozen=True)
class AuditResult:
    """The verdict of an audit and where its page lies."""

    passed: bool
    summary: str
    checks: list[Check]
    report: Path


def audit(
    config: Config,
    workspace: Workspace,
    *,
    date: str,
    scored: pl.DataFrame,
    counts: dict[str, int],
    quarantine: Sequence[dict],
) -> AuditResult:
    """Judge `scored` (doc_id, content_hash, source, text, score, is_new), and write the audit to a folder named after the date.

    `counts` says what became of the rows of `audit.documents`, and `quarantine` which of them were malformed. A second audit on
    the same date gets the suffix -2. The folder appears whole, then the line of the history; the caller makes sure that two
    audits do not run at once. An invalid date, no documents, or an id that comes twice is a ValueError.
    """
    _refuse(date, scored)
    table = scored.sort("doc_id").with_columns(pl.col("score").cast(pl.Float64).fill_null(math.nan))
    before, earlier = previous_audit(workspace)
    shifts = source_shifts(table, earlier)
    crossed = crossed_documents(table, earlier)
    checks = check_limits(table, shifts=shifts, crossed=crossed, earlier=earlier, before=before, limits=config.audit)
    failed = [check for check in checks if check.status == FAILED]
    name = _free_name(workspace, date)
    num_new = int(table["is_new"].sum())
    facts = {
        "name": name,
        "date": date,
        "passed": not failed,
        "summary": _summary(table, failed, before),
        "checks": [asdict(check) for check in checks],
        "previous": before["name"] if before else None,
        "scope": config.audit.scope,
        "method": config.scores.answering,
        "num_documents": len(table),
        "num_new": num_new,
        "new_documents": counts,
        "num_harmful": int(_harmful(table).sum()),
        "num_new_harmful": int(_harmful(table.filter("is_new")).sum()),
        "sources": shifts.to_dicts(),
        "num_crossed_to_harm": int((crossed["score"] < 0).sum()) if crossed is not None else 0,
        "num_crossed_to_help": int((crossed["score"] >= 0).sum()) if crossed is not None else 0,
        "crossed": crossed.head(NUM_CROSSED_SHOWN).to_dicts() if crossed is not None else [],
    }
    made = provenance(workspace.root)
    history = [
        *read_history(workspace),
        {key: facts[key] for key in ("name", "date", "passed", "summary", "num_documents", "num_harmful", "checks")},
    ]
    with whole(workspace.audits / name) as part:
        part.mkdir()
        write_json(part / "audit.json", facts | {"provenance": made})
        write_table(part / "scores.parquet", table.drop("text"))
        if counts:
            lines = (json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in quarantine)
            (part / "quarantine.jsonl").write_text("".join(lines), encoding="utf-8")
        page = _page(config, facts, table=table, made=made, history=history)
        (part / "index.html").write_text(page, encoding="utf-8")
    _write_history(workspace, history)
    return AuditResult(passed=not failed, summary=facts["summary"], checks=checks, report=workspace.audits / name / "index.html")


def _refuse(date: str, scored: pl.DataFrame) -> None:
    try:
        valid = datetime.date.fromisoformat(date).isoformat() == date
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"audit: expected a date as YYYY-MM-DD, such as 2026-01-31; got {date!r}")
    if scored.is_empty():
        raise ValueError(
            "audit: no documents to audit; expected at least one; with audit.scope: new there may be none, set it to all"
        )
    if scored["doc_id"].n_unique() != len(scored):
        twice = scored.filter(pl.col("doc_id").is_duplicated())["doc_id"].min()
        raise ValueError(f"audit: document {twice} has several scores; expected one row per id")


# History


def read_history(workspace: Workspace) -> list[dict]:
    """An entry per finished audit, the oldest first.

    Raises:
        ValueError: a line is damaged.
    """
    path = _history_path(workspace)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read: {error}; expected an object in each line, as audits write them; remove what is damaged, or "
            "the file, to begin a new history"
        ) from error


def previous_audit(workspace: Workspace) -> tuple[dict, pl.DataFrame] | tuple[None, None]:
    """The facts and the scores of the last finished audit whose scores are still there.

    Raises:
        ValueError: they are damaged.
    """
    folders = [workspace.audits / entry["name"] for entry in read_history(workspace)]
    folder = next((folder for folder in reversed(folders) if (folder / "scores.parquet").exists()), None)
    if folder is None:
        return None, None
    path = folder / "audit.json"
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        path = folder / "scores.parquet"
        return before, pl.read_parquet(path)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"{path} cannot be read: {str(error).splitlines()[0]}; expected the file that the audit wrote; remove the folder "
            f"{folder}, to compare with the audit before it"
        ) from error


def _history_path(workspace: Workspace) -> Path:
    return workspace.audits / "history.jsonl"


def _write_history(workspace: Workspace, history: list[dict]) -> None:
    with whole(_history_path(workspace)) as part:
        part.write_text("".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history), encoding="utf-8")


def _free_name(workspace: Workspace, date: str) -> str:
    name, count = date, 1
    while (workspace.audits / name).exists():
        count += 1
        name = f"{date}-{count}"
    return name


# Checks


def check_limits(
    table: pl.DataFrame,
    *,
    shifts: pl.DataFrame,
    crossed: pl.DataFrame | None,
    earlier: pl.DataFrame | None,
    before: dict | None,
    limits: Audit,
) -> list[Check]:
    """Every limit of `params.yaml`, and that every document has a score."""
    past = {check["name"]: check["value"] for check in before["checks"]} if before else {}
    scored = table.filter(pl.col("score").is_finite())
    values = {
        "share_unscored": (1 - len(scored) / len(table), 0.0),
        "share_harmful": (
            float((scored["score"] < 0).mean()) if len(scored) else None,
            limits.max_share_harmful,
        ),
        "share_crossed": (_share_crossed(crossed, table, earlier), limits.max_share_crossed),
        "source_shift": (shifts.filter("compared")["shift"].abs().max(), limits.max_source_shift),
    }
    nothing = NOTHING_SHARED if before else NO_EARLIER
    return [
        Check(
            name=name,
            value=value,
            limit=limit,
            previous=past.get(name),
            status=nothing if value is None else PASSED if value <= limit else FAILED,
        )
        for name, (value, limit) in values.items()
    ]


def source_shifts(table: pl.DataFrame, earlier: pl.DataFrame | None) -> pl.DataFrame:
    """Number of documents, share harmful, mean score and its shift since the previous audit, per source.

    `shift` is in standard deviations of all earlier scores. `compared` marks sources with enough documents for a limit on it.
    """

    def per_source(scores: pl.DataFrame) -> pl.DataFrame:
        score = pl.col("score")
        return (
            scores
            .filter(score.is_finite())
            .group_by("source")
            .agg(num_documents=pl.len().cast(pl.Int64), share_harmful=(score < 0).mean(), mean=score.mean())
        )

    now = per_source(table)
    if earlier is None:
        none = pl.lit(None, dtype=pl.Float64)
        return now.with_columns(previous_mean=none, shift=none, compared=pl.lit(value=False)).sort("source")
    spread = earlier.filter(pl.col("score").is_finite())["score"].std()
    past = per_source(earlier).select("source", previous_mean="mean", previous_documents="num_documents")
    shift = (pl.col("mean") - pl.col("previous_mean")) / (spread or math.nan)
    enough = pl.min_horizontal("num_documents", pl.col("previous_documents").fill_null(0)) >= MIN_SHIFT_DOCUMENTS
    both = now.join(past, on="source", how="left").with_columns(shift=shift.fill_nan(None), compared=enough)
    return both.drop("previous_documents").sort("source")


def crossed_documents(table: pl.DataFrame, earlier: pl.DataFrame | None) -> pl.DataFrame | None:
    """Unchanged documents whose score has changed its sign, largest change first; None if there is no previous audit."""
    if earlier is None:
        return None
    both = _in_both(table, earlier)
    return (
        both
        .filter((pl.col("score") < 0) != (pl.col("previous_score") < 0))
        .sort((pl.col("score") - pl.col("previous_score")).abs(), "doc_id", descending=[True, False])
        .select("doc_id", "source", "previous_score", "score")
    )


def _in_both(table: pl.DataFrame, earlier: pl.DataFrame) -> pl.DataFrame:
    past = earlier.select("doc_id", "content_hash", previous_score="score")
    both = table.join(past, on=["doc_id", "content_hash"])
    return both.filter(pl.col("score").is_finite() & pl.col("previous_score").is_finite())


def _share_crossed(crossed: pl.DataFrame | None, table: pl.DataFrame, earlier: pl.DataFrame | None) -> float | None:
    if crossed is None or earlier is None:
        return None
    num_both = len(_in_both(table, earlier))
    return len(crossed) / num_both if num_both else None


def _harmful(table: pl.DataFrame) -> pl.Series:
    return table["score"].is_finite() & (table["score"] < 0)


def _summary(table: pl.DataFrame, failed: list[Check], before: dict | None) -> str:
    share = float(_harmful(table).mean())
    count = f"{len(table):,} documents, {int(table['is_new'].sum()):,} of them new; {share:.1%} are predicted to harm the targets"
    if failed:
        reasons = "; ".join(f"{CHECKS[check.name]} {check.value:.3g}, limit {check.limit:.3g}" for check in failed)
        return f"{reasons[0].upper()}{reasons[1:]}. {count}."
    compared = f"compared with the audit {before['name']}" if before else "the first audit, so there is nothing to compare with"
    return f"Every limit is kept. {count}; {compared}."


# The page


def _page(config: Config, facts: dict, *, table: pl.DataFrame, made: dict, history: list[dict]) -> str:
    harmful = table.filter(_harmful(table)).sort("score", "doc_id").head(config.report.num_examples)
    means = [source[key] for source in facts["sources"] for key in ("mean", "previous_mean")]
    crossed = [row[key] for row in facts["crossed"] for key in ("score", "previous_score")]
    exponent = power_of_ten([value for value in [*means, *crossed, *harmful["score"]] if value is not None])
    cards = [
        row | document_card(row["text"]) | {"rank": place, "shown_score": scaled(row["score"], exponent, sign=True)}
        for place, row in enumerate(harmful.to_dicts(), start=1)
    ]
    shares = [(entry["name"], entry["num_harmful"] / entry["num_documents"]) for entry in history]
    return render(
        "audit.html.j2",
        title=f"Audit {facts['name']}",
        facts=facts,
        made=made,
        cards=cards,
        score_unit=times_power(exponent),
        exponent=exponent,
        history=history[::-1],
        trend=both(lambda width: charts.trend(shares, limit=config.audit.max_share_harmful, width=width)),
        words=CHECKS,
        min_shift_documents=MIN_SHIFT_DOCUMENTS,
        limits=config.audit,
    )
