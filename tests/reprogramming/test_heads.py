"""Encoders without a text tower: label maps, linear heads, black boxes."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from torch import nn

from skperf.reprogramming import Reprogrammer
from skperf.reprogramming.heads import (
    Adapter,
    Attributes,
    Cache,
    Cached,
    _adapter,
    calibrated,
    few_rows,
    folds_of,
    rebuilt,
    sharpened_losses,
    voted,
)
from tests.reprogramming.conftest import assert_same_state, state_of

RNG = np.random.default_rng(0)
OUTPUTS, TEXTS = RNG.normal(size=(9, 6)), RNG.normal(size=(3, 6))
CODES = np.array([0, 0, 1, 1, 1, 2, 2, 2, 2])
WEIGHTS = RNG.uniform(0.5, 3, 9)
CACHED = Cached(
    torch.tensor(OUTPUTS), torch.tensor(CODES), torch.tensor(WEIGHTS), 3, torch.tensor(TEXTS),
    torch.tensor(RNG.normal(size=(6, 6))), torch.tensor([0, 0, 1, 1, 1, 2]), scale=2.0, bias=-0.5,
)  # fmt: skip


def lengths_of_one(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_cache_adds_votes_of_near_rows_by_their_weights():
    found = Cache(CACHED, 1.5, 4.0)(torch.tensor(OUTPUTS[:4]))
    near = np.exp(4.0 * (lengths_of_one(OUTPUTS[:4]) @ lengths_of_one(OUTPUTS).T - 1))
    expected = 2.0 * OUTPUTS[:4] @ TEXTS.T - 0.5
    for code in range(3):
        own = code == CODES
        expected[:, code] += 1.5 * near[:, own] @ (WEIGHTS[own] / WEIGHTS.mean())
    np.testing.assert_allclose(found, expected)


def test_an_adapter_holds_mixed_features_against_the_texts():
    head = _adapter(0.3, CACHED, 0)
    assert isinstance(head, Adapter)
    assert head.share == 0.3
    down, up = head.down.detach().numpy(), head.up.detach().numpy()
    moved = np.maximum(np.maximum(OUTPUTS @ down, 0) @ up, 0)
    mixed = lengths_of_one(0.3 * moved + 0.7 * OUTPUTS)
    expected = 2.0 * mixed @ TEXTS.T - 0.5
    np.testing.assert_allclose(head(torch.tensor(OUTPUTS)).detach(), expected)


@pytest.mark.parametrize("nearest", [1, 2, 10])
def test_attributes_are_means_of_the_nearest_prompts_of_a_class(nearest):
    similarities = OUTPUTS @ CACHED.attributes.numpy().T
    columns = []
    for code in range(3):
        own = np.sort(similarities[:, CACHED.groups.numpy() == code], axis=1)
        columns.append(own[:, -nearest:].mean(1))
    expected = 2.0 * np.stack(columns, 1) - 0.5
    np.testing.assert_allclose(Attributes(CACHED, nearest)(torch.tensor(OUTPUTS)), expected)


@pytest.mark.parametrize(("kind", "numbers"), [(Cache, (1.0, 3.0)), (Attributes, (2,))])
def test_a_head_is_made_again_from_its_numbers_and_tensors(kind, numbers):
    head, rows = kind(CACHED, *numbers), torch.tensor(OUTPUTS)
    again = rebuilt(head.describe(), dict(head.state_dict()))
    assert torch.equal(again(rows), head(rows))
    assert again.describe() == head.describe()


def test_the_factor_of_similarities_makes_the_weighted_loss_smallest():
    similarities = RNG.normal(size=(9, 3)) + 2 * np.eye(3)[CODES]

    def losses(factor):
        return -log_softmax(factor * similarities, axis=1)[np.arange(9), CODES]

    best = minimize_scalar(
        lambda log: np.average(losses(np.exp(log)), weights=WEIGHTS), bounds=(-4, 4)
    )
    told = [torch.tensor(each) for each in (similarities, CODES, WEIGHTS)]
    assert calibrated(7.0, *told) == pytest.approx(np.exp(best.x), rel=1e-3)
    found = sharpened_losses(*told)
    np.testing.assert_allclose(found, losses(np.exp(best.x)), rtol=1e-3)


@pytest.mark.parametrize("n_folds", [2, 3, 4])
def test_rows_of_every_class_are_dealt_out_evenly(n_folds):
    folds = folds_of(np.repeat([0, 1, 2], [5, 3, 1]), n_folds, np.random.RandomState(0))
    assert len(folds) == n_folds
    assert sorted(np.concatenate([test for _, test in folds])) == list(range(9))
    for train, test in folds:
        assert sorted([*train, *test]) == list(range(9))
        assert abs(len(test) - 9 / n_folds) < 1  # classes go on where the one before ended


@pytest.fixture
def source():
    """A classifier of seven labels, with batch normalisation and dropout in training mode."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(6 * 25, 7),
    ).train()


