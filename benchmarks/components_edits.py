"""Edits by ablation, against the released ranking at its own k, magnitudes and chance.

    python -m benchmarks.components_edits                       # all, ten seeds
    python -m benchmarks.components_edits backdoor --seeds 0
    python -m benchmarks.components_edits table                 # the table of the guide

Fix single errors, forget a class, raise the worst subgroup of a network that learned a spurious
cue, remove a planted backdoor, and undo lines and words drawn into the images that the shipped
text-image encoder names without training. Attributions come from some rows, figures from others;
k comes from the rows of the attributions, by the same rule for both criteria: the best for the
targets among those that cost the others at most `max_drop`. A single error is judged on eight
copies of it that the edit has not seen, shifted by a pixel and noisy. "minilm" and "lite0"
need fetched files.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import runner
from benchmarks.components_networks import NETWORKS, n_logits
from skperf import from_module
from skperf.backbone.architectures import SmallConvNet
from skperf.components import ComponentAttributor, ComponentEditor
from skperf.datasets import (
    load_emoji,
    load_fashion_cnn,
    load_fashion_mnist,
    load_small_resnet,
    load_text_image_encoder,
)

RESULTS = Path(__file__).parent / "results" / "components_edits.json"


def fashion(subset):
    bunch = load_fashion_mnist(subset=subset)
    return floats(bunch.images), np.unique(bunch.target, return_inverse=True)[1]


def floats(images):
    return images.astype(np.float32)[:, None] / 255


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


def attributed(module, X, y, seed, *, components="auto", budget=200, fraction=0.05):
    """Attribute the margins of some rows."""
    classifier = from_module(module, np.arange(n_logits(module, X)))
    return ComponentAttributor(
        classifier, components=components, budget=budget, fraction=fraction, random_state=seed
    ).fit(X, y)


def magnitudes(module, model):
    """Mean absolute weight of every component."""
    parts, norms = dict(module.named_modules()), []
    sites = {name: site for site in model._study.wiring.sites for name in [site.module]}
    for component in model.components_:
        spot = sites[component.module].weights[0]
        weight = parts[spot.module].weight.detach().abs().movedim(spot.dim, 0)
        width = sites[component.module].width
        norms.append(float(weight[component.unit * width : (component.unit + 1) * width].mean()))
    return np.array(norms)


def accuracies(classifier, groups):
    """Accuracy on every group of held-out rows."""
    return {
        name: round(float((classifier.predict(rows) == labels).mean()), 4)
        for name, (rows, labels) in groups.items()
        if len(rows)
    }


def against(model, edits, norms, seed, groups):
    """Accuracies after edits, and after simpler rules that ablate as many as the first."""
    k, n_components = edits["attribution"].edit_report_["k"], model.n_components_
    rng = np.random.default_rng(seed)

    def cut(order):
        mask = ~np.isin(np.arange(n_components), order[:k])
        return accuracies(model.ablate(mask), groups)

    random = [cut(rng.permutation(n_components)) for _ in range(5)]
    return {
        "k": {rule: edited.edit_report_["k"] for rule, edited in edits.items()},
        "n_components": n_components,
        "before": accuracies(model.estimator_, groups),
        **{rule: accuracies(edited, groups) for rule, edited in edits.items()},
        "magnitude": cut(np.argsort(norms)),
        "random": {name: round(np.mean([r[name] for r in random]), 4) for name in random[0]},
    }


def by_both(model, target, *rest, **options):
    """Edit by our criterion and by the released one, each with the k that its own path says."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "target has a single row")
        return {
            "attribution": model.edit(target, *rest, criterion="budgeted", **options),
            "released ranking": model.edit(target, *rest, criterion="welch", **options),
        }


def compare(module, fit_rows, groups, seed, *, components="auto", budget=200, **edit):
    """Edit by attributions, k by true passes, and compare with the simpler rules."""
    X, y, target = fit_rows
    model = attributed(module, X, y, seed, components=components, budget=budget)
    return against(model, by_both(model, target, **edit), magnitudes(module, model), seed, groups)


def copies(row, seed, n=8):
    """Copy an image that nobody has fitted on: shifted by a pixel, with some noise."""
    rng = np.random.default_rng(seed)
    shifts = rng.integers(-1, 2, (n, 2))
    moved = np.stack([np.roll(row, tuple(shift), (-2, -1)) for shift in shifts])
    if moved.dtype == np.uint8:
        return np.clip(moved + rng.normal(scale=5, size=moved.shape), 0, 255).astype(np.uint8)
    return (moved + rng.normal(scale=0.02, size=moved.shape)).astype(np.float32)


