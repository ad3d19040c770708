"""Our skorch net: plain supervised training without skorch's surprises."""

import inspect
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import check_random_state
from skorch import NeuralNetClassifier
from skorch.callbacks import EpochTimer, GradientNormClipping, PrintLog
from skorch.callbacks.scoring import PassthroughScoring, ScoringBase
from skorch.dataset import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skperf.backbone._batches import LabelledRows, TensorBatches
from skperf.backbone._callbacks import StopTraining, raised_by_callback
from skperf.backbone._modules import OfLogits
from skperf.backbone._sklearn import check_sample_weight
from skperf.backbone._training import TrainingRun
from skperf.backbone._validation import check_labelled_rows, check_rows, check_training
from skperf.backbone.architectures import MLP
from skperf.backbone.interrupts import undisturbed
from skperf.backbone.losses import Loss, Own, Penalty, of_rows, of_two_classes, resolve_loss
from skperf.backbone.network import (
    Network,
    chained,
    check_device,
    first_column,
    log_odds_of_probability,
    log_of_probabilities,
    two_logits,
)
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows
from skperf.backbone.sparse import chosen_entries
from skperf.backbone.training_run import (
    SLOTS,
    Data,
    Recording,
    Streams,
    mask_gradients,
    mean_loss,
    restore_masked,
    tensor_of,
)
from skperf.backbone.views import own_copy, view

_KEPT = 2**28  # bytes of states that a recorded run keeps, to be gone back through at once
# what a net that takes over trained weights must know besides
_LEARNED = (
    *("classes_inferred_", "module_widths_", "n_features_in_", "feature_names_in_"),
    *("seed_", "drawn_state_", "returns_record_"),
)


