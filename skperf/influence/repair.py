"""Change a network a little: to correct predictions, or to forget rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skperf.backbone.network import Network
from skperf.backbone.outputs import log_odds
from skperf.backbone.parameters import Parameters
from skperf.backbone.rows import Rows

Labelled = tuple[Rows, Tensor]
Batches = Iterator[tuple[Tensor, Tensor]]
Precondition = Callable[[Parameters], Parameters]


@dataclass(frozen=True)
class Displacement:
    """Where a change of the parameters ended."""

    parameters: Parameters
    n_steps: int
    length: float
    flipped: Tensor


def _outputs(network: Network, parameters: Parameters, rows: Labelled) -> Batches:
    """Run rows batch by batch, beside their targets: (m, ...) each."""
    inputs, targets = rows
    for start in range(0, len(inputs), network.batch_size):
        part = slice(start, start + network.batch_size)
        with torch.no_grad():
            outputs = network(inputs[part], parameters)
        yield outputs, targets[part]


def predicted_as(network: Network, parameters: Parameters, rows: Labelled) -> Tensor:
    """Tell which rows are predicted as labelled."""
    right = [
        outputs.argmax(1) == targets
        if targets.ndim == 1
        else ((outputs > 0) == (targets > 0.5)).flatten(1).all(1)
        for outputs, targets in _outputs(network, parameters, rows)
    ]
    return torch.cat(right)


def accuracy(network: Network, parameters: Parameters, rows: Labelled) -> float:
    """Share of rows predicted as labelled; minus the mean loss where there are no labels."""
    if len(rows[1]) == 0:
        return float("nan")
    if network.loss.kind in ("classes", "labels"):
        return float(predicted_as(network, parameters, rows).double().mean())
    value, pairs = network.loss.value, _outputs(network, parameters, rows)
    return -sum(float(value(*pair).sum()) for pair in pairs) / len(rows[0])


@dataclass(frozen=True)
class Lesson:
    """Rows to train on, how much each counts, and rows whose loss must not rise."""

    rows: Labelled
    weights: Tensor | None = None  # (k,), negative where the odds of a row are to fall
    kept: Labelled | None = None
    rehearsal: float = 100.0  # how much their loss counts beside the odds of the others

    def gradient(self, network: Network, parameters: Parameters) -> Parameters:
        """Slope of what training lowers, by the parameters."""
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        with torch.enable_grad():
            doubts = doubt(network(self.rows[0], leaves), self.rows[1])
            total = (doubts if self.weights is None else doubts * self.weights).mean()
            if self.kept is not None:
                losses = network.loss.value(network(self.kept[0], leaves), self.kept[1])
                total = total + self.rehearsal * losses.mean()
            gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))


# how much rows at rest count, tried in turn; the first was chosen on MNIST, word vectors of
# e-mails and breast cancer, the others on tables with a fifth of the labels wrong
REHEARSALS = (100.0, 10.0, 1.0)


def doubt(outputs: Tensor, targets: Tensor) -> Tensor:
    """Log odds against each label: outputs (n, K), targets (n,) or (n, K) -> (n,)."""
    # rows that are fitted well have a loss without a slope, but always odds to raise
    if targets.ndim == 1:
        return -log_odds(outputs, targets)
    return -(outputs * (2 * targets - 1)).flatten(1).mean(1)


def smallest_flip(
    network: Network,
    start: Parameters,
    lesson: Lesson,
    queries: Labelled,
    *,
    learning_rate: float = 0.1,
    max_steps: int = 50,
    n_backtracks: int = 2,
    precondition: Precondition | None = None,
) -> Displacement:
    """Train on a few rows until the queries flip, and go no further than that."""
    # Step sizes are halved twice at a time as long as the queries can still flip within
    # `max_steps`; of the paths that flip most queries the shortest is kept, its last step cut by
    # bisection.
    best: Displacement | None = None
    for _ in range(n_backtracks + 1):
        path = _path(network, start, lesson, queries, learning_rate, max_steps, precondition)
        if best is not None and int(path.flipped.sum()) < int(best.flipped.sum()):
            break
        if best is None or path.length < best.length or path.flipped.sum() > best.flipped.sum():
            best = path
        if bool(path.flipped.all()) and 4 * (path.n_steps - 1) > max_steps:
            break  # a quarter of the step takes four times as many
        learning_rate /= 4
    assert best is not None
    return best


def _path(
    network: Network,
    start: Parameters,
    lesson: Lesson,
    queries: Labelled,
    step: float,
    max_steps: int,
    precondition: Precondition | None,
) -> Displacement:
    current = start
    flipped = predicted_as(network, start, queries)
    taken = 0
    while taken < max_steps and not bool(flipped.all()):
        direction = lesson.gradient(network, current)
        if precondition is not None:
            direction = _of_length(precondition(direction), direction)
        following = moved(current, direction, -step)
        if not all(bool(torch.isfinite(p).all()) for p in following.values()):
            break
        after = predicted_as(network, following, queries)
        taken += 1
        if bool(after.all()):
            following = _bisected(network, current, following, queries)
        current, flipped = following, after
    return Displacement(current, taken, distance(start, current), flipped)


def _of_length(direction: Parameters, like: Parameters) -> Parameters:
    wanted, size = (
        sum(float(p.square().sum()) for p in parameters.values()) ** 0.5
        for parameters in (like, direction)
    )
    return {name: p * (wanted / max(size, 1e-30)) for name, p in direction.items()}


def _between(first: Parameters, second: Parameters, share: float) -> Parameters:
    return {name: torch.lerp(first[name], second[name], share) for name in first}


def _bisected(
    network: Network, before: Parameters, after: Parameters, queries: Labelled, n_halvings: int = 6
) -> Parameters:
    low, high = 0.0, 1.0
    for _ in range(n_halvings):
        middle = (low + high) / 2
        if bool(predicted_as(network, _between(before, after, middle), queries).all()):
            high = middle
        else:
            low = middle
    return _between(before, after, high)


def distance(first: Parameters, second: Parameters) -> float:
    """Euclidean distance of two sets of parameters."""
    return float(sum(float((first[name] - second[name]).square().sum()) for name in first) ** 0.5)


def largest_allowed(
    network: Network,
    start: Parameters,
    end: Parameters,
    guard: Labelled,
    *,
    before: float,
    max_drop: float,
    n_halvings: int = 6,
) -> tuple[Parameters, float, float]:
    """Go from start towards end as far as a guard set's accuracy allows."""
    least = before - max_drop
    at_end = accuracy(network, end, guard)
    if at_end >= least:
        return end, 1.0, at_end
    low, high, kept = 0.0, 1.0, before
    for _ in range(n_halvings):
        middle = (low + high) / 2
        there = accuracy(network, _between(start, end, middle), guard)
        if there >= least:
            low, kept = middle, there
        else:
            high = middle
    return _between(start, end, low), low, kept


