"""What gradients say before any ablation: sums over passes, guesses, and how to mix them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_TINY = 1e-12


@dataclass
class PathSums:
    """Running sums over gradient passes; their size does not depend on the number of passes.

    Parameters
    ----------
    n_components : int
        Number of gates.
    n_examples : int
        Number of examples.
    """

    n_components: int
    n_examples: int

    def __post_init__(self) -> None:
        shape = (self.n_examples, self.n_components)
        self.passes = 0
        self.tested = np.zeros(shape)
        self.inside = np.zeros(shape)
        self.inside_squared = np.zeros(shape)
        self.outside = np.zeros(shape)

    def add(self, gradients: NDArray[np.floating], tested: NDArray[np.bool_]) -> None:
        """Take one pass in.

        Parameters
        ----------
        gradients : ndarray of shape (n_examples, n_components)
            Derivatives of the output with respect to the gates.
        tested : ndarray of shape (n_examples, n_components)
            Where the gate was under test.
        """
        self.passes += 1
        under_test = np.where(tested, gradients, 0.0)
        self.tested += tested
        self.inside += under_test
        self.inside_squared += under_test**2
        self.outside += gradients - under_test

    def merge(self, other: "PathSums") -> None:
        """Take in the sums over other passes.

        Parameters
        ----------
        other : PathSums
            Over the same examples and components.
        """
        self.passes += other.passes
        self.tested += other.tested
        self.inside += other.inside
        self.inside_squared += other.inside_squared
        self.outside += other.outside

    def means(self) -> tuple[Array, Array]:
        """Mean derivatives on the path and with the gate open.

        Returns
        -------
        on_path : ndarray of shape (n_examples, n_components)
            Over the passes that tested the component; where there was none, as `open_gate`.
        open_gate : ndarray of shape (n_examples, n_components)
            Over all other passes.
        """
        open_gate = self.outside / np.maximum(self.passes - self.tested, 1)
        open_gate = np.where(self.passes > self.tested, open_gate, self.inside / self.passes)
        on_path = np.where(self.tested > 0, self.inside / np.maximum(self.tested, 1), open_gate)
        return on_path, open_gate

    def spread(self, on_path: Array) -> Array:
        """Squared deviations from the mean on the path, summed over the passes.

        Parameters
        ----------
        on_path : ndarray of shape (n_examples, n_components)
            From :meth:`means`.

        Returns
        -------
        ndarray of shape (n_examples, n_components)
            Zero where no pass or one tested the component.
        """
        tested: Array = np.maximum(self.inside_squared - self.tested * on_path**2, 0.0)
        return np.where(self.tested > 1, tested, 0.0)


@dataclass(frozen=True)
class Prior:
    """What gradients say before any ablation.

    Parameters
    ----------
    guesses : sequence of ndarray of shape (n_examples, n_components)
        Guesses of the attributions, to be mixed by what the ablations show.
    variance : ndarray of shape (n_components,)
        How far off the guesses are, relative to one another.
    noise : ndarray of shape (n_examples, n_components)
        Sampling variance of the first guess.
    """

    guesses: Sequence[Array]
    variance: Array
    noise: Array


@dataclass(frozen=True)
class Population:
    """What the examples given to `fit` have in common.

    Parameters
    ----------
    on_path, open_gate : ndarray of shape (n_components,)
        Mean derivatives over examples and passes.
    single : ndarray of shape (n_components,)
        Variance of one derivative on the path around its example's mean.
    """

    on_path: Array
    open_gate: Array
    single: Array


def population(sums: PathSums) -> Population:
    """Pool gradient passes over the examples.

    Parameters
    ----------
    sums : PathSums
        At least one pass. Every example has its own deal of the gates, so that noise
        averages out over them.

    Returns
    -------
    Population
        Means and variances.
    """
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
    """Guesses of the attributions from gradient passes.

    By the fundamental theorem of calculus the mean derivative over the path of a gate from
    1 to 0 is the effect of closing it. The derivative at the open gate is steadier but
    biased; the means over all examples are steadier still but say nothing of the single
    one. Ablations decide how to mix the four.

    Parameters
    ----------
    sums : PathSums
        At least one pass over some examples.
    shared : Population
        Of the examples given to `fit`.

    Returns
    -------
    Prior
        Guesses: on the path, open gate, and the population's two means.
    """
    on_path, open_gate = sums.means()
    freedom = np.maximum(sums.tested - 1, 0)
    own = sums.spread(on_path).sum(1) / np.maximum((freedom * shared.single).sum(1), _TINY)
    own = np.where(freedom.any(1), own, 1.0)
    typical = shared.single / np.maximum(sums.tested, 1.0)
    both = [np.broadcast_to(v, on_path.shape) for v in (shared.on_path, shared.open_gate)]
    return Prior([on_path, open_gate, *both], typical.mean(0), own[:, None] * typical)


def with_singles(prior: Prior | None, alone: Array) -> Prior:
    """Add what ablating each component alone has shown, free of noise, to the guesses.

    Parameters
    ----------
    prior : Prior or None
        From gradients, if there are any.
    alone : ndarray of shape (n_examples, n_components)
        Fall of the output.

    Returns
    -------
    Prior
        With one guess more.
    """
    if prior is None:
        return Prior([alone], np.ones(alone.shape[1]), np.zeros(alone.shape))
    return replace(prior, guesses=[*prior.guesses, alone])


def pooled_slopes(observations: Sequence[tuple[Array, Array]]) -> Array:
    """Mix guesses by one regression over all examples.

    Parameters
    ----------
    observations : sequence of (ndarray, ndarray)
        Groups of passes: what each guess predicts for each of them, of shape
        (n_guesses, n_passes, n_examples), and the outputs, of shape (n_passes, n_examples).
        Each group has its own intercept.

    Returns
    -------
    ndarray of shape (n_guesses,)
        Slopes; every example counts alike.
    """
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
    """Mix the guesses of a prior.

    Parameters
    ----------
    prior : Prior
        The guesses.
    slopes : ndarray of shape (n_guesses,)
        A factor for each.

    Returns
    -------
    ndarray of shape (n_examples, n_components)
        The sum.
    """
    mixed = np.zeros(prior.guesses[0].shape)
    for slope, guess in zip(slopes, prior.guesses, strict=True):
        mixed += slope * guess
    return mixed
