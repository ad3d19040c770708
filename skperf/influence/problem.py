"""What an influence method is fitted on, and what it keeps."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from skperf.backbone.network import Network
from skperf.backbone.outputs import Output, loss
from skperf.backbone.parameters import Parameters
from skperf.influence.captures import Tape, recording
from skperf.influence.curvature import CurvatureProduct
from skperf.influence.gradients import Gradients, inner, paired, take, written_out
from skperf.influence.layers import Layer
from skperf.influence.output_rows import OutputRows, softmax_rows
from skperf.influence.tiles import Shelf, Terms, gather

LOSS_UNIT = "loss"
DOT_UNIT = "squared gradient"


@dataclass(frozen=True)
class Settings:
    """Choices of the methods; see InfluenceScorer for their meaning."""

    curvature: str = "ggn"
    damping: float | str = "auto"
    horizon: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    kept_trace: float = 0.95
    max_rows: int | None = 1000
    rank: int | None = 8
    n_components: int = 100
    n_projections: int = 512
    tol: float = 1e-4
    max_iter: int | None = None
    scale: float | None = None
    select: str = "gradient"
    ratio: float = 0.05
    ridge: float = 1e-3
    seed: int = 0
    verbose: int = 0


@dataclass(frozen=True)
class Problem:
    """A network, its training rows, and how to differentiate."""

    network: Network
    parameters: Parameters
    layers: list[Layer]
    record: Callable[[Network, Tensor], Tape]
    X: NDArray[Any]  # (n, ...)
    codes: Tensor  # (n,)
    shares: Tensor  # (n,)
    settings: Settings
    batch_size: int
    shelf: Shelf

    @property
    def n_train(self) -> int:
        """Training rows."""
        return len(self.codes)

    @property
    def coverage(self) -> float:
        """Share of the network's parameters taken into account."""
        every = sum(p.numel() for p in self.network.module.parameters())
        return sum(p.numel() for p in self.parameters.values()) / every

    def gradients(
        self, output: Output, X: NDArray[Any], codes: Tensor, weights: Tensor | None = None
    ) -> Gradients:
        """Gradients of an output of many rows: X (n, ...), codes (n,), weights (n,)."""

        def cotangents(logits: Tensor, rows: Tensor) -> Tensor:
            values = slopes(output, logits, codes[rows].to(logits.device))
            return values if weights is None else values * weights[rows, None].to(values)

        return self.gather(X, cotangents)

    def gather(self, X: NDArray[Any], cotangents: Any, examples: Tensor | None = None) -> Gradients:
        """Pull cotangents back; see :func:`~skperf.influence.tiles.gather`.

        Shapes: X (n, ...), cotangents (m, n_classes), examples (m,).
        """
        with recording(self.network.module):
            return gather(
                self.network,
                self.record,
                X,
                cotangents,
                examples=examples,
                batch_size=self.batch_size,
                shelf=self.shelf if len(X) == self.n_train else None,
                verbose=self.settings.verbose,
            )

    def train_gradients(self) -> Gradients:
        """Gradients of all training rows, weighted."""
        return self.gradients(loss, self.X, self.codes, self.relative_weights())

    def logits(self) -> Tensor:
        """Logits of the training rows: -> (n, n_classes)."""
        batch_size = max(self.batch_size, self.network.batch_size)
        logits = self.network.logits(self.X, batch_size)
        finite = torch.isfinite(logits).all(1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            raise ValueError(f"the network's logits are not finite, first at training row {row}.")
        return logits

    def train_cotangents(self, logits: Tensor) -> Tensor:
        """Say what to pull back for :meth:`train_gradients`, where logits are known.

        Shapes: logits (n, n_classes) -> (n, n_classes).
        """
        own, weights = slopes(loss, logits, self.codes), self.relative_weights()
        return own if weights is None else own * weights[:, None].to(own)

    def relative_weights(self) -> Tensor | None:
        """Shares times n, None where they are all one: -> (n,)."""
        weights = self.shares * self.n_train
        return None if torch.allclose(weights, torch.ones_like(weights), rtol=1e-12) else weights

    def product(self, damping: float = 0.0) -> CurvatureProduct:
        """Products with the curvature of the mean training loss."""
        device, dtype = self.network.device, self.network.dtype
        return CurvatureProduct(
            self.network,
            self.parameters,
            self.network.tensor(self.X),
            self.codes.to(device),
            self.shares.to(device, dtype),
            "hessian" if self.settings.curvature == "hessian" else "ggn",
            damping,
            self.batch_size,
        )


def slopes(output: Output, logits: Tensor, codes: Tensor) -> Tensor:
    """Differentiate an output by the logits.

    Shapes: logits (n, n_classes), codes (n,) -> (n, n_classes).
    """
    if output is loss:
        slope = logits.softmax(1)
        return slope.scatter_add_(1, codes[:, None], slope.new_full((len(codes), 1), -1.0))
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        values = output(leaf, codes)
        (total,) = torch.autograd.grad(values.sum(), leaf, retain_graph=len(codes) > 1)
        if len(codes) > 1:
            (first,) = torch.autograd.grad(values[0], leaf)
            if bool(first[1:].any()):
                raise ValueError(
                    "target is not separable: the value of one row depends on the logits of "
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


def plain_terms(queries: Gradients) -> Terms:
    """Meet each layer's gradients with the layer's own."""
    return list(enumerate(queries))


def curvature_rows(problem: Problem, *, kept_trace: float, max_rows: int | None) -> OutputRows:
    """Rows of the curvature at the logits."""
    logits = problem.logits()
    if problem.settings.curvature == "empirical":
        cotangents = slopes(loss, logits, problem.codes) * problem.shares.sqrt()[:, None].to(logits)
        return OutputRows(torch.arange(problem.n_train), cotangents, 1.0, logits)
    return softmax_rows(logits, problem.shares, kept_trace=kept_trace, max_rows=max_rows)


def random_vector(problem: Problem) -> Tensor:
    """Draw a vector over the parameters: -> (n_parameters,)."""
    size = sum(p.numel() for p in problem.parameters.values())
    generator = torch.Generator().manual_seed(problem.settings.seed)
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    return vector.to(problem.network.device, problem.network.dtype)


def scores_of(problem: Problem, fitted: Fitted, queries: Gradients, rows: Tensor) -> Tensor:
    """Score queries against some training rows: -> (n_queries, m)."""
    terms, train = fitted.lift(problem, queries), take(fitted.train, rows)
    return inner([factor for _, factor in terms], [train[i] for i, _ in terms]) * fitted.scale


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
