"""The derivative of whole runs against whole runs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from joblib import parallel_config
from sklearn.base import clone
from sklearn.datasets import load_iris
from torch import nn

from skperf import MLP, Net, TrainingRun
from skperf.backbone._training import data_of
from skperf.backbone.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Data, Run, Step, Trainer, floating_buffers, train_again
from skperf.influence import replay, replay_store
from skperf.influence.replay import Budget, losses_at, replayed, smoothness
from skperf.influence.replay_queries import basis_of

N, WIDTH, CLASSES, BATCH = 50, 6, 3, 16


def mlp(activation=nn.Tanh):
    return nn.Sequential(
        nn.Linear(WIDTH, 7), activation(), nn.Linear(7, 5), activation(), nn.Linear(5, CLASSES)
    )


class Attention(nn.Module):
    """What no chain of layers is: a residual connection, attention, a layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix = nn.Linear(2, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, inputs):
        states = self.embed(inputs.view(len(inputs), 3, 2))
        states = states + nn.functional.scaled_dot_product_attention(
            self.mix(states)[:, None], states[:, None], self.mix(states)[:, None]
        ).squeeze(1)
        return self.head(self.norm(states).mean(1))


def normed(momentum):
    # a bias before the normalisation would have no gradient, and Adam would divide by it
    return nn.Sequential(
        nn.Linear(WIDTH, 7, bias=False),
        nn.BatchNorm1d(7, momentum=momentum),
        nn.Tanh(),
        nn.Linear(7, CLASSES),
    )


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, WIDTH)),
        nn.Conv1d(1, 4, 3),
        nn.GELU(),
        nn.Conv1d(4, 2, 2, padding=1, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(10, 3),
    )


