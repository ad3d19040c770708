"""Take the strongest components away, or nothing else: four families, three stand-ins.

    python -m benchmarks.components_deletion              # all families, three seeds
    python -m benchmarks.components_deletion vit --seeds 0
    python -m benchmarks.components_deletion plot

Small classifiers of transformers' BERT, GPT-2 (words of R8), ViT and ResNet (Fashion-MNIST) are
trained here. Components are ranked by the mean attribution of 100 rows; the curves are of 200 other
rows that nobody has fitted on: margin and accuracy when the first k are gone (deletion), and when
all but the first k are (insertion), with zero, the mean or another row's value in their place,
each by attributions of its own. "chance" is the mean of five random orders. R8 is fetched
(`benchmarks.data`).
"""

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks import runner
from benchmarks.components_edits import fashion, train
from skperf import from_module
from skperf.components import ComponentAttributor

RESULTS = Path(__file__).parent / "results" / "components_deletion.json"
STAND_INS = ("zero", "mean", "resample")
SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1)


def words(n_words=1000, length=32):
    """R8 as numbers of its commonest words, 0 where a text is shorter."""
    from benchmarks.data import fetch_r8

    bunch = fetch_r8(subset="train")
    texts = [text.lower().split() for text in bunch.data]
    common = Counter(word for text in texts for word in text).most_common(n_words)
    numbers = {word: number for number, (word, _) in enumerate(common, 1)}
    known = [[numbers[word] for word in text if word in numbers][:length] for text in texts]
    X = np.array([row + [0] * (length - len(row)) for row in known])
    X[:, 0] = np.maximum(X[:, 0], 1)
    return X, np.unique(bunch.target, return_inverse=True)[1]


class Logits(torch.nn.Module):
    """Gives tokens their mask, and of what comes back the logits alone."""

    def __init__(self, model, *, masked=False):
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, x):
        """Logits."""
        return self.model(x, **({"attention_mask": x != 0} if self.masked else {})).logits


def bert():
    import transformers

    config = transformers.BertConfig(
        vocab_size=1001,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        num_labels=8,
    )
    return Logits(transformers.BertForSequenceClassification(config), masked=True)


def gpt2():
    import transformers

    config = transformers.GPT2Config(
        vocab_size=1001,
        n_embd=48,
        n_layer=3,
        n_head=4,
        n_positions=32,
        num_labels=8,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Logits(transformers.GPT2ForSequenceClassification(config), masked=True)


def vit():
    import transformers

    config = transformers.ViTConfig(
        image_size=28,
        patch_size=7,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
    )
    return Logits(transformers.ViTForImageClassification(config))


def resnet():
    import transformers

    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[24, 48],
        depths=[1, 1],
        layer_type="basic",
        num_labels=10,
    )
    return Logits(transformers.ResNetForImageClassification(config))


FAMILIES = {"bert": bert, "gpt2": gpt2, "vit": vit, "resnet": resnet}


def trained(family, seed):
    """Give a classifier, rows to attribute and rows to judge by."""
    X, y = words() if family in ("bert", "gpt2") else fashion("all")
    rows = np.random.default_rng(seed).permutation(len(X))
    held, rest = rows[:300], rows[300:]
    torch.manual_seed(seed)
    module = train(FAMILIES[family](), X[rest], y[rest], seed, epochs=8, lr=1e-3)
    classifier = from_module(module, np.arange(y.max() + 1))
    return classifier, (X[held[:100]], y[held[:100]]), (X[held[100:]], y[held[100:]])


