"""Any classifier on rows as they are, honest measurement, and a correction that may be nothing."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from joblib import parallel_backend
from scipy.sparse import coo_matrix
from scipy.special import softmax
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.datasets import make_classification
from sklearn.ensemble import (
    AdaBoostClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    FixedThresholdClassifier,
    TunedThresholdClassifierCV,
    cross_validate,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.semi_supervised import SelfTrainingClassifier
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from skorch import NeuralNetBinaryClassifier
from torch import nn

from skperf import PerformativeAdapter, PerformativeWarning
from skperf.model_selection import RoundForwardSplit
from skperf.performative._inputs import check_rounds
from tests.performative.conftest import K, World, live

QUICK = {"adapter": ["fixed", "tied"], "random_state": 0}
ROUNDS = np.repeat(np.arange(6), 40)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(0)
    y = np.where(rng.random(240) < 0.4, "bad", "ok")
    frame = pd.DataFrame(
        {"amount": rng.normal(size=240) + (y == "bad"), "city": rng.choice(list("abc"), 240)}
    )
    frame.loc[::17, "amount"] = np.nan
    return frame, y


def by_name():
    columns = make_column_transformer((SimpleImputer(), ["amount"]), (OneHotEncoder(), ["city"]))
    return make_pipeline(columns, LogisticRegression())


def forms(frame, y):
    words = np.where(np.asarray(y) == "ok", "nice", "awful")
    texts = [f"{word} {city}" for word, city in zip(words, frame.city, strict=True)]
    numbers = frame[["amount"]].fillna(0.0)
    return {
        "columns by name": (by_name(), frame),
        "categories": (
            HistGradientBoostingClassifier(max_iter=5),
            frame.assign(city=frame.city.astype("category")),
        ),
        "missing": (HistGradientBoostingClassifier(max_iter=5), frame[["amount"]]),
        "sparse": (LogisticRegression(), coo_matrix(numbers.to_numpy())),
        "texts": (make_pipeline(TfidfVectorizer(), LogisticRegression()), texts),
        "array of texts": (
            make_pipeline(TfidfVectorizer(), LogisticRegression()),
            np.array(texts, dtype=object),
        ),
        "bare column of pandas": (
            make_pipeline(TfidfVectorizer(), LogisticRegression()),
            pd.array(texts, dtype="string"),
        ),
    }


@pytest.mark.filterwarnings("ignore:the statistic was the same", "ignore:the correction is")
@pytest.mark.parametrize("frozen", [False, True], ids=["inside", "frozen"])
@pytest.mark.parametrize("form", list(forms(pd.DataFrame({"city": [], "amount": []}), [])))
def test_rows_reach_the_classifier_as_they_are(table, form, frozen):
    frame, y = table
    estimator, X = forms(frame, y)[form]
    if frozen:
        estimator = FrozenEstimator(estimator.fit(X, y))
    adapter = PerformativeAdapter(estimator, strength=0.0, calibration="none", **QUICK)
    adapter.fit(X, y, rounds=ROUNDS)
    assert adapter.n_rounds_ == 6
    own = adapter.estimator_
    np.testing.assert_array_equal(adapter.predict(X), own.predict(X))
    np.testing.assert_allclose(adapter.predict_proba(X), own.predict_proba(X), atol=1e-9)


def test_the_estimators_own_rule_holds_where_nothing_is_corrected(world):
    X, y = world.draw(400)
    rule = FixedThresholdClassifier(LogisticRegression(), threshold=0.1).fit(X, y % 2)
    adapter = PerformativeAdapter(FrozenEstimator(rule)).fit(X, y % 2)
    assert adapter.fallback_
    assert (rule.predict(X) != rule.predict_proba(X).argmax(axis=1)).any()
    np.testing.assert_array_equal(adapter.predict(X), rule.predict(X))


def test_a_temperature_leaves_predictions_to_the_classifier(world):
    X, y = world.draw(400)
    rule = FixedThresholdClassifier(LogisticRegression(), threshold=0.1).fit(X, y % 2)
    adapter = PerformativeAdapter(
        FrozenEstimator(rule), strength=0.0, calibration="temperature", **QUICK
    ).fit(X, y % 2, rounds=np.repeat(np.arange(4), 100))
    assert adapter.calibrator_ is not None
    assert not adapter.fallback_
    assert np.abs(adapter.predict_proba(X) - rule.predict_proba(X)).max() > 1e-4
    np.testing.assert_array_equal(adapter.predict(X), rule.predict(X))
    record = adapter.prequential_
    np.testing.assert_array_equal(record.accuracy, record.accuracy_none)


@pytest.mark.parametrize("n_classes", [3, 4])
def test_scores_of_pairs_are_refused(world, n_classes):
    X, y = world.draw(400)
    kept = y < n_classes
    svc = SVC(decision_function_shape="ovo").fit(X[kept], y[kept])
    with pytest.raises(ValueError, match="one-vs-one scores are of pairs of classes"):
        PerformativeAdapter(FrozenEstimator(svc)).fit(X[kept], y[kept])


class _Shaped(LinearSVC):
    """Scores of another shape or order than one a row and class."""

    how = staticmethod(lambda scores: scores)

    def decision_function(self, X):
        return self.how(super().decision_function(X))

    def predict(self, X):
        return self.classes_[super().decision_function(X).argmax(axis=1)]


class _Permuted(_Shaped):
    def predict_proba(self, X):
        return softmax(super().decision_function(X), axis=1)[:, ::-1]


@pytest.mark.parametrize(
    "how",
    [lambda s: s[:, :, None], lambda s: s[:, 0], lambda s: s[:-1], lambda s: s.T],
    ids=["more dimensions", "fewer", "fewer rows", "transposed"],
)
def test_scores_of_another_shape_are_refused_by_name(world, how):
    X, y = world.draw(200)
    model = _Shaped().fit(X, y)
    model.how = how
    with pytest.raises(ValueError, match=r"_Shaped gives scores of shape .* 200 rows"):
        PerformativeAdapter(FrozenEstimator(model)).fit(X, y, rounds=0)


def test_probabilities_in_an_order_of_their_own_are_warned_of(world):
    X, y = world.draw(200)
    adapter = PerformativeAdapter(FrozenEstimator(_Permuted().fit(X, y)))
    with pytest.warns(PerformativeWarning, match="in the order of classes_"):
        adapter.fit(X, y)


def test_an_estimator_fitted_inside_is_measured_on_rows_it_did_not_see(world):
    forest = RandomForestClassifier(20, min_samples_leaf=1, random_state=0)
    adapter = PerformativeAdapter(forest, calibration="none", **QUICK)
    live(adapter, World(), 4)
    # on its own rows a forest is nearly perfect
    assert adapter.prequential_.accuracy_none[0] < 0.95
    assert adapter.prequential_.none[0] > 0.3


@pytest.mark.parametrize(("weighting", "expected"), [(None, 0.9), ("balanced", 0.5)])
def test_the_mix_a_fitted_classifier_is_right_for(world, weighting, expected):
    rng = np.random.default_rng(0)
    y = (rng.random(3000) < 0.1).astype(int)
    X = rng.normal(size=(3000, 2)) + 1.3 * y[:, None]
    inside = PerformativeAdapter(LogisticRegression(class_weight=weighting)).fit(X, y)
    assert inside.base_prior_[0] == pytest.approx(expected, abs=0.03)
    if weighting is None:
        np.testing.assert_allclose(inside.base_prior_, np.bincount(y) / 3000)


def test_timid_scores_keep_their_accuracy():
    """AdaBoost's probabilities hardly differ from equal shares: a correction would drown them."""
    world = World(seed=3, temperature=0.3)
    X, y = world.draw(400)
    ada = AdaBoostClassifier(random_state=0).fit(X, y)
    adapter = PerformativeAdapter(FrozenEstimator(ada), **QUICK)
    live(adapter, World(seed=4, temperature=0.3), 20)
    record = adapter.prequential_
    assert record.accuracy[3:].mean() > record.accuracy_none[3:].mean() - 0.005
    assert record.adapter[3:].mean() < record.none[3:].mean()
    assert adapter.calibrator_.temperature < 0.9


