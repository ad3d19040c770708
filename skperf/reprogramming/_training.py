"""From settings to trained programs, and what rows that they were not trained on decide."""

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from skorch.callbacks import EarlyStopping, LRScheduler, ProgressBar
from skorch.utils import noop
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from skperf.reprogramming._net import ProgramNet
from skperf.reprogramming._options import Settings
from skperf.reprogramming._task import MOST_ATTRIBUTES, Task
from skperf.reprogramming.black_box import CALLS_PER_DIRECTION
from skperf.reprogramming.fitted import FittedProgram
from skperf.reprogramming.heads import (
    HEADS,
    MOST_ROWS,
    MOST_WORK,
    Cached,
    Folds,
    candidates,
    few_rows,
    folds_of,
    seen_rows,
)
from skperf.reprogramming.judging import Choice, Judged, choose
from skperf.reprogramming.label_mapping import cooccurrence, labels_of_interest, random_mapping
from skperf.reprogramming.objectives import ClassObjective
from skperf.reprogramming.pictures import Pictures
from skperf.reprogramming.programmed import ProgrammedEncoder
from skperf.reprogramming.programs import Prompts
from skperf.reprogramming.rejection import FEATURE_SCORES
from skperf.reprogramming.residual import Representations, unit

#: Learning rates of the border where texts are trained beside it, and where it is alone.
BORDER_RATES = {"beside texts": 0.03, "alone": 0.1}

#: Learning rate of token rows, as a share of the embeddings' root mean square.
RELATIVE_TEXT_RATE = 0.02

#: The same of offsets to class embeddings, as a share of the size of their coordinates.
RELATIVE_HEAD_RATE = 0.15

#: Fewer held-out rows than these are no sample: every row is judged in its turn instead.
FEW_HELD_OUT, MOST_CROSS_FITTED, N_FOLDS = 20, 1000, 5


@dataclass(frozen=True)
class Labelled:
    """Pictures on the canvas, read by number, their labels and plain outputs."""

    task: Task
    pictures: Pictures
    codes: np.ndarray  # (n,)
    weight: np.ndarray | None  # (n,)
    plain: Tensor | None  # (n, d)

    def __call__(self, rows: Tensor) -> Tensor:
        """Read some: rows (m,) -> (m, channels, height, width)."""
        return self.pictures.placed(rows, self.task.program.place)

    def weights(self, rows: np.ndarray) -> Tensor:
        """Weights of some rows, ones where there are none: rows (m,) -> (m,)."""
        weight = np.ones(len(self.codes)) if self.weight is None else self.weight
        return torch.as_tensor(weight[rows]).float()


def warmup_cosine(n_steps, n_warmup, step):
    """Factor of the learning rate at a step: linear warm-up, then a cosine to zero."""
    if step < n_warmup:
        return (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, n_steps - n_warmup)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def hold_out(codes, fraction, generator):
    """Set a share of the rows aside, of every class as nearly as possible: codes (n,)."""
    present, counts = np.unique(codes, return_counts=True)
    wanted = fraction * counts
    sizes = np.floor(wanted).astype(int)
    # the parts of rows that are left go to classes drawn at random; none is held out whole
    short = min(round(fraction * len(codes)) - sizes.sum(), (counts > sizes + 1).sum())
    if short > 0:
        order = np.argsort(-(wanted - sizes) - 1e-6 * generator.random_sample(len(present)))
        order = [i for i in order if counts[i] > sizes[i] + 1]
        sizes[order[:short]] += 1
    chosen = [
        generator.permutation(np.flatnonzero(codes == code))[:size]
        for code, size in zip(present, sizes, strict=True)
    ]
    held_out = np.sort(np.concatenate(chosen)).astype(int)
    return np.setdiff1d(np.arange(len(codes)), held_out), held_out