def curves(family, seed, budget=300):
    """Run all stand-ins on one trained network."""
    classifier, fitted_on, judged_by = trained(family, seed)
    found = []
    for ablation in STAND_INS:
        model = ComponentAttributor(
            classifier, ablation=ablation, budget=budget, random_state=seed
        ).fit(*fitted_on)
        order = np.argsort(-model.attributions_.mean(0), kind="stable")
        rng = np.random.default_rng(seed)
        chance = [rng.permutation(len(order)) for _ in range(5)]
        sizes = [round(share * len(order)) for share in SHARES]
        row = {
            "family": family,
            "seed": seed,
            "ablation": ablation,
            "n_components": len(order),
            "accuracy": round(float(classifier.score(*judged_by)), 4),
            "correlation": round(model.score(*judged_by, n_masks=60), 4),
        }
        for what, gone in (("deletion", lambda o, k: o[:k]), ("insertion", lambda o, k: o[k:])):
            masks = {
                rule: [~np.isin(np.arange(len(order)), gone(o, k)) for o in orders for k in sizes]
                for rule, orders in (("attributions", [order]), ("chance", chance))
            }
            for rule, each in masks.items():
                margins = model.counterfactual(np.array(each), *judged_by)
                by_size = margins.reshape(len(margins), -1, len(sizes)).mean(1)
                right = (margins > 0).reshape(len(margins), -1, len(sizes)).mean((0, 1))
                row[f"{what} {rule}"] = by_size.mean(0).round(4).tolist()
                row[f"{what} {rule}, accuracy"] = right.round(4).tolist()
        print({name: row[name] for name in list(row)[:8]}, flush=True)
        found.append(row)
    return found


def area(row, what, rule):
    """Mean accuracy along a curve, over the share of components."""
    return float(np.trapezoid(row[f"{what} {rule}, accuracy"], SHARES))


def table():
    """Head and rows of the guide's table: areas under accuracy, over the seeds."""
    results = runner.load(RESULTS)
    lines = []
    for family in FAMILIES:
        for ablation in STAND_INS:
            rows = [r for r in results if (r["family"], r["ablation"]) == (family, ablation)]
            if not rows:
                continue
            cells = [f"{family}, {rows[0]['n_components']}", ablation]
            values = [[row["correlation"] for row in rows]]
            for what in ("deletion", "insertion"):
                values += [
                    [area(r, what, rule) for r in rows] for rule in ("attributions", "chance")
                ]
            for each in values:
                spread = f" ± {np.std(each, ddof=1):.2f}" if len(each) > 1 else ""
                cells.append(f"{np.mean(each):.2f}{spread}")
            lines.append([*cells, len(rows)])
    head = ["family, components", "in their place", "correlation"]
    head += [f"{what}, {rule}" for what in ("deletion", "insertion") for rule in ("ours", "chance")]
    return [*head, "seeds"], lines


def plot():
    """Draw accuracy against the share that is gone, or left."""
    import matplotlib.pyplot as plt

    results = runner.load(RESULTS)
    figure, axes = plt.subplots(2, 4, figsize=(11, 5), sharey=True, layout="constrained")
    for line, what in zip(axes, ("deletion", "insertion"), strict=True):
        for ax, family in zip(line, FAMILIES, strict=True):
            for colour, ablation in zip(("C3", "C0", "C2"), STAND_INS, strict=True):
                rows = [r for r in results if (r["family"], r["ablation"]) == (family, ablation)]
                for rule, style in (("attributions", "-"), ("chance", ":")):
                    values = np.array([row[f"{what} {rule}, accuracy"] for row in rows])
                    label = ablation if rule == "attributions" else None
                    ax.plot(SHARES, values.mean(0), style, color=colour, label=label)
                    if rule == "attributions":
                        low, high = values.min(0), values.max(0)
                        ax.fill_between(SHARES, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.set_title(f"{family}, {rows[0]['n_components']} components", fontsize=10)
            ax.set_xlabel("share " + ("gone" if what == "deletion" else "left"))
        line[0].set_ylabel(f"accuracy, {what}")
    axes[0, -1].legend(fontsize=8)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    if options.families == ["plot"]:
        plot()
        return
    torch.set_num_threads(1)
    commit = runner.provenance()["commit"]
    for family in options.families:
        for seed in options.seeds:
            rows = runner.load(RESULTS) if RESULTS.exists() else []
            rows = [row for row in rows if (row["family"], row["seed"]) != (family, seed)]
            rows += [{**row, "commit": commit} for row in curves(family, seed)]
            runner.save(RESULTS, rows)


if __name__ == "__main__":
    main()
