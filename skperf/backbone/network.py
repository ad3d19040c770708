"""A classifier opened as a network: inputs in, logits out."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.func import functional_call

from skperf.backbone.modes import untouched
from skperf.backbone.parameters import Parameters

Readout = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Network:
    """The network inside a fitted classifier."""

    module: nn.Module
    classes: NDArray[Any]  # (n_classes,)
    batch_size: int = 256
    readout: Readout | None = None

    @property
    def device(self) -> torch.device:
        """Where the module's tensors live."""
        tensor = self._first_floating()
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the module's parameters."""
        tensor = self._first_floating()
        return torch.float32 if tensor is None else tensor.dtype

    @property
    def n_classes(self) -> int:
        """Number of columns of the logits."""
        return len(self.classes)

    @property
    def takes_tokens(self) -> bool:
        """Whether integer inputs are indices into an embedding."""
        embeddings = (nn.Embedding, nn.EmbeddingBag)
        return any(isinstance(part, embeddings) for part in self.module.modules())

    def __call__(self, inputs: Tensor, parameters: Parameters | None = None) -> Tensor:
        """Compute logits, differentiably, in the mode the module is in.

        Shapes: inputs (n, ...) -> (n, n_classes).
        """
        if parameters is None:
            outputs = self.module(inputs)
        else:
            outputs = functional_call(self.module, parameters, (inputs,))
        return outputs if self.readout is None else self.readout(outputs)

    def tensor(self, X: ArrayLike) -> Tensor:
        """Bring rows to the module's device and type: X (n, ...) -> (n, ...)."""
        return self._converter()(X)

    def codes(self, y: ArrayLike) -> Tensor:
        """Columns of the logits that belong to labels: y (n,) -> (n,)."""
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

    def batches(
        self, X: ArrayLike, *others: Tensor, batch_size: int | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Go through rows in slices: X (n, ...), *others (n, ...)."""
        size = batch_size or self.batch_size
        rows = X if isinstance(X, Tensor) else np.asarray(X)
        convert, device = self._converter(), self.device
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            yield convert(rows[part]), *(other[part].to(device) for other in others)

    def logits(self, X: ArrayLike, batch_size: int | None = None) -> Tensor:
        """Logits of many rows, the module left as it was: X (n, ...) -> (n, n_classes)."""
        with untouched(self.module), torch.inference_mode():
            parts = [self(inputs).cpu() for (inputs,) in self.batches(X, batch_size=batch_size)]
        if not parts:
            raise ValueError("X holds no rows.")
        logits = torch.cat(parts)
        if logits.ndim != 2 or logits.shape[1] != self.n_classes:
            raise ValueError(
                f"the network returns logits of shape {tuple(logits.shape)}, expected "
                f"({len(logits)}, {self.n_classes}): one column for each of its classes."
            )
        return logits

    def copy(self) -> "Network":
        """Copy the network, its module included."""
        return replace(self, module=deepcopy(self.module))

    def to_module(self) -> nn.Module:
        """Give the network as a module that returns logits."""
        return self.module if self.readout is None else WithReadout(self.module, self.readout)

    def _converter(self) -> Callable[[ArrayLike], Tensor]:
        device, dtype, takes_tokens = self.device, self.dtype, self.takes_tokens

        def convert(X: ArrayLike) -> Tensor:
            rows = X.detach() if isinstance(X, Tensor) else _as_tensor(np.asarray(X))
            if rows.dtype == torch.uint8 and rows.ndim >= 3:
                return rows.to(device, dtype) / 255
            if takes_tokens and not rows.is_floating_point():
                return rows.to(device, torch.long)
            return rows.to(device, dtype)

        return convert

    def _first_floating(self) -> Tensor | None:
        tensors = chain(self.module.parameters(), self.module.buffers())
        return next((tensor for tensor in tensors if tensor.is_floating_point()), None)


def _as_tensor(array: NDArray[Any]) -> Tensor:
    # torch warns of read-only memory, such as the maps that joblib hands to its workers
    return torch.as_tensor(array if array.flags.writeable else array.copy())


class WithReadout(nn.Module):
    """A module followed by a function."""

    def __init__(self, module: nn.Module, readout: Readout) -> None:
        super().__init__()
        self.module = module
        self.readout = readout

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply one after the other: inputs (n, ...) -> (n, n_classes)."""
        return self.readout(self.module(inputs))


def log_of_probabilities(outputs: Tensor) -> Tensor:
    """Logits of a module that returns probabilities: outputs (n, n_classes) -> (n, n_classes)."""
    return outputs.clamp_min(torch.finfo(outputs.dtype).tiny).log()


def two_logits(outputs: Tensor) -> Tensor:
    """Logits of a module with a single output for two classes: outputs (n,) or (n, 1) -> (n, 2)."""
    second = outputs.reshape(len(outputs))
    return torch.stack([torch.zeros_like(second), second], 1)


def logits_of_model_output(outputs: Any) -> Tensor:
    """Logits of a module that returns a record or a tuple: -> (n, n_classes)."""
    logits = outputs[0] if isinstance(outputs, tuple) else outputs.logits
    assert isinstance(logits, Tensor)
    return logits


def first_column(outputs: Tensor) -> Tensor:
    """Logits of a module that was trained on a single class: outputs (n, n_outputs) -> (n, 1)."""
    return outputs[:, :1]
