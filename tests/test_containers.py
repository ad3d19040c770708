"""Every public method on rows of every kind, held against the same rows as one plain array.

The plain form of a network does the unpacking inside its own forward, so that everything around it
sees one float32 array; what containers change can then only come from the containers.
"""

import copy
import functools
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from skperf import (
    ComponentAttributor,
    InfluenceScorer,
    PerformativeAdapter,
    Reprogrammer,
    from_module,
)

N, L, K = 48, 6, 3
QUERY = slice(36, 42)
RNG = np.random.default_rng(0)
TABLE = RNG.normal(size=(N, 2 * L)).astype(np.float32)
LABELS = (TABLE[:, 0] + 0.3 * RNG.normal(size=N) > 0).astype(int) + (TABLE[:, 1] > 0.8)
IDS = RNG.integers(1, 20, (N, L))
MASK = (np.arange(L) < RNG.integers(2, L + 1, N)[:, None]).astype(np.int64)
VALUES = (TABLE[:, :3] @ np.array([1.0, -2.0, 0.5], np.float32)).astype(np.float32)
SEVERAL = (TABLE[:, :K] > 0.2).astype(int)
WEIGHT = torch.tensor([4.0, 1.0, 0.5])
ROUNDS = np.repeat(np.arange(6), N // 6)
IMAGES = RNG.random((N, 1, 8, 8)).astype(np.float32)


class Plain(nn.Module):
    def __init__(self, n_outputs=K, width=2 * L):
        super().__init__()
        self.hidden, self.output = nn.Linear(width, 8), nn.Linear(8, n_outputs)

    def forward(self, rows):
        return self.output(torch.tanh(self.hidden(rows)))


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.hidden, self.output = nn.Linear(8, 8), nn.Linear(8, K)

    def forward(self, input_ids, attention_mask):
        kept = attention_mask[:, :, None].float()
        pooled = (self.embedding(input_ids) * kept).sum(1) / kept.sum(1)
        return self.output(torch.tanh(self.hidden(pooled)))


class MaskedInOne(Masked):
    def forward(self, rows):
        return super().forward(rows[:, :L].long(), rows[:, L:].long())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(L, 8), nn.Linear(L, 8)
        self.output = nn.Linear(8, K)

    def forward(self, left, right):
        return self.output(torch.tanh(self.left(left) - self.right(right)))


class TwoInOne(Two):
    def forward(self, rows):
        return super().forward(rows[:, :L], rows[:, L:])


class Stored(Dataset):
    """Rows in a file; an item is a pair of a row and its label, as is the custom."""

    def __init__(self, folder):
        self.rows = np.memmap(folder / "rows", np.float32, "w+", shape=TABLE.shape)
        self.rows[:] = TABLE

    def __len__(self):
        return N

    def __getitem__(self, i):
        return torch.tensor(self.rows[i]), int(LABELS[i])


def seeded(module, kind=torch.float32):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.to(kind).eval()


def in_float32(module):
    return copy.deepcopy(module).float()


class Part:
    """Some rows of a map-style data set."""

    def __init__(self, data, where):
        self.data, self.numbers = data, np.arange(N)[where]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        return self.data[int(self.numbers[i])]


def rows_of(X, where):
    if isinstance(X, dict):
        return {name: value[where] for name, value in X.items()}
    if isinstance(X, tuple):
        return tuple(value[where] for value in X)
    if isinstance(X, pd.DataFrame):
        return X.iloc[where]
    return Part(X, where) if isinstance(X, Dataset) else X[where]


@functools.lru_cache
def case(kind, folder):
    """The network and rows of a kind, and the same in plain form: two of (estimator, X, y)."""
    module = seeded(Plain())
    plain = (module, TABLE, LABELS)
    if kind == "array":
        # float64, read-only, in another memory order
        X = np.asfortranarray(TABLE.astype(np.float64))
        X.flags.writeable = False
        return (module, X, LABELS), plain
    if kind == "frame":
        return (module, pd.DataFrame(TABLE, columns=[f"c{i}" for i in range(2 * L)]), LABELS), plain
    if kind == "masked":
        masked, one = seeded(Masked()), seeded(MaskedInOne())
        X = {"input_ids": IDS, "attention_mask": MASK}
        return (masked, X, LABELS), (one, np.hstack([IDS, MASK]).astype(np.float32), LABELS)
    if kind == "two inputs":
        return (seeded(Two()), (TABLE[:, :L], TABLE[:, L:]), LABELS), (
            seeded(TwoInOne()),
            TABLE,
            LABELS,
        )
    if kind == "on disk":
        return (module, Stored(folder), LABELS), plain
    if kind == "half":
        half = seeded(Plain(), torch.bfloat16)
        return (half, TABLE, LABELS), (in_float32(half), TABLE, LABELS)
    if kind == "values":
        numbers = seeded(Plain(1))
        return (from_module(numbers, loss="squared_error"), TABLE, VALUES), (
            from_module(numbers, loss=lambda z, t: (z[:, 0] - t.reshape(-1)) ** 2),
            TABLE,
            VALUES,
        )
    if kind == "labels":
        return (from_module(module, loss="binary_cross_entropy"), TABLE, SEVERAL), (
            from_module(
                module,
                loss=lambda z, t: nn.functional.binary_cross_entropy_with_logits(
                    z, t.to(z.dtype), reduction="none"
                ).mean(1),
            ),
            TABLE,
            SEVERAL.astype(np.float32),
        )
    weighted = from_module(module, classes=range(K), loss=nn.CrossEntropyLoss(weight=WEIGHT))
    return (weighted, TABLE, LABELS), plain


KINDS = [
    "array",
    "frame",
    "masked",
    "two inputs",
    "on disk",
    "half",
    "values",
    "labels",
    "weighted",
]


def influence(estimator, X, y, kind):
    output = "loss"
    weight = WEIGHT[LABELS[:36]].numpy() if kind == "weighted in plain form" else None
    scorer = InfluenceScorer(estimator, method="ggn", damping=0.1, output=output, random_state=0)
    return scorer.fit(rows_of(X, slice(0, 36)), y[:36], sample_weight=weight)


def components(estimator, X, y, kind):
    output = {"values": "value", "labels": "loss"}.get(kind, "margin")
    attributor = ComponentAttributor(
        estimator, components="neurons", output=output, budget=40, fraction=0.3, random_state=0
    )
    return attributor.fit(rows_of(X, slice(0, 12)), y[:12])


def performative(estimator, X, y, kind):
    return PerformativeAdapter(estimator, random_state=0).fit(X, y, rounds=ROUNDS)


def predictor(estimator, X, y, kind):
    made = estimator if not isinstance(estimator, nn.Module) else from_module(estimator, range(K))
    made.predict(rows_of(X, slice(0, 2)))  # one look at a row
    return made


def masks(attributor):
    rng = np.random.default_rng(2)
    return (rng.random((3, len(attributor.components_))) > 0.3).astype(float)


METHODS = {
    "InfluenceScorer": (
        influence,
        {
            "influence": lambda e, X, y: e.influence(X, y),
            "transform": lambda e, X, y: e.transform(X),
            "self_influence": lambda e, X, y: e.self_influence(X, y),
            "self_influence_": lambda e, X, y: e.self_influence_,
            "loss_": lambda e, X, y: e.loss_,
            "top_k": lambda e, X, y: e.top_k(X, y, k=3)["values"],
            "group_influence": lambda e, X, y: e.group_influence([[0, 3, 5], [7]], X, y, order=2),
            "detect_mislabels": lambda e, X, y: e.detect_mislabels(),
            "loo_effect": lambda e, X, y: e.loo_effect(X, y),
            "fading": lambda e, X, y: e.fading(X, y, steps=(1, 3), n_train=4)["actual"],
            "score": lambda e, X, y: e.score(X, y, n_subsets=4),
            "repair": lambda e, X, y: e.repair(X, y, k=4, max_steps=3).predict(X),
            "remove": lambda e, X, y: e.remove([0, 3]).predict(X),
        },
    ),
    "ComponentAttributor": (
        components,
        {
            "attributions_": lambda e, X, y: e.attributions_,
            "attribute": lambda e, X, y: e.attribute(X, y),
            "transform": lambda e, X, y: e.transform(X),
            "counterfactual": lambda e, X, y: e.counterfactual(masks(e), X, y),
            "predict_counterfactual": lambda e, X, y: e.predict_counterfactual(masks(e), X, y),
            "score": lambda e, X, y: e.score(X, y, n_masks=5),
            "top_components": lambda e, X, y: np.asarray(e.top_components(2)["index"]),
            "edit": lambda e, X, y: e.edit(np.arange(3), k=1).predict(X),
            "ablate": lambda e, X, y: e.ablate(masks(e)[0]).predict(X),
        },
    ),
    "PerformativeAdapter": (
        performative,
        {
            "predict": lambda e, X, y: e.predict(X),
            "predict_proba": lambda e, X, y: e.predict_proba(X),
            "decision_function": lambda e, X, y: e.decision_function(X),
            "predict_prior": lambda e, X, y: e.predict_prior(),
            "statistic_of": lambda e, X, y: e.statistic_of(e.estimator_, X, y),
            "stable_point": lambda e, X, y: e.stable_point(X, y)["prior"],
            "rank_models": lambda e, X, y: e.rank_models([e.estimator_], X, y)["predicted"],
            "score": lambda e, X, y: e.score(X, y),
            "partial_fit": lambda e, X, y: copy.deepcopy(e).partial_fit(X, y).predict_prior(),
            "estimate_prior": lambda e, X, y: e.estimate_prior(X),
            "correct": lambda e, X, y: e.correct(X, np.full(K, 1 / K)),
        },
    ),
    "from_module": (
        predictor,
        {
            "predict": lambda e, X, y: e.predict(X),
            "predict_proba": lambda e, X, y: e.predict_proba(X),
            "decision_function": lambda e, X, y: e.decision_function(X),
            "score": lambda e, X, y: e.score(X, y),
        },
    ),
}

# cells in which the method has no meaning: a reason each
MEANINGLESS = {
    ("PerformativeAdapter", "values"): "anticipates the mix of classes",
    ("PerformativeAdapter", "labels"): "anticipates the mix of classes",
    ("from_module.predict_proba", "values"): "numbers have no probabilities",
    ("from_module.decision_function", "values"): "numbers have no probabilities",
    ("from_module.predict_proba", "labels"): "yes-or-no labels are given by predict",
    ("from_module.decision_function", "labels"): "yes-or-no labels are given by predict",
    ("ComponentAttributor.transform", "values"): "no label is predicted",
    ("ComponentAttributor.transform", "labels"): "the loss at one's own predictions is given by y",
    ("InfluenceScorer.transform", "values"): "at the predicted number the loss is flat",
    ("InfluenceScorer.repair", "values"): "there is no label to repair",
    ("InfluenceScorer.repair", "labels"): "there is no single label to repair",
}
CELLS = [
    (estimator, method, kind)
    for estimator, (_, methods) in METHODS.items()
    for method in methods
    for kind in KINDS
    if (estimator, kind) not in MEANINGLESS and (f"{estimator}.{method}", kind) not in MEANINGLESS
]


def in_make_test(cell):
    """A seeded tenth of the table, the same on every machine."""
    return zlib.crc32("/".join(cell).encode()) % 10 == 0


@functools.lru_cache
def fitted(estimator, kind, folder):
    make, _ = METHODS[estimator]
    (given, X, y), (plain, plain_X, plain_y) = case(kind, folder)
    inside = "weighted in plain form" if kind == "weighted" else kind
    return (
        (make(given, X, y, kind), X, y),
        (make(plain, plain_X, plain_y, inside), plain_X, plain_y),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def test_few_cells_have_no_meaning():
    n_cells = len(KINDS) * sum(len(methods) for _, methods in METHODS.values())
    assert n_cells - len(CELLS) <= 0.1 * n_cells
    assert sum(map(in_make_test, CELLS)) > 0.05 * len(CELLS)


@pytest.mark.parametrize(
    ("estimator", "method", "kind"),
    [
        pytest.param(*cell, marks=() if in_make_test(cell) else pytest.mark.slow, id="/".join(cell))
        for cell in CELLS
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_cell(estimator, method, kind, folder):
    (ours, X, y), (plain, plain_X, plain_y) = fitted(estimator, kind, folder)
    call = METHODS[estimator][1][method]
    where = slice(0, N) if estimator == "PerformativeAdapter" else QUERY
    actual = np.asarray(call(ours, rows_of(X, where), y[where]), dtype=float)
    expected = _expected(call, plain, rows_of(plain_X, where), plain_y[where], method, kind)
    assert np.isfinite(actual).all()
    scale = max(float(np.abs(expected).max()), 1e-12)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=1e-4 * scale)


def _expected(call, plain, X, y, method, kind):
    """The plain form knows of no yes-or-no labels: they are read off its outputs here."""
    if kind == "labels" and method in ("predict", "score", "transform"):
        module = seeded(Plain())
        with torch.no_grad():
            predicted = (module(torch.tensor(X)) > 0).numpy().astype(np.float32)
        if isinstance(plain, InfluenceScorer) and method == "transform":
            return plain.influence(X, predicted)
        if isinstance(plain, ComponentAttributor) and method == "transform":
            return plain.attribute(X, predicted)
        if method == "predict":
            return predicted
        if not isinstance(plain, InfluenceScorer | ComponentAttributor):
            return np.asarray((predicted == y).all(1).mean())
    if kind == "labels" and method in ("edit", "ablate"):
        return (np.asarray(call(plain, X, y)) > 0).astype(float)
    found = np.asarray(call(plain, X, y), dtype=float)
    return found > 0 if kind == "labels" and method == "remove" else found


@pytest.mark.parametrize("kind", ["uint8", "flat", "half"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_pictures_for_an_encoder(kind):
    encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    seeded(encoder)
    eighths = np.round(IMAGES * 255).astype(np.uint8)
    X, other, options = eighths / np.float32(255), eighths, {}
    if kind == "flat":
        other, options = X.reshape(N, -1), {"image_shape": (1, 8, 8)}
    if kind == "half":
        other, encoder = X, encoder.to(torch.bfloat16)
    common = {"max_epochs": 1, "border": 1, "random_state": 0}
    plain = Reprogrammer(in_float32(encoder), **common).fit(X, LABELS)
    ours = Reprogrammer(encoder, **common, **options).fit(other, LABELS)
    np.testing.assert_allclose(ours.predict_proba(other), plain.predict_proba(X), atol=2e-3)
