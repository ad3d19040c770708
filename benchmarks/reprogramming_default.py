"""Whether the default of Reprogrammer is as good as what is simpler, on tasks that chose nothing.

The shipped text-image encoder (R-Net for its own crops), ``border=0``, so that pictures are
embedded once. Beside the default: zero-shot, scikit-learn's ``LogisticRegressionCV`` on
``transform(X)`` and on the plain embeddings, the heads "probe" and "cache" (Tip-Adapter) alone,
the released preset, and, which change the encoder, fine-tuning (the better of two rates on a tenth
held out, a hundred steps at least) and WiSE-FT. Accuracy, expected calibration error, AUROC of near
foreign pictures (of the same kind) and far ones, and the share of fresh rows that
``predict_inlier`` keeps; ten draws at four rows a class and fewer, five elsewhere. Defaults were
chosen on other data: drawn letters and Google's emoji (shipped encoder), R8 and 20 Newsgroups
(wordllama). Rows are written as they come; a run goes on where the last one ended:

    python -m benchmarks.data fetch mnist
    python -m benchmarks.reprogramming_default
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

from benchmarks import runner
from benchmarks.data import fetch_mnist
from benchmarks.reprogramming import Prompted, Tuning, best_tuned, halfway, similarities
from benchmarks.reprogramming_tasks import DIGITS, FASHION, PROMPT, Task, to_canvas
from skperf.datasets import (
    load_emoji,
    load_faces,
    load_fashion_mnist,
    load_rnet,
    load_text_image_encoder,
)
from skperf.metrics import ood_auroc
from skperf.reprogramming import RELEASED_SETTINGS, Reprogrammer
from skperf.reprogramming.heads import HEADS, Cached, folds_of

FOLDER = Path(__file__).parent / "results"
ROWS, TABLE = FOLDER / "reprogramming_default_rows.json", FOLDER / "reprogramming_default.json"
N_TEST, N_FOREIGN, EPOCHS = 500, 250, 5


def drawn(images, target, names, foreign, n, seed, each=False):
    """Draw training and test rows: n in all, or of each class."""
    order = np.random.RandomState(seed).permutation(len(images))
    if each:
        train = np.concatenate([order[target[order] == k][:n] for k in np.unique(target)])
    else:
        train = order[:n]
    test = order[~np.isin(order, train)][-N_TEST:]
    parts = {name: rows[seed::3][:N_FOREIGN] for name, rows in foreign.items()}
    return names, images[train], target[train], images[test], target[test], parts


def tasks():
    """Name, size and a function of the seed that draws each task."""
    fashion, mnist = load_fashion_mnist(subset="train"), fetch_mnist()
    uci, faces, twitter = load_digits(), load_faces(), load_emoji("twitter")
    digits = np.clip(uci.images * 16, 0, 255).astype(np.uint8)[:, None]
    garments, numbers = fashion.images[:, None], mnist.images[:, None]
    names = [str(name).lower().replace("&", "and") for name in twitter.target_names]
    held = ~twitter.is_train
    emoji, kinds = twitter.images[held], twitter.target[held]
    grey = {"near": garments, "far": emoji}
    clothes = {"near": numbers, "far": emoji}
    scenes = {"near": emoji, "far": numbers}
    people = ["background", "face"]
    yield "faces", 100, lambda s: drawn(faces.images, faces.target, people, scenes, 100, s)
    yield "R-Net crops", 100, lambda s: drawn(faces.images, faces.target, people, scenes, 100, s)
    yield "UCI digits", 400, lambda s: drawn(digits, uci.target, DIGITS, grey, 400, s)
    foreign = {"near": faces.images, "far": numbers}
    yield "Twitter emoji", 150, lambda s: drawn(emoji, kinds, names, foreign, 150, s)
    yield "MNIST", 400, lambda s: drawn(numbers, mnist.target, DIGITS, grey, 400, s)
    for n in (1, 2, 4, 8, 16):
        yield (
            f"Fashion-MNIST, {n} a class",
            10 * n,
            lambda s, n=n: drawn(garments, fashion.target, FASHION, clothes, n, s, each=True),
        )


def figures(probabilities, codes, own, foreign, kept=None):
    """Accuracy, calibration and AUROC: probabilities (n, K), codes (n,), own (n,)."""
    guess, sure = probabilities.argmax(1), probabilities.max(1)
    right = guess == codes
    bins = np.minimum((sure * 15).astype(int), 14)
    gaps = [abs((right[bins == b] - sure[bins == b]).sum()) for b in range(15)]
    result = {"accuracy": right.mean(), "ECE": sum(gaps) / len(codes)}
    for name, scores in foreign.items():
        truth = np.repeat([1, 0], [len(own), len(scores)])
        result[f"AUROC {name}"] = ood_auroc(truth, np.r_[own, scores])
    if kept is not None:
        result["kept"] = kept
    return {name: round(float(value), 4) for name, value in result.items()}


def run(name, draw, seed):
    """Figures of every method on one draw of a task."""
    names, X, y, T, codes, foreign = draw(seed)
    if name == "R-Net crops":
        options = {"encoder": load_rnet()}
    else:
        encoder, tokenizer = load_text_image_encoder()
        options = {"encoder": encoder, "tokenizer": tokenizer, "class_names": names}
        options |= {"prompts": PROMPT}
    options |= {"border": 0, "random_state": seed}
    y, codes = y.astype(int), codes.astype(int)
    sets = {"own": T, **foreign}
    model = Reprogrammer(max_epochs=EPOCHS, **options).fit(X, y)
    scores = {part: model.score_samples(rows) for part, rows in sets.items()}
    own = scores.pop("own")
    kept = (own >= model.ood_threshold_).mean()
    chosen = {"head": model.head_, "score": model.ood_score_}
    yield "default", figures(model.predict_proba(T), codes, own, scores, kept) | chosen
    plain = Reprogrammer(**options | {"max_epochs": 0}).fit(X, y)
    rows = {part: torch.as_tensor(plain.transform(pictures)) for part, pictures in sets.items()}
    if plain.class_embeddings_ is not None and name != "R-Net crops":
        scores = {part: (e @ plain.class_embeddings_.T).amax(1) for part, e in rows.items()}
        own = scores.pop("own")
        yield "zero-shot", figures(plain.predict_proba(T), codes, own.numpy(), scores)
    embedded = torch.as_tensor(plain.transform(X))
    after = {part: model.transform(pictures) for part, pictures in sets.items()}
    fits = {"LogisticRegressionCV, plain": (embedded.numpy(), rows)}
    fits["LogisticRegressionCV, transform"] = (model.transform(X), after)
    least = np.bincount(y).min()
    for method, (inputs, parts) in fits.items():
        single = LogisticRegression(max_iter=300)
        several = LogisticRegressionCV(cv=int(min(5, max(2, least))), max_iter=300)
        fitted = (single if least < 2 else several).fit(inputs, y)
        made = {part: fitted.predict_proba(np.asarray(e)) for part, e in parts.items()}
        sure = {part: p.max(1) for part, p in made.items()}
        yield method, figures(made["own"], codes, sure.pop("own"), sure)
    texts = None if name == "R-Net crops" else torch.as_tensor(plain.class_embeddings_)
    scale = plain.logit_scale_ if texts is not None else 1.0
    weight = torch.ones(len(y))
    cached = Cached(embedded, torch.as_tensor(y), weight, len(names), texts, None, None, scale)
    folds = folds_of(y, 5, np.random.RandomState(seed))
    for head in ("probe", "cache"):
        fitted = HEADS[head](cached, folds).head
        with torch.no_grad():
            made = {part: fitted(e).softmax(1).numpy() for part, e in rows.items()}
        sure = {part: p.max(1) for part, p in made.items()}
        yield f"head={head!r} alone", figures(made["own"], codes, sure.pop("own"), sure)
    if texts is not None:
        yield from beyond_heads(options, (names, X, y, seed), sets, codes)


def beyond_heads(options, learned, sets, codes):
    """Figures of the released preset, of fine-tuning, and of its mix with zero-shot."""
    names, X, y, seed = learned
    encoder, tokenizer = options["encoder"], options["tokenizer"]
    side = encoder.image_size
    # the border at the same share of the canvas, the warm-up at that of a long training
    preset = RELEASED_SETTINGS | {"warmup": 0.05, "max_epochs": 25}
    model = Reprogrammer(**options | preset | {"border": side // 16}).fit(X, y)
    scores = {part: model.score_samples(rows) for part, rows in sets.items()}
    own = scores.pop("own")
    kept = (own >= model.ood_threshold_).mean()
    yield "released preset", figures(model.predict_proba(sets["own"]), codes, own, scores, kept)

    plain = Prompted(encoder, tokenizer, names)
    canvas = (to_canvas(X, side), y)
    task = Task("", names, canvas, canvas, canvas, {})
    tuning = Tuning(-(-100 // -(-len(X) // 128)), (3e-4, 1e-3), fixed_statistics=False)
    tuned = best_tuned(plain, task, seed, tuning)
    parts = {part: to_canvas(rows, side) for part, rows in sets.items()}
    for method, module in (("fine-tuning", tuned), ("WiSE-FT 0.5", halfway(plain, tuned))):
        cosines = {part: similarities(module, rows) for part, rows in parts.items()}
        sure = (plain.scale * cosines["own"]).softmax(1).numpy()
        scores = {part: rows.amax(1).numpy() for part, rows in cosines.items()}
        own = scores.pop("own")
        yield method, figures(sure, codes, own, scores)


COLUMNS = ("accuracy", "ECE", "AUROC near", "AUROC far", "kept")


def table(rows):
    """Mean and standard error of every figure and of what the default is ahead by, draw by draw."""
    records = []
    by_draw = {(row["task"], row["method"], row["seed"]): row for row in rows}
    for task in dict.fromkeys(row["task"] for row in rows):
        for method in dict.fromkeys(row["method"] for row in rows):
            some = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            if not some:
                continue
            record = {"task": task, "method": method}
            for column in COLUMNS:
                record[column] = mean_and_error([row[column] for row in some if column in row])
            leads = [
                by_draw[task, "default", row["seed"]]["accuracy"] - row["accuracy"] for row in some
            ]
            record["default ahead"] = "" if method == "default" else mean_and_error(leads, "+")
            records.append(record | {"draws": len(some)})
    return records


def mean_and_error(values, sign=""):
    """Write percents as a mean and its standard error."""
    values = 100 * np.array(values)
    if not len(values):
        return ""
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.1f}" + error


def main():
    """Run what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=range(10))
    parser.add_argument("--tasks", nargs="*")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = runner.load(ROWS) if ROWS.exists() else []
    known, commit = list(tasks()), runner.provenance()["commit"]
    for seed in options.seeds:
        for name, n, draw in known:
            done = any((row["task"], row["seed"]) == (name, seed) for row in rows)
            # ten draws at four rows a class and fewer
            if done or (seed >= 5 and n > 40) or (options.tasks and name not in options.tasks):
                continue
            for method, result in run(name, draw, seed):
                found = {"task": name, "n": n, "seed": seed, "method": method, **result}
                rows.append(found | {"commit": commit})
                print(rows[-1], flush=True)
            runner.save(ROWS, rows)
    runner.save(TABLE, table(rows), seeds=sorted({row["seed"] for row in rows}))


if __name__ == "__main__":
    main()
