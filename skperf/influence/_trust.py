"""Hold estimates against training: further, on subsets, and assumption by assumption."""

import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Bunch
from skorch import NeuralNet
from torch import Tensor, nn

from skperf.backbone._modules import ModuleClassifier
from skperf.backbone._opening import fit_estimator, open_network
from skperf.backbone._stock import own_names
from skperf.backbone.losses import Loss
from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.influence._members import Learned, learning_rate_of, with_damping
from skperf.influence._stages import with_weights
from skperf.influence.captures import recording
from skperf.influence.gradients import squared_norms
from skperf.influence.horizon import (
    FurtherTraining,
    actual_effects,
    correlation,
    curve,
)
from skperf.influence.layers import to_vectors
from skperf.influence.methods import RowForm
from skperf.influence.problem import random_vector
from skperf.influence.retraining import Recipe, half_subsets, stacked_outputs, train_subsets
from skperf.influence.scoring import Ensemble
from skperf.influence.solvers import arnoldi
from skperf.metrics import linear_datamodeling_score


def fading_curve(
    learned: Learned,
    X: Rows,
    y: Any,
    *,
    steps: list[int],
    n_train: int,
    batch_size: int,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    least: float = 0.8,
) -> Bunch:
    """Hold predicted against actual effects of further training: X (n_query, ...)."""
    settings, n, rows = learned.settings, len(learned.X), _drawn(learned, n_train)
    training = FurtherTraining(
        learning_rate or _rate_of(learned),
        min(batch_size, n),
        settings.weight_decay if weight_decay is None else weight_decay,
        settings.seed + 7919,
    )
    _check_step_size(learned, training.learning_rate)
    actual = _effects(learned, X, y, rows, training, steps)
    predicted = _predicted(learned, X, y, steps, rows, training)
    figures = curve(steps, predicted, actual, least)
    effects = {"predicted": predicted.numpy(), "actual": actual.cpu().numpy()}
    return Bunch(rows=rows.numpy(), **effects, **figures)


def _drawn(learned: Learned, n_train: int) -> Tensor:
    # by a generator of its own: not the rows that the first batches happen to use
    generator = torch.Generator().manual_seed(learned.settings.seed)
    return torch.randperm(len(learned.X), generator=generator)[:n_train]


def _rate_of(learned: Learned) -> float:
    return learning_rate_of(learned.estimators[0], learned.choices.learning_rate) or 0.03


def _judge(ensemble: Ensemble) -> tuple[Any, float]:
    """Give the function of what is asked about, and the sign that makes less of it better."""
    output = ensemble.output
    return (output.value, 1.0) if isinstance(output, Loss) else (output, -1.0)


def _effects(
    learned: Learned,
    X: Rows,
    y: Any,
    rows: Tensor,
    training: FurtherTraining,
    steps: list[int],
    kept: float = 0.0,
) -> Tensor:
    """Train on with some rows at a share of their weight: -> (n_steps, n_query, m)."""
    problem = learned.plain_problem()
    network, (output, sign) = problem.network, _judge(learned.opened())
    effects = actual_effects(
        network,
        problem.parameters,
        network.inputs(problem.X),
        problem.targets.to(network.device),
        rows,
        (network.inputs(X), network.targets(y)),
        output,
        training,
        steps,
        weights=problem.relative_weights(),
        kept=torch.full((len(rows),), kept),
        verbose=problem.settings.verbose,
    )
    return sign * effects


def _check_step_size(learned: Learned, learning_rate: float) -> None:
    lift = learned.stages[0].fit.lift
    if not isinstance(lift, RowForm) or lift.stretch != 1:
        return
    largest = float(torch.linalg.eigvalsh(lift.filtered.curvature.gram)[-1])
    if learning_rate * largest > 2:
        warnings.warn(
            f"learning_rate={learning_rate:.3g} is too large for plain gradient steps: times the "
            f"curvature's largest eigenvalue, {largest:.3g}, it exceeds 2, so that the runs drift "
            "apart at once and no estimate holds. Give fading a smaller one.",
            RuntimeWarning,
            stacklevel=4,
        )


