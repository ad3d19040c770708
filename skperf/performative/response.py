"""Maps from what is known before a round to its label mix.

A map is log-linear, ``log pi = anchor + a + F b + W v`` up to a constant, and is fitted by
penalised multinomial likelihood, so that each label seen counts once. The anchor is the base mix
or the mix of the round before; F holds features with one entry a class, whose coefficients b all
classes share; v is a free vector, whose matrix W is shrunk towards zero. A `Form` says which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import xlogy

from skperf.performative.label_shift import Array, log_softmax

SLOPE_SHARE = 0.1  # a slope of 10 costs as much as an offset of 3
CURVE_KNOTS = 5
GUESS = 10.0  # of the dispersion, worth two rounds


@dataclass(frozen=True, eq=False)
class Inputs:
    """What is known before each of R rounds, NaN where not: statistics, mixes and shares."""

    statistics: Array
    mixes: Array
    shares: Array
    confusions: Array
    covariates: Array

    def __len__(self) -> int:
        """Count the rounds."""
        return len(self.mixes)

    def __getitem__(self, rows: Any) -> "Inputs":
        """Take some rounds."""
        return Inputs(*(getattr(self, name)[rows] for name in INPUT_NAMES))

    def at(self, statistics: Array) -> "Inputs":
        """Put other statistics (n, S) in force before the one round there is."""
        # shares and confusions were another model's than the one these statistics are of
        others = [np.repeat(getattr(self, name), len(statistics), axis=0) for name in INPUT_NAMES]
        others[0] = np.concatenate([statistics[:, None], others[0][:, 1:]], axis=1)
        if not np.array_equal(statistics, self.statistics[:, 0]):
            others[2], others[3] = np.full_like(others[2], np.nan), np.full_like(others[3], np.nan)
        return Inputs(*others)


INPUT_NAMES = ("statistics", "mixes", "shares", "confusions", "covariates")


@dataclass(frozen=True)
class Form:
    """Which inputs a map reads, and how."""

    shared: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    anchor: str = "base"

    @property
    def cost(self) -> float:
        """Nats a round by which a map has to be better than a simpler one to lead."""
        # inputs that move together tell the same; a reader and a candidate want the simpler map
        plain = self.shared in ((), ("statistic",)) and self.anchor == "base"
        n_inputs = len(self.shared) + len(self.free) + (self.anchor == "previous")
        return (0.0 if plain else 0.5) + 0.3 * max(0, n_inputs - 1)

    @property
    def reads_model(self) -> bool:
        """Whether the deployed model itself is among the inputs."""
        return any(
            not name.startswith(("mix", "change", "cov")) for name in self.shared + self.free
        )


class ResponseMap(Protocol):
    """Whatever answers inputs with label mixes."""

    def log_prior(self, inputs: Inputs) -> Array:
        """Log label mix (n, n_classes) of the rounds before which the inputs are known."""
        ...


@dataclass(frozen=True, eq=False)
class LogLinearMap:
    """A fitted map of some form."""

    form: Form
    log_base: Array  # (n_classes,)
    offset: Array  # (n_classes,) added to the anchor
    coefficients: Array  # (n_features,) of the shared features
    matrix: Array  # (n_classes, n_free)
    knots: Array  # of the curve
    centre: Array  # (n_free,)
    scale: Array  # (n_free,)

    def log_prior(self, inputs: Inputs) -> Array:
        """Log label mix of each round, of shape (n, n_classes)."""
        scores = anchor_of(inputs, self.form, self.log_base) + self.offset
        if len(self.coefficients):
            scores = scores + features_of(inputs, self.form, self.knots) @ self.coefficients
        if self.matrix.size:
            free = (free_of(inputs, self.form) - self.centre) / self.scale
            scores = scores + free @ self.matrix.T
        return log_softmax(scores, axis=1)


@dataclass(frozen=True, eq=False)
class Answering:
    """All maps together, as functions of the statistic alone: the rest is as known now."""

    answer: Callable[[Inputs], Array]
    coming: Inputs
    response: Any  # the map that leads

    def log_prior(self, statistics: Array) -> Array:
        """Log label mix (n, n_classes) answering statistics (n, n_statistics), unblended."""
        return self.answer(self.coming.at(np.asarray(statistics, dtype=np.float64)))

    @property
    def weights(self) -> Array:
        """Slopes (n_classes, n_statistics) of the leading map, where it has any."""
        n_classes, n_statistics = self.coming.mixes.shape[2], self.coming.statistics.shape[2]
        slopes = np.zeros((n_classes, n_statistics))
        if not isinstance(self.response, LogLinearMap):
            return slopes
        form = self.response.form
        if "statistic" in form.shared:
            slopes += self.response.coefficients[form.shared.index("statistic")] * np.eye(n_classes)
        if form.free[:1] == ("statistic",):
            slopes += self.response.matrix[:, :n_statistics]
        return slopes


def anchor_of(inputs: Inputs, form: Form, log_base: Array) -> Array:
    """Log mix from which a map departs, (R, K)."""
    if form.anchor == "base":
        return np.full((len(inputs), len(log_base)), log_base)
    latest: Array = inputs.mixes[:, 0]
    return latest


_SOURCES = {
    "statistic": ("statistics", 0),
    "curve": ("statistics", 0),
    "statistic_2": ("statistics", 1),
    "mix": ("mixes", 0),
    "mix_2": ("mixes", 1),
    "mix_3": ("mixes", 2),
}


def _read(inputs: Inputs, name: str) -> Array:
    """One input that a form names, (R, K) or (R, D); NaN where it is not known."""
    if name == "change":
        return np.asarray(inputs.mixes[:, 0] - inputs.mixes[:, 1])
    if name == "taken":  # what each class takes from the others
        n_classes = inputs.mixes.shape[2]
        tables = inputs.confusions.reshape(len(inputs), n_classes, n_classes)
        return np.asarray(tables.sum(axis=1) - np.diagonal(tables, axis1=1, axis2=2))
    source, lag = _SOURCES.get(name, (name, None))
    values: Array = getattr(inputs, source)
    if lag is None:
        return values
    return values[:, lag] if lag < values.shape[1] else np.full_like(values[:, 0], np.nan)


def features_of(inputs: Inputs, form: Form, knots: Array) -> Array:
    """Features with one entry a class, (R, K, J)."""
    parts = []
    for name in form.shared:
        values = _read(inputs, name)
        parts.append(_hinges(values, knots) if name == "curve" else _centred(values)[..., None])
        if name == "shares":  # a world may answer shares by their level or by their ratio
            parts.append(_centred(np.log(np.maximum(values, 1e-3)))[..., None])
    if not parts:
        return np.zeros((*inputs.mixes[:, 0].shape, 0))
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def free_of(inputs: Inputs, form: Form) -> Array:
    """Free vector of each round, (R, D)."""
    parts = [_read(inputs, name) for name in form.free]
    return np.concatenate([np.zeros((len(inputs), 0)), *parts], axis=1)


def known_rounds(inputs: Inputs, form: Form) -> NDArray[np.bool_]:
    """Tell the rounds (R,) before which all that a form reads is known."""
    known = np.ones(len(inputs), bool)
    for name in form.shared + form.free + (("mix",) if form.anchor == "previous" else ()):
        known &= np.isfinite(_read(inputs, name)).all(axis=1)
    return known


def fit_map(
    inputs: Inputs,
    counts: Array,
    *,
    form: Form,
    log_base: Array,
    l2: float = 1.0,
    start: Any = None,
    max_iter: int = 100,
) -> LogLinearMap:
    """Fit a map to label counts (R, K) of rounds; counts may be weighted or pseudo-counts."""
    n_classes = counts.shape[1]
    # counts of none tell nothing and may stand beside inputs that are not known
    used = known_rounds(inputs, form) & counts.any(axis=1)
    if not used.all():
        inputs, counts = inputs[used], counts[used]
    knots = np.zeros(0)
    if "curve" in form.shared:
        # knots that stay for some rounds let the last solution start the next one
        if isinstance(start, LogLinearMap) and len(inputs) % 8 != 0:
            knots = start.knots
        elif len(inputs):
            levels = np.linspace(0.0, 1.0, CURVE_KNOTS + 2)[1:-1]
            knots = np.unique(np.quantile(_centred(inputs.statistics[:, 0]), levels))
    anchor = anchor_of(inputs, form, log_base)
    features = features_of(inputs, form, knots)
    first = None
    if isinstance(start, LogLinearMap) and len(start.coefficients) == features.shape[2]:
        first = np.append(start.offset, start.coefficients)
    offset, coefficients = _fit_shared(features, counts, anchor, l2, first, max_iter)
    free = free_of(inputs, form)
    centre, scale = np.zeros(free.shape[1]), np.ones(free.shape[1])
    matrix = np.zeros((n_classes, free.shape[1]))
    if free.size:
        centre = free.mean(axis=0)
        if "covariates" in form.free:
            scale = np.maximum(free.std(axis=0), 1e-6)
        scores = anchor + offset + features @ coefficients
        before = start.matrix if isinstance(start, LogLinearMap) else None
        further, matrix = _fit_free((free - centre) / scale, scores, counts, l2, before)
        offset = offset + further
    return LogLinearMap(form, log_base, offset, coefficients, matrix, knots, centre, scale)


def _fit_free(
    free: Array, scores: Array, counts: Array, l2: float, known: Array | None
) -> tuple[Array, Array]:
    """Fit offsets (K,) and a matrix (K, D) of free inputs (R, D) on top of scores (R, K)."""
    n_classes = counts.shape[1]
    # the constant column lets one matrix hold the offsets too
    columns, basis = np.column_stack([np.ones(len(free)), free]), None
    if columns.shape[1] > len(columns):  # the penalty keeps the matrix in what the rounds span
        basis, across = np.linalg.qr(columns.T)
        columns = across.T
    totals = counts.sum(axis=1, keepdims=True)

    def penalised(flat: Array) -> tuple[float, Array]:
        change = flat.reshape(n_classes, -1)
        log_prior = log_softmax(scores + columns @ change.T, axis=1)
        residual = totals * np.exp(log_prior) - counts
        value = -np.sum(counts * log_prior) + 0.5 * l2 * flat @ flat
        return float(value), (residual.T @ columns + l2 * change).ravel()

    first = np.zeros((n_classes, 1 + free.shape[1]))
    if known is not None and known.shape == (n_classes, free.shape[1]):
        first[:, 1:] = known
    first = first if basis is None else first @ basis
    options = {"maxiter": 300, "ftol": 1e-8}
    found = minimize(penalised, first.ravel(), jac=True, method="L-BFGS-B", options=options)
    change = found.x.reshape(n_classes, -1)
    change = change if basis is None else change @ basis.T
    return change[:, 0], change[:, 1:]


def dispersion(response: ResponseMap, inputs: Inputs, counts: Array) -> float:
    """Estimate how much more label counts (R, K) vary than draws from the map's mixes would."""
    # Rounds differ for reasons that no map knows, so a thousand labels of one round are worth
    # fewer independent ones. Counts divided by this factor give honest likelihoods.
    freedom = max(1, counts.shape[1] - 1)
    log_prior = response.log_prior(inputs)
    seen = np.isfinite(log_prior).all(axis=1) & counts.any(axis=1)
    total = deviance(log_prior[seen], counts[seen]).sum()
    return max(1.0, float((total + 2 * GUESS * freedom) / ((seen.sum() + 2) * freedom)))


