"""What fit learned, as a record, and the networks of it opened for one call."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from skperf.backbone._nets import seed_of
from skperf.backbone._opening import check_told, fit_estimator, open_network, source_of
from skperf.backbone.losses import Loss
from skperf.backbone.network import Network
from skperf.backbone.outputs import resolve_output
from skperf.backbone.parameters import Parameters, checksum, select_parameters
from skperf.backbone.rows import Rows
from skperf.influence._methods import GGN, Exact, Method, Nearest, Replay, Source, TracIn
from skperf.influence._replay import ReplayEnsemble, replay_of
from skperf.influence._stages import moments_of, state_of, with_weights
from skperf.influence.captures import Unusual, record
from skperf.influence.curvature import RowSpace
from skperf.influence.damping import horizon_time
from skperf.influence.horizon import FurtherTraining, further_trained
from skperf.influence.methods import METHODS, redamped, train_and_rows
from skperf.influence.neighbours import last_layer
from skperf.influence.placement import Plan, plan
from skperf.influence.problem import LOSS_UNIT, Fitted, Problem, Settings, at_last_layer
from skperf.influence.scoring import Candidates, Ensemble, Member
from skperf.influence.source import Segment, Unrolled
from skperf.influence.tiles import Shelf, budget_in_bytes

OUTPUTS = ("loss", "log_odds", "logit", "margin", "proba")
_MOST_EXACT = 5000


@dataclass(frozen=True)
class Choices:
    """The scorer's parameters as fit found them."""

    method: Method | None
    parameters: Any
    output: Any
    loss: Loss | None
    damping: float | str
    horizon: int | None
    learning_rate: float | None
    checkpoints: Sequence[Any] | None
    candidates: Nearest | None
    gradients: str
    batch_size: int | None
    memory_budget: str | float
    storage: Any
    seed: int
    n_jobs: int | None
    verbose: int


@dataclass(frozen=True)
class Stage:
    """One network that scores are summed over: a member's own, or with other weights."""

    member: int
    state: Mapping[str, Tensor] | None  # in place of the member's weights
    share: float
    options: dict[str, Any]  # of the method
    plan: Plan
    fit: Fitted


