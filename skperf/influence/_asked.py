"""What methods of the scorer may be asked: one table of their arguments."""

from numbers import Integral, Real
from typing import Any

import numpy as np

from skperf.backbone._sklearn import Interval, Options, StrOptions, validate_parameter_constraints
from skperf.influence._methods import _COUNT, SELECTIONS
from skperf.influence.generalized import REMOVALS
from skperf.influence.retraining import Recipe

_POSITIVE = Interval(Real, 0, None, closed="neither")
_INSIDE = Interval(Real, 0, 1, closed="neither")
_ALLOWED: dict[str, Any] = {
    "aggregate": [StrOptions({"sum", "mean"}), None],
    "baseline": ["boolean"],
    "baselines": ["boolean"],
    "batch_size": _COUNT,
    "change": [StrOptions({"weight", "label"})],
    "class_aware": ["boolean"],
    "damping": [_POSITIVE, StrOptions({"auto", "horizon", "flow"})],
    "drop": [_INSIDE, None],
    "fraction": [_INSIDE],
    "horizon": [*_COUNT, None],
    "k": _COUNT,
    "kind": [StrOptions({"proponents", "opponents"})],
    "learning_rate": [_POSITIVE, None],
    "least": [Interval(Real, -1, 1, closed="both")],
    "max_drop": [Interval(Real, 0, None, closed="left")],
    "max_iter": _COUNT,
    "max_steps": _COUNT,
    "n_subsets": [Interval(Integral, 2, None, closed="left")],
    "n_train": _COUNT,
    "norm": [Options(Real, {2, np.inf})],
    "order": [Options(Integral, {1, 2})],
    "precondition": ["boolean", StrOptions({"auto"})],
    "radius": [Interval(Real, 0, None, closed="left")],
    "ratio": [Interval(Real, 0, 1, closed="right"), None],
    "recipe": [Recipe, None],
    "ridge": [Interval(Real, 0, None, closed="left"), None],
    "select": [StrOptions(set(SELECTIONS)), None],
    "tokens": [StrOptions({"queries", "rows"}), None],
    "weight_decay": [Interval(Real, 0, None, closed="left"), None],
}
_WAYS = {"repair": {"ascend", "descend", "relabel"}, "remove": set(REMOVALS)}


def checked(method: str, **given: Any) -> dict[str, Any]:
    """Refuse what the arguments of a method can't be."""
    allowed = _ALLOWED | {"how": [StrOptions(_WAYS.get(method, set()))]}
    validate_parameter_constraints(allowed, given, method)
    return given


def pair(given: Any, name: str) -> tuple[Any, Any]:
    """Take rows and their targets apart."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise ValueError(f"{name} must be a pair (X, y), got {type(given).__name__}.")
    return given[0], given[1]


def steps_of(given: Any) -> list[int]:
    """Read numbers of training steps, in ascending order."""
    values = np.asarray(given)
    if values.ndim != 1 or values.dtype.kind not in "iu" or not (values.size and values.min() > 0):
        raise ValueError(f"steps must be positive numbers of training steps, got {given!r}.")
    return sorted({int(step) for step in values})