def deviance(log_prior: Array, counts: Array) -> Array:
    """Twice the log likelihood lost against the realised mix, of shape (n_rounds,)."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    lost: Array = 2.0 * (xlogy(counts, counts / totals) - counts * log_prior).sum(axis=1)
    return lost


def _fit_shared(
    features: Array, counts: Array, anchor: Array, l2: float, first: Array | None, max_iter: int
) -> tuple[Array, Array]:
    """Fit offsets (K,) and shared coefficients (J,) of features (R, K, J) by Newton's method."""
    n_classes, n_features = features.shape[1:]
    penalty = l2 * np.repeat([1.0, SLOPE_SHARE], [n_classes, n_features])
    theta = np.zeros(n_classes + n_features) if first is None else first
    totals = counts.sum(axis=1, keepdims=True)
    value, prior = _penalised(theta, features, counts, totals, anchor, penalty)
    for _ in range(max_iter):
        gradient, step = _newton_step(prior, features, counts, totals, theta, penalty)
        decrease = gradient @ step
        if decrease < 1e-9 + 1e-14 * abs(value):
            break
        scale = 1.0
        while True:
            trial = theta - scale * step
            reached, prior = _penalised(trial, features, counts, totals, anchor, penalty)
            if reached <= value - 1e-4 * scale * decrease or scale < 1e-6:
                break
            scale /= 2
        theta, value = trial, reached
    return theta[:n_classes], theta[n_classes:]


