"""Train many copies of a small network at once, as batched matrix products."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from skperf.backbone.network import Network
from skperf.backbone.parameters import Parameters
from skperf.backbone.progress import track
from skperf.backbone.randomness import drawing_from
from skperf.backbone.rows import Rows
from skperf.backbone.views import own_copy
from skperf.influence.mapping import mapped


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
    """Initialise what trains in copies of a network."""
    copies = []
    module = own_copy(network.module)
    kept = network.trainable
    _check_resettable(module, kept)
    for seed in seeds:
        with drawing_from(torch.Generator().manual_seed(seed)):
            for reset in filter(None, map(_reset_of, module.modules())):
                reset()
        named = module.named_parameters()
        copies.append({n: p.detach().clone() for n, p in named if kept is None or n in kept})
    return {name: torch.stack([copy[name] for copy in copies]) for name in copies[0]}


def _reset_of(part: nn.Module) -> Callable[[], None] | None:
    # attention keeps it private
    own = getattr(part, "reset_parameters", getattr(part, "_reset_parameters", None))
    return own if callable(own) else None


def _check_resettable(module: nn.Module, kept: tuple[str, ...] | None) -> None:
    for name, part in module.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in part.named_parameters(recurse=False)]
        trains = any(kept is None or n in kept for n in own)
        if trains and _reset_of(part) is None:
            raise ValueError(
                f"layer {name!r} ({type(part).__name__}) cannot be initialised afresh: it has no "
                "reset_parameters. Give an unfitted estimator, which can be refitted."
            )


def stacked_outputs_of(
    network: Network, stacked: Parameters, inputs: Rows, *, own: bool = False
) -> Tensor:
    """Compute outputs of many networks: inputs (n, ...) or (m, n, ...) -> (m, n, ...)."""
    # batched weights make a grouped convolution, which is slower than one network after another
    convolves = any(isinstance(part, nn.Conv2d) for part in network.module.modules())
    one_by_one = 1 if convolves else None
    if own:
        function: Callable[..., Tensor] = lambda values, rows: network(rows, values)  # noqa: E731
        result: Tensor = mapped(function, stacked, inputs, chunk_size=one_by_one)
        return result
    result = mapped(lambda values: network(inputs, values), stacked, chunk_size=one_by_one)
    return result


def stacked_values(
    function: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> Tensor:
    """One number for every network and row: outputs (m, n, ...), targets (m, n, ...) -> (m, n)."""
    values: Tensor = mapped(function, outputs, targets)
    return values


def train_subsets(
    network: Network,
    inputs: Rows,
    targets: Tensor,
    subsets: Tensor,
    recipe: Recipe,
    *,
    seeds: list[int],
    weights: Tensor | None = None,
    verbose: int = 0,
) -> Parameters:
    """Train fresh copies of a network on subsets, all at once: inputs (n, ...), weights (n,)."""
    sizes = subsets.sum(1)
    if not bool((sizes == sizes[0]).all()):
        raise ValueError("all subsets must hold equally many rows.")
    members = subsets.nonzero()[:, 1].view(len(subsets), -1).to(targets.device)
    generator = torch.Generator().manual_seed(seeds[0])
    stacked = fresh_parameters(network, seeds)
    tensors = [tensor.requires_grad_() for tensor in stacked.values()]
    optimizer = recipe.optimizer(tensors)
    with torch.enable_grad():
        for _ in track(range(recipe.n_epochs), description="retraining", verbose=verbose):
            order = torch.rand(members.shape, generator=generator).argsort(1).to(members.device)
            shuffled = members.gather(1, order)
            for rows in torch.split(shuffled, recipe.batch_size, 1):
                optimizer.zero_grad()
                batch = inputs.map(itemgetter(rows))
                outputs = stacked_outputs_of(network, stacked, batch, own=True)
                losses = stacked_values(network.loss.value, outputs, targets[rows])
                share = 1.0 if weights is None else weights[rows]
                (losses * share).mean(1).sum().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return {name: tensor.detach() for name, tensor in stacked.items()}


def stacked_outputs(
    network: Network,
    stacked: Parameters,
    inputs: Rows,
    targets: Tensor,
    output: Callable[[Tensor, Tensor], Tensor],
    *,
    batch_size: int = 256,
) -> Tensor:
    """One number, such as a loss, for every network and row: inputs (n, ...) -> (m, n)."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(inputs), batch_size):
            rows = slice(start, start + batch_size)
            outputs = stacked_outputs_of(network, stacked, inputs[rows])
            parts.append(torch.stack([output(one, targets[rows]) for one in outputs]))
    return torch.cat(parts, 1).cpu()