def seed_of(random_state: Any) -> int:
    """Draw one seed."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0] >> 1)
    return int(check_random_state(random_state).randint(2**31 - 1))


@partial(undisturbed, within=("notify", "train_step", "train_step_single", "get_loss", "infer"))
class Net(OfLogits, NeuralNetClassifier):
    """Skorch classifier for ordinary training of a logits-producing module.

    It differs from :class:`skorch.NeuralNetClassifier` where that one surprises people who
    come from scikit-learn: a module given as an instance is copied, not trained in place;
    no rows are held out unless `train_split` says so; labels may be anything; rows come in
    any numeric type; the module's ``n_features`` and ``n_classes`` are filled in; training
    is seeded without touching torch's global stream; a keyboard interrupt ends `fit`;
    rows are validated as by scikit-learn's own estimators; batches are slices, which makes
    small networks train several times faster; a step takes the weighted sum of the rows'
    losses over their number.

    Parameters
    ----------
    module : nn.Module class, instance or factory
        Returns logits, one column for each class.
    criterion : torch criterion class, default=torch.nn.CrossEntropyLoss
        Takes logits and codes; `NLLLoss` and `BCELoss` take probabilities, as in skorch.
        Sample weights need ``reduction="none"`` support.
    optimizer : torch optimizer class, default=torch.optim.Adam
        As in skorch.
    lr : float, default=0.001
        Learning rate.
    max_epochs : int, default=10
        Passes over the rows.
    train_split : callable, optional
        As in skorch; by default nothing is held out.
    iterator_train : iterator class, default=TensorBatches
        As in skorch.
    iterator_valid : iterator class, default=TensorBatches
        As in skorch.
    iterator_train__shuffle : bool, default=True
        Whether each epoch has its own order.
    train_only : str, list of str, dict or Sparse, optional
        Which parameters train, where not all of them should: patterns of their names, boolean
        masks by name, or the entries of largest saliency, ``skperf.Sparse(ratio=0.05)``. What
        does not train stays as it was, whatever the optimizer's weight decay.
    record_run : bool, default=False
        Whether `fit` leaves a :class:`TrainingRun` in ``run_``.
    random_state : int, RandomState or None, default=None
        Seeds initial weights, orders and dropout. A clone of a fitted net repeats its run,
        also where the seed was drawn.
    verbose : int, default=0
        Whether skorch prints a line an epoch.
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
    n_features_in_ : int
        Width of a table of rows.
    feature_names_in_ : ndarray of str
        Names of a DataFrame's columns.
    run_ : TrainingRun
        The run, with ``record_run=True``.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skperf import MLP, Net
    >>> X, y = load_iris(return_X_y=True)
    >>> net = Net(MLP, lr=0.01, max_epochs=50, random_state=0).fit(X, y)
    >>> bool(net.score(X, y) > 0.9)
    True
    """

    # while `fit` runs
    streams_: Streams | None = None
    recording_: Recording | None = None
    iterator_: Any = None
    n_steps_ = 0
    returns_record_ = False
    # what `set_params` has changed since the fit
    set_since_: Any = ()

    def __init__(
        self,
        module: Any,
        *,
        criterion: Any = nn.CrossEntropyLoss,
        optimizer: Any = torch.optim.Adam,
        lr: float = 1e-3,
        max_epochs: int = 10,
        train_split: Any = None,
        iterator_train: Any = TensorBatches,
        iterator_valid: Any = TensorBatches,
        iterator_train__shuffle: bool = True,
        train_only: Any = None,
        record_run: bool = False,
        random_state: Any = None,
        verbose: int = 0,
        **kwargs: Any,
    ) -> None:
        self.random_state = random_state
        self.train_only = train_only
        self.record_run = record_run
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
    def _default_callbacks(self) -> list[tuple[str, Any]]:
        return [
            ("epoch_timer", EpochTimer()),
            ("train_loss", PassthroughScoring(name="train_loss", on_train=True)),
            ("valid_loss", PassthroughScoring(name="valid_loss")),
            ("print_log", PrintLog()),
        ]

    def __sklearn_clone__(self) -> Self:
        copied: Self = super().__sklearn_clone__()
        if not isinstance(self.random_state, int) and hasattr(self, "drawn_state_"):
            # so that a clone of a fitted net repeats its run
            copied.random_state = self.drawn_state_
        return copied

    def set_params(self, **kwargs: Any) -> Self:
        """Set parameters, none of which is looked at before `fit`.

        Parameters
        ----------
        **kwargs : dict
            By name.

        Returns
        -------
        Net
            Itself.
        """
        if not self.initialized_ and "callbacks" in kwargs:
            # skorch would build, and so validate, them before fit
            self.callbacks = kwargs.pop("callbacks")
        if "streams_" not in vars(self):
            # skorch would build these anew at once, and forget what was fitted
            parts = ("module", "criterion", "optimizer")
            late = [n for n in kwargs if n in parts or n.startswith(("module__", "criterion__"))]
            self.__dict__.update({name: kwargs.pop(name) for name in late})
            self._params_to_validate.update(late)
            self.set_since_ = sorted({*self.set_since_, *late})
        super().set_params(**kwargs)
        return self

    def fit(self, X: Any, y: Any = None, sample_weight: ArrayLike | None = None) -> Self:
        """Train from the start.

        Parameters
        ----------
        X : array-like of shape (n, ...)
            Rows.
        y : array-like of shape (n,)
            Labels of any kind.
        sample_weight : array-like of shape (n,), optional
            Weights of the rows' losses: a step takes the weighted sum over the number of
            rows in its batch, in which a row of weight 0 counts too.

        Returns
        -------
        Net
            Itself.
        """
        begun = self.warm_start and hasattr(self, "generator_") and not self.set_since_
        rows, labels = check_labelled_rows(self, *_parts(X, y), reset=not begun)
        if not begun:
            self._begin(rows, labels)
        return self._learn(rows, labels, sample_weight, record=self.record_run)

    def partial_fit(
        self,
        X: Any,
        y: Any = None,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
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
        begun = self.initialized_ and hasattr(self, "generator_")
        if begun and self.set_since_:
            raise ValueError(
                f"{self.set_since_} were set since the fit, and partial_fit goes on with the "
                "module and criterion as they are: call fit."
            )
        rows, labels = check_labelled_rows(self, *_parts(X, y), reset=not begun)
        if not begun:
            self._begin(rows, labels, classes)
        return self._learn(rows, labels, sample_weight, record=False)

    def _begin(self, X: Any, y: Any, classes: ArrayLike | None = None) -> None:
        # a generator as random_state gives another seed at every fit
        whole = isinstance(self.random_state, int | np.integer)
        self.drawn_state_ = self.random_state if whole else seed_of(self.random_state)
        self.seed_ = seed_of(self.drawn_state_)
        self.classes_inferred_ = np.unique(np.asarray(y if classes is None else classes))
        self.module_widths_ = {
            "n_features": int(np.prod(Rows.of(X).shape[1:])),
            "n_classes": max(2, len(self.classes_inferred_)),
        }
        self.generator_ = torch.Generator().manual_seed(self.seed_)
        self.n_steps_ = 0
        for name in ("run_", "train_masks_", "train_initial_", "set_since_"):
            self.__dict__.pop(name, None)
        names = "batch_size max_epochs lr train_split module criterion optimizer iterator_train"
        check_training(**{name: getattr(self, name) for name in names.split()})
        check_device(self.device)
        for entry in self.callbacks if isinstance(self.callbacks, list | tuple) else ():
            callback = entry[1] if isinstance(entry, tuple) and len(entry) == 2 else entry
            if not hasattr(callback, "on_train_begin"):
                raise TypeError(f"callbacks holds {callback!r}, which is no callback of skorch.")
        with drawing_from(torch.Generator().manual_seed(self.seed_)):
            self.initialize()
        for name, callback in self.callbacks_:
            watched = getattr(callback, "monitor", None)
            if not self.train_split and watched in ("valid_loss", "valid_loss_best"):
                raise ValueError(
                    f"callbacks: {name} watches {watched!r}, but train_split=None holds no rows "
                    "out. Give train_split=skorch.dataset.ValidSplit(5), or let it watch "
                    "monitor='train_loss'."
                )
        weight = getattr(self.criterion_, "weight", None)
        k = self.module_widths_["n_classes"]
        if self.loss_.kind == "classes" and weight is not None and len(weight) != k:
            raise ValueError(f"criterion__weight holds {len(weight)} weights for {k} classes.")

    def _learn(
        self, rows: Rows, labels: np.ndarray, sample_weight: ArrayLike | None, *, record: bool
    ) -> Self:
        data = self._labelled(rows, labels, sample_weight)
        self.__dict__.pop("run_", None)
        self._choose_entries(data)
        recording = self._recording(record)
        with Streams(self.module_, self.seed_) as self.streams_:
            self.recording_ = recording
            try:
                with suppress(StopTraining):
                    self.notify("on_train_begin", X=data, y=labels)
                    self.fit_loop(data)
                self.notify("on_train_end", X=data, y=labels)
            except (RuntimeError, ValueError) as error:
                if "more than 1 value per channel" in str(error):
                    raise ValueError(
                        f"a batch of one row is left over, which batch normalisation can't train "
                        f"on: choose another batch_size than {self.batch_size} for {len(rows)} "
                        "rows, or iterator_train__drop_last=True."
                    ) from error
                if self.n_steps_ or isinstance(error, torch.OutOfMemoryError | ValueError):
                    raise
                raise ValueError(
                    f"{type(self.module_).__name__} does not train on the first rows of X, of "
                    f"shape {rows.shape}: {error}"
                ) from error
            finally:
                for name in ("streams_", "recording_", "iterator_"):
                    self.__dict__.pop(name, None)
        if recording is not None:
            self._keep(recording, data)
        return self

    def _labelled(
        self, rows: Rows, labels: np.ndarray, sample_weight: ArrayLike | None = None
    ) -> LabelledRows:
        """Bring validated rows into the form that training takes: (n, ...), (n,), (n,)."""
        network = self._to_network()
        codes = network.codes(labels).cpu()
        targets: Any = codes.to(network.dtype) if self._takes_numbers() else codes
        if sample_weight is not None:
            weight = check_sample_weight(sample_weight, range(len(rows)), dtype=np.float64)
            targets = (targets, torch.as_tensor(weight).to(network.dtype))
        return LabelledRows(rows, labels, targets, network.inputs)

    def notify(self, method_name: str, **cb_kwargs: Any) -> None:
        """Call a method of the callbacks."""
        if method_name == "on_batch_end" and self._scores():
            # scorers hold predictions against labels, not against codes and weights
            inputs, targets = cb_kwargs["batch"]
            codes = targets[0] if isinstance(targets, tuple | list) else targets
            cb_kwargs["batch"] = inputs, self.classes_[codes.cpu().long().numpy()]
        data, begins = cb_kwargs.get("X"), method_name.endswith("_begin") and self.callbacks
        if method_name == "on_train_begin" and isinstance(data, LabelledRows):
            # what was given, whose shape a callback may want to know
            cb_kwargs |= {"X": data.X, "y": data.y}
        try:
            # callbacks may draw weights, or build the module anew
            with drawing_from(self.generator_) if begins else nullcontext():
                super().notify(method_name, **cb_kwargs)
        except KeyboardInterrupt as error:
            if raised_by_callback(error):  # skorch's way to end training; else it is the user
                raise StopTraining from None
            raise

    def _scores(self) -> bool:
        return any(isinstance(callback, ScoringBase) for _, callback in self.callbacks_)

    def train_step_single(self, batch: Any, **fit_params: Any) -> dict[str, Tensor]:
        """Differentiate the loss of a batch."""
        self._set_training(True)
        inputs, targets = batch
        streams = self.streams_
        with nullcontext() if streams is None else streams.step(self.n_steps_):
            outputs = self.infer(inputs, **fit_params)
        self.returns_record_ = not isinstance(outputs, Tensor)
        self._check_outputs(tensor_of(outputs))
        loss = self.get_loss(outputs, targets, X=inputs, training=True)
        loss.backward()
        mask_gradients(self.module_, vars(self).get("train_masks_", {}))
        return {"loss": loss, "y_pred": outputs}

    def _check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that the criterion would not hold against codes: (n, ...)."""
        k, criterion, kind = len(self.classes_), type(self.criterion_).__name__, self.loss_.kind
        if not outputs.requires_grad:
            raise ValueError("nothing in module trains: see its requires_grad, and train_only.")
        wanted = 1 if self._takes_numbers() else max(2, k)
        fits = outputs.shape[1:] == (wanted,) or (wanted == 1 and outputs.ndim == 1)
        fits |= kind == "own" and criterion not in ("NLLLoss", "BCELoss")
        if kind == "values" or not fits:
            raise ValueError(
                f"module returns outputs of shape {tuple(outputs.shape)} for the {k} classes of y, "
                f"which don't fit criterion={criterion}; CrossEntropyLoss takes (n, {max(2, k)})."
            )

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        """Take a step."""
        recording = self.recording_
        taken = super().train_step(batch, **fit_params)
        if "train_masks_" in vars(self):
            restore_masked(self.module_, self.train_masks_, self.train_initial_)
        if recording is not None:
            recording.after_step()
        self.n_steps_ += 1
        return taken

    def _step_optimizer(self, step_fn: Any) -> None:
        if self.recording_ is None:
            super()._step_optimizer(step_fn)
            return
        # settings may be changed by callbacks up to here; the batch is known to the iterator
        rows, noted, streams = self.iterator_.positions(), self.recording_, self.streams_

        def noting() -> Any:
            loss = step_fn()
            noted.before_step(rows, None if streams is None else streams.latest)
            return loss

        super()._step_optimizer(noting)

    def _choose_entries(self, data: LabelledRows) -> None:
        if self.train_only is None or hasattr(self, "train_masks_"):
            return
        where = torch.linspace(0, len(data) - 1, min(256, len(data))).long()
        some = Rows(data.gather(where))
        codes = data.targets[0] if isinstance(data.targets, tuple) else data.targets
        chosen = chosen_entries(self.train_only, self.module_, self.loss_, some, codes[where])
        initial = {}
        for name, parameter in self.module_.named_parameters():
            parameter.requires_grad_(name in chosen)
            if name in chosen and not bool(chosen[name].all()):
                initial[name] = parameter.detach().clone()
        self.train_masks_ = {name: chosen[name] for name in initial}
        self.train_initial_ = initial

    def _recording(self, record: bool) -> Recording | None:
        if not record:
            return None
        if self.optimizer not in SLOTS:
            raise ValueError(
                f"record_run=True: a run of {getattr(self.optimizer, '__name__', self.optimizer)} "
                "can't be gone back through; use torch.optim.SGD, Adam or AdamW."
            )
        if not isinstance(self.iterator_train, type) or not issubclass(
            self.iterator_train, TensorBatches
        ):
            raise ValueError(
                "record_run=True needs iterator_train=TensorBatches (the default), which knows "
                "which rows a batch holds."
            )
        masks = vars(self).get("train_masks_")
        return Recording(self.module_, self.optimizer_, masks=masks, keep=_KEPT)

    def _keep(self, recording: Recording, data: LabelledRows) -> None:
        clippings = [c for _, c in self.callbacks_ if isinstance(c, GradientNormClipping)]
        if any(c.gradient_clip_norm_type != 2 for c in clippings) or len(clippings) > 1:
            raise ValueError(
                "record_run=True: of GradientNormClipping one callback of the 2-norm can be gone "
                "back through."
            )
        norms = [c.gradient_clip_value for c in clippings if c.gradient_clip_value is not None]
        run = recording.finish(self.loss_, self._as_data(data), norms[0] if norms else None)
        learned = {name: vars(self)[name] for name in _LEARNED if name in vars(self)}
        self.run_ = TrainingRun(run, self.__sklearn_clone__(), learned)

    def _as_data(self, data: LabelledRows) -> Data:
        targets, weights = data.targets if isinstance(data.targets, tuple) else (data.targets, None)
        # rows of a data set stay where they are; they must come out as the module takes them
        rows = Rows(data.rows.tree) if not data.stays else data.rows
        targets = targets.to(next(self.module_.parameters()).device)
        return Data(rows, targets, weights, data.convert if data.stays else None)

    def _training_data(self, X: Any, y: Any, sample_weight: ArrayLike | None = None) -> Data:
        """Bring rows (n, ...), labels (n,) and weights (n,) into the form that a run trains on."""
        rows, labels = check_labelled_rows(self, X, y)
        return self._as_data(self._labelled(rows, labels, sample_weight))

    def _adopt(self, module: nn.Module, learned: dict[str, Any]) -> Self:
        """Become a fitted net around weights that were trained elsewhere, and what was learned."""
        self.__dict__.update(learned)
        self.generator_ = torch.Generator().manual_seed(0)
        with drawing_from(self.generator_):
            self.initialize()
        self.module_.load_state_dict(module.state_dict())
        self.module_.eval()
        return self

    def _to_network(self) -> Network:
        """Open the trained module as a private view."""
        self.check_is_fitted()
        binary, weight = self._takes_numbers(), getattr(self.criterion_, "pos_weight", None)
        return Network(
            view(self.module_),
            self.classes_,
            batch_size=max(256, self.batch_size),
            readout=chained(tensor_of if self.returns_record_ else None, self._readout()),
            loss=of_two_classes(weight) if binary else resolve_loss(self.criterion_),
            penalty=Penalty.of(self.optimizer_, "rows"),
        )

    def _readout(self) -> Any:
        if isinstance(self.criterion_, nn.NLLLoss):
            return log_of_probabilities
        if isinstance(self.criterion_, nn.BCELoss):
            return log_odds_of_probability
        if isinstance(self.criterion_, nn.BCEWithLogitsLoss):
            return two_logits
        return first_column if len(self.classes_) == 1 else None

    def _takes_numbers(self) -> bool:
        return isinstance(self.criterion_, nn.BCELoss | nn.BCEWithLogitsLoss)

    def initialize_module(self) -> Self:
        """Build the module, or copy the one that was given."""
        given = self.get_params_for("module")
        if isinstance(self.module, nn.Module):
            if given:
                raise ValueError(
                    f"module is an instance of {type(self.module).__name__} and keeps its weights; "
                    f"{sorted('module__' + name for name in given)} would rebuild it without them. "
                    "Give the class instead, or leave these parameters out."
                )
            self.module_ = own_copy(self.module)
        else:
            accepted = inspect.signature(self.module).parameters
            widths = getattr(self, "module_widths_", {})
            widths = {name: width for name, width in widths.items() if name in accepted}
            self.module_ = self.module(**widths | given)
        if not list(self.module_.parameters()):
            raise ValueError(f"module: {type(self.module_).__name__} has no parameters to train.")
        if Network(self.module_, None).dtype.itemsize < 4:
            self.module_.float()  # half precision is computed in float32, as in a view
        return self

    def initialize_criterion(self) -> Self:
        """Build the criterion, and the loss of single rows that goes with it."""
        super().initialize_criterion()
        criterion = self.criterion_
        self.loss_: Loss = of_rows(criterion)
        # a criterion of the user's own may know the mean of a batch only
        self.per_row_: bool | None = None if isinstance(self.loss_, Own) else True
        return self

    def check_data(self, X: Any, y: Any = None) -> None:
        """Accept what `fit` has validated."""

    def get_loss(self, y_pred: Any, y_true: Any, X: Any = None, training: bool = False) -> Tensor:
        """Weigh and average a batch's losses: y_pred (n, K), y_true (n,) or with weights (n,)."""
        targets, weight = y_true if isinstance(y_true, tuple | list) else (y_true, None)
        outputs = tensor_of(y_pred)
        targets = targets.to(outputs.device)
        if self.per_row_ is None:
            self.per_row_ = False
            with suppress(ValueError):
                self.loss_.value(outputs.detach(), targets)
                self.per_row_ = True
        if weight is None and not self.per_row_:
            loss: Tensor = self.criterion_(outputs, targets)
            return loss
        return mean_loss(
            self.loss_, outputs, targets, None if weight is None else weight.to(outputs.device)
        )

    def infer(self, x: Any, **fit_params: Any) -> Any:
        """Run the module on a batch; a tuple of inputs is taken apart."""
        if isinstance(x, tuple):
            return self.module_(*(part.to(self.device) for part in x), **fit_params)
        return super().infer(x, **fit_params)

    def _get_param_names(self) -> list[str]:
        # skorch keeps a note for its own checks among them
        return [name for name in super()._get_param_names() if name != "_params_to_validate"]

    def get_dataset(self, X: Any, y: Any = None) -> Any:
        """Take rows that are labelled as they are."""
        return X if isinstance(X, LabelledRows) else super().get_dataset(X, y)

    def get_split_datasets(self, X: Any, y: Any = None, **fit_params: Any) -> tuple[Any, Any]:
        """Hold rows out, without a look at their weights."""
        if not isinstance(X, LabelledRows) or not self.train_split:
            return super().get_split_datasets(X, y, **fit_params)  # type: ignore[no-any-return]
        training, held_out = self.train_split(X, X.y, **fit_params)
        if isinstance(held_out, Dataset) and not isinstance(held_out, LabelledRows):
            # skorch.helper.predefined_split
            held_out = self._labelled(*check_labelled_rows(self, held_out.X, held_out.y))
        return training, held_out

    def get_iterator(self, dataset: Any, training: bool = False) -> Any:
        """Iterate over batches, in orders of the net's own."""
        iterator = super().get_iterator(dataset, training)
        ordered = isinstance(iterator, TensorBatches | DataLoader)
        if ordered and iterator.generator is None:
            iterator.generator = self.generator_
        if training and self.recording_ is not None:
            self.iterator_ = iterator
        return iterator

    def _outputs(self, X: Any) -> Tensor:
        if "forward_iter" in vars(self):
            # a scorer among the callbacks, which keeps the outputs of the epoch's batches
            outputs = torch.cat([tensor_of(part).detach() for part in self.forward_iter(X)])
            readout = self._readout()
            return (outputs if readout is None else readout(outputs)).cpu()
        network = self._to_network()
        if isinstance(X, LabelledRows):
            X = X.rows
        # while it trains, its callbacks ask about rows that were validated already
        fitting = "streams_" in vars(self)
        return network.logits(Rows.of(X) if fitting else check_rows(self, _parts(X, None)[0]))


def _parts(X: Any, y: Any) -> tuple[Any, Any]:
    """Take skorch's own data set apart."""
    if isinstance(X, Dataset):
        return X.X, X.y if y is None else y
    return X, y


def default_net(**params: Any) -> Net:
    """Build the small network behind ``estimator=None``.

    It computes in double precision and takes all rows at once by steps of Adam that do not
    depend on the scale of the loss, so that a row of weight two counts exactly like the row
    given twice. For more than some ten thousand rows, set ``batch_size``.

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
    small: dict[str, Any] = {
        "module__dtype": torch.float64,
        "lr": 0.01,
        "max_epochs": 100,
        "batch_size": -1,
        "iterator_train__shuffle": False,
        # weights scale the mean over the rows; without a floor Adam's steps do not notice
        "optimizer__eps": 1e-30,
    }
    return Net(MLP, **(small | params))
