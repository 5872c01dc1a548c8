"""A workspace with every artifact that the report and the audit read, plausible and made in a second, without a model."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import xxhash

from tda.artifacts import Workspace, write_json, write_table
from tda.baselines import random_scores
from tda.config import Config, load_config
from tda.curate import count_decisions, curate
from tda.evaluate import evaluate, write_evaluation

PARAMS = Path(__file__).parent.parent / "params.yaml"
SOURCES = {
    "python": 0.42,
    "numpy": 0.2,
    "scipy": 0.14,
    "polars": 0.1,
    "jinja2": 0.06,
    "tqdm": 0.04,
    "click": 0.03,
    "packaging": 0.01,
}
KINDS = ["shuffled words", "wrong pairing", "encoding damage", "boilerplate"]
STEPS, STAGE_ENDS, CHECKPOINT_STEPS = 620, [210, 620], [105, 210, 312, 415, 517, 620]
_SENTENCES = """
Return the elements of the array that satisfy a condition.|The default is None, in which case the axis is flattened.
|Raises ValueError if the two sequences differ in length.|This is a low-level function; most callers want open() instead.
|If the file does not exist it is created with mode 0o666.|See also: reshape, ravel, and the notes on broadcasting below.
|The callback is called once for each item, in the order of the input.|Changed in version 3.11: the argument is now keyword-only.
|Two objects that compare equal also have the same hash value.|Missing values are ignored unless skipna is false."""
SENTENCES = [sentence.strip() for sentence in _SENTENCES.split("|")]


@dataclass(frozen=True)
class Fake:
    """The workspace and the configuration it was made with."""

    workspace: Workspace
    config: Config


def fake_workspace(
    root: Path,
    *,
    num_documents: int = 600,
    damage: float = 0.1,
    gain: float = 0.04,
    action: str = "drop",
    texts: tuple[str, ...] = (),
) -> Fake:
    """All artifacts below `root`; `texts` become the most harmful documents, `gain` is what curation lowers the loss by."""
    config = load_config(PARAMS)
    config = config.model_copy(
        update={
            "prepare": config.prepare.model_copy(update={"damage": damage}),
            "curation": config.curation.model_copy(update={"action": action, "max_share_per_source": 0.25}),
        }
    )
    random = np.random.default_rng(0)
    workspace = Workspace(root)
    documents, truth = _documents(random, num_documents, damage, texts)
    write_table(workspace.documents, documents)
    targets = documents.head(40).with_columns(
        id=pl.concat_str(pl.lit("target/"), "id"), half=pl.Series(["score", "verdict"] * 20)
    )
    write_table(workspace.targets, targets)
    write_json(workspace.preparation, _preparation(documents))

    trajectory = _train(workspace, random, documents)
    scores = _scores(random, documents, truth, texts)
    write_table(workspace.scores, scores)
    queries = targets.filter(half="score")["id"].to_list()
    per_query = scores["score_source"].to_numpy()[:, None] + 2e-6 * random.standard_normal((num_documents, len(queries)))
    array = pl.Series(per_query.astype(np.float32), dtype=pl.Array(pl.Float32, len(queries)))
    write_table(workspace.query_scores, pl.DataFrame({"doc_id": scores["doc_id"], "scores": array}))
    write_json(workspace.scoring, {"query_ids": queries, "layers": 28, "rank": 16})

    manifest = curate(scores.select("doc_id", "content_hash", "source", score="score_source"), config.curation)
    write_table(workspace.manifest, manifest)
    write_json(workspace.curation, count_decisions(manifest))
    runs = _runs(random, gain, num_documents, int(manifest["keep"].sum()))
    write_table(workspace.retraining, runs)
    write_evaluation(
        evaluate(
            runs,
            scores=scores,
            manifest=manifest,
            trajectory=trajectory,
            truth=truth,
            target_sources=list(SOURCES)[:2],
            rule=config.evaluation,
        ),
        workspace,
    )
    (root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  prepare:\n    cmd: tda prepare\n  report:\n    cmd: tda report\n", encoding="utf-8"
    )
    return Fake(workspace, config)


def _documents(
    random: np.random.Generator, count: int, damage: float, texts: tuple[str, ...]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    sources = random.choice(list(SOURCES), size=count, p=list(SOURCES.values()))
    rows = []
    for number, source in enumerate(sources):
        body = " ".join(random.choice(SENTENCES, size=random.integers(2, 14)))
        text = texts[number] if number < len(texts) else f"{source}.function_{number}\n\n{body}"
        rows.append({"id": f"{source}/function_{number:04}", "source": str(source), "text": text})
    hashes = [xxhash.xxh3_128_hexdigest(row["text"].encode()) for row in rows]
    documents = pl.DataFrame(rows).with_columns(
        part=pl.when(pl.col("source") == "python").then(pl.lit("general")).otherwise(pl.lit("mixed")),
        prompt=pl.lit(""),
        completion=pl.lit(""),
        content_hash=pl.Series(hashes),
        tokens=pl.Series([[1, 2, 3]] * count, dtype=pl.List(pl.Int32)),
        loss_start=pl.lit(1, dtype=pl.Int32),
        num_tokens=pl.lit(3, dtype=pl.Int32),
    )
    damaged = random.random(count) < damage
    kinds = np.where(damaged, random.choice(KINDS, size=count), "")
    return documents, pl.DataFrame({"id": documents["id"], "damaged": damaged, "kind": kinds})


def _preparation(documents: pl.DataFrame) -> dict:
    sources = dict(sorted(documents["source"].value_counts().iter_rows()))
    return {
        "read": {"rows": 5210, "target_rows": 0, "ids_made": 0},
        "quarantined": {"not valid JSON": 3},
        "too_short": 402,
        "exact_duplicates": 211,
        "near_duplicates": 160,
        "damaged": {kind: len(documents) // 40 for kind in KINDS},
        "documents": {source: {"mixed": count} for source, count in sources.items()},
        "targets": {"numpy": {"score": 20, "verdict": 20}},
        "heldout": {"python": {"general": 200}},
        "tokens": {"documents": {"documents": len(documents), "total": 61 * len(documents), "median": 50.5}},
        "vocabulary": 2048,
    }


def _train(workspace: Workspace, random: np.random.Generator, documents: pl.DataFrame) -> pl.DataFrame:
    steps = np.arange(1, STEPS + 1)
    loss = (
        2.6
        + 5 * np.exp(-steps / 60)
        + 0.5 * (steps > STAGE_ENDS[0]) * np.exp(-(steps - STAGE_ENDS[0]) / 90)
        + random.normal(0, 0.1, STEPS)
    )
    rate = 0.003 * np.minimum(steps / 31, 0.5 * (1 + np.cos(np.pi * steps / STEPS)))
    stage = (steps > STAGE_ENDS[0]).astype(np.int64)
    trajectory = pl.DataFrame({"step": steps, "learning_rate": rate, "stage": stage, "loss": loss})
    write_table(workspace.trajectory, trajectory)
    write_json(
        workspace.training,
        {
            "num_parameters": 731_520,
            "num_trained_parameters": 731_520,
            "num_documents": len(documents),
            "num_tokens": 3 * len(documents),
            "num_steps": STEPS,
            "checkpoint_steps": CHECKPOINT_STEPS,
            "stage_ends": STAGE_ENDS,
            "stage_parts": ["general", "mixed"],
            "optimizer": "adamw",
            "first_loss": float(loss[0]),
            "final_loss": float(loss[-20:].mean()),
        },
    )
    ends = [0, *CHECKPOINT_STEPS[1::2]]
    segments = [
        {
            "index": index,
            "checkpoints": [2 * index, 2 * index + 1],
            "first_step": ends[index] + 1,
            "last_step": ends[index + 1],
            "num_steps": ends[index + 1] - ends[index],
            "mean_learning_rate": float(rate[ends[index] : ends[index + 1]].mean()),
        }
        for index in range(3)
    ]
    write_json(workspace.segments, {"by": "stages", "segments": segments})
    for checkpoint in range(6):
        digest = xxhash.xxh3_128_hexdigest(str(checkpoint).encode())
        manifest = {
            "table": "gradients",
            "tag": f"run-{digest[:12]}",
            "digest": digest,
            "rows": len(documents),
            "checkpoint": checkpoint,
        }
        write_json(workspace.gradients(checkpoint), manifest)
    return trajectory


def _scores(random: np.random.Generator, documents: pl.DataFrame, truth: pl.DataFrame, texts: tuple[str, ...]) -> pl.DataFrame:
    count, damaged = len(documents), truth["damaged"].to_numpy()
    source = (random.standard_t(3, count) * 1.5 + 0.8 - 2.6 * damaged + 0.5 * (documents["source"] == "numpy").to_numpy()) * 1e-6
    source[: len(texts)] = -1e-4 + 1e-6 * np.arange(len(texts))
    columns = {
        "averaged_influence": source,
        "source": source * 1.1 + random.normal(0, 1e-7, count),
        "ekfac_influence": source * 900 + random.normal(0, 1.5e-3, count),
        "gradient_dot": source * 4e4 + random.normal(0, 0.13, count),
        "gradient_cosine": np.tanh(source * 2e4) + random.normal(0, 0.07, count),
        "bm25": np.abs(random.normal(3, 1, count)),
        "random": random_scores(documents["id"].to_list(), seed=0),
    }
    return documents.select(doc_id="id", content_hash="content_hash", source="source").with_columns(**{
        f"score_{method}": pl.Series(values) for method, values in columns.items()
    })


def _runs(random: np.random.Generator, gain: float, num_documents: int, num_kept: int) -> pl.DataFrame:
    rows = []
    for seed in range(5):
        of_seed = random.normal(0, 0.012)
        for arm, shift in (("all", 0.0), ("curated", -gain), ("random", 0.008)):
            noise = random.normal(0, 0.006, 2)
            losses = {
                "train_loss": 2.6,
                "target_loss": 2.91 + of_seed + shift + noise[0],
                "general_loss": 3.02 + of_seed + shift / 8 + noise[1],
            }
            rows.append({
                "arm": arm,
                "seed": seed,
                "steps": STEPS,
                "num_documents": num_documents if arm == "all" else num_kept,
                **losses,
            })
    return pl.DataFrame(rows)


def scored_documents(fake: Fake, *, shift: float = 0.0, flipped: float = 0.0, num_new: int = 0) -> pl.DataFrame:
    """What scoring for an audit returns: all scores moved by `shift`, a share of them with the other sign."""
    table = pl.read_parquet(fake.workspace.scores).select("doc_id", "content_hash", "source", score="score_source")
    table = table.join(pl.read_parquet(fake.workspace.documents).select("text", doc_id="id"), on="doc_id", maintain_order="left")
    flip = np.arange(len(table)) < flipped * len(table)
    new = pl.Series(np.arange(len(table)) < num_new)
    return table.with_columns((pl.col("score") + shift) * pl.Series(np.where(flip, -1.0, 1.0))).with_columns(is_new=new)


def json_at(path: Path) -> dict:
    """The JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))
