import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from skperf.backbone.parameters import (
    fingerprint,
    flatten,
    restored,
    select_parameters,
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


def test_restored_undoes_in_place_changes_after_an_exception(module):
    before = fingerprint(module)

    def spoil():
        with restored(module), torch.no_grad():
            module[0].weight.zero_()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        spoil()
    assert fingerprint(module) == before


def test_fingerprint_sees_values_and_buffers():
    norm = nn.BatchNorm1d(3)
    before = fingerprint(norm)
    norm.running_mean[0] = 1e-7
    assert fingerprint(norm) != before
