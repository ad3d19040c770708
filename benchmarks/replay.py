"""Influence through the training run against retraining itself, and what it costs.

    python -m benchmarks.replay threshold      # smoothness beside scores, on rows of their own
    python -m benchmarks.replay quality        # every fixed configuration, three seeds
    python -m benchmarks.replay quality CNN 1  # some configurations by name, some seeds
    python -m benchmarks.replay speed          # over bare loops of the same steps
    python -m benchmarks.replay speed CNN      # of one network, beside what is saved
    python -m benchmarks.replay basis          # what few directions leave out
    python -m benchmarks.replay memory         # with checkpoints over storing all
    python -m benchmarks.replay bergson PYTHON # the same run in Bergson's environment

Each writes ``benchmarks/results/replay_<part>.json``.
"""

import copy
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.frozen import FrozenEstimator
from torch import nn

from benchmarks import influence_peers, runner
from benchmarks.replay_configurations import (
    CONFIGURATIONS,
    SEEDS,
    SHARES,
    SUBSETS,
    THRESHOLD_DATA,
    Configuration,
    digits,
    fashion,
)
from skperf import InfluenceScorer, Net
from skperf.backbone import _nets
from skperf.backbone._training import data_of
from skperf.backbone.training_run import Run, Trainer, train_again
from skperf.backbone.views import own_copy
from skperf.influence import Source, TracIn
from skperf.influence.replay import Budget, losses_at, replayed, smoothness

OTHERS = (
    "gradient_dot",
    "ggn",
    "ekfac",
    "kfac",
    "trak",
    "datainf",
    "arnoldi",
    "cg",
    "lissa",
    "gif",
    "source",
    "tracin",
)
SLOW = {"arnoldi", "cg", "lissa", "gif"}  # minutes for 60 queries on the CNN: left out there
# by name: function, and the damping that these packages advise
PEERS = {
    "kronfluence": (influence_peers.kronfluence, 1e-4),
    "pyDVL": (influence_peers.pydvl_nystroem, 0.01),
}
CACHE = Path(tempfile.gettempdir()) / "skperf_replay"


def trained(config: Configuration, seed: int) -> tuple[Net, Any, Any]:
    """Train as configured, and bring the queries into the run's form."""
    X, y, X_query, y_query = config.rows(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = config.module(int(np.prod(X.shape[1:])), len(np.unique(y)))
    net = Net(
        module,
        optimizer=config.optimizer,
        lr=config.lr,
        batch_size=config.batch_size,
        max_epochs=config.max_epochs,
        random_state=seed,
        record_run=True,
        **{f"optimizer__{name}": value for name, value in config.settings.items()},
    ).fit(X, y)
    return net, data_of(net.run_, X_query, y_query), (X, y, X_query, y_query)


def retrained(run: Run, weights: torch.Tensor, asked: Any) -> np.ndarray:
    """Losses of the queries after retraining with each row of weights: -> (m, q)."""
    # All retrainings take the same batches from the same weights, so they go side by side; plain
    # runs confirm it to rounding (`side_by_side` below).
    parts = [_retrained(run, part, asked) for part in weights.split(50)]
    return torch.cat(parts).numpy()


def _retrained(run: Run, weights: torch.Tensor, asked: Any) -> torch.Tensor:
    module, m = own_copy(run.module), len(weights)
    stacked = {
        name: parameter.detach().repeat(m, *[1] * parameter.ndim).requires_grad_()
        for name, parameter in module.named_parameters()
    }
    for parameter in module.parameters():
        parameter.requires_grad_(False)

    def outputs(parameters: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, parameters, (inputs,))

    every = torch.func.vmap(outputs, (0, None))
    optimizer = run.optimizer([{**run.steps[0].settings[0], "params": list(stacked.values())}])
    X, y = run.data.inputs.array, run.data.targets
    for step in run.steps:
        rows = step.rows.long()
        optimizer.zero_grad()
        logits = every(stacked, X[rows])
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), y[rows].repeat(m), reduction="none"
        )
        (losses.view(m, -1) * weights[:, rows]).mean(1).sum().backward()
        optimizer.step()
    with torch.no_grad():
        logits = every(stacked, asked.inputs.array)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), asked.targets.repeat(m), reduction="none"
        )
    return losses.view(m, -1)


