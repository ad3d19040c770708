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

    Shapes: sample_weight (n,), X (n, ...) -> (n,).
    """
    return _check_sample_weight(sample_weight, X, dtype=dtype, ensure_non_negative=True)
