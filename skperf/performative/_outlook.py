"""Looking ahead with a fitted adapter: candidates, rest points, and what the record can tell."""

import numpy as np
from sklearn.utils import Bunch

from skperf.backbone._sklearn import check_sample_weight
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.performative import _learning
from skperf.performative._inputs import encode, open_candidate, predicted_codes
from skperf.performative._rounds import measure, settings_of
from skperf.performative.diagnostics import one_step_gains, response_p_value
from skperf.performative.equilibrium import plain_gaps, stable_prior
from skperf.performative.label_shift import correct_logits
from skperf.performative.ranking import predict_score, resampled_maps, score_under
from skperf.performative.response import FITTERS, fit_linear, fit_tied

FLIP = 0.1  # total variation between rounds above which a steady alternation is a cycle


def statistic_of(adapter, estimator, X, y, sample_weight):
    """See `PerformativeAdapter.statistic_of`."""
    X, y = check_labelled_rows(adapter, X, y)
    codes, weight = encode(y, adapter.classes_), check_sample_weight(sample_weight, X)
    fitted = open_candidate(estimator, X)
    logits = _learning.logits_of(adapter, fitted, X)
    predicted = predicted_codes(fitted, X, adapter.classes_, logits)
    smoothing = adapter.recall_smoothing
    return measure(adapter.statistic, smoothing, codes, predicted, logits, adapter.classes_, weight)


def rank_models(adapter, candidates, X, y, scoring, n_bootstrap):
    """See `PerformativeAdapter.rank_models`."""
    if not (callable(scoring) or scoring in ("accuracy", "neg_log_loss")):
        raise ValueError(
            f"scoring must be 'accuracy', 'neg_log_loss' or a callable, got {scoring!r}."
        )
    if n_bootstrap < 0:
        raise ValueError(f"n_bootstrap must be 0 or more, got {n_bootstrap}.")
    named = _by_name(candidates)
    X, y = check_labelled_rows(adapter, X, y)
    codes = encode(y, adapter.classes_)
    generator = np.random.default_rng(adapter.seed_)
    draws = _row_draws(codes, n_bootstrap, generator)
    state = adapter.record_.anticipation
    settings = _settings(adapter)
    known = state.choice.name in state.contenders and state.choice.strength > 0
    maps = resampled_maps(state, settings, n_bootstrap, generator) if known else []
    surprises = _one_step_errors(adapter)
    errors = surprises[generator.integers(len(surprises), size=n_bootstrap)]
    results, current = [], []
    for model in named.values():
        statistic, score = _candidate(adapter, model, X, codes, scoring)
        results.append(predict_score(state, maps, statistic, score, draws, errors))
        shares = np.bincount(codes, minlength=len(adapter.classes_)) / len(codes)
        current.append(score(shares, np.arange(len(codes))))
    predicted = np.array([result.value for result in results])
    return Bunch(
        order=np.argsort(-predicted, kind="stable"),
        predicted=predicted,
        low=np.array([result.low for result in results]),
        high=np.array([result.high for result in results]),
        current=np.array(current),
        prior=np.array([result.prior for result in results]),
        names=list(named),
    )


def _by_name(candidates):
    if not isinstance(candidates, dict | list | tuple) or not candidates:
        raise ValueError(
            "candidates must be a list of fitted classifiers or a dict of them by name, with one "
            f"or more; got {candidates!r}."
        )
    return candidates if isinstance(candidates, dict) else dict(enumerate(candidates))


def _settings(adapter):
    n_statistics, n_classes = len(adapter.statistic_), len(adapter.classes_)
    return settings_of(adapter, seed=adapter.seed_, n_statistics=n_statistics, n_classes=n_classes)


def _one_step_errors(adapter):
    """Realised minus anticipated shares, (n_errors, n_classes), of the rounds to learn from."""
    known = adapter.prequential_
    errors = (known.realised - known.predicted)[adapter.min_rounds :]
    if adapter.buffer_size is not None:
        errors = errors[-adapter.buffer_size :]
    return errors if len(errors) else np.zeros((1, len(adapter.classes_)))


def _row_draws(codes, n_draws, generator):
    """Resample within the classes, (n_draws, n): recalls are what matters, not the mix."""
    order = np.argsort(codes, kind="stable")
    draws = np.empty((n_draws, len(codes)), dtype=np.int64)
    start = 0
    for size in np.bincount(codes):
        rows = order[start : start + size]
        draws[:, start : start + size] = rows[
            generator.integers(max(1, size), size=(n_draws, size))
        ]
        start += size
    return draws