def side_by_side(run: Run, weights: torch.Tensor, asked: Any) -> float:
    """Largest difference between retraining side by side and one after another."""
    alone = [
        losses_at(run, train_again(run, w).module, asked.inputs, asked.targets) for w in weights
    ]
    return float((_retrained(run, weights, asked) - torch.stack(alone)).abs().max())


def dropped(n: int, share: float, count: int, seed: int) -> torch.Tensor:
    """Weights that leave random rows out: -> (count, n)."""
    rng, weights = np.random.default_rng([seed, round(1000 * share)]), torch.ones(count, n)
    for row in weights:
        row[rng.choice(n, max(1, round(share * n)), replace=False)] = 0
    return weights


def datamodeling(influence: np.ndarray, weights: torch.Tensor, losses: np.ndarray) -> float:
    """Mean over queries of the rank correlation of predicted and actual losses."""
    predicted = (1 - weights.numpy()) @ influence.T
    moved = losses.std(0) > 1e-7
    each = [spearmanr(predicted[:, q], losses[:, q])[0] for q in np.flatnonzero(moved)]
    return float(np.mean(each))


def quality(configurations: Any, seeds: Any, part: str, *, singles: bool, others: Any) -> None:
    path = runner.RESULTS / f"replay_{part}.json"
    rows: list[dict[str, Any]] = runner.load(path) if path.exists() else []
    order = [config.name for config in (*CONFIGURATIONS, *THRESHOLD_DATA)]
    for config in configurations:
        for seed in seeds:
            net, asked, data = trained(config, seed)
            kept = Kept(config, seed, net)
            row = facts(net, asked, data, kept, singles=singles)
            n = len(data[0])
            for method in ("replay", *others):
                if method in SLOW and not config.widths:
                    continue
                try:
                    found = kept(f"scores {method}", partial(scores, method, net, asked, data))
                except (ImportError, ValueError, RuntimeError, MemoryError) as error:
                    print(config.name, seed, method, error, flush=True)
                    continue
                for share in SHARES:
                    weights = dropped(n, share, SUBSETS, seed)
                    row[f"{method} {share:g}"] = datamodeling(
                        found, weights, kept.arrays[f"losses {share:g}"]
                    )
            own = {
                "configuration": config.name,
                "seed": seed,
                "commit": runner.provenance()["commit"],
            }
            others_rows = [
                r for r in rows if (r["configuration"], r["seed"]) != (config.name, seed)
            ]
            rows = [*others_rows, {**own, **row}]
            rows.sort(key=lambda r: (order.index(r["configuration"]), r["seed"]))
            print(config.name, seed, *(f"{k} {v:.3f}" for k, v in row.items()), flush=True)
            runner.save(path, rows)


class Kept:
    """What was computed for one configuration, on disk, as long as it ends at the same weights."""

    def __init__(self, config: Configuration, seed: int, net: Net) -> None:
        end = net.run_.recorded.end.numpy().tobytes()
        name = "".join(c for c in config.name if c.isalnum())
        self.path = CACHE / f"{name}_{seed}_{hashlib.sha256(end).hexdigest()[:12]}.npz"
        CACHE.mkdir(parents=True, exist_ok=True)
        self.arrays = dict(np.load(self.path)) if self.path.exists() else {}

    def __call__(self, name: str, compute: Any) -> Any:
        """Look up, or compute and keep."""
        if name not in self.arrays:
            started = time.process_time()
            self.arrays[name] = np.asarray(compute())
            self.arrays[f"seconds {name}"] = np.asarray(time.process_time() - started)
            np.savez(self.path, **self.arrays)
        return self.arrays[name]


