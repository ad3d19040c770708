"""Reprogramming a small CLIP-like encoder, side by side with what else one could do.

Three tasks, on the shipped text-image encoder or on EfficientNet-Lite0 joined to MiniLM. For
each method: accuracy on the task's own test rows (ID), on shifted rows, and AUROC and FPR95 of
"does this belong to the task at all" against two sets of foreign pictures, by two scores: the
estimator's default ("mcm") and the largest similarity ("max_logit"). Writes
``benchmarks/results/reprogramming_<encoder>_seed<n>.json`` and, from all of these, the tables
``reprogramming.json``, ``reprogramming_lite0.json`` and, of differences by seed,
``reprogramming_paired.json``:

    python -m benchmarks.data fetch mnist fashion_mnist
    python -m benchmarks.reprogramming --seeds 0 1 2
    python -m benchmarks.data fetch emoji_google emoji_twitter efficientnet_lite0 minilm
    python -m benchmarks.reprogramming --encoder lite0 --seeds 0 1 2

The encoders are CLIP-like in form only; nothing here says anything about CLIP's own figures.
"""

import argparse
import time
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from benchmarks import runner
from benchmarks.reprogramming_tasks import ENCODERS, PROMPT, make_tasks
from skperf.metrics import fpr_at_95_tpr, ood_auroc
from skperf.reprogramming import RELEASED_SETTINGS, Reprogrammer
from skperf.reprogramming.rejection import SCORES as RATES

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Size:
    """How much of the benchmark an encoder runs."""

    tasks: tuple[str, ...]
    epochs: int
    preset_epochs: int
    n_train: int
    n_test: int
    tuning_rates: tuple[float, float]
    fixed_statistics: bool


class Prompted(torch.nn.Module):
    """An image tower and class embeddings: zero-shot, or fine-tuned together."""

    def __init__(self, encoder, tokenizer, classes):
        super().__init__()
        self.visual = deepcopy(encoder.visual)
        self.mean = torch.tensor(encoder.mean).view(3, 1, 1)
        self.std = torch.tensor(encoder.std).view(3, 1, 1)
        self.scale = float(encoder.logit_scale.detach().exp())
        texts = tokenizer([PROMPT.format(name) for name in classes])
        with torch.no_grad():
            table = encoder.encode_text(texts, normalize=True)
        self.table = torch.nn.Parameter(table)

    def forward(self, images):
        """Compute cosines with the classes."""
        return self.embed(images) @ functional.normalize(self.table, dim=-1).T

    def embed(self, images):
        """Embed images in [0, 1], of unit length."""
        return functional.normalize(self.visual((images - self.mean) / self.std), dim=-1)


def similarities(module, images):
    """Cosines of many images, in evaluation mode."""
    return in_batches(module.eval(), images)


def in_batches(function, images):
    """Apply a function to many images, without gradients."""
    with torch.inference_mode():
        return torch.cat([function(torch.as_tensor(b)) for b in np.array_split(images, 8)])


