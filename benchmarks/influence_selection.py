"""Choose the tenth of R8 to train on by LESS (arXiv 2402.04333), beside other tenths.

    python -m benchmarks.influence_selection  # after: benchmarks.data fetch r8 newsgroups

A small transformer is trained on 20 Newsgroups; low-rank changes of its layers, and a new head,
are then trained on R8, as it is and with 40 % of the labels wrong. As in the paper a warm-up of
four epochs on 5 % of the rows gives checkpoints with Adam's moments. A row's score for a held-out
row (100 of them, with their right labels) is the cosine of the step that Adam would take for it
with the gradient of the other, summed over checkpoints by rate. As released, the best are taken by
the mean over the held-out rows of a topic, the largest of the topics; or each held-out row takes
the best that is left, in turn. The same recipe then trains on each tenth, and the test rows of R8
judge it. Recipe, sizes and settings were chosen on seed 100. With ``--pieces FILE --minutes 14`` it
goes on where it was cut. Writes results/influence_selection.json.
"""

import argparse
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from benchmarks import runner
from benchmarks.influence_tasks import flipped, texts
from benchmarks.influence_use import Pieces, summarised
from benchmarks.performative_retraining import SmallTransformer
from skperf import from_module
from skperf.influence import InfluenceScorer, TracIn

RESULT = Path(__file__).parent / "results" / "influence_selection.json"
N_CLASSES, N_HELD, RATE, EPOCHS = 8, 100, 5e-3, 8
WRONG = {"as it is": 0.0, "40 % wrong labels": 0.4}


def trained(net, rows, seed, epochs, rate=RATE, batch_size=16):
    """Train a copy by Adam; tell its weights and moments after every epoch."""
    net = deepcopy(net).train()
    own = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(own.values(), lr=rate)
    generator, (X, y) = torch.Generator().manual_seed(seed), map(torch.as_tensor, rows)
    states, moments = [], []
    for _ in range(epochs):
        for part in torch.randperm(len(y), generator=generator).split(batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(X[part]), y[part]).backward()
            optimizer.step()
        states.append(deepcopy(net.state_dict()))
        moments.append({name: deepcopy(optimizer.state[p]) for name, p in own.items()})
    return net.eval(), states, moments


def adapted(news, seed):
    """Pre-train on 20 Newsgroups, and put low-rank changes and a new head on."""
    torch.manual_seed(seed)
    net = trained(SmallTransformer(20, 48, 2), news, seed, epochs=6, rate=2e-3, batch_size=64)[0]
    net.head = nn.Linear(net.head.in_features, N_CLASSES)
    layers = ["embed", "linear1", "linear2"]
    return get_peft_model(net, LoraConfig(r=8, target_modules=layers, modules_to_save=["head"]))


def scored(net, states, moments, pool, held):
    """Score every row of the pool for every held-out row: -> (n_held, n)."""
    method = TracIn(learning_rate=RATE, normalize=True, moments=moments)
    scorer = InfluenceScorer(from_module(net), method=method, checkpoints=states).fit(*pool)
    return scorer.influence(*held)


def in_turn(scores, size):
    """Let each held-out row choose the best row that is left, in turn."""
    scores, chosen = scores.copy(), []
    for turn in range(size):
        chosen.append(int(scores[turn % len(scores)].argmax()))
        scores[:, chosen[-1]] = -np.inf
    return np.array(chosen)


def tenths(seed, net, pool, held):
    """Give each way's tenth of the pool."""
    rng, (X, y) = np.random.default_rng(seed), pool
    size = len(y) // 10
    warm = rng.permutation(len(y))[: len(y) // 20]
    warmed, states, moments = trained(net, (X[warm], y[warm]), seed, epochs=4)
    scores = scored(net, states, moments, pool, held)
    of_topics = [scores[held[1] == code].mean(0) for code in np.unique(held[1])]
    features = InfluenceScorer(from_module(warmed), method="gradient_dot", parameters="last")
    return {
        "LESS, as released": np.argsort(-np.max(of_topics, 0))[:size],
        "LESS, held-out rows in turn": in_turn(scores, size),
        "gradients of the head, in turn": in_turn(features.fit(*pool).influence(*held), size),
        "lowest loss after the warm-up": np.argsort(features.loss_)[:size],
        "random": rng.permutation(len(y))[:size],
        "all rows": np.arange(len(y)),
    }


def selection(seed):
    news, (X, y), (X_test, y_test) = texts()
    net = adapted(news, seed)
    held, pool = np.split(np.random.default_rng(seed).permutation(len(y)), [N_HELD])
    for name, share in WRONG.items():
        labels = flipped(y, seed, share)[0]
        chosen = tenths(seed, net, (X[pool], labels[pool]), (X[held], y[held]))
        for way, rows in chosen.items():
            final = trained(net, (X[pool][rows], labels[pool][rows]), seed, EPOCHS)[0]
            # torch's own fast path in eval mode would pass the low-rank changes by
            predicted = from_module(final).predict(X_test)
            yield {
                "labels": name,
                "way": way,
                "accuracy": np.mean(predicted == y_test),
                "balanced accuracy": balanced_accuracy_score(y_test, predicted),
                "right labels": np.mean(labels[pool][rows] == y[pool][rows]),
            }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--pieces", type=Path, help="file of what has been found so far")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no seed later")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known, runs, start = Pieces(arguments.pieces), [], time.monotonic()
    for seed in arguments.seeds:
        if [seed] not in known:
            if time.monotonic() - start > 60 * arguments.minutes:
                raise SystemExit(f"seed {seed} waits; run it again.")
            known.add([seed], list(selection(seed)))
        runs.append(known[[seed]])
    rows = summarised(runs)
    runner.save(RESULT, rows, seeds=arguments.seeds)
    for row in rows:
        print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


if __name__ == "__main__":
    main()
