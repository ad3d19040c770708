"""Heads on cached outputs of a frozen encoder, each with its cross-fitted logits.

A head is fitted once on all rows; beside it stand the logits that every row gets from heads
which were fitted without it, so that heads can be compared on rows they have not seen.

References
----------
Gao et al., "CLIP-Adapter" (arXiv 2110.04544); Zhang et al., "Tip-Adapter" (ECCV 2022); Silva-
Rodriguez et al., "A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models"
(CVPR 2024, a probe held to the text embeddings); Cai et al., "Attribute-based Visual
Reprogramming" (ICLR 2025).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from torch import Tensor, nn
from torch.nn import functional

from skperf.reprogramming.residual import unit

Folds = list[tuple[NDArray[np.intp], NDArray[np.intp]]]

#: Ridge of the probe, on features whose mean square length is 1.
RIDGES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
#: Share of the zero-shot logits that the probe starts from.
PRIORS = (0.0, 0.3, 1.0)
#: Prior and ridge unless others are clearly better on rows left out. Best of the grid at two rows a
#: class of drawn letters and Google's emoji (shipped encoder), R8 and 20 Newsgroups (wordllama).
USUAL = (0.3, 1e-2)
#: Rows a class up to which the usual probe is taken: on the same four, comparing heads and
#: settings on rows left out lost accuracy at two and gained it at four.
FEW_ROWS = 2
#: Weight and sharpness of the cache.
CACHE_WEIGHTS = (0.3, 1.0, 3.0, 10.0)
CACHE_SHARPNESS = (1.0, 3.0, 10.0, 30.0)
#: Share of the adapter in the features.
ADAPTER_SHARES = (0.2, 0.6)
#: Number of nearest attributes.
NEAREST = (1, 3, 10**6)
#: Rows, and rows times outputs times classes, up to which settings are compared by folds.
MOST_ROWS, MOST_WORK = 4000, 5e7


@dataclass(frozen=True)
class Cached:
    """Outputs of the plain encoder for labelled rows, and what the texts say."""

    outputs: Tensor  # (n, d)
    codes: Tensor  # (n,)
    weight: Tensor  # (n,)
    n_classes: int
    zero_shot: Tensor | None = None  # (n_classes, d)
    attributes: Tensor | None = None  # (n_prompts, d), the prompts one by one
    groups: Tensor | None = None  # (n_prompts,), the class of each
    scale: float = 1.0
    bias: float = 0.0

    def __getitem__(self, rows: Any) -> "Cached":
        parts = {name: getattr(self, name)[rows] for name in ("outputs", "codes", "weight")}
        return replace(self, **parts)

    def loss(self, logits: Tensor) -> float:
        """Weighted mean cross-entropy: logits (n, n_classes) -> ()."""
        losses = functional.cross_entropy(logits, self.codes, reduction="none")
        return float(losses @ self.weight.to(losses) / self.weight.sum())


def zero_shot_logits(known: "Cached | Head", outputs: Tensor) -> Tensor:
    """Hold outputs (n, d) against the texts; zeros without: -> (n, n_classes)."""
    if known.zero_shot is None:
        return outputs.new_zeros(len(outputs), known.n_classes)
    return known.scale * outputs @ known.zero_shot.to(outputs).T + known.bias


def calibrated(scale: float, similarities: Tensor, codes: Tensor, weight: Tensor) -> float:
    """Find the factor of similarities (n, n_classes) that makes the loss smallest."""

    def loss(log_factor: float) -> float:
        logits = similarities * (scale * float(np.exp(log_factor)))
        losses = functional.cross_entropy(logits, codes, reduction="none")
        return float(losses @ weight.to(losses) / weight.sum())

    return scale * float(np.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x))


def sharpened_losses(logits: Tensor, codes: Tensor, weight: Tensor) -> Tensor:
    """Losses of logits (n, n_classes) at their own best temperature: -> (n,)."""
    scale = calibrated(1.0, logits, codes, weight)
    return functional.cross_entropy(scale * logits, codes, reduction="none")


def clearly_better(losses: Tensor, usual: Tensor, weight: Tensor) -> bool:
    """Whether losses are smaller by more than the error of the difference: (n,) each."""
    share = weight / weight.sum()
    gains = (usual - losses).to(share)
    mean = float(gains @ share)
    spread = float((gains - mean).square() @ share) ** 0.5
    return mean > spread / len(gains) ** 0.5


class Head(nn.Module):
    """A map from outputs of the plain encoder (n, d) to class logits (n, n_classes)."""

    zero_shot: Tensor | None

    def __init__(self, cached: Cached) -> None:
        super().__init__()
        self.register_buffer("zero_shot", cached.zero_shot)
        self.scale, self.bias, self.n_classes = cached.scale, cached.bias, cached.n_classes

    def describe(self) -> dict[str, Any]:
        """Kind and numbers; the tensors are in the state dictionary."""
        numbers = {n: v for n, v in vars(self).items() if isinstance(v, int | float)}
        return {"kind": type(self).__name__} | {n: v for n, v in numbers.items() if n != "training"}


class Probe(Head):
    """Softmax regression, held to a share of the zero-shot classifier by its ridge."""

    centre: Tensor
    length: Tensor
    weight: nn.Parameter
    offset: nn.Parameter

    def __init__(self, cached: Cached, prior: float, ridge: float, start: "Probe | None" = None):
        super().__init__(cached)
        self.prior = prior
        centre = cached.outputs.mean(0)
        length = (cached.outputs - centre).square().sum(1).mean().sqrt().clamp_min(1e-12)
        self.register_buffer("centre", centre)
        self.register_buffer("length", length)
        n_outputs, n_classes = len(centre), cached.n_classes
        first = np.zeros((n_outputs + 1, n_classes))
        if start is not None:
            first[:-1], first[-1] = start.weight.detach().double(), start.offset.detach().double()
        x = ((cached.outputs - centre) / length).double().numpy()
        x = np.hstack([x, np.ones((len(x), 1))])
        texts = prior * zero_shot_logits(cached, cached.outputs).double().numpy()
        share = cached.weight.double().numpy() / float(cached.weight.sum())
        hot = np.eye(n_classes)[cached.codes.numpy()]

        def objective(flat: NDArray[Any]) -> tuple[float, NDArray[Any]]:
            w = flat.reshape(first.shape)
            logits = x @ w + texts
            logits = logits - logits.max(1, keepdims=True)
            total = np.exp(logits).sum(1, keepdims=True)
            loss = share @ (np.log(total[:, 0]) - (logits * hot).sum(1))
            slope = x.T @ ((np.exp(logits) / total - hot) * share[:, None])
            slope[:-1] += ridge * w[:-1]
            return loss + ridge / 2 * (w[:-1] ** 2).sum(), slope.ravel()

        options = {"maxiter": 100, "ftol": 1e-7, "gtol": 1e-5}
        found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options)
        solution = torch.as_tensor(found.x.reshape(first.shape)).to(cached.outputs)
        self.weight, self.offset = nn.Parameter(solution[:-1]), nn.Parameter(solution[-1])

    def sharpened(self, factor: float) -> "Probe":
        """Multiply its logits."""
        self.prior *= factor
        for part in (self.weight, self.offset):
            part.data *= factor
        return self

    def forward(self, outputs: Tensor) -> Tensor:
        """Compute class logits: outputs (n, d) -> (n, n_classes)."""
        x = (outputs - self.centre) / self.length
        return x @ self.weight + self.offset + self.prior * zero_shot_logits(self, outputs)


class Cache(Head):
    """Zero-shot logits plus votes of the training rows, weighted by their nearness."""

    keys: Tensor
    votes: Tensor

    def __init__(self, cached: Cached, weight: float, sharpness: float) -> None:
        super().__init__(cached)
        self.weight, self.sharpness = weight, sharpness
        self.register_buffer("keys", unit(cached.outputs))
        self.register_buffer("votes", cache_votes(cached))

    def forward(self, outputs: Tensor) -> Tensor:
        """Compute class logits: outputs (n, d) -> (n, n_classes)."""
        votes = voted(unit(outputs), self.keys, self.votes, self.sharpness)
        return zero_shot_logits(self, outputs) + self.weight * votes


def cache_votes(cached: Cached) -> Tensor:
    """One vote a row for its class, weights taken into account: -> (n, n_classes)."""
    votes = functional.one_hot(cached.codes, cached.n_classes).to(cached.outputs)
    return votes * (cached.weight / cached.weight.mean()).to(votes)[:, None]


def voted(
    asked: Tensor, keys: Tensor, votes: Tensor, sharpness: float, own: Tensor | None = None
) -> Tensor:
    """Sum votes by nearness, but for `own` (n,): asked (n, d), keys (m, d) -> (n, k)."""
    pieces = []
    for rows in torch.arange(len(asked)).split(512):  # n x m numbers would not fit
        near = torch.exp(sharpness * (asked[rows] @ keys.T - 1))
        if own is not None:
            near[torch.arange(len(rows)), own[rows]] = 0
        pieces.append(near @ votes)
    return torch.cat(pieces)


class Adapter(Head):
    """Texts held against features that a small bottleneck has moved."""

    def __init__(self, cached: Cached, share: float, seed: int = 0, steps: int = 150) -> None:
        super().__init__(cached)
        self.share = share
        n_outputs = cached.outputs.shape[1]
        generator = torch.Generator().manual_seed(seed)
        narrow = max(4, n_outputs // 4)
        draw = [
            (torch.randn(a, b, generator=generator) * (2 / a) ** 0.5).to(cached.outputs)
            for a, b in ((n_outputs, narrow), (narrow, n_outputs))
        ]
        self.down, self.up = nn.Parameter(draw[0]), nn.Parameter(draw[1])
        optimizer = torch.optim.AdamW([self.down, self.up], lr=1e-3)
        weight = cached.weight / cached.weight.sum()
        for _ in range(steps):
            losses = functional.cross_entropy(self(cached.outputs), cached.codes, reduction="none")
            optimizer.zero_grad()
            (losses @ weight.to(losses)).backward()
            optimizer.step()

    def forward(self, outputs: Tensor) -> Tensor:
        """Compute class logits: outputs (n, d) -> (n, n_classes)."""
        moved = ((outputs @ self.down).relu() @ self.up).relu()
        mixed = self.share * moved + (1 - self.share) * outputs
        return zero_shot_logits(self, unit(mixed))


class Attributes(Head):
    """The mean of a class's prompts that are nearest to the image."""

    def __init__(self, cached: Cached, nearest: int) -> None:
        super().__init__(cached)
        if cached.attributes is None:
            raise ValueError("head='attributes': there are too many prompts for one row each.")
        self.nearest = nearest
        self.register_buffer("attributes", cached.attributes)
        self.register_buffer("groups", cached.groups)

    def forward(self, outputs: Tensor) -> Tensor:
        """Compute class logits: outputs (n, d) -> (n, n_classes)."""
        similarities = outputs @ self.attributes.T  # type: ignore[operator]
        columns = []
        for code in range(self.n_classes):
            own = similarities[:, self.groups == code]
            columns.append(own.topk(min(self.nearest, own.shape[1]), 1).values.mean(1))
        return self.scale * torch.stack(columns, 1) + self.bias


