"""Random projections of gradients that never form them.

An outer product ``b a'`` is projected by one small matrix on each side,
``(P_b' b) (P_a' a)'``; inner products are kept in expectation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from skperf.influence.gradients import Dense, Gradients, Outer, Tokens


@dataclass(frozen=True)
class TwoSided:
    """Projection of one layer's gradients."""

    inputs: Tensor | None  # (n_inputs, k_inputs)
    outputs: Tensor | None  # (n_outputs, k_outputs)
    shape: tuple[int, int] | None


@dataclass
class Projection:
    """Projections of all layers, wider for those with more weights; drawn for the first rows."""

    layers: Sequence[tuple[tuple[int, int] | None, int]]  # shape and number of weights
    n_projections: int
    seed: int
    maps: list[TwoSided] = field(default_factory=list)

    def __call__(self, gradients: Gradients) -> Gradients:
        """Project gradients: -> (n, about n_projections)."""
        generator = torch.Generator().manual_seed(self.seed)
        total = sum(size**0.5 for _, size in self.layers)
        if not self.maps:
            for factor, (shape, size) in zip(gradients, self.layers, strict=True):
                wanted = max(1, round(self.n_projections * size**0.5 / total))
                self.maps.append(_two_sided(shape, size, wanted, generator, factor))
        parts = [_project_layer(f, m) for f, m in zip(gradients, self.maps, strict=True)]
        return [Dense(torch.cat(parts, 1))]


def _two_sided(
    shape: tuple[int, int] | None, size: int, wanted: int, generator: torch.Generator, like: object
) -> TwoSided:
    if size <= wanted and not isinstance(like, Tokens):
        return TwoSided(None, None, shape)
    if isinstance(like, Tokens):
        n_outputs = like.outputs.shape[-1]
        k_outputs = min(n_outputs, max(1, round(wanted**0.5)))
        k_inputs = max(1, wanted // k_outputs)
        table = _normal(like.n_embeddings, k_inputs, generator)
        return TwoSided(table, _normal(n_outputs, k_outputs, generator), None)
    if shape is None:
        return TwoSided(None, _normal(size, wanted, generator), None)
    n_outputs, n_inputs = shape
    k_outputs = min(n_outputs, max(1, round((wanted * n_outputs / n_inputs) ** 0.5)))
    k_inputs = min(n_inputs, max(1, round(wanted / k_outputs)))
    inputs = None if k_inputs == n_inputs else _normal(n_inputs, k_inputs, generator)
    outputs = None if k_outputs == n_outputs else _normal(n_outputs, k_outputs, generator)
    return TwoSided(inputs, outputs, shape)


def _normal(n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, k, generator=generator, dtype=torch.float64).float() / k**0.5


def _project_layer(factor: Outer | Dense | Tokens, two: TwoSided) -> Tensor:
    like = factor.tensors[-1]
    left, right = (None if m is None else m.to(like) for m in (two.outputs, two.inputs))
    if isinstance(factor, Tokens):
        assert left is not None
        assert right is not None
        outputs = (factor.outputs * (factor.indices >= 0)[:, :, None]) @ left
        inputs = right[factor.indices.clamp_min(0)]
        return torch.einsum("nto,nti->noi", outputs, inputs).flatten(1)
    if isinstance(factor, Outer):
        inputs = factor.inputs if right is None else factor.inputs @ right
        outputs = factor.outputs if left is None else factor.outputs @ left
        if inputs.ndim == 3:
            return (outputs.mT @ inputs).flatten(1)
        return (outputs[:, :, None] * inputs[:, None]).flatten(1)
    if two.shape is None:
        return factor.values if left is None else factor.values @ left
    matrices = factor.values.view(-1, *two.shape)
    matrices = matrices if left is None else left.T @ matrices
    return (matrices if right is None else matrices @ right).flatten(1)
