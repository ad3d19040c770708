"""Rows of a denoising loss: each image under several drawn levels of noise.

The influence of an image on the loss of another is that of the mean over the levels, with the
Gauss-Newton matrix of a squared error, the identity at the outputs ("Influence Functions for
Scalable Data Attribution in Diffusion Models", arXiv 2410.13850).
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn


def noised(
    X: ArrayLike, kept: ArrayLike, *, n_draws: int = 8, random_state: int = 0
) -> tuple[tuple[NDArray[Any], NDArray[Any]], NDArray[Any]]:
    """Draw noise levels and noise for every row, for a network that predicts the noise.

    Parameters
    ----------
    X : array-like of shape (n, ...)
        Images.
    kept : array-like of shape (n_levels,)
        Share of the signal's variance that each level keeps (``alphas_cumprod``).
    n_draws : int, default=8
        Levels drawn for each row.
    random_state : int, default=0
        Seed of levels and noise.

    Returns
    -------
    rows : tuple of ndarrays of shape (n, n_draws, ...) and (n, n_draws)
        Noised images and their levels, as :class:`PerDraw` takes them.
    noise : ndarray of shape (n, n_draws, ...)
        What the network should predict: the targets, with ``loss="squared_error"``.
    """
    images, kept = np.asarray(X), np.asarray(kept)
    if kept.ndim != 1 or not kept.size or kept.min() < 0 or kept.max() > 1 or n_draws < 1:
        raise ValueError("kept must hold shares between 0 and 1, and n_draws be at least 1.")
    rng = np.random.default_rng(random_state)
    levels = rng.integers(0, len(kept), (len(images), n_draws))
    noise = rng.normal(size=(len(images), n_draws, *images.shape[1:])).astype(images.dtype)
    share = kept[levels].reshape(*levels.shape, *[1] * (images.ndim - 1))
    rows = np.sqrt(share) * images[:, None] + np.sqrt(1 - share) * noise
    return (rows.astype(images.dtype), levels), noise


class PerDraw(nn.Module):
    """Run a denoiser on every draw of every row.

    Parameters
    ----------
    denoiser : nn.Module
        Takes images (m, ...) and levels (m,), and predicts the noise (m, ...).
    """

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, images: Tensor, levels: Tensor) -> Tensor:
        """Predict the noise of every draw.

        Parameters
        ----------
        images : Tensor of shape (n, n_draws, ...)
            Noised images.
        levels : Tensor of shape (n, n_draws)
            Their levels.

        Returns
        -------
        Tensor of shape (n, n_draws, ...)
            The noise.
        """
        predicted = self.denoiser(images.flatten(0, 1), levels.flatten())
        if not isinstance(predicted, Tensor):
            predicted = predicted[0] if isinstance(predicted, tuple) else predicted.sample
        result: Tensor = torch.unflatten(predicted, 0, images.shape[:2])
        return result