@pytest.fixture
def parameters():
    return {"border": 2, "max_epochs": 4, "batch_size": 32, "random_state": 0, "lr": 0.1}


@pytest.mark.parametrize("head", ["auto", "probe", "cache", "adapter", "attributes"])
def test_double_precision_is_kept(towers, tokenizer, pictures, head):
    X, y = pictures[0][:60], pictures[1][:60]
    prompts = ["a photo of a {}", "a drawing of a {}"]
    options = {"tokenizer": tokenizer, "prompts": prompts, "border": 2, "random_state": 0}
    double = Reprogrammer(towers.double(), head=head, max_epochs=1, **options).fit(X, y)
    single = Reprogrammer(towers.float(), head=head, max_epochs=1, **options).fit(X, y)
    towers.double()
    proba = double.predict_proba(X)
    towers.float()
    np.testing.assert_allclose(proba, single.predict_proba(X), atol=0.05)
    assert double.ood_thresholds_.keys() == single.ood_thresholds_.keys()


@pytest.mark.parametrize("mapping", ["rlm", "flm", "ilm", "blm", "blm+", "linear"])
def test_every_mapping_learns_and_leaves_the_encoder(source, pictures, parameters, mapping):
    X, y = pictures
    before = state_of(source)
    model = Reprogrammer(source, mapping=mapping, **parameters).fit(X, y)
    assert_same_state(before, state_of(source))
    assert model.alpha_ == 0
    assert model.history_[-1, "train_loss"] < model.history_[0, "train_loss"]
    assert np.isfinite(model.score_samples(X)).all()
    assert model.transform(X).shape == (len(X), 7)
    if mapping != "linear":
        assert model.label_mapping_.shape == (7, 3)
        expected = model.transform(X) @ model.label_mapping_
        np.testing.assert_allclose(model.decision_function(X), expected, atol=1e-4)


def test_border_learns_faster_where_it_is_alone(source, towers, tokenizer, pictures):
    shared = {"border": 2, "max_epochs": 1}
    assert Reprogrammer(source, **shared).fit(*pictures).net_.lr == 0.1
    assert Reprogrammer(towers, tokenizer=tokenizer, **shared).fit(*pictures).net_.lr == 0.03


