"""The names that scikit-learn keeps private, imported here and nowhere else."""

from typing import Any

import numpy as np
from sklearn.base import _fit_context as fit_context
from sklearn.model_selection._search import BaseSearchCV
from sklearn.utils import _safe_indexing as safe_indexing
from sklearn.utils._metadata_requests import _MetadataRequester as MetadataRequester
from sklearn.utils._param_validation import (
    HasMethods,
    Interval,
    InvalidParameterError,
    Options,
    StrOptions,
    validate_parameter_constraints,
)
from sklearn.utils.validation import _check_feature_names_in as check_feature_names_in
from sklearn.utils.validation import _check_sample_weight

# where `make docs` puts the page of a class, below the address it is published at
DOC_LINK = "https://skperf.readthedocs.io/en/stable/api/skperf.{estimator_name}.html"

__all__ = [
    "DOC_LINK",
    "BaseSearchCV",
    "HasMethods",
    "Interval",
    "InvalidParameterError",
    "MetadataRequester",
    "Options",
    "StrOptions",
    "check_feature_names_in",
    "check_sample_weight",
    "fit_context",
    "safe_indexing",
    "validate_parameter_constraints",
]


def check_sample_weight(sample_weight: Any, X: Any, *, dtype: Any = None) -> np.ndarray:
    """Validate weights (n,) of rows X (n, ...): finite, none negative, not all zero: -> (n,)."""
    # scikit-learn reads off X the number of rows, and what kind of array to make
    if dtype is not None and not hasattr(X, "dtype"):
        X = np.empty((len(X), 1))
    if np.asarray(sample_weight).dtype.kind not in "biufO":
        raise ValueError("sample_weight must hold numbers.")
    weight = _check_sample_weight(sample_weight, X, dtype=dtype, ensure_non_negative=True)
    if not 1e-30 < (largest := float(weight.max())) < 1e30:  # their sums leave single precision
        raise ValueError(f"sample_weight holds {largest:.3g}: scale the weights to about 1.")
    return np.asarray(weight)