@pytest.mark.parametrize("seed", [0, 1])
def test_a_correction_that_hurts_is_withdrawn_and_says_so(frozen, seed):
    """Mixes answer the model until round 20; then the least expected class fills every round."""
    adapter, world = PerformativeAdapter(frozen, **QUICK), World(seed)
    live(adapter, world, 20)
    assert adapter.strength_ > 0

    def mislead():
        for number in range(20, 30):
            mix = np.full(K, 0.03)
            mix[adapter.predict_prior().argmin()] = 0.91
            adapter.partial_fit(*world.draw(400, prior=mix), rounds=number)

    with pytest.warns(PerformativeWarning, match="the correction is withdrawn after round"):
        mislead()
    record, late = adapter.prequential_, slice(24, None)
    assert record.adapter[late].mean() < record.none[late].mean() + 0.1


def test_certain_scores_do_not_bend_the_base_mix(world):
    """A full tree is sure of everything: its scores deny any base mix, a temperature does not."""
    X, y = world.draw(1500, prior=[0.7, 0.1, 0.1, 0.1])
    tree = DecisionTreeClassifier(random_state=0)
    inside = PerformativeAdapter(tree, **QUICK).partial_fit(X, y, rounds=0)
    assert inside.base_prior_.argmax() == 0
    assert inside.base_prior_.min() > 0.05
    frozen = PerformativeAdapter(FrozenEstimator(tree.fit(X, y)), **QUICK)
    frozen.partial_fit(*world.draw(3000), rounds=0)
    assert frozen.base_prior_.argmax() == 0
    assert frozen.base_prior_.min() > 0.02


# ---- rounds without labels, labels that come late