@dataclass(frozen=True)
class Learned:
    """What fit learned."""

    estimators: tuple[Any, ...]
    checksums: tuple[str, ...]
    X: Rows
    y: Any
    weights: Tensor | None  # (n,), given by the user
    choices: Choices
    method: Method
    settings: Settings
    names: tuple[str, ...]  # of the parameters taken into account
    stages: tuple[Stage, ...] = ()
    features: dict[str, Tensor] = field(default_factory=dict)  # of the training rows, once asked

    def networks(self) -> list[Network]:
        """Open a private view of every member, as the user has it."""
        found = []
        for i, (fitted, known) in enumerate(zip(self.estimators, self.checksums, strict=True)):
            if _checksum(fitted) != known:
                which = f"member {i} of the ensemble" if len(self.estimators) > 1 else "estimator_"
                raise ValueError(
                    f"the weights of {which} have changed since InfluenceScorer was fitted on "
                    "them, and its scores would mix the two: fit it again, or on a copy."
                )
            found.append(open_network(fitted, loss=self.choices.loss))
        return found

    def network(self) -> Network:
        """Open a private view of the first member."""
        return self.networks()[0]

    def opened(self) -> Ensemble:
        """Open everything that scores need."""
        networks = self.networks()
        members = []
        for stage in self.stages:
            problem = self.problem(self.staged(networks[stage.member], stage.state), stage.plan)
            members.append(Member(problem, stage.fit, stage.share))
        first, choices = members[0].problem.network, self.choices
        output = first.loss if choices.output == "loss" else _output(choices.output, first)
        near, candidates = choices.candidates, None
        if near is not None:
            candidates = Candidates(near.k, np.asarray(self.y) if near.per_class else None)
        made: Any = Ensemble
        if isinstance(self.method, Replay):
            made = partial(ReplayEnsemble, run=self._replayed(networks[0]))
        ensemble: Ensemble = made(
            members,
            output,
            budget_in_bytes(choices.memory_budget),
            np.dtype(np.float64 if networks[0].dtype == torch.float64 else np.float32),
            choices.n_jobs,
            candidates,
            self.features,
        )
        return ensemble

    def _replayed(self, network: Network) -> Any:
        """Find the run, its rows brought back where pickling has left them out."""
        kept: Any = self.stages[0].fit.lift
        if kept.run.data is None:
            rows = (self.X, self.y, self.weights)
            return replay_of(self.estimators[0], network, self.method, rows, self.choices)
        return kept

    def staged(self, network: Network, state: Mapping[str, Tensor] | None) -> Network:
        """Put a stage's weights into a member's network, doubled where the method asks for it."""
        return with_weights(network, state, double=isinstance(self.method, Exact))

    def problem(self, network: Network, planned: Plan) -> Problem:
        """State the problem that a method is fitted on."""
        parameters = _selected(network, self.names)
        layers = planned.layers(network.module, parameters)
        choices, targets = self.choices, network.targets(self.y).cpu()
        total = row_weights(network.loss, targets, self.weights)
        convolves = any(isinstance(p, nn.Conv2d | nn.Conv1d) for p in network.module.modules())
        return Problem(
            network,
            parameters,
            layers,
            partial(record, layers=layers),
            self.X,
            targets,
            total / total.sum(),
            self.settings,
            choices.batch_size or min(64 if convolves else 2048, planned.at_once),
            Shelf(budget_in_bytes(choices.memory_budget), choices.storage),
        )

    def coverage(self, network: Network) -> float:
        """Share of the parameters that train taken into account."""
        sizes = {name: p.numel() for name, p in network.module.named_parameters()}
        known = sizes if network.trainable is None else {*network.trainable, *self.names}
        return sum(sizes[name] for name in self.names) / sum(sizes[name] for name in known)

    def plain_problem(self) -> Problem:
        """State the problem at the first member's own weights, in its own type."""
        network, stage = self.network(), self.stages[0]
        same = stage.state is None and not isinstance(self.method, Exact)
        planned = stage.plan if same else self.planned(network)
        return self.problem(network, planned)

    def planned(self, network: Network, without: Collection[str] = ()) -> Plan:
        """Choose how to differentiate a network."""
        parameters, how = _selected(network, self.names), self.choices.gradients
        return plan(network, self.X, parameters, how, without)


def row_weights(loss: Loss, targets: Tensor, weights: Tensor | None) -> Tensor:
    """Weight of each row in the sum of losses: targets (n, ...), weights (n,) -> (n,)."""
    own = torch.ones(len(targets), dtype=torch.float64) if weights is None else weights
    if getattr(loss, "balanced", False):
        # scikit-learn balances weighted counts
        counts = torch.bincount(targets, own)
        return own * own.sum() / (int((counts > 0).sum()) * counts.clamp_min(1e-300)[targets])
    of_classes = loss.weights(targets)
    return own if of_classes is None else own * of_classes.double().cpu()


def _checksum(fitted: Any) -> str:
    source = source_of(fitted)
    # scikit-learn's own models have no module: the one that they are converted to has their weights
    return checksum(open_network(fitted).module if source is None else source)


def _selected(network: Network, names: Sequence[str]) -> Parameters:
    own = dict(network.module.named_parameters())
    return {name: own[name].detach() for name in names}


def _output(output: Any, network: Network) -> Any:
    if network.loss.kind != "classes" and isinstance(output, str):
        raise ValueError(
            f"output={output!r} needs class labels, and the loss is {network.loss.name}: use "
            "output='loss', or a function of (outputs, targets)."
        )
    return resolve_output(output, OUTPUTS, network.probabilities)


def fitted_members(
    given: Any, X: Rows, y: Any, *, sample_weight: Any, random_state: Any, loss: Loss | None
) -> tuple[Any, ...]:
    """Fit every member that is not fitted: X (n, ...), y (n, ...), sample_weight (n,)."""
    members = [given]
    if isinstance(given, list | tuple):
        if not given:
            raise ValueError("estimator is an empty list; an ensemble needs at least one network.")
        members = [_kept_if_fitted(member) for member in given]
    seed = None if random_state is None else seed_of(random_state)
    fitted = tuple(
        fit_estimator(
            member,
            X,
            y,
            sample_weight=sample_weight,
            random_state=None if seed is None else (seed + i) % (2**31),
            loss=loss,
        )
        for i, member in enumerate(members)
    )
    if len(fitted) == 1:
        return fitted
    known = [open_network(one, loss=loss).classes for one in fitted]
    first, *others = [None if classes is None else classes.tolist() for classes in known]
    for other in others:
        if other != first:
            raise ValueError(
                "the members of an ensemble must know the same classes in the same order: "
                f"{first and first[:20]} and {other and other[:20]}."
            )
    return fitted


