import json

import numpy as np
import polars as pl
import pytest
from scipy import stats

from tda.artifacts import Workspace
from tda.config import Evaluation as Rule
from tda.evaluate import evaluate, paired_comparison, roc_auc, score_histogram, summarise, t_interval, write_evaluation

TARGET_SOURCES = ["s1"]
RULE = Rule(confidence=0.95, max_general_loss_increase=0.02)
NOISE = np.array([0.0, 0.001, -0.001, 0.002, -0.002])


def retraining(*, target: float, random: float = 0.0, general: float = 0.0) -> pl.DataFrame:
    """Runs whose curated arm differs from all by `target` and `general`, up to noise."""
    shifts = {"all": (0.0, 0.0), "curated": (target, general), "random": (random, 0.0)}
    return pl.DataFrame([
        {
            "arm": arm,
            "seed": seed,
            "target_loss": 3 + seed + a + NOISE[seed] * (arm == "curated"),
            "general_loss": 4.0 + seed + b + NOISE[seed] * (arm == "curated"),
        }
        for arm, (a, b) in shifts.items()
        for seed in range(5)
    ])


def decision(num_documents: int = 20, num_dropped: int = 4) -> pl.DataFrame:
    rank = np.arange(num_documents)
    return pl.DataFrame({
        "doc_id": [f"d{number:02}" for number in rank],
        "content_hash": "h",
        "source": [f"s{number % 2}" for number in rank],
        "score": (rank - 8.0) * 1e-6,
        "rank": rank + 1,
        "keep": rank >= num_dropped,
        "weight": (rank >= num_dropped).astype(float),
        "reason": "",
    })


def truth(damaged: list[int], num_documents: int = 20) -> pl.DataFrame:
    rows = np.arange(num_documents)
    return pl.DataFrame({
        "id": [f"d{number:02}" for number in rows],
        "damaged": np.isin(rows, damaged),
        "kind": ["shuffled" if row in damaged[::2] else "encoding" if row in damaged else "" for row in rows],
    })


def judged(runs: pl.DataFrame, manifest: pl.DataFrame | None = None, damage: pl.DataFrame | None = None):
    manifest, damage = decision() if manifest is None else manifest, truth([]) if damage is None else damage
    scores = manifest.select(
        "doc_id", "content_hash", "source", score_source="score", score_bm25=-pl.col("score"), score_random=pl.lit(0.0)
    )
    trajectory = pl.DataFrame({"step": [2, 1], "stage": [0, 0], "loss": [2.0, 3.0], "learning_rate": [0.1, 0.1]})
    return evaluate(
        runs, scores=scores, manifest=manifest, trajectory=trajectory, truth=damage, target_sources=TARGET_SOURCES, rule=RULE
    )


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(0).normal(size=7)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert t_interval(values, confidence=0.9) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_differences_are_paired_by_seed_in_any_order():
    runs = retraining(target=-0.1).sample(fraction=1.0, shuffle=True, seed=1)
    comparison = paired_comparison(runs, "curated", "all", "target_loss", confidence=0.95)
    assert comparison["mean_difference"] == pytest.approx(-0.1)
    assert comparison["per_seed"] == pytest.approx({str(seed): -0.1 + NOISE[seed] for seed in range(5)})
    assert comparison["high"] - comparison["low"] < 0.01  # unpaired, the seeds' spread alone would make it about 4


@pytest.mark.parametrize(
    ("runs", "accepted", "said"),
    [
        (retraining(target=-0.1), True, "better for the targets than all data"),
        (
            retraining(target=0.1),
            False,
            "Not shown to be better: the loss is higher than with all data; the loss is higher than with the random control.",
        ),
        (retraining(target=-0.0005), False, "the gain against all data is not certain"),
        (retraining(target=-0.1, random=-0.1), False, "the gain against the random control is not certain"),
        (
            retraining(target=-0.1, general=0.019),
            False,
            "the general loss may rise by more than is allowed",
        ),  # the mean is below the limit
        (retraining(target=-0.1, general=0.1), False, "the general loss rises by more than is allowed"),
        (retraining(target=-0.1, general=0.015), True, "limit +0.02"),
    ],
)
def test_verdict_follows_its_rule(runs, accepted, said):
    verdict = judged(runs).verdict
    assert verdict["accepted"] is accepted
    assert said in verdict["summary"]
    assert "95% interval" in verdict["rule"]
    assert verdict["accepted"] == all(condition["holds"] for condition in verdict["conditions"])


def test_a_decision_that_changes_nothing_is_not_accepted():
    verdict = judged(retraining(target=-0.1), decision(num_dropped=0)).verdict
    assert not verdict["accepted"]
    assert verdict["summary"].startswith("Nothing was dropped or reweighted")


def test_refuses_unpaired_seeds_and_losses_that_are_not_finite():
    runs = retraining(target=-0.1)
    with pytest.raises(ValueError, match=r"without a value in both: seeds \[3\]"):
        judged(runs.filter(~((pl.col("arm") == "curated") & (pl.col("seed") == 3))))
    with pytest.raises(ValueError, match=r"one finite target_loss of arms curated and all .* seeds \[0, 1, 2, 3, 4\]"):
        judged(runs.with_columns(target_loss=pl.when(pl.col("arm") == "all").then(float("nan")).otherwise("target_loss")))
    with pytest.raises(ValueError, match="got 1 pairs"):
        judged(runs.filter(seed=0))


