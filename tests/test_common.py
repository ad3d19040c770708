"""scikit-learn's own checks on every estimator."""

import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from skperf import (
    ComponentAttributor,
    ComponentEditor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    Reprogrammer,
    default_net,
)

ESTIMATORS = [
    PerformativeAdapter(),
    PerformativeAdapter(LogisticRegression()),
    Reprogrammer(max_epochs=5),
    InfluenceScorer(),
    ComponentAttributor(budget=30),
    ComponentEditor(attributor=ComponentAttributor(budget=30), random_state=0),
    default_net(random_state=0),
]
# hundreds of ablations and epochs on tables of twenty rows
WITH_DEFAULTS = [Reprogrammer(), ComponentAttributor(), ComponentEditor(random_state=0)]
WEIGHTS = "check_sample_weight_equivalence_on_dense_data"
EXPECTED = {
    Net: {
        "check_no_attributes_set_in_init": "skorch keeps `module__...` and its like, and its "
        "history, as attributes from the start"
    },
    Reprogrammer: {
        WEIGHTS: "programs train in float32 by shuffled batches, and a part of the rows is held "
        "out for alpha and the threshold"
    },
    InfluenceScorer: {
        WEIGHTS: "a row given twice has two columns of influence, a row of weight two has one"
    },
}


def checks_on(estimators):
    """Parametrize a test with the checks of some estimators."""
    return parametrize_with_checks(
        estimators,
        expected_failed_checks=lambda estimator: EXPECTED.get(type(estimator), {}),
        xfail_strict=True,
    )


@checks_on(ESTIMATORS)
def test_estimator_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@checks_on(WITH_DEFAULTS)
def test_estimator_checks_with_defaults(estimator, check):
    check(estimator)


# what check_estimator leaves out
BY_HAND = [
    "check_param_validation",
    "check_dataframe_column_names_consistency",
]
FOR_TRANSFORMERS = [
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_set_output_transform",
    "check_set_output_transform_pandas",
    "check_global_output_transform_pandas",
    "check_get_feature_names_out_error",
]


@pytest.mark.parametrize(
    ("estimator", "check"),
    [
        (estimator, check)
        for estimator in ESTIMATORS
        for check in BY_HAND + (FOR_TRANSFORMERS if hasattr(estimator, "transform") else [])
        # a skorch net takes settings that its constructor does not name, `module__...`
        if not (isinstance(estimator, Net) and check == "check_param_validation")
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value)[:40],
)
@pytest.mark.filterwarnings("ignore:X .* feature names")
def test_checks_left_out(estimator, check):
    getattr(estimator_checks, check)(type(estimator).__name__, estimator)
