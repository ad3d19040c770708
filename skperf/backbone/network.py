"""A classifier opened as a network of our own: rows in, outputs out."""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial, reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from skperf.backbone.losses import LOSSES, Loss, Penalty
from skperf.backbone.parameters import Parameters, substituted
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows, call
from skperf.backbone.views import own_copy

Readout = Callable[[Any], Tensor]
Forward = Callable[[nn.Module, Any], Any]
_BROUGHT_OVER = 2**22  # bytes
_SINGLE = torch.empty(0, dtype=torch.float32)  # what a module without tensors computes in
_SEED = 0  # of networks that draw random numbers in evaluation mode: the same at every call


@dataclass(frozen=True)
class Network:
    """The network inside a fitted classifier, in a module that nobody else holds."""

    module: nn.Module
    classes: NDArray[Any] | None  # (n_classes,), None where targets are no classes
    batch_size: int = 256
    readout: Readout | None = None  # what the module returns -> outputs (n, K) or (n,)
    forward: Forward | None = None  # the module and the rows' tree -> what the module returns
    loss: Loss = LOSSES["cross_entropy"]
    penalty: Penalty | None = None
    trainable: tuple[str, ...] | None = None  # names of parameters that train; None for all
    before: Callable[[Rows], Rows] | None = None  # the steps of a pipeline before the network
    draws: bool = False  # whether a forward draws random numbers
    probabilities: Callable[[Tensor], Tensor] | None = None  # of outputs, if not by a softmax

    @property
    def device(self) -> torch.device:
        """Where the module's tensors live."""
        return self._like().device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the module's parameters."""
        return self._like().dtype

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        assert self.classes is not None
        return len(self.classes)

    @cached_property
    def takes_tokens(self) -> bool:
        """Whether integer inputs are indices into an embedding."""
        embeddings = (nn.Embedding, nn.EmbeddingBag)
        if "input_ids" in _names(self.module)[1]:
            return True
        return any(isinstance(part, embeddings) for part in self.module.modules())

    def __call__(self, inputs: Rows | Tensor, parameters: Parameters | None = None) -> Tensor:
        """Compute outputs, differentiably, in the mode the module is in: (n, ...) -> (n, K)."""
        if parameters is None:
            outputs = self.returned(inputs)
        else:
            with substituted(self.module, parameters):
                outputs = self.returned(inputs)
        return outputs if self.readout is None else self.readout(outputs)

    def returned(self, inputs: Rows | Tensor) -> Any:
        """Give what the module itself returns for rows (n, ...)."""
        tree = inputs.tree if isinstance(inputs, Rows) else inputs
        if not self.draws or self.module.training:
            return self._run(tree)
        with drawing_from(torch.Generator().manual_seed(_SEED)):
            return self._run(tree)

    def _run(self, tree: Any) -> Any:
        # a module may write to its input, which is often passed again
        tree = Rows(tree).map(Tensor.clone).tree
        if self.forward is not None:
            return self.forward(self.module, tree)
        return call(self.module, tree)

    def inputs(self, X: Any) -> Rows:
        """Bring rows to the module's device and type: (n, ...)."""
        return self._converter()(Rows.of(X))

    def codes(self, y: ArrayLike) -> Tensor:
        """Columns of the outputs that belong to labels: y (n,) -> (n,)."""
        assert self.classes is not None
        labels = np.asarray(y)
        order = np.argsort(self.classes)
        sorted_classes = self.classes[order]
        known = np.isin(labels, sorted_classes)
        if not known.all():
            unknown = np.unique(labels[~known]).tolist()
            raise ValueError(
                f"y holds labels that the estimator does not know: {unknown[:10]}; "
                f"its classes are {self.classes.tolist()[:20]}."
            )
        codes = order[np.searchsorted(sorted_classes, labels)]
        return torch.as_tensor(codes, dtype=torch.long, device=self.device)

    def targets(self, y: Any) -> Tensor:
        """Targets as the loss takes them: y (n, ...) -> (n, ...)."""
        values = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
        if self.classes is not None and values.ndim == 1:
            return self.codes(values)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"y must hold numbers for this loss, got {values.dtype}.")
        if self.loss.kind == "labels" and values.size and (values.min() < 0 or values.max() > 1):
            raise ValueError(f"y must lie in 0..1 for this loss, got up to {np.abs(values).max()}.")
        if self.loss.kind in ("values", "labels") or values.dtype.kind == "f":
            return torch.as_tensor(values).to(self.device, self.dtype)
        return torch.as_tensor(values).to(self.device)

    def batches(
        self, X: Any, *others: Tensor, batch_size: int | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Go through rows in slices, each on the module's device: X (n, ...), *others (n, ...)."""
        size, device, start = batch_size or self.batch_size, self.device, 0
        for brought in self._brought(Rows.of(X), size):
            for begin in range(0, len(brought), size):
                part = slice(start + begin, start + begin + size)
                inputs = brought[begin : begin + size] if len(brought) > size else brought
                yield inputs, *(other[part].to(device) for other in others)
            start += len(brought)

    def logits(self, X: Any, batch_size: int | None = None) -> Tensor:
        """Compute outputs of many rows, on the CPU: X (n, ...) -> (n, n_classes) or (n, ...)."""
        rows, size = Rows.of(X), batch_size or self.batch_size
        plain = self.readout is None and self.forward is None and not self.draws

        def run() -> list[Tensor]:
            parts: list[Tensor] = []
            for brought in self._brought(rows, size):
                if plain and brought.single:  # a bare loop, for small networks
                    parts += [self.module(part) for part in brought.tree.split(size)]
                else:
                    starts = range(0, len(brought), size)
                    parts += [self(brought[begin : begin + size]).cpu() for begin in starts]
            return parts

        try:
            with torch.inference_mode():  # a little faster, for small networks
                parts = run()
        except RuntimeError:  # as of a forward that takes gradients itself
            with torch.no_grad():
                parts = run()
        if not parts:
            raise ValueError("X holds no rows.")
        logits = torch.cat(parts).cpu()
        if len(logits) != len(rows) or (
            self.classes is not None and logits.shape[1:2] != (self.n_classes,) and logits.ndim < 3
        ):
            expected = f"({len(rows)}, {'...' if self.classes is None else self.n_classes})"
            raise ValueError(
                f"the network returns logits of shape {tuple(logits.shape)}, expected {expected}: "
                "one row for each of X, one column for each of its classes. "
                "skperf.from_module(module, readout=...) says which part of what it returns."
            )
        if math.isfinite(logits.sum()):  # as a rule, and cheap
            return logits
        finite = torch.isfinite(logits).flatten(1).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(
                f"the network's outputs are not finite for {int((~finite).sum())} of "
                f"{len(logits)} rows, first for row {row} of X."
            )
        return logits

    def copy(self) -> "Network":
        """Copy the network, its weights included."""
        return replace(self, module=own_copy(self.module))

    def to_module(self) -> nn.Module:
        """Give the network as a module that returns outputs."""
        if self.readout is None and self.forward is None:
            return self.module
        return WithReadout(self.module, self.readout, self.forward)

    def _brought(self, rows: Rows, size: int) -> Iterator[Rows]:
        """Bring rows to the device, small ones many batches at once: slices cost little then."""
        convert = self._converter()
        row = rows.nbytes // max(1, len(rows))
        at_once = size * max(1, _BROUGHT_OVER // max(1, size * row))
        for start in range(0, len(rows), at_once):
            yield convert(rows[start : start + at_once])

    def _converter(self) -> Callable[[Rows], Rows]:
        like, takes_tokens = self._like(), self.takes_tokens
        device, dtype = like.device, like.dtype
        names = _names(self.module) if self.forward is None else (None, ())
        mask_of = _mask_maker(self.module) if self.forward is None else None

        def convert(leaf: Any) -> Tensor:
            rows = leaf.detach() if isinstance(leaf, Tensor) else _as_tensor(np.asarray(leaf))
            if rows.dtype == torch.uint8 and rows.ndim >= 3:
                return rows.to(device, dtype) / 255
            if not rows.is_floating_point() and (takes_tokens or rows.dtype == torch.bool):
                kind = torch.bool if rows.dtype == torch.bool else torch.long
                return rows.to(device, kind)
            moved = rows.to(device, dtype)
            narrowed = rows.is_floating_point() and moved.dtype.itemsize < rows.dtype.itemsize
            # a sum is cheap, and finite as a rule
            suspect = narrowed and not math.isfinite(moved.sum())
            if suspect and bool((torch.isinf(moved) & torch.isfinite(rows)).any()):
                raise ValueError(
                    f"X holds values up to {float(rows.abs().max()):.3g}, beyond the largest "
                    f"number of the network's type {dtype}: scale them, or use a float64 module."
                )
            # a module may write to its input, which would be the user's own memory
            return moved.clone() if moved.data_ptr() == rows.data_ptr() else moved

        def converted(rows: Rows) -> Rows:
            rows = (rows if self.before is None else self.before(rows)).load()
            if rows.single and rows.tree.dtype == bool:
                return Rows(convert(rows.tree.astype(np.float32)))
            rows = _only_inputs(rows, names).map(convert)
            return rows if mask_of is None else mask_of(rows)

        return converted

    def _like(self) -> Tensor:
        """Give the first floating tensor of the module."""
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point()), _SINGLE)


