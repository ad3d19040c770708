"""A frozen encoder with programs around it, in training."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.reprogramming.encoders import FrozenEncoder
from skperf.reprogramming.programs import InputProgram, TextProgram, class_embeddings
from skperf.reprogramming.residual import mixed


class ProgrammedEncoder(nn.Module):
    """The trainable part: program, text delta and head. The encoder is no child of it."""

    zero_shot: Tensor | None
    mapping: Tensor
    shift: Tensor
    stretch: Tensor
    none_level: Tensor

    def __init__(
        self,
        encoder: FrozenEncoder,
        program: InputProgram,
        n_outputs: int,
        n_classes: int,
        head: str,
        *,
        text: TextProgram | None = None,
        ids: Tensor | None = None,
        init: str = "zeros",
        exact: bool = True,
        training_alpha: float = 0.0,
        none_margin: float | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.none_margin = none_margin
        self.training_alpha = training_alpha
        self.program = program
        self.text_program = text
        self.ids = ids
        self.head_kind = head
        self.exact = exact
        self.n_queries = 0
        self.outputs: Tensor | None = None
        draw = torch.randn if init == "normal" else torch.zeros
        self.image = nn.Parameter(draw(program.shape))
        self.text = None if text is None else nn.Parameter(torch.zeros(text.shape))
        self.register_buffer("zero_shot", self._zero_shot(n_classes))
        offsets = nn.Linear(n_outputs, n_classes, bias=self.zero_shot is None)
        self.head = offsets if head == "linear" else None
        self.register_buffer("mapping", torch.full((n_outputs, n_classes), 1 / n_outputs))
        self.register_buffer("shift", torch.zeros(n_outputs))
        self.register_buffer("stretch", torch.ones(n_outputs))
        self.register_buffer("none_level", torch.zeros(()))
        if self.head is not None:
            for parameter in self.head.parameters():
                parameter.data.zero_()
        if encoder.dtype == torch.float64:
            self.double()

    @property
    def has_unit_embeddings(self) -> bool:
        """Whether images and classes meet in the space of a text-image encoder."""
        return self.zero_shot is not None

    def forward(self, images: Tensor, plain: Tensor | None = None) -> Tensor:
        """Compute class logits of reprogrammed images.

        Shapes: images (n, channels, height, width), plain (n, n_outputs) -> (n, n_classes), (2, n,
        n_classes) or (2, n, n_classes + 1).
        """
        return self.logits(self.encode(images, self.image), plain)

    def encode(self, images: Tensor, weights: Tensor | None) -> Tensor:
        """Encode images: images (n, channels, height, width) -> (n, n_outputs)."""
        self.n_queries += len(images)
        with torch.set_grad_enabled(self.exact and torch.is_grad_enabled()):
            placed = self.program.place(images)
            seen = placed if weights is None else self.program.add(placed, weights)
            outputs = self.encoder.encode_image(seen)
        if self.has_unit_embeddings:
            outputs = functional.normalize(outputs, dim=-1)
        self.outputs = outputs.detach()
        return outputs

    def logits(self, outputs: Tensor, plain: Tensor | None = None) -> Tensor:
        """Compute class logits from the encoder's outputs.

        Shapes: outputs (n, n_outputs), plain (n, n_outputs).
        """
        if self.head_kind == "mapping":
            return outputs @ self.mapping
        if self.zero_shot is None:
            assert self.head is not None
            logits: Tensor = self.head((outputs - self.shift) * self.stretch)
            return logits
        classes = self.classes()
        similarities = outputs @ classes.T
        if plain is not None:
            alpha = self.training_alpha
            mixes = mixed(outputs, plain, alpha) @ mixed(classes, self.zero_shot, alpha).T
            similarities = torch.stack([similarities, mixes])
        if plain is not None and self.none_margin is not None:
            none = self.none_level.expand(*similarities.shape[:-1], 1)
            similarities = torch.cat([similarities, none], -1)
        return self.encoder.logit_scale * similarities + self.encoder.logit_bias

    def classes(self) -> Tensor:
        """Embed the classes, with the text program and the linear head's offsets.

        Shapes: -> (n_classes, n_outputs).
        """
        return self.shifted(self.prompts())

    def prompts(self, model: Any = None) -> Tensor:
        """Embed the prompts, with the text program: -> (n_classes, n_outputs)."""
        assert self.zero_shot is not None
        if self.text_program is None or self.text is None or self.ids is None:
            return self.zero_shot
        hook = self.text_program.hook(self.text)
        return class_embeddings(self.encoder, self.ids, len(self.zero_shot), hook, model=model)

    def shifted(self, prompts: Tensor) -> Tensor:
        """Add the linear head's offsets, where there are any.

        Shapes: prompts (n_classes, n_outputs) -> (n_classes, n_outputs).
        """
        return (
            prompts
            if self.head is None
            else functional.normalize(prompts + self.head.weight, dim=-1)
        )

    def batches(
        self, images: Tensor, batch_size: int, *, programmed: bool = True
    ) -> Iterator[Tensor]:
        """Encode many images without gradients, batch by batch.

        Shapes: images (n, channels, height, width) -> (batch_size, n_outputs).
        """
        weights = self.image if programmed else None
        with self.encoder.open(), torch.inference_mode():
            for batch in images.split(batch_size):
                yield self.encode(batch.to(self.image), weights).cpu()

    def set_none_level(self, plain: Tensor, weight: Tensor | None) -> None:
        """Place the logit of "none of these" above those of zero-shot.

        Shapes: plain (n, n_outputs), weight (n,).
        """
        assert self.zero_shot is not None
        assert self.none_margin is not None
        largest = (plain.to(self.zero_shot) @ self.zero_shot.T).amax(1)
        weight = torch.ones_like(largest) if weight is None else weight.to(largest)
        margin = self.none_margin / self.encoder.logit_scale
        self.none_level.copy_(largest @ weight / weight.sum() + margin)

    def standardise(self, outputs: Tensor) -> None:
        """Take over the means and deviations of outputs, for the linear head.

        Shapes: outputs (n, n_outputs).
        """
        deviation = outputs.double().std(0, correction=0)
        self.shift.copy_(outputs.double().mean(0))
        self.stretch.copy_(torch.where(deviation > 1e-6, 1 / deviation.clamp_min(1e-6), 1.0))

    def _zero_shot(self, n_classes: int) -> Tensor | None:
        if self.ids is None:
            return None
        with self.encoder.open(), torch.no_grad():
            return class_embeddings(self.encoder, self.ids, n_classes).detach().clone()

    def __getstate__(self) -> dict[str, Any]:
        # the encoder travels with whoever holds this module, once
        return {**self.__dict__, "encoder": None, "outputs": None}
