"""Masks of token ids, and forwards of the user under a readout."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone import network as module_of
from skperf.backbone.network import (
    Field,
    Network,
    WithReadout,
    _mask_maker,
    _names_of,
    _only_inputs,
    check_device,
    logits_of_shares,
)
from skperf.backbone.rows import Rows


class Reads(nn.Module):
    """Takes token ids and a mask, with or without a config."""

    def __init__(self, **config):
        super().__init__()
        if config:
            self.config = SimpleNamespace(**config)

    def forward(self, input_ids, attention_mask=None):
        return input_ids


IDS = torch.tensor([[5, 6, 0], [7, 0, 0]])


def test_padding_is_masked_by_the_id_of_the_config():
    for config in ({"pad_token_id": 0}, {"text_config": SimpleNamespace(pad_token_id=0)}):
        masked = _mask_maker(Reads(**config))(Rows(IDS)).tree
        assert torch.equal(masked["input_ids"], IDS)
        assert masked["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert _mask_maker(Reads()) is None
    assert _mask_maker(nn.Linear(2, 2)) is None


def test_an_id_that_may_be_padding_or_not_is_asked_about():
    with pytest.raises(ValueError, match="both padding and the end of a text"):
        _mask_maker(Reads(pad_token_id=0, eos_token_id=[3, 0]))(Rows(IDS))
    with pytest.raises(ValueError, match="names no pad_token_id"):
        _mask_maker(Reads(vocab_size=9))(Rows(IDS))
    whole = _mask_maker(Reads(vocab_size=9))(Rows(torch.tensor([[1, 2], [3, 4]]))).tree
    assert whole["attention_mask"].tolist() == [[1, 1], [1, 1]]


def test_masks_of_the_user_and_numbers_stay():
    mask = _mask_maker(Reads(pad_token_id=0))
    own = Rows({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert mask(own) is own
    numbers = Rows(torch.ones(2, 3))
    assert mask(numbers) is numbers


def test_a_forward_of_the_user_gets_the_rows_as_they_were_given():
    seen = []
    wrapped = WithReadout(nn.Linear(3, 2), None, lambda module, tree: seen.append(tree))
    one, two = torch.ones(2, 3), torch.zeros(2, 3)
    wrapped(one)
    wrapped(one, two)
    wrapped(table=one)
    assert seen[0] is one
    assert isinstance(seen[1], tuple)
    assert [seen[1][0] is one, seen[1][1] is two] == [True, True]
    assert seen[2]["table"] is one
    halved = WithReadout(nn.Identity(), lambda outputs: outputs / 2)
    assert torch.equal(halved(one), one / 2)


class Adds(nn.Module):
    def forward(self, *parts):
        return sum(parts)


def test_names_of_inputs_are_those_by_position():
    assert _names_of(lambda self, a, b=None, *, c: 0, True) == (("a", "b"), ("a", "b", "c"))
    assert _names_of(lambda a, b=None, *, c: 0, False) == (("a", "b"), ("a", "b", "c"))
    assert _names_of(lambda self, *parts, c: 0, True) == (None, ("parts", "c"))
    assert _names_of(lambda me, a, **more: 0, True) == (None, ("a", "more"))
    assert Network(Adds(), None).inputs((np.ones((2, 3)), np.ones((2, 3)))).tree[1].shape == (2, 3)


def test_inputs_that_a_forward_does_not_take_are_refused_by_name():
    one = torch.ones(2, 3)
    rows = Rows({"a": one, "c": one})
    assert _only_inputs(rows, (("a", "b"), ("a", "b", "c"))) is rows  # c by keyword
    assert _only_inputs(rows, (None, ())) is rows
    with pytest.raises(ValueError, match=r"inputs named \['c'\]"):
        _only_inputs(rows, (("a", "b"), ("a", "b")))
    pair = Rows((one, one))
    assert _only_inputs(pair, (("a", "b"), ("a", "b"))) is pair
    with pytest.raises(ValueError, match="takes 1"):
        _only_inputs(pair, (("a",), ("a", "b")))


def test_rows_beyond_the_type_are_refused_and_infinite_ones_are_not_blamed_on_it():
    network = Network(nn.Linear(2, 1), None)
    with pytest.raises(ValueError, match=r"X holds values up to 1e\+300"):
        network.inputs(np.array([[1.0, 1e300]]))
    assert torch.isinf(network.inputs(np.array([[1.0, np.inf]])).array[0, 1])
    assert network.inputs(np.array([[1.0, 1e30]])).array[0, 1] == np.float32(1e30)


def test_large_rows_are_brought_a_batch_at_a_time(monkeypatch):
    network = Network(nn.Linear(2, 1), None)
    X = Rows(np.arange(14, dtype=np.float32).reshape(7, 2))
    assert [len(rows) for rows in network._brought(X, 3)] == [7]
    monkeypatch.setattr(module_of, "_BROUGHT_OVER", 1)
    brought = [*network._brought(X, 3)]
    assert [len(rows) for rows in brought] == [3, 3, 1]
    np.testing.assert_array_equal(torch.cat([rows.array for rows in brought]), X.array)
    monkeypatch.setattr(module_of, "_BROUGHT_OVER", 2 * 3 * 8)
    assert [len(rows) for rows in network._brought(X, 3)] == [6, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_certain_shares_are_finite(dtype):
    shares = torch.tensor([[0.3, 0.0, 1.0, 0.75]], dtype=dtype)
    found = logits_of_shares(shares)
    assert torch.isfinite(found).all()
    expected = torch.tensor([np.log(0.3 / 0.7), np.log(3)], dtype=dtype)
    torch.testing.assert_close(found[0, [0, 3]], expected)
    assert found[0, 1] < -50
    assert found[0, 2] == pytest.approx(24 * np.log(2), rel=1e-6)


def test_targets_that_are_no_classes_are_numbers():
    network = Network(nn.Linear(2, 1).double(), None, loss=module_of.LOSSES["squared_error"])
    found = network.targets([1, 2.5])
    assert found.dtype == torch.float64
    assert found.tolist() == [1, 2.5]
    with pytest.raises(ValueError, match="y must hold numbers"):
        network.targets(["a", "b"])


@pytest.mark.parametrize("kind", ["record", "dict", "tuple"])
def test_a_field_is_read_off_a_record_a_dictionary_or_a_tuple(kind):
    wanted, other = torch.ones(2), torch.zeros(2)
    returned, key = {
        "record": (SimpleNamespace(scores=wanted, other=other), "scores"),
        "dict": ({"scores": wanted, "other": other}, "scores"),
        "tuple": ((other, wanted), 1),
    }[kind]
    assert Field(key)(returned) is wanted


def test_devices_are_tried_before_anything_else():
    check_device(None)
    check_device("cpu")
    check_device(torch.device("cpu"))
    for wrong in ("gpu", "cpu:zero", 3.5, *([] if torch.cuda.is_available() else ["cuda"])):
        with pytest.raises(ValueError, match=f"device={wrong!r} can't be computed on"):
            check_device(wrong)
