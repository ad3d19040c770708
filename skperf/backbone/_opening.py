"""Every form that an `estimator` may take, fitted and opened."""

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted, has_fit_parameter
from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier
from skorch.dataset import Dataset
from torch import Tensor, nn

from skperf.backbone._modules import ModuleClassifier, trained_names
from skperf.backbone._nets import Net, default_net, seed_of
from skperf.backbone._sklearn import BaseSearchCV
from skperf.backbone._stock import net_of, own_names
from skperf.backbone.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Loss,
    Penalty,
    SquaredError,
    of_two_classes,
    resolve_loss,
)
from skperf.backbone.network import (
    Network,
    Readout,
    chained,
    log_odds_of_probability,
    log_of_probabilities,
    logits_of_shares,
    two_logits,
)
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import tensor_of
from skperf.backbone.views import view

TINY = float(np.finfo(np.float64).tiny)


# whether skorch's modules draw random numbers and return more than a tensor, once they were run
_SEEN: WeakKeyDictionary[nn.Module, tuple[bool, bool]] = WeakKeyDictionary()


def fit_estimator(estimator: Any, X: Any, y: Any, **options: Any) -> Any:
    """Clone and fit a classifier; what is frozen, a module or has to_module() is used as it is."""
    fitted = _fitted(estimator, X, y, **options)
    inner, _ = _inner(fitted)
    if isinstance(inner, NeuralNet) and inner.module_ not in _SEEN:
        generator, network = torch.Generator().manual_seed(0), open_network(fitted)
        # what doesn't run is refused where it is asked
        with suppress(Exception), torch.no_grad(), drawing_from(generator) as mode:
            returned = network.returned(*next(network.batches(Rows.of(X)[:2])))
            _SEEN[inner.module_] = mode.drawn, not isinstance(returned, Tensor)
    return fitted


def _fitted(
    estimator: Any,
    X: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    random_state: Any = None,
    loss: Loss | None = None,
) -> Any:
    inner = estimator.estimator if isinstance(estimator, FrozenEstimator) else estimator
    if isinstance(inner, nn.Module):
        inner = ModuleClassifier(inner)
    if isinstance(inner, ModuleClassifier):
        return inner._looked_at(Rows.of(X), y, loss)
    if isinstance(estimator, FrozenEstimator):
        check_is_fitted(estimator)
        return estimator
    if callable(getattr(estimator, "to_module", None)):
        if isinstance(estimator, BaseEstimator):
            check_is_fitted(estimator)
        return estimator
    if estimator is None:
        estimator = default_net()
    if not isinstance(estimator, BaseEstimator) or not hasattr(estimator, "fit"):
        raise TypeError(
            "estimator must be a scikit-learn classifier, a skorch net, a torch.nn.Module that "
            f"returns logits, FrozenEstimator(...) of one, or None; got {type(estimator).__name__}."
        )
    warn_if_fitted(estimator)
    rows, fresh = Rows.of(X), clone(estimator)
    if isinstance(fresh, NeuralNetClassifier | NeuralNetBinaryClassifier):
        fresh = net_of(fresh)
    elif isinstance(fresh, NeuralNet):
        return _fit_other_net(fresh, rows, y, sample_weight, seed_of(random_state))
    if random_state is not None and fresh.get_params(deep=False).get("random_state", 0) is None:
        fresh.set_params(random_state=seed_of(random_state))
    if sample_weight is None:
        return fresh.fit(_given(rows, fresh), y)
    if isinstance(fresh, Pipeline):
        step = fresh.steps[-1][0]
        return fresh.fit(_given(rows, fresh), y, **{f"{step}__sample_weight": sample_weight})
    if not has_fit_parameter(fresh, "sample_weight"):
        raise ValueError(f"{type(fresh).__name__}.fit takes no sample_weight.")
    return fresh.fit(_given(rows, fresh), y, sample_weight=sample_weight)


def open_network(fitted: Any, loss: Loss | None = None) -> Network:
    """Open the network of a fitted classifier as a view, linear models and perceptrons exactly."""
    inner, before = _inner(fitted)
    network = _opened(inner)
    own = getattr(inner, "predict_nonlinearity", None)
    if callable(own):
        network = replace(network, probabilities=OwnProbabilities(own, network.readout))
    if before is not None:
        network = replace(network, before=before)
    if loss is None:
        return network
    classes = network.classes if loss.kind == "classes" else None
    return replace(network, loss=loss, classes=classes)


