"""From parameters to a net that is ready to train; the rows it is trained and judged on."""

import math

import numpy as np
import torch
from skorch.callbacks import EarlyStopping, LRScheduler, ProgressBar
from torch.optim.lr_scheduler import LambdaLR

from skperf.backbone._nets import seed_of
from skperf.reprogramming._net import ProgramNet
from skperf.reprogramming.black_box import CALLS_PER_DIRECTION
from skperf.reprogramming.label_mapping import cooccurrence, labels_of_interest, random_mapping
from skperf.reprogramming.objectives import ClassObjective
from skperf.reprogramming.programmed import ProgrammedEncoder

#: Learning rates of the border where texts are trained beside it, and where it is alone.
BORDER_RATES = {"beside texts": 0.03, "alone": 0.1}

#: Learning rate of token rows, as a share of the embeddings' root mean square.
RELATIVE_TEXT_RATE = 0.02

#: The same of offsets to class embeddings, as a share of the size of their coordinates.
RELATIVE_HEAD_RATE = 0.15


class WarmupCosine:
    """Factor of the learning rate at each step: linear warm-up, then a cosine to zero."""

    def __init__(self, n_steps, n_warmup):
        self.n_steps = n_steps
        self.n_warmup = n_warmup

    def __call__(self, step):
        """Compute the factor."""
        if step < self.n_warmup:
            return (step + 1) / self.n_warmup
        done = (step - self.n_warmup) / max(1, self.n_steps - self.n_warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def hold_out(codes, fraction, generator):
    """Set rows aside, the same share of every class: codes (n,)."""
    chosen = [
        generator.permutation(rows)[: round(fraction * len(rows))]
        for rows in (np.flatnonzero(codes == code) for code in np.unique(codes))
    ]
    held_out = np.sort(np.concatenate(chosen)).astype(int)
    return np.setdiff1d(np.arange(len(codes)), held_out), held_out


def make_net(estimator, task, *, n_train, n_held_out):
    """Assemble the net that trains the programs."""
    named = isinstance(estimator.mapping, str) and task.head == "mapping"
    rate = estimator.lr
    if rate == "auto":
        rate = BORDER_RATES["alone" if task.ids is None else "beside texts"]
    params = {
        "criterion": ClassObjective,
        "criterion__contrastive": estimator.objective == "contrastive",
        "criterion__gamma": estimator.focal_gamma,
        "criterion__scale": estimator.focal_alpha,
        "optimizer": torch.optim.AdamW,
        "optimizer__weight_decay": 0.0,
        "optimizer__param_groups": _parameter_groups(estimator, task),
        "lr": rate,
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
        "module__none_margin": estimator.none_margin,
    }
    return ProgramNet(ProgrammedEncoder, **(params | (estimator.net_params or {})))


def module_params(task, *, init, exact):
    """Give the ``module__`` parameters that build the ProgrammedEncoder of a task."""
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

    Shapes: images (n, ...), codes (n,), weight (n,).
    """
    # The linear head on features gets their means and deviations, a label mapping its first
    # estimate. Heads on prompts need nothing.
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
