"""Gates on the components of a network: ablate, and differentiate.

A gate of 1 keeps a component and a gate of 0 ablates it; in between, what comes out is
``replacement + gate * (output - replacement)``. What replaces an ablated component is the
layer's bias (weight rows zeroed, as released), zero, a mean, the value on another
example, or whatever a function makes of the output.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.backbone.modes import forward_hooks, untouched
from skperf.backbone.network import Network
from skperf.backbone.outputs import Output
from skperf.components.folding import Trace, fold, private_copy, trace
from skperf.components.taps import Tap, make_taps, scale_weights, tapped
from skperf.components.units import Component

Ablation = str | float | Callable[[Tensor], Tensor]
ABLATIONS = ("zero", "zero_output", "mean", "resample")
_ROWS_PER_PASS = 64
_SMALL_BATCH = 32
_GRADIENT_FLOATS = 60_000_000


class Circuit:
    """A network with a gate on every chosen component."""

    # The user's module is copied, batch normalisations are folded into the layers before them
    # where that changes nothing, and all work is done on the copy.

    def __init__(
        self,
        network: Network,
        components: Sequence[Component],
        examples: Tensor,
        *,
        ablation: Ablation = "zero",
        accelerate: bool = True,
    ) -> None:
        if isinstance(ablation, str) and ablation not in ABLATIONS:
            raise ValueError(
                f"ablation={ablation!r} is unknown; use one of {ABLATIONS}, a scale or a function."
            )
        self.components = list(components)
        self.ablation = ablation
        self.examples = examples[:256]
        self.network, self.copied = private_copy(network, examples[:2])
        seen = trace(self.network, examples[:2])
        self._build(seen)
        if self.copied and accelerate and seen.followers:
            seen = self._fold_if_nothing_changes(network, seen)
        self._folded = any(isinstance(part, nn.Identity) for part in self.network.module.modules())
        self._floats_per_row = seen.floats
        self._prefix = self._before_the_gates(seen) if self.copied and accelerate else []

    @property
    def n_components(self) -> int:
        """Number of gates."""
        return len(self.components)

    @property
    def scales_weights(self) -> bool:
        """Whether ablating the same components in every row is scaling some weights."""
        local = self.ablation in ("mean", "resample") or callable(self.ablation)
        return self.copied and not local and all(tap.scaled for tap in self._taps)

    def outputs(
        self, inputs: Tensor, codes: Tensor, output: Output, masks: Tensor, *, first: int = 0
    ) -> Tensor:
        """Compute true outputs under ablation.

        Shapes: inputs (n, ...), codes (n,), masks (m, n_components) -> (n, m).
        """
        values = self._values(masks)
        size = min(self.network.batch_size, _ROWS_PER_PASS)
        parts = []
        with untouched(self.network.module):
            for start in range(0, len(inputs), size):
                rows, labels = inputs[start : start + size], codes[start : start + size]
                parts.append(self._batch(rows, labels, output, values, first))
        return torch.cat(parts)

    def gradients(
        self, inputs: Tensor, codes: Tensor, output: Output, gates: Tensor, *, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Compute outputs and their derivatives with respect to every gate.

        Shapes: inputs (n, ...), codes (n,), gates (n_components,) or (n, n_components) -> values
        (n,), gradients (n, n_components).
        """
        size = max(1, min(_ROWS_PER_PASS, _GRADIENT_FLOATS // max(self._floats_per_row, 1)))
        values, gradients = [], []
        with untouched(self.network.module):
            self._replace_by(range(first, first + 1))
            for start in range(0, len(inputs), size):
                rows, labels = inputs[start : start + size], codes[start : start + size]
                here = gates if gates.ndim == 1 else gates[start : start + size]
                leaf = here.to(rows.device, self.network.dtype).expand(len(rows), -1).clone()
                leaf.requires_grad_(True)
                with torch.enable_grad(), self._gated(self._values(leaf)):
                    result = output(self.network(rows), labels)
                    (gradient,) = torch.autograd.grad(result.sum(), leaf)
                values.append(result.detach().cpu())
                gradients.append(gradient.cpu())
        return torch.cat(values), torch.cat(gradients)

    def edited_module(self, module: nn.Module, mask: Tensor) -> nn.Module:
        """Copy a network with an ablation made permanent: mask (n_components,)."""
        values = self._values(mask[None])
        if self.scales_weights and not (self._folded and self.ablation == "zero_output"):
            changed = deepcopy(module)
            with_bias = self.ablation == "zero_output"
            scale_weights(make_taps(changed, self.components, with_bias=with_bias), values[0])
            return changed
        return Gated(self, values)

    def _values(self, masks: Tensor) -> Tensor:
        """Gate values and one more that is always open, (m, n_components + 1)."""
        values = masks.to(self.network.device, self.network.dtype)
        if isinstance(self.ablation, float | int):
            values = self.ablation + (1 - self.ablation) * values
        return functional.pad(values, (0, 1), value=1.0)

    def _build(self, seen: Trace) -> None:
        output_itself = self.ablation not in ("zero",) and not isinstance(
            self.ablation, float | int
        )
        module = self.network.module
        self._taps = make_taps(module, self.components, with_bias=self.ablation == "zero_output")
        for tap in self._taps:
            follower = seen.followers.get(tap.part)
            if not output_itself:
                tap.replacement = tap.bias
            elif follower is not None:
                tap.part, tap.scaled = follower, []
        if self.ablation == "mean":
            means = self._captured(self.examples, along_channels=True)
            for tap in self._taps:
                tap.replacement = means[tap]

    def _fold_if_nothing_changes(self, network: Network, seen: Trace) -> Trace:
        """Fold, and go back to a plain copy if an output were to differ."""
        mask = (torch.arange(self.n_components) % 7 != 3).float()
        before = [self._probe(torch.ones_like(mask)), self._probe(mask)]
        fold(self.network, seen.followers)
        folded = trace(self.network, self.examples[:2])
        self._build(folded)
        after = [self._probe(torch.ones_like(mask)), self._probe(mask)]
        scale = max(float(logits.abs().max()) for logits in before)
        if all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-4 * scale)
            for a, b in zip(before, after, strict=True)
        ):
            return folded
        self.network, self.copied = private_copy(network, self.examples[:2])
        seen = trace(self.network, self.examples[:2])
        self._build(seen)
        return seen

    def _probe(self, mask: Tensor) -> Tensor:
        with untouched(self.network.module), torch.inference_mode():
            self._replace_by(range(1))
            with self._gated(self._values(mask[None])):
                return self.network(self.examples[:2])

    def _before_the_gates(self, seen: Trace) -> list[nn.Module]:
        """Modules called once, before anything gated: their outputs never change."""
        gated = {part for tap in self._taps for part in tap.part.modules()}
        ends = [position for position, part in enumerate(seen.order) if part in gated]
        before = seen.order[: ends[0]] if ends else []
        return [part for part in before if seen.order.count(part) == 1]

    def _batch(
        self, rows: Tensor, codes: Tensor, output: Output, values: Tensor, first: int
    ) -> Tensor:
        together = min(len(values), max(1, _SMALL_BATCH // len(rows)))
        if self.scales_weights and together == 1:
            return self._by_weights(rows, codes, output, values)
        columns = []
        with self._remembering(rows, together, len(values)):
            for start in range(0, len(values), together):
                part = values[start : start + together]
                self._replace_by(range(first + start, first + start + together))
                # A last group that is too small is filled up: what is remembered has its size.
                filled = torch.cat([part, part[:1].expand(together - len(part), -1)])
                with torch.inference_mode(), self._gated(filled):
                    logits = self.network(_repeat(rows, together))
                    result = output(logits, codes.repeat(together))
                columns.append(result.view(together, len(rows)).T[:, : len(part)].cpu())
        return torch.cat(columns, 1)

    def _by_weights(self, rows: Tensor, codes: Tensor, output: Output, values: Tensor) -> Tensor:
        columns = []
        try:
            with self._remembering(rows, 1, len(values)):
                for value in values:
                    scale_weights(self._taps, value)
                    with torch.inference_mode():
                        columns.append(output(self.network(rows), codes).cpu())
        finally:
            scale_weights(self._taps, torch.ones_like(values[0]))
        return torch.stack(columns, 1)

    @contextmanager
    def _remembering(self, rows: Tensor, together: int, n_masks: int) -> Iterator[None]:
        """Compute what comes before the first gate once for all masks of a batch."""
        if not self._prefix or n_masks <= 2 * together:
            yield
            return
        made: dict[nn.Module, Tensor] = {}

        def keep(part: nn.Module, _: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made[part] = output

        with torch.no_grad(), forward_hooks(dict.fromkeys(self._prefix, keep)):
            self.network(_repeat(rows, together))
        # What was changed in place afterwards must be computed anew.
        usable = {part: output for part, output in made.items() if output._version == 0}
        with ExitStack() as stack:
            for part, output in usable.items():
                part.__dict__["forward"] = _Recall(output)
                stack.callback(part.__dict__.pop, "forward")
            yield

    @contextmanager
    def _gated(self, values: Tensor) -> Iterator[None]:
        with tapped({tap: self._gate(tap, values) for tap in self._taps}):
            yield

    def _gate(self, tap: Tap, values: Tensor) -> Callable[[Tensor], Tensor]:
        gates = values.index_select(1, tap.channels)

        def mix(output: Tensor) -> Tensor:
            weights = _along(_per_row(gates, len(output)), tap.dim, output.ndim)
            if callable(self.ablation):
                return torch.lerp(self.ablation(output), output, weights)
            if tap.replacement is None:
                return output * weights
            instead = tap.replacement
            if instead.ndim == 1:
                instead = _along(instead[None], tap.dim, output.ndim)
            return torch.lerp(_per_row(instead, len(output)), output, weights)

        return mix

    def _replace_by(self, numbers: range) -> None:
        """With "resample", capture the activations of one donor for each mask."""
        if self.ablation == "resample":
            donors = self.examples[[number % len(self.examples) for number in numbers]]
            for tap, activations in self._captured(donors).items():
                tap.replacement = activations

    def _captured(self, inputs: Tensor, *, along_channels: bool = False) -> dict[Tap, Tensor]:
        made: dict[Tap, Tensor] = {}

        def watch(tap: Tap) -> Callable[[Tensor], None]:
            def keep(output: Tensor) -> None:
                flat = (
                    output.movedim(tap.dim, -1).flatten(0, -2).mean(0) if along_channels else output
                )
                made[tap] = flat

            return keep

        watchers = {tap: watch(tap) for tap in self._taps}
        with untouched(self.network.module), torch.no_grad(), tapped(watchers):
            self.network(inputs)
        return made


class Gated(nn.Module):
    """A network with some components ablated for good."""

    def __init__(self, circuit: Circuit, values: Tensor) -> None:
        super().__init__()
        self.circuit = deepcopy(circuit)
        self.inner = self.circuit.network.module
        self.register_buffer("values", values.clone())
        self.circuit._replace_by(range(1))

    def forward(self, inputs: Tensor) -> Any:
        """Run the gated network: inputs (n, ...)."""
        with self.circuit._gated(self.get_buffer("values")):
            return self.inner(inputs)


class _Recall:
    """Stands in for a forward method."""

    def __init__(self, output: Tensor) -> None:
        self.output = output

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output


def _repeat(rows: Tensor, times: int) -> Tensor:
    return rows if times == 1 else rows.repeat(times, *[1] * (rows.ndim - 1))


def _per_row(table: Tensor, n_rows: int) -> Tensor:
    """One entry for each row of an output, given one for each mask or example."""
    if len(table) in (1, n_rows):
        return table
    return table.repeat_interleave(n_rows // len(table), 0)


def _along(table: Tensor, dim: int, ndim: int) -> Tensor:
    shape = [len(table), *[1] * (ndim - 1)]
    shape[dim] = table.shape[1]
    return table.view(shape)