def facts(net: Net, asked: Any, data: Any, kept: Kept, *, singles: bool) -> dict[str, Any]:
    """Retrain, and say how near single rows and labels come."""
    X, y, X_query, y_query = data
    run, n = net.run_.recorded, len(X)
    seed = net.random_state
    row: dict[str, Any] = {
        "steps": len(run.steps),
        "test accuracy": net.score(X_query, y_query),
        "smoothness": float(kept("smoothness", lambda: smoothness_of(run))),
        "side by side": float(
            kept("side by side", lambda: side_by_side(run, dropped(n, 0.1, 2, seed), asked))
        ),
    }
    for share in SHARES:
        losses = kept(
            f"losses {share:g}",
            lambda share=share: retrained(run, dropped(n, share, SUBSETS, seed), asked),
        )
        row[f"constant queries {share:g}"] = int((losses.std(0) <= 1e-7).sum())
    if singles:
        chosen = np.random.default_rng(seed).choice(n, 100, replace=False)
        weights = torch.ones(100, n)
        weights[range(100), chosen] = 0
        base = losses_at(run, net.module_, asked.inputs, asked.targets).numpy()
        actual = kept("singles", lambda: retrained(run, weights, asked)) - base
        found = kept("scores replay", partial(scores, "replay", net, asked, data))
        predicted = found[:, chosen].T
        row["leave-one-out Pearson"] = float(pearsonr(actual.ravel(), predicted.ravel())[0])
        row["leave-one-out slope"] = float((actual * predicted).sum() / np.square(predicted).sum())
        row["relabelling Pearson"] = float(
            kept("relabelling", lambda: relabelling(net, asked, X, y, seed))
        )
    return row


def smoothness_of(run: Run) -> float:
    """As the scorer asks for it, about 32 rows."""
    some = slice(0, 32)
    return smoothness(replayed(run), run.data.inputs[some], run.data.targets[some])


def scores(method: str, net: Net, asked: Any, data: Any) -> np.ndarray:
    """Influence of every training row on every query: -> (q, n)."""
    X, y, X_query, y_query = data
    if method == "replay":
        fitted = replayed(net.run_.recorded, Budget(tolerance=0))
        return fitted.influence(asked.inputs, asked.targets).numpy()
    if method in PEERS:
        labels = np.unique(y)
        codes, asked_codes = np.searchsorted(labels, y), np.searchsorted(labels, y_query)
        workload = SimpleNamespace(
            modules=[net.module_], X_train=X, y_train=codes, X_test=X_query, y_test=asked_codes
        )
        function, damping = PEERS[method]
        return np.asarray(function(workload, damping))
    given, options = staged(net.run_.recorded, method)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scorer = InfluenceScorer(
            FrozenEstimator(net), method=given, random_state=net.random_state, **options
        ).fit(X, y)
        return scorer.influence(X_query, y_query)


