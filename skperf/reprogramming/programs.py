"""Programs: what is added to images and to token embeddings before a frozen encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from skperf.reprogramming.encoders import FrozenEncoder

BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "clamp": lambda weights: clamp_inward(weights, -1.0, 1.0),
    "none": lambda weights: weights,
}


class InputProgram(Protocol):
    """What any program on the encoder's input offers."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its weights."""
        ...

    def place(self, inputs: Tensor) -> Tensor:
        """Bring inputs to the encoder's size, not yet programmed."""
        ...

    def add(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Add the program to placed inputs."""
        ...

    def picture(self, weights: Tensor) -> Tensor:
        """Draw what is added, in the shape of one placed input."""
        ...


@dataclass(frozen=True)
class ImageProgram:
    """A border of learnable pixels."""

    # With layout "overlay" the picture fills the canvas and the border lies on its edge,
    # `clip(resize(x) + bound(w))`; with "pad" the picture shrinks into the space inside the
    # border. At w = 0 an overlay leaves the picture as it is.

    channels: int
    canvas: tuple[int, int]
    border: int
    layout: str = "overlay"
    bound: str = "tanh"
    resize: str = "bicubic"
    clip: str = "inward"

    def __post_init__(self) -> None:
        if self.border <= 0 or 2 * self.border >= min(self.canvas):
            height, width = self.canvas
            most = (min(self.canvas) - 1) // 2
            raise ValueError(
                f"border={self.border} does not fit a canvas of {height} x {width} pixels: "
                f"it must be positive and leave some of the picture, so at most {most}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weights: (channels, pixels of the border)."""
        return self.channels, len(self._index)

    @property
    def inner(self) -> tuple[int, int]:
        """Height and width of the space inside the border."""
        return self.canvas[0] - 2 * self.border, self.canvas[1] - 2 * self.border

    @cached_property
    def _index(self) -> Tensor:
        mask = torch.ones(self.canvas, dtype=torch.bool)
        mask[self.border : -self.border, self.border : -self.border] = False
        return mask.view(-1).nonzero().view(-1)

    def place(self, inputs: Tensor) -> Tensor:
        """Bring images to the canvas; not yet programmed.

        Shapes: inputs (n, 1 or channels, height, width) -> (n, channels, canvas height, canvas
        width).
        """
        size = self.canvas if self.layout == "overlay" else self.inner
        images = resized(inputs, size, self.resize)
        if self.layout == "pad":
            images = functional.pad(images, (self.border,) * 4)
        return images.expand(-1, self.channels, -1, -1)

    def picture(self, weights: Tensor) -> Tensor:
        """Draw the border.

        Shapes: weights (channels, n_border) -> (channels, canvas height, canvas width).
        """
        height, width = self.canvas
        flat = weights.new_zeros(self.channels, height * width)
        index = self._index.to(weights.device)
        return flat.index_copy(1, index, BOUNDS[self.bound](weights)).view(-1, height, width)

    def add(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Add the border.

        Shapes: placed (n, channels, canvas height, canvas width), weights (channels, n_border) ->
        (n, channels, canvas height, canvas width).
        """
        programmed = placed + self.picture(weights)
        return clamp_inward(programmed) if self.clip == "inward" else programmed.clamp(0, 1)


class _ClampInward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(values: Tensor, low: float, high: float) -> Tensor:  # type: ignore[override]
        return values.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        values, low, high = inputs
        ctx.save_for_backward(values)
        ctx.range = low, high

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (values,) = ctx.saved_tensors
        low, high = ctx.range
        # descent moves against the gradient: up where it is negative
        outward = ((values < low) & (gradient > 0)) | ((values > high) & (gradient < 0))
        return gradient.masked_fill(outward, 0), None, None


def clamp_inward(values: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Clamp, with a gradient wherever descent leads back inside."""
    result: Tensor = _ClampInward.apply(values, low, high)
    return result


def resized(images: Tensor, size: tuple[int, int], mode: str = "bicubic") -> Tensor:
    """Scale images to cover a size and crop the middle.

    Shapes: images (n, channels, height, width) -> (n, channels, *size).
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = max(size[0] / height, size[1] / width)
    scaled = max(size[0], round(height * scale)), max(size[1], round(width * scale))
    if mode == "nearest":
        images = functional.interpolate(images, scaled, mode=mode)
    else:
        images = functional.interpolate(
            images,
            scaled,
            mode=mode,
            align_corners=False,
            antialias=min(scaled) < min(height, width),
        ).clamp(0, 1)
    top, left = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]


@dataclass(frozen=True, eq=False)
class TextProgram:
    """A learnable delta on the embeddings of tokens."""

    used: Tensor  # (n_used,)
    n_positions: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the delta: rows of the used tokens first, then of the positions."""
        return len(self.used) + abs(self.n_positions), self.width

    def hook(self, delta: Tensor) -> Callable[..., Tensor]:
        """Make a forward hook for the token embedding: delta (n_rows, width)."""

        def shifted(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
            rows, positions = delta.split([len(self.used), abs(self.n_positions)])
            if len(rows):
                output = output + self._of_tokens(rows, args[0])
            if len(positions):
                output = output + positions[: output.shape[-2]]
            return output

        return shifted

    def _of_tokens(self, rows: Tensor, ids: Tensor) -> Tensor:
        used = self.used.to(ids.device)
        index = torch.searchsorted(used, ids).clamp_max(len(used) - 1)
        index = torch.where(used[index] == ids, index, len(used))
        padded = torch.cat([rows, rows.new_zeros(1, self.width)])
        return functional.embedding(index, padded)


def text_program(kind: str, encoder: FrozenEncoder, ids: Tensor) -> TextProgram | None:
    """Choose the rows of a text program: ids (n_prompts, length)."""
    if kind == "none":
        return None
    assert encoder.tokenize is not None
    used = torch.zeros(0, dtype=torch.long)
    if kind.startswith("table"):
        marks = encoder.tokenize([""])
        used = ids.unique()
        used = used[~torch.isin(used, marks)].cpu()
    n_positions = {"bias": -1, "table": 0}.get(kind, ids.shape[1])
    return TextProgram(used, n_positions, encoder.token_width)


def filled_prompts(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Put every class name into every template."""
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the prompt {template!r} has no '{{}}' for the class name.")
    return [template.replace("{}", name) for name in names for template in templates]


def class_embeddings(
    encoder: FrozenEncoder,
    ids: Tensor,
    n_classes: int,
    hook: Callable[..., Tensor] | None = None,
    *,
    model: Any = None,
) -> Tensor:
    """Embed classes by their prompts: ids (n_classes * n_templates, length) -> (n_classes, d)."""
    embeddings = functional.normalize(encoder.encode_text(ids, hook, model), dim=-1)
    means = embeddings.view(n_classes, -1, embeddings.shape[-1]).mean(1)
    return functional.normalize(means, dim=-1)
