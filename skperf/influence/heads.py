"""Exact Newton and leave-one-out steps for models that are linear in their parameters."""

import torch
from torch import Tensor


def linear_head_hessian(inputs: Tensor, curvatures: Tensor, ridge: Tensor) -> Tensor:
    """Hessian of a loss linear in inputs (n, d): curvatures (n, K, K), ridge (d,) -> (K d, K d)."""
    n_outputs, d = curvatures.shape[1], inputs.shape[1]
    hessian = inputs.new_zeros(n_outputs, d, n_outputs, d)
    for k in range(n_outputs):
        for m in range(k + 1):
            part = (inputs * curvatures[:, k, m, None]).T @ inputs
            hessian[k, :, m] = part
            hessian[m, :, k] = part.T
    matrix = hessian.reshape(n_outputs * d, n_outputs * d)
    matrix.diagonal().add_(ridge.repeat(n_outputs))
    return matrix


def leave_one_out_steps(
    inputs: Tensor, slopes: Tensor, curvatures: Tensor, hessian: Tensor, *, chunk: int = 256
) -> Tensor:
    """Newton steps that leave a row out: inputs (n, d), slopes (n, K) -> (n, K, d)."""
    # Without row i the Hessian is `H - J_i' C_i J_i`; Woodbury turns its inverse into one of K x
    # K. For a squared loss the step lands on the leave-one-out solution itself.
    n_outputs, d = slopes.shape[1], inputs.shape[1]
    # the unpenalised directions that leave every output as it is have no curvature
    inverse = torch.linalg.pinv(hessian, hermitian=True)
    blocks = inverse.view(n_outputs, d, n_outputs, d)
    steps = []
    for start in range(0, len(inputs), chunk):
        x, slope = inputs[start : start + chunk], slopes[start : start + chunk]
        curvature = curvatures[start : start + chunk]
        reached = torch.einsum("kdme,ne->nkdm", blocks, x)  # H^-1 J_i'
        leverage = torch.einsum("nd,nkdm->nkm", x, reached)
        identity = torch.eye(n_outputs, dtype=x.dtype, device=x.device)
        # (H - J'CJ)^-1 J' s = H^-1 J' (I - C L)^-1 s with L = J H^-1 J'
        slope = torch.linalg.solve(identity - curvature @ leverage, slope[:, :, None])[:, :, 0]
        steps.append(torch.einsum("nkdm,nm->nkd", reached, slope))
    return torch.cat(steps)
