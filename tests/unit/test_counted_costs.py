import pytest
import torch

from benchmarks import counted_costs
from benchmarks.counted_costs import (
    LARGE,
    Waits,
    compiled_layer,
    counted_curvature,
    counted_rows,
    fitted_in,
    least_covariances,
    least_eigenvalues,
    least_rows,
    made_case,
    packed_curvature,
    pass_bytes,
)
from tda.fit_factors import SHARE_BESIDE_A_PASS

WITHIN = 1.05


@pytest.mark.parametrize("shape", LARGE)
def test_rows_cost_what_the_method_needs_and_a_batch_is_two_copies(shape):
    found = counted_rows(made_case(shape, num_layers=2))
    assert 1 <= found["share_of_least"] <= WITHIN
    assert found["copies_per_batch"] == 2
    assert found["waits_per_batch"] == 0
    assert found["fill"] < 1.01


@pytest.mark.parametrize("shape", LARGE)
def test_curvature_passes_cost_what_the_method_needs(shape):
    found = counted_curvature(made_case(shape))
    assert 1 <= found["eigenvalues"]["share_of_least"] <= WITHIN
    assert 1 <= found["covariances"]["share_of_least"] <= WITHIN


def test_curvature_of_packed_documents_is_a_copy_a_batch_and_no_wait():
    found = packed_curvature(made_case("Llama-3.2-1B", narrow=16, device=torch.device("cpu"), num_layers=1))
    assert found == {"copies_per_batch": 1, "waits_per_batch": 0}


def test_curvature_at_the_shape_of_8b_is_fitted_on_one_card_by_blocks():
    case = made_case("Llama-3-8B")
    found = fitted_in(case, 80e9)
    assert found["bytes_of_all"] > 80e9
    assert found["bytes_at_once"] < SHARE_BESIDE_A_PASS * (80e9 - 16e9 - pass_bytes(case))
    assert found["blocks"] > 1
    assert 1 < found["share_of_one_block"] < 2.5
    assert fitted_in(case, 1e12)["share_of_one_block"] == 1


def test_the_least_is_the_sum_of_its_products():
    case = made_case("Llama-3-8B", num_layers=1)
    model, load = case.decoder(), case.load([0, 1])
    lengths = case.documents.lengths[:2]
    tokens, d, wide, small, vocabulary, k = int(lengths.sum()), 4096, 14336, 1024, 128256, 64
    weights = 2 * d * d + 2 * d * small + 3 * d * wide  # q o, k v, gate up down
    below = d * d + 2 * d * small  # nothing lies below the first inputs
    attention = 12 * d * int((lengths**2).sum())  # two products forward, four back
    head = 4 * d * vocabulary * (tokens - 2)  # of all tokens but the documents' last
    frozen = 2 * tokens * (2 * weights - below) + attention + head
    shared_inputs = d + d + d + wide  # of q k v, o, gate up, down
    outputs = d + small + small + d + wide + wide + d
    assert least_rows(model, load, rank=k) == frozen + 2 * tokens * (k * (shared_inputs + outputs) + 7 * k * k)
    squares = sum(side * (side + 1) for side in (d, d, d, wide, d, small, small, d, wide, wide, d))
    assert least_covariances(model, load) == frozen + tokens * squares
    rotations = sum(side**2 for side in (d, d, d, wide, d, small, small, d, wide, wide, d))
    assert least_eigenvalues(model, load) == frozen + 2 * tokens * (rotations + weights)


@pytest.mark.filterwarnings("ignore")  # by torch itself, while it traces
def test_a_compiled_layer_projects_each_input_once_and_keeps_little():
    found = compiled_layer(made_case("Llama-3-8B", narrow=16, device=torch.device("cpu"), num_layers=3))
    assert found["products_forward"] == 7 + 4  # seven matrices, four inputs
    assert found["products_backward"] == 7 + 7 + 7  # input gradients, projected outputs, rows
    d, wide, small = 4096, 14336, 1024
    floor = 2 * (4 * d + 2 * small + 2 * wide)  # bytes of input, q k v, attention's and its layer's outputs, gate and up
    assert found["kept_bytes"] * 16 < 1.3 * floor  # projected inputs, and the grid in which documents are uneven


def test_waits_are_seen():
    with Waits() as waits:
        values = torch.tensor([1.0, 0.0])
        values[values > 0]
        values.nonzero()
        float(values.sum())
    assert len(waits.seen) >= 3


def test_a_shape_is_divided():
    narrow = made_case("Llama-3.2-1B", narrow=16, num_layers=1)
    assert (narrow.model.config.hidden_size, narrow.context, narrow.rank, narrow.batch_tokens) == (128, 32, 4, 512)
    assert counted_costs.CONTEXT == 512
