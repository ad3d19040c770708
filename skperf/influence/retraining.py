"""Train many copies of a small network at once, as batched matrix products."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.optim import Optimizer

from skperf.backbone.modes import preserved_rng, untouched
from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.backbone.progress import track


def _adam(parameters: list[Tensor]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Parameters
    ----------
    optimizer : callable
        From a list of tensors to a torch optimizer that treats every entry by itself (SGD
        and Adam do), for many networks are stacked in one tensor.
    n_epochs : int, default=40
        Passes over each network's rows.
    batch_size : int, default=64
        Rows a step.
    """

    optimizer: Callable[[list[Tensor]], Optimizer] = _adam
    n_epochs: int = 40
    batch_size: int = 64


def half_subsets(
    n: int, n_subsets: int, generator: torch.Generator, *, fraction: float = 0.5
) -> Tensor:
    """Draw random subsets of equal size."""
    size = max(1, round(fraction * n))
    order = torch.rand(n_subsets, n, generator=generator).argsort(1)
    return torch.zeros(n_subsets, n, dtype=torch.bool).scatter_(1, order[:, :size], True)


def fresh_parameters(network: Network, seeds: list[int]) -> Parameters:
    """Initialise copies of a network."""
    copies = []
    module = deepcopy(network.module)
    _check_resettable(module)
    with preserved_rng(network.device):
        for seed in seeds:
            torch.manual_seed(seed)
            for part in module.modules():
                reset = getattr(part, "reset_parameters", None)
                if callable(reset):
                    reset()
            copies.append({n: p.detach().clone() for n, p in module.named_parameters()})
    return {name: torch.stack([copy[name] for copy in copies]) for name in copies[0]}


def _check_resettable(module: nn.Module) -> None:
    for name, part in module.named_modules():
        own = dict(part.named_parameters(recurse=False))
        if own and not callable(getattr(part, "reset_parameters", None)):
            raise ValueError(
                f"layer {name!r} ({type(part).__name__}) cannot be initialised afresh: it has no "
                "reset_parameters. Give an unfitted estimator, which can be refitted."
            )


def stacked_logits(
    network: Network, stacked: Parameters, inputs: Tensor, *, own: bool = False
) -> Tensor:
    """Logits of many networks: inputs (n, ...) or (m, n, ...) -> (m, n, n_classes)."""

    def logits(parameters: Parameters, rows: Tensor) -> Tensor:
        outputs = functional_call(network.module, parameters, (rows,))
        return outputs if network.readout is None else network.readout(outputs)

    # batched weights make a grouped convolution, which is slower than one network after another
    convolves = any(isinstance(part, nn.Conv2d) for part in network.module.modules())
    one_by_one = 1 if convolves else None
    result: Tensor = vmap(logits, (0, 0 if own else None), chunk_size=one_by_one)(stacked, inputs)
    return result


def train_subsets(
    network: Network,
    inputs: Tensor,
    codes: Tensor,
    subsets: Tensor,
    recipe: Recipe,
    *,
    seeds: list[int],
    weights: Tensor | None = None,
    verbose: int = 0,
) -> Parameters:
    """Train one fresh copy of a network on each subset of the rows, all at once.

    Shapes: inputs (n, ...), codes (n,), weights (n,).
    """
    sizes = subsets.sum(1)
    if not bool((sizes == sizes[0]).all()):
        raise ValueError("all subsets must hold equally many rows.")
    members = subsets.nonzero()[:, 1].view(len(subsets), -1).to(inputs.device)
    generator = torch.Generator().manual_seed(seeds[0])
    stacked = fresh_parameters(network, seeds)
    importance = torch.ones(len(inputs), device=inputs.device) if weights is None else weights
    with untouched(network.module), torch.enable_grad():
        tensors = [tensor.requires_grad_() for tensor in stacked.values()]
        optimizer = recipe.optimizer(tensors)
        for _ in track(range(recipe.n_epochs), description="retraining", verbose=verbose):
            order = torch.rand(members.shape, generator=generator).argsort(1).to(members.device)
            shuffled = members.gather(1, order)
            for rows in torch.split(shuffled, recipe.batch_size, 1):
                optimizer.zero_grad()
                logits = stacked_logits(network, stacked, inputs[rows], own=True)
                losses = functional.cross_entropy(
                    logits.transpose(1, 2), codes[rows], reduction="none"
                )
                share = importance[rows]
                ((losses * share).sum(1) / share.sum(1)).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return {name: tensor.detach() for name, tensor in stacked.items()}


def stacked_outputs(
    network: Network,
    stacked: Parameters,
    inputs: Tensor,
    codes: Tensor,
    output: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int = 256,
) -> Tensor:
    """One number for every network and row, such as its loss.

    Shapes: inputs (n, ...), codes (n,) -> (m, n).
    """
    parts = []
    with untouched(network.module), torch.no_grad():
        for rows in torch.split(torch.arange(len(inputs)), batch_size):
            logits = stacked_logits(network, stacked, inputs[rows])
            parts.append(torch.stack([output(one, codes[rows]) for one in logits]))
    return torch.cat(parts, 1).cpu()
