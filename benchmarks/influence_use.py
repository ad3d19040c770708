"""What influence is good for, with the baselines that any claim must be held against.

    python -m benchmarks.influence_use            # all parts
    python -m benchmarks.influence_use fading --seeds 3 4 5 6 7
    python -m benchmarks.influence_use removal --pieces removal.jsonl --minutes 14  # goes on there

Parts: ``mislabels`` (10 % flipped labels), ``fading`` (how long estimates stay true),
``deeper`` (the same of a transformer and a residual network), ``repair`` (mis-predictions),
``removal`` (forget a class). Writes results/influence_PART.json. Seeds 0, 1 and 2 served to choose
what ``fading`` does, so that it is reported on others; the sizes of ``deeper`` come of seed 100.
"""

import argparse
import json
import time
from copy import deepcopy
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from benchmarks import runner
from benchmarks.influence_tasks import (
    UNTUNED,
    cnn,
    digits,
    fashion,
    fine_tuned,
    flipped,
    halves,
    mails,
    mlp,
    news,
    residual,
    tanh_net,
    untuned,
)
from skperf import TrainingRun, from_module
from skperf.datasets import load_email_vectors
from skperf.influence import InfluenceScorer, Replay
from skperf.influence.horizon import agreement, usable_horizon
from skperf.influence.methods import redamped
from skperf.influence.repair import harmonic_mean

RESULTS = Path(__file__).parent / "results"


def mislabels(seed, name, model, rows):
    X, y = rows
    labels, wrong = flipped(y, seed)
    scorer = InfluenceScorer(model, random_state=seed).fit(X, labels)
    first = InfluenceScorer(FrozenEstimator(scorer.estimator_), method="gradient_dot")
    scores = {
        "leave-one-out loss": scorer.detect_mislabels(),
        "self-influence": scorer.self_influence_,
        "class-aware": scorer.detect_mislabels(class_aware=True),
        "gradient norm": first.fit(X, labels).detect_mislabels(),
        "plain loss": scorer.loss_,
    }
    yield {"way": name} | {way: roc_auc_score(wrong, score) for way, score in scores.items()}


def _mislabel_tasks(seed):
    yield "digits, MLP 64-64-10", mlp(64, 40, seed, lr=0.003), digits(seed, 0.2)[0]
    yield "Fashion-MNIST, CNN 17k", cnn(seed), fashion(seed)[0]
    model = LogisticRegression(C=1.0, max_iter=2000)
    yield "SpamAssassin, wordllama + logistic", model, mails(seed)[0]
    mail = load_email_vectors()
    yield "e-mails, MiniLM + logistic", model, (mail.data, mail.target)


STEPS, FEWER = (1, 10, 50, 200, 500), (1, 10, 50, 100)


def fading(seed, name, model, rows, queries, n_left_out, steps=STEPS):
    scorer = InfluenceScorer(model, learning_rate=0.03, random_state=seed).fit(*rows)
    truth = scorer.fading(*queries, steps=steps, n_train=n_left_out, weight_decay=1e-3)
    for way, at in _ways_to_predict(scorer, model, rows).items():
        figures = {}
        for step, actual in zip(steps, truth.actual, strict=True):
            predicted = at(step).influence(*queries)[:, truth.rows]
            figures[step] = agreement(torch.as_tensor(predicted), torch.as_tensor(actual))
        pearson = [figures[step][0] for step in steps]
        yield {
            "task": name,
            "way": way,
            **{f"{step} steps": value for step, value in zip(steps, pearson, strict=True)},
            f"slope at {steps[-1]}": figures[steps[-1]][2],
            "usable horizon": usable_horizon(steps, pearson),
        }


def _fading_tasks(seed):
    """Networks trained on 10 % wrong labels, and what is asked of them."""
    for name, width, (train, test) in (
        ("digits, tanh net 64-32-10", 32, digits(seed)),
        ("SpamAssassin, tanh net 256-8-2", 8, mails(seed)),
    ):
        rows = train[0], flipped(train[1], seed)[0]
        yield name, tanh_net(width, rows, seed), rows, (test[0][:60], test[1][:60]), 64


def _deeper_tasks(seed):
    yield "R8, transformer fine-tuned", *fine_tuned(seed), 32, FEWER
    yield "Fashion-MNIST, residual net", *residual(seed), 32, FEWER


