"""Curvature of the mean training loss, from the rows of its Gauss-Newton form.

The Gauss-Newton matrix (for a softmax classifier also the Fisher matrix with the exact
expectation over labels) is ``C = sum_i w_i J_i' H_i J_i`` with ``H_i = diag(p_i) - p_i p_i'``.
Each eigenpair of an ``H_i`` gives one row of a matrix A with ``C = A' A``; few of the
eigenvalues carry nearly all of the trace. Their rows are pulled back, and a sample of the
others in proportion to their share stands for the rest of the trace; see
:mod:`~skperf.influence.output_rows`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from skperf.backbone.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters, flatten, unflatten
from skperf.backbone.rows import Rows
from skperf.influence.gradients import Dense, Factor, Gradients, combine, gram, inner, written_out
from skperf.influence.layers import SUPPORTED, TABLES
from skperf.influence.mapping import mapped
from skperf.influence.output_rows import prepare_forward_mode


@dataclass(frozen=True)
class RowSpace:
    """A curvature matrix ``A' A`` known by its rows."""

    rows: Gradients
    gram: Tensor  # (n_rows, n_rows)

    @classmethod
    def of(cls, rows: Gradients) -> "RowSpace":
        """Form the Gram matrix."""
        return cls(rows, gram(rows))

    @property
    def trace(self) -> float:
        """Sum of the curvature's eigenvalues."""
        return float(self.gram.diagonal().sum())


Filter = Callable[[Tensor], Tensor]


def gradient_flow(time: float, weight_decay: float = 0.0) -> Filter:
    """Make the filter of training for a while, ``(1 - exp(-time x)) / x``."""

    def apply(values: Tensor) -> Tensor:
        x = values + weight_decay
        x = torch.where(x.abs() < 1e-12 / time, 1e-12 / time, x)
        return -torch.expm1(-time * x) / x

    return apply


@dataclass(frozen=True)
class Filtered:
    """A falling function of a row-space curvature, ``f(C) = f(0) (1 - A' R' R A)``."""

    # damping is the function `1 / (x + damping)`: gradients meet directly, and by way of their
    # products with the curvature's rows

    curvature: RowSpace
    at_zero: float  # f(0)
    squared: Callable[[Tensor], Tensor]  # times R' R, in double precision: (n, n_rows) -> same

    @classmethod
    def damped(cls, curvature: RowSpace, damping: float) -> "Filtered":
        """Make the damped inverse."""
        matrix = curvature.gram.to(torch.float64, copy=True)
        matrix.diagonal().add_(damping)
        least = torch.finfo(curvature.gram.dtype).eps * float(matrix.norm())
        if damping < least:
            raise ValueError(
                f"damping={damping:.3g} is lost in the rounding of a curvature of this size: raise "
                f"it above {least:.1g}, use method='exact', or a float64 module."
            )
        return cls(curvature, 1 / damping, partial(_solved, torch.linalg.cholesky(matrix)))

    @classmethod
    def of(cls, curvature: RowSpace, function: Filter) -> "Filtered":
        """Make any function that falls, and is not zero at zero."""
        values, vectors = torch.linalg.eigh(curvature.gram.double())
        keep = values > values[-1:].clamp_min(0) * 1e-9
        values, vectors = values[keep], vectors[:, keep]
        at_zero = function(values.new_zeros(1))
        weights = (1 - function(values) / at_zero) / values
        return cls(curvature, float(at_zero), partial(_spread, vectors, weights.clamp_min(0)))

    def weights(self, vectors: Sequence[Factor]) -> Tensor:
        """Of the curvature's rows: -> (n, n_rows)."""
        found = inner(vectors, self.curvature.rows)
        return -self.squared(found.double()).to(found)

    def apply(self, vectors: Sequence[Factor]) -> Gradients:
        """Multiply vectors: (n, ...) each."""
        weights, rows = self.weights(vectors), self.curvature.rows
        return [
            Dense((written_out(v) + combine(weights, row)) * self.at_zero)
            for v, row in zip(vectors, rows, strict=True)
        ]


def _solved(lower: Tensor, found: Tensor) -> Tensor:
    return torch.cholesky_solve(found.T, lower).T


def _spread(vectors: Tensor, weights: Tensor, found: Tensor) -> Tensor:
    return (found @ vectors * weights) @ vectors.T


# torch's forward mode knows of one derivative at a time, whichever thread asks for it
_FORWARD_MODE = threading.Lock()


