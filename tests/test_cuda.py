"""On a device as on the CPU: every public method on a network that lies there, against a copy here.

``SKPERF_TEST_DEVICE=mps`` tries another kind of device.
"""

import copy
import functools
import json
import os
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from torch import nn

from skperf import (
    ComponentAttributor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    Reprogrammer,
    TrainingRun,
    from_module,
)
from skperf.influence import GGN, GIF, Arnoldi, LiSSA, Nearest, PerDraw, Replay, Source, noised
from skperf.reprogramming import Pixels
from tests import test_containers as containers
from tests.components import families
from tests.influence.influence_nets import Convolutional
from tests.influence.test_kinds import NETWORKS as LAYERS
from tests.reprogramming.conftest import TwoTowers, WordTokenizer

DEVICE = os.environ.get("SKPERF_TEST_DEVICE", "cuda")
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]

N, K = 24, 3
RNG = np.random.default_rng(0)
IMAGES = RNG.random((N, 1, 8, 8))
LABELS = np.arange(N) % K
QUERIES = IMAGES[:5] + 0.1 * RNG.normal(size=(5, 1, 8, 8)), (LABELS[:5] + 1) % K


@pytest.fixture(autouse=True)
def _plain_arithmetic(monkeypatch):
    """Convolutions in float32 itself, not in its 19-bit form."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def close(there, here, rtol=2e-3, atol=1e-4):
    there, here = (np.asarray(found, dtype=float) for found in (there, here))
    assert np.isfinite(there).all()
    np.testing.assert_allclose(there, here, rtol=rtol, atol=atol * max(np.abs(here).max(), 1e-12))


def both(make):
    """What `make` gives on the device and here, from copies of one module."""
    return make(torch.device(DEVICE)), make(torch.device("cpu"))


def moved(estimator):
    """The module, or the module inside, on the device."""
    if isinstance(estimator, nn.Module):
        return copy.deepcopy(estimator).to(DEVICE)
    inner = clone(estimator.estimator)
    inner.module = copy.deepcopy(inner.module).to(DEVICE)
    return FrozenEstimator(inner)


def double(kind, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().double().eval()


@functools.lru_cache
def fitted(estimator, kind):
    make, _ = containers.METHODS[estimator]
    (given, X, y), _ = containers.case(kind, None)
    return make(moved(given), X, y, kind), make(given, X, y, kind), X, y


KINDS = [kind for kind in containers.KINDS if kind != "on disk"]
CELLS = [cell for cell in containers.CELLS if cell[2] in KINDS]


@pytest.mark.parametrize("cell", CELLS, ids="/".join)
def test_every_public_method(cell):
    estimator, method, kind = cell
    there, here, X, y = fitted(estimator, kind)
    call = containers.METHODS[estimator][1][method]
    where = slice(0, len(y)) if estimator == "PerformativeAdapter" else containers.QUERY
    given = containers.rows_of(X, where), y[where]
    if (estimator, method) == ("InfluenceScorer", "score"):
        # networks trained from weights that each device draws by itself
        assert np.isfinite(call(there, *given))
        return
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if kind == "half" else {}
    close(call(there, *given), call(here, *given), **tolerance)


METHODS = ["gradient_dot", "ggn", "ekfac", "kfac", "cg", "datainf", "trak", "exact"]
METHODS += [Arnoldi(), LiSSA(max_iter=50), GIF(ratio=0.5)]
METHODS += ["tracin", Source(n_steps=20)]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_methods_of_influence(method):
    module, start = double(Convolutional), double(Convolutional, seed=1)
    several = method == "tracin" or isinstance(method, Source)
    options = {"random_state": 0} | ({} if several else {"damping": 0.1})
    if method == "exact":
        options["parameters"] = ["output*", "hidden*"]

    def make(device):
        own = copy.deepcopy(module).to(device)
        more = {"checkpoints": [copy.deepcopy(start).to(device), own]} if several else {}
        more |= {"learning_rate": 0.1} if several else {}
        return InfluenceScorer(own, method=method, **options, **more).fit(IMAGES, LABELS)

    there, here = both(make)
    # conjugate gradients stop at a tolerance of their own
    allowed = (1e-2, 1e-4) if method == "cg" else (1e-5, 1e-6)
    assert there.influence(*QUERIES).shape == (5, N)
    close(there.influence(*QUERIES), here.influence(*QUERIES), *allowed)
    if not isinstance(method, Source):
        close(there.self_influence_, here.self_influence_, *allowed)
    close(there.top_k(*QUERIES, 4).values, here.top_k(*QUERIES, 4).values, *allowed)
    again = pickle.loads(pickle.dumps(there))
    close(again.influence(*QUERIES), here.influence(*QUERIES), *allowed)


# a table that is asked with a range made on the CPU is the user's own to mend
@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"Positions"}))
@pytest.mark.parametrize("method", ["gradient_dot", "ggn", "ekfac"])
def test_layers_of_influence(name, method):
    module = double(LAYERS[name])
    rng = np.random.default_rng(1)
    X, y = rng.normal(size=(11, 4, 5)), rng.integers(0, 3, 11)

    def make(device):
        scorer = InfluenceScorer(copy.deepcopy(module).to(device), method=method, random_state=0)
        return scorer.fit(X, y).influence(X[:4], y[:4])

    close(*both(make), 1e-5, 1e-6)


def test_other_questions_of_influence():
    module = double(Convolutional)

    def make(device):
        own = copy.deepcopy(module).to(device)
        scorer = InfluenceScorer(own, method=GGN(), damping=0.1, random_state=0)
        scorer.fit(IMAGES, LABELS)
        out = np.empty((5, N), np.float64)
        scorer.influence(*QUERIES, out=out)
        report = scorer.diagnose(*QUERIES, n_train=3, steps=(1, 2))
        edited = scorer.repair(QUERIES[0][:1], QUERIES[1][:1], k=3, max_steps=2)
        assert {p.device.type for p in edited.to_module().parameters()} == {device.type}
        assert {p.device.type for p in own.parameters()} == {device.type}
        return np.concatenate(
            [
                out.ravel(),
                scorer.influence(*QUERIES, aggregate="mean"),
                scorer.influence(*QUERIES, rows=(QUERIES[0][:2], QUERIES[1][:2])).ravel(),
                scorer.detect_mislabels(class_aware=True),
                scorer.with_damping(0.3).influence(*QUERIES).ravel(),
                scorer.radius_effect(*QUERIES),
                np.array([float(str(report) != "")]),
                edited.predict_proba(QUERIES[0]).ravel(),
            ]
        )

    close(*both(make), 1e-4, 1e-5)


def test_candidates():
    module = double(Convolutional)

    def make(device):
        own = copy.deepcopy(module).to(device)
        near = InfluenceScorer(own, method="gradient_dot", candidates=Nearest(9)).fit(
            IMAGES, LABELS
        )
        return near.influence(*QUERIES)

    close(*both(make), 1e-5, 1e-6)


def test_a_language_model_by_token():
    pytest.importorskip("transformers")
    from tests.influence.test_kinds import language_model

    module = language_model(tied=True)
    ids = np.random.default_rng(0).integers(1, 40, (11, 7))
    X, y = ids[:, :-1], ids[:, 1:].copy()
    y[np.arange(6) >= np.random.default_rng(1).integers(3, 7, 11)[:, None]] = -100

    def make(device):
        scorer = InfluenceScorer(copy.deepcopy(module).to(device), method="ggn", damping=0.1)
        scorer.fit(X, y)
        tokens = scorer.influence(X[:3], y[:3], tokens="queries")
        return np.concatenate([scorer.influence(X[:3], y[:3]).ravel(), tokens.ravel()])

    close(*both(make), 1e-4, 1e-6)


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.level = nn.Embedding(10, 4)
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, images, levels):
        return self.last((self.first(images) + self.level(levels)[:, :, None, None]).tanh())


def test_a_denoiser():
    module = double(Denoiser)
    images = np.random.default_rng(0).normal(size=(12, 1, 5, 5))
    X, noise = noised(images, np.linspace(0.95, 0.05, 10), n_draws=3)

    def make(device):
        given = {"method": GGN(1.0, None), "loss": "squared_error", "damping": 0.1}
        own = PerDraw(copy.deepcopy(module).to(device))
        return InfluenceScorer(own, **given).fit(X, noise).influence(X, noise)

    close(*both(make), 1e-5, 1e-6)


def net(device, **params):
    settings = {"optimizer": torch.optim.SGD, "lr": 0.05, "max_epochs": 4, "batch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, K)).double()
    return Net(module, device=str(device), random_state=0, **settings | params)


@pytest.mark.parametrize(
    "params", [{}, {"optimizer": torch.optim.AdamW, "lr": 0.01}], ids=["SGD", "AdamW"]
)
def test_through_the_training_run(params):
    def make(device):
        scorer = InfluenceScorer(net(device, **params), method=Replay(tolerance=0), random_state=0)
        scorer.fit(IMAGES, LABELS)
        slopes = scorer.hyperparameter_gradient(*QUERIES)
        return np.concatenate(
            [
                scorer.influence(*QUERIES).ravel(),
                scorer.influence(*QUERIES, change="label").ravel(),
                *(np.ravel(value) for value in slopes.values()),
                [scorer.smoothness_],
            ]
        )

    close(*both(make), 1e-4, 1e-6)


def test_the_run_of_a_convolutional_network():
    def make(device):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Sequential(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4),
                nn.GELU(),
                nn.Dropout(0.2),
                nn.Flatten(),
                nn.Linear(144, K),
            )
        estimator = Net(module, device=str(device), max_epochs=3, batch_size=8, random_state=0)
        scorer = InfluenceScorer(estimator, method=Replay(tolerance=0), random_state=0)
        scorer.fit(IMAGES.astype(np.float32), LABELS)
        again = clone(scorer.estimator_).fit(
            IMAGES.astype(np.float32), LABELS, sample_weight=np.ones(N)
        )
        for a, b in zip(
            again.module_.parameters(), scorer.estimator_.module_.parameters(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        return scorer.influence(QUERIES[0].astype(np.float32), QUERIES[1])

    # drawn masks are those of the device's own generator: finite, not equal
    assert np.isfinite(make(torch.device(DEVICE))).all()


def test_a_loop_of_ones_own():
    def make(device):
        own = copy.deepcopy(net("cpu").module).to(device)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
        inputs, targets = torch.tensor(IMAGES, device=device), torch.tensor(LABELS, device=device)
        order = torch.arange(N, device=device).split(8)
        batches = [(rows.cpu(), (inputs[rows], targets[rows])) for rows in order] * 3
        with TrainingRun.record(own, optimizer, batches) as run:
            for _, (some, wanted) in run:
                optimizer.zero_grad()
                nn.functional.cross_entropy(own(some), wanted).backward()
                optimizer.step()
        scorer = InfluenceScorer(own, method=Replay(run=run), random_state=0)
        return scorer.fit(IMAGES, LABELS).influence(*QUERIES)

    close(*both(make), 1e-4, 1e-6)


def test_a_net_is_trained_and_read_on_the_device():
    def make(device):
        trained = net(device, max_epochs=10).fit(IMAGES, LABELS)
        assert next(trained.module_.parameters()).device.type == device.type
        scorer = InfluenceScorer(FrozenEstimator(trained), method="ggn", damping=0.1)
        scores = scorer.fit(IMAGES, LABELS).influence(*QUERIES)
        return np.concatenate([scores.ravel(), trained.predict_proba(IMAGES).ravel()])

    close(*both(make), 1e-4, 1e-6)


@pytest.mark.parametrize("kind", ["conv_filters", "neurons", "layers", "auto"])
@pytest.mark.parametrize("ablation", ["zero", "mean", "resample", 0.3])
def test_components(kind, ablation):
    module = double(Convolutional)

    def make(device):
        own = copy.deepcopy(module).to(device)
        model = ComponentAttributor(
            own, components=kind, ablation=ablation, budget=60, fraction=0.4, random_state=0
        ).fit(IMAGES[:9], LABELS[:9])
        masks = (np.random.default_rng(2).random((3, len(model.components_))) > 0.3).astype(float)
        pieces = [
            model.attributions_,
            model.stderr_,
            model.counterfactual(masks, *QUERIES),
            model.predict_counterfactual(masks),
            [model.score(*QUERIES, n_masks=5)],
            model.ablate(masks[0]).predict_proba(QUERIES[0]),
        ]
        if kind != "layers" and ablation == "zero":
            edited = model.edit(np.arange(3), k=1)
            assert {p.device.type for p in edited.to_module().parameters()} == {device.type}
            pieces.append(edited.predict_proba(QUERIES[0]))
        return np.concatenate([np.ravel(piece) for piece in pieces])

    close(*both(make), 1e-5, 1e-6)


FAMILIES = json.loads(families.RECORD.read_text())["models"]
SOME = sorted(
    np.random.default_rng(4).choice(
        [name for name, entry in FAMILIES.items() if "refused" not in entry],
        12,
        replace=False,
    )
)


@pytest.mark.parametrize("name", SOME)
def test_heads_of_transformers(name):
    module = families.build(FAMILIES[name]["family"], name)
    X = families.rows(FAMILIES[name]["task"], module)

    def make(device):
        own = copy.deepcopy(module).to(device)
        model = ComponentAttributor(own, budget=20, fraction=0.2, random_state=0)
        model.fit(X, np.arange(len(X)) % 3)
        return np.concatenate([model.attributions_.ravel(), model.baseline_output_])

    close(*both(make), 1e-3, 1e-4)


def pictures():
    generator = np.random.RandomState(0)
    y = np.arange(60) % 3
    X = generator.uniform(0.0, 0.4, (60, 3, 12, 12)).astype(np.float32)
    for row, code in zip(X, y, strict=True):
        row[:, :, 4 * code : 4 * code + 4] += 0.5
    return X, np.array(["cat", "dog", "bird"])[y]


REPROGRAMMED = {
    "auto": {},
    "zero-shot": {"max_epochs": 0},
    "prompts": {"prompts": ["a photo of a {}", "a drawing of the {}"]},
    "mahalanobis": {"ood_score": "mahalanobis"},
    "probe": {"head": "probe"},
    "cache": {"head": "cache"},
    "black box": {"gradient": "rge"},
}


@pytest.mark.parametrize("name", REPROGRAMMED)
def test_reprogramming_two_towers(name, tmp_path):
    X, y = pictures()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        towers = TwoTowers().eval()

    def make(device):
        settings = {"border": 2, "max_epochs": 2, "batch_size": 32, "random_state": 0}
        model = Reprogrammer(
            copy.deepcopy(towers).to(device),
            tokenizer=WordTokenizer(),
            **settings | REPROGRAMMED[name],
        ).fit(X, y)
        assert model.encoder_.device.type == device.type
        pieces = [model.predict_proba(X), model.score_samples(X), model.transform(X)]
        pieces += [model.reprogram(X[:3]), model.with_classes(["horse", "zebra"]).predict_proba(X)]
        model.save_program(tmp_path / device.type)
        read = Reprogrammer(copy.deepcopy(towers).to(device), tokenizer=WordTokenizer())
        read.load_program(tmp_path / device.type)
        close(read.predict_proba(X), model.predict_proba(X), 1e-4, 1e-5)
        module = model.to_module()
        with torch.no_grad():
            outputs = module(torch.tensor(X[:4], device=device))
        assert outputs.device.type == device.type
        return np.concatenate([np.ravel(piece) for piece in pieces])

    # trained with other roundings
    close(*both(make), 5e-2, 2e-2)


@pytest.mark.parametrize("head", ["auto", "linear"])
def test_reprogramming_a_plain_encoder(head):
    X, y = pictures()
    module = double(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(1)))

    def make(device):
        settings = {"border": 2, "max_epochs": 2, "random_state": 0, "head": head}
        model = Reprogrammer(copy.deepcopy(module).to(device), **settings).fit(X, y)
        return np.concatenate([model.predict_proba(X).ravel(), model.score_samples(X)])

    close(*both(make), 1e-2, 1e-3)


def test_a_table_for_a_plain_encoder():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(60, 5)), np.arange(60) % 2
    module = double(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(1)))

    def make(device):
        own = copy.deepcopy(module).to(device)
        settings = {"pixels": Pixels(canvas=40), "max_epochs": 2, "random_state": 0}
        return Reprogrammer(own, rows="table", **settings).fit(X, y).predict_proba(X)

    close(*both(make), 1e-2, 1e-3)


@pytest.mark.parametrize("adapter", ["auto", "mlp", "paper"])
def test_adapting_a_network_there(adapter):
    rng = np.random.default_rng(0)
    X, rounds = rng.normal(size=(240, 64)), np.repeat(np.arange(8), 30)
    y = rng.integers(0, K, 240)

    def make(device):
        trained = net(device, max_epochs=3).fit(X.reshape(-1, 1, 8, 8), y)
        model = PerformativeAdapter(FrozenEstimator(trained), adapter=adapter, random_state=0)
        model.fit(X.reshape(-1, 1, 8, 8), y, rounds=rounds)
        found = model.predict_proba(X[:20].reshape(-1, 1, 8, 8))
        return np.concatenate([found.ravel(), model.predict_prior()])

    close(*both(make), 1e-3, 1e-4)


def test_a_network_that_is_moved_here_is_read_from_there():
    module = double(Convolutional)
    opened = from_module(module, classes=range(K), device=DEVICE)
    close(opened.predict_proba(IMAGES), from_module(module, range(K)).predict_proba(IMAGES), 1e-6)
    assert next(module.parameters()).device.type == "cpu"


def test_memory_of_the_device_does_not_grow():
    if DEVICE != "cuda":
        pytest.skip("counted by CUDA's own allocator")
    module = double(Convolutional).to(DEVICE)

    def call():
        scorer = InfluenceScorer(module, method="ggn", damping=0.1, random_state=0)
        scorer.fit(IMAGES, LABELS).influence(*QUERIES)
        ComponentAttributor(module, budget=20, random_state=0).fit(IMAGES, LABELS)

    call()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        call()
    assert torch.cuda.memory_allocated() <= before + 2**16
