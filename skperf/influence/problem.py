"""What an influence method is fitted on, and what it keeps."""

import math
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from skperf.backbone.losses import Loss
from skperf.backbone.network import Network
from skperf.backbone.outputs import Output
from skperf.backbone.parameters import Parameters
from skperf.backbone.rows import Rows
from skperf.influence.captures import Recorder, record, recording
from skperf.influence.curvature import CurvatureProduct
from skperf.influence.gradients import Gradients, paired, written_out
from skperf.influence.layers import Layer, Place
from skperf.influence.neighbours import features_and_outputs, last_layer
from skperf.influence.output_rows import Cotangents, OutputRows, loss_rows, sampled_rows
from skperf.influence.tiles import Shelf, Terms, Through, gather

LOSS_UNIT = "loss"
DOT_UNIT = "squared gradient"
_MOST_OUTPUTS = 1 << 24  # numbers in the outputs of all rows that are held at once
_MOST_SAMPLED = 1000


@dataclass(frozen=True)
class Settings:
    """Choices that all methods share; see InfluenceScorer for their meaning."""

    damping: float | str = "auto"
    horizon: int | None = None
    learning_rate: float | None = None
    penalty: float = 0.0  # strength beside the mean loss; nan if it is none of the squares
    ridge: float | None = None  # the same of a linear model that says it
    ridge_on_biases: bool = True
    seed: int = 0
    verbose: int = 0

    @property
    def weight_decay(self) -> float:
        """Strength of the penalty that the network was trained with."""
        if math.isnan(self.penalty):
            raise ValueError(
                "estimator was trained with a penalty that is no one multiple of the squared "
                "weights (an l1 part, bounds, several strengths, an intercept_scaling): give "
                "damping= (and weight_decay= to fading), or train with another."
            )
        return self.penalty


@dataclass(frozen=True)
class Problem:
    """A network, its training rows, and how to differentiate."""

    network: Network
    parameters: Parameters
    layers: list[Layer]
    record: Recorder
    X: Rows  # (n, ...)
    targets: Tensor  # (n, ...)
    shares: Tensor  # (n,)
    settings: Settings
    batch_size: int
    shelf: Shelf

    @property
    def n_train(self) -> int:
        """Training rows."""
        return len(self.targets)

    @property
    def loss(self) -> Loss:
        """What the network was trained on."""
        return self.network.loss

    def gradients(
        self, output: Loss | Output, X: Rows, targets: Tensor, weights: Any = None, **how: Through
    ) -> Gradients:
        """Gradients of an output of many rows: X (n, ...), targets (n, ...), weights (n,)."""

        def cotangents(outputs: Tensor, rows: Tensor) -> Tensor:
            values = slopes(output, outputs, targets[rows].to(outputs.device))
            return values if weights is None else weighted(values, weights[rows])

        return self.gather(X, cotangents, **how)

    def gather(
        self, X: Rows, cotangents: Cotangents, examples: Any = None, through: Through = list
    ) -> Gradients:
        """Pull cotangents (m, ...) back through rows X (n, ...): see `tiles.gather`."""
        with recording(self.network.module):
            return gather(
                self.network,
                self.record,
                X,
                cotangents,
                examples=examples,
                batch_size=self.batch_size,
                shelf=self.shelf if len(X) == self.n_train else None,
                through=through,
                verbose=self.settings.verbose,
            )

    def train_gradients(self) -> Gradients:
        """Gradients of all training rows, weighted."""
        return self.gradients(self.loss, self.X, self.targets, self.relative_weights())

    def outputs(self) -> Tensor:
        """Compute the outputs of the training rows: -> (n, ...)."""
        batch_size = max(self.batch_size, self.network.batch_size)
        return self.network.logits(self.X, batch_size)

    def losses(self, X: Rows, targets: Tensor) -> NDArray[Any]:
        """Loss of rows: X (n, ...), targets (n, ...) -> (n,)."""
        parts = []
        with torch.no_grad():
            for inputs, own in self.network.batches(X, targets):
                parts.append(self.loss.value(self.network(inputs), own).cpu())
        losses: NDArray[Any] = torch.cat(parts).numpy()
        return losses

    def relative_weights(self) -> Tensor | None:
        """Shares times n, None where they are all one: -> (n,)."""
        weights = self.shares * self.n_train
        return None if torch.allclose(weights, torch.ones_like(weights), rtol=1e-12) else weights

    def product(self, curvature: str = "ggn", damping: float | Tensor = 0.0) -> CurvatureProduct:
        """Products with the curvature of the mean training loss."""
        device, dtype = self.network.device, self.network.dtype
        return CurvatureProduct(
            self.network,
            self.parameters,
            self.network.inputs(self.X),
            self.targets.to(device),
            self.shares.to(device, dtype),
            curvature,
            damping,
            self.batch_size,
        )


