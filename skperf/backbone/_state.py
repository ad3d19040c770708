"""All or nothing: a call that breaks off leaves the estimator as it was."""

from contextlib import contextmanager


@contextmanager
def unchanged_on_error(estimator):
    """Undo all that a call did to an estimator if it is broken off, by Ctrl-C too.

    Parameters
    ----------
    estimator : object
        Its attributes are put back; what they hold is not copied.

    Yields
    ------
    None
        Nothing.
    """
    before = dict(vars(estimator))
    try:
        yield
    except BaseException:
        vars(estimator).clear()
        vars(estimator).update(before)
        raise
