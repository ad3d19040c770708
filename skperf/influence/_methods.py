"""Influence methods as records that own their options, searched as ``method__rank``."""

from numbers import Integral, Real
from typing import Any, ClassVar

from sklearn.base import BaseEstimator

from skperf.backbone._sklearn import Interval, StrOptions, validate_parameter_constraints

_COUNT = [Interval(Integral, 1, None, closed="left")]
_POSITIVE = [Interval(Real, 0, None, closed="neither")]
_SHARE = [Interval(Real, 0, 1, closed="right")]
_OF_ROWS = [StrOptions({"ggn", "empirical"})]
_OF_PRODUCTS = [StrOptions({"ggn", "hessian"})]
SELECTIONS = ("gradient", "output", "sam", "random")


class Method(BaseEstimator):
    """A way to estimate influence, with its options."""

    name: ClassVar[str]
    constraints: ClassVar[dict[str, Any]] = {}

    def options(self) -> dict[str, Any]:
        """Validate and state the options.

        Returns
        -------
        dict
            Options by name.
        """
        own: dict[str, Any] = self.get_params(deep=False)
        validate_parameter_constraints(self.constraints, own, type(self).__name__)
        return own


class GradientDot(Method):
    """Inner products of gradients, TracIn at the final weights alone."""

    name = "gradient_dot"


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
    constraints: ClassVar[dict[str, Any]] = {
        "learning_rate": [*_POSITIVE, "array-like"],
        "normalize": ["boolean"],
        "moments": [list, tuple, None],
        "betas": [tuple, list],
        "eps": _POSITIVE,
    }

    def __init__(
        self, learning_rate=1.0, normalize=False, moments=None, betas=(0.9, 0.999), eps=1e-8
    ):
        self.learning_rate = learning_rate
        self.normalize = normalize
        self.moments = moments
        self.betas = betas
        self.eps = eps


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
    constraints: ClassVar[dict[str, Any]] = {
        "kept_trace": _SHARE,
        "max_rows": [*_COUNT, None],
        "curvature": _OF_ROWS,
    }

    def __init__(self, kept_trace=0.95, max_rows=1000, curvature="ggn"):
        self.kept_trace = kept_trace
        self.max_rows = max_rows
        self.curvature = curvature


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
    constraints: ClassVar[dict[str, Any]] = {"rank": [*_COUNT, None], "curvature": _OF_ROWS}

    def __init__(self, rank=8, curvature="ggn"):
        self.rank = rank
        self.curvature = curvature


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
    constraints: ClassVar[dict[str, Any]] = {
        "n_components": _COUNT,
        "max_iter": _COUNT,
        "curvature": _OF_PRODUCTS,
    }

    def __init__(self, n_components=100, max_iter=200, curvature="ggn"):
        self.n_components = n_components
        self.max_iter = max_iter
        self.curvature = curvature


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
    constraints: ClassVar[dict[str, Any]] = {
        "tol": _POSITIVE,
        "max_iter": _COUNT,
        "curvature": _OF_PRODUCTS,
    }

    def __init__(self, tol=1e-4, max_iter=500, curvature="ggn"):
        self.tol = tol
        self.max_iter = max_iter
        self.curvature = curvature


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
    constraints: ClassVar[dict[str, Any]] = {
        "scale": [*_POSITIVE, None],
        "n_samples": [*_COUNT, None],
        "n_repeats": _COUNT,
        "tol": _POSITIVE,
        "max_iter": _COUNT,
        "curvature": _OF_PRODUCTS,
    }

    def __init__(
        self, scale=None, n_samples=None, n_repeats=1, tol=1e-4, max_iter=5000, curvature="ggn"
    ):
        self.scale = scale
        self.n_samples = n_samples
        self.n_repeats = n_repeats
        self.tol = tol
        self.max_iter = max_iter
        self.curvature = curvature


class TRAK(Method):
    """Kernel of randomly projected gradients of the log odds.

    Parameters
    ----------
    n_projections : int, default=512
        Coordinates.
    """

    name = "trak"
    constraints: ClassVar[dict[str, Any]] = {"n_projections": _COUNT}

    def __init__(self, n_projections=512):
        self.n_projections = n_projections


class DataInf(Method):
    """Mean of inverses in place of the inverse of the mean, tensor by tensor."""

    name = "datainf"


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
    constraints: ClassVar[dict[str, Any]] = {
        "select": [StrOptions(set(SELECTIONS))],
        "ratio": _SHARE,
        "ridge": _POSITIVE,
        "tol": _POSITIVE,
        "max_iter": _COUNT,
        "curvature": _OF_PRODUCTS,
    }

    def __init__(
        self, select="gradient", ratio=0.05, ridge=1e-3, tol=1e-4, max_iter=50, curvature="hessian"
    ):
        self.select = select
        self.ratio = ratio
        self.ridge = ridge
        self.tol = tol
        self.max_iter = max_iter
        self.curvature = curvature


class Exact(Method):
    """Dense curvature in double precision, for small networks.

    Parameters
    ----------
    curvature : {"ggn", "hessian"}, default="ggn"
        Gauss-Newton, or the Hessian itself.
    """

    name = "exact"
    constraints: ClassVar[dict[str, Any]] = {"curvature": _OF_PRODUCTS}

    def __init__(self, curvature="ggn"):
        self.curvature = curvature


class Replay(Method):
    """The derivative of the whole training run, by going back through its steps.

    Parameters
    ----------
    run : TrainingRun, optional
        The run that trained the network, where it was not trained by the scorer.
    tolerance : float, default=0.05
        Largest relative error of a query's gradient in the directions that go back for all.
    folder : str, optional
        Where checkpoints are kept, and an interrupted pass goes on from; by default in memory.
    """

    name = "replay"
    constraints: ClassVar[dict[str, Any]] = {
        "run": "no_validation",
        "tolerance": [Interval(Real, 0, 1, closed="left")],
        "folder": [str, None],
    }

    def __init__(self, run=None, tolerance=0.05, folder=None):
        self.run = run
        self.tolerance = tolerance
        self.folder = folder


class Nearest(BaseEstimator):
    """Training rows that are scored: those nearest to the query in the last features.

    Parameters
    ----------
    k : int, default=100
        How many.
    per_class : bool, default=False
        Whether so many of every class.
    """

    def __init__(self, k=100, per_class=False):
        self.k = k
        self.per_class = per_class


RECORDS: dict[str, type[Method]] = {
    record.name: record
    for record in (
        GradientDot,
        TracIn,
        GGN,
        EKFAC,
        KFAC,
        Arnoldi,
        CG,
        LiSSA,
        TRAK,
        DataInf,
        GIF,
        Exact,
        Replay,
    )
}


def resolve_method(method: str | Method) -> Method | None:
    """Find the record of a method; None for "auto"."""
    if isinstance(method, Method):
        return method
    return None if method == "auto" else RECORDS[method]()
