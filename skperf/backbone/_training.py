"""A recorded training, as its users hold it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import clone
from torch import Tensor, nn
from torch.optim import Optimizer

from skperf.backbone._sklearn import check_sample_weight
from skperf.backbone.losses import resolve_loss
from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Data, Recording, Run, outputs_of, train_again


class TrainingRun:
    """A training that can be run again with other weights, or gone back through.

    It holds the initial weights, the order of the batches and the settings of the optimizer
    at every step; ``Net(record_run=True)`` leaves one in ``run_``, and :meth:`record` makes
    one of a training loop of your own. The rows themselves are left out when it is pickled.

    Parameters
    ----------
    recorded : Run or None
        The record itself; None as long as the training goes on.
    like : Net
        Not fitted; what trains again becomes a clone of it.
    learned : dict
        What a fitted net knows besides its weights.

    Attributes
    ----------
    n_steps : int
        Steps taken.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn.datasets import load_iris
    >>> from skperf import MLP, Net
    >>> X, y = load_iris(return_X_y=True)
    >>> net = Net(MLP, lr=0.01, random_state=0, record_run=True).fit(X, y)
    >>> again = net.run_.reweighted(np.ones(len(X)))
    >>> bool(np.array_equal(again.predict_proba(X), net.predict_proba(X)))
    True
    """

    def __init__(self, recorded: Run | None, like: Any, learned: dict[str, Any]) -> None:
        self.recorded_ = recorded
        self._like = like
        self._learned = learned
        self._batches: Iterable[Any] = ()

    @property
    def recorded(self) -> Run:
        """The record itself."""
        if self.recorded_ is None:
            raise ValueError(
                "the run is not complete: its training is going on, or was broken off by an error."
            )
        return self.recorded_

    @property
    def n_steps(self) -> int:
        """Steps taken."""
        return len(self.recorded.steps)

    @classmethod
    @contextmanager
    def record(
        cls,
        module: nn.Module,
        optimizer: Optimizer,
        batches: Iterable[Any],
        *,
        loss: Any = "cross_entropy",
        max_norm: float | None = None,
        classes: ArrayLike | None = None,
    ) -> "Iterator[TrainingRun]":
        """Record a training loop of your own.

        Inside the context, loop over the run (or over ``run.batches``) in place of `batches`
        and take one optimizer step for every batch, on the mean of its rows' losses.

        Parameters
        ----------
        module : nn.Module
            What is trained, before its first step.
        optimizer : torch.optim.Optimizer
            Over the module's parameters, before its first step.
        batches : iterable
            Yields pairs ``(indices, (inputs, targets))``: which training rows a batch holds,
            and the batch.
        loss : str, nn.Module or callable, default="cross_entropy"
            The loss of the loop, as in :func:`skperf.from_module`.
        max_norm : float, optional
            Norm at which the loop clips its gradients, by ``torch.nn.utils.clip_grad_norm_``.
        classes : array-like of shape (n_classes,), optional
            Labels in the order of the logits; by default 0, 1, ...

        Yields
        ------
        TrainingRun
            Complete once the context is left.

        Raises
        ------
        ValueError
            If the optimizer has taken steps before, or trains tensors of another module, or
            no step was taken.
        """
        loop = _Loop(module, optimizer, batches)
        run = cls(None, None, {})
        run._batches = loop
        handle = optimizer.register_step_pre_hook(loop.before_step)
        try:
            yield run
        finally:
            handle.remove()
        run.recorded_ = loop.finish(resolve_loss(loss), max_norm)
        run._like, run._learned = _fitted_like(run.recorded_, loss, classes)

    @property
    def batches(self) -> Iterator[Any]:
        """The batches of the loop that is being recorded."""
        return iter(self)

    def __iter__(self) -> Iterator[Any]:
        if self.recorded_ is not None:
            raise ValueError("the run is complete; its batches are those of the loop that is over.")
        return iter(self._batches)

    def reweighted(self, weights: ArrayLike, X: Any = None, y: Any = None) -> Any:
        """Train again, each row's loss times a weight of its own.

        A row of weight 0 stays in its batch and in the count of its rows: every step takes
        the sum of the weighted losses over the number of rows in the batch.

        Parameters
        ----------
        weights : array-like of shape (n,)
            Weight of each training row, in place of those the run was fitted with.
        X : array-like of shape (n, ...), optional
            The rows, for a run that was pickled and so has left them out.
        y : array-like of shape (n,), optional
            Their labels, with `X`.

        Returns
        -------
        Net
            Fitted, its own run in ``run_``; at the weights of the run itself, bit-equal to what
            was trained.
        """
        run = self.recorded
        net = clone(self._like)
        if X is not None:
            run = run.with_data(data_of(self, X, y))
        if run.data is None:
            raise ValueError(
                "the run does not hold its rows, which pickling leaves out: pass X and y again."
            )
        checked = check_sample_weight(weights, range(len(run.data)), dtype=np.float64)
        own = torch.as_tensor(checked).to(next(run.module.parameters()))
        trainer = train_again(run, own)
        net._adopt(trainer.module, self._learned)
        # the new run, so that rows can be scored, left out and scored again
        data = replace(run.data, weights=own)
        again = replace(run, data=data, states=None, end=trainer.state())
        net.run_ = TrainingRun(again, self._like, self._learned)
        return net

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": ()}


def data_of(run: TrainingRun, X: Any, y: Any, sample_weight: Any = None) -> Data:
    """Bring rows (n, ...), labels (n,) and weights (n,) into the form that a run trains on."""
    if not run._learned:  # a loop on targets that are no labels
        network = Network(run.recorded.module, None, loss=run.recorded.loss)
        rows, weights = network.inputs(Rows.of(X)), sample_weight
        if weights is not None:
            weights = torch.as_tensor(check_sample_weight(weights, rows)).to(network.dtype)
        return Data(rows, network.targets(y), weights)
    net = clone(run._like)
    net._adopt(run.recorded.module, run._learned)
    data: Data = net._training_data(X, y, sample_weight)
    return data


class _Loop:
    """Someone's own training loop, watched from its batches and its optimizer."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, batches: Iterable[Any]) -> None:
        self.recording = Recording(module, optimizer)
        self.device, self.batches = next(module.parameters()).device, batches
        self.rows: Tensor | None = None
        self.batch: tuple[Rows, Tensor] | None = None
        self.state: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        for entry in self.batches:
            if not isinstance(entry, tuple | list) or len(entry) != 2:
                raise ValueError(
                    "batches must yield pairs (indices, (inputs, targets)); got "
                    f"{type(entry).__name__}."
                )
            indices, batch = entry
            inputs, targets = batch
            self.rows = torch.as_tensor(indices)
            rows = Rows.of(inputs).map(lambda leaf: torch.as_tensor(leaf, device=self.device))
            self.batch = rows, torch.as_tensor(targets, device=self.device)
            # reading the stream changes nothing; only a loop that draws needs it
            self.state = torch.get_rng_state()
            yield entry
        self.rows = None

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self.rows is None or self.batch is None:
            raise ValueError(
                "optimizer.step() was called without a batch of the run: loop over the run that "
                "`record` gives, `for indices, (inputs, targets) in run`, one step a batch."
            )
        assert self.state is not None
        drawn = not torch.equal(self.state, torch.get_rng_state())
        self.recording.before_step(self.rows, self.state if drawn else None, self.batch)
        self.rows = None

    def finish(self, loss: Any, max_norm: float | None) -> Run:
        recording = self.recording
        if not recording.steps:
            raise ValueError(
                "no step was recorded: loop over the run that `record` gives, not over batches."
            )
        data = self._table()
        steps = [_without_copy(step, data) for step in recording.steps]
        if all(step.batch is None for step in steps):
            recording.steps = steps
        # else rows were augmented, and those of the table are none that anybody else has
        return recording.finish(loss, data, max_norm)

    def _table(self) -> Data:
        """Put the rows of all batches in one place, each as it was seen first."""
        steps = self.recording.steps
        n = max(int(step.rows.max()) for step in steps) + 1
        where = torch.full((n,), -1)
        parts, targets, count = [], [], 0
        for step in steps:
            assert step.batch is not None
            rows = step.rows.long()
            fresh = where[rows] < 0
            if bool(fresh.any()):
                where[rows[fresh]] = torch.arange(count, count + int(fresh.sum()))
                parts.append(step.batch[0][fresh])
                targets.append(step.batch[1][fresh])
                count += int(fresh.sum())
        # rows that no batch held have no influence; any row may stand in for them
        order = where.clamp_min(0)
        return Data(Rows.cat(parts)[order], torch.cat(targets)[order])


