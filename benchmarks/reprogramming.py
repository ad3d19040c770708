"""Reprogramming EfficientNet-Lite0 joined to MiniLM, side by side with what else one could do.

Two tasks of 150 rows. For each method: accuracy on the task's own test rows (ID), on shifted rows,
and AUROC and FPR95 of "does this belong to the task at all" against two sets of foreign pictures,
by two scores of its logits: "mcm" at temperature 1 and the largest. Writes
``benchmarks/results/reprogramming_lite0_rows.json``, from which it goes on where the same code was
broken off, and the table ``reprogramming_lite0.json``:

    python -m benchmarks.data fetch mnist fashion_mnist emoji_google emoji_twitter
    python -m benchmarks.data fetch efficientnet_lite0 minilm
    python -m benchmarks.reprogramming

The encoder is CLIP-like in form only; nothing here says anything about CLIP's own figures.
"""

import argparse
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from benchmarks import runner
from benchmarks.reprogramming_tasks import PROMPT, lite0_minilm, make_tasks
from skperf.metrics import fpr_at_95_tpr, ood_auroc
from skperf.reprogramming import RELEASED_SETTINGS, Reprogrammer
from skperf.reprogramming.rejection import SCORES as RATES

FOLDER = Path(__file__).parent / "results"
ROWS, TABLE = (FOLDER / f"reprogramming_lite0{end}.json" for end in ("_rows", ""))


@dataclass(frozen=True)
class Tuning:
    """How long an encoder is fine-tuned, and at which rates; batch statistics may be fixed."""

    epochs: int
    rates: tuple[float, float]
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


def fine_tuned(module, X, y, *, lr, how, seed, held_out):
    """Fine-tune image tower and class embeddings; return module and held-out accuracy."""
    module = deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    keep = np.setdiff1d(np.arange(len(X)), held_out)
    images, codes = torch.as_tensor(X[keep]), torch.as_tensor(y[keep]).long()
    n_steps = how.epochs * -(-len(keep) // 128)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    module.train(not how.fixed_statistics)
    for _ in range(how.epochs):
        for rows in torch.randperm(len(keep), generator=generator).split(128):
            cosines = module(images[rows])
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


def best_tuned(plain, task, seed, how):
    """Fine-tune at two rates; return the module that is better on a tenth held out."""
    X, y = task.train
    held_out = np.random.RandomState(seed).permutation(len(X))[: len(X) // 10]
    options = {"how": how, "seed": seed, "held_out": held_out}
    tried = [fine_tuned(plain, X, y, lr=lr, **options) for lr in how.rates]
    return max(tried, key=lambda pair: pair[1])[0]


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


def plainly(encoder, tokenizer, task, seed):
    """Zero-shot and a linear probe: functions from images to logits or cosines, by name."""
    X, y = task.train
    plain = Prompted(encoder, tokenizer, task.classes).eval()

    def embed(images):
        return in_batches(plain.embed, images).numpy()

    probe = LogisticRegression(C=100.0, max_iter=500).fit(embed(X), y)
    return {
        "zero-shot": partial(similarities, plain),
        "linear probe": lambda images: torch.as_tensor(probe.decision_function(embed(images))),
    }


def tuning(encoder, tokenizer, task, seed):
    """Fine-tuning, and the mix of its weights with the first ones."""
    plain = Prompted(encoder, tokenizer, task.classes).eval()
    tuned = best_tuned(plain, task, seed, TUNING)
    scores = {"full fine-tuning": tuned, "WiSE-FT 0.5": halfway(plain, tuned)}
    return {name: partial(similarities, module) for name, module in scores.items()}


def reprogramming(encoder, tokenizer, task, seed):
    """Fit the released preset, a border with a text table and offsets, and the default."""
    shared = {"tokenizer": tokenizer, "class_names": task.classes, "prompts": PROMPT}
    shared |= {"random_state": seed, "max_epochs": EPOCHS, "border": encoder.image_size // 8}
    # the border at the same share of the canvas, the warm-up at that of a long training
    preset = {"warmup": 0.05, "border": encoder.image_size // 16, "max_epochs": PRESET_EPOCHS}
    preset = Reprogrammer(encoder, **(shared | RELEASED_SETTINGS | preset)).fit(*task.train)
    program = Reprogrammer(encoder, head="linear", text="table", **shared).fit(*task.train)
    default = Reprogrammer(encoder, **shared).fit(*task.train)
    return {
        "released preset": partial(cosines, preset, 0.4),
        "program, alpha 0": partial(cosines, program, 0.0),
        "program, alpha 0.4": partial(cosines, program, 0.4),
        "program, alpha as chosen": partial(cosines, program, program.alpha_),
        "default": lambda images: torch.as_tensor(default.decision_function(images)),
    }


def cosines(model, alpha, images):
    """Cosines of a fitted Reprogrammer at some alpha."""
    return model._fitted.representations(model._pictures(images)).similarities(alpha)


def table(rows):
    """Means and standard deviations over seeds, by task and over all tasks."""
    records = []
    for task in [*dict.fromkeys(row["task"] for row in rows), MEAN]:
        for method in dict.fromkeys(row["method"] for row in rows):
            some = [r for r in rows if r["method"] == method and task in (r["task"], MEAN)]
            seeds, record = sorted({row["seed"] for row in some}), {"task": task, "method": method}
            for column in COLUMNS:
                each = [np.mean([r[column] for r in some if r["seed"] == seed]) for seed in seeds]
                record[column] = f"{100 * np.mean(each):.1f} ± {100 * np.std(each, ddof=1):.1f}"
            records.append(record | {"seeds": len(seeds)})
    return records


MEAN = "mean of tasks"
SCORES = {
    "": partial(RATES["mcm"], temperature=1),
    " max logit": partial(RATES["max_logit"], temperature=1),
}
COLUMNS = ("ID", "shifted", *(f"{what}{s}" for s in SCORES for what in ("AUROC", "FPR95")))
# what can be done in minutes: few batches spoil the statistics of batch normalisations
N_ROWS, EPOCHS, PRESET_EPOCHS, TUNING = 150, 5, 10, Tuning(5, (3e-5, 3e-4), True)


def main():
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = runner.begun(ROWS)
    encoder, tokenizer, pictures = lite0_minilm()
    done = {(row["task"], row["seed"], row["by"]) for row in rows}
    for seed in options.seeds:
        tasks = make_tasks(pictures, encoder.image_size, seed, N_ROWS, N_ROWS)
        for task, by in product(tasks, (plainly, tuning, reprogramming)):
            # of digits this encoder knows nothing to begin with
            if task.name == "MNIST" or (task.name, seed, by.__name__) in done:
                continue
            for method, score in by(encoder, tokenizer, task, seed).items():
                rows.append({"task": task.name, "seed": seed, "by": by.__name__, "method": method})
                rows[-1] |= figures(score)(task)
                print(*rows[-1].values(), flush=True)
            runner.save(ROWS, rows)
    runner.save(TABLE, table(rows), seeds=options.seeds)


if __name__ == "__main__":
    main()