def test_labels_that_come_one_round_late(frozen):
    in_time, late, world = (
        PerformativeAdapter(frozen, **QUICK),
        PerformativeAdapter(frozen, **QUICK),
        World(),
    )
    statistic, waiting = None, None
    for number in range(15):
        X, y = world.next_round(statistic, size=600)
        statistic = in_time.partial_fit(X, y, rounds=number).statistic_
        if waiting is not None:
            late.partial_fit(*waiting, rounds=number - 1)
        late.partial_fit(X, y if number == 0 else None, rounds=number)
        waiting = None if number == 0 else (X, y)
        if number:
            assert np.isnan(late.prequential_.adapter[-1])
            # measured on rows remembered from earlier rounds, as recall does not depend on mixes
            assert np.isfinite(late.statistic_).all()
    assert late.n_rounds_ == 15
    np.testing.assert_array_equal(late.trajectory_.counts[:-1], in_time.trajectory_.counts[:-1])
    before = slice(5, 14)
    losses, known = late.prequential_, in_time.prequential_
    assert losses.adapter[before].mean() < known.adapter[before].mean() + 0.05
    assert losses.adapter[before].mean() < losses.none[before].mean() - 0.1
    late.partial_fit(*waiting, rounds=14)
    with pytest.raises(ValueError, match="has all its labels"):
        late.partial_fit(*waiting, rounds=14)


@pytest.mark.parametrize("statistic", ["recall", "confusion"])
def test_labels_told_bit_by_bit_give_the_statistic_of_all(world, frozen, statistic):
    X, y = world.draw(200)
    X, y = X[(y < 2) | (np.arange(200) < 150)], y[(y < 2) | (np.arange(200) < 150)]
    deployed = np.random.default_rng(0).permutation(y)  # any predictions that went out
    at_once, bits = (PerformativeAdapter(frozen, statistic=statistic, **QUICK) for _ in range(2))
    at_once.partial_fit(X, y, rounds=0, deployed_pred=deployed)
    first = np.where(np.arange(len(y)) < 60, y, np.nan)
    bits.partial_fit(X, first, rounds=0, deployed_pred=deployed)
    for part in (slice(60, 110), slice(110, None)):
        bits.partial_fit(X[part], y[part], rounds=0, deployed_pred=deployed[part])
    for name in ("statistics", "counts", "confusions", "unlabelled"):
        found, expected = (getattr(one.trajectory_, name) for one in (bits, at_once))
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=name)


def test_rows_after_a_record_without_rows_tell_the_base_mix(lived):
    adapter, _ = lived
    skewed = LogisticRegression().fit(*World(seed=8).draw(3000, prior=[0.7, 0.1, 0.1, 0.1]))
    record = adapter.trajectory_
    again = PerformativeAdapter(FrozenEstimator(skewed), **QUICK)
    again.fit_trajectory(record.statistics, record.counts)
    np.testing.assert_allclose(again.base_prior_, 1 / K)
    again.partial_fit(*World(seed=9).draw(2000, prior=np.full(K, 1 / K)))
    assert again.base_prior_[0] == pytest.approx(0.7, abs=0.08)


def test_a_new_base_mix_does_not_upset_the_calibration():
    """Wild scores are calibrated with biases relative to a base mix, which later rows correct."""
    world = World(seed=2)
    X, y = world.draw(60)
    wild = torch.nn.Linear(3, K).double()
    model = LogisticRegression(C=1e4).fit(X, y)
    with torch.no_grad():
        wild.weight.copy_(8 * torch.tensor(model.coef_))
        wild.bias.copy_(8 * torch.tensor(model.intercept_) + torch.tensor([4.0, 0, 0, -4.0]))
    adapter = PerformativeAdapter(wild, **QUICK)
    live(adapter, world, 20, size=300)
    record = adapter.prequential_
    assert adapter.calibrator_ is not None
    assert (record.accuracy[4:] > record.accuracy_none[4:] - 0.2).all()  # no round is lost
    assert record.accuracy[4:].mean() > record.accuracy_none[4:].mean()


def test_labels_may_trickle_in(frozen, world):
    X, y = world.draw(400)
    adapter = PerformativeAdapter(frozen, **QUICK).partial_fit(X, y, rounds=0)
    some = np.where(np.arange(400) % 2, y.astype(object), None)
    adapter.partial_fit(X, some, rounds=1)
    assert adapter.trajectory_.unlabelled.tolist() == [0, 200]
    adapter.partial_fit(X[::2][:100], y[::2][:100], rounds=1)
    adapter.partial_fit(X[::2][100:], y[::2][100:], rounds=1)
    assert adapter.trajectory_.unlabelled.tolist() == [0, 0]
    np.testing.assert_allclose(adapter.trajectory_.counts[1], np.bincount(y, minlength=K))


def test_the_statistic_of_what_is_deployed_now(frozen, lived):
    adapter, (X, y, _) = lived
    scores = np.log(adapter.predict_proba(X))
    expected = adapter.record_.measured(y, scores.argmax(axis=1), scores)
    np.testing.assert_allclose(adapter.deployed_statistic(X, y), expected)
    base = adapter.deployed_statistic(X, y, prior=adapter.base_prior_)
    np.testing.assert_allclose(base, adapter.statistic_of(frozen, X, y))


# ---- another classifier, a known mix, a batch