def fit_program(
    settings: Settings, task: Task, pictures: Pictures, codes, weight, generator, seed: int
) -> tuple[FittedProgram, ProgramNet]:
    """Train, judge and put together: codes (n,), weight (n,) or None."""
    every = np.arange(len(codes))
    exact = settings.gradient == "exact"
    counted = task.n_queries
    plain = None
    if task.keeps_outputs:
        plain = embed(task, pictures, settings.batch_size)
        counted += len(pictures)
    labelled = Labelled(task, pictures, codes, weight, plain)
    train, held_out = every, every[:0]
    if settings.max_epochs:
        train, held_out = hold_out(codes, settings.training.validation_fraction, generator)
    few = len(held_out) < FEW_HELD_OUT and 1 < len(codes) <= MOST_CROSS_FITTED
    crossed = few and bool(settings.max_epochs) and exact
    if crossed:
        splits = folds_of(codes, min(N_FOLDS, len(codes)), generator)
        train, held_out = every, every[:0]
    else:
        splits = [(train, held_out if len(held_out) else train)]
    nets, epochs = [], settings.max_epochs
    if crossed:
        # as many steps as all rows get: scores move with them
        steps = -(-len(codes) // settings.batch_size)
        for part, test in splits:
            each = round(epochs * steps / -(-len(part) // settings.batch_size))
            nets.append(trained(settings, labelled, part, test, seed, each))
        if settings.training.early_stopping:
            best = [np.argmin(net.history[:, "valid_loss"]) + 1 for net in nets]
            epochs = max(1, round(float(np.median(best))))
    net = trained(settings, labelled, train, held_out, seed, epochs)
    judged = judge(settings, labelled, splits, nets or [net])
    if settings.max_epochs and settings.encoder is not None:
        _warn_of_retention(len(judged.codes), settings.ood_retention)
    heads, logits = fit_heads(settings, labelled, generator, judged.rows)
    choice = choose(settings, task, judged, logits)
    if settings.compares_heads and few_rows(torch.as_tensor(codes)):
        choice = replace(choice, head="probe")
    counted += sum(known.module_.n_queries for known in [net, *nets])
    head = heads[choice.head].head if choice.head in heads else None
    return assemble(settings, labelled, net, choice, head, counted), net


def trained(settings, labelled, train, held_out, seed, max_epochs=None) -> ProgramNet:
    """Train a net: train (m,), held_out (k,), numbers of rows."""
    task = labelled.task
    epochs = settings.max_epochs if max_epochs is None else max_epochs
    stop = settings.training.early_stopping and len(held_out) > 0
    net = make_net(settings, task, len(train), len(held_out), seed, epochs, stop)
    net.begin(task.n_classes)
    watching = [n for n, c in net.callbacks_ if str(vars(c).get("monitor")).startswith("valid_")]
    if watching and epochs and not stop:
        raise ValueError(
            f"net_params: callbacks {watching} watch rows held out, but none are while these "
            "are trained on; let them watch 'train_loss', or give more rows."
        )
    prepare_head(net, settings, labelled, train)
    net.learn(labelled, labelled.codes, labelled.weight, train, held_out if stop else None)
    return net


def embed(task: Task, pictures: Pictures, batch_size: int, module=None) -> Tensor:
    """Encode all pictures, with the program of a module or plain: -> (n, d)."""
    encoder, program = task.own, task.program
    pieces = []
    with torch.no_grad():
        for placed in pictures.batches(batch_size, program.place):
            placed = placed.to(encoder.device, encoder.dtype)
            if module is not None:
                outputs = module.encode(placed, module.image)
            else:
                outputs = encoder.encode_image(placed)
                if task.zero_shot is not None:
                    outputs = unit(outputs)
            pieces.append(outputs.cpu())
    # a copy, since tensors of inference mode take no part in training
    return torch.cat(pieces).clone()


def judge(settings: Settings, labelled: Labelled, splits: Folds, nets: list[ProgramNet]) -> Judged:
    """Embed rows by programs that were not trained on them, where there are such."""
    task, logits = labelled.task, []
    parts: list[Representations] = []
    for (_, test), net in zip(splits, nets, strict=True):
        module = net.module_
        unmoved = module.image.numel() == 0 or not settings.max_epochs
        if unmoved and labelled.plain is not None and settings.init == "zeros":
            outputs = labelled.plain[test]
        else:
            outputs = embed(task, labelled.pictures[test], settings.batch_size, module)
        with torch.no_grad():
            if task.zero_shot is None:
                logits.append(module.logits(outputs.to(module.image)).cpu())
                continue
            assert labelled.plain is not None
            classes, zero_shot = module.classes().detach().cpu(), task.zero_shot.cpu()
            parts.append(Representations(outputs, labelled.plain[test], classes, zero_shot))
    rows = np.concatenate([test for _, test in splits])
    plain, full = labelled.plain, labelled.codes
    scored: dict[str, Tensor] = {}
    if plain is not None:
        # no row is its own neighbour, and a threshold of all rows is less rough than one of some
        own = splits
        if len(full) <= MOST_ROWS or np.array_equal(*splits[0]):
            own = folds_of(full, min(N_FOLDS, len(full)), np.random.RandomState(0))
        codes = torch.as_tensor(full)
        for name, kind in FEATURE_SCORES.items():
            scores = [kind.fit(plain[a], codes[a]).score(plain[b]) for a, b in own]
            scored[name] = torch.cat(scores).float()
    return Judged(
        rows,
        torch.as_tensor(full[rows]),
        labelled.weights(rows),
        parts or None,
        torch.cat(logits) if logits else None,
        scored,
        None if plain is None else (plain, torch.as_tensor(full)),
    )


def fit_heads(settings, labelled: Labelled, generator, judged_rows):
    """Fit the heads that compete, or the one asked for: dict of Fitted, of (m, n_classes)."""
    wanted = settings.head in HEADS
    if labelled.plain is None or not (wanted or settings.compares_heads):
        return {}, {}
    cached = cached_rows(labelled)
    names = (settings.head,) if wanted else candidates(cached)
    heavy = len(cached.codes) > MOST_ROWS or cached.outputs.numel() * cached.n_classes > MOST_WORK
    rows = np.arange(len(cached.codes))
    if heavy:
        apart = np.setdiff1d(rows, judged_rows)
        others = generator.permutation(apart if len(apart) else rows)[:MOST_ROWS]
        tested = judged_rows if len(apart) else others[: len(others) // 5]
        folds: Folds = [(np.setdiff1d(others, tested), tested)]
    else:
        folds = folds_of(labelled.codes, min(N_FOLDS, len(rows)), generator)
    heads = {name: HEADS[name](cached, folds) for name in names}
    seen = seen_rows(folds)
    known = np.isin(judged_rows, seen)
    place = np.searchsorted(seen, judged_rows[known])
    logits = {name: labelled.plain.new_zeros(len(known), cached.n_classes) for name in heads}
    for name, fitted in heads.items():
        logits[name][known] = fitted.logits[place].to(labelled.plain)
    return heads, logits


def cached_rows(labelled: Labelled) -> Cached:
    """Plain outputs of all rows, in the form that heads take."""
    task, encoder = labelled.task, labelled.task.own
    assert labelled.plain is not None
    unit = task.zero_shot is not None
    attributes = groups = None
    prompts = task.prompts
    if prompts is not None and len(prompts.tokens) <= MOST_ATTRIBUTES:
        each = torch.arange(len(prompts.tokens), device=prompts.groups.device)
        with torch.no_grad():
            attributes = Prompts(prompts.tokens, each, len(each)).embeddings(encoder).cpu()
        groups = prompts.groups.cpu()
    return Cached(
        labelled.plain,
        torch.as_tensor(labelled.codes),
        labelled.weights(np.arange(len(labelled.codes))),
        task.n_classes,
        None if task.zero_shot is None else task.zero_shot.cpu(),
        attributes,
        groups,
        encoder.logit_scale if unit else 1.0,
        encoder.logit_bias if unit else 0.0,
    )


def assemble(settings, labelled: Labelled, net, choice: Choice, head, n_queries) -> FittedProgram:
    """Put the fitted record together, with the scores that go by all training rows."""
    scorers = {}
    if labelled.plain is not None:
        codes = torch.as_tensor(labelled.codes)
        scorers = {n: kind.fit(labelled.plain, codes) for n, kind in FEATURE_SCORES.items()}
    head = head if head is None else head.requires_grad_(True)
    form = labelled.pictures.form
    return record_of(settings, labelled.task, net, choice, head, scorers, form, n_queries)


def record_of(settings, task: Task, net, choice, head, scorers, form, n_queries) -> FittedProgram:
    """Hold a net, a head and decisions in a record; the net lets go of the private view."""
    module = net.module_
    with torch.no_grad():
        settled = module.embedded_prompts(task.own) if module.has_unit_embeddings else None
    net.put_encoder(task.encoder)
    return FittedProgram(
        encoder=task.encoder,
        programmed=module,
        checksum=task.encoder._checksum(),
        settled=settled,
        head=head if head is None else head.to(task.encoder.device),
        scorers=scorers,
        choice=choice,
        renormalize=settings.training.renormalize,
        temperature=settings.ood_temperature,
        batch_size=settings.batch_size,
        image_shape=task.image_shape,
        form=form,
        n_queries=n_queries,
    )


def zero_shot_program(settings, task: Task, pictures: Pictures, seed: int):
    """Put the classifier of the prompts alone together, thresholds from unlabelled rows."""
    if task.zero_shot is None:
        raise ValueError("y is None: zero-shot needs an encoder with a text tower and a tokenizer.")
    settings = settings.but(max_epochs=0)
    plain = embed(task, pictures, settings.batch_size)
    codes = (plain @ task.zero_shot.cpu().T).argmax(1).numpy()
    labelled = Labelled(task, pictures, codes, None, plain)
    net = first_net(settings, labelled, seed)
    every = np.arange(len(codes))
    judged = replace(judge(settings, labelled, [(every, every)], [net]), known=None)
    # there are no labels that alpha could be chosen by, and nothing for it to mix
    choice = replace(choose(settings, task, judged, {}), curve=None, losses={})
    return assemble(settings, labelled, net, choice, None, len(pictures) + 1), net


def with_classes(settings, task: Task, fitted: FittedProgram, net: ProgramNet, classes):
    """Put a program around the prompts of other classes: classes (n_classes,)."""
    old, known = fitted.programmed, [names[0] for names in task.names]
    task = task.reopened().with_names(settings, classes)
    other = make_net(settings, task, 1, 0, 0, settings.max_epochs, False).begin(len(classes))
    module = other.module_
    same = [(i, known.index(n[0])) for i, n in enumerate(task.names) if n[0] in known]
    with torch.no_grad():
        module.image.copy_(old.image)
        module.none_level.copy_(old.none_level)
        if old.text is not None:
            module.text.copy_(old.text)
        if old.head is not None:
            for new, was in same:
                module.head.weight[new] = old.head.weight[was]
        settled = module.embedded_prompts(task.own)
    other.put_encoder(task.encoder)
    score = fitted.choice.score
    if score in fitted.scorers:  # which know the old classes
        score = "max_logit" if settings.trains_none else "mcm"
    choice = replace(fitted.choice, score=score, thresholds={}, curve=None, losses={})
    choice = replace(choice, head=task.head)
    own = replace(fitted, programmed=module, settled=settled, choice=choice)
    fitted = replace(own, head=None, scorers={})
    return task, fitted, other


def train_further(settings, task, labelled, net, first: bool):
    """Judge new rows by what is there, then train one epoch on them: -> (record, net)."""
    rows = np.arange(len(labelled.codes))
    judged = judge(settings, labelled, [(rows, rows)], [net])
    choice = choose(settings, task, judged, {}, alphas=task.alphas[:1] if first else None)
    net.set_params(max_epochs=1, callbacks=[])
    net.learn(labelled, labelled.codes, labelled.weight, rows)
    return assemble(settings, labelled, net, choice, None, net.module_.n_queries + 1), net


def first_net(settings, labelled: Labelled, seed: int) -> ProgramNet:
    """Build the net that `partial_fit` goes on with."""
    rows = np.arange(len(labelled.codes))
    task = labelled.task
    net = make_net(settings, task, len(rows), 0, seed, settings.max_epochs, False)
    net.begin(task.n_classes)
    prepare_head(net, settings, labelled, rows)
    return net


def reopened(net: ProgramNet, task: Task) -> ProgramNet:
    """Copy a net, with a private view in its module."""
    net = copy.deepcopy(net)
    net.put_encoder(task.own)
    return net


def make_net(settings, task, n_train, n_held_out, seed, max_epochs, stop) -> ProgramNet:
    """Assemble the net that trains the programs."""
    training, pixels = settings.training, settings.pixels
    named = isinstance(settings.mapping, str) and task.head == "mapping"
    rate = training.lr
    if rate == "auto":
        rate = BORDER_RATES["alone" if task.prompts is None else "beside texts"]
    own = dict(training.net_params or {})
    added = own.pop("callbacks", None) or []
    callbacks: Any = "disable"
    if not isinstance(added, str):
        added = added if isinstance(added, list | tuple) else [added]
        callbacks = [*_callbacks(settings, n_train, max_epochs, stop), *added]
    elif added != "disable" or training.early_stopping:
        raise ValueError(
            f"net_params: callbacks is {added!r} with early_stopping={training.early_stopping}; "
            "give callbacks, or 'disable' without early stopping: it drops ours too, the "
            "learning rate's schedule among them."
        )
    params = {
        "criterion": ClassObjective,
        "criterion__contrastive": settings.objective == "contrastive",
        "criterion__gamma": training.focal_gamma,
        "criterion__scale": training.focal_alpha,
        "optimizer": torch.optim.AdamW,
        "optimizer__weight_decay": 0.0,
        "optimizer__param_groups": _parameter_groups(training, task),
        "lr": rate,
        "max_epochs": max_epochs,
        "batch_size": settings.batch_size,
        "callbacks": callbacks,
        "device": str(task.own.device),
        "random_state": seed,
        "weight_decay": training.weight_decay,
        "gradient": settings.gradient,
        "n_directions": training.n_directions,
        "smoothing": training.smoothing,
        "query_budget": _training_budget(settings, task, n_train, n_held_out),
        "mapping": settings.mapping if named else None,
        "mapping_per_class": training.mapping_m,
        "mapping_smoothing": training.mapping_smoothing,
        "augment": pixels.augment,
    }
    module = {
        "encoder": task.own,
        "program": task.program,
        "n_outputs": task.n_outputs,
        "n_classes": task.n_classes,
        "head": task.head,
        "text": task.text,
        "prompts": task.prompts,
        "zero_shot": task.zero_shot,
        "init": settings.init,
        "exact": settings.gradient == "exact",
        "seed": seed,
        "training_alpha": training.training_alpha if settings.max_epochs else 0.0,
        "none_margin": training.none_margin if settings.trains_none else None,
    }
    params |= {f"module__{name}": value for name, value in module.items()}
    return ProgramNet(ProgrammedEncoder, **(params | own))


def prepare_head(net, settings, labelled: Labelled, rows):
    """Set what a head takes from the training images before training: rows (m,)."""
    # The linear head on features gets their means and deviations, a label mapping its first
    # estimate. Heads on prompts need nothing.
    module, mapping = net.module_, settings.mapping
    if module.head_kind == "mapping" and not isinstance(mapping, str):
        module.mapping.copy_(torch.as_tensor(np.asarray(mapping), dtype=torch.float32))
    elif module.head_kind == "mapping" and mapping == "rlm":
        per_class = settings.training.mapping_m
        drawn = random_mapping(*module.mapping.shape, per_class, net.generator_)  # type: ignore[call-arg]
        module.mapping.copy_(drawn)
    elif module.head_kind == "mapping" or not module.has_unit_embeddings:
        if labelled.plain is None:
            outputs = embed(labelled.task, labelled.pictures[rows], settings.batch_size)
            module.n_queries += len(rows)
        else:
            outputs = labelled.plain[rows]
        if module.head_kind == "linear":
            module.standardise(outputs)
            return
        top = labels_of_interest(mapping, module.mapping.shape[1])
        weight = None if labelled.weight is None else torch.as_tensor(labelled.weight[rows])
        codes = torch.as_tensor(labelled.codes[rows])
        net.set_mapping(
            cooccurrence(outputs, codes, module.mapping.shape[1], weight=weight, top=top)
        )


def _parameter_groups(training, task) -> list[tuple[str, dict]]:
    groups = []
    if task.text is not None:
        # the betas with which text towers are trained, and the released code too
        rate = training.text_lr
        rate = RELATIVE_TEXT_RATE * task.own.token_scale if rate == "auto" else rate
        text = {"lr": rate, "weight_decay": training.text_decay}
        groups.append(("text", {**text, "betas": (0.9, 0.98), "eps": 1e-6}))
    if task.head == "linear":
        rate = training.head_lr
        if rate == "auto":
            # coordinates of unit embeddings are of size d ** -0.5, standardised features of 1
            rate = 0.05 if task.prompts is None else RELATIVE_HEAD_RATE * task.n_outputs**-0.5
        groups.append(("head.*", {"lr": rate}))
    return groups


def _training_budget(settings, task, n_train, n_held_out):
    budget = settings.training.query_budget
    if budget is None:
        return None
    n_judged = (n_held_out or n_train) * (1 if max(task.alphas) == 0 else 2)
    left = budget - 1 - n_judged
    calls = 1 + settings.training.n_directions * CALLS_PER_DIRECTION.get(settings.gradient, 0)
    first = n_train + calls * min(n_train, settings.batch_size)
    if left < first and settings.max_epochs:
        raise ValueError(
            f"query_budget={budget} is spent before the first step: {n_judged + 1} "
            f"images are needed for checks and {first} for the first step."
        )
    return left


def _callbacks(settings, n_rows, max_epochs, stop) -> Iterator:
    n_steps = max_epochs * -(-n_rows // settings.batch_size)
    training = settings.training
    if training.schedule == "cosine" and n_steps:
        warmup = training.warmup
        n_warmup = round(warmup * n_steps) if warmup < 1 else round(warmup)
        policy = {"policy": LambdaLR, "lr_lambda": partial(warmup_cosine, n_steps, n_warmup)}
        yield "schedule", LRScheduler(**policy, step_every="batch")
    if stop:
        patience = training.n_iter_no_change
        yield "early_stopping", EarlyStopping(patience=patience, load_best=True, sink=noop)
    if settings.verbose:
        yield "progress", ProgressBar()


def _warn_of_retention(n_rows: int, retention: float) -> None:
    if n_rows + 1 < round(1 / max(1 - retention, 1e-9)) and retention < 1:
        warnings.warn(
            f"ood_retention={retention:g} needs at least {round(1 / (1 - retention)) - 1} rows "
            f"that the threshold can be read from; {n_rows} rows support a retention of "
            f"{n_rows / (n_rows + 1):.2f} at most, which is what predict_inlier keeps.",
            UserWarning,
            stacklevel=2,
        )
