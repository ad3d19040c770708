"""Real rows and networks on them, for what influence is good for."""

from functools import partial

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits, load_wine
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import nn

from benchmarks.data import (
    fetch_fashion_mnist,
    fetch_newsgroups,
    fetch_r8,
    fetch_spam_assassin,
    fetch_wordllama,
)
from benchmarks.performative_retraining import LENGTH, WORDS, SmallTransformer
from skperf import MLP, Net
from skperf.backbone.architectures import SmallConvNet
from skperf.datasets import load_fashion_mnist

_ADAM = partial(torch.optim.Adam, lr=2e-3)


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


def texts():
    """Word numbers (n, LENGTH) and labels: of 20 Newsgroups, of R8 to train on and to test."""
    r8, test = (fetch_r8(subset=part) for part in ("train", "test"))
    news = fetch_newsgroups(subset="train")
    words = CountVectorizer(max_features=WORDS, token_pattern=r"[a-z]{2,}").fit(r8.data)
    known, cut = words.vocabulary_, words.build_analyzer()

    def numbers(bunch):
        tokens = np.zeros((len(bunch.data), LENGTH), np.int64)
        for i, text in enumerate(bunch.data):
            found = [known[word] + 2 for word in cut(text) if word in known][:LENGTH] or [1]
            tokens[i, : len(found)] = found
        return tokens, np.unique(bunch.target, return_inverse=True)[1]

    return numbers(news), numbers(r8), numbers(test)


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


def fine_tuned(seed):
    """Train a transformer on 20 Newsgroups and then on 1,000 rows of R8, a tenth mislabelled."""
    news, *r8 = texts()
    rng = np.random.default_rng(seed)
    (X, y), (asked, answers) = (_some(rng, rows, n) for rows, n in zip(r8, (1000, 12), strict=True))
    y = flipped(y, seed)[0]
    torch.manual_seed(seed)
    net = _fitted(SmallTransformer(20), *_some(rng, news, 4000), n_epochs=3)
    net.head = nn.Linear(net.head.in_features, 8)
    return _fitted(net, X, y, n_epochs=8).double(), (X, y), (asked, answers)


class Residual(nn.Module):
    """Two residual blocks on images (n, 1, 14, 14)."""

    def __init__(self, width=9):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, stride=2, padding=1), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(3, width), nn.ReLU()),
                *(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(3, width)),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, images):
        """Return logits (n, 10)."""
        found = self.stem(images)
        for block in self.blocks:
            found = torch.relu(found + block(found))
        return self.head(found.mean((2, 3)))


def residual(seed):
    """Train a residual network on 1,000 small images of clothes, a tenth mislabelled."""
    (X, y), (asked, answers) = fashion(seed)
    X, asked = (nn.functional.avg_pool2d(torch.as_tensor(_pixels(p)), 2) for p in (X, asked))
    rows = X[:1000].double().numpy(), flipped(y[:1000], seed)[0]
    torch.manual_seed(seed)
    net = _fitted(Residual(), X[:1000].numpy(), rows[1], n_epochs=20)
    # Adam goes to where the plain steps that `fading` takes would be too long
    net = _fitted(net, X[:1000].numpy(), rows[1], n_epochs=20, by=partial(torch.optim.SGD, lr=0.03))
    return net.double(), rows, (asked[:12].double().numpy(), answers[:12])


def _some(rng, rows, n):
    order = rng.permutation(len(rows[1]))[:n]
    return tuple(part[order] for part in rows)


def untuned(name, seed):
    """Train a network that nobody tuned: -> it, rows (X, y), the first n of which trained it."""
    rows, n, net, n_epochs = UNTUNED[name]
    X, y = rows(seed)
    order = np.random.default_rng(seed).permutation(len(y))[:6000]
    X, y = X[order], np.unique(y, return_inverse=True)[1][order]
    return _trained(net(), X[:n], y[:n], n_epochs, seed), (X, y), n


def _table(load):
    X, y = load(return_X_y=True)
    return StandardScaler().fit_transform(X).astype(np.float32), y


def _ill(seed):
    X, y = _table(load_diabetes)
    return X, y > np.median(y)


def _digits(seed):
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32), y


def _both(parts):
    return tuple(np.concatenate(each) for each in zip(*parts, strict=True))


def _clothes(seed):
    images, labels = load_fashion_mnist(return_X_y=True)
    small = nn.functional.avg_pool2d(torch.as_tensor(_pixels(images)), 2)
    return small.numpy(), np.asarray(labels)


def _relu(n_inputs, width, n_classes):
    return nn.Sequential(nn.Linear(n_inputs, width), nn.ReLU(), nn.Linear(width, n_classes))


def _convolutional():
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(72, 10)),
    )


UNTUNED = {
    "diabetes above the median, MLP 10-24-2": (_ill, 200, partial(_relu, 10, 24, 2), 30),
    "wine, MLP 13-16-3": (lambda seed: _table(load_wine), 40, partial(_relu, 13, 16, 3), 60),
    "digits, MLP 64-24-10": (_digits, 500, partial(_relu, 64, 24, 10), 100),
    "SpamAssassin, MLP 256-16-2": (
        lambda seed: _both(mails(seed)), 1000, partial(_relu, 256, 16, 2), 40,
    ),
    "20 Newsgroups, MLP 256-16-20": (
        lambda seed: _both(news(seed)), 1000, partial(_relu, 256, 16, 20), 40,
    ),
    "Fashion-MNIST, CNN 4-8": (_clothes, 600, _convolutional, 30),
}  # fmt: skip


def _pixels(images):
    images = np.asarray(images, np.float32).reshape(-1, 1, 28, 28)
    return images / 255 if images.max() > 1 else images


def _trained(net, X, y, n_epochs, seed):
    torch.manual_seed(seed)
    for part in net:
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return _fitted(net, X, y, n_epochs)


def _fitted(net, X, y, n_epochs, by=_ADAM):
    optimizer = by(net.train().parameters())
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    for _ in range(n_epochs):
        for rows in torch.randperm(len(X)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()
