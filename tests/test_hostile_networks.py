"""Odd networks: the answers of a plain one, or a refusal by name, and nothing of theirs changed."""

import copy
import functools
import warnings
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from skperf import (
    ComponentAttributor,
    InfluenceScorer,
    PerformativeAdapter,
    Reprogrammer,
    from_module,
)

D, K, N = 16, 3, 36
RNG = np.random.default_rng(0)
X = RNG.random((N, D)).astype(np.float32)
y = np.arange(N) % K
ROUNDS = np.repeat(np.arange(6), N // 6)
CALLS = 5  # after which a network raises


def base():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, K)).eval()


class Around(nn.Module):
    """The plain network, with something done before and after."""

    def __init__(self, before=None, after=None):
        super().__init__()
        self.net, self.before, self.after = base(), before, after

    def forward(self, rows):
        rows = rows if self.before is None else self.before(rows)
        outputs = self.net(rows)
        return outputs if self.after is None else self.after(outputs)


class Cached(nn.Module):
    """Keeps a table that it makes at its first call, and the mean of what it saw last."""

    def __init__(self):
        super().__init__()
        self.net, self.table = base(), None
        self.register_buffer("last", torch.zeros(D))

    def forward(self, rows):
        if self.table is None:
            self.table = torch.ones(D, device=rows.device)
        self.last = rows.mean(0)
        return self.net(rows * self.table)


class Counting(nn.Module):
    """Raises an error of its own after some calls."""

    seen = 0

    def __init__(self):
        super().__init__()
        self.net = base()

    def forward(self, rows):
        Counting.seen += 1
        if Counting.seen > CALLS:
            raise RuntimeError("out of order")
        return self.net(rows)


