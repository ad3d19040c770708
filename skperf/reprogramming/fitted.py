"""What `Reprogrammer.fit` has learned: a record, and the module that it opens to answer."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from skperf.backbone.batch_norm import batch_statistics
from skperf.reprogramming.encoders import FrozenEncoder
from skperf.reprogramming.heads import Head
from skperf.reprogramming.judging import Choice
from skperf.reprogramming.pictures import PictureForm, Pictures
from skperf.reprogramming.programmed import ProgrammedEncoder
from skperf.reprogramming.rejection import SCORES, agreement, retention_threshold
from skperf.reprogramming.residual import Representations, mixed, unit


class ReprogrammedClassifier(nn.Module):
    """From images to class logits, the encoder included."""

    # Its parameters are those of a view of the encoder, `model.*`, and of the programs and the
    # head, `programmed.*`.

    settled: Tensor | None
    text: Tensor | None

    def __init__(
        self, fitted: "FittedProgram", encoder: FrozenEncoder, *, own: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.model = encoder.model if encoder.differentiable else None
        self.programmed = deepcopy(fitted.programmed) if own else fitted.programmed
        self.head = deepcopy(fitted.head) if own else fitted.head
        if own:
            self.programmed.encoder = encoder
        self.alpha, self.scale = fitted.choice.alpha, fitted.choice.logit_scale
        self.image_shape, self.renormalize = fitted.image_shape, fitted.renormalize
        self.unit = self.programmed.has_unit_embeddings
        self.bias = encoder.logit_bias if self.unit else 0.0
        text = self.programmed.text
        self.register_buffer("settled", fitted.settled)
        self.register_buffer("text", None if text is None else text.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Compute class logits of images or rows: (n, ...) -> (n, n_classes)."""
        return self.class_logits(self._placed(images))

    def class_logits(self, placed: Tensor) -> Tensor:
        """Compute class logits of images on the canvas: placed (n, ...) -> (n, n_classes)."""
        if self.head is not None:
            logits: Tensor = self.head(self._encode(placed))
            return logits
        return self.scale * self.similarities(self.represent(placed)) + self.bias

    def represent(self, placed: Tensor) -> Tensor:
        """Encode with the programs and the residual: placed (n, ...) -> (n, n_outputs)."""
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
        """Hold against the classes: representation (n, n_outputs) -> (n, n_classes)."""
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
        return self.programmed.program.place(images).to(self.programmed.image.dtype)

    def _encode(self, placed: Tensor) -> Tensor:
        outputs = self.encoder.encode_image(placed, self.model)
        return unit(outputs) if self.unit else outputs

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.programmed.encoder = self.encoder