def source_of(fitted: Any) -> nn.Module | None:
    """Find the user's own module, None where an estimator is converted; never to be run."""
    inner, _ = _inner(fitted)
    module: nn.Module | None = None
    if isinstance(inner, nn.Module):
        module = inner
    elif isinstance(inner, ModuleClassifier):
        module = inner.module
    elif isinstance(inner, NeuralNet):
        module = inner.module_
    elif callable(getattr(inner, "to_module", None)):
        module = inner.to_module()
    return module


def class_logits(fitted: Any, X: Any) -> np.ndarray:
    """Log scores (n, n_classes) by any fitted classifier, float64, up to a constant in each row."""
    if has_network(fitted):
        network = open_network(fitted)
        logits, own = network.logits(X), network.probabilities
        if own is not None:
            return log_probabilities(own(logits).numpy(), type(_inner(fitted)[0]).__name__)
        return np.asarray(logits.double().numpy())
    given = _given(X, fitted) if isinstance(X, Rows) else X
    with warnings.catch_warnings():
        # the callers validate names; what reaches here is an array
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
        if hasattr(fitted, "predict_proba"):
            return log_probabilities(fitted.predict_proba(given), type(fitted).__name__)
        if hasattr(fitted, "decision_function"):
            scores: Any = np.asarray(fitted.decision_function(given), dtype=np.float64)
            if scores.ndim == 1:
                scores = np.stack([np.zeros_like(scores), scores], 1)
            return np.asarray(scores)
    raise TypeError(
        "estimator must have predict_proba or decision_function; "
        f"{type(fitted).__name__} has neither."
    )


def has_network(fitted: Any) -> bool:
    """Whether :func:`open_network` would open a classifier."""
    inner, _ = _inner(fitted)
    kinds = (nn.Module, NeuralNet, *(kind for kind, _ in _CONVERSIONS))
    return isinstance(inner, kinds) or callable(getattr(inner, "to_module", None))


@dataclass(frozen=True)
class OwnProbabilities:
    """Probabilities by the nonlinearity of a skorch net, which takes what its module returns."""

    nonlinearity: Callable[[Tensor], Tensor]
    readout: Readout | None

    def __call__(self, outputs: Tensor) -> Tensor:
        """Go back to what the module returned, and on from there: (n, K) -> (n, K)."""
        if self.readout in (two_logits, log_odds_of_probability):
            outputs = outputs[:, 1]
        if self.readout is log_odds_of_probability:
            outputs = outputs.sigmoid()
        return self.nonlinearity(outputs.exp() if self.readout is log_of_probabilities else outputs)


@dataclass(frozen=True)
class Steps:
    """The steps of a fitted pipeline before its network."""

    pipelines: tuple[Any, ...]

    def __call__(self, rows: Rows) -> Rows:
        """Transform rows: (n, ...) -> (n, ...)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
            for pipeline in self.pipelines:
                rows = Rows.of(pipeline.transform(_given(rows, pipeline)))
        return rows


def _inner(fitted: Any) -> tuple[Any, Steps | None]:
    """Look through freezing, searches and pipelines, whose steps before the last are kept."""
    steps: tuple[Any, ...] = ()
    while True:
        if isinstance(fitted, FrozenEstimator):
            fitted = fitted.estimator
        elif isinstance(fitted, BaseSearchCV):
            if not hasattr(fitted, "best_estimator_"):
                raise ValueError(
                    f"estimator is a {type(fitted).__name__} with refit=False, which keeps no "
                    "fitted model: search with refit=True."
                )
            fitted = fitted.best_estimator_
        elif isinstance(fitted, Pipeline):
            if len(fitted.steps) > 1:
                steps = (*steps, fitted[:-1])
            fitted = fitted.steps[-1][1]
        else:
            return fitted, Steps(steps) if steps else None


def _opened(inner: Any) -> Network:
    if isinstance(inner, nn.Module):
        inner = ModuleClassifier(inner)
    if isinstance(inner, ModuleClassifier):
        return inner._to_network()
    if isinstance(inner, NeuralNet):
        return _of_net(inner)
    for kind, conversion in _CONVERSIONS:
        if isinstance(inner, kind):
            return conversion(inner)
    if callable(getattr(inner, "to_module", None)):
        return ModuleClassifier(inner.to_module(), inner.classes_)._to_network()
    raise TypeError(
        f"estimator has no torch network inside: {type(inner).__name__}. Needed is a skorch net, "
        "a torch.nn.Module that returns logits, an object with to_module(), or scikit-learn's "
        "LogisticRegression, Ridge, LinearRegression or MLP."
    )


def _given(X: Any, estimator: Any) -> Any:
    """Rows in the form that an estimator's own methods take: (n, ...)."""
    rows = Rows.of(X)
    if rows.indices is not None:
        whole = len(rows) == len(rows.dataset) and (np.diff(rows.indices) == 1).all()
        return rows.dataset if whole else torch.utils.data.Subset(rows.dataset, list(rows.indices))
    if not isinstance(rows.tree, dict | tuple):
        return rows.tree
    if isinstance(estimator, NeuralNet | Pipeline | BaseSearchCV):
        return rows.tree
    raise TypeError(
        f"X holds several inputs, which {type(estimator).__name__} does not take; a torch network "
        "does."
    )