def _kept_if_fitted(member: Any) -> Any:
    if isinstance(member, BaseEstimator) and not isinstance(member, FrozenEstimator):
        try:
            check_is_fitted(member)
        except NotFittedError:
            return member
        return FrozenEstimator(member)
    return member


def learn(
    fitted: tuple[Any, ...], X: Rows, y: Any, weights: Tensor | None, choices: Choices
) -> tuple[Learned, Network]:
    """Fit a method on opened networks, of which the first: X (n, ...), y (n, ...), weights (n,)."""
    for one in () if isinstance(choices.method, Replay) else fitted:
        check_told(one, choices.loss, choices.parameters)
    networks = [open_network(one, loss=choices.loss) for one in fitted]
    first = networks[0]
    _check_loss(first, X, y)
    parameters = _chosen(first, X, choices.parameters)
    method = choices.method or _automatic(first, parameters, choices)
    if choices.output != "loss":
        _output(choices.output, first)
    learned = Learned(
        fitted,
        tuple(_checksum(one) for one in fitted),
        X,
        y,
        weights,
        choices,
        method,
        _settings(fitted[0], first, parameters, y, weights, choices),
        tuple(parameters),
    )
    return replace(learned, stages=tuple(_stages(learned, networks))), first


def _check_loss(network: Network, X: Rows, y: Any) -> None:
    """Refuse targets that the loss has no meaning for, one row run: X (n, ...), y (n, ...)."""
    values, name = np.asarray(y), network.loss.name
    hint = "Say loss='squared_error' for numbers, 'binary_cross_entropy' for yes-or-no labels."
    labels = network.loss.kind == "classes"
    numbers = labels and values.ndim == 1 and values.dtype.kind == "f"
    if numbers and not np.isin(values, [*np.unique(values.round()), *network.classes]).all():  # type: ignore[misc]
        raise ValueError(f"y holds numbers, and the loss is {name}, of class labels. {hint}")
    with torch.no_grad():
        outputs = network(network.inputs(X[:1]))
    same = labels and values.ndim > 1 and values.shape[1:] == outputs.shape[1:]
    if same and values.dtype.kind in "iub":
        raise ValueError(
            f"y of shape {values.shape} holds integers, one for each of the network's outputs, and "
            f"the loss is {name}: are these yes-or-no labels, or shares of classes? {hint} Shares "
            "are given as floats."
        )
    network.loss.check(outputs, network.targets(values[:1]))


def _chosen(network: Network, X: Rows, patterns: Any) -> Parameters:
    last = last_layer(network, X)[0] if patterns == "last" else None
    if not isinstance(patterns, str) and not (
        len(patterns) and all(isinstance(pattern, str) for pattern in patterns)
    ):
        raise ValueError(f"parameters must be 'all', 'last' or globs, got {patterns!r}.")
    return select_parameters(network.module, patterns, trainable=network.trainable, last=last)


def _linear_head(network: Network, parameters: Parameters) -> nn.Linear | None:
    """Find the only layer of trained parameters, where it is linear."""
    owners = {
        part: None
        for part in network.module.modules()
        for name, _ in part.named_parameters(recurse=False)
        if any(part.get_parameter(name) is network.module.get_parameter(n) for n in parameters)
    }
    layer = next(iter(owners), None)
    return layer if len(owners) == 1 and isinstance(layer, nn.Linear) else None


def _automatic(network: Network, parameters: Parameters, choices: Choices) -> Method:
    size = sum(p.numel() for p in parameters.values())
    linear = _linear_head(network, parameters) is not None and size <= _MOST_EXACT
    usable = choices.damping != "flow" and choices.gradients != "reference"
    return Exact() if linear and usable else GGN()


