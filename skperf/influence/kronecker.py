"""Kronecker-factored curvature: one small eigenbasis for a layer's inputs, one for its outputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.influence.gradients import Dense, Factor, Outer, Tokens, written_out

_CHUNK = 1 << 24


@dataclass(frozen=True)
class KroneckerBasis:
    """Eigenbasis of one layer's inputs and output gradients."""

    inputs: Tensor | None  # (n_inputs, n_inputs)
    outputs: Tensor | None  # (n_outputs, n_outputs)
    values: Tensor  # (n_outputs, n_inputs)

    def rotate(self, factor: Factor) -> Factor:
        """Express gradients in the basis."""
        if self.outputs is None:
            return factor
        if isinstance(factor, Outer):
            assert self.inputs is not None
            return Outer(factor.inputs @ self.inputs, factor.outputs @ self.outputs)
        if isinstance(factor, Tokens):
            return Tokens(factor.indices, factor.outputs @ self.outputs, factor.n_embeddings)
        assert self.inputs is not None
        matrices = factor.values.view(-1, *self.values.shape)
        return Dense((self.outputs.T @ matrices @ self.inputs).flatten(1))


def kronecker_basis(
    inputs_of: Factor,
    rows: Factor,
    shape: tuple[int, int] | None,
    *,
    corrected: bool,
    weights: Tensor,
) -> KroneckerBasis:
    """Fit the Kronecker-factored curvature of one layer: weights (n,)."""
    if isinstance(rows, Tokens):
        covariance = torch.tensordot(rows.outputs, rows.outputs, dims=([0, 1], [0, 1]))
        basis = KroneckerBasis(None, torch.linalg.eigh(covariance)[1], covariance)
        return KroneckerBasis(None, basis.outputs, _second_moments(basis.rotate(rows), None))
    if shape is None:
        return KroneckerBasis(None, None, _second_moments(rows, (1, -1)))
    input_moment, output_moment = _moments(inputs_of, rows, shape, weights)
    input_values, input_vectors = torch.linalg.eigh(input_moment)
    output_values, output_vectors = torch.linalg.eigh(output_moment)
    products = output_values.clamp_min(0)[:, None] * input_values.clamp_min(0)[None]
    basis = KroneckerBasis(input_vectors, output_vectors, products)
    if not corrected:
        return basis
    values = _second_moments(basis.rotate(rows), shape)
    return KroneckerBasis(input_vectors, output_vectors, values)


def _moments(
    inputs_of: Factor, rows: Factor, shape: tuple[int, int], weights: Tensor
) -> tuple[Tensor, Tensor]:
    if isinstance(inputs_of, Outer) and isinstance(rows, Outer):
        inputs, outputs = inputs_of.inputs, rows.outputs
        share = weights.to(inputs.dtype).sqrt()
        n_positions = 1 if inputs.ndim == 2 else inputs.shape[1]
        inputs = inputs * share.view(-1, *[1] * (inputs.ndim - 1))
        inputs, outputs = inputs.flatten(0, -2), outputs.flatten(0, -2)
        return inputs.T @ inputs, outputs.T @ outputs / n_positions
    matrices = written_out(rows).view(-1, *shape)
    inputs = matrices.flatten(0, 1)
    outputs = matrices.mT.flatten(0, 1)
    output_moment = outputs.T @ outputs
    trace = output_moment.diagonal().sum().clamp_min(torch.finfo(inputs.dtype).tiny)
    return inputs.T @ inputs / trace, output_moment


def _second_moments(rotated: Factor, shape: tuple[int, int] | None) -> Tensor:
    if isinstance(rotated, Outer) and rotated.inputs.ndim == 2:
        return rotated.outputs.square().T @ rotated.inputs.square()
    if isinstance(rotated, Tokens):
        shape = (rotated.n_embeddings, rotated.outputs.shape[-1])
    assert shape is not None
    size = max(1, _CHUNK // max(1, shape[0] * shape[1]))
    total = None
    for start in range(0, len(rotated), size):
        summed = written_out(rotated[start : start + size]).square().sum(0)
        total = summed if total is None else total.add_(summed)
    assert total is not None
    return total.view(shape)


def separable(
    values: Tensor, inverse: Tensor, *, tolerance: float, max_rank: int
) -> tuple[Tensor, Tensor]:
    """Approximate filtered curvature (o, i) by products: -> outputs (rank, o), inputs (rank, i)."""
    # Weighted by the energy that gradients have along each direction, so that a few terms
    # reproduce the scores.
    tiny = torch.finfo(values.dtype).tiny ** 0.5
    by_output = values.sum(1).clamp_min(values.sum() * 1e-12 + tiny).sqrt()
    by_input = values.sum(0).clamp_min(values.sum() * 1e-12 + tiny).sqrt()
    weighted = by_output[:, None] * inverse * by_input
    left, energy, right = torch.linalg.svd(weighted.double(), full_matrices=False)
    lost = energy.square().flip(0).cumsum(0).flip(0) / energy.square().sum()
    rank = min(max(1, int((lost > tolerance).sum())), max_rank)
    scale = energy[:rank].sqrt()[:, None]
    outputs = left[:, :rank].T * scale / by_output
    inputs = right[:rank] * scale / by_input
    return outputs.to(values.dtype), inputs.to(values.dtype)