@dataclass(frozen=True)
class Fitted:
    """A head, and the logits of `seen_rows` from heads that were fitted without them."""

    head: Head
    logits: Tensor  # (m, n_classes)


def fit_probe(cached: Cached, folds: Folds) -> Fitted:
    """Choose prior and ridge by rows left out, and how sharp the probabilities are; fit on all."""
    usual = (min(USUAL[0], 1.0 if cached.zero_shot is not None else 0.0), USUAL[1])
    priors: tuple[float, ...] = PRIORS if cached.zero_shot is not None else PRIORS[:1]
    seen = cached[seen_rows(folds)]
    share = seen.weight / seen.weight.sum()
    wrong: dict[tuple[float, float], Tensor] = {}
    ranks: dict[tuple[float, float], tuple[float, float]] = {}
    kept: dict[tuple[float, float], Tensor] = {}  # all logits of all trials would be many

    def tried(key: tuple[float, float], make: Callable[[Cached, int], Head]) -> float:
        logits = left_out_logits(cached, folds, make)
        # accuracy, since a loss of few rows goes by how sharp the logits are
        wrong[key] = (logits.argmax(1) != seen.codes).float()
        losses = sharpened_losses(logits, seen.codes, seen.weight)
        ranks[key] = round(float(wrong[key] @ share), 6), float(losses @ share.to(losses))
        kept[key] = logits
        for other in set(kept) - {usual, min(ranks, key=ranks.__getitem__)}:
            del kept[other]
        return seen.loss(logits)

    if few_rows(cached.codes):
        priors = ()
        tried(usual, lambda rows, _: Probe(rows, *usual))
    for prior in priors:
        starts: list[Probe | None] = [None] * len(folds)
        lowest, worse = np.inf, 0
        for ridge in RIDGES:  # from the strongest on, each from the one before
            loss = tried((prior, ridge), partial(_next_probe, starts, prior, ridge))
            worse = worse + 1 if loss > lowest else 0
            lowest = min(loss, lowest)
            if worse == 2 and ridge <= usual[1]:  # the weaker the ridge, the slower
                break
    best = min(ranks, key=ranks.__getitem__)
    best = best if clearly_better(wrong[best], wrong[usual], seen.weight) else usual
    factor = 1.0
    if not few_rows(cached.codes, 1):
        factor = calibrated(1.0, kept[best], seen.codes, seen.weight)
    return Fitted(Probe(cached, *best).sharpened(factor), factor * kept[best])