def _ways_to_predict(scorer, model, rows):
    """Give for each way a function from a horizon to a scorer."""
    dot = InfluenceScorer(model, method="gradient_dot").fit(*rows)
    damped = scorer.with_damping
    return {
        "gradient dot": lambda step: dot,
        "GGN, damping 0.01": lambda step: damped(0.01),
        "GGN, damping 0.1": lambda step: damped(0.1),
        "GGN, damping tied to the horizon": lambda step: damped("horizon", horizon=step),
        "GGN, filter where training starts": lambda step: _started(scorer, step),
        "GGN, filter of the horizon": lambda step: damped("flow", horizon=step),
        "replay of these steps": lambda step: _gone_back(scorer, model, rows, step),
    }


def _gone_back(scorer, model, rows, step):
    """Train on for as many steps as `fading` does, in its batches, and go back through them."""
    own, (X, codes) = deepcopy(model), map(torch.from_numpy, rows)
    X = X.double() if X.is_floating_point() else X
    optimizer = torch.optim.SGD(own.parameters(), lr=0.03, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(scorer._learned.settings.seed + 7919)
    epochs = (torch.randperm(len(X), generator=generator).split(64) for _ in range(step))
    order = islice(chain.from_iterable(epochs), step)
    batches = ((batch, (X[batch], codes[batch])) for batch in order)
    with TrainingRun.record(own, optimizer, batches) as run:
        for _, (inputs, targets) in run:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(own(inputs), targets).backward()
            optimizer.step()
    return InfluenceScorer(own, method=Replay(run=run)).fit(*rows)


def _started(scorer, step):
    """Filter as a horizon asks, but at the fitted weights."""
    there = scorer.with_damping(1.0)
    learned, rate = there._learned, scorer.learning_rate
    settings = replace(learned.settings, damping="flow", horizon=step, learning_rate=rate)
    learned = replace(learned, settings=settings)
    problem, stage = learned.plain_problem(), learned.stages[0]
    fit = redamped(problem, stage.fit, "ggn", stage.options)
    there._learned = replace(learned, stages=(replace(stage, fit=fit),))
    return there


def repair(seeds, known, deadline=float("inf"), most=50, only=""):
    """Correct mis-predictions of networks that nobody tuned, each on its own."""
    # networks of one seed after the other make mistakes until there are enough of them
    for name in (name for name in UNTUNED if only in name):
        found, used = {}, 0
        for seed in seeds:
            if len(found.get("proponents", ())) >= most or time.monotonic() > deadline:
                break
            used += 1
            for outcomes in _repaired(name, seed, known, deadline, most):
                if len(found.get("proponents", ())) < most:
                    for way, outcome in outcomes.items():
                        found.setdefault(way, []).append(outcome)
        for way, outcomes in found.items():
            shares = [outcome["flipped"] for outcome in outcomes]
            yield {
                "task": name,
                "way": way,
                "mis-predictions": len(outcomes),
                "networks": used,
                **_mean(outcomes),
                "error": float(np.std(shares) / len(shares) ** 0.5),
            }


def _repaired(name, seed, known, deadline, most):
    """Give mis-predicted rows of one network, and what each way makes of them."""
    net, (X, y), n = untuned(name, seed)
    scorer = InfluenceScorer(from_module(net), method="ggn", random_state=seed)
    predicted = from_module(net).predict(X)
    middle = n + (len(X) - n) // 2
    rest = np.arange(middle, len(X))
    for i in rest[predicted[rest] != y[rest]][:most]:
        key = [seed, name, int(i)]
        if key not in known:
            if time.monotonic() > deadline:
                return
            if not hasattr(scorer, "estimator_"):
                scorer.fit(X[:n], y[:n])
            guard = X[n:middle], y[n:middle]
            edited = scorer.repair(X[[i]], y[[i]], guard=guard, max_drop=0.02)
            report, others = edited.edit_report_, np.setdiff1d(rest, [i])
            ways = {"proponents": report, **report["baselines"]}
            outcomes = {way: _outcome(one) for way, one in ways.items()}
            before = np.mean(predicted[others] == y[others])
            change = edited.score(X[others], y[others]) - before
            outcomes["proponents"]["others change"] = float(change)
            known.add(key, outcomes)
        yield known[key]


class Pieces:
    """Outcomes by key, each kept in a file as soon as it is known."""

    def __init__(self, path):
        self.path, self.found = path, {}
        if path and path.exists():
            for line in path.read_text().splitlines():
                self._hold(**json.loads(line))

    def _hold(self, key, outcomes):
        self.found[tuple(key)] = outcomes

    def __contains__(self, key):
        return tuple(key) in self.found

    def __getitem__(self, key):
        return self.found[tuple(key)]

    def add(self, key, outcomes):
        """Hold what was found, and write it down."""
        self._hold(key, outcomes)
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps({"key": key, "outcomes": outcomes}) + "\n")


