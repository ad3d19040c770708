"""Influence between the checkpoints of a training that is over (SOURCE, arXiv 2405.12186)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.influence.curvature import Filter, Filtered, RowSpace, gradient_flow
from skperf.influence.gradients import Dense, Gradients, inner, written_out


@dataclass(frozen=True)
class Segment:
    """A stretch of training with one curvature, seen from the checkpoint that stands for it."""

    rows: Gradients  # gradients of the n training rows, each times its weight
    curvature: RowSpace  # Gauss-Newton, of the mean loss
    time: float  # learning rate times steps

    def apply(self, vectors: Gradients, function: Filter) -> Gradients:
        """Multiply vectors by a function of the curvature: (q, ...) each."""
        return Filtered.of(self.curvature, function).apply(vectors)


def fading_away(time: float) -> Filter:
    """Make the filter of what is left after training on for a while, ``exp(-time x)``."""

    def apply(values: Tensor) -> Tensor:
        return torch.exp(-time * values)

    return apply


def unrolled(segments: Sequence[Segment], queries: Gradients) -> Tensor:
    """How much each query's loss would rise without each row, in the loss's unit: -> (q, n).

    Segments in the order of training; queries are gradients at its end. With one segment this is
    influence at a checkpoint, damped by its horizon.
    """
    # A row pushes the weights within every segment, by (1 - exp(-time C)) / C; what it did there
    # fades by exp(-time C) in each later one. Queries are carried back instead of rows forwards.
    total: Tensor | None = None
    vectors: Gradients = [Dense(written_out(query)) for query in queries]
    for segment in reversed(segments):
        pushed = segment.apply(vectors, gradient_flow(segment.time))
        scores = inner(pushed, segment.rows) / len(segment.rows[0])
        total = scores if total is None else total + scores
        vectors = segment.apply(vectors, fading_away(segment.time))
    if total is None:
        raise ValueError("checkpoints must hold at least one set of weights.")
    return total