def at_last_layer(problem: Problem) -> Problem:
    """Where a last linear layer alone trains, run what is below once: rows are what it takes."""
    layer, network = problem.layers[0], problem.network
    if not is_last_linear(problem.layers, network, problem.X):
        return problem
    features, outputs = features_and_outputs(network, layer.module, problem.X)
    own = functional.linear(features, *(p.cpu() for p in layer.module.parameters()))
    if own.shape != outputs.shape or not own.allclose(outputs, 1e-4, 1e-5):
        return problem
    name = layer.names[0].rpartition(".")[0]
    above = replace(network, forward=partial(_run_part, name=name), readout=None, before=None)
    layers = [replace(layer, places=(Place(0),))]
    again = partial(record, layers=layers)
    return replace(problem, network=above, layers=layers, record=again, X=Rows(features))


def is_last_linear(layers: list[Layer], network: Network, X: Rows) -> bool:
    """Whether one linear layer alone trains, and runs last: X (n, ...)."""
    if len(layers) > 1 or not layers[0].sites or type(layers[0].module) is not nn.Linear:
        return False
    return layers[0].weight and last_layer(network, X)[1] is layers[0].module


def _run_part(module: nn.Module, rows: Any, *, name: str) -> Tensor:
    outputs: Tensor = module.get_submodule(name)(rows)
    return outputs


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Multiply rows by their weights: values (n, ...), weights (n,) -> (n, ...)."""
    return values * weights.to(values).view(-1, *[1] * (values.ndim - 1))


def slopes(output: Loss | Output, outputs: Tensor, targets: Tensor) -> Tensor:
    """Differentiate by the network's outputs: outputs (n, ...), targets (n, ...) -> (n, ...)."""
    if isinstance(output, Loss):
        return output.slope(outputs, targets)
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        values = output(leaf, targets)
        (total,) = torch.autograd.grad(values.sum(), leaf, retain_graph=len(targets) > 1)
        if len(targets) > 1:
            (first,) = torch.autograd.grad(values[0], leaf)
            if bool(first[1:].any()):
                raise ValueError(
                    "output is not separable: the value of one row depends on the outputs of "
                    "another (a reduction such as a mean?); return one number for each row."
                )
    return total


class Lift(Protocol):
    """Maps of query gradients and of training gradients, whose inner products are scores."""

    def __call__(self, problem: Problem, queries: Gradients) -> Terms:
        """Give the factors that meet what is stored of the training rows."""

    def store(self, problem: Problem, rows: Gradients) -> Gradients:
        """Give what is stored of rows."""


@dataclass(frozen=True)
class Fitted:
    """What a method keeps."""

    train: Gradients
    lift: Lift
    scale: float
    unit: str
    report: dict[str, Any] = field(default_factory=dict)


def curvature_rows(
    problem: Problem,
    *,
    kept_trace: float = 0.95,
    max_rows: int | None = 1000,
    curvature: str = "ggn",
) -> OutputRows:
    """Rows of the curvature at the outputs."""
    with torch.no_grad():
        shape = problem.network(problem.network.inputs(problem.X[:1])).shape[1:]
    several = len(shape) > 1
    if not several and problem.n_train * shape.numel() <= min(256, max_rows or 256):
        kept_trace = 1.0  # a sample of so few would be far off
    if curvature == "empirical":
        examples = torch.arange(problem.n_train)

        def own(outputs: Tensor, rows: Tensor) -> Tensor:
            targets = problem.targets[rows].to(outputs.device)
            return weighted(slopes(problem.loss, outputs, targets), problem.shares[rows].sqrt())

        return OutputRows(examples, own, 1.0, None)
    exact = problem.n_train * shape.numel() * shape.numel() <= _MOST_OUTPUTS
    if not several or (exact and kept_trace == 1.0 and max_rows is None):
        return loss_rows(
            problem.loss,
            problem.outputs(),
            problem.targets,
            problem.shares,
            kept_trace=kept_trace,
            max_rows=max_rows,
        )
    return sampled_rows(
        problem.loss,
        problem.shares,
        problem.targets,
        max_rows or _MOST_SAMPLED,
        problem.settings.seed,
    )


def random_vector(problem: Problem) -> Tensor:
    """Draw a vector over the parameters: -> (n_parameters,)."""
    size = sum(p.numel() for p in problem.parameters.values())
    generator = torch.Generator().manual_seed(problem.settings.seed)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    return vector.to(problem.network.device, problem.network.dtype)


def self_scores(problem: Problem, fitted: Fitted, queries: Gradients, rows: Gradients) -> Tensor:
    """Score each query against a row of its own: -> (n,)."""
    stored = fitted.lift.store(problem, rows)
    parts = []
    for which, factor in fitted.lift(problem, queries):
        row = stored[which]
        if type(factor) is type(row):
            parts.append(paired(factor, row))
        else:
            parts.append(torch.einsum("ij,ij->i", written_out(factor), written_out(row)))
    return torch.stack(parts).sum(0) * fitted.scale