def _outcome(report):
    return {
        "flipped": bool(report["flipped"].all()),
        "guard change": float(report["guard_after"] - report["guard_before"]),
        "displacement": float(report["displacement"]),
    }


CLASSES = (0, 3, 8)


def removal(seed, name, net, rows, selects):
    """Forget a class with 5 % of the parameters; the scale is chosen on held-out rows."""
    train, test = rows
    ways = {
        f"{select}, {how}": {"select": select, "how": how}
        for select in selects
        for how in ("gif", "freeze", "project", "ascent")
    } | {"all parameters, plain": {"how": "plain"}}
    guard, rest = halves(test, seed)
    scorer = InfluenceScorer(net, random_state=seed).fit(*train)
    before = [_forgotten(scorer.estimator_, rest, class_) for class_ in CLASSES]
    yield {"task": name, "way": "before", **_mean(before)}
    for way, asked in ways.items():
        found = []
        for class_ in CLASSES:
            edited = scorer.remove(class_=class_, guard=guard, baseline=False, **asked)
            found.append(_forgotten(edited, rest, class_))
        yield {"task": name, "way": way, **_mean(found)}


def _removal_tasks(seed):
    few = ("output", "gradient", "random")
    yield "digits, MLP 64-32-10", mlp(32, 30, seed), digits(seed), (*few, "sam")
    yield "Fashion-MNIST, CNN 17k", cnn(seed), fashion(seed), few
    yield "20 Newsgroups, MLP 256-32-20", mlp(32, 30, seed), news(seed), few


def _forgotten(edited, rows, class_):
    X, y = rows
    predicted, gone = edited.predict(X), y == class_
    self_accuracy = np.mean(predicted[gone] == class_)
    other = np.mean(predicted[~gone] == y[~gone])
    f1 = harmonic_mean(1 - self_accuracy, other)
    return {"self": self_accuracy, "other": other, "f1": f1}


def _mean(records):
    return {key: np.mean([record[key] for record in records]) for key in records[0]}


PARTS = {
    "mislabels": (0, 1, 2),
    "fading": (3, 4, 5, 6, 7),
    "deeper": (0, 1, 2),
    "repair": tuple(range(20)),
    "removal": (0, 1, 2),
}
TASKS = {
    "mislabels": (mislabels, _mislabel_tasks),
    "fading": (fading, _fading_tasks),
    "deeper": (fading, _deeper_tasks),
    "removal": (removal, _removal_tasks),
}


def by_task(part, seed, known, deadline=float("inf"), only=""):
    """Give the records of a seed, task by task, each kept as soon as it is known."""
    run, tasks = TASKS[part]
    for name, *given in tasks(seed):
        key = [part, seed, name]
        if only in name and key not in known and time.monotonic() < deadline:
            records = list(run(seed, name, *given))
            known.add(key, [{k: _plain(value) for k, value in one.items()} for one in records])
        if key in known:
            yield from known[key]
        elif only in name:
            print(f"{part}: {name!r} of seed {seed} waits; run it again.", flush=True)


def _plain(value):
    return value if isinstance(value, str) else float(value)


def summarised(runs):
    """One flat record for each task and way: means over seeds, the values beside them."""
    groups = {}
    for record in chain.from_iterable(runs):
        named = {key: value for key, value in record.items() if isinstance(value, str)}
        groups.setdefault(tuple(named.items()), []).append(record)
    rows = []
    for named, records in groups.items():
        row = {**dict(named), "seeds": len(records)}
        for key in (key for key in records[0] if key not in row):
            values = [float(record[key]) for record in records]
            row[key] = round(float(np.mean(values)), 4)
            row[f"{key}: range"] = f"{min(values):.3g} to {max(values):.3g}"
            row[f"{key}: seeds"] = [round(value, 4) for value in values]
        rows.append(row)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--pieces", type=Path, help="file of what has been found so far")
    parser.add_argument("--only", default="", help="part of the name of a network")
    parser.add_argument("--most", type=int, default=50, help="mis-predictions of a network")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no task later")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        start = time.process_time()
        seeds = arguments.seeds or PARTS[part]
        limits = {
            "known": Pieces(arguments.pieces),
            "deadline": time.monotonic() + 60 * arguments.minutes,
            "only": arguments.only,
        }
        if part == "repair":
            rows = list(repair(seeds, most=arguments.most, **limits))
        else:
            runs = []
            for seed in seeds:
                runs.append(list(by_task(part, seed, **limits)))
                print(f"{part}, seed {seed}: {time.process_time() - start:.0f} CPU s", flush=True)
            rows = summarised(runs)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"influence_{part}.json"
        runner.save(path, rows, seeds=seeds)
        print("means over seeds and ranges")
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
