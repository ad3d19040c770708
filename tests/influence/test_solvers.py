import pytest
import torch

from skperf.influence.solvers import arnoldi, conjugate_gradient, largest_eigenvalue, lsmr, neumann

torch.manual_seed(0)
ROOT = torch.randn(20, 30, dtype=torch.float64)
MATRIX = ROOT.T @ ROOT / 20 + 0.3 * torch.eye(30, dtype=torch.float64)
RIGHT = torch.randn(4, 30, dtype=torch.float64)
EXACT = torch.linalg.solve(MATRIX, RIGHT.T).T


def multiply(vectors):
    return vectors @ MATRIX


def test_conjugate_gradient():
    solution = conjugate_gradient(multiply, RIGHT, tol=1e-10)
    torch.testing.assert_close(solution.values, EXACT)
    assert solution.converged
    assert solution.n_iterations <= 31
    assert not conjugate_gradient(multiply, RIGHT, tol=1e-10, max_iter=3).converged


def test_conjugate_gradient_refuses_negative_curvature():
    with pytest.raises(ValueError, match="indefinite"):
        conjugate_gradient(lambda v: v @ (MATRIX - 2 * torch.eye(30)), RIGHT)


def test_neumann_series_and_its_divergence():
    top = largest_eigenvalue(multiply, RIGHT[0], n_iterations=100)
    assert top == pytest.approx(float(torch.linalg.eigvalsh(MATRIX)[-1]), rel=1e-3)
    solution = neumann(lambda x, step: multiply(x), RIGHT, scale=1.1 * top, tol=1e-10)
    torch.testing.assert_close(solution.values, EXACT, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="diverges"):
        neumann(lambda x, step: multiply(x), RIGHT, scale=0.3 * top)


def test_krylov_space_of_full_size_gives_all_eigenpairs():
    values, vectors = arnoldi(multiply, RIGHT[0], n_iterations=30)
    assert (values.diff() <= 1e-12).all()
    torch.testing.assert_close(multiply(vectors), values[:, None] * vectors, rtol=1e-6, atol=1e-7)
    top, _ = arnoldi(multiply, RIGHT[0], n_iterations=12)
    torch.testing.assert_close(top[:2], values[:2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ridge", [0.0, 0.2])
@pytest.mark.parametrize("shape", [(40, 12), (12, 40)])
def test_lsmr_is_damped_least_squares(ridge, shape):
    matrix = torch.randn(*shape, dtype=torch.float64)
    right = torch.randn(3, shape[0], dtype=torch.float64)
    solution = lsmr(
        lambda x: x @ matrix.T, lambda r: r @ matrix, right, ridge=ridge, max_iter=200, tol=1e-13
    )
    damped = matrix.T @ matrix + ridge * torch.eye(shape[1])
    expected = torch.linalg.pinv(damped) @ matrix.T @ right.T
    torch.testing.assert_close(solution.values, expected.T, rtol=1e-6, atol=1e-7)
