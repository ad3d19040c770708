"""Every form that an `estimator` may take, fitted and opened."""

import warnings

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.utils.validation import check_is_fitted, has_fit_parameter
from skorch import NeuralNet, NeuralNetBinaryClassifier
from torch import nn

from skperf.backbone._modules import ModuleClassifier
from skperf.backbone._nets import _INITIALISING, Net, default_net, seed_of
from skperf.backbone.modes import preserved_rng, untouched
from skperf.backbone.network import (
    Network,
    log_of_probabilities,
    two_logits,
)


def fit_estimator(estimator, X, y, *, sample_weight=None, random_state=None):
    """Fit an estimator given in any of the accepted forms.

    Shapes: X (n, ...), y (n,), sample_weight (n,).
    """
    if isinstance(estimator, nn.Module):
        return _probed(ModuleClassifier(estimator), X)
    if isinstance(estimator, FrozenEstimator):
        inner = estimator.estimator
        if isinstance(inner, nn.Module):
            inner = ModuleClassifier(inner)
        if isinstance(inner, ModuleClassifier):
            return _probed(inner, X)
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
    if _is_fitted(estimator):
        warnings.warn(
            f"estimator is a fitted {type(estimator).__name__}, but a clone of it is fitted anew "
            "and its weights are not used. To use it as it is: "
            "sklearn.frozen.FrozenEstimator(estimator).",
            UserWarning,
            stacklevel=3,
        )
    fresh = clone(estimator)
    if random_state is not None and fresh.get_params(deep=False).get("random_state", 0) is None:
        fresh.set_params(random_state=seed_of(random_state))
    if isinstance(fresh, NeuralNet) and not isinstance(fresh, Net):
        return _fit_stock_net(fresh, X, y, sample_weight, seed_of(random_state))
    if sample_weight is None:
        return fresh.fit(X, y)
    if not has_fit_parameter(fresh, "sample_weight"):
        raise ValueError(f"{type(fresh).__name__}.fit takes no sample_weight.")
    return fresh.fit(X, y, sample_weight=sample_weight)


def open_network(fitted):
    """Open the torch network inside a fitted classifier."""
    if isinstance(fitted, FrozenEstimator):
        return open_network(fitted.estimator)
    if isinstance(fitted, nn.Module):
        return ModuleClassifier(fitted).to_network()
    if isinstance(fitted, Net | ModuleClassifier):
        return fitted.to_network()
    if isinstance(fitted, NeuralNet):
        return _stock_network(fitted, fitted.classes_)
    if isinstance(fitted, LogisticRegression):
        return _from_logistic_regression(fitted)
    if isinstance(fitted, MLPClassifier):
        return _from_mlp(fitted)
    if callable(getattr(fitted, "to_module", None)):
        return ModuleClassifier(fitted.to_module(), fitted.classes_).to_network()
    raise TypeError(
        f"estimator has no torch network inside: {type(fitted).__name__}. Needed is a skorch net, "
        "a torch.nn.Module that returns logits, an object with to_module(), or scikit-learn's "
        "LogisticRegression or MLPClassifier."
    )


def class_logits(fitted, X):
    """Compute log scores of every class with any fitted classifier.

    Shapes: X (n, ...) -> (n, n_classes).
    """
    if has_network(fitted):
        return open_network(fitted).logits(X).double().numpy()
    with warnings.catch_warnings():
        # the callers validate names; what reaches here is an array
        warnings.filterwarnings("ignore", "X does not have valid feature names", UserWarning)
        if hasattr(fitted, "predict_proba"):
            return _log_probabilities(fitted.predict_proba(X), type(fitted).__name__)
        if hasattr(fitted, "decision_function"):
            scores = np.asarray(fitted.decision_function(X), dtype=np.float64)
            return scores if scores.ndim == 2 else np.stack([np.zeros_like(scores), scores], 1)
    raise TypeError(
        "estimator must have predict_proba or decision_function; "
        f"{type(fitted).__name__} has neither."
    )


def has_network(fitted):
    """Tell whether :func:`open_network` would open a classifier."""
    if isinstance(fitted, FrozenEstimator):
        return has_network(fitted.estimator)
    kinds = (nn.Module, NeuralNet, LogisticRegression, MLPClassifier)
    return isinstance(fitted, kinds) or callable(getattr(fitted, "to_module", None))


