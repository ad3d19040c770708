"""Programs: what is added to images and to token embeddings before a frozen encoder."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from skperf.reprogramming.encoders import FrozenEncoder
from skperf.reprogramming.pixels import PLAIN, PixelPipeline
from skperf.reprogramming.residual import unit
from skperf.reprogramming.tokens import Tokens

#: Prompts that go through the text tower at once.
PROMPTS_AT_ONCE = 256

BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "clamp": lambda weights: clamp_inward(weights, -1.0, 1.0),
    "none": lambda weights: weights,
}


class InputProgram:
    """What any program on the encoder's input offers; by default, an addition."""

    shape: tuple[int, ...]  # of its weights
    canvas: Any  # of placed inputs
    clip = "none"

    def start(self, init: str, generator: torch.Generator) -> Tensor:
        """Zeros, which leave inputs as they are, or normal draws: -> shape."""
        normal = init == "normal"
        return torch.randn(self.shape, generator=generator) if normal else torch.zeros(self.shape)

    def place(self, inputs: Tensor) -> Tensor:
        """Bring inputs to the encoder's size, not yet programmed."""
        raise NotImplementedError  # every program has its own

    def picture(self, weights: Tensor) -> Tensor:
        """Draw what is added, in the shape of one placed input."""
        return weights

    def add(self, placed: Tensor, weights: Tensor) -> Tensor:
        """Add the program: placed (n, ...) -> the same shape."""
        programmed = placed + self.picture(weights)
        if self.clip == "none":
            return programmed
        return clamp_inward(programmed) if self.clip == "inward" else programmed.clamp(0, 1)