class Repeated(nn.Module):
    """A layer that runs twice, and one whose weights are another's."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.twice, self.tied, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, K)
        self.tied.weight = self.twice.weight

    def forward(self, rows):
        hidden = torch.tanh(self.twice(torch.tanh(self.twice(rows))))
        return self.out(torch.tanh(self.tied(hidden)))


def with_parts(*between):
    plain = base()
    return nn.Sequential(plain[0], plain[1], *between, plain[2])


def hooked():
    module = base()
    module[0].register_forward_hook(lambda part, args, output: output * 1.0)
    return module


def parametrised():
    module = base()
    parametrizations.weight_norm(module[0])
    return module


def frozen():
    module = base()
    module[0].requires_grad_(False)
    return module


def lazy(run):
    plain = base()
    module = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, K)).eval()
    if run:
        module(torch.zeros(1, D))
        module.load_state_dict(plain.state_dict())
    return module


class Held(nn.Module):
    """Keeps a weight in a list as well, and uses that one."""

    def __init__(self):
        super().__init__()
        self.net = base()
        self.held = [self.net[0].weight]

    def forward(self, rows):
        hidden = nn.functional.linear(rows, self.held[0], self.net[0].bias)
        return self.net[2](torch.tanh(hidden))


class Clamping(nn.Module):
    """Writes to its weights when it runs."""

    def __init__(self):
        super().__init__()
        self.net = base()

    def forward(self, rows):
        self.net[0].weight.data.clamp_(-0.01, 0.01)
        return self.net(rows)


class Quiet(nn.Module):
    """Runs its network in a block of no_grad, of inference_mode or of autocast."""

    def __init__(self, block):
        super().__init__()
        self.net, self.block = base(), block

    def forward(self, rows):
        with self.block():
            return self.net(rows)


def compiled_part():
    module = base()
    module[0] = torch.compile(module[0], backend="eager")
    module[2].compile(backend="eager")
    return module


def wrapped():
    """A forward that others have put a function around, as libraries of hooks do."""
    module = Around()
    inner = module.forward

    def forward(rows, *, again=module):
        return inner(rows) + 0 * again.net(rows)

    module.forward = forward
    return module


def around_graph():
    return nn.Sequential(nn.Identity(), torch.fx.symbolic_trace(base()))


def checkpointed():
    from torch.utils.checkpoint import checkpoint

    module = Around()
    module.after = lambda outputs: checkpoint(lambda z: z * 1.0, outputs, use_reentrant=False)
    return module


def written(rows):
    return rows.mul_(1.0).add_(0.0)


def doubled_in_place(rows):
    return rows.mul_(2.0)


def some_nan(outputs):
    return torch.where(outputs[:, :1] > outputs[:, :1].median(), torch.nan, outputs)


class Sloping(nn.Module):
    """Differentiates in its forward, as energies and physics do."""

    def __init__(self):
        super().__init__()
        self.net = base()

    def forward(self, rows):
        with torch.enable_grad():
            rows = rows.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.net(rows).sum(), rows)
        return self.net(rows) + 0 * slope.sum()


def wide():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(D, 10_000)


def rounded(module, kind):
    return module.to(kind)


# what is given, and the plain network that it should answer like; None: there is none
NETWORKS = {
    "dropout": (lambda: with_parts(nn.Dropout(0.5)).train(), base),
    "batch norm in training": (
        lambda: with_parts(nn.BatchNorm1d(8, eps=1e-12, affine=False)).train(),
        base,
    ),
    "in place": (lambda: with_parts(nn.ReLU(inplace=True)), lambda: with_parts(nn.ReLU())),
    "shared": (Repeated, Repeated),
    "hooks": (hooked, base),
    "parametrised": (parametrised, None),
    "frozen": (frozen, frozen),
    "float64": (lambda: base().double(), None),
    "bfloat16": (
        lambda: rounded(base(), torch.bfloat16),
        lambda: rounded(base(), torch.bfloat16).float(),
    ),
    "float16": (lambda: base().half(), lambda: base().half().float()),
    "lazy, run": (lambda: lazy(True), base),
    "lazy, not run": (lambda: lazy(False), None),
    "scripted": (lambda: torch.jit.script(base()), None),
    "traced": (lambda: torch.jit.trace(base(), torch.zeros(2, D)), None),
    "compiled": (lambda: torch.compile(base(), backend="eager"), base),
    "cached": (Cached, base),
    "writes its input": (lambda: Around(written), lambda: Around(torch.clone)),
    "doubles its input": (lambda: Around(doubled_in_place), lambda: Around(lambda r: 2 * r)),
    "raises": (Counting, None),
    "some NaN": (lambda: Around(after=some_nan), None),
    "all NaN": (lambda: Around(after=lambda z: z * torch.nan), None),
    "tuple": (lambda: Around(after=lambda z: (z, 0 * z)), Around),
    "dict": (lambda: Around(after=lambda z: {"logits": z, "hidden": 0 * z}), Around),
    "empty": (lambda: nn.Sequential(), None),
    "parameterless": (lambda: Around(after=None).net[1], None),
    "detached": (lambda: Around(after=lambda z: z.detach()), None),
    "10,000 outputs": (wide, wide),
    "compiled parts": (compiled_part, base),
    "wrapped": (wrapped, base),
    "graph inside": (around_graph, base),
    "checkpointed": (checkpointed, base),
    "squeezes": (lambda: Around(after=lambda z: z.squeeze(0)), base),
    "double outputs": (lambda: Around(after=lambda z: z.double()), base),
    "half outputs": (lambda: Quiet(lambda: torch.autocast("cpu", torch.bfloat16)), None),
    "integer outputs": (lambda: Around(after=lambda z: (100 * z).long()), None),
    "complex outputs": (lambda: Around(after=lambda z: z + 0j), None),
    "no gradient": (lambda: Quiet(torch.no_grad), None),
    "inference": (lambda: Quiet(torch.inference_mode), None),
    "holds a weight twice": (Held, None),
    "writes its weights": (Clamping, None),
    "on no device": (lambda: base().to("meta"), None),
    "quantised": (
        lambda: torch.ao.quantization.quantize_dynamic(base(), {nn.Linear}, torch.qint8),
        None,
    ),
    "graph module": (lambda: torch.fx.symbolic_trace(base()), base),
    "draws in evaluation": (lambda: Around(after=lambda z: z + 0 * torch.randn(len(z), 1)), base),
    "takes gradients itself": (Sloping, base),
}
REFUSED = {"lazy, not run", "all NaN", "integer outputs", "complex outputs", "writes its weights"}
REFUSED |= {"on no device"}
NO_GRADIENT = {"detached", "no gradient", "inference", "holds a weight twice"}


def performative(module):
    return PerformativeAdapter(from_module(module), adapter="tied", random_state=0).fit(
        X, y, rounds=ROUNDS
    )


ESTIMATORS = {
    "from_module": lambda m: from_module(m).predict_proba(X),
    "InfluenceScorer": lambda m: (
        InfluenceScorer(m, method="ggn", damping=0.1, random_state=0)
        .fit(X[:30], y[:30])
        .influence(X[30:], y[30:])
    ),
    "gradients row by row": lambda m: (
        InfluenceScorer(m, method="gradient_dot", gradients="reference")
        .fit(X[:30], y[:30])
        .influence(X[30:], y[30:])
    ),
    "ComponentAttributor": lambda m: (
        ComponentAttributor(m, fraction=0.3, budget=20, random_state=0)
        .fit(X[:30], y[:30])
        .attribute(X[30:], y[30:])
    ),
    "PerformativeAdapter": lambda m: performative(m).predict_proba(X),
    "Reprogrammer": lambda m: (
        Reprogrammer(
            nn.Sequential(nn.Flatten(), m),
            image_shape=(1, 4, 4),
            border=1,
            max_epochs=1,
            head="linear",
            random_state=0,
        )
        .fit(X, y)
        .predict_proba(X)
    ),
}
# any outputs of an encoder are features; one that writes to its weights is the user's to mend
FEATURES = {"integer outputs", "complex outputs", "writes its weights"}
CELLS = [
    (estimator, network)
    for estimator in ESTIMATORS
    for network in NETWORKS
    if estimator != "Reprogrammer" or network not in FEATURES
]


def state_of(module):
    """Whatever a call might change of a network."""
    parts = list(module.modules())
    tensors = [*module.parameters(), *module.buffers()]
    return {
        "modes": [part.training for part in parts],
        "flags": [p.requires_grad for p in module.parameters()],
        "gradients": [p.grad is None for p in module.parameters()],
        "tensors": [id(t) for t in tensors],
        "versions": [0 if nn.parameter.is_lazy(t) else t._version for t in tensors],
        "attributes": [
            {k: id(v) for k, v in part.__dict__.items() if not k.startswith("_")} for part in parts
        ],
        "random": torch.get_rng_state().numpy().tobytes(),
    }


@functools.lru_cache
def expected(estimator, network):
    plain = NETWORKS[network][1]
    return None if plain is None else np.asarray(ESTIMATORS[estimator](plain()), dtype=float)


def outcome(cell):
    """Run one cell: "same", "refused", "runs" where there is no plain network, or what is wrong."""
    estimator, network = cell
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, given = expected(*cell), X.copy()
        module = NETWORKS[network][0]()
        Counting.seen = 0
        before = state_of(module)
        try:
            found = np.asarray(ESTIMATORS[estimator](module), dtype=float)
        except (ValueError, TypeError, FloatingPointError) as error:
            found, said = None, str(error)
        except RuntimeError as error:
            found, said = None, str(error)
            if "out of order" not in said:
                return f"RuntimeError: {said}"
        after = state_of(module)
    changed = [key for key in before if before[key] != after[key]]
    if changed:
        return f"changed: {changed}"
    if not np.array_equal(X, given):
        return "X is changed"
    if found is None:
        return "refused" if len(said) > 20 or "out of order" in said else f"says only: {said}"
    if plain is None:
        return "runs"
    scale = np.abs(plain).max()
    close = np.allclose(found, plain, rtol=2e-3, atol=1e-4 * scale)
    return "same" if close else f"{found.ravel()[:3]} for {plain.ravel()[:3]}"


def in_make_test(cell):
    """A seeded fifth of the table, the same on every machine."""
    return zlib.crc32("/".join(cell).encode()) % 5 == 0


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, marks=() if in_make_test(cell) else pytest.mark.slow, id="/".join(cell))
        for cell in CELLS
    ],
)
def test_cell(cell):
    said = outcome(cell)
    assert said in ("same", "refused", "runs")
    if cell == ("ComponentAttributor", "takes gradients itself"):
        assert said == "refused"
    asks_gradients = cell[0] in ("InfluenceScorer", "gradients row by row")
    if cell[1] in REFUSED or (cell[1] in NO_GRADIENT and asks_gradients):
        assert said == "refused"


STEPPED: list[nn.Parameter] = []  # by name in a module, where no view finds it


def stepping(outputs):
    with torch.no_grad():
        for parameter in STEPPED:
            parameter += 1.0
    return outputs


def test_steps_of_another_thread_are_not_taken_for_writes_of_the_forward():
    module = Around(after=stepping)
    STEPPED.extend(module.parameters())
    try:
        assert np.isfinite(from_module(module).predict_proba(X)).all()
    finally:
        STEPPED.clear()


def test_tables_that_bound_their_norms_bound_those_of_a_copy():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        table, out = nn.Embedding(20, 6, max_norm=0.5), nn.Linear(18, K)
    module, tokens = nn.Sequential(table, nn.Flatten(), out), np.arange(60).reshape(20, 3) % 20
    before, unlike = table.weight.detach().clone(), np.arange(20) % K
    bounded = copy.deepcopy(module)
    expected = bounded(torch.tensor(tokens)).softmax(1).detach().numpy()
    np.testing.assert_allclose(from_module(module).predict_proba(tokens), expected, rtol=1e-5)
    scores = [
        InfluenceScorer(module, method="gradient_dot", gradients=how).fit(tokens, unlike)
        for how in ("auto", "reference")
    ]
    scores = [scorer.influence(tokens[:3], unlike[:3]) for scorer in scores]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-6)
    ComponentAttributor(module, budget=20, fraction=0.4, random_state=0).fit(tokens, unlike)
    torch.testing.assert_close(table.weight, before, rtol=0, atol=0)


def test_caches_made_in_forward_hold_no_inference_tensors():
    module = Cached()
    from_module(module).predict_proba(X)
    assert module.table is None
    assert not module.last.is_inference()
    copied = copy.deepcopy(module)
    loss = copied(torch.tensor(X)).sum()
    loss.backward()  # would fail on tensors made in inference mode


def main():
    """Count the cells by outcome."""
    torch.set_num_threads(1)
    counts = {}
    for cell in CELLS:
        said = outcome(cell)
        if said not in ("same", "refused", "runs"):
            print("/".join(cell), said[:300], flush=True)
            said = "wrong"
        counts[said] = counts.get(said, 0) + 1
    print(len(CELLS), "cells", counts)


if __name__ == "__main__":
    main()
