"""Influence methods as records that own their options, searched as ``method__rank``."""

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from sklearn.base import BaseEstimator

from skperf.backbone._sklearn import Interval, StrOptions, validate_parameter_constraints

_COUNT = [Interval(Integral, 1, None, closed="left")]
_POSITIVE = [Interval(Real, 0, None, closed="neither")]
_SHARE = [Interval(Real, 0, 1, closed="right")]
SELECTIONS = ("gradient", "output", "sam", "random")
_ALLOWED: dict[str, Any] = {
    "betas": [tuple, list],
    "eps": _POSITIVE,
    "folder": [str, None],
    "kept_trace": _SHARE,
    "learning_rate": [*_POSITIVE, "array-like"],
    "max_iter": _COUNT,
    "max_rows": [*_COUNT, None],
    "moments": [list, tuple, None],
    "n_components": _COUNT,
    "n_projections": _COUNT,
    "n_repeats": _COUNT,
    "n_samples": [*_COUNT, None],
    "n_steps": [*_COUNT, "array-like", None],
    "normalize": ["boolean"],
    "rank": [*_COUNT, None],
    "ratio": _SHARE,
    "ridge": _POSITIVE,
    "run": "no_validation",
    "scale": [*_POSITIVE, None],
    "select": [StrOptions(set(SELECTIONS))],
    "tol": _POSITIVE,
    "tolerance": [Interval(Real, 0, 1, closed="left")],
}


class Method(BaseEstimator):
    """A way to estimate influence, with its options."""

    name: ClassVar[str]
    curvatures: ClassVar[tuple[str, ...]] = ("ggn", "hessian")

    def options(self) -> dict[str, Any]:
        """Validate and state the options.

        Returns
        -------
        dict
            Options by name.
        """
        own: dict[str, Any] = self.get_params(deep=False)
        allowed = {**_ALLOWED, "curvature": [StrOptions(set(self.curvatures))]}
        validate_parameter_constraints(allowed, own, type(self).__name__)
        return own


class GradientDot(Method):
    """Inner products of gradients, TracIn at the final weights alone."""

    name = "gradient_dot"


@dataclass(eq=False, repr=False)
class TracIn(Method):
    """Inner products of gradients, summed over the scorer's `checkpoints`.

    Parameters
    ----------
    learning_rate : float or list of float, default=1.0
        Weight of every checkpoint, or of each.
    normalize : bool, default=False
        Whether gradients are scaled to length one first: their cosine. With `moments`, the
        scores are those that LESS selects data by (arXiv 2402.04333).
    moments : list of dict, optional
        Of each checkpoint the state of Adam, by name of parameter: ``exp_avg``,
        ``exp_avg_sq`` and ``step``, as ``torch.optim.Adam`` keeps them. Gradients of training
        rows then become the step that Adam would take.
    betas : tuple of float, default=(0.9, 0.999)
        Of that step.
    eps : float, default=1e-8
        Of that step.
    """

    name = "tracin"
    learning_rate: Any = 1.0
    normalize: Any = False
    moments: Any = None
    betas: Any = (0.9, 0.999)
    eps: Any = 1e-8


@dataclass(eq=False, repr=False)
class GGN(Method):
    """Gauss-Newton curvature from its largest rows and a sample of the others.

    Parameters
    ----------
    kept_trace : float, default=0.95
        As many rows are taken as the largest would need for this share of the trace at the
        outputs: the largest, and a sample that stands for the rest.
    max_rows : int or None, default=1000
        Most rows.
    curvature : {"ggn", "empirical"}, default="ggn"
        With the exact expectation over labels, or the second moment of training gradients.
    """

    name = "ggn"
    curvatures = ("ggn", "empirical")
    kept_trace: Any = 0.95
    max_rows: Any = 1000
    curvature: Any = "ggn"


@dataclass(eq=False, repr=False)
class EKFAC(Method):
    """Kronecker-factored eigenbasis with exact second moments in it.

    Parameters
    ----------
    rank : int or None, default=8
        Most terms of the separable score; None for the exact one.
    curvature : {"ggn", "empirical"}, default="ggn"
        As of :class:`GGN`.
    """

    name = "ekfac"
    curvatures = ("ggn", "empirical")
    rank: Any = 8
    curvature: Any = "ggn"


class KFAC(EKFAC):
    """Kronecker-factored curvature.

    Parameters
    ----------
    rank : int or None, default=8
        Most terms of the separable score; None for the exact one.
    curvature : {"ggn", "empirical"}, default="ggn"
        As of :class:`GGN`.
    """

    name = "kfac"


@dataclass(eq=False, repr=False)
class Arnoldi(Method):
    """Dominant eigenpairs of the curvature from a Krylov space.

    Parameters
    ----------
    n_components : int, default=100
        Eigenpairs that are kept.
    max_iter : int, default=200
        Size of the Krylov space.
    curvature : {"ggn", "hessian"}, default="ggn"
        Gauss-Newton, or the Hessian itself.
    """

    name = "arnoldi"
    n_components: Any = 100
    max_iter: Any = 200
    curvature: Any = "ggn"


@dataclass(eq=False, repr=False)
class CG(Method):
    """Conjugate gradients.

    Parameters
    ----------
    tol : float, default=0.0001
        Relative residual.
    max_iter : int, default=500
        Most iterations.
    curvature : {"ggn", "hessian"}, default="ggn"
        Gauss-Newton, or the Hessian itself.
    """

    name = "cg"
    tol: Any = 1e-4
    max_iter: Any = 500
    curvature: Any = "ggn"


