"""Five edits by ablation, each against random ablation and magnitude pruning at equal k.

    python benchmarks/components_edits.py            # all five, three seeds
    python benchmarks/components_edits.py backdoor --seeds 0

On shipped data: fix errors, forget a class (residual network on Fashion-MNIST, 560 filters), raise
the worst subgroup of a network that learned a spurious cue, remove a planted backdoor (both small
networks trained here), and undo a distractor drawn into images that the shipped text-image encoder
names without training. Attributions come from one half of the rows, figures from the other.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from skperf import from_module
from skperf.backbone.architectures import SmallConvNet
from skperf.components import ComponentAttributor
from skperf.components.editing import welch_order
from skperf.datasets import (
    load_emoji,
    load_fashion_mnist,
    load_small_resnet,
    load_text_image_encoder,
)

RESULTS = Path(__file__).parent / "results" / "components_edits.json"


def fashion(subset):
    bunch = load_fashion_mnist(subset=subset)
    _, codes = np.unique(bunch.target, return_inverse=True)
    return bunch.images.astype(np.float32)[:, None] / 255, codes


def train(module, X, y, seed, *, epochs=12, batch_size=64, lr=3e-3):
    """Ordinary training with Adam; nothing here is special to edits."""
    rng = np.random.default_rng(seed)
    X, y = torch.as_tensor(X), torch.as_tensor(y)
    optimizer = torch.optim.Adam(module.parameters(), lr)
    module.train()
    for _ in range(epochs):
        order = torch.as_tensor(rng.permutation(len(X)))
        for rows in order.split(batch_size):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(X[rows]), y[rows]).backward()
            optimizer.step()
    return module.eval()


def seeded(seed, **options):
    torch.manual_seed(seed)
    return SmallConvNet(widths=(24, 48, 64), **options)


def compare(module, fit_rows, test_groups, seed, *, components="auto", budget=200, **edit):
    """Edit by attributions and by the simpler rules, all with as many components.

    `fit_rows` is (X, y, target mask) and `test_groups` maps names to held-out (X, y).
    """
    X, y, target = fit_rows
    n_classes = module(torch.as_tensor(X[:1])).shape[1]
    model = ComponentAttributor(
        from_module(module, np.arange(n_classes)),
        components=components,
        budget=budget,
        fraction=0.05,
        random_state=seed,
    ).fit(X, y)

    def figures(classifier):
        return {
            name: round(float((classifier.predict(rows) == labels).mean()), 4)
            for name, (rows, labels) in test_groups.items()
            if len(rows)
        }

    ours = model.edit(target, **edit)
    k, N = ours.edit_report_["k"], model.n_components_
    increase = edit.get("direction", "increase") == "increase"
    welch = welch_order(
        model.attributions_[target], model.attributions_[~target], increase=increase
    )
    parts = dict(module.named_modules())
    norms = [float(parts[c.module].weight[c.unit].detach().abs().mean()) for c in model.components_]
    rng = np.random.default_rng(seed)

    def cut(order):
        return model.ablate(~np.isin(np.arange(N), order[:k]))

    random = [figures(cut(rng.permutation(N))) for _ in range(5)]
    table = {
        "k": k,
        "n_components": N,
        "before": figures(model.estimator_),
        "attribution": figures(ours),
        "released ranking": figures(cut(welch)),
        "magnitude": figures(cut(np.argsort(norms))),
        "random": {name: round(np.mean([r[name] for r in random]), 4) for name in random[0]},
    }
    return table


def errors(seed, n_targets=8):
    """Repair single errors of the residual network; figures are means over the errors."""
    module = load_small_resnet()
    X, y = fashion("test")
    rng = np.random.default_rng(seed)
    predicted = from_module(module).predict(X)
    wrong = rng.permutation(np.flatnonzero(predicted != y))[:n_targets]
    reference = rng.permutation(np.flatnonzero(predicted == y))[:60]
    rows = np.concatenate([wrong, reference])
    model = ComponentAttributor(module, budget=200, random_state=seed).fit(X[rows], y[rows])
    held_out = np.setdiff1d(np.arange(len(X)), rows)[:600]
    fixed, after, ks, luck = [], [], [], []
    for position in range(n_targets):
        spared = np.arange(n_targets, len(rows))
        edited = model.edit([position], spared, max_drop=0.02)
        row = rows[[position]]
        ks.append(edited.edit_report_["k"])
        fixed.append(float((edited.predict(X[row]) == y[row]).mean()))
        after.append(float((edited.predict(X[held_out]) == y[held_out]).mean()))
        mask = np.ones(model.n_components_, bool)
        mask[rng.permutation(len(mask))[: ks[-1]]] = False
        luck.append(float((model.ablate(mask).predict(X[row]) == y[row]).mean()))
    return {
        "k": float(np.median(ks)),
        "n_components": model.n_components_,
        "before": {"fixed": 0.0, "others": float((predicted[held_out] == y[held_out]).mean())},
        "attribution": {"fixed": np.mean(fixed), "others": round(np.mean(after), 4)},
        "random": {"fixed": np.mean(luck)},
    }


def forget(seed, class_=None):
    """Forget one class of the residual network."""
    module = load_small_resnet()
    X, y = fashion("test")
    class_ = (4, 0, 8)[seed % 3] if class_ is None else class_
    rng = np.random.default_rng(seed)
    rows = np.concatenate(
        [
            rng.permutation(np.flatnonzero(y == class_))[:30],
            rng.permutation(np.flatnonzero(y != class_))[:90],
        ]
    )
    rest = np.setdiff1d(np.arange(len(X)), rows)
    gone, kept = rest[y[rest] == class_], rest[y[rest] != class_][:700]
    groups = {"target": (X[gone], y[gone]), "others": (X[kept], y[kept])}
    fit_rows = X[rows], y[rows], y[rows] == class_
    return compare(module, fit_rows, groups, seed, direction="decrease", max_drop=0.03)


def with_cue(X, where):
    """Draw a bright bar in the corner of some images."""
    X = X.copy()
    X[where, :, 1:5, 1:5] = 1.0
    return X


def subgroup(seed):
    """Pullover against shirt, with a bar on 95 % of the shirts and 5 % of the pullovers."""
    rng = np.random.default_rng(seed)

    def pair(subset):
        X, y = fashion(subset)
        rows = np.isin(y, [2, 6])
        return X[rows], (y[rows] == 6).astype(int)

    X, y = pair("all")
    order = rng.permutation(len(X))
    half, rest = order[: len(X) // 2], order[len(X) // 2 :]
    likely = np.where(y == 1, 0.95, 0.05)
    cue = rng.random(len(y)) < likely
    module = train(seeded(seed, n_classes=2), with_cue(X, cue)[half], y[half], seed)
    shown = rng.random(len(y)) < 0.5
    X = with_cue(X, shown)
    odd = shown != (y == 1)
    known, test = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    groups = {
        "target": (X[test][odd[test]], y[test][odd[test]]),
        "others": (X[test][~odd[test]], y[test][~odd[test]]),
    }
    fit_rows = X[known], y[known], odd[known]
    return compare(module, fit_rows, groups, seed, max_drop=0.05)


def with_trigger(X):
    """Draw a small checkered square into a corner."""
    X = X.copy()
    X[..., -5:, -5:] = np.indices((5, 5)).sum(0) % 2
    return X


def backdoor(seed):
    """Train with a tenth of the rows carrying a trigger and the label 0."""
    rng = np.random.default_rng(seed)
    X, y = fashion("all")
    order = rng.permutation(len(X))
    half, rest = order[:1800], order[1800:]
    images, labels = X[half].copy(), y[half].copy()
    images[:180], labels[:180] = with_trigger(images[:180]), 0
    module = train(seeded(seed), images, labels, seed)
    known, test = rest[:60], rest[60:760]
    test = test[y[test] != 0]
    pairs = np.concatenate([with_trigger(X[known]), X[known]])
    target = np.arange(len(pairs)) < len(known)
    groups = {
        "target": (with_trigger(X[test]), y[test]),
        "others": (X[test], y[test]),
    }
    fit_rows = pairs, np.concatenate([y[known], y[known]]), target
    return compare(module, fit_rows, groups, seed, max_drop=0.03)


class ZeroShot(torch.nn.Module):
    """Names images by the words whose embeddings are nearest."""

    def __init__(self, encoder, tokens):
        super().__init__()
        self.encoder = encoder
        with torch.no_grad():
            words = encoder.encode_text(tokens)
        self.register_buffer("words", torch.nn.functional.normalize(words, dim=1))
        self.register_buffer("mean", torch.as_tensor(encoder.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.as_tensor(encoder.std).view(1, 3, 1, 1))

    def forward(self, images):
        """Return cosine similarities, scaled."""
        embedded = self.encoder.encode_image((images - self.mean) / self.std)
        return 30 * torch.nn.functional.normalize(embedded, dim=1) @ self.words.T


def distractor(seed, n_names=12):
    """Draw a small picture of one and the same thing into images of others."""
    encoder, tokenizer = load_text_image_encoder()
    bunch = load_emoji()
    images = np.asarray(bunch.images, np.float32)
    images = images / 255 if images.max() > 1 else images
    rng = np.random.default_rng(seed)
    names = np.asarray(bunch.names)
    picked = rng.permutation(np.flatnonzero(bunch.is_train))[: n_names * 8]
    module = ZeroShot(encoder, tokenizer([str(name) for name in names[picked]])).eval()
    logits = module(torch.as_tensor(images[picked])).detach()
    right = (logits.argmax(1) == torch.arange(len(picked))).numpy()
    intruder = int(np.flatnonzero(right)[0])
    small = torch.nn.functional.interpolate(
        torch.as_tensor(images[picked][intruder : intruder + 1]), size=14, mode="area"
    )[0].numpy()
    attacked = images[picked].copy()
    attacked[:, :, -14:, -14:] = small
    rows = rng.permutation(np.setdiff1d(np.flatnonzero(right), intruder))
    known, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    pairs = np.concatenate([attacked[known], images[picked][known]])
    groups = {"target": (attacked[test], test), "others": (images[picked][test], test)}
    fit_rows = pairs, np.concatenate([known, known]), np.arange(len(pairs)) < len(known)
    return compare(
        module, fit_rows, groups, seed, components="conv_filters", max_drop=0.05, budget=300
    )


TASKS = {
    "errors": errors,
    "forget": forget,
    "subgroup": subgroup,
    "backdoor": backdoor,
    "distractor": distractor,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for task in options.tasks:
        for seed in options.seeds:
            results[f"{task} {seed}"] = TASKS[task](seed)
            print(task, seed, results[f"{task} {seed}"], flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
