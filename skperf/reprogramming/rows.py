"""Rows that are no pictures: on a small fixed encoder, and on those of signals, pictures and texts.

References
----------
Yang, Tsai and Chen, "Voice2Series: Reprogramming Acoustic Models for Time Series Classification"
(ICML 2021).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.reprogramming.programs import BOUNDS, InputProgram


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
class RowProgram(InputProgram):
    """A learnable shift of flat rows."""

    shape: tuple[int, ...]  # (n_features,)
    canvas: None = None

    def place(self, inputs: Tensor) -> Tensor:
        """Flatten the rows: inputs (n, ...) -> (n, n_features)."""
        return inputs.flatten(1)


@dataclass(frozen=True, eq=False)
class SignalProgram(InputProgram):
    """Values that are learned at both ends of a signal, for encoders with one axis."""

    # With layout "overlay" the signal fills the encoder's length and the program lies on its
    # ends, with "pad" it shrinks into the space between them.

    channels: int
    canvas: tuple[int]
    border: int
    centre: Tensor  # () or (n_features,), taken off before anything else
    scale: Tensor  # the same, divided by
    layout: str = "overlay"
    bound: str = "tanh"

    def __post_init__(self) -> None:
        if self.border < 0 or 2 * self.border >= self.canvas[0]:
            raise ValueError(
                f"border={self.border} does not fit a signal of {self.canvas[0]} values: it must "
                f"leave some of it, so at most {(self.canvas[0] - 1) // 2}; 0 is none."
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the weights: (channels, 2 border)."""
        return self.channels, 2 * self.border

    def place(self, inputs: Tensor) -> Tensor:
        """Standardise, bring to length: (n, length) or (n, c, length) -> (n, c, canvas)."""
        signals = (inputs - self.centre.to(inputs)) / self.scale.to(inputs)
        signals = signals if signals.ndim == 3 else signals[:, None]
        around = self.border if self.layout == "pad" else 0
        length = self.canvas[0] - 2 * around
        if signals.shape[-1] != length:
            signals = functional.interpolate(signals, length, mode="linear")
        return functional.pad(signals, (around, around)).expand(-1, self.channels, -1)

    def picture(self, weights: Tensor) -> Tensor:
        """Draw both ends: weights (channels, 2 border) -> (channels, canvas)."""
        ends = BOUNDS[self.bound](weights)
        between = weights.new_zeros(self.channels, self.canvas[0] - 2 * self.border)
        return torch.cat([ends[:, : self.border], between, ends[:, self.border :]], 1)


@dataclass(frozen=True, eq=False)
class RowPicture:
    """Draws a row as a picture of one pixel a value, each column from its lowest to its highest."""

    low: Tensor  # (n_features,)
    high: Tensor  # (n_features,)

    def __call__(self, rows: Tensor) -> Tensor:
        """Draw: rows (n, n_features) -> (n, 1, height, width)."""
        rows = rows.flatten(1)
        low, high = self.low.to(rows), self.high.to(rows)
        values = ((rows - low) / torch.where(high > low, high - low, 1.0)).clamp(0, 1)
        width = math.isqrt(max(1, rows.shape[1] - 1)) + 1
        height = -(-rows.shape[1] // width)
        values = functional.pad(values, (0, height * width - rows.shape[1]))
        return values.view(len(rows), 1, height, width)


@dataclass(frozen=True)
class Spectrogram:
    """Draws a signal as the logarithm of its short Fourier transforms, low frequencies below."""

    n_fft: int
    low: float = 0.0
    high: float = 1.0

    def __call__(self, signals: Tensor) -> Tensor:
        """Draw: signals (n, length) or (n, channels, length) -> (n, channels, n_fft / 2 + 1, t)."""
        drawn = (self._logarithms(signals) - self.low) / (self.high - self.low)
        return drawn.flip(2).clamp(0, 1)

    @classmethod
    def of(cls, signals: Tensor) -> "Spectrogram":
        """Choose window and range by some signals: (n, length) or (n, channels, length)."""
        length = signals.shape[-1]
        if length < 8:
            raise ValueError(f"X holds series of {length} values; a spectrogram needs at least 8.")
        n_fft = 2 ** max(3, round(math.log2(2 * length**0.5)))
        values = cls(n_fft)._logarithms(signals[:256])
        low, high = float(values.quantile(0.05)), float(values.amax())
        return cls(n_fft, low, max(high, low + 1e-3))

    def _logarithms(self, signals: Tensor) -> Tensor:
        signals = signals.float() if signals.ndim == 3 else signals.float()[:, None]
        window = torch.hann_window(self.n_fft, device=signals.device)
        spectra = torch.stft(
            signals.flatten(0, 1), self.n_fft, self.n_fft // 4, window=window, return_complex=True
        )
        return spectra.abs().clamp_min(1e-6).log().view(*signals.shape[:2], *spectra.shape[1:])


@dataclass(frozen=True)
class TokenProgram(InputProgram):
    """A learnable shift of token embeddings, one for each place of a text."""

    # Placed texts are shifts of their tokens and, as the last number of each, the token's id: the
    # encoder looks the embeddings up itself.

    canvas: tuple[int]  # tokens of a text
    width: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the weights: (n_tokens, width)."""
        return self.canvas[0], self.width

    def place(self, inputs: Tensor) -> Tensor:
        """Put ids beside shifts of zero: (n, length) -> (n, length, width + 1)."""
        ids = inputs.float()[..., None]
        return torch.cat([ids.new_zeros(*inputs.shape, self.width), ids], -1)

    def add(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Shift the embeddings; texts may be shorter or longer than those of the fit."""
        after = max(0, placed.shape[1] - len(weights))
        return placed + functional.pad(weights, (0, 1, 0, after))[: placed.shape[1]]
