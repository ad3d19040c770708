"""The steps behind the adapter's public methods: records, opened classifiers and rows."""

import sys
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.utils import Bunch

from skperf.backbone.progress import track
from skperf.performative import _inputs, learning
from skperf.performative._inputs import PerformativeWarning
from skperf.performative._scores import Opened, is_frozen, open_candidate, take
from skperf.performative._start import Data, Measured, given_base, taken
from skperf.performative.corrector import FAST
from skperf.performative.diagnostics import extrapolation
from skperf.performative.label_shift import probabilities
from skperf.performative.ranking import Candidate, answers_the_model, predict_scores, score_under
from skperf.performative.record import Record, Round
from skperf.performative.report import quick_diagnostics
from skperf.performative.response import Answering

SPOKEN_OF, FEW = 300, 3  # rows and rounds below which a loss may be chance
HARM = 0.01  # nats a row that a withdrawn correction has to have cost to be spoken of
FAR = 3.0  # times the largest distance between neighbours on record
SEEN = 200  # rounds that a statistic may be far from


def learn(
    record: Record, fitted: Any, data: Data, measured: Measured | None, verbose: int
) -> Record:
    """Go through the rounds of a call in order."""
    codes = np.full(len(data.y), -1)
    codes[data.known] = _inputs.encode(data.y[data.known], record.classes)
    deployed = data.deployed
    if deployed is not None:
        deployed = _inputs.deployed_codes(deployed, record.classes)
    numbers = np.unique(np.asarray(data.rounds))
    # the whole call is refused before any of it is learned
    n_labels = [int((codes[data.rounds == number] >= 0).sum()) for number in numbers]
    late = _inputs.check_later(record.anticipation.trajectory, numbers, n_labels)
    strata = strata_codes(record, data.strata)
    for i, number in enumerate(track(numbers, description="rounds", verbose=verbose)):
        rows = np.flatnonzero(data.rounds == number)
        rows = rows[codes[rows] >= 0] if i in late else rows
        if not len(rows):
            continue
        opened = Opened(fitted, record.classes, record.log_base)
        logits, own, honest = _scored(opened, data.X, rows, measured if i == 0 else None)
        sent, groups = (None if each is None else each[rows] for each in (deployed, strata))
        told = None if data.covariates is None else data.covariates[i]
        weight = data.weight[rows]
        now = Round(number, logits, own, codes[rows], weight, sent, honest, told, groups)
        before = record.corrector.choice.strength
        record = (learning.labelled_later if i in late else learning.learned)(record, now)
        if before > 0.0 and record.corrector.choice.strength == 0.0:
            _warn_of_harm(record, number)
    return record


def _warn_of_harm(record: Record, number: Any) -> None:
    """Say that a correction was withdrawn, where what was applied has cost more than chance."""
    applied = [one["adapter"] - one["none"] for one in record.losses[-10:] if one["strength"] > 0]
    latest = [cost for cost in applied if np.isfinite(cost)]
    fading = FAST ** np.arange(len(latest))[::-1]
    harm = float(fading @ latest) / fading.sum() if len(latest) >= FEW else 0.0
    if harm > HARM and record.corrector.n_rows > SPOKEN_OF:
        warnings.warn(
            f"the correction is withdrawn after round {number}: over the latest rounds it cost "
            f"{harm:.3f} nats a row more than it saved.",
            PerformativeWarning,
            stacklevel=5,
        )


def _scored(opened: Opened, X: Any, rows: np.ndarray, measured: Measured | None) -> tuple:
    """Scores and own predictions of rows (m,), honest ones where there are, and which those are."""
    logits, own = np.empty((len(rows), len(opened.classes))), np.empty(len(rows), np.int64)
    at = np.zeros(0, np.int64)
    if measured is not None:
        at = np.searchsorted(rows, measured.rows)
        logits[at], own[at] = measured.logits, measured.own
    rest = np.setdiff1d(np.arange(len(rows)), at)
    if len(rest):
        part = take(X, rows[rest])
        logits[rest] = opened.logits(part)
        own[rest] = opened.own(part, logits[rest])
    return logits, own, None if measured is None else np.isin(np.arange(len(rows)), at)


def strata_codes(record: Record, strata: Any) -> Any:
    """Find the numbers of strata (n,), None where the record knows of none."""
    if strata is None or record.strata is None:
        return None
    return _inputs.encode(np.asarray(strata), record.strata, known_to="the record", name="strata")


def replaced(
    record: Record, estimator: Any, X: Any, y: Any, params: dict[str, Any]
) -> tuple[Any, Record]:
    """Fit or take another classifier; give it and the record that goes on with it."""
    fitted, classes, rows, base = estimator, record.classes, None, None
    finds_base = given_base(params, classes) is None
    if X is not None:
        codes = _inputs.check_all_labels(y, classes, _inputs.count_rows(X))
        every = np.ones(len(codes))
        data = Data(X, classes[codes], every > 0, 0 * codes, every)
        fitted, _, found, base = taken(estimator, params, data, record.options.seed, None, classes)
        rows = found.logits, codes[found.rows]
    options = replace(record.options, refines_base=is_frozen(estimator) and finds_base)
    record = learning.replaced(record, rows, base if finds_base else None)
    return fitted, replace(record, options=options, shown=np.isin(classes, fitted.classes_))


