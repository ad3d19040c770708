"""Products with the second derivative of one step's loss, its running statistics included."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from skperf.backbone.losses import CrossEntropy
from skperf.backbone.training_run import weighted_losses
from skperf.influence.replay_products import (
    Twice,
    _batch_statistics,
    _momentum,
    _of_other_labels,
)

M = 3


def test_momentum_of_batch_norm_is_its_own_or_that_of_a_plain_mean():
    assert _momentum(nn.BatchNorm1d(2, momentum=0.3)) == 0.3
    norm = nn.BatchNorm1d(2, momentum=None)
    for count in (1, 2, 3, 4):
        assert _momentum(norm) == 1 / count
        norm(torch.randn(5, 2))


def test_statistics_are_those_that_batch_norm_keeps():
    norm, inputs = nn.BatchNorm2d(3, momentum=1.0), torch.randn(4, 3, 2, 5)
    norm(inputs)
    mean, variance = _batch_statistics(inputs)
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)


def test_losses_are_weighed_by_class_and_compared_with_those_of_other_labels():
    weight = torch.tensor([0.5, 1.0, 3.0]).double()
    loss, outputs = CrossEntropy(weight=weight), torch.randn(4, 3).double()
    codes = torch.tensor([0, 2, 1, 2])

    def told(codes):
        return weight[codes] * cross_entropy(outputs, codes, reduction="none")

    own = weighted_losses(loss, outputs, codes)
    torch.testing.assert_close(own, told(codes))
    plain = cross_entropy(outputs, codes, reduction="none")
    torch.testing.assert_close(weighted_losses(CrossEntropy(), outputs, codes), plain)
    relabelled = torch.randn(4, 3).double()
    other = torch.stack([told(torch.full((4,), k)) for k in range(3)], 1)
    expected = ((other - own[:, None]) * relabelled).sum(1)
    torch.testing.assert_close(_of_other_labels(loss, outputs, own, relabelled), expected)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_pulls_go_through_gradients_and_running_statistics(scale, one_by_one):
    torch.manual_seed(0)
    weight, shares = torch.randn(4).double(), torch.rand(5).double() + 0.5
    X = torch.randn(5, 4).double()

    def seen(weight, shares):
        """The gradient of a loss, and a mean and variance that hang on the weights alone."""
        losses = ((X * weight).sum(1)).sin() * shares
        (gradient,) = torch.autograd.grad(losses.mean(), weight, create_graph=True)
        return gradient, (X * weight).mean(0), (X * weight).var(0)

    leaf, own = weight.clone().requires_grad_(), shares.clone().requires_grad_()
    gradient, mean, variance = seen(leaf, own)
    twice = Twice([gradient], [leaf, own], [(0.2, mean, variance)], [(1, 0)], 1, one_by_one)
    towards, start = torch.randn(M, 4).double(), torch.randn(M, 4).double()
    buffers = [torch.randn(M, 4).double() for _ in range(2)]
    given, into = [b.clone() for b in buffers], [start.clone()]
    rows, labels = twice.pull([towards], into, buffers, scale)
    assert labels is None
    sources = [leaf, own]
    for m in range(M):
        asked = [scale * towards[m], 0.2 * given[1][m], 0.2 * given[0][m]]
        by_weight, by_share = torch.autograd.grad(
            [gradient, mean, variance], sources, asked, retain_graph=True, materialize_grads=True
        )
        torch.testing.assert_close(into[0][m], start[m] + by_weight)
        torch.testing.assert_close(rows[m], by_share)
    for buffer, before in zip(buffers, given, strict=True):
        torch.testing.assert_close(buffer, 0.8 * before)
