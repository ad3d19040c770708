"""Component attribution side by side with the released procedure, captum and simpler methods.

    python benchmarks/components.py curve --network resnet --fraction 0.1 --seed 0
    python benchmarks/components.py speed
    python benchmarks/components.py coverage
    python benchmarks/components.py plot

Networks: "resnet" (the shipped residual network, 560 filters, 250 Fashion-MNIST images),
"rnet" (140 filters, 200 faces and non-faces), "minilm" (72 heads under a logistic head on
100 R8 texts) and "lite0" (21,008 filters, 20 photographs and their mirror images at 128 px).
"minilm" and "lite0" need fetched files. Every run writes benchmarks/results/components_*.json.
captum is used by "speed" where it is installed (see benchmarks/peers.txt).
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from skperf import from_module
from skperf.components import ComponentAttributor
from skperf.components.designs import bernoulli_masks
from skperf.components.estimation import ridge
from skperf.metrics import counterfactual_correlation

RESULTS = Path(__file__).parent / "results"


def resnet():
    from skperf.datasets import load_fashion_mnist, load_small_resnet

    X, y = load_fashion_mnist(subset="test", return_X_y=True)
    return load_small_resnet(), X[:250], np.unique(y, return_inverse=True)[1][:250], "auto"


def rnet():
    from skperf.datasets import load_faces, load_rnet

    faces = load_faces()
    X, y = faces.images, faces.target
    return load_rnet(), X, np.unique(y, return_inverse=True)[1], "conv_filters"


def lite0():
    from skperf.datasets import fetch_efficientnet_lite0, fetch_imagenet_photos

    photos = fetch_imagenet_photos()
    X, y = torch.as_tensor(photos.images).float(), photos.target
    X = X / 255 if X.max() > 1 else X
    X = torch.nn.functional.interpolate(X, size=128, mode="bilinear", antialias=True)
    X = torch.cat([X, X.flip(3)])
    return fetch_efficientnet_lite0(), X.numpy(), np.concatenate([y, y]), "conv_filters"


def minilm():
    from sklearn.linear_model import LogisticRegression
    from transformers import AutoModel, AutoTokenizer

    from skperf.datasets import fetch_minilm, fetch_r8

    folder = fetch_minilm()
    encoder = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    bunch = fetch_r8(subset="train")
    rows = np.random.default_rng(0).permutation(len(bunch.data))[:400]
    texts = [bunch.data[i] for i in rows]
    classes, y = np.unique(np.asarray(bunch.target)[rows], return_inverse=True)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=32)["input_ids"]
    X = np.asarray(tokens)
    body = TextClassifier(encoder, len(classes))
    with torch.inference_mode():
        features = torch.cat(
            [body.embed(torch.as_tensor(X[i : i + 50])) for i in range(0, 400, 50)]
        )
    head = LogisticRegression(max_iter=500).fit(features[100:].numpy(), y[100:])
    present = head.classes_
    with torch.no_grad():
        body.head.weight.zero_()
        body.head.bias.fill_(-20.0)
        body.head.weight[present] = torch.as_tensor(head.coef_, dtype=torch.float32)
        body.head.bias[present] = torch.as_tensor(head.intercept_, dtype=torch.float32)
    return body.eval(), X[:100], y[:100], "attention_heads"


class TextClassifier(torch.nn.Module):
    """Mean of the last hidden states, then a linear layer."""

    def __init__(self, encoder, n_classes):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, n_classes)

    def embed(self, tokens):
        """Mean over the tokens that are no padding."""
        mask = (tokens != 0).long()
        hidden = self.encoder(input_ids=tokens, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, tokens):
        """Logits."""
        return self.head(self.embed(tokens))


NETWORKS = {"resnet": resnet, "rnet": rnet, "lite0": lite0, "minilm": minilm}


def attributor(module, components, n_classes, **options):
    estimator = from_module(module, np.arange(n_classes))
    return ComponentAttributor(estimator, components=components, **options)


def n_logits(module, X):
    with torch.inference_mode():
        inputs = torch.as_tensor(X[:1])
        inputs = inputs.float() / 255 if inputs.dtype == torch.uint8 else inputs
        out = module(inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits).shape[1]


def curve(network, fraction, seed, budgets, n_test, simple):
    """Correlation with fresh ablations against the budget, for every method."""
    module, X, y, components = NETWORKS[network]()
    K = n_logits(module, X)

    def fitted(**options):
        start = time.process_time()
        model = attributor(
            module, components, K, fraction=fraction, random_state=seed, **options
        ).fit(X, y)
        return model, time.process_time() - start

    first, _ = fitted(method="gradient")
    N = first.n_components_
    masks = bernoulli_masks(10_000 + seed, range(n_test), N, fraction, fresh=True)
    actual = first.counterfactual(masks)
    rows = []

    def record(method, cost, predicted, seconds=None):
        good = actual.var(1) > 0
        r2 = 1 - ((predicted - actual) ** 2).mean(1)[good] / actual.var(1)[good]
        slope = ((predicted - predicted.mean(1, keepdims=True)) * actual).mean(1)[good]
        slope = slope / np.maximum(predicted.var(1)[good], 1e-12)
        rows.append(
            {
                "network": network,
                "fraction": fraction,
                "seed": seed,
                "n_components": N,
                "n_examples": len(X),
                "method": method,
                "cost": int(cost),
                "correlation": round(counterfactual_correlation(predicted, actual), 4),
                "r2": round(float(np.median(r2)), 4),
                "slope": round(float(np.median(slope)), 3),
                "cpu_seconds": None if seconds is None else round(seconds, 2),
            }
        )
        print(rows[-1], flush=True)
        save(f"curve_{network}_{fraction}_{seed}", rows)

    record("gradient x parameter", 4, first.predict_counterfactual(masks))
    for budget in [budget or round(4 * N) for budget in budgets]:
        model, seconds = fitted(method="auto", budget=budget)
        record("auto", model.n_forward_equivalents_, model.predict_counterfactual(masks), seconds)
    if simple:
        most = max(budget or 4 * N for budget in budgets)
        V = bernoulli_masks(seed + 77, range(most - 1), N, fraction)
        start = time.process_time()
        Y = first.counterfactual(V).T
        per_mask = (time.process_time() - start) / len(V)
        for budget in [budget or round(4 * N) for budget in budgets]:
            m = budget - 1
            design = np.column_stack([V[:m], np.ones(m)]).astype(float)
            weights = np.linalg.lstsq(design, Y[:m], rcond=None)[0]
            record("least squares", budget, weights[:-1].T @ masks.T + weights[-1:].T, m * per_mask)
            if m <= 2500:
                fit = ridge(V[:m], Y[:m], anchor=first.baseline_output_)
                predicted = fit.coefficients @ masks.T + fit.intercept[:, None]
                record("ridge", budget, predicted, m * per_mask)
        if 4 * N + 1 >= N:
            model, seconds = fitted(method="loo")
            record("leave one out", N + 1, model.predict_counterfactual(masks), seconds)


def released_pass(module, names, mask, inputs, codes):
    """One mask of the released procedure: copy, zero the rows, one pass."""
    changed = copy.deepcopy(module)
    parts = dict(changed.named_modules())
    with torch.inference_mode():
        for (name, unit), kept in zip(names, mask, strict=True):
            if not kept:
                parts[name].weight[unit] = 0
        logits = changed(inputs)
        label = logits.gather(1, codes[:, None])[:, 0]
        other = logits.scatter(1, codes[:, None], -torch.inf).amax(1)
        return label - other


def speed(fraction=0.1, rounds=5):
    """Time per true mask, and time to a quality, interleaved with the peers."""
    module, X, y, components = resnet()
    K = n_logits(module, X)
    model = attributor(module, components, K, method="gradient", fraction=fraction).fit(X, y)
    N = model.n_components_
    names = [(str(c.module), int(c.unit)) for c in model.components_]
    masks = bernoulli_masks(5, range(256), N, fraction)
    inputs = torch.as_tensor(X)
    codes = torch.as_tensor(y)
    table = {}
    for n, m in ((250, 16), (1, 128)):
        ours, theirs = [], []
        for _ in range(rounds):
            start = time.process_time()
            mine = model.counterfactual(masks[:m], X[:n], y[:n])
            ours.append((time.process_time() - start) / m)
            start = time.process_time()
            plain = [released_pass(module, names, v, inputs[:n], codes[:n]) for v in masks[:m]]
            theirs.append((time.process_time() - start) / m)
        difference = np.abs(mine - torch.stack(plain, 1).numpy()).max()
        scale = np.abs(mine).max()
        table[f"per mask, {n} examples"] = {
            "ours_ms": round(1e3 * statistics.median(ours), 3),
            "loop_ms": round(1e3 * statistics.median(theirs), 3),
            "ratio": round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3),
            "largest_difference": float(difference),
            "largest_output": float(scale),
        }
        print(n, table[f"per mask, {n} examples"], flush=True)
    save("speed", table)


def race(fraction=0.1, rounds=3):
    """Whole fits: auto against one at a time (captum) and 4 N masks of the released loop."""
    module, X, y, components = resnet()
    K = n_logits(module, X)
    first = attributor(module, components, K, method="gradient", fraction=fraction).fit(X, y)
    N = first.n_components_
    names = [(str(c.module), int(c.unit)) for c in first.components_]
    masks = bernoulli_masks(99, range(200), N, fraction, fresh=True)
    actual = first.counterfactual(masks)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    rows = []
    for seed in range(rounds):
        row = {"seed": seed}
        for budget in (60, 112, 200, 448):
            start = time.process_time()
            model = attributor(
                module, components, K, fraction=fraction, budget=budget, random_state=seed
            ).fit(X, y)
            row[f"auto {budget} s"] = round(time.process_time() - start, 2)
            predicted = model.predict_counterfactual(masks)
            row[f"auto {budget}"] = round(counterfactual_correlation(predicted, actual), 4)
        start = time.process_time()
        try:
            alone = captum_ablation(module, names, inputs, codes)
            row["captum"] = round(counterfactual_correlation(-alone @ (1.0 - masks.T), actual), 4)
        except ImportError:
            for v in 1 - np.eye(N)[:56]:
                released_pass(module, names, v, inputs, codes)
        row["captum s"] = round(time.process_time() - start, 2)
        V = bernoulli_masks(seed + 7, range(32), N, fraction)
        start = time.process_time()
        for v in V:
            released_pass(module, names, v, inputs, codes)
        row["released 4N s"] = round((time.process_time() - start) / 32 * 4 * N, 1)
        rows.append(row)
        print(row, flush=True)
    save("race", rows)


def captum_ablation(module, names, inputs, codes):
    """Fall of the margin as captum ablates one filter's output at a time."""
    from captum.attr import LayerFeatureAblation

    def margin(images):
        logits = module(images)
        label = logits.gather(1, codes[:, None])[:, 0]
        return label - logits.scatter(1, codes[:, None], -torch.inf).amax(1)

    parts = dict(module.named_modules())
    columns = []
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in dict.fromkeys(name for name, _ in names):
            ablation = LayerFeatureAblation(margin, parts[layer])
            width = parts[layer].out_channels
            groups = torch.arange(width).view(1, width, 1, 1)
            scores = ablation.attribute(inputs, layer_mask=groups)
            columns.append(scores[:, :, 0, 0])
    return torch.cat(columns, 1).double().numpy()