def anticipated(record: Record, statistic: Any, covariates: Any, said: set[str]) -> np.ndarray:
    """Log mix (n_classes,) or (n, n_classes) that answers statistics."""
    trajectory = record.anticipation.trajectory
    if covariates is not None:
        covariates = _inputs.check_covariates(covariates, 1, trajectory.covariates.shape[1])[0]
    if statistic is None:
        return record.prior(None, covariates)[0]
    n_statistics = trajectory.statistics.shape[1]
    recall = record.options.statistic == "recall" and n_statistics == len(record.classes)
    values = _inputs.check_statistic(statistic, n_statistics, is_recall=recall)
    if values.ndim == 2:
        return np.array([anticipated(record, one, covariates, said) for one in values])
    return _held_back(record, values, record.prior(values, covariates)[0], said)


def _held_back(
    record: Record, statistic: np.ndarray, log_prior: np.ndarray, said: set[str]
) -> np.ndarray:
    """Blend towards the base mix where the statistic is far from all that was recorded."""
    seen = record.anticipation.trajectory.statistics[-SEEN:]
    excess = extrapolation(statistic, seen[np.isfinite(seen).all(axis=1)]) / FAR
    if excess <= 1.0 or record.own_rule_holds:
        return log_prior
    if "far" not in said:
        said.add("far")
        warnings.warn(
            f"statistic is {FAR * excess:.1f} times as far from the recorded ones as these are "
            "from one another: the anticipated mix is blended towards the base prior.",
            PerformativeWarning,
            stacklevel=5,
        )
    return np.logaddexp(log_prior - np.log(excess), record.log_base + np.log1p(-1 / excess))


def corrected(record: Record, logits: np.ndarray, log_prior: np.ndarray) -> tuple:
    """Corrected scores (n, n_classes), and whether the classifier's own rule holds."""
    if log_prior.ndim != 1:
        raise ValueError("predict takes one statistic of shape (n_statistics,) for all rows.")
    how, needed = record.options.transductive, 10 * logits.shape[1]
    if how == "auto":
        how = "map_em" if len(logits) >= needed else None
    elif how is not None and len(logits) < needed:
        warnings.warn(
            f"a batch of {len(logits)} rows is short for transductive={how!r}: below {needed} "
            "rows, ten for each class, its label mix is hard to tell.",
            UserWarning,
            stacklevel=4,
        )
    if how is not None:
        log_prior = record.batch_prior(logits, log_prior, how)
    return record.corrected(logits, log_prior), how is None and record.own_rule_holds


def replayed(
    record: Record, opened: Opened, X: Any, codes: np.ndarray, numbers: np.ndarray, strata: Any
) -> np.ndarray:
    """Predict probabilities (n, n_classes) of rounds in order; nothing is learned."""
    state, n_classes = record.anticipation, len(record.classes)
    # rounds of the past may be told once more: what counts is their order
    start = len(state.trajectory)
    trajectory = replace(state.trajectory, rounds=np.arange(-start, 0))
    proba = np.empty((len(codes), n_classes))

    def prior() -> np.ndarray:
        return record.applied(state.log_answer(trajectory.coming())[0])[0]

    missing = _inputs.missing_rounds(state.trajectory.rounds, np.unique(numbers)[0])
    for number in range(missing):
        log_prior = prior()
        trajectory = trajectory.append(
            number,
            record.remembered_statistic(log_prior),
            np.zeros(n_classes),
            # the mix of a round that nobody has labelled is what was anticipated
            mix=log_prior - log_prior.mean(),
        )
    for i, number in enumerate(np.unique(numbers)):
        rows = np.flatnonzero(numbers == number)
        scores = record.corrected(opened.logits(take(X, rows)), prior())
        proba[rows], predicted = probabilities(scores), scores.argmax(axis=1)
        trajectory = trajectory.append(
            missing + i,
            record.measured(
                codes[rows], predicted, scores, strata=None if strata is None else strata[rows]
            ),
            np.bincount(codes[rows], minlength=n_classes).astype(np.float64),
            shares=np.bincount(predicted, minlength=n_classes) / len(rows),
        )
    return proba


