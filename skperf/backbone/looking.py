"""Run one row and look at what comes out: which entry holds the outputs, and what they are."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from skperf.backbone.losses import Loss
from skperf.backbone.network import (
    AsRows,
    Field,
    Network,
    Readout,
    chained,
    log_odds_of_probability,
    log_of_probabilities,
    logits_of_shares,
    two_logits,
)
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows
from skperf.backbone.views import bounds_its_norms

_MOST_BYTES = 2**26
_MANY = 256  # rows that are looked at where two leave a doubt
_HINT = "say which: skperf.from_module(module, readout=lambda returned: ...)."


@dataclass(frozen=True)
class Seen:
    """What one row has shown."""

    readout: Readout | None
    shape: tuple[int, ...]  # of one row's outputs
    draws: bool
    two_classes: bool = False  # told apart by one output


def look(network: Network, X: Rows, *, n_labels: int | None, loss: Loss | None = None) -> Seen:
    """Find the outputs in what a network returns for a row of X; a known readout stays."""
    few = X[: min(2, len(X))]
    generator = torch.Generator().manual_seed(0)
    plain = replace(network, readout=None, draws=False)
    returned, outputs, drawn = _returned(network, few, generator)
    entry, two, final = network.readout, False, None
    if entry is None:
        entry, outputs = _entry(returned, len(few), n_labels, network)
    elif not isinstance(outputs, Tensor) or outputs.shape[:1] != (len(few),):
        shaped = isinstance(outputs, Tensor)
        seen = f"shape {tuple(outputs.shape)}" if shaped else type(outputs).__name__
        raise TypeError(
            f"readout must return a tensor (n, K) or (n,), got {seen} for {len(few)} rows."
        )
    if not outputs.is_floating_point():
        raise TypeError(
            f"{type(network.module).__name__} returns outputs of type {outputs.dtype}, where real "
            f"numbers such as logits are needed. If these are another part of it, {_HINT}"
        )
    if network.readout is None:
        two = n_labels == 2 and _single(outputs)

        def more() -> Tensor:
            with torch.no_grad(), drawing_from(generator):
                returned = plain(*next(plain.batches(X[:_MANY])))
                return returned if entry is None else entry(returned)

        final = _final(outputs, two, loss, more)
    shape = tuple(outputs.shape[1:])
    with suppress(Exception):  # what refuses a row alone says so when it is given one
        alone = replace(plain, draws=True)(*next(plain.batches(few[:1])))
        if (alone if entry is None else entry(alone)).shape != (1, *shape):
            entry = chained(entry, AsRows(shape))  # squeezed where there is one row
    if outputs.element_size() < 4:
        entry = chained(entry, Tensor.float)
    return Seen(
        chained(entry, final), shape if final is None else final(outputs).shape[1:], drawn, two
    )


def _returned(network: Network, few: Rows, generator: torch.Generator) -> tuple[Any, Any, bool]:
    """Run rows few (n, ...): what is returned, what is read out of it, and whether any was drawn.

    Copies of the parameters run, with gradients, so that the last operation can be seen.
    """
    module, plain = network.module, replace(network, readout=None, draws=False)
    scripted = any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())
    known = {id(part.weight) for part in module.modules() if bounds_its_norms(part)}
    large = sum(parameter.nbytes for parameter in module.parameters()) > _MOST_BYTES
    own = {
        name: (p.detach() if large and id(p) not in known else p.detach().clone()).requires_grad_()
        for name, p in module.named_parameters()
        if p.is_floating_point() and not scripted
    }
    # of a large network there is no second copy; what would write to it is stopped before
    shared = {w.untyped_storage().data_ptr() for w in own.values()} if large else set()
    sums = {} if large else {name: _digest(weight) for name, weight in own.items()}
    # nothing is kept for the gradients
    nothing = saved_tensors_hooks(lambda tensor: None, lambda _: torch.empty(0))
    with torch.enable_grad(), nothing, drawing_from(generator) as mode:
        mode.read_only = shared
        (inputs,) = next(plain.batches(few))
        try:
            try:
                returned = plain(inputs, own or None)
            except RuntimeError:  # as of a forward that takes gradients itself, and keeps for them
                with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                    returned = plain(inputs, own or None)
            outputs = returned if network.readout is None else network.readout(returned)
        except Exception as error:
            raise ValueError(
                f"{type(module).__name__} does not run on the first rows of X, of shape "
                f"{few.shape}: {type(error).__name__}: {error}"
            ) from error
    for name, total in sums.items():  # before a run that has the user's own
        bounded = id(module.get_parameter(name)) in known
        if not bounded and total != _digest(own[name]):
            raise ValueError(
                f"{type(module).__name__} writes to its own parameter {name!r} when it "
                "runs, and would change yours: write to a copy in its forward."
            )
    return returned, outputs, mode.drawn


def _digest(weight: Tensor) -> str:
    return str(float(weight.detach().sum(dtype=torch.float64)))  # NaN is as it was


def _entry(
    returned: Any, n: int, n_labels: int | None, network: Network
) -> tuple[Readout | None, Tensor]:
    """Choose the entry that holds the outputs: -> (n, ...)."""
    name = type(network.module).__name__ if network.forward is None else "forward"
    if isinstance(returned, Tensor):
        if returned.ndim == 0 or len(returned) != n:
            raise ValueError(
                f"{name} must return logits of shape (n, n_classes); for {n} rows it returned "
                f"{tuple(returned.shape)}. If rows are another dimension of it, or a part of what "
                f"it returns, {_HINT}"
            )
        return None, returned
    entries: dict[Any, Any] = getattr(returned, "__dict__", {})
    if isinstance(returned, Mapping) or hasattr(returned, "keys"):
        entries = {key: returned[key] for key in returned}
    elif isinstance(returned, tuple | list):
        entries = dict(enumerate(returned))
    named = {key: entry for key, entry in entries.items() if isinstance(entry, Tensor)}
    if "logits" in named:
        return Field("logits"), named["logits"]
    fitting = {key: entry for key, entry in named.items() if entry.ndim and len(entry) == n}
    if len(fitting) > 1 and n_labels is not None:
        fitting = {
            key: entry
            for key, entry in fitting.items()
            if entry.ndim == 2 and entry.shape[1] == n_labels
        } or fitting
    if len(fitting) != 1:
        shapes = {key: tuple(entry.shape) for key, entry in named.items()}
        raise ValueError(
            f"{name} returns a {type(returned).__name__} with tensors {shapes} for {n} rows: "
            f"which of them are the outputs? {_HINT}"
        )
    ((key, outputs),) = fitting.items()
    return Field(key), outputs


def _single(outputs: Tensor) -> bool:
    return outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1)


def _final(
    outputs: Tensor, two: bool, loss: Loss | None, more: Callable[[], Tensor]
) -> Readout | None:
    """Say what makes logits of probabilities, and two columns of one; may ask for more rows."""
    if loss is not None and loss.kind in ("values", "own"):
        return None
    last = _last_operation(outputs)
    single, flat = _single(outputs), outputs.ndim == 2
    labels = loss is not None and loss.kind == "labels" and not two
    sums_to_one = flat and bool((outputs.detach().sum(1) - 1).abs().max() < 1e-4)
    bounded = _bounded(outputs)
    unclear = single or labels or (last is None and flat and not sums_to_one)
    if unclear and last != "Sigmoid" and last not in _PRODUCTS and bounded and _bounded(more()):
        raise ValueError(
            "the network's outputs lie between 0 and 1 for the first rows, and their last "
            f"operation ({last or 'hidden, by no_grad say'}) does not tell what they are: "
            f"probabilities, or logits? {_HINT}"
        )
    if labels:
        return logits_of_shares if last == "Sigmoid" else None
    if single:
        return log_odds_of_probability if last == "Sigmoid" else two_logits
    if outputs.ndim == 2:
        if last == "Softmax" or (sums_to_one and bounded):
            return log_of_probabilities
        if last == "Sigmoid":
            raise ValueError(
                "the network ends in a sigmoid for each of several outputs: are these yes-or-no "
                "labels (loss='binary_cross_entropy'), or one class of several? Say loss= or "
                "readout= in skperf.from_module."
            )
    return None


def _bounded(outputs: Tensor) -> bool:
    return bool(((outputs >= 0) & (outputs <= 1)).all())


# what ends in one of these is no probability
_PRODUCTS = ("Addmm", "Mm", "Mv", "Bmm", "Baddbmm", "Dot", "Convolution", "MkldnnConvolution")
_SHAPE_ONLY = ("View", "Squeeze", "Unsqueeze", "Select", "Slice", "Alias", "Clone", "T", "Clamp")


def _last_operation(outputs: Tensor) -> str | None:
    """Name the operation that made the outputs, changes of shape and clamps apart."""
    node: Any = outputs.grad_fn
    for _ in range(10):
        if node is None:
            return None
        # such as SqueezeBackward1
        name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
        if not name.endswith(_SHAPE_ONLY):
            return name
        node = node.next_functions[0][0]
    return None
