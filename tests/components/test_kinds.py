"""Architectures, rows and outputs of every kind, against ablation by hand."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from skperf import from_module
from skperf.components import Ablation, Component, ComponentAttributor, Place, load_attributions
from tests.components.networks import Residual, linear, made

CLOSE = {"atol": 1e-5}


def setting(module, shape, n=10, seed=0, **options):
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(n, *shape)).astype(np.float32), np.arange(n) % 3
    options = {"output": "logit", "budget": 30, "fraction": 0.2, "random_state": 0, **options}
    return X, y, ComponentAttributor(module.eval(), **options)


def truth(module, X, y, cut, masks):
    """Logits of copies that a function has cut by hand, (n, m)."""
    columns = []
    for mask in masks:
        own = copy.deepcopy(module)
        with torch.no_grad():
            cut(own, torch.as_tensor(np.asarray(mask, bool)))
            columns.append(own(torch.as_tensor(X))[range(len(y)), y].numpy())
    return np.stack(columns, 1)


def some_masks(n, m=6):
    return np.random.default_rng(5).random((m, n)) > 0.3


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.run, self.up, self.head = nn.LSTM(5, 7), nn.Linear(7, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.up(self.run(x.transpose(0, 1))[0])).mean(0))


class Windows(nn.Module):
    """Windows of every row stand one behind the other along the first dimension."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x):
        windows = x.unflatten(1, (3, 2)).flatten(0, 1)
        hidden = torch.relu(self.up(windows)).unflatten(0, (len(x), 3))
        return self.head(hidden.mean((1, 2)))


class Routed(nn.Module):
    """Each expert sees the rows that are sent to it, however many these are."""

    def __init__(self):
        super().__init__()
        self.router, self.head = nn.Linear(6, 2), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))

    def forward(self, x):
        chosen = self.router(x).argmax(1)
        hidden = x.new_zeros(len(x), 8)
        for number, expert in enumerate(self.experts):
            hidden[chosen == number] = torch.relu(expert(x[chosen == number]))
        return self.head(hidden)


class Towers(nn.Module):
    """Classes are embedded anew in every pass, beside the rows."""

    def __init__(self):
        super().__init__()
        self.register_buffer("words", torch.randn(3, 5))
        self.word, self.image = nn.Linear(5, 8), nn.Linear(6, 8)

    def forward(self, x):
        return torch.tanh(self.image(x)) @ torch.tanh(self.word(self.words)).T


class Functional(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(F.linear(x, self.up.weight, self.up.bias)))


def rows_of(names):
    def cut(own, mask):
        for name, kept in zip(names, mask.split(len(mask) // len(names)), strict=True):
            own.get_submodule(name).weight[~kept] = 0

    return cut


KINDS = {
    "time first": (TimeFirst, (9, 5), ["up"], 12),
    "windows": (Windows, (6, 4), ["up"], 12),
    "routed": (Routed, (6,), ["experts.0", "experts.1"], 16),
    "towers": (Towers, (6,), ["word", "image"], 16),
    "functional": (Functional, (6,), ["up"], 8),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 9, 10, 40])
def test_rows_are_found_wherever_they_are(kind, n):
    make, shape, names, n_components = KINDS[kind]
    torch.manual_seed(0)
    module = make()
    X, y, model = setting(module, shape, n, components=names)
    model.fit(X, y)
    assert (model.n_components_, model.path_) == (n_components, "gates")
    masks = some_masks(n_components)
    expected = truth(module, X, y, rows_of(names), masks)
    np.testing.assert_allclose(model.counterfactual(masks), expected, **CLOSE)
    alone = ComponentAttributor(module, components=names, output="logit", method="loo").fit(X, y)
    singles = 1 - np.eye(n_components)
    fall = model.baseline_output_[:, None] - truth(module, X, y, rows_of(names), singles)
    np.testing.assert_allclose(alone.attributions_, fall, **CLOSE)


class Adapted(nn.Module):
    """A linear layer and a low-rank adapter that read the same rows."""

    def __init__(self, inner, rank=2):
        super().__init__()
        self.base, self.drop = inner, nn.Dropout(0.1)
        self.down = nn.Linear(inner.in_features, rank, bias=False)
        self.up = nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(self.drop(x)))