def ranked(
    record: Record,
    named: dict,
    X: Any,
    codes: np.ndarray,
    scoring: Any,
    n_bootstrap: int,
    strata: Any,
) -> Bunch:
    """Rank candidates by what they would score in the round after their deployment."""
    models = [_candidate(record, model, X, codes, scoring, strata) for model in named.values()]
    answers = answers_the_model(record)
    if not answers and record.anticipation.n_pairs:
        warnings.warn(
            "the record gives no evidence that the mix answers the deployed model: candidates "
            "are ranked by the mix expected whatever is deployed.",
            PerformativeWarning,
            stacklevel=3,
        )
    generator = np.random.default_rng(record.options.seed)
    found = predict_scores(record, models, codes, n_bootstrap, generator, answers=answers)
    told = zip(("predicted", "low", "high", "prior"), zip(*found, strict=True), strict=True)
    ranking = Bunch(**{name: np.array(values) for name, values in told})
    shares = np.bincount(codes, minlength=len(record.classes)) / len(codes)
    current = [model.score(shares, np.arange(len(codes))) for model in models]
    order = np.argsort(-ranking.predicted, kind="stable")
    ranking.update(order=order, current=np.array(current), names=list(named), fallback=not answers)
    return ranking


def _candidate(
    record: Record, model: Any, X: Any, codes: np.ndarray, scoring: Any, strata: Any
) -> Candidate:
    """Give a candidate's statistic and score as functions of row indices."""
    classes = record.classes
    opened = open_candidate(model, X, classes)
    logits = opened.logits(X, strict=True)
    predicted = opened.own(X, logits)

    def statistic(rows: np.ndarray) -> np.ndarray:
        groups = None if strata is None else strata[rows]
        return record.measured(codes[rows], predicted[rows], logits[rows], strata=groups)

    def by_metric(prior: np.ndarray, rows: np.ndarray) -> float:
        shares = np.bincount(codes[rows], minlength=len(classes)) / len(rows)
        weight = prior[codes[rows]] / shares[codes[rows]]
        labels = classes[codes[rows]], classes[predicted[rows]]
        return float(scoring(*labels, sample_weight=weight))

    if callable(scoring):
        return Candidate(statistic, by_metric)
    if scoring == "accuracy":
        scores = (predicted == codes).astype(np.float64)
    else:
        own = logits[np.arange(len(codes)), codes]
        scores = own - np.logaddexp.reduce(logits, axis=1)
    return Candidate(statistic, lambda p, rows: score_under(p, scores[rows], codes[rows]))


def published(record: Record) -> dict[str, Any]:
    """Spread a record over fitted attributes."""
    state = record.anticipation
    trajectory, leader = state.trajectory, state.leader
    log_prior, strength = record.prior()
    choice = record.corrector.choice
    calibrator = record.corrector.calibrators[choice.calibration]
    lead = state.contenders[leader] if leader else None
    found = {
        "record_": record,
        "classes_": record.classes,
        "base_prior_": np.exp(record.log_base),
        "calibrator_": calibrator,
        "trajectory_": trajectory,
        "adapter_": Answering(state.log_answer, state.ahead[0], lead and lead.response),
        "leader_": leader or "nothing yet",
        "adapter_name_": lead.kind if lead and strength > 0.0 else "fixed",
        "strength_": strength,
        "mix_": choice.mix,
        "fallback_": record.own_rule_holds and calibrator is None,
        "predicted_prior_": np.exp(log_prior),
        "n_rounds_": state.n_rounds,
    }
    if len(trajectory):
        known = np.flatnonzero(np.isfinite(trajectory.statistics).all(axis=1))
        found["statistic_"] = trajectory.statistics[known[-1] if len(known) else -1]
    return found


def warn_of_little(record: Record, numbers: np.ndarray | None) -> None:
    """Warn of what a record cannot tell: too few rounds, gaps, a model that never changed."""
    state, least = record.anticipation, record.options.min_rounds
    if numbers is not None:
        _inputs.warn_of_gaps(numbers)
    if 0 < state.n_rounds < least:
        warnings.warn(
            f"{state.n_rounds} rounds are fewer than min_rounds={least}: the adapter "
            "is 'fixed' and nothing is corrected.",
            UserWarning,
            stacklevel=3,
        )
    elif state.n_pairs > 1 and quick_diagnostics(record)["rank"] == 0:
        warnings.warn(
            "the statistic was the same in every round, so the response to a change of model "
            "is not identifiable from these deployments: slopes rest on shrinkage alone.",
            PerformativeWarning,
            stacklevel=3,
        )


def warn_in_a_search() -> None:
    """Warn where a splitter along rounds made the training rows, but no rounds were passed."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_fit_and_score":
        frame = frame.f_back
    if frame is None:
        return
    # newer versions of scikit-learn make plain arrays of the indices they were called with
    called = frame.f_back.f_locals.get("kwargs", {})
    if hasattr(called.get("train", frame.f_locals.get("train")), "of_rounds"):
        warnings.warn(
            "fitted in a search along rounds, but without rounds: nothing is corrected. Pass "
            "rounds= to its fit as well, or let it route one column: "
            'adapter.set_fit_request(rounds="groups").',
            PerformativeWarning,
            stacklevel=3,
        )
