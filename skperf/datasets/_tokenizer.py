"""The tokenizer of the shipped text-image encoder."""

import re
import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

PADDING, START = 0, 1
CONTINUED = "##"


class WordPieceTokenizer:
    """Cut texts into the longest known pieces of their words."""

    # Texts are lower-cased and stripped of accents; only the letters a-z and digits count, all
    # else separates words. Every letter and digit is a piece, so no text is unknown.

    def __init__(self, pieces: Sequence[str], context_length: int = 24) -> None:
        self.pieces = list(pieces)
        self.context_length = context_length
        self._ids = {piece: code for code, piece in enumerate(self.pieces)}
        self._longest = max(map(len, self.pieces))

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenize texts: -> (n, context_length)."""
        texts = [texts] if isinstance(texts, str) else texts
        length = self.context_length if context_length is None else context_length
        rows = torch.full((len(texts), length), PADDING)
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > length:
                raise ValueError(f"{text!r} has {len(ids)} tokens, more than {length}")
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without padding."""
        return [START, *(code for word in words_of(text) for code in self._pieces_of(word))]

    def _pieces_of(self, word: str) -> list[int]:
        codes: list[int] = []
        start = 0
        while start < len(word):
            prefix = CONTINUED if start else ""
            stop = min(len(word), start + self._longest)
            while prefix + word[start:stop] not in self._ids:
                stop -= 1
            codes.append(self._ids[prefix + word[start:stop]])
            start = stop
        return codes


def words_of(text: str) -> list[str]:
    """Return the lower-case words of a text without accents and punctuation."""
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.findall(r"[a-z0-9]+", plain)
