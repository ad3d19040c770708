"""Split and score along rounds of deployment, forward in time."""

from collections.abc import Iterator
from copy import copy
from numbers import Integral
from typing import Any

import numpy as np
from sklearn.metrics import log_loss
from sklearn.model_selection import BaseCrossValidator
from sklearn.utils.validation import check_consistent_length

from skperf.backbone._sklearn import MetadataRequester
from skperf.performative._inputs import check_rounds

__all__ = ["OneStepScorer", "RoundForwardSplit", "one_step_scorer"]


class RoundRows(np.ndarray):
    """Row indices that a splitter along rounds made: an adapter fitted on them needs its rounds."""

    of_rounds = True


class RoundForwardSplit(BaseCrossValidator):
    """Train on the first rounds, test on the next ones, and go forward.

    Parameters
    ----------
    min_train_rounds : int, default=3
        Rounds in the first training set.
    test_rounds : int, default=1
        Rounds in each test set. With one, every scorer is honest: the statistic in force is
        that of the last training round. With more, use :func:`one_step_scorer` or a ``score``
        that takes ``rounds``.
    gap : int, default=0
        Rounds left out between training and testing, for labels that arrive late.
    max_train_rounds : int, optional
        Rounds in each training set, the latest; by default all before the gap.

    Examples
    --------
    >>> import numpy as np
    >>> from skperf.model_selection import RoundForwardSplit
    >>> rounds = np.repeat([0, 1, 2, 3, 4], 2)
    >>> for train, test in RoundForwardSplit().split(np.zeros((10, 1)), groups=rounds):
    ...     print(np.unique(rounds[train]), np.unique(rounds[test]))
    [0 1 2] [3]
    [0 1 2 3] [4]
    """

    __metadata_request__split = {"groups": True}  # noqa: RUF012

    def __init__(
        self,
        min_train_rounds: int = 3,
        test_rounds: int = 1,
        gap: int = 0,
        *,
        max_train_rounds: int | None = None,
    ) -> None:
        self.min_train_rounds = min_train_rounds
        self.test_rounds = test_rounds
        self.gap = gap
        self.max_train_rounds = max_train_rounds

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Count the splits.

        Parameters
        ----------
        X : object
            Not used.
        y : object
            Not used.
        groups : array-like of int, str or date of shape (n,)
            Round of every row.

        Returns
        -------
        int
            Number of splits.
        """
        return len(self._starts(_rounds(groups)))

    def split(
        self, X: Any, y: Any = None, groups: Any = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Go forward in rounds.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : object
            Not used.
        groups : array-like of int, str or date of shape (n,)
            Round of every row; their order is time.

        Yields
        ------
        train, test : ndarray of int
            Row indices.

        Raises
        ------
        ValueError
            If there are no rounds, or too few for one split.
        """
        numbers = _rounds(groups)
        check_consistent_length(X, groups)
        _, codes = np.unique(numbers, return_inverse=True)
        for start in self._starts(numbers):
            stop = start - self.gap
            first = 0 if self.max_train_rounds is None else stop - self.max_train_rounds
            train = (codes >= first) & (codes < stop)
            test = (codes >= start) & (codes < start + self.test_rounds)
            yield np.flatnonzero(train).view(RoundRows), np.flatnonzero(test)

    def _starts(self, numbers: np.ndarray) -> range:
        """Positions of the first test rounds."""
        for name, least in (("min_train_rounds", 1), ("test_rounds", 1), ("gap", 0)):
            value = getattr(self, name)
            if not isinstance(value, Integral) or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, got {value}.")
        n_rounds = len(np.unique(numbers))
        first = self.min_train_rounds + self.gap
        starts = range(first, n_rounds - self.test_rounds + 1, self.test_rounds)
        if not len(starts):
            raise ValueError(
                f"{n_rounds} rounds are too few for one split: {self.min_train_rounds} to train "
                f"on, a gap of {self.gap} and {self.test_rounds} to test on are needed."
            )
        return starts


def _rounds(groups: Any) -> np.ndarray:
    if groups is None:
        raise ValueError("The 'groups' parameter should not be None: it holds every row's round.")
    numbers: np.ndarray = check_rounds(groups, len(groups))
    return numbers


class OneStepScorer(MetadataRequester):
    """Scorer of log likelihood, each round predicted by the statistic of the one before."""

    def set_score_request(self, *, rounds: str | bool | None) -> "OneStepScorer":
        """Ask for the rounds under metadata routing.

        Parameters
        ----------
        rounds : str, bool or None
            Name of the metadata that holds them, True for "rounds", False for none.

        Returns
        -------
        OneStepScorer
            A copy that asks.
        """
        asking = copy(self)
        requests = asking._get_metadata_request()
        requests.score.add_request(param="rounds", alias=rounds)
        asking._metadata_request = requests
        return asking

    def __call__(self, estimator: Any, X: Any, y: Any, rounds: Any = None) -> float:
        """Compute the mean log likelihood of labels (n,) of rows (n, ...), higher is better."""
        if hasattr(estimator, "best_estimator_"):
            estimator = estimator.best_estimator_
        if hasattr(estimator, "steps"):
            X = estimator[:-1].transform(X) if len(estimator.steps) > 1 else X
            estimator = estimator[-1]
        if not hasattr(estimator, "replay"):
            raise TypeError(
                f"one_step_scorer scores a PerformativeAdapter, not a {type(estimator).__name__}."
            )
        numbers = np.zeros(len(y), dtype=int) if rounds is None else rounds
        proba = estimator.replay(X, y, rounds=numbers)
        return -float(log_loss(y, proba, labels=estimator.classes_))

    def __repr__(self) -> str:
        return "one_step_scorer"


one_step_scorer = OneStepScorer()
