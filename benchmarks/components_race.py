"""Cost of component attribution beside the released procedure and captum: speed and race."""

import copy
import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import torch

from benchmarks.components_networks import attributor, n_logits, resnet
from skperf.components.designs import bernoulli_masks
from skperf.metrics import counterfactual_correlation

RESULTS = Path(__file__).parent / "results"


def save(key, value):
    """Write one result of the components."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"components_{key}.json").write_text(json.dumps(value, indent=1) + "\n")


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