def harmonic_mean(forgotten: float, kept: float) -> float:
    """F1 of forgetting: harmonic mean of error on the removed and accuracy on the rest."""
    total = forgotten + kept
    return 2 * forgotten * kept / total if total > 0 else 0.0


def best_scale(
    network: Network,
    start: Parameters,
    direction: Parameters,
    removed: Labelled,
    others: Labelled,
    scales: Sequence[float],
    *,
    n_refinements: int = 6,
) -> tuple[float, float]:
    """Choose how far to go along an unlearning direction, on held-out rows."""

    def quality(scale: float) -> float:
        there = moved(start, direction, scale)
        forgotten = 1 - accuracy(network, there, removed)
        return harmonic_mean(forgotten, accuracy(network, there, others)) if forgotten else 0.0

    scores = [quality(scale) for scale in scales]
    best = max(range(len(scales)), key=lambda i: scores[i])
    low, high = scales[max(best - 1, 0)], scales[min(best + 1, len(scales) - 1)]
    between = [low + (high - low) * (i + 1) / (n_refinements + 1) for i in range(n_refinements)]
    candidates = [(scales[best], scores[best]), *((scale, quality(scale)) for scale in between)]
    return max(candidates, key=lambda pair: (pair[1], -pair[0]))


def moved(parameters: Parameters, direction: Parameters, scale: float) -> Parameters:
    """Add a multiple of a direction."""
    return {name: p + scale * direction[name] for name, p in parameters.items()}
