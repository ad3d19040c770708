"""Time and memory of ten thousand rounds, thousand by thousand.

Run with ``python -m benchmarks.performative_rounds [--rounds 10000]``; writes
``benchmarks/results/performative_rounds.json``. Five Gaussian classes in a world that collects
what the model gets wrong, rounds of 100 rows, all maps but the perceptron. Peak memory is that of
the whole process so far.
"""

import argparse
import pickle
import resource
import time
from pathlib import Path

import numpy as np
from scipy.special import softmax
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from benchmarks import runner
from skperf import PerformativeAdapter

RESULTS = Path(__file__).parent / "results" / "performative_rounds.json"
N_CLASSES, N_ROWS, STEP = 5, 100, 1000
KINDS = ["fixed", "tied", "curve", "linear"]


def live(n_rounds):
    """Live through rounds; one record after every thousand."""
    generator = np.random.default_rng(0)
    means = 1.3 * generator.normal(size=(N_CLASSES, N_CLASSES))

    def rows(y):
        return means[y] + generator.normal(size=(len(y), N_CLASSES))

    y = generator.integers(N_CLASSES, size=3000)
    model = FrozenEstimator(LogisticRegression(max_iter=500).fit(rows(y), y))
    adapter, mix, records = PerformativeAdapter(model, adapter=KINDS, random_state=0), None, []
    start = time.process_time()
    for number in range(n_rounds):
        y = generator.choice(N_CLASSES, N_ROWS, p=mix)
        adapter.partial_fit(rows(y), y, rounds=number)
        mix = softmax(-adapter.statistic_ / 0.2)
        if (number + 1) % STEP == 0:
            now = time.process_time()
            record = {
                "rounds": number + 1,
                "CPU ms a round": round(1e3 * (now - start) / STEP, 2),
                "peak memory MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                "pickle MB": round(len(pickle.dumps(adapter)) / 1e6, 2),
            }
            print(*record.values(), sep="  ", flush=True)
            records.append(record)
            start = time.process_time()
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10_000)
    options = parser.parse_args()
    runner.save(RESULTS, live(options.rounds), seeds=[0])


if __name__ == "__main__":
    main()
