"""Scikit-learn's fit callbacks, where the installed version has them."""

from contextlib import contextmanager

from skorch.callbacks import Callback
from tqdm.auto import tqdm

try:
    from sklearn.callback import CallbackSupportMixin
except ImportError:  # scikit-learn 1.8

    class CallbackSupportMixin:
        """Stands in for scikit-learn's mixin: no callbacks can be set."""


__all__ = ["CallbackSupportMixin", "EpochTasks", "fit_tasks"]


@contextmanager
def fit_tasks(estimator, *, total, description, X=None, y=None):
    """Report the steps of a fit: a bar when `verbose`, and scikit-learn's callbacks.

    Parameters
    ----------
    estimator : estimator with CallbackSupportMixin
        Its ``fit`` is under way and decorated with ``fit_context``.
    total : int
        Number of steps.
    description : str
        What the bar and the callbacks call a step.
    X, y : object, optional
        Rows and labels that callbacks may score on.

    Yields
    ------
    callable
        Call it after each step, optionally with a function that returns the fitted
        attributes so far; it returns True when a callback asks for the end of the fit.
    """
    root = None
    if getattr(estimator, "_skl_callbacks", None):
        root = estimator._init_callback_context(max_subtasks=total)
        root.call_on_fit_task_begin(estimator=estimator, X=X, y=y)
    bar = tqdm(total=total, desc=description, disable=not estimator.verbose, leave=False)

    def step(attributes=None):
        bar.update()
        if root is None:
            return False
        task = root.subcontext(task_name=description)
        task.call_on_fit_task_begin(estimator=estimator, X=X, y=y)
        return task.call_on_fit_task_end(
            estimator=estimator, X=X, y=y, reconstruction_attributes=attributes
        )

    with bar:
        yield step
        if root is not None:
            root.call_on_fit_task_end(estimator=estimator, X=X, y=y)


class EpochTasks(Callback):
    """Skorch callback that reports every epoch as a step.

    Parameters
    ----------
    step : callable
        What :func:`fit_tasks` yields.
    attributes : callable, optional
        ``attributes(net)`` returns the fitted attributes so far.
    """

    def __init__(self, step, attributes=None):
        self.step = step
        self.attributes = attributes

    def on_epoch_end(self, net, **kwargs):
        """Report the epoch; end the training where a callback asks for it.

        Parameters
        ----------
        net : skorch net
            In training.
        **kwargs : dict
            Not used.
        """
        attributes = None if self.attributes is None else lambda: self.attributes(net)
        if self.step(attributes):
            raise KeyboardInterrupt
