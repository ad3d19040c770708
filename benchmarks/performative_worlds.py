"""A simulated world of Gaussian classes that answers to the deployed classifier."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from skperf import PerformativeAdapter
from skperf.performative.label_shift import log_loss as nll
from skperf.performative.label_shift import smooth_shares

ROUNDS = 200


@dataclass(frozen=True)
class Column:
    """One world: classes in `d` dimensions and what the next label mix is drawn from."""

    n_classes: int
    d: int
    sep: float
    answer: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    floor: int = 5
    train_size: int = 1000
    test_size: int = 2000


def adversarial(temperature):
    return lambda statistic, _: softmax(-statistic / temperature)


def bent(statistic, _):
    return softmax(-np.tanh(4 * (statistic - statistic.mean())) / 0.3)


def independent(concentration):
    return lambda statistic, generator: generator.dirichlet(np.full(len(statistic), concentration))


COLUMNS = {
    "C10 t0.1": Column(10, 6, 1.8, adversarial(0.1)),
    "C10 t0.3": Column(10, 6, 1.8, adversarial(0.3)),
    "C10 bent": Column(10, 6, 1.8, bent),
    "C100 t0.1 floor": Column(100, 24, 1.0, adversarial(0.1)),
    "C100 t0.1": Column(100, 24, 1.0, adversarial(0.1), floor=0),
    "independent 100": Column(10, 6, 1.8, independent(100.0)),
    "independent 5": Column(10, 6, 1.8, independent(5.0)),
}


@dataclass
class World:
    """Rows drawn anew in every round; the backbone is fitted on equal shares, then frozen."""

    column: Column
    seed: int
    generator: np.random.Generator = field(init=False)

    def __post_init__(self):
        self.generator = np.random.default_rng(self.seed)
        c, draw = self.column, self.generator
        spread = draw.uniform(0.5, 1.5, size=(c.n_classes, 1))
        self.means = draw.normal(size=(c.n_classes, c.d)) * c.sep * spread
        self.scales = draw.uniform(0.7, 1.6, size=c.n_classes)
        y = np.repeat(np.arange(c.n_classes), 100)
        self.backbone = LogisticRegression(max_iter=1000).fit(self.rows(y), y)
        self.prior = draw.dirichlet(np.full(c.n_classes, 100.0))

    def rows(self, y):
        """Draw one row for each label."""
        noise = self.generator.normal(size=(len(y), self.column.d))
        return self.means[y] + noise * self.scales[y][:, None]

    def mix(self):
        """Give the mix of the round, its floor included."""
        share = self.column.floor / self.column.test_size
        return np.maximum(self.prior * (1 - share * self.column.n_classes) + share, 1e-12)

    def next_round(self, statistic=None):
        """Give the traffic of a round: rows, labels."""
        c = self.column
        if statistic is not None:
            self.prior = c.answer(statistic, self.generator)
        free = self.generator.choice(c.n_classes, c.test_size - c.floor * c.n_classes, p=self.prior)
        y = np.concatenate([np.repeat(np.arange(c.n_classes), c.floor), free])
        return self.rows(y), y


ARMS = {
    "auto": {},
    "tied": {"adapter": "tied"},
    "paper": {"adapter": "paper"},
    "last round": {"adapter": "fixed", "strength": 0.0, "calibration": "none"},
    "EM": {"adapter": "fixed", "strength": 0.0, "transductive": "em"},
    "BBSE": {"adapter": "fixed", "strength": 0.0, "transductive": "bbse"},
    "auto + EM": {"transductive": "map_em"},
}


def run(column, seed, arm, *, n_rounds=ROUNDS):
    """Live through the rounds with one arm.

    Returns
    -------
    ndarray of shape (n_rounds, 6)
        Log loss of no correction, the arm, the mix that the round is drawn from, and the mix that
        its rows happen to have, all on the arm's own trajectory; accuracy and worst recall of the
        arm.
    """
    world = World(COLUMNS[column], seed)
    n_classes = COLUMNS[column].n_classes
    adapter = PerformativeAdapter(
        FrozenEstimator(world.backbone),
        base_prior="uniform",
        random_state=seed,
        **ARMS[arm],
    )
    statistic, counts, losses = None, np.ones(n_classes), []
    for number in range(n_rounds):
        X, y = world.next_round(statistic)
        logits = world.backbone.decision_function(X)
        if arm == "last round":
            log_proba = log_softmax(logits + np.log(smooth_shares(counts)), axis=1)
        elif number == 0:
            log_proba = log_softmax(logits, axis=1)
        else:
            log_proba = adapter.predict_log_proba(X)
        deployed = log_proba.argmax(axis=1)
        adapter.partial_fit(X, y, rounds=number, deployed_pred=deployed)
        statistic, counts = adapter.statistic_, np.bincount(y, minlength=n_classes)
        drawn = nll(logits + np.log(world.mix()), y)
        realised = nll(logits + np.log(np.maximum(counts / len(y), 1e-12)), y)
        right = np.bincount(y, deployed == y, n_classes)[counts > 0] / counts[counts > 0]
        losses.append(
            (
                nll(logits, y),
                nll(log_proba, y),
                drawn,
                realised,
                np.mean(deployed == y),
                right.min(),
            )
        )
    return np.array(losses)