def _log_probabilities(proba, name):
    proba = np.asarray(proba, dtype=np.float64)
    if not np.isfinite(proba).all() or (proba < 0).any() or np.abs(proba.sum(1) - 1).max() > 1e-3:
        raise ValueError(
            f"{name}.predict_proba must return probabilities: finite, not negative, each row "
            f"summing to 1; saw values from {np.nanmin(proba):.4g} to {np.nanmax(proba):.4g} and "
            f"row sums from {np.nanmin(proba.sum(1)):.4g} to {np.nanmax(proba.sum(1)):.4g}. "
            "A classifier with decision_function or a torch net gives logits directly."
        )
    return np.log(np.clip(proba, np.finfo(np.float64).tiny, None))


def _probed(classifier, X):
    """Find the number of classes of a module from its answer to one row."""
    if classifier.classes is not None:
        return classifier
    network = Network(classifier.module, np.arange(2), readout=classifier.to_network().readout)
    with untouched(network.module), torch.inference_mode():
        logits = network(network.tensor(X[:1]))
    if logits.ndim != 2:
        raise ValueError(
            f"{type(classifier.module).__name__} must return logits of shape (n, n_classes); for "
            f"one row it returned {tuple(logits.shape)}."
        )
    classes = np.arange(logits.shape[1])
    return type(classifier)(classifier.module, classes, batch_size=classifier.batch_size)


def _is_fitted(estimator):
    try:
        check_is_fitted(estimator)
    except NotFittedError:
        return False
    return True


def _fit_stock_net(net, X, y, sample_weight, seed):
    if sample_weight is not None:
        raise ValueError(
            f"{type(net).__name__} takes no sample_weight; skperf.Net does, "
            "with the same arguments."
        )
    classes, codes = np.unique(y, return_inverse=True)
    is_binary = isinstance(net, NeuralNetBinaryClassifier)
    with preserved_rng():
        with _INITIALISING:
            torch.manual_seed(seed)
            net.initialize()
        network = _stock_network(net, classes)
        inputs = network.tensor(X).cpu()
        net.partial_fit(inputs, codes.astype(np.float32 if is_binary else np.int64))
    if np.array_equal(classes, np.arange(len(classes))):
        return net
    return ModuleClassifier(network.to_module(), classes, batch_size=network.batch_size)


def _stock_network(net, classes):
    criterion = net.criterion if isinstance(net.criterion, type) else type(net.criterion)
    if isinstance(net, NeuralNetBinaryClassifier):
        readout = two_logits
    elif issubclass(criterion, nn.NLLLoss):
        readout = log_of_probabilities
    else:
        readout = ModuleClassifier(net.module_, classes).to_network().readout
    return Network(net.module_, np.asarray(classes), max(256, net.batch_size), readout)


def _from_logistic_regression(fitted):
    linear = _linear(fitted.coef_, fitted.intercept_ if fitted.fit_intercept else None)
    readout = two_logits if len(fitted.coef_) == 1 else None
    return Network(linear, fitted.classes_, readout=readout)


_ACTIVATIONS = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "logistic": nn.Sigmoid,
    "identity": nn.Identity,
}


def _from_mlp(fitted):
    if fitted.out_activation_ == "logistic" and fitted.n_outputs_ > 1:
        raise TypeError("estimator is a multilabel MLPClassifier, which has no class logits.")
    layers = []
    for weight, bias in zip(fitted.coefs_, fitted.intercepts_, strict=True):
        layers += [_linear(weight.T, bias), _ACTIVATIONS[fitted.activation]()]
    readout = two_logits if fitted.n_outputs_ == 1 else None
    return Network(nn.Sequential(*layers[:-1]), fitted.classes_, readout=readout)


def _linear(weight, bias):
    n_outputs, n_inputs = weight.shape
    linear = nn.Linear(n_inputs, n_outputs, bias=bias is not None).to(torch.as_tensor(weight).dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.as_tensor(weight))
        if bias is not None:
            linear.bias.copy_(torch.as_tensor(np.broadcast_to(bias, n_outputs).copy()))
    return linear
