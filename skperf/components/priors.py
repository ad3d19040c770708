"""What gradients say before any ablation: sums over passes, guesses, and how to mix them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_TINY = 1e-12


@dataclass
class PathSums:
    """Running sums over gradient passes; their size does not depend on the number of passes."""

    n_components: int
    n_examples: int

    def __post_init__(self) -> None:
        self.passes = 0
        zeros = np.zeros((4, self.n_examples, self.n_components))
        self.tested, self.inside, self.inside_squared, self.outside = zeros

    def add(self, gradients: NDArray[np.floating], tested: NDArray[np.bool_]) -> None:
        """Take one pass in: gradients, tested (n_examples, n_components)."""
        self.passes += 1
        under_test = np.where(tested, gradients, 0.0)
        self.tested += tested
        self.inside += under_test
        self.inside_squared += under_test**2
        self.outside += gradients - under_test

    def merge(self, other: "PathSums") -> None:
        """Take in the sums over other passes."""
        self.passes += other.passes
        for name in ("tested", "inside", "inside_squared", "outside"):
            getattr(self, name)[:] += getattr(other, name)

    def means(self) -> tuple[Array, Array]:
        """Mean derivatives on the path and with gates open: -> two (n_examples, n_components)."""
        open_gate = self.outside / np.maximum(self.passes - self.tested, 1)
        open_gate = np.where(self.passes > self.tested, open_gate, self.inside / self.passes)
        on_path = np.where(self.tested > 0, self.inside / np.maximum(self.tested, 1), open_gate)
        return on_path, open_gate

    def spread(self, on_path: Array) -> Array:
        """Squared deviations from the mean on the path, summed: (n_examples, n_components)."""
        tested: Array = np.maximum(self.inside_squared - self.tested * on_path**2, 0.0)
        return np.where(self.tested > 1, tested, 0.0)


@dataclass(frozen=True)
class Prior:
    """What gradients say before any ablation."""

    guesses: Sequence[Array]  # (n_examples, n_components)
    variance: Array  # (n_components,)
    noise: Array  # (n_examples, n_components)


@dataclass(frozen=True)
class Population:
    """What the examples given to `fit` have in common."""

    on_path: Array  # (n_components,)
    open_gate: Array  # (n_components,)
    single: Array  # (n_components,)


def population(sums: PathSums) -> Population:
    """Pool gradient passes over the examples."""
    on_path, open_gate = sums.means()
    count = np.maximum(sums.tested.sum(0), 1)
    pooled = np.where(sums.tested.any(0), sums.inside.sum(0) / count, open_gate.mean(0))
    spread = sums.spread(on_path).sum(0)
    freedom = np.maximum(sums.tested - 1, 0).sum(0)
    if freedom.any():
        typical = spread.sum() / freedom.sum()
    else:
        typical = float(((on_path - open_gate) ** 2).mean())
    support = 0.1 * max(float(freedom.mean()), 1.0)
    single = (spread + support * typical) / (freedom + support)
    return Population(pooled, open_gate.mean(0), single + _TINY)


def path_prior(sums: PathSums, shared: Population) -> Prior:
    """Guesses of the attributions from gradient passes."""
    # By the fundamental theorem of calculus the mean derivative over the path of a gate from 1
    # to 0 is the effect of closing it. The derivative at the open gate is steadier but biased;
    # the means over all examples are steadier still but say nothing of the single one. Ablations
    # decide how to mix the four.
    on_path, open_gate = sums.means()
    freedom = np.maximum(sums.tested - 1, 0)
    own = sums.spread(on_path).sum(1) / np.maximum((freedom * shared.single).sum(1), _TINY)
    own = np.where(freedom.any(1), own, 1.0)
    typical = shared.single / np.maximum(sums.tested, 1.0)
    both = [np.broadcast_to(v, on_path.shape) for v in (shared.on_path, shared.open_gate)]
    return Prior([on_path, open_gate, *both], typical.mean(0), own[:, None] * typical)


def with_singles(prior: Prior | None, alone: Array) -> Prior:
    """Add what ablating each component alone has shown: alone (n_examples, n_components)."""
    if prior is None:
        return Prior([alone], np.ones(alone.shape[1]), np.zeros(alone.shape))
    return replace(prior, guesses=[*prior.guesses, alone])


def pooled_slopes(observations: Sequence[tuple[Array, Array]]) -> Array:
    """Mix guesses by one regression over all examples: -> (n_guesses,)."""
    gram, cross = 0.0, 0.0
    for features, outcomes in observations:
        scale = outcomes.std(0) + _TINY
        x = (features - features.mean(1, keepdims=True)) / scale
        gram = gram + np.einsum("apn,bpn->ab", x, x)
        cross = cross + np.einsum("apn,pn->a", x, (outcomes - outcomes.mean(0)) / scale)
    # Guesses may coincide, so least squares comes with a trace of ridge.
    diagonal = np.diag(1e-4 * np.diag(gram) + 1e-9 * np.trace(gram) + _TINY)
    return np.asarray(np.linalg.solve(gram + diagonal, cross))


def mixture(prior: Prior, slopes: Array) -> Array:
    """Mix the guesses of a prior: slopes (n_guesses,) -> (n_examples, n_components)."""
    mixed = np.zeros(prior.guesses[0].shape)
    for slope, guess in zip(slopes, prior.guesses, strict=True):
        mixed += slope * guess
    return mixed