@dataclass(frozen=True)
class ImageProgram(InputProgram):
    """A border of learnable pixels; a border of 0 is none."""

    # With layout "overlay" the picture fills the canvas and the border lies on its edge,
    # `clip(resize(x) + bound(w))`; with "pad" the picture shrinks into the space inside the
    # border. At w = 0 an overlay leaves the picture as it is.

    channels: int
    canvas: tuple[int, int]
    border: int
    layout: str = "overlay"
    bound: str = "tanh"
    pipeline: PixelPipeline = PLAIN
    clip: str = "inward"
    front: Callable[[Tensor], Tensor] | None = None  # makes pictures of other rows

    def __post_init__(self) -> None:
        if self.border < 0 or 2 * self.border >= min(self.canvas):
            height, width = self.canvas
            most = (min(self.canvas) - 1) // 2
            raise ValueError(
                f"border={self.border} does not fit a canvas of {height} x {width} pixels: "
                f"it must leave some of the picture, so at most {most}; 0 is no border."
            )

    @cached_property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the weights: (channels, pixels of the border)."""
        return self.channels, len(self._index)

    @cached_property
    def _index(self) -> Tensor:
        mask = torch.ones(self.canvas, dtype=torch.bool)
        height, width = self.canvas
        mask[self.border : height - self.border, self.border : width - self.border] = False
        return mask.view(-1).nonzero().view(-1)

    def place(self, inputs: Tensor) -> Tensor:
        """Bring images to the canvas: (n, 1 or channels, ...) -> (n, channels, *canvas)."""
        around = self.border if self.layout == "pad" else 0
        inner = (self.canvas[0] - 2 * around, self.canvas[1] - 2 * around)
        images = inputs if self.front is None else self.front(inputs)
        images = functional.pad(self.pipeline.place(images, inner), (around,) * 4)
        return images.expand(-1, self.channels, -1, -1)

    def picture(self, weights: Tensor) -> Tensor:
        """Draw the border: weights (channels, n_border) -> (channels, *canvas)."""
        height, width = self.canvas
        flat = weights.new_zeros(self.channels, height * width)
        index = self._index.to(weights.device)
        return flat.index_copy(1, index, BOUNDS[self.bound](weights)).view(-1, height, width)


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


@dataclass(frozen=True, eq=False)
class TextProgram:
    """A learnable delta on the embeddings of tokens."""

    used: Tensor  # (n_used,)
    n_positions: int  # -1: one row for all of them
    width: int
    first: int = 0  # position of the first row

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
                output = output + self._of_positions(positions, output.shape[-2])
            return output

        return shifted

    def _of_positions(self, rows: Tensor, length: int) -> Tensor:
        if self.n_positions < 0:
            return rows
        after = max(0, length - self.first - len(rows))
        return functional.pad(rows, (0, 0, self.first, after))[:length]

    def _of_tokens(self, rows: Tensor, ids: Tensor) -> Tensor:
        used = self.used.to(ids.device)
        index = torch.searchsorted(used, ids).clamp_max(len(used) - 1)
        index = torch.where(used[index] == ids, index, len(used))
        padded = torch.cat([rows, rows.new_zeros(1, self.width)])
        return functional.embedding(index, padded)


#: Text programs: which tokens get a row of their own, and whether positions do.
TEXT_PROGRAMS = (
    "none",
    "bias",
    "position",
    "context",
    "table",
    "table+position",
    "all",
    "all+position",
)


def text_program(kind: str, encoder: FrozenEncoder, tokens: Tokens) -> TextProgram | None:
    """Choose the rows of a text program: tokens (n_prompts, length)."""
    if kind == "none":
        return None
    assert encoder.tokenize is not None
    ids = tokens.ids
    used = torch.zeros(0, dtype=torch.long)
    if kind.startswith(("table", "all")):
        used = ids.unique().cpu()
        if kind.startswith("table"):
            used = used[~torch.isin(used, encoder.tokenize([""]).ids)]
    n_positions = {"bias": -1, "table": 0, "all": 0}.get(kind, ids.shape[1])
    first = 0
    if kind == "context":
        # the tokens before the name, as CoOp has them, which are the same in all prompts
        same = (ids == ids[:1]).all(0).int().cumprod(0)
        start = int(torch.isin(ids[0], encoder.tokenize([""]).ids).int().cumprod(0).sum())
        first, n_positions = start, int(same.sum()) - start
        if n_positions < 1:
            raise ValueError(
                "text='context' trains the words before the class name, and the prompts have no "
                "such words in common; use one template such as 'a photo of a {}'."
            )
    return TextProgram(used, n_positions, encoder.token_width, first)


def class_prompts(
    templates: Any, names: Sequence[Sequence[str]], labels: Sequence[Any]
) -> list[list[str]]:
    """Write the prompts of every class: its names in every template, or its own prompts."""
    if isinstance(templates, Mapping):
        missing = [label for label in labels if label not in templates]
        if missing:
            raise ValueError(f"prompts has no entry for the labels {missing[:10]}.")
        own = [templates[label] for label in labels]
        own = [[texts] if isinstance(texts, str) or callable(texts) else texts for texts in own]
        if not all(len(texts) for texts in own):
            raise ValueError("prompts has a class without any prompt.")
        return [
            [
                filled(text, name) if callable(text) or "{}" in text else text
                for name in known
                for text in texts
            ]
            for texts, known in zip(own, names, strict=True)
        ]
    templates = [templates] if isinstance(templates, str) or callable(templates) else templates
    return [[filled(text, name) for name in known for text in templates] for known in names]


def filled(template: Any, name: str) -> str:
    """Put a class name into a template or a function of names."""
    if callable(template):
        return str(template(name))
    if "{}" not in template:
        raise ValueError(f"the prompt {template!r} has no '{{}}' for the class name.")
    return str(template.replace("{}", name))


@dataclass(frozen=True, eq=False)
class Prompts:
    """Tokenized prompts and the class of each."""

    tokens: Tokens  # (n_prompts, length)
    groups: Tensor  # (n_prompts,)
    n_classes: int

    def of(self, classes: Tensor) -> "Prompts":
        """Those of some classes, numbered anew: classes (m,)."""
        number = self.groups.new_full((self.n_classes,), -1)
        number[classes] = torch.arange(len(classes), device=number.device)
        groups = number[self.groups]
        kept = groups >= 0
        return Prompts(self.tokens[kept], groups[kept], len(classes))

    def embeddings(
        self, encoder: FrozenEncoder, hook: Callable[..., Tensor] | None = None, model: Any = None
    ) -> Tensor:
        """Embed classes by the mean of their prompts, of unit length: -> (n_classes, d)."""
        encode: Callable[..., Tensor] = encoder.encode_text
        if hook is not None and torch.is_grad_enabled() and len(self.tokens) > PROMPTS_AT_ONCE:
            # one piece at a time keeps what its way back needs; a frozen tower draws nothing
            encode = partial(checkpoint, encode, use_reentrant=False, preserve_rng_state=False)
        starts = range(0, len(self.tokens), PROMPTS_AT_ONCE)
        pieces = [encode(self.tokens[s : s + PROMPTS_AT_ONCE], hook, model) for s in starts]
        embeddings = unit(torch.cat(pieces))
        sums = embeddings.new_zeros(self.n_classes, embeddings.shape[1])
        # the length of the mean is lost, so the sum will do
        return unit(sums.index_add(0, self.groups, embeddings))
