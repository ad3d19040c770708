"""What rows that a program was not trained on decide: alpha, scale, thresholds, score, head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skperf.reprogramming.heads import calibrated, clearly_better, sharpened_losses
from skperf.reprogramming.rejection import (
    FEATURE_SCORES,
    SCORES,
    agreement,
    left_out_aurocs,
    retention_threshold,
)
from skperf.reprogramming.residual import AlphaCurve, Representations, alpha_curve


@dataclass(frozen=True)
class Judged:
    """Rows, and what programs that were not trained on them make of them, part by part."""

    rows: NDArray[np.intp]  # (m,), their numbers
    codes: Tensor  # (m,)
    weight: Tensor  # (m,)
    parts: list[Representations] | None  # where there are texts, else
    logits: Tensor | None  # (m, n_classes)
    features: dict[str, Tensor] = field(default_factory=dict)  # scores of outputs, in any order
    known: tuple[Tensor, Tensor] | None = None  # plain outputs (n, d) and codes (n,) of all rows

    def similarities(self, alpha: float, renormalize: bool) -> Tensor:
        """Similarities to the classes, or logits without texts: -> (m, n_classes)."""
        if self.parts is None:
            assert self.logits is not None
            return self.logits
        each = [part.similarities(alpha, renormalize=renormalize) for part in self.parts]
        return torch.cat(each)

    def scores(self, name: str, similarities: Tensor, temperature: float) -> Tensor:
        """Scores for rejection: similarities (m, n_classes) -> (m,)."""
        if name == "disagreement":
            assert self.parts is not None
            return torch.cat([agreement(part.images, part.images_zero) for part in self.parts])
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
    if judged.parts is not None:
        scale, bias = encoder.logit_scale, encoder.logit_bias
        curve = alpha_curve(
            judged.parts,
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
    if judged.parts is not None:
        names.append("disagreement")
    scores = {n: judged.scores(n, similarities, settings.ood_temperature) for n in names}
    kept = settings.ood_retention
    thresholds = {n: retention_threshold(s.double().numpy(), kept) for n, s in scores.items()}
    score = settings.ood_score
    if score == "auto":
        trained = settings.trains_none and task.zero_shot is not None
        score = "max_logit" if trained else "mcm"
        score = score if judged.known is None else best_score(*judged.known)
    trials = {task.head: scale * similarities + bias, **heads}
    rows = {n: sharpened_losses(each, judged.codes, judged.weight) for n, each in trials.items()}
    share = judged.weight / judged.weight.sum()
    losses = {name: float(each @ share.to(each)) for name, each in rows.items()}
    head = next(iter(heads), task.head)
    for name in [] if settings.head in heads else trials:
        # heads after the first have to be better beyond the error of the comparison
        if losses[name] < losses[head] and clearly_better(rows[name], rows[head], judged.weight):
            head = name
    return Choice(alpha, scale, score, thresholds, curve, head, losses)


def best_score(outputs: Tensor, codes: Tensor, usual: str = "mahalanobis") -> str:
    """Find the score that best tells unknown classes apart: outputs (n, d), codes (n,)."""
    # the program was trained on all classes: only scores that are fitted anew can be compared
    rows = torch.from_numpy(np.random.RandomState(0).permutation(len(codes))[:4000])
    outputs, codes = outputs[rows], codes[rows]
    if len(codes) < 4 * len(codes.unique()):
        return usual
    # a decomposition of d x d numbers for each class
    n_tried = int(np.clip(1e9 / outputs.shape[1] ** 3, 2, 10))
    found: dict[str, NDArray[Any]] = {}
    for name, kind in FEATURE_SCORES.items():

        def score(known: NDArray[Any], asked: NDArray[Any], kind: Any = kind) -> Tensor:
            return kind.fit(outputs[known], codes[known]).score(outputs[asked])

        found[name] = left_out_aurocs(score, codes, n_tried)
    best = max(found, key=lambda name: float(found[name].mean()))
    gains = found[best] - found[usual]
    return best if gains.mean() > gains.std() / len(gains) ** 0.5 else usual
