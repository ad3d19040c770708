import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from skperf.backbone.parameters import (
    checksum,
    fingerprint,
    flatten,
    select_parameters,
    substituted,
    unflatten,
)


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.ReLU())


def test_select_by_name_and_glob(module):
    assert list(select_parameters(module)) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(select_parameters(module, "last")) == ["2.weight", "2.bias"]
    assert list(select_parameters(module, "*.bias")) == ["0.bias", "2.bias"]
    assert list(select_parameters(module, ["2.*", "0.bias"])) == ["0.bias", "2.weight", "2.bias"]


def test_selected_parameters_share_memory_without_gradient(module):
    weight = select_parameters(module)["0.weight"]
    assert weight.data_ptr() == module[0].weight.data_ptr()
    assert not weight.requires_grad


def test_tied_parameters_count_once(module):
    module[2].weight = nn.Parameter(torch.zeros(4, 8).T.contiguous())
    tied = nn.Sequential(module[0], nn.Linear(4, 8))
    tied[1].weight = tied[0].weight
    assert list(select_parameters(tied)) == ["0.weight", "0.bias", "1.bias"]


def test_unknown_pattern_lists_the_names(module):
    with pytest.raises(ValueError, match=r"parameters='head.\*' matches no parameter.*'0.weight'"):
        select_parameters(module, "head.*")
    with pytest.raises(ValueError, match="has no parameters"):
        select_parameters(nn.ReLU())


@given(st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=5))
def test_flatten_and_unflatten_are_inverse(shapes):
    parameters = {str(i): torch.randn(shape) for i, shape in enumerate(shapes)}
    back = unflatten(flatten(parameters), parameters)
    assert all(torch.equal(back[name], tensor) for name, tensor in parameters.items())


def test_unflatten_refuses_another_length(module):
    with pytest.raises(ValueError, match=r"expected \(67,\)"):
        unflatten(torch.zeros(5), select_parameters(module))


def test_substituted_tensors_are_used_and_taken_out_again(module):
    own = dict(module.named_parameters())
    rows = torch.randn(5, 4)
    expected = module(rows)
    with substituted(module, {"2.bias": own["2.bias"] * 0 - 9.0}):
        assert not module(rows).any()  # below zero, and cut off
    torch.testing.assert_close(module(rows), expected)
    assert module.get_parameter("2.bias") is own["2.bias"]


def test_a_layer_that_stands_twice_is_substituted_in_both_places():
    layer = nn.Linear(3, 3)
    module = nn.Sequential(layer, nn.ReLU(), layer)
    rows = torch.randn(4, 3)
    expected = module(rows)
    values = {n: p.detach() * 0 for n, p in module.named_parameters()}
    with substituted(module, values):
        assert not module(rows).any()
    torch.testing.assert_close(module(rows), expected)
    assert all(isinstance(p, nn.Parameter) for p in module.parameters())


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16])
def test_the_checksum_notices_any_change_of_one_weight(kind):
    module = nn.Sequential(nn.Linear(50, 40), nn.BatchNorm1d(40)).to(kind)
    before = checksum(module)
    assert checksum(copy.deepcopy(module)) == before
    module[0].weight.data[7, 3] += 0.25  # bumps no version counter
    assert checksum(module) != before
    other = copy.deepcopy(module)
    other[1].running_mean[5] = 1.0
    assert checksum(other) != checksum(module)


def test_fingerprint_sees_values_and_buffers():
    norm = nn.BatchNorm1d(3)
    before = fingerprint(norm)
    norm.running_mean[0] = 1e-7
    assert fingerprint(norm) != before
