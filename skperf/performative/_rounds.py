"""The adapter's record of rounds: what is deployed, what is measured, what is learned."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import nn

from skperf.performative._neural import fit_neural
from skperf.performative.anticipation import (
    MIXES,
    STRENGTHS,
    Anticipation,
    Candidate,
    Rows,
    Settings,
    observe,
)
from skperf.performative.label_shift import (
    bbse_prior,
    em_prior,
    log_loss,
    probabilities,
    smooth_shares,
    soft_confusion,
)
from skperf.performative.paper import fit_paper
from skperf.performative.response import FITTERS, SHARED
from skperf.performative.trajectory import STATISTICS

COSTLY = 2000  # parameters above which a linear map among others is refitted more rarely
LADDER = ("fixed", "tied", "curve", "linear", "mlp")
ROWS_A_ROUND = 256  # kept for the log-loss objective
ROWS_A_CLASS = 200  # kept to watch the worst recall
WORTHS = (np.inf, 1e4, 1e3, 1e2, 0.0)  # labels; infinity is the anticipation alone
BATCH_MEMORY = 0.8  # about five rounds
LOSSES = ("none", "last", "adapter", "oracle")


def settings_of(adapter, *, seed, n_statistics, n_classes):
    """Translate an adapter's parameters."""
    names = _names(adapter.adapter, n_statistics == n_classes)
    is_paper = "paper" in names
    if is_paper and adapter.objective == "log_loss":
        raise ValueError("adapter='paper' is fitted to label mixes: objective must be 'marginal'.")
    strength = 1.0 if is_paper and adapter.strength == "auto" else adapter.strength
    mix = 0.0 if is_paper and adapter.mix == "auto" else adapter.mix
    costly = n_statistics * n_classes > COSTLY
    return Settings(
        candidates={
            _name_of(kind): _candidate(kind, adapter, seed, costly=costly, alone=len(names) == 1)
            for kind in names
        },
        strengths=STRENGTHS if isinstance(strength, str) else np.array([float(strength)]),
        mixes=MIXES if isinstance(mix, str) else np.array([float(mix)]),
        l2=adapter.l2,
        decay=adapter.decay,
        buffer_size=adapter.buffer_size,
        min_rounds=adapter.min_rounds,
    )


def _names(adapter, one_entry_a_class):
    if isinstance(adapter, list | tuple):
        if not adapter:
            raise ValueError("adapter is an empty list: name one kind of map or more.")
        return tuple(adapter)
    if not (isinstance(adapter, str) and adapter == "auto"):
        return (adapter,)
    return tuple(name for name in LADDER if one_entry_a_class or name not in SHARED)


def _name_of(kind):
    if isinstance(kind, str) and kind in (*LADDER, "paper"):
        return kind
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return kind.__name__
    raise ValueError(
        f"adapter must be 'auto', one or a list of {[*LADDER, 'paper']}, or a torch.nn.Module "
        f"class; got {kind!r}."
    )


def _candidate(kind, adapter, seed, *, costly, alone):
    if isinstance(kind, str) and kind in FITTERS:
        if kind != "linear" or alone:
            return Candidate(FITTERS[kind])
        return Candidate(FITTERS[kind], growth=1.2 if costly else 1.05)
    if isinstance(kind, str) and kind == "paper":
        return Candidate(partial(fit_paper, seed=seed), weigh=False)
    given = {} if isinstance(kind, str) else {"module": kind}
    fit = partial(
        fit_neural,
        **given,
        seed=seed,
        hidden=adapter.hidden_layer_sizes,
        lr=adapter.lr,
        max_epochs=adapter.max_epochs,
        batch_size=adapter.batch_size,
        weight_decay=adapter.weight_decay,
    )
    # among others a network only enters once it has something to learn from
    first, growth = (1, 1.1) if alone else (20, 1.25)
    return Candidate(fit, first_pair=first, growth=growth, weigh=False)


