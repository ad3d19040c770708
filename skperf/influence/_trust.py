"""Methods of InfluenceScorer that hold its estimates against training."""

import warnings

import numpy as np
import torch
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Bunch
from sklearn.utils.validation import check_is_fitted
from skorch import NeuralNet
from torch import nn

from skperf.backbone._modules import ModuleClassifier
from skperf.backbone._opening import fit_estimator, open_network
from skperf.backbone._validation import labelled_array_rows as check_labelled_rows
from skperf.backbone.outputs import resolve_output
from skperf.influence._members import learning_rate_of, networks_of, open_problem
from skperf.influence._scoring import influence_matrix, open_members, query_gradients
from skperf.influence.horizon import FurtherTraining, actual_effects, agreement, usable_horizon
from skperf.influence.problem import scores_of
from skperf.influence.retraining import Recipe, half_subsets, stacked_outputs, train_subsets
from skperf.metrics import linear_datamodeling_score

_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def fading(
    self,
    X,
    y,
    *,
    steps=_STEPS,
    n_train=64,
    learning_rate=None,
    batch_size=64,
    weight_decay=None,
    least=0.8,
):
    """Hold predicted against actual effects of further training.

    From the fitted weights the network is trained on with plain gradient steps, once with
    all rows and once for each of some training rows with that row's weight zero, in the same
    order of batches. The actual effect is the difference between two such runs.

    Parameters
    ----------
    X : array-like of shape (n_query, ...)
        Queries.
    y : array-like of shape (n_query,)
        Their labels.
    steps : sequence of int, default=(1, 2, 5, ..., 500)
        When to compare. With a damping tied to a horizon, each is its own horizon.
    n_train : int, default=64
        Training rows, drawn at random, that are left out in turn.
    learning_rate : float, optional
        Step size; by default the scorer's, else the estimator's, else 0.03.
    batch_size : int, default=64
        Rows a step.
    weight_decay : float, optional
        By default the estimator's.
    least : float, default=0.8
        Correlation that still counts as usable.

    Returns
    -------
    Bunch
        steps : ndarray of shape (n_steps,);
        pearson, spearman : ndarray of shape (n_steps,), mean over queries of the correlation
        across left-out rows;
        slope : ndarray of shape (n_steps,), actual over predicted effect;
        usable_horizon : int, the last step before `pearson` falls below `least`; 0 where already
        the first does, as with a damping far below ``1 / (learning_rate * step)``;
        rows : ndarray of shape (n_train,), which rows were left out;
        predicted, actual : ndarray of shape (n_steps, n_query, n_train).
    """
    check_is_fitted(self)
    X, y = check_labelled_rows(self, X, y)
    steps = sorted({int(step) for step in steps})
    if not steps or steps[0] < 1:
        raise ValueError(f"steps must be positive numbers of training steps, got {steps}.")
    network = networks_of(self)[0][0]
    problem = open_problem(self, network)
    generator = torch.Generator().manual_seed(self.settings_.seed)
    rows = torch.randperm(problem.n_train, generator=generator)[:n_train]
    training = FurtherTraining(
        learning_rate or learning_rate_of(self) or 0.03,
        min(batch_size, problem.n_train),
        self.settings_.weight_decay if weight_decay is None else weight_decay,
        self.settings_.seed,
    )
    _check_step_size(self, training.learning_rate)
    output = resolve_output(self.target, argument="target")
    sign = 1.0 if self.target == "loss" else -1.0
    actual = sign * actual_effects(
        network,
        problem.parameters,
        network.tensor(problem.X),
        problem.codes.to(network.device),
        rows,
        (network.tensor(X), network.codes(y)),
        output,
        training,
        steps,
        shares=problem.shares,
        verbose=self.verbose,
    )
    predicted = _predicted(self, X, y, steps, rows, training)
    figures = [agreement(p, a) for p, a in zip(predicted, actual, strict=True)]
    pearson, spearman, slope = map(np.array, zip(*figures, strict=True))
    return Bunch(
        steps=np.array(steps),
        pearson=pearson,
        spearman=spearman,
        slope=slope,
        usable_horizon=usable_horizon(steps, pearson, least=least),
        rows=rows.numpy(),
        predicted=predicted.numpy(),
        actual=actual.cpu().numpy(),
    )


def _check_step_size(scorer, learning_rate):
    curvature = getattr(scorer.fits_[0].lift, "curvature", None)
    if curvature is None:
        return
    largest = float(torch.linalg.eigvalsh(curvature.gram)[-1])
    if learning_rate * largest > 2:
        warnings.warn(
            f"learning_rate={learning_rate:.3g} is too large for plain gradient steps: times the "
            f"curvature's largest eigenvalue, {largest:.3g}, it exceeds 2, so that the runs drift "
            "apart at once and no estimate holds. Give fading a smaller one.",
            RuntimeWarning,
            stacklevel=3,
        )