def test_another_classifier_goes_on_with_the_record(lived, classifier):
    _, (X, y, rounds) = lived
    adapter = PerformativeAdapter(FrozenEstimator(classifier), **QUICK).fit(X, y, rounds=rounds)
    prior = adapter.predict_prior()
    skewed = World(seed=8).draw(3000, prior=[0.7, 0.1, 0.1, 0.1])
    other = LogisticRegression(C=0.1).fit(*skewed)
    held = World(seed=9).draw(2000, prior=np.full(K, 1 / K))
    adapter.replace_estimator(FrozenEstimator(other), *held)
    np.testing.assert_allclose(adapter.predict_prior(), prior, atol=0.1)
    assert adapter.n_rounds_ == 12
    assert adapter.base_prior_[0] == pytest.approx(0.7, abs=0.08)
    assert np.isnan(adapter.trajectory_.hits).all()
    X, y = World(seed=10).draw(2000, prior=adapter.predicted_prior_)
    assert adapter.score(X, y) > other.score(X, y)
    adapter.partial_fit(X, y)
    assert adapter.n_rounds_ == 13
    with pytest.raises(ValueError, match="give X and y"):
        adapter.replace_estimator(LogisticRegression())


def test_the_mix_that_a_balanced_successor_is_right_for(lived, world):
    adapter = copy.deepcopy(lived[0])
    X, y = world.draw(1500, prior=[0.82, 0.06, 0.06, 0.06])
    adapter.replace_estimator(LogisticRegression(class_weight="balanced"), X, y)
    np.testing.assert_allclose(adapter.base_prior_, 0.25, atol=0.06)
    adapter.replace_estimator(LogisticRegression(), X, y)
    np.testing.assert_allclose(adapter.base_prior_, np.bincount(y) / 1500)