def _predicted(
    learned: Learned, X: Rows, y: Any, steps: list[int], rows: Tensor, training: FurtherTraining
) -> Tensor:
    """Scores of the rows that are left out, at each horizon where they depend on it."""
    choices = learned.choices
    if choices.horizon is None and choices.damping not in ("horizon", "flow"):
        return _scores(learned, X, y, rows).expand(len(steps), -1, -1)
    how = "flow" if choices.damping == "flow" else "horizon"
    at_rate = replace(learned, choices=replace(choices, learning_rate=training.learning_rate))
    return torch.stack([_scores(with_damping(at_rate, how, step), X, y, rows) for step in steps])


def _scores(learned: Learned, X: Rows, y: Any, rows: Tensor) -> Tensor:
    ensemble = learned.opened()
    targets = ensemble.first.network.targets(y).cpu()
    return ensemble.scores_of(X, targets, rows)


def datamodeling_score(
    learned: Learned, X: Rows, y: Any, *, n_subsets: int, fraction: float, recipe: Any
) -> float:
    """Linear datamodeling score from subset retraining: X (n_query, ...)."""
    generator = torch.Generator().manual_seed(learned.settings.seed + 1)
    subsets = half_subsets(len(learned.X), n_subsets, generator, fraction=fraction)
    losses = retrained_losses(learned, X, y, subsets, recipe)
    return float(linear_datamodeling_score(_matrix(learned, X, y), subsets.numpy(), losses))


def retrained_losses(
    learned: Learned, X: Rows, y: Any, subsets: Tensor, recipe: Recipe | None = None
) -> NDArray[Any]:
    """Loss of queries after training on subsets: -> (n_subsets, n_query)."""
    network = learned.network()
    fitted = learned.estimators[0]
    inner = fitted.estimator if isinstance(fitted, FrozenEstimator) else fitted
    output, sign = _judge(learned.opened())
    recipe = recipe or _recipe_of(inner, network, subsets.shape[1])
    seed = learned.settings.seed
    if recipe is None:
        return sign * _refitted(learned, inner, X, y, subsets, output)
    problem = learned.plain_problem()
    weights = problem.relative_weights()
    stacked = train_subsets(
        network,
        network.inputs(learned.X),
        network.targets(learned.y),
        subsets,
        recipe,
        seeds=[seed + 1000 + i for i in range(len(subsets))],
        weights=None if weights is None else weights.to(network.device, network.dtype),
        verbose=learned.settings.verbose,
    )
    values = stacked_outputs(network, stacked, network.inputs(X), network.targets(y), output)
    return sign * values.numpy()


def _recipe_of(fitted: Any, network: Network, n_train: int) -> Recipe | None:
    """Repeat a skorch net's training by a recipe, where that is faithful."""
    if isinstance(fitted, ModuleClassifier | nn.Module):
        return Recipe()
    mixes = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Conv2d)
    if not isinstance(fitted, NeuralNet) or any(
        isinstance(m, mixes) for m in network.module.modules()
    ):
        return None
    # torch's class weights are shared out batch by batch, which only its own training repeats
    weighted = getattr(network.loss, "weight", None) is not None
    if weighted or fitted.optimizer not in (torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW):
        return None
    called = fitted.callbacks not in (None, [], "disable")
    if fitted.train_split or called or own_names(fitted) or vars(fitted).get("train_masks_"):
        return None
    extra = {
        name.removeprefix("optimizer__"): value
        for name, value in fitted.get_params(deep=False).items()
        if name.startswith("optimizer__")
    }
    if "param_groups" in extra:
        return None

    def optimizer(tensors: list[Tensor]) -> Any:
        return fitted.optimizer(tensors, lr=fitted.lr, **extra)

    size = fitted.batch_size if fitted.batch_size > 0 else n_train
    return Recipe(optimizer, fitted.max_epochs, size)


