"""What a training step, a whole fit and a grid search of Reprogrammer cost.

1. A training step against the bare forward and backward pass through the frozen encoder.
2. A whole fit against the released loop, written out plainly, on the same rows and epochs.
3. Peak memory of ten grid-search candidates around an encoder of 100 MB.

Writes ``benchmarks/results/reprogramming_cost.json``:

    python -m benchmarks.reprogramming_cost
"""

import argparse
import json
import resource
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from torch import nn
from torch.nn import functional

from benchmarks import runner
from benchmarks.timing import interleaved
from skperf.datasets import load_fashion_mnist, load_text_image_encoder
from skperf.reprogramming import RELEASED_SETTINGS, Reprogrammer
from skperf.reprogramming._training import Labelled, reopened

RESULTS = Path(__file__).parent / "results" / "reprogramming_cost.json"
FASHION = ["t-shirt", "trousers", "pullover", "dress", "coat"]
FASHION += ["sandal", "shirt", "sneaker", "bag", "boot"]
BATCH, STEPS = 128, 4
BICUBIC = Image.Resampling.BICUBIC


def step_cost(repeats):
    """CPU seconds of a step, bare and through the estimator."""
    encoder, tokenizer = load_text_image_encoder()
    images = load_fashion_mnist(subset="train").images[: BATCH * STEPS]
    y = np.arange(BATCH * STEPS) % 10
    X = images[:, None].astype(np.float32) / 255
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    pixels = functional.interpolate(torch.as_tensor(X), (32, 32), mode="bicubic")
    pixels = ((pixels - 0.5) / 0.5).expand(-1, 3, -1, -1).contiguous()
    layouts = {"bare": torch.contiguous_format, "bare, channels last": torch.channels_last}

    def bare(layout):
        for batch in pixels.split(BATCH):
            inputs = batch.clone(memory_format=layout).requires_grad_()
            encoder.encode_image(inputs).square().sum().backward()

    functions = {name: lambda layout=layout: bare(layout) for name, layout in layouts.items()}
    shared = {"tokenizer": tokenizer, "class_names": FASHION, "border": 4, "max_epochs": 1}
    shared |= {"validation_fraction": 0.0, "alpha": 0.0, "random_state": 0}
    # with it, a fit embeds the plain rows once, which is no part of a step
    shared |= {"training_alpha": 0.0, "head": "prompts"}
    for text in ("none", "table"):
        model = Reprogrammer(encoder, text=text, **shared).fit(X, y)
        task, rows = model._task.reopened(), np.arange(len(y))
        net = reopened(model.net_, task).set_params(callbacks=[])
        labelled = Labelled(task, model._pictures(X), y, None, None)

        def epoch(net=net, labelled=labelled, rows=rows):
            net.learn(labelled, y, None, rows)

        functions[f"step, text={text!r}"] = epoch
    timed = interleaved(functions, repeats=repeats)
    base = timed["bare"]["cpu"]
    return [
        {
            "what": name,
            "ms per step": round(1000 * row["cpu"] / STEPS, 1),
            "least": round(1000 * row["cpu_min"] / STEPS, 1),
            "most": round(1000 * row["cpu_max"] / STEPS, 1),
            "ratio to bare": round(row["cpu"] / base, 3),
        }
        for name, row in timed.items()
    ]


class ReleasedLoop:
    """The released training loop, written out plainly for the shipped encoder.

    As in the authors' code (github.com/IBM/reprogrammer, commit f107472): each image is loaded
    through an 8-bit picture into a float tensor, and in the forward pass goes through another
    one, in which it is resized; every image brings its own caption through the text tower;
    gradients of all weights and of the images are computed, two optimisers step, and the
    validation rows are judged after every epoch. What the code does with a batch-normalised
    tower in training mode is left out: the tower stays in evaluation mode, which is cheaper.
    """

    def __init__(self, encoder, tokenizer, names, border, epochs):
        self.encoder, self.tokenizer, self.names = encoder, tokenizer, names
        self.epochs = epochs
        self.mask = torch.ones(3, 32, 32)
        self.mask[:, border:-border, border:-border] = 0
        self.weights = nn.Parameter(torch.randn(3, 32, 32))

    def images(self, batch):
        """Load and reprogram a batch."""
        loaded = torch.stack([as_tensor(Image.fromarray(row).convert("RGB")) for row in batch])
        bytes_ = (loaded * 255).byte().permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(row).resize((32, 32), BICUBIC) for row in bytes_]
        x = torch.stack([as_tensor(picture) for picture in pictures])
        canvas = torch.zeros(len(x), 3, 32, 32)
        canvas[:] = x
        canvas.requires_grad_()
        return ((canvas + torch.tanh(self.weights * self.mask)).clamp(0, 1) - 0.5) / 0.5

    def logits(self, batch, texts):
        """Hold a batch against texts."""
        u = self.encoder.encode_image(self.images(batch), normalize=True)
        ids = torch.cat([self.tokenizer([f"a photo of a {text}"]) for text in texts])
        q = self.encoder.encode_text(ids, normalize=True)
        return self.encoder.logit_scale.exp() * u @ q.T

    def fit(self, X, y, X_val, y_val):
        """Train; the encoder's token table and positions change."""
        image = torch.optim.Adam([self.weights], lr=5e-3, weight_decay=0.1)
        text = [self.encoder.token_embedding.weight, self.encoder.positional_embedding]
        text = torch.optim.AdamW(text, lr=5e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)
        for _ in range(self.epochs):
            for rows in torch.randperm(len(X)).split(BATCH):
                logits = self.logits(X[rows], [self.names[code] for code in y[rows]])
                target = torch.arange(len(rows))
                loss = (focal(logits, target) + focal(logits.T, target)) / 2
                self.encoder.zero_grad()
                image.zero_grad()
                loss.backward()
                image.step()
                text.step()
            with torch.no_grad():
                for rows in torch.arange(len(X_val)).split(BATCH):
                    self.logits(X_val[rows], self.names)