def fine_tuned(module, X, y, *, lr, size, seed, held_out, margin=None):
    """Train image tower and class embeddings; return module and held-out accuracy.

    With `margin`, beside the constant logit of "none of these" that Reprogrammer trains with.
    """
    level = None
    if margin is not None:
        level = similarities(module, X).amax(1).mean() + margin / module.scale
    module = deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    keep = np.setdiff1d(np.arange(len(X)), held_out)
    images, codes = torch.as_tensor(X[keep]), torch.as_tensor(y[keep]).long()
    n_steps = size.epochs * -(-len(keep) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    module.train(not size.fixed_statistics)
    for _ in range(size.epochs):
        for rows in torch.randperm(len(keep), generator=generator).split(128):
            cosines = module(images[rows])
            if level is not None:
                cosines = torch.cat([cosines, level.expand(len(rows), 1)], 1)
            loss = functional.cross_entropy(module.scale * cosines, codes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    guess = similarities(module, X[held_out]).argmax(1).numpy()
    return module, float((guess == y[held_out]).mean())


def figures(score):
    """Reduce a function from images to cosines (or logits) to the table's numbers."""

    def reduce(task):
        inside, shifted = score(task.test[0]), score(task.shifted[0])
        foreign = [score(images) for images in task.foreign.values()]
        result = {
            "ID": float((inside.argmax(1).numpy() == task.test[1]).mean()),
            "shifted": float((shifted.argmax(1).numpy() == task.shifted[1]).mean()),
        }
        for suffix, rate in SCORES.items():
            own = rate(inside).numpy()
            aurocs, fprs = [], []
            for other in foreign:
                scores = np.r_[own, rate(other).numpy()]
                truth = np.repeat([1, 0], [len(own), len(other)])
                aurocs.append(ood_auroc(truth, scores))
                fprs.append(fpr_at_95_tpr(truth, scores))
            result[f"AUROC{suffix}"] = float(np.mean(aurocs))
            result[f"FPR95{suffix}"] = float(np.mean(fprs))
        return result

    return reduce


def best_tuned(plain, task, seed, size, margin=None):
    """Fine-tune at two rates; return the better module and the seconds of one."""
    X, y = task.train
    held_out = np.random.RandomState(seed).permutation(len(X))[: len(X) // 10]
    options = {"size": size, "seed": seed, "held_out": held_out, "margin": margin}
    start = time.process_time()
    tried = [fine_tuned(plain, X, y, lr=lr, **options) for lr in size.tuning_rates]
    seconds = (time.process_time() - start) / 2
    return max(tried, key=lambda pair: pair[1])[0], seconds


def halfway(plain, tuned):
    """Mix the weights of two modules, as WiSE-FT does."""
    mixed, state = deepcopy(tuned), plain.state_dict()
    mixed.load_state_dict(
        {
            k: (v + state[k]) / 2 if v.is_floating_point() else v
            for k, v in tuned.state_dict().items()
        }
    )
    return mixed


def baselines(encoder, tokenizer, task, seed, size):
    """Zero-shot, linear probe, full fine-tuning and the mix of its weights with the first."""
    X, y = task.train
    plain = Prompted(encoder, tokenizer, task.classes)
    yield "zero-shot", figures(lambda images: similarities(plain, images))(task), 0.0

    start = time.process_time()

    def embed(images):
        return in_batches(plain.embed, images).numpy()

    plain.eval()
    probe = LogisticRegression(C=100.0, max_iter=500).fit(embed(X), y)
    seconds = time.process_time() - start
    result = figures(lambda images: torch.as_tensor(probe.decision_function(embed(images))))(task)
    yield "linear probe", result, seconds

    tuned, seconds = best_tuned(plain, task, seed, size)
    yield "full fine-tuning", figures(lambda images: similarities(tuned, images))(task), seconds

    mixed = halfway(plain, tuned)
    yield "WiSE-FT 0.5", figures(lambda images: similarities(mixed, images))(task), seconds


def reprogrammed(encoder, tokenizer, task, seed, *, epochs, **more):
    """Fit a Reprogrammer; give its figures at alpha 0, as chosen, and the whole path."""
    shared = {"tokenizer": tokenizer, "class_names": task.classes, "prompts": PROMPT}
    shared |= {"max_epochs": epochs, "random_state": seed}
    start = time.process_time()
    model = Reprogrammer(encoder, **(shared | {"border": 4} | more)).fit(*task.train)
    seconds = time.process_time() - start
    seen = {}

    def at(alpha):
        def score(images):
            if id(images) not in seen:
                seen[id(images)] = model._fitted.representations(model._pictures(images))
            return seen[id(images)].similarities(alpha)

        return figures(score)(task)

    return model, at, seconds


def run(name, task_name, seed, afresh):
    """Fill the results file of a seed by one task, method by method.

    What is there is kept, skperf's own rows only unless they are wanted afresh.
    """
    path = RESULTS / f"reprogramming_{name}_seed{seed}.json"
    rows = runner.load(path) if path.exists() else []
    if afresh:
        ours = [row["method"].startswith("skperf") and row["task"] == task_name for row in rows]
        rows = [row for row, own in zip(rows, ours, strict=True) if not own]
    done = {(row["task"], row["method"]) for row in rows}
    encoder, tokenizer, pictures = ENCODERS[name]()
    side, size = encoder.image_size, SIZES[name]
    # the border at the same share of the canvas, the warm-up at that of a long training
    preset = RELEASED_SETTINGS | {"warmup": 0.05, "border": side // 16}
    preset |= {"max_epochs": size.preset_epochs}
    settings = {"released preset": preset}
    if name == "tiny":
        # the released rate is made for tokens of size 0.01 or so, as MiniLM's are too; those of
        # the shipped encoder are of size 1
        settings["released preset, text rate scaled"] = preset | {"text_lr": 0.02}

    def keep(task, method, result, seconds, **more):
        rows.append({"task": task.name, "seed": seed, "method": method, **result, **more})
        rows[-1] |= {"cpu_s": round(seconds, 1)}
        runner.save(path, rows)
        shown = " ".join(f"{k} {v:.3f}" for k, v in result.items())
        print(f"{task.name:14s} {seed} {method:34s} {shown} {seconds:.0f} s", flush=True)

    epochs = size.epochs
    tasks = make_tasks(pictures, side, seed, size.n_train, size.n_test)
    task = next(task for task in tasks if task.name == task_name)
    if (task.name, "WiSE-FT 0.5") not in done:
        for method, result, seconds in baselines(encoder, tokenizer, task, seed, size):
            keep(task, method, result, seconds)
    if name == "tiny" and (task.name, REJECTING) not in done:
        plain = Prompted(encoder, tokenizer, task.classes)
        tuned, seconds = best_tuned(plain, task, seed, size, margin=2.0)
        keep(task, REJECTING, figures(partial(similarities, tuned))(task), seconds)
    for method, chosen in settings.items():
        if (task.name, method) not in done:
            _, at, seconds = reprogrammed(encoder, tokenizer, task, seed, epochs=epochs, **chosen)
            keep(task, method, at(0.4), seconds)
    if (task.name, "skperf default") in done:
        return
    model, at, seconds = reprogrammed(
        encoder, tokenizer, task, seed, epochs=epochs, border=side // 8
    )
    keep(task, "skperf, alpha 0", at(0.0), seconds)
    keep(task, "skperf, alpha 0.4", at(0.4), seconds)
    curve = model.alpha_curve_
    ends = max(curve.accuracy[0], curve.accuracy[-1])
    gain = curve.accuracy[curve.alphas.index(model.alpha_)] - ends
    result = at(model.alpha_)
    keep(task, "skperf default", result, seconds, alpha=model.alpha_, over_best_end=gain)


def by_seed(rows, method, task, column):
    """Percent of a method, seed by seed, for one task or the mean over the tasks."""
    values: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method and task in (row["task"], MEAN):
            values.setdefault(row["seed"], []).append(100 * row[column])
    n_tasks = max(map(len, values.values()), default=0)
    return {seed: float(np.mean(v)) for seed, v in values.items() if len(v) == n_tasks}


def read(name):
    """Read the results of all seeds of an encoder."""
    paths = sorted(RESULTS.glob(f"reprogramming_{name}_seed*.json"))
    return [row for path in paths for row in runner.load(path)]


def table(name, target):
    """Write and print means and standard deviations over seeds, by task and over all tasks."""
    rows, records = read(name), []
    for task in [*dict.fromkeys(row["task"] for row in rows), MEAN]:
        methods = [row["method"] for row in rows if task in (row["task"], MEAN)]
        for method in dict.fromkeys(methods):
            record = {"task": task, "method": method}
            for column in COLUMNS:
                means = list(by_seed(rows, method, task, column).values())
                record[column] = f"{np.mean(means):.1f} ± {np.std(means, ddof=1):.1f}"
            records.append(record | {"seeds": len(means)})
            cells = "".join(f"{record[column]:>14s}" for column in COLUMNS)
            print(f"{task:14s} {method:34s}{cells}")
    write(target, records)


def paired():
    """Write and print by how much skperf's default differs from other methods.

    Mean and standard deviation over seeds of the difference averaged over tasks, and in how
    many of the pairs of seed and task the default is the better.
    """
    records = []
    for name in ENCODERS:
        rows = read(name)
        tasks = dict.fromkeys(row["task"] for row in rows)
        for other in (method for method in METHODS if any(r["method"] == method for r in rows)):
            record = {"encoder": name, "skperf default minus": other}
            for column in COLUMNS:
                means = gains(rows, other, MEAN, column)
                single = [gain for task in tasks for gain in gains(rows, other, task, column)]
                sign = -1 if column.startswith("FPR95") else 1
                won = sum(sign * gain > 0 for gain in single)
                spread = np.std(means, ddof=1)
                record[column] = f"{np.mean(means):+.1f} ± {spread:.1f} ({won}/{len(single)})"
            records.append(record | {"seeds": len(means)})
            cells = "".join(f"{record[column]:>20s}" for column in COLUMNS)
            print(f"{name:6s} default minus {other:34s}{cells}")
    write("reprogramming_paired.json", records)


def gains(rows, other, task, column):
    """Differences of skperf's default from another method, seed by seed."""
    ours = by_seed(rows, "skperf default", task, column)
    theirs = by_seed(rows, other, task, column)
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def write(name, records):
    """Write records to the results."""
    runner.save(RESULTS / name, records)


MEAN = "mean of tasks"
SCORES = {
    "": partial(RATES["mcm"], temperature=1),
    " max logit": partial(RATES["max_logit"], temperature=1),
}
COLUMNS = ("ID", "shifted", *(f"{what}{s}" for s in SCORES for what in ("AUROC", "FPR95")))
METHODS = ["released preset", "released preset, text rate scaled", "zero-shot", "linear probe"]
REJECTING = "full fine-tuning with none of these"
METHODS += ["full fine-tuning", REJECTING, "WiSE-FT 0.5"]
TARGETS = {"tiny": "reprogramming.json", "lite0": "reprogramming_lite0.json"}
SIZES = {
    "tiny": Size(("MNIST", "Fashion-MNIST", "emoji"), 10, 25, 600, 600, (3e-4, 1e-3), False),
    # what can be done in minutes; of digits this encoder knows nothing to begin with, and few
    # batches spoil the statistics of its batch normalisations
    "lite0": Size(("emoji", "Fashion-MNIST"), 5, 10, 150, 150, (3e-5, 3e-4), True),
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", choices=ENCODERS, default="tiny")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--afresh", action="store_true", help="run skperf's own rows again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for task in SIZES[options.encoder].tasks:
        for seed in options.seeds:
            run(options.encoder, task, seed, options.afresh)
    table(options.encoder, TARGETS[options.encoder])
    paired()