def _candidate(adapter, model, X, codes, scoring):
    """Give a candidate's statistic and score as functions of row indices."""
    fitted = open_candidate(model, X)
    logits = _learning.logits_of(adapter, fitted, X)
    predicted = predicted_codes(fitted, X, adapter.classes_, logits)
    classes = adapter.classes_

    def statistic(rows):
        smoothing = adapter.recall_smoothing
        return measure(
            adapter.statistic, smoothing, codes[rows], predicted[rows], logits[rows], classes, None
        )

    if callable(scoring):
        return statistic, _weighted_metric(scoring, codes, predicted, classes)
    if scoring == "accuracy":
        scores = (predicted == codes).astype(np.float64)
    else:
        own = logits[np.arange(len(codes)), codes]
        scores = own - np.logaddexp.reduce(logits, axis=1)

    def score(prior, rows):
        return score_under(prior, scores[rows], codes[rows])

    return statistic, score


def _weighted_metric(metric, codes, predicted, classes):
    def score(prior, rows):
        shares = np.bincount(codes[rows], minlength=len(classes)) / len(rows)
        weight = prior[codes[rows]] / shares[codes[rows]]
        return float(metric(classes[codes[rows]], classes[predicted[rows]], sample_weight=weight))

    return score


def stable_point(adapter, X, y, damping, tol, max_iter):
    """See `PerformativeAdapter.stable_point`."""
    if not 0 < damping <= 1:
        raise ValueError(f"damping must be in (0, 1], got {damping}.")
    if max_iter < 1:
        raise ValueError(f"max_iter must be 1 or more, got {max_iter}.")
    X, y = check_labelled_rows(adapter, X, y)
    codes = encode(y, adapter.classes_)
    logits = _learning.logits_of(adapter, adapter.estimator_, X, strict=False)
    logits = _learning.calibrated(adapter, logits)
    state = adapter.record_.anticipation

    def corrected(prior):
        log_prior = np.log(np.maximum(prior, 1e-12))
        return correct_logits(logits, log_prior, state.log_base)

    def statistic(prior):
        scores = corrected(prior)
        predicted, smoothing = scores.argmax(axis=1), adapter.recall_smoothing
        return measure(
            adapter.statistic, smoothing, codes, predicted, scores, adapter.classes_, None
        )

    def answer(prior):
        return np.exp(state.log_prior(statistic(prior)))

    rest = stable_prior(answer, adapter.base_prior_, damping=damping, tol=tol, max_iter=max_iter)
    one, two = plain_gaps(answer, adapter.base_prior_)
    right = (corrected(rest.prior).argmax(axis=1) == codes).astype(np.float64)
    rows = np.bincount(codes, minlength=len(adapter.classes_))
    hits = np.bincount(codes, right, minlength=len(adapter.classes_))
    return Bunch(
        prior=rest.prior,
        statistic=statistic(rest.prior),
        converged=rest.converged,
        residual=rest.residual,
        cycle=bool(one > FLIP and two < 0.5 * one),
        cycle_gap=one,
        worst_recall=float((hits[rows > 0] / rows[rows > 0]).min()),
        accuracy=score_under(rest.prior, right, codes),
        n_iter=rest.n_iter,
    )


def diagnose(adapter, n_permutations):
    """See `PerformativeAdapter.diagnose`."""
    state = adapter.record_.anticipation
    trajectory = state.trajectory
    statistics, counts = trajectory.pairs()
    matching = trajectory.statistics.shape[1] == trajectory.counts.shape[1]
    name = adapter.adapter_name_
    fit = FITTERS[name] if name in ("tied", "curve", "linear") else fit_linear
    if matching and name == "fixed":
        fit = fit_tied
    generator = np.random.default_rng(adapter.seed_)
    losses = adapter.prequential_
    return adapter.diagnostics_ | {
        "response_p_value": response_p_value(
            statistics,
            counts,
            fit,
            log_base=state.log_base,
            n_permutations=n_permutations,
            generator=generator,
        ),
        **one_step_gains(trajectory, fit, log_base=state.log_base),
        "gain_adapter": float(np.mean(losses.none - losses.adapter)) if len(losses.none) else 0.0,
        "worst_recall": losses.worst_recall,
    }
