"""Scores and metrics of "none of these" beside those of pytorch-ood, on the same numbers.

Similarities of the shipped encoder's zero-shot classifier on Fashion-MNIST and on emoji.
Writes ``benchmarks/results/reprogramming_peers.json``; needs pytorch-ood
(``benchmarks/peers.txt``):

    sh benchmarks/run.sh .venv reprogramming
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.nn import functional

from benchmarks import runner
from skperf.datasets import load_emoji, load_fashion_mnist, load_text_image_encoder
from skperf.metrics import fpr_at_95_tpr, ood_auroc
from skperf.reprogramming import Reprogrammer
from skperf.reprogramming.rejection import SCORES

RESULTS = Path(__file__).parent / "results" / "reprogramming_peers.json"


def open_peer():
    """Import the parts of pytorch-ood that need no torchvision, which its front page imports."""
    spec = importlib.util.find_spec("pytorch_ood")
    package = ModuleType("pytorch_ood")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["pytorch_ood"] = package
    from pytorch_ood import detector, metrics

    return detector, metrics


def embeddings():
    """Embed rows of the task, foreign rows and the classes."""
    encoder, tokenizer = load_text_image_encoder()
    fashion, emoji = load_fashion_mnist(subset="test"), load_emoji(subset="test")
    model = Reprogrammer(
        encoder, tokenizer=tokenizer, class_names=fashion.target_names, border=4, max_epochs=0
    ).fit(fashion.images[:, None], fashion.target)
    grey = emoji.images.mean(1, keepdims=True).astype(np.uint8)
    own, foreign = model.transform(fashion.images[:, None]), model.transform(grey)
    return torch.as_tensor(np.r_[own, foreign]), len(own), torch.as_tensor(model.class_embeddings_)


def compare():
    """Hold every score, and both metrics on it, against the peer's."""
    detector, metrics = open_peer()
    images, n_own, classes = embeddings()
    images = functional.normalize(images, dim=-1)
    similarities = images @ functional.normalize(classes, dim=-1).T
    inside = np.repeat([1, 0], [n_own, len(images) - n_own])
    peers = {
        ("mcm", 1.0): detector.MCM(None, classes).predict_features(images),
        ("mcm", 0.01): detector.MaxSoftmax(None, t=0.01).predict_logits(similarities),
        ("max_logit", 1.0): detector.MaxLogit(None).predict_logits(similarities),
        ("energy", 1.0): detector.EnergyBased(None).predict_logits(similarities),
        ("entropy", 1.0): detector.Entropy(None).predict_logits(similarities),
    }
    for (name, temperature), outlier in peers.items():
        ours = SCORES[name](similarities, temperature)
        # theirs is higher for outliers, and takes outliers for the positive class
        label = torch.as_tensor(np.where(inside == 1, -1, 1))
        auroc = metrics.AUROC().update(-outlier.double(), label).compute()["AUROC"]
        fpr = metrics.FPRAtTPR(tpr=0.95).update(-outlier.double(), label).compute()
        yield {
            "score": f"{name}, T = {temperature:g}",
            "largest difference of a score": float((ours + outlier).abs().max()),
            "AUROC": ood_auroc(inside, ours.numpy()),
            "AUROC of pytorch-ood": float(auroc),
            "FPR95": fpr_at_95_tpr(inside, ours.numpy()),
            "FPR95 of pytorch-ood": float(next(iter(fpr.values()))),
        }


if __name__ == "__main__":
    records = list(compare())
    runner.save(RESULTS, records)
    for record in records:
        print(record)
