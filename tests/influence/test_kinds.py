"""Every kind of network, input and loss, against autograd row by row."""

import copy
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from skperf import from_module
from skperf.backbone.losses import Focal, Margin, resolve_loss
from skperf.influence import GGN, InfluenceScorer
from skperf.influence.output_rows import prepare_forward_mode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
N = 11


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 3)


class Sorted(Base):
    """Sorts its rows by length, as before packing."""

    def forward(self, x):
        order = (x[:, :, 0] > 0).sum(1).argsort(stable=True)
        return self.last(self.first(x[order].mean(1)).tanh()[order.argsort()])


class Query(Base):
    """A fixed query goes through a layer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("query", torch.randn(1, 5))

    def forward(self, x):
        asked = self.first(self.query).tanh()
        return self.last((torch.einsum("nld,qh->nlh", x[..., :1], asked)).tanh().mean(1))


class TimeFirst(Base):
    def forward(self, x):
        return self.last(self.first(x.transpose(0, 1)).tanh().mean(0))


class Folded(Base):
    """Frames are folded into the batch."""

    def forward(self, x):
        frames = self.first(x.reshape(-1, 5)).tanh()
        return self.last(frames.reshape(len(x), x.shape[1], 8).mean(1))


class FoldedTimeMajor(Base):
    def forward(self, x):
        frames = self.first(x.transpose(0, 1).reshape(-1, 5)).tanh()
        return self.last(frames.reshape(x.shape[1], len(x), 8).mean(0))


class Positions(Base):
    """A table of positions is asked with a range, as nanoGPT does, and with (1, length)."""

    def __init__(self):
        super().__init__()
        self.table, self.other = nn.Embedding(9, 5), nn.Embedding(9, 5)

    def forward(self, x):
        where = torch.arange(x.shape[1])
        return self.last(self.first(x + self.table(where) + self.other(where[None])).tanh().mean(1))


class Siamese(Base):
    def forward(self, x):
        left, right = self.first(x[:, 0]).tanh(), self.first(x[:, 1:]).tanh().mean(1)
        return self.last(left - right)


class ClassToken(nn.Module):
    """A parameter of a module around others, and attention."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.lift, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.block = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.lift(x)], 1)
        return self.last(self.block(tokens)[:, 0])


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.body, self.last = kind(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.body(x)[0].mean(1))


class Adapted(nn.Module):
    """A frozen layer with low-rank changes, as LoRA makes it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 8, bias=False)
        self.last = nn.Linear(8, 3)
        for p in [*self.first.parameters(), *self.last.parameters()]:
            p.requires_grad_(False)

    def forward(self, x):
        return self.last((self.first(x) + self.up(self.down(x))).tanh().mean(1))


class Experts(Base):
    """Rows take one of two layers."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(5, 8)

    def forward(self, x):
        x = x.mean(1)
        first = x[:, 0] > 0
        hidden = x.new_zeros(len(x), 8)
        hidden[first], hidden[~first] = self.first(x[first]), self.other(x[~first])
        return self.last(hidden.tanh())


NETWORKS = {
    kind.__name__: kind
    for kind in (
        Sorted,
        Query,
        TimeFirst,
        Folded,
        FoldedTimeMajor,
        Positions,
        Siamese,
        ClassToken,
        Adapted,
        Experts,
    )
} | {kind.__name__: lambda kind=kind: Recurrent(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)}


def rows(length=4):
    rng = np.random.default_rng(0)
    return rng.normal(size=(N, length, 5)), rng.integers(0, 3, N)


