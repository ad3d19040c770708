"""Random projections of gradients that never form them.

An outer product ``b a'`` is projected by one small matrix on each side,
``(P_b' b) (P_a' a)'``; inner products are kept in expectation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.influence.gradients import Dense, Gradients, Outer, Tokens
from skperf.influence.layers import Layer


@dataclass(frozen=True)
class TwoSided:
    """Projection of one layer's gradients."""

    inputs: Tensor | None  # (n_inputs, k_inputs)
    outputs: Tensor | None  # (n_outputs, k_outputs)
    shape: tuple[int, int] | None


def projections(
    gradients: Gradients, layers: Sequence[Layer], n_projections: int, generator: torch.Generator
) -> list[TwoSided]:
    """Draw projections, wider for layers with more weights."""
    shapes = [layer.matrix_shape for layer in layers]
    sizes = [layer.n_weights for layer in layers]
    total = sum(size**0.5 for size in sizes)
    maps = []
    for factor, shape, size in zip(gradients, shapes, sizes, strict=True):
        wanted = max(1, round(n_projections * size**0.5 / total))
        maps.append(_two_sided(shape, size, wanted, generator, factor))
    return maps


def _two_sided(
    shape: tuple[int, int] | None, size: int, wanted: int, generator: torch.Generator, like: object
) -> TwoSided:
    dtype = torch.float32
    assert isinstance(like, Outer | Dense | Tokens)
    dtype = like.tensors[-1].dtype
    if size <= wanted and not isinstance(like, Tokens):
        return TwoSided(None, None, shape)
    if isinstance(like, Tokens):
        n_outputs = like.outputs.shape[-1]
        k_outputs = min(n_outputs, max(1, round(wanted**0.5)))
        k_inputs = max(1, wanted // k_outputs)
        table = _normal(like.n_embeddings, k_inputs, generator, dtype)
        return TwoSided(table, _normal(n_outputs, k_outputs, generator, dtype), None)
    if shape is None:
        return TwoSided(None, _normal(size, wanted, generator, dtype), None)
    n_outputs, n_inputs = shape
    k_outputs = min(n_outputs, max(1, round((wanted * n_outputs / n_inputs) ** 0.5)))
    k_inputs = min(n_inputs, max(1, round(wanted / k_outputs)))
    inputs = None if k_inputs == n_inputs else _normal(n_inputs, k_inputs, generator, dtype)
    outputs = None if k_outputs == n_outputs else _normal(n_outputs, k_outputs, generator, dtype)
    return TwoSided(inputs, outputs, shape)


def _normal(n: int, k: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    values: Tensor = torch.randn(n, k, generator=generator, dtype=torch.float64) / k**0.5
    return values.to(dtype)


def project(gradients: Gradients, maps: Sequence[TwoSided]) -> Tensor:
    """Project gradients: -> (n, about n_projections)."""
    parts = [_project_layer(f, m) for f, m in zip(gradients, maps, strict=True)]
    return torch.cat(parts, 1)


def _project_layer(factor: Outer | Dense | Tokens, two: TwoSided) -> Tensor:
    if isinstance(factor, Tokens):
        assert two.inputs is not None
        assert two.outputs is not None
        outputs = (factor.outputs * (factor.indices >= 0)[:, :, None]) @ two.outputs
        inputs = two.inputs[factor.indices.clamp_min(0)]
        return torch.einsum("nto,nti->noi", outputs, inputs).flatten(1)
    if isinstance(factor, Outer):
        inputs = factor.inputs if two.inputs is None else factor.inputs @ two.inputs
        outputs = factor.outputs if two.outputs is None else factor.outputs @ two.outputs
        if inputs.ndim == 3:
            return (outputs.mT @ inputs).flatten(1)
        return (outputs[:, :, None] * inputs[:, None]).flatten(1)
    if two.shape is None:
        return factor.values if two.outputs is None else factor.values @ two.outputs
    matrices = factor.values.view(-1, *two.shape)
    if two.outputs is not None:
        matrices = two.outputs.T @ matrices
    if two.inputs is not None:
        matrices = matrices @ two.inputs
    return matrices.flatten(1)
