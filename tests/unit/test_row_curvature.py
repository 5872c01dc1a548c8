import numpy as np
import pytest
import torch

from tda.model import Layer
from tda.row_curvature import row_curvature

LAYERS = [Layer("first", d_in=9, d_out=7, bias=False, group="first"), Layer("second", d_in=9, d_out=5, bias=False, group="first")]
SHAPES = {"first": (3, 4), "second": (2, 4)}


def made_rows(num: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(20, 20, dtype=torch.float64, generator=generator)
    return torch.randn(num, 20, dtype=torch.float64, generator=generator) @ mixing


def test_basis_and_eigenvalues_are_those_of_explicit_matrices():
    rows = made_rows(40)
    got = row_curvature(lambda: [rows], LAYERS, SHAPES, weight=0.25)
    for name, block in (("first", rows[:, :12].reshape(40, 3, 4)), ("second", rows[:, 12:].reshape(40, 2, 4))):
        A, S = sum(R.T @ R for R in block), sum(R @ R.T for R in block)
        Q_A, Q_S = got[name].Q_A, got[name].Q_S
        for Q, M in ((Q_A, A), (Q_S, S)):
            torch.testing.assert_close(Q.T @ Q, torch.eye(len(Q), dtype=torch.float64))
            rotated = Q.T @ M @ Q
            torch.testing.assert_close(
                rotated, torch.diag(torch.linalg.eigvalsh(M).flip(0)), atol=1e-9 * float(M.trace()), rtol=0
            )
        # the diagonal of the empirical Fisher matrix in the Kronecker basis
        Q = torch.kron(Q_S, Q_A)
        fisher = 0.25 * sum(torch.outer(R.flatten(), R.flatten()) for R in block) / 40
        torch.testing.assert_close(got[name].Lambda.flatten(), (Q.T @ fisher @ Q).diagonal())


@pytest.mark.parametrize("size", [1, 7, 40])
def test_blocks_do_not_matter(size):
    rows = made_rows(40)
    whole = row_curvature(lambda: [rows], LAYERS, SHAPES, weight=1.0)
    parts = row_curvature(lambda: iter(rows.split(size)), LAYERS, SHAPES, weight=1.0)
    for name in SHAPES:
        torch.testing.assert_close(parts[name].Lambda, whole[name].Lambda)


def test_a_rotation_of_the_projection_rotates_the_basis_alone():
    rows, generator = made_rows(60), torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=generator))[0]
    turned = torch.cat([(part.unflatten(1, (-1, 4)) @ turn).flatten(1) for part in rows.split([12, 8], dim=1)], dim=1)
    plain = row_curvature(lambda: [rows], LAYERS, SHAPES, weight=1.0)
    rotated = row_curvature(lambda: [turned], LAYERS, SHAPES, weight=1.0)
    for name in SHAPES:
        torch.testing.assert_close(rotated[name].Lambda, plain[name].Lambda)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="needs gradient rows of documents that the segment saw; there are none"):
        row_curvature(list, LAYERS, SHAPES, weight=1.0)


def test_rows_that_are_not_finite_are_refused():
    rows = made_rows(5)
    rows[2, 3] = np.nan
    with pytest.raises(ValueError, match="the covariance of the inputs of first is not finite"):
        row_curvature(lambda: [rows], LAYERS, SHAPES, weight=1.0)
