"""What is added to the curvature's eigenvalues."""

from skperf.influence.curvature import RowSpace
from skperf.influence.problem import Problem, Settings, curvature_rows


def horizon_time(settings: Settings) -> float:
    """Learning rate times number of further steps.

    Parameters
    ----------
    settings : Settings
        With `horizon` and `learning_rate`.

    Returns
    -------
    float
        Positive.

    Raises
    ------
    ValueError
        If one of the two is missing.
    """
    if settings.horizon is None or settings.learning_rate is None:
        missing = "horizon" if settings.horizon is None else "learning_rate"
        raise ValueError(
            f"damping tied to a horizon needs {missing}: horizon is the number of further training "
            "steps, learning_rate their step size."
        )
    return settings.horizon * settings.learning_rate


def resolve_damping(problem: Problem, curvature: RowSpace | None = None) -> float:
    """Find the number that is added to the curvature's eigenvalues.

    Parameters
    ----------
    problem : Problem
        With `damping` as given.
    curvature : RowSpace, optional
        Needed for ``"auto"``; made when it is missing.

    Returns
    -------
    float
        Positive.
    """
    settings = problem.settings
    if not isinstance(settings.damping, str):
        return float(settings.damping)
    if settings.damping == "horizon" or settings.horizon is not None:
        return 1 / horizon_time(settings)
    if curvature is None:
        rows = curvature_rows(problem, kept_trace=settings.kept_trace, max_rows=settings.max_rows)
        curvature = RowSpace.of(problem.gather(problem.X, rows.cotangents, rows.examples))
    return max(_AUTO_SHARE * curvature.mean_eigenvalue, _LEAST_DAMPING)


# of the mean eigenvalue, each weighted by itself: benchmarks.influence_damping chose it
_AUTO_SHARE = 0.002
_LEAST_DAMPING = 1e-8


def layer_damping(settings: Settings, mean_eigenvalue: float) -> float:
    """Find the damping of one layer's own curvature.

    Parameters
    ----------
    settings : Settings
        With `damping` as given.
    mean_eigenvalue : float
        Of the layer's curvature.

    Returns
    -------
    float
        Positive; ``"auto"`` is a tenth of the mean eigenvalue.
    """
    if not isinstance(settings.damping, str):
        return float(settings.damping)
    if settings.damping != "auto" or settings.horizon is not None:
        return 1 / horizon_time(settings)
    return max(0.1 * mean_eigenvalue, _LEAST_DAMPING)