@dataclass(frozen=True)
class Record:
    """Immutable state of a fitted adapter; `add_round` returns the next one."""

    anticipation: Anticipation
    confusion: np.ndarray  # (n_classes, n_classes)
    losses: tuple = ()
    memory: tuple | None = None
    batch_losses: np.ndarray | None = None  # (n_worths,)

    @property
    def log_base(self):
        return self.anticipation.log_base


def measure(statistic, smoothing, codes, predicted, logits, classes, weight):
    """Compute a statistic by name or by a callable that takes labels.

    Shapes: codes, predicted (n,), logits (n, n_classes), classes (n_classes,), weight (n,) ->
    (n_statistics,).
    """
    labels_only = isinstance(statistic, str) and statistic in ("recall", "confusion")
    proba = None if labels_only else probabilities(logits)
    if not callable(statistic):
        function = STATISTICS[statistic]
        return function(codes, predicted, proba, classes, weight, smoothing=smoothing)
    values = np.asarray(
        statistic(classes[codes], classes[predicted], proba, classes, weight), dtype=np.float64
    )
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(
            f"statistic must return finite numbers of shape (n_statistics,), got {values!r}."
        )
    return values


def add_round(
    record, settings, number, logits, codes, statistic, log_prior, *, weight, objective, hybrid
):
    """Learn from one round.

    Shapes: logits (n, n_classes), codes (n,), statistic (n_statistics,), log_prior (n_classes,),
    weight (n,).
    """
    n_classes = len(record.log_base)
    counts = np.bincount(codes, weight, minlength=n_classes)
    right = weight * (logits.argmax(axis=1) == codes)
    rows = _kept_rows(logits - record.log_base, codes, weight) if objective == "log_loss" else None
    anticipation = observe(
        record.anticipation,
        settings,
        number,
        statistic,
        counts,
        hits=np.bincount(codes, right, minlength=n_classes),
        rows=rows,
    )
    proba = probabilities(logits)
    return replace(
        record,
        anticipation=anticipation,
        confusion=record.confusion + soft_confusion(proba, codes, weight),
        losses=(*record.losses, _losses(record, number, counts, log_prior, logits, codes, weight)),
        memory=_remembered(record.memory, logits - record.log_base, codes),
        batch_losses=_hybrid_losses(record, logits, codes, log_prior, weight) if hybrid else None,
    )


def _hybrid_losses(record, logits, codes, log_prior, weight):
    """Judge every worth on a round before its labels are learned from."""
    scores = logits - record.log_base
    mixes = [_hybrid_prior(record, logits, log_prior, worth) for worth in WORTHS]
    losses = np.array([log_loss(scores + mix, codes, weight) for mix in mixes])
    before = record.batch_losses
    return losses if before is None else BATCH_MEMORY * before + (1 - BATCH_MEMORY) * losses


def _hybrid_prior(record, logits, log_prior, worth):
    if np.isinf(worth):
        return log_prior
    mean = np.exp(log_prior)
    prior = em_prior(logits, record.log_base, mean=mean, strength=worth, tol=1e-5).prior
    return np.log(np.maximum(prior, 1e-12))


def add_counts(record, settings, number, counts, statistic):
    """Learn from a round without rows: its label counts and its statistic."""
    log_prior = record.anticipation.log_prior(record.anticipation.trajectory.in_force())
    anticipation = observe(record.anticipation, settings, number, statistic, counts)
    losses = _losses(record, number, counts, log_prior)
    return replace(record, anticipation=anticipation, losses=(*record.losses, losses))


def _losses(record, number, counts, log_prior, logits=None, codes=None, weight=None):
    trajectory = record.anticipation.trajectory
    shares = counts / max(counts.sum(), np.finfo(np.float64).tiny)
    last = np.log(smooth_shares(trajectory.counts[-1])) if len(trajectory) else record.log_base
    mixes = (record.log_base, last, log_prior, np.log(np.maximum(shares, 1e-12)))
    if logits is None:
        losses = [-float(shares @ mix) for mix in mixes]
        worst = np.nan
    else:
        scores = logits - record.log_base
        losses = [log_loss(scores + mix, codes, weight) for mix in mixes]
        right = np.bincount(codes, (scores + log_prior).argmax(axis=1) == codes, len(counts))
        rows = np.bincount(codes, minlength=len(counts))
        worst = float((right[rows > 0] / rows[rows > 0]).min())
    moved = 0.5 * np.abs(shares - np.exp(last)).sum() if len(trajectory) else 0.0
    named = dict(zip(LOSSES, losses, strict=True))
    return (
        {"round": number}
        | named
        | {
            "worst_recall": worst,
            "tv": float(moved),
            "predicted": np.exp(log_prior),
            "realised": shares,
        }
    )


