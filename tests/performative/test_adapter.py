"""PerformativeAdapter: what it promises, and how it says no."""

import datetime
import pickle
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier

from skperf import MLP, Net, PerformativeAdapter, PerformativeWarning, from_module
from skperf.backbone.parameters import fingerprint
from tests.performative.conftest import K, World, live

QUICK = {"adapter": ["fixed", "tied", "linear"], "random_state": 0}
AWARE = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)


def refitted(lived, **parameters):
    """Fit a clone with other parameters on the same rounds."""
    adapter, (X, y, rounds) = lived
    return clone(adapter).set_params(**parameters).fit(X, y, rounds=rounds)


def same_state(one, two, X):
    np.testing.assert_allclose(one.predict_proba(X), two.predict_proba(X), atol=1e-6)
    np.testing.assert_allclose(one.predicted_prior_, two.predicted_prior_, atol=1e-6)
    np.testing.assert_array_equal(one.trajectory_.counts, two.trajectory_.counts)
    assert (one.adapter_name_, one.strength_, one.mix_) == (
        two.adapter_name_,
        two.strength_,
        two.mix_,
    )


def test_scores_are_bayes_rule(frozen, lived):
    adapter, (X, _, _) = lived
    logits = log_softmax(frozen.decision_function(X), axis=1)
    expected = logits + np.log(adapter.predicted_prior_) - np.log(adapter.base_prior_)
    np.testing.assert_allclose(
        adapter.predict_log_proba(X), log_softmax(expected, axis=1), atol=1e-10
    )
    np.testing.assert_allclose(adapter.predict_proba(X), softmax(expected, axis=1), atol=1e-10)
    np.testing.assert_array_equal(adapter.predict(X), expected.argmax(axis=1))


def test_without_rounds_nothing_is_corrected_and_nothing_warns(frozen, classifier, world):
    X, y = world.draw(300)
    for estimator in (frozen, LogisticRegression()):
        adapter = PerformativeAdapter(estimator).fit(X, y)
        expected = (classifier if estimator is frozen else adapter.estimator_).predict_proba(X)
        np.testing.assert_allclose(adapter.predict_proba(X), expected, atol=1e-12)
        assert adapter.fallback_
        assert adapter.adapter_name_ == "fixed"
        np.testing.assert_allclose(adapter.predict_prior(), adapter.base_prior_)


def test_a_responding_world_is_anticipated(lived):
    adapter, _ = lived
    assert adapter.adapter_name_ in ("tied", "curve", "linear")
    assert not adapter.fallback_
    record = adapter.prequential_
    saved = (record.none - record.adapter)[4:].sum() / (record.none - record.oracle)[4:].sum()
    assert saved > 0.8
    assert record.last[4:].mean() > record.none[4:].mean()
    assert record.predicted.shape == record.realised.shape == (12, K)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        (["fixed", "tied", "curve", "linear"], "marginal"),
        (["fixed", "tied", "linear"], "log_loss"),
        ("mlp", "marginal"),
        ("mlp", "log_loss"),
        ("paper", "marginal"),
    ],
    ids=str,
)
def test_fit_in_one_go_equals_partial_fit(frozen, kind, objective):
    keywords = {"adapter": kind, "objective": objective, "max_epochs": 5, "random_state": 3}
    adapter = PerformativeAdapter(frozen, **keywords)
    X, y, rounds = live(adapter, World(), 6)
    same_state(PerformativeAdapter(frozen, **keywords).fit(X, y, rounds=rounds), adapter, X)
    shuffled = np.random.default_rng(0).permutation(len(y))
    in_two = PerformativeAdapter(frozen, **keywords)
    in_two.partial_fit(X[rounds < 4], y[rounds < 4], rounds=rounds[rounds < 4])
    in_two.partial_fit(X[rounds >= 4], y[rounds >= 4], rounds=rounds[rounds >= 4])
    same_state(in_two, adapter, X)
    at_once = PerformativeAdapter(frozen, **keywords)
    at_once.fit(X[shuffled], y[shuffled], rounds=rounds[shuffled])
    np.testing.assert_allclose(at_once.trajectory_.counts, adapter.trajectory_.counts)


def test_an_unfitted_estimator_learns_from_the_first_round_only():
    adapter = PerformativeAdapter(LogisticRegression(), **QUICK)
    X, y, rounds = live(adapter, World(), 5)
    at_once = PerformativeAdapter(LogisticRegression(), **QUICK).fit(X, y, rounds=rounds)
    same_state(at_once, adapter, X)
    alone = LogisticRegression().fit(X[rounds == 0], y[rounds == 0])
    np.testing.assert_allclose(at_once.estimator_.coef_, alone.coef_)
    shares = np.bincount(y[rounds == 0]) / (rounds == 0).sum()
    np.testing.assert_allclose(at_once.base_prior_, shares)


def test_labels_of_future_rounds_change_nothing_in_the_present(frozen, lived):
    _, (X, y, rounds) = lived
    permuted = y.copy()
    late = rounds >= 7
    permuted[late] = np.random.default_rng(0).permutation(y[late])
    one, two = (
        PerformativeAdapter(frozen, **QUICK).fit(X, labels, rounds=rounds)
        for labels in (y, permuted)
    )
    for name in ("none", "last", "adapter", "oracle", "predicted", "realised", "worst_recall"):
        np.testing.assert_array_equal(one.prequential_[name][:7], two.prequential_[name][:7])
    # the prediction for round 7 is made before its labels
    np.testing.assert_array_equal(one.prequential_.predicted[7], two.prequential_.predicted[7])
    replayed = [one.replay(X, labels, rounds=rounds) for labels in (y, permuted)]
    now = rounds <= 7
    np.testing.assert_array_equal(replayed[0][now], replayed[1][now])


