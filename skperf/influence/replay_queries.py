"""What is asked of a training run: gradients of queries at its end, and a basis of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skperf.backbone.parameters import substituted
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Run, floating_buffers, split_state
from skperf.backbone.views import own_copy
from skperf.influence.curvature import PlainAttention
from skperf.influence.replay_products import BATCH_NORM

Value = Callable[[Tensor, Tensor], Tensor]


def query_gradients(
    run: Run,
    end: Tensor,
    inputs: Rows,
    targets: Tensor,
    value: Value | None = None,
    *,
    aggregate: bool = False,
) -> Tensor:
    """Gradients of queries (q, ...) at the end of the run, or of their mean: (q, p) or (1, p)."""
    module = _at_end(run, end)
    state = split_state(run, module, end)
    names, leaves = run.names, [*state.parameters, *state.buffers]
    targets = targets.to(end.device)
    of = run.loss.value if value is None else value

    def total(tensors: list[Tensor], rows: Any, targets: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=False))
        statistics = _with_statistics(module, tensors[len(names) :])
        # fused attention has no rule for many rows at once
        with statistics, substituted(module, given), PlainAttention():
            outputs = run.compute(module, Rows.of(rows))
        return of(outputs, targets).sum()

    pieces = []
    for start in range(0, len(inputs), 64):
        rows, own = inputs[start : start + 64].load(), targets[start : start + 64]
        if aggregate:
            pieces.append(_gradient(total, leaves, rows, own)[None] / len(inputs))
        else:
            pieces.append(_each(total, leaves, rows, own))
    return torch.stack(pieces).sum(0) if aggregate else torch.cat(pieces)


def _each(total: Callable[..., Tensor], leaves: list[Tensor], rows: Rows, y: Tensor) -> Tensor:
    try:
        per_row = torch.func.vmap(torch.func.grad(total), (None, 0, 0))
        gradients = per_row(leaves, rows.map(lambda leaf: leaf[:, None]).tree, y[:, None])
        return torch.cat([gradient.reshape(len(y), -1) for gradient in gradients], 1)
    except RuntimeError:  # layers that vmap has no rule for
        one = [slice(i, i + 1) for i in range(len(y))]
        return torch.stack([_gradient(total, leaves, rows[i], y[i]) for i in one])


def _gradient(total: Callable[..., Tensor], leaves: list[Tensor], rows: Rows, y: Tensor) -> Tensor:
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with torch.enable_grad():
        value = total(own, rows.tree, y)
    found = torch.autograd.grad(value, own, materialize_grads=True, allow_unused=True)
    return torch.cat([gradient.reshape(-1) for gradient in found])


def _at_end(run: Run, end: Tensor) -> nn.Module:
    module = own_copy(run.module)
    state = split_state(run, module, end)
    for own, value in zip(floating_buffers(module).values(), state.buffers, strict=True):
        own.copy_(value)
    return module.requires_grad_(False).eval()


@contextmanager
def _with_statistics(module: nn.Module, buffers: Sequence[Tensor]) -> Iterator[None]:
    """Let batch normalisation in evaluation mode be differentiable by its running statistics."""
    owned = floating_buffers(module).values()
    where = {id(own): value for own, value in zip(owned, buffers, strict=True)}

    def normalised(part: Any, args: Any, output: Tensor) -> Tensor:
        shape = (1, -1, *[1] * (output.ndim - 2))
        mean, var = (where[id(b)].view(shape) for b in (part.running_mean, part.running_var))
        result: Tensor = (args[0] - mean) / (var + part.eps).sqrt()
        if part.weight is not None:
            result = result * part.weight.view(shape) + part.bias.view(shape)
        return result

    handles = [
        part.register_forward_hook(normalised)
        for part in module.modules()
        if isinstance(part, BATCH_NORM) and part.running_mean is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Basis:
    """A few directions that the gradients of many queries lie in."""

    directions: Tensor  # (m, p)
    coefficients: Tensor  # (q, m)
    error: float  # largest relative error of a query's gradient


def basis_of(gradients: Tensor, tolerance: float) -> Basis:
    """Find the fewest directions that leave no query a larger relative error: (q, p)."""
    norms = gradients.norm(dim=1).clamp_min(torch.finfo(gradients.dtype).tiny)
    # every query counts alike, however small its gradient: its scores are read by themselves
    unit = gradients / norms[:, None]
    # squared errors below the rounding of float32 are asked about
    wide = unit.double()
    gram = wide @ wide.T
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    left = (gram.diagonal()[:, None] - (vectors.square() * values).cumsum(1)).clamp_min(0)
    errors = left.sqrt().amax(0)
    enough = (errors <= tolerance).nonzero()
    m = int(enough[0]) + 1 if len(enough) else len(values)
    if tolerance == 0 or m >= len(gradients):
        eye = torch.eye(len(gradients), dtype=gradients.dtype, device=gradients.device)
        return Basis(unit, eye * norms[:, None], 0.0)
    roots = values[:m].sqrt()
    directions = (vectors[:, :m] / roots).T.to(unit) @ unit
    coefficients = (vectors[:, :m] * roots).to(unit) * norms[:, None]
    return Basis(directions, coefficients, float(errors[m - 1]))