def _next_probe(
    starts: list[Probe | None], prior: float, ridge: float, rows: Cached, fold: int
) -> Probe:
    starts[fold] = probe = Probe(rows, prior, ridge, starts[fold])
    return probe


def few_rows(codes: Tensor, most: int = FEW_ROWS) -> bool:
    """Whether most classes have so few rows that leaving some out says nothing: codes (n,)."""
    counts = torch.bincount(codes)
    return bool((counts[counts > 0] <= most).float().mean() > 0.5)


def fit_cache(cached: Cached, folds: Folds) -> Fitted:
    """Choose weight and sharpness; every row is left out of the votes for itself."""
    rows = seen_rows(folds)
    keys, seen = unit(cached.outputs), cached[rows]
    texts = zero_shot_logits(cached, seen.outputs)
    trials: dict[tuple[float, float], Tensor] = {}
    for sharpness in CACHE_SHARPNESS:
        votes = voted(keys[rows], keys, cache_votes(cached), sharpness, torch.as_tensor(rows))
        trials |= {(weight, sharpness): texts + weight * votes for weight in CACHE_WEIGHTS}
    best = min(trials, key=lambda key: seen.loss(trials[key]))
    return Fitted(Cache(cached, *best), trials[best])


def fit_adapter(cached: Cached, folds: Folds) -> Fitted:
    """Choose the adapter's share by the loss of rows left out."""
    seen = cached[seen_rows(folds)]
    trials = {
        share: left_out_logits(cached, folds, partial(_adapter, share)) for share in ADAPTER_SHARES
    }
    best = min(trials, key=lambda share: seen.loss(trials[share]))
    return Fitted(Adapter(cached, best), trials[best])