class Interrupting(BaseEstimator, ClassifierMixin):
    """A classifier that is stopped by the user at a given call."""

    def __init__(self, inner, calls):
        self.inner = inner
        self.calls = calls

    def __sklearn_is_fitted__(self):
        return True

    @property
    def classes_(self):
        return self.inner.classes_

    def fit(self, X, y):
        return self

    def predict_proba(self, X):
        self.calls.append(len(X))
        if len(self.calls) == 6:
            raise KeyboardInterrupt
        return self.inner.predict_proba(X)


def test_an_interrupted_partial_fit_leaves_the_adapter_as_it_was(classifier, lived):
    _, (X, y, rounds) = lived
    calls = []
    adapter = PerformativeAdapter(FrozenEstimator(Interrupting(classifier, calls)), **QUICK)
    first = rounds < 4
    adapter.partial_fit(X[first], y[first], rounds=rounds[first])
    assert len(calls) == 4  # the first round's scores serve to begin as well
    before = dict(vars(adapter))
    prior = adapter.predict_prior().copy()
    with pytest.raises(KeyboardInterrupt):
        adapter.partial_fit(X[~first], y[~first], rounds=rounds[~first])
    assert vars(adapter) == before
    np.testing.assert_array_equal(adapter.predict_prior(), prior)
    adapter.partial_fit(X[~first], y[~first], rounds=rounds[~first])
    assert adapter.n_rounds_ == 12


def test_an_interrupted_first_call_leaves_nothing(classifier, lived):
    _, (X, y, rounds) = lived
    adapter = PerformativeAdapter(FrozenEstimator(Interrupting(classifier, [0] * 3)), **QUICK)
    before = dict(vars(adapter))
    with pytest.raises(KeyboardInterrupt):
        adapter.fit(X, y, rounds=rounds)
    assert vars(adapter) == before


def test_one_row_rounds(frozen, world):
    X, y = world.draw(40)
    adapter = PerformativeAdapter(frozen, base_prior="uniform", **QUICK)
    adapter.fit(X, y, rounds=np.arange(40))
    assert adapter.n_rounds_ == 40
    assert np.isfinite(adapter.predict_proba(X)).all()
    assert adapter.statistic_.shape == (K,)


def test_a_class_absent_from_the_first_rounds(frozen, lived):
    _, (X, y, rounds) = lived
    kept = (y != 2) | (rounds > 4)
    with pytest.warns(UserWarning, match=r"no rows of the classes \[2\].*smoothed"):
        adapter = PerformativeAdapter(frozen, **QUICK).fit(X[kept], y[kept], rounds=rounds[kept])
    assert (adapter.base_prior_ > 0).all()
    assert (adapter.predicted_prior_ > 0).all()
    assert adapter.predict_proba(X).shape == (len(X), K)
    unfitted = PerformativeAdapter(LogisticRegression(), calibration="none", **QUICK)
    with pytest.warns(UserWarning, match="smoothed"):
        unfitted.fit(X[kept], y[kept], rounds=rounds[kept])
    assert unfitted.classes_.tolist() == [0, 1, 2, 3]
    assert np.isfinite(unfitted.predict_log_proba(X)).all()
    # rows tell nothing of a class that was never shown: it has its anticipated share in each
    expected = unfitted.predicted_prior_[2]
    np.testing.assert_allclose(unfitted.predict_proba(X)[:, 2].mean(), expected, rtol=0.5)


def test_rounds_in_any_form(frozen, world):
    X, y = world.draw(60)
    rounds = np.repeat(np.arange(6), 10)
    plain = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=rounds)
    for other in (rounds.tolist(), rounds.astype(float), pd.Series(rounds), torch.tensor(rounds)):
        same_state(PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=other), plain, X)
    adapter = PerformativeAdapter(frozen, **QUICK)
    for _ in range(3):
        adapter.partial_fit(X, y)
    assert adapter.trajectory_.rounds.tolist() == [0, 1, 2]
    with pytest.warns(UserWarning, match="min_rounds"):
        assert PerformativeAdapter(frozen).fit(X, y, rounds=7).trajectory_.rounds.tolist() == [7]


@pytest.mark.filterwarnings("ignore:the correction is withdrawn")  # mixes answered another model
def test_logged_predictions_are_what_was_deployed(frozen, lived):
    _, (X, y, rounds) = lived
    right = PerformativeAdapter(frozen, recall_smoothing=0.0, **QUICK)
    deployed = np.where(np.random.default_rng(0).random(len(y)) < 0.7, y, 0)
    right.fit(X, y, rounds=rounds, deployed_pred=deployed)
    for number, statistic in enumerate(right.trajectory_.statistics):
        now = rounds == number
        hits = np.bincount(y[now], deployed[now] == y[now], K)
        np.testing.assert_allclose(statistic, hits / np.bincount(y[now], minlength=K))
    proba = np.eye(K)[deployed]
    again = clone(right).fit(X, y, rounds=rounds, deployed_pred=proba)
    np.testing.assert_array_equal(again.trajectory_.statistics, right.trajectory_.statistics)
    for wrong, message in ((y[:5], "(5,)"), (proba[:, :2], "2 columns"), (y + 9, "labels")):
        with pytest.raises(ValueError, match=message):
            clone(right).fit(X, y, rounds=rounds, deployed_pred=wrong)


def test_a_round_counts_as_many_labels_as_its_weights_are_worth(frozen, lived):
    _, (X, y, rounds) = lived
    plain = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=rounds)
    kept = np.random.default_rng(5).random(len(y)) < 0.7
    for weight, same in (
        (np.full(len(y), 1 / len(y)), plain),
        (np.full(len(y), 100.0), plain),
        (
            0.01 * kept,
            PerformativeAdapter(frozen, **QUICK).fit(X[kept], y[kept], rounds=rounds[kept]),
        ),
    ):
        weighted = PerformativeAdapter(frozen, **QUICK).fit(
            X, y, rounds=rounds, sample_weight=weight
        )
        np.testing.assert_allclose(
            weighted.trajectory_.statistics, same.trajectory_.statistics, atol=1e-6
        )
        np.testing.assert_allclose(weighted.predicted_prior_, same.predicted_prior_, atol=1e-4)
    # a heavy row among light ones makes a round worth less than its rows
    uneven = np.where(np.arange(len(y)) % 400 == 0, 50.0, 1.0)
    few = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=rounds, sample_weight=uneven)
    expected = (50 + 399) ** 2 / (50**2 + 399)
    np.testing.assert_allclose(few.trajectory_.counts.sum(axis=1), expected)