def recorded(
    module,
    optimizer=torch.optim.SGD,
    *,
    schedule=lambda step: 1.0,
    draws=False,
    loss=None,
    y=None,
    dtype=torch.float64,
    n_epochs=3,
    masks=None,
    **settings,
):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(N, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(CLASSES, (N,), generator=generator) if y is None else y
    weights = torch.rand(N, generator=generator, dtype=torch.float64).to(dtype) + 0.5
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    module = module.to(dtype)
    max_norm = settings.pop("max_norm", None)
    groups = optimizer(module.parameters(), **settings).param_groups
    base = {name: value for name, value in groups[0].items() if name != "params"}
    steps = []
    for _ in range(n_epochs):
        for rows in torch.randperm(N, generator=generator).split(BATCH):
            at = {**base, "lr": base["lr"] * schedule(len(steps))}
            steps.append(Step(rows.int(), (at,), len(steps) if draws else None))
    return Run(
        module,
        loss or CrossEntropy(),
        optimizer,
        (tuple(name for name, _ in module.named_parameters()),),
        steps,
        Data(Rows(X), y, weights),
        max_norm,
        masks or {},
        base_lr=(base["lr"],),
    )


def queries(run, q=5):
    generator = torch.Generator().manual_seed(9)
    dtype = run.data.inputs.array.dtype
    inputs = Rows(torch.randn(q, WIDTH, generator=generator, dtype=torch.float64).to(dtype))
    targets = run.data.targets[:q]
    return inputs, targets


def outcome(run, inputs, targets):
    return losses_at(run, train_again(run, run.data.weights).module, inputs, targets)


def difference(run, changed, inputs, targets, size):
    up, down = (outcome(changed(run, sign * size), inputs, targets) for sign in (1, -1))
    return (up - down) / (2 * size)


def exact(run, **budget):
    return replayed(run, Budget(tolerance=0, **budget))


def close(found, actual, tolerance=1e-6):
    assert float((found - actual).abs().max()) <= tolerance * float(actual.abs().max())


RUNS = {
    "plain": lambda: recorded(mlp(), lr=0.3),
    "nesterov": lambda: recorded(
        mlp(nn.GELU),
        lr=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.01,
        schedule=lambda t: 1 / (1 + t),
    ),
    "dampened, clipped": lambda: recorded(
        mlp(nn.SiLU), lr=0.1, momentum=0.8, dampening=0.2, weight_decay=0.02, max_norm=0.3
    ),
    "maximize": lambda: recorded(mlp(), lr=0.05, momentum=0.5, maximize=True),
    "adam": lambda: recorded(mlp(), torch.optim.Adam, lr=0.02, weight_decay=0.01),
    "adam, clipped": lambda: recorded(mlp(nn.Sigmoid), torch.optim.Adam, lr=0.02, max_norm=0.1),
    "adamw, warm-up": lambda: recorded(
        mlp(), torch.optim.AdamW, lr=0.02, weight_decay=0.1, schedule=lambda t: min(1, t / 5)
    ),
    "dropout": lambda: recorded(
        nn.Sequential(nn.Linear(WIDTH, 9), nn.Tanh(), nn.Dropout(0.4), nn.Linear(9, CLASSES)),
        draws=True,
        lr=0.3,
    ),
    "batch norm": lambda: recorded(normed(0.1), torch.optim.Adam, lr=0.02),
    "batch norm, cumulative": lambda: recorded(normed(None), lr=0.1, momentum=0.5),
    "convolution": lambda: recorded(convolution(), lr=0.3, momentum=0.5),
    "attention": lambda: recorded(Attention(), torch.optim.Adam, lr=0.02),
    "masks": lambda: recorded(
        mlp(),
        torch.optim.AdamW,
        lr=0.02,
        weight_decay=0.1,
        masks={"0.weight": torch.arange(42).view(7, 6) % 3 > 0},
    ),
    "class weights": lambda: recorded(
        mlp(), lr=0.3, loss=CrossEntropy(torch.tensor([1.0, 2.0, 3.0]).double(), 0.1)
    ),
    "several labels": lambda: recorded(
        mlp(), lr=0.3, loss=BinaryCrossEntropy(), y=(torch.arange(150).view(N, 3) % 2).double()
    ),
    "values": lambda: recorded(
        mlp(), lr=0.1, loss=SquaredError(), y=torch.arange(150).view(N, 3).double() / 150
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_weights_of_rows(name):
    run = RUNS[name]()
    inputs, targets = queries(run)
    found = replayed(run, Budget(tolerance=0)).derivative(inputs, targets).rows
    direction = torch.randn(N, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def moved(run, size):
        return replace(run, data=replace(run.data, weights=run.data.weights + size * direction))

    close(found @ direction, difference(run, moved, inputs, targets, 1e-5))


@pytest.mark.parametrize("name", RUNS)
def test_hyperparameters(name):
    run = RUNS[name]()
    inputs, targets = queries(run)
    found = exact(run).derivative(inputs, targets, hyperparameters=True).hyperparameters

    def rate(run, size):
        factor = 1 + size / run.base_lr[0]
        steps = [
            replace(s, settings=({**s.settings[0], "lr": s.settings[0]["lr"] * factor},))
            for s in run.steps
        ]
        return replace(run, steps=steps)

    def decay(run, size):
        steps = [
            replace(
                s,
                settings=({**s.settings[0], "weight_decay": s.settings[0]["weight_decay"] + size},),
            )
            for s in run.steps
        ]
        return replace(run, steps=steps)

    close(found["lr"], difference(run, rate, inputs, targets, 2e-7))
    close(found["weight_decay"], difference(run, decay, inputs, targets, 2e-7))


def test_groups_of_parameters_have_rates_of_their_own():
    run = recorded(mlp(), lr=0.2)
    own, others = run.names[:2], run.names[2:]
    slow = {**run.steps[0].settings[0], "lr": 0.05}
    steps = [replace(step, settings=(step.settings[0], slow)) for step in run.steps]
    run = replace(run, groups=(tuple(own), tuple(others)), steps=steps, base_lr=(0.2, 0.05))
    inputs, targets = queries(run)
    found = exact(run).derivative(inputs, targets, hyperparameters=True).hyperparameters
    assert set(found) == {"lr.0", "weight_decay.0", "lr.1", "weight_decay.1"}
    for k in (0, 1):
        for name in ("lr", "weight_decay"):

            def moved(run, size, k=k, name=name):
                def changed(settings):
                    settings = [dict(group) for group in settings]
                    settings[k][name] += size
                    return tuple(settings)

                steps = [replace(step, settings=changed(step.settings)) for step in run.steps]
                return replace(run, steps=steps)

            close(found[f"{name}.{k}"], difference(run, moved, inputs, targets, 1e-6))


@pytest.mark.parametrize("name", ["plain", "adam", "dropout", "batch norm", "attention"])
def test_labels_of_rows(name):
    run = RUNS[name]()
    inputs, targets = queries(run)
    found = exact(run).derivative(inputs, targets, n_labels=CLASSES).labels
    row = 4
    old = int(run.data.targets[row])
    assert float(found[:, row, old].abs().max()) == 0
    for new in {0, 1, 2} - {old}:

        def relabelled(run, size, new=new):
            shares = torch.eye(CLASSES, dtype=torch.float64)[run.data.targets]
            shares[row, old] -= size
            shares[row, new] += size
            return replace(run, data=replace(run.data, targets=shares))

        close(found[:, row, new], difference(run, relabelled, inputs, targets, 1e-5))


def test_labels_with_class_weights_whichever_way_they_are_found(monkeypatch):
    run = RUNS["class weights"]()
    inputs, targets = queries(run)
    by_chain = exact(run).derivative(inputs, targets, n_labels=CLASSES).labels
    monkeypatch.setattr(replay.Differentiator, "_checked_chain", lambda *args: None)
    by_graph = exact(run).derivative(inputs, targets, n_labels=CLASSES).labels
    assert float(by_chain.abs().max()) > 0
    close(by_chain, by_graph, 1e-10)


@pytest.mark.parametrize(
    ("module", "quick"),
    [
        (mlp(), True),
        (MLP(WIDTH, CLASSES), True),
        (nn.Linear(WIDTH, CLASSES), True),
        (convolution(), True),
        (normed(0.1), False),
        (Attention(), False),
    ],
)
def test_chains_of_layers_are_found(module, quick):
    run = recorded(module, lr=0.1)
    differentiator = replay.Differentiator(run, Trainer(run).module)
    differentiator.take(run.steps[0], *_start(run), run.data.weights)
    assert (differentiator.chain is not None) == quick


def _start(run):
    trainer = Trainer(run)
    return [p.detach() for p in trainer.parameters], [
        b.clone() for b in floating_buffers(trainer.module).values()
    ]


# Memory ----------------------------------------------------------------------------------------


def with_states(run):
    trainer = Trainer(run)
    states = [trainer.state()]
    for _ in run.steps:
        trainer.step(run.data.weights)
        states.append(trainer.state())
    return replace(run, states=states, end=states[-1])


@pytest.mark.parametrize("n_states", [4, 6, 9, 1000])
@pytest.mark.parametrize("name", ["nesterov", "adam", "dropout", "batch norm"])
def test_checkpoints_change_no_bit(name, n_states, tmp_path):
    run = with_states(RUNS[name]())
    inputs, targets = queries(run)
    expected = replayed(run).influence(inputs, targets)
    budget = Budget(memory=2 * n_states * run.end.numel() * run.end.element_size())
    for folder in (None, str(tmp_path)):
        fitted = replayed(replace(run, states=None), replace(budget, folder=folder))
        # fewer directions go back at once, in products of another shape
        found = torch.cat([fitted.influence(inputs, targets)])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        states = list(replay.visit_backwards(fitted.run, fitted.budget))
        assert [t for t, _, _ in states] == list(range(len(run.steps)))[::-1]
        for t, before, after in states:
            assert torch.equal(before, run.states[t])
            assert torch.equal(after, run.states[t + 1])
    assert not list(tmp_path.iterdir())


def test_at_most_so_many_states_are_alive(monkeypatch):
    run = with_states(recorded(mlp(), lr=0.1, n_epochs=40))
    size = run.end.numel() * run.end.element_size()
    longest = []
    original = replay.states_between

    def counted(*args):
        states = list(original(*args))
        longest.append(len(states))
        return iter(states)

    monkeypatch.setattr(replay, "states_between", counted)
    budget = Budget(memory=2 * 40 * size)
    assert len(list(replay.visit_backwards(replace(run, states=None), budget))) == len(run.steps)
    # the first pass is only looked at in passing
    assert max(longest[1:]) < 40
    assert sum(longest) < 2.3 * len(run.steps)


@pytest.mark.parametrize("broken_at", [9, 5, 1])
def test_an_interrupted_pass_goes_on_where_it_was(broken_at, tmp_path, monkeypatch):
    run = replace(RUNS["nesterov"](), states=None)
    inputs, targets = queries(run)
    expected = replayed(run, Budget(tolerance=0)).influence(inputs, targets)
    size = Trainer(run).state().numel() * 8
    fitted = replayed(run, Budget(2 * 8 * size, 0, str(tmp_path)))
    fitted = replace(fitted, budget=replace(fitted.budget, memory=2 * 8 * size))
    original, taken = replay.Differentiator.take, []

    def interrupted(self, step, *args):
        taken.append(step)
        if len(taken) > len(run.steps) - broken_at and broken_at >= 0:
            raise KeyboardInterrupt
        return original(self, step, *args)

    monkeypatch.setattr(replay.Differentiator, "take", interrupted)
    directions = fitted.basis(inputs, targets).directions
    with pytest.raises(KeyboardInterrupt):
        fitted.back(directions)
    assert not list(tmp_path.glob("*.tmp"))
    broken_at, steps_before = -1, len(taken)
    basis = fitted.basis(inputs, targets)
    found = fitted.back(directions).combined(basis.coefficients).rows * -run.data.weights
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    # some of the steps had been done before
    assert len(taken) - steps_before <= len(run.steps)
    assert not list(tmp_path.iterdir())


def test_half_written_checkpoints_do_not_load(tmp_path, monkeypatch):
    shelf = replay_store.Shelf(str(tmp_path), torch.zeros(3), torch.ones(3))
    shelf[2] = torch.arange(3.0)
    assert 2 in shelf
    assert torch.equal(shelf.get(2), torch.arange(3.0))

    def killed(tensors, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(replay_store, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        shelf[4] = torch.arange(3.0)
    assert 4 not in shelf
    other = replay_store.Shelf(str(tmp_path), torch.ones(3), torch.ones(3))
    assert 2 not in other


@pytest.mark.parametrize("content", [b"", b"some text" * 99, None], ids=["empty", "text", "gone"])
def test_checkpoints_that_were_damaged_or_removed_are_made_again(content, tmp_path, monkeypatch):
    run = replace(RUNS["nesterov"](), states=None)
    expected = list(replay.visit_backwards(run, Budget()))
    size = Trainer(run).state().numel() * 8
    shelf = replay_store.Shelf(str(tmp_path), torch.zeros(3), torch.ones(3))
    damaged = []

    def get(step, read=shelf.get):
        if len(damaged) < 2:  # what another process that has finished the same pass leaves
            damaged.append(step)
            path = shelf._state(step)
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        return read(step)

    monkeypatch.setattr(shelf, "get", get)
    found = list(replay.visit_backwards(run, Budget(2 * 8 * size), shelf))
    assert len(damaged) == 2
    assert [t for t, *_ in found] == [t for t, *_ in expected]
    for (_, *states), (_, *others) in zip(found, expected, strict=True):
        torch.testing.assert_close(states, others, rtol=0, atol=0)


# Many queries ----------------------------------------------------------------------------------


def test_a_basis_holds_every_query_to_the_tolerance():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(60, 4, generator=generator) @ torch.randn(4, 300, generator=generator)
    gradients += 1e-3 * torch.randn(60, 300, generator=generator)
    gradients *= 10.0 ** torch.randint(-4, 4, (60, 1), generator=generator)
    basis = basis_of(gradients, 0.05)
    assert len(basis.directions) == 4
    errors = (basis.coefficients @ basis.directions - gradients).norm(dim=1) / gradients.norm(dim=1)
    assert float(errors.max()) <= 0.05
    assert float(errors.max()) == pytest.approx(basis.error, rel=0.05)
    whole = basis_of(gradients, 0)
    torch.testing.assert_close(whole.coefficients @ whole.directions, gradients)


@pytest.mark.parametrize("name", ["plain", "batch norm", "attention"])
def test_groups_of_directions_and_aggregates(name):
    run = with_states(RUNS[name]())
    inputs, targets = queries(run, 12)
    exact = replayed(run, Budget(tolerance=0))
    expected = exact.influence(inputs, targets)
    few = replace(exact, budget=Budget(12 * run.end.numel() * 8 * 3, 0))
    assert few.at_once < 12
    torch.testing.assert_close(few.influence(inputs, targets), expected, rtol=1e-8, atol=1e-12)
    mean = exact.influence(inputs, targets, aggregate=True)
    torch.testing.assert_close(mean, expected.mean(0, keepdim=True), rtol=1e-8, atol=1e-12)
    rough = replace(exact, budget=Budget(tolerance=0.3)).influence(inputs, targets)
    error = (rough - expected).norm(dim=1) / expected.norm(dim=1)
    assert 0 < float(error.max()) < 0.6


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_groups_of_directions_go_back_side_by_side(backend):
    run = with_states(RUNS["adam"]())
    inputs, targets = queries(run, 9)
    expected = exact(run).influence(inputs, targets)
    with parallel_config(backend):
        found = exact(run, n_jobs=2).influence(inputs, targets)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)


def test_one_pass_at_a_time_writes_to_a_folder(tmp_path):
    run = RUNS["plain"]()
    with pytest.raises(ValueError, match="keeps one pass at a time: give n_jobs=1"):
        exact(run, n_jobs=2, folder=str(tmp_path)).influence(*queries(run))


@pytest.mark.parametrize("name", ["plain", "nesterov", "adam", "dropout", "convolution"])
def test_products_by_hand_are_those_of_the_graph(name, monkeypatch):
    run = with_states(RUNS[name]())
    inputs, targets = queries(run, 7)
    by_hand = exact(run).influence(inputs, targets)
    monkeypatch.setattr(replay.Differentiator, "_checked_chain", lambda *args: None)
    close(by_hand, exact(run).influence(inputs, targets), 1e-10)


def test_another_question_than_the_loss():
    run = with_states(RUNS["plain"]())
    inputs, targets = queries(run)
    found = replayed(run, Budget(tolerance=0)).influence(
        inputs, targets, value=lambda outputs, targets: outputs[:, 0]
    )
    weights = run.data.weights.clone()

    def logit(size):
        moved = weights.clone()
        moved[3] += size
        module = train_again(run, moved).module.eval()
        with torch.no_grad():
            return module(inputs.array)[:, 0]

    actual = -weights[3] * (logit(1e-5) - logit(-1e-5)) / 2e-5
    close(found[:, 3], actual)


# Through Net -----------------------------------------------------------------------------------


def test_leaving_rows_out_of_a_net():
    X, y = load_iris(return_X_y=True)
    y = np.array(["a", "b", "c"])[y]
    torch.manual_seed(0)
    net = Net(
        nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double(),
        optimizer=torch.optim.SGD,
        lr=0.05,
        max_epochs=20,
        batch_size=30,
        record_run=True,
    ).fit(X[::2], y[::2])
    run = net.run_.recorded
    asked = data_of(net.run_, X[1::2], y[1::2])
    found = replayed(run).influence(asked.inputs, asked.targets)
    before = losses_at(run, train_again(run).module, asked.inputs, asked.targets)
    actual = []
    for row in range(0, 75, 5):
        weights = np.ones(75)
        weights[row] = 0
        again = clone(net).fit(X[::2], y[::2], sample_weight=weights)
        actual.append(losses_at(run, again.module_, asked.inputs, asked.targets) - before)
    actual = torch.stack(actual, 1)
    assert np.corrcoef(actual.flatten(), found[:, ::5].flatten())[0, 1] > 0.99
    slope = float((actual * found[:, ::5]).sum() / found[:, ::5].square().sum())
    assert 0.9 < slope < 1.1


def test_smoothness_tells_a_smooth_run_from_a_rough_one():
    smooth = with_states(recorded(mlp(), lr=0.05))
    rough = with_states(recorded(mlp(nn.ReLU), lr=60.0, n_epochs=10))
    values = [smoothness(replayed(run), *queries(run, 20)) for run in (smooth, rough)]
    assert values[0] > 0.99
    assert values[1] < 0.9


def test_a_loop_of_ones_own():
    X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (X[:, 0] > 0).long()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2)).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.9)
    batches = [(rows, (X[rows], y[rows])) for rows in torch.arange(60).split(20)] * 4
    with TrainingRun.record(module, optimizer, batches) as run:
        for _, (inputs, targets) in run:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(inputs), targets).backward()
            optimizer.step()
    fitted = replayed(run.recorded, Budget(tolerance=0))
    found = fitted.influence(Rows(X[:3]), y[:3])
    weights = torch.ones(60, dtype=torch.float64)
    weights[7] += 1e-5
    up = losses_at(run.recorded, train_again(run.recorded, weights).module, Rows(X[:3]), y[:3])
    weights[7] -= 2e-5
    down = losses_at(run.recorded, train_again(run.recorded, weights).module, Rows(X[:3]), y[:3])
    close(found[:, 7], -(up - down) / 2e-5)


# Bad input -------------------------------------------------------------------------------------


def test_a_run_that_does_not_reproduce_its_end_is_refused():
    run = with_states(RUNS["nesterov"]())
    for changed in (
        replace(run, states=None, steps=run.steps[::-1]),
        replace(run, states=None, data=replace(run.data, targets=run.data.targets.flip(0))),
        replace(run, states=None, max_norm=0.01),
    ):
        with pytest.raises(ValueError, match="run does not reproduce its end"):
            replayed(changed)


def test_what_cannot_be_gone_back_through_is_refused_by_name():
    run = recorded(mlp(), lr=0.1)
    with pytest.raises(ValueError, match=r"memory_budget=100 .* needed are \d+ bytes"):
        replayed(replace(run, end=None), Budget(memory=100)).influence(*queries(run))
    with pytest.raises(ValueError, match="Adagrad can't be gone back through"):
        replayed(recorded(mlp(), torch.optim.Adagrad, lr=0.1))
    with pytest.raises(ValueError, match="amsgrad=True can't be gone back through"):
        replayed(recorded(mlp(), torch.optim.Adam, lr=0.1, amsgrad=True))
    with pytest.raises(ValueError, match="does not hold its rows"):
        replayed(replace(run, data=None))
