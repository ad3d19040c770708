"""Small networks of every make, for the tests of components."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Convolutions with batch normalisation, in-place ReLU and a shared block."""

    def __init__(self, bias=False):
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(6, 3)
        self.alias = self.conv1

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        x = self.act(self.norm1(self.conv1(x)) + x)
        return self.out(self.drop(x.mean((2, 3))))


class TorchTransformer(nn.Module):
    """``nn.TransformerEncoderLayer``, whose attention calls no ``out_proj`` module."""

    def __init__(self, batch_first=True):
        super().__init__()
        self.batch_first = batch_first
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = x.view(len(x), -1, 8)
        if not self.batch_first:
            x = x.transpose(0, 1)
        return self.out(self.layer(x).mean(1 if self.batch_first else 0))


class SeparateAttention(nn.Module):
    """Query, key and value by name, as in Hugging Face encoders."""

    def __init__(self):
        super().__init__()
        self.num_attention_heads = 2
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        parts = [
            layer(x).view(*x.shape[:2], 2, 4).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        heads = F.scaled_dot_product_attention(*parts)
        return heads.transpose(1, 2).flatten(2)


class SeparateTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = SeparateAttention()
        self.dense = nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        x = x.view(len(x), -1, 8)
        x = x + self.dense(self.attention(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.out(x.mean(1))


class Tied(nn.Module):
    """One weight under two modules."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Linear(nn.Module):
    """A network whose output is linear in its gates, so that every method must be exact."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.out(self.hidden(x))


def linear():
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    return Linear(), X, np.arange(30) % 2


def made(kind, seed=0, dtype=torch.float64, **options):
    """A network with statistics that are not the initial ones, and rows for it."""
    torch.manual_seed(seed)
    module = kind(**options).to(dtype)
    shape = (1, 6, 6) if kind is Residual else (6,) if kind is Tied else (24,)
    X = torch.randn(40, *shape, dtype=dtype)
    module.train()
    with torch.no_grad():
        for _ in range(5):
            module(X)
    return module.eval(), X.numpy(), np.arange(40) % 3
