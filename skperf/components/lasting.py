"""Make an ablation permanent in a copy of a network, so that training cannot undo it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.components.gates import Circuit, Tap
from skperf.components.taps import opened_attention, with_first
from skperf.components.units import Spot
from skperf.components.wiring import Layout


class Gate(nn.Module):
    """Stands at a module for good, and puts something in the place of what it returns or takes."""

    # It is part of the network: it is copied, cast and moved with it, and lets no gradient reach
    # the weights behind a closed gate, so that these stay at zero in training.
    def __init__(
        self,
        dim: int,
        kept: Tensor,
        instead: Sequence[Tensor | None],
        layouts: Sequence[Layout | None],
        *,
        function: Any = None,
        positions: tuple[int, ...] | None = None,
        stores: bool = False,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.layouts = list(layouts)
        self.function = function
        self.positions = positions
        self.calls = 0
        self.register_buffer("kept", kept.clone(), persistent=stores)
        for call, tensor in enumerate(instead):
            copied = None if tensor is None else tensor.clone()
            self.register_buffer(f"instead_{call}", copied, persistent=stores)

    def forward(self, output: Tensor) -> Tensor:
        """Replace what is ablated: output (..., n_channels, ...)."""
        call = self.calls % len(self.layouts)
        self.calls += 1
        layout, dim = self.layouts[call], self.dim % output.ndim
        weights = self._along(self.get_buffer("kept"), dim, output, 1.0)
        if self.positions is not None:
            weights = self._at_positions(weights, layout, dim, output)
        if self.function is not None:
            return torch.lerp(self.function(output), output, weights)
        instead = getattr(self, f"instead_{call}")
        if instead is None:
            return output * weights
        if instead.ndim == 1:
            instead = self._along(instead, dim, output, 0.0)
        elif layout is None:
            instead = instead[0]
        else:
            n_rows = output.shape[layout.axis] // instead.shape[1]
            instead = layout.join(instead.expand(n_rows, *instead.shape[1:]))
        return torch.lerp(instead.to(output).expand_as(output), output, weights)

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Act behind a module."""
        return with_first(output, self)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Act before a module."""
        return with_first((args, kwargs), self)

    def behind_weights(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Act behind a layer whose own bias stands in."""
        bias = module._parameters.get("bias")
        if bias is None:
            return with_first(output, self)

        def mix(tensor: Tensor) -> Tensor:
            dim = self.dim % tensor.ndim
            weights = self._along(self.get_buffer("kept"), dim, tensor, 1.0)
            return torch.lerp(
                self._along(bias, dim, tensor, 0.0).expand_as(tensor), tensor, weights
            )

        return with_first(output, mix)

    def _along(self, values: Tensor, dim: int, output: Tensor, beyond: float) -> Tensor:
        size = output.shape[dim]
        values = functional.pad(values, (0, size - len(values)), value=beyond)
        shape = [1] * output.ndim
        shape[dim] = size
        return values.view(shape).to(output)

    def _at_positions(
        self, weights: Tensor, layout: Layout | None, dim: int, output: Tensor
    ) -> Tensor:
        axis = [a for a in range(output.ndim) if a != dim and (layout is None or a != layout.axis)]
        chosen = torch.zeros(output.shape[axis[0]]).to(output)
        chosen[list(self.positions or ())] = 1
        return 1 - self._along(chosen, axis[0], output, 0.0) * (1 - weights)


def make_lasting(module: nn.Module, circuit: Circuit, mask: Tensor) -> None:
    """Ablate components of a copy of the circuit's network for good: mask (n_components,)."""
    values = circuit.values(mask[None])[0].detach()
    rule, wiring = circuit.rule, circuit.wiring
    for site in wiring.sites:
        touched = [tap for tap in circuit.taps if tap.spot in site.spots]
        closed = [tap for tap in touched if bool((values[tap.channels] != 1).any())]
        if not closed:
            continue
        if rule.scales and site.weights:
            for spot in site.weights:
                _scale(module, spot, [values[tap.channels] for tap in _once(closed)])
            if rule.kind != "zero":
                continue
        for tap in closed:
            if tap.spot.is_activation:
                _stand(module, circuit, tap, values[tap.channels])
            else:
                _scale(module, tap.spot, [values[tap.channels]])


def _once(taps: Sequence[Tap]) -> list[Tap]:
    """Taps at the first of a site's tensors: the others carry the same gates."""
    return [tap for tap in taps if tap.spot == taps[0].spot]


def _scale(module: nn.Module, spot: Spot, factors: Sequence[Tensor]) -> None:
    own = module.get_submodule(spot.module)._parameters[spot.side]
    assert own is not None
    with torch.no_grad():
        for factor in factors:
            size = own.shape[spot.dim]
            shape = [1] * own.ndim
            shape[spot.dim] = size
            padded = functional.pad(factor, (0, size - len(factor)), value=1.0)
            own.mul_(padded.view(shape).to(own))


def _stand(module: nn.Module, circuit: Circuit, tap: Tap, kept: Tensor) -> None:
    part = module.get_submodule(tap.spot.module)
    rule, wiring = circuit.rule, circuit.wiring
    n_calls = max(wiring.n_calls.get(tap.spot, 1), 1)
    keys = [(tap.spot, call) for call in range(n_calls)]
    instead = [circuit.instead.get(key) for key in keys]
    gate = Gate(
        tap.spot.dim,
        kept,
        instead,
        [wiring.layouts.get(key) for key in keys],
        function=rule.kind if callable(rule.kind) else None,
        positions=rule.positions,
        stores=rule.kind in ("mean", "resample"),
    )
    gate.train(part.training)
    name = f"ablation_{sum(key.startswith('ablation_') for key in part._modules)}"
    part.add_module(name, gate)
    if tap.spot.side == "input":
        opened_attention(module)  # its projection must be called for the gate to be reached
        part.register_forward_pre_hook(gate.before, with_kwargs=True)
    elif tap.bias is not None:
        part.register_forward_hook(gate.behind_weights)
    else:
        part.register_forward_hook(gate.after)
