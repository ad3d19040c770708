"""Networks, rows and retraining truth that influence methods are held against."""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from benchmarks.data import fetch_fashion_mnist, fetch_newsgroups, fetch_wordllama
from skperf.backbone.network import Network
from skperf.backbone.outputs import loss
from skperf.backbone.rows import Rows
from skperf.datasets import load_email_vectors
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


def digits():
    """1,797 images of 8 x 8."""
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32), y


def stacked_workload(
    name, data, widths, *, n_members=1, n_test=360, n_subsets=50, n_seeds=2, draw=2, n_epochs=40
):
    """Fully connected networks, retrained all at once."""
    X, y = data()
    parts = train_test_split(X, y, test_size=n_test, random_state=draw - 1, stratify=y)
    X_train, X_test, y_train, y_test = parts
    network = Network(mlp(*widths), np.unique(y))
    recipe = Recipe(partial(adam, lr=1e-3), n_epochs=n_epochs, batch_size=32)
    rows, codes = Rows(torch.from_numpy(X_train)), torch.from_numpy(y_train)
    everything = torch.ones(n_members, len(rows), dtype=torch.bool)
    members = train_subsets(network, rows, codes, everything, recipe, seeds=list(range(n_members)))
    subsets = half_subsets(len(rows), n_subsets, torch.Generator().manual_seed(draw))
    seeds = [1000 + i for i in range(n_subsets * n_seeds)]
    retrained = train_subsets(network, rows, codes, subsets.repeat(n_seeds, 1), recipe, seeds=seeds)
    queries = Rows(torch.from_numpy(X_test)), torch.from_numpy(y_test)
    losses = stacked_outputs(network, retrained, *queries, loss)
    losses = losses.view(n_seeds, n_subsets, -1).mean(0)
    modules = [_filled(mlp(*widths), members, i) for i in range(n_members)]
    return Workload(
        name, modules, X_train, y_train, X_test, y_test, subsets.numpy(), losses.numpy()
    )


def _filled(module, stacked, i):
    module.load_state_dict({name: tensor[i] for name, tensor in stacked.items()})
    return module.eval()


def fashion_workload(
    name, build, n_train, *, first=20_000, n_subsets=0, n_seeds=2, n_epochs=10, n_test=500, draw=2
):
    """Fashion-MNIST images; the truth by retraining one network after another."""
    images, target = fetch_fashion_mnist(subset="train", return_X_y=True)
    test_images, test_target = fetch_fashion_mnist(subset="test", return_X_y=True)
    train, test = slice(first, first + n_train), slice(first // 10, first // 10 + n_test)
    X_train, y_train = _images(images[train]), target[train].astype(np.int64)
    X_test, y_test = _images(test_images[test]), test_target[test].astype(np.int64)
    if build is not convolutional:
        X_train, X_test = X_train.reshape(n_train, -1), X_test.reshape(n_test, -1)
    rows, codes = torch.from_numpy(X_train), torch.from_numpy(y_train)
    again = partial(trained, build, n_epochs=n_epochs)
    module = again(rows, codes, seed=0)
    subsets = losses = None
    if n_subsets:
        subsets = half_subsets(n_train, n_subsets, torch.Generator().manual_seed(draw)).numpy()
        queries = torch.from_numpy(X_test), torch.from_numpy(y_test)
        retrained = [
            again(rows[kept], codes[kept], seed=10 ** (draw + 1) + i)
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


def small_fashion(first=5000, n=2000):
    """Fashion-MNIST images of 14 x 14, none of which W2 holds."""
    images, target = fetch_fashion_mnist(subset="train", return_X_y=True)
    rows = slice(first, first + n)
    pooled = _images(images[rows]).reshape(-1, 14, 2, 14, 2).mean((2, 4))
    return pooled.reshape(len(pooled), -1), target[rows].astype(np.int64)


def news():
    """Embed posts to 20 newsgroups by the mean of their word vectors."""
    found = fetch_newsgroups(subset="train")
    rows = np.random.default_rng(0).permutation(len(found.data))[:3360]
    vectors = fetch_wordllama().embed([found.data[i] for i in rows])
    return vectors.astype(np.float32), np.asarray(found.target)[rows]


def tumours():
    """30 measurements of 569 tumours, malignant or not."""
    X, y = load_breast_cancer(return_X_y=True)
    return ((X - X.mean(0)) / X.std(0)).astype(np.float32), y


def mails():
    """E-mails as MiniLM vectors, spam or not."""
    found = load_email_vectors()
    codes = np.unique(found.target, return_inverse=True)[1]
    return found.data.astype(np.float32), codes


BUILDERS = {
    "W1": partial(stacked_workload, "W1", digits, (64, 128, 64, 10), n_members=8),
    "W1s": partial(stacked_workload, "W1s", digits, (64, 32, 10)),
    "W2": partial(fashion_workload, "W2", convolutional, 2000, n_subsets=50),
    "W2-10k": partial(fashion_workload, "W2-10k", convolutional, 10_000, n_epochs=4),
    "MLP235k": partial(fashion_workload, "MLP235k", partial(mlp, 784, 256, 128, 10), 5000),
    # no row and no retraining of these is among those above: damping is chosen on them
    "images": partial(stacked_workload, "images", small_fashion, (196, 64, 32, 10), draw=1),
    "images, one layer": partial(
        stacked_workload, "images, one layer", small_fashion, (196, 32, 10), draw=1
    ),
    "mails": partial(
        stacked_workload, "mails", mails, (384, 32, 2), draw=1, n_test=200, n_epochs=20
    ),
    "images, 400": partial(
        stacked_workload,
        "images, 400",
        partial(small_fashion, 7000, 760),
        (196, 64, 32, 10),
        draw=1,
    ),
    "images, 6,000": partial(
        stacked_workload,
        "images, 6,000",
        partial(small_fashion, 8000, 6360),
        (196, 64, 32, 10),
        draw=1,
        n_epochs=15,
        n_seeds=1,
    ),
    "tumours": partial(stacked_workload, "tumours", tumours, (30, 32, 2), draw=1, n_test=160),
    "news": partial(stacked_workload, "news", news, (256, 32, 20), draw=1, n_epochs=15, n_seeds=1),
    "CNN": partial(
        fashion_workload, "CNN", convolutional, 2000, first=0, n_subsets=50, n_seeds=1, draw=1
    ),
}
MODULES = {
    "W1": partial(mlp, 64, 128, 64, 10),
    "W1s": partial(mlp, 64, 32, 10),
    "MLP235k": partial(mlp, 784, 256, 128, 10),
    "images": partial(mlp, 196, 64, 32, 10),
    "images, one layer": partial(mlp, 196, 32, 10),
    "images, 400": partial(mlp, 196, 64, 32, 10),
    "images, 6,000": partial(mlp, 196, 64, 32, 10),
    "tumours": partial(mlp, 30, 32, 2),
    "news": partial(mlp, 256, 32, 20),
    "mails": partial(mlp, 384, 32, 2),
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
    build = MODULES.get(name, convolutional)
    modules = []
    for state in fields["modules"]:
        module = build()
        module.load_state_dict(state)
        modules.append(module.eval())
    return Workload(**{**fields, "modules": modules})
