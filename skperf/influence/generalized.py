"""Generalised influence: change few parameters, silence the gradient of all.

With S the chosen parameters and ``H_S`` the curvature's columns at S (all rows), the update is
``argmin_d |H_S d - g|^2 + ridge |d|^2``: the gradient change is matched on all parameters, the
fixed ones included (Lyu, Jang, Ryu, Yang, arXiv 2312.05586).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from skperf.backbone.modes import forward_hooks
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters, flatten
from skperf.backbone.rows import Rows
from skperf.influence.gradients import Dense, Gradients, combine, inner
from skperf.influence.layers import Layer, from_vectors, to_vectors
from skperf.influence.solvers import Solution, lsmr

Multiply = Callable[[Tensor], Tensor]
_UNIT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)


def unit_strengths(
    network: Network, inputs: Rows, targets: Tensor, layers: Sequence[Layer], by: str
) -> dict[str, Tensor]:
    """Mean pre-activation, or size of the mean gradient, of units: inputs, targets (n, ...)."""
    # Pre-activations keep their sign: where a rectifier follows, the weights of a unit far below
    # zero do nothing, and the most negative logit is not that of the class.
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            outputs[name] = output if output.requires_grad else output.detach().requires_grad_()
            return outputs[name].clone()

        return hook

    chosen = [layer for layer in layers if layer.sites and isinstance(layer.module, _UNIT_LAYERS)]
    if not chosen:
        return {}
    with forward_hooks({layer.module: keep(layer.name) for layer in chosen}):
        results = network(inputs)
    # in order of execution, without the layers that do not run
    seen = outputs
    if by != "output":
        total = network.loss.value(results, targets).sum()
        # what runs under no_grad has no gradient
        slopes = torch.autograd.grad(total, list(seen.values()), materialize_grads=True)
        seen = dict(zip(seen, slopes, strict=True))
    means = {}
    for layer in chosen:
        if layer.name not in seen:
            continue
        axis = -1 if isinstance(layer.module, nn.Linear) else 1
        mean = seen[layer.name].detach().movedim(axis, 0).flatten(1).mean(1)
        means[layer.name] = mean if by == "output" else mean.abs()
    return means


def choose_units(
    layers: Sequence[Layer],
    like: Parameters,
    strengths: dict[str, Tensor],
    ratio: float,
    generator: torch.Generator,
) -> Tensor:
    """Mark the weights of the strongest units, layer by layer."""
    # Whole units are taken until the layer's quota is full; what is left of it goes to a random
    # part of the next unit.
    chosen = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in like.items()}
    for layer in layers:
        if layer.name not in strengths:
            continue
        strength = strengths[layer.name].cpu()
        masks = [chosen[name].view(len(strength), -1) for name in layer.names]
        width = sum(mask.shape[1] for mask in masks)
        whole, rest = divmod(int(ratio * layer.n_weights), width)
        order = strength.argsort(descending=True, stable=True)
        for mask in masks:
            mask[order[:whole]] = True
        if rest and whole < len(order):
            partial = torch.randperm(width, generator=generator)[:rest]
            row = torch.zeros(width, dtype=torch.bool)
            row[partial] = True
            start = 0
            for mask in masks:
                mask[order[whole]] = row[start : start + mask.shape[1]]
                start += mask.shape[1]
    return flatten(chosen)


def choose_by_saliency(gradient: Tensor, curvature: Tensor, ratio: float) -> Tensor:
    """Mark the parameters whose change pays most, gradient^2 / curvature: (n_parameters,) each."""
    saliency = gradient.square() / curvature
    chosen = torch.zeros_like(saliency, dtype=torch.bool)
    chosen[saliency.argsort(descending=True)[: max(1, int(ratio * len(saliency)))]] = True
    return chosen


def row_product(
    layers: Sequence[Layer], like: Parameters, rows: Gradients, damping: float | Tensor
) -> Multiply:
    """Make products with a damped curvature ``A'A + damping`` from its rows."""

    def multiply(vectors: Tensor) -> Tensor:
        weights = inner(from_vectors(layers, vectors.cpu(), like), rows)
        products = [Dense(combine(weights, row)) for row in rows]
        return to_vectors(layers, products, like).to(vectors.device) + damping * vectors

    return multiply


def generalized_update(
    multiply: Multiply, chosen: Tensor, gradients: Tensor, **options: Any
) -> Solution:
    """Solve the generalised influence problem, options of `lsmr`: gradients (m, n_parameters)."""
    where = chosen.nonzero()[:, 0]
    solution = lsmr(
        lambda d: multiply(_spread(d, chosen)),
        lambda v: multiply(v)[:, where],
        gradients,
        **options,
    )
    return replace(solution, values=_spread(solution.values, chosen))


def _spread(values: Tensor, chosen: Tensor) -> Tensor:
    full = values.new_zeros(len(values), len(chosen))
    full[:, chosen] = values
    return full


def generalized_query(
    multiply: Multiply, chosen: Tensor, gradients: Tensor, **options: Any
) -> Tensor:
    """Vectors whose products with gradients are influences: (m, p) -> (m, p)."""
    # `g_t[S]' (H_S'H_S + ridge)^-1 H_S' g_i = y_t' g_i` with `y_t = H_S (H_S'H_S + ridge)^-1
    # g_t[S]`, the least-norm solution of a damped problem.
    where = chosen.nonzero()[:, 0]
    # min |y|^2 over y with H_S'y ~ g: the same damped least squares with the roles exchanged
    return lsmr(
        lambda v: multiply(v)[:, where],
        lambda d: multiply(_spread(d, chosen)),
        gradients[:, where],
        **options,
    ).values


def removal_update(
    how: str, multiply: Multiply, chosen: Tensor, gradient: Tensor, **options: Any
) -> Tensor:
    """Direction that unlearns rows, by one of several rules: gradient (p,) -> (p,)."""
    g = gradient[None]
    if how == "ascent":
        return gradient * chosen
    if how == "gif":
        return generalized_update(multiply, chosen, g, **options).values[0]
    if how == "freeze":

        def inside(vectors: Tensor) -> Tensor:
            return multiply(vectors * chosen) * chosen

        return lsmr(inside, inside, g * chosen, **options).values[0]
    update = lsmr(multiply, multiply, g, **options).values[0]
    return update * chosen if how == "project" else update


REMOVALS = ("ascent", "freeze", "gif", "plain", "project")