def _predicted(scorer, X, y, steps, rows, training):
    """Scores of the rows that are left out, at each horizon where they depend on it."""
    if scorer.horizon is None and scorer.damping not in ("horizon", "flow"):
        return _scores_of_rows(scorer, X, y, rows).expand(len(steps), -1, -1)
    how = "flow" if scorer.damping == "flow" else "horizon"
    there = (scorer._redamped(how, step, training.learning_rate) for step in steps)
    return torch.stack([_scores_of_rows(one, X, y, rows) for one in there])


def _scores_of_rows(scorer, X, y, rows):
    output = resolve_output(scorer.target, argument="target")
    parts = [
        weight * scores_of(problem, fitted, query_gradients(scorer, problem, output, X, y), rows)
        for problem, fitted, weight in open_members(scorer)
    ]
    return torch.stack(parts).sum(0)


def score(self, X, y, *, n_subsets=50, fraction=0.5, recipe=None):
    """Compute the linear datamodeling score from subset retraining.

    The network is retrained on random subsets of the training rows; the summed influences of
    a subset's rows are correlated, for every query, with minus the retrained loss.

    Parameters
    ----------
    X : array-like of shape (n_query, ...)
        Queries.
    y : array-like of shape (n_query,)
        Their labels.
    n_subsets : int, default=50
        Retrainings.
    fraction : float, default=0.5
        Share of the rows in a subset.
    recipe : Recipe, optional
        Train fresh copies of the network this way, all at once. By default the estimator's
        own training is repeated: at once where it is a network of ours without dropout and
        normalisation, by refits otherwise, spread over `n_jobs`. A bare module has no training
        to repeat and gets ``Recipe()``.

    Returns
    -------
    float
        Mean over queries of a Spearman correlation; 1 is perfect.
    """
    check_is_fitted(self)
    X, y = check_labelled_rows(self, X, y)
    generator = torch.Generator().manual_seed(self.settings_.seed + 1)
    subsets = half_subsets(len(self.X_), n_subsets, generator, fraction=fraction)
    losses = retrained_losses(self, X, y, subsets, recipe)
    return linear_datamodeling_score(influence_matrix(self, X, y), subsets.numpy(), losses)


def retrained_losses(scorer, X, y, subsets, recipe=None):
    """Loss of queries after training on subsets.

    Shapes: X (n_query, ...), y (n_query,) -> (n_subsets, n_query).
    """
    network = networks_of(scorer)[0][0]
    fitted = scorer.estimators_[0]
    inner = fitted.estimator if isinstance(fitted, FrozenEstimator) else fitted
    output = resolve_output(scorer.target, argument="target")
    sign = 1.0 if scorer.target == "loss" else -1.0
    recipe = recipe or _recipe_of(inner, network, subsets.shape[1])
    if recipe is None:
        return sign * _refitted(scorer, inner, X, y, subsets, output)
    seeds = [scorer.settings_.seed + 1000 + i for i in range(len(subsets))]
    weights = scorer.sample_weight_
    stacked = train_subsets(
        network,
        network.tensor(scorer.X_),
        network.codes(scorer.y_),
        subsets,
        recipe,
        seeds=seeds,
        weights=None if weights is None else network.tensor(weights),
        verbose=scorer.verbose,
    )
    values = stacked_outputs(network, stacked, network.tensor(X), network.codes(y), output)
    return sign * values.numpy()


def _recipe_of(fitted, network, n_train):
    """Repeat a skorch net's training by a recipe, where that is faithful."""
    if isinstance(fitted, ModuleClassifier | nn.Module):
        return Recipe()
    mixes = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd, nn.Conv2d)
    if not isinstance(fitted, NeuralNet) or any(
        isinstance(m, mixes) for m in network.module.modules()
    ):
        return None
    if fitted.optimizer not in (torch.optim.Adam, torch.optim.SGD, torch.optim.AdamW):
        return None
    extra = {
        name.removeprefix("optimizer__"): value
        for name, value in fitted.get_params(deep=False).items()
        if name.startswith("optimizer__")
    }

    def optimizer(tensors):
        return fitted.optimizer(tensors, lr=fitted.lr, **extra)

    size = fitted.batch_size if fitted.batch_size > 0 else n_train
    return Recipe(optimizer, fitted.max_epochs, size)


def _refitted(scorer, fitted, X, y, subsets, output):
    seeds = range(len(subsets))
    jobs = (
        delayed(_refit)(clone(fitted), scorer.X_[kept], scorer.y_[kept], X, y, output, seed)
        for kept, seed in zip(subsets.numpy(), seeds, strict=True)
    )
    return np.stack(Parallel(scorer.n_jobs)(jobs))


def _refit(estimator, X_train, y_train, X, y, output, seed):
    if "random_state" in estimator.get_params(deep=False):
        estimator.set_params(random_state=seed)
    network = open_network(fit_estimator(estimator, X_train, y_train, random_state=seed))
    return output(network.logits(X), network.codes(y).cpu()).numpy()
