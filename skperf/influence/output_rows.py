"""Rows of the curvature at the logits: which ones are worth pulling back."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class OutputRows:
    """Rows of the curvature at the logits.

    Parameters
    ----------
    examples : Tensor of shape (n_rows,)
        Training row that each comes from.
    cotangents : Tensor of shape (n_rows, n_classes)
        What to pull back.
    kept_trace : float
        Share of the trace at the logits that these rows hold by themselves.
    logits : Tensor of shape (n, n_classes)
        Of all training rows.
    """

    examples: Tensor
    cotangents: Tensor
    kept_trace: float
    logits: Tensor


def softmax_rows(
    logits: Tensor, weights: Tensor, *, kept_trace: float = 1.0, max_rows: int | None = None
) -> OutputRows:
    """Eigenpairs of the softmax Hessians of many examples, the largest and a sample.

    Parameters
    ----------
    logits : Tensor of shape (n, n_classes)
        The network's answers.
    weights : Tensor of shape (n,)
        Share of each example in the mean loss; they sum to one.
    kept_trace : float, default=1.0
        Take as many rows as the largest would need to hold this share of the trace.
    max_rows : int, optional
        Never take more.

    Returns
    -------
    OutputRows
        Cotangents ``sqrt(size) * eigenvector``, where the size is ``w_i eigenvalue`` of a large
        one, and of the others what each :func:`stands for <representatives>`.
    """
    probabilities = logits.double().softmax(1)
    traces = weights.double() * (1 - probabilities.square().sum(1))
    total = traces.sum()
    order = traces.argsort(descending=True, stable=True)
    # the tail whose whole trace is a tenth of what may be dropped needs no decomposition
    reached = traces[order].cumsum(0)
    tolerance = max((1 - kept_trace) / 10, 1e-14)
    order = order[: int((reached < (1 - tolerance) * total).sum()) + 1]
    p = probabilities[order]
    hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(hessians)
    values = (values.clamp_min(0) * weights[order, None]).flatten()
    ranked = values.argsort(descending=True, stable=True)
    sums = values[ranked].cumsum(0)
    wanted = int((sums < min(kept_trace, 1 - 1e-14) * total).sum()) + 1
    wanted = min(wanted, int((values > 0).sum()), max_rows or len(values))
    kept, sizes = representatives(values[ranked], wanted)
    ranked = ranked[kept]
    cotangents = vectors.mT.flatten(0, 1)[ranked] * sizes[:, None].sqrt()
    share = float(values[ranked].sum() / total) if total > 0 else 1.0
    return OutputRows(
        order[ranked // logits.shape[1]], cotangents.to(logits.dtype), min(share, 1.0), logits
    )


def representatives(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Choose entries that stand for all, large ones for themselves alone.

    Systematic sampling with probabilities proportional to size: an entry whose probability
    reaches one is certain, the others are met at equal steps of their cumulated sum and share
    it. The sum is kept, and in expectation over where the steps begin, every entry.

    Parameters
    ----------
    values : Tensor of shape (m,)
        Positive or zero, in descending order.
    n : int
        How many to choose.

    Returns
    -------
    indices : Tensor of int, shape (n,)
        Ascending.
    sizes : Tensor of shape (n,)
        What each stands for.
    """
    if n == 0:
        return torch.arange(0), values[:0]
    rest = values.flip(0).cumsum(0).flip(0)[:n]
    places = torch.arange(n, 0, -1).to(values)
    certain = int((values[:n] * places >= rest).long().cumprod(0).sum())
    if certain == n:
        return torch.arange(n), values[:n]
    step = rest[certain] / places[certain]
    met = step * (torch.arange(n - certain).to(values) + 0.5)
    sampled = torch.searchsorted(values[certain:].cumsum(0), met)
    indices = torch.cat([torch.arange(certain), certain + sampled])
    return indices, torch.cat([values[:certain], step.expand(n - certain)])