def data_of(network):
    """Give a module, rows, labels and components; R-Net errs on noisy images alone."""
    if network in ("cnn", "resnet"):
        module = load_small_resnet() if network == "resnet" else load_fashion_cnn()
        return module, *fashion("test"), "auto"
    module, X, y, components = NETWORKS[network]()
    if network == "rnet":
        noise = 25 * np.random.default_rng(0).normal(size=X.shape)
        X = np.clip(X + noise, 0, 255).astype(np.uint8)
    return module, X, y, components


def errors(network, seed, *, n_targets=8, n_reference=60, budget=200, fraction=0.05):
    """Repair single errors; the figures are means over the errors."""
    module, X, y, components = data_of(network)
    rng = np.random.default_rng(seed)
    classifier = from_module(module, np.arange(n_logits(module, X)))
    predicted = classifier.predict(X)
    wrong = rng.permutation(np.flatnonzero(predicted != y))[:n_targets]
    right = rng.permutation(np.flatnonzero(predicted == y))
    n_reference = min(n_reference, len(right) // 2)
    rows = np.concatenate([wrong, right[:n_reference]])
    others = np.setdiff1d(np.arange(len(X)), rows)[:600]
    model = attributed(
        module, X[rows], y[rows], seed, components=components, budget=budget, fraction=fraction
    )
    norms = magnitudes(module, model)
    tables = []
    for position, row in enumerate(wrong):
        target = np.arange(len(rows)) == position
        edits = by_both(model, target, np.arange(len(wrong), len(rows)), max_drop=0.02)
        seen = copies(X[row], seed) if X.ndim > 2 else X[[row]]
        groups = {"target": (seen, np.repeat(y[row], len(seen))), "others": (X[others], y[others])}
        tables.append(against(model, edits, norms, seed, groups))
    rules = ("before", "attribution", "released ranking", "magnitude", "random")
    return {
        "k": {
            rule: float(np.median([table["k"][rule] for table in tables])) for rule in rules[1:3]
        },
        "n_components": model.n_components_,
        "n_errors": len(wrong),
        **{
            rule: {
                group: round(float(np.mean([table[rule][group] for table in tables])), 4)
                for group in ("target", "others")
            }
            for rule in rules
        },
    }


def forget(network, seed):
    """Forget one class."""
    module, X, y, components = data_of(network)
    rng = np.random.default_rng(seed)
    common = np.argsort(-np.bincount(y), kind="stable")
    class_ = common[seed % 2] if network == "minilm" else (4, 0, 8)[seed % 3]
    inside, outside = (rng.permutation(np.flatnonzero((y == class_) == is_)) for is_ in (1, 0))
    n_inside, n_outside = min(30, len(inside) // 2), min(90, len(outside) // 2)
    rows = np.concatenate([inside[:n_inside], outside[:n_outside]])
    gone, kept = inside[n_inside:], outside[n_outside:][:700]
    groups = {"target": (X[gone], y[gone]), "others": (X[kept], y[kept])}
    fit_rows = X[rows], y[rows], y[rows] == class_
    budget = 100 if network == "minilm" else 200
    return compare(
        module,
        fit_rows,
        groups,
        seed,
        components=components,
        budget=budget,
        direction="decrease",
        max_drop=0.03,
    )


def with_cue(X, where):
    """Draw a bright bar in the corner of some images."""
    X = X.copy()
    X[where, :, 1:5, 1:5] = 1.0
    return X


def subgroup(seed, n_train=500):
    """Shirts against pullovers and coats, with a bar on 95 % of the latter and 5 % of the former.

    Rows to edit by and rows to judge by come once with the bar and once without.
    """
    rng = np.random.default_rng(seed)
    X, codes = fashion("all")
    rows = rng.permutation(np.flatnonzero(np.isin(codes, [0, 2, 4, 6])))
    X, y = X[rows], np.isin(codes[rows], [2, 4]).astype(int)
    cue = rng.random(len(y)) < np.where(y == 1, 0.95, 0.05)
    module = train(
        seeded(seed, n_classes=2), with_cue(X, cue)[:n_train], y[:n_train], seed, epochs=6
    )
    X = np.concatenate([with_cue(X, np.full(len(y), bar)) for bar in (False, True)])
    group, y = np.concatenate([2 * y, 2 * y + 1]), np.concatenate([y, y])
    half = len(y) // 2
    known, test = (
        np.concatenate([rows, rows + half])
        for rows in (np.arange(n_train, n_train + 200), np.arange(n_train + 200, half))
    )
    return raised(module, (X, y, group), known, test, seed, rng)[0]


def raised(module, rows, known, test, seed, rng, **options):
    """Raise the worst group by the editor and by the released ranking; with all groups' rows."""
    X, y, group = rows
    groups = {
        f"group {g}": (X[test][group[test] == g], y[test][group[test] == g]) for g in range(4)
    }
    base = from_module(module, np.arange(2))
    attributor = ComponentAttributor(budget=200, **options)
    editor = ComponentEditor(
        base, attributor, target="worst_group", max_drop=0.02, random_state=seed
    ).fit(X[known], y[known], groups=group[known])
    before = accuracies(
        base,
        {g: (X[known][group[known] == g], y[known][group[known] == g]) for g in range(4)},
    )
    worst = min(before, key=before.get)
    few = rng.permutation(known)[:200]
    model = attributed(module, X[few], y[few], seed, **options)
    released = model.edit(
        group[few] == worst,
        criterion="welch",
        guard=(X[known], y[known], group[known]),
        max_drop=0.02,
    )
    edits = {"attribution": editor.edited_, "released ranking": released}
    table = against(model, edits, magnitudes(module, model), seed, groups)
    return {
        rule: value
        if rule in ("k", "n_components")
        else {"target": min(value.values()), "others": round(np.mean(list(value.values())), 4)}
        for rule, value in table.items()
    }, groups


def digits(seed):
    """Eights against threes in a network of 28 filters, 180 rows to train and 90 to edit by.

    "ceiling" is the lowest accuracy of a group that greedy search over all filters reaches on the
    rows to judge by themselves.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pick = np.isin(bunch.target, (3, 8))
    images = (bunch.images[pick] / 16).astype(np.float32)[:, None]
    labels = (bunch.target[pick] == 8).astype(int)
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    train_rows, known, test = np.split(rng.permutation(len(labels)), [180, 270])
    cue = rng.random(len(labels)) < np.where(labels == 1, 0.95, 0.05)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(1, 12, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv2d(12, 16, 3, padding=1), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Flatten(), torch.nn.Linear(256, 2),
    )  # fmt: skip
    X, y = with_corner(images, cue)[train_rows], labels[train_rows]
    train(module, X, y, seed, batch_size=32, lr=5e-3)
    X = np.concatenate([with_corner(images, np.full(len(labels), bar)) for bar in (False, True)])
    y, n = np.concatenate([labels, labels]), len(labels)
    group = np.concatenate([2 * labels, 2 * labels + 1])
    known, test = (np.concatenate([rows, rows + n]) for rows in (known, test))
    table, groups = raised(module, (X, y, group), known, test, seed, rng, fraction=0.1)
    sizes = {name: len(labels) for name, (_, labels) in groups.items()}
    return {**table, "smallest group": min(sizes.values()), "ceiling": ceiling(module, groups)}


def with_corner(X, where):
    """Brighten two by two pixels in the corner of some images."""
    X = X.copy()
    X[where, :, :2, :2] = 1.0
    return X


def ceiling(module, groups):
    """Go greedily over all components, there and back, by the lowest accuracy of a group."""
    X, y = (np.concatenate(parts) for parts in zip(*groups.values(), strict=True))
    names = np.repeat(np.arange(len(groups)), [len(labels) for _, labels in groups.values()])
    model = attributed(module, X, y, 0, budget=30, fraction=0.1)
    mask, reached = np.ones(model.n_components_, bool), -1.0
    while True:
        tried = mask ^ np.eye(len(mask), dtype=bool)
        right = model.counterfactual(tried) > 0
        lowest = np.min([right[names == g].mean(0) for g in np.unique(names)], 0)
        if lowest.max() <= reached:
            return round(float(reached), 4)
        mask, reached = tried[lowest.argmax()], lowest.max()


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


def with_lines(X):
    """Draw a black line near the upper and the lower edge."""
    X = X.copy()
    X[:, :, [2, -3]] = 0.0
    return X


def with_words(X, names, seed):
    """Write the name of another image across each, in black letters on a white band."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    written = []
    for image, name in zip(X, np.asarray(names)[rng.permutation(len(names))], strict=True):
        size = image.shape[-1]
        picture = Image.fromarray((image.transpose(1, 2, 0) * 255).astype(np.uint8))
        picture = picture.resize((4 * size, 4 * size))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, int(2.8 * size), 4 * size, int(3.5 * size)), fill="white")
        draw.text((2, int(2.85 * size)), str(name)[:18], fill="black")
        written.append(np.asarray(picture.resize((size, size))) / 255)
    return np.stack(written).transpose(0, 3, 1, 2).astype(np.float32)


