"""How much of an anticipated mix is applied, and to which scores: judged by corrected rows.

After each round every calibration, strength and mix of a grid is scored by the log loss of the
round's rows under the mix that had been anticipated for it. What did best over the rounds so far
is used, unless it has cost something lately or made fewer predictions right: then less, or nothing.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from skperf.performative.anticipation import blend
from skperf.performative.label_shift import Array, Calibration, Codes

STRENGTHS = np.array([0.0, 0.25, 0.5, 0.75, 0.9, 1.0])
MIXES = np.array([0.0, 0.01, 0.03, 0.1, 0.25, 0.5])
JUDGED = 500  # rows of a round that are enough to tell options apart
SLOW, FAST = 0.97, 0.7  # memories: about thirty and three rounds
CHANGED = 0.1  # share of predictions that a correction may change, for chance in accuracies
SURE = 0.5  # standard errors
BAD = 2.0  # root mean squares of what a proposal changes in a round
CALIBRATION_GAIN = 0.01  # of the log loss that a calibration has to save to be used


@dataclass(frozen=True, eq=False)
class Option:
    """What is applied: a calibration by position, a strength and a mix of the base."""

    calibration: int = 0
    strength: float = 0.0
    mix: float = 0.0


@dataclass(frozen=True, eq=False)
class Corrector:
    """Losses and accuracies of every option over the rounds so far, older ones fading."""

    strengths: Array
    mixes: Array
    calibrators: tuple[Calibration | None, ...]
    slow: Array  # (n_calibrations, n_strengths, n_mixes)
    fast: Array
    right: Array
    noise: Array  # variance of `fast` against no correction
    own_right: float = 0.0  # of the classifier's own rule
    weight: float = 0.0
    n_rounds: int = 0
    n_rows: float = 0.0  # judged, older ones fading
    choice: Option = Option()
    proposed: Option = Option()  # what would be the choice if proposals had kept the accuracy
    proposed_right: float = 0.0  # of the proposals, each of the round after it
    swings: float = 0.0  # squares of what proposals gained, less those of chance
    failed: bool = False  # whether the last one lost more than chance would

    def calibrated(self, logits: Array, option: Option | None = None) -> Array:
        """Scores (n, n_classes) as an option calibrates them."""
        calibrator = self.calibrators[(option or self.choice).calibration]
        return logits if calibrator is None else calibrator(logits)

    def keeps_order(self, calibration: int) -> bool:
        """Whether a calibration leaves the classifier's own predictions as they are."""
        calibrator = self.calibrators[calibration]
        return calibrator is None or not calibrator.bias.any()

    def log_prior(self, answer: Array, log_base: Array, strength: float | None = None) -> Array:
        """Apply the choice to an answer (..., n_classes)."""
        strength = self.choice.strength if strength is None else strength
        return blend(answer, log_base, strength, self.choice.mix)

    def judged(
        self,
        logits: Array,
        codes: Codes,
        weight: Array,
        answer: Array,
        log_base: Array,
        own: NDArray[np.bool_],
    ) -> "Corrector":
        """Score options on rows of a round: logits (n, K), codes, own hits (n,), answer (K,)."""
        kept = np.linspace(0, len(codes) - 1, min(len(codes), JUDGED)).astype(int)
        logits, codes, weight = logits[kept], codes[kept], weight[kept] / weight[kept].sum()
        own_right = float(weight @ own[kept])  # of the same rows, or chance decides
        mixes = self._grid(answer, log_base)
        losses, right, noise = [], [], []
        plain = None
        for i in range(len(self.calibrators)):
            scores = self.calibrated(logits, Option(i)) - log_base
            top = scores.max(axis=1, keepdims=True)
            total = np.exp(scores - top) @ np.exp(mixes).T  # (n, n_options)
            true = (scores - top)[np.arange(len(codes)), codes, None] + mixes[:, codes].T
            each = np.log(np.maximum(total, 1e-300)) - true  # (n, n_options)
            plain = each[:, :1] if plain is None else plain
            losses.append(weight @ each)
            noise.append(weight**2 @ (each - plain - weight @ (each - plain)) ** 2)
            best = np.array([(scores + mix).argmax(axis=1) == codes for mix in mixes])
            hits = best @ weight
            if self.keeps_order(i) and self.strengths[0] == 0.0:
                hits[: len(self.mixes)] = own_right
            right.append(hits)
        judged = self._with(np.array(losses), np.array(right), np.array(noise))
        rows, told = SLOW * self.n_rows + len(codes), SLOW * self.own_right + own_right
        proposed_hits = float(np.reshape(right, self.slow.shape)[self._at(self.proposed)])
        gain, by_chance = proposed_hits - own_right, CHANGED / len(codes)
        return replace(
            judged,
            own_right=told,
            n_rows=rows,
            proposed_right=SLOW * self.proposed_right + proposed_hits,
            swings=max(0.0, SLOW * self.swings + gain**2 - by_chance),
            failed=bool(gain < -np.sqrt(by_chance)),
        )

    def judged_by_shares(self, counts: Array, answer: Array, log_base: Array) -> "Corrector":
        """Score all options on label counts (K,), where there are no rows."""
        shares, each = counts / counts.sum(), -self._grid(answer, log_base)  # (n_options, K)
        gaps = each - each[:1]
        noise = ((gaps - (gaps @ shares)[:, None]) ** 2 @ shares) / counts.sum()
        losses, noise = (np.tile(a, (len(self.calibrators), 1)) for a in (each @ shares, noise))
        return self._with(losses, np.zeros_like(losses), noise)

    def _grid(self, answer: Array, log_base: Array) -> Array:
        grid = blend(answer, log_base, self.strengths[:, None, None], self.mixes[None, :, None])
        return grid.reshape(-1, len(log_base))

    def _with(self, losses: Array, right: Array, noise: Array) -> "Corrector":
        losses, right, noise = (a.reshape(self.slow.shape) for a in (losses, right, noise))
        return replace(
            self,
            slow=SLOW * self.slow + losses,
            fast=FAST * self.fast + losses,
            right=SLOW * self.right + right,
            noise=FAST**2 * self.noise + noise,
            weight=SLOW * self.weight + 1.0,
            n_rounds=self.n_rounds + 1,
        )

    def chosen(self, n_rounds: int, min_rounds: int, moving: bool = False) -> "Corrector":
        """Choose what to apply from now on; `moving` classes ask for more evidence."""
        free = 0.0 in self.strengths
        nothing = Option() if free else Option(0, float(self.strengths[-1]), float(self.mixes[0]))
        if n_rounds < min_rounds or self.weight == 0.0:
            start = Option() if n_rounds < min_rounds else nothing
            return replace(self, choice=start, proposed=start)
        allowed, chance = np.ones(self.slow.shape, bool), np.sqrt(CHANGED / max(self.n_rows, 1.0))
        if free:
            allowed = self.right >= self.own_right - SURE * chance * self.weight
            allowed[0, 0] = True
        best = self._best(self.slow, allowed)
        if best[0] and len(self.calibrators) > 1:
            plain = self._best(self.slow, allowed & (np.arange(len(allowed)) == 0)[:, None, None])
            # scores that are right as they are should not be bent to a round's noise
            if self.slow[plain] - self.slow[best] < CALIBRATION_GAIN * self.slow[plain]:
                best = plain
        still = best[0], 0, 0
        if free and self.right[best] <= self.right[still] and allowed[still]:
            # what makes no more predictions right has to save more than a round's noise
            gained = self.slow[still] - self.slow[best]
            best = still if gained < CALIBRATION_GAIN * self.slow[still] else best
        cost = self.fast[best] - self.fast[0, 0, 0]
        if free and cost > np.sqrt(self.noise[best]):
            best = self._best(self.fast, allowed)
        proposed = option = self._option(best)
        # what did best of many on past rows need not do so on those to come
        lost, allowance = self.own_right - self.proposed_right, SURE * chance * self.weight
        if moving:
            # past gains tell less of the next one: they have to cover a bad round, and what has
            # begun to lose goes on
            swing = np.inf if self.failed else np.sqrt(self.swings / self.weight)
            allowance = -allowance - BAD * swing
        if free and lost > allowance:
            every = range(len(self.calibrators))  # one that is asked for stays
            kept = [i for i in every if self.keeps_order(i)] or every
            option = self._option((min(kept, key=lambda i: float(self.slow[i, 0, 0])), 0, 0))
        return replace(self, choice=option, proposed=proposed)

    def _option(self, at: tuple[int, ...]) -> Option:
        return Option(at[0], float(self.strengths[at[1]]), float(self.mixes[at[2]]))

    def _at(self, option: Option) -> tuple[int, ...]:
        strength, mix = np.abs(self.strengths - option.strength), np.abs(self.mixes - option.mix)
        return option.calibration, int(strength.argmin()), int(mix.argmin())

    def _best(self, losses: Array, allowed: NDArray[np.bool_]) -> tuple[int, ...]:
        flat = np.where(allowed, losses, np.inf).argmin()
        return tuple(int(i) for i in np.unravel_index(int(flat), losses.shape))
