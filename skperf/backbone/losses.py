"""What a network was trained on: a loss, its slope and curvature at the outputs, its weights.

Outputs are (n,), (n, K), (n, L, K) for tokens, or (n, K, ...) with torch's class axis for maps; a
row with several outputs has the mean of their losses, as torch's own ``reduction="mean"``.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Penalty:
    """Weight decay that a network was trained with: strength / 2 times the squared weights."""

    strength: float = 0.0
    # torch adds it to the weighted mean of the losses, scikit-learn to their sum, and our own nets
    # to the sum over the number of rows
    beside: Literal["mean", "sum", "rows"] = "mean"
    biases: bool = True

    def on_mean_loss(self, total_weight: float, n: int) -> float:
        """Strength beside the weighted mean of the losses of n rows."""
        over = {"mean": 1.0, "sum": total_weight, "rows": total_weight / n}
        return self.strength / over[self.beside]

    @classmethod
    def of(cls, optimizer: Any, beside: Literal["mean", "rows"]) -> "Penalty | None":
        """Read it off an optimizer, None where its decay is no gradient of one penalty."""
        groups = optimizer.param_groups
        pairs = {
            (p.ndim > 1, float(g.get("weight_decay") or 0)) for g in groups for p in g["params"]
        }
        weights, biases = ({decay for wide, decay in pairs if wide is w} for w in (True, False))
        decoupled = any(group.get("decoupled_weight_decay") for group in groups)
        strength = max(weights, default=0.0)
        if decoupled or not strength or weights != {strength} or biases - {strength, 0.0}:
            return None
        return cls(strength, beside, biases=biases <= weights)


@dataclass(frozen=True, eq=False)
class Loss:
    """Loss of each row."""

    # "classes": one label a row (or an output); "labels": several yes-or-no labels; "values":
    # numbers; "own": whatever a function of the user takes
    kind: ClassVar[str] = "own"

    @property
    def name(self) -> str:
        """What messages call it."""
        return type(self).__name__

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row: outputs (n, ...), targets (n, ...) -> (n,)."""
        raise TypeError(f"{self.name} has no value.")

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Refuse targets (n, ...) of another shape than outputs (n, ...) ask for."""
        try:
            self.value(outputs, targets)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"y of shape (n, {str(tuple(targets.shape[1:]))[1:]} does not fit outputs of shape "
                f"(n, {str(tuple(outputs.shape[1:]))[1:]}, and the loss is {self.name}: "
                f"{str(error).splitlines()[0]}"
            ) from error

    def slope(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Differentiate by the outputs: outputs (n, ...), targets (n, ...) -> (n, ...)."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.value(leaf, targets).sum(), leaf)
        return slope

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Differentiate twice by a row's outputs: (n, K) or (n,) -> (n, K, K)."""
        flat = outputs.detach().reshape(len(outputs), -1).requires_grad_()
        with torch.enable_grad():
            total = self.value(flat.reshape(outputs.shape), targets).sum()
            (slope,) = torch.autograd.grad(total, flat, create_graph=True)
            # rows do not meet in the sum, so one pass gives a column of every row's matrix
            try:
                columns = [_differentiated(column, flat) for column in slope.unbind(1)]
            except RuntimeError as error:
                if "not implemented" not in str(error):
                    raise
                raise ValueError(
                    f"loss={self.name} cannot be differentiated twice ({error}): use "
                    "method='gradient_dot', or write the loss as a function of torch operations."
                ) from error
        return torch.stack(columns, 1).detach()

    def weights(self, targets: Tensor) -> Tensor | None:
        """Training weight of each row beside its sample weight: targets (n, ...) -> (n,)."""
        weight = getattr(self, "weight", None) if self.kind == "classes" else None
        return None if weight is None else weight.to(targets.device)[targets]


