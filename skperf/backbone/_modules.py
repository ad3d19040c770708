"""A torch module as a fitted scikit-learn classifier."""

from copy import deepcopy

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.frozen import FrozenEstimator
from torch import nn

from skperf.backbone._validation import as_array
from skperf.backbone.network import Network, WithReadout, logits_of_model_output, two_logits


class ModuleClassifier(ClassifierMixin, BaseEstimator):
    """A trained torch module that predicts like a scikit-learn classifier.

    It is fitted from the beginning, and ``clone`` returns it as it is, so that a large
    network is never copied.

    Parameters
    ----------
    module : nn.Module
        Returns logits, or a single logit for two classes.
    classes : array-like of shape (n_classes,), optional
        Labels in the order of the logits' columns; by default 0, 1, ...
    batch_size : int, default=256
        Rows that go through the module at once.

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        The labels.
    """

    def __init__(self, module, classes=None, *, batch_size=256):
        self.module = module
        self.classes = classes
        self.batch_size = batch_size

    def __sklearn_clone__(self):
        return self

    def __sklearn_is_fitted__(self):
        return True

    @property
    def classes_(self):
        if self.classes is not None:
            return np.asarray(self.classes)
        return np.arange(max(2, n_outputs(self.module)))

    def fit(self, X=None, y=None):
        """Do nothing: the module is trained.

        Parameters
        ----------
        X, y : object
            Not used.

        Returns
        -------
        ModuleClassifier
            Itself.
        """
        return self

    def decision_function(self, X):
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
        logits = self.to_network().logits(as_array(X)).numpy()
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X):
        """Compute class probabilities.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n, n_classes)
            The softmax of the logits.
        """
        return self.to_network().logits(as_array(X)).softmax(1).numpy()

    def predict(self, X):
        """Predict labels.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.

        Returns
        -------
        ndarray of shape (n,)
            The label with the largest logit.
        """
        codes = self.to_network().logits(as_array(X)).argmax(1).numpy()
        return self.classes_[codes]

    def to_network(self):
        """Open the module.

        Returns
        -------
        Network
            The module itself, not a copy.
        """
        return Network(self.module, self.classes_, self.batch_size, _readout_of(self.module))

    def to_module(self):
        """Give the module that returns logits.

        Returns
        -------
        nn.Module
            The module itself where it returns logits.
        """
        return self.to_network().to_module()


def from_module(module, classes=None, *, device=None, batch_size=256):
    """Use a trained torch module wherever a fitted classifier is accepted.

    Parameters
    ----------
    module : nn.Module
        Maps inputs to logits. It is shared among clones, never copied and never changed.
    classes : array-like of shape (n_classes,), optional
        Labels in the order of the logits' columns; by default 0, 1, ...
    device : str or torch.device, optional
        Where to compute. A module that lives elsewhere is copied there.
    batch_size : int, default=256
        Rows that go through the module at once.

    Returns
    -------
    FrozenEstimator
        Around a classifier that is fitted.

    Raises
    ------
    TypeError
        If `module` is no ``nn.Module``.
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
    if (
        device is not None
        and Network(module, np.arange(2)).device.type != str(device).split(":")[0]
    ):
        module = deepcopy(module).to(device)
    if classes is not None:
        labels = np.asarray(classes)
        if labels.ndim != 1 or len(np.unique(labels)) != len(labels):
            raise ValueError(f"classes must be a list of different labels, got {classes!r}.")
        classes = labels
    return FrozenEstimator(ModuleClassifier(module, classes, batch_size=batch_size))


def n_outputs(module):
    """Read a module's number of outputs off its last layer."""
    for part in reversed(list(module.modules())):
        for attribute in ("out_features", "out_channels"):
            width = getattr(part, attribute, None)
            if isinstance(width, int):
                return width
    raise AttributeError(
        f"the number of classes cannot be read off {type(module).__name__}: give the labels, "
        "skperf.from_module(module, classes=[...])."
    )


def _readout_of(module):
    if isinstance(module, WithReadout):
        return None
    if any(kind.__module__.partition(".")[0] == "transformers" for kind in type(module).__mro__):
        return logits_of_model_output
    try:
        return two_logits if n_outputs(module) == 1 else None
    except AttributeError:
        return None
