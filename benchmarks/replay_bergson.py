"""Bergson's magic on a run that `benchmarks.replay bergson` wrote; runs in Bergson's environment.

pip install --no-deps bergson torchopt optree datasets accelerate peft ...  # beside torch
python benchmarks/replay_bergson.py run.npz 3 theirs.npz  # file, queries, result
"""

import copy
import sys
import tempfile
import time

import numpy as np
import torch
import torchopt
from bergson.magic.trainer import BackwardState, Trainer
from torch import nn
from torch.nn import functional
from torchopt.pytree import tree_iter


class Weighted(nn.Module):
    """The loss of a batch, as Bergson asks a model for it."""

    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x, y, labels, example_weight):
        """Mean over the batch of the weighted losses."""
        losses = functional.cross_entropy(self.layers(x), y, reduction="none")
        return (losses * example_weight).mean()


class Stream:
    """The batches of the recorded run, with a weight for each training row."""

    device = torch.device("cpu")

    def __init__(self, X, y, order):
        self.X, self.y = X, y
        self.weights = nn.Parameter(torch.ones(len(X)))
        self.batches = [row[row >= 0] for row in order]

    @property
    def requires_grad(self):
        """Of the weights."""
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value):
        self.weights.requires_grad = value

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        rows = self.batches[i]
        # labels are only counted, to weigh parts of a batch
        counted = torch.zeros(len(rows), 2, dtype=torch.long)
        weights = self.weights[rows]
        return {"x": self.X[rows], "y": self.y[rows], "labels": counted, "example_weight": weights}


def layers_of(data):
    """Build the recorded network, its weights those before the first step."""
    first, last = data["0.weight"].shape, data["2.weight"].shape
    layers = nn.Sequential(nn.Linear(first[1], first[0]), nn.Tanh(), nn.Linear(last[1], last[0]))
    layers.load_state_dict({name: torch.as_tensor(data[name]) for name in layers.state_dict()})
    return layers


def main():
    """Score the first queries one by one: Bergson carries one adjoint at a time."""
    torch.set_num_threads(1)
    data = np.load(sys.argv[1])
    X, y, X_query, y_query, order = (
        torch.as_tensor(data[name]) for name in ("X", "y", "X_query", "y_query", "order")
    )
    scores, seconds = [], []
    for k in range(int(sys.argv[2])):
        layers, stream = layers_of(data), Stream(X, y, order)
        optimizer = torchopt.sgd(float(data["lr"]), moment_requires_grad=True)
        trainer, state = Trainer.initialize(Weighted(copy.deepcopy(layers)), optimizer)
        with tempfile.TemporaryDirectory() as folder:
            end = trainer.train(state, stream, save_dir=folder, save_mode="sqrt")
            started = time.process_time()
            end.detach_()
            end.requires_grad = True
            named = {n.removeprefix("layers."): p for n, p in end.params.items()}
            outputs = torch.func.functional_call(layers, named, (X_query[k : k + 1],))
            loss = functional.cross_entropy(outputs, y_query[k : k + 1])
            gradients = torch.autograd.grad(loss, list(end.params.values()))
            slots = [
                torch.zeros_like(t)
                for t in tree_iter(end.opt_state)
                if isinstance(t, torch.Tensor) and t.is_floating_point()
            ]
            by_end = dict(zip(end.params, gradients, strict=True))
            asked = BackwardState(by_end, slots, torch.zeros(len(X)))
            found = trainer.backward(folder, stream, asked, end, save_mode="sqrt")
            seconds.append(time.process_time() - started)
        scores.append(-found.weight_grads.detach().numpy())
    np.savez(sys.argv[3], scores=np.stack(scores), seconds=seconds)


if __name__ == "__main__":
    main()
