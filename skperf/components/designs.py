"""Which gates are where in which pass, and how a budget is spent.

Every draw has a seed of its own, made of the user's seed, the purpose and a number, so that
no result depends on how the work is cut.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Masks = NDArray[np.bool_]

_FIT, _FRESH, _GROUPS, _PHASES = range(4)
_BLOCK = 64
_GOLDEN = 0.6180339887498949
GRADIENT_COST = 3
"""Forward-equivalents of one forward and backward pass."""
_LEAST = 12
_FEW_TOGETHER = 10


def bernoulli_masks(
    seed: int, numbers: range, n_components: int, fraction: float, *, fresh: bool = False
) -> Masks:
    """Random masks that ablate all with the same probability: -> (n_masks, n_components)."""
    purpose = _FRESH if fresh else _FIT
    rows = [_stream(seed, purpose, number).random(n_components) for number in numbers]
    return np.stack(rows) >= fraction if rows else np.ones((0, n_components), bool)


def path_gates(
    seed: int, number: int, rows: range, n_components: int, n_groups: int
) -> tuple[Floats, Masks]:
    """Gates of one pass of the balanced path design, and which are tested: (n_rows, N)."""
    # The components of every example are dealt into `n_groups` groups, anew in each round of
    # `n_groups` passes. A pass opens all gates but those of one group, whose gates stand at
    # points of [0, 1] that are spread evenly over the rounds from a random start.
    round_, turn = divmod(number, n_groups)
    blocks = range(rows[0] // _BLOCK, rows[-1] // _BLOCK + 1)
    first = rows[0] - blocks[0] * _BLOCK
    chosen = slice(first, first + len(rows))
    deals = [_deal(seed, round_, block, n_components, n_groups) for block in blocks]
    starts = [_starts(seed, block, n_components) for block in blocks]
    tested = np.concatenate(deals)[chosen] == turn
    points = (np.concatenate(starts)[chosen] + round_ * _GOLDEN) % 1
    return np.where(tested, points, 1).astype(np.float32), tested


@lru_cache(maxsize=16)
def _deal(
    seed: int, round_: int, block: int, n_components: int, n_groups: int
) -> NDArray[np.int16]:
    """Group of every component in one round, for one block of examples."""
    draws = _stream(seed, _GROUPS, round_, block).random((_BLOCK, n_components), np.float32)
    ranks = draws.argsort(1).argsort(1)
    return (ranks % n_groups).astype(np.int16)


@lru_cache(maxsize=16)
def _starts(seed: int, block: int, n_components: int) -> Floats:
    return _stream(seed, _PHASES, block).random((_BLOCK, n_components), np.float32)


@dataclass(frozen=True)
class Plan:
    """How a budget is spent."""

    gradients: int = 0
    masks: int = 0
    singles: int = 0

    @property
    def cost(self) -> int:
        """Forward-equivalents, the intact network's own pass included."""
        return 1 + GRADIENT_COST * self.gradients + self.masks + self.singles


def plan_budget(
    method: str,
    budget: int,
    n_components: int,
    fraction: float,
    *,
    differentiable: bool = True,
    done: Plan | None = None,
) -> Plan:
    """Split a budget of forward-equivalents."""
    alone = n_components - (done.singles if done else 0)
    if method == "loo":
        return Plan(singles=alone)
    least = {"auto": _LEAST, "regression": 3, "path_gradient": 1 + GRADIENT_COST}[method]
    if budget < least:
        raise ValueError(f"budget={budget} is too small: method={method!r} needs at least {least}.")
    rest = budget - 1
    if method == "path_gradient":
        return Plan(gradients=rest // GRADIENT_COST)
    if method == "regression":
        return Plan(masks=rest)
    if fraction * n_components <= _FEW_TOGETHER and rest >= alone:
        left = rest - alone
        worth = differentiable and budget >= 2 * n_components
        gradients = left // (2 * GRADIENT_COST) if worth else 0
        return Plan(gradients, left - GRADIENT_COST * gradients, alone)
    if not differentiable:
        return Plan(masks=rest)
    # gradients while they say most, masks more and more as the budget outgrows the parts
    masks_share = 0.25 + 0.25 * min(1.0, rest / (4 * n_components))
    gradients = (rest - max(6, round(rest * masks_share))) // GRADIENT_COST
    return Plan(gradients=gradients, masks=rest - GRADIENT_COST * gradients)


def _stream(seed: int, *purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=purpose))
