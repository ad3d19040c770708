"""Tables, series and tokens on encoders of signals, pictures and texts."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from skperf import Reprogrammer
from skperf.reprogramming.programs import ImageProgram
from skperf.reprogramming.rows import (
    RowPicture,
    RowProgram,
    SignalProgram,
    Spectrogram,
    TokenProgram,
)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    rows = np.random.RandomState(0).permutation(len(X))[:260]
    return X[rows] * 3 - 7, y[rows] % 4


@pytest.fixture
def filters():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(2, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool1d(5), nn.Flatten()
    )


class Words(nn.Module):
    """Mean of token vectors, padding left out."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.last = nn.Linear(6, 12)

    def forward(self, ids):
        known = (ids > 0).float()[..., None]
        return (self.last(self.table(ids)).tanh() * known).sum(1) / known.sum(1)


class Bags(nn.Module):
    """The same from vectors in place of ids."""

    def __init__(self, words):
        super().__init__()
        self.last = words.last

    def forward(self, vectors, known):
        return (self.last(vectors).tanh() * known).sum(1) / known.sum(1)


def test_row_program_flattens_and_shifts():
    program = RowProgram((6,))
    rows, weights = torch.randn(4, 2, 3), torch.randn(6)
    assert program.place(rows).shape == (4, 6)
    expected = torch.stack([row.flatten() + weights for row in rows])
    torch.testing.assert_close(program.add(program.place(rows), weights), expected)


@pytest.mark.parametrize("length", [3, 5, 7])
def test_token_program_shifts_the_first_places_of_texts_of_any_length(length):
    program, weights = TokenProgram((5,), 2), torch.randn(5, 2)
    ids = torch.randint(9, (4, length))
    found = program.add(program.place(ids), weights)
    assert found.shape == (4, length, 3)
    assert torch.equal(found[..., 2], ids.float())
    for place in range(length):
        shift = weights[place] if place < 5 else torch.zeros(2)
        torch.testing.assert_close(found[:, place, :2], shift.expand(4, 2))


def test_signal_program_pads_standardised_signals_by_hand():
    signals = np.random.RandomState(0).normal(3, 2, (4, 10))
    program = SignalProgram(2, (16,), 3, torch.tensor(3.0), torch.tensor(2.0), layout="pad")
    weights = torch.arange(12.0).view(2, 6) / 10
    seen = program.add(program.place(torch.as_tensor(signals)), weights).numpy()
    assert seen.shape == (4, 2, 16)
    np.testing.assert_allclose(seen[:, 1, 3:13], (signals - 3) / 2, rtol=1e-6)
    ends = np.tanh(weights.numpy())
    np.testing.assert_allclose(seen[2, 0, :3], ends[0, :3], rtol=1e-6)
    np.testing.assert_allclose(seen[2, 1, 13:], ends[1, 3:], rtol=1e-6)


def test_row_picture_draws_each_column_from_lowest_to_highest():
    rows = torch.tensor([[0.0, 10, 5, 1, 7], [2, 30, 5, 3, 8]])
    drawn = RowPicture(rows.amin(0), rows.amax(0))(torch.cat([rows, rows.mean(0)[None]]))
    assert drawn.shape == (3, 1, 2, 3)
    expected = [[0, 0, 0, 0, 0, 0], [1, 1, 0, 1, 1, 0], [0.5, 0.5, 0, 0.5, 0.5, 0]]
    torch.testing.assert_close(drawn.flatten(1), torch.tensor(expected))


