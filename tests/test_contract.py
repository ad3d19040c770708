"""The public names, their arguments and their defaults."""

import inspect
import subprocess
import sys

import pytest

import skperf
import skperf.metrics
from skperf.datasets import PerformativeStream
from skperf.model_selection import RoundForwardSplit

# constructor: (positional, {keyword: default}); methods: {name: arguments}
ESTIMATORS = {
    "PerformativeAdapter": (
        {
            "estimator": None,
            "adapter": "auto",
            "statistic": "recall",
            "objective": "marginal",
            "base_prior": "fit",
            "calibration": None,
            "strength": "auto",
            "mix": "auto",
            "transductive": None,
            "worst_recall_floor": None,
            "random_state": None,
            "verbose": 0,
        },
        {
            "fit": ["X", "y", "rounds", "deployed_pred", "sample_weight"],
            "partial_fit": ["X", "y", "rounds", "classes"],
            "fit_trajectory": ["statistics", "label_counts"],
            "predict": ["X", "statistic"],
            "predict_proba": ["X", "statistic"],
            "decision_function": ["X", "statistic"],
            "predict_prior": ["statistic", "return_interval"],
            "statistic_of": ["estimator", "X", "y"],
            "rank_models": ["candidates", "X", "y", "scoring", "n_bootstrap"],
            "stable_point": ["X", "y"],
            "score": ["X", "y", "rounds"],
            "diagnose": [],
        },
    ),
    "Reprogrammer": (
        {
            "encoder": None,
            "class_names": None,
            "prompts": "a photo of a {}",
            "layout": "overlay",
            "border": 16,
            "init": "zeros",
            "text": "auto",
            "head": "auto",
            "mapping": "blm",
            "objective": "cross_entropy",
            "alpha": "auto",
            "ood_score": "auto",
            "ood_temperature": 1.0,
            "ood_retention": 0.95,
            "max_epochs": 25,
            "batch_size": 128,
            "gradient": "exact",
            "device": None,
            "random_state": None,
            "verbose": 0,
            "processor": None,
            "tokenizer": None,
            "pixels": None,
            "training": None,
        },
        {
            "fit": ["X", "y", "sample_weight"],
            "partial_fit": ["X", "y"],
            "predict": ["X"],
            "predict_proba": ["X"],
            "decision_function": ["X"],
            "score_samples": ["X"],
            "predict_inlier": ["X"],
            "transform": ["X"],
            "reprogram": ["X"],
            "alpha_path": ["X", "y", "alphas"],
            "save_program": ["path"],
            "load_program": ["path"],
            "to_module": [],
            "with_classes": ["names"],
        },
    ),
    "InfluenceScorer": (
        {
            "estimator": None,
            "method": "auto",
            "loss": "auto",
            "parameters": "all",
            "output": "loss",
            "damping": "auto",
            "horizon": None,
            "checkpoints": None,
            "candidates": None,
            "random_state": None,
            "n_jobs": None,
            "verbose": 0,
        },
        {
            "fit": ["X", "y", "sample_weight"],
            "influence": ["X", "y", "out", "aggregate", "rows", "tokens"],
            "transform": ["X"],
            "self_influence": ["X", "y"],
            "top_k": ["X", "y", "k", "kind"],
            "group_influence": ["groups", "X", "y", "order"],
            "detect_mislabels": ["class_aware", "reference"],
            "loo_effect": ["X", "y"],
            "radius_effect": ["X", "y", "radius", "norm"],
            "fading": ["X", "y", "steps", "n_train"],
            "diagnose": ["X", "y"],
            "repair": ["X", "y", "k", "how", "max_steps", "guard", "max_drop"],
            "remove": ["indices", "class_"],
            "score": ["X", "y"],
        },
    ),
    "ComponentAttributor": (
        {
            "estimator": None,
            "components": "auto",
            "ablation": "zero",
            "output": "margin",
            "fraction": 0.05,
            "method": "auto",
            "budget": 512,
            "regressor": "ridge",
            "random_state": None,
            "n_jobs": None,
            "verbose": 0,
        },
        {
            "fit": ["X", "y"],
            "partial_fit": ["X", "y"],
            "transform": ["X"],
            "attribute": ["X", "y"],
            "predict_counterfactual": ["masks", "X", "y"],
            "counterfactual": ["masks", "X", "y"],
            "score": ["X", "y", "n_masks", "fraction"],
            "top_components": ["k"],
            "edit": [
                "target",
                "reference",
                "k",
                "direction",
                "criterion",
                "guard",
                "max_drop",
            ],
            "ablate": ["mask"],
        },
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_constructor(name):
    expected, _ = ESTIMATORS[name]
    parameters = inspect.signature(getattr(skperf, name)).parameters
    first, *others = parameters.values()
    assert first.name == next(iter(expected))
    assert all(p.kind is p.KEYWORD_ONLY for p in others)
    for argument, default in expected.items():
        assert argument in parameters
        if default is not ...:
            assert parameters[argument].default == default, argument


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in ESTIMATORS for method in ESTIMATORS[name][1]]
)
def test_method(name, method):
    arguments = ESTIMATORS[name][1][method]
    signature = inspect.signature(getattr(getattr(skperf, name), method))
    assert set(arguments) <= set(signature.parameters)
    required = [a for a in arguments if a in ("X", "y", "masks", "groups", "target", "path")]
    assert [a for a in signature.parameters if a in required] == required


def test_other_public_names():
    for name in (
        "AlphaPathDisplay",
        "Component",
        "ComponentDisplay",
        "ComponentEditor",
        "EditPathDisplay",
        "EditedClassifier",
        "FadingDisplay",
        "InfluenceDisplay",
        "Net",
        "OODScoreDisplay",
        "TrajectoryDisplay",
        "default_net",
        "from_module",
    ):
        assert name in skperf.__all__
        assert inspect.getdoc(getattr(skperf, name))
    for name in (
        "linear_datamodeling_score",
        "counterfactual_correlation",
        "ood_auroc",
        "fpr_at_95_tpr",
        "accuracy_under_prior",
        "atc_accuracy",
    ):
        assert callable(getattr(skperf.metrics, name))


@pytest.mark.parametrize(
    "name",
    [
        "TrajectoryDisplay",
        "AlphaPathDisplay",
        "OODScoreDisplay",
        "InfluenceDisplay",
        "FadingDisplay",
        "ComponentDisplay",
        "EditPathDisplay",
    ],
)
def test_displays_have_scikit_learns_form(name):
    display = getattr(skperf, name)
    assert callable(display.from_estimator)
    assert callable(display.from_predictions)
    assert "ax" in inspect.signature(display.plot).parameters


def test_splitter_and_stream():
    split = inspect.signature(RoundForwardSplit).parameters
    assert [split[p].default for p in ("min_train_rounds", "test_rounds", "gap")] == [3, 1, 0]
    stream = inspect.signature(PerformativeStream).parameters
    expected = {"response": "adversarial", "temperature": 0.1, "train_size": 1000}
    expected |= {"test_size": 2000, "random_state": None, "floor": 0}
    assert {name: stream[name].default for name in expected} == expected


HEAVY = "{'matplotlib', 'pandas', 'transformers', 'open_clip', 'dask', 'distributed'}"


def test_import_stays_light():
    # skorch and scikit-learn may import pandas where it is installed; skperf adds nothing
    code = f"""
import sys, skorch
before = {HEAVY} & set(sys.modules)
import skperf
sys.exit(sorted({HEAVY} & set(sys.modules) - before) or 0)
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
