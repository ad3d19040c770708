"""The one door for rows and labels."""

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import Tensor


def as_array(values):
    """Turn a torch tensor into an array; pass everything else on."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def check_rows(estimator, X, *, reset=False):
    """Validate rows of features, images or tokens: X (n, ...) -> (n, ...)."""
    return validate_data(estimator, as_array(X), reset=reset, allow_nd=True)


def check_labelled_rows(estimator, X, y, *, reset=False):
    """Validate rows and their class labels: X (n, ...), y (n,) -> X (n, ...), y (n,)."""
    if y is None:
        # in scikit-learn's words, whose own checks look for them
        name = type(estimator).__name__
        raise ValueError(
            f"This {name} estimator requires y to be passed, but the target y is None."
        )
    X, y = validate_data(estimator, as_array(X), as_array(y), reset=reset, allow_nd=True)
    if reset:  # later labels are held against the classes that fit has seen
        check_classification_targets(y)
    return X, np.asarray(y)