def brute(module, run, loss, trained=None):
    """Gradient of each row's loss, run alone: -> (n, n_parameters)."""
    module.eval()
    own = [p for p in module.parameters() if trained is None or p.requires_grad]
    found = []
    for i in range(N):
        value = loss(run(module, slice(i, i + 1)), i)
        parts = torch.autograd.grad(value, own, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(found).detach()


def assert_products(scorer, X, y, gradients, rtol=1e-8):
    expected = (gradients @ gradients.T).numpy()
    scores = scorer.fit(X, y).influence(X, y)
    np.testing.assert_allclose(scores, expected, rtol=rtol, atol=rtol * np.abs(expected).max())
    np.testing.assert_allclose(scorer.self_influence_, np.diag(expected), rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    torch.manual_seed(0)
    module = NETWORKS[name]().double()
    # as many places as rows: the dimensions cannot be told by their sizes
    X, y = rows(N if name in ("Sorted", "TimeFirst", "Folded") else 4)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    gradients = brute(
        module,
        lambda m, part: m(inputs[part]),
        lambda outputs, i: cross_entropy(outputs, codes[i : i + 1]),
        trained=True,
    )
    scorer = InfluenceScorer(module, method="gradient_dot", batch_size=4)
    assert_products(scorer, X, y, gradients)
    assert scorer.coverage_ == 1


SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 12,
}


def hugging_face(name):
    import transformers as hf

    small = {"num_labels": 3, "pad_token_id": 0, **SIZES}
    made = {
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**small)),
        "distilbert": lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(
                num_labels=3,
                vocab_size=40,
                dim=16,
                n_layers=1,
                n_heads=2,
                hidden_dim=20,
                max_position_embeddings=12,
            )
        ),
        "gpt2": lambda: hf.GPT2ForSequenceClassification(
            hf.GPT2Config(
                num_labels=3,
                vocab_size=40,
                n_embd=16,
                n_layer=1,
                n_head=2,
                n_positions=12,
                pad_token_id=0,
            )
        ),
        "llama": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**small)),
    }
    torch.manual_seed(0)
    return made[name]().double().eval()


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "llama"])
def test_text_networks_with_their_masks(name):
    module = hugging_face(name)
    rng = np.random.default_rng(0)
    ids, y = rng.integers(1, 40, (N, 7)), rng.integers(0, 3, N)
    lengths = rng.integers(3, 8, N)
    mask = (np.arange(7) < lengths[:, None]).astype(int)
    ids = ids * mask
    given = {"input_ids": torch.as_tensor(ids), "attention_mask": torch.as_tensor(mask)}
    codes = torch.as_tensor(y)
    gradients = brute(
        module,
        lambda m, part: m(**{k: v[part] for k, v in given.items()}).logits,
        lambda outputs, i: cross_entropy(outputs, codes[i : i + 1]),
    )
    for X in (ids, {"input_ids": ids, "attention_mask": mask}):
        assert_products(InfluenceScorer(module, method="gradient_dot"), X, y, gradients, rtol=1e-6)


def test_a_vision_transformer_with_its_class_token():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **sizes)
    module = ViTForImageClassification(config).double().eval()
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(N, 1, 8, 8)), rng.integers(0, 3, N)
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    gradients = brute(
        module,
        lambda m, part: m(inputs[part]).logits,
        lambda outputs, i: cross_entropy(outputs, codes[i : i + 1]),
    )
    assert_products(InfluenceScorer(module, method="gradient_dot"), X, y, gradients, rtol=1e-6)


def language_model(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(tie_word_embeddings=tied, **SIZES)
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("tied", [False, True])
def test_language_models_by_sequence_and_by_token(tied):
    module = language_model(tied)
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 40, (N, 7))
    X, y = ids[:, :-1], ids[:, 1:].copy()
    y[np.arange(6) >= rng.integers(3, 7, N)[:, None]] = -100
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    n_tokens = (codes >= 0).sum(1)

    def token_loss(outputs, i, token=None):
        losses = cross_entropy(outputs[0], codes[i], reduction="none", ignore_index=-100)
        return (losses.sum() if token is None else losses[token]) / n_tokens[i]

    gradients = brute(module, lambda m, part: m(inputs[part]).logits, token_loss)
    scorer = InfluenceScorer(module, method="gradient_dot")
    assert_products(scorer, X, y, gradients, rtol=1e-6)
    scale = float((gradients @ gradients.T).abs().max())
    own = list(module.parameters())
    tokens = [
        torch.cat(
            [
                g.reshape(-1)
                for g in torch.autograd.grad(
                    token_loss(module(inputs[2:3]).logits, 2, t), own, materialize_grads=True
                )
            ]
        )
        for t in range(6)
    ]
    expected = (torch.stack(tokens) @ gradients.T).numpy()
    apart = scorer.influence(X[2:4], y[2:4], tokens="queries")
    assert apart.shape == (2, 6, N)
    np.testing.assert_allclose(apart[0], expected, rtol=1e-6, atol=1e-8 * scale)
    of_rows = scorer.influence(X[:3], y[:3], tokens="rows")
    assert of_rows.shape == (3, N, 6)
    np.testing.assert_allclose(of_rows[:, 2], expected[:, :3].T, rtol=1e-6, atol=1e-8 * scale)
    whole = scorer.influence(X[:3], y[:3])
    np.testing.assert_allclose(of_rows.sum(2), whole, rtol=1e-6, atol=1e-8 * scale)


