"""Next-round log loss on real rows, in worlds that answer the model and in one that does not.

Run with ``python -m benchmarks.performative_real [--seeds 5] [--rounds 40]`` after
``python -m benchmarks.data fetch fashion_mnist r8 newsgroups wordllama``; writes
``benchmarks/results/performative_real.json``, from which it goes on where the same code was broken
off, and ``performative_real.png``. The adapter is what is deployed; all others, the released method
among them, are judged on the rounds that it meets.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from sklearn.linear_model import LogisticRegression

from benchmarks import runner
from benchmarks.data import fetch_fashion_mnist, fetch_newsgroups, fetch_r8, fetch_wordllama
from skperf import PerformativeAdapter, from_module
from skperf.backbone._opening import class_logits
from skperf.datasets import PerformativeStream, load_fashion_cnn
from skperf.performative.label_shift import bbse_prior, em_prior, log_loss, soft_confusion

RESULTS = Path(__file__).parent / "results"
WORLDS = {
    "adversarial": {"response": "adversarial", "temperature": 0.1},
    "adversarial, weak": {"response": "adversarial", "temperature": 0.3},
    "popularity": {"response": "popularity", "temperature": 0.3},
    "no answer": {"response": "none"},
}
METHODS = ("none", "last round", "BBSE", "EM", "paper", "adapter", "adapter + EM", "oracle")
BURN_IN = 3  # rounds before anything is corrected, the same for all


def fashion_mnist():
    """Logits of the shipped network on the 10,000 test images, which it never saw."""
    images, labels = fetch_fashion_mnist(subset="test", return_X_y=True)
    images = np.asarray(images, dtype=np.float32).reshape(-1, 1, 28, 28)
    images = images / 255 if images.max() > 1 else images
    return class_logits(from_module(load_fashion_cnn(), np.arange(10)), images), labels


def texts(fetch):
    """Log probabilities of a logistic regression on mean word vectors, for the test texts."""
    vectors = fetch_wordllama()
    train, test = fetch(subset="train"), fetch(subset="test")
    model = LogisticRegression(C=10.0, max_iter=500)
    model.fit(vectors.embed(train.data), train.target)
    return class_logits(model, vectors.embed(test.data)), np.asarray(test.target)


DATA = {
    "Fashion-MNIST, CNN": fashion_mnist,
    "R8, word vectors": lambda: texts(fetch_r8),
    "20 Newsgroups, word vectors": lambda: texts(fetch_newsgroups),
}


def live(logits, y, world, seed, n_rounds):
    """Deploy the adapter for some rounds; give losses (n_rounds, n_methods) and recalls."""
    n_classes = logits.shape[1]
    stream = PerformativeStream(logits, y, train_size=1, random_state=seed, **WORLDS[world])
    # the rows are logits already: the network has been run once for all
    classifier = from_module(torch.nn.Identity().double(), np.arange(n_classes))
    adapter = PerformativeAdapter(classifier, transductive="map_em", random_state=seed)
    paper = PerformativeAdapter(classifier, adapter="paper", random_state=seed)
    statistic, counts, losses, recalls = None, None, [], []
    confusion = np.zeros((n_classes, n_classes))
    for number in range(n_rounds):
        batch = stream.next_round(statistic)
        X, codes = batch.X_test.astype(np.float64), batch.y_test
        if number >= BURN_IN:
            scores = X - np.log(adapter.base_prior_)
            shares = (counts + 1 / n_classes) / (counts.sum() + 1)
            base, anticipated = np.log(adapter.base_prior_), np.log(adapter.predicted_prior_)
            both = adapter.predict_log_proba(X)  # has seen the batch, which is not deployed
            bbse = bbse_prior(softmax(X, axis=1), confusion)
            mixes = {
                "none": base,
                "last round": np.log(shares),
                "BBSE": np.log(np.maximum(bbse, 1e-4)),
                "EM": np.log(np.maximum(em_prior(X, base), 1e-12)),
                "adapter": anticipated,
                "oracle": np.log(np.maximum(batch.prior, 1e-12)),
            }
            found = {name: log_loss(scores + mix, codes) for name, mix in mixes.items()}
            found["adapter + EM"] = log_loss(both, codes)
            found["paper"] = log_loss(paper.predict_log_proba(X), codes)
            losses.append([found[name] for name in METHODS])
            recalls.append([_worst(scores + mixes[n], codes) for n in ("none", "adapter")])
        proba = adapter.correct(X, adapter.predicted_prior_) if number else X
        for one in (adapter, paper):  # of the same deployments
            one.partial_fit(X, codes, rounds=number, deployed_pred=proba.argmax(axis=1))
        confusion += soft_confusion(softmax(X, axis=1), codes)
        counts, statistic = np.bincount(codes, minlength=n_classes), adapter.statistic_
    return np.array(losses), np.array(recalls), adapter


def _worst(scores, codes):
    rows = np.bincount(codes, minlength=scores.shape[1])
    hits = np.bincount(codes, scores.argmax(axis=1) == codes, scores.shape[1])
    return (hits[rows >= 5] / rows[rows >= 5]).min()


def summarise(data, world, runs):
    """One record for each method: means over seeds of mean losses, with their spread."""
    means = np.array([losses.mean(axis=0) for losses, _, _ in runs])
    gaps = means[:, :1] - means
    records = []
    for i, method in enumerate(METHODS):
        record = {
            "data": data,
            "world": world,
            "method": method,
            "log loss": means[:, i].mean(),
            "sd over seeds": means[:, i].std(ddof=1) if len(runs) > 1 else 0.0,
            "saved over none": gaps[:, i].mean(),
            "saved in the worst seed": gaps[:, i].min(),
            "saved over last round": (means[:, 1] - means[:, i]).mean(),
            "over last round in the worst seed": (means[:, 1] - means[:, i]).min(),
            "seeds": len(runs),
        }
        record = {k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()}
        curve = np.mean([losses[:, i] for losses, _, _ in runs], axis=0)
        records.append(record | {"curve": curve.round(4).tolist()})
    return records


def draw(records):
    """One figure: losses over rounds, data sets down, worlds across."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "none": {"color": "0.6"},
        "last round": {"color": "C1"},
        "EM": {"color": "C2", "linewidth": 0.8},
        "adapter": {"color": "C0", "linewidth": 2},
        "oracle": {"color": "k", "linestyle": "--", "linewidth": 0.8},
    }
    names = list(dict.fromkeys(record["data"] for record in records))
    figure, axes = plt.subplots(
        len(names), len(WORLDS), figsize=(11, 2.4 * len(names)), layout="constrained", squeeze=False
    )
    for record in records:
        data, world, method, curve = (record[k] for k in ("data", "world", "method", "curve"))
        ax = axes[names.index(data), list(WORLDS).index(world)]
        if method in styles:
            ax.plot(BURN_IN + np.arange(len(curve)), curve, label=method, **styles[method])
        if method == "none":
            ax.set_title(f"{data.split(',')[0]}: {world}", fontsize="small")
            ax.set_ylim(0, 1.6 * max(curve))
            ax.tick_params(labelsize="small")
    axes[0, 0].legend(fontsize="x-small")
    axes[-1, 0].set(xlabel="round", ylabel="log loss")
    figure.savefig(RESULTS / "performative_real.png", dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    records = runner.begun(RESULTS / "performative_real.json")
    done = [(one["data"], one["world"]) for one in records if one["seeds"] == options.seeds]
    for data, make in DATA.items():
        missing = [world for world in WORLDS if (data, world) not in done]
        if not missing:
            continue
        logits, y = make()
        logits = log_softmax(logits, axis=1)
        accuracy = np.mean(logits.argmax(axis=1) == y)
        print(f"{data}: {len(y)} rows, {logits.shape[1]} classes, accuracy {accuracy:.3f}")
        for world in missing:
            runs = [live(logits, y, world, seed, options.rounds) for seed in range(options.seeds)]
            found = summarise(data, world, runs)
            records += found
            chosen = [adapter.adapter_name_ for _, _, adapter in runs]
            worst = np.mean([recalls.mean(axis=0) for _, recalls, _ in runs], axis=0)
            print(f"  {world}: chosen {chosen}; worst recall none, adapter {worst.round(3)}")
            for record in found:
                print("   ", *list(record.values())[2:9], flush=True)
            path = RESULTS / "performative_real.json"
            runner.save(path, records, seeds=range(options.seeds))
    draw(records)


if __name__ == "__main__":
    main()
