"""The main job: every estimator on real data, one table, a few figures.

Run with ``python -m skperf [folder]``; figures go to the folder, by default
``skperf_quickstart``.
"""

import argparse
import textwrap
import time
import warnings
from pathlib import Path

COLUMNS = ("estimator", "what was asked", "what came out", "the naive alternative")
WIDTHS = (24, 38, 38, 32)


def main(folder: Path) -> None:
    """Run every section and print one table."""
    import matplotlib as mpl
    import torch

    mpl.use("Agg")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    print_row(COLUMNS)
    print("-" * (sum(WIDTHS) + 2 * len(WIDTHS)))
    for section in SECTIONS:
        start = time.perf_counter()
        for row in section(folder):
            print_row(row)
        print(f"  ({time.perf_counter() - start:.0f} s)\n", flush=True)
    names = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    print(f"Figures in {folder}/: {names}")


def print_row(cells: tuple[str, ...]) -> None:
    """Print a row of the table, its cells wrapped."""
    wrapped = [textwrap.wrap(cell, width) for cell, width in zip(cells, WIDTHS, strict=True)]
    for line in range(max(map(len, wrapped))):
        parts = [
            (lines[line] if line < len(lines) else "").ljust(width)
            for lines, width in zip(wrapped, WIDTHS, strict=True)
        ]
        print("  ".join(parts).rstrip())


def performative_rows(figures: Path) -> list[tuple[str, str, str, str]]:
    """Live through rounds that answer the deployed network, then choose what to ship."""
    import numpy as np

    from skperf import PerformativeAdapter, TrajectoryDisplay, from_module
    from skperf.datasets import (
        PerformativeStream,
        load_fashion_cnn,
        load_fashion_mnist,
        load_small_resnet,
    )

    fashion = load_fashion_mnist(subset="test")
    X, y = fashion.images[:, None].astype(np.float32) / 255, fashion.target
    network = from_module(load_fashion_cnn(), np.arange(10))
    world = PerformativeStream(X, y, train_size=500, test_size=500, random_state=0)
    adapter = PerformativeAdapter(network, base_prior="uniform", random_state=0)
    statistic = None
    for number in range(16):
        now = world.next_round(statistic)
        adapter.partial_fit(now.X_test, now.y_test, rounds=number)
        statistic = adapter.statistic_
    late = {
        name: np.mean(adapter.prequential_[name][6:])
        for name in ("none", "last", "adapter", "oracle")
    }
    display = TrajectoryDisplay.from_estimator(adapter)
    display.figure_.savefig(figures / "performative.png", dpi=90)

    candidates = {
        "the convolutional": network,
        "the residual": from_module(load_small_resnet(), np.arange(10)),
    }
    ranking = adapter.rank_models([*candidates.values()], X, y)
    best = ranking.order[0]
    return [
        (
            "PerformativeAdapter",
            "log loss where each round asks more of what the network got wrong, rounds 7 to 16",
            f"{late['adapter']:.2f}; who knew the mix: {late['oracle']:.2f}",
            f"no correction {late['none']:.2f}, last round's mix {late['last']:.2f}",
        ),
        (
            "PerformativeAdapter.rank_models",
            "which network to ship, by its accuracy in the round after",
            f"{list(candidates)[best]} one: {ranking.predicted[best]:.2f}",
            f"accuracy now: {ranking.current[0]:.2f} and {ranking.current[1]:.2f}",
        ),
    ]


def reprogramming_rows(figures: Path) -> list[tuple[str, str, str, str]]:
    """Reprogram the shipped text-image encoder for ten kinds of clothes."""
    import matplotlib.pyplot as plt
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    from skperf import OODScoreDisplay, Reprogrammer
    from skperf.datasets import load_emoji, load_fashion_mnist, load_text_image_encoder

    encoder, tokenizer = load_text_image_encoder()
    train, test = load_fashion_mnist(subset="train"), load_fashion_mnist(subset="test")
    X, y = train.images[:600, None], train.target[:600]
    X_test, y_test = test.images[:300, None], test.target[:300]
    shared = {"tokenizer": tokenizer, "class_names": train.target_names, "border": 4}
    zero_shot = Reprogrammer(encoder, max_epochs=0, **shared).fit(X, y)
    model = Reprogrammer(encoder, max_epochs=6, random_state=0, **shared).fit(X, y)
    probe = LogisticRegression(C=100, max_iter=500).fit(zero_shot.transform(X), y)

    # emoji belong to none of the classes
    foreign = load_emoji(subset="test").images[:300].mean(1, keepdims=True).astype(np.uint8)
    foreign = foreign[:, :, 2:-2, 2:-2]
    rows, inside = np.concatenate([X_test, foreign]), np.repeat([1, 0], [300, len(foreign)])
    display = OODScoreDisplay.from_estimator(model, rows, inside)
    display.figure_.savefig(figures / "reprogramming.png", dpi=80)
    plt.close(display.figure_)
    plain = OODScoreDisplay(inside, probe.predict_proba(zero_shot.transform(rows)).max(1))
    accuracy = model.score(X_test, y_test)
    probed = probe.score(zero_shot.transform(X_test), y_test)
    return [
        (
            "Reprogrammer",
            "10 kinds of clothes from 600 pictures, encoder untouched",
            f"accuracy {accuracy:.2f} (alpha {model.alpha_})",
            f"zero-shot {zero_shot.score(X_test, y_test):.2f}, linear probe {probed:.2f}",
        ),
        (
            "Reprogrammer",
            '"none of these": clothes against emoji',
            f"AUROC {display.auroc:.2f}, FPR95 {display.fpr95:.2f}",
            f"linear probe {plain.auroc:.2f}, {plain.fpr95:.2f}",
        ),
    ]