def _penalised(
    theta: Array, features: Array, counts: Array, totals: Array, anchor: Array, penalty: Array
) -> tuple[float, Array]:
    """Penalised loss, and the mixes (R, K) it is of."""
    n_classes, n_features = features.shape[1:]
    scores = anchor + theta[:n_classes]
    if n_features:  # one product of a flat array is several times faster than a stack of them
        scores += (features.reshape(-1, n_features) @ theta[n_classes:]).reshape(scores.shape)
    scores -= scores.max(axis=1, keepdims=True)
    prior = np.exp(scores)
    mass = prior.sum(axis=1, keepdims=True)
    prior /= mass
    value = np.vdot(totals, np.log(mass)) - np.vdot(counts, scores)
    return float(value + 0.5 * penalty @ theta**2), prior


def _newton_step(
    prior: Array, features: Array, counts: Array, totals: Array, theta: Array, penalty: Array
) -> tuple[Array, Array]:
    """Give the gradient and Newton's step of the penalised likelihood, (K + J,) each."""
    n_classes, n_features = features.shape[1:]
    mass = totals * prior
    residual = mass - counts
    columns = residual.sum(axis=0)[:, None] + (penalty * theta)[:n_classes, None]
    diagonal = mass.sum(axis=0) + penalty[:n_classes]
    if n_features:
        flat = (residual.size, n_features)
        slopes = residual.ravel() @ features.reshape(flat) + (penalty * theta)[n_classes:]
        centred = features - prior[:, None] @ features  # (R, K, J)
        weighted = mass[..., None] * centred
        cross = weighted.sum(axis=0)  # (K, J)
        inner = weighted.reshape(flat).T @ centred.reshape(flat)
        inner.flat[:: n_features + 1] += penalty[n_classes:]
        columns = np.concatenate([columns, cross], axis=1)
    # the block of the offsets is a diagonal less a matrix of rank R
    if len(counts) < n_classes:
        scaled = prior / diagonal
        small = np.diag(1.0 / totals[:, 0]) - scaled @ prior.T
        solved = columns / diagonal[:, None] + scaled.T @ np.linalg.solve(small, scaled @ columns)
    else:
        block = mass.T @ -prior
        block.flat[:: n_classes + 1] += diagonal
        solved = np.linalg.solve(block, columns)
    if not n_features:
        return columns[:, 0], solved[:, 0]
    step = np.linalg.solve(inner - cross.T @ solved[:, 1:], slopes - cross.T @ solved[:, 0])
    gradient = np.concatenate([columns[:, 0], slopes])
    return gradient, np.concatenate([solved[:, 0] - solved[:, 1:] @ step, step])


def _hinges(statistics: Array, knots: Array) -> Array:
    centred = _centred(statistics)[..., None]
    return np.concatenate([centred, np.maximum(centred - knots, 0.0)], axis=-1)


def _centred(statistics: Array) -> Array:
    centred: Array = statistics - statistics.sum(axis=1, keepdims=True) / statistics.shape[1]
    return centred