@dataclass(frozen=True, eq=False)
class CrossEntropy(Loss):
    """Cross-entropy of labels, or of label shares, with torch's weights and smoothing."""

    kind: ClassVar[str] = "classes"
    weight: Tensor | None = None  # (K,)
    label_smoothing: float = 0.0
    ignore_index: int = -100
    balanced: bool = False  # scikit-learn's class_weight="balanced": known once all targets are
    summed: bool = False  # over the outputs of a row, where torch's reduction is no mean of them

    def __post_init__(self) -> None:
        if self.label_smoothing and self.weight is not None and not bool(self.weight.all()):
            raise ValueError(
                "loss: a class has weight 0 beside label_smoothing, so that its rows weigh nothing "
                "and yet have a loss: give the class a small weight, or leave its rows out."
            )

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Nats of each row: outputs (n, K, ...) or (n, L, K), targets (n, ...) -> (n,)."""
        means = self._means(outputs, targets)
        return means * self._counts(targets).to(means) if self.summed else means

    def _counts(self, targets: Tensor) -> Tensor:
        """Count the outputs of each row that have a label: -> (n,)."""
        if targets.is_floating_point():
            return targets.new_full((len(targets),), targets[0, 0].numel())
        return (targets != self.ignore_index).view(len(targets), -1).sum(1)

    def _means(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if outputs.ndim == 2 and targets.ndim == 1 and not self.label_smoothing:
            return functional.cross_entropy(
                outputs, targets, reduction="none", ignore_index=self.ignore_index
            )
        logits = _class_axis_second(outputs, targets)
        inside = self.label_smoothing or targets.is_floating_point() or targets.ndim > 1
        weight = self.weight if inside else None
        losses = functional.cross_entropy(
            logits,
            targets.to(logits.dtype) if targets.is_floating_point() else targets,
            None if weight is None else weight.to(logits),
            reduction="none",
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        if weight is not None and not targets.is_floating_point():
            # torch's mean over one row: what the row weighs as a whole is left to `weights`
            own = self._of_labels(targets).to(losses).view(len(losses), -1).sum(1)
            return losses.view(len(losses), -1).sum(1) / own.clamp_min(1e-30)
        if losses.ndim == 1:
            return losses
        if targets.is_floating_point():
            return losses.flatten(1).mean(1)
        counted = (targets != self.ignore_index).flatten(1)
        return losses.flatten(1).sum(1) / counted.sum(1).clamp_min(1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Covariance of the predicted label: outputs (n, K) -> (n, K, K)."""
        if outputs.ndim != 2:
            return super().hessian(outputs, targets)
        p = outputs.softmax(1)
        sizes = self.sizes(targets).to(p)[:, None, None]
        return (torch.diag_embed(p) - p[:, :, None] * p[:, None]) * sizes

    def weights(self, targets: Tensor) -> Tensor | None:
        """Weight of each row's class: targets (n,), (n, ...) or shares (n, K) -> (n,)."""
        if self.balanced:
            counts = torch.bincount(targets)
            return len(targets) / (int((counts > 0).sum()) * counts[targets].double())
        if self.weight is None:
            return None
        if targets.is_floating_point():
            return None  # torch's mean is over rows then, whatever their shares weigh
        own = self._of_labels(targets)
        if own.ndim == 1:
            return own
        own = own.flatten(1)
        return own.sum(1) / self._counts(targets) if self.summed else own.mean(1)

    def _of_labels(self, targets: Tensor) -> Tensor:
        assert self.weight is not None
        own = self.weight.to(targets.device)[targets.clamp_min(0)]
        return own * (targets != self.ignore_index)

    def sizes(self, targets: Tensor) -> Tensor:
        """Hessian size at each place, in covariances of its label: (n, [K,] ...) -> (n, ...)."""
        smooth, shared = self.label_smoothing, targets.is_floating_point()
        if self.weight is None:
            # shares of labels need not sum to one
            if shared:
                return targets.sum(1) * (1 - smooth) + smooth
            return targets != self.ignore_index
        weight = self.weight.to(targets.device)
        if shared:
            own = targets.movedim(1, -1) @ weight.to(targets.dtype)
            return (1 - smooth) * own + smooth * weight.mean()
        own = self._of_labels(targets)
        counted = targets != self.ignore_index
        means = own.view(len(own), -1).sum(1) / counted.view(len(own), -1).sum(1).clamp_min(1)
        full = (1 - smooth) * own + smooth * weight.mean() * counted
        return full / means.clamp_min(1e-30).view(-1, *[1] * (own.ndim - 1))


@dataclass(frozen=True, eq=False)
class BinaryCrossEntropy(Loss):
    """Mean over the labels of each one's binary cross-entropy at its logit."""

    kind: ClassVar[str] = "labels"
    pos_weight: Tensor | None = None  # (K,)
    weight: Tensor | None = None  # (K,)
    summed: bool = False  # over the labels, where torch's reduction is no mean of them

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Nats of each row: outputs (n, K), targets (n, K) -> (n,)."""
        losses = functional.binary_cross_entropy_with_logits(
            outputs,
            targets.to(outputs.dtype).reshape(outputs.shape),
            weight=None if self.weight is None else self.weight.to(outputs),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(outputs),
            reduction="none",
        ).reshape(len(outputs), -1)
        return losses.sum(1) if self.summed else losses.mean(1)

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Variance of each label, a diagonal: outputs (n, K) -> (n, K, K)."""
        flat = outputs.reshape(len(outputs), -1)
        p, k = flat.sigmoid(), 1 if self.summed else flat.shape[1]
        diagonal = p * (1 - p) / k
        goal = targets.to(flat.dtype).reshape(flat.shape)
        if self.pos_weight is not None:
            diagonal = diagonal * (1 + (self.pos_weight.to(flat) - 1) * goal)
        if self.weight is not None:
            diagonal = diagonal * self.weight.to(flat)
        return torch.diag_embed(diagonal)