def test_a_mix_that_is_known(frozen, lived):
    adapter, (X, _, _) = lived
    mix = np.array([0.1, 0.2, 0.3, 0.4])
    logits = frozen.decision_function(X)
    expected = softmax(logits + np.log(mix) - np.log(adapter.base_prior_), axis=1)
    np.testing.assert_allclose(adapter.correct(X, mix), expected, atol=1e-9)
    by_label = dict(zip(range(K), mix, strict=True))
    np.testing.assert_allclose(adapter.correct(X, by_label), expected, atol=1e-9)
    for wrong, message in (
        ([0.5, 0.5], "4 classes"),
        ({9: 1.0}, "not known"),
        ([-1, 1, 1, 1], "none negative"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.correct(X, wrong)


def test_the_mix_of_a_batch_and_where_it_lies(lived):
    adapter, _ = lived
    held = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        X, y = World(seed=100 + seed).draw(400, prior=rng.dirichlet(np.full(K, 5.0)))
        prior, (low, high) = adapter.estimate_prior(X, return_interval=True)
        shares = np.bincount(y, minlength=K) / 400
        held.append((low <= shares) & (shares <= high))
        np.testing.assert_allclose(prior.sum(), 1.0)
        assert np.abs(prior - shares).max() < 0.15
    assert np.mean(held) > 0.8


def test_a_report_to_read(lived):
    import matplotlib.pyplot as plt

    adapter, (_, y, rounds) = lived
    report = adapter.report()
    text = str(report)
    assert "round 11: mix" in text
    assert "the mix answers the deployed model" in text
    shares = np.bincount(y[rounds == 11], minlength=K) / 400
    np.testing.assert_allclose([row["last"] for row in report.mix], shares)
    np.testing.assert_allclose([row["anticipated"] for row in report.mix], adapter.predicted_prior_)
    assert report.plot().get_title().startswith("label mix about round 11")
    plt.close("all")


def test_a_classifier_of_other_classes_takes_nobodys_place(frozen, world):
    X, y = world.draw(90)
    adapter = PerformativeAdapter(frozen, **QUICK).partial_fit(X, y)
    other = FrozenEstimator(LogisticRegression().fit(X, y + 1))
    for call in (adapter.replace_estimator, lambda one, X, y: adapter.rank_models([one], X, y)):
        with pytest.raises(ValueError, match=r"not on record: \[4\]"):
            call(other, X, y)
    with pytest.raises(ValueError, match="rows without a label"):
        adapter.replace_estimator(frozen, X, np.where(y == 1, np.nan, y))
    assert adapter.estimator_ is frozen


def test_a_round_gets_each_label_once(frozen, world):
    X, y = world.draw(90)
    adapter = PerformativeAdapter(frozen, **QUICK).partial_fit(X, y, rounds=0)
    some = np.where(np.arange(90) < 30, y.astype(object), None)
    adapter.partial_fit(X, some, rounds=1)
    with pytest.raises(ValueError, match="round 1 waits for 60 labels, but 90 came"):
        adapter.partial_fit(X, y, rounds=1)
    with pytest.raises(ValueError, match="sample_weight is 0 for all rows"):
        adapter.partial_fit(X[30:], y[30:], rounds=1, sample_weight=np.zeros(60))
    adapter.partial_fit(X[30:], y[30:], rounds=1)
    np.testing.assert_array_equal(adapter.trajectory_.counts[1], np.bincount(y, minlength=K))


@pytest.mark.parametrize("missing", [None, np.nan, pd.NA], ids=repr)
@pytest.mark.parametrize("dtype", [object, "string", "category"])
def test_labels_missing_in_any_form(frozen, world, dtype, missing):
    X, y = world.draw(90)
    some = pd.Series([missing if i % 3 else f"c{label}" for i, label in enumerate(y)], dtype=dtype)
    adapter = PerformativeAdapter(LogisticRegression(), **QUICK)
    adapter.fit(X, some, rounds=np.arange(90) // 30)
    assert adapter.trajectory_.counts.sum() == 30
    assert adapter.trajectory_.unlabelled.tolist() == [20, 20, 20]


def test_a_rule_of_its_own_is_kept_in_order_and_for_late_labels(world):
    X, y = world.draw(600, prior=[0.6, 0.4, 0, 0])
    own = FixedThresholdClassifier(LogisticRegression(), threshold=0.1).fit(X, y)
    adapter = PerformativeAdapter(FrozenEstimator(own), strength=0.0, calibration="none", **QUICK)
    adapter.fit(X, y, rounds=np.arange(600) // 100)
    recall = [np.mean(own.predict(X[y == c]) == c) for c in (0, 1)]
    assert adapter.fallback_
    assert adapter.score(X, y, rounds=np.arange(600) // 100) == own.score(X, y)
    found = adapter.deployed_statistic(X, y)
    np.testing.assert_allclose(found, recall, atol=0.01)  # shrunk by two rows
    adapter.partial_fit(X, None, rounds=6).partial_fit(X, y, rounds=6)
    np.testing.assert_allclose(adapter.statistic_, found)


def test_a_batch_that_denies_what_was_anticipated_is_believed(frozen, world):
    usual, changed = np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.05, 0.05, 0.1, 0.8])
    adapter = PerformativeAdapter(frozen, transductive="map_em", **QUICK)
    for number in range(12):
        adapter.partial_fit(*world.draw(400, prior=usual), rounds=number)
    before = adapter.predicted_prior_
    as_ever = adapter.estimate_prior(world.draw(1000, prior=usual)[0])
    X, y = world.draw(1000, prior=changed)
    assert np.abs(as_ever - before).sum() < 0.15
    assert np.abs(before - changed).sum() > 1.3
    assert np.abs(adapter.estimate_prior(X) - np.bincount(y) / len(y)).sum() < 0.2
    np.testing.assert_allclose(
        adapter.predict_proba(X), adapter.correct(X, adapter.estimate_prior(X)), atol=1e-6
    )
    sure = PerformativeAdapter(frozen, transductive="map_em", prior_strength=1e7, **QUICK)
    sure.fit(X, y, rounds=np.arange(1000) // 100)
    stuck = sure.estimate_prior(world.draw(1000, prior=usual)[0])
    assert np.abs(stuck - sure.predicted_prior_).sum() < 0.01


# ---- covariates, strata, options


@pytest.mark.filterwarnings("ignore:the correction is withdrawn")
def test_a_calendar_is_read(frozen):
    """Mixes follow a calendar with no order that lags could tell."""
    rng = np.random.default_rng(0)
    world = World()
    days = rng.integers(3, size=40)
    mixes = np.array([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], [0.25, 0.25, 0.25, 0.25]])
    calendar = np.eye(3)[days]
    adapter = PerformativeAdapter(frozen, adapter=["fixed", "linear"], random_state=0)
    for number, day in enumerate(days):
        X, y = world.draw(400, prior=mixes[day])
        adapter.partial_fit(X, y, rounds=number, covariates=calendar[number])
    record = adapter.prequential_
    assert record.adapter[15:].mean() < record.oracle[15:].mean() + 0.05
    assert record.none[15:].mean() > record.oracle[15:].mean() + 0.1
    for day in range(3):
        found = adapter.predict_prior(covariates=np.eye(3)[day])
        np.testing.assert_allclose(found, mixes[day], atol=0.08)
    with pytest.raises(ValueError, match="every round needs them"):
        adapter.partial_fit(X, y)
    with pytest.raises(ValueError, match="of 3 columns"):
        adapter.partial_fit(X, y, covariates=[1.0])
    with pytest.raises(ValueError, match="covariates must be numbers"):
        adapter.partial_fit(X, y, covariates=[[pd.Timestamp("2024-01-01")] * 3])


def test_rounds_named_by_numbers_that_do_not_sort_are_refused():
    numbers = np.arange(12)
    named = np.array([f"r{number:02d}" for number in numbers])
    for good in (named, np.array(["b", "aa", "2024-01-10", "2024-01-09"] * 3)):
        np.testing.assert_array_equal(check_rounds(good, 12), good)
    with pytest.raises(ValueError, match="order is not that of their numbers"):
        check_rounds(np.array([f"r{number}" for number in numbers]), 12)


_NOT_SORTED = [
    ["Jan", "Feb", "Mar"],
    ["2024 October", "2024 November", "2024 December"],
    ["Mon", "Tue", "Wed"],
    ["Q4 2024", "Q1 2025", "Q2 2025"],
    ["31/12/2024", "01/01/2025", "02/01/2025"],
    ["01/02/2024", "02/02/2024", "03/02/2024"],
]


@pytest.mark.parametrize("names", _NOT_SORTED, ids=" ".join)
def test_rounds_whose_names_do_not_sort_by_time_are_refused(frozen, world, names):
    X, y = world.draw(90)
    rounds = np.repeat(names, 30)
    with pytest.raises(ValueError, match="order is not that of their numbers or of time"):
        PerformativeAdapter(frozen).fit(X, y, rounds=rounds)
    with pytest.raises(ValueError, match="order is not that of their numbers or of time"):
        next(RoundForwardSplit(1).split(X, groups=rounds))


@pytest.mark.parametrize(
    "names",
    [["2024-Q4", "2025-Q1"], ["w 09", "w 10"], ["2024-12-31", "2025-01-01"], ["may", "q"]],
    ids=" ".join,
)
def test_rounds_whose_names_sort_by_time(frozen, world, names):
    X, y = world.draw(60)
    adapter = PerformativeAdapter(frozen, **QUICK, min_rounds=1)
    assert adapter.fit(X, y, rounds=np.repeat(names, 30)).trajectory_.rounds.tolist() == names


@pytest.mark.parametrize("name", ["deployed_pred", "strata"])
@pytest.mark.parametrize("missing", [np.nan, None])
def test_what_is_told_by_row_is_told_of_every_row(frozen, world, name, missing):
    X, y = world.draw(40)
    told = y.astype(object)
    told[7] = missing
    with pytest.raises(ValueError, match=f"{name} has a missing value in row 7"):
        PerformativeAdapter(frozen).fit(X, y, rounds=0, **{name: told})
    proba = np.full((40, K), 1 / K)
    proba[3, 1] = np.nan
    with pytest.raises(ValueError, match="deployed_pred has a missing value in row 3"):
        PerformativeAdapter(frozen).fit(X, y, rounds=0, deployed_pred=proba)


def test_a_statistic_does_not_depend_on_the_scale_of_weights(lived, world):
    adapter, classifier = lived[0], lived[0].estimator_
    X, y = world.draw(60)
    w = np.random.default_rng(0).uniform(0.1, 3, 60)
    found = adapter.statistic_of(classifier, X, y, w)
    w = w * w.sum() / (w @ w)  # worth that many rows
    right = classifier.predict(X) == y
    hits, rows = np.bincount(y, w * right, K), np.bincount(y, w, K)
    np.testing.assert_allclose(found, (hits + 2 * hits.sum() / rows.sum()) / (rows + 2))
    np.testing.assert_allclose(adapter.statistic_of(classifier, X, y, 100 * w), found)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_search_that_forgot_the_rounds_warns(n_jobs):
    rng = np.random.default_rng(0)
    X, y, rounds = rng.normal(size=(400, 3)), np.arange(400) % 3, np.arange(400) // 40
    adapter = PerformativeAdapter(LogisticRegression(), adapter="fixed", random_state=0)
    options = {"cv": RoundForwardSplit(7), "groups": rounds, "error_score": "raise"}
    # in a worker the warning is an error, as everywhere in these tests
    with parallel_backend("threading", n_jobs=n_jobs), warnings.catch_warnings():
        warnings.simplefilter("error", PerformativeWarning)
        with pytest.raises(PerformativeWarning, match="without rounds: nothing is corrected"):
            cross_validate(adapter, X, y, n_jobs=n_jobs, **options)


@pytest.mark.filterwarnings("ignore:the correction is withdrawn")
@pytest.mark.parametrize(("statistic", "width"), [("stratum", 2), ("class_stratum", 2 * K)])
def test_statistics_by_stratum(frozen, lived, statistic, width):
    _, (X, y, rounds) = lived
    strata = np.where(X[:, 0] > 0, "north", "south")
    adapter = PerformativeAdapter(
        frozen, statistic=statistic, adapter=["fixed", "linear"], random_state=0
    )
    adapter.fit(X, y, rounds=rounds, strata=strata)
    assert adapter.statistic_.shape == (width,)
    assert adapter.statistic_of(frozen, X, y, strata=strata).shape == (width,)
    rest = adapter.stable_point(X, y, max_iter=20, strata=strata)
    assert rest.statistic.shape == (width,)
    assert adapter.replay(X, y, rounds=rounds, strata=strata).shape == (len(y), K)
    with pytest.warns(PerformativeWarning, match="no evidence"):
        adapter.rank_models([frozen], X, y, n_bootstrap=0, strata=strata)
    asked = (
        lambda: adapter.stable_point(X, y),
        lambda: adapter.replay(X, y, rounds=rounds),
        lambda: adapter.partial_fit(X, y),
    )
    for call in asked:
        with pytest.raises(ValueError, match="needs strata"):
            call()
    with pytest.raises(ValueError, match="needs strata"):
        PerformativeAdapter(frozen, statistic=statistic).fit(X, y, rounds=rounds)


def test_settings_are_those_of_the_fit(lived, frozen):
    _, (X, y, rounds) = lived
    adapter = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=rounds)
    before = adapter.predict_proba(X)
    adapter.set_params(transductive="em", statistic="confusion", l2=9.0, worst_recall_floor=0.9)
    np.testing.assert_array_equal(adapter.predict_proba(X), before)
    with pytest.raises(ValueError, match=r"(statistic|l2).*changed since the first call"):
        adapter.partial_fit(X, y)
    adapter.set_params(transductive=None, statistic="recall", l2=1.0, worst_recall_floor=None)
    adapter.set_params(verbose=0).partial_fit(X[:50], y[:50])


@pytest.mark.parametrize(
    "make",
    [
        lambda n: np.datetime64("2024-01-01") + 30 * n.astype("timedelta64[D]"),
        lambda n: pd.period_range("2024-01", periods=6, freq="M")[n],
        lambda n: np.array([f"2024-{i + 1:02d}" for i in n]),
        lambda n: 202409 + n + 88 * (n > 3),
        lambda n: pd.Series(n, dtype="Int64"),
        lambda n: pd.Categorical.from_codes(n, categories=list("zyxwvutsrqpo"), ordered=True),
    ],
    ids=["dates", "periods", "names", "months", "nullable", "ordered"],
)
def test_rounds_of_any_kind_that_has_an_order(frozen, world, make):
    X, y = world.draw(240)
    plain = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=ROUNDS)
    adapter = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=make(ROUNDS))
    np.testing.assert_array_equal(adapter.trajectory_.counts, plain.trajectory_.counts)
    np.testing.assert_allclose(adapter.predicted_prior_, plain.predicted_prior_)
    again = type(adapter.trajectory_).from_dict(adapter.trajectory_.to_dict())
    np.testing.assert_array_equal(again.rounds, adapter.trajectory_.rounds)


