import pytest
import torch
from torch import nn

from skperf.backbone.batch_norm import OtherBatchNorm
from skperf.reprogramming.batch_norm import affine_batch_norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layer", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_values_and_gradients_are_those_of_torch(layer, affine):
    torch.manual_seed(0)
    norm = layer(5, affine=affine).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 2)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    shape = (4, 5, 3, 2, 2)[: 2 + {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[layer]]
    inputs, outputs = torch.randn(shape).double().requires_grad_(), []
    norm.eval()
    for mode in (torch.enable_grad(), OtherBatchNorm(affine_batch_norm)):
        with mode:
            values = norm(inputs)
        (gradient,) = torch.autograd.grad(values.pow(3).sum(), inputs)
        outputs.append((values, gradient))
    torch.testing.assert_close(*outputs)


def test_training_mode_stays_what_it_is():
    norm, twin, inputs = nn.BatchNorm2d(3), nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    with OtherBatchNorm(affine_batch_norm):
        values = norm(inputs)
    assert torch.equal(values, twin(inputs))
    assert torch.equal(norm.running_mean, twin.running_mean)
    without = nn.BatchNorm2d(3, track_running_stats=False).eval()
    with OtherBatchNorm(affine_batch_norm):
        assert torch.equal(without(inputs), values)