@dataclass(frozen=True, eq=False)
class SquaredError(Loss):
    """Mean over the outputs of the squared difference, as torch's MSELoss."""

    kind: ClassVar[str] = "values"
    factor: float = 1.0

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error of each row: outputs (n, ...), targets (n, ...) -> (n,)."""
        squares = self.factor * (outputs - targets.to(outputs.dtype).reshape(outputs.shape)) ** 2
        return squares.flatten(1).mean(1) if squares.ndim > 1 else squares

    def hessian(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Twice the identity over the number of outputs: (n, K) -> (n, K, K)."""
        n, k = len(outputs), outputs[0].numel()
        eye = torch.eye(k, dtype=outputs.dtype, device=outputs.device)
        return (2 * self.factor / k * eye).expand(n, k, k)


@dataclass(frozen=True, eq=False)
class Focal(Loss):
    """Focal loss, (1 - p)^gamma times the cross-entropy (arXiv 1708.02002)."""

    kind: ClassVar[str] = "classes"
    gamma: float = 2.0
    weight: Tensor | None = None  # (K,)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Focal loss of each row: outputs (n, K), targets (n,) -> (n,)."""
        nats = functional.cross_entropy(outputs, targets, reduction="none")
        return (1 - (-nats).exp()) ** self.gamma * nats


@dataclass(frozen=True, eq=False)
class Margin(Loss):
    """Multi-class hinge loss, as torch's MultiMarginLoss."""

    kind: ClassVar[str] = "classes"
    p: int = 1
    margin: float = 1.0
    weight: Tensor | None = None  # (K,)

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Hinge loss of each row: outputs (n, K), targets (n,) -> (n,)."""
        own = outputs.gather(1, targets[:, None])
        gaps = (self.margin - own + outputs).clamp_min(0) ** self.p
        mine = functional.one_hot(targets, outputs.shape[1]).bool()
        return gaps.masked_fill(mine, 0).sum(1) / outputs.shape[1]


@dataclass(frozen=True, eq=False)
class Own(Loss):
    """A function of outputs and targets that returns one loss a row."""

    function: Function = field(default=lambda outputs, targets: outputs.flatten(1).mean(1))
    label: str = "loss"
    summed: bool = False  # over the outputs of a row, where torch's reduction is no mean of them

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.label

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row: outputs (n, ...), targets (n, ...) -> (n,)."""
        n, same = len(outputs), outputs.numel() == targets.numel()
        if same and type(self.function).__module__ == nn.L1Loss.__module__:
            targets = targets.reshape(outputs.shape)
        values = self.function(outputs, targets)
        # outputs (n, 1) less targets (n,) are every row beside every other
        crossed = same and outputs.numel() == n > 1 and values.numel() == n * n
        if not isinstance(values, Tensor) or values.ndim == 0 or len(values) != n or crossed:
            seen = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"loss must return one number for each row, a tensor of shape ({n},); "
                f"it returned {seen}. A torch module is given as it is; a function must not "
                "average over rows."
            )
        if values.ndim == 1:
            return values
        return values.flatten(1).sum(1) if self.summed else values.flatten(1).mean(1)


