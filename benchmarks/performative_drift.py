"""Excess log loss over the true mix in worlds that answer, drift, change, or do nothing.

Run with ``python -m benchmarks.performative_drift [--seeds 5]``; writes
``benchmarks/results/performative_drift.json``, and goes on where the same code was broken
off. Five Gaussian classes, a frozen logistic
regression, 70 rounds of 1,000 rows, judged from the fourth round on. "floor" is the excess of
whoever is told the true mix of the round before. No default was chosen on the worlds marked
"unseen"; horizons, the share dealt out anew and the costs of forms were chosen on worlds of the
other kinds, drawn from other seeds.
"""

import argparse
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, softmax
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from benchmarks import runner
from benchmarks.performative_worlds import nll
from skperf import PerformativeAdapter

RESULTS = Path(__file__).parent / "results" / "performative_drift.json"
N_CLASSES, N_ROUNDS, N_ROWS, TURN, FIRST = 5, 70, 1000, 40, 3
EQUAL = np.full(N_CLASSES, 1 / N_CLASSES)


@dataclass
class Nature:
    """What the next mix is made of: the deployed model's recall and shares, and a state."""

    generator: np.random.Generator
    older: np.ndarray | None = None
    t: int = 0

    def __post_init__(self):
        draw = self.generator
        self.log_mix, self.step = 0.5 * draw.normal(size=N_CLASSES), np.zeros(N_CLASSES)
        self.phase = draw.uniform(0, 2 * np.pi, N_CLASSES)
        self.trend = 0.05 * draw.normal(size=N_CLASSES)
        self.slopes = draw.uniform(2, 8, N_CLASSES)
        self.matrix = 2 * draw.normal(size=(N_CLASSES, N_CLASSES))

    def normal(self):
        """Draw one number a class."""
        return self.generator.normal(size=N_CLASSES)


def walk(world, recall, shares):
    world.log_mix = world.log_mix + 0.25 * world.normal()
    return world.log_mix


def trend(world, recall, shares):
    world.log_mix = world.log_mix + world.trend
    return world.log_mix


def level_shift(world, recall, shares):
    if world.t % 20 == 0:
        world.log_mix = world.normal()
    return world.log_mix


def momentum(world, recall, shares):
    world.step = 0.8 * world.step + 0.12 * world.normal()
    world.log_mix = 0.97 * world.log_mix + world.step
    return world.log_mix


def inertia(world, recall, shares):
    world.log_mix = 0.7 * log_softmax(world.log_mix) + 0.3 * log_softmax(-recall / 0.1)
    return world.log_mix


def stops(world, recall, shares):
    if world.t < TURN:
        world.log_mix = -recall / 0.2
    return world.log_mix


def delay(world, recall, shares):
    before, world.older = world.older, recall
    return -(recall if before is None else before) / 0.2


WORLDS: dict[str, Callable] = {
    "answer": lambda w, recall, shares: -recall / 0.2,
    "popularity": lambda w, recall, shares: recall / 0.3,
    "bent answer": lambda w, r, s: -np.tanh(4 * (r - r.mean())) / 0.3,
    "inertia": inertia,
    "predicted shares": lambda w, recall, shares: -shares / 0.2,
    "season": lambda w, r, s: 1.2 * np.sin(2 * np.pi * w.t / 12 + w.phase),
    "walk": walk,
    "trend": trend,
    "level shift": level_shift,
    "momentum": momentum,
    "answer stops": stops,
    "answer turns": lambda w, recall, shares: (-recall if w.t < TURN else recall) / 0.2,
    "static": lambda w, recall, shares: w.log_mix,
    "independent": lambda w, r, s: np.log(w.generator.dirichlet(np.full(N_CLASSES, 8.0))),
    "own slopes (unseen)": lambda w, recall, shares: -w.slopes * recall,
    "other classes (unseen)": lambda w, recall, shares: w.matrix @ recall,
    "delay (unseen)": delay,
}
ARMS = {"adapter": {}, "adapter + batch": {"transductive": "map_em"}, "paper": {"adapter": "paper"}}


def run(name, seed, arm):
    """Live through one world: losses (n_rounds, 5) of none, arm, floor, true mix; coverage."""
    generator = np.random.default_rng(seed)
    means = 1.3 * generator.normal(size=(N_CLASSES, N_CLASSES))

    def rows(y):
        return means[y] + generator.normal(size=(len(y), N_CLASSES))

    y = generator.integers(N_CLASSES, size=3000)
    model = LogisticRegression(max_iter=500).fit(rows(y), y)
    adapter = PerformativeAdapter(FrozenEstimator(model), random_state=seed, **ARMS[arm])
    world, mix, before = Nature(generator), EQUAL, EQUAL
    losses, held, recall, shares = [], [], None, None
    for t in range(N_ROUNDS):
        if recall is not None:
            world.t += 1
            mix = np.maximum(softmax(WORLDS[name](world, recall, shares)), 1e-4)
            mix = mix / mix.sum()
        y = generator.choice(N_CLASSES, N_ROWS, p=mix)
        X = rows(y)
        logits = model.predict_log_proba(X)
        log_proba = logits if t == 0 else adapter.predict_log_proba(X)
        if t >= FIRST:
            base = np.log(adapter.base_prior_)
            low, high = adapter.predict_prior(return_interval=True)[1]
            found = np.bincount(y, minlength=N_CLASSES) / N_ROWS
            held.append(np.mean((low <= found) & (found <= high)))
            mixes = (np.log(before), np.log(mix))
            losses.append(
                [nll(logits, y), nll(log_proba, y), *(nll(logits - base + m, y) for m in mixes)]
            )
        predicted = log_proba.argmax(axis=1)
        adapter.partial_fit(X, y, rounds=t)
        recall, before = adapter.statistic_, mix
        shares = np.bincount(predicted, minlength=N_CLASSES) / N_ROWS
    return np.array(losses), float(np.mean(held)), adapter


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    records = runner.begun(RESULTS)
    done = [(one["world"], one["arm"]) for one in records if one["seeds"] == options.seeds]
    for name in WORLDS:
        for arm in ARMS:
            if (name, arm) in done:
                continue
            runs = [run(name, seed, arm) for seed in range(options.seeds)]
            excess = np.array([(losses - losses[:, 3:]).mean(axis=0) for losses, _, _ in runs])
            worse = [int((x[TURN:, 1] > x[TURN:, 0] + 0.005).sum()) for x, _, _ in runs]
            record = {
                "world": name,
                "arm": arm,
                "nothing": excess[:, 0].mean(),
                "floor": excess[:, 2].mean(),
                "excess": excess[:, 1].mean(),
                "largest": excess[:, 1].max(),
                "late rounds worse than nothing": max(worse),
                "90 % interval holds": np.mean([held for _, held, _ in runs]),
                "seeds": options.seeds,
            }
            record = {
                k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()
            }
            print(*(f"{key} {value}" for key, value in record.items()), sep="  ", flush=True)
            records = [r for r in records if (r["world"], r["arm"]) != (name, arm)] + [record]
            order = [(w, a) for w in WORLDS for a in ARMS]
            records.sort(key=lambda r: order.index((r["world"], r["arm"])))
            runner.save(RESULTS, records, seeds=range(options.seeds))


if __name__ == "__main__":
    main()