def test_rows_of_weight_zero_are_no_rows(world):
    X, y = world.draw(240)
    weight = (np.random.default_rng(1).random(240) < 0.7).astype(float)
    kept = weight > 0
    adapter = PerformativeAdapter(LogisticRegression(), **QUICK)
    with_zeros = clone(adapter).fit(X, y, rounds=ROUNDS, sample_weight=weight)
    dropped = clone(adapter).fit(X[kept], y[kept], rounds=ROUNDS[kept], sample_weight=weight[kept])
    np.testing.assert_array_equal(with_zeros.predicted_prior_, dropped.predicted_prior_)
    np.testing.assert_array_equal(with_zeros.predict_proba(X), dropped.predict_proba(X))
    with pytest.raises(ValueError, match="all rows of round 3 have weight 0"):
        clone(adapter).fit(X, y, rounds=ROUNDS, sample_weight=(ROUNDS != 3).astype(float))


def test_a_batch_unlike_what_was_anticipated_lies_in_its_interval(classifier, frozen):
    adapter, world, statistic = PerformativeAdapter(frozen, **QUICK), World(), None
    for number in range(12):
        X, y = world.next_round(statistic)
        statistic = adapter.partial_fit(X, y, rounds=number).statistic_
    rng, held = np.random.default_rng(0), []
    for _ in range(60):
        X, y = world.draw(100, prior=rng.dirichlet(np.full(K, 4.0)))
        found, (low, high) = adapter.estimate_prior(X, return_interval=True)
        shares = np.bincount(y, minlength=K) / 100
        held.append(np.mean((low <= shares) & (shares <= high)))
        assert (low <= found).all()
        assert (found <= high).all()
    assert 0.85 < np.mean(held) < 0.99