def staged(run: Run, method: str) -> tuple[Any, dict[str, Any]]:
    """Give methods over checkpoints four of the run: the middle of each quarter, and the end."""
    if method not in ("source", "tracin"):
        return method, {}
    bounds = [round(k * len(run.steps) / 4) for k in range(5)]
    trainer, states = Trainer(run), []
    for t in range(bounds[-1]):
        trainer.step(run.data.weights)
        if t + 1 in {(a + b) // 2 for a, b in itertools.pairwise(bounds)}:
            states.append(copy.deepcopy(trainer.module.state_dict()))
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    rate = run.steps[0].settings[0]["lr"]
    if method == "tracin":
        return TracIn(learning_rate=rate), {"checkpoints": states}
    return Source(n_steps=lengths), {"learning_rate": rate, "checkpoints": states}


def relabelling(net: Net, asked: Any, X: Any, y: Any, seed: int) -> float:
    """Flip 20 labels, train, and predict what setting each right would do to the queries."""
    rng = np.random.default_rng(seed)
    wrong, labels = y.copy(), np.unique(y)
    chosen = rng.choice(len(y), 20, replace=False)
    wrong[chosen] = labels[(np.searchsorted(labels, y[chosen]) + 1) % len(labels)]
    flawed = copy.deepcopy(net).fit(X, wrong)
    run = flawed.run_.recorded
    found = replayed(run).derivative(asked.inputs, asked.targets, n_labels=len(labels)).labels
    codes = torch.as_tensor(np.searchsorted(labels, y[chosen]))
    predicted = found[:, torch.as_tensor(chosen), codes].T
    base = losses_at(run, flawed.module_, asked.inputs, asked.targets)
    actual = []
    for row, code in zip(chosen, codes, strict=True):
        targets = run.data.targets.clone()
        targets[row] = code
        mended = replace(run, data=replace(run.data, targets=targets))
        module = train_again(mended).module
        actual.append(losses_at(run, module, asked.inputs, asked.targets) - base)
    return float(pearsonr(torch.stack(actual).flatten(), predicted.flatten())[0])


# Cost ------------------------------------------------------------------------------------------


def bare_loop(run: Run, module: nn.Module) -> None:
    """Train with the same steps and nothing else."""
    module = copy.deepcopy(module)
    settings = run.steps[0].settings[0]
    known = ("lr", "momentum", "betas", "weight_decay")
    optimizer = run.optimizer(
        module.parameters(), **{name: settings[name] for name in known if name in settings}
    )
    inputs, targets = run.data.inputs.array, run.data.targets
    for step in run.steps:
        rows = step.rows.long()
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs[rows]), targets[rows]).backward()
        optimizer.step()


def arithmetic(run: Run, module: nn.Module, directions: int) -> float:
    """Multiplications and additions of the way back: one loss and its Hessian products a step."""
    rows = float(np.mean([len(step.rows) for step in run.steps]))
    products = []
    handles = [
        part.register_forward_hook(
            lambda part, args, output: products.append(
                2 * output[0].numel() * part.weight[0].numel()
            )
        )
        for part in module.modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    ]
    with torch.no_grad():
        module(run.data.inputs.array[:1])
    for handle in handles:
        handle.remove()
    # forwards and by the weights for every layer, by the inputs for all but the first; a moved
    # layer meets its own input and its moved input, of which the first has none
    first, others = products[0], sum(products[1:])
    once = 2 * first + 3 * others
    return len(run.steps) * rows * (once + directions * (2 * first + 6 * others))


