"""What fit has learned answers alone: not today's parameters, not today's weights."""

import pickle

import numpy as np
import pytest
import torch

from tests.test_untouched import CALLS, QUERY, X, network, y

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")

# calls that fit anew, by their own words
FITTING = {name for name in CALLS if name.endswith((".fit", ".partial_fit"))}
ANSWERS = sorted(set(CALLS) - FITTING - {"from_module.predict_proba", "from_module.predict"})
EDITED = "EditedClassifier.predict_proba"


class Nonsense:
    """No value of any parameter."""


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != EDITED])
def test_after_set_params_every_method_answers_as_fitted(name):
    make, call = CALLS[name]
    estimator = make(network())
    expected = np.asarray(call(estimator))
    estimator.set_params(**{p: Nonsense() for p in estimator.get_params(deep=False)})
    np.testing.assert_array_equal(np.asarray(call(estimator)), expected)


# they measure the classifiers they are given, as these are now
MEASURING = {"PerformativeAdapter.statistic_of", "PerformativeAdapter.rank_models"}


@pytest.mark.parametrize("name", sorted(set(ANSWERS) - MEASURING - {EDITED}))
def test_weights_that_changed_since_are_refused_by_name(name):
    make, call = CALLS[name]
    module = network()
    estimator = make(module)
    call(estimator)
    weight = module.output.weight.detach().clone()
    # no version counter notices this
    module.output.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match=r"changed|not those that fit has seen"):
        call(estimator)
    module.output.weight.data.copy_(weight)
    call(estimator)


def test_a_change_of_mode_or_of_flags_is_no_change_of_weights():
    for name in ("InfluenceScorer.influence", "ComponentAttributor.counterfactual"):
        make, call = CALLS[name]
        module = network()
        estimator = make(module)
        expected = np.asarray(call(estimator))
        module.eval().requires_grad_(False)
        np.testing.assert_array_equal(np.asarray(call(estimator)), expected)


def test_an_edited_classifier_keeps_its_own_weights():
    make, call = CALLS[EDITED]
    module = network()
    edited = make(module)
    expected = call(edited)
    with torch.no_grad():
        module.output.weight.mul_(1.5)
    np.testing.assert_array_equal(call(edited), expected)


@pytest.mark.parametrize("name", ANSWERS)
def test_pickles_answer_alike(name):
    make, call = CALLS[name]
    estimator = make(network())
    expected = np.asarray(call(estimator))
    again = pickle.loads(pickle.dumps(estimator))
    np.testing.assert_allclose(np.asarray(call(again)), expected, rtol=1e-5, atol=1e-6)


def test_a_fit_that_breaks_off_leaves_the_last_one():
    for name in ("InfluenceScorer.influence", "ComponentAttributor.attribute"):
        make, call = CALLS[name]
        estimator = make(network())
        expected = np.asarray(call(estimator))
        with pytest.raises(ValueError):
            estimator.fit(np.full_like(X[QUERY], np.nan), y[QUERY])
        np.testing.assert_array_equal(np.asarray(call(estimator)), expected)