def slow_auc(harm: np.ndarray, damaged: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in harm[damaged] for b in harm[~damaged]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(8))
def test_auc_counts_pairs_and_halves_ties(seed):
    random = np.random.default_rng(seed)
    harm = random.integers(0, 6, size=40).astype(float)
    harm[:3] = -np.inf
    damaged = random.random(40) < 0.3
    assert roc_auc(harm, damaged) == pytest.approx(slow_auc(harm, damaged), abs=1e-12)
    assert roc_auc(harm, damaged) == pytest.approx(1 - roc_auc(-harm, damaged), abs=1e-12)


def test_auc_refuses_one_class():
    with pytest.raises(ValueError, match="got 3 damaged of 3"):
        roc_auc(np.ones(3), np.ones(3, dtype=bool))


def test_planted_damage_is_found_by_the_score_that_ranks_it_first():
    evaluation = judged(retraining(target=-0.1), damage=truth([0, 1, 2, 9, 19]))
    found = evaluation.metrics["damage"]
    assert found["kinds"] == {"encoding": 2, "shuffled": 3}
    assert found["num_damaged"] == 5
    assert found["num_damaged_dropped"] == 3
    source, against, ties = (found["methods"][name] for name in ("source", "bm25", "random"))
    assert source["recall_at_dropped"] == source["recall_at_damaged"] == 3 / 5
    assert source["auc"] == pytest.approx(1 - against["auc"])
    assert source["kinds"]["encoding"]["recall_at_damaged"] == 1 / 2  # d01 is among the first five, d09 is not
    assert source["kinds"]["shuffled"]["recall_at_damaged"] == 2 / 3
    assert ties["auc"] == 0.5
    near = [row for row in range(20) if row % 2]  # of source s1
    harm = -np.array([(row - 8.0) * 1e-6 for row in near])
    expected = roc_auc(harm, np.isin(near, [0, 1, 2, 9, 19]))
    assert source["auc_target_sources"] == pytest.approx(expected)
    curve = evaluation.plots["recall_curve"]
    assert curve.columns == ["share_inspected", "source", "bm25", "random"]
    assert curve.select("share_inspected", "source").rows()[:: len(curve) - 1] == [(0, 0), (1, 1)]
    assert curve["source"].is_sorted()
    assert evaluation.plots["planted"].select("doc_id", "keep").rows() == [
        ("d00", False),
        ("d01", False),
        ("d02", False),
        ("d09", True),
        ("d19", True),
    ]


def test_without_damage_its_metrics_and_plots_are_absent():
    evaluation = judged(retraining(target=-0.1), damage=truth([]))
    assert "damage" not in evaluation.metrics
    assert sorted(evaluation.plots) == ["retraining", "score_histogram", "scores_by_source", "training_loss"]


def test_truth_of_other_documents_is_refused():
    with pytest.raises(ValueError, match="20 scores, 20 decisions and 19 rows of truth have 19 documents in common"):
        judged(retraining(target=-0.1), damage=truth([0], num_documents=19))


def test_histogram_counts_every_scored_document_once_with_an_edge_at_zero():
    manifest = decision(num_documents=300, num_dropped=30).with_columns(
        score=pl.when(pl.col("rank") == 300).then(float("nan")).otherwise("score")
    )
    histogram = score_histogram(manifest)
    assert histogram["documents"].sum() == 299
    assert histogram["dropped"].sum() == 30
    assert ((histogram["low"] >= 0) | (histogram["high"] <= 0)).all()
    negative = manifest.filter(pl.col("score") < 0)
    assert histogram.filter(pl.col("high") <= 0)["documents"].sum() == len(negative)
    assert len(score_histogram(manifest.with_columns(score=pl.lit(1.0)))) == 2  # a bin for each source
    assert score_histogram(manifest.with_columns(score=pl.lit(float("nan")))).is_empty()


def test_files_are_written_whole_and_the_same_twice(tmp_path):
    workspace = Workspace(tmp_path)
    evaluation = judged(retraining(target=-0.1), damage=truth([0, 1]))
    write_evaluation(evaluation, workspace)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (workspace.plots / "stale.csv").write_text("")
    write_evaluation(judged(retraining(target=-0.1), damage=truth([0, 1])), workspace)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first
    assert json.loads(workspace.verdict.read_text())["accepted"] is True
    assert pl.read_csv(workspace.plots / "retraining.csv").columns[:3] == ["seed", "target_loss_all", "target_loss_curated"]
    assert json.loads(workspace.metrics.read_text())["difference"]["curated_minus_all"]["target_loss"]["mean"] == pytest.approx(
        -0.1
    )


def test_the_summary_is_a_screen_of_the_metrics():
    evaluation = judged(retraining(target=-0.1), damage=truth([0, 1, 2]))
    summary = summarise(evaluation.metrics)
    assert summary["target"]["curated_minus_all"] == evaluation.metrics["difference"]["curated_minus_all"]["target_loss"]["mean"]
    assert summary["damage_auc"]["source"] == evaluation.metrics["damage"]["methods"]["source"]["auc"]
    assert summarise(judged(retraining(target=-0.1)).metrics)["damage_auc"] == {}
