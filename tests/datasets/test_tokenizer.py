import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from skperf.datasets import load_text_image_encoder
from skperf.datasets._tokenizer import WordPieceTokenizer, words_of

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIECES = ["[padding]", "[start]", *LETTERS, *(f"##{each}" for each in LETTERS), "cat", "##fish"]


@pytest.fixture(scope="module")
def tokenizer():
    return WordPieceTokenizer(PIECES, context_length=12)


@pytest.fixture(scope="module")
def shipped():
    return load_text_image_encoder()[1]


def test_longest_pieces_are_taken(tokenizer):
    ids = tokenizer.encode("catfish")
    assert [PIECES[code] for code in ids] == ["[start]", "cat", "##fish"]
    assert [PIECES[code] for code in tokenizer.encode("a cap")] == [
        "[start]",
        "a",
        "c",
        "##a",
        "##p",
    ]


def test_rows_are_padded_with_zeros(tokenizer):
    ids = tokenizer(["cat", ""])
    assert ids.dtype == torch.int64
    assert ids.shape == (2, 12)
    assert ids[0].tolist() == [1, PIECES.index("cat"), *[0] * 10]
    assert ids[1].tolist() == [1, *[0] * 11]


def test_one_text_is_a_batch_of_one(tokenizer):
    assert tokenizer("cat", 4).tolist() == tokenizer(["cat"], context_length=4).tolist()


def test_too_long_a_text_is_refused(tokenizer):
    with pytest.raises(ValueError, match="has 5 tokens, more than 4"):
        tokenizer(["dogs"], context_length=4)


@given(text=st.text(max_size=40))
def test_any_text_survives_the_round_trip(shipped, text):
    pieces = [shipped.pieces[code] for code in shipped.encode(text)[1:]]
    assert " ".join(pieces).replace(" ##", "") == " ".join(words_of(text))


def test_accents_case_and_punctuation_do_not_matter(shipped):
    assert shipped.encode("CAFÉ, t-shirt!") == shipped.encode("cafe t shirt")


def test_common_class_names_are_whole_tokens(shipped):
    for name in ("trouser", "pullover", "dress", "sneaker", "cat", "seven", "food", "photo"):
        assert len(shipped.encode(name)) == 2
