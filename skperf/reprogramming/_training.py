"""The skorch net that trains programs, and nothing but programs."""

import math
from contextlib import suppress

import numpy as np
import torch
from skorch.callbacks import EarlyStopping, LRScheduler, ProgressBar
from skorch.dataset import Dataset, unpack_data
from torch.optim.lr_scheduler import LambdaLR

from skperf.backbone._nets import Net, _StopTraining, seed_of
from skperf.backbone.modes import preserved_rng
from skperf.reprogramming.black_box import CALLS_PER_DIRECTION, ESTIMATORS
from skperf.reprogramming.label_mapping import (
    FROM_COUNTS,
    REFRESHED,
    cooccurrence,
    labels_of_interest,
    random_mapping,
)
from skperf.reprogramming.objectives import ClassObjective
from skperf.reprogramming.programmed import ProgrammedEncoder

#: Learning rate of token rows, as a share of the embeddings' root mean square.
RELATIVE_TEXT_RATE = 0.02

#: The same of offsets to class embeddings, as a share of the size of their coordinates.
RELATIVE_HEAD_RATE = 0.15


class QueryBudgetSpentError(Exception):
    """The next step would send more images to the encoder than allowed."""


class ProgramNet(Net):
    """A :class:`~skperf.backbone._nets.Net` over a ProgrammedEncoder.

    Parameters
    ----------
    module : ProgrammedEncoder class
        Built from the ``module__`` parameters.
    weight_decay : float, default=0.0
        Half of it times the squared weights of the image program is added to the loss.
    gradient : {"exact", "rge", "spsa"}, default="exact"
        How the image program's gradient is found.
    n_directions : int, default=8
        Directions of an estimated gradient.
    smoothing : float, default=0.01
        Length of its differences.
    query_budget : int, optional
        Images that training may send to the encoder.
    mapping : str, optional
        Name of a label mapping that is refreshed between epochs.
    mapping_per_class : int, default=1
        Source labels of a class in one-to-one mappings.
    mapping_smoothing : float, default=1.0
        Smoothing of the Bayesian ones.
    **kwargs : dict
        As in Net.
    """

    def __init__(
        self,
        module,
        *,
        weight_decay=0.0,
        gradient="exact",
        n_directions=8,
        smoothing=0.01,
        query_budget=None,
        mapping=None,
        mapping_per_class=1,
        mapping_smoothing=1.0,
        **kwargs,
    ):
        self.held_out = None
        self.weight_decay = weight_decay
        self.gradient = gradient
        self.n_directions = n_directions
        self.smoothing = smoothing
        self.query_budget = query_budget
        self.mapping = mapping
        self.mapping_per_class = mapping_per_class
        self.mapping_smoothing = mapping_smoothing
        super().__init__(module, **kwargs)

    def train_step_single(self, batch, **fit_params):
        """Compute the loss of a batch and all gradients.

        Parameters
        ----------
        batch : pair
            Images and targets.
        **fit_params : dict
            As in skorch.

        Returns
        -------
        dict
            Loss and logits.
        """
        inputs, targets = unpack_data(batch)
        if self.query_budget is not None:
            self._check_budget(len(inputs["images"]))
        self._set_training(True)
        logits = self.infer(inputs)
        loss = self.get_loss(logits, targets, training=True)
        if loss.requires_grad:
            loss.backward()
        if self.gradient != "exact":
            self._estimate_gradient(inputs, targets, loss.detach())
        return {"loss": loss, "y_pred": logits}

    def get_loss(self, y_pred, y_true, X=None, training=False):
        """Compute the loss of a batch.

        Parameters
        ----------
        y_pred : Tensor of shape (n, n_classes) or (2, n, n_classes)
            Class logits, maybe of two mixes.
        y_true : Tensor or pair of Tensors
            Codes, or codes and weights.
        X : Tensor, optional
            Not used.
        training : bool, default=False
            Whether decay is added and counts for the label mapping are taken.

        Returns
        -------
        Tensor
            Scalar.

        Raises
        ------
        FloatingPointError
            If it is not finite.
        """
        loss = self._mean_loss(y_pred, y_true)
        if not training:
            return loss
        if self.weight_decay:
            loss = loss + self.weight_decay / 2 * self.module_.image.square().sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} in epoch {len(self.history)} at "
                f"lr={self.lr}: training diverges. Lower lr (and text_lr)."
            )
        if self.mapping in REFRESHED:
            self._count(y_true)
        return loss

    def on_epoch_end(self, net, **kwargs):
        """Refresh the label mapping from the source labels that the epoch has seen.

        Parameters
        ----------
        net : Net
            Itself.
        **kwargs : dict
            As in skorch.
        """
        super().on_epoch_end(net, **kwargs)
        # the program of the last epoch was trained against the mapping it had then
        if self.mapping in REFRESHED and len(self.history) < self.max_epochs:
            self.set_mapping(self.counts_)
        self.counts_ = None

    def begin(self, images, n_classes):
        """Build the module, before any training.

        Parameters
        ----------
        images : Tensor of shape (n, ...)
            Images or rows.
        n_classes : int
            Number of classes.

        Returns
        -------
        ProgramNet
            Itself.
        """
        self._begin(images, np.arange(n_classes))
        return self

    def learn(self, images, codes, weight, held_out=None):
        """Train until the epochs, the patience or the query budget are over.

        Parameters
        ----------
        images : Tensor of shape (n, ...)
            Images or rows.
        codes : ndarray of shape (n,)
            Their classes.
        weight : ndarray of shape (n,) or None
            Their weights.
        held_out : pair of Tensors, optional
            Images and codes for early stopping.
        """
        targets = torch.as_tensor(codes)
        if weight is not None:
            targets = (targets, torch.as_tensor(weight).to(self.module_.image.dtype))
        # what Net.partial_fit does, with several inputs for each row
        with preserved_rng(self.module_.image.device):
            torch.manual_seed(int(torch.randint(2**31, (), generator=self.generator_)))
            inputs = self.inputs(images)
            if held_out is not None:
                held_out = Dataset(self.inputs(held_out[0]), held_out[1])
            self.held_out = held_out
            self.notify("on_train_begin", X=inputs, y=targets)
            with suppress(QueryBudgetSpentError, _StopTraining):
                self.fit_loop(inputs, targets)
            self.notify("on_train_end", X=inputs, y=targets)
        self.held_out = None

    def get_split_datasets(self, X, y=None, **fit_params):
        """Give the training rows and those held out.

        Parameters
        ----------
        X : dict of Tensor
            Inputs.
        y : Tensor or pair of Tensors
            Targets.
        **fit_params : dict
            Not used.

        Returns
        -------
        pair of Dataset
            The second may be None.
        """
        return self.get_dataset(X, y), self.held_out

    def inputs(self, images):
        """Put the images and, where it is trained with, their zero-shot embeddings together.

        Parameters
        ----------
        images : Tensor of shape (n, ...)
            Images or rows.

        Returns
        -------
        dict
            Inputs of the module.
        """
        module = self.module_
        inputs = {"images": images.to(module.image.dtype)}
        if module.has_unit_embeddings and module.training_alpha > 0 and self.max_epochs:
            plain = module.batches(images, self.batch_size, programmed=False)
            # a copy, since tensors of inference mode take no part in training
            inputs["plain"] = torch.cat(list(plain)).clone()
        return inputs

    def set_mapping(self, counts):
        """Estimate the label mapping.

        Parameters
        ----------
        counts : Tensor of shape (n_source, n_classes)
            How often each class got each source label.
        """
        estimate = FROM_COUNTS[self.mapping]
        mapping = estimate(counts, self.mapping_per_class, self.mapping_smoothing)
        self.module_.mapping.copy_(mapping)

    def __getstate__(self):
        # skorch writes module parameters to a stream of their own: keep the encoder out of
        # it, so that it is pickled once with whoever else holds it
        encoder = self.__dict__.get("module__encoder")
        self.__dict__["module__encoder"] = None
        try:
            return super().__getstate__() | {"shared_encoder": encoder}
        finally:
            self.__dict__["module__encoder"] = encoder

    def __setstate__(self, state):
        encoder = state["shared_encoder"]
        super().__setstate__({k: v for k, v in state.items() if k != "shared_encoder"})
        self.__dict__["module__encoder"] = encoder
        if hasattr(self, "module_"):
            self.module_.encoder = encoder

    def _count(self, y_true):
        codes, weight = y_true if isinstance(y_true, tuple | list) else (y_true, None)
        n_classes = self.module_.mapping.shape[1]
        top = labels_of_interest(self.mapping, n_classes)
        codes = codes.to(self.module_.outputs.device)
        counts = cooccurrence(self.module_.outputs, codes, n_classes, weight=weight, top=top)
        previous = getattr(self, "counts_", None)
        self.counts_ = counts if previous is None else previous + counts

    def _mean_loss(self, logits, targets):
        if logits.ndim == 2:
            return super().get_loss(logits, targets)
        return sum(super(ProgramNet, self).get_loss(mix, targets) for mix in logits) / len(logits)

    def _estimate_gradient(self, inputs, targets, base):
        module = self.module_
        outputs = module.outputs
        plain = inputs.get("plain")

        def loss_at(weights):
            logits = module.logits(module.encode(inputs["images"], weights), plain)
            loss = self._mean_loss(logits, targets)
            return loss + self.weight_decay / 2 * weights.square().sum()

        with torch.no_grad():
            module.image.grad = ESTIMATORS[self.gradient](
                loss_at,
                module.image.detach(),
                base,
                n_directions=self.n_directions,
                step=self.smoothing,
                generator=self.generator_,
            )
        module.outputs = outputs

    def _check_budget(self, n_images):
        calls = 1
        if self.gradient != "exact":
            calls += self.n_directions * CALLS_PER_DIRECTION[self.gradient]
        if self.module_.n_queries + calls * n_images > self.query_budget:
            raise QueryBudgetSpentError


