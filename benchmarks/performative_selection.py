"""How well candidates are ranked by what they would score in the round after their deployment.

Run with ``python -m benchmarks.performative_selection [--seeds 8]``; writes
``benchmarks/results/performative_selection.json`` and, seed by seed,
``performative_selection_rows.json``, from which it goes on where the same code was broken off. One
frozen classifier lives through 60 rounds
without correction; 20 others, each with strengths of its own, are then ranked on 2,000 labelled
rows, and held against what each would truly score: its recalls on 100,000 rows, in the mix of the
round that answers them.
"""

import argparse
from itertools import product
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from benchmarks import runner
from benchmarks.performative_worlds import COLUMNS, World
from skperf import PerformativeAdapter

FOLDER = Path(__file__).parent / "results"
ROWS, TABLE = (FOLDER / f"performative_selection{end}.json" for end in ("_rows", ""))
N_CLASSES, N_CANDIDATES, N_ROUNDS = 10, 20, 60
WORLDS = ("C10 t0.1", "C10 t0.3", "C10 bent")
ADAPTERS = {"auto": {}, "tied": {"adapter": "tied"}}
SCORERS = ("current accuracy", "balanced accuracy", *ADAPTERS)


def candidates(world, generator):
    """Logistic regressions on some of the columns, with weights on the classes at random."""
    models = []
    for _ in range(N_CANDIDATES):
        y = np.repeat(np.arange(N_CLASSES), generator.integers(20, 200))
        columns = generator.permutation(6)[: generator.integers(3, 7)]
        weights = dict(enumerate(np.exp(generator.normal(size=N_CLASSES))))
        model = make_pipeline(
            FunctionTransformer(np.take, kw_args={"indices": columns, "axis": 1}),
            LogisticRegression(max_iter=300, class_weight=weights),
        )
        models.append(model.fit(world.rows(y), y))
    return models


def run(column, seed):
    """Kendall, regret, error, coverage and width of every scorer on one world."""
    world = World(COLUMNS[column], seed)
    adapters = {
        name: PerformativeAdapter(
            FrozenEstimator(world.backbone), base_prior="uniform", random_state=seed, **given
        )
        for name, given in ADAPTERS.items()
    }
    statistic = None
    for number in range(N_ROUNDS):
        X, y = world.next_round(statistic)
        deployed = world.backbone.predict(X)  # never adapted
        for adapter in adapters.values():
            adapter.partial_fit(X, y, rounds=number, deployed_pred=deployed)
        statistic = adapters["auto"].statistic_
    models = candidates(world, world.generator)
    many = np.repeat(np.arange(N_CLASSES), 10_000)
    fresh, held = world.rows(many), np.repeat(np.arange(N_CLASSES), 200)
    recalls = np.array([_recalls(model, fresh, many) for model in models])
    truth = np.array([_met(world, recall) @ recall for recall in recalls])
    labelled = world.rows(held)
    measured = np.array([_recalls(model, labelled, held) for model in models])
    now = np.bincount(y, minlength=N_CLASSES) / len(y)
    scores = {"current accuracy": measured @ now, "balanced accuracy": measured.mean(axis=1)}
    covered, width = dict.fromkeys(SCORERS, np.nan), dict.fromkeys(SCORERS, np.nan)
    for name, adapter in adapters.items():
        found = adapter.rank_models(models, labelled, held)
        scores[name] = found.predicted
        covered[name] = np.mean((found.low <= truth) & (truth <= found.high))
        width[name] = np.mean(found.high - found.low)
    return {
        name: (
            kendalltau(score, truth)[0],
            truth.max() - truth[score.argmax()],
            np.abs(score - truth).mean(),
            covered[name],
            width[name],
        )
        for name, score in scores.items()
    }


def _met(world, recalls):
    """Give the mix of the round that answers recalls."""
    world.prior = world.column.answer(recalls, world.generator)
    return world.mix()


def _recalls(model, X, y):
    return (model.predict(X) == y).reshape(N_CLASSES, -1).mean(axis=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    rows = runner.begun(ROWS)
    done = [(one["world"], one["seed"]) for one in rows]
    for seed, column in product(range(options.seeds), WORLDS):
        if (column, seed) not in done:
            for name, values in run(column, seed).items():
                values = [float(value) for value in values]
                rows.append({"world": column, "seed": seed, "scorer": name, "values": values})
                print(*rows[-1].values(), sep="  ", flush=True)
            runner.save(ROWS, rows)
    records = []
    for column in WORLDS:
        for name in SCORERS:
            same = [r["values"] for r in rows if (r["world"], r["scorer"]) == (column, name)]
            values = np.array(same)
            mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
            record = {
                "world": column,
                "scorer": name,
                "Kendall": mean[0],
                "least Kendall": low[0],
                "regret of the first": mean[1],
                "largest regret": high[1],
                "error of the score": mean[2],
                "90 % interval holds": None if np.isnan(mean[3]) else mean[3],
                "width of the interval": None if np.isnan(mean[4]) else mean[4],
                "seeds": options.seeds,
            }
            record = {
                k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()
            }
            records.append(record)
    runner.save(TABLE, records, seeds=range(options.seeds))


if __name__ == "__main__":
    main()
