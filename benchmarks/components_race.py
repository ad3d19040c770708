"""Cost of component attribution beside the released procedure and captum: speed and race."""

import copy
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LinearRegression

from benchmarks import runner
from benchmarks.components_networks import attributor, n_logits, resnet
from skperf.components.designs import bernoulli_masks
from skperf.metrics import counterfactual_correlation

RESULTS = Path(__file__).parent / "results"


def save(key, value):
    """Write one result of the components."""
    RESULTS.mkdir(exist_ok=True)
    runner.save(RESULTS / f"components_{key}.json", value)


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
    """Time whole fits: auto, captum, and 4 N masks of the released loop, scaled up from 32.

    What the released loop's masks are worth is measured by masks of our own and least squares.
    """
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

        def entered(name, work, row=row):
            start = time.process_time()
            predicted = work()
            row[f"{name} s"] = round(time.process_time() - start, 2)
            row[name] = round(counterfactual_correlation(predicted, actual), 4)

        def fitted(budget, fraction=fraction, seed=seed, **options):
            options |= {"fraction": fraction, "budget": budget, "random_state": seed}
            model = attributor(module, components, K, **options)
            return model.fit(X, y).predict_counterfactual(masks)

        for budget in (60, 112, 200, 4 * N // 5):
            entered(f"auto {budget}", partial(fitted, budget))
        for name, scores in CAPTUM.items():
            entered(name, lambda: scores(module, names, inputs, codes) @ masks.T)  # noqa: B023
        V = bernoulli_masks(seed + 7, range(32), N, fraction)
        start = time.process_time()
        for v in V:
            released_pass(module, names, v, inputs, codes)
        row["released 4N s"] = round((time.process_time() - start) / 32 * 4 * N, 1)
        least_squares = {"method": "regression", "regressor": LinearRegression()}
        row["released 4N"] = round(
            counterfactual_correlation(fitted(4 * N, **least_squares), actual), 4
        )
        rows.append(row)
        print(row, flush=True)
        save("race", rows)


def by_layer(score):
    """Turn scores of one layer's output into scores of all components."""

    def scores(module, names, inputs, codes):
        def margin(images, labels):
            logits = module(images)
            label = logits.gather(1, labels[:, None])[:, 0]
            return label - logits.scatter(1, labels[:, None], -torch.inf).amax(1)

        parts = dict(module.named_modules())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layers = dict.fromkeys(name for name, _ in names)
            columns = [score(margin, parts[layer], inputs, codes) for layer in layers]
        return torch.cat(columns, 1).detach().double().numpy()

    return scores


def captum_ablation(margin, layer, inputs, codes):
    """Ablate the output of one filter at a time."""
    from captum.attr import LayerFeatureAblation

    width = layer.out_channels
    groups = torch.arange(width).view(1, width, 1, 1)
    with torch.inference_mode():
        ablation = LayerFeatureAblation(margin, layer)
        options = {"layer_mask": groups, "additional_forward_args": codes}
        return ablation.attribute(inputs, **options)[:, :, 0, 0]


def captum_gradient(margin, layer, inputs, codes):
    """Multiply activations by gradients."""
    from captum.attr import LayerGradientXActivation

    method = LayerGradientXActivation(margin, layer)
    return method.attribute(inputs, additional_forward_args=codes).sum((2, 3))


def captum_conductance(margin, layer, inputs, codes):
    """Integrate gradients from a black image, in 20 steps."""
    from captum.attr import LayerConductance

    method = LayerConductance(margin, layer)
    options = {"n_steps": 20, "internal_batch_size": 250, "additional_forward_args": codes}
    return method.attribute(inputs, **options).sum((2, 3))


CAPTUM = {
    "captum ablation": by_layer(captum_ablation),
    "captum gradient x activation": by_layer(captum_gradient),
    "captum conductance": by_layer(captum_conductance),
}