def log_probabilities(proba: Any, name: str, least: float = TINY) -> np.ndarray:
    """Logarithms of predicted probabilities (n, n_classes), none below `least`; checked."""
    proba = np.asarray(proba, dtype=np.float64)
    if not np.isfinite(proba).all() or (proba < 0).any() or np.abs(proba.sum(-1) - 1).max() > 1e-3:
        raise ValueError(
            f"{name}.predict_proba must return probabilities: finite, not negative, each row "
            f"summing to 1; saw values from {np.nanmin(proba):.4g} to {np.nanmax(proba):.4g} and "
            f"row sums from {np.nanmin(proba.sum(-1)):.4g} to {np.nanmax(proba.sum(-1)):.4g}. "
            "A classifier with decision_function or a torch net gives logits directly."
        )
    return np.asarray(np.log(np.clip(proba, least, None)))


def warn_if_fitted(estimator: Any) -> None:
    """Warn that a fitted estimator is going to be fitted anew."""
    if _is_fitted(estimator):
        warnings.warn(
            f"estimator is a fitted {type(estimator).__name__}, but a clone of it is fitted anew "
            "and its weights are not used. To use it as it is: "
            "sklearn.frozen.FrozenEstimator(estimator).",
            UserWarning,
            stacklevel=4,
        )


def _is_fitted(estimator: Any) -> bool:
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        return False
    return True


def _fit_other_net(net: Any, rows: Rows, y: Any, sample_weight: Any, seed: int) -> Any:
    """Fit a skorch net that is no classifier: its labels, if it has any, are 0, 1, ..."""
    name = type(net).__name__
    if sample_weight is not None:
        raise ValueError(f"{name} takes no sample_weight; leave it out, or use skperf.Net.")
    criterion = net.criterion if isinstance(net.criterion, type) else type(net.criterion)
    labels, targets = None, np.asarray(y)
    if issubclass(criterion, nn.CrossEntropyLoss | nn.NLLLoss):
        labels, targets = np.unique(targets, return_inverse=True)
    elif targets.dtype.kind in "biuf":
        targets = targets.astype(np.float32)
    with drawing_from(torch.Generator().manual_seed(seed)):
        net.initialize()
        inputs = Network(net.module_, None).inputs(rows).map(lambda leaf: leaf.cpu())
        if targets.ndim == 1 and labels is None and criterion.__module__ == nn.MSELoss.__module__:
            _refuse_broadcast(name, view(net.module_), inputs[:2], targets)
        net.partial_fit(inputs.tree, targets)
    if labels is None:
        return net
    network = replace(_of_net(net, labels), module=net.module_)
    return ModuleClassifier(
        network.to_module(), labels, batch_size=network.batch_size, loss=network.loss
    )


def _refuse_broadcast(name: str, module: nn.Module, few: Rows, targets: Any) -> None:
    """Refuse targets (n,) beside outputs (n, 1), which torch's losses make (n, n) of."""
    shape: Any = None
    with suppress(Exception), torch.no_grad():  # what does not run says so in training
        shape = tensor_of(Network(module, None).returned(few)).shape
    if shape == (len(few), 1):
        raise ValueError(
            f"y has shape {targets.shape}, and the module of {name} returns (n, 1): its criterion "
            "would hold every row against all others. Pass y[:, None]."
        )


