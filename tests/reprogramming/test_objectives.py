"""Losses of class logits against loops."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from skperf.reprogramming.objectives import ClassObjective, focal_cross_entropy


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return functional.normalize(values, dim=-1)


def test_focal_loss_is_cross_entropy_at_gamma_zero():
    logits, codes = torch.randn(8, 3).double(), torch.arange(8) % 3
    torch.testing.assert_close(
        focal_cross_entropy(logits, codes),
        functional.cross_entropy(logits, codes, reduction="none"),
    )
    p = logits.softmax(1)[torch.arange(8), codes]
    torch.testing.assert_close(
        focal_cross_entropy(logits, codes, gamma=4.0, scale=0.8), -0.8 * (1 - p) ** 4 * p.log()
    )


def test_contrast_equals_the_released_loop():
    """Every image against the caption of every image of the batch, and the reverse."""
    u, classes = unit(6, 4), unit(3, 4, seed=1)
    codes = torch.tensor([0, 1, 2, 0, 0, 1])
    captions = classes[codes]
    similarity = 10 * u @ captions.T
    target = torch.arange(6)

    def focal(logits):
        p = logits.softmax(1)[target, target]
        return (-0.8 * (1 - p) ** 4 * p.log()).mean()

    expected = (focal(similarity) + focal(similarity.T)) / 2
    objective = ClassObjective(contrastive=True, gamma=4.0, scale=0.8)
    torch.testing.assert_close(objective(10 * u @ classes.T, codes).mean(), expected)
    assert np.isfinite(expected.item())


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("contrastive", [True, False])
def test_objectives_by_loops(gamma, contrastive):
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = torch.tensor([2, 0, 1, 1, 2])

    def focal(row, target):
        p = torch.softmax(row, 0)[target]
        return -0.7 * (1 - p) ** gamma * torch.log(p)

    if contrastive:
        pairs = torch.stack([logits[:, c] for c in codes], 1)
        expected = [(focal(pairs[i], i) + focal(pairs[:, i], i)) / 2 for i in range(5)]
    else:
        expected = [focal(logits[i], codes[i]) for i in range(5)]
    expected = torch.stack(expected)
    torch.testing.assert_close(ClassObjective(contrastive, gamma, 0.7)(logits, codes), expected)
