"""Which parameters a watcher takes for tables of units of their own."""

from copy import deepcopy

import numpy as np
import torch
from torch import nn

from skperf import ComponentAttributor
from skperf.components.watching import Watcher


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.scale = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(3))
        self.conv, self.norm = nn.Conv1d(3, 2, 2), nn.LayerNorm(3)


def test_owners_are_parameters_of_three_axes_outside_layers_with_rows():
    module = Experts()
    assert Watcher(module).owners == {id(module.up): ("", "up")}


class Rotated(nn.Module):
    """Turns its input block by block with a matrix made of parameters, as OFT does."""

    def __init__(self, width, size):
        super().__init__()
        self.turn, self.layer = nn.Parameter(torch.randn(size, size) * 0.3), nn.Linear(width, width)

    def forward(self, x):
        size = len(self.turn)
        skew = torch.zeros(size, size)
        skew[:] = self.turn - self.turn.T
        rotation = torch.linalg.matrix_exp(skew)
        blocks = x.unflatten(-1, (-1, size))
        return self.layer(torch.einsum("bnks,st->bnkt", blocks, rotation).flatten(-2))


class Attends(nn.Module):
    def __init__(self, width=12, n_heads=3):
        super().__init__()
        self.q, self.k, self.v = (Rotated(width, 4) for _ in range(3))
        self.out, self.head, self.n_heads = nn.Linear(width, width), nn.Linear(width, 2), n_heads

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        weights = torch.matmul(q, k.transpose(2, 3)).softmax(-1)
        return self.head(self.out((weights @ v).transpose(1, 2).flatten(2)).mean(1))


def test_blocks_that_are_turned_by_a_parameter_are_no_heads():
    torch.manual_seed(0)
    X, y = np.random.default_rng(0).normal(size=(8, 5, 12)).astype(np.float32), np.arange(8) % 2
    model = ComponentAttributor(
        module := Attends().eval(), components="attention_heads", budget=12, random_state=0
    ).fit(X, y)
    assert len(model.components_) == 3
    assert {str(c.module) for c in model.components_} == {""}
    # the second head gone: its columns of the projection that takes heads
    copied = deepcopy(module)
    with torch.no_grad():
        copied.out.weight[:, 4:8] = 0
        outputs = copied(torch.as_tensor(X))
    found = model.counterfactual(np.array([1, 0, 1]), X, y)[:, 0]
    margin = outputs[range(8), y] - outputs[range(8), 1 - y]
    np.testing.assert_allclose(found, margin, atol=1e-5)


class Written(nn.Module):
    """Puts what depends on the row into a tensor that began as a constant."""

    def __init__(self):
        super().__init__()
        self.values, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        room = torch.zeros(len(x), 4, 6)
        room[:] = self.values(x)
        other = torch.zeros(len(x), 4, 6)
        other.add_(x)
        left, right = (t.unflatten(-1, (3, 2)).transpose(1, 2) for t in (other, room))
        mixed = torch.matmul(torch.matmul(left, left.transpose(2, 3)), right)
        return self.out(mixed.transpose(1, 2).flatten(2)).mean(1)


def test_a_constant_that_is_written_to_is_none_any_more():
    torch.manual_seed(0)
    X, y = np.random.default_rng(0).normal(size=(6, 4, 6)).astype(np.float32), np.arange(6) % 2
    model = ComponentAttributor(
        Written().eval(), components="attention_heads", budget=12, random_state=0
    ).fit(X, y)
    assert len(model.components_) == 3