def influence_rows(figures: Path) -> list[tuple[str, str, str, str]]:
    """Find flipped labels, and correct mistakes by the rows behind them."""
    import numpy as np
    from sklearn.metrics import roc_auc_score

    from skperf import InfluenceDisplay, InfluenceScorer, Net
    from skperf.backbone.architectures import SmallConvNet
    from skperf.datasets import load_fashion_mnist

    fashion = load_fashion_mnist()
    X, y, names = fashion.images[:, None], fashion.target, fashion.target_names
    rng = np.random.default_rng(0)
    flipped = rng.random(1000) < 0.1
    labels = np.where(flipped, (y[:1000] + rng.integers(1, 10, 1000)) % 10, y[:1000])
    net = Net(SmallConvNet, lr=0.003, max_epochs=6, batch_size=64, random_state=0)
    scorer = InfluenceScorer(net, random_state=0).fit(X[:1000], labels)
    found, plain = scorer.detect_mislabels(), scorer.loss_
    auc, naive = roc_auc_score(flipped, found), roc_auc_score(flipped, plain)
    guard = slice(1000, 1400)
    wrong = 1400 + np.flatnonzero(scorer.estimator_.predict(X[1400:2000]) != y[1400:2000])[:5]
    options = {"guard": (X[guard], y[guard]), "k": 50, "max_steps": 10, "max_drop": 0.02}
    reports = [scorer.repair(X[[i]], y[[i]], **options).edit_report_ for i in wrong]
    others = [report["baselines"]["same_class"] for report in reports]
    display = InfluenceDisplay.from_estimator(
        scorer, X[wrong[:3]], y[wrong[:3]], k=4, class_names=names
    )
    display.figure_.savefig(figures / "influence.png", dpi=110)

    def outcome(each):
        repaired = sum(bool(report["flipped"].all()) for report in each)
        cost = 100 * np.mean([report["guard_after"] - report["guard_before"] for report in each])
        return f"{repaired} of {len(each)} corrected, guard accuracy {cost:+.2f} points"

    return [
        (
            "InfluenceScorer",
            "which of 1,000 Fashion-MNIST labels were flipped (10 %)?",
            f"leave-one-out loss: AUROC {auc:.3f}",
            f"plain training loss: AUROC {naive:.3f}",
        ),
        (
            "InfluenceScorer.repair",
            "correct mis-predicted images by a few steps on 50 training rows",
            f"strongest proponents: {outcome(reports)}",
            f"random rows of the same class: {outcome(others)}",
        ),
    ]


def component_rows(figures: Path) -> list[tuple[str, str, str, str]]:
    """Say which filters made predictions, and cut a class out of a network."""
    import matplotlib.pyplot as plt
    import numpy as np

    from skperf import ComponentAttributor, from_module
    from skperf.components import ComponentDisplay, EditPathDisplay
    from skperf.datasets import load_fashion_mnist, load_small_resnet

    bunch = load_fashion_mnist(subset="test")
    X, y = bunch.images.astype(np.float32) / 255, np.asarray(bunch.target)
    names = list(bunch.target_names)
    module = from_module(load_small_resnet(), np.arange(len(names)))
    forgotten = names.index("coat")
    rng = np.random.default_rng(0)
    rows = np.concatenate(
        [
            rng.permutation(np.flatnonzero(y == forgotten))[:25],
            rng.permutation(np.flatnonzero(y != forgotten))[:75],
        ]
    )
    model = ComponentAttributor(module, budget=120, random_state=0).fit(X[rows], y[rows])
    naive = ComponentAttributor(module, method="gradient", random_state=0).fit(X[rows], y[rows])
    score, naive_score = (m.score(n_masks=40) for m in (model, naive))

    edited = model.edit(y[rows] == forgotten, direction="decrease", max_drop=0.03)
    k = edited.edit_report_["k"]
    test = np.setdiff1d(np.arange(len(y)), rows)[:600]
    gone, kept = test[y[test] == forgotten], test[y[test] != forgotten]

    def accuracies(classifier):
        return [f"{(classifier.predict(X[part]) == y[part]).mean():.0%}" for part in (gone, kept)]

    before, after = accuracies(module), accuracies(edited)
    random = np.ones(model.n_components_)
    random[rng.permutation(len(random))[:k]] = 0
    luck = accuracies(model.ablate(random))

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    of_class = np.flatnonzero(y[rows] == forgotten)
    ComponentDisplay.from_estimator(
        model, examples=of_class, ax=axes[0], name="what makes a coat a coat"
    )
    EditPathDisplay.from_estimator(edited, ax=axes[1], name="forgetting it")
    figure.savefig(figures / "components.png", dpi=90)
    plt.close(figure)
    return [
        (
            "ComponentAttributor",
            f"outputs of 100 images under fresh ablations of 5 % of {model.n_components_} filters",
            f"correlation {score:.2f} with {model.n_forward_equivalents_} forward-equivalents",
            f"gradient x parameter: {naive_score:.2f}",
        ),
        (
            "ComponentAttributor.edit",
            f"forget the class 'coat' ({before[0]} right, the others {before[1]})",
            f"{k} filters gone: {after[0]} right, the others {after[1]}",
            f"{k} random filters: {luck[0]} and {luck[1]}",
        ),
    ]


SECTIONS = (performative_rows, reprogramming_rows, influence_rows, component_rows)

if __name__ == "__main__":
    warnings.simplefilter("default")
    parser = argparse.ArgumentParser("python -m skperf", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("skperf_quickstart"))
    main(parser.parse_args().folder)