def check_device(device: Any) -> None:
    """Refuse a device that torch does not know or has not got; None is whichever it is."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} can't be computed on: {reason}") from error


def _names(module: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """Names of a forward's inputs by position, None where it takes any, and all its names."""
    function = getattr(module.forward, "__func__", None)
    return _names_of(module.forward if function is None else function, function is not None)


@lru_cache(maxsize=256)
def _names_of(
    function: Callable[..., Any], bound: bool
) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    try:
        parameters = list(inspect.signature(function).parameters.values())[bound:]
    except (TypeError, ValueError):
        return None, ()
    every = tuple(p.name for p in parameters)
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        # a container passes on what it gets
        return None, every
    return tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY), every


def _only_inputs(rows: Rows, known: tuple[tuple[str, ...] | None, tuple[str, ...]]) -> Rows:
    """Refuse what a forward can't take."""
    names, every = known
    if names is None or rows.single:
        return rows
    if isinstance(rows.tree, dict):
        unknown = sorted(set(rows.tree) - set(every))
        if unknown:
            raise ValueError(
                f"X has inputs named {unknown}, which the network's forward does not take; it "
                f"takes {list(every)}. Leave them out, or say forward= in skperf.from_module."
            )
    elif len(rows.tree) > len(names):
        raise ValueError(
            f"X holds {len(rows.tree)} inputs, but the network's forward takes {len(names)} "
            f"({', '.join(names)}); leave the targets out, or say forward= in skperf.from_module."
        )
    return rows