class Attending(nn.Module):
    def __init__(self, pool="mean"):
        super().__init__()
        self.pool, self.embed, self.head = pool, nn.Embedding(20, 8), nn.Linear(8, 3)
        self.mix, self.out = nn.Linear(8, 24), Adapted(nn.Linear(8, 8))
        self.layer = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2
        )

    def forward(self, ids):
        x = self.embed(ids)
        query, key, value = (
            part.unflatten(2, (4, 2)).transpose(1, 2) for part in self.mix(x).chunk(3, 2)
        )
        heads = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = self.layer(x + self.out(heads), src_key_padding_mask=ids == 0)
        return self.head(x[:, 0])


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@NESTED
@pytest.mark.parametrize("n", [2, 40])
def test_heads_through_adapters_and_padded_encoders(n):
    torch.manual_seed(0)
    module = Attending()
    X, y, model = setting(module, (7,), n, components="attention_heads")
    X = np.random.default_rng(0).integers(1, 20, (n, 7))
    X[:, 5:] = 0
    model.fit(X, y)
    assert list(model.components_["unit"]) == [0, 1, 2, 3, 0, 1, 0, 1]

    def cut(own, mask):
        for part in (own.out.base, own.out.down):
            part.weight.view(-1, 4, 2)[:, ~mask[:4]] = 0
        for layer, kept in zip(own.layer.layers, mask[4:].split(2), strict=True):
            layer.self_attn.out_proj.weight.view(8, 2, 4)[:, ~kept] = 0

    masks = some_masks(8)
    np.testing.assert_allclose(
        model.counterfactual(masks), truth(module, X, y, cut, masks), **CLOSE
    )
    edited = model.ablate(masks[1]).decision_function(X)[range(n), y]
    np.testing.assert_allclose(edited, model.counterfactual(masks[1])[:, 0], **CLOSE)
    np.testing.assert_allclose(
        model.counterfactual(np.ones(8))[:, 0], model.baseline_output_, **CLOSE
    )


def test_tied_convolutions_with_normalisations_of_their_own_stay_tied():
    torch.manual_seed(0)
    first, second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    second.weight = first.weight
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    module = nn.Sequential(
        first, norms[0], nn.ReLU(), second, norms[1], nn.Flatten(), nn.Linear(100, 3)
    )
    X, y, model = setting(module, (4, 5, 5), components="conv_filters", fraction=0.3)
    masks = some_masks(4)
    np.testing.assert_allclose(
        model.fit(X, y).counterfactual(masks), truth(module, X, y, rows_of(["0"]), masks), **CLOSE
    )


class Twofold(nn.Module):
    """Calls one layer twice."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.up(torch.tanh(self.up(x)))))


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_each_call_of_a_layer_has_its_own_stand_in(kind):
    torch.manual_seed(0)
    module = Twofold()
    X, y, model = setting(module, (6,), ablation=kind, components="up")
    model.fit(X, y)
    seen = []
    handle = module.up.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
    with torch.no_grad():
        module(torch.as_tensor(X))
    handle.remove()
    given = [out.mean(0) if kind == "mean" else out[0] for out in seen]
    calls = []

    def replace(_m, _a, out):
        out = out.clone()
        out[:, 2] = given[len(calls)][2]
        calls.append(1)
        return out

    own = copy.deepcopy(module)
    own.up.register_forward_hook(replace)
    with torch.no_grad():
        expected = own(torch.as_tensor(X))[range(10), y].numpy()
    mask = np.arange(6) != 2
    np.testing.assert_allclose(model.counterfactual(mask)[:, 0], expected, **CLOSE)
    logits = pickle.loads(pickle.dumps(model.ablate(mask))).to_module()(torch.as_tensor(X))
    np.testing.assert_allclose(logits[range(10), y].detach().numpy(), expected, **CLOSE)


class Fooling(nn.Module):
    """Reads a layer's weight beside calling it: a gate at its output is not the whole truth."""

    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.up(x)) + self.up.weight.sum(1))


