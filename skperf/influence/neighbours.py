"""The layer that runs last, and the nearest training rows in the features before it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from skperf.backbone.modes import forward_hooks
from skperf.backbone.network import Network
from skperf.backbone.rows import Rows


def last_layer(network: Network, X: Rows) -> tuple[str, nn.Module]:
    """Find the layer of trained parameters that runs last, by running a row: X (n, ...)."""
    trained = network.trainable
    owners = {}
    for name, part in network.module.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in part.named_parameters(recurse=False)]
        if any(trained is None or n in trained for n in own):
            owners[part] = name
    ran: list[nn.Module] = []

    def seen(module: nn.Module, args: Any, output: Any) -> None:
        ran.append(module)

    with torch.no_grad(), forward_hooks(dict.fromkeys(owners, seen)):
        network(network.inputs(X[:1]))
    if not ran:
        raise ValueError(
            "no layer of the network runs as a module, so that none is the last: name parameters "
            "by globs, and leave candidates out."
        )
    return owners[ran[-1]], ran[-1]


def features_of(network: Network, X: Rows) -> Tensor:
    """Read the inputs of the layer that runs last: X (n, ...) -> (n, n_features)."""
    features, outputs = features_and_outputs(network, last_layer(network, X)[1], X)
    if len(features) != len(outputs):
        raise ValueError("candidates: the last layer does not keep one entry a row.")
    return features


def features_and_outputs(network: Network, last: nn.Module, X: Rows) -> tuple[Tensor, Tensor]:
    """Read what the last layer takes and the network gives: X (n, ...) -> (n, d), (n, ...)."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].detach().cpu())

    features, outputs = [], []
    with torch.no_grad(), forward_hooks({last: keep}, before=True):
        for (inputs,) in network.batches(X):
            seen.clear()
            outputs.append(network(inputs).cpu())
            # of a layer that runs several times, its last inputs; of many positions, their mean
            values = seen[-1]
            features.append(values if values.ndim <= 2 else values.flatten(1, -2).mean(1))
    return torch.cat(features).to(network.dtype), torch.cat(outputs)


def nearest(
    train: Tensor, queries: Tensor, k: int, *, groups: NDArray[Any] | None = None, chunk: int = 256
) -> NDArray[np.intp]:
    """Find the k nearest rows of (n, d) to queries (q, d), of every group (n,) if there are any."""
    if groups is not None:
        found = []
        for group in np.unique(groups):
            own = np.flatnonzero(groups == group)
            found.append(own[nearest(train[own], queries, k, chunk=chunk)])
        return np.concatenate(found, 1)
    k = min(k, len(train))
    squares = train.square().sum(1)
    parts = [
        (squares - 2 * part @ train.T).topk(k, 1, largest=False, sorted=False)[1]
        for part in torch.split(queries, chunk)
    ]
    close: NDArray[np.intp] = torch.cat(parts).numpy()
    return close