def coverage(n_repeats=30, fraction=0.1, budget=200):
    """How often +-2 standard errors cover the mean of repeated fits."""
    module, X, y, components = rnet()
    table = {}
    for method in ("auto", "path_gradient", "regression"):
        fits = [
            attributor(
                module,
                components,
                2,
                fraction=fraction,
                budget=budget,
                method=method,
                random_state=seed,
            ).fit(X[::4], y[::4])
            for seed in range(n_repeats)
        ]
        mean = np.mean([fit.attributions_ for fit in fits], 0)
        inside = [np.abs(fit.attributions_ - mean) <= 2 * fit.stderr_ for fit in fits]
        table[method] = round(float(np.mean(inside)), 4)
        print(method, table[method], flush=True)
        save("coverage", {"n_repeats": n_repeats, "budget": budget, **table})


def save(key, value):
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"components_{key}.json"
    path.write_text(json.dumps(value, indent=1) + "\n")


def plot():
    """One panel a network and fraction: correlation against forward-equivalents."""
    import matplotlib.pyplot as plt

    paths = sorted(RESULTS.glob("components_curve_*.json"))
    rows = [row for path in paths for row in json.loads(path.read_text())]
    panels = sorted({(row["network"], row["fraction"]) for row in rows})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.2), squeeze=False, layout="constrained"
    )
    for ax, (network, fraction) in zip(axes[0], panels, strict=True):
        here = [r for r in rows if (r["network"], r["fraction"]) == (network, fraction)]
        for method in dict.fromkeys(row["method"] for row in here):
            points = {}
            for row in here:
                if row["method"] == method:
                    points.setdefault(row["cost"], []).append(row["correlation"])
            costs = sorted(points)
            ax.plot(costs, [np.mean(points[c]) for c in costs], marker=".", label=method)
        ax.set(title=f"{network}, {fraction} ablated", xlabel="forward-equivalents", xscale="log")
    axes[0, 0].set_ylabel("correlation with fresh ablations")
    axes[0, 0].legend(fontsize=7)
    figure.savefig(RESULTS / "components.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["curve", "speed", "race", "coverage", "plot"])
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet")
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budgets", type=int, nargs="+", default=[100, 200, 448, 1120, 0])
    parser.add_argument("--n-test", type=int, default=100)
    parser.add_argument("--only-auto", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "curve":
        curve(
            options.network,
            options.fraction,
            options.seed,
            options.budgets,
            options.n_test,
            not options.only_auto,
        )
    else:
        {"speed": speed, "race": race, "coverage": coverage, "plot": plot}[options.what]()


if __name__ == "__main__":
    main()
