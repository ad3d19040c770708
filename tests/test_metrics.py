import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import roc_curve

from skperf.metrics import (
    accuracy_under_prior,
    atc_accuracy,
    counterfactual_correlation,
    fpr_at_95_tpr,
    linear_datamodeling_score,
    ood_auroc,
)


def test_linear_datamodeling_score_is_the_mean_spearman_with_minus_the_loss():
    rng = np.random.default_rng(0)
    influence, losses = rng.normal(size=(4, 30)), rng.normal(size=(12, 4))
    subsets = rng.random((12, 30)) < 0.5
    expected = [
        spearmanr([influence[q, kept].sum() for kept in subsets], -losses[:, q]).statistic
        for q in range(4)
    ]
    assert linear_datamodeling_score(influence, subsets, losses) == pytest.approx(np.mean(expected))


def test_linear_datamodeling_score_counts_constant_queries_as_zero():
    subsets = np.eye(3, dtype=bool)
    assert linear_datamodeling_score([[1.0, 2, 3]], subsets, np.ones((3, 1))) == 0


def test_linear_datamodeling_score_refuses_swapped_axes():
    with pytest.raises(ValueError, match="do not fit"):
        linear_datamodeling_score(np.ones((4, 30)), np.ones((12, 30)), np.ones((4, 12)))


def test_counterfactual_correlation_is_the_mean_pearson_over_rows():
    rng = np.random.default_rng(0)
    predicted, actual = rng.normal(size=(5, 20)), rng.normal(size=(5, 20))
    expected = np.mean([np.corrcoef(p, a)[0, 1] for p, a in zip(predicted, actual, strict=True)])
    assert counterfactual_correlation(predicted, actual) == pytest.approx(expected)


def test_counterfactual_correlation_refuses_nan():
    with pytest.raises(ValueError, match="actual holds values that are not finite"):
        counterfactual_correlation([[1.0, 2.0]], [[1.0, np.nan]])


def test_ood_metrics_agree_with_the_definition_on_random_scores():
    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 400), rng.normal(0, 1, 300)
    y_true = np.r_[np.ones(400), np.zeros(300)]
    y_score = np.r_[inside, outside]
    pairs = (inside[:, None] > outside).mean() + 0.5 * (inside[:, None] == outside).mean()
    assert ood_auroc(y_true, y_score) == pytest.approx(pairs)
    threshold = np.sort(inside)[::-1][int(np.ceil(0.95 * 400)) - 1]
    assert fpr_at_95_tpr(y_true, y_score) == pytest.approx((outside >= threshold).mean())
    fpr, tpr, _ = roc_curve(y_true, y_score)
    assert fpr_at_95_tpr(y_true, y_score) == fpr[np.argmax(tpr >= 0.95)]


def test_ood_metrics_need_both_kinds():
    with pytest.raises(ValueError, match="must hold both"):
        ood_auroc([1, 1], [0.1, 0.2])


def test_accuracy_under_prior():
    assert accuracy_under_prior([0.9, 0.1], [0.5, 0.5]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must be a distribution"):
        accuracy_under_prior([0.9, 0.1], [0.5, 0.6])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        accuracy_under_prior([1.9, 0.1], [0.5, 0.5])


def test_atc_returns_the_source_accuracy_on_the_source():
    rng = np.random.default_rng(0)
    scores, correct = rng.random(1000), rng.random(1000) < 0.8
    assert atc_accuracy(scores, correct, scores) == pytest.approx(correct.mean())
    assert atc_accuracy(scores, np.zeros(1000, bool), scores) == 0


def test_rows_as_sure_as_the_threshold_count_by_their_share():
    # 3 of 5 are right, one lies above 2, so that two of the three at 2 are counted
    found = atc_accuracy([3, 2, 2, 2, 1], [True, True, False, True, False], [3, 2, 2, 1, 0])
    assert found == pytest.approx((1 + 2 * 2 / 3) / 5)


def test_the_threshold_may_lie_where_the_curve_goes_straight_on():
    # one of each kind at every score: all points of the curve lie on one line
    y_true, y_score = np.tile([1, 0], 20), np.repeat(np.arange(20), 2)
    assert fpr_at_95_tpr(y_true, y_score) == pytest.approx(0.95)


def test_two_masks_are_enough_for_a_correlation_and_one_is_not():
    assert counterfactual_correlation([[1.0, 2.0]], [[5.0, 9.0]]) == pytest.approx(1)
    with pytest.raises(ValueError, match="needs at least two masks, got 1"):
        counterfactual_correlation([[1.0]], [[1.0]])
