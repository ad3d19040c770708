"""Component attribution side by side with the released procedure, captum and simpler methods.

    python -m benchmarks.components curve --network resnet --fraction 0.1 --seed 0
    python -m benchmarks.components speed
    python -m benchmarks.components race
    python -m benchmarks.components coverage
    python -m benchmarks.components plot

The networks are those of components_networks.py. Every run writes
benchmarks/results/components_*.json; "plot" draws the curves from these files. captum is used by
"race" where it is installed (see benchmarks/peers.txt).
"""

import argparse

import numpy as np
import torch

from benchmarks import runner
from benchmarks.components_networks import NETWORKS, attributor, n_logits
from benchmarks.components_race import RESULTS, race, save, speed
from skperf.backbone._opening import open_network
from skperf.components.designs import Plan, bernoulli_masks, plan_budget
from skperf.components.estimation import ridge
from skperf.components.passes import Measurements, spend
from skperf.components.recipes import attribute
from skperf.metrics import counterfactual_correlation


class Curve:
    """Correlation with fresh ablations against the budget, for every method.

    All methods see the same masks, a larger budget those of a smaller one and more.
    """

    def __init__(self, network, fraction, seed, n_test):
        module, X, y, components = NETWORKS[network]()
        model = attributor(
            module,
            components,
            n_logits(module, X),
            fraction=fraction,
            random_state=seed,
            method="gradient",
        ).fit(X, y)
        self.question = model._study.question(open_network(model.estimator_))
        self.baseline = model.baseline_output_
        self.masks = model._study.fresh_masks(n_test, fraction)
        self.about = {
            "network": network,
            "fraction": fraction,
            "seed": seed,
            "n_components": model.n_components_,
            "n_examples": len(X),
        }
        self.rows = []
        self.actual = self.question.outcomes(self.masks).T
        self.record("gradient x parameter", 4, model.attributions_, model.intercept_)

    def record(self, method, cost, coefficients, intercept):
        """Compare predictions with the truth, and save."""
        predicted = coefficients @ self.masks.T + intercept[:, None]
        actual, varies = self.actual, self.actual.var(1) > 0
        r2 = 1 - ((predicted - actual) ** 2).mean(1)[varies] / actual.var(1)[varies]
        slope = ((predicted - predicted.mean(1, keepdims=True)) * actual).mean(1)[varies]
        slope = slope / np.maximum(predicted.var(1)[varies], 1e-12)
        row = {
            **self.about,
            "method": method,
            "cost": int(cost),
            "correlation": round(counterfactual_correlation(predicted, actual), 4),
            "r2": round(float(np.median(r2)), 4),
            "slope": round(float(np.median(slope)), 3),
        }
        print(row, flush=True)
        self.rows.append(row)
        save("curve_{network}_{fraction}_{seed}".format(**self.about), self.rows)

    def auto(self, budgets):
        """Take gradients, then ridge around them."""
        asked = self.question
        for budget in budgets:
            measured = Measurements(self.baseline, asked.n_components)
            spend(asked, measured, plan_budget("auto", budget, asked.n_components, asked.fraction))
            fit = attribute(asked, measured)[0]
            self.record("auto", budget, fit.coefficients, fit.intercept)

    def least_squares(self, budgets):
        """Fit as released, and by ridge with nothing known before."""
        question = self.question
        m = max(budgets) - 1
        masks = bernoulli_masks(question.seed, range(m), question.n_components, question.fraction)
        outcomes = question.outcomes(masks)
        for budget in budgets:
            V, Y = masks[: budget - 1].astype(float), outcomes[: budget - 1]
            design = np.column_stack([V, np.ones(len(V))])
            weights = np.linalg.lstsq(design, Y, rcond=None)[0]
            self.record("least squares", budget, weights[:-1].T, weights[-1])
            fit = ridge(V, Y, anchor=self.baseline)
            self.record("ridge", budget, fit.coefficients, fit.intercept)

    def one_at_a_time(self):
        """Ablate every component alone."""
        measured = Measurements(self.baseline, self.question.n_components)
        spend(self.question, measured, Plan(singles=self.question.n_components))
        fit = attribute(self.question, measured)[0]
        self.record("leave one out", measured.done.cost, fit.coefficients, fit.intercept)


