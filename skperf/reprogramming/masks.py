"""A program that looks at the picture: a full-size pattern times a mask drawn from each sample.

References
----------
Cai et al., "Sample-specific Masks for Visual Reprogramming-based Prompting" (ICML 2024).
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from skperf.reprogramming.pixels import PLAIN, PixelPipeline
from skperf.reprogramming.programs import BOUNDS, InputProgram, clamp_inward

_WIDTHS = (8, 16)


@dataclass(frozen=True)
class MaskProgram(InputProgram):
    """``clip(x + bound(pattern) * mask(x))``: weights of a pattern, then of a small mask."""

    channels: int
    canvas: tuple[int, int]
    bound: str = "tanh"
    pipeline: PixelPipeline = PLAIN
    clip: str = "inward"

    @property
    def _layers(self) -> list[tuple[int, ...]]:
        widths = (self.channels, *_WIDTHS, self.channels)
        return [(wide, narrow, 3, 3) for narrow, wide in pairwise(widths)]

    @property
    def _n_pattern(self) -> int:
        return self.channels * prod(self.canvas)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the weights: (n_weights,)."""
        return (self._n_pattern + sum(prod(layer) + layer[0] for layer in self._layers),)

    def start(self, init: str, generator: torch.Generator) -> Tensor:
        """Pattern of zeros or normal draws, and a mask drawn at random: -> (n_weights,)."""
        parts = [super().start(init, generator)[: self._n_pattern]]
        for layer in self._layers:
            deviation = (2 / prod(layer[1:])) ** 0.5
            parts.append(torch.randn(prod(layer), generator=generator) * deviation)
            parts.append(torch.zeros(layer[0]))
        return torch.cat(parts)

    def place(self, inputs: Tensor) -> Tensor:
        """Bring images to the canvas: (n, 1 or channels, ...) -> (n, channels, *canvas)."""
        return self.pipeline.place(inputs, self.canvas).expand(-1, self.channels, -1, -1)

    def picture(self, weights: Tensor) -> Tensor:
        """Draw the pattern: weights (n_weights,) -> (channels, *canvas)."""
        pattern = BOUNDS[self.bound](weights[: self._n_pattern])
        return pattern.view(self.channels, *self.canvas)

    def add(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Add the masked pattern: placed (n, channels, *canvas) -> the same shape."""
        programmed = placed + self.picture(weights) * self.mask(placed, weights)
        return clamp_inward(programmed) if self.clip == "inward" else programmed.clamp(0, 1)

    def mask(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Draw the masks: placed (n, channels, *canvas) -> the same shape."""
        values, first = placed, self._n_pattern
        for depth, layer in enumerate(self._layers):
            if depth:
                values = functional.max_pool2d(values.relu(), 2, ceil_mode=True)
            kernel, first = weights[first : first + prod(layer)].view(layer), first + prod(layer)
            bias, first = weights[first : first + layer[0]], first + layer[0]
            values = functional.conv2d(values, kernel, bias, padding=1)
        # whole patches, as in the paper
        return functional.interpolate(values, self.canvas, mode="nearest")
