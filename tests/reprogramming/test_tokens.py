"""Tokenizers of one's own: what they may return, and what is refused."""

import pytest
import torch

from skperf.reprogramming.tokens import tokens_for

IDS = [[1, 4, 2, 0], [1, 5, 6, 2]]
MASK = [[1, 1, 1, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("length", [None, 7])
def test_a_function_may_return_ids_or_a_dict_with_their_mask(length):
    plain = tokens_for(lambda texts: IDS, length)(["a", "b"])
    assert plain.ids.tolist() == IDS
    assert plain.mask is None
    named = tokens_for(lambda texts: {"input_ids": IDS, "attention_mask": MASK}, length)(["a", "b"])
    assert named.ids.tolist() == IDS
    assert named.mask.tolist() == MASK
    assert named.mask.dtype == torch.int64


@pytest.mark.parametrize("returned", [{"ids": IDS}, [[1, 2], [1, 3, 2]], None])
def test_what_is_no_table_of_ids_is_refused(returned):
    with pytest.raises(ValueError, match=r"tokenizer returned a \w+; expected ids .* Does it pad"):
        tokens_for(lambda texts: returned, 7)(["a", "b"])


def test_a_tower_that_reads_its_last_place_wants_texts_of_full_length():
    def tokenizer(texts):
        return torch.ones(len(texts), 6, dtype=torch.long)

    assert tokens_for(tokenizer, 6, True, True)(["a"]).ids.shape == (1, 6)
    with pytest.raises(ValueError, match=r"6 tokens a text.*the last of 9: let it pad"):
        tokens_for(tokenizer, 9, True, True)(["a"])