@dataclass(eq=False, repr=False)
class LiSSA(Method):
    """Stochastic Neumann series.

    Parameters
    ----------
    scale : float, optional
        Divisor of the series, above the largest curvature; estimated by default.
    n_samples : int, optional
        Rows drawn for each term; by default 256 or `batch_size`.
    n_repeats : int, default=1
        Independent series, whose mean is taken.
    tol : float, default=0.0001
        Relative size of the last term.
    max_iter : int, default=5000
        Most terms.
    curvature : {"ggn", "hessian"}, default="ggn"
        Gauss-Newton, or the Hessian itself.
    """

    name = "lissa"
    scale: Any = None
    n_samples: Any = None
    n_repeats: Any = 1
    tol: Any = 1e-4
    max_iter: Any = 5000
    curvature: Any = "ggn"


@dataclass(eq=False, repr=False)
class TRAK(Method):
    """Kernel of randomly projected gradients of the log odds.

    Parameters
    ----------
    n_projections : int, default=512
        Coordinates.
    """

    name = "trak"
    n_projections: Any = 512


class DataInf(Method):
    """Mean of inverses in place of the inverse of the mean, tensor by tensor."""

    name = "datainf"


@dataclass(eq=False, repr=False)
class GIF(Method):
    """Generalised influence on few parameters (arXiv 2312.05586).

    Parameters
    ----------
    select : {"gradient", "output", "sam", "random"}, default="gradient"
        Units of largest mean output gradient or mean pre-activation, weights of largest
        gradient^2 / curvature, or units at random.
    ratio : float, default=0.05
        Share of the parameters that may change.
    ridge : float, default=0.001
        Penalty of the least-squares problem, relative to the largest eigenvalue of its normal
        equations.
    tol : float, default=0.0001
        Relative tolerance.
    max_iter : int, default=50
        Most iterations.
    curvature : {"hessian", "ggn"}, default="hessian"
        The Hessian, or Gauss-Newton.
    """

    name = "gif"
    select: Any = "gradient"
    ratio: Any = 0.05
    ridge: Any = 1e-3
    tol: Any = 1e-4
    max_iter: Any = 50
    curvature: Any = "hessian"


@dataclass(eq=False, repr=False)
class Exact(Method):
    """Dense curvature in double precision, for small networks.

    Parameters
    ----------
    curvature : {"ggn", "hessian"}, default="ggn"
        Gauss-Newton, or the Hessian itself.
    """

    name = "exact"
    curvature: Any = "ggn"


@dataclass(eq=False, repr=False)
class Replay(Method):
    """The derivative of the whole training run, by going back through its steps.

    Parameters
    ----------
    run : TrainingRun, optional
        The run that trained the network, where it was not trained by the scorer.
    tolerance : float, default=0.0001
        Largest relative error of a query's gradient in the directions that go back for all.
        Fewer directions cost less, and their scores depend on what else was asked.
    folder : str, optional
        Where checkpoints are kept, and an interrupted pass goes on from; by default in memory.
    """

    name = "replay"
    run: Any = None
    tolerance: Any = 1e-4
    folder: Any = None


@dataclass(eq=False, repr=False)
class Source(Method):
    """Through a training that is over, by its checkpoints (SOURCE, arXiv 2405.12186).

    Each of the scorer's `checkpoints` stands for a stretch of training, with its gradients and
    its Gauss-Newton curvature; the last one ends at the estimator's weights. Without checkpoints
    the estimator's weights stand for all of it: influence damped by its horizon.

    Parameters
    ----------
    n_steps : int or list of int, optional
        Steps of training that each checkpoint stands for; by default the scorer's `horizon`.
        Their rate is the scorer's `learning_rate`, one number or a list.
    kept_trace : float, default=0.95
        As of :class:`GGN`.
    max_rows : int or None, default=1000
        As of :class:`GGN`.
    """

    name = "source"
    n_steps: Any = None
    kept_trace: Any = 0.95
    max_rows: Any = 1000


@dataclass(eq=False, repr=False)
class Nearest(BaseEstimator):
    """Training rows that are scored: those nearest to the query in the last features.

    Parameters
    ----------
    k : int, default=100
        How many.
    per_class : bool, default=False
        Whether so many of every class.
    """

    k: Any = 100
    per_class: Any = False


_FIRST_ORDER = (GradientDot, TracIn, TRAK, Replay)
_CURVED = (GGN, Source, EKFAC, KFAC, Arnoldi, CG, LiSSA, DataInf, GIF, Exact)
RECORDS: dict[str, type[Method]] = {record.name: record for record in (*_FIRST_ORDER, *_CURVED)}


def nearest_rows(given: int | Nearest | None) -> Nearest | None:
    """Make candidates a record, and validate it."""
    if given is None:
        return None
    near = given if isinstance(given, Nearest) else Nearest(given)
    allowed = {"k": _COUNT, "per_class": ["boolean"]}
    validate_parameter_constraints(allowed, near.get_params(), "Nearest")
    return near


def resolve_method(method: str | Method) -> Method | None:
    """Find the record of a method; None for "auto"."""
    if isinstance(method, Method):
        return method
    return None if method == "auto" else RECORDS[method]()
