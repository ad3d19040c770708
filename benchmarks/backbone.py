"""What training and prediction through the backbone cost over bare torch.

Run with ``python -m benchmarks.backbone``; writes ``benchmarks/results/backbone.json``.
"""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import make_classification
from skorch import NeuralNetClassifier
from torch import nn

from benchmarks import runner
from benchmarks.timing import interleaved
from skperf import MLP, Net

BATCH, EPOCHS, REPEATS = 128, 3, 11


def main() -> None:
    torch.set_num_threads(1)
    X, y = make_classification(10_000, 20, random_state=0)
    X = X.astype(np.float32)
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    shared = {"batch_size": BATCH, "max_epochs": EPOCHS, "optimizer": torch.optim.SGD, "lr": 0.01}
    net = Net(MLP, random_state=0, **shared)
    stock = NeuralNetClassifier(
        MLP(20, 2),
        criterion=nn.CrossEntropyLoss,
        train_split=None,
        iterator_train__shuffle=True,
        iterator_valid__batch_size=256,  # as the others predict
        verbose=0,
        **shared,
    )
    training = interleaved(
        {
            "bare torch, slices": lambda: train_bare(inputs, targets),
            "skperf.Net": lambda: net.fit(X, y),
            "stock skorch": lambda: stock.fit(X, y),
        },
        repeats=REPEATS,
    )
    network = net._to_network()
    prediction = interleaved(
        {
            "bare torch, slices": lambda: predict_bare(network.module, inputs),
            "Network.logits": lambda: network.logits(X),
            "stock skorch": lambda: stock.predict_proba(X),
        },
        repeats=10 * REPEATS,
    )
    report = []
    for task, rows in {
        "3 epochs of 10,000 rows": training,
        "logits of 10,000 rows": prediction,
    }.items():
        bare = rows["bare torch, slices"]["cpu"]
        for name, row in rows.items():
            times = {"CPU ms (median)": row["cpu"] * 1e3, "times bare torch": row["cpu"] / bare}
            report.append({"task": task, "engine": name} | times)
            print(*report[-1].values(), sep="\t")
    path = Path(__file__).parent / "results" / "backbone.json"
    path.parent.mkdir(exist_ok=True)
    runner.save(path, report)


def train_bare(inputs: torch.Tensor, targets: torch.Tensor) -> None:
    module = MLP(20, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    criterion = nn.CrossEntropyLoss()
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs))
        for start in range(0, len(inputs), BATCH):
            rows = order[start : start + BATCH]
            optimizer.zero_grad()
            criterion(module(inputs[rows]), targets[rows]).backward()
            optimizer.step()


@torch.inference_mode()
def predict_bare(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat([module(part) for part in inputs.split(256)])


if __name__ == "__main__":
    main()