def test_mapping_without_epochs_is_that_of_the_plain_pictures(source, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(source, mapping="flm", **parameters | {"max_epochs": 0}).fit(X, y)
    labels = model.transform(X).argmax(1)
    counts = np.array(
        [[np.sum((labels == s) & (y == c)) for c in model.classes_] for s in range(7)]
    )
    chosen = model.label_mapping_.argmax(0)
    assert (model.label_mapping_.sum(0) == 1).all()
    assert counts[chosen, range(3)].max() == counts.max()


def test_refreshed_mapping_follows_the_program(source, pictures, parameters):
    X, y = pictures
    start = Reprogrammer(source, **parameters | {"max_epochs": 0}).fit(X, y)
    end = Reprogrammer(source, **parameters | {"lr": 0.5, "max_epochs": 10}).fit(X, y)
    assert not np.allclose(start.label_mapping_, end.label_mapping_)
    np.testing.assert_allclose(end.label_mapping_.sum(0), 1, rtol=1e-5)


def test_more_classes_than_source_labels(source, parameters):
    X = np.random.RandomState(0).rand(90, 3, 12, 12).astype(np.float32)
    y = np.arange(90) % 9
    model = Reprogrammer(source, **parameters).fit(X, y)
    assert model.predict_proba(X).shape == (90, 9)
    with pytest.raises(ValueError, match="needs 9 source labels for 9 classes; the encoder has 7"):
        Reprogrammer(source, mapping="ilm", **parameters).fit(X, y)


def test_given_mapping_is_used(source, pictures, parameters):
    X, y = pictures
    mapping = np.eye(7)[:, [4, 2, 0]]
    model = Reprogrammer(source, mapping=mapping, **parameters).fit(X, y)
    np.testing.assert_array_equal(model.label_mapping_, mapping)


def test_features_get_a_linear_head(source, pictures, parameters):
    X, y = pictures
    model = Reprogrammer(source[:5], **parameters | {"max_epochs": 20}).fit(X, y)
    assert model.label_mapping_ is None
    assert model.score(X, y) > 0.9
    with torch.no_grad():
        logits = model.to_module()(torch.tensor(X)).numpy()
    np.testing.assert_allclose(logits, model.decision_function(X), atol=1e-4)


@pytest.mark.parametrize("gradient", ["rge", "spsa"])
@pytest.mark.filterwarnings("ignore:ood_retention")
def test_black_box_learns_within_its_budget(source, pictures, parameters, gradient):
    X, y = pictures
    asked = []
    network = source.eval()

    def scores(images):
        assert isinstance(images, np.ndarray)
        asked.append(len(images))
        with torch.no_grad():
            return network(torch.tensor(images)).numpy()

    parameters |= {"gradient": gradient, "n_directions": 10, "smoothing": 0.05, "lr": 0.2}
    parameters |= {"max_epochs": 500, "mapping": "flm", "query_budget": 30_000}
    model = Reprogrammer(scores, **parameters).fit(X, y)
    assert model.n_queries_ == sum(asked) <= 30_000
    assert model.n_queries_ > 25_000
    losses = model.history_[:-1, "train_loss"]
    assert losses[-1] < 0.96 * losses[0]
    assert model.predict(X).shape == (120,)


def test_estimated_gradient_follows_the_exact_one(source, pictures, parameters):
    """One full-batch step with many directions goes where the exact gradient points."""
    X, y = pictures
    shared = parameters | {"max_epochs": 1, "batch_size": 200, "mapping": np.eye(7)[:, :3]}
    shared |= {"validation_fraction": 0.0, "schedule": "constant"}
    shared |= {"net_params": {"optimizer": torch.optim.SGD, "optimizer__weight_decay": 0.0}}
    exact = Reprogrammer(source, **shared | {"lr": 1.0}).fit(X, y)
    more = {"gradient": "spsa", "n_directions": 600, "smoothing": 1e-2, "lr": 1.0}
    estimated = Reprogrammer(source, **shared | more).fit(X, y)
    a, b = np.ravel(exact.program_), np.ravel(estimated.program_)
    assert np.corrcoef(a, b)[0, 1] > 0.8


def test_budget_too_small_for_one_step(source, pictures, parameters):
    parameters |= {"gradient": "spsa", "query_budget": 100}
    with pytest.raises(ValueError, match="query_budget=100 is spent before the first step"):
        Reprogrammer(source, **parameters).fit(*pictures)


@pytest.mark.parametrize("mapping", ["ilm", "blm+"])
def test_refreshed_mapping_without_a_border_counts_known_outputs(
    source, pictures, parameters, mapping
):
    X, y = pictures
    parameters |= {"border": 0, "mapping": mapping, "max_epochs": 2}
    model = Reprogrammer(source, **parameters).fit(X, y)
    plain = Reprogrammer(source, **parameters | {"max_epochs": 0}).fit(X, y)
    np.testing.assert_allclose(model.label_mapping_, plain.label_mapping_, atol=1e-6)


@pytest.mark.filterwarnings("ignore:ood_retention|The number of unique classes:UserWarning")
def test_many_classes_of_one_row_each_leave_rows_to_compare_heads(towers, tokenizer, monkeypatch):
    monkeypatch.setattr("skperf.reprogramming._training.MOST_WORK", 0)
    monkeypatch.setattr("skperf.reprogramming._training.MOST_CROSS_FITTED", 3)
    words = ["cat", "dog", "bird", "fish", "horse", "zebra", "quux"]
    X = np.random.RandomState(0).uniform(0, 1, (7, 3, 12, 12)).astype(np.float32)
    options = {"tokenizer": tokenizer, "border": 2, "max_epochs": 1, "random_state": 0}
    model = Reprogrammer(towers, **options).fit(X, words)
    assert sorted(model.classes_) == sorted(words)
    assert np.isfinite(model.predict_proba(X)).all()


def test_votes_in_pieces_are_those_of_the_whole_table():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(700, 5, generator=generator, dtype=torch.double)
    keys = keys / keys.norm(dim=1, keepdim=True)
    votes = torch.rand(700, 3, generator=generator, dtype=torch.double)
    table = torch.exp(2.5 * (keys @ keys.T - 1))
    torch.testing.assert_close(voted(keys, keys, votes, 2.5), table @ votes)
    table.fill_diagonal_(0)
    torch.testing.assert_close(voted(keys, keys, votes, 2.5, torch.arange(700)), table @ votes)


def test_a_head_is_rebuilt_from_what_it_tells_of_itself():
    generator = torch.Generator().manual_seed(0)
    outputs, texts = (torch.randn(n, 5, generator=generator) for n in (12, 3))
    weight = torch.linspace(0.5, 2, 12)
    cached = Cached(outputs, torch.arange(12) % 3, weight, 3, zero_shot=texts, scale=2.0, bias=0.5)
    head = Cache(cached, weight=0.7, sharpness=3.0)
    again = rebuilt(head.describe(), dict(head.state_dict()))
    asked = torch.randn(4, 5, generator=generator)
    assert torch.equal(again(asked), head(asked))
    near = nn.functional.cosine_similarity(asked[:, None], outputs[None], dim=2)
    votes = nn.functional.one_hot(cached.codes, 3) * (weight / weight.mean())[:, None]
    expected = 2.0 * asked @ texts.T + 0.5 + 0.7 * torch.exp(3.0 * (near - 1)) @ votes
    torch.testing.assert_close(head(asked), expected)


def test_attributes_take_one_prompt_a_class_and_say_when_there_are_too_many():
    texts = torch.eye(3, 5)
    outputs, codes = torch.eye(3, 5)[[0, 1, 2, 0]] + 0.1, torch.tensor([0, 1, 2, 0])
    cached = Cached(outputs, codes, torch.ones(4), 3, texts, texts, torch.arange(3), 2.0)
    torch.testing.assert_close(Attributes(cached, 1)(outputs), 2.0 * outputs @ texts.T)
    with pytest.raises(ValueError, match="head='attributes': there are too many prompts"):
        Attributes(Cached(outputs, codes, torch.ones(4), 3, texts), 1)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1, 1, 9, 9], False), ([1, 1, 1, 9, 9], True), ([2, 2, 0, 0, 9], True), ([3, 3, 3], False)],
)
def test_rows_are_few_where_most_classes_have_one_or_two(sizes, expected):
    codes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert few_rows(codes, 2) is expected
