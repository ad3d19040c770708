"""A backbone that is retrained every round, in worlds that answer the deployed model.

Run with ``python -m benchmarks.performative_retraining [--seeds 5] [--rounds 24]`` after
``python -m benchmarks.data fetch fashion_mnist r8``; writes
``benchmarks/results/performative_retraining.json`` (loss along the trajectory),
``performative_retraining_selection.json`` and ``performative_retraining.png``; runs that are in
``performative_retraining_runs.json`` already, of the same code, are not made again.

A small network is trained on 1,500 rows. In every round 800 rows are judged without their labels,
which then arrive, with 400 further labelled rows of the same mix to train on. Arms: nothing; the
network fine-tuned on the labelled rows of each round; the adapter around the first network; both;
a larger network taken at a third and at two thirds of the way, its adapter kept or begun anew.
Each arm lives on its own trajectory. On that of the adapter, models that take the statistic as
features are judged beside it, and snapshots of the fine-tuned network are ranked at its end.
"""

import argparse
import itertools
import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import kendalltau
from sklearn.feature_extraction.text import CountVectorizer
from torch import nn

from benchmarks import runner
from benchmarks.data import fetch_fashion_mnist, fetch_r8
from benchmarks.performative_worlds import nll
from skperf import PerformativeAdapter, from_module
from skperf.datasets import PerformativeStream
from skperf.performative.label_shift import smooth_shares

RESULTS = Path(__file__).parent / "results"
N_FIRST, N_TRAIN, N_TEST, BURN_IN = 1500, 400, 800, 3
KEYS = ("data", "world", "trajectory", "arm")
JUDGED = ("Kendall", "regret of the first", "error of the score", "90 % interval holds")
LENGTH, WORDS = 40, 1500  # tokens of a text, entries of the vocabulary


class SmallTransformer(nn.Module):
    """One layer of attention over word embeddings, averaged over the words that are there."""

    def __init__(self, n_classes, width=32, n_layers=1):
        super().__init__()
        self.embed = nn.Embedding(WORDS + 2, width, padding_idx=0)
        self.place = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, n_classes)

    def forward(self, tokens):
        """Return logits (n, n_classes) of word indices (n, LENGTH)."""
        there = (tokens > 0).float()[..., None]
        found = self.body(self.embed(tokens) + self.place.weight)
        return self.head((found * there).sum(1) / there.sum(1).clamp(min=1.0))


def small_cnn(n_classes, width=8):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 49, n_classes),
    )


def fashion_mnist():
    """Images (n, 1, 28, 28) and labels; networks by size."""
    images, y = fetch_fashion_mnist(subset="all", return_X_y=True)
    X = np.asarray(images, np.float32).reshape(-1, 1, 28, 28)
    kept = np.random.default_rng(0).permutation(len(y))[:14_000]
    X = X[kept] / 255 if X.max() > 1 else X[kept]
    return X, np.asarray(y)[kept], [lambda k, w=w: small_cnn(k, w) for w in (8, 16, 24)], 6


def r8():
    """Word indices (n, LENGTH) and labels; networks by size."""
    texts = fetch_r8(subset="all")
    words = CountVectorizer(max_features=WORDS, token_pattern=r"[a-z]{2,}").fit(texts.data)
    known, cut = words.vocabulary_, words.build_analyzer()
    tokens = np.zeros((len(texts.data), LENGTH), np.int64)
    for i, text in enumerate(texts.data):
        found = [known.get(word, -1) + 2 for word in cut(text)][:LENGTH]
        tokens[i, : len(found)] = found
    sizes = ((24, 1), (32, 1), (48, 2))
    makers = [lambda k, w=w, n=n: SmallTransformer(k, w, n) for w, n in sizes]
    return tokens, np.asarray(texts.target), makers, 8


DATA = {"Fashion-MNIST, CNN": fashion_mnist, "R8, transformer": r8}


def walk(seed, n_classes):
    """Mixes that wander by .3 a logit and round, whatever is deployed."""
    generator, log_mix = np.random.default_rng(seed + 100), np.zeros(n_classes)

    def answer(statistic):
        nonlocal log_mix
        log_mix = log_mix + 0.3 * generator.normal(size=n_classes)
        return softmax(log_mix)

    return answer


WORLDS = {
    "adversarial": lambda seed, k: {"response": "adversarial", "temperature": 0.15},
    "popularity": lambda seed, k: {"response": "popularity", "temperature": 0.3},
    "walk": lambda seed, k: {"response": walk(seed, k)},
}


