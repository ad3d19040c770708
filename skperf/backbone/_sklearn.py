"""The names that scikit-learn keeps private, imported here and nowhere else."""

from sklearn.base import _fit_context as fit_context
from sklearn.utils._metadata_requests import _MetadataRequester as MetadataRequester
from sklearn.utils._param_validation import (
    HasMethods,
    Interval,
    InvalidParameterError,
    Options,
    StrOptions,
)
from sklearn.utils.validation import _check_sample_weight

# where `make docs` puts the page of a class, below the address it is published at
DOC_LINK = "https://skperf.readthedocs.io/en/stable/api/skperf.{estimator_name}.html"

__all__ = [
    "DOC_LINK",
    "HasMethods",
    "Interval",
    "InvalidParameterError",
    "MetadataRequester",
    "Options",
    "StrOptions",
    "check_sample_weight",
    "fit_context",
]


def check_sample_weight(sample_weight, X, *, dtype=None):
    """Validate weights: one a row, finite, none negative, not all zero.

    Parameters
    ----------
    sample_weight : array-like of shape (n,), float or None
        Weights; None means ones.
    X : ndarray of shape (n, ...)
        The rows.
    dtype : dtype, optional
        Floating type of the result.

    Returns
    -------
    ndarray of shape (n,)
        The weights.
    """
    return _check_sample_weight(sample_weight, X, dtype=dtype, ensure_non_negative=True)
