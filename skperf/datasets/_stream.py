"""A world that answers to the deployed model, made of real rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.utils import Bunch, check_random_state

STARTING_CONCENTRATION = 100.0

Pools = list[np.ndarray]  # the rows of each class


class PerformativeStream:
    """Rounds of rows whose label mix answers the model deployed in the round before.

    Rows are drawn with replacement from two disjoint halves of the data, one for training and
    one for testing, split once. Only the shares of the classes move: within a class every
    round draws from the same rows, so the change is a pure label shift.

    Parameters
    ----------
    X : array-like of shape (n, ...)
        Rows.
    y : array-like of shape (n,)
        Their labels, every class at least twice.
    response : {"adversarial", "popularity", "none"} or callable, default="adversarial"
        Answer to the statistic S, by class in the order of ``classes_``:
        ``softmax(-S / temperature)``, the world collects what the model gets wrong;
        ``softmax(+S / temperature)``, it shows what the model gets right; the mix of round 0
        for ever; or any function of S that returns shares.
    temperature : float, default=0.1
        The smaller, the stronger the answer.
    train_size : int, default=1000
        Training rows in a round.
    test_size : int, default=2000
        Test rows in a round, those of `floor` included.
    floor : int, default=0
        Rows of every class that each test sample holds whatever the mix.
    random_state : int, RandomState or None, default=None
        Splits and draws.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels in order.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from skperf.datasets import PerformativeStream
    >>> X, y = load_digits(return_X_y=True)
    >>> stream = PerformativeStream(X, y, test_size=500, random_state=0)
    >>> first = stream.next_round()
    >>> second = stream.next_round([0.5, *[0.9] * 9])
    >>> bool((second.y_test == 0).mean() > 0.8)
    True
    """

    def __init__(
        self,
        X: Any,
        y: Any,
        *,
        response: str | Callable[..., Any] = "adversarial",
        temperature: float = 0.1,
        train_size: int = 1000,
        test_size: int = 2000,
        floor: int = 0,
        random_state: Any = None,
    ) -> None:
        self.X = np.asarray(X)
        self.y = np.asarray(y)
        self.response = response
        self.temperature = temperature
        self.train_size = train_size
        self.test_size = test_size
        self.floor = floor
        self.random_state = random_state
        self.classes_, codes = np.unique(self.y, return_inverse=True)
        self._check()
        self._generator = check_random_state(random_state)
        self._pools = _halves(codes, len(self.classes_), self._generator)
        concentration = np.full(len(self.classes_), STARTING_CONCENTRATION)
        self._prior = self._generator.dirichlet(concentration)
        self._round = 0

    def next_round(self, statistic: Any = None) -> Bunch:
        """Draw the next round.

        Parameters
        ----------
        statistic : array-like of shape (n_statistics,), optional
            Statistic of the model deployed in the round before, such as its recalls. None
            keeps the mix as it is.

        Returns
        -------
        Bunch
            ``X``, ``y`` (training rows), ``X_test``, ``y_test``, ``prior`` (the mix drawn from)
            and ``round``, its number.

        Raises
        ------
        ValueError
            If the answer to the statistic is no label mix.
        """
        if statistic is not None:
            self._prior = self._answer(np.asarray(statistic, dtype=np.float64))
        train = self._draw(self._pools[0], self.train_size)
        fixed = [self._generator.choice(pool, self.floor) for pool in self._pools[1]]
        free = self._draw(self._pools[1], self.test_size - self.floor * len(self.classes_))
        test = self._generator.permutation(np.concatenate([*fixed, free]))
        number, self._round = self._round, self._round + 1
        return Bunch(
            X=self.X[train],
            y=self.y[train],
            X_test=self.X[test],
            y_test=self.y[test],
            prior=self._prior.copy(),
            round=number,
        )

    def _check(self) -> None:
        if len(self.X) != len(self.y):
            raise ValueError(f"X has {len(self.X)} rows, but y has {len(self.y)}.")
        if not (callable(self.response) or self.response in RESPONSES):
            raise ValueError(
                f"response must be one of {sorted(RESPONSES)} or a callable, got {self.response!r}."
            )
        for name in ("train_size", "test_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}.")
        reserved = self.floor * len(self.classes_)
        if self.floor < 0 or reserved > self.test_size:
            raise ValueError(
                f"floor={self.floor} for {len(self.classes_)} classes takes {reserved} rows, but "
                f"test_size is {self.test_size}."
            )

    def _answer(self, statistic: Any) -> np.ndarray:
        if callable(self.response):
            prior = np.asarray(self.response(statistic), dtype=np.float64)
        else:
            if self.response != "none" and statistic.shape != self.classes_.shape:
                raise ValueError(
                    f"statistic has shape {statistic.shape}, but there are {len(self.classes_)} "
                    "classes."
                )
            prior = RESPONSES[self.response](statistic, self.temperature, self._prior)
        if prior.shape != self.classes_.shape or not np.isfinite(prior).all() or prior.min() < 0:
            raise ValueError(f"response must return a share for each class, got {prior!r}.")
        return np.asarray(prior / prior.sum())

    def _draw(self, pools: Pools, size: int) -> np.ndarray:
        rows = [
            self._generator.choice(pool, count)
            for pool, count in zip(
                pools, self._generator.multinomial(size, self._prior), strict=True
            )
        ]
        return np.asarray(self._generator.permutation(np.concatenate(rows)))


RESPONSES: dict[str, Callable[..., Any]] = {
    "adversarial": lambda statistic, temperature, _: softmax(-statistic / temperature),
    "popularity": lambda statistic, temperature, _: softmax(statistic / temperature),
    "none": lambda _, __, current: current,
}


def _halves(codes: np.ndarray, n_classes: int, generator: Any) -> tuple[Pools, Pools]:
    """Split the rows of each class in two pools."""
    pools: tuple[Pools, Pools] = ([], [])
    for c in range(n_classes):
        rows = generator.permutation(np.flatnonzero(codes == c))
        if len(rows) < 2:
            raise ValueError("y must hold every class at least twice, once for each pool.")
        middle = len(rows) // 2
        pools[0].append(rows[:middle])
        pools[1].append(rows[middle:])
    return pools
