"""Curvature of the mean training loss, from the rows of its Gauss-Newton form.

The Gauss-Newton matrix (for a softmax classifier also the Fisher matrix with the exact
expectation over labels) is ``C = sum_i w_i J_i' H_i J_i`` with ``H_i = diag(p_i) - p_i p_i'``.
Each eigenpair of an ``H_i`` gives one row of a matrix A with ``C = A' A``; few of the
eigenvalues carry nearly all of the trace. Their rows are pulled back, and a sample of the
others in proportion to their share stands for the rest of the trace; see
:mod:`~skperf.influence.output_rows`.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters, flatten, unflatten
from skperf.influence.gradients import Gradients, gram


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

    def factor(self, damping: float) -> Tensor:
        """Factorise ``A A' + damping``: -> (n_rows, n_rows)."""
        damped = self.gram.to(torch.float64, copy=True)
        damped.diagonal().add_(damping)
        factor: Tensor = torch.linalg.cholesky(damped)
        return factor.to(self.gram)


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of a row-space curvature, for filters other than damping."""

    values: Tensor  # (n_rows,)
    vectors: Tensor  # (n_rows, n_rows)

    @classmethod
    def of(cls, curvature: RowSpace) -> "Spectrum":
        """Decompose a curvature."""
        values, vectors = torch.linalg.eigh(curvature.gram.double())
        keep = values > values[-1:].clamp_min(0) * 1e-9
        return cls(values[keep], vectors[:, keep])

    def coordinates(self, crossed: Tensor) -> Tensor:
        """Components of gradients along the eigenvectors: crossed (n, n_rows) -> (n, n_values)."""
        return crossed.double() @ (self.vectors / self.values.sqrt())


Filter = Callable[[Tensor], Tensor]


def gradient_flow(time: float, weight_decay: float = 0.0) -> Filter:
    """Make the filter of training for a while, ``(1 - exp(-time x)) / x``."""

    def apply(values: Tensor) -> Tensor:
        x = values + weight_decay
        x = torch.where(x.abs() < 1e-12 / time, 1e-12 / time, x)
        return -torch.expm1(-time * x) / x

    return apply


def filtered_weights(values: Tensor, apply: Filter) -> tuple[float, Tensor]:
    """Take a spectral filter apart: a multiple of the identity, and corrections.

    Shapes: values (r,) -> weights (r,).
    """
    # `g' f(C) h = at_zero g'h + sum_k weights_k (g.v_k)(h.v_k)`.
    at_zero = apply(values.new_zeros(1))
    return float(at_zero), apply(values) - at_zero


@dataclass(frozen=True)
class CurvatureProduct:
    """Products of the curvature of the mean loss with vectors, no matrix formed."""

    network: Network
    parameters: Parameters
    inputs: Tensor  # (n, ...)
    codes: Tensor  # (n,)
    weights: Tensor  # (n,)
    kind: str = "ggn"
    damping: float = 0.0
    batch_size: int = 256

    def __call__(self, vectors: Tensor, rows: Tensor | None = None) -> Tensor:
        """Multiply: vectors (m, n_parameters) -> (m, n_parameters)."""
        _prepare_forward_mode()
        everything = torch.arange(len(self.inputs)) if rows is None else rows
        share = 1.0 if rows is None else float(self.weights.sum() / self.weights[rows].sum())
        result = self.damping * vectors
        for part in torch.split(everything, self.batch_size):
            weights = self.weights[part] * share
            product = _PRODUCTS[self.kind](self, self.inputs[part], self.codes[part], weights)
            with _named_layers(self.network):
                result = result + vmap(product, chunk_size=32)(vectors).detach()
        return result

    def _logits(self, inputs: Tensor) -> Callable[[Parameters], Tensor]:
        return lambda values: self.network(inputs, values)


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
            if list(part.parameters(recurse=False)) and not isinstance(part, _DIFFERENTIABLE)
        ]
        raise ValueError(
            "methods that multiply by the curvature ('cg', 'lissa', 'arnoldi', 'exact', 'gif') "
            f"cannot differentiate {', '.join(unusual) or type(network.module).__name__}: "
            f"{str(error).splitlines()[0]} Use method='ggn' or 'ekfac', or leave the layer out "
            "with parameters=..."
        ) from error


_DIFFERENTIABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Embedding,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.batchnorm._NormBase,
)


@cache
def _prepare_forward_mode() -> None:
    # torch compiles some rules at first use and then warns about its own compiler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")


def _ggn_product(
    product: CurvatureProduct, inputs: Tensor, codes: Tensor, weights: Tensor
) -> Callable[[Tensor], Tensor]:
    logits, pull_back, *_ = vjp(product._logits(inputs), product.parameters)
    p = logits.softmax(1)

    def multiply(vector: Tensor) -> Tensor:
        tangent = unflatten(vector, product.parameters)
        _, moved, *_ = jvp(product._logits(inputs), (product.parameters,), (tangent,))
        weighted = weights[:, None] * p * (moved - (p * moved).sum(1, keepdim=True))
        return flatten(pull_back(weighted)[0])

    return multiply


def _hessian_product(
    product: CurvatureProduct, inputs: Tensor, codes: Tensor, weights: Tensor
) -> Callable[[Tensor], Tensor]:
    def mean_loss(values: Parameters) -> Tensor:
        losses = torch.nn.functional.cross_entropy(
            product.network(inputs, values), codes, reduction="none"
        )
        return (weights * losses).sum()

    def multiply(vector: Tensor) -> Tensor:
        tangent = unflatten(vector, product.parameters)
        gradient = torch.func.grad(mean_loss)
        return flatten(jvp(gradient, (product.parameters,), (tangent,))[1])

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