@dataclass(frozen=True, eq=False)
class FittedProgram:
    """Programs, head and decisions around an encoder; every answer opens a view of it."""

    encoder: FrozenEncoder
    programmed: ProgrammedEncoder
    checksum: str
    settled: Tensor | None  # (n_classes, d), prompts with the text program
    head: Head | None
    scorers: dict[str, Any]
    choice: Choice
    renormalize: bool
    temperature: float
    batch_size: int
    image_shape: tuple[int, ...] | None
    form: PictureForm
    n_queries: int

    def open(self, *, own: bool = False) -> ReprogrammedClassifier:
        """Open a private view of the encoder with the programs around it, or copies of them."""
        if self.encoder._checksum() != self.checksum:
            raise ValueError(
                "the encoder's weights are not those that the program was fitted with: they "
                "were changed in place since. Fit again, or restore them."
            )
        return ReprogrammedClassifier(self, self.encoder._private(), own=own).eval()

    def logits(self, pictures: Pictures, batch_norm: str = "stored") -> NDArray[Any]:
        """Class logits: -> (n, n_classes)."""
        return self._run(pictures, lambda opened, placed: opened.class_logits(placed), batch_norm)

    def embeddings(self, pictures: Pictures) -> NDArray[Any]:
        """Mixed embeddings, or what the encoder returns: -> (n, n_outputs)."""
        return self._run(pictures, lambda opened, placed: opened.represent(placed))

    def reprogrammed(self, pictures: Pictures) -> NDArray[Any]:
        """Images that the encoder sees: -> (n, channels, height, width)."""
        return self._run(pictures, lambda opened, placed: opened.reprogram(placed))

    def scores(self, pictures: Pictures, name: str | None = None) -> NDArray[Any]:
        """Scores for rejection, higher is more in-distribution: -> (n,)."""
        name = self.known_score(name)
        if name == "disagreement":
            return self._run(pictures, lambda opened, placed: opened.agreement(placed))
        if name in self.scorers:
            scorer = self.scorers[name]
            return self._run(
                pictures, lambda opened, placed: scorer.score(opened._encode(placed).cpu())
            )

        def scored(opened: ReprogrammedClassifier, placed: Tensor) -> Tensor:
            return SCORES[name](opened.similarities(opened.represent(placed)), self.temperature)

        return self._run(pictures, scored)

    @property
    def score_names(self) -> list[str]:
        """Scores that can be computed."""
        compared = ["disagreement"] if self.programmed.has_unit_embeddings else []
        return [*SCORES, *self.scorers, *compared]

    def known_score(self, name: str | None) -> str:
        """Check the name of a score; by default the one that was chosen."""
        name = self.choice.score if name is None or name == "auto" else name
        if name not in self.score_names:
            raise ValueError(f"there is no score {name!r} here; there are {self.score_names}.")
        return name

    def inliers(self, pictures: Pictures, name: str | None = None) -> NDArray[Any]:
        """+1 where the score reaches its own threshold, else -1: -> (n,)."""
        name = self.known_score(name)
        if name not in self.choice.thresholds:
            raise ValueError(
                "the thresholds belong to the classes of fit; give with_classes some rows, X=, "
                "from which those of the new classes can be read."
            )
        threshold = self.choice.thresholds[name]
        return np.where(self.scores(pictures, name) >= threshold, 1, -1)

    def representations(self, pictures: Pictures) -> Representations:
        """Embeddings of pictures and classes, with and without the programs."""
        opened = self.open()
        assert self.programmed.zero_shot is not None

        def both(opened: ReprogrammedClassifier, placed: Tensor) -> Tensor:
            return torch.stack(
                [opened._encode(opened.reprogram(placed)), opened._encode(placed)], 1
            )

        images = torch.from_numpy(self._run(pictures, both))
        prompts = self.settled if self.settled is not None else self.programmed.zero_shot
        with torch.no_grad():
            classes = opened.programmed.shifted(prompts).cpu()
        return Representations(images[:, 0], images[:, 1], classes, self.programmed.zero_shot.cpu())

    def path_scores(self, parts: Representations, alphas: Any) -> list[float]:
        """Mean score at each alpha, where it depends on alpha at all."""
        means = []
        for alpha in alphas:
            similarities = parts.similarities(alpha, renormalize=self.renormalize)
            if self.choice.score in SCORES:
                scores = SCORES[self.choice.score](similarities, self.temperature)
            elif self.choice.score in self.scorers:
                scores = self.scorers[self.choice.score].score(parts.images_zero)
            else:
                scores = functional.cosine_similarity(parts.images, parts.images_zero, dim=1)
            means.append(float(scores.mean()))
        return means

    def class_embeddings(self) -> Tensor | None:
        """Embed what images are held against: -> (n_classes, d), or None."""
        with torch.no_grad():
            opened = self.open()
            classes = opened.classes()
            programmed = self.programmed
            if classes is None and programmed.head is not None:
                classes = programmed.head.weight.detach() * programmed.stretch
        return classes

    def with_thresholds(self, pictures: Pictures, retention: float) -> "FittedProgram":
        """Read thresholds that keep a share of given pictures."""
        scores = {name: self.scores(pictures, name) for name in self.score_names}
        thresholds = {name: retention_threshold(each, retention) for name, each in scores.items()}
        return replace(self, choice=replace(self.choice, thresholds=thresholds))

    def _run(
        self,
        pictures: Pictures,
        function: Callable[[ReprogrammedClassifier, Tensor], Tensor],
        batch_norm: str = "stored",
    ) -> NDArray[Any]:
        opened = self.open()
        by_batch = batch_norm == "batch"
        context = batch_statistics(opened) if by_batch else nullcontext()
        like, pieces = self.programmed.image, []
        place = self.programmed.program.place
        with context, torch.no_grad():
            for placed in pictures.batches(self.batch_size, place):
                pieces.append(function(opened, placed.to(like)).cpu())
        return torch.cat(pieces).numpy()
