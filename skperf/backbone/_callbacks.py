"""Scikit-learn's fit callbacks, where the installed version has them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn 1.8

    class CallbackSupportMixin:  # type: ignore[no-redef]
        """Stands in for scikit-learn's mixin: no callbacks can be set."""


__all__ = ["CallbackSupportMixin", "tells_callbacks"]


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