def distractor(seed, n_names=96, *, words=False):
    """Lines or words across the image, which make the encoder name other things."""
    encoder, tokenizer = load_text_image_encoder()
    bunch = load_emoji()
    images = np.asarray(bunch.images, np.float32)
    images = images / 255 if images.max() > 1 else images
    rng = np.random.default_rng(seed)
    picked = rng.permutation(np.flatnonzero(bunch.is_train))[:n_names]
    names = [str(name) for name in np.asarray(bunch.names)[picked]]
    module, X = ZeroShot(encoder, tokenizer(names)).eval(), images[picked]
    right = from_module(module, np.arange(n_names)).predict(X) == np.arange(n_names)
    rows = rng.permutation(np.flatnonzero(right))
    known, test = rows[: len(rows) // 2], rows[len(rows) // 2 :]

    def spoiled(rows):
        return with_words(X[rows], np.take(names, rows), seed) if words else with_lines(X[rows])

    pairs = np.concatenate([spoiled(known), X[known]])
    groups = {"target": (spoiled(test), test), "others": (X[test], test)}
    fit_rows = pairs, np.concatenate([known, known]), np.arange(len(pairs)) < len(known)
    return compare(module, fit_rows, groups, seed, components="conv_filters", max_drop=0.05)


TASKS = {
    "errors cnn": partial(errors, "cnn"),
    "errors resnet": partial(errors, "resnet"),
    "errors rnet": partial(errors, "rnet"),
    "errors minilm": partial(errors, "minilm", n_targets=4, n_reference=40, budget=100),
    "errors lite0": partial(errors, "lite0", n_targets=4, budget=150, fraction=0.01),
    "forget cnn": partial(forget, "cnn"),
    "forget resnet": partial(forget, "resnet"),
    "forget minilm": partial(forget, "minilm"),
    "subgroup": subgroup,
    "digits": digits,
    "backdoor": backdoor,
    "lines": distractor,
    "words": partial(distractor, words=True),
}
TITLES = {
    "errors cnn": "fix an error, Fashion-MNIST CNN",
    "errors resnet": "fix an error, residual network",
    "errors rnet": "fix an error, R-Net on noisy images",
    "errors minilm": "fix an error, MiniLM heads on R8 (the row itself)",
    "errors lite0": "fix an error, EfficientNet-Lite0",
    "forget cnn": "forget a class, Fashion-MNIST CNN",
    "forget resnet": "forget a class, residual network",
    "forget minilm": "forget a class, MiniLM heads on R8",
    "subgroup": "raise the worst of four subgroups",
    "digits": "raise the worst of four subgroups, 28 filters on digits",
    "backdoor": "remove a backdoor",
    "lines": "undo drawn lines, text-image encoder",
    "words": "undo drawn words, text-image encoder",
}


def table():
    """Lines of the guide's table, from the file of results alone."""
    results = runner.load(RESULTS)
    rules = ("before", "attribution", "released ranking", "magnitude", "random")
    lines = [
        "| task | seeds | k of N | " + " | ".join(rules) + " | lead, paired |",
        "|---" * (len(rules) + 4) + "|",
    ]
    for task, title in TITLES.items():
        runs = [run for run in results if run["task"] == task]
        if not runs:
            continue
        ours, theirs = (
            ", ".join(f"{run['k'][rule]:g}" for run in runs)
            for rule in ("attribution", "released ranking")
        )
        cells = []
        for rule in rules:
            target, others = (
                np.array([run[rule][g] for run in runs]) for g in ("target", "others")
            )
            spread = f" ± {target.std(ddof=1):.2f}" if len(runs) > 1 else ""
            cells.append(f"{target.mean():.2f}{spread} / {others.mean():.2f}")
        sizes = f"{ours} and {theirs} of {runs[0]['n_components']}"
        cells.append(lead(task, runs))
        lines.append(f"| {title} | {len(runs)} | {sizes} | " + " | ".join(cells) + " |")
    return lines


def lead(task, runs):
    """By how much attribution does better than the released ranking, seed by seed."""
    ours, theirs = (
        np.array([[run[rule][group] for group in ("target", "others")] for run in runs])
        for rule in ("attribution", "released ranking")
    )
    gains = (ours - theirs) * ([-1, 1] if task.startswith("forget") else [1, 1])
    deviation = gains[:, 0].std(ddof=1) if len(runs) > 1 else 0
    error = deviation / len(runs) ** 0.5
    spread = f" ± {deviation:.2f} (error of the mean {error:.2f})" if len(runs) > 1 else ""
    won = f"({(gains[:, 0] > 0).sum()} of {len(runs)})"
    return f"{gains[:, 0].mean():+.2f}{spread} {won} / {gains[:, 1].mean():+.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    options = parser.parse_args()
    if options.tasks == ["table"]:
        print("\n".join(table()))
        return
    torch.set_num_threads(1)
    rows = runner.load(RESULTS) if RESULTS.exists() else []
    commit = runner.provenance()["commit"]
    for task in options.tasks:
        for seed in options.seeds:
            rows = [row for row in rows if (row["task"], row["seed"]) != (task, seed)]
            rows.append({"task": task, "seed": seed, "commit": commit, **TASKS[task](seed)})
            print(rows[-1], flush=True)
            runner.save(RESULTS, rows)


if __name__ == "__main__":
    main()