def as_tensor(picture):
    """Turn a picture into floats in [0, 1], channels first."""
    return torch.as_tensor(np.array(picture)).permute(2, 0, 1).contiguous().float() / 255


def focal(logits, target):
    """Focal loss as released."""
    p = logits.softmax(1).gather(1, target[:, None])
    return (-0.8 * (1 - p) ** 4 * p.clamp_min(1e-12).log()).mean()


def fit_cost(repeats, epochs):
    """CPU seconds of a whole fit, released and ours."""
    rows = load_fashion_mnist(subset="train")
    X, y = rows.images[:512], rows.target[:512]
    held_out = np.arange(512) < 51
    encoder, tokenizer = load_text_image_encoder()
    released = RELEASED_SETTINGS | {"border": 4, "warmup": 0.05, "max_epochs": epochs}
    shared = {"tokenizer": tokenizer, "class_names": FASHION, "random_state": 0}

    def loop():
        # it changes the encoder's weights
        trainer = ReleasedLoop(deepcopy(encoder), tokenizer, FASHION, 4, epochs)
        trainer.fit(X[~held_out], y[~held_out], X[held_out], y[held_out])

    def preset():
        Reprogrammer(encoder, **shared, **released).fit(X[:, None], y)

    def default():
        Reprogrammer(encoder, **shared, border=4, max_epochs=epochs).fit(X[:, None], y)

    functions = {"released loop": loop, "released preset": preset, "skperf default": default}
    timed = interleaved(functions, repeats=repeats)
    base = timed["released loop"]["cpu"]
    return [
        {
            "what": f"{name}, {epochs} epochs of 512 rows",
            "CPU s": round(row["cpu"], 2),
            "least": round(row["cpu_min"], 2),
            "most": round(row["cpu_max"], 2),
            "ratio to released": round(row["cpu"] / base, 3),
        }
        for name, row in timed.items()
    ]


class Large(nn.Module):
    """An encoder of 100 MB that is cheap to run."""

    def __init__(self):
        super().__init__()
        self.ballast = nn.Parameter(torch.zeros(25_000_000))
        self.tower = nn.Sequential(nn.Conv2d(3, 4, 3, stride=4), nn.Flatten(), nn.Linear(36, 20))

    def forward(self, images):
        """Compute logits."""
        return self.tower(images) + self.ballast[:20]


def peak_memory():
    """Print resident and peak megabytes before and after ten candidates."""
    X, y = np.random.RandomState(0).rand(200, 3, 12, 12).astype("f4"), np.arange(200) % 4
    model = Reprogrammer(Large(), border=2, max_epochs=1, head="linear", random_state=0)
    clone(model).fit(X, y)
    before = _peak()
    grid = {"lr": [0.001, 0.01, 0.1, 0.2, 0.5], "border": [1, 2]}
    GridSearchCV(model, grid, cv=2, n_jobs=1).fit(X, y)
    print(json.dumps([before, _peak()]))


def _peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory_cost():
    """Peak memory in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.reprogramming_cost", "--memory"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = json.loads(output)
    return [
        {
            "what": "peak MB before and after 10 candidates x 2 folds, encoder 100 MB",
            "before": round(before, 1),
            "after": round(after, 1),
            "growth, share of encoder": round((after - before) / 95.4, 4),
        }
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        peak_memory()
    else:
        results = {
            "step": step_cost(options.repeats),
            "fit": fit_cost(options.repeats, options.epochs),
            "memory": memory_cost(),
        }
        runner.save(RESULTS, results)
        print(json.dumps(results, indent=1))