class Unpadded(nn.Module):
    """Runs a layer on the words that are there, one row's after the other's."""

    def __init__(self, at_front):
        super().__init__()
        self.embed, self.middle = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 5)
        self.head, self.at_front = nn.Linear(5, 3), at_front

    def forward(self, ids):
        there = ids > 0
        words = self.embed(ids[there])
        found = self.middle(words if self.at_front else words[None]).view(-1, 5).tanh()
        sums = found.new_zeros(len(ids), 5).index_add(0, there.nonzero()[:, 0], found)
        return self.head(sums / there.sum(1, keepdim=True))


@pytest.mark.parametrize("at_front", [True, False])
def test_rows_without_padding_whose_lengths_come_to_the_same_sum(at_front):
    """Six rows of six words are tried; the others are longer and shorter, and six in the mean."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    lengths = np.full(N, 6)
    others = np.setdiff1d(np.arange(N), np.linspace(0, N - 1, 6).astype(int))
    lengths[others[:4]] = [5, 7, 4, 8]
    X = np.where(np.arange(8) < lengths[:, None], rng.integers(1, 11, (N, 8)), 0)
    y, inputs = np.arange(N) % 3, torch.as_tensor(X)
    module = Unpadded(at_front).double().eval()
    gradients = brute(
        module,
        lambda m, part: m(inputs[part]),
        lambda outputs, i: cross_entropy(outputs, torch.as_tensor(y[i : i + 1])),
    )
    scorer = InfluenceScorer(module, method="gradient_dot").fit(X, y)
    expected = (gradients @ gradients.T).numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(scorer.influence(X, y), expected, rtol=1e-6, atol=1e-8 * scale)


@pytest.mark.parametrize("of", ["queries", "rows"])
def test_scores_of_tokens_are_those_of_candidates_alone(of):
    module = nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 4)).double().eval()
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 7, (N, 5)), rng.integers(0, 4, (N, 5))
    scorers = (
        InfluenceScorer(module, method="gradient_dot", candidates=k).fit(X, y) for k in (3, None)
    )
    some, every = scorers
    scored = some.influence(X[:2], y[:2]) != 0
    assert (scored.sum(1) == 3).all()
    kept = scored[:, None] if of == "queries" else scored[:, :, None]
    expected = every.influence(X[:2], y[:2], tokens=of) * kept
    np.testing.assert_array_equal(some.influence(X[:2], y[:2], tokens=of), expected)


def test_few_rows_are_all_kept_in_the_curvature():
    """A sample of their small eigenvalues would be far off."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    X, y = rng.normal(size=(9, 4)), np.arange(9) % 3
    ggn, exact = (
        InfluenceScorer(module.eval(), method=method, damping=0.1).fit(X, y).influence(X, y)
        for method in ("ggn", "exact")
    )
    np.testing.assert_allclose(ggn, exact, rtol=1e-6, atol=1e-9 * np.abs(exact).max())


def test_sampled_rows_of_the_curvature_are_right_in_the_mean():
    """Their outer products come to the Gauss-Newton matrix of all tokens."""
    module = nn.Sequential(nn.Linear(3, 4)).double()
    torch.manual_seed(0)
    X, y = np.random.default_rng(0).normal(size=(N, 5, 3)), np.arange(5 * N).reshape(N, 5) % 4
    y[::2, 3:] = -100
    scorers = [
        InfluenceScorer(module, method=GGN(*options), damping=0.1, random_state=1).fit(X, y)
        for options in ((1.0, None), (0.9, 2_000))
    ]
    exact, sampled = (s._learned.stages[0].fit.lift.filtered.curvature.rows for s in scorers)
    one, two = (torch.cat([f.values for f in rows], 1) for rows in (exact, sampled))
    expected = one.T @ one
    assert len(two) == 2_000
    assert float((two.T @ two - expected).norm() / expected.norm()) < 0.12
    shapes = [s.influence(X[:2], y[:2]).shape for s in scorers]
    assert shapes == [(2, N), (2, N)]