# methods of skorch by which a net's answers are more than what its module returns
_ANSWERS = {"evaluation_step", "forward", "forward_iter", "get_dataset", "predict_proba"}


def _of_net(net: Any, labels: Any = None) -> Network:
    """Open a skorch net, whose class may have an `infer` of its own."""
    own, name = own_names(net), type(net).__name__
    options = sorted(
        key
        for key in net.get_params(deep=False)
        if key.startswith("dataset__") or key == "iterator_valid__collate_fn"
    )
    lost = [*sorted(_ANSWERS & set(own)), *options]
    if lost or net.dataset is not Dataset:
        raise TypeError(
            f"estimator is a {name} whose own {lost or ['dataset']} would be lost: pass "
            "skperf.from_module(net.module_, classes=net.classes_, forward=..., readout=...), "
            "which says what goes in and comes out, and rows as the module takes them."
        )
    network: Network = net._to_network() if isinstance(net, Net) else _of_stock(net, labels)
    trained = trained_names(net.module_, getattr(net, "optimizer_", None))
    draws, several = _SEEN.get(net.module_, (False, "get_loss" in own))
    readout = chained(tensor_of if several and not isinstance(net, Net) else None, network.readout)
    network = replace(network, trainable=trained, draws=draws, readout=readout)
    return replace(network, forward=partial(_inferred, net)) if "infer" in own else network


def _inferred(net: Any, module: nn.Module, tree: Any) -> Any:
    """Run a net's own `infer` on another module."""
    other = copy(net)
    other.__dict__["module_"] = module
    return other.infer(tree)


def check_told(fitted: Any, loss: Any, parameters: Any = None) -> None:
    """Refuse a loss that is a method's, and single entries that train; warn of held-out rows."""
    inner, _ = _inner(fitted)
    name, masks = type(inner).__name__, vars(inner).get("train_masks_")
    if loss is None and isinstance(inner, NeuralNet) and "get_loss" in own_names(inner):
        raise ValueError(
            f"estimator is a {name} whose own get_loss says no loss for each row: "
            "give InfluenceScorer(loss=...), or skperf.from_module(net.module_, loss=...)."
        )
    split = getattr(inner, "train_split", None)
    if "valid_ds" in getattr(split, "keywords", {}):  # skorch.helper.predefined_split
        split = None
    held = f"train_split={type(split).__name__}" if split else "early_stopping=True"
    if parameters is not None and (split or getattr(inner, "early_stopping", False)):
        warnings.warn(
            f"estimator is a {name} with {held}, which keeps rows out of its training, and all "
            "rows given to fit count as trained on. Train without it; for a frozen estimator, give "
            "those that it trained on.",
            UserWarning,
            stacklevel=4,
        )
    if parameters == "all" and masks:
        raise ValueError(
            f"train_only chose single entries of {sorted(masks)}, and influence is of whole "
            "parameters: name in parameters= those to take whole, or use method='replay'."
        )


def _of_stock(net: Any, labels: Any = None) -> Network:
    """Open a skorch net: its nonlinearity and its criterion say what its module returns."""
    criterion = net.criterion_
    loss = resolve_loss(criterion)
    classifies = isinstance(net, NeuralNetClassifier | NeuralNetBinaryClassifier)
    classes = np.asarray(net.classes_) if classifies else labels
    readout: Readout | None = None
    if isinstance(criterion, nn.BCELoss):
        readout = log_odds_of_probability if classifies else logits_of_shares
    elif isinstance(net, NeuralNetBinaryClassifier):
        readout = two_logits
    elif isinstance(net, NeuralNetClassifier) and isinstance(criterion, nn.NLLLoss):
        readout = log_of_probabilities
    elif classes is None and loss.kind == "classes":
        raise ValueError(
            f"estimator is a {type(net).__name__} trained with {type(criterion).__name__}, whose "
            "labels are not known: use NeuralNetClassifier, or "
            "skperf.from_module(net.module_, classes=[...])."
        )
    if classifies and isinstance(criterion, nn.BCEWithLogitsLoss | nn.BCELoss):
        loss = of_two_classes(getattr(criterion, "pos_weight", None))
    return Network(
        view(net.module_),
        classes,
        max(256, net.batch_size),
        readout,
        loss=loss,
        penalty=Penalty.of(net.optimizer_, "mean") if hasattr(net, "optimizer_") else None,
    )


