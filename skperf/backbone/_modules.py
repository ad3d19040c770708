"""A torch module as a fitted scikit-learn estimator."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import accuracy_score, r2_score
from sklearn.utils.metaestimators import available_if
from torch import Tensor, nn

from skperf.backbone._validation import as_labels, check_rows
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.looking import Seen, look
from skperf.backbone.losses import BinaryCrossEntropy, Loss, describes, of_two_classes, resolve_loss
from skperf.backbone.network import Forward, Network, Readout, check_device
from skperf.backbone.rows import Rows
from skperf.backbone.views import original, own_copy, view


@undisturbed
class OfLogits:
    """What a fitted classifier answers by the outputs of its network."""

    classes_: np.ndarray
    probabilities: Any = None  # of outputs, where that is not their softmax

    def _outputs(self, X: Any) -> Tensor:
        """Compute the outputs of rows, on the CPU: X (n, ...) -> (n, n_classes) or (n, ...)."""
        raise NotImplementedError  # every classifier around a network has its own

    def _kind(self) -> str:
        """Kind of the targets, as a loss names it."""
        return "classes"

    def _classifies(self) -> bool:
        return self._kind() == "classes"

    def _class_axis(self, outputs: Tensor) -> int:
        return 1

    @available_if(_classifies)
    def decision_function(self, X: Any) -> np.ndarray:
        """Compute class logits.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n, n_classes) or (n,)
            Logits; with two classes, of the second against the first.
        """
        logits = self._outputs(X)
        axis = self._class_axis(logits)
        return (logits.diff(dim=axis).squeeze(axis) if logits.shape[axis] == 2 else logits).numpy()

    @available_if(_classifies)
    def predict_proba(self, X: Any) -> np.ndarray:
        """Compute class probabilities.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n, n_classes)
            The softmax of the logits, or what the network's own nonlinearity makes of them.
        """
        outputs = self._outputs(X)
        if self.probabilities is not None:
            return np.asarray(self.probabilities(outputs).numpy())
        return np.asarray(outputs.softmax(self._class_axis(outputs)).numpy())

    def predict(self, X: Any) -> np.ndarray:
        """Predict labels, or the outputs themselves where targets are no classes.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n,) or (n, ...)
            The label with the largest logit; yes-or-no labels by the sign of theirs.

        Raises
        ------
        ValueError
            If the rows are not those the network takes, or an output is not finite.
        """
        outputs, kind = self._outputs(X), self._kind()
        if kind == "classes":
            return np.asarray(self.classes_[outputs.argmax(self._class_axis(outputs)).numpy()])
        if kind == "labels":
            return np.asarray((outputs > 0).long().numpy())
        values: np.ndarray = outputs.numpy()
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values


@undisturbed
class ModuleClassifier(OfLogits, ClassifierMixin, BaseEstimator):
    """A trained torch module that predicts like a scikit-learn estimator.

    It is fitted from the beginning, and ``clone`` returns it as it is, so that a large
    network is never copied.

    Arguments as in :func:`from_module`; `before` are the steps of a pipeline before the network,
    `width` and `names` the columns that rows must have.
    """

    def __init__(
        self,
        module: nn.Module,
        classes: Any = None,
        *,
        forward: Forward | None = None,
        readout: Readout | None = None,
        loss: Any = None,
        batch_size: int = 256,
        before: Callable[[Rows], Rows] | None = None,
        width: int | None = None,
        names: Any = None,
    ) -> None:
        self.module = module
        self.classes = classes
        self.forward = forward
        self.readout = readout
        self.loss = loss
        self.batch_size = batch_size
        self.before = before
        self.width = width
        self.names = names
        if width is not None:
            self.n_features_in_ = int(width)
        if names is not None:
            self.feature_names_in_ = np.asarray(names, dtype=object)
        # what one row has shown, and whether the classes of its outputs come before positions
        self._looked: Seen | None = None
        self._classes_first = False

    def __sklearn_clone__(self) -> "ModuleClassifier":
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        if not self._classifies():
            tags.estimator_type = "regressor"
        return tags

    @property
    def classes_(self) -> np.ndarray:  # type: ignore[override]
        found = self._known_classes()
        if found is None:
            raise AttributeError(
                f"the classes of {type(self.module).__name__} are not known before it has seen a "
                "row: give the labels, skperf.from_module(module, classes=[...])."
            )
        return found

    @property
    def loss_(self) -> Loss:
        loss = self._declared()
        if isinstance(loss, BinaryCrossEntropy) and self.classes is not None:
            # two classes at one logit; several outputs are labels of their own
            one = len(self.classes) == 2 if self._looked is None else self._looked.two_classes
            return of_two_classes(loss.pos_weight) if one else loss
        return loss

    def _declared(self) -> Loss:
        # Hugging Face keeps what a model was trained on in its config
        told = str(getattr(getattr(self.module, "config", None), "problem_type", None))
        told = _PROBLEMS.get(told, "cross_entropy")
        return resolve_loss(told if self.loss is None else self.loss)

    def fit(self, X: Any = None, y: Any = None) -> "ModuleClassifier":
        """Do nothing: the module is trained.

        Parameters
        ----------
        X : object
            Not used.
        y : object
            Not used.

        Returns
        -------
        ModuleClassifier
            Itself.
        """
        return self

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy; the coefficient of determination where targets are numbers.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n, ...)
            Targets.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows.

        Returns
        -------
        float
            The larger the better.
        """
        metric = r2_score if self._kind() in ("values", "own") else accuracy_score
        return float(metric(as_labels(y), self.predict(X), sample_weight=sample_weight))

    def _to_network(self, X: Rows | None = None) -> Network:
        """Open the module as a private view; of rows X (n, ...) some may be looked at."""
        if self._looked is None and X is not None and len(X):
            known = None if self.classes is None else len(self.classes)
            # the same for every thread that looks
            self._looked = look(self._blank(), X, n_labels=known, loss=self._declared())
        seen = self._looked
        return replace(
            self._blank(),
            classes=self._known_classes() if self._classifies() else None,
            readout=self.readout if seen is None else seen.readout,
            loss=self.loss_,
            trainable=trained_names(self.module),
            draws=seen is not None and seen.draws,
        )

    def to_module(self) -> nn.Module:
        """Give the module that returns outputs.

        Returns
        -------
        nn.Module
            The module itself where it returns them, else one around it.
        """
        return replace(self._to_network(), module=self.module).to_module()

    def _looked_at(self, X: Rows, y: Any = None, loss: Loss | None = None) -> "ModuleClassifier":
        """Run a row, so that readout, classes and loss (where none was declared) are known."""
        # what was edited is used as it is
        other = copy(self) if type(self) is ModuleClassifier else self
        labels = as_labels(y)
        if self.loss is None:
            other.loss = loss
        known, n_labels = self._known_classes(), None
        if known is not None:
            n_labels = len(known)
        elif other._classifies() and labels is not None and labels.ndim == 1:
            n_labels = len(np.unique(labels))
        other.classes = self._named_classes(labels)
        seen = other._looked = look(self._blank(), X, n_labels=n_labels, loss=other._declared())
        # classes of maps stand in torch's place, before the positions; those of tokens behind
        other._classes_first = (
            labels is not None and labels.ndim > 1 and labels.shape[1:] == seen.shape[1:]
        )
        other._check_seen(labels)
        return other

    def _check_seen(self, labels: Any) -> None:
        seen, name = self._looked, type(self.module).__name__
        if seen is None or not self._classifies():
            return
        if not seen.shape or (seen.shape == (1,) and self.classes is None):
            raise ValueError(
                f"{name} must return logits of shape (n, n_classes); its readout returned one "
                "number a row. If its targets are numbers, say loss='squared_error'."
            )
        known = self._known_classes()
        if known is not None and len(known) not in seen.shape:
            raise ValueError(
                f"{name} returns {' x '.join(map(str, seen.shape))} outputs a row, but classes= "
                f"names {len(known)}: {known.tolist()[:20]}."
            )
        weight = getattr(self.loss_, "weight", None)
        if weight is not None and len(weight) not in seen.shape:
            raise ValueError(
                f"loss holds {len(weight)} class weights, but {name} returns "
                f"{' x '.join(map(str, seen.shape))} outputs a row."
            )
        if seen.shape == (2,) and labels is not None and labels.ndim == 1 and self.classes is None:
            values = np.unique(labels)
            if len(values) > 2:
                raise ValueError(
                    f"y holds {len(values)} different values, but {name} has outputs for two "
                    "classes. If it predicts numbers, say loss='squared_error'."
                )

    def _named_classes(self, labels: Any) -> Any:
        """Classes by the names that a Hugging Face config has for them, where y uses these."""
        names = getattr(getattr(self.module, "config", None), "id2label", None)
        if self.classes is not None or not names or labels is None or labels.dtype.kind not in "OU":
            return self.classes
        named = np.asarray([names[i] for i in sorted(names)])
        return named if np.isin(labels, named).all() else None

    def _known_classes(self) -> np.ndarray | None:
        if self.classes is not None:
            return np.asarray(self.classes)
        seen = self._looked
        if seen is None or not seen.shape:
            return None
        tokens = len(seen.shape) == 2 and not self._classes_first
        return np.arange(seen.shape[1] if tokens else seen.shape[0])

    def _blank(self) -> Network:
        module = view(self.module)
        return Network(
            module, None, self.batch_size, self.readout, self.forward, before=self.before
        )

    def _outputs(self, X: Any) -> Tensor:
        rows = Rows.of(X) if self.before is not None else check_rows(self, X)
        network = self._to_network(rows)  # looks
        self._check_seen(None)
        return network.logits(rows)

    def _kind(self) -> str:
        return self.loss_.kind

    def _class_axis(self, outputs: Tensor) -> int:
        """Axis of the classes: behind the tokens in (n, L, K), else the second."""
        fits = self.classes is None or outputs.shape[-1] == len(self.classes)
        return 2 if outputs.ndim == 3 and fits and not self._classes_first else 1

    def __repr__(self, N_CHAR_MAX: int = 700) -> str:
        loss = "" if self.loss is None else f", loss={describes(self.loss_)}"
        return f"{type(self).__name__}({type(self.module).__name__}{loss})"


