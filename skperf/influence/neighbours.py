"""Nearest training rows in the features before the last layer."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skperf.backbone.modes import forward_pre_hooks, untouched
from skperf.backbone.network import Network


def features_of(network: Network, X: NDArray[Any]) -> Tensor:
    """Read the inputs of a network's last layer: X (n, ...) -> (n, n_features)."""
    owners = [part for part in network.module.modules() if list(part.parameters(recurse=False))]
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().flatten(1).cpu())

    with (
        untouched(network.module),
        torch.inference_mode(),
        forward_pre_hooks({owners[-1]: keep}),
    ):
        for (inputs,) in network.batches(X):
            network(inputs)
    return torch.cat(seen).clone().to(network.dtype)


def nearest(train: Tensor, queries: Tensor, k: int, *, chunk: int = 256) -> NDArray[np.intp]:
    """Find the k nearest rows by Euclidean distance: train (n, d), queries (q, d)."""
    k = min(k, len(train))
    squares = train.square().sum(1)
    parts = [
        (squares - 2 * part @ train.T).topk(k, 1, largest=False, sorted=False)[1]
        for part in torch.split(queries, chunk)
    ]
    found: NDArray[np.intp] = torch.cat(parts).numpy()
    return found
