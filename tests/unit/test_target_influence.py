"""The target set's scores from artifacts are those that the public function gives of the same run."""

import numpy as np
import pytest
import torch

from tda.artifacts import Workspace
from tda.attribute import attribute
from tda.data import load_documents
from tda.recorded import load_run
from tda.stages import prepare, segments, train
from tda.target_influence import grouped, groups_for, target_influence
from tda.task import CausalLM
from tests.toy import toy_config, write_corpus


def trained(folder, **changes):
    write_corpus(folder)
    config, workspace = toy_config(folder, **changes), Workspace(folder)
    prepare(config, workspace)
    train(config, workspace)
    segments(config, workspace)
    return config, workspace


def test_one_target_gets_the_scores_of_the_public_function(tmp_path):
    config, workspace = trained(tmp_path)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score").select([0])
    scores = target_influence(config, workspace, documents, queries)
    expected = attribute(
        "averaged_influence",
        load_run(workspace, needs_moments=True),
        CausalLM(),
        documents,
        queries,
        counterfactual_end=1.0,
        rounds=6,
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


def test_groups_add_up_to_the_weighted_sum():
    G = {"layer": torch.randn(30, 2, 3, dtype=torch.float64)}
    weights = np.random.default_rng(0).dirichlet(np.ones(30))
    groups = grouped(G, weights, np.arange(30), num_groups=12)
    assert groups["layer"].shape == (12, 2, 3)
    expected = torch.einsum("q,qoi->oi", torch.from_numpy(weights).float().double(), G["layer"])
    torch.testing.assert_close(groups["layer"].sum(dim=0), expected)
    parts = [
        grouped({"layer": G["layer"][rows]}, weights, rows, num_groups=12)["layer"] for rows in np.array_split(np.arange(30), 4)
    ]
    torch.testing.assert_close(sum(parts), groups["layer"])


def test_a_large_model_is_solved_for_fewer_groups_so_that_memory_stays_bounded():
    assert groups_for(200, gradient=200_000) == 12
    assert groups_for(5, gradient=200_000) == 5
    assert groups_for(200, gradient=2**24) == 4
    assert groups_for(200, gradient=10**9) == 1


def test_one_group_has_nearly_the_scores_of_many(tmp_path, monkeypatch):
    config, workspace = trained(tmp_path)
    documents, queries = load_documents(workspace.documents), load_documents(workspace.targets, half="score")
    many = target_influence(config, workspace, documents, queries)
    monkeypatch.setattr("tda.target_influence.BLOCK_VALUES", 1)
    assert np.corrcoef(target_influence(config, workspace, documents, queries), many)[0, 1] > 0.99
