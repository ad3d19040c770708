"""One number for each example, read from a classifier's logits."""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

Output = Callable[[Tensor, Tensor], Tensor]


def logit(logits: Tensor, codes: Tensor) -> Tensor:
    """Logit of the label: logits (n, n_classes), codes (n,) -> (n,)."""
    return logits.gather(1, codes[:, None])[:, 0]


def margin(logits: Tensor, codes: Tensor) -> Tensor:
    """Logit of the label minus the largest other: logits (n, n_classes), codes (n,) -> (n,)."""
    return logit(logits, codes) - _without_label(logits, codes).amax(1)


def log_odds(logits: Tensor, codes: Tensor) -> Tensor:
    """Log odds of the label, ``log(p / (1 - p))``: logits (n, n_classes), codes (n,) -> (n,)."""
    return logit(logits, codes) - _without_label(logits, codes).logsumexp(1)


def loss(logits: Tensor, codes: Tensor) -> Tensor:
    """Cross-entropy of the label: logits (n, n_classes), codes (n,) -> (n,)."""
    return functional.cross_entropy(logits, codes, reduction="none")


def proba(logits: Tensor, codes: Tensor) -> Tensor:
    """Probability of the label: logits (n, n_classes), codes (n,) -> (n,)."""
    return logit(logits.softmax(1), codes)


def of_probability(
    name: str, probabilities: Callable[[Tensor], Tensor], outputs: Tensor, codes: Tensor
) -> Tensor:
    """Probability of the label or its log odds, by probabilities of a net's own: -> (n,)."""
    chosen = logit(probabilities(outputs), codes)
    return chosen if name == "proba" else chosen.logit()


OUTPUTS: dict[str, Output] = {
    "margin": margin,
    "log_odds": log_odds,
    "logit": logit,
    "loss": loss,
    "proba": proba,
}


def resolve_output(
    output: str | Output,
    allowed: Collection[str] = tuple(OUTPUTS),
    own: Callable[[Tensor], Tensor] | None = None,
) -> Output:
    """Find an output by name, of a net's `own` probabilities if any, or guard a function."""
    if isinstance(output, str):
        if output not in allowed:
            raise ValueError(
                f"output={output!r} is unknown; use one of {sorted(allowed)} or a function "
                "of (logits, codes)."
            )
        if own is not None and output in ("proba", "log_odds"):
            return partial(of_probability, output, own)
        return OUTPUTS[output]
    return _Guarded(output)


class _Guarded:
    """An output function of the user, its answers checked."""

    def __init__(self, function: Output) -> None:
        self.function = function

    def __call__(self, logits: Tensor, codes: Tensor) -> Tensor:
        values = self.function(logits, codes)
        if not isinstance(values, Tensor) or values.shape != codes.shape:
            seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"output must return one number for each example, a tensor of shape "
                f"{tuple(codes.shape)}; it returned {seen}."
            )
        if not torch.isfinite(values).all():
            row = int((~torch.isfinite(values)).nonzero()[0, 0])
            raise ValueError(f"output returned a value that is not finite, first at row {row}.")
        return values


def _without_label(logits: Tensor, codes: Tensor) -> Tensor:
    label = functional.one_hot(codes, logits.shape[1]).bool()
    return logits.masked_fill(label, -torch.inf)