def _refitted(
    learned: Learned, fitted: Any, X: Rows, y: Any, subsets: Tensor, output: Any
) -> NDArray[Any]:
    jobs = (
        delayed(_refit)(learned, clone(fitted), np.flatnonzero(kept), X, y, output, seed)
        for seed, kept in enumerate(subsets.numpy())
    )
    return np.stack(Parallel(learned.choices.n_jobs)(jobs))


def _refit(
    learned: Learned, fresh: Any, kept: Any, X: Rows, y: Any, output: Any, seed: int
) -> NDArray[Any]:
    if "random_state" in fresh.get_params(deep=False):
        fresh.set_params(random_state=seed)
    weights = None if learned.weights is None else learned.weights[kept].numpy()
    rows, loss = (learned.X[kept], np.asarray(learned.y)[kept]), learned.choices.loss
    again = fit_estimator(fresh, *rows, sample_weight=weights, random_state=seed, loss=loss)
    network = open_network(again, loss=loss)
    values: Tensor = output(network.logits(X), network.targets(y).cpu())
    return values.numpy()


def diagnosis(learned: Learned, X: Rows, y: Any, *, n_train: int, steps: list[int]) -> Bunch:
    """Measure the assumptions of influence on a network: X (n_query, ...)."""
    found = {
        "convexity": _convexity(learned),
        "stability_of_numbers": _numbers(learned, X, y),
        "trajectory": _trajectory(learned),
        "divergence": _divergence(learned, X, y, n_train, steps),
        "first_order": _first_order(learned, X, y, n_train),
    }
    if len(learned.estimators) > 1:
        found["stability"] = _over_seeds(learned, X, y)
    return Bunch(**found)


def _entry(
    value: float, threshold: float, advice: str, *, more_is_better: bool = False, **more: Any
) -> Bunch:
    good = value >= threshold if more_is_better else value < threshold
    verdict = "holds" if good else "does not hold"
    return Bunch(value=value, threshold=threshold, verdict=verdict, advice=advice, **more)


def _convexity(learned: Learned) -> Bunch:
    """Share of the curvature's large eigenvalues that are negative, and how large they are."""
    problem = learned.plain_problem()
    with recording(problem.network.module):
        product, start = problem.product("hessian"), random_vector(problem)
        values, _ = arnoldi(product, start, n_iterations=min(40, len(start)))
    negative = values[values < 0]
    size = float(-negative.min() / values.abs().max()) if len(negative) else 0.0
    return _entry(
        size,
        0.1,
        "The Hessian has directions of negative curvature; stay with the Gauss-Newton form, "
        "curvature='ggn', or damp beyond the most negative eigenvalue.",
        share_negative=len(negative) / len(values),
        most_negative=float(negative.min()) if len(negative) else 0.0,
        largest=float(values.abs().max()),
    )


def _numbers(learned: Learned, X: Rows, y: Any) -> Bunch:
    """How far scores change with the batch size, the damping and the precision."""
    plain = _matrix(learned, X, y)
    smaller = replace(learned, choices=replace(learned.choices, batch_size=7))
    change = np.abs(_matrix(smaller, X, y) - plain).max() / max(np.abs(plain).max(), 1e-300)
    changes: dict[str, Any] = {"batch_size": float(change)}
    damping = learned.stages[0].fit.report.get("damping")
    if isinstance(damping, float) and damping > 0 and learned.method.name in ("ggn", "exact"):
        other = with_damping(learned, 2 * damping)
        changes["damping"] = 1 - correlation(_matrix(other, X, y), plain)
    problem = learned.plain_problem()
    if problem.network.dtype == torch.float32:
        double = with_weights(problem.network, None, double=True)
        rows = slice(0, min(32, problem.n_train))
        again = learned.problem(double, learned.stages[0].plan)
        one, two = (
            to_vectors(p.layers, p.gradients(p.loss, p.X[rows], p.targets[rows]), p.parameters)
            for p in (problem, again)
        )
        changes["precision"] = float((one.double() - two).norm() / two.norm().clamp_min(1e-30))
    return _entry(
        max(changes.values()),
        0.05,
        "Scores change with what should not matter: raise damping, or use a float64 module.",
        **changes,
    )