def test_where_gates_are_not_the_truth_the_plain_path_is_used_and_named():
    torch.manual_seed(0)
    module = Fooling()
    X, y, model = setting(module, (6,), components="up")
    with pytest.warns(UserWarning, match="differs from zeroing its weights .* plain path is used"):
        model.fit(X, y)
    assert model.path_ == "plain"
    assert model.verified_ > 0.01
    masks = some_masks(8)
    np.testing.assert_allclose(
        model.counterfactual(masks), truth(module, X, y, rows_of(["up"]), masks), **CLOSE
    )
    assert model.score(n_masks=20) > 0.9
    with pytest.warns(UserWarning, match="plain path"):
        gradient = ComponentAttributor(
            module, components="up", output="logit", method="gradient"
        ).fit(X, y)
    scale = torch.ones(8, requires_grad=True)
    weight = module.up.weight * scale[:, None]
    outputs = module.head(
        torch.relu(F.linear(torch.as_tensor(X), weight, module.up.bias)) + weight.sum(1)
    )
    expected = [
        torch.autograd.grad(outputs[i, y[i]], scale, retain_graph=True)[0].numpy()
        for i in range(10)
    ]
    np.testing.assert_allclose(gradient.attributions_, expected, **CLOSE)


def test_verified_is_rounding_for_the_rest():
    module, X, y = made(Residual)
    model = ComponentAttributor(module, fraction=0.2, budget=20).fit(X, y)
    assert 0 <= model.verified_ < 1e-12
    assert model.coverage_["kinds"] == {"conv_filter": 12}
    assert model.coverage_["left_out"] == ["out"]
    assert 0 < model.coverage_["share"] < 1