def huber(outputs, targets):
    return nn.functional.huber_loss(outputs, targets, reduction="none", delta=0.5).mean(1)


def targets_of(kind):
    rng = np.random.default_rng(1)
    return {
        "codes": rng.integers(0, 3, N),
        "shares": rng.dirichlet(np.ones(3), N),
        "labels": rng.integers(0, 2, (N, 3)).astype(float),
        "numbers": rng.normal(size=(N, 3)),
    }[kind]


WEIGHT = torch.tensor([5.0, 1.0, 0.5], dtype=torch.float64)
LOSSES = {
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT), "codes"),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), "codes"),
    "shares": (nn.CrossEntropyLoss(), "shares"),
    "labels": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), "labels"),
    "numbers": (nn.MSELoss(), "numbers"),
    "focal": (Focal(gamma=1.5), "codes"),
    "hinge": (Margin(p=2), "codes"),
    "own": (huber, "numbers"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    """Gradients, shares and Gauss-Newton matrix, with every row's Hessian written out."""
    given, kind = LOSSES[name]
    y, loss = targets_of(kind), resolve_loss(given)
    prepare_forward_mode()
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X = np.random.default_rng(0).normal(size=(N, 4))
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y)
    own = dict(module.named_parameters())
    gradients = brute(
        module,
        lambda m, part: m(inputs[part]),
        lambda outputs, i: loss.value(outputs, targets[i : i + 1])[0],
    )
    weights = torch.ones(N, dtype=torch.float64)
    if name == "weighted":
        weights = WEIGHT[targets]
    shares, curvature = weights / weights.sum(), 0
    for i in range(N):
        jacobian = torch.func.jacrev(
            lambda p, i=i: torch.func.functional_call(module, p, (inputs[i],))
        )(own)
        matrix = torch.cat([jacobian[n].reshape(3, -1) for n in own], 1).detach()
        hessian = torch.func.hessian(lambda z, i=i: loss.value(z[None], targets[i : i + 1])[0])(
            module(inputs[i]).detach()
        )
        values, vectors = torch.linalg.eigh(hessian)
        positive = (vectors * values.clamp_min(0)) @ vectors.T
        curvature = curvature + shares[i] * matrix.T @ positive @ matrix
    damped = curvature + 0.1 * torch.eye(len(curvature))
    expected = gradients @ torch.linalg.solve(damped, (gradients * shares[:, None]).T)
    for method in ("exact", GGN(1.0, None), "cg"):
        scorer = InfluenceScorer(module, method=method, loss=given, damping=0.1).fit(X, y)
        tolerance = 1e-3 if method == "cg" else 1e-7
        np.testing.assert_allclose(
            scorer.influence(X, y), expected, rtol=tolerance, atol=tolerance * 0.1
        )
    np.testing.assert_allclose(scorer.loss_, loss.value(module(inputs), targets).detach())


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_a_reduction_by_sums_sums_over_the_outputs_of_a_row(kind):
    prepare_forward_mode()
    given = {"labels": nn.BCEWithLogitsLoss, "numbers": nn.MSELoss}[kind](reduction="sum")
    y, targets = targets_of(kind), torch.as_tensor(targets_of(kind))
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    X = np.random.default_rng(0).normal(size=(N, 4))
    inputs = torch.as_tensor(X)
    gradients = brute(
        module,
        lambda m, part: m(inputs[part]),
        lambda outputs, i: given(outputs, targets[i : i + 1]),
    )
    assert_products(InfluenceScorer(module, method="gradient_dot", loss=given), X, y, gradients)
    outputs = module(inputs).detach()
    hessian = torch.func.hessian(lambda z: given(z, targets[0]))(outputs[0])
    torch.testing.assert_close(resolve_loss(given).hessian(outputs, targets)[0], hessian)


