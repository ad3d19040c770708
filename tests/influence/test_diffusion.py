"""Noised rows, and a denoiser that runs on every draw."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skperf.influence.diffusion import PerDraw, noised

X = np.random.default_rng(0).normal(size=(5, 2, 3, 3))


def test_rows_hold_as_much_of_the_signal_as_their_levels_say():
    kept = np.array([1.0, 0.64, 0.0])
    (rows, levels), noise = noised(X, kept, n_draws=9, random_state=1)
    assert rows.shape == noise.shape == (5, 9, 2, 3, 3)
    assert set(levels.flatten()) == {0, 1, 2}
    for i in range(5):
        for j, level in enumerate(levels[i]):
            signal, rest = {0: (1.0, 0.0), 1: (0.8, 0.6), 2: (0.0, 1.0)}[level]
            np.testing.assert_allclose(rows[i, j], signal * X[i] + rest * noise[i, j], atol=1e-12)
    assert noise.std() == pytest.approx(1.0, abs=0.1)


class Denoiser(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.scale = wrap, nn.Parameter(torch.tensor([1.0, 2.0, -3.0]).double())

    def forward(self, images, levels):
        return self.wrap(images * self.scale[levels].view(-1, 1, 1, 1))


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, 0), lambda x: SimpleNamespace(sample=x)],
    ids=["tensor", "tuple", "sample"],
)
def test_every_draw_is_denoised_at_its_level(wrap):
    denoiser = Denoiser(wrap)
    images, levels = torch.randn(4, 3, 2, 3, 3).double(), torch.arange(12).view(4, 3) % 3
    found = PerDraw(denoiser)(images, levels)
    assert found.shape == images.shape
    for i in range(4):
        for j in range(3):
            torch.testing.assert_close(found[i, j], images[i, j] * denoiser.scale[levels[i, j]])
