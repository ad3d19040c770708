"""What influence is good for, with the baselines that any claim must be held against.

    python -m benchmarks.influence_use            # all parts, three seeds

Parts: ``mislabels`` (10 % flipped labels), ``fading`` (how long estimates stay true),
``repair`` (mis-predictions), ``removal`` (forget a class). Writes results/influence_PART.json.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split
from torch import nn

from skperf import MLP, Net
from skperf.backbone.architectures import SmallConvNet
from skperf.datasets import (
    fetch_fashion_mnist,
    fetch_spam_assassin,
    fetch_wordllama,
    load_email_vectors,
)
from skperf.influence import InfluenceScorer
from skperf.influence._members import linearised
from skperf.influence.horizon import agreement
from skperf.influence.methods import redamped

RESULTS = Path(__file__).parent / "results"


def digits(seed, test_size=0.3):
    X, y = load_digits(return_X_y=True)
    X = (X / 16).astype(np.float32)
    return train_test_split(X, y, test_size=test_size, random_state=seed, stratify=y)


def flipped(y, rng, share=0.1):
    labels = np.unique(y)
    wrong = rng.random(len(y)) < share
    other = (np.searchsorted(labels, y) + rng.integers(1, len(labels), len(y))) % len(labels)
    return np.where(wrong, labels[other], y), wrong


def mislabel_tasks(seed):
    """Yield (name, classifier, rows, labels)."""
    X, _, y, _ = digits(seed, 0.2)
    net = Net(MLP, module__hidden=(64,), lr=0.003, max_epochs=40, random_state=seed)
    yield "digits, MLP 64-64-10", net, X, y
    images, target = fetch_fashion_mnist(subset="train", return_X_y=True)
    rows = np.random.default_rng(seed).permutation(len(images))[:2000]
    X = images[rows].reshape(-1, 1, 28, 28)
    net = Net(SmallConvNet, lr=0.002, max_epochs=8, batch_size=64, random_state=seed)
    yield "Fashion-MNIST, CNN 17k", net, X, target[rows]
    mail = fetch_spam_assassin()
    rows = np.random.default_rng(seed).permutation(len(mail.data))[:2000]
    vectors = fetch_wordllama().embed([mail.data[i] for i in rows])
    model = LogisticRegression(C=1.0, max_iter=2000)
    yield "SpamAssassin, wordllama + logistic", model, vectors, mail.target[rows]
    mail = load_email_vectors()
    yield "e-mails, MiniLM + logistic", model, mail.data, mail.target


def mislabels(seed):
    found = {}
    for name, model, X, y in mislabel_tasks(seed):
        labels, wrong = flipped(y, np.random.default_rng(seed))
        scorer = InfluenceScorer(model, random_state=seed).fit(X, labels)
        first = InfluenceScorer(FrozenEstimator(scorer.estimator_), method="gradient_dot")
        found[name] = {
            "self-influence": roc_auc_score(wrong, scorer.detect_mislabels()),
            "class-aware": roc_auc_score(wrong, scorer.detect_mislabels(class_aware=True)),
            "gradient norm": roc_auc_score(wrong, first.fit(X, labels).detect_mislabels()),
            "plain loss": roc_auc_score(wrong, scorer.loss_),
        }
    return found


def noisy_tanh_net(seed):
    """64-32-10 tanh network on digits with 10 % label noise, not trained to the end."""
    X_train, X_test, y_train, y_test = digits(seed)
    labels, _ = flipped(y_train, np.random.default_rng(seed))
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    rows, codes = torch.from_numpy(X_train), torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(30):
        for batch in torch.randperm(len(rows), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(rows[batch]), codes[batch]).backward()
            optimizer.step()
    return module.double(), X_train, labels, X_test, y_test


STEPS = (1, 10, 50, 200, 500)


def started(scorer, step):
    """Filter as a horizon asks, but at the fitted weights."""
    there = scorer.with_damping(1.0)
    there.settings_ = replace(there.settings_, damping="flow", horizon=step, learning_rate=0.03)
    there.fits_ = [
        redamped(problem, fitted, "ggn")
        for (problem, _), fitted in zip(linearised(there), scorer.fits_, strict=True)
    ]
    return there


def fading(seed):
    module, X_train, labels, X_test, y_test = noisy_tanh_net(seed)
    queries = X_test[:60], y_test[:60]
    scorer = InfluenceScorer(module, learning_rate=0.03, random_state=seed).fit(X_train, labels)
    truth = scorer.fading(*queries, steps=STEPS, n_train=64, weight_decay=1e-3)
    dot = InfluenceScorer(module, method="gradient_dot").fit(X_train, labels)
    damped = scorer.with_damping
    more = InfluenceScorer(module, learning_rate=0.03, max_rows=2000).fit(X_train, labels)
    dense = {"method": "exact", "curvature": "hessian", "damping": 100.0}
    full = InfluenceScorer(module, learning_rate=0.03, **dense).fit(X_train, labels)
    ways = {
        "gradient dot": lambda step: dot,
        "GGN, damping 0.01": lambda step: damped(0.01),
        "GGN, damping 0.1": lambda step: damped(0.1),
        "GGN, damping tied to the horizon": lambda step: damped("horizon", horizon=step),
        "GGN, filter where training starts": lambda step: started(scorer, step),
        "GGN, filter of the horizon": lambda step: damped("flow", horizon=step),
        "GGN of 2,000 rows, the same": lambda step: more.with_damping("flow", horizon=step),
        "exact Hessian, the same": lambda step: full.with_damping("flow", horizon=step),
    }
    found = {}
    for name, at in ways.items():
        figures = {}
        for step, actual in zip(STEPS, truth.actual, strict=True):
            predicted = at(step).influence(*queries)[:, truth.rows]
            figures[step] = agreement(torch.as_tensor(predicted), torch.as_tensor(actual))
        found[name] = {f"{step} steps": figures[step][0] for step in STEPS}
        found[name]["slope at 500"] = figures[500][2]
    return found


def repair(seed):
    X_train, X_test, y_train, y_test = digits(seed, 0.6)
    labels, _ = flipped(y_train, np.random.default_rng(seed))
    net = Net(MLP, module__hidden=(32,), lr=0.005, max_epochs=15, random_state=seed)
    guard, X_test, guard_y, y_test = train_test_split(
        X_test, y_test, test_size=0.5, random_state=seed
    )
    scorer = InfluenceScorer(net, random_state=seed).fit(X_train, labels)
    first = InfluenceScorer(FrozenEstimator(scorer.estimator_), method="gradient_dot")
    first.fit(X_train, labels)
    wrong = np.flatnonzero(scorer.estimator_.predict(X_test) != y_test)[:40]
    reports = {}

    def add(name, report):
        reports.setdefault(name, []).append(report)

    for i in wrong:
        asked = {"guard": (guard, guard_y), "max_drop": 0.03, "k": 50}
        report = scorer.repair(X_test[[i]], y_test[[i]], **asked).edit_report_
        add("GGN proponents, natural steps", report)
        add("same class at random, natural steps", report["baselines"]["same_class"])
        add("same class at random, plain steps", report["baselines"]["same_class_plain"])
        add("random rows, plain steps", report["baselines"]["random"])
        asked["baselines"] = False
        plain = scorer.repair(X_test[[i]], y_test[[i]], precondition=False, **asked)
        add("GGN proponents, plain steps", plain.edit_report_)
        dot = first.repair(X_test[[i]], y_test[[i]], **asked).edit_report_
        add("gradient dot proponents, plain steps", dot)
    return {name: _repair_summary(each) for name, each in reports.items()}


def _repair_summary(reports):
    return {
        "flipped": float(np.mean([r["flipped"].all() for r in reports])),
        "guard change": float(np.mean([r["guard_after"] - r["guard_before"] for r in reports])),
        "displacement": float(np.mean([r["displacement"] for r in reports])),
    }


def removal(seed):
    """Forget a class with 5 % of the parameters; the scale is chosen on held-out rows."""
    X_train, X_test, y_train, y_test = digits(seed)
    held_out = train_test_split(X_test, y_test, test_size=0.5, random_state=seed)
    guard, test, guard_y, test_y = held_out
    net = Net(MLP, module__hidden=(32,), lr=0.005, max_epochs=30, random_state=seed)
    scorer = InfluenceScorer(net, random_state=seed).fit(X_train, y_train)
    found = {}
    for select in ("output", "gradient", "sam", "random"):
        for how in ("gif", "freeze", "project", "ascent", "plain"):
            scores = []
            for class_ in (0, 3, 8):
                asked = {"guard": (guard, guard_y), "select": select, "baseline": False}
                edited = scorer.remove(class_=class_, how=how, **asked)
                gone = test_y == class_
                self_accuracy = (edited.predict(test[gone]) == class_).mean()
                other = (edited.predict(test[~gone]) == test_y[~gone]).mean()
                scores.append(
                    [
                        self_accuracy,
                        other,
                        2 * (1 - self_accuracy) * other / max(1 - self_accuracy + other, 1e-9),
                    ]
                )
            means = np.mean(scores, 0)
            found[f"{select}, {how}"] = dict(
                zip(("self", "other", "f1"), means.tolist(), strict=True)
            )
    return found


PARTS = {"mislabels": mislabels, "fading": fading, "repair": repair, "removal": removal}


def summarised(runs):
    """One flat record for each way, means over seeds with the range beside them."""
    rows = []
    for name in runs[0]:
        record = {"way": name}
        for key in runs[0][name]:
            values = [float(run[name][key]) for run in runs]
            record[key] = round(float(np.mean(values)), 4)
            record[f"{key}: range"] = f"{min(values):.3f} to {max(values):.3f}"
        rows.append(record)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        start = time.process_time()
        rows = summarised([PARTS[part](seed) for seed in range(arguments.seeds)])
        command = f"python -m benchmarks.influence_use {part} --seeds {arguments.seeds}"
        results = {"command": command, "seeds": arguments.seeds, "rows": rows}
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"influence_{part}.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{part} ({time.process_time() - start:.0f} CPU s), means over seeds and ranges")
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
