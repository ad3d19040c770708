"""Rows of the curvature at the outputs: which ones are worth pulling back."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from skperf.backbone.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError

_CHUNK = 1 << 22  # numbers in the matrices that are decomposed at once
_MOST_DECOMPOSED = 128  # classes; beyond, a decomposition costs more than it spares rows


# outputs of a batch (m, ...) and numbers of rows (m,) -> what to pull back (m, ...)
Cotangents = Tensor | Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class OutputRows:
    """Rows of the curvature at the outputs."""

    examples: Tensor  # (n_rows,)
    cotangents: Cotangents  # (n_rows, ...)
    kept_trace: float
    outputs: Tensor | None  # (n, ...)


def loss_rows(
    loss: Loss,
    outputs: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    kept_trace: float = 1.0,
    max_rows: int | None = None,
) -> OutputRows:
    """Eigenpairs of a loss's Hessians, the largest and a sample: outputs (n, K) or (n,)."""
    if isinstance(loss, CrossEntropy) and outputs.ndim == 2:
        weights = weights * loss.sizes(targets).to(weights)
        return softmax_rows(outputs, weights, kept_trace=kept_trace, max_rows=max_rows)
    prepare_forward_mode()
    values, vectors = torch.linalg.eigh(loss.hessian(outputs, targets).double())
    # a loss that is not convex in the outputs lends its positive part
    sizes = (values.clamp_min(0) * weights.double()[:, None]).flatten()
    if not bool(sizes.any()) and not isinstance(loss, BinaryCrossEntropy):
        raise ValueError(
            f"the curvature of {loss.name} is zero at every row, so that methods that use it say "
            "nothing: use method='gradient_dot', or GGN(curvature='empirical')."
        )
    ranked, shares, share = _chosen(sizes, sizes.sum(), kept_trace, max_rows)
    which, number = ranked // values.shape[1], ranked % values.shape[1]
    rows = vectors[which, :, number] * shares[:, None].sqrt()
    cotangents = rows.to(outputs.dtype).view(-1, *outputs.shape[1:])
    return OutputRows(which, cotangents, share, outputs)


def _chosen(
    sizes: Tensor, total: Tensor, kept_trace: float, max_rows: int | None
) -> tuple[Tensor, Tensor, float]:
    """Choose eigenvalues that stand for all, and say which share they hold by themselves."""
    ranked = sizes.argsort(descending=True, stable=True)
    sums = sizes[ranked].cumsum(0)
    wanted = int((sums < min(kept_trace, 1 - 1e-14) * total).sum()) + 1
    wanted = min(wanted, int((sizes > 0).sum()), max_rows or len(sizes))
    kept, shares = representatives(sizes[ranked], wanted)
    held = float(sizes[ranked[kept]].sum() / total) if total > 0 else 1.0
    return ranked[kept], shares, min(held, 1.0)


@cache
def prepare_forward_mode() -> None:
    """Load torch's rules of forward mode, without the warnings about its own compiler."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")


def sampled_rows(
    loss: Loss, weights: Tensor, targets: Tensor, n_rows: int, seed: int
) -> OutputRows:
    """Draw rows whose squares are the curvature in the mean: weights (n,), targets (n, ...)."""
    # A row is `H^(1/2) e` with random signs e, or the slope of a label that the network drew
    # itself: one pass each, whatever the number of tokens and words.
    if not isinstance(loss, CrossEntropy | BinaryCrossEntropy | SquaredError):
        raise ValueError(
            f"the curvature of {loss.name} at rows of several outputs is not known; use "
            "method='gradient_dot', or GGN(curvature='empirical')."
        )
    n = len(weights)
    shares = weights.double() / weights.double().sum()
    total = float(weights.double().sum())
    met = (torch.arange(n_rows).double() + 0.5) / n_rows
    examples = torch.searchsorted(shares.cumsum(0), met).clamp_max(n - 1)
    scale = (total / n_rows) ** 0.5

    def cotangents(outputs: Tensor, rows: Tensor) -> Tensor:
        # numbers of each row's own, so that batches never change them
        chances = []
        for row in rows.tolist():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + row)
            chances.append(torch.rand(outputs.shape[1:], generator=generator))
        own = targets[examples[rows]].to(outputs.device)
        return _drawn(loss, outputs, own, torch.stack(chances).to(outputs)) * scale

    return OutputRows(examples, cotangents, 0.0, None)


def _drawn(loss: Loss, outputs: Tensor, targets: Tensor, chances: Tensor) -> Tensor:
    """Draw a row of each example's curvature: outputs, targets, chances (m, ...) -> (m, ...)."""
    if isinstance(loss, CrossEntropy):
        # shares are as torch takes them, their classes second
        second = targets.is_floating_point() or targets.shape[1:] == outputs.shape[2:]
        axis = 1 if second else -1
        reached = outputs.softmax(axis).cumsum(axis) <= chances.select(axis, 0).unsqueeze(axis)
        labels = reached.sum(axis).clamp_max(outputs.shape[axis] - 1)
        if not targets.is_floating_point():
            labels = labels.masked_fill(targets == loss.ignore_index, loss.ignore_index)
        slopes = CrossEntropy(ignore_index=loss.ignore_index).slope(outputs, labels)
        # the slope is that of a mean over the places, the curvature has one share of it for each
        counts = (labels != loss.ignore_index).flatten(1).sum(1) ** (1.0 if loss.summed else 0.5)
        if loss.weight is not None:
            slopes = slopes * loss.sizes(targets).to(slopes).sqrt().unsqueeze(axis)
        return slopes * counts.to(slopes).view(-1, *[1] * (slopes.ndim - 1))
    signs = (chances < 0.5).to(outputs) * 2 - 1
    if isinstance(loss, SquaredError):
        return signs * (2 * loss.factor / outputs[0].numel()) ** 0.5
    diagonal = loss.hessian(outputs, targets).diagonal(dim1=1, dim2=2).view(outputs.shape)
    return signs * diagonal.sqrt()


