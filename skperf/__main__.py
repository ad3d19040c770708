"""The main job: four questions about a trained network, answered on real data.

Run with ``python -m skperf [folder]``; figures go to the folder, by default
``skperf_quickstart``.
"""

import argparse
import textwrap
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """A question, its answer, what a simpler way gives, and the call."""

    question: str
    answer: str
    instead: str
    call: str

    def __str__(self) -> str:
        lines = textwrap.wrap(self.question, 96)
        for name in ("answer", "instead", "call"):
            wrapped = textwrap.wrap(getattr(self, name), 86)
            lines += [f"    {name if not i else '':8}{line}" for i, line in enumerate(wrapped)]
        return "\n".join(lines)


def main(folder: Path) -> None:
    """Answer every question and save the figures."""
    import matplotlib as mpl
    import torch

    mpl.use("Agg")
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    print("Fashion-MNIST, and small networks trained on it; nothing is downloaded.\n")
    for section in SECTIONS:
        start = time.perf_counter()
        for finding in section(folder):
            print(f"{finding}\n")
        print(f"({time.perf_counter() - start:.0f} s)\n", flush=True)
    names = ", ".join(sorted(path.name for path in folder.glob("*.png")))
    print(f"Figures in {folder}/: {names}")


def performative_findings(figures: Path) -> list[Finding]:
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

    names = ("convolutional", "residual")
    candidates = [network, from_module(load_small_resnet(), np.arange(10))]
    ranking = adapter.rank_models(candidates, X, y)
    best, other = ranking.order
    return [
        Finding(
            "Each round brings more of what the network got wrong. Can that be anticipated?",
            f"Yes: log loss {late['adapter']:.2f} in rounds 7 to 16; "
            f"{late['oracle']:.2f} for one who knew the mix.",
            f"No correction: {late['none']:.2f}. Assuming last round's mix: {late['last']:.2f}.",
            "PerformativeAdapter(network).partial_fit(X, y) after each round",
        ),
        Finding(
            "Which of two networks should be shipped, when shipping it changes what comes next?",
            f"The {names[best]} one: {ranking.predicted[best]:.0%} right in the round after its "
            f"deployment, the {names[other]} one {ranking.predicted[other]:.0%}.",
            f"Accuracy on today's rows: {ranking.current[best]:.0%} and "
            f"{ranking.current[other]:.0%}.",
            "adapter.rank_models(candidates, X, y)",
        ),
    ]


def reprogramming_findings(figures: Path) -> list[Finding]:
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
        Finding(
            "Can a text-image encoder that never saw clothes sort them, and say 'none of these'?",
            f"It tells clothes from emoji with an AUROC of {display.auroc:.2f} and sorts "
            f"{accuracy:.0%} right, from 600 pictures, the encoder untouched.",
            f"A linear probe on its features: AUROC {plain.auroc:.2f}, {probed:.0%} right. "
            f"Zero-shot: {zero_shot.score(X_test, y_test):.0%} right.",
            "Reprogrammer(encoder, class_names=names).fit(X, y)",
        )
    ]


def influence_findings(figures: Path) -> list[Finding]:
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

    def outcome(each: list[dict[str, Any]]) -> str:
        repaired = sum(bool(report["flipped"].all()) for report in each)
        cost = 100 * np.mean([report["guard_after"] - report["guard_before"] for report in each])
        return f"{repaired} of {len(each)} corrected, accuracy elsewhere {cost:+.2f} points"

    return [
        Finding(
            "An image is predicted wrongly. Which training rows can correct it, at what cost?",
            f"A few steps on its 50 strongest proponents: {outcome(reports)}.",
            f"The same on random rows of its class: {outcome(others)}.",
            "InfluenceScorer(net).fit(X, y).repair(X_wrong, y_wrong, guard=(X_guard, y_guard))",
        ),
        Finding(
            "Which of 1,000 training labels are wrong? (A tenth was flipped.)",
            f"Ranked by leave-one-out loss: AUROC {auc:.3f}.",
            f"Ranked by plain training loss: {naive:.3f}. Print both: it is a strong baseline.",
            "InfluenceScorer(net).fit(X, y).detect_mislabels()",
        ),
    ]


def component_findings(figures: Path) -> list[Finding]:
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

    def accuracies(classifier: Any) -> list[str]:
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
        Finding(
            "Can a network forget the class 'coat' without training, and keep the others?",
            f"{k} of {model.n_components_} filters switched off: {after[0]} of the coats right "
            f"({before[0]} before), {after[1]} of the others ({before[1]} before).",
            f"{k} random filters off: {luck[0]} and {luck[1]}.",
            'ComponentAttributor(network).fit(X, y).edit(coats, direction="decrease")',
        ),
        Finding(
            "Which filters do these 100 predictions rest on?",
            f"Effects that foretell fresh ablations of 5 % of the filters (correlation "
            f"{score:.2f}) "
            f"at the price of {model.n_forward_equivalents_} forward passes.",
            f"Gradient times parameter: {naive_score:.2f}.",
            "ComponentAttributor(network).fit(X, y).attributions_",
        ),
    ]


SECTIONS: tuple[Callable[[Path], list[Finding]], ...] = (
    component_findings,
    performative_findings,
    reprogramming_findings,
    influence_findings,
)

if __name__ == "__main__":
    warnings.simplefilter("default")
    parser = argparse.ArgumentParser("python -m skperf", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("skperf_quickstart"))
    main(parser.parse_args().folder)
