"""Tokenizers of every kind as functions from texts to ids; too long a text is refused."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TransformersTokens:
    """Token ids from a transformers tokenizer."""

    tokenizer: Any
    length: int
    fill: bool

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokenize: -> (n_texts, n_tokens)."""
        ids = self.tokenizer(texts, padding="longest", return_tensors="pt")["input_ids"]
        if ids.shape[1] > self.length:
            raise _too_long(max(texts, key=len), ids.shape[1], self.length)
        if self.fill:
            padding = {"padding": "max_length", "max_length": self.length}
            ids = self.tokenizer(texts, **padding, return_tensors="pt")["input_ids"]
        return torch.as_tensor(ids)


@dataclass(frozen=True, eq=False)
class PlainTokens:
    """Token ids from a function of a list of texts, such as open_clip's tokenizers."""

    tokenizer: Any
    length: int | None

    def __call__(self, texts: list[str]) -> Tensor:
        """Tokenize: -> (n_texts, n_tokens)."""
        ids = torch.as_tensor(self.tokenizer(texts)).long()
        if self.length is None:
            return ids
        if ids.shape[1] > self.length:
            raise _too_long(max(texts, key=len), ids.shape[1], self.length)
        if "context_length" in inspect.signature(self.tokenizer).parameters:
            # open_clip cuts long texts without a word; one more place would change the cut
            longer = torch.as_tensor(self.tokenizer(texts, context_length=ids.shape[1] + 1))
            cut = (longer[:, :-1] != ids).any(1)
            if bool(cut.any()):
                text = texts[int(cut.int().argmax())]
                raise _too_long(text, ids.shape[1] + 1, self.length)
        return ids


def tokens_for(tokenizer: Any, length: int | None) -> Callable[[list[str]], Tensor]:
    """Find out how a tokenizer is to be called."""
    if hasattr(tokenizer, "batch_encode_plus") or hasattr(tokenizer, "convert_ids_to_tokens"):
        return TransformersTokens(tokenizer, length or 77, fill=True)
    return PlainTokens(tokenizer, length)


def _too_long(text: str, needed: int, length: int) -> ValueError:
    return ValueError(
        f"the prompt {text!r} needs {needed} tokens or more; the text tower takes {length}."
    )
