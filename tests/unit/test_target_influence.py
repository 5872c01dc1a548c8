"""The target set's scores from artifacts are those that the public function gives of the same run."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tda.artifacts import Workspace
from tda.attribute import attribute
from tda.averaged_influence import row_scores
from tda.data import load_documents
from tda.factors import load_factors
from tda.gradients import weighted_sum
from tda.projection import random_projections
from tda.recorded import load_run
from tda.target_influence import ANSWER, DECISION, influence_of_new, mean_place, mean_response, target_influence
from tda.task import CausalLM
from tests.toy import run_stages, toy_config, write_corpus


def trained(folder, **changes):
    write_corpus(folder)
    config, workspace = toy_config(folder, **changes), Workspace(folder)
    run_stages(config, workspace, "prepare", "train", "segments", "curvature")
    return config, workspace


def start_there(monkeypatch):
    """The solver starts from EK-FAC at the mean weights, as if the stored factors were in projected space."""

    def projected(path):
        held = load_factors(path)
        return replace(held, projections=random_projections(held.layers, rank=1, seed=0))

    monkeypatch.setattr("tda.target_influence.load_factors", projected)


def test_one_target_gets_the_scores_of_the_public_function(tmp_path, monkeypatch):
    config, workspace = trained(tmp_path)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score").select([0])
    start_there(monkeypatch)
    scores = target_influence(config, workspace, documents, queries)
    expected = attribute(
        "averaged_influence",
        load_run(workspace, needs_moments=True),
        CausalLM(),
        documents,
        queries,
        counterfactual_end=1.0,
        rounds=DECISION.rounds,
        curvature_examples=20,
        batch_size=256,
    )
    np.testing.assert_allclose(scores, expected.values[0], rtol=1e-4, atol=1e-6 * np.abs(scores).max())
    assert np.array_equal(scores, target_influence(config, workspace, documents, queries))


def test_scores_are_the_same_however_few_targets_are_in_memory_at_once(tmp_path, monkeypatch):
    config, workspace = trained(tmp_path)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    expected = target_influence(config, workspace, documents, queries)
    monkeypatch.setattr("tda.target_influence.QUERY_VALUES", 1)
    scores = target_influence(config, workspace, documents, queries)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_missing_optimizer_state_is_refused_unless_the_run_is_taken_for_sgd(tmp_path):
    _config, workspace = trained(tmp_path)
    (workspace.checkpoint(3) / "optimizer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"the run used AdamW, .* or set curvature\.adam to none"):
        load_run(workspace, needs_moments=True)
    assert load_run(workspace, needs_moments=False).optimizer.kind == "sgd"


def test_the_mean_over_all_tokens_is_a_weighted_sum_of_the_queries_gradients():
    G = {"layer": torch.randn(30, 2, 3, dtype=torch.float64)}
    weights = torch.from_numpy(np.random.default_rng(0).dirichlet(np.ones(30)))
    parts = [rows.tolist() for rows in np.array_split(np.random.default_rng(1).permutation(30), 4)]
    total = weighted_sum((({"layer": G["layer"][rows]}, rows) for rows in parts), weights)
    torch.testing.assert_close(total["layer"], torch.einsum("q,qoi->oi", weights, G["layer"])[None])


def test_a_quick_answer_has_nearly_the_scores_of_a_decision(tmp_path):
    config, workspace = trained(tmp_path)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    place = mean_place(config, workspace, documents, queries, ANSWER)
    quick = row_scores(place, mean_response(place))[0]
    assert np.corrcoef(quick, target_influence(config, workspace, documents, queries))[0, 1] > 0.99


@pytest.mark.parametrize(
    "change", [{}, {"curvature__adam": "symmetric"}, {"curvature__space": "projected", "gradients__projection": "random"}]
)
def test_where_the_solver_starts_changes_little(tmp_path, monkeypatch, change):
    config, workspace = trained(tmp_path, **change)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    scores = target_influence(config, workspace, documents, queries)
    start_there(monkeypatch)
    assert np.corrcoef(scores, target_influence(config, workspace, documents, queries))[0, 1] > 0.99


def test_documents_that_training_has_not_seen_score_as_those_of_average_exposure(tmp_path):
    config, workspace = trained(tmp_path)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    place = mean_place(config, workspace, documents, queries, ANSWER)
    share = place.exposure[:, 0] * len(documents)
    rows = [3, 11, 40]
    scores = influence_of_new(config, workspace, documents, queries, new=documents.select(rows))
    expected = target_influence(config, workspace, documents, queries)[rows] / share[rows]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6 * np.abs(scores).max())