@dataclass(frozen=True)
class CurvatureProduct:
    """Products of the curvature of the mean loss with vectors, no matrix formed."""

    network: Network
    parameters: Parameters
    inputs: Rows  # (n, ...)
    targets: Tensor  # (n, ...)
    weights: Tensor  # (n,)
    kind: str = "ggn"
    damping: float | Tensor = 0.0  # or (n_parameters,)
    batch_size: int = 256

    def __call__(self, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Multiply: vectors (m, n_parameters) -> (m, n_parameters)."""
        prepare_forward_mode()
        everything = torch.arange(len(self.inputs)) if rows is None else rows
        share = 1.0 if rows is None else float(self.weights.sum() / self.weights[rows].sum())
        result = self.damping * vectors
        vectors = vectors * self._moving().to(vectors)
        for part in torch.split(everything, self.batch_size):
            weights = self.weights[part] * share
            with _FORWARD_MODE, _named_layers(self.network), PlainAttention():
                product = _PRODUCTS[self.kind](self, self.inputs[part], self.targets[part], weights)
                result = result + mapped(product, vectors, chunk_size=32).detach()
        return result

    def _moving(self) -> Tensor:
        """Mark the weights with gradients, which a table's padding has not: (n_parameters,)."""
        moving = {name: torch.ones_like(p) for name, p in self.parameters.items()}
        for name, part in self.network.module.named_modules():
            if isinstance(part, TABLES) and part.padding_idx is not None:
                moving.get(f"{name}.weight", torch.ones_like(part.weight))[part.padding_idx] = 0
        return flatten(moving)

    def _outputs(self, inputs: Rows) -> Callable[[Parameters], Tensor]:
        return lambda values: self.network(inputs, values)


_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


class PlainAttention(TorchFunctionMode):
    """Attention and norms of weights written out, in this thread: fused ones differentiate once."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.multi_head_attention_forward:
            with sdpa_kernel(SDPBackend.MATH):  # what it calls passes by this mode
                return func(*args, **(kwargs or {}))
        if func is torch._weight_norm:
            v, g, dim = args
            return v * (g / torch.norm_except_dim(v, 2, dim))
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(_ATTENTION, args, strict=False)) | (kwargs or {})
        mask = named.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:  # this operator would add 0 and 1
            named["attn_mask"] = torch.where(mask, 0.0, -torch.inf).to(named["query"])
        return torch.ops.aten._scaled_dot_product_attention_math(**named)[0]


@contextmanager
def _named_layers(network: Network) -> Iterator[None]:
    """Say which layers torch's forward mode may have failed at."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        unusual = [
            f"{name!r} ({type(part).__name__})"
            for name, part in network.module.named_modules()
            if list(part.parameters(recurse=False))
            and (isinstance(part, nn.EmbeddingBag) or not isinstance(part, SUPPORTED))
        ]
        raise ValueError(
            "methods that multiply by the curvature ('cg', 'lissa', 'arnoldi', 'exact', 'gif') "
            f"cannot differentiate {', '.join(unusual) or type(network.module).__name__}: "
            f"{str(error).splitlines()[0]} Use method='ggn' or 'ekfac', or leave the layer out "
            "with parameters=..."
        ) from error


Multiply = Callable[[Tensor], Tensor]


def _pushed(outputs_of: Callable[[Parameters], Tensor], at: Parameters) -> Callable[..., Tensor]:
    """Make the map from a change of the parameters to that of the outputs."""

    def forward(tangent: Parameters) -> Tensor:
        moved: Tensor = jvp(outputs_of, (at,), (tangent,))[1]
        return moved

    def twice_backward(tangent: Parameters) -> Tensor:
        # where a layer has no rule for forward mode: the derivative of a pullback by its argument
        outputs, pull_back, *_ = vjp(outputs_of, at)
        _, again, *_ = vjp(lambda u: pull_back(u)[0], torch.zeros_like(outputs))
        moved: Tensor = again(tangent)[0]
        return moved

    try:
        forward({name: torch.zeros_like(value) for name, value in at.items()})
    except (RuntimeError, NotImplementedError):
        return twice_backward
    return forward


def _ggn_product(
    product: CurvatureProduct, inputs: Rows, targets: Tensor, weights: Tensor
) -> Multiply:
    outputs_of = product._outputs(inputs)
    outputs, pull_back, *_ = vjp(outputs_of, product.parameters)
    push = _pushed(outputs_of, product.parameters)
    curved = _at_outputs(product, outputs.detach(), targets, weights)

    def multiply(vector: Tensor) -> Tensor:
        moved = push(unflatten(vector, product.parameters))
        return flatten(pull_back(curved(moved))[0])

    return multiply


def _at_outputs(
    product: CurvatureProduct, outputs: Tensor, targets: Tensor, weights: Tensor
) -> Multiply:
    """Multiply by the Hessian of the weighted loss at the outputs: (n, ...) -> (n, ...)."""
    loss = product.network.loss
    if outputs.ndim < 3 and not isinstance(loss, CrossEntropy | BinaryCrossEntropy | SquaredError):
        values, vectors = torch.linalg.eigh(loss.hessian(outputs, targets))
        # a loss that is not convex in the outputs lends its positive part
        positive = (vectors * values.clamp_min(0)[:, None]) @ vectors.mT * weights[:, None, None]

        def by_matrix(moved: Tensor) -> Tensor:
            flat = moved.reshape(len(moved), -1, 1)
            return (positive @ flat).reshape(moved.shape)

        return by_matrix
    slope = torch.func.grad(lambda z: (weights * loss.value(z, targets)).sum())

    def by_slope(moved: Tensor) -> Tensor:
        changed: Tensor = jvp(slope, (outputs,), (moved,))[1]
        return changed

    return by_slope


def _hessian_product(
    product: CurvatureProduct, inputs: Rows, targets: Tensor, weights: Tensor
) -> Multiply:
    loss = product.network.loss

    def mean_loss(values: Parameters) -> Tensor:
        return (weights * loss.value(product.network(inputs, values), targets)).sum()

    def multiply(vector: Tensor) -> Tensor:
        tangent = unflatten(vector, product.parameters)
        gradient = torch.func.grad(mean_loss)
        try:
            return flatten(jvp(gradient, (product.parameters,), (tangent,))[1])
        except NotImplementedError:
            _, pull_back, *_ = vjp(gradient, product.parameters)
            return flatten(pull_back(tangent)[0])

    return multiply


_PRODUCTS = {"ggn": _ggn_product, "hessian": _hessian_product}


def dense_curvature(product: CurvatureProduct, *, chunk: int = 256) -> Tensor:
    """Write the whole curvature matrix out, for small networks: -> (n_parameters, n_parameters)."""
    size = sum(p.numel() for p in product.parameters.values())
    like = next(iter(product.parameters.values()))
    columns = [
        product(torch.eye(size, dtype=like.dtype, device=like.device)[start : start + chunk])
        for start in range(0, size, chunk)
    ]
    matrix = torch.cat(columns)
    return (matrix + matrix.T) / 2