def test_spectrogram_is_brightest_at_the_frequency_of_a_tone():
    time = torch.arange(256)
    tones = torch.stack([torch.sin(2 * np.pi * time * k / 32) for k in (2, 5, 11)])
    drawn = Spectrogram.of(tones)(tones)
    n_bins = drawn.shape[2]
    brightest = n_bins - 1 - drawn[:, 0, :, drawn.shape[3] // 2].argmax(1)
    assert brightest.tolist() == [2, 5, 11]
    with pytest.raises(ValueError, match="at least 8"):
        Spectrogram.of(tones[:, :5])


@pytest.mark.parametrize("rows", ["table", "series"])
@pytest.mark.parametrize("layout", ["overlay", "pad"])
def test_numbers_on_an_encoder_of_signals(rows, layout, digits, filters):
    X, y = digits
    before = {name: tensor.clone() for name, tensor in filters.state_dict().items()}
    model = Reprogrammer(filters, rows=rows, layout=layout, border=6, max_epochs=4, random_state=0)
    model = clone(model).fit(X[:200], y[:200])
    assert model.score(X[200:], y[200:]) > 0.5  # four classes
    assert model.program_.shape == (2, 64)
    assert np.abs(model.program_).max() > 0
    assert not model.program_[:, 6:-6].any()
    twin = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(twin.predict_proba(X[:9]), model.predict_proba(X[:9]))
    logits = model.to_module()(torch.as_tensor(X[:9])).detach().numpy()
    np.testing.assert_allclose(logits, model.decision_function(X[:9]), atol=1e-4)
    for name, tensor in filters.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ValueError, match=r"rows='(table|series)'.*pickle"):
        model.save_program("nowhere.safetensors")


def test_series_of_several_channels_equal_flat_ones_of_that_shape(digits, filters):
    X, y = digits
    options = {"rows": "series", "border": 2, "max_epochs": 2, "random_state": 0}
    deep = Reprogrammer(filters, **options).fit(X.reshape(-1, 2, 32), y)
    flat = Reprogrammer(filters, image_shape=(2, 32), **options).fit(X, y)
    np.testing.assert_array_equal(
        deep.predict_proba(X[:9].reshape(-1, 2, 32)), flat.predict_proba(X[:9])
    )
    with pytest.raises(ValueError, match="4 channels; the encoder takes 2"):
        Reprogrammer(filters, **options).fit(X.reshape(-1, 4, 16), y)


@pytest.mark.parametrize("rows", ["table", "series", "spectrogram"])
def test_numbers_on_a_text_image_encoder(rows, digits, towers, parameters):
    X, y = digits
    names = ["cat", "dog", "bird", "fish"]
    model = Reprogrammer(towers, rows=rows, class_names=names, **parameters).fit(X[:160], y[:160])
    assert model.score(X[160:], y[160:]) > 0.4
    seen = model.reprogram(X[:3])
    assert seen.shape == (3, 3, 12, 12)
    front = model._task.program.front
    plain = ImageProgram(3, (12, 12), 2, pipeline=model._task.program.pipeline)
    placed = plain.place(front(torch.as_tensor(X[:3])))
    expected = (placed.numpy() + model.program_).clip(0, 1)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_token_program_shifts_the_embeddings_of_an_encoder_of_texts():
    torch.manual_seed(0)
    words, draw = Words().eval(), np.random.RandomState(0)
    ids = draw.randint(1, 50, (150, 7))
    ids[draw.rand(150) < 0.5, 5:] = 0
    y = (ids < 20).sum(1) > 2
    model = Reprogrammer(words, rows="tokens", max_epochs=5, random_state=0, head="linear")
    model.fit(ids, y)
    assert model.score(ids, y) > 0.7
    assert model.program_.shape == (7, 6)
    # shorter texts than those of the fit, by vectors that are shifted by hand
    short = torch.as_tensor(ids[:20, :4])
    vectors = words.table(short) + torch.as_tensor(model.program_)[:4]
    expected = Bags(words)(vectors, (short > 0).float()[..., None]).detach().numpy()
    np.testing.assert_allclose(model.transform(ids[:20, :4]), expected, atol=1e-5)
    with pytest.raises(ValueError, match="token ids are expected"):
        model.predict(ids / 2)


def test_token_program_takes_texts_and_masks_padding_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    bert = transformers.BertModel(config).eval()
    ids = np.random.RandomState(0).randint(5, 40, (60, 6))
    y = (ids[:, 0] < 20).astype(int)
    model = Reprogrammer(bert, rows="tokens", max_epochs=0, random_state=0).fit(ids, y)
    padded = np.hstack([ids, np.zeros((60, 3), int)])
    with torch.no_grad():
        expected = bert(torch.as_tensor(ids)).pooler_output.numpy()
    np.testing.assert_allclose(model.transform(padded), expected, atol=1e-5)


