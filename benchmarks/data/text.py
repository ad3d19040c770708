"""Vectors of texts from fetched models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from benchmarks.data.fetched import fetched_path


@dataclass(frozen=True)
class WordVectors:
    """Static vectors of word pieces, with their tokenizer."""

    vectors: np.ndarray  # (32000, 256)
    tokenizer: Any

    def encode(self, texts: Sequence[str], length: int = 128) -> np.ndarray:
        """Return token ids, cut or filled with zeros to one length: -> (n, length)."""
        rows = np.zeros((len(texts), length), np.int64)
        encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = encoding.ids[:length]
            row[: len(ids)] = ids
        return rows

    def embed(self, texts: Sequence[str], length: int = 512) -> np.ndarray:
        """Return the mean vector of the tokens of each text: -> (n, 256)."""
        ids = self.encode(texts, length)
        return np.stack(
            [self.vectors[row[row > 0]].sum(0) / max((row > 0).sum(), 1) for row in ids]
        )


def fetch_wordllama() -> WordVectors:
    """Load wordllama's static token vectors (MIT licence); needs the package tokenizers.

    Returns
    -------
    WordVectors
        Vectors and tokenizer.
    """
    from tokenizers import Tokenizer

    folder = fetched_path("wordllama")
    (vectors,) = load_file(folder / "vectors.safetensors").values()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return WordVectors(vectors.astype(np.float32), tokenizer)


@torch.inference_mode()
def sentence_vectors(
    texts: Sequence[str], *, max_length: int = 96, batch_size: int = 64
) -> np.ndarray:
    """Return MiniLM's embeddings of texts; needs transformers.

    Parameters
    ----------
    texts : sequence of str
        The texts.
    max_length : int, default=96
        Tokens taken of each.
    batch_size : int, default=64
        Texts at a time.

    Returns
    -------
    ndarray of shape (n, 384), float32
        Unit vectors: means over tokens, as the model was trained.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = fetched_path("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    # Texts of like length share a batch, so that little padding is computed.
    order = np.argsort([len(text) for text in texts], kind="stable")
    vectors = np.empty((len(texts), model.config.hidden_size), np.float32)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [texts[row] for row in rows],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        mask = batch["attention_mask"][:, :, None]
        means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        vectors[rows] = torch.nn.functional.normalize(means, dim=1).numpy()
    return vectors