class Mixed(nn.Module):
    """Attention whose heads are normalised together: nobody can tell them apart."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.Linear(8, 24), nn.LayerNorm(8)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        query, key, value = (
            part.unflatten(2, (4, 2)).transpose(1, 2) for part in self.mix(x).chunk(3, 2)
        )
        heads = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.head(self.out(self.norm(heads)).mean(1))


def test_auto_says_where_it_does_not_see_the_heads():
    torch.manual_seed(0)
    X, y, model = setting(Mixed(), (5, 8), components="auto")
    with pytest.warns(UserWarning, match="no heads were found in the attention"):
        model.fit(X, y)
    assert model.coverage_["attention_not_recognised"] == [""]


def cut_columns(own, mask):
    own.up.weight[:, ~mask] = 0


def cut_block(own, mask):
    for parameter in own.up.parameters():
        parameter *= float(mask[0])


def cut_pairs(own, mask):
    own.up.weight[2:10] *= mask.repeat_interleave(2)[:, None]


def cut_units(own, mask):
    own.run.register_forward_hook(lambda _m, _a, out: (out[0] * mask, out[1]))


PLACES = {
    "lstm units": (Place("run", dim=2, name="unit"), cut_units, 7),
    "inputs": (Place("up", "input", dim=2), cut_columns, 7),
    "weight columns": (Place("up", "weight"), cut_columns, 7),
    "a whole block": (Place("up", dim=-1, width=None), cut_block, 1),
    "pairs": (Place("up", "weight", dim=0, start=2, width=2, n_units=4), cut_pairs, 4),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("method", ["auto", "loo"])
def test_declared_places(name, method):
    place, cut, n_components = PLACES[name]
    torch.manual_seed(0)
    module = TimeFirst()
    X, y, model = setting(module, (9, 5), components=[place], method=method, fraction=0.05)
    model.fit(X, y)
    assert model.n_components_ == n_components
    masks = some_masks(n_components)
    expected = truth(module, X, y, cut, masks)
    np.testing.assert_allclose(model.counterfactual(masks), expected, **CLOSE)
    logits = model.ablate(masks[0]).to_module()(torch.as_tensor(X)).detach().numpy()
    np.testing.assert_allclose(logits[range(10), y], expected[:, 0], **CLOSE)


class OnDisk(Dataset):
    def __init__(self, X):
        self.X = X

    def __len__(self):
        return len(self.X)

    def __getitem__(self, i):
        return torch.as_tensor(self.X[i])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, values, weights):
        return self.head((torch.relu(self.up(values)) * weights[:, :, None]).sum(1))


@pytest.mark.parametrize("container", ["dict", "tuple", "dataset", "half"])
def test_rows_of_every_kind(container):
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    values, weights = rng.normal(size=(2, 10, 4, 6)).astype(np.float32), rng.random((10, 4))
    given = {"values": values[0], "weights": weights.astype(np.float32)}
    module, y = TwoInputs().eval(), np.arange(10) % 3
    plain = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    options = {"output": "logit", "fraction": 0.2, "budget": 30, "random_state": 0}
    if container in ("dict", "tuple"):
        X = given if container == "dict" else tuple(given.values())
        with torch.no_grad():
            expected = module(*(torch.as_tensor(v) for v in given.values()))[range(10), y]
    else:
        X = OnDisk(values[0]) if container == "dataset" else values[0]
        if container == "half":
            plain = plain.to(torch.bfloat16)
        module = plain
        with torch.no_grad():
            expected = copy.deepcopy(plain).float()(torch.as_tensor(values[0]))[range(10), y]
    model = ComponentAttributor(module, **options).fit(X, y)
    np.testing.assert_allclose(model.baseline_output_, expected.numpy(), **CLOSE)
    few = {k: v[:3] for k, v in X.items()} if container == "dict" else None
    few = tuple(v[:3] for v in X) if container == "tuple" else few
    few = values[0][:3] if few is None else few
    assert model.transform(few).shape == (3, 8)
    assert model.ablate(np.ones(8)).predict(few).shape == (3,)
    assert model.partial_fit(X, y).n_forward_equivalents_ == 60


def test_outputs_of_every_kind():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(12, 6)).astype(np.float32), rng.normal(size=12).astype(np.float32)
    one = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)).eval()
    three = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    options = {"budget": 30, "fraction": 0.2, "random_state": 0}
    with torch.no_grad():
        value, logits = one(torch.as_tensor(X)).numpy(), three(torch.as_tensor(X)).numpy()
    regressor = from_module(one, loss="squared_error")
    for output, expected in (
        ("value", value[:, 0]),
        ("loss", (value[:, 0] - y) ** 2),
        (lambda out: out[:, 0] * 2, 2 * value[:, 0]),
        (lambda out, goal: out[:, 0] * goal, value[:, 0] * y),
        (lambda out, goal, rows: out[:, 0] + rows[:, 1], value[:, 0] + X[:, 1]),
    ):
        model = ComponentAttributor(regressor, output=output, **options).fit(X, y)
        np.testing.assert_allclose(model.baseline_output_, expected, rtol=1e-4, atol=1e-5)
    # of a bare module with one output, which is taken for a classifier of two labels
    bare = ComponentAttributor(one, output="value", **options).fit(X)
    np.testing.assert_allclose(bare.baseline_output_, value[:, 0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="network with one output a row, and this one has"):
        ComponentAttributor(three, output="value", **options).fit(X)
    labels = rng.integers(0, 2, (12, 3))
    many = ComponentAttributor(
        from_module(three, loss="binary_cross_entropy"), output="loss", **options
    ).fit(X, labels)
    expected = F.binary_cross_entropy_with_logits(
        torch.as_tensor(logits), torch.as_tensor(labels).float(), reduction="none"
    ).mean(1)
    np.testing.assert_allclose(many.baseline_output_, expected, rtol=1e-4)
    several = ComponentAttributor(three, output=lambda out: out, **options).fit(X)
    assert several.attributions_.shape == (12, 3, 8)
    np.testing.assert_allclose(several.baseline_output_, logits, rtol=1e-4, atol=1e-5)
    single = ComponentAttributor(three, output=lambda out: out[:, 1], **options).fit(X)
    several.set_params(method="loo").fit(X)
    single.set_params(method="loo").fit(X)
    np.testing.assert_allclose(several.attributions_[:, 1], single.attributions_, **CLOSE)
    assert several.counterfactual(np.ones((2, 8))).shape == (12, 3, 2)
    assert several.edit([0, 1], k=2).edit_report_["k"] == 2
    with pytest.raises(ValueError, match="loss='binary_cross_entropy'"):
        ComponentAttributor(three, output="loss", **options).fit(X, labels)
    with pytest.raises(ValueError, match="pass y"):
        ComponentAttributor(regressor, output="loss", **options).fit(X, y).transform(X)
    with pytest.raises(ValueError, match="predicts no classes"):
        ComponentAttributor(regressor, output="margin", **options).fit(X, np.arange(12) % 2)


def test_maps_and_positions():
    torch.manual_seed(0)
    X = np.random.default_rng(0).normal(size=(8, 3, 6, 6)).astype(np.float32)
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    model = ComponentAttributor(
        from_module(module, range(4)),
        output=lambda maps: maps[:, 1].mean((1, 2)),
        method="loo",
        components="0",
    ).fit(X)
    own = copy.deepcopy(module)
    with torch.no_grad():
        own[0].weight[5] = 0
        fall = (module(torch.as_tensor(X)) - own(torch.as_tensor(X)))[:, 1].mean((1, 2))
    np.testing.assert_allclose(model.attributions_[:, 5], fall, **CLOSE)
    assert model.transform(X[:2]).shape == (2, 8)
    with pytest.raises(ValueError, match="positions"):
        ComponentAttributor(
            from_module(module, range(4)),
            output=lambda maps: maps[:, 1].mean((1, 2)),
            ablation=Ablation("zero_output", positions=[0]),
        ).fit(X)


@NESTED
def test_trained_on_an_edit_keeps_its_rows_at_zero():
    for heads in (False, True):
        torch.manual_seed(0)
        module = Attending() if heads else Twofold()
        X, y, model = setting(module, (6,), components="attention_heads" if heads else "up")
        X = np.random.default_rng(0).integers(1, 20, (10, 7)) if heads else X
        model.fit(X, y)
        mask = np.ones(model.n_components_)
        mask[1] = 0
        own = model.ablate(mask).to_module()
        before = own(torch.as_tensor(X)).detach()
        optimizer = torch.optim.Adam(own.parameters(), 0.05, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(own(torch.as_tensor(X)), torch.as_tensor(y)).backward()
            optimizer.step()
        gone = own.out.base.weight[:, 2:4] if heads else own.up.weight[1]
        assert bool((gone == 0).all())
        assert not torch.allclose(own(torch.as_tensor(X)), before)
        assert own.double().to("cpu")(torch.as_tensor(X if heads else X.astype(float))).dtype == (
            torch.float64
        )


@pytest.mark.parametrize("kind", ["mean", "resample"])
def test_edits_with_stand_ins_can_be_cast_and_trained(kind):
    module, X, y = made(Residual)
    model = ComponentAttributor(
        module, ablation=Ablation(kind, per="position" if kind == "mean" else "all"), budget=20
    ).fit(X, y)
    own = model.ablate(np.arange(12) != 3).to_module().float()
    own(torch.as_tensor(X).float()).sum().backward()
    assert all(p.grad is not None for p in own.parameters())
    with pytest.raises(ValueError, match="which a lasting edit does not know"):
        ComponentAttributor(module, ablation=Ablation("mean", per="class"), budget=20).fit(
            X, y
        ).ablate(np.ones(12))


def test_patching_by_donors_of_ones_own():
    module, X, y = made(Residual)
    clean = X.copy()
    corrupt = X[::-1] * 0.5
    model = ComponentAttributor(
        module,
        ablation=Ablation("resample", per="row", donors=corrupt),
        output="logit",
        method="loo",
    ).fit(clean, y)
    assert np.abs(model.attributions_).max() > 0
    with pytest.raises(ValueError, match="one for each row of fit"):
        model.attribute(X[:3], y[:3])
    with pytest.raises(ValueError, match="needs donors"):
        ComponentAttributor(module, ablation=Ablation("resample", per="row")).fit(X, y)
    with pytest.raises(ValueError, match="goes with no ablation"):
        ComponentAttributor(module, ablation=Ablation("zero", per="class")).fit(X, y)


def test_pairs_of_a_network_that_multiplies_two_gates():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 6, bias=False)

        def forward(self, x):
            hidden = self.up(x)
            value = hidden[:, 0] * hidden[:, 1] + hidden.sum(1)
            return torch.stack([value, -value], 1)

    torch.manual_seed(0)
    module = Product()
    X, _, model = setting(
        module, (4,), components="up", method="regression", budget=600, fraction=0.3
    )
    model.fit(X, np.zeros(10, int))
    pairs = model.interactions(6)
    assert pairs.pairs.shape == (15, 2)
    with torch.no_grad():
        hidden = module.up(torch.as_tensor(X)).numpy()
    where = int(np.flatnonzero((pairs.pairs == [0, 1]).all(1))[0])
    np.testing.assert_allclose(pairs.values[:, where], -hidden[:, 0] * hidden[:, 1], atol=0.05)
    np.testing.assert_allclose(np.delete(pairs.values, where, 1), 0, atol=0.1)
    with pytest.raises(ValueError, match="need outcomes of random masks"):
        model.set_params(method="loo").fit(X, np.zeros(10, int)).interactions(2)


def test_settings_are_those_of_fit():
    module, X, y = made(Residual)
    options = {"fraction": 0.2, "budget": 60, "random_state": 0}
    model = ComponentAttributor(module, warm_start=True, **options).fit(X, y)
    before = model.attribute(X[:3], y[:3])
    model.set_params(output="loss", ablation="mean")
    np.testing.assert_array_equal(model.attribute(X[:3], y[:3]), before)
    with pytest.raises(ValueError, match="ablation, output changed since fit"):
        model.partial_fit(X, y)
    fresh = ComponentAttributor(module, output="loss", ablation="mean", **options).fit(X, y)
    np.testing.assert_array_equal(model.fit(X, y).attributions_, fresh.attributions_)


def test_other_weights_than_those_of_fit_are_refused():
    module, X, y = linear()
    model = ComponentAttributor(module, fraction=0.2, budget=20).fit(X, y)
    module.hidden.weight.data[0] += 1
    for call in (model.transform, model.score, lambda X: model.counterfactual(np.ones(8))):
        with pytest.raises(ValueError, match="not those that fit has seen"):
            call(X)
    assert model.predict_counterfactual(np.ones(8)).shape == (30, 1)


def test_attributions_go_to_a_file_and_come_back(tmp_path):
    module, X, y = made(Residual)
    model = ComponentAttributor(module, fraction=0.2, budget=20).fit(X, y)
    model.save_attributions(tmp_path / "kept.npz")
    back = load_attributions(tmp_path / "kept.npz")
    np.testing.assert_array_equal(back.attributions, model.attributions_)
    assert list(back.names) == list(model.get_feature_names_out())
    assert back.components[7].module == "conv1"


def test_edits_are_guarded_by_the_worst_group_and_by_any_output():
    module, X, y = made(Residual)
    y = from_module(module).predict(X)
    y[:6] = (y[:6] + 1) % 3
    groups = np.arange(40) % 4
    model = ComponentAttributor(module, fraction=0.2, budget=100, random_state=0).fit(X, y)
    report = model.edit(np.arange(6), guard=(X, y, groups), max_drop=0.05).edit_report_
    assert set(report["groups"]) == {0, 1, 2, 3}
    first, last = report["path"][0], next(s for s in report["path"] if s["k"] == report["k"])
    assert last["guard_score"] >= first["guard_score"] - 0.05
    assert last["guard_score"] == min(last["groups"].values())
    with pytest.raises(ValueError, match="guard must be a pair"):
        model.edit([0], guard=X)
    with pytest.raises(ValueError, match=r"guard has groups of shape \(3,\)"):
        model.edit([0], guard=(X, y, groups[:3]))
    model = ComponentAttributor(
        from_module(module, range(3)), output=lambda out: out[:, 2], fraction=0.2, budget=60
    ).fit(X)
    report = model.edit([0, 1], max_drop=0.05).edit_report_
    last = next(s for s in report["path"] if s["k"] == report["k"])
    assert last["guard_score"] >= report["path"][0]["guard_score"] - 0.05


class Routed(nn.Module):
    """Sends every row through one of three experts."""

    def __init__(self):
        super().__init__()
        self.route = nn.Linear(4, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(3)
        )
        self.out = nn.Linear(4, 3)

    def forward(self, x):
        hidden, chosen = torch.zeros_like(x), self.route(x).argmax(1)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                hidden = hidden.index_add(0, rows, expert(x[rows]))
        return self.out(hidden)


def test_experts_that_the_first_row_passes_by_are_found_and_differentiated():
    torch.manual_seed(0)
    module = Routed().eval()
    X = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    y = np.arange(30) % 3
    model = ComponentAttributor(
        module, components="experts.*.0", budget=30, fraction=0.2, random_state=0
    ).fit(X, y)
    assert model.n_components_ == 15
    mask = np.arange(15) % 4 > 0
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for component in model.components_[~mask]:
            copied.get_submodule(component["module"]).weight[component["unit"]] = 0
        logits = copied(torch.as_tensor(X)).numpy()
    label = logits[np.arange(30), y]
    logits[np.arange(30), y] = -np.inf
    np.testing.assert_allclose(model.counterfactual(mask)[:, 0], label - logits.max(1), atol=1e-5)
    assert model.attributions_.any(0).reshape(3, 5).any(1).all()
    assert model.attribute(X[:1], y[:1]).shape == (1, 15)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.attend(x, x, x)[0]
        return self.head((x + self.down(torch.tanh(self.up(x)))).mean(1))


@pytest.mark.parametrize(
    "words", [["neurons", "mlp_neurons"], ["mlp_neurons", "up"], ["up", "auto"]]
)
def test_a_unit_of_several_names_has_one_gate(words):
    X, y, model = setting(Grouped(), (5, 6), n=7, components=words, method="loo")
    model.fit(X, y)
    names = [(c.module, c.unit) for c in model._study.wiring.components]
    assert len(set(names)) == len(names)
    assert (np.abs(model.attributions_).max(0) > 0).all()


def test_two_places_of_a_module_are_two_rows_of_components():
    module = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Flatten(), nn.Linear(40, 3))
    places = [Place("1", dim=-1), Place("1", dim=1), Place("1", dim=-1, start=2, width=3)]
    X, y, model = setting(module, (5, 6), n=7, components=places)
    model.fit(X, y)
    assert model.n_components_ == 8 + 5 + 2
    masks = np.random.default_rng(1).random((4, 15))

    def cut(own, v):
        own[1].register_forward_hook(
            lambda m, a, out: (
                out
                * v[:8]
                * v[8:13, None]
                * torch.cat([torch.ones(2), v[13:].repeat_interleave(3)])
            )
        )

    for mask, outputs in zip(masks, model.counterfactual(masks).T, strict=True):
        own = copy.deepcopy(module)
        cut(own, torch.as_tensor(mask, dtype=torch.float32))
        with torch.no_grad():
            expected = own(torch.as_tensor(X))[range(7), y].numpy()
        np.testing.assert_allclose(outputs, expected, **CLOSE)
    named = [Place("0", dim=2, name="neuron"), "neurons"]
    with pytest.raises(ValueError, match="tell them apart by name="):
        setting(module, (5, 6), components=named)[2].fit(X, y)
    with pytest.raises(ValueError, match="runs over rows"):
        setting(module, (5, 6), components=Place("1", dim=0))[2].fit(X, y)


def test_a_place_that_the_network_does_not_use_is_warned_of():
    class LastState(nn.Module):
        def __init__(self):
            super().__init__()
            self.run, self.head = nn.LSTM(6, 9, batch_first=True), nn.Linear(9, 3)

        def forward(self, x):
            return self.head(self.run(x)[1][0][-1])

    X, y, model = setting(LastState(), (5, 6), components=Place("run", dim=2))
    with pytest.warns(UserWarning, match="changes no output of the first 8 rows"):
        model.fit(X, y)


@pytest.mark.parametrize("ablation", ["zero", "zero_output", -0.4])
def test_towers_by_vmap(ablation):
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Parameter(torch.randn(3, 6))
            self.first, self.up, self.head = nn.Linear(6, 6), nn.Linear(6, 13), nn.Linear(13, 1)

        def forward(self, x):
            def tower(word):
                return self.head(torch.tanh(self.up(torch.tanh(self.first(x * word)))))[:, 0]

            return torch.vmap(tower)(self.words).T

    module = Towers()
    X, y, model = setting(module, (6,), n=7, components="up", ablation=ablation)
    model.fit(X, y)
    assert model.path_ == "gates"
    scale = ablation if isinstance(ablation, float) else 0.0

    def cut(own, mask):
        own.up.weight[~mask] *= scale
        if ablation == "zero_output":
            own.up.bias[~mask] = 0

    masks = some_masks(13)
    expected = truth(module, X, y, cut, masks)
    np.testing.assert_allclose(model.counterfactual(masks), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"lives within torch\.vmap"):
        setting(module, (6,), components="up", ablation="mean")[2].fit(X, y)


def test_the_second_layer_of_a_low_rank_map_is_no_feed_forward_layer():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(2, 6)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x))

    class Net(Grouped):
        def __init__(self):
            super().__init__()
            self.adapted = Adapted()

        def forward(self, x):
            return super().forward(x + self.adapted(x))

    X, y, model = setting(Net(), (5, 6), n=7)
    assert set(model.fit(X, y).components_.module) == {"attend", "up"}


class Running(Grouped):
    def __init__(self):
        super().__init__()
        self.run = nn.GRU(6, 6, batch_first=True)

    def forward(self, x):
        return super().forward(self.run(x)[0])


@pytest.mark.parametrize(
    "components",
    [
        Place("run", "weight_hh_l0", dim=1),
        [Place("up", "weight", dim=1), Place("up", "weight", dim=0, name="rows")],
        "layers",
    ],
)
def test_no_parameter_that_was_cut_comes_back_in_training(components):
    X, y, model = setting(Running(), (5, 6), components=components, fraction=0.4)
    model.fit(X, y)
    mask = np.ones(model.n_components_)
    mask[::2] = 0
    edited = model.ablate(mask)
    expected = model.counterfactual(mask)[:, 0]
    logits = edited.decision_function(X)[range(10), y]
    np.testing.assert_allclose(logits, expected, **CLOSE)
    own = pickle.loads(pickle.dumps(copy.deepcopy(edited.to_module())))
    optimizer = torch.optim.AdamW(own.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        both = own(torch.as_tensor(X)).sum(0), own(torch.as_tensor(X[:3])).sum(0)
        F.cross_entropy(torch.stack(both), torch.tensor([0, 1])).backward()
        optimizer.step()
    with pytest.raises(RuntimeError):
        own(torch.zeros(2, 3, 4))
    assert not any("weight" in part.__dict__ for part in own.modules())
    again = setting(own, (5, 6), components=components, fraction=0.4)[2].fit(X, y)
    intact, closed = again.counterfactual(np.stack([np.ones(len(mask)), mask])).T
    np.testing.assert_allclose(intact, closed, atol=1e-6)


def test_what_is_cut_beside_the_weights_is_in_the_state():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.run, self.head = nn.GRU(6, 9, batch_first=True), nn.Linear(9, 3)

        def forward(self, x):
            return self.head(self.run(x)[0].mean(1))

    X, y, model = setting(Net(), (5, 6), components=Place("run", dim=2))
    state = model.fit(X, y).ablate(np.arange(9) > 2).to_module().state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        Net().load_state_dict(state)


def test_means_behind_torch_attention_stay_in_an_edit():
    chosen = [Component("attend.out_proj", "neuron", unit) for unit in range(6)]
    X, y, model = setting(Grouped(), (5, 6), components=chosen, ablation="mean")
    mask = np.arange(6) > 2
    logits = model.fit(X, y).ablate(mask).decision_function(X)[range(10), y]
    np.testing.assert_allclose(logits, model.counterfactual(mask)[:, 0], **CLOSE)


def test_losses_of_positions_are_of_their_labels():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.head = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x):
            return self.head(torch.tanh(self.up(x)))

    X, _, model = setting(Tagger(), (5, 6), n=7, components="up", output="loss")
    y = np.random.default_rng(0).integers(0, 4, (7, 5))
    own = copy.deepcopy(model.estimator)
    masks = some_masks(9)
    model.set_params(estimator=from_module(model.estimator, range(4))).fit(X, y)
    with torch.no_grad():
        own.up.weight[~torch.as_tensor(masks[0])] = 0
        losses = F.cross_entropy(
            own(torch.as_tensor(X)).transpose(1, 2), torch.as_tensor(y), reduction="none"
        )
    fast = model.counterfactual(masks[:1])[:, 0]
    np.testing.assert_allclose(fast, losses.mean(1).numpy(), **CLOSE)
    with pytest.raises(ValueError, match="is of one label a row"):
        model.set_params(output="logit").fit(X, y[:, 0])
    with pytest.raises(ValueError, match="is of one label a row"):
        model.fit(X, np.zeros((7, 5, 2), int))


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("name", ["kept.npz", "kept.parquet", "run.1"])
def test_attributions_of_every_shape_go_to_files_under_their_names(tmp_path, name, several):
    X, y, model = setting(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), (6,))
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    model.set_params(output=(lambda outputs: outputs) if several else "logit").fit(X, y)
    model.save_attributions(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name if "kept" in name else "run.1.npz"]
    back = load_attributions(tmp_path / name)
    for key in ("attributions", "stderr", "intercept", "baseline_output"):
        np.testing.assert_array_equal(back[key], getattr(model, f"{key}_"))
    assert list(back.names) == list(model.get_feature_names_out())
    np.testing.assert_array_equal(back.components, model.components_)
