"""Open a scorer's networks and state its choices."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import nn

from skperf.backbone._nets import seed_of
from skperf.backbone._opening import fit_estimator, open_network
from skperf.backbone.parameters import select_parameters
from skperf.influence.captures import record, record_reference
from skperf.influence.damping import horizon_time
from skperf.influence.horizon import FurtherTraining, further_trained
from skperf.influence.layers import find_layers
from skperf.influence.problem import Problem, Settings
from skperf.influence.tiles import Shelf, budget_in_bytes


def fitted_members(scorer, X, y, sample_weight):
    """Fit every member that is not fitted: X (n, ...), y (n,), sample_weight (n,)."""
    members = scorer.estimator
    if not isinstance(members, list | tuple):
        members = [members]
    elif not members:
        raise ValueError("estimator is an empty list; an ensemble needs at least one network.")
    else:
        members = [_kept_if_fitted(member) for member in members]
    seed = None if scorer.random_state is None else seed_of(scorer.random_state)
    fitted = [
        fit_estimator(
            member,
            X,
            y,
            sample_weight=sample_weight,
            random_state=None if seed is None else (seed + i) % (2**31),
        )
        for i, member in enumerate(members)
    ]
    first = open_network(fitted[0]).classes
    for other in fitted[1:]:
        classes = open_network(other).classes
        if len(classes) != len(first) or (classes != first).any():
            raise ValueError(
                f"the members of an ensemble must know the same classes in the same order: "
                f"{first.tolist()[:20]} and {classes.tolist()[:20]}."
            )
    return fitted


def _kept_if_fitted(member):
    if isinstance(member, BaseEstimator) and not isinstance(member, FrozenEstimator):
        try:
            check_is_fitted(member)
        except NotFittedError:
            return member
        return FrozenEstimator(member)
    return member


def networks_of(scorer):
    """Open a fitted scorer's networks."""
    networks = [open_network(estimator) for estimator in scorer.estimators_]
    if scorer.method_ == "tracin":
        return _checkpoints(scorer, networks)
    if scorer.method_ == "exact":
        networks = [_in_double(network) for network in networks]
    return [(network, 1 / len(networks)) for network in networks]


def _in_double(network):
    if network.dtype == torch.float64:
        return network
    copy = network.copy()
    return replace(copy, module=copy.module.double())


def _checkpoints(scorer, networks):
    if not scorer.checkpoints:
        raise ValueError(
            "method='tracin' sums over checkpoints: give a list of state dicts, modules or fitted "
            "estimators, or use method='gradient_dot' for the final weights alone."
        )
    rates = scorer.learning_rate
    rates = (
        [1.0 if rates is None else rates] * len(scorer.checkpoints) if _is_number(rates) else rates
    )
    if len(rates) != len(scorer.checkpoints):
        raise ValueError(
            f"learning_rate has {len(rates)} entries for {len(scorer.checkpoints)} checkpoints."
        )
    return [
        (_loaded(network, checkpoint, i), float(rate) / len(networks))
        for network in networks
        for i, (checkpoint, rate) in enumerate(zip(scorer.checkpoints, rates, strict=True))
    ]


def _is_number(rates):
    return rates is None or not hasattr(rates, "__len__")


def _loaded(network, checkpoint, i):
    if isinstance(checkpoint, Mapping):
        state = checkpoint
    elif isinstance(checkpoint, nn.Module):
        state = checkpoint.state_dict()
    elif isinstance(checkpoint, BaseEstimator):
        state = open_network(checkpoint).module.state_dict()
    else:
        raise TypeError(
            f"checkpoint {i} is a {type(checkpoint).__name__}; needed is a state dict, a module or "
            "a fitted estimator. Read files with torch.load."
        )
    own = network.module.state_dict()
    for name, tensor in own.items():
        if name not in state or state[name].shape != tensor.shape:
            seen = "missing" if name not in state else f"of shape {tuple(state[name].shape)}"
            raise ValueError(
                f"checkpoint {i} does not fit the estimator: {name!r} is {seen}, expected shape "
                f"{tuple(tensor.shape)}."
            )
    copy = network.copy()
    copy.module.load_state_dict(dict(state), strict=False)
    return copy