def test_a_known_mix_without_a_class_never_predicts_it_and_is_read_by_label(classifier, frozen):
    X, y = World().draw(300)
    adapter = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=np.repeat([0, 1, 2], 100))
    labels = adapter.classes_
    prior = np.r_[0.0, np.full(K - 1, 1 / (K - 1))]
    found = adapter.correct(X, prior)
    scores = np.log(classifier.predict_proba(X)[:, 1:]) - np.log(adapter.base_prior_[1:])
    if adapter.calibrator_ is None:
        np.testing.assert_allclose(found[:, 1:], softmax(scores, axis=1), atol=1e-6)
    assert found[:, 0].max() < 1e-200
    turned = pd.Series(prior[::-1], index=labels[::-1])
    np.testing.assert_array_equal(adapter.correct(X, turned), found)


@pytest.mark.parametrize("seed", [0, 2, 9])
def test_a_correction_that_costs_accuracy_is_withheld(seed):
    """Classes move towards the one that is served best: no mix answers, but fifteen neighbours
    look as if one did."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(K, 5)) * 1.3
    y = rng.integers(K, size=1500)
    model = KNeighborsClassifier(15).fit(means[y] + rng.normal(size=(1500, 5)), y)
    adapter, moved = PerformativeAdapter(FrozenEstimator(model), **QUICK), np.zeros((K, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(30):
            y = rng.integers(K, size=500)
            X = (means + moved)[y] + rng.normal(size=(500, 5))
            served = adapter.partial_fit(X, y, rounds=number).statistic_.argmax()
            moved = 0.8 * moved + 0.1 * (means[served] - means)
    record = adapter.prequential_
    assert record.accuracy[4:].mean() > record.accuracy_none[4:].mean() - 0.005
    assert record.adapter[4:].mean() < record.none[4:].mean()


@pytest.mark.filterwarnings("ignore:no rows of the classes")
@pytest.mark.parametrize("calibration", ["temperature", "bcts"])
@pytest.mark.parametrize("classifier", [KNeighborsClassifier(15), DecisionTreeClassifier()])
def test_rows_tell_nothing_of_a_class_that_the_first_round_lacked(world, classifier, calibration):
    adapter = PerformativeAdapter(classifier, calibration=calibration, **QUICK)
    for number, shares in enumerate([[0.4, 0.3, 0.3, 0.0], [0.3, 0.3, 0.2, 0.2]]):
        X, y = world.draw(400, shares)
        adapter.partial_fit(X, y, rounds=number, classes=np.arange(K))
    assert adapter.calibrator_.temperature != 1.0
    share = adapter.correct(X, adapter.base_prior_)[:, 3]
    np.testing.assert_allclose(share, share[0], rtol=1e-9)


@pytest.mark.parametrize("kind", ["fixed", "tuned", "skorch"])
def test_a_threshold_of_the_classifier_is_set_around_the_adapter(kind):
    X, y = make_classification(1200, 6, weights=[0.85], random_state=0)
    X = X.astype("f4")
    if kind == "skorch":
        net = NeuralNetBinaryClassifier(nn.Linear(6, 1), threshold=0.2, train_split=None, verbose=0)
        own = net.fit(X[:300], y[:300].astype("f4"))
    elif kind == "fixed":
        own = FixedThresholdClassifier(LogisticRegression(), threshold=0.2)
    else:
        own = TunedThresholdClassifierCV(LogisticRegression(), scoring="balanced_accuracy")
    own = own if kind == "skorch" else own.fit(X[:300], y[:300])
    cut = own.best_threshold_ if kind == "tuned" else 0.2
    rows = np.arange(300, 900)
    asked = PerformativeAdapter(FrozenEstimator(own), strength=1.0, **QUICK)
    with pytest.warns(PerformativeWarning, match=rf"at its own threshold, {cut:.3g}.*FixedThresh"):
        adapter = asked.fit(X[rows], y[rows], rounds=rows // 100)
    around = FixedThresholdClassifier(FrozenEstimator(adapter), threshold=cut).fit(X[:9], y[:9])
    likely = adapter.predict_proba(X[900:])[:, 1] >= cut
    np.testing.assert_array_equal(around.predict(X[900:]), likely.astype(int))


@pytest.mark.parametrize("form", ["in order", "in another order", "column of labels"])
def test_logged_predictions_are_read_by_their_labels(world, form):
    labels, told, by_label = np.array(list("dbac")), [], []
    for _ in range(3):
        X, y = world.draw(200)
        proba = pd.DataFrame(world.rng.dirichlet(np.ones(K), 200), columns=sorted(labels))
        told.append((X, labels[y], proba.columns.to_numpy()[proba.to_numpy().argmax(axis=1)]))
        by_label.append(proba)
    plain, other = (PerformativeAdapter(LogisticRegression(), **QUICK) for _ in range(2))
    for number, ((X, y, sent), proba) in enumerate(zip(told, by_label, strict=True)):
        plain.partial_fit(X, y, rounds=number, deployed_pred=sent)
        proba = proba[list(labels)] if form == "in another order" else proba
        proba = sent[:, None] if form == "column of labels" else proba
        other.partial_fit(X, y, rounds=number, deployed_pred=proba)
    np.testing.assert_array_equal(other.trajectory_.statistics, plain.trajectory_.statistics)


def test_a_calibration_that_is_asked_for_stays_where_nothing_is_corrected(world):
    """The frozen tree lacks a class, whose correction costs accuracy."""
    X, y = world.draw(300, prior=[0.4, 0.3, 0.3, 0.0])
    forest = RandomForestClassifier(20, random_state=0)
    adapter = PerformativeAdapter(forest, calibration="bcts", base_prior="uniform", **QUICK)
    adapter.partial_fit(X, y, rounds=0, classes=range(K))
    for number in range(1, 9):
        adapter.partial_fit(*world.draw(200, world.rng.dirichlet(np.ones(K))), rounds=number)
    assert adapter.calibrator_ is not None


@pytest.mark.filterwarnings("ignore:y contains no unlabeled")
def test_labels_that_are_objects_stay_so(world):
    """Self-training refuses strings of a fixed width, and says to give objects."""
    X, y = world.draw(300)
    names = np.array(list("abcd"), dtype=object)
    classifier = SelfTrainingClassifier(LogisticRegression())
    adapter = PerformativeAdapter(classifier, **QUICK).partial_fit(X, names[y], rounds=0)
    assert adapter.classes_.tolist() == list("abcd")
    assert set(adapter.predict(X)) <= set("abcd")


def test_groups_in_a_column_are_groups_and_several_columns_are_refused(world):
    (X, y), groups = world.draw(300), np.array(["north", "south", "west"] * 100)
    rounds, plain = np.repeat(range(3), 100), {"statistic": "stratum", **QUICK}
    expected = PerformativeAdapter(LogisticRegression(), **plain)
    expected.fit(X, y, rounds=rounds, strata=groups)
    for column in (groups[:, None], pd.DataFrame({"region": groups})):
        adapter = PerformativeAdapter(LogisticRegression(), **plain)
        adapter.fit(X, y, rounds=rounds, strata=column)
        np.testing.assert_array_equal(adapter.statistic_, expected.statistic_)
    two = pd.DataFrame({"region": groups, "age": groups})
    with pytest.raises(ValueError, match=r"strata has shape \(300, 2\).*one group"):
        PerformativeAdapter(LogisticRegression(), **plain).fit(X, y, rounds=rounds, strata=two)
