"""What `Reprogrammer.fit` has learned: a record that answers for pictures."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from skperf.backbone.batch_norm import batch_statistics
from skperf.reprogramming.classifier import ReprogrammedClassifier
from skperf.reprogramming.encoders import FrozenEncoder
from skperf.reprogramming.heads import Head
from skperf.reprogramming.judging import Choice
from skperf.reprogramming.pictures import PictureForm, Pictures
from skperf.reprogramming.programmed import ProgrammedEncoder
from skperf.reprogramming.rejection import SCORES, retention_threshold
from skperf.reprogramming.residual import Representations


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

    def open(self) -> ReprogrammedClassifier:
        """Open a private view of the encoder with the programs around it."""
        if self.encoder.checksum() != self.checksum:
            raise ValueError(
                "the encoder's weights are not those that the program was fitted with: they "
                "were changed in place since. Fit again, or restore them."
            )
        return ReprogrammedClassifier(
            self.programmed,
            self.encoder.private(),
            alpha=self.choice.alpha,
            scale=self.choice.logit_scale,
            settled=self.settled,
            image_shape=self.image_shape,
            renormalize=self.renormalize,
            head=self.head,
        ).eval()

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

    def known_score(self, name: str | None) -> str:
        """Check the name of a score; by default the one that was chosen."""
        name = self.choice.score if name is None or name == "auto" else name
        known = {*SCORES, *self.scorers}
        if self.programmed.has_unit_embeddings:
            known.add("disagreement")
        if name not in known:
            raise ValueError(f"there is no score {name!r} here; there are {sorted(known)}.")
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
        names = [*SCORES, *self.scorers]
        names += ["disagreement"] if self.programmed.has_unit_embeddings else []
        thresholds = {n: retention_threshold(self.scores(pictures, n), retention) for n in names}
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
        with context, torch.inference_mode():
            for placed in pictures.batches(self.batch_size, place):
                pieces.append(function(opened, placed.to(like)).cpu())
        return torch.cat(pieces).numpy()


def to_module(fitted: FittedProgram) -> nn.Module:
    """From images in [0, 1] to class logits, over a view of the encoder."""
    return fitted.open().own()