@dataclass(frozen=True)
class OfProbabilities:
    """A criterion that takes probabilities, row by row."""

    criterion: nn.Module

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Loss of each row: outputs (n, K), targets (n,) -> (n,)."""
        each = copy.deepcopy(self.criterion)
        each.reduction = "none"  # type: ignore[assignment]
        if isinstance(each, nn.NLLLoss):
            # as skorch does
            outputs = (outputs + torch.finfo(outputs.dtype).eps).log()
        else:
            targets = targets.to(outputs.dtype).reshape(outputs.shape)
        losses: Tensor = each(outputs, targets)
        return losses


LOSSES: dict[str, Loss] = {
    "cross_entropy": CrossEntropy(),
    "binary_cross_entropy": BinaryCrossEntropy(),
    "squared_error": SquaredError(),
}


def resolve_loss(loss: Any) -> Loss:
    """Find a loss by name, from a torch module with its weights and smoothing, or a function."""
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(
                f"loss={loss!r} is unknown; use one of {sorted(LOSSES)}, a torch.nn loss module "
                "or a function of (outputs, targets) that returns one number for each row."
            )
        return LOSSES[loss]
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        loss = loss()
    if isinstance(loss, nn.Module):
        return _of_module(loss)
    if callable(loss) and not isinstance(loss, type):
        return Own(loss, getattr(loss, "__name__", type(loss).__name__))
    raise TypeError(
        f"loss must be a name of {sorted(LOSSES)}, a torch.nn loss module or a function of "
        f"(outputs, targets), got {type(loss).__name__}."
    )


def _of_module(module: nn.Module) -> Loss:
    kind: Any = type(module)
    weight: Any = getattr(module, "weight", None)
    weight = None if weight is None else weight.detach()
    if kind is nn.CrossEntropyLoss:
        assert isinstance(module, nn.CrossEntropyLoss)
        summed = module.reduction == "sum"
        return CrossEntropy(weight, module.label_smoothing, module.ignore_index, summed=summed)
    if kind is nn.NLLLoss:
        # its outputs are log-probabilities, which are logits too
        assert isinstance(module, nn.NLLLoss)
        return CrossEntropy(weight, 0.0, module.ignore_index, summed=module.reduction == "sum")
    if kind is nn.BCEWithLogitsLoss:
        pos_weight: Any = getattr(module, "pos_weight", None)
        return BinaryCrossEntropy(pos_weight, weight, module.reduction == "sum")
    if kind is nn.BCELoss:
        # read at the logits of the probabilities it takes
        return BinaryCrossEntropy(None, weight, module.reduction == "sum")
    if kind is nn.MSELoss and module.reduction != "sum":
        return SquaredError()
    if kind is nn.MultiMarginLoss:
        assert isinstance(module, nn.MultiMarginLoss)
        return Margin(module.p, module.margin, weight)
    takes = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in takes if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    if len(needed) > 2:
        raise TypeError(
            f"loss={kind.__name__} takes {', '.join(needed)}: give a function of (outputs, "
            "targets) that calls it and returns one number for each row."
        )
    if not hasattr(module, "reduction"):
        return Own(module, kind.__name__)
    each = copy.deepcopy(module)
    each.reduction = "none"  # type: ignore[assignment]
    return Own(each, kind.__name__, summed=module.reduction in ("sum", "batchmean"))


def of_rows(criterion: nn.Module) -> Loss:
    """Find the loss of single rows by a criterion that takes probabilities where skorch's does."""
    if isinstance(criterion, nn.NLLLoss | nn.BCELoss):
        return Own(OfProbabilities(copy.deepcopy(criterion)), type(criterion).__name__)
    return resolve_loss(criterion)


def of_two_classes(pos_weight: Tensor | None) -> CrossEntropy:
    """Give binary cross-entropy as one over the logits (0, z): pos_weight (1,) or None."""
    if pos_weight is None:
        return CrossEntropy()
    return CrossEntropy(torch.cat([torch.ones(1), pos_weight.detach().reshape(1).cpu().float()]))


def describes(loss: Loss) -> str:
    """Say what a loss is, with what makes it differ from its plain form."""
    plain = type(loss)() if not isinstance(loss, Own) else loss
    changed = [
        f"{entry.name}={getattr(loss, entry.name)}"
        for entry in fields(loss)
        if entry.name not in ("function", "label", "summed")
        and getattr(loss, entry.name) is not getattr(plain, entry.name)
    ]
    return loss.name + (f"({', '.join(changed)})" if changed else "")


def _differentiated(column: Tensor, by: Tensor) -> Tensor:
    if not column.requires_grad:
        return torch.zeros_like(by)
    (gradient,) = torch.autograd.grad(column.sum(), by, retain_graph=True, materialize_grads=True)
    return gradient


def _class_axis_second(outputs: Tensor, targets: Tensor) -> Tensor:
    """Bring the classes to torch's place: outputs (n, L, K), targets (n, L) -> (n, K, L)."""
    if outputs.ndim < 3:
        return outputs
    if targets.is_floating_point():
        return outputs  # shares (n, K, ...) are as torch takes them
    last, second = targets.shape[1:] == outputs.shape[1:-1], targets.shape[1:] == outputs.shape[2:]
    if last and second and outputs.ndim == 3:
        raise ValueError(
            f"outputs of shape {tuple(outputs.shape)} have as many classes as places, and either "
            "axis may hold the classes: give loss= a function of (outputs, targets)."
        )
    if last and not second:
        return outputs.movedim(-1, 1)
    if second:
        return outputs
    raise ValueError(
        f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)} do "
        "not fit: expected (n, L, K) and (n, L), or (n, K, ...) and (n, ...)."
    )
