"""What the parameters of InfluenceScorer may be."""

from numbers import Integral, Real

from skperf.backbone._sklearn import Interval, StrOptions
from skperf.influence.methods import METHODS

TARGETS = ("loss", "log_odds", "logit", "margin", "proba")

CONSTRAINTS = {
    "estimator": "no_validation",
    "method": [StrOptions({"auto", *METHODS})],
    "parameters": [str, list, tuple],
    "target": [StrOptions(set(TARGETS)), callable],
    "curvature": [StrOptions({"ggn", "hessian", "empirical"})],
    "damping": [
        Interval(Real, 0, None, closed="neither"),
        StrOptions({"auto", "horizon", "flow"}),
    ],
    "horizon": [Interval(Integral, 1, None, closed="left"), None],
    "learning_rate": [Interval(Real, 0, None, closed="neither"), "array-like", None],
    "kept_trace": [Interval(Real, 0, 1, closed="right")],
    "max_rows": [Interval(Integral, 1, None, closed="left"), None],
    "rank": [Interval(Integral, 1, None, closed="left"), None],
    "n_components": [Interval(Integral, 1, None, closed="left")],
    "n_projections": [Interval(Integral, 1, None, closed="left")],
    "checkpoints": [list, tuple, None],
    "select": [StrOptions({"output", "gradient", "sam", "random"})],
    "ratio": [Interval(Real, 0, 1, closed="right")],
    "ridge": [Interval(Real, 0, None, closed="neither")],
    "n_iterations": [Interval(Integral, 1, None, closed="left"), None],
    "tol": [Interval(Real, 0, None, closed="neither")],
    "lissa_scale": [Interval(Real, 0, None, closed="neither"), None],
    "candidates": [Interval(Integral, 1, None, closed="left"), None],
    "gradients": [StrOptions({"factorised", "reference"})],
    "batch_size": [Interval(Integral, 1, None, closed="left"), None],
    "memory_budget": [str, Interval(Real, 0, None, closed="neither")],
    "storage": "no_validation",
    "random_state": ["random_state"],
    "n_jobs": [Integral, None],
    "verbose": ["verbose"],
}
