"""Tokenizers of every kind as functions from texts to ids and masks; too long a text is refused."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of some texts and, where the tokenizer gives one, which are not padding."""

    ids: Tensor  # (n, length)
    mask: Tensor | None = None  # (n, length)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Any) -> "Tokens":
        return Tokens(self.ids[rows], None if self.mask is None else self.mask[rows])

    def to(self, device: torch.device) -> "Tokens":
        """Move both: -> the same shapes."""
        return Tokens(self.ids.to(device), None if self.mask is None else self.mask.to(device))


@dataclass(frozen=True, eq=False)
class TransformersTokens:
    """Token ids from a transformers tokenizer, with the mask that it gives for its model."""

    tokenizer: Any
    length: int
    fill: bool

    def __call__(self, texts: list[str]) -> Tokens:
        """Tokenize: -> (n_texts, n_tokens)."""
        encoded = self.tokenizer(texts, padding="longest", return_tensors="pt")
        needed = encoded["input_ids"].shape[1]
        if needed > self.length:
            raise _too_long(max(texts, key=len), needed, self.length)
        if self.fill:
            padding = {"padding": "max_length", "max_length": self.length}
            encoded = self.tokenizer(texts, **padding, return_tensors="pt")
        mask = encoded.get("attention_mask")
        return Tokens(torch.as_tensor(encoded["input_ids"]), mask)


@dataclass(frozen=True, eq=False)
class PlainTokens:
    """Token ids from a function of a list of texts, such as open_clip's tokenizers."""

    tokenizer: Any
    length: int | None
    whole: bool = False  # whether the tower reads the last of all its places

    def __call__(self, texts: list[str]) -> Tokens:
        """Tokenize: -> (n_texts, n_tokens)."""
        returned = self.tokenizer(texts)
        named = returned if isinstance(returned, Mapping) else {"input_ids": returned}
        try:
            ids = torch.as_tensor(named["input_ids"]).long()
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"tokenizer returned a {type(returned).__name__}; expected ids (n_texts, length), "
                "or a dict with such 'input_ids'. Does it pad?"
            ) from error
        mask = named.get("attention_mask")
        if mask is not None:
            mask = torch.as_tensor(mask)
        if self.length is None:
            return Tokens(ids, mask)
        if ids.shape[1] > self.length:
            raise _too_long(max(texts, key=len), ids.shape[1], self.length)
        if self.whole and ids.shape[1] < self.length:
            raise ValueError(
                f"tokenizer gives {ids.shape[1]} tokens a text, but the text tower reads the last "
                f"of {self.length}: let it pad to that length."
            )
        if "context_length" in inspect.signature(self.tokenizer).parameters:
            # open_clip cuts long texts without a word; one more place would change the cut
            longer = torch.as_tensor(self.tokenizer(texts, context_length=ids.shape[1] + 1))
            cut = (longer[:, :-1] != ids).any(1)
            if bool(cut.any()):
                text = texts[int(cut.int().argmax())]
                raise _too_long(text, ids.shape[1] + 1, self.length)
        return Tokens(ids, mask)


def tokens_for(
    tokenizer: Any, length: int | None, fill: bool = True, whole: bool = False
) -> Callable[[list[str]], Tokens]:
    """Find out how a tokenizer is to be called."""
    if hasattr(tokenizer, "batch_encode_plus") or hasattr(tokenizer, "convert_ids_to_tokens"):
        most = getattr(tokenizer, "model_max_length", None) or length or 77
        return TransformersTokens(tokenizer, min(length or 77, most), fill=fill)
    return PlainTokens(tokenizer, length, whole)


def _too_long(text: str, needed: int, length: int) -> ValueError:
    return ValueError(
        f"the prompt {text!r} needs {needed} tokens or more; the text tower takes {length}."
    )
