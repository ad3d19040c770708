"""Make an ablation permanent in a copy of a network, so that training cannot undo it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from skperf.components.gates import Circuit, Rule, Tap, along, blend, padded
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
        rule: Rule,
        keeps_bias: bool,
        stores: bool = True,
    ) -> None:
        super().__init__()
        self.dim, self.layouts, self.keeps_bias, self.calls = dim, list(layouts), keeps_bias, 0
        self.rule = Rule(rule.kind, positions=rule.positions)
        self.register_buffer("kept", kept.clone(), persistent=stores)
        for call, tensor in enumerate(instead):
            copied = None if tensor is None else tensor.clone()
            self.register_buffer(f"instead_{call}", copied, persistent=stores)

    def forward(self, output: Tensor, bias: Tensor | None = None) -> Tensor:
        """Replace what is ablated: output (..., n_channels, ...)."""
        call = self.calls % len(self.layouts)
        self.calls += 1
        layout, instead = self.layouts[call], getattr(self, f"instead_{call}")
        instead = bias if instead is None else instead
        n_rows = 1
        if layout is not None and instead is not None and instead.ndim > 1:
            n_rows = output.shape[layout.axis] // instead.shape[1]
        kept = self.get_buffer("kept")[None]
        return blend(output, kept, instead, layout, self.dim, self.rule, n_rows)

    def anew(self, module: nn.Module, args: Any) -> None:
        """Count calls from the first: the last pass may have been broken off."""
        self.calls = 0

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Act behind a module; the bias of a layer stands in for its rows."""
        bias = module._parameters.get("bias") if self.keeps_bias else None
        return with_first(output, lambda tensor: self(tensor, bias))

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Act before a module."""
        return with_first((args, kwargs), self)


class Still(nn.Module):
    """Keeps slices of a parameter at zero: training reads a product that lets no gradient there."""

    def __init__(self, module: str, side: str) -> None:
        super().__init__()
        self.module, self.side, self.dims = module, side, list[int]()

    def watch(self, root: nn.Module) -> None:
        """Act in every pass of a network."""
        _add(root.get_submodule(self.module), self)
        root.register_forward_pre_hook(self.before)
        root.register_forward_hook(self.after, always_call=True)

    def close(self, dim: int, kept: Tensor) -> None:
        """Take in more slices, already at zero: kept (n_channels,)."""
        self.register_buffer(f"kept_{len(self.dims)}", kept.clone(), persistent=False)
        self.dims.append(dim)

    def before(self, root: nn.Module, args: Any) -> None:
        """Lay the product over the parameter."""
        product: Tensor | None = root.get_submodule(self.module)._parameters[self.side]
        assert product is not None
        if product.requires_grad and torch.is_grad_enabled():
            for dim, kept in zip(self.dims, self.buffers(), strict=True):
                product = product * along(padded(kept, product.shape[dim]), dim, product.ndim)
            self._lay(root, product)

    def after(self, root: nn.Module, args: Any, output: Any) -> None:
        """Take it away, also where the pass was broken off."""
        self._lay(root, None)

    def _lay(self, root: nn.Module, product: Tensor | None) -> None:
        own = root.get_submodule(self.module)._parameters[self.side]
        for part in root.modules():  # whoever shares it
            for name in [name for name, tensor in part._parameters.items() if tensor is own]:
                part.__dict__.pop(name, None)
                part.__dict__.update({} if product is None else {name: product})
                if isinstance(part, nn.RNNBase):  # it has a list of its own
                    part._flat_weights = [getattr(part, n) for n in part._flat_weights_names]


def make_lasting(module: nn.Module, circuit: Circuit, mask: Tensor) -> None:
    """Ablate components of a copy of the circuit's network for good: mask (n_components,)."""
    values = circuit.values(mask[None])[0].detach()
    rule = circuit.rule
    for site in circuit.wiring.sites:
        taps = [tap for tap in circuit.taps if tap.spot in site.spots]
        closed = [tap for tap in taps if bool((values[tap.channels] != 1).any())]
        scaled = bool(closed and rule.scales and site.weights)
        if scaled:
            # the site's other tensors carry the same gates
            for tap in [tap for tap in closed if tap.spot == closed[0].spot]:
                for spot in site.weights:
                    _scale(module, spot, values[tap.channels])
            if rule.kind != "zero":
                continue
        for tap in closed:
            if tap.spot.is_activation:
                # zeros are in the weights as well, means are nowhere else
                _stand(module, circuit, tap, values[tap.channels], stores=not scaled)
            else:
                _scale(module, tap.spot, values[tap.channels])
                if rule.kind == "zero":
                    _still(module, tap.spot).close(tap.spot.dim, values[tap.channels])


def _scale(module: nn.Module, spot: Spot, factors: Tensor) -> None:
    own = module.get_submodule(spot.module)._parameters[spot.side]
    assert own is not None
    with torch.no_grad():
        own.mul_(along(padded(factors, own.shape[spot.dim]), spot.dim, own.ndim).to(own))


def _stand(module: nn.Module, circuit: Circuit, tap: Tap, kept: Tensor, *, stores: bool) -> None:
    part, wiring = module.get_submodule(tap.spot.module), circuit.wiring
    keys = [(tap.spot, call) for call in range(max(wiring.n_calls.get(tap.spot, 1), 1))]
    instead = [circuit.instead.get(key) for key in keys]
    layouts = [wiring.layouts.get(key) for key in keys]
    gate = Gate(tap.spot.dim, kept, instead, layouts, circuit.rule, tap.bias is not None, stores)
    _add(part, gate)
    module.register_forward_pre_hook(gate.anew)
    opened_attention(module)  # its projection must be called for the gate to be reached
    if tap.spot.side == "input":
        part.register_forward_pre_hook(gate.before, with_kwargs=True)
    else:
        part.register_forward_hook(gate.after)


def _still(root: nn.Module, spot: Spot) -> Still:
    for known in root.get_submodule(spot.module)._modules.values():
        if isinstance(known, Still) and known.side == spot.side:
            return known
    still = Still(spot.module, spot.side)
    still.watch(root)
    return still


def _add(part: nn.Module, gate: nn.Module) -> None:
    gate.train(part.training)
    part.add_module(f"ablation_{sum(key.startswith('ablation_') for key in part._modules)}", gate)