# ---- a record without rows


def test_a_record_without_rows(lived):
    rng = np.random.default_rng(0)
    statistics = rng.uniform(0.3, 1.0, size=(31, K))
    counts = np.vstack(
        [np.full(K, 250), [rng.multinomial(1000, softmax(-s / 0.1)) for s in statistics[:-1]]]
    )
    adapter = PerformativeAdapter(random_state=0).fit_trajectory(statistics, counts)
    fresh = rng.uniform(0.35, 0.95, size=(40, K))
    truth = softmax(-fresh / 0.1, axis=1)
    predicted = adapter.predict_prior(fresh)
    assert np.sum(truth * np.log(truth / predicted), axis=1).mean() < 0.02
    np.testing.assert_array_equal(adapter.predict_prior(fresh[0]), predicted[0])
    np.testing.assert_allclose(adapter.predict_prior().sum(), 1.0)
    with pytest.raises(NotFittedError, match="frozen"):
        adapter.predict(np.zeros((1, 3)))
    with pytest.raises(NotFittedError, match="frozen"):
        adapter.partial_fit(np.zeros((4, 3)), np.arange(4))


def test_counts_are_explained_by_the_row_before():
    rng = np.random.default_rng(1)
    statistics = rng.uniform(0.3, 1.0, size=(40, K))
    mixes = np.array([1000 * softmax(-s / 0.1) for s in statistics])
    after = np.vstack([np.full(K, 250.0), mixes[:-1]])
    fits = [
        PerformativeAdapter(adapter="tied", random_state=0).fit_trajectory(statistics, counts)
        for counts in (after, np.vstack([np.full(K, 250.0), mixes[1:]]))
    ]
    gains = [np.mean(f.prequential_.none - f.prequential_.adapter) for f in fits]
    assert gains[0] > 0.2
    assert abs(gains[1]) < 0.02
    late = np.vstack([np.full((2, K), 250.0), mixes[:-2]])
    adapter = PerformativeAdapter(adapter="tied", lag=2).fit_trajectory(statistics, late)
    assert np.mean(adapter.prequential_.none - adapter.prequential_.adapter) > 0.2


def test_a_record_serves_a_frozen_estimator(frozen, lived):
    adapter, (X, _, _) = lived
    record = adapter.trajectory_
    again = clone(adapter).set_params(base_prior=adapter.base_prior_)
    again.fit_trajectory(record.statistics, record.counts)
    # strength and mix were judged by rows in one, by label shares in the other
    np.testing.assert_allclose(again.predicted_prior_, adapter.predicted_prior_, atol=0.02)
    np.testing.assert_allclose(again.predict_proba(X), adapter.predict_proba(X), atol=0.05)
    module = torch.nn.Linear(3, K)
    from_record = PerformativeAdapter(module, base_prior="uniform", **QUICK)
    from_record.fit_trajectory(record.statistics, record.counts)
    assert from_record.predict_proba(X[:5].astype(np.float32)).shape == (5, K)


def test_tables_of_counts_are_read_by_label(lived):
    trajectory, labels = lived[0].trajectory_, lived[0].classes_.tolist()
    tables = [pd.DataFrame(a, columns=labels) for a in (trajectory.statistics, trajectory.counts)]
    turned = [table[labels[::-1]] for table in tables]
    found = [
        PerformativeAdapter(lived[0].estimator, adapter="tied").fit_trajectory(*given)
        for given in (tables, turned)
    ]
    np.testing.assert_array_equal(found[0].predict_prior(), found[1].predict_prior())


@pytest.mark.parametrize(
    ("classes", "divided", "message"),
    [
        ([4, 5, 6, 7], 1, "classes must be the frozen"),
        (None, 400, "label_counts hold shares"),
    ],
)
def test_counts_that_are_none(lived, classes, divided, message):
    trajectory = lived[0].trajectory_
    adapter = PerformativeAdapter(lived[0].estimator)
    with pytest.raises(ValueError, match=message):
        adapter.fit_trajectory(trajectory.statistics, trajectory.counts / divided, classes=classes)
    with pytest.raises(ValueError, match="each needs its own"):
        PerformativeAdapter().fit_trajectory(
            trajectory.statistics, trajectory.counts, classes=[1, 1, 2, 3]
        )


