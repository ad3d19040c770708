"""Masks of token ids, and forwards of the user under a readout."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from skperf.backbone.network import WithReadout, _mask_maker
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