def product_rate() -> float:
    """Operations a second of a large matrix product."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    started = time.process_time()
    for _ in range(10):
        left @ right
    return 20 * 1024**3 / (time.process_time() - started)


def speed(wanted: str = "") -> None:
    path = runner.RESULTS / "replay_speed.json"
    rows = runner.load(path) if path.exists() else []
    cases = [
        Configuration(f"MLP 64-{width}-10, {kind.__name__}", digits, (width,), nn.Tanh, kind, lr)
        for width in (32, 512)
        for kind, lr in ((torch.optim.SGD, 0.1), (torch.optim.Adam, 0.002))
    ]
    cases += [Configuration("CNN, SGD", fashion, lr=0.1, batch_size=100, max_epochs=2)]
    for config in (config for config in cases if wanted in config.name):
        rows = [row for row in rows if row["network"] != config.name]
        net, _, (X, y, X_query, y_query) = trained(config, 0)
        run = net.run_.recorded
        X_more, y_more = np.concatenate([X_query, X[:40]]), np.concatenate([y_query, y[:40]])
        more = data_of(net.run_, X_more, y_more)
        # tolerance, queries, aggregated
        asked: dict[str, tuple[float, int, bool]] = {"mean of 100": (1e-4, 100, True)}
        if config.widths:
            asked |= {
                "100 queries": (1e-4, 100, False),
                "100 queries, error 0.2": (0.2, 100, False),
            }
        else:
            asked["one query"] = (0.0, 1, False)
        tasks: dict[str, Any] = {"bare loop": lambda run=run: bare_loop(run, run.module)}
        directions = {"bare loop": 0}
        for name, (tolerance, q, mean) in asked.items():
            fitted = replayed(run, Budget(tolerance=tolerance))
            part = slice(0, q)
            basis = fitted.basis(more.inputs[part], more.targets[part], aggregate=mean)
            directions[name] = len(basis.directions)
            tasks[name] = lambda f=fitted, p=part, m=mean, more=more: f.influence(
                more.inputs[p], more.targets[p], aggregate=m
            )
        samples: dict[str, list[float]] = {name: [] for name in tasks}
        rates = []
        for turn in range(4):
            rates.append(product_rate())
            for name, task in tasks.items():
                started = time.process_time()
                task()
                if turn:
                    samples[name].append(time.process_time() - started)
        bare, rate = float(np.median(samples["bare loop"])), float(np.median(rates))
        for name, values in samples.items():
            middle = float(np.median(values))
            row = {
                "network": config.name,
                "task": name,
                "directions": directions[name],
                "CPU ms": middle * 1e3,
                "times the bare loop": middle / bare,
                "least": min(values) / bare,
                "greatest": max(values) / bare,
            }
            if name != "bare loop":
                limit = arithmetic(run, copy.deepcopy(run.module), directions[name]) / rate
                row["times the arithmetic"] = middle / limit
            rows.append(row)
            print(*(f"{v:.2f}" if isinstance(v, float) else v for v in row.values()), flush=True)
        runner.save(path, rows)


def fewer_directions() -> None:
    """Say what a basis of few directions leaves out of the scores, at the best."""
    rows = []
    for kind, lr in ((torch.optim.SGD, 0.1), (torch.optim.Adam, 0.002)):
        config = Configuration(f"MLP 64-32-10, {kind.__name__}", digits, (32,), nn.Tanh, kind, lr)
        net, _, (X, y, X_query, y_query) = trained(config, 0)
        queries = np.concatenate([X_query, X[:40]]), np.concatenate([y_query, y[:40]])
        more = data_of(net.run_, *queries)
        fitted = replayed(net.run_.recorded, Budget(tolerance=0))
        directions = fitted.basis(more.inputs, more.targets).directions.double()
        scores = fitted.influence(more.inputs, more.targets).double()
        scores = scores / scores.norm(dim=1, keepdim=True)
        bases = [torch.linalg.svd(matrix)[0] for matrix in (scores, directions)]
        for m in (10, 20, 50, 80, 90):
            own, plain = ((scores - u[:, :m] @ (u[:, :m].T @ scores)).norm(dim=1) for u in bases)
            rows.append(
                {
                    "network": config.name,
                    "seed": 0,
                    "directions of 100": m,
                    "worst error, best basis of the scores": float(own.max()),
                    "worst error, basis of the gradients": float(plain.max()),
                }
            )
            print(rows[-1], flush=True)
    runner.save(runner.RESULTS / "replay_basis.json", rows)


def memory() -> None:
    """In a process of its own each: what fit and one aggregate take above the base before fit."""
    rows: list[dict[str, Any]] = []
    for states, share in (("all", None), ("checkpoints", 0.06)):
        command = [sys.executable, "-m", "benchmarks.replay", "memory-of", str(share or 0)]
        found = subprocess.run(command, check=True, capture_output=True, text=True)
        row = {"states": states, **json.loads(found.stdout.splitlines()[-1])}
        first = rows[0] if rows else row
        row["bytes over all"] = row["bytes above base"] / first["bytes above base"]
        row["time over all"] = row["CPU s"] / first["CPU s"]
        rows.append(row)
        print(row, flush=True)
    runner.save(runner.RESULTS / "replay_memory.json", rows)


def memory_of(share: float) -> None:
    """Train, go back once, and print what that took: half of the budget is for states."""
    config = Configuration("MLP 64-512-512-10", digits, (512, 512), nn.GELU, lr=0.1, max_epochs=50)
    warm, asked, _ = trained(replace(config, max_epochs=1), 0)
    replayed(warm.run_.recorded).influence(asked.inputs, asked.targets, aggregate=True)
    n_steps = len(warm.run_.recorded.steps) * config.max_epochs
    size = warm.run_.recorded.end.numel() * 4
    whole = size * (n_steps + 1)
    # what a run keeps by itself is left out: the budget alone says how many states there are
    _nets._KEPT = 0
    del warm
    Path("/proc/self/clear_refs").write_text("5")
    base, started = resident("VmRSS"), time.process_time()
    net, asked, _ = trained(config, 0)
    fitted = replayed(net.run_.recorded, Budget(int(2 * share * whole) or 4 * whole), check=False)
    found = fitted.influence(asked.inputs, asked.targets, aggregate=True)
    row = {
        "bytes of all states": whole,
        "bytes above base": resident("VmHWM") - base,
        "CPU s": time.process_time() - started,
        "checksum": float(found.double().sum()),
    }
    print(json.dumps(row))


def resident(name: str) -> int:
    """Memory of this process now (VmRSS) or at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def bergson(python: str) -> None:
    """Score the same run in Bergson's environment, one query at a time, as it takes them."""
    config, n_queries = Configuration("MLP 64-32-10, SGD", digits, (32,), nn.Tanh, lr=0.1), 3
    net, asked, _ = trained(config, 0)
    # as Bergson's: checkpoints, and the steps between them taken again
    run = replace(net.run_.recorded, states=None)
    fitted = replayed(run, Budget(tolerance=0))
    order = np.full((len(run.steps), config.batch_size), -1)
    for row, step in zip(order, run.steps, strict=True):
        row[: len(step.rows)] = step.rows
    with tempfile.TemporaryDirectory() as folder:
        given, theirs = f"{folder}/run.npz", f"{folder}/theirs.npz"
        np.savez(
            given,
            X=run.data.inputs.array,
            y=run.data.targets,
            X_query=asked.inputs.array,
            y_query=asked.targets,
            order=order,
            lr=config.lr,
            **{name: p.detach().numpy() for name, p in run.module.named_parameters()},
        )
        script = Path(__file__).with_name("replay_bergson.py")
        subprocess.run([python, script, given, str(n_queries), theirs], check=True)
        found = dict(np.load(theirs))
    rows = []
    for k in range(n_queries):
        part = slice(k, k + 1)
        started = time.process_time()
        own = fitted.influence(asked.inputs[part], asked.targets[part])[0].numpy()
        seconds = time.process_time() - started
        difference = np.abs(own - found["scores"][k]).max() / np.abs(own).max()
        rows.append(
            {
                "query": k,
                "largest difference over largest score": float(difference),
                "CPU s": seconds,
                "CPU s, Bergson": float(found["seconds"][k]),
                "time ratio": seconds / float(found["seconds"][k]),
            }
        )
        print(rows[-1], flush=True)
    started = time.process_time()
    fitted.influence(asked.inputs, asked.targets)
    rows.append({"query": "60 at once", "CPU s": time.process_time() - started})
    runner.save(runner.RESULTS / "replay_bergson.json", rows)


def main() -> None:
    torch.set_num_threads(1)
    part = sys.argv[1] if len(sys.argv) > 1 else "quality"
    if part == "threshold":
        quality(THRESHOLD_DATA, SEEDS[:2], "threshold", singles=False, others=())
    elif part == "quality":
        wanted = sys.argv[2] if len(sys.argv) > 2 else ""
        chosen = [config for config in CONFIGURATIONS if wanted in config.name]
        seeds = [int(seed) for seed in sys.argv[3:]] or SEEDS
        quality(chosen, seeds, "quality", singles=True, others=(*OTHERS, *PEERS))
    elif part == "speed":
        speed("".join(sys.argv[2:3]))
    elif part == "basis":
        fewer_directions()
    elif part == "bergson":
        bergson(sys.argv[2] if len(sys.argv) > 2 else sys.executable)
    elif part == "memory-of":
        memory_of(float(sys.argv[2]))
    else:
        memory()


if __name__ == "__main__":
    main()
