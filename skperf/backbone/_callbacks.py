"""Callbacks of scikit-learn, where the installed version has them, and the ends of skorch's."""

from collections.abc import Callable
from dis import opmap
from functools import wraps
from typing import Any

from skorch.callbacks import Callback

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn 1.8

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin: no callbacks can be set."""


__all__ = ["CallbackSupportMixin", "StopTraining", "raised_by_callback", "tells_callbacks"]


def tells_callbacks(fit: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a ``fit`` so that scikit-learn's callbacks hear of its beginning and end."""
    # Goes below `fit_context`, which takes the callbacks down again.

    @wraps(fit)
    def told(estimator: Any, X: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not getattr(estimator, "_skl_callbacks", None):
            return fit(estimator, X, y, *args, **kwargs)
        task = estimator._init_callback_context()
        task.call_on_fit_task_begin(estimator=estimator, X=X, y=y)
        fitted = fit(estimator, X, y, *args, **kwargs)
        # the estimator is fitted by now: nothing has to be set for callbacks to use it
        task.call_on_fit_task_end(estimator=estimator, X=X, y=y, reconstruction_attributes=dict)
        return fitted

    return told


class StopTraining(Exception):
    """A callback asks for the end of training."""


def raised_by_callback(error: BaseException) -> bool:
    """Whether a statement of a callback raised an error, and no signal that fell into it."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not isinstance(last.tb_frame.f_locals.get("self"), Callback):
        return False
    return last.tb_frame.f_code.co_code[last.tb_lasti] == opmap["RAISE_VARARGS"]