def test_records_are_checked():
    adapter, good = PerformativeAdapter(), np.full((5, K), 0.5)
    counts = np.full((5, K), 10.0)
    holed = good.copy()
    holed[2, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        adapter.fit_trajectory(holed, counts)
    empty = counts.copy()
    empty[2, 1] = 0
    varied = holed + 0.1 * np.arange(5)[:, None] / 5
    with pytest.warns(UserWarning, match="set to the mean"):
        adapter.fit_trajectory(varied, empty)
    np.testing.assert_allclose(adapter.trajectory_.statistics[2, 1], varied[2, 0])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        adapter.fit_trajectory(good + 1, counts)
    with pytest.raises(ValueError, match="shape"):
        adapter.fit_trajectory(good[:4], counts)
    with pytest.raises(ValueError, match="negative"):
        adapter.fit_trajectory(good, counts - 11)
    with pytest.raises(ValueError, match="there is no round, statistic or class"):
        adapter.fit_trajectory(good[:0], counts[:0])
    with pytest.raises(ValueError, match="needs rows"):
        PerformativeAdapter(objective="log_loss").fit_trajectory(good, counts)
    with pytest.warns(PerformativeWarning, match="not identifiable"):
        adapter.fit_trajectory(good, counts)


# ---- the error table


@pytest.mark.parametrize(
    ("rounds", "message"),
    [
        (np.zeros(5), "5 entries .* 60 rows"),
        (np.where(np.arange(60) == 7, np.nan, 1.0), "missing value in row 7"),
        (np.where(np.arange(60) == 3, 1.5, 1.0), "1.5 in row 3"),
        (np.array(["a", 1] * 30, dtype=object), "no order"),
        (np.array([None] * 60), "missing value in row 0"),
        (pd.Series([*range(59), None], dtype="Int64"), "missing value in row 59"),
        (pd.Series([*"ab" * 29, "b", None], dtype="string"), "missing value in row 59"),
        (np.array([AWARE, AWARE.replace(tzinfo=None)] * 30), "with and without a zone"),
    ],
    ids=["short", "nan", "fraction", "mixed", "missing", "Int64", "string", "zones"],
)
def test_rounds_that_are_none(frozen, world, rounds, message):
    X, y = world.draw(60)
    with pytest.raises(ValueError, match=message):
        PerformativeAdapter(frozen).fit(X, y, rounds=rounds)


def test_times_of_any_zone_are_put_on_one_clock(frozen, world):
    X, y = world.draw(60)
    days = pd.date_range("2024-01-01", periods=4, freq="D", tz="Asia/Tokyo").repeat(15)
    here = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=days)
    there = PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=days.tz_convert("UTC"))
    np.testing.assert_array_equal(here.trajectory_.rounds, there.trajectory_.rounds)
    assert str(here.trajectory_.rounds[0]).startswith("2023-12-31T15")


@pytest.mark.parametrize("prior", [[1, 2, 3, 4], [0.2] * 4, {0: 0.5, 1: 0.2}], ids=str)
def test_shares_that_do_not_sum_to_one(frozen, world, prior):
    X, y = world.draw(60)
    adapter = PerformativeAdapter(frozen).fit(X, y)
    for call in (adapter.correct, lambda X, mix: adapter.deployed_statistic(X, y, prior=mix)):
        with pytest.raises(ValueError, match="prior must sum to 1"):
            call(X, prior)
    assert adapter.correct(X, [0.333, 0.333, 0.333, 0]).shape == (60, K)


def test_unknown_labels_are_listed(frozen, world):
    X, y = world.draw(60)
    y[3], y[4] = 8, 9
    with pytest.raises(ValueError, match=r"unknown to the estimator: \[8, 9\]"):
        PerformativeAdapter(frozen).fit(X, y)
    adapter = PerformativeAdapter(LogisticRegression()).partial_fit(*world.draw(60))
    with pytest.raises(ValueError, match=r"\[8, 9\]"):
        adapter.partial_fit(X, y)


def test_an_estimator_without_scores(world):
    class Mute(BaseEstimator, ClassifierMixin):
        def fit(self, X, y):
            self.classes_ = np.unique(y)
            return self

    with pytest.raises(TypeError, match="predict_proba or decision_function"):
        PerformativeAdapter(Mute()).fit(*world.draw(60))


def test_probabilities_that_are_none(world):
    class Wrong(BaseEstimator, ClassifierMixin):
        def fit(self, X, y):
            self.classes_ = np.unique(y)
            return self

        def predict_proba(self, X):
            return np.full((len(X), K), 0.4)

    with pytest.raises(ValueError, match="must return probabilities"):
        PerformativeAdapter(Wrong()).fit(*world.draw(60))


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ([0.5, 0.5, 0.0, 0.0], "positive"),
        ([0.5, 0.6, 0.4, -0.5], "positive"),
        ([0.5, 0.5], "4 classes"),
        ({0: 0.5, 1: 0.5, 2: 0.1, 9: 0.1}, r"missing are \[3\], not known \[9\]"),
    ],
    ids=str,
)
def test_base_priors_that_are_none(frozen, world, prior, message):
    with pytest.raises(ValueError, match=message):
        PerformativeAdapter(frozen, base_prior=prior).fit(*world.draw(60))


def test_base_priors(frozen, world):
    X, y = world.draw(400)
    by_label = PerformativeAdapter(frozen, base_prior={3: 2, 1: 1, 0: 1, 2: 4}).fit(X, y)
    np.testing.assert_allclose(by_label.base_prior_, np.array([1, 1, 4, 2]) / 8)
    equal = PerformativeAdapter(frozen, base_prior="uniform").fit(X, y)
    np.testing.assert_allclose(equal.base_prior_, 1 / K)
    skewed = world.draw(4000, prior=[0.7, 0.1, 0.1, 0.1])
    found = PerformativeAdapter(frozen).fit(*skewed)
    # the frozen classifier was trained at equal shares, whatever the rows at hand
    assert np.abs(found.base_prior_ - 1 / K).max() < 0.1
    assert np.abs(np.bincount(skewed[1]) / 4000 - 1 / K).max() > 0.4


