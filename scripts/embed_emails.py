"""Embed 600 e-mails of the SpamAssassin corpus (CC0) with MiniLM and write email_vectors.npz.

Beside the vectors stand the first 300 characters of each, addresses and long numbers replaced.

python -m benchmarks.data fetch spam_assassin minilm
PYTHONPATH=. python scripts/embed_emails.py
"""

import re
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from benchmarks.data.fetched import fetch_spam_assassin
from benchmarks.data.text import sentence_vectors

DATA = Path(__file__).parents[1] / "skperf" / "datasets" / "data"
ROWS_PER_CLASS = 300
REPLACED = {
    r"\S+@\S+": "someone@example.org",
    r"(?i)(https?://|www\.)\S+": "http://example.org",
    r"\d[\d\-\s().]{5,}\d": "0000",
    r"[^ -~]+": " ",
}


def beginning(text: str, length: int = 300) -> str:
    """Return the first characters of a text, without what leads to a person."""
    for pattern, replacement in REPLACED.items():
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split())[:length]


def main() -> None:
    """Embed as many spam as other e-mails."""
    torch.set_num_threads(1)
    emails = fetch_spam_assassin()
    random_state = np.random.RandomState(0)
    rows = [
        random_state.choice(np.flatnonzero(emails.target == code), ROWS_PER_CLASS, replace=False)
        for code in (0, 1)
    ]
    rows = random_state.permutation(np.concatenate(rows))
    vectors = sentence_vectors([emails.data[row] for row in rows]).astype(np.float16)
    target = emails.target[rows].astype(np.uint8)
    np.savez_compressed(
        DATA / "email_vectors.npz",
        vectors=vectors,
        target=target,
        groups=emails.groups[rows],
        texts=np.array([beginning(emails.data[row]) for row in rows]),
    )
    scores = cross_val_score(LogisticRegression(C=10, max_iter=2000), vectors, target, cv=5)
    print(f"logistic regression, 5-fold accuracy {scores.mean():.3f} +- {scores.std():.3f}")


if __name__ == "__main__":
    main()