def softmax_rows(
    logits: Tensor, weights: Tensor, *, kept_trace: float = 1.0, max_rows: int | None = None
) -> OutputRows:
    """Eigenpairs of softmax Hessians, the largest and a sample: logits (n, K), weights (n,)."""
    probabilities, weights = logits.double().softmax(1), weights.double()
    traces = weights * (1 - probabilities.square().sum(1))
    total = traces.sum()
    order = traces.argsort(descending=True, stable=True)
    # the tail whose whole trace is a tenth of what may be dropped needs no decomposition
    tolerance = max((1 - kept_trace) / 10, 1e-14)
    reached = traces[order].cumsum(0)
    order = order[: int((reached < (1 - tolerance) * total).sum()) + 1]
    p, classes = probabilities[order].sort(dim=1, descending=True, stable=True)
    n_likely = _n_likely(p, weights[order], tolerance)
    parts = _Answers(p) if n_likely > _MOST_DECOMPOSED else _Eigenpairs(p[:, :n_likely])
    values = (parts.sizes() * weights[order, None]).flatten()
    ranked, sizes, share = _chosen(values, total, kept_trace, max_rows)
    which, number = ranked // parts.p.shape[1], ranked % parts.p.shape[1]
    cotangents = torch.zeros(len(ranked), p.shape[1], dtype=p.dtype, device=p.device)
    directions = parts.directions(which, number) * sizes[:, None].sqrt()
    cotangents.scatter_(1, classes[which, : parts.p.shape[1]], directions)
    return OutputRows(order[which], cotangents.to(logits.dtype), share, logits)


def _n_likely(p: Tensor, weights: Tensor, tolerance: float) -> int:
    """Count the likeliest classes among which lies nearly all of the trace."""
    inside = p.cumsum(1)
    held = (weights[:, None] * (inside - p.square().cumsum(1) / inside)).sum(0)
    return min(int((held < (1 - tolerance) * held[-1]).sum()) + 1, p.shape[1])


@dataclass(frozen=True)
class _Eigenpairs:
    """Eigenpairs of softmax Hessians among the likeliest classes."""

    # A label says whether it is among these, and which of them it is. The first is left out, so
    # that the curvature never grows.

    p: Tensor

    @property
    def chunk(self) -> int:
        return max(1, _CHUNK // self.p.shape[1] ** 2)

    def sizes(self) -> Tensor:
        """Give the eigenvalues, (n, n_classes)."""
        parts = [torch.linalg.eigvalsh(_hessians(part)) for part in self.p.split(self.chunk)]
        return torch.cat(parts).clamp_min(0)

    def directions(self, which: Tensor, number: Tensor) -> Tensor:
        """Give the eigenvectors that are asked for, (n_asked, n_classes)."""
        # an example is decomposed once, whatever is asked of it
        examples, place = which.unique(return_inverse=True)
        found = self.p.new_empty(len(which), self.p.shape[1])
        for start in range(0, len(examples), self.chunk):
            part = self.p[examples[start : start + self.chunk]]
            vectors = torch.linalg.eigh(_hessians(part)).eigenvectors
            rows = (place >= start) & (place < start + self.chunk)
            found[rows] = vectors[place[rows] - start, :, number[rows]]
        return found


def _hessians(p: Tensor) -> Tensor:
    return torch.diag_embed(p) - p[:, :, None] * (p / p.sum(1, keepdim=True))[:, None, :]


@dataclass(frozen=True)
class _Answers:
    """Softmax Hessians as expectations over labels, for too many classes to decompose."""

    p: Tensor

    def sizes(self) -> Tensor:
        """Give the expected squared length of each slope, (n, n_classes)."""
        return self.p * (1 - 2 * self.p + self.p.square().sum(1, keepdim=True))

    def directions(self, which: Tensor, number: Tensor) -> Tensor:
        """Give slopes of labels, each of length one, (n_asked, n_classes)."""
        slopes = -self.p[which]
        slopes[torch.arange(len(which)), number] += 1
        lengths: Tensor = slopes.norm(dim=1, keepdim=True)
        return slopes / lengths


def representatives(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Choose entries of values (m,) that stand for all, large ones for themselves alone."""
    # Systematic sampling with probabilities proportional to size: an entry whose probability
    # reaches one is certain, the others are met at equal steps of their cumulated sum and share
    # it. The sum is kept, and in expectation over where the steps begin, every entry.
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
