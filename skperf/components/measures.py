"""Numbers read from a network's outputs: one for each row, or several."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skperf.backbone.losses import Loss
from skperf.backbone.outputs import OUTPUTS, of_probability


@dataclass(frozen=True)
class Measure:
    """An output by name, or a function of outputs, of outputs and targets, or of rows as well."""

    output: str | Callable[..., Tensor]
    loss: Loss
    probabilities: Callable[[Tensor], Tensor] | None = None  # of outputs, if not by a softmax

    @property
    def n_arguments(self) -> int:
        """How many of outputs, targets and rows it takes."""
        return 2 if isinstance(self.output, str) else _n_arguments(self.output)

    @property
    def by_class(self) -> bool:
        """Whether targets must be labels of classes."""
        return isinstance(self.output, str) and self.output not in ("loss", "value")

    def __call__(self, outputs: Tensor, asked: Any) -> Tensor:
        """Read the numbers of rows that are `Asked`: outputs (n, ...) -> (n,) or (n, n_numbers)."""
        targets = asked.targets
        if isinstance(self.output, str):
            if self.output == "value":
                return _guarded(_single(outputs), len(outputs))
            assert targets is not None
            if self.output == "loss":
                several = outputs.ndim == targets.ndim == 2 and not targets.is_floating_point()
                if several and self.loss.kind == "classes":
                    raise ValueError(
                        f"y has shape {tuple(targets.shape)}, several labels a row, but the "
                        "network is taken to be trained on one: say so, from_module(module, "
                        "loss='binary_cross_entropy')."
                    )
                return self.loss.value(outputs, targets)
            if outputs.ndim != 2:
                raise ValueError(
                    f"output={self.output!r} is of one label a row, and the network returns "
                    f"{tuple(outputs.shape[1:])} a row: use 'loss', or a function of (outputs, y)."
                )
            if self.probabilities is not None and self.output in ("proba", "log_odds"):
                return of_probability(self.output, self.probabilities, outputs, targets)
            return OUTPUTS[self.output](outputs, targets)
        tree = asked.rows.tree
        if asked.single and isinstance(tree, dict):
            tree = tree["input_ids"]  # a mask was made
        given: Any = (outputs, targets, tree)[: self.n_arguments]
        try:
            values = self.output(*given)
        except (TypeError, AttributeError) as error:
            if targets is not None or self.n_arguments < 2:
                raise
            raise ValueError(
                f"output reads y, which was not given ({error}): pass y, or let it take the "
                "outputs alone."
            ) from error
        return _guarded(values, len(outputs))


def checked_output(output: Any) -> None:
    """Refuse the name of an output that there is not."""
    if isinstance(output, str) and output not in NAMES:
        raise ValueError(
            f"output={output!r} is unknown; use one of {sorted(NAMES)} or a function of the "
            "outputs, of (outputs, y) or of (outputs, y, X)."
        )


NAMES = (*OUTPUTS, "value")


def _single(outputs: Tensor) -> Tensor:
    """Take the only number a row: outputs (n,), (n, 1) or the two logits of one, (n, 2) -> (n,)."""
    if outputs.ndim == 2 and outputs.shape[1] == 2 and not outputs[:, 0].any():
        return outputs[:, 1]
    if outputs[:1].numel() > 1:
        raise ValueError(
            "output='value' is of a network with one output a row, and this one has "
            f"{tuple(outputs.shape[1:])}: say which, as output=lambda outputs: outputs[:, 0]."
        )
    return outputs.reshape(len(outputs))


def _guarded(values: Any, n_rows: int) -> Tensor:
    if not isinstance(values, Tensor) or values.ndim not in (1, 2) or len(values) != n_rows:
        seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(
            "output must return one number for each example, or a row of numbers: a tensor of "
            f"shape ({n_rows},) or ({n_rows}, t); it returned {seen}."
        )
    if not torch.isfinite(values).all():
        row = int((~torch.isfinite(values)).nonzero()[0, 0])
        raise ValueError(f"output returned a value that is not finite, first at row {row}.")
    return values


def _n_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some callables have no signature
        return 2
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    taken = [
        p
        for p in parameters
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
    ]
    return min(len(taken), 3)
