"""Influence through the training run, as the scorer asks for it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from skorch import NeuralNet
from torch import Tensor

from skperf.backbone._nets import default_net
from skperf.backbone._stock import net_of
from skperf.backbone._training import data_of
from skperf.backbone.losses import Loss
from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Data, split_state
from skperf.influence._methods import Replay
from skperf.influence.replay import Budget, Replayed, replayed, retrained, smoothness
from skperf.influence.scoring import Ensemble, Tile
from skperf.influence.tiles import budget_in_bytes

# of `smoothness`, chosen on wine (benchmarks/replay_configurations.py, THRESHOLD_DATA)
SMOOTH_ENOUGH = 0.98
_NO_RUN = (
    "method='replay' goes back through the training, and {} comes without one: give an estimator "
    "that is fitted here (skperf.Net, a skorch classifier, None), or "
    "Replay(run=TrainingRun.record(...)) of the loop that trained it."
)


def recording(estimator: Any, method: Replay) -> Any:
    """Let an estimator that will be fitted leave its run behind."""
    if method.run is not None:
        return estimator
    if estimator is None:
        return default_net(record_run=True)
    if isinstance(estimator, NeuralNet):
        return clone(net_of(estimator)).set_params(record_run=True)
    if isinstance(estimator, FrozenEstimator) and hasattr(estimator.estimator, "run_"):
        return estimator
    raise ValueError(_NO_RUN.format(type(estimator).__name__))


def replay_of(
    fitted: Any, network: Network, method: Replay, rows: tuple[Any, Any, Any], choices: Any
) -> Replayed:
    """Hold the run of a fitted estimator against its weights, on rows, targets and weights."""
    inner = fitted.estimator if isinstance(fitted, FrozenEstimator) else fitted
    given = method.run if method.run is not None else getattr(inner, "run_", None)
    if given is None:
        raise ValueError(_NO_RUN.format(type(inner).__name__))
    run, data = given.recorded, data_of(given, *rows)
    # other rows than the run was trained on do not arrive at its end, which is looked at then
    same = run.data is not None and _same(run.data, data)
    run = replace(run.with_data(data), states=run.states if same else None)
    memory, options = budget_in_bytes(choices.memory_budget), method.options()
    allowed = options["tolerance"], options["folder"], choices.verbose, choices.n_jobs
    found = replayed(run, Budget(memory, *allowed))
    state = split_state(run, run.module, found.end)
    own = dict(network.module.named_parameters())
    for name, value in zip(run.names, state.parameters, strict=True):
        if name not in own or not torch.equal(own[name].detach(), value):
            raise ValueError(
                f"run ends at other weights than estimator has: {name!r} differs. Give the run "
                "that trained this network, and the network as it was trained."
            )
    return found


def _same(one: Data, other: Data) -> bool:
    pairs = [
        (one.targets, other.targets),
        *zip(one.inputs.leaves, other.inputs.leaves, strict=True),
    ]
    equal = all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    known = [data.weights.cpu() for data in (one, other) if data.weights is not None]
    return equal and (not known or (len(known) == 2 and torch.equal(*known)))


@dataclass(frozen=True)
class ReplayEnsemble(Ensemble):
    """The scorer's questions, answered by going back through the run."""

    run: Replayed = None  # type: ignore[assignment]  # always given, by keyword

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Give what is asked to rise: (q, ...) outputs of the module, targets (q, ...) -> (q,)."""
        readout = self.first.network.readout
        outputs = outputs if readout is None else readout(outputs)
        if isinstance(self.output, Loss):
            return self.output.value(outputs, targets)
        return -self.output(outputs, targets)

    def asked(self, X: Rows) -> Rows:
        """Bring queries into the network's types: (q, ...)."""
        return self.first.network.inputs(X)

    def tiles(self, X: Rows, targets: Tensor, fill: float = 0.0) -> Iterator[Tile]:
        """Go through the matrix of scores: X (n_query, ...), targets (n_query, ...)."""
        size = max(1, self.budget // (16 * self.n_train))
        for start in range(0, len(X), size):
            queries = slice(start, min(start + size, len(X)))
            own = targets[queries]
            scores = self.run.influence(self.asked(X[queries]), own, value=self.value)
            yield queries, slice(0, self.n_train), scores.numpy().astype(self.dtype, copy=False)

    def matrix(
        self, X: Rows, targets: Tensor, *, out: Any = None, aggregate: str | None = None
    ) -> Any:
        """Score every query: -> (n_query, n_train); a mean or sum needs one way back."""
        if aggregate not in ("sum", "mean"):
            return super().matrix(X, targets, out=out, aggregate=aggregate)
        found = self.run.influence(self.asked(X), targets, value=self.value, aggregate=True)[0]
        scores = (found * (len(X) if aggregate == "sum" else 1)).numpy().astype(self.dtype)
        if out is None:
            return scores
        out[:] = scores
        return out

    def self_influences(self, X: Rows, targets: Tensor) -> NDArray[Any]:
        """Influence of training rows on themselves: -> (n_train,)."""
        if X is not self.first.X:
            raise ValueError(
                "method='replay' knows the influence of rows on themselves for the training rows "
                "only: self_influence_."
            )
        tiles = self.tiles(X, targets)
        own = [t[np.arange(len(t)), np.arange(q.start, q.stop)] for q, _, t in tiles]
        scores = np.concatenate(own)
        relative = self.first.relative_weights()  # which the scorer multiplies by
        return scores if relative is None else scores / np.maximum(relative.numpy(), 1e-30)

    def of_others(self, X: Rows, targets: Tensor, rows: Rows, labels: Tensor) -> NDArray[Any]:
        """Refuse rows that no batch of the run held."""
        raise ValueError("rows= has no meaning for method='replay': no batch of the run held them.")

    def by_token(self, X: Rows, targets: Tensor, of: str) -> NDArray[Any]:
        """Refuse tokens."""
        raise ValueError("tokens= has no meaning for method='replay'.")

    def scores_of(self, X: Rows, targets: Tensor, rows: Tensor) -> Tensor:
        """Score queries against some training rows: -> (n_query, m)."""
        found = self.run.influence(self.asked(X), targets, value=self.value)
        return found[:, rows]

    def labels(self, X: Rows, targets: Tensor) -> NDArray[Any]:
        """Change of each query's loss if a row had another label: -> (q, n, K)."""
        classes = self.first.network.classes
        if classes is None:
            raise ValueError("change='label' needs class labels.")
        found = self.run.derivative(
            self.asked(X), targets, value=self.value, n_labels=len(classes)
        ).labels
        assert found is not None
        return np.asarray(found.numpy())

    def hyperparameters(self, X: Rows, targets: Tensor) -> dict[str, NDArray[Any]]:
        """Differentiate by the settings of the run: -> (q,) each."""
        found = self.run.derivative(
            self.asked(X), targets, value=self.value, hyperparameters=True
        ).hyperparameters
        return {name: value.numpy() for name, value in found.items()}

    def smoothness(self, seed: int) -> float:
        """Agreement with retraining, asked about some training rows."""
        data = self.run.run.data
        assert data is not None
        some = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:32]
        return smoothness(self.run, data.gather(some), data.targets[some], seed=seed)

    def same_seed_score(
        self, X: Rows, targets: Tensor, *, drop: float, n_subsets: int, seed: int
    ) -> float:
        """Correlate predicted and actual losses when a share of the rows is left out."""
        run, n = self.run.run, self.n_train
        assert run.data is not None
        generator = torch.Generator().manual_seed(seed)
        given = run.data.weights
        base = torch.ones(n, dtype=self.run.end.dtype) if given is None else given.cpu()
        weights = base.repeat(n_subsets, 1)
        for row in weights:
            row[torch.randperm(n, generator=generator)[: max(1, round(drop * n))]] = 0
        predicted = (1 - weights / base.clamp_min(1e-30)).numpy() @ self.matrix(X, targets).T
        actual = torch.stack([*retrained(run, weights, self.asked(X), targets)]).numpy()
        moved = np.flatnonzero(actual.std(0) > 1e-7)
        return float(np.mean([spearmanr(predicted[:, q], actual[:, q])[0] for q in moved]))
