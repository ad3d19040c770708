"""The statistics of the batch in place of the stored ones, by hand."""

import pytest
import torch
from torch import nn

from skperf.backbone.batch_norm import (
    batch_statistics,
    batch_statistics_wanted,
    prediction_time_batch_norm,
)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.1), nn.ReLU())
    net[1].running_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 3.0]))
    net[1].running_var.copy_(torch.tensor([4.0, 0.25, 9.0, 1.0]))
    nn.init.normal_(net[1].weight)
    nn.init.normal_(net[1].bias)
    return net.train()


def test_a_view_normalises_by_the_mean_and_variance_of_its_batch():
    net, rows = network(), torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with prediction_time_batch_norm(net) as opened:
        assert batch_statistics_wanted()
        assert opened is not net
        assert not opened.training
        found = opened(rows)
    values = net[0](rows)
    centred = (values - values.mean(0)) / (values.var(0, correction=0) + 0.1).sqrt()
    expected = (centred * net[1].weight + net[1].bias).relu()
    torch.testing.assert_close(found, expected)
    assert not batch_statistics_wanted()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        stored = net.eval()(rows)
    assert not torch.allclose(stored, expected, atol=0.1)


def test_what_has_no_such_layer_is_refused():
    with pytest.raises(ValueError, match="Linear has no batch normalisation layer"):
        batch_statistics(nn.Linear(2, 2)).__enter__()
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got int"):
        batch_statistics(3).__enter__()
    assert not batch_statistics_wanted()
