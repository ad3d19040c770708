import copy

import pytest
import torch
from torch import nn

from skperf.backbone import prediction_time_batch_norm


def test_prediction_time_batch_norm_equals_training_mode_without_its_side_effects():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    module[1].running_mean.fill_(3.0)
    x = torch.randn(32, 1, 8, 8) * 2 + 5
    expected = copy.deepcopy(module).train()(x)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with prediction_time_batch_norm(module) as opened:
        actual = opened(x)
    torch.testing.assert_close(actual, expected)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in before.items())
    assert module.training
    assert not torch.allclose(module.eval()(x), expected)


def test_prediction_time_batch_norm_needs_a_layer():
    with (
        pytest.raises(ValueError, match="no batch normalisation layer"),
        prediction_time_batch_norm(nn.Linear(2, 2)),
    ):
        pass
