"""Flat rows of any range in place of images: a small fixed encoder and a program for them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from skperf.reprogramming.programs import start


class RowEncoder(nn.Module):
    """Features of flat rows: the standardised row itself and fixed random features of it."""

    # In double precision, which rows of any range need.

    def __init__(self, rows: Tensor, n_random: int = 64) -> None:
        super().__init__()
        rows = rows.double()
        deviation = rows.std(0, correction=0)
        scale = torch.where(deviation > 1e-10 * rows.abs().amax(0), deviation, 1.0)
        generator = torch.Generator().manual_seed(0)
        n_features = rows.shape[1]
        directions = torch.randn(n_features, n_random, generator=generator) / n_features**0.5
        offsets = torch.rand(n_random, generator=generator) * 2 - 1
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("scale", scale)
        self.register_buffer("directions", directions.double())
        self.register_buffer("offsets", offsets.double())

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the features: rows (n, n_features) -> (n, n_features + n_random)."""
        standard = (rows - self.mean) / self.scale  # type: ignore[operator]
        random = torch.tanh(standard @ self.directions + self.offsets)  # type: ignore[operator]
        return torch.cat([standard, random], 1)


@dataclass(frozen=True)
class RowProgram:
    """A learnable shift of flat rows."""

    n_features: int
    canvas: None = None

    @property
    def shape(self) -> tuple[int]:
        """Shape of the weights."""
        return (self.n_features,)

    def start(self, init: str, generator: torch.Generator) -> Tensor:
        """No shift, or a normal one: -> (n_features,)."""
        return start(self.shape, init, generator)

    def place(self, inputs: Tensor) -> Tensor:
        """Flatten the rows: inputs (n, ...) -> (n, n_features)."""
        return inputs.flatten(1)

    def picture(self, weights: Tensor) -> Tensor:
        """Give the shift: weights (n_features,) -> (n_features,)."""
        return weights

    def add(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Shift the rows: placed (n, n_features), weights (n_features,) -> (n, n_features)."""
        return placed + weights
