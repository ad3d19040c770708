import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from skorch.callbacks import Callback, GradientNormClipping, LRScheduler
from torch import nn
from torch.optim.lr_scheduler import StepLR

from skperf import MLP, Net, TrainingRun
from skperf.backbone.training_run import (
    Streams,
    Trainer,
    mask_gradients,
    restore_masked,
    slots_of,
    states_between,
    stream_of,
)

X, y = load_iris(return_X_y=True)
X = X.astype(np.float32)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]
DROPPING = nn.Sequential(
    nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3)
)
NETS = {
    "adam": {"module": MLP, "lr": 0.01},
    "sgd": {
        "module": MLP,
        "optimizer": torch.optim.SGD,
        "optimizer__momentum": 0.9,
        "optimizer__nesterov": True,
        "optimizer__weight_decay": 0.01,
        "lr": 0.05,
    },
    "drawing": {"module": DROPPING, "optimizer": torch.optim.AdamW, "lr": 0.01},
    "scheduled": {
        "module": MLP,
        "lr": 0.05,
        "callbacks": [LRScheduler(StepLR, step_size=2), GradientNormClipping(0.5)],
    },
    "masked": {"module": MLP(4, 3), "train_only": ["hidden.*"], "lr": 0.01},
}


def recorded(name, **params):
    return Net(**NETS[name], max_epochs=4, batch_size=32, random_state=0, record_run=True, **params)


@pytest.mark.parametrize("name", NETS)
def test_the_run_again_is_the_run_bit_for_bit(name):
    net = recorded(name).fit(X, NAMES)
    again = net.run_.reweighted(np.ones(150))
    for key, tensor in net.module_.state_dict().items():
        assert torch.equal(tensor, again.module_.state_dict()[key])
    assert np.array_equal(net.predict(X), again.predict(X))


@pytest.mark.parametrize("name", NETS)
def test_a_reweighted_run_is_a_fit_with_these_weights(name):
    weights = np.random.default_rng(0).uniform(0, 2, 150) * (np.arange(150) % 4 > 0)
    net = recorded(name).fit(X, NAMES)
    again = net.run_.reweighted(weights)
    refitted = clone(net).fit(X, NAMES, sample_weight=weights)
    assert np.array_equal(again.predict_proba(X), refitted.predict_proba(X))
    assert not np.array_equal(again.predict_proba(X), net.predict_proba(X))


@pytest.mark.parametrize("name", NETS)
def test_a_run_goes_on_from_any_of_its_states(name):
    run = recorded(name).fit(X, y).run_.recorded
    kept = run.states
    assert len(kept) == len(run.steps) + 1
    assert torch.equal(kept[-1], run.end)
    for first in (0, 1, 7):
        states = list(states_between(Trainer(run), kept[first], first, len(run.steps)))
        assert all(torch.equal(a, b) for a, b in zip(states, kept[first:], strict=True))


def test_a_run_leaves_its_rows_out_when_pickled():
    net = recorded("drawing").fit(X, NAMES)
    loaded = pickle.loads(pickle.dumps(net))
    with pytest.raises(ValueError, match="pass X and y again"):
        loaded.run_.reweighted(np.ones(150))
    again = loaded.run_.reweighted(np.ones(150), X, NAMES)
    assert np.array_equal(again.predict_proba(X), net.predict_proba(X))
    with pytest.raises(ValueError, match=r"X holds 60 rows, but the run trained on row"):
        loaded.run_.reweighted(np.ones(60), X[::2][:60], NAMES[::2][:60])


def test_nothing_is_recorded_unless_asked_for():
    net = Net(MLP, max_epochs=1).fit(X, y)
    assert not hasattr(net, "run_")
    net = recorded("adam").fit(X, y)
    net.partial_fit(X, y)
    assert not hasattr(net, "run_")


class Doubling(Callback):
    def on_train_end(self, net, **kwargs):
        with torch.no_grad():
            net.module_.output.weight.mul_(2)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"optimizer": torch.optim.LBFGS}, "a run of LBFGS can't be gone back through"),
        ({"iterator_train": torch.utils.data.DataLoader}, "needs iterator_train=TensorBatches"),
        ({"callbacks": [GradientNormClipping(1.0, np.inf)]}, "of the 2-norm"),
        ({"callbacks": [Doubling()]}, "changed after the last step"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_name(params, message):
    with pytest.raises(ValueError, match=message):
        Net(MLP, max_epochs=1, record_run=True, **params).fit(X, y)


# A loop of one's own


def loop(module, batches, optimizer, max_norm=None):
    for indices, (inputs, targets) in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs), targets).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
        assert len(indices) == len(targets)


