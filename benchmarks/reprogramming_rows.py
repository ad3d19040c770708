"""Rows that are no pictures on encoders of pictures and of signals.

UCI digits as 64 columns of a table and as series of 64 values, 300 rows to learn from and 300 to
be tested on: on the shipped text-image encoder, and on a convolution over one axis with random
filters, which nobody trained. Beside them a logistic regression on the rows themselves. Writes
``benchmarks/results/reprogramming_rows.json``:

    python -m benchmarks.reprogramming_rows --seeds 0 1 2
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from benchmarks import runner
from benchmarks.reprogramming_tasks import DIGITS
from skperf.datasets import load_text_image_encoder
from skperf.reprogramming import Reprogrammer

TABLE = Path(__file__).parent / "results" / "reprogramming_rows.json"


def filters():
    """Make a convolution over one axis, of random filters."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 32, 7, stride=2, padding=3), nn.ReLU()]
    layers += [nn.Conv1d(32, 64, 5, stride=2, padding=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(6), nn.Flatten()).eval()


def main():
    """Fit all and write mean and standard error over seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    X, y = load_digits(return_X_y=True)
    encoder, tokenizer = load_text_image_encoder()
    pictures = {"encoder": encoder, "tokenizer": tokenizer, "class_names": DIGITS, "border": 2}
    signals = {"encoder": filters(), "border": 4, "canvas": 72, "layout": "pad"}
    found: dict[tuple[str, str], list[float]] = {}
    for seed in parser.parse_args().seeds:
        order = np.random.RandomState(seed).permutation(len(X))
        train, test = order[:300], order[300:600]
        for name, options in (("random filters, one axis", signals), ("text-image", pictures)):
            for rows in ("table", "series", "spectrogram")[: 2 + (options is pictures)]:
                model = Reprogrammer(**options, rows=rows, max_epochs=3, random_state=seed)
                score = model.fit(X[train], y[train]).score(X[test], y[test])
                found.setdefault((name, rows), []).append(score)
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
        score = plain.fit(X[train], y[train]).score(X[test], y[test])
        found.setdefault(("none: logistic regression on the rows", "table"), []).append(score)
        records = []
        for (name, rows), scores in found.items():
            percent = f"{100 * np.mean(scores):.1f}"
            if len(scores) > 1:
                percent += f" ± {100 * np.std(scores, ddof=1) / len(scores) ** 0.5:.1f}"
            records.append({"encoder": name, "rows": rows, "accuracy": percent})
            records[-1]["draws"] = len(scores)
        runner.save(TABLE, records)
        print(records, flush=True)


if __name__ == "__main__":
    main()