def named_settings(scorer):
    """State a scorer's choices for the mathematics."""
    tied = scorer.horizon is not None or scorer.damping in ("horizon", "flow")
    return Settings(
        curvature=scorer.curvature,
        damping=scorer.damping if isinstance(scorer.damping, str) else float(scorer.damping),
        horizon=scorer.horizon,
        learning_rate=learning_rate_of(scorer) if tied else None,
        weight_decay=weight_decay_of(scorer.estimators_[0]),
        kept_trace=scorer.kept_trace,
        max_rows=scorer.max_rows,
        rank=scorer.rank,
        n_components=scorer.n_components,
        n_projections=scorer.n_projections,
        tol=scorer.tol,
        max_iter=scorer.n_iterations,
        scale=scorer.lissa_scale,
        select=scorer.select,
        ratio=scorer.ratio,
        ridge=scorer.ridge,
        seed=0 if scorer.random_state is None else seed_of(scorer.random_state),
        verbose=scorer.verbose,
    )


def learning_rate_of(scorer):
    """Find the step size of further training."""
    if scorer.learning_rate is not None:
        return float(scorer.learning_rate)
    params = params_of(scorer.estimators_[0])
    rate = params.get("lr", params.get("learning_rate_init"))
    return None if rate is None else float(rate)


def weight_decay_of(fitted):
    """Find the weight decay that an estimator was trained with."""
    return float(params_of(fitted).get("optimizer__weight_decay", 0.0))


def params_of(fitted):
    """Parameters of an estimator, frozen or not."""
    if isinstance(fitted, FrozenEstimator):
        fitted = fitted.estimator
    return fitted.get_params(deep=False) if hasattr(fitted, "get_params") else {}


def open_problem(scorer, network):
    """State the problem that a method is fitted on."""
    parameters = select_parameters(network.module, scorer.parameters)
    if scorer.gradients == "reference":
        layers = []

        def recorder(network, inputs):
            return record_reference(network, inputs, parameters)
    else:
        layers = find_layers(network.module, parameters)

        def recorder(network, inputs):
            return record(network, inputs, layers)

    weights = scorer.sample_weight_
    n = len(scorer.X_)
    shares = torch.full((n,), 1 / n, dtype=torch.float64)
    if weights is not None:
        shares = torch.as_tensor(weights, dtype=torch.float64) / float(weights.sum())
    return Problem(
        network,
        parameters,
        layers,
        recorder,
        scorer.X_,
        network.codes(scorer.y_).cpu(),
        shares,
        scorer.settings_,
        scorer.batch_size or _batch_size(network),
        Shelf(budget_in_bytes(scorer.memory_budget), scorer.storage),
    )


def linearised(scorer):
    """State the problems that a scorer's methods are fitted on."""
    found = networks_of(scorer)
    if scorer.ahead_ is not None:
        found = [
            (_moved(network, weights), share)
            for (network, share), weights in zip(found, scorer.ahead_, strict=True)
        ]
    return [(open_problem(scorer, network), share) for network, share in found]


def _moved(network, weights):
    copy = network.copy()
    own = dict(copy.module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    return copy


def half_way(scorer):
    """Train each member on for half of the horizon."""
    # The effect of a row on a horizon of training is that of gradients and curvature along the
    # way; those of its middle stand for them all, as in the midpoint rule.
    settings = scorer.settings_
    if settings.damping != "flow":
        return None
    if scorer.method_ not in ("ggn", "exact"):
        raise ValueError(
            f"damping='flow' needs method='ggn' or 'exact', not {scorer.method_!r}; "
            "damping='horizon' ties any damped method to a horizon."
        )
    horizon_time(settings)
    ends = []
    for network, _ in networks_of(scorer):
        problem = open_problem(scorer, network)
        training = FurtherTraining(
            settings.learning_rate,
            min(64, problem.n_train),
            settings.weight_decay,
            settings.seed + 1,
        )
        end = further_trained(
            network,
            problem.parameters,
            network.tensor(problem.X),
            problem.codes.to(network.device),
            problem.shares,
            training,
            settings.horizon // 2,
        )
        ends.append({name: value.cpu() for name, value in end.items()})
    return ends


def _batch_size(network):
    convolves = any(isinstance(part, nn.Conv2d | nn.Conv1d) for part in network.module.modules())
    return 64 if convolves else 2048
