import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge

from skperf.influence.heads import leave_one_out_steps, linear_head_hessian


def test_squared_loss_gives_press_exactly():
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:80], (y[:80] - y.mean()) / y.std()
    ridge = Ridge(alpha=0.3, fit_intercept=False).fit(X, y)
    n = len(X)
    inputs, residual = torch.as_tensor(X), torch.as_tensor(ridge.predict(X) - y)
    penalty = torch.full((X.shape[1],), 0.3 / n, dtype=torch.float64)
    curvatures = torch.full((n, 1, 1), 1 / n, dtype=torch.float64)
    hessian = linear_head_hessian(inputs, curvatures, penalty)
    steps = leave_one_out_steps(inputs, residual[:, None] / n, curvatures, hessian)
    left_out = [ridge.coef_ + steps[i, 0].numpy() for i in range(n)]
    press = np.array([y[i] - X[i] @ left_out[i] for i in range(n)])
    hat = X @ np.linalg.solve(X.T @ X + 0.3 * np.eye(X.shape[1]), X.T)
    np.testing.assert_allclose(press, -residual.numpy() / (1 - np.diag(hat)), rtol=1e-8)
    for i in range(0, n, 20):
        keep = np.arange(n) != i
        refit = Ridge(alpha=0.3, fit_intercept=False).fit(X[keep], y[keep])
        np.testing.assert_allclose(left_out[i], refit.coef_, rtol=1e-6, atol=1e-9)


def test_rows_without_curvature_leave_the_influence_function():
    torch.manual_seed(0)
    inputs = torch.randn(9, 4, dtype=torch.float64)
    slopes = torch.randn(9, 2, dtype=torch.float64)
    root = torch.randn(9, 2, 2, dtype=torch.float64)
    curvatures = root @ root.mT
    hessian = linear_head_hessian(inputs, curvatures, torch.full((4,), 0.1, dtype=torch.float64))
    jacobians = torch.einsum("kl,nd->nkld", torch.eye(2, dtype=torch.float64), inputs).flatten(2)
    expected = sum(j.T @ c @ j for j, c in zip(jacobians, curvatures, strict=True))
    torch.testing.assert_close(hessian, expected + 0.1 * torch.eye(8, dtype=torch.float64))
    plain = leave_one_out_steps(inputs, slopes, 0 * curvatures, hessian, chunk=4)
    gradients = torch.einsum("nk,nd->nkd", slopes, inputs).flatten(1)
    torch.testing.assert_close(plain.flatten(1), torch.linalg.solve(hessian, gradients.T).T)
    exact = leave_one_out_steps(inputs, slopes, curvatures, hessian, chunk=4)
    for i in range(9):
        without = hessian - jacobians[i].T @ curvatures[i] @ jacobians[i]
        torch.testing.assert_close(
            exact[i].flatten(), torch.linalg.solve(without, gradients[i]), rtol=1e-6, atol=1e-8
        )