def _adapter(share: float, cached: Cached, fold: int) -> Head:
    return Adapter(cached, share)


def fit_attributes(cached: Cached, folds: Folds) -> Fitted:
    """Choose how many attributes count; nothing is trained."""
    seen = cached[seen_rows(folds)]
    heads = [Attributes(cached, nearest) for nearest in NEAREST]
    trials = [head(seen.outputs) for head in heads]
    best = min(range(len(heads)), key=lambda i: seen.loss(trials[i]))
    return Fitted(heads[best], trials[best])


def left_out_logits(cached: Cached, folds: Folds, make: Callable[[Cached, int], Head]) -> Tensor:
    """Logits of `seen_rows` from heads that were fitted without them: -> (m, n_classes)."""
    seen = seen_rows(folds)
    logits = cached.outputs.new_zeros(len(seen), cached.n_classes)
    for fold, (train, test) in enumerate(folds):
        head = make(cached[train], fold)
        with torch.no_grad():
            logits[np.searchsorted(seen, test)] = head(cached.outputs[test])
    return logits


def seen_rows(folds: Folds) -> NDArray[np.intp]:
    """Rows that are left out once, in order: -> (m,)."""
    return np.sort(np.concatenate([test for _, test in folds]))


#: Heads by name, and how each is fitted.
HEADS: dict[str, Callable[[Cached, Folds], Fitted]] = {
    "probe": fit_probe,
    "cache": fit_cache,
    "adapter": fit_adapter,
    "attributes": fit_attributes,
}


def candidates(cached: Cached) -> tuple[str, ...]:
    """Name the heads that can be compared on rows of this number and kind."""
    # not the adapter, which takes the longest and is a probe with less freedom
    n = len(cached.codes)
    names = ["probe"]
    if n <= MOST_ROWS:
        names.append("cache")
    if cached.attributes is not None and len(cached.attributes) > cached.n_classes:
        names.append("attributes")
    return tuple(names)


def folds_of(codes: NDArray[np.intp], n_folds: int, generator: np.random.RandomState) -> Folds:
    """Deal the rows of every class out to folds: codes (n,)."""
    fold = np.empty(len(codes), dtype=int)
    start = 0
    for code in np.unique(codes):
        rows = generator.permutation(np.flatnonzero(codes == code))
        fold[rows] = (start + np.arange(len(rows))) % n_folds
        start += len(rows)
    rows = np.arange(len(codes))
    parts = [(rows[fold != k], rows[fold == k]) for k in range(n_folds) if (fold == k).any()]
    return parts if len(rows) > 1 else [(rows, rows)]  # it can only stand for itself


def rebuilt(description: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
    """Make a head from what it told of itself."""
    kinds = {kind.__name__: kind for kind in (Probe, Cache, Adapter, Attributes)}
    numbers = dict(description)
    kind = kinds[numbers.pop("kind")]
    head = kind.__new__(kind)
    nn.Module.__init__(head)
    for name, value in numbers.items():
        setattr(head, name, value)
    for name, tensor in ({"zero_shot": None} | tensors).items():
        head.register_buffer(name, tensor)
    return head