def test_maps_have_one_label_a_place():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 1)).double()
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(N, 1, 5, 4)), rng.integers(0, 3, (N, 5, 4))
    inputs, codes = torch.as_tensor(X), torch.as_tensor(y)
    gradients = brute(
        module,
        lambda m, part: m(inputs[part]),
        lambda outputs, i: cross_entropy(outputs, codes[i : i + 1]),
    )
    assert_products(InfluenceScorer(module, method="gradient_dot"), X, y, gradients)
    assert InfluenceScorer(module).fit(X, y).transform(X[:2]).shape == (2, N)


def test_several_inputs_and_half_precision():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
            self.last = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.last((self.left(a) + self.right(b)).tanh())

    torch.manual_seed(0)
    module = Two().double()
    rng = np.random.default_rng(0)
    X, y = (rng.normal(size=(N, 3)), rng.normal(size=(N, 2))), rng.integers(0, 3, N)
    one, two, codes = torch.as_tensor(X[0]), torch.as_tensor(X[1]), torch.as_tensor(y)
    gradients = brute(
        module,
        lambda m, part: m(one[part], two[part]),
        lambda outputs, i: cross_entropy(outputs, codes[i : i + 1]),
    )
    assert_products(InfluenceScorer(module, method="gradient_dot"), X, y, gradients)
    half = Two().bfloat16()
    for method in ("ggn", "exact", "ekfac", "trak", "cg"):
        scorer = InfluenceScorer(from_module(half), method=method).fit(X, y)
        scores = scorer.influence(X, y)
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()
        assert half.last.weight.dtype == torch.bfloat16