def train(net, X, y, seed, epochs, offset=None, lr=2e-3, batch_size=64):
    """Train a copy by Adam; with an offset (n_classes,) it stays right for the mix it was at."""
    net = deepcopy(net).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    rows, codes = torch.as_tensor(X), torch.as_tensor(y)
    shift = torch.zeros(1) if offset is None else torch.as_tensor(offset, dtype=torch.float32)
    for _ in range(epochs):
        for part in torch.randperm(len(codes), generator=generator).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(rows[part]) + shift, codes[part]).backward()
            optimizer.step()
    return net.eval()


def logits_of(net, X):
    with torch.inference_mode():
        parts = [net(part).double() for part in torch.as_tensor(X).split(500)]
    return log_softmax(torch.cat(parts).numpy(), axis=1)


class Deployed:
    """A network that may be fine-tuned, behind an adapter or not."""

    def __init__(self, nets, base, seed, *, tunes=False, adapts=False, switches=None, paper=False):
        self.nets, self.net, self.base, self.seed = nets, nets[0], base, seed
        self.tunes, self.switches, self.n_classes = tunes, switches, len(base)
        self.options = {"adapter": "paper" if paper else ["fixed", "tied", "curve", "linear"]}
        self.adapter = self._new() if adapts else None
        self.snapshots, self.kept = [], []

    def _new(self):
        model = from_module(self.net, np.arange(self.n_classes))
        return PerformativeAdapter(
            model, base_prior=self.base, random_state=self.seed, **self.options
        )

    def predict(self, X, number):
        """Log probabilities (n, n_classes) as they go out."""
        if self.adapter is None or not number:
            return logits_of(self.net, X)
        return self.adapter.predict_log_proba(X)

    def learn(self, batch, log_proba, number, n_rounds):
        """Take in the labels of a round; tune or switch the network for the next one."""
        self.kept.append(batch)
        if self.adapter is not None:
            self.adapter.partial_fit(
                batch.X_test, batch.y_test, rounds=number, deployed_pred=log_proba.argmax(axis=1)
            )
        switch = self.switches and number + 1 in (n_rounds // 3, 2 * n_rounds // 3)
        if switch:
            self.net = self.nets[1 if number + 1 < n_rounds // 2 else 2]
        if self.tunes:
            offset = None
            if self.adapter is not None:
                counts = np.bincount(batch.y, minlength=self.n_classes).astype(float)
                offset = np.log(smooth_shares(counts)) - np.log(self.base)
            self.net = train(self.net, batch.X, batch.y, self.seed + number, 2, offset, 1e-3)
            self.snapshots.append(self.net)
        if self.adapter is not None and (switch or self.tunes):
            if self.switches == "anew":
                self.adapter = self._new()
                self.adapter.partial_fit(batch.X_test, batch.y_test, rounds=number)
            else:
                model = from_module(self.net, np.arange(self.n_classes))
                self.adapter.replace_estimator(model, batch.X_test, batch.y_test)


ARMS = {
    "nothing": {},
    "fine-tune": {"tunes": True},
    "adapter": {"adapts": True},
    "both": {"adapts": True, "tunes": True},
    "paper": {"adapts": True, "paper": True},
    "switch": {"switches": "plain"},
    "switch, adapter kept": {"switches": "kept", "adapts": True},
    "switch, adapter anew": {"switches": "anew", "adapts": True},
}


class ByFeatures:
    """Predicts from a row's scores and the statistic in force, learned from all rows so far."""

    def __init__(self, n_classes, hidden, seed):
        torch.manual_seed(seed)
        self.net = nn.Linear(2 * n_classes, n_classes)
        if hidden:
            layers = nn.Linear(2 * n_classes, hidden), nn.ReLU(), nn.Linear(hidden, n_classes)
            self.net = nn.Sequential(*layers)
        self.n_classes, self.rows, self.codes, self.seed = n_classes, [], [], seed

    def _joined(self, logits, statistic):
        told = np.broadcast_to(statistic, (len(logits), self.n_classes))
        return np.concatenate([logits, told], axis=1).astype(np.float32)

    def predict(self, logits, statistic):
        """Log probabilities (n, n_classes)."""
        return logits_of(self.net, self._joined(logits, statistic))

    def learn(self, logits, codes, statistic):
        """Train on the rows of all rounds so far."""
        self.rows.append(self._joined(logits, statistic))
        self.codes.append(codes)
        X, y = np.concatenate(self.rows), np.concatenate(self.codes)
        epochs = max(3, 40 // len(self.rows))
        self.net = train(
            self.net, X, y, self.seed + len(self.rows), epochs, lr=1e-2, batch_size=256
        )


def recalls(codes, right, n_classes):
    """Recall of each class, shrunk by two rows towards the accuracy."""
    rows = np.bincount(codes, minlength=n_classes)
    hits = np.bincount(codes, right, n_classes)
    return (hits + 2 * right.mean()) / (rows + 2)


def measured(log_proba, codes, n_classes):
    right = log_proba.argmax(axis=1) == codes
    rows = np.bincount(codes, minlength=n_classes)
    worst = np.bincount(codes, right, n_classes)[rows >= 5] / rows[rows >= 5]
    return [nll(log_proba, codes), right.mean(), worst.min()]


def live(arm, X, y, nets, base, world, seed, n_rounds, beside=False):
    """Live through the rounds: what was measured (n_rounds, 4 or more) by name, and the arm."""
    n_classes, deployed = len(base), Deployed(nets, base, seed, **ARMS[arm])
    stream = PerformativeStream(
        X,
        y,
        train_size=N_TRAIN,
        test_size=N_TEST,
        random_state=seed,
        **WORLDS[world](seed, n_classes),
    )
    others = {}
    if beside:
        others = {
            f"statistic as features, {name}": ByFeatures(n_classes, hidden, seed)
            for name, hidden in (("linear", 0), ("network", 64))
        }
    found, statistic, before = {}, None, base
    for number in range(n_rounds):
        batch = stream.next_round(statistic)
        codes = batch.y_test
        log_proba = deployed.predict(batch.X_test, number)
        own = logits_of(deployed.net, batch.X_test)
        prior = np.log(np.maximum(batch.prior, 1e-6))
        row = measured(log_proba, codes, n_classes)
        # a fine-tuned network without an adapter is right for the mix it was tuned on
        at = np.log(before) if deployed.tunes and deployed.adapter is None else np.log(base)
        oracle = nll(own - at + prior, codes)
        found.setdefault(arm, []).append([*row, oracle])
        if beside:
            table = {"nothing": own, "last round": own - np.log(base) + np.log(before)}
            if statistic is not None:
                table |= {name: one.predict(own, statistic) for name, one in others.items()}
                for one in others.values():
                    one.learn(own, codes, statistic)
            for name, values in table.items():
                found.setdefault(name, []).append([*measured(values, codes, n_classes), oracle])
        right = log_proba.argmax(axis=1) == codes
        deployed.learn(batch, log_proba, number, n_rounds)
        statistic = recalls(codes, right, n_classes)
        before = smooth_shares(np.bincount(batch.y, minlength=n_classes).astype(float))
    return {name: np.array(values)[-(n_rounds - BURN_IN) :] for name, values in found.items()}, (
        deployed,
        stream,
    )


def selected(deployed, stream, snapshots, X, y):
    """Kendall, regret, error and coverage of rankings of candidates, by scorer."""
    n_classes = deployed.n_classes
    pool = np.concatenate(stream._pools[1])
    models = [from_module(net, np.arange(n_classes)) for net in snapshots]
    right = np.array([logits_of(net, X[pool]).argmax(axis=1) == y[pool] for net in snapshots])
    counts = np.bincount(y[pool], minlength=n_classes)
    found = [np.bincount(y[pool], one, n_classes) / counts for one in right]
    ranking = deployed.adapter.rank_models(
        models,
        np.concatenate([batch.X_test for batch in deployed.kept[-5:]]),
        np.concatenate([batch.y_test for batch in deployed.kept[-5:]]),
    )
    if callable(stream.response):  # one mix, whatever is deployed
        mixes = [stream._answer(found[0])] * len(found)
    else:
        mixes = [stream._answer(recall) for recall in found]
    truth = np.array([mix @ recall for mix, recall in zip(mixes, found, strict=True)])
    scores = {"current accuracy": ranking.current, "rank_models": ranking.predicted}
    within = np.mean((ranking.low <= truth) & (truth <= ranking.high))
    judged = {
        name: (
            kendalltau(score, truth)[0],
            truth.max() - truth[score.argmax()],
            np.abs(score - truth).mean(),
            within if name == "rank_models" else None,
        )
        for name, score in scores.items()
    }
    return {
        name: {
            k: None if v is None else round(float(v), 4)
            for k, v in zip(JUDGED, values, strict=True)
        }
        for name, values in judged.items()
    }


def table(runs):
    """One record for each arm in each world: means over seeds, their spread, the mean curve."""
    records = []
    for key in sorted({tuple(run[name] for name in KEYS) for run in runs}):
        same = [run for run in runs if tuple(run[name] for name in KEYS) == key]
        values = np.array([run["rounds"] for run in same])  # (n_seeds, n_rounds, 4)
        excess = values[..., 0] - values[..., 3]
        third = excess.shape[1] // 3
        record = dict(zip(KEYS, key, strict=True)) | {
            "log loss": values[..., 0].mean(),
            "sd over seeds": values[..., 0].mean(axis=1).std(ddof=len(same) > 1),
            "accuracy": values[..., 1].mean(),
            "worst recall": values[..., 2].mean(),
            "over oracle": excess.mean(),
            "first third": excess[:, :third].mean(),
            "last third": excess[:, -third:].mean(),
            "seeds": len(same),
            "curve": values[..., 0].mean(axis=0).round(4).tolist(),
        }
        records.append(
            {k: round(float(v), 4) if isinstance(v, float) else v for k, v in record.items()}
        )
    order = list(dict.fromkeys(run["arm"] for run in runs))
    return sorted(records, key=lambda one: ([one[k] for k in KEYS[:3]], order.index(one["arm"])))


def choices_table(choices):
    """Means over seeds of what rankings were worth, by data, world and scorer."""
    records = []
    keys = ("data", "world", "scorer")
    for key in dict.fromkeys(tuple(one[name] for name in keys) for one in choices):
        same = [one for one in choices if tuple(one[name] for name in keys) == key]
        record = dict(zip(keys, key, strict=True))
        for name in JUDGED:
            values = [one[name] for one in same if one[name] is not None]
            record[name] = round(float(np.mean(values)), 4) if values else None
        record["largest regret"] = max(one["regret of the first"] for one in same)
        records.append(record | {"seeds": len(same)})
    return records


def draw(records, folder):
    """Log loss by round, data sets down, worlds across; each arm on its own trajectory."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "nothing": {"color": "0.6"},
        "fine-tune": {"color": "C1"},
        "adapter": {"color": "C0"},
        "both": {"color": "C2", "linewidth": 2},
        "switch, adapter kept": {"color": "C3", "linestyle": "--"},
        "switch, adapter anew": {"color": "C4", "linestyle": ":"},
    }
    rows = list(dict.fromkeys(one["data"] for one in records))
    figure, axes = plt.subplots(
        len(rows), len(WORLDS), figsize=(11, 2.6 * len(rows)), layout="constrained", squeeze=False
    )
    for one in records:
        if one["trajectory"] == "own" and one["arm"] in styles:
            ax = axes[rows.index(one["data"]), list(WORLDS).index(one["world"])]
            at = BURN_IN + np.arange(len(one["curve"]))
            ax.plot(at, one["curve"], label=one["arm"], **styles[one["arm"]])
            ax.set_title(f"{one['data'].split(',')[0]}: {one['world']}", fontsize="small")
            ax.tick_params(labelsize="small")
    for ax in axes.ravel():
        ax.set_ylim(bottom=0)
    axes[0, 0].legend(fontsize="x-small")
    axes[-1, 0].set(xlabel="round", ylabel="log loss")
    figure.savefig(folder / "performative_retraining.png", dpi=80)


def run(data, world, seed, n_rounds):
    """Let every arm live through one world: runs by arm and trajectory, and rankings."""
    X, y, makers, epochs = DATA[data]()
    n_classes, order = int(y.max()) + 1, np.random.default_rng(seed).permutation(len(y))
    first, rest = order[:N_FIRST], order[N_FIRST:]
    torch.manual_seed(seed)
    nets = [train(make(n_classes), X[first], y[first], seed, epochs) for make in makers]
    base = smooth_shares(np.bincount(y[first], minlength=n_classes).astype(float))
    given = (X[rest], y[rest], nets, base, world, seed, n_rounds)
    lived = {arm: live(arm, *given, beside=arm == "adapter") for arm in ARMS}
    told = {"data": data, "world": world, "seed": seed}
    runs = [("own", arm, found[arm]) for arm, (found, _) in lived.items()]
    runs += [("the adapter's", arm, values) for arm, values in lived["adapter"][0].items()]
    runs = [
        told | {"trajectory": where, "arm": arm, "rounds": values.round(4).tolist()}
        for where, arm, values in runs
    ]
    snapshots = [*nets, *lived["fine-tune"][1][0].snapshots[2::3]]
    found = selected(*lived["adapter"][1], snapshots, X[rest], y[rest])
    picked = [told | {"scorer": name} | values for name, values in found.items()]
    return runs, picked


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--folder", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    kept = options.folder / "performative_retraining_runs.json"
    runs, choices = runner.begun(kept) or ([], [])
    done = {(one["data"], one["world"], one["seed"]) for one in choices}
    for seed, data, world in itertools.product(range(options.seeds), DATA, WORLDS):
        if (data, world, seed) in done:
            continue
        found, picked = run(data, world, seed, options.rounds)
        runs, choices = runs + found, choices + picked
        for one in (*table(found), *picked):
            print("  ", *list(one.values())[:11], sep="  ", flush=True)
        runner.save(kept, [runs, choices], seeds=range(seed + 1))
    seeds = range(options.seeds)
    records = table(runs)
    runner.save(options.folder / "performative_retraining.json", records, seeds=seeds)
    name = "performative_retraining_selection.json"
    runner.save(options.folder / name, choices_table(choices), seeds=seeds)
    draw(records, options.folder)


if __name__ == "__main__":
    main()
