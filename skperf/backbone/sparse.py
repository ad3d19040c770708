"""Which entries of a network's parameters train, where not all of them do."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skperf.backbone.losses import Loss
from skperf.backbone.parameters import Parameters, select_parameters, substituted
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import outputs_of
from skperf.backbone.views import view

Saliency = Callable[[Parameters, Parameters], Parameters]
_ROWS = 256  # that gradients and their squares are averaged over


@dataclass(frozen=True)
class Sparse:
    """Train only the entries of largest saliency, a share `ratio` of all of them.

    Parameters
    ----------
    ratio : float, default=0.05
        Share of the entries that train.
    saliency : str or callable, default="sam"
        ``"sam"`` is the squared gradient over the curvature, the gain that a step in this
        entry alone promises, ``"gradient"`` the size of the gradient. A callable takes
        gradients and curvatures by name, and returns saliencies by name.
    """

    ratio: float = 0.05
    saliency: str | Saliency = "sam"


def _sam(gradients: Parameters, curvatures: Parameters) -> Parameters:
    floor = max(float(c.mean()) for c in curvatures.values()) * 1e-3 + 1e-30
    return {name: g.square() / (curvatures[name] + floor) for name, g in gradients.items()}


SALIENCIES: dict[str, Saliency] = {
    "sam": _sam,
    "gradient": lambda gradients, _: {name: g.abs() for name, g in gradients.items()},
}


def chosen_entries(
    train_only: Any, module: nn.Module, loss: Loss, inputs: Rows, targets: Tensor
) -> dict[str, Tensor]:
    """Say which entries of each parameter train, by name: inputs (n, ...), targets (n, ...)."""
    if isinstance(train_only, Sparse):
        return _by_saliency(train_only, module, loss, inputs, targets)
    if isinstance(train_only, Mapping):
        return {name: _mask(module, name, mask) for name, mask in train_only.items()}
    if isinstance(train_only, str | list | tuple):
        patterns = [train_only] if isinstance(train_only, str) else list(train_only)
        chosen = select_parameters(module, patterns)
        return {name: torch.ones_like(p, dtype=torch.bool) for name, p in chosen.items()}
    raise TypeError(
        "train_only must be a pattern of parameters' names or a list of them, a dict of masks by "
        f"name, or skperf.Sparse(...); got {type(train_only).__name__}."
    )


def _mask(module: nn.Module, name: str, mask: Any) -> Tensor:
    named = dict(module.named_parameters())
    if name not in named:
        raise ValueError(
            f"train_only names {name!r}, which is no parameter of {type(module).__name__}; it has "
            f"{list(named)[:12]}."
        )
    own = torch.as_tensor(mask)
    if own.shape != named[name].shape or own.dtype != torch.bool:
        raise ValueError(
            f"train_only[{name!r}] must be a boolean mask of shape {tuple(named[name].shape)}, got "
            f"{own.dtype} of shape {tuple(own.shape)}."
        )
    return own.to(named[name].device)


def _by_saliency(
    rule: Sparse, module: nn.Module, loss: Loss, inputs: Rows, targets: Tensor
) -> dict[str, Tensor]:
    if not 0 < rule.ratio <= 1:
        raise ValueError(f"train_only: ratio must lie in (0, 1], got {rule.ratio}.")
    if isinstance(rule.saliency, str) and rule.saliency not in SALIENCIES:
        raise ValueError(
            f"train_only: saliency={rule.saliency!r} is unknown; use one of "
            f"{sorted(SALIENCIES)} or a function of gradients and curvatures."
        )
    function = SALIENCIES[rule.saliency] if isinstance(rule.saliency, str) else rule.saliency
    gradients, squares = _moments(module, loss, inputs, targets)
    values = function(gradients, squares)
    everything = torch.cat([values[name].reshape(-1) for name in gradients])
    k = max(1, round(rule.ratio * len(everything)))
    chosen = torch.zeros_like(everything, dtype=torch.bool)
    chosen[everything.topk(k).indices] = True
    pieces = chosen.split([g.numel() for g in gradients.values()])
    return {
        name: piece.view(gradients[name].shape)
        for name, piece in zip(gradients, pieces, strict=True)
        if bool(piece.any())
    }


def _moments(
    module: nn.Module, loss: Loss, inputs: Rows, targets: Tensor
) -> tuple[Parameters, Parameters]:
    """Mean and mean square of the rows' gradients, the second in the curvature's place."""
    parameters = {n: p.detach() for n, p in module.named_parameters() if p.requires_grad}
    module = view(module)
    rows = inputs[torch.linspace(0, len(inputs) - 1, min(_ROWS, len(inputs))).long()].load()
    at = targets[torch.linspace(0, len(inputs) - 1, len(rows)).long()]

    def one(values: Parameters, row: Any, target: Tensor) -> Tensor:
        with substituted(module, values):
            return loss.value(outputs_of(module, Rows.of(row)), target)[0]

    per_row = torch.func.vmap(torch.func.grad(one), (None, 0, 0), chunk_size=32)
    each = per_row(parameters, rows.map(lambda leaf: leaf[:, None]).tree, at[:, None])
    return {n: g.mean(0) for n, g in each.items()}, {n: g.square().mean(0) for n, g in each.items()}
