"""The one door for rows and labels."""

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data
from torch import Tensor


def as_array(values):
    """Turn a torch tensor into an array; pass everything else on.

    Parameters
    ----------
    values : object
        Rows or labels in any form.

    Returns
    -------
    object
        An ndarray where a tensor was given.
    """
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def check_rows(estimator, X, *, reset=False):
    """Validate rows of features, images or tokens.

    Parameters
    ----------
    estimator : estimator
        Gets ``n_features_in_`` and ``feature_names_in_`` when `reset`, else is held
        against them.
    X : array-like of shape (n, ...)
        Numbers, images or tokens; a DataFrame or a torch tensor is welcome.
    reset : bool, default=False
        Whether these are the rows that the estimator is fitted on.

    Returns
    -------
    ndarray of shape (n, ...)
        In the type they came in, if that is numeric.
    """
    return validate_data(estimator, as_array(X), reset=reset, allow_nd=True)


def check_labelled_rows(estimator, X, y, *, reset=False):
    """Validate rows and their class labels.

    Parameters
    ----------
    estimator : estimator
        As in :func:`check_rows`.
    X : array-like of shape (n, ...)
        As in :func:`check_rows`.
    y : array-like of shape (n,)
        Class labels.
    reset : bool, default=False
        Whether these are the rows that the estimator is fitted on.

    Returns
    -------
    X : ndarray of shape (n, ...)
        The rows.
    y : ndarray of shape (n,)
        The labels.

    Raises
    ------
    ValueError
        If there are no labels, or rows and labels are none or disagree.
    """
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
