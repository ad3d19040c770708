"""Batch normalisations merged into the layers before them, against torch's own."""

import pytest
import torch
from torch import nn

from skperf.backbone._opening import open_network
from skperf.backbone.rows import Rows
from skperf.backbone.views import view
from skperf.components.folding import (
    fold,
    folds_exactly,
    followers_of,
    in_image_order,
    is_small,
)


def drawn(norm):
    for tensor in norm.parameters():
        nn.init.normal_(tensor)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    return norm


def pairs():
    torch.manual_seed(0)
    yield nn.Linear(4, 3), drawn(nn.BatchNorm1d(3, eps=0.1)), torch.randn(5, 4)
    yield nn.Linear(4, 3, bias=False), drawn(nn.BatchNorm1d(3)), torch.randn(5, 4)
    yield nn.Conv2d(2, 3, 3), drawn(nn.BatchNorm2d(3, affine=False)), torch.randn(5, 2, 6, 6)
    yield nn.Conv1d(2, 4, 3, bias=False), drawn(nn.BatchNorm1d(4)), torch.randn(5, 2, 6)


@pytest.mark.parametrize("which", range(4))
def test_one_layer_does_what_two_did_and_zeroed_rows_leave_the_same(which):
    layer, norm, rows = list(pairs())[which]
    module = nn.Sequential(layer, norm).eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    folded = view(module)
    fold(folded, {"0": "1"})
    torch.testing.assert_close(folded(rows), module(rows))
    # the layer does it all
    torch.testing.assert_close(folded[0](rows), module(rows))
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        folded[0].weight[1] = 0
        layer.weight[1] = 0
    torch.testing.assert_close(folded(rows), module(rows))


class Reads(nn.Module):
    """Uses a layer beside its normalisation."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), drawn(nn.BatchNorm1d(3))

    def forward(self, x):
        values = self.layer(x)
        return self.norm(values) + values


def test_what_is_used_beside_its_normalisation_does_not_fold():
    torch.manual_seed(0)
    rows = torch.randn(6, 3)
    network = open_network(Reads().eval())
    assert not folds_exactly(network, {"layer": "norm"}, Rows.of(rows))
    plain = nn.Sequential(nn.Linear(3, 3), drawn(nn.BatchNorm1d(3))).eval()
    assert folds_exactly(open_network(plain), {"0": "1"}, Rows.of(rows))


def followers(module, n_calls=None):
    return followers_of(module, {"0": "1"}, n_calls or {"0": 1, "1": 1})


def test_pairs_are_layers_and_norms_that_nobody_shares():
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert followers(module) == {"0": "1"}
    assert followers(module, {"0": 2, "1": 1}) == {}
    assert followers(module, {"0": 1, "1": 2}) == {}
    assert followers(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))) == {}
    assert followers(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))) == {}
    bare = nn.BatchNorm1d(3, track_running_stats=False)
    assert followers(nn.Sequential(nn.Linear(3, 3), bare)) == {}


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("which", [0, 1])
def test_shared_tensors_and_hooks_keep_a_pair_apart(what, which):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    own = getattr(module[which], what)
    if own.shape == getattr(module[2], what).shape:
        setattr(module[2], what, own)
        assert followers(module) == {}
    hooked = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    handle = (
        hooked[which].register_forward_hook(lambda *_: None)
        if what == "weight"
        else hooked[which].register_forward_pre_hook(lambda *_: None)
    )
    assert followers(hooked) == {}
    handle.remove()
    assert followers(hooked) == {"0": "1"}


def test_small_is_64_mebibytes_of_weights():
    def sized(n, dtype=torch.float32):
        module = nn.Module()
        module.weight = nn.Parameter(torch.empty(n, dtype=dtype), requires_grad=False)
        return module

    assert is_small(sized(2**24))
    assert not is_small(sized(2**24 + 1))
    assert is_small(sized(2**25, torch.float16))
    assert not is_small(sized(2**23 + 1, torch.float64))


class Views(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(48, 2)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def test_weights_are_kept_in_image_order_where_the_network_bears_it():
    rows = torch.randn(4, 2, 6, 6)
    module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 2)).eval()
    network = open_network(module)
    expected = module(rows)
    in_image_order(network, Rows.of(rows))
    conv = network.module[0]
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()
    assert module[0].weight.is_contiguous()
    torch.testing.assert_close(network(Rows.of(rows)), expected)
    stubborn = open_network(views := Views().eval())
    in_image_order(stubborn, Rows.of(rows.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(stubborn(Rows.of(rows)), views(rows))