def _mask_maker(module: nn.Module) -> Callable[[Rows], Rows] | None:
    """Say how to tell padding from tokens, for modules that take token ids and a mask."""
    names = _names(module)[1]
    config = getattr(module, "config", None) if "input_ids" in names else None
    if config is None or "attention_mask" not in names:
        return None
    config = getattr(config, "text_config", config)
    pad, end = (getattr(config, f"{name}_token_id", None) for name in ("pad", "eos"))
    ends = end if isinstance(end, list) else [end]

    def with_mask(rows: Rows) -> Rows:
        named = rows.tree if isinstance(rows.tree, dict) else {"input_ids": rows.tree}
        ids = named.get("input_ids")
        if isinstance(rows.tree, tuple) or "attention_mask" in named:
            return rows
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            return rows
        if pad is None:
            if bool((ids[:, -1:] == ids[:, -2:-1]).any()) and bool((ids == 0).any()):
                raise ValueError(
                    "X holds token ids alone, and the network's config names no pad_token_id: "
                    "which of them are padding? Pass X={'input_ids': ..., 'attention_mask': ...}."
                )
            return Rows({**named, "attention_mask": torch.ones_like(ids)})
        mask = ids != pad
        if pad in ends and not bool(mask.all()):
            raise ValueError(
                f"X holds token ids alone, and id {pad} is both padding and the end of a text: "
                "which is it? Pass X={'input_ids': ..., 'attention_mask': ...}."
            )
        return Rows({**named, "attention_mask": mask.long()})

    return with_mask


