"""A frozen encoder with programs around it, in use: a module from images to class logits."""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from skperf.reprogramming.programmed import ProgrammedEncoder
from skperf.reprogramming.rejection import agreement
from skperf.reprogramming.residual import mixed


class ReprogrammedClassifier(nn.Module):
    """From images to class logits, the encoder included."""

    # Its parameters are those of the encoder, `model.*`, and of the programs and the head,
    # `programmed.*`.

    prompts: Tensor
    text: Tensor

    def __init__(
        self,
        programmed: ProgrammedEncoder,
        *,
        alpha: float,
        scale: float,
        image_shape: tuple[int, ...] | None = None,
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        self.encoder = programmed.encoder
        self.model = self.encoder.model if self.encoder.differentiable else None
        self.programmed = deepcopy(programmed)
        self.programmed.encoder = self.encoder
        self.alpha = alpha
        self.scale = scale
        self.image_shape = image_shape
        self.renormalize = renormalize
        self.unit = programmed.has_unit_embeddings
        self.bias = self.encoder.logit_bias if self.unit else 0.0
        with torch.no_grad(), self.encoder.open():
            prompts = programmed.prompts().clone() if self.unit else None
        self.register_buffer("prompts", prompts)
        self.register_buffer(
            "text", None if programmed.text is None else programmed.text.detach().clone()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits.

        Shapes: images (n, channels, height, width) or (n, n_features) -> (n, n_classes).
        """
        return self.scale * self.similarities(self.represent(images)) + self.bias

    def represent(self, images: Tensor) -> Tensor:
        """Encode images with the programs and the residual.

        Shapes: images (n, channels, height, width) or (n, n_features) -> (n, n_outputs).
        """
        placed = self._placed(images)
        if self.alpha == 1:
            return self._encode(placed)
        outputs = self._encode(self.programmed.program.add(placed, self.programmed.image))
        if self.alpha == 0:
            return outputs
        return mixed(outputs, self._encode(placed), self.alpha, renormalize=self.renormalize)

    def classes(self) -> Tensor | None:
        """Embed the classes, with the programs and the residual: -> (n_classes, n_outputs)."""
        # The text tower runs only where the text program has changed or its gradient is wanted.
        zero_shot = self.programmed.zero_shot
        if zero_shot is None:
            return None
        prompts = self.prompts if self._text_is_settled() else self.programmed.prompts(self.model)
        classes = self.programmed.shifted(prompts)
        return mixed(classes, zero_shot, self.alpha, renormalize=self.renormalize)

    def similarities(self, representation: Tensor) -> Tensor:
        """Hold representations against the classes.

        Shapes: representation (n, n_outputs) -> (n, n_classes).
        """
        classes = self.classes()
        return (
            self.programmed.logits(representation)
            if classes is None
            else representation @ classes.T
        )

    def reprogram(self, images: Tensor) -> Tensor:
        """Add the program.

        Shapes: images (n, channels, height, width) or (n, n_features) -> (n, channels, canvas
        height, canvas width).
        """
        return self.programmed.program.add(self._placed(images), self.programmed.image)

    def agreement(self, images: Tensor) -> Tensor:
        """Compare embeddings with and without the program.

        Shapes: images (n, channels, height, width) or (n, n_features) -> (n,).
        """
        programmed = self._encode(self.reprogram(images))
        return agreement(programmed, self._encode(self._placed(images)))

    def _text_is_settled(self) -> bool:
        text = self.programmed.text
        if text is None:
            return True
        # other than a parameter is what torch.func puts in its place
        if not isinstance(text, nn.Parameter) or (torch.is_grad_enabled() and text.requires_grad):
            return False
        return torch.equal(text, self.text)

    def _placed(self, images: Tensor) -> Tensor:
        if images.ndim == 2 and self.image_shape is not None:
            images = images.view(-1, *self.image_shape)
        return self.programmed.program.place(images)

    def _encode(self, placed: Tensor) -> Tensor:
        outputs = self.encoder.encode_image(placed, self.model)
        return functional.normalize(outputs, dim=-1) if self.unit else outputs

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.programmed.encoder = self.encoder