_PROBLEMS = {"regression": "squared_error", "multi_label_classification": "binary_cross_entropy"}


def trained_names(module: nn.Module, optimizer: Any = None) -> tuple[str, ...] | None:
    """Names of the parameters that train, None where all do, or none (a network at rest)."""
    named = list(original(module).named_parameters())
    groups = [] if optimizer is None else optimizer.param_groups
    # a schedule keeps the rate it began with
    rates = {
        id(p): group.get("initial_lr", group["lr"]) for group in groups for p in group["params"]
    }
    trained = tuple(
        name.replace("_orig_mod.", "")
        for name, parameter in named
        if parameter.requires_grad and (not any(rates.values()) or rates.get(id(parameter)))
    )
    return None if len(trained) in (0, len(named)) else trained


def from_module(
    module: nn.Module,
    classes: Any = None,
    *,
    forward: Forward | None = None,
    readout: Readout | None = None,
    loss: Any = None,
    device: Any = None,
    batch_size: int = 256,
) -> FrozenEstimator:
    """Use a trained torch module wherever a fitted estimator is accepted.

    Parameters
    ----------
    module : nn.Module
        The network. It is shared among clones, never copied and never changed.
    classes : array-like of shape (n_classes,), optional
        Labels in the order of the outputs' columns; by default 0, 1, ...
    forward : callable, optional
        ``forward(module, rows)`` runs the network; by default ``module(rows)``, with several
        inputs ``module(*rows)`` or ``module(**rows)``.
    readout : callable, optional
        ``readout(returned)`` takes the outputs, a tensor (n, n_classes), (n, K) or (n,), from what
        the forward returns. By default one row is run and looked at: a tensor is taken as it
        is, the entry ``logits`` of a record or a dictionary, one column as the logit of the
        second class, probabilities by their logarithm.
    loss : str, nn.Module or callable, optional
        What the network was trained on: ``"cross_entropy"``, ``"binary_cross_entropy"`` (several
        yes-or-no labels), ``"squared_error"``, a ``torch.nn`` loss module with its weights and
        smoothing, or a function of (outputs, targets) that returns one number for each row.
    device : str or torch.device, optional
        Where to compute. A module that lives elsewhere is copied there.
    batch_size : int, default=256
        Rows that go through the module at once.

    Returns
    -------
    FrozenEstimator
        Around an estimator that is fitted.

    Raises
    ------
    TypeError
        If `module` is no ``nn.Module``, or `loss` is none of these.
    ValueError
        If `classes` holds a label twice.

    Examples
    --------
    >>> import torch
    >>> from skperf import from_module
    >>> classifier = from_module(torch.nn.Linear(4, 3), classes=["cat", "dog", "owl"])
    >>> classifier.predict_proba(torch.zeros(2, 4)).shape
    (2, 3)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    for name, function in (("forward", forward), ("readout", readout)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}.")
    if loss is not None:
        resolve_loss(loss)
    check_device(device)
    if device is not None and Network(module, None).device.type != str(device).split(":")[0]:
        module = own_copy(module).to(device)
    if not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive whole number, got {batch_size!r}.")
    if classes is not None:
        labels = np.asarray(classes)
        if labels.ndim != 1 or len(set(labels.tolist())) != len(labels):
            raise ValueError(f"classes must be a list of different labels, got {classes!r}.")
        classes = labels
    return FrozenEstimator(
        ModuleClassifier(
            module, classes, forward=forward, readout=readout, loss=loss, batch_size=batch_size
        )
    )
