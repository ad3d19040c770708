"""What keeps an ablation for good, against the same done to plain tensors."""

import pytest
import torch
from torch import nn

from skperf.components.lasting import Still


def kept_still(dims):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    still = Still("0", "weight")
    still.watch(module)
    for dim, kept in dims:
        with torch.no_grad():
            shape = (-1, 1) if dim == 0 else (1, -1)
            module[0].weight.mul_(torch.tensor(kept).view(shape))
        still.close(dim, torch.tensor(kept))
    return module, still


@pytest.mark.parametrize(
    "dims",
    [[(0, [1.0, 0.0, 1.0])], [(0, [0.0, 1.0, 1.0]), (1, [1.0, 1.0, 0.0, 1.0])]],
)
def test_closed_slices_stay_at_zero_through_steps_with_momentum(dims):
    module, _ = kept_still(dims)
    closed = module[0].weight.detach() == 0
    assert closed.any()
    start = module[0].weight.detach().clone()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
    rows, codes = torch.randn(8, 4), torch.arange(8) % 2
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(rows), codes).backward()
        assert not module[0].weight.grad[closed].any()
        assert module[0].weight.grad[~closed].all()
        optimizer.step()
    assert not module[0].weight[closed].any()
    assert (module[0].weight != start)[~closed].all()


def test_the_gradient_of_what_stays_is_that_of_the_plain_network():
    module, _ = kept_still([(0, [1.0, 0.0, 1.0])])
    twin = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    with torch.no_grad():
        for mine, theirs in zip(twin.parameters(), module.parameters(), strict=True):
            mine.copy_(theirs)
    rows = torch.randn(5, 4)
    for network in (module, twin):
        network(rows).square().sum().backward()
    found, plain = module[0].weight.grad, twin[0].weight.grad
    torch.testing.assert_close(found[[0, 2]], plain[[0, 2]])
    assert not found[1].any()
    assert plain[1].any()


def test_after_a_pass_the_parameter_is_in_its_place_also_if_it_breaks_off():
    module, still = kept_still([(1, [0.0, 1.0, 1.0, 1.0])])
    own = module[0]._parameters["weight"]
    inside = []
    module[1].register_forward_hook(lambda *_: inside.append(module[0].weight))
    module(torch.ones(2, 4))
    assert module[0].weight is own
    assert inside[0] is not own  # the product, in the pass
    torch.testing.assert_close(inside[0], own.detach())

    def breaks(*_):
        raise RuntimeError("broken")

    handle = module[2].register_forward_hook(breaks)
    with pytest.raises(RuntimeError, match="broken"):
        module(torch.ones(2, 4))
    assert module[0].weight is own
    handle.remove()
    with torch.no_grad():
        inside.clear()
        module(torch.ones(2, 4))
    assert inside[0] is own  # nothing is laid over it where nothing trains
    assert still.dims == [1]


def test_layers_that_share_the_parameter_read_the_product_too():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    still = Still("0", "weight")
    still.watch(module)
    with torch.no_grad():
        module[0].weight[1] = 0
    still.close(0, torch.tensor([1.0, 0.0, 1.0]))
    module(torch.randn(4, 3)).sum().backward()
    assert not module[0].weight.grad[1].any()
    assert module[1].weight is module[0].weight
