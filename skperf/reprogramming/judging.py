"""What rows that a program was not trained on decide: alpha, scale, thresholds, score, head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional

from skperf.reprogramming.rejection import (
    SCORES,
    agreement,
    left_out_auroc,
    retention_threshold,
)
from skperf.reprogramming.residual import AlphaCurve, Representations, alpha_curve


@dataclass(frozen=True)
class Judged:
    """Rows, and what programs that were not trained on them make of them, part by part."""

    rows: NDArray[np.intp]  # (m,), their numbers
    codes: Tensor  # (m,)
    weight: Tensor  # (m,)
    outputs: list[Tensor]  # each (m_i, d)
    plain: list[Tensor] | None  # each (m_i, d)
    classes: list[Tensor] | None  # each (n_classes, d)
    zero_shot: Tensor | None  # (n_classes, d)
    logits: Tensor | None  # (m, n_classes), without texts
    features: dict[str, Tensor] = field(default_factory=dict)  # scores of outputs, each (m,)

    @property
    def representations(self) -> list[Representations]:
        """Embeddings of the parts, with their classes."""
        assert self.classes is not None
        assert self.plain is not None
        assert self.zero_shot is not None
        parts = zip(self.outputs, self.plain, self.classes, strict=True)
        return [Representations(u, u0, q, self.zero_shot) for u, u0, q in parts]

    def similarities(self, alpha: float, renormalize: bool) -> Tensor:
        """Similarities to the classes, or logits without texts: -> (m, n_classes)."""
        if self.logits is not None:
            return self.logits
        parts = self.representations
        return torch.cat([part.similarities(alpha, renormalize=renormalize) for part in parts])

    def scores(self, name: str, similarities: Tensor, temperature: float) -> Tensor:
        """Scores for rejection: similarities (m, n_classes) -> (m,)."""
        if name == "disagreement":
            parts = self.representations
            return torch.cat([agreement(part.images, part.images_zero) for part in parts])
        if name in self.features:
            return self.features[name]
        return SCORES[name](similarities, temperature)


@dataclass(frozen=True)
class Choice:
    """What the rows decide."""

    alpha: float
    logit_scale: float
    score: str
    thresholds: dict[str, float]
    curve: AlphaCurve | None
    head: str
    losses: dict[str, float] = field(default_factory=dict)


def choose(
    settings: Any,
    task: Any,
    judged: Judged,
    heads: Mapping[str, Tensor],
    alphas: Sequence[float] | None = None,
) -> Choice:
    """Choose alpha, scale, score, thresholds and head: heads each (m, n_classes)."""
    training, encoder = settings.training, task.own
    alpha, curve, scale, bias = 0.0, None, 1.0, 0.0
    if judged.logits is None:
        scale, bias = encoder.logit_scale, encoder.logit_bias
        curve = alpha_curve(
            judged.representations,
            judged.codes,
            task.alphas if alphas is None else alphas,
            scale=scale,
            renormalize=training.renormalize,
            weight=judged.weight,
        )
        alpha = curve.best()
    similarities = judged.similarities(alpha, training.renormalize)
    if training.logit_scale == "calibrated":
        scale = calibrated(scale, similarities, judged.codes, judged.weight)
    elif training.logit_scale != "encoder":
        scale = float(training.logit_scale)
    names = [*SCORES, *judged.features]
    if judged.zero_shot is not None and judged.plain is not None:
        names.append("disagreement")
    scores = {n: judged.scores(n, similarities, settings.ood_temperature) for n in names}
    kept = settings.ood_retention
    thresholds = {n: retention_threshold(s.double().numpy(), kept) for n, s in scores.items()}
    score = settings.ood_score
    if score == "auto":
        trained = settings.trains_none and task.zero_shot is not None
        score = "max_logit" if trained else best_score(judged, similarities, settings)
    trials = {task.head: scale * similarities + bias, **heads}
    weight = judged.weight / judged.weight.sum()
    rows = {name: sharpened_losses(logits, judged) for name, logits in trials.items()}
    losses = {name: float(each @ weight.to(each)) for name, each in rows.items()}
    head = settings.head if settings.head in heads else task.head
    if heads and settings.head not in heads:
        # the program has to be better beyond the error of the comparison: the heads were fitted
        # with settings chosen on more rows than it is judged on
        head = min(heads, key=lambda name: losses[name])
        gains = rows[head] - rows[task.head]
        error = float(gains.std(correction=0)) / len(gains) ** 0.5
        head = task.head if losses[head] - losses[task.head] > error else head
    return Choice(alpha, scale, score, thresholds, curve, head, losses)


def best_score(judged: Judged, similarities: Tensor, settings: Any) -> str:
    """Find the score that best tells classes apart which it does not know of."""
    n_classes = similarities.shape[1]
    if n_classes < 3 or len(judged.codes) < 2 * n_classes:
        return "mcm"
    most = slice(0, 2000)
    known, codes = similarities[most], judged.codes[most]

    def left_out(name: str) -> float:
        def scores(code: int) -> tuple[Tensor, Tensor]:
            others = torch.arange(n_classes) != code
            values = SCORES[name](known[:, others], settings.ood_temperature)
            return values[codes != code], values[codes == code]

        return left_out_auroc(scores, n_classes)

    return max(SCORES, key=left_out)


def calibrated(scale: float, similarities: Tensor, codes: Tensor, weight: Tensor) -> float:
    """Find the factor of similarities (m, n_classes) that makes the loss smallest."""

    def loss(log_factor: float) -> float:
        logits = similarities * (scale * float(np.exp(log_factor)))
        losses = functional.cross_entropy(logits, codes, reduction="none")
        return float(losses @ weight.to(losses) / weight.sum())

    return scale * float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def sharpened_losses(logits: Tensor, judged: Judged) -> Tensor:
    """Losses of logits (m, n_classes) at their own best temperature: -> (m,)."""
    scale = calibrated(1.0, logits, judged.codes, judged.weight)
    return functional.cross_entropy(scale * logits, judged.codes, reduction="none")