def test_texts_are_tokenized(towers, tokenizer):
    texts = [f"a photo of a {w}" for w in ("cat", "dog", "bird", "fish", "horse")] * 6
    texts += [f"red {w} drawing" for w in ("cat", "dog", "bird", "fish", "horse")] * 6
    y = np.repeat(["photo", "drawing"], 30)
    options = {"rows": "tokens", "max_epochs": 3, "random_state": 0}
    model = Reprogrammer(towers, tokenizer=tokenizer, **options).fit(texts, y)
    assert model.score(texts, y) == 1
    with pytest.raises(ValueError, match="give tokenizer="):
        Reprogrammer(towers, **options).fit(texts, y)


def test_what_rows_cannot_be_is_refused(digits, filters):
    X, y = digits
    with pytest.raises(ValueError, match="neither that it takes signals nor"):
        Reprogrammer(nn.Sequential(nn.Flatten(), nn.Linear(64, 4)), rows="table").fit(X, y)
    with pytest.raises(TypeError, match="no token embedding"):
        Reprogrammer(filters, rows="tokens").fit(X.astype(int).clip(0), y)
    with pytest.raises(ValueError, match="layout='mask' is for pictures"):
        Reprogrammer(filters, rows="series", layout="mask").fit(X, y)
    with pytest.raises(ValueError, match="at most 31"):
        Reprogrammer(filters, rows="series", border=40).fit(X, y)
    broken = X.reshape(-1, 2, 32).copy()
    broken[3, 1, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        Reprogrammer(filters, rows="series").fit(broken, y)


def test_token_program_ends_with_the_ids():
    placed = TokenProgram((4,), 3).place(torch.tensor([[7, 2, 9]]))
    assert placed.shape == (1, 3, 4)
    assert placed[0, :, -1].tolist() == [7, 2, 9]
    assert not placed[..., :-1].any()
    assert functional.pad(placed, (0, 0)).shape == placed.shape


def test_the_range_of_a_spectrogram_is_chosen_by_256_signals():
    signals = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    louder = signals.clone()
    louder[256:] *= 100
    assert Spectrogram.of(louder) == Spectrogram.of(signals)
    louder[255] *= 100
    assert Spectrogram.of(louder).high > Spectrogram.of(signals).high + 1


def test_a_column_that_was_constant_is_drawn_in_its_own_units():
    picture = RowPicture(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 4.0]))
    drawn = picture(torch.tensor([[1.25, 1.0], [0.5, 3.0]]))
    torch.testing.assert_close(drawn.flatten(1)[:, :2], torch.tensor([[0.25, 0.25], [0, 0.75]]))


def test_series_without_a_border_go_by_their_features(digits, filters):
    X, y = digits
    options = {"rows": "series", "max_epochs": 2, "random_state": 0}
    model = Reprogrammer(filters, border=0, **options).fit(X, y)
    assert not model.program_.any()
    with torch.no_grad():
        signals = torch.as_tensor((X - X.mean()) / X.std())[:, None].float().expand(-1, 2, -1)
        expected = filters(signals).flatten(1).numpy()
    np.testing.assert_allclose(model.transform(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [list, tuple, "object"])
def test_rows_of_several_lengths_and_names_of_files_are_refused(digits, filters, kind):
    X, y = digits
    make = kind if kind != "object" else lambda rows: np.array([*rows, None], dtype=object)[:-1]
    uneven = make([row[: 20 + i % 3] for i, row in enumerate(X)])
    with pytest.raises(ValueError, match=r"different shapes, \(20,\) and \(22,\).*cut or pad"):
        Reprogrammer(filters, rows="series").fit(uneven, y)
    with pytest.raises(ValueError, match=r"holds a str where a picture.*open files first"):
        Reprogrammer(filters).fit(make([f"{i}.png" for i in range(len(y))]), y)


def test_tokens_of_another_vocabulary_and_of_several_lengths_are_refused():
    ids, y = np.arange(24).reshape(8, 3) % 7, np.arange(8) % 2
    model = Reprogrammer(Words(), rows="tokens", max_epochs=1)
    with pytest.raises(ValueError, match=r"token id 99, but the encoder knows \d+ tokens"):
        model.fit(np.where(ids == 6, 99, ids), y)
    with pytest.raises(ValueError, match=r"different shapes, \(2,\) and \(3,\).*cut or pad"):
        model.fit([row[: 2 + i % 2].tolist() for i, row in enumerate(ids)], y)
