"""Splitting and scoring forward in rounds, alone and inside scikit-learn's searches."""

import numpy as np
import pandas as pd
import pytest
from sklearn import config_context
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from skperf import PerformativeAdapter, PerformativeWarning
from skperf.model_selection import RoundForwardSplit, one_step_scorer

QUICK = {"adapter": ["fixed", "tied"], "random_state": 0}


@pytest.fixture(scope="module")
def lived():
    """Rows of 8 rounds whose mix moves, and a classifier trained elsewhere."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(3, 2)) * 1.5
    mixes = rng.dirichlet(np.full(3, 3.0), size=9)
    y = np.concatenate([rng.choice(3, 60, p=mix) for mix in mixes])
    X = means[y] + rng.normal(size=(len(y), 2))
    rounds = np.repeat(np.arange(9), 60)
    train = rounds == 8
    return X[~train], y[~train], rounds[~train], LogisticRegression().fit(X[train], y[train])


def splits(splitter, rounds):
    X = np.zeros((len(rounds), 1))
    return [
        (np.unique(rounds[a]).tolist(), np.unique(rounds[b]).tolist())
        for a, b in splitter.split(X, groups=rounds)
    ]


def test_forward_in_rounds():
    rounds = np.array([30, 10, 20, 40, 50, 10, 60])
    assert splits(RoundForwardSplit(), rounds) == [
        ([10, 20, 30], [40]),
        ([10, 20, 30, 40], [50]),
        ([10, 20, 30, 40, 50], [60]),
    ]
    assert splits(RoundForwardSplit(2, 2, gap=1), rounds) == [([10, 20], [40, 50])]
    assert splits(RoundForwardSplit(4, max_train_rounds=2), rounds) == [
        ([30, 40], [50]),
        ([40, 50], [60]),
    ]
    for splitter in (RoundForwardSplit(), RoundForwardSplit(2, 2, gap=1)):
        assert splitter.get_n_splits(groups=rounds) == len(splits(splitter, rounds))


def test_every_row_of_a_round_stays_together():
    rounds = np.random.default_rng(0).permutation(np.repeat(np.arange(6), 7))
    for train, test in RoundForwardSplit().split(np.zeros((42, 1)), groups=rounds):
        assert len(np.intersect1d(train, test)) == 0
        assert rounds[train].max() < rounds[test].min()
        assert len(test) == 7


@pytest.mark.parametrize(
    ("splitter", "groups", "message"),
    [
        (RoundForwardSplit(), None, "'groups' parameter should not be None"),
        (RoundForwardSplit(), np.zeros(5), "1 rounds are too few"),
        (
            RoundForwardSplit(0),
            np.arange(5),
            "min_train_rounds must be a whole number of at least 1",
        ),
        (RoundForwardSplit(gap=-1), np.arange(5), "gap must be a whole number of at least 0"),
        (RoundForwardSplit(2.5), np.arange(5), r"whole number of at least 1, got 2\.5"),
        (
            RoundForwardSplit(),
            [0, 1, 2, 3, np.nan],
            "missing value in row 4",
        ),
        (RoundForwardSplit(), np.arange(9), "inconsistent numbers of samples"),
    ],
    ids=["none", "few", "train", "gap", "half", "nan", "length"],
)
def test_splits_that_cannot_be(splitter, groups, message):
    with pytest.raises(ValueError, match=message):
        list(splitter.split(np.zeros((5, 1)), groups=groups))


def test_one_column_feeds_splitter_and_adapter(lived):
    X, y, rounds, classifier = lived
    with config_context(enable_metadata_routing=True):
        adapter = PerformativeAdapter(FrozenEstimator(classifier), **QUICK)
        adapter.set_fit_request(rounds="groups").set_score_request(rounds=False)
        pipeline = make_pipeline(FunctionTransformer(), adapter)
        search = GridSearchCV(
            pipeline,
            {"performativeadapter__l2": [0.1, 10.0]},
            cv=RoundForwardSplit(),
            scoring="neg_log_loss",
        )
        search.fit(X, y, groups=rounds)
        assert search.n_splits_ == 5
        assert search.best_estimator_[-1].n_rounds_ == 8
        # the split's own arithmetic, done by hand
        train, test = next(RoundForwardSplit().split(X, y, rounds))
        by_hand = PerformativeAdapter(FrozenEstimator(classifier), l2=0.1, **QUICK)
        by_hand.fit(X[train], y[train], rounds=rounds[train])
        expected = -log_loss(y[test], by_hand.predict_proba(X[test]), labels=[0, 1, 2])
        assert search.cv_results_["split0_test_score"][0] == pytest.approx(expected)


def test_nested_cross_validation(lived):
    X, y, rounds, classifier = lived
    with config_context(enable_metadata_routing=True):
        adapter = PerformativeAdapter(FrozenEstimator(classifier), **QUICK)
        adapter.set_fit_request(rounds="groups").set_score_request(rounds="groups")
        search = GridSearchCV(
            make_pipeline(FunctionTransformer(), adapter),
            {"performativeadapter__min_rounds": [1, 2]},
            cv=RoundForwardSplit(2),
        )
        found = cross_validate(search, X, y, cv=RoundForwardSplit(4, 2), params={"groups": rounds})
        assert found["test_score"].shape == (2,)
        assert np.isfinite(found["test_score"]).all()


def test_without_routing(lived):
    X, y, rounds, classifier = lived
    pipeline = make_pipeline(
        FunctionTransformer(), PerformativeAdapter(FrozenEstimator(classifier), **QUICK)
    )
    search = GridSearchCV(
        pipeline, {"performativeadapter__l2": [1.0]}, cv=RoundForwardSplit(), scoring="accuracy"
    )
    search.fit(X, y, groups=rounds, performativeadapter__rounds=rounds)
    assert search.best_estimator_[-1].n_rounds_ == 8


def test_shuffled_splits_of_rounds_are_told(lived):
    X, y, rounds, classifier = lived
    adapter = PerformativeAdapter(FrozenEstimator(classifier), **QUICK)
    train = np.isin(rounds, next(KFold(4, shuffle=True, random_state=0).split(np.arange(8)))[0])
    with pytest.warns(PerformativeWarning, match="RoundForwardSplit"):
        adapter.fit(X[train], y[train], rounds=rounds[train])


def test_one_step_scorer(lived):
    X, y, rounds, classifier = lived
    adapter = PerformativeAdapter(FrozenEstimator(classifier), **QUICK)
    early = rounds < 5
    adapter.fit(X[early], y[early], rounds=rounds[early])
    proba = adapter.replay(X[~early], y[~early], rounds=rounds[~early])
    expected = -log_loss(y[~early], proba, labels=[0, 1, 2])
    assert one_step_scorer(adapter, X[~early], y[~early], rounds[~early]) == pytest.approx(expected)
    pipeline = make_pipeline(StandardScaler().fit(X), FrozenEstimator(adapter))
    assert pipeline[:-1].transform(X).shape == X.shape
    found = accuracy_score(y[~early], proba.argmax(axis=1))
    assert adapter.score(X[~early], y[~early], rounds=rounds[~early]) == pytest.approx(found)


def test_one_step_scorer_is_routed(lived):
    X, y, rounds, classifier = lived
    with config_context(enable_metadata_routing=True):
        adapter = PerformativeAdapter(FrozenEstimator(classifier), **QUICK)
        adapter.set_fit_request(rounds="groups")
        scores = cross_val_score(
            make_pipeline(FunctionTransformer(), adapter),
            X,
            y,
            cv=RoundForwardSplit(3, 2),
            scoring=one_step_scorer.set_score_request(rounds="groups"),
            params={"groups": rounds},
        )
        assert scores.shape == (2,)
        assert (scores < 0).all()
    assert repr(one_step_scorer) == "one_step_scorer"
    with pytest.raises(TypeError, match="scores a PerformativeAdapter, not a LogisticRegression"):
        one_step_scorer(classifier, X, y)


def test_rounds_in_an_order_of_their_own_are_split_in_that_order():
    names = ["mon", "tue", "wed", "thu"]
    days = pd.Categorical(np.repeat(names, 2), categories=names, ordered=True)
    train, test = next(RoundForwardSplit().split(np.zeros((8, 1)), groups=days))
    assert (set(days[train]), set(days[test])) == ({"mon", "tue", "wed"}, {"thu"})
    with pytest.raises(ValueError, match="order is not that of their numbers"):
        RoundForwardSplit().get_n_splits(groups=["r8", "r9", "r10", "r11"])


def test_the_scorer_asks_for_rounds_under_the_name_it_is_told():
    with config_context(enable_metadata_routing=True):
        asking = one_step_scorer.set_score_request(rounds="groups")
        assert asking._get_metadata_request().score.requests == {"rounds": "groups"}
        assert one_step_scorer._get_metadata_request().score.requests.get("rounds") != "groups"
