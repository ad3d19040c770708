from functools import partial

import numpy as np
import pytest
import torch
from influence_nets import cases, mlp
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.outputs import loss
from skperf.backbone.rows import Rows
from skperf.influence.retraining import (
    Recipe,
    _adam,
    fresh_parameters,
    half_subsets,
    stacked_outputs,
    stacked_outputs_of,
    train_subsets,
)


def test_subsets_are_halves():
    subsets = half_subsets(11, 6, torch.Generator().manual_seed(0))
    assert subsets.shape == (6, 11)
    assert (subsets.sum(1) == 6).all()
    assert len({tuple(s.tolist()) for s in subsets}) > 1


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_many_at_once_equal_one_after_another(kind):
    torch.manual_seed(0)
    network = Network(mlp(4, 6, 3), np.arange(3))
    inputs, codes = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    subsets = half_subsets(24, 3, torch.Generator().manual_seed(1))
    recipe = Recipe(partial(kind, lr=0.05), n_epochs=3, batch_size=5)
    stacked = train_subsets(network, Rows(inputs), codes, subsets, recipe, seeds=[7, 8, 9])
    fresh = fresh_parameters(network, [7, 8, 9])
    generator = torch.Generator().manual_seed(7)
    orders = [torch.rand(3, 12, generator=generator).argsort(1) for _ in range(3)]
    for i in range(3):
        module = mlp(4, 6, 3)
        module.load_state_dict({name: tensor[i] for name, tensor in fresh.items()})
        optimizer = kind(module.parameters(), lr=0.05)
        members = subsets[i].nonzero()[:, 0]
        for order in orders:
            for rows in members[order[i]].split(5):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(inputs[rows]), codes[rows]).backward()
                optimizer.step()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(stacked[name][i], parameter.detach())
        own = loss(module(inputs), codes).detach()
        values = stacked_outputs(network, stacked, Rows(inputs), codes, loss, batch_size=10)
        torch.testing.assert_close(values[i], own)


def test_logits_of_many_convolutional_networks():
    network, images = cases()["convolutional"]
    stacked = {
        name: torch.stack([p.detach(), 2 * p.detach()])
        for name, p in network.module.named_parameters()
    }
    own = torch.stack([images, images.flip(0)])
    for inputs, together in (
        ([images, images], stacked_outputs_of(network, stacked, Rows(images))),
        (own, stacked_outputs_of(network, stacked, Rows(own), own=True)),
    ):
        for i in range(2):
            one = {name: tensor[i] for name, tensor in stacked.items()}
            torch.testing.assert_close(together[i], network(inputs[i], one))


def test_modules_that_cannot_start_afresh_are_named():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.layer = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"layer '' \(Scaled\) cannot be initialised afresh"):
        fresh_parameters(Network(Scaled(), np.arange(2)), [0])


def test_subsets_must_be_of_one_size():
    network = Network(mlp(4, 3), np.arange(3))
    subsets = torch.tensor([[True, False], [True, True]])
    with pytest.raises(ValueError, match="equally many"):
        train_subsets(
            network, Rows(torch.zeros(2, 4)), torch.zeros(2).long(), subsets, Recipe(), seeds=[0, 1]
        )


def test_the_usual_optimizer_is_adam_with_a_step_of_a_hundredth():
    weight = torch.zeros(3, requires_grad=True)
    optimizer = _adam([weight])
    weight.grad = torch.tensor([1.0, -5.0, 0.1])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -0.01 * weight.grad.sign())


def test_initial_weights_are_drawn_anew_for_each_seed_and_again_for_the_same():
    torch.manual_seed(3)
    network = Network(mlp(4, 6, 3), np.arange(3))
    fresh = fresh_parameters(network, [7, 8, 7])
    for name, parameter in network.module.named_parameters():
        one, two, again = fresh[name]
        assert torch.equal(one, again)
        assert not torch.equal(one, two)
        assert not torch.equal(one, parameter)
