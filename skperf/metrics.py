"""The figures the field reports, as plain functions of arrays."""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.utils import check_consistent_length

__all__ = [
    "accuracy_under_prior",
    "atc_accuracy",
    "counterfactual_correlation",
    "fpr_at_95_tpr",
    "linear_datamodeling_score",
    "ood_auroc",
]


def linear_datamodeling_score(influence: ArrayLike, subsets: ArrayLike, losses: ArrayLike) -> float:
    """Hold influence estimates against models retrained on subsets of the rows.

    For every query, the influences of the rows that a subset keeps are summed and ranked
    against the losses of the models retrained on the subsets.

    Parameters
    ----------
    influence : array-like of shape (n_query, n_train)
        Estimated rise of the query's loss when a training row is left out.
    subsets : array-like of shape (n_subsets, n_train), bool
        True where a subset keeps the row.
    losses : array-like of shape (n_subsets, n_query)
        Loss of each retrained model on each query; average over seeds first.

    Returns
    -------
    float
        Mean over queries of the Spearman correlation of the summed influence with minus
        the loss: 1 is perfect, 0 chance. Queries whose losses or sums are constant count
        as 0.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are fewer than two subsets.

    References
    ----------
    Park et al., "TRAK: Attributing Model Behavior at Scale" (arXiv 2303.14186), section 2.

    Examples
    --------
    >>> import numpy as np
    >>> from skperf.metrics import linear_datamodeling_score
    >>> influence = np.array([[3.0, 1.0, 0.0]])
    >>> subsets = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=bool)
    >>> round(linear_datamodeling_score(influence, subsets, [[0.1], [0.5], [0.9]]), 6)
    1.0
    """
    influence = _finite(influence, "influence", 2)
    losses = _finite(losses, "losses", 2)
    kept = np.asarray(subsets).astype(bool)
    if kept.shape != (len(losses), influence.shape[1]) or losses.shape[1] != len(influence):
        raise ValueError(
            "influence (n_query, n_train), subsets (n_subsets, n_train) and losses (n_subsets, "
            f"n_query) do not fit: {influence.shape}, {kept.shape}, {losses.shape}."
        )
    if len(kept) < 2:
        raise ValueError(f"a correlation needs at least two subsets, got {len(kept)}.")
    predicted = influence @ kept.T.astype(influence.dtype)
    correlation = _row_correlations(rankdata(predicted, axis=1), rankdata(-losses.T, axis=1))
    return float(correlation.mean())


def counterfactual_correlation(predicted: ArrayLike, actual: ArrayLike) -> float:
    """Hold predicted outputs of ablated networks against the true ones.

    Parameters
    ----------
    predicted : array-like of shape (n, n_masks)
        Estimated output of every example under every mask.
    actual : array-like of shape (n, n_masks)
        Output of the network with the components really ablated.

    Returns
    -------
    float
        Mean over examples of the Pearson correlation over masks. Examples whose outputs
        are constant count as 0.

    Raises
    ------
    ValueError
        If shapes disagree, values are not finite, or there are fewer than two masks.

    References
    ----------
    Shah, Ilyas and Madry, "Decomposing and Editing Predictions by Modeling Model
    Computation" (arXiv 2404.11534), section 4.

    Examples
    --------
    >>> from skperf.metrics import counterfactual_correlation
    >>> round(counterfactual_correlation([[1.0, 2.0, 3.0]], [[10.0, 20.0, 30.0]]), 6)
    1.0
    """
    predicted, actual = _finite(predicted, "predicted", 2), _finite(actual, "actual", 2)
    if predicted.shape != actual.shape:
        raise ValueError(
            f"predicted and actual differ in shape: {predicted.shape}, {actual.shape}."
        )
    if predicted.shape[1] < 2:
        raise ValueError(f"a correlation needs at least two masks, got {predicted.shape[1]}.")
    return float(_row_correlations(predicted, actual).mean())


def ood_auroc(y_true: ArrayLike, y_score: ArrayLike) -> float:
    """Area under the ROC curve of telling in-distribution rows from others.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        1 for in-distribution rows, 0 for others.
    y_score : array-like of shape (n,)
        Higher means more in-distribution.

    Returns
    -------
    float
        Chance that an in-distribution row scores higher than another, ties counted half.

    Raises
    ------
    ValueError
        If `y_true` holds anything but both of 0 and 1, or a score is not finite.

    Examples
    --------
    >>> from skperf.metrics import ood_auroc
    >>> ood_auroc([1, 1, 0, 0], [0.9, 0.6, 0.7, 0.1])
    0.75
    """
    y_true, y_score = _in_and_out(y_true, y_score)
    return float(roc_auc_score(y_true, y_score))


