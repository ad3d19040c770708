"""Refits, corrections and mix estimation against the clock.

Run with ``python -m benchmarks.performative_speed``; writes
``benchmarks/results/performative_speed.json``.
"""

from pathlib import Path

import numpy as np
from scipy.special import softmax

from benchmarks import runner
from benchmarks.timing import interleaved
from skperf.performative.label_shift import em_prior, probabilities
from skperf.performative.response import Form, Inputs, fit_map

RESULTS = Path(__file__).parent / "results" / "performative_speed.json"


def main():
    rng = np.random.default_rng(0)
    statistics = rng.uniform(0.2, 1.0, size=(200, 100))
    counts = np.array([rng.multinomial(1000, softmax(-s / 0.3)) for s in statistics], float)
    unknown, none = np.full((200, 1, 100), np.nan), np.zeros((200, 0))
    inputs = Inputs(statistics[:, None], unknown, unknown[:, 0], none, none)
    base = np.log(np.full(100, 0.01))
    logits = rng.normal(size=(1_000_000, 10))
    shift = np.log(rng.dirichlet(np.ones(10)))
    scores = rng.normal(size=(20_000, 100)) * 3
    rows = {
        "tied map, 200 rounds x 100 classes": lambda: fit_map(
            inputs, counts, form=Form(("statistic",)), log_base=base
        ),
        "linear map, 200 rounds x 100 classes": lambda: fit_map(
            inputs, counts, form=Form(("statistic",), ("statistic",)), log_base=base
        ),
        "correction, 1,000,000 x 10 logits": lambda: probabilities(logits + (shift - np.log(0.1))),
        "EM, 20,000 x 100, 50 matrix-vector steps": lambda: em_prior(
            scores, base, max_iter=50, tol=0.0
        ),
        "EM, 20,000 x 100, 50 element-wise steps": lambda: by_elements(scores, np.exp(base)),
    }
    found = interleaved(rows, repeats=5)
    setups = {
        "ours": lambda: em_prior(scores, base, max_iter=0),
        "theirs": lambda: by_elements(scores, np.exp(base), n_steps=0),
    }
    before = {name: 1e3 * row["cpu"] for name, row in interleaved(setups, repeats=5).items()}
    records = [
        {
            "task": name,
            "CPU ms (median)": round(1e3 * row["cpu"], 1),
            "least": round(1e3 * row["cpu_min"], 1),
            "greatest": round(1e3 * row["cpu_max"], 1),
        }
        for name, row in found.items()
    ]
    fast, slow = (records[i]["CPU ms (median)"] for i in (3, 4))
    ratio = {"task": "EM, whole call over element-wise", "CPU ms (median)": round(fast / slow, 3)}
    step = (fast - before["ours"]) / (slow - before["theirs"])
    ratio_step = {"task": "EM, step over element-wise step", "CPU ms (median)": round(step, 3)}
    records += [r | {"least": None, "greatest": None} for r in (ratio, ratio_step)]
    for record in records:
        print(*record.values(), sep="  ")
    runner.save(RESULTS, records)


def by_elements(scores, base, n_steps=50):
    """Iterate in the textbook form, which builds the responsibilities at every step."""
    proba, prior = softmax(scores, axis=1), base.copy()
    for _ in range(n_steps):
        responsibilities = proba * (prior / base)
        responsibilities /= responsibilities.sum(axis=1, keepdims=True)
        prior = responsibilities.mean(axis=0)
    return prior


if __name__ == "__main__":
    main()