def _settings(
    fitted: Any,
    network: Network,
    parameters: Parameters,
    y: Any,
    weights: Tensor | None,
    choices: Choices,
) -> Settings:
    tied = choices.horizon is not None or choices.damping in ("horizon", "flow")
    penalty, targets = network.penalty, network.targets(y).cpu()
    total = float(row_weights(network.loss, targets, weights).sum())
    strength = 0.0 if penalty is None else penalty.on_mean_loss(total, len(targets))
    linear = _linear_head(network, parameters) is not None
    damping = choices.damping
    return Settings(
        damping=damping if isinstance(damping, str) else float(damping),
        horizon=choices.horizon,
        learning_rate=learning_rate_of(fitted, choices.learning_rate) if tied else None,
        penalty=strength,
        ridge=strength if linear and penalty is not None else None,
        ridge_on_biases=penalty is None or penalty.biases,
        seed=choices.seed,
        verbose=choices.verbose,
    )


def learning_rate_of(fitted: Any, given: Any) -> float | None:
    """Find the step size of further training."""
    if np.ndim(given):
        raise ValueError("learning_rate must be one number where damping is tied to a horizon.")
    if given is not None:
        return float(given)
    inner = fitted.estimator if isinstance(fitted, FrozenEstimator) else fitted
    params: dict[str, Any] = inner.get_params(deep=False) if hasattr(inner, "get_params") else {}
    rate = params.get("lr", params.get("learning_rate_init"))
    return None if rate is None else float(rate)


def _stages(learned: Learned, networks: list[Network]) -> list[Stage]:
    """Fit the method on every network that scores are summed over."""
    method, found = learned.method, []
    if isinstance(method, Replay):
        if len(networks) > 1:
            raise ValueError("method='replay' takes one network, whose run it goes back through.")
        rows = (learned.X, learned.y, learned.weights)
        run: Any = replay_of(learned.estimators[0], networks[0], method, rows, learned.choices)
        fit = Fitted([], run, 1.0, LOSS_UNIT, {"n_steps": len(run.run.steps)})
        return [Stage(0, None, 1.0, {}, learned.planned(networks[0]), fit)]
    if isinstance(method, Source):
        return [_unrolled(learned, method, networks, i) for i in range(len(networks))]
    if isinstance(method, TracIn):
        found = _checkpoints(learned, method, networks)
    else:
        options, share = method.options(), 1 / len(networks)
        ahead = _half_way(learned, networks)
        found = [(i, state, share, options) for i, state in enumerate(ahead)]
    stages: list[Stage] = []
    plans: dict[int, Plan] = {}
    for i, state, share, options in found:
        network = learned.staged(networks[i], state)
        if i not in plans:
            plans[i] = learned.planned(network)
        plans[i], fit = _fitted(learned, network, plans[i], options)
        stages.append(Stage(i, state, share, options, plans[i], fit))
    return stages


def _fitted(
    learned: Learned, network: Network, planned: Plan, options: dict[str, Any]
) -> tuple[Plan, Fitted]:
    """Fit the method; what keeps its rows elsewhere than where some were tried goes row by row."""
    without: set[str] = set()
    while True:
        problem = at_last_layer(learned.problem(network, planned))
        try:
            return planned, METHODS[learned.method.name](problem, **options)
        except Unusual as error:
            without.add(error.layer.name)
            planned = learned.planned(network, without)


def _checkpoints(learned: Learned, method: TracIn, networks: list[Network]) -> list[Any]:
    checkpoints = learned.choices.checkpoints
    if not checkpoints:
        raise ValueError(
            "method='tracin' sums over checkpoints: give a list of state dicts, modules or fitted "
            "estimators, or use method='gradient_dot' for the final weights alone."
        )
    options = method.options()
    rates, moments = options["learning_rate"], options["moments"] or [None] * len(checkpoints)
    given = learned.choices.learning_rate
    if given is not None and np.ndim(rates) == 0 and rates == 1.0:
        rates = given
    rates = [rates] * len(checkpoints) if np.ndim(rates) == 0 else rates
    for name, entries in (("learning_rate", rates), ("moments", moments)):
        if len(entries) != len(checkpoints):
            raise ValueError(
                f"{name} has {len(entries)} entries for {len(checkpoints)} checkpoints."
            )
    found = []
    for i, network in enumerate(networks):
        parameters = _selected(network, learned.names)
        stages = zip(checkpoints, rates, moments, strict=True)
        for j, (checkpoint, rate, state) in enumerate(stages):
            adam = None if state is None else moments_of(state, parameters, method)
            own = {"normalize": options["normalize"], "adam": adam}
            weights = state_of(network, checkpoint, j)
            found.append((i, weights, float(rate) / len(networks), own))
    return found