def _without_copy(step: Any, data: Data) -> Any:
    assert step.batch is not None
    rows, targets = step.rows.long(), step.batch[1]
    same = torch.equal(data.targets[rows], targets)
    for own, seen in zip(data.inputs[rows].leaves, step.batch[0].leaves, strict=True):
        # other places in memory lead to other kernels, which round otherwise
        same &= seen.stride() == own.stride() and seen.data_ptr() % 64 == 0
        same &= torch.equal(torch.as_tensor(own), torch.as_tensor(seen))
    return replace(step, batch=None) if same else step


def _fitted_like(run: Run, loss: Any, classes: ArrayLike | None) -> tuple[Any, dict[str, Any]]:
    from skperf.backbone._nets import Net  # which itself leaves runs behind

    assert run.data is not None
    criterion = loss if isinstance(loss, nn.Module | type) else nn.CrossEntropyLoss
    targets, device = run.data.targets, next(run.module.parameters()).device
    if classes is None and targets.ndim == 1 and not targets.is_floating_point():
        with torch.no_grad():
            module = train_again(replace(run, steps=run.steps[:1])).module.eval()
            outputs = outputs_of(module, run.data.inputs[slice(0, 1)].load())
        classes = np.arange(outputs.shape[1] if outputs.ndim > 1 else 2)
    learned = {} if classes is None else {"classes_inferred_": np.asarray(classes)}
    return Net(run.module, criterion=criterion, device=str(device), random_state=0), learned
