import copy
import threading

import pytest
import torch
from torch import nn

from skperf.backbone import prediction_time_batch_norm
from skperf.backbone.modes import forward_hooks, forward_pre_hooks, preserved_rng, untouched


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    module[1].eval()  # a mixed state, as after partial freezing
    module[0].weight.requires_grad_(False)
    module[3].weight.grad = torch.ones_like(module[3].weight)
    module.train_only = module[2].train()
    return module


def state_of(module):
    return {
        "tensors": {n: t.clone() for n, t in module.state_dict().items()},
        "modes": [part.training for part in module.modules()],
        "requires_grad": [p.requires_grad for p in module.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in module.parameters()],
        "hooks": [len(part._forward_hooks) for part in module.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before, after):
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name])
    for key in ("modes", "requires_grad", "hooks"):
        assert before[key] == after[key]
    for a, b in zip(before["gradients"], after["gradients"], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert torch.equal(before["rng"], after["rng"])


def disturb(module):
    module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    module[0].register_forward_hook(lambda *args: None)
    module(torch.randn(16, 4)).sum().backward()  # changes running statistics and gradients
    torch.manual_seed(99)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_untouched_gives_the_module_back_as_found(module, error):
    before = state_of(module)
    try:
        with untouched(module):
            assert not any(part.training for part in module.modules())
            assert not any(p.requires_grad for p in module.parameters())
            disturb(module)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert_same(before, state_of(module))


def test_untouched_nests(module):
    before = state_of(module)
    with untouched(module):
        with untouched(module):
            pass
        assert not module[2].training
    assert_same(before, state_of(module))


def test_threads_may_share_a_module(module):
    before = state_of(module)
    first_in, second_done = threading.Event(), threading.Event()
    seen = []

    def outer():
        with untouched(module):
            first_in.set()
            second_done.wait(5)
            seen.append(any(part.training for part in module.modules()))

    def inner():
        first_in.wait(5)
        with untouched(module):
            pass
        second_done.set()

    threads = [threading.Thread(target=f) for f in (outer, inner)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False]
    assert_same(before, state_of(module))


def test_hooks_fire_only_in_the_thread_that_set_them(module):
    calls = []
    x = torch.zeros(2, 4)
    hook = forward_hooks({module[0]: lambda *args: calls.append(threading.get_ident())})
    pre = forward_pre_hooks({module[3]: lambda _, args: (args[0] * 0,)})
    with untouched(module), hook, pre:
        other = threading.Thread(target=lambda: module(x))
        other.start()
        other.join()
        assert torch.equal(module(x), module[3].bias.expand(2, 3))
    assert calls == [threading.get_ident()]
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())


def test_preserved_rng():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with preserved_rng():
        torch.rand(5)
    assert torch.equal(state, torch.get_rng_state())


def test_prediction_time_batch_norm_equals_training_mode_without_its_side_effects():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    module[1].running_mean.fill_(3.0)
    x = torch.randn(32, 1, 8, 8) * 2 + 5
    expected = copy.deepcopy(module).train()(x)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with untouched(module), prediction_time_batch_norm(module):
        actual = module(x)
    torch.testing.assert_close(actual, expected)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in before.items())
    with untouched(module):
        assert not torch.allclose(module(x), expected)


def test_prediction_time_batch_norm_needs_a_layer():
    with (
        pytest.raises(ValueError, match="no batch normalisation layer"),
        prediction_time_batch_norm(nn.Linear(2, 2)),
    ):
        pass