class WarmupCosine:
    """Factor of the learning rate at each step: linear warm-up, then a cosine to zero.

    Parameters
    ----------
    n_steps : int
        Steps of the whole training.
    n_warmup : int
        Steps of the warm-up.
    """

    def __init__(self, n_steps, n_warmup):
        self.n_steps = n_steps
        self.n_warmup = n_warmup

    def __call__(self, step):
        """Compute the factor.

        Parameters
        ----------
        step : int
            Steps done.

        Returns
        -------
        float
            In [0, 1].
        """
        if step < self.n_warmup:
            return (step + 1) / self.n_warmup
        done = (step - self.n_warmup) / max(1, self.n_steps - self.n_warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def hold_out(codes, fraction, generator):
    """Set rows aside, the same share of every class.

    Parameters
    ----------
    codes : ndarray of shape (n,)
        Classes.
    fraction : float
        Share of the rows; classes that are too small give none.
    generator : RandomState
        Source of randomness.

    Returns
    -------
    train, held_out : ndarray of int
        Row indices, each in order.
    """
    chosen = [
        generator.permutation(rows)[: round(fraction * len(rows))]
        for rows in (np.flatnonzero(codes == code) for code in np.unique(codes))
    ]
    held_out = np.sort(np.concatenate(chosen)).astype(int)
    return np.setdiff1d(np.arange(len(codes)), held_out), held_out


def make_net(estimator, task, *, n_train, n_held_out):
    """Assemble the net that trains the programs.

    Parameters
    ----------
    estimator : Reprogrammer
        Its parameters are read.
    task : Task
        What was settled.
    n_train, n_held_out : int
        Numbers of rows to train on and to judge by.

    Returns
    -------
    ProgramNet
        Not initialised.
    """
    named = isinstance(estimator.mapping, str) and task.head == "mapping"
    params = {
        "criterion": ClassObjective,
        "criterion__contrastive": estimator.objective == "contrastive",
        "criterion__gamma": estimator.focal_gamma,
        "criterion__scale": estimator.focal_alpha,
        "optimizer": torch.optim.AdamW,
        "optimizer__weight_decay": 0.0,
        "optimizer__param_groups": _parameter_groups(estimator, task),
        "lr": estimator.lr,
        "max_epochs": estimator.max_epochs,
        "batch_size": estimator.batch_size,
        "callbacks": _callbacks(
            estimator, n_train, stop=estimator.early_stopping and n_held_out > 0
        ),
        "device": str(task.encoder.device),
        "random_state": seed_of(estimator.random_state),
        "weight_decay": estimator.weight_decay,
        "gradient": estimator.gradient,
        "n_directions": estimator.n_directions,
        "smoothing": estimator.smoothing,
        "query_budget": _training_budget(estimator, task, n_train, n_held_out),
        "mapping": estimator.mapping if named else None,
        "mapping_per_class": estimator.mapping_m,
        "mapping_smoothing": estimator.mapping_smoothing,
        **module_params(task, init=estimator.init, exact=estimator.gradient == "exact"),
        "module__training_alpha": estimator.training_alpha,
    }
    return ProgramNet(ProgrammedEncoder, **(params | (estimator.net_params or {})))


def module_params(task, *, init, exact):
    """Give the ``module__`` parameters that build the ProgrammedEncoder of a task.

    Parameters
    ----------
    task : Task
        What was settled.
    init : {"zeros", "normal"}
        First weights of the image program.
    exact : bool
        Whether gradients flow through the encoder.

    Returns
    -------
    dict
        For :class:`ProgramNet`.
    """
    values = {
        "encoder": task.encoder,
        "program": task.program,
        "n_outputs": task.n_outputs,
        "n_classes": task.n_classes,
        "head": task.head,
        "text": task.text,
        "ids": task.ids,
        "init": init,
        "exact": exact,
    }
    return {f"module__{name}": value for name, value in values.items()}


def prepare_head(net, estimator, images, codes, weight):
    """Set what a head takes from the training images before training.

    The linear head on features gets their means and deviations, a label mapping its first
    estimate. Heads on prompts need nothing.

    Parameters
    ----------
    net : ProgramNet
        Initialised.
    estimator : Reprogrammer
        Its parameters are read.
    images : Tensor of shape (n, ...)
        Training images.
    codes : ndarray of shape (n,)
        Their classes.
    weight : ndarray of shape (n,) or None
        Their weights.
    """
    module = net.module_
    mapping = estimator.mapping
    if module.head_kind == "mapping" and not isinstance(mapping, str):
        module.mapping.copy_(torch.as_tensor(np.asarray(mapping), dtype=torch.float32))
    elif module.head_kind == "mapping" and mapping == "rlm":
        drawn = random_mapping(*module.mapping.shape, estimator.mapping_m, net.generator_)
        module.mapping.copy_(drawn)
    elif module.head_kind == "mapping" or not module.has_unit_embeddings:
        outputs = torch.cat(list(module.batches(images, net.batch_size, programmed=False)))
        if module.head_kind == "linear":
            module.standardise(outputs)
            return
        top = labels_of_interest(mapping, module.mapping.shape[1])
        weight = None if weight is None else torch.as_tensor(weight)
        codes = torch.as_tensor(codes)
        net.set_mapping(
            cooccurrence(outputs, codes, module.mapping.shape[1], weight=weight, top=top)
        )


def _parameter_groups(estimator, task):
    groups = []
    if task.text is not None:
        # the betas with which text towers are trained, and the released code too
        rate = estimator.text_lr
        rate = RELATIVE_TEXT_RATE * task.encoder.token_scale if rate == "auto" else rate
        text = {"lr": rate, "weight_decay": estimator.text_decay}
        groups.append(("text", {**text, "betas": (0.9, 0.98), "eps": 1e-6}))
    if task.head == "linear":
        rate = estimator.head_lr
        if rate == "auto":
            # coordinates of unit embeddings are of size d ** -0.5, standardised features of 1
            rate = 0.05 if task.ids is None else RELATIVE_HEAD_RATE * task.n_outputs**-0.5
        groups.append(("head.*", {"lr": rate}))
    return groups


def _training_budget(estimator, task, n_train, n_held_out):
    if estimator.query_budget is None:
        return None
    n_judged = (n_held_out or n_train) * (1 if max(task.alphas) == 0 else 2)
    left = estimator.query_budget - 1 - n_judged
    calls = 1 + estimator.n_directions * CALLS_PER_DIRECTION.get(estimator.gradient, 0)
    first = n_train + calls * min(n_train, estimator.batch_size)
    if left < first and estimator.max_epochs:
        raise ValueError(
            f"query_budget={estimator.query_budget} is spent before the first step: {n_judged + 1} "
            f"images are needed for checks and {first} for the first step."
        )
    return left


def _callbacks(estimator, n_rows, *, stop):
    callbacks = []
    n_steps = estimator.max_epochs * -(-n_rows // estimator.batch_size)
    if estimator.schedule == "cosine" and n_steps:
        warmup = estimator.warmup
        n_warmup = round(warmup * n_steps) if warmup < 1 else round(warmup)
        policy = {"policy": LambdaLR, "lr_lambda": WarmupCosine(n_steps, n_warmup)}
        callbacks.append(("schedule", LRScheduler(**policy, step_every="batch")))
    if stop:
        patience = estimator.n_iter_no_change
        stopping = EarlyStopping(patience=patience, load_best=True, sink=_silent)
        callbacks.append(("early_stopping", stopping))
    if estimator.verbose:
        callbacks.append(("progress", ProgressBar()))
    return callbacks


def _silent(*args):
    pass