def _trajectory(learned: Learned) -> Bunch:
    """How far the weights are from a minimum: the mean gradient beside those of single rows."""
    problem = learned.plain_problem()
    gradients = problem.train_gradients()
    single = float(squared_norms(gradients).mean().sqrt())
    mean = to_vectors(problem.layers, gradients, problem.parameters).mean(0)
    decay = problem.settings.weight_decay
    own = torch.cat([p.reshape(-1) for p in problem.parameters.values()]).cpu()
    left = float((mean + decay * own).norm())
    # the mean of n independent gradients of mean zero is that long
    by_chance = single / problem.n_train**0.5
    return _entry(
        left / max(by_chance, 1e-30),
        1.0,
        "The network has not come to rest, so that how it was trained matters: "
        "method='replay' follows the run, damping='flow' a horizon from here on.",
        mean_gradient=left,
        by_chance=by_chance,
    )


def _divergence(learned: Learned, X: Rows, y: Any, n_train: int, steps: list[int]) -> Bunch:
    """Summarise the fading curve."""
    n = len(learned.X)
    found = fading_curve(learned, X, y, steps=steps, n_train=n_train, batch_size=n)
    value = float(found.pearson[-1])
    return _entry(
        value,
        0.8,
        f"Runs with and without a row drift apart: predictions hold for {found.usable_horizon} "
        "further steps. Tie the damping to the horizon: damping='flow', horizon=...",
        more_is_better=True,
        curve=found,
        usable_horizon=found.usable_horizon,
    )


def _first_order(learned: Learned, X: Rows, y: Any, n_train: int) -> Bunch:
    """Effects of row weights .5 and 0 beside each other: a straight line has half and whole."""
    rows = _drawn(learned, n_train)
    training = FurtherTraining(_rate_of(learned), len(learned.X), learned.settings.weight_decay)
    half, whole = (
        _effects(learned, X, y, rows, training, [20], kept)[0].double() for kept in (0.5, 0.0)
    )
    slope = float((half * whole).sum() / whole.square().sum().clamp_min(1e-300))
    predicted = _scores(learned, X, y, rows).double()
    ratio = float((predicted * whole).sum() / predicted.square().sum().clamp_min(1e-300))
    return _entry(
        abs(slope - 0.5) / 0.5,
        0.1,
        "Leaving a row out is no small change: half of it does not have half of the effect. Trust "
        "the order of rows more than the size of their scores.",
        half_to_whole=slope,
        actual_to_predicted=ratio,
    )


def _over_seeds(learned: Learned, X: Rows, y: Any) -> Bunch:
    """How far the members of an ensemble agree, and by that what their mean is worth."""
    each = [
        _matrix(replace(learned, stages=(replace(stage, share=1.0),)), X, y)
        for stage in learned.stages
    ]
    value = float(np.mean([correlation(one, two) for one, two in pairwise(each)]))
    k = len(each)
    together = k * value / (1 + (k - 1) * value) if value > 0 else 0.0
    return _entry(
        together,
        0.8,
        "Networks trained from other seeds score differently: give more of them as a list, and "
        "trust their mean.",
        more_is_better=True,
        between_members=value,
        of_the_mean=together,
    )


def _matrix(learned: Learned, X: Rows, y: Any) -> NDArray[Any]:
    ensemble = learned.opened()
    scores: NDArray[Any] = ensemble.matrix(X, ensemble.first.network.targets(y).cpu())
    return scores
