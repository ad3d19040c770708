"""Our skorch net: plain supervised training without skorch's surprises."""

import inspect
from contextlib import suppress
from copy import deepcopy

import numpy as np
import torch
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, column_or_1d
from skorch import NeuralNetClassifier
from skorch.callbacks import EpochTimer, PassthroughScoring, PrintLog
from torch import nn

from skperf.backbone._sklearn import check_sample_weight
from skperf.backbone._validation import as_array
from skperf.backbone.architectures import MLP
from skperf.backbone.losses import resolve_loss
from skperf.backbone.network import Network, first_column
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows
from skperf.backbone.views import view


class _StopTraining(Exception):
    """A callback asks for the end of training."""


def seed_of(random_state):
    """Draw one seed."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    return int(check_random_state(random_state).randint(2**31 - 1))


class TensorBatches:
    """Slices of tensors, in place of a DataLoader that collates row by row."""

    def __init__(self, dataset, batch_size=128, shuffle=False, generator=None):
        indices = getattr(dataset, "indices", None)
        if indices is not None:
            dataset = dataset.dataset
        rows = slice(None) if indices is None else np.asarray(indices)
        self.X = _map_tensors(dataset.X, rows)
        # skorch stands a float 0 in for a missing y
        self.y = _map_tensors(dataset.y, rows) if dataset.y is not None else None
        self.n_rows = len(_first(self.X))
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.generator = generator

    def __len__(self):
        return -(-self.n_rows // self.batch_size)

    def __iter__(self):
        order = torch.randperm(self.n_rows, generator=self.generator) if self.shuffle else None
        for start in range(0, self.n_rows, self.batch_size):
            stop = start + self.batch_size
            rows = slice(start, stop) if order is None else order[start:stop]
            y = torch.zeros(1) if self.y is None else _map_tensors(self.y, rows)
            yield _map_tensors(self.X, rows), y


def _map_tensors(values, rows):
    if isinstance(values, tuple | list):
        return tuple(_map_tensors(value, rows) for value in values)
    if isinstance(values, dict):
        return {name: _map_tensors(value, rows) for name, value in values.items()}
    return torch.as_tensor(values)[rows]


def _first(values):
    while isinstance(values, tuple | dict):
        values = next(iter(values.values() if isinstance(values, dict) else values))
    return values


class Net(NeuralNetClassifier):
    """Skorch classifier for ordinary training of a logits-producing module.

    It differs from :class:`skorch.NeuralNetClassifier` where that one surprises people who
    come from scikit-learn: a module given as an instance is copied, not trained in place;
    no rows are held out unless `train_split` says so; labels may be anything; rows come in
    any numeric type; the module's ``n_features`` and ``n_classes`` are filled in; training
    is seeded without touching torch's global stream; a keyboard interrupt ends `fit`;
    batches are slices, which makes small networks train several times faster.

    Parameters
    ----------
    module : nn.Module class, instance or factory
        Returns logits, one column for each class.
    criterion : torch criterion class, default=torch.nn.CrossEntropyLoss
        Must take logits and codes. Sample weights need ``reduction="none"`` support.
    optimizer : torch optimizer class, default=torch.optim.Adam
        As in skorch.
    lr : float, default=0.001
        Learning rate.
    max_epochs : int, default=10
        Passes over the rows.
    train_split : callable, optional
        As in skorch; by default nothing is held out.
    iterator_train, iterator_valid : iterator classes, default=TensorBatches
        As in skorch.
    iterator_train__shuffle : bool, default=True
        Whether each epoch has its own order.
    random_state : int, RandomState or None, default=None
        Seeds initial weights, orders and dropout.
    **kwargs : dict
        Everything else that skorch takes: ``module__...``, ``callbacks``, ``device``, ...

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Labels in the order of the logits' columns.
    module_ : nn.Module
        The trained module.
    history_ : skorch.History
        Losses by epoch and batch.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skperf import MLP, Net
    >>> X, y = load_iris(return_X_y=True)
    >>> net = Net(MLP, lr=0.01, max_epochs=50, random_state=0).fit(X, y)
    >>> bool(net.score(X, y) > 0.9)
    True
    """

    def __init__(
        self,
        module,
        *,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=1e-3,
        max_epochs=10,
        train_split=None,
        iterator_train=TensorBatches,
        iterator_valid=TensorBatches,
        iterator_train__shuffle=True,
        random_state=None,
        verbose=0,
        **kwargs,
    ):
        self.random_state = random_state
        super().__init__(
            module,
            criterion=criterion,
            optimizer=optimizer,
            lr=lr,
            max_epochs=max_epochs,
            train_split=train_split,
            iterator_train=iterator_train,
            iterator_valid=iterator_valid,
            iterator_train__shuffle=iterator_train__shuffle,
            verbose=verbose,
            **kwargs,
        )

    @property
    def _default_callbacks(self):
        return [
            ("epoch_timer", EpochTimer()),
            ("train_loss", PassthroughScoring(name="train_loss", on_train=True)),
            ("valid_loss", PassthroughScoring(name="valid_loss")),
            ("print_log", PrintLog()),
        ]

    def fit(self, X, y, sample_weight=None):
        """Train from the start.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels of any kind.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows' losses.

        Returns
        -------
        Net
            Itself.
        """
        self._begin(X, y)
        return self.partial_fit(X, y, sample_weight=sample_weight)

    def partial_fit(self, X, y, classes=None, sample_weight=None):
        """Train on, without starting anew.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels.
        classes : array-like of shape (n_classes,), optional
            All labels there will be; needed at the first call if `y` lacks some.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows' losses.

        Returns
        -------
        Net
            Itself.
        """
        if not self.initialized_ or not hasattr(self, "generator_"):
            self._begin(X, y, classes)
        network = self.to_network()
        inputs, targets = network.inputs(as_array(X)).tree, network.codes(as_array(y)).cpu()
        check_consistent_length(inputs, targets)
        if sample_weight is not None:
            weight = check_sample_weight(sample_weight, inputs, dtype=np.float64)
            targets = (targets, torch.as_tensor(weight).to(network.dtype))
        dropout = torch.Generator().manual_seed(
            int(torch.randint(2**31, (), generator=self.generator_))
        )
        with drawing_from(dropout):
            self.notify("on_train_begin", X=inputs, y=targets)
            with suppress(_StopTraining):
                self.fit_loop(inputs, targets)
            self.notify("on_train_end", X=inputs, y=targets)
        return self

    def notify(self, method_name, **cb_kwargs):
        """Call the callbacks.

        Parameters
        ----------
        method_name : str
            Which of their methods.
        **cb_kwargs : dict
            What they get.
        """
        try:
            super().notify(method_name, **cb_kwargs)
        except KeyboardInterrupt:
            # skorch's way for a callback to end training; anywhere else it is the user
            raise _StopTraining from None

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
        return self._logits(X).softmax(1).numpy()

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
        codes = self._logits(X).argmax(1).numpy()
        return self.classes_[codes]

    def to_network(self):
        """Open the trained module.

        Returns
        -------
        Network
            The module itself, not a copy.
        """
        self.check_is_fitted()
        return Network(
            view(self.module_),
            self.classes_,
            batch_size=max(256, self.batch_size),
            readout=first_column if len(self.classes_) == 1 else None,
            loss=resolve_loss(self.criterion_),
        )

    def initialize_module(self):
        """Build the module, or copy the one that was given.

        Returns
        -------
        Net
            Itself.

        Raises
        ------
        ValueError
            If a module instance comes with ``module__`` parameters, which would rebuild it
            and lose its weights.
        """
        given = self.get_params_for("module")
        if isinstance(self.module, nn.Module):
            if given:
                raise ValueError(
                    f"module is an instance of {type(self.module).__name__} and keeps its weights; "
                    f"{sorted('module__' + name for name in given)} would rebuild it without them. "
                    "Give the class instead, or leave these parameters out."
                )
            self.module_ = deepcopy(self.module)
            return self
        accepted = inspect.signature(self.module).parameters
        widths = getattr(self, "module_widths_", {})
        self.module_ = self.module(**{n: w for n, w in widths.items() if n in accepted} | given)
        return self

    def check_data(self, X, y):
        """Accept what `fit` has validated."""

    def get_loss(self, y_pred, y_true, X=None, training=False):
        """Compute the loss of a batch.

        Parameters
        ----------
        y_pred : Tensor of shape (n, n_classes)
            Logits.
        y_true : Tensor of shape (n,) or pair of Tensors
            Codes, or codes and weights.
        X : object, optional
            Not used.
        training : bool, default=False
            Not used.

        Returns
        -------
        Tensor
            Mean loss; with weights the weighted sum over the sum of weights.
        """
        if not isinstance(y_true, tuple | list):
            return self.criterion_(y_pred, y_true.to(y_pred.device))
        codes, weight = y_true
        weight = weight.to(y_pred.device)
        reduction, self.criterion_.reduction = self.criterion_.reduction, "none"
        try:
            losses = self.criterion_(y_pred, codes.to(y_pred.device))
        finally:
            self.criterion_.reduction = reduction
        return (losses * weight).sum() / weight.sum().clamp_min(torch.finfo(weight.dtype).tiny)

    def _get_param_names(self):
        # skorch keeps a note for its own checks among them
        return [name for name in super()._get_param_names() if name != "_params_to_validate"]

    def get_iterator(self, dataset, training=False):
        """Iterate over batches, in orders of the net's own.

        Parameters
        ----------
        dataset : Dataset
            Rows.
        training : bool, default=False
            Whether for training.

        Returns
        -------
        iterator
            Of pairs of inputs and targets.
        """
        iterator = super().get_iterator(dataset, training)
        if isinstance(iterator, TensorBatches) and iterator.generator is None:
            iterator.generator = self.generator_
        return iterator

    def _begin(self, X, y, classes=None):
        labels = column_or_1d(as_array(y))
        check_classification_targets(labels)
        self.classes_inferred_ = np.unique(labels if classes is None else as_array(classes))
        self.module_widths_ = {
            "n_features": int(np.prod(Rows.of(as_array(X)).shape[1:])),
            "n_classes": max(2, len(self.classes_inferred_)),
        }
        seed = seed_of(self.random_state)
        self.generator_ = torch.Generator().manual_seed(seed)
        with drawing_from(torch.Generator().manual_seed(seed)):
            self.initialize()

    def _logits(self, X):
        return self.to_network().logits(as_array(X))


def default_net(**params):
    """Build the small network behind ``estimator=None``.

    It computes in double precision and takes all rows at once, so that a row of weight two
    counts exactly like the row given twice. For more than some ten thousand rows, set
    ``batch_size``.

    Parameters
    ----------
    **params : dict
        Overrides, such as ``module__hidden=(32,)`` or ``max_epochs=50``.

    Returns
    -------
    Net
        A multi-layer perceptron with one hidden layer, not fitted.

    Examples
    --------
    >>> from skperf import default_net
    >>> default_net(max_epochs=5).max_epochs
    5
    """
    small = {
        "module__dtype": torch.float64,
        "lr": 0.01,
        "max_epochs": 100,
        "batch_size": -1,
        "iterator_train__shuffle": False,
    }
    return Net(MLP, **(small | params))
