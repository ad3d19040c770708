"""Real rows and networks on them, for what influence is good for."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from benchmarks.data import fetch_newsgroups, fetch_spam_assassin, fetch_wordllama
from skperf import MLP, Net
from skperf.backbone.architectures import SmallConvNet
from skperf.datasets import fetch_fashion_mnist


def halves(rows, seed):
    """Split rows into those that guard and those that are asked about."""
    X, y = rows
    guard, asked, guard_y, asked_y = train_test_split(X, y, test_size=0.5, random_state=seed)
    return (guard, guard_y), (asked, asked_y)


def flipped(y, seed, share=0.1):
    """Give a share of the labels another value; tell which."""
    rng, labels = np.random.default_rng(seed), np.unique(y)
    wrong = rng.random(len(y)) < share
    other = (np.searchsorted(labels, y) + rng.integers(1, len(labels), len(y))) % len(labels)
    return np.where(wrong, labels[other], y), wrong


def digits(seed, test_size=0.3):
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    X_train, X_test, y_train, y_test = train_test_split(
        X, y, test_size=test_size, random_state=seed, stratify=y
    )
    return (X_train, y_train), (X_test, y_test)


def fashion(seed):
    """2,000 images to train on and 1,200 to judge by."""
    images, target = fetch_fashion_mnist(subset="train", return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))[:3200]
    images, target = images[order].reshape(-1, 1, 28, 28), target[order]
    return (images[:2000], target[:2000]), (images[2000:], target[2000:])


def mails(seed):
    """Mean word vectors of e-mails, spam or not."""
    found = fetch_spam_assassin()
    order = np.random.default_rng(seed).permutation(len(found.data))[:4000]
    vectors = _word_vectors(found, order)
    target = np.asarray(found.target)[order]
    return (vectors[:2000], target[:2000]), (vectors[2000:], target[2000:])


def news(seed):
    """Mean word vectors of posts to 20 newsgroups, of later ones to judge by."""
    rng, parts = np.random.default_rng(seed), []
    for subset, size in (("train", 4000), ("test", 3000)):
        found = fetch_newsgroups(subset=subset)
        order = rng.permutation(len(found.data))[:size]
        parts.append((_word_vectors(found, order), np.asarray(found.target)[order]))
    return tuple(parts)


def _word_vectors(texts, order):
    vectors = fetch_wordllama().embed([texts.data[i] for i in order])
    return vectors.astype(np.float32)


def mlp(width, n_epochs, seed, lr=0.005):
    return Net(MLP, module__hidden=(width,), lr=lr, max_epochs=n_epochs, random_state=seed)


def cnn(seed):
    return Net(SmallConvNet, lr=0.002, max_epochs=8, batch_size=64, random_state=seed)


def tanh_net(width, rows, seed):
    """Train a tanh network, not to the end; give it in double precision."""
    X, codes = torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Linear(X.shape[1], width), nn.Tanh(), nn.Linear(width, int(codes.max()) + 1)
    )
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        for batch in torch.randperm(len(X), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(X[batch]), codes[batch]).backward()
            optimizer.step()
    return module.double()