def test_statistics_that_are_none(lived):
    adapter, (X, _, _) = lived
    for statistic, message in (
        (np.ones(3), "shape"),
        (np.full(K, 1.5), r"\[0, 1\]"),
        (np.full(K, np.nan), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.predict(X, statistic=statistic)
        with pytest.raises(ValueError, match=message):
            adapter.predict_prior(statistic)
    with pytest.raises(ValueError, match="one statistic"):
        adapter.predict(X, statistic=np.full((2, K), 0.5))


@pytest.mark.parametrize("number", [11, 4])
def test_a_round_that_is_not_later(lived, number):
    adapter, (X, y, _) = lived
    with pytest.raises(ValueError, match="last round seen, 11"):
        deepcopy(adapter).partial_fit(X[:20], y[:20], rounds=number)


def test_too_few_rounds(frozen, world):
    X, y = world.draw(60)
    adapter = PerformativeAdapter(frozen, strength=1.0, adapter="tied")
    with pytest.warns(UserWarning, match="fewer than min_rounds=3"):
        adapter.fit(X, y, rounds=np.arange(60) // 30)
    assert adapter.adapter_name_ == "fixed"
    assert adapter.fallback_
    np.testing.assert_allclose(adapter.predict_proba(X), frozen.predict_proba(X), atol=1e-12)


def test_gaps_in_rounds(frozen, world):
    X, y = world.draw(60)
    with pytest.warns(PerformativeWarning, match="jump from 1 to 3"):
        PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=np.repeat([0, 1, 3, 4], 15))
    PerformativeAdapter(frozen, **QUICK).fit(X, y, rounds=np.repeat([10, 20, 30, 40], 15))


def test_a_statistic_far_from_all_seen():
    rng = np.random.default_rng(0)
    statistics = rng.uniform(0.70, 0.74, size=(40, K))
    counts = np.array([1000 * softmax(-s / 0.01) for s in statistics])
    adapter = PerformativeAdapter(adapter="tied", base_prior="uniform")
    adapter.fit_trajectory(statistics, np.vstack([counts[:1], counts[:-1]]))
    far = np.array([0.1, 0.9, 0.9, 0.9])
    with pytest.warns(PerformativeWarning, match="blended towards the base prior"):
        held = adapter.predict_prior(far)
    plain = np.exp(adapter.adapter_.log_prior(far[None])[0])
    assert 1 / K < held[0] < plain[0]
    adapter.predict_prior(far)  # says so once


@pytest.mark.parametrize(
    "y",
    [np.random.default_rng(0).normal(size=60), np.eye(2, dtype=int)[np.arange(60) % 2]],
    ids=["continuous", "multilabel"],
)
def test_targets_that_are_no_classes(frozen, world, y):
    with pytest.raises(ValueError, match=r"Unknown label type|y should be a 1d array|1d"):
        PerformativeAdapter(frozen).fit(world.draw(60)[0], y)


def test_short_batches(lived):
    adapter, (X, _, _) = lived
    hybrid = refitted(lived, transductive="map_em")
    with pytest.warns(UserWarning, match="39 rows is short"):
        hybrid.predict(X[:39])
    hybrid.predict(X[:40])
    silent = refitted(lived, transductive="auto")
    np.testing.assert_array_equal(silent.predict_proba(X[:39]), adapter.predict_proba(X[:39]))
    np.testing.assert_array_equal(silent.predict_proba(X[:400]), hybrid.predict_proba(X[:400]))


@pytest.mark.parametrize(
    "parameters",
    [{"adapter": "cubic"}, {"strength": 1.5}, {"mix": 1.0}, {"lag": 0}, {"transductive": "x"}],
    ids=str,
)
def test_parameters_are_checked_in_fit(frozen, world, parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        PerformativeAdapter(frozen, **parameters).fit(*world.draw(60))


@pytest.mark.parametrize("kind", [["tied", "cubic"], int, [LogisticRegression], []], ids=str)
@pytest.mark.parametrize("rounds", [None, np.arange(60) // 10], ids=["alone", "rounds"])
def test_maps_that_are_none(frozen, world, kind, rounds):
    X, y = world.draw(60)
    with pytest.raises(ValueError, match=r"adapter (must be|is an empty list)"):
        PerformativeAdapter(frozen, adapter=kind).fit(X, y, rounds=rounds)


def test_the_paper_knows_mixes_only(frozen, world):
    X, y = world.draw(60)
    adapter = PerformativeAdapter(frozen, adapter="paper", objective="log_loss")
    with pytest.raises(ValueError, match="fitted to label mixes"):
        adapter.fit(X, y, rounds=np.arange(60) // 10)


def test_tied_needs_one_entry_a_class(frozen, world):
    X, y = world.draw(60)
    adapter = PerformativeAdapter(frozen, adapter="tied", statistic="confusion")
    with pytest.raises(ValueError, match="one entry a class"):
        adapter.fit(X, y, rounds=np.arange(60) // 10)


# ---- estimators in every form


@pytest.mark.parametrize(
    "make",
    [
        lambda X, y: LinearSVC().fit(X, y),
        lambda X, y: DecisionTreeClassifier(max_depth=3).fit(X, y),
        lambda X, y: Net(MLP, max_epochs=2, random_state=0).fit(X.astype(np.float32), y),
    ],
    ids=["svc", "tree", "net"],
)
def test_any_classifier(world, make):
    X, y = world.draw(200)
    adapter = PerformativeAdapter(FrozenEstimator(make(X, y)), **QUICK)
    adapter.fit(X, y, rounds=np.arange(200) // 40)
    assert adapter.predict_proba(X).shape == (200, K)


def test_a_module_is_used_as_it_is_and_never_changed(world):
    X, y = world.draw(200)
    X = X.astype(np.float32)
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, K)).train()
    before, rng = fingerprint(module), torch.get_rng_state()
    adapter = PerformativeAdapter(module, adapter="auto", max_epochs=2, random_state=0)
    adapter.fit(X, y, rounds=np.arange(200) // 8)
    adapter.predict(X)
    assert adapter.estimator_.module is module
    assert fingerprint(module) == before
    assert module.training
    assert all(p.requires_grad and p.grad is None for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
    with pytest.raises(ValueError, match="unknown"):
        adapter.partial_fit(X, y + 1)
    assert fingerprint(module) == before


def test_a_fitted_estimator_that_is_not_frozen_warns(classifier, world):
    with pytest.warns(UserWarning, match="FrozenEstimator"):
        PerformativeAdapter(classifier).fit(*world.draw(100))


def test_classes_in_an_order_of_their_own(world, lived):
    adapter, (X, y, rounds) = lived
    names = np.array(["kiwi", "apple", "melon", "pear"])
    weights = torch.nn.Linear(3, K).double()
    inner = adapter.estimator_.estimator
    with torch.no_grad():
        weights.weight.copy_(torch.tensor(inner.coef_))
        weights.bias.copy_(torch.tensor(inner.intercept_))
    named = clone(adapter).set_params(estimator=from_module(weights, classes=names))
    named.fit(X, names[y], rounds=rounds)
    np.testing.assert_allclose(named.predict_proba(X), adapter.predict_proba(X), atol=1e-6)
    assert (named.predict(X) == names[adapter.predict(X)]).mean() > 0.999


def test_string_labels_and_data_frames(frozen, world):
    X, y = world.draw(200)
    names = np.array(["d", "b", "c", "a"])[y]
    frame = pd.DataFrame(X, columns=["u", "v", "w"])
    adapter = PerformativeAdapter(LogisticRegression(), **QUICK)
    adapter.fit(frame, pd.Series(names), rounds=pd.Series(np.arange(200) // 40))
    assert adapter.feature_names_in_.tolist() == ["u", "v", "w"]
    assert set(adapter.predict(frame)) <= set("abcd")
    adapter.partial_fit(frame, names)
    assert 0 <= adapter.score(frame, names, rounds=np.arange(200) // 50) <= 1
    with pytest.raises(ValueError, match="feature names"):
        adapter.predict(frame[["w", "v", "u"]])


def test_two_classes_have_one_score(world):
    X, y = world.draw(200)
    adapter = PerformativeAdapter(LogisticRegression(), **QUICK)
    adapter.fit(X, y % 2, rounds=np.arange(200) // 25)
    scores = adapter.decision_function(X)
    assert scores.shape == (200,)
    np.testing.assert_array_equal(scores > 0, adapter.predict(X) == 1)
    assert adapter.adapter_.weights.shape == (2, 2)


def test_clone_and_pickle(lived):
    adapter, (X, _, _) = lived
    again = pickle.loads(pickle.dumps(adapter))
    np.testing.assert_array_equal(again.predict_proba(X), adapter.predict_proba(X))
    assert not hasattr(clone(adapter), "classes_")
    again.partial_fit(X[:50], np.zeros(50, int))
    assert again.n_rounds_ == adapter.n_rounds_ + 1


class OwnMap(torch.nn.Module):
    """Two widths by position."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.layer = torch.nn.Linear(n_in, n_out)

    def forward(self, X):
        return self.layer(X)


@pytest.mark.filterwarnings("ignore:the correction is withdrawn")
def test_a_map_of_the_users_own(frozen, lived):
    _, (X, y, rounds) = lived
    adapter = PerformativeAdapter(frozen, adapter=OwnMap, lr=0.05, random_state=0)
    adapter.fit(X, y, rounds=rounds)
    assert adapter.adapter_name_ in ("OwnMap", "fixed")
    assert adapter.record_.anticipation.contenders["OwnMap"].fitted_at > 0
    again = pickle.loads(pickle.dumps(adapter))
    np.testing.assert_array_equal(again.predict_proba(X), adapter.predict_proba(X))


# ---- other statistics, calibration, batches, the tail


@pytest.mark.filterwarnings("ignore:the correction is withdrawn")
@pytest.mark.parametrize("statistic", ["confusion", "predicted_marginal"])
def test_other_statistics(frozen, lived, statistic):
    _, (X, y, rounds) = lived
    adapter = PerformativeAdapter(frozen, statistic=statistic, adapter=["fixed", "linear"])
    adapter.fit(X, y, rounds=rounds)
    assert len(adapter.statistic_) == {"confusion": K * K, "predicted_marginal": K}[statistic]
    assert adapter.statistic_of(adapter, X, y).shape == adapter.statistic_.shape


def accuracy_and_rate(y_true, y_pred, proba, classes, sample_weight):
    return np.array([np.mean(y_true == y_pred), np.mean(y_pred == "b")])


def test_a_statistic_of_the_users_own_sees_labels(frozen, world):
    X, y = world.draw(200)
    names = np.array(list("abcd"))[y]
    adapter = PerformativeAdapter(LogisticRegression(), statistic=accuracy_and_rate, max_epochs=2)
    adapter.fit(X, names, rounds=np.arange(200) // 20)
    assert adapter.statistic_.shape == (2,)
    # recalls lie in [0, 1], a statistic of one's own need not
    with pytest.warns(PerformativeWarning, match="times as far"):
        assert adapter.predict_prior(np.array([0.9, -3.0])).shape == (K,)
    broken = PerformativeAdapter(LogisticRegression(), statistic=lambda *_: np.nan)
    with pytest.raises(ValueError, match="finite numbers"):
        broken.fit(X, names)


def test_statistic_of_is_smoothed_recall(frozen, lived):
    adapter, (X, y, _) = lived
    right = frozen.predict(X) == y
    totals, hits = np.bincount(y, minlength=K), np.bincount(y, right, minlength=K)
    expected = (hits + 2 * right.mean()) / (totals + 2)
    np.testing.assert_allclose(adapter.statistic_of(frozen, X, y), expected)
    own = adapter.statistic_of(adapter, X, y)
    assert not np.allclose(own, expected)
    with pytest.raises(ValueError, match="NaN"):
        adapter.statistic_of(frozen, np.full_like(X, np.nan), y)
    with pytest.raises(ValueError, match="sample_weight"):
        adapter.statistic_of(frozen, X, y, sample_weight=[1.0])


@pytest.mark.parametrize("kind", ["temperature", "bcts"])
def test_calibration_at_the_base_mix(frozen, world, kind):
    module = torch.nn.Linear(3, K).double()
    inner = frozen.estimator
    with torch.no_grad():
        module.weight.copy_(3 * torch.tensor(inner.coef_))
        module.bias.copy_(3 * torch.tensor(inner.intercept_))
    X, y = world.draw(3000)
    adapter = PerformativeAdapter(module, calibration=kind, base_prior="uniform").fit(X, y)
    assert adapter.calibrator_.temperature == pytest.approx(3.0, rel=0.15)
    held = PerformativeAdapter(LogisticRegression(), calibration=kind).fit(X, y)
    assert held.calibrator_.temperature == pytest.approx(1.0, rel=0.2)


@pytest.mark.parametrize("how", ["em", "bbse", "map_em"])
def test_the_batch_itself(lived, how):
    adapter = refitted(lived, transductive=how)
    X, y = World(seed=5).draw(2000, prior=[0.05, 0.05, 0.1, 0.8])
    before = adapter.estimator_.score(X, y)
    assert adapter.score(X, y) > before
    np.testing.assert_array_equal(adapter.predict(X), adapter.predict(X))


def test_overconfident_scores_make_the_hybrid_trust_the_anticipation(frozen):
    module = torch.nn.Linear(3, K).double()
    inner = frozen.estimator
    with torch.no_grad():
        module.weight.copy_(6 * torch.tensor(inner.coef_))
        module.bias.copy_(6 * torch.tensor(inner.intercept_))
    keywords = {"adapter": ["fixed", "tied"], "base_prior": "uniform", "random_state": 0}
    keywords["calibration"] = "none"
    adapter = PerformativeAdapter(module, transductive="map_em", **keywords)
    live(adapter, World(), 12)
    losses = adapter.record_.batch_losses
    assert losses[0] < losses[-1]  # the anticipation alone is better than EM alone
    assert adapter.record_.worth() >= 1e3


@pytest.mark.parametrize("how", ["em", "bbse", "map_em"])
def test_a_batch_without_any_rounds(frozen, how):
    X, y = World(seed=5).draw(2000, prior=[0.05, 0.05, 0.1, 0.8])
    plain = PerformativeAdapter(frozen).fit(*World(seed=6).draw(1000))
    adapter = PerformativeAdapter(frozen, transductive=how).fit(*World(seed=6).draw(1000))
    assert adapter.score(X, y) > plain.score(X, y)


def test_the_floor_under_the_worst_recall(frozen):
    plain = PerformativeAdapter(frozen, adapter="tied", random_state=0)
    live(plain, World(temperature=0.05), 10)
    kept = PerformativeAdapter(frozen, adapter="tied", worst_recall_floor=0.4, random_state=0)
    X, y, _ = live(kept, World(temperature=0.05), 10)
    assert kept.strength_ < plain.strength_
    recall = np.bincount(y, kept.predict(X) == y) / np.bincount(y)
    assert recall.min() > 0.3


def test_intervals_hold_what_they_promise(frozen):
    adapter = PerformativeAdapter(frozen, adapter="tied", random_state=0)
    world, held = World(), []
    statistic = None
    for number in range(40):
        X, y = world.next_round(statistic, size=300)
        if number > 9:
            prior, (low, high) = adapter.predict_prior(return_interval=True)
            assert (low <= prior + 1e-9).all()
            assert (prior <= high + 1e-9).all()
            shares = np.bincount(y, minlength=K) / len(y)
            held.append((low <= shares) & (shares <= high))
        adapter.partial_fit(X, y)
        statistic = adapter.statistic_
    assert 0.8 < np.mean(held) <= 1.0


# ---- looking ahead


def test_candidates_are_ranked_by_what_they_would_meet(classifier, lived):
    adapter, _ = lived
    X, y = World(seed=9).draw(2000, prior=np.full(K, 1 / K))
    world = World(seed=11)
    candidates = {"plain": classifier}
    for name, size in (("weak", 4), ("weaker", 2)):
        labels = np.repeat(np.arange(K), [size, 60, 60, 60])
        candidates[name] = LogisticRegression().fit(world.rows(labels), labels)
    found = adapter.rank_models(candidates, X, y, n_bootstrap=50)
    for i, model in enumerate(candidates.values()):
        recall = np.array([(model.predict(X[y == c]) == c).mean() for c in range(K)])
        statistic = adapter.statistic_of(model, X, y)
        expected = np.exp(adapter.record_.prior(statistic)[0])
        np.testing.assert_allclose(found.prior[i], expected)
        assert found.predicted[i] == pytest.approx(expected @ recall)
        assert found.current[i] == pytest.approx(model.score(X, y))
    assert (found.low <= found.predicted).all()
    assert (found.predicted <= found.high).all()
    assert found.order.tolist() == np.argsort(-found.predicted).tolist()
    assert found.names == ["plain", "weak", "weaker"]


def test_the_interval_of_a_candidate_holds_what_rounds_do_to_it(frozen, classifier):
    rng = np.random.default_rng(3)
    mixes = rng.dirichlet(np.full(K, 5.0), size=60)  # whatever was deployed
    counts = np.array([rng.multinomial(400, mix) for mix in mixes])
    X, y = World(seed=9).draw(8000, prior=np.full(K, 1 / K))
    recall = np.array([(classifier.predict(X[y == c]) == c).mean() for c in range(K)])
    statistics = np.clip(recall + rng.normal(scale=0.02, size=(60, K)), 0, 1)
    adapter = PerformativeAdapter(frozen, base_prior="uniform", random_state=0, adapter="tied")
    with pytest.warns(PerformativeWarning, match="no evidence that the mix answers"):
        found = adapter.fit_trajectory(statistics, counts).rank_models([classifier], X, y)
    assert found.fallback
    scores = rng.dirichlet(np.full(K, 5.0), size=2000) @ recall
    assert 0.8 < np.mean((found.low <= scores) & (scores <= found.high)) < 0.97
    latest = PerformativeAdapter(frozen, base_prior="uniform", random_state=0, adapter="tied")
    latest.set_params(buffer_size=20).fit_trajectory(
        statistics[:30], np.vstack([counts[:10], np.full((20, K), 100)])
    )
    with pytest.warns(PerformativeWarning, match="no evidence that the mix answers"):
        calm = latest.rank_models([classifier], X, y)
    assert calm.high[0] - calm.low[0] < 0.5 * (found.high[0] - found.low[0])


def test_candidates_in_any_class_order_and_form(classifier, lived):
    adapter, _ = lived
    X, y = World(seed=9).draw(400, prior=np.full(K, 1 / K))
    order = [2, 0, 3, 1]
    module = torch.nn.Linear(3, K).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor(classifier.coef_[order]))
        module.bias.copy_(torch.tensor(classifier.intercept_[order]))
    same = [classifier, FrozenEstimator(classifier), from_module(module, classes=order)]
    for scoring in ("accuracy", "neg_log_loss"):
        found = adapter.rank_models(same, X, y, scoring=scoring, n_bootstrap=0)
        np.testing.assert_allclose(found.predicted, found.predicted[0], atol=1e-9)
    few = LogisticRegression().fit(X[y < 3], y[y < 3])
    with pytest.raises(ValueError, match=r"does not know the classes \[3\]"):
        adapter.rank_models([few], X, y)


def test_scoring_by_a_metric(classifier, lived):
    from sklearn.metrics import accuracy_score

    adapter, _ = lived
    X, y = World(seed=9).draw(400, prior=np.full(K, 1 / K))
    by_name = adapter.rank_models([classifier], X, y, n_bootstrap=5)
    by_metric = adapter.rank_models([classifier], X, y, scoring=accuracy_score, n_bootstrap=5)
    np.testing.assert_allclose(by_name.predicted, by_metric.predicted)
    with pytest.raises(ValueError, match="scoring must be"):
        adapter.rank_models([classifier], X, y, scoring="speed")


def test_candidates_that_cannot_be_ranked(classifier, lived):
    adapter, _ = lived
    X, y = World(seed=9).draw(100, prior=np.full(K, 1 / K))
    for candidates in ([], {}, classifier):
        with pytest.raises(ValueError, match="candidates must be a list"):
            adapter.rank_models(candidates, X, y)
    with pytest.raises(NotFittedError, match="LogisticRegression"):
        adapter.rank_models([LogisticRegression()], X, y)
    with pytest.raises(ValueError, match="n_bootstrap must be 0 or more, got -1"):
        adapter.rank_models([classifier], X, y, n_bootstrap=-1)


def test_rest_point(frozen):
    adapter = PerformativeAdapter(frozen, adapter="tied", random_state=0)
    live(adapter, World(temperature=0.1), 10)
    X, y = World(seed=9).draw(4000, prior=np.full(K, 1 / K))
    rest = adapter.stable_point(X, y)
    assert rest.converged
    assert rest.residual <= 0.005
    with pytest.raises(ValueError, match=r"damping must be in \(0, 1\], got 0"):
        adapter.stable_point(X, y, damping=0)
    with pytest.raises(ValueError, match="max_iter must be 1 or more, got 0"):
        adapter.stable_point(X, y, max_iter=0)
    np.testing.assert_allclose(rest.prior.sum(), 1.0)
    assert rest.statistic.shape == (K,)
    assert rest.cycle is True
    again = np.exp(adapter.record_.prior(rest.statistic)[0])
    np.testing.assert_allclose(again, rest.prior, atol=0.1)
    assert rest.worst_recall > 0.2


def test_a_model_that_is_not_corrected_rests_at_the_answer_to_its_own_recalls(frozen):
    adapter = PerformativeAdapter(frozen, adapter="tied", random_state=0)
    live(adapter, World(temperature=0.3), 12)
    record = adapter.record_
    nothing = replace(record.corrector.choice, strength=0.0, calibration=0)
    adapter.record_ = replace(record, corrector=replace(record.corrector, choice=nothing))
    X, y = World(seed=9).draw(4000, prior=np.full(K, 1 / K))
    rest = adapter.stable_point(X, y)
    recalls = [np.mean(adapter.estimator_.predict(X[y == c]) == c) for c in np.unique(y)]
    expected = softmax(-np.array(recalls) / 0.3)  # what this world does
    np.testing.assert_allclose(rest.prior, expected, atol=0.03)
    assert np.abs(expected - 1 / K).max() > 0.05


@pytest.mark.filterwarnings("ignore:the correction is withdrawn")
def test_diagnosis_of_an_answer_and_of_drift(frozen, lived):
    adapter, _ = lived
    found = adapter.diagnose()
    assert found["response_p_value"] <= 0.05
    assert found["conditional_shift_p_value"] > 0.001
    assert found["gain_statistic"] > 0.0
    assert found["rank"] == K
    assert 0 <= found["cycling_index"] <= 1
    assert found.keys() >= adapter.diagnostics_.keys()
    X, y, rounds = lived[1]
    bent = X.copy()
    bent[rounds >= 6] *= -0.3
    moved = PerformativeAdapter(frozen, **QUICK).fit(bent, y, rounds=rounds)
    assert moved.diagnose(n_permutations=9)["conditional_shift_p_value"] < 1e-6


def test_score_one_step_ahead(lived):
    adapter = refitted(lived, inputs="statistic")
    world, later = World(seed=3), []
    statistic = adapter.statistic_
    for number in range(12, 16):
        X, y = world.next_round(statistic)
        proba = adapter.predict_proba(X, statistic=statistic)
        statistic = adapter.statistic_of(_Fixed(adapter, statistic), X, y)
        later.append((X, y, np.full(len(y), number), proba))
    X, y, rounds, proba = (np.concatenate(column) for column in zip(*later, strict=True))
    np.testing.assert_allclose(adapter.replay(X, y, rounds=rounds), proba, atol=1e-9)
    expected = np.mean(proba.argmax(axis=1) == y)
    assert adapter.score(X, y, rounds=rounds) == pytest.approx(expected)
    assert adapter.n_rounds_ == 12


class _Fixed(BaseEstimator, ClassifierMixin):
    """An adapter held at one statistic."""

    def __init__(self, adapter, statistic):
        self.adapter = adapter
        self.statistic = statistic

    @property
    def classes_(self):
        return self.adapter.classes_

    def predict(self, X):
        return self.adapter.predict(X, statistic=self.statistic)

    def predict_proba(self, X):
        return self.adapter.predict_proba(X, statistic=self.statistic)