def fpr_at_95_tpr(y_true: ArrayLike, y_score: ArrayLike) -> float:
    """Share of other rows let in by the threshold that keeps 95 % of in-distribution rows.

    Parameters
    ----------
    y_true : array-like of shape (n,)
        1 for in-distribution rows, 0 for others.
    y_score : array-like of shape (n,)
        Higher means more in-distribution.

    Returns
    -------
    float
        False positive rate at the highest threshold whose true positive rate is at
        least 0.95.

    Raises
    ------
    ValueError
        If `y_true` holds anything but both of 0 and 1, or a score is not finite.

    Examples
    --------
    >>> from skperf.metrics import fpr_at_95_tpr
    >>> fpr_at_95_tpr([1, 1, 0, 0], [0.9, 0.6, 0.7, 0.1])
    0.5
    """
    y_true, y_score = _in_and_out(y_true, y_score)
    false_positive, true_positive, _ = roc_curve(y_true, y_score, drop_intermediate=False)
    return float(false_positive[np.argmax(true_positive >= 0.95)])


def accuracy_under_prior(recall: ArrayLike, prior: ArrayLike) -> float:
    """Accuracy that a fixed rule has where labels follow a given mix.

    Under pure label shift the recall of a fixed rule does not depend on the label mix, so
    recall measured anywhere gives the accuracy everywhere.

    Parameters
    ----------
    recall : array-like of shape (n_classes,)
        Share of each class that the rule gets right.
    prior : array-like of shape (n_classes,)
        Share of each class among the labels.

    Returns
    -------
    float
        The mean recall, weighted by `prior`.

    Raises
    ------
    ValueError
        If lengths differ, a recall is outside [0, 1] or `prior` is no distribution.

    Examples
    --------
    >>> from skperf.metrics import accuracy_under_prior
    >>> round(accuracy_under_prior([1.0, 0.5], [0.2, 0.8]), 6)
    0.6
    """
    recall, prior = _finite(recall, "recall", 1), _finite(prior, "prior", 1)
    if recall.shape != prior.shape:
        raise ValueError(f"recall and prior differ in length: {len(recall)}, {len(prior)}.")
    if (recall < 0).any() or (recall > 1).any():
        raise ValueError(f"recall must lie in [0, 1], got {recall.min()} to {recall.max()}.")
    if (prior < 0).any() or not np.isclose(prior.sum(), 1, atol=1e-6):
        raise ValueError(f"prior must be a distribution, got a sum of {prior.sum():.6g}.")
    return float(recall @ prior)


def atc_accuracy(
    source_scores: ArrayLike, source_correct: ArrayLike, target_scores: ArrayLike
) -> float:
    """Predict accuracy on unlabelled rows by Average Thresholded Confidence.

    A threshold is put where the share of source rows that score above it equals the source
    accuracy; the share of target rows that score higher is the estimate. Of the rows that score
    exactly as high, the share counts that makes the estimate on the source rows exact.

    Parameters
    ----------
    source_scores : array-like of shape (n_source,)
        Confidence in labelled rows, higher means surer; the maximum softmax or negative
        entropy.
    source_correct : array-like of shape (n_source,), bool
        Whether each of those predictions was right.
    target_scores : array-like of shape (n_target,)
        Confidence in the unlabelled rows.

    Returns
    -------
    float
        Estimated accuracy on the target rows.

    Raises
    ------
    ValueError
        If the two source arrays differ in length or a score is not finite.

    References
    ----------
    Garg et al., "Leveraging Unlabeled Data to Predict Out-of-Distribution Performance"
    (arXiv 2201.04234), section 3.

    Examples
    --------
    >>> from skperf.metrics import atc_accuracy
    >>> atc_accuracy([0.2, 0.6, 0.8, 0.9], [False, True, True, True], [0.3, 0.7])
    0.5
    """
    source = _finite(source_scores, "source_scores", 1)
    target = _finite(target_scores, "target_scores", 1)
    correct = np.asarray(source_correct).astype(bool)
    check_consistent_length(source, correct)
    n_correct = int(correct.sum())
    if n_correct == 0:
        return 0.0
    threshold = np.sort(source)[len(source) - n_correct]
    tied = (n_correct - (source > threshold).sum()) / (source == threshold).sum()
    return float((target > threshold).mean() + tied * (target == threshold).mean())


def _finite(values: ArrayLike, name: str, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must have {ndim} dimensions and a value, got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds values that are not finite.")
    return array


def _in_and_out(
    y_true: ArrayLike, y_score: ArrayLike
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    labels, scores = np.asarray(y_true), _finite(y_score, "y_score", 1)
    check_consistent_length(labels, scores)
    if not np.array_equal(np.unique(labels), [0, 1]):
        raise ValueError(
            "y_true must hold both 1 (in-distribution) and 0 (not), and nothing else; got "
            f"{np.unique(labels)[:5].tolist()}."
        )
    return labels.astype(np.int64), scores


def _row_correlations(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    a = a - a.mean(1, keepdims=True)
    b = b - b.mean(1, keepdims=True)
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = (a * b).sum(1)
    found: NDArray[np.float64] = np.divide(
        products, norm, out=np.zeros_like(products), where=norm > 0
    )
    return found