def _from_logistic_regression(fitted: Any) -> Network:
    linear = _linear(fitted.coef_, fitted.intercept_ if fitted.fit_intercept else None)
    readout = two_logits if len(fitted.coef_) == 1 else None
    strengths = 1 / np.unique(getattr(fitted, "C_", fitted.C if hasattr(fitted, "C") else 1.0))
    shares: Any = getattr(fitted, "l1_ratio_", getattr(fitted, "l1_ratio", None))
    absolute = fitted.penalty == "l1" or any(share not in (None, 0) for share in np.ravel(shares))
    # liblinear takes the intercept for the weight of a constant column
    liblinear = fitted.solver == "liblinear"
    scaled = liblinear and fitted.fit_intercept and fitted.intercept_scaling != 1
    if fitted.penalty is None:  # as older versions call it
        strengths = np.zeros(1)
    elif absolute or scaled:
        strengths = np.array([])
    return Network(
        linear,
        fitted.classes_,
        readout=readout,
        loss=_weighted(fitted.class_weight, fitted.classes_),
        penalty=_of_sum(strengths, biases=liblinear),
    )


def _of_sum(strengths: Any, *, biases: bool = False) -> Penalty:
    """Penalty beside the sum of the losses: nan unless it is one multiple of the squares."""
    only = float(strengths[0]) if len(strengths) == 1 else math.nan
    return Penalty(only, "sum", biases)


def _weighted(class_weight: Any, classes: Any) -> CrossEntropy:
    if class_weight is None:
        return CrossEntropy()
    if isinstance(class_weight, str):
        return CrossEntropy(balanced=True)
    weights = [float(class_weight.get(label, 1.0)) for label in np.asarray(classes).tolist()]
    return CrossEntropy(torch.tensor(weights, dtype=torch.float64))


_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "logistic": nn.Sigmoid, "identity": nn.Identity}


def _from_mlp(fitted: Any) -> Network:
    layers: list[nn.Module] = []
    for weight, bias in zip(fitted.coefs_, fitted.intercepts_, strict=True):
        layers += [_linear(weight.T, bias), _ACTIVATIONS[fitted.activation]()]
    module = nn.Sequential(*layers[:-1])
    penalty = Penalty(float(fitted.alpha), "sum", biases=False)
    if isinstance(fitted, MLPRegressor):
        return Network(module, None, loss=SquaredError(0.5), penalty=penalty)
    if fitted.out_activation_ == "logistic" and fitted.n_outputs_ > 1:
        # scikit-learn adds the labels' losses up
        loss = BinaryCrossEntropy(weight=torch.full((fitted.n_outputs_,), float(fitted.n_outputs_)))
        return Network(module, None, loss=loss, penalty=penalty)
    readout = two_logits if fitted.n_outputs_ == 1 else None
    return Network(module, fitted.classes_, readout=readout, penalty=penalty)


def _from_linear_regression(fitted: Any) -> Network:
    alphas = np.unique(fitted.alpha if isinstance(fitted, Ridge) else 0.0)
    coefficients = np.atleast_2d(fitted.coef_)
    intercept = np.atleast_1d(fitted.intercept_) if fitted.fit_intercept else None
    # the mean over several outputs is a share of scikit-learn's sum of squares
    penalty = _of_sum([] if fitted.positive else 2 * alphas / len(coefficients))
    return Network(_linear(coefficients, intercept), None, loss=SquaredError(), penalty=penalty)


_CONVERSIONS: tuple[tuple[type, Callable[[Any], Network]], ...] = (
    (LogisticRegression, _from_logistic_regression),
    (LogisticRegressionCV, _from_logistic_regression),
    (MLPClassifier, _from_mlp),
    (MLPRegressor, _from_mlp),
    (LinearRegression, _from_linear_regression),
    (Ridge, _from_linear_regression),
)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    n_outputs, n_inputs = weight.shape
    made = nn.utils.skip_init(nn.Linear, n_inputs, n_outputs, bias=bias is not None)
    linear: nn.Linear = made.to(torch.as_tensor(weight).dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.as_tensor(weight))
        if bias is not None:
            linear.bias.copy_(torch.as_tensor(np.broadcast_to(bias, n_outputs).copy()))
    return linear.eval().requires_grad_(False)
