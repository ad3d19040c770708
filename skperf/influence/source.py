"""Influence between the checkpoints of a training that is over (SOURCE, arXiv 2405.12186)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.influence.curvature import Filtered, RowSpace, gradient_flow
from skperf.influence.gradients import Dense, Gradients, written_out
from skperf.influence.problem import Problem
from skperf.influence.tiles import Terms


@dataclass(frozen=True)
class Segment:
    """A stretch of training with one curvature, that at the checkpoint that stands for it."""

    curvature: RowSpace  # Gauss-Newton, of the mean loss
    time: float  # learning rate times steps
    weight_decay: float = 0.0

    def pushed(self, vectors: Gradients) -> Gradients:
        """How far a constant force moves the weights, ``(1 - exp(-time C)) / C``."""
        flow = gradient_flow(self.time, self.weight_decay)
        return Filtered.of(self.curvature, flow).apply(vectors)

    def faded(self, vectors: Gradients) -> Gradients:
        """Say what is left of an earlier move, ``exp(-time C)``."""

        def left(values: Tensor) -> Tensor:
            return torch.exp(-self.time * (values + self.weight_decay))

        return Filtered.of(self.curvature, left).apply(vectors)


@dataclass(frozen=True)
class Unrolled:
    """Queries at the end of training, carried back to meet the rows' gradients in each segment.

    What is stored of the rows is one list of layers a segment, one segment after another. With
    one segment this is influence at a checkpoint, damped by its horizon.
    """

    segments: tuple[Segment, ...]  # in the order of training

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Keep the rows, whose gradients are known at the last weights only."""
        if len(self.segments) > 1:
            raise ValueError(
                "method='source' with several checkpoints scores training rows against queries "
                "only: ask for influence(X, y)."
            )
        return rows

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Map the queries: a row pushed in its segment, and what it did fades in later ones."""
        terms: Terms = []
        vectors: Gradients = [Dense(written_out(query)) for query in queries]
        for k in range(len(self.segments) - 1, -1, -1):
            pushed = self.segments[k].pushed(vectors)
            terms += enumerate(pushed, k * len(pushed))
            if k:
                vectors = self.segments[k].faded(vectors)
        return terms
