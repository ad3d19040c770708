"""Small networks in double precision, and brute-force references."""

import itertools

import numpy as np
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.parameters import flatten, select_parameters


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, stride=2, groups=2)
        self.groups = nn.GroupNorm(2, 6)
        self.hidden = nn.Linear(54, 12)
        self.layer_norm = nn.LayerNorm(12)
        self.output = nn.Linear(12, 3, bias=False)

    def forward(self, x):
        x = torch.relu_(self.norm(self.first(x)))
        x = torch.relu_(self.groups(self.second(x)))
        return self.output(torch.relu(self.layer_norm(self.hidden(x.flatten(1)))))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 5, padding_idx=0)
        self.lift = nn.Linear(5, 16)
        self.bag = nn.EmbeddingBag(30, 16, mode="mean")
        self.convolve = nn.Conv1d(16, 8, 3, padding="same", padding_mode="circular")
        self.output = nn.Linear(8, 3)

    def forward(self, x):
        hidden = torch.relu(self.lift(self.words(x))) + self.bag(x)[:, None]
        return self.output(self.convolve(hidden.transpose(1, 2)).mean(2))


class Padded(nn.Conv2d):
    """A kind of layer that nobody else knows."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Scaled(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shift, self.scale = (nn.Parameter(torch.randn(width)) for _ in range(2))

    def forward(self, x):
        return torch.tanh(x * self.scale) + self.shift


def unusual():
    """Join parts of unknown kinds to known ones."""
    return nn.Sequential(
        Padded(1, 4, 3, stride=4, bias=False),
        nn.PReLU(4),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Flatten(),
        Scaled(18),
        nn.Linear(18, 3),
    )


def mlp(*widths, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layers = []
    for n_in, n_out in itertools.pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to(dtype)


def cases():
    """Yield (network, inputs) of every kind of layer."""
    torch.manual_seed(0)
    convolutional, text = Convolutional().double(), Text().double()
    convolutional.norm.running_mean.normal_()
    images = torch.randn(7, 1, 8, 8, dtype=torch.float64)
    tokens = torch.randint(0, 30, (7, 4))
    return {
        "mlp": (Network(mlp(5, 6, 3), np.arange(3)), torch.randn(7, 5, dtype=torch.float64)),
        "convolutional": (Network(convolutional.eval(), np.arange(3)), images),
        "unusual": (Network(unusual().double(), np.arange(3)), images),
        "text": (Network(text.eval(), np.arange(3)), tokens),
    }


def brute_gradients(network, inputs, cotangents):
    """Gradient of (cotangent * logits).sum() for each row, one backward pass each."""
    own = {n: p.detach().requires_grad_() for n, p in network.module.named_parameters()}
    names = list(select_parameters(network.module))
    rows = []
    for row, cotangent in zip(inputs, cotangents, strict=True):
        value = (network(row[None], own)[0] * cotangent).sum()
        gradients = torch.autograd.grad(value, [own[n] for n in names], materialize_grads=True)
        rows.append(flatten(dict(zip(names, gradients, strict=True))))
    return torch.stack(rows)


def brute_curvature(network, inputs, shares):
    """Gauss-Newton matrix of the mean cross-entropy, from one Jacobian a row."""
    parameters = select_parameters(network.module)
    total = 0
    for row, share in zip(inputs, shares, strict=True):
        jacobian = torch.func.jacrev(lambda p, row=row: network(row[None], p)[0])(parameters)
        matrix = torch.cat([jacobian[n].flatten(1) for n in parameters], 1).detach()
        p = network(row[None])[0].softmax(0).detach()
        total = total + share * matrix.T @ (torch.diag(p) - torch.outer(p, p)) @ matrix
    return total