def _unrolled(learned: Learned, method: Source, networks: list[Network], i: int) -> Stage:
    """Fit the curvature of every stretch of a training, of member i."""
    network, choices = networks[i], learned.choices
    checkpoints, options = choices.checkpoints or [None], method.options()
    steps: Any = choices.horizon if options["n_steps"] is None else options["n_steps"]
    rate: Any = choices.learning_rate
    rate = learning_rate_of(learned.estimators[i], None) if rate is None else rate
    for name, known in (("Source(n_steps=...)", steps), ("learning_rate", rate)):
        if known is None or (np.ndim(known) and np.size(known) != len(checkpoints)):
            raise ValueError(
                f"method='source' needs {name}, one number for all or one for each of the "
                f"{len(checkpoints)} checkpoints, got {known!r}."
            )
    times = np.broadcast_to(np.multiply(steps, rate), len(checkpoints))
    rows, segments = [], []
    planned = learned.planned(network)
    for j, (checkpoint, time) in enumerate(zip(checkpoints, times, strict=True)):
        state = None if checkpoint is None else state_of(network, checkpoint, j)
        problem = learned.problem(with_weights(network, state), planned)
        own = {name: options[name] for name in ("kept_trace", "max_rows")}
        train, curved, _ = train_and_rows(problem, **own)
        rows += train
        decay = problem.settings.weight_decay
        segments.append(Segment(RowSpace.of(curved), float(time), decay))
    fit = Fitted(rows, Unrolled(tuple(segments)), 1 / len(learned.X), LOSS_UNIT)
    return Stage(i, None, 1 / len(networks), {}, planned, fit)


def _half_way(learned: Learned, networks: list[Network]) -> list[Parameters | None]:
    """Train each member on for half of the horizon, where the damping is "flow"."""
    # The effect of a row on a horizon of training is that of gradients and curvature along the
    # way; those of its middle stand for them all, as in the midpoint rule.
    settings = learned.settings
    if settings.damping != "flow":
        return [None] * len(networks)
    if not isinstance(learned.method, GGN | Exact):
        raise ValueError(
            f"damping='flow' needs method='ggn' or 'exact', not {learned.method.name!r}; "
            "damping='horizon' ties any damped method to a horizon."
        )
    horizon_time(settings)
    assert settings.horizon is not None
    assert settings.learning_rate is not None
    ends: list[Parameters | None] = []
    for network in networks:
        targets = network.targets(learned.y)
        total = row_weights(network.loss, targets.cpu(), learned.weights)
        training = FurtherTraining(
            settings.learning_rate,
            min(64, len(learned.X)),
            settings.weight_decay,
            settings.seed + 1,
        )
        stages = further_trained(
            network,
            _selected(network, learned.names),
            network.inputs(learned.X),
            targets,
            (total / total.mean())[None],
            training,
        )
        end = next(islice(stages, settings.horizon // 2, None))
        ends.append({name: value[0].detach().cpu() for name, value in end.items()})
    return ends


def with_damping(learned: Learned, damping: float | str, horizon: int | None = None) -> Learned:
    """Fit with another damping, without a pass through the network where the method allows."""
    if isinstance(learned.method, Source | Replay):
        raise ValueError(f"method={learned.method.name!r} has no damping that could be changed.")
    networks = learned.networks()
    choices = replace(learned.choices, damping=damping, horizon=horizon)
    parameters = _selected(networks[0], learned.names)
    settings = _settings(
        learned.estimators[0], networks[0], parameters, learned.y, learned.weights, choices
    )
    other = replace(learned, choices=choices, settings=settings)
    stages = []
    for stage, state in zip(learned.stages, _half_way(other, networks), strict=True):
        network = other.staged(networks[stage.member], state)
        problem = other.problem(network, stage.plan)
        name = other.method.name
        if state is None and stage.state is None:
            fit = redamped(problem, stage.fit, name, stage.options)
        else:
            fit = METHODS[name](problem, **stage.options)
        stages.append(replace(stage, state=state, fit=fit))
    return replace(other, stages=tuple(stages))
