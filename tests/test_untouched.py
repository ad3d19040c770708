"""The user's network is never touched: not after a call, not during it, not for other threads."""

import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from torch import nn
from torch._functorch import eager_transforms
from torch.utils import _python_dispatch

from skperf import (
    ComponentAttributor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    Reprogrammer,
    from_module,
)
from skperf.backbone import prediction_time_batch_norm

X, y = load_digits(return_X_y=True)
X = (X[:90] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
y = y[:90]
TRAIN, QUERY = slice(0, 60), slice(60, 66)
ROUNDS = np.repeat(np.arange(6), 15)
WATCHED: list["Watch"] = []


class Body(nn.Module):
    """A convolutional network that tells its watch whenever it runs."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten()
        )
        self.output = nn.Linear(144, 10)

    def forward(self, rows):
        for watch in WATCHED:
            watch.look()
        return self.output(self.features(rows))


class Watch:
    """Compare a network, and torch's global random stream, with how they were at first."""

    def __init__(self, module):
        self.module, self.differences, self.looks = module, [], 0
        self.before, self.modes = self.state(), self.modes_of_torch()

    def state(self):
        parts = list(self.module.modules())
        return {
            "modes": [part.training for part in parts],
            "flags": [p.requires_grad for p in self.module.parameters()],
            "gradients": [id(p.grad) for p in self.module.parameters()],
            "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts],
            "attributes": [sorted(part.__dict__) for part in parts],
            "tensors": [id(t) for t in (*self.module.parameters(), *self.module.buffers())],
            "versions": [t._version for t in (*self.module.parameters(), *self.module.buffers())],
            "random": torch.get_rng_state().numpy().tobytes(),
        }

    def modes_of_torch(self):
        return {
            "gradients on": torch.is_grad_enabled(),
            "inference": torch.is_inference_mode_enabled(),
            "functions": torch._C._len_torch_function_stack(),
            "dispatch": _python_dispatch._len_torch_dispatch_stack(),
            "levels": torch._C._functorch.get_dynamic_layer_stack_depth(),
            "nesting": eager_transforms.JVP_NESTING,
            "dual": torch.autograd.forward_ad._current_level,
            "saved": torch._C._autograd._top_saved_tensors_default_hooks(True),
            "filters": list(warnings.filters),
        }

    def look(self):
        now, self.looks = self.state(), self.looks + 1
        self.differences += [key for key in now if now[key] != self.before[key]]


def network():
    generator = torch.Generator().manual_seed(0)
    module = Body()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    # a mixed state, as in the middle of somebody's training
    module.train()
    module.features[1].eval()
    module.features[0].bias.requires_grad_(False)
    module.output.weight.grad = torch.ones_like(module.output.weight)
    return module


def influence(module):
    return InfluenceScorer(module, random_state=0).fit(X[TRAIN], y[TRAIN])


def components(module):
    return ComponentAttributor(module, budget=30, random_state=0).fit(X[:30], y[:30])


def performative(module):
    return PerformativeAdapter(module, random_state=0).fit(X, y, rounds=ROUNDS)


def reprogramming(module):
    return Reprogrammer(module, max_epochs=1, border=1, random_state=0).fit(X[TRAIN], y[TRAIN])


def fitted(module):
    return from_module(module, classes=range(10), batch_size=7)


def edited(module):
    attributor = components(module)
    mask = np.ones(len(attributor.components_))
    mask[0] = 0
    return attributor.ablate(mask)


# name: what is fitted, and a call on it
CALLS = {
    "from_module.predict_proba": (fitted, lambda e: e.predict_proba(X)),
    "from_module.predict": (fitted, lambda e: e.predict(X)),
    "InfluenceScorer.fit": (fitted, lambda e: influence(e).self_influence_),
    "InfluenceScorer.influence": (influence, lambda e: e.influence(X[QUERY], y[QUERY])),
    "InfluenceScorer.transform": (influence, lambda e: e.transform(X[QUERY])),
    "InfluenceScorer.self_influence": (influence, lambda e: e.self_influence(X[QUERY], y[QUERY])),
    "InfluenceScorer.top_k": (influence, lambda e: e.top_k(X[QUERY], y[QUERY], k=2)["values"]),
    "InfluenceScorer.group_influence": (
        influence,
        lambda e: e.group_influence([[0, 1], [5]], X[QUERY], y[QUERY], order=2),
    ),
    "InfluenceScorer.detect_mislabels": (influence, lambda e: e.detect_mislabels()),
    "InfluenceScorer.loo_effect": (influence, lambda e: e.loo_effect(X[QUERY], y[QUERY])),
    "InfluenceScorer.fading": (
        influence,
        lambda e: e.fading(X[QUERY], y[QUERY], steps=(1, 2), n_train=3)["pearson"],
    ),
    "InfluenceScorer.repair": (
        influence,
        lambda e: e.repair(X[60:62], y[60:62], k=3, max_steps=2).predict_proba(X[QUERY]),
    ),
    "InfluenceScorer.remove": (
        influence,
        lambda e: e.remove([0, 1]).predict_proba(X[QUERY]),
    ),
    "ComponentAttributor.fit": (fitted, lambda e: components(e).attributions_),
    "ComponentAttributor.attribute": (components, lambda e: e.attribute(X[QUERY], y[QUERY])),
    "ComponentAttributor.transform": (components, lambda e: e.transform(X[QUERY])),
    "ComponentAttributor.counterfactual": (
        components,
        lambda e: e.counterfactual(np.eye(len(e.components_))[:2], X[QUERY], y[QUERY]),
    ),
    "ComponentAttributor.score": (components, lambda e: e.score(X[QUERY], y[QUERY], n_masks=4)),
    "ComponentAttributor.edit": (
        components,
        lambda e: e.edit(np.arange(3), k=1).predict_proba(X[QUERY]),
    ),
    "EditedClassifier.predict_proba": (edited, lambda e: e.predict_proba(X[QUERY])),
    "PerformativeAdapter.fit": (fitted, lambda e: performative(e).base_prior_),
    "PerformativeAdapter.predict_proba": (performative, lambda e: e.predict_proba(X[QUERY])),
    "PerformativeAdapter.partial_fit": (
        performative,
        lambda e: clone(e).fit(X, y, rounds=ROUNDS).partial_fit(X, y).predict_prior(),
    ),
    "PerformativeAdapter.statistic_of": (
        performative,
        lambda e: e.statistic_of(e.estimator_, X, y),
    ),
    "PerformativeAdapter.rank_models": (
        performative,
        lambda e: e.rank_models([e.estimator_], X, y, n_bootstrap=5)["predicted"],
    ),
    "PerformativeAdapter.stable_point": (performative, lambda e: e.stable_point(X, y)["prior"]),
    "Reprogrammer.fit": (lambda m: m, lambda m: reprogramming(m).predict_proba(X[QUERY])),
    "Reprogrammer.predict_proba": (reprogramming, lambda e: e.predict_proba(X[QUERY])),
    "Reprogrammer.score_samples": (reprogramming, lambda e: e.score_samples(X[QUERY])),
    "Reprogrammer.transform": (reprogramming, lambda e: e.transform(X[QUERY])),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_touched_during_a_call(name):
    module = network()
    make, call = CALLS[name]
    watch = Watch(module)
    WATCHED.append(watch)
    stop = threading.Event()

    def beside():
        while not stop.is_set():
            watch.look()
            time.sleep(0.0005)

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        estimator = make(module)
        call(estimator)
    finally:
        stop.set()
        thread.join()
        WATCHED.remove(watch)
    watch.look()
    assert watch.looks > 2
    assert sorted(set(watch.differences)) == []


def test_other_threads_draws_do_not_repeat():
    classifier, stop = fitted(network()), threading.Event()

    def serve():
        while not stop.is_set():
            classifier.predict_proba(X)

    thread = threading.Thread(target=serve)
    thread.start()
    draws = [float(torch.rand((), dtype=torch.float64)) for _ in range(3000)]
    stop.set()
    thread.join()
    assert len(set(draws)) == 3000


SERVED = ["from_module.predict_proba", "InfluenceScorer.influence", "InfluenceScorer.repair"]
SERVED += ["ComponentAttributor.counterfactual", "PerformativeAdapter.predict_proba"]
SERVED += ["Reprogrammer.predict_proba", "EditedClassifier.predict_proba"]


@pytest.mark.parametrize("name", SERVED)
def test_eight_threads_get_the_answers_of_a_quiet_one(name):
    module = network()
    make, call = CALLS[name]
    estimator = make(module)
    expected = np.asarray(call(estimator))
    stop, wrong, errors = time.time() + 2.0, [], []

    def serve():
        while time.time() < stop:
            try:
                if not np.array_equal(np.asarray(call(estimator)), expected):
                    wrong.append(1)
            except Exception as error:  # whatever it is, it is a failure here
                errors.append(error)
                return

    def disturb():
        # somebody else's training loop on the very same network
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
        while time.time() < stop:
            module.train()
            module(torch.tensor(X[:4])).sum().backward()
            optimizer.step()
            module.eval()
            module.requires_grad_(True)

    module.features[1].momentum = 0.0  # its statistics stay: they are part of the answers
    threads = [threading.Thread(target=serve) for _ in range(8)]
    threads.append(threading.Thread(target=disturb))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert wrong == []


def test_threads_that_multiply_by_the_curvature_do_not_meet_in_torchs_forward_mode():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    scorer = InfluenceScorer(module, method="cg", damping=0.3).fit(X[TRAIN], y[TRAIN])
    expected, found = scorer.influence(X[60:62], y[60:62]), []

    def ask():
        for _ in range(3):
            found.append(scorer.influence(X[60:62], y[60:62]))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 18
    assert all(np.array_equal(one, expected) for one in found)


def test_networks_that_share_a_body_are_served_side_by_side():
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5))
    heads = [nn.Sequential(body, nn.Linear(32, k)).train() for k in (3, 5)]
    served = [from_module(head, batch_size=4) for head in heads]
    expected = [c.predict_proba(X) for c in served]
    stop, wrong = time.time() + 1.5, []

    def serve(i):
        while time.time() < stop:
            heads[0].train()
            wrong.append(not np.allclose(served[i].predict_proba(X), expected[i], atol=1e-6))

    threads = [threading.Thread(target=serve, args=(i % 2,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(wrong)
    assert all(part.training for part in heads[1].modules())
    assert all(p.requires_grad for head in heads for p in head.parameters())


def interrupted(names, n_trials, seed, *, twice=False):
    """Ctrl-C at random instants of random calls; what is found changed afterwards.

    With `twice` another follows within a millisecond, and falls into the cleaning up.
    """
    rng = np.random.default_rng(seed)
    changed, left = [], []

    def ctrl_c(*_):
        if len(left) < 2:  # the last: alarms a microsecond apart would leave no time for the call
            signal.setitimer(signal.ITIMER_REAL, 0)
        if left:
            left.pop()
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGALRM, ctrl_c)
    try:
        for name in names:
            module = network()
            make, call = CALLS[name]
            estimator = make(module)
            start = time.perf_counter()
            expected = np.asarray(call(estimator))
            length = time.perf_counter() - start
            watch = Watch(module)
            for _ in range(-(-n_trials // len(names))):
                first = max(rng.uniform(0, length), 1e-6)
                left[:] = [1, 1] if twice else [1]
                try:
                    try:
                        signal.setitimer(signal.ITIMER_REAL, first, rng.uniform(1e-6, 1e-3))
                        call(estimator)
                    finally:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    pass
                left.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
                watch.look()
                now = watch.modes_of_torch()
                watch.differences += [key for key in now if now[key] != watch.modes[key]]
            changed += [(name, key) for key in watch.differences]
            if not np.array_equal(np.asarray(call(estimator)), expected):
                changed.append((name, "answer"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return changed


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX interval timers")
@pytest.mark.parametrize("name", SERVED)
def test_ctrl_c_leaves_nothing_changed(name):
    assert interrupted([name], 8, seed=0) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX interval timers")
@pytest.mark.parametrize("seed", range(1, 5))
def test_five_hundred_interrupts_leave_nothing_changed(seed):
    assert interrupted(list(CALLS), 125, seed=seed) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX interval timers")
@pytest.mark.parametrize("seed", range(1, 5))
def test_five_hundred_interrupts_of_the_cleaning_up_leave_nothing_changed(seed):
    assert interrupted(list(CALLS), 125, seed=seed, twice=True) == []


def test_batch_norm_at_prediction_time_and_training_leave_a_network_alone():
    module = network()
    watch = Watch(module)
    WATCHED.append(watch)
    try:
        with prediction_time_batch_norm(module) as opened:
            opened(torch.tensor(X))
        net = Net(module, max_epochs=1, random_state=0)
        net.fit(X, y)
        net.predict_proba(X)
    finally:
        WATCHED.remove(watch)
    watch.look()
    assert watch.looks > 2
    assert sorted(set(watch.differences)) == []
