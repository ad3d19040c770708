"""A frozen encoder with programs around it, in use: a module from images to class logits."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from skperf.reprogramming.encoders import FrozenEncoder
from skperf.reprogramming.heads import Head
from skperf.reprogramming.programmed import ProgrammedEncoder
from skperf.reprogramming.rejection import agreement
from skperf.reprogramming.residual import mixed, unit


class ReprogrammedClassifier(nn.Module):
    """From images to class logits, the encoder included."""

    # Its parameters are those of a view of the encoder, `model.*`, and of the programs and the
    # head, `programmed.*`.

    settled: Tensor | None
    text: Tensor | None

    def __init__(
        self,
        programmed: ProgrammedEncoder,
        encoder: FrozenEncoder,
        *,
        alpha: float,
        scale: float,
        settled: Tensor | None = None,
        image_shape: tuple[int, ...] | None = None,
        renormalize: bool = False,
        head: Head | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model if encoder.differentiable else None
        self.programmed = programmed
        self.alpha = alpha
        self.scale = scale
        self.image_shape = image_shape
        self.renormalize = renormalize
        self.head = head
        self.unit = programmed.has_unit_embeddings
        self.bias = encoder.logit_bias if self.unit else 0.0
        text = programmed.text
        self.register_buffer("settled", settled)
        self.register_buffer("text", None if text is None else text.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits.

        Shapes: images (n, channels, height, width) or (n, n_features) -> (n, n_classes).
        """
        return self.class_logits(self._placed(images))

    def class_logits(self, placed: Tensor) -> Tensor:
        """Compute class logits of images on the canvas: placed (n, ...) -> (n, n_classes)."""
        if self.head is not None:
            logits: Tensor = self.head(self._encode(placed))
            return logits
        return self.scale * self.similarities(self.represent(placed)) + self.bias

    def represent(self, placed: Tensor) -> Tensor:
        """Encode images on the canvas with the programs and the residual.

        Shapes: placed (n, channels, height, width) or (n, n_features) -> (n, n_outputs).
        """
        if self.alpha == 1:
            return self._encode(placed)
        outputs = self._encode(self.programmed.program.add(placed, self.programmed.image))
        if self.alpha == 0:
            return outputs
        return mixed(outputs, self._encode(placed), self.alpha, renormalize=self.renormalize)

    def classes(self) -> Tensor | None:
        """Embed the classes, with the programs and the residual: -> (n_classes, n_outputs)."""
        # The text tower runs only where the text program has changed or its gradient is wanted.
        programmed = self.programmed
        if programmed.zero_shot is None:
            return None
        prompts = self.settled
        if prompts is None or not self._text_is_settled():
            prompts = programmed.embedded_prompts(self.encoder, self.model)
        classes = programmed.shifted(prompts)
        return mixed(classes, programmed.zero_shot, self.alpha, renormalize=self.renormalize)

    def similarities(self, representation: Tensor) -> Tensor:
        """Hold representations against the classes.

        Shapes: representation (n, n_outputs) -> (n, n_classes).
        """
        classes = self.classes()
        if classes is None:
            return self.programmed.logits(representation)
        return representation @ classes.T

    def reprogram(self, placed: Tensor) -> Tensor:
        """Add the program: placed (n, ...) -> the same shape."""
        return self.programmed.program.add(placed, self.programmed.image)

    def agreement(self, placed: Tensor) -> Tensor:
        """Compare embeddings with and without the program: placed (n, ...) -> (n,)."""
        return agreement(self._encode(self.reprogram(placed)), self._encode(placed))

    def own(self) -> "ReprogrammedClassifier":
        """Copy with programs and heads of its own: what `to_module` gives away."""
        twin = ReprogrammedClassifier(
            deepcopy(self.programmed),
            self.encoder,
            alpha=self.alpha,
            scale=self.scale,
            settled=self.settled,
            image_shape=self.image_shape,
            renormalize=self.renormalize,
            head=deepcopy(self.head),
        )
        twin.programmed.encoder = self.encoder
        return twin.eval()

    def _text_is_settled(self) -> bool:
        text = self.programmed.text
        if text is None:
            return True
        # other than a parameter is what torch.func puts in its place
        if not isinstance(text, nn.Parameter) or (torch.is_grad_enabled() and text.requires_grad):
            return False
        return self.text is not None and torch.equal(text, self.text)

    def _placed(self, images: Tensor) -> Tensor:
        if images.ndim == 2 and self.image_shape is not None:
            images = images.view(-1, *self.image_shape)
        return self.programmed.program.place(images)

    def _encode(self, placed: Tensor) -> Tensor:
        outputs = self.encoder.encode_image(placed, self.model)
        return unit(outputs) if self.unit else outputs

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.programmed.encoder = self.encoder