def _as_tensor(array: NDArray[Any]) -> Tensor:
    if array.dtype == object:
        array = np.asarray(array.tolist())  # numbers in a nullable table
    if array.dtype.kind not in "biufc":
        raise ValueError(
            f"X has type {array.dtype}, where the network takes numbers: encode texts and "
            "categories first, for instance in a Pipeline before the network."
        )
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype in (np.uint16, np.uint32, np.uint64):
        array = array.astype(np.int64)
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    # torch warns of read-only memory, such as the maps that joblib hands to its workers, and
    # takes no negative strides
    plain = array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return torch.as_tensor(array if plain else array.copy())


class WithReadout(nn.Module):
    """A module between a forward and a readout of the user."""

    def __init__(
        self, module: nn.Module, readout: Readout | None, forward: Forward | None = None
    ) -> None:
        super().__init__()
        self.module = module
        self.readout = readout
        self.called = forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Apply one after the other: inputs (n, ...) -> (n, n_classes)."""
        if self.called is None:
            outputs = self.module(*inputs, **named)
        else:
            tree = named or (inputs if len(inputs) > 1 else inputs[0])
            outputs = self.called(self.module, tree)
        return outputs if self.readout is None else self.readout(outputs)


def log_of_probabilities(outputs: Tensor) -> Tensor:
    """Logits of a module that returns probabilities: outputs (n, n_classes) -> (n, n_classes)."""
    return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()


def log_odds_of_probability(outputs: Tensor) -> Tensor:
    """Logits of a module that returns one probability: outputs (n,) or (n, 1) -> (n, 2)."""
    p = outputs.reshape(len(outputs)).clamp(torch.finfo(outputs.dtype).tiny, 1 - 2**-24)
    return two_logits(p.log() - torch.log1p(-p))


def logits_of_shares(outputs: Tensor) -> Tensor:
    """Logits of a module that returns a probability a label: outputs (n, K) -> (n, K)."""
    p = outputs.clamp(torch.finfo(outputs.dtype).tiny, 1 - 2**-24)
    return p.log() - torch.log1p(-p)


def two_logits(outputs: Tensor) -> Tensor:
    """Logits of a module with a single output for two classes: outputs (n,) or (n, 1) -> (n, 2)."""
    second = outputs.reshape(len(outputs))
    return torch.stack([torch.zeros_like(second), second], 1)


def first_column(outputs: Tensor) -> Tensor:
    """Logits of a module that was trained on a single class: outputs (n, n_outputs) -> (n, 1)."""
    return outputs[:, :1]


@dataclass(frozen=True)
class Field:
    """A readout: one entry of the record, dictionary or tuple that a module returns."""

    key: str | int

    def __call__(self, returned: Any) -> Tensor:
        """Take it out: -> (n, ...)."""
        if isinstance(self.key, str) and not hasattr(returned, "keys"):
            entry: Tensor = getattr(returned, self.key)
        else:
            entry = returned[self.key]
        return entry


@dataclass(frozen=True)
class AsRows:
    """A readout: outputs of a known shape, one a row, whatever was squeezed away."""

    shape: tuple[int, ...]

    def __call__(self, outputs: Tensor) -> Tensor:
        """Lay them out: -> (n, ...)."""
        return outputs.reshape(-1, *self.shape)


def chained(*steps: Readout | None) -> Readout | None:
    """Join readouts, None where there is nothing to do."""
    kept = tuple(step for step in steps if step is not None)
    return None if not kept else kept[0] if len(kept) == 1 else partial(reduce, _applied, kept)


def _applied(value: Any, step: Readout) -> Any:
    return step(value)
