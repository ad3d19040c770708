"""Networks, rows and retraining truth that influence methods are held against."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.outputs import loss
from skperf.datasets import fetch_fashion_mnist
from skperf.influence.retraining import (
    Recipe,
    fresh_parameters,
    half_subsets,
    stacked_outputs,
    train_subsets,
)


@dataclass
class Workload:
    """A trained network, or several trained alike, and what retraining on halves gives."""

    name: str
    modules: list
    X_train: np.ndarray
    y_train: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    subsets: np.ndarray | None = None
    losses: np.ndarray | None = None


def mlp(*widths):
    layers = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutional():
    """119,530 parameters on images of 28 x 28."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def adam(parameters, lr):
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def digits_workload(name, widths, *, n_members=8, n_subsets=50, n_seeds=2):
    """Digits, 1,437 rows to train on and 360 to ask about."""
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    parts = train_test_split(X, y, test_size=360, random_state=1, stratify=y)
    X_train, X_test, y_train, y_test = parts
    network = Network(mlp(*widths), np.arange(10))
    recipe = Recipe(partial(adam, lr=1e-3), n_epochs=40, batch_size=32)
    rows, codes = torch.from_numpy(X_train), torch.from_numpy(y_train)
    everything = torch.ones(n_members, len(rows), dtype=torch.bool)
    members = train_subsets(network, rows, codes, everything, recipe, seeds=list(range(n_members)))
    subsets = half_subsets(len(rows), n_subsets, torch.Generator().manual_seed(2))
    seeds = [1000 + i for i in range(n_subsets * n_seeds)]
    retrained = train_subsets(network, rows, codes, subsets.repeat(n_seeds, 1), recipe, seeds=seeds)
    queries = torch.from_numpy(X_test), torch.from_numpy(y_test)
    losses = stacked_outputs(network, retrained, *queries, loss)
    losses = losses.view(n_seeds, n_subsets, -1).mean(0)
    modules = [_filled(mlp(*widths), members, i) for i in range(n_members)]
    return Workload(
        name, modules, X_train, y_train, X_test, y_test, subsets.numpy(), losses.numpy()
    )


def _filled(module, stacked, i):
    module.load_state_dict({name: tensor[i] for name, tensor in stacked.items()})
    return module.eval()


def fashion_workload(name, build, n_train, *, n_subsets=0, n_seeds=2, n_epochs=10, n_test=500):
    """Fashion-MNIST images; the truth by retraining one network after another."""
    images, target = fetch_fashion_mnist(subset="train", return_X_y=True)
    test_images, test_target = fetch_fashion_mnist(subset="test", return_X_y=True)
    # the first rows belong to benchmarks.influence_damping
    train, test = slice(20_000, 20_000 + n_train), slice(2000, 2000 + n_test)
    X_train, y_train = _images(images[train]), target[train].astype(np.int64)
    X_test, y_test = _images(test_images[test]), test_target[test].astype(np.int64)
    if build is not convolutional:
        X_train, X_test = X_train.reshape(n_train, -1), X_test.reshape(n_test, -1)
    rows, codes = torch.from_numpy(X_train), torch.from_numpy(y_train)
    again = partial(trained, build, n_epochs=n_epochs)
    module = again(rows, codes, seed=0)
    subsets = losses = None
    if n_subsets:
        subsets = half_subsets(n_train, n_subsets, torch.Generator().manual_seed(2)).numpy()
        queries = torch.from_numpy(X_test), torch.from_numpy(y_test)
        retrained = [
            again(rows[kept], codes[kept], seed=1000 + i)
            for i, kept in enumerate(np.tile(subsets, (n_seeds, 1)))
        ]
        losses = np.stack([_losses(module, queries) for module in retrained])
        losses = losses.reshape(n_seeds, n_subsets, -1).mean(0)
    return Workload(name, [module], X_train, y_train, X_test, y_test, subsets, losses)


def _images(images):
    return images.reshape(-1, 1, 28, 28).astype(np.float32)


def trained(build, rows, codes, *, seed, n_epochs, batch_size=64, lr=1e-3):
    module = build()
    fresh = fresh_parameters(Network(module, np.arange(10)), [seed])
    module.load_state_dict({name: tensor[0] for name, tensor in fresh.items()})
    optimizer = adam(module.parameters(), lr)
    generator = torch.Generator().manual_seed(seed)
    if rows.ndim == 4:
        rows = rows.contiguous(memory_format=torch.channels_last)
    for _ in range(n_epochs):
        for batch in torch.randperm(len(rows), generator=generator).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(rows[batch]), codes[batch]).backward()
            optimizer.step()
    return module.eval()


def _losses(module, queries):
    with torch.inference_mode():
        return nn.functional.cross_entropy(module(queries[0]), queries[1], reduction="none").numpy()


BUILDERS = {
    "W1": partial(digits_workload, "W1", (64, 128, 64, 10)),
    "W1s": partial(digits_workload, "W1s", (64, 32, 10), n_members=1),
    "W2": partial(fashion_workload, "W2", convolutional, 2000, n_subsets=50),
    "W2-10k": partial(fashion_workload, "W2-10k", convolutional, 10_000, n_epochs=4),
    "MLP235k": partial(
        fashion_workload, "MLP235k", partial(mlp, 784, 256, 128, 10), 5000, n_epochs=10
    ),
}


def load(name, folder):
    """Build a workload, or read it from a folder where it was built before."""
    path = Path(folder) / f"{name}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        workload = BUILDERS[name]()
        fields = {**vars(workload), "modules": [m.state_dict() for m in workload.modules]}
        torch.save(fields, path)
    fields = torch.load(path, weights_only=False)
    build = {"W1": partial(mlp, 64, 128, 64, 10), "W1s": partial(mlp, 64, 32, 10)}.get(
        name, partial(mlp, 784, 256, 128, 10) if name == "MLP235k" else convolutional
    )
    modules = []
    for state in fields["modules"]:
        module = build()
        module.load_state_dict(state)
        modules.append(module.eval())
    return Workload(**{**fields, "modules": modules})