class Attending(nn.Module):
    """Attends to some places: a mask of yes and no, or one that is added, causal, or none."""

    def __init__(self, how):
        super().__init__()
        self.how, self.inner, self.last = how, nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x):
        query, key, value = self.inner(x)[:, None].chunk(3, -1)
        seen = (x[:, None, None, :, 0] > -0.5) | torch.eye(x.shape[1], dtype=torch.bool)
        options = {"is_causal": True} if self.how == "causal" else {}
        if self.how == "boolean":
            options["attn_mask"] = seen
        elif self.how == "added":
            options["attn_mask"] = torch.where(seen, 0.0, -3.0).to(x.dtype)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, **options)
        return self.last(attended[:, 0].mean(1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of its own jacrev
@pytest.mark.parametrize("how", ["boolean", "added", "causal", "none"])
def test_products_of_attention_with_masks(how):
    """Written-out attention stands for the fused kernel, which has no second derivative."""
    torch.manual_seed(0)
    module = Attending(how).double()
    X, y = rows()
    inputs, n = torch.as_tensor(X), N
    own = dict(module.named_parameters())
    jacobians = []
    for i in range(n):
        found = torch.func.jacrev(
            lambda p, i=i: torch.func.functional_call(module, p, (inputs[i : i + 1],))[0]
        )(own)
        jacobians.append(torch.cat([found[name].flatten(1) for name in own], 1).detach())
    stacked, p = torch.stack(jacobians), module(inputs).softmax(1).detach()
    at_outputs = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    curvature = torch.einsum("nki,nkl,nlj->ij", stacked, at_outputs, stacked) / n
    gradients = torch.einsum("nk,nki->ni", p - torch.eye(3)[y], stacked)
    solved = torch.linalg.solve(curvature + 0.1 * torch.eye(len(curvature)), gradients.T)
    for method, rtol in (("exact", 1e-6), ("cg", 1e-3)):
        scorer = InfluenceScorer(module, method=method, damping=0.1).fit(X, y)
        expected = (gradients @ solved / n).numpy()
        allowed = {"rtol": rtol, "atol": rtol * np.abs(expected).max()}
        np.testing.assert_allclose(scorer.influence(X, y), expected, **allowed)


@pytest.mark.parametrize("parameters", ["all", "last*"])
def test_a_forward_that_casts_its_outputs(parameters):
    """As code with mixed precision ends; dense solves run in double precision all the same."""
    module = Base()
    X, y = np.random.default_rng(0).normal(size=(N, 5)), np.arange(N) % 3
    cast = from_module(module.eval(), forward=lambda own, x: own.last(own.first(x)).float())
    plain = from_module(module, forward=lambda own, x: own.last(own.first(x)))
    scores = [
        InfluenceScorer(given, method="exact", parameters=parameters, damping=0.1)
        .fit(X, y)
        .influence(X, y)
        for given in (cast, plain)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-4, atol=1e-6)


class _Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 5, padding_idx=0)
        self.recurrent = nn.GRU(5, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        lengths = (tokens != 0).sum(1)
        packed = nn.utils.rnn.pack_padded_sequence(
            self.table(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        return self.head(self.recurrent(packed)[1][-1])


def test_packed_sequences_are_differentiated_row_by_row():
    torch.manual_seed(0)
    module, tokens, y = _Packed(), torch.randint(1, 11, (7, 6)), torch.arange(7) % 3
    for row in range(7):
        tokens[row, 2 + row % 4 :] = 0
    expected = []
    for row in range(7):
        loss = cross_entropy(module(tokens[row : row + 1]), y[row : row + 1])
        slopes = torch.autograd.grad(loss, list(module.parameters()))
        expected.append(torch.cat([slope.flatten() for slope in slopes]))
    expected = torch.stack(expected)
    scorer = InfluenceScorer(from_module(module), method="gradient_dot").fit(tokens, y)
    torch.testing.assert_close(
        torch.as_tensor(scorer.influence(tokens, y)), expected @ expected.T, rtol=1e-4, atol=1e-5
    )


ONE_NUMBER = {
    "smooth L1": (nn.SmoothL1Loss(beta=0.7), nn.functional.smooth_l1_loss, {"beta": 0.7}),
    "Poisson": (nn.PoissonNLLLoss(), nn.functional.poisson_nll_loss, {}),
    "soft margin": (nn.SoftMarginLoss(), nn.functional.soft_margin_loss, {}),
    "sum": (nn.MSELoss(reduction="sum"), nn.functional.mse_loss, {"reduction": "sum"}),
}


@pytest.mark.parametrize("name", ONE_NUMBER)
def test_losses_of_one_number_a_row_never_meet_other_rows(name):
    """Outputs (n, 1) beside targets (n,) would be broadcast to (n, n)."""
    loss, function, options = ONE_NUMBER[name]
    torch.manual_seed(0)
    width = 2 if name == "sum" else 1
    module = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, width)).double()
    X, _ = rows()
    y = np.random.default_rng(1).normal(size=(N, 2) if name == "sum" else N)
    X, y = X[:, 0], np.sign(y) if name == "soft margin" else y
    inputs, targets = torch.as_tensor(X), torch.as_tensor(y).view(N, width)
    gradients = brute(
        module, lambda m, i: m(inputs[i]), lambda z, i: function(z, targets[i : i + 1], **options)
    )
    scorer = InfluenceScorer(from_module(module), method="gradient_dot", loss=loss)
    assert_products(scorer, X, y, gradients)


def test_a_loss_that_crosses_rows_is_refused():
    X, _ = rows()
    scorer = InfluenceScorer(
        nn.Linear(5, 1), loss=lambda outputs, targets: (outputs - targets) ** 2
    )
    with pytest.raises(ValueError, match="one number for each row"):
        scorer.fit(X[:, 0], np.arange(N) / N)


class _Attentive(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(12, 8), nn.Linear(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        return self.head(self.block(self.table(tokens)).mean(1))


def test_torchs_own_transformer_trains_on_without_its_rows():
    torch.manual_seed(0)
    module, tokens = _Attentive(), torch.randint(0, 12, (20, 5))
    y = (tokens[:, 0] > 5).long()
    scorer = InfluenceScorer(module, random_state=0).fit(tokens, y)
    found = scorer.fading(
        tokens[:3], y[:3], steps=(1, 3), n_train=3, learning_rate=0.1, batch_size=20, weight_decay=0
    )

    def further(weights):
        network = copy.deepcopy(module)
        optimizer, losses = torch.optim.SGD(network.parameters(), 0.1), []
        for step in range(1, 4):
            optimizer.zero_grad()
            (weights * cross_entropy(network(tokens), y, reduction="none")).mean().backward()
            optimizer.step()
            if step != 2:
                losses.append(cross_entropy(network(tokens[:3]), y[:3], reduction="none").detach())
        return torch.stack(losses)

    ones = torch.ones(20)
    for column, row in enumerate(found.rows):
        without = further(ones.index_fill(0, torch.tensor(int(row)), 0.0))
        expected = (without - further(ones)).numpy()
        np.testing.assert_allclose(found.actual[:, :, column], expected, atol=2e-6)
    # products with the curvature, trainings ahead and anew
    products = InfluenceScorer(module, method="cg", damping=0.1).fit(tokens, y)
    plain = InfluenceScorer(module, method=GGN(kept_trace=1.0, max_rows=None), damping=0.1)
    expected = plain.fit(tokens, y).influence(tokens, y)
    np.testing.assert_allclose(products.influence(tokens, y), expected, atol=2e-3 * expected.max())
    flow = InfluenceScorer(module, damping="flow", horizon=6, learning_rate=0.03).fit(tokens, y)
    assert np.isfinite(flow.influence(tokens[:3], y[:3])).all()
    assert np.isfinite(scorer.score(tokens[:4], y[:4], n_subsets=3))


class _Words(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.table, self.last = nn.Embedding(12, 4, **options), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.last(self.table(tokens).tanh().sum(1))


class _Unpadded(_Words):
    """Runs the words that are there as one long row."""

    def forward(self, tokens):
        there = tokens > 0
        found = self.table.weight.new_zeros(*tokens.shape, 4)
        found[there] = self.table(tokens[there]).tanh()
        return self.last(found.sum(1))


class _Told(nn.Module):
    """A part that is called with more than its input, as adapters call theirs."""

    class Part(nn.Linear):
        def forward(self, x, *, scale):
            return super().forward(x) * scale

    def __init__(self):
        super().__init__()
        self.part, self.last = self.Part(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.part(x.mean(1), scale=0.5).tanh())


def exactly(module, X, y, loss, damping=0.05):
    """Influence with every matrix written out, rows run alone."""
    inputs, own, gradients, curvature = torch.as_tensor(X), list(module.parameters()), [], 0
    for i in range(len(X)):
        output = module(inputs[i : i + 1])
        jacobian = [
            torch.cat(
                [
                    part.to_dense().flatten()
                    for part in torch.autograd.grad(entry, own, retain_graph=True)
                ]
            )
            for entry in output.flatten()
        ]
        jacobian, at = torch.stack(jacobian), output.detach()
        value = lambda z, i=i, at=at: loss(z.view_as(at), i)  # noqa: E731
        slope, hessian = (
            f(value, at.flatten())
            for f in (torch.autograd.functional.jacobian, torch.autograd.functional.hessian)
        )
        gradients.append(slope @ jacobian)
        curvature = curvature + jacobian.T @ hessian @ jacobian / len(X)
    gradients = torch.stack(gradients)
    damped = curvature + damping * torch.eye(len(curvature))
    return gradients @ torch.linalg.solve(damped, gradients.T)


def spread_over(n, tried=4):
    """Lengths of rows that are all the same where some are tried, and not elsewhere."""
    lengths = np.where(np.isin(np.arange(n), np.linspace(0, n - 1, 6).astype(int)), tried, 3)
    lengths[1] = 5
    return lengths


@pytest.mark.parametrize("kind", ["padded", "sparse", "unpadded", "told"])
def test_more_networks_with_their_curvature(kind):
    made = {
        "padded": lambda: _Words(padding_idx=0),
        "sparse": lambda: _Words(sparse=True),
        "unpadded": _Unpadded,
        "told": _Told,
    }
    torch.manual_seed(0)
    module = made[kind]().double()
    rng = np.random.default_rng(0)
    X, y = rng.integers(1, 12, (N, 5)), rng.integers(0, 3, N)
    X = X * (np.arange(5) < spread_over(N)[:, None]) if kind != "told" else rows()[0]
    codes = torch.as_tensor(y)
    expected = exactly(module, X, y, lambda z, i: cross_entropy(z, codes[i : i + 1])) / N
    for method in ("exact", GGN(kept_trace=1.0, max_rows=None)):
        scorer = InfluenceScorer(module, method=method, damping=0.05, batch_size=4).fit(X, y)
        np.testing.assert_allclose(scorer.influence(X, y), expected.detach(), rtol=1e-6, atol=1e-9)


def test_a_table_that_counts_the_words_of_a_batch_is_refused():
    scorer = InfluenceScorer(_Words(scale_grad_by_freq=True), method="gradient_dot")
    with pytest.raises(ValueError, match="scales"):
        scorer.fit(np.ones((N, 3), int), np.arange(N) % 3)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["map", "tokens"])
def test_cross_entropy_of_many_outputs_by_sums(kind, weighted):
    """With reduction="sum" a row is the sum over its places; ignored ones and weights too."""
    weight = torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64) if weighted else None
    given, rng = nn.CrossEntropyLoss(weight=weight, reduction="sum"), np.random.default_rng(0)
    torch.manual_seed(0)
    if kind == "map":
        module = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1))
        X, y = rng.normal(size=(N, 1, 4, 3)), rng.integers(0, 3, (N, 4, 3))
    else:
        module = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3))
        X, y = rng.normal(size=(N, 5, 4)), rng.integers(0, 3, (N, 5))
    y[rng.random(y.shape) < 0.3] = -100
    module, targets = module.double(), torch.as_tensor(y)

    def one(z, i):
        return given(z if kind == "map" else z.mT, targets[i : i + 1])

    # a query's loss is plain: of the weights it has the mean of its own, which rows weigh by
    counted = targets >= 0
    shares = torch.ones(N, dtype=torch.float64)
    if weighted:
        own = weight[targets.clamp_min(0)] * counted
        shares = own.flatten(1).sum(1) / counted.flatten(1).sum(1)
    expected = exactly(module, X, y, one, damping=0.05 * float(shares.mean()))
    expected = expected.detach() / shares[:, None] / N
    for options in (GGN(kept_trace=1.0, max_rows=None), "exact"):
        scorer = InfluenceScorer(module, method=options, loss=given, damping=0.05).fit(X, y)
        np.testing.assert_allclose(scorer.influence(X, y), expected, rtol=1e-4, atol=1e-7)
    sampled = InfluenceScorer(module, method=GGN(0.9, 600), loss=given, damping=0.05).fit(X, y)
    slope = np.polyfit(expected.flatten(), sampled.influence(X, y).ravel(), 1)[0]
    assert abs(slope - 1) < 0.15