BUDGETS = {
    "resnet": [100, 200, 448, 1120, 2240],
    "rnet": [100, 140, 141, 150, 160, 180, 220, 280, 420, 560],
    "minilm": [72, 73, 100, 144, 216, 288],
    "lite0": [150, 300, 600, 1200],
}


def curve(options):
    """All methods at all budgets, up to four passes a component; "auto" alone for lite0."""
    deep = options.network == "lite0"
    fraction = options.fraction or (0.01 if deep else 0.1)
    result = Curve(options.network, fraction, options.seed, options.n_test)
    budgets = options.budgets or BUDGETS[options.network]
    result.auto(budgets)
    if not deep:
        result.least_squares(budgets)
        result.one_at_a_time()


def coverage(n_repeats=30, fraction=0.1, budget=200):
    """How often +-2 standard errors cover the mean of repeated fits."""
    module, X, y, components = NETWORKS["rnet"]()
    table = {}
    for method in ("auto", "path_gradient", "regression"):
        fits = [
            attributor(
                module,
                components,
                2,
                fraction=fraction,
                budget=budget,
                method=method,
                random_state=seed,
            ).fit(X[::4], y[::4])
            for seed in range(n_repeats)
        ]
        mean = np.mean([fit.attributions_ for fit in fits], 0)
        inside = [np.abs(fit.attributions_ - mean) <= 2 * fit.stderr_ for fit in fits]
        table[method] = round(float(np.mean(inside)), 4)
        print(method, table[method], flush=True)
        save("coverage", {"n_repeats": n_repeats, "budget": budget, **table})


def plot():
    """Draw correlation against forward-equivalents: one figure of all networks, one of lite0."""
    import matplotlib.pyplot as plt

    paths = sorted(RESULTS.glob("components_curve_*.json"))
    rows = [row for path in paths for row in runner.load(path)]
    small = [row for row in rows if row["network"] != "lite0"]
    deep = [row for row in rows if row["network"] == "lite0"]
    networks = ["resnet", "rnet", "minilm"]
    figure, axes = plt.subplots(2, 3, figsize=(10, 6), layout="constrained")
    for line, fraction in zip(axes, (0.1, 0.05), strict=True):
        for ax, network in zip(line, networks, strict=True):
            here = [r for r in small if (r["network"], r["fraction"]) == (network, fraction)]
            draw(ax, here, "correlation")
            count = f"{here[0]['n_components']} parts, " if here else ""
            ax.set_title(f"{network}: {count}{fraction} ablated", fontsize=10)
        line[0].set_ylabel("correlation with fresh ablations")
    axes[0, 1].legend(fontsize=8, loc="lower left")
    figure.savefig(RESULTS / "components.png", dpi=100)
    figure, axes = plt.subplots(1, 2, figsize=(7, 3), layout="constrained")
    for ax, key in zip(axes, ("correlation", "slope"), strict=True):
        draw(ax, deep, key)
        ax.set_ylabel(key)
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / "components_lite0.png", dpi=100)


COLOURS = {
    "auto": "C3",
    "least squares": "C0",
    "ridge": "C2",
    "leave one out": "C1",
    "gradient x parameter": "C7",
}


def draw(ax, rows, key):
    """Draw mean and range over the seeds, by method."""
    for method, colour in COLOURS.items():
        points = {}
        for row in rows:
            if row["method"] == method:
                points.setdefault(row["cost"], []).append(row[key])
        costs = sorted(points)
        if costs:
            ax.plot(costs, [np.mean(points[c]) for c in costs], colour, marker=".", label=method)
            least, most = ([end(points[c]) for c in costs] for end in (min, max))
            ax.fill_between(costs, least, most, color=colour, alpha=0.25, linewidth=0)
    ax.set(xscale="log", xlabel="forward-equivalents")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["curve", "speed", "race", "coverage", "plot"])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet")
    parser.add_argument("--fraction", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=int, nargs="+")
    parser.add_argument("--n-test", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "curve":
        curve(options)
    else:
        {"speed": speed, "race": race, "coverage": coverage, "plot": plot}[options.what]()


if __name__ == "__main__":
    main()