def _kept_rows(scores, codes, weight):
    kept = np.flatnonzero(weight > 0)
    kept = kept[np.linspace(0, len(kept) - 1, min(len(kept), ROWS_A_ROUND)).astype(int)]
    return Rows(scores[kept], codes[kept], weight[kept] * weight.sum() / weight[kept].sum())


def _remembered(memory, scores, codes):
    if memory is None:
        return None
    scores, codes = np.vstack([memory[0], scores]), np.append(memory[1], codes)
    latest = [np.flatnonzero(codes == c)[-ROWS_A_CLASS:] for c in range(scores.shape[1])]
    kept = np.sort(np.concatenate(latest))
    return scores[kept], codes[kept]


def prior_of(record, statistic, floor):
    """Anticipate the log mix, weakened where it would drown a class.

    Shapes: statistic (n_statistics,) -> log_prior (n_classes,).
    """
    state = record.anticipation
    chosen = state.choice.strength
    if floor is None or record.memory is None or not len(record.memory[1]) or chosen == 0.0:
        return state.log_prior(statistic), chosen
    options = chosen * np.array([1.0, 0.9, 0.75, 0.5, 0.35, 0.25, 0.1, 0.0])
    priors = [state.log_prior(statistic, strength=strength) for strength in options]
    worst = [_worst_recall(record.memory, prior) for prior in priors]
    enough = np.flatnonzero(np.array(worst) >= floor)
    best = int(enough[0]) if len(enough) else int(np.argmax(worst))
    return priors[best], float(options[best])


def _worst_recall(memory, log_prior):
    scores, codes = memory
    right = (scores + log_prior).argmax(axis=1) == codes
    rows = np.bincount(codes, minlength=len(log_prior))
    hits = np.bincount(codes, right, len(log_prior))
    return float((hits[rows > 0] / rows[rows > 0]).min())


def batch_prior(record, logits, log_prior, *, how, strength):
    """Refine an anticipated mix by the unlabelled rows it is meant for.

    Shapes: logits (n, n_classes), log_prior (n_classes,) -> (n_classes,).
    """
    if how == "bbse":
        prior = bbse_prior(probabilities(logits), record.confusion)
        return np.log(np.maximum(prior, 1e-6))
    if how == "em":
        return np.log(np.maximum(em_prior(logits, record.log_base).prior, 1e-12))
    worth = _pseudo_labels(record) if isinstance(strength, str) else strength
    return _hybrid_prior(record, logits, log_prior, worth)


def _pseudo_labels(record):
    """Give the worth that did best lately, or at first the concentration of recent mixes."""
    if record.batch_losses is not None:
        return WORTHS[int(record.batch_losses.argmin())]
    state = record.anticipation
    size = state.trajectory.counts.sum(axis=1).mean() if len(state.trajectory) else 1.0
    return float(np.clip((size - state.spread) / max(state.spread - 1.0, 1e-2), 1.0, 10 * size))


def interval_of(record, prior, level=0.9):
    """Find where the realised shares of a round of usual size will lie.

    Shapes: prior (..., n_classes) -> (2, ..., n_classes).
    """
    from scipy.stats import beta

    state = record.anticipation
    size = state.trajectory.counts.sum(axis=1).mean() if len(state.trajectory) else 1.0
    worth = max(1.0, size / max(1.0, state.spread))
    tails = np.array([(1 - level) / 2, (1 + level) / 2])[(...,) + (None,) * prior.ndim]
    return beta.ppf(tails, worth * prior, np.maximum(worth * (1 - prior), 1e-9))