def batches_of(n_epochs=3, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    for _ in range(n_epochs):
        for rows in torch.randperm(150, generator=generator).split(32):
            moved = torch.randn(len(rows), 4, generator=generator) * noise
            yield rows, (torch.tensor(X)[rows] + moved, torch.tensor(y)[rows])


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_a_loop_of_ones_own_is_run_again(noise, max_norm):
    torch.manual_seed(1)
    module = copy.deepcopy(DROPPING)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    plain = copy.deepcopy(module)
    state = torch.get_rng_state()
    loop(plain, batches_of(noise=noise), torch.optim.SGD(plain.parameters(), 0.1, 0.9), max_norm)
    torch.set_rng_state(state)
    with TrainingRun.record(
        module, optimizer, batches_of(noise=noise), max_norm=max_norm, classes=list("abc")
    ) as run:
        loop(module, run, optimizer, max_norm)
    for own, theirs in zip(module.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, theirs)
    assert run.n_steps == 15
    again = run.reweighted(np.ones(150))
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.module_.state_dict()[key])
    assert set(again.predict(X)) <= set("abc")
    # augmented rows stay with their steps, others are kept once
    assert (run.recorded.steps[-1].batch is None) == (noise == 0)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_loop_that_is_not_watched_is_refused():
    module = copy.deepcopy(DROPPING)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    record = TrainingRun.record
    message = "without a batch of the run"
    with pytest.raises(ValueError, match=message), record(module, optimizer, batches_of()):
        loop(module, batches_of(), optimizer)
    with pytest.raises(ValueError, match="no step"), record(module, optimizer, batches_of()):
        pass
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="no parameters of Sequential"):
        record(module, other, batches_of()).__enter__()
    used = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    loop(module, batches_of(1), used)
    with pytest.raises(ValueError, match="taken steps already"):
        record(module, used, batches_of()).__enter__()


def test_a_loop_that_was_broken_off_leaves_no_run():
    module = copy.deepcopy(DROPPING)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    recording = TrainingRun.record(module, optimizer, batches_of())
    run = recording.__enter__()
    next(iter(run))
    error = KeyboardInterrupt()
    assert not recording.__exit__(type(error), error, None)
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(ValueError, match="not complete"):
        run.reweighted(np.ones(150))


class Noisy(nn.Module):
    def forward(self, inputs):
        return inputs + torch.randn_like(inputs)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("dropping", [False, True])
def test_every_step_that_draws_has_a_stream_of_its_seed_and_number(noisy, dropping):
    module = nn.Sequential(nn.Dropout(0.5 if dropping else 0.0), Noisy() if noisy else nn.Tanh())
    module = module if dropping else module[1:]
    inputs, seen = torch.ones(4, 50), []
    with Streams(module, 3) as streams:
        for number in (5, 6, 5):
            with streams.step(number):
                seen.append(module(inputs))
            drawn = stream_of(3, number) if noisy or dropping else None
            assert streams.latest == drawn
        assert streams.others is noisy
    assert not any("forward" in vars(part) for part in module.modules())
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], seen[1]) is not (noisy or dropping)
    assert stream_of(3, 5) != stream_of(5, 3)


def test_entries_that_do_not_train_have_no_gradient_and_stay():
    module = nn.Linear(2, 2)
    mask = torch.tensor([[True, False], [False, True]])
    module(torch.ones(1, 2)).sum().backward()
    masks = {"weight": mask}
    mask_gradients(module, masks)
    assert torch.equal(module.weight.grad, mask.float())
    assert torch.equal(module.bias.grad, torch.ones(2))
    initial = {"weight": torch.full((2, 2), 7.0)}
    before = module.weight.detach().clone()
    restore_masked(module, masks, initial)
    assert torch.equal(module.weight, torch.where(mask, before, torch.tensor(7.0)))


def test_optimizers_keep_what_their_steps_read():
    still, moving = {"momentum": 0.0}, {"momentum": 0.9}
    assert slots_of(torch.optim.SGD, [still, still]) == ()
    assert slots_of(torch.optim.SGD, [still, moving]) == ("momentum_buffer",)
    assert slots_of(torch.optim.Adam, [{}]) == ("exp_avg", "exp_avg_sq")
    assert slots_of(torch.optim.LBFGS, [{}]) == ()