def test_as_many_classes_as_tokens_are_no_guess():
    X, y = np.random.default_rng(0).normal(size=(N, 3, 4)), np.arange(3 * N).reshape(N, 3) % 3
    with pytest.raises(ValueError, match="either axis may hold the classes"):
        InfluenceScorer(nn.Linear(4, 3)).fit(X, y)


def test_what_hugging_face_says_a_model_was_trained_on():
    """Yes-or-no labels are no shares of classes, though their numbers would do."""
    import transformers as hf

    torch.manual_seed(0)
    task = {"num_labels": 3, "problem_type": "multi_label_classification"}
    module = hf.BertForSequenceClassification(hf.BertConfig(**SIZES, **task)).eval()
    rng = np.random.default_rng(0)
    ids, y = rng.integers(1, 40, (N, 6)), rng.integers(0, 2, (N, 3)).astype(float)
    scorer = InfluenceScorer(module, method="gradient_dot").fit(ids, y)
    logits, targets = module(torch.as_tensor(ids)).logits.detach(), torch.as_tensor(y).float()
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    np.testing.assert_allclose(scorer.loss_, losses.mean(1), rtol=1e-5)


@pytest.mark.parametrize("loss", [nn.L1Loss(), nn.MultiMarginLoss()], ids=["absolute", "hinge"])
def test_a_loss_without_curvature_is_no_matter_of_damping(loss):
    """The least damping would make ten million of an influence of nothing."""
    X, y = np.random.default_rng(0).normal(size=(N, 4)), np.arange(N) % 3
    y = y if isinstance(loss, nn.MultiMarginLoss) else np.eye(3)[y]
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    for method in ("auto", "ekfac", "cg"):
        with pytest.raises(ValueError, match="is zero at every row"):
            InfluenceScorer(module, loss=loss, method=method).fit(X, y)
    for method in ("gradient_dot", GGN(curvature="empirical")):
        assert np.isfinite(InfluenceScorer(module, loss=loss, method=method).fit(X, y).loss_).all()
