"""Networks that do unusual things, each against a copy of it changed by plain hooks."""

import copy

import matplotlib
import numpy as np
import pytest
import torch
from sklearn.frozen import FrozenEstimator
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import nn

from skperf import from_module
from skperf.components import ComponentAttributor, ComponentDisplay, Place

matplotlib.use("Agg")


class Of(nn.Module):
    """A network of a function and the parts that it uses."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def images(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 3, 8, 8)).astype(np.float32)


def vectors(n, seed=0):
    return np.random.default_rng(seed).normal(size=(n, 12)).astype(np.float32)


def changed(module, hooks, X):
    """Outputs of a copy whose layers return what functions make of their outputs."""
    copied = copy.deepcopy(module).eval()
    for name, function in hooks.items():
        copied.get_submodule(name).register_forward_hook(
            lambda part, args, output, function=function: function(output)
        )
    with torch.no_grad():
        return copied(torch.as_tensor(X)).numpy()


def without_rows(module, components, mask, X):
    """Outputs of a copy with weight rows zeroed."""
    copied = copy.deepcopy(module).eval()
    with torch.no_grad():
        for component, kept in zip(components, mask, strict=True):
            if not kept:
                copied.get_submodule(component.module).weight[component.unit] = 0
        return copied(torch.as_tensor(X)).numpy()


def fitted(module, X, y, **options):
    known = {"output": "logit", "fraction": 0.3, "budget": 24, "random_state": 0, **options}
    module = module.eval() if isinstance(module, nn.Module) else module
    return ComponentAttributor(module, **known).fit(X, y)


class Encoder(nn.Module):
    """Leaves its features in a list of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 6, 3, padding=1), []

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        self.kept.append(2 * x)
        return x


def decoded(s, x):
    x = torch.relu(s.middle(s.encoder(x))) + s.encoder.kept.pop()
    return s.head(x.mean((2, 3)))


def normalised(s, x):
    x = torch.relu(s.norm(s.conv(x))).mean((2, 3))
    return s.head(x * s.norm.weight + s.norm.running_var)


def of_single_images(s, x):
    return torch.stack([s.head(torch.relu(s.conv(image)).mean((1, 2))) for image in x])


def mapped(s, x):
    return torch.vmap(lambda image: s.head(torch.relu(s.conv(image)).mean((1, 2))))(x)


def checkpointed(s, x):
    def run(x):
        return torch.relu(s.conv(x))

    kept = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
    return s.head(kept.mean((2, 3)))


def conv(width=6):
    return {"conv": nn.Conv2d(3, width, 3, padding=1), "head": nn.Linear(width, 3)}


UNUSUAL = {
    "leaves features in a list": lambda: Of(
        decoded,
        encoder=Encoder(),
        middle=nn.Conv2d(6, 6, 3, padding=1),
        head=nn.Linear(6, 3),
    ),
    "reads what a normalisation holds": lambda: Of(normalised, norm=nn.BatchNorm2d(6), **conv()),
    "runs images one by one": lambda: Of(of_single_images, **conv()),
    "maps over images": lambda: Of(mapped, **conv()),
    "is checkpointed": lambda: Of(checkpointed, **conv()),
    "normalises by the batch": lambda: Of(
        lambda s, x: s.head(torch.relu(s.norm(s.conv(x))).mean((2, 3))),
        norm=nn.BatchNorm2d(6, track_running_stats=False),
        **conv(),
    ),
}


@pytest.mark.filterwarnings("ignore:gating the network differs")
@pytest.mark.parametrize("kind", UNUSUAL)
def test_filters_of_networks_that_do_unusual_things(kind):
    torch.manual_seed(0)
    module, X, y = UNUSUAL[kind](), images(70), np.arange(70) % 3
    picked = "middle" if "list" in kind else "conv"
    model = fitted(module, X, y, components=picked)
    masks = np.random.default_rng(1).random((5, 6)) > 0.4
    for n in (2, 33, 70):
        truth = [
            without_rows(module, model.components_, mask, X[:n])[range(n), y[:n]] for mask in masks
        ]
        found = model.counterfactual(masks, X[:n], y[:n])
        np.testing.assert_allclose(found, np.stack(truth, 1), atol=2e-6)
        assert np.ptp(truth, axis=0).max() > 1e-3


def test_gradients_through_a_checkpoint_are_those_without():
    torch.manual_seed(0)
    module, X, y = UNUSUAL["is checkpointed"](), images(9), np.arange(9) % 3
    plain = Of(
        lambda s, x: s.head(torch.relu(s.conv(x)).mean((2, 3))), **dict(module.named_children())
    )
    found, truth = (
        fitted(m, X, y, components="conv", method="gradient").attributions_ for m in (module, plain)
    )
    np.testing.assert_allclose(found, truth, atol=1e-6)


class Head(nn.Module):
    """One head of attention, a module of its own."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 9)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT).softmax(-1) @ v


class Heads(nn.Module):
    """Heads in a list, or mixed by a parameter before they meet the values."""

    def __init__(self, talking):
        super().__init__()
        self.heads = nn.ModuleList([] if talking else [Head() for _ in range(4)])
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.mix = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        if len(self.heads):
            return self.out(torch.cat([head(x) for head in self.heads], -1))
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4)
        weights = torch.einsum("hg,bgts->bhts", self.mix, (q @ k.mT).softmax(-1))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("talking", [False, True])
def test_heads_of_a_module_each_and_heads_that_talk_are_found_once(talking):
    torch.manual_seed(0)
    module = Of(
        lambda s, x: s.head((x + s.attention(x)).mean(1)),
        attention=Heads(talking),
        head=nn.Linear(12, 3),
    )
    X, y = np.random.default_rng(0).normal(size=(9, 5, 12)).astype(np.float32), np.arange(9) % 3
    model = fitted(module, X, y, components="attention_heads")
    assert [(c.module, c.unit) for c in model.components_] == [("attention", u) for u in range(4)]
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.attention.out.weight[:, 3:6] = 0
        truth = copied(torch.as_tensor(X)).numpy()[range(9), y]
    np.testing.assert_allclose(model.counterfactual([1, 0, 1, 1])[:, 0], truth, atol=2e-6)


def routed(s, x):
    gates = s.gate(x).softmax(-1)
    chosen, made = gates.argmax(-1), x.new_zeros(len(x), 12)
    for number, expert in enumerate(s.experts):
        rows = (chosen == number).nonzero()[:, 0]
        made = made.index_add(0, rows, expert(x[rows]) * gates[rows, number, None])
    return s.head(torch.relu(made))


def settles(s, x):
    for _ in range(6):
        x = x + torch.tanh(s.layer(x))
        if x.norm() > 35:  # all rows of a pass decide together
            break
    return s.head(x)


def test_rows_that_decide_together_are_never_stacked():
    torch.manual_seed(0)
    module = Of(settles, layer=nn.Linear(12, 12), head=nn.Linear(12, 3)).eval()
    X, y = vectors(5), np.arange(5) % 3
    with pytest.warns(UserWarning, match="the plain path is used"):
        model = fitted(module, X, y)
    masks = np.random.default_rng(1).random((6, 12)) > 0.4
    expected = [without_rows(module, model.components_, mask, X)[range(5), y] for mask in masks]
    np.testing.assert_allclose(model.counterfactual(masks), np.stack(expected, 1), atol=1e-5)


class Product(nn.Module):
    """An adapter whose map is a product of parameters that no layer holds."""

    def __init__(self, base):
        super().__init__()
        self.base, shape = base, base.weight.shape
        self.factors = nn.ParameterDict({str(i): nn.Parameter(torch.randn(shape)) for i in (0, 1)})

    def forward(self, x):
        return self.base(x) + nn.functional.linear(x, self.factors["0"] * self.factors["1"])


def attends(s, x):
    query, key, value = s.mix(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
    heads = nn.functional.scaled_dot_product_attention(query, key, value)
    return s.head((x + s.out(heads.transpose(1, 2).flatten(2))).mean(1))


def test_heads_are_gone_from_adapters_that_hold_parameters_of_their_own():
    torch.manual_seed(0)
    parts = {"mix": nn.Linear(12, 36), "out": Product(nn.Linear(12, 12)), "head": nn.Linear(12, 3)}
    module = Of(attends, **parts).eval()
    X, y = np.random.default_rng(0).normal(size=(5, 6, 12)).astype(np.float32), np.arange(5) % 3
    model = fitted(module, X, y, components="attention_heads", fraction=0.5)
    assert model.n_components_ == 3
    for mask in np.eye(3, dtype=bool):
        copied = copy.deepcopy(module)
        kept = torch.as_tensor(np.repeat(mask, 4)).float()
        copied.out.register_forward_pre_hook(lambda part, args, kept=kept: args[0] * kept)
        with torch.no_grad():
            expected = copied(torch.as_tensor(X)).numpy()
        np.testing.assert_allclose(
            model.counterfactual(mask)[:, 0], expected[range(5), y], atol=1e-5
        )
        edited = model.ablate(mask).decision_function(X)
        np.testing.assert_allclose(edited, expected, atol=1e-5)
    assert model.path_ == "gates"


def test_places_at_the_projection_of_torchs_attention_are_reached_on_both_paths():
    torch.manual_seed(0)
    parts = {"attend": nn.MultiheadAttention(12, 3, batch_first=True), "head": nn.Linear(12, 3)}
    module = Of(lambda s, x: s.head((x + s.attend(x, x, x)[0]).mean(1)), **parts).eval()
    X, y = np.random.default_rng(0).normal(size=(5, 6, 12)).astype(np.float32), np.arange(5) % 3
    place = Place("attend.out_proj", "input", dim=-1, width=2)
    model = fitted(module, X, y, components=place)
    assert model.path_ == "gates"
    mask = np.arange(6) % 2 == 0
    copied = copy.deepcopy(module)
    with torch.no_grad():
        copied.attend.out_proj.weight[:, ~np.repeat(mask, 2)] = 0
        expected = copied(torch.as_tensor(X)).numpy()
    np.testing.assert_allclose(model.counterfactual(mask)[:, 0], expected[range(5), y], atol=1e-5)
    assert model.score() > 0.5


def test_means_are_over_the_rows_that_reach_a_layer():
    torch.manual_seed(0)
    experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
    module = Of(routed, gate=nn.Linear(12, 3), experts=experts, head=nn.Linear(12, 3)).eval()
    X = vectors(150)
    X = X[np.argsort(module.gate(torch.as_tensor(X)).argmax(1).numpy(), kind="stable")]
    y = np.arange(150) % 3
    # some batches of the rows pass an expert by
    model = fitted(module, X, y, components=["experts.0", "experts.2"], ablation="mean")
    mask = np.arange(24) % 5 > 1
    means = {}
    for name in ("experts.0", "experts.2"):
        changed(module, {name: lambda out, name=name: means.update({name: out.mean(0)})}, X)
    kept = torch.as_tensor(mask)
    truth = changed(
        module,
        {
            "experts.0": lambda out: torch.where(kept[:12], out, means["experts.0"]),
            "experts.2": lambda out: torch.where(kept[12:], out, means["experts.2"]),
        },
        X,
    )
    np.testing.assert_allclose(model.counterfactual(mask)[:, 0], truth[range(150), y], atol=2e-6)


def written_to(s, x):
    x = s.first(x)
    kept = torch.relu(s.second(x))
    x[:, :4] += kept[:, :4]
    return s.head(x)


def test_means_are_of_what_a_layer_returned_and_not_of_what_was_written_to_it_later():
    torch.manual_seed(0)
    parts = {"first": nn.Linear(12, 8), "second": nn.Linear(8, 8), "head": nn.Linear(8, 3)}
    module, X, y = Of(written_to, **parts).eval(), vectors(20), np.arange(20) % 3
    model = fitted(module, X, y, components="first", ablation="mean")
    mask = np.arange(8) % 3 > 0
    mean = module.first(torch.as_tensor(X)).mean(0).detach()
    truth = changed(module, {"first": lambda out: torch.where(torch.as_tensor(mask), out, mean)}, X)
    np.testing.assert_allclose(model.counterfactual(mask)[:, 0], truth[range(20), y], atol=2e-6)


def as_often_as_asked(s, x):
    for _ in range(int(3 * x[0, 0].abs()) + 1):
        x = torch.tanh(s.layer(x))
    return s.head(x)


def test_no_mean_stands_in_for_calls_that_the_donors_do_not_make():
    module = Of(as_often_as_asked, layer=nn.Linear(12, 12), head=nn.Linear(12, 3))
    X, y = vectors(20), np.arange(20) % 3
    X[:, 0], X[-1, 0] = 0.1, 2.0
    with pytest.raises(ValueError, match="runs more often for some rows than for the donors"):
        fitted(module, X, y, components="layer", ablation="mean").counterfactual(
            np.zeros(12), X[-1:], y[-1:]
        )


def test_a_lasting_edit_counts_calls_anew_after_a_pass_that_was_broken_off():
    torch.manual_seed(0)
    module = Of(
        lambda s, x: s.head(torch.tanh(s.layer(torch.tanh(s.layer(x)) + 1))),
        layer=nn.Linear(12, 12),
        head=nn.Linear(12, 3),
    )
    X, y = vectors(20), np.arange(20) % 3
    edited = fitted(module, X, y, components="layer", ablation="mean").ablate(np.arange(12) % 3 > 0)
    before, inner = edited.decision_function(X), edited.to_module()

    def breaks(*_):
        raise KeyboardInterrupt

    with inner.layer.register_forward_hook(breaks), pytest.raises(KeyboardInterrupt):
        inner(torch.as_tensor(X))
    np.testing.assert_array_equal(inner(torch.as_tensor(X)).detach().numpy(), before)


def cooled(outputs):
    return (outputs / 3).softmax(-1)


def of_each(outputs):
    return torch.sigmoid(outputs)


def both(outputs):
    return torch.stack([1 - torch.sigmoid(outputs / 4), torch.sigmoid(outputs / 4)], 1)


class Scores(nn.Module):
    def __init__(self, n_outputs=3, *, softmax=False):
        super().__init__()
        self.hidden, self.head = nn.Linear(12, 6), nn.Linear(6, n_outputs)
        self.softmax = softmax

    def forward(self, x):
        x = self.head(torch.relu(self.hidden(x)))
        return x.softmax(-1) if self.softmax else x.squeeze(-1)


@pytest.mark.parametrize("output", ["proba", "log_odds"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (NeuralNetClassifier, {"criterion": nn.CrossEntropyLoss, "predict_nonlinearity": cooled}),
        (NeuralNetClassifier, {"criterion": nn.CrossEntropyLoss, "predict_nonlinearity": of_each}),
        (NeuralNetClassifier, {"module__softmax": True, "predict_nonlinearity": cooled}),
        (NeuralNetBinaryClassifier, {"module__n_outputs": 1, "predict_nonlinearity": both}),
    ],
)
def test_probabilities_are_those_that_a_net_of_its_own_nonlinearity_predicts(kind, options, output):
    binary = kind is NeuralNetBinaryClassifier
    X, y = vectors(20), np.arange(20) % (2 if binary else 3)
    net = kind(Scores, max_epochs=1, train_split=None, verbose=0, **options)
    net.fit(X, y.astype(np.float32) if binary else y)
    model = ComponentAttributor(
        FrozenEstimator(net), output=output, method="loo", fraction=0.3, random_state=0
    ).fit(X, y)

    def answered():
        p = net.predict_proba(X)[range(20), y]
        return p if output == "proba" else np.log(p / (1 - p))

    before, edited = answered(), model.edit([0, 1, 2], k=1)
    np.testing.assert_allclose(model.baseline_output_, before, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        net.module_.hidden.weight[2] = 0
    np.testing.assert_allclose(model.attributions_[:, 2], before - answered(), atol=1e-5)
    raw = edited.module(torch.as_tensor(X, dtype=torch.float32)).detach()
    own = options["predict_nonlinearity"](raw)
    np.testing.assert_allclose(edited.predict_proba(X), own.numpy(), atol=1e-6)


def test_a_picture_keeps_kinds_of_a_module_apart():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    places = [Place("0", name="behind"), Place("0", "input", name="before", n_units=6)]
    model = fitted(module, vectors(20), np.arange(20) % 3, components=places, method="loo")
    display = ComponentDisplay.from_estimator(model)
    shown = display.image_.get_array().reshape(2, 6)
    np.testing.assert_allclose(shown.ravel(), model.attributions_.mean(0), rtol=1e-6)


def small_gpt(kind):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=4, num_labels=3, pad_token_id=0
    )
    torch.manual_seed(0)
    return getattr(transformers, kind)(config).eval()


def tokens(n):
    return np.random.default_rng(0).integers(1, 50, (n, 7))


def test_heads_of_an_edited_network_are_found_and_do_nothing():
    module, X, y = small_gpt("GPT2ForSequenceClassification"), tokens(12), np.arange(12) % 3
    model = fitted(module, X, y, components="attention_heads")
    mask = np.arange(8) % 3 > 0
    again = ComponentAttributor(
        model.ablate(mask), components="attention_heads", output="logit", method="loo"
    ).fit(X, y)
    assert len(again.components_) == 8
    assert not again.attributions_[:, ~mask].any()
    assert np.abs(again.attributions_[:, mask]).max(0).min() > 1e-5


def surprise(outputs, y, X):
    return outputs.log_softmax(-1)[:, :-1].gather(2, X[:, 1:, None])[..., 0]


def next_token(outputs, y):
    return outputs[:, -1].gather(1, y[:, None])[:, 0]


def test_outputs_of_every_position_read_rows_as_they_were_given():
    module, X = small_gpt("GPT2LMHeadModel"), tokens(9)
    model = fitted(
        from_module(module), X, None, components="attention_heads", output=surprise, method="loo"
    )
    copied, given = copy.deepcopy(module), torch.as_tensor(X)
    with torch.no_grad():
        copied.transformer.h[1].attn.c_proj.weight[4:8] = 0
        fall = [surprise(m(given).logits, None, given).numpy() for m in (module, copied)]
    np.testing.assert_allclose(model.attributions_[..., 5], fall[0] - fall[1], atol=1e-5)


def test_labels_of_another_shape_than_those_of_fit_are_not_predicted():
    module, X = small_gpt("GPT2LMHeadModel"), tokens(9)
    classifier = from_module(module, range(50))
    model = fitted(classifier, X, X[:, 0], components="attention_heads", output=next_token)
    assert model.attribute(X[:2], X[:2, 0]).shape == (2, 8)
    with pytest.raises(ValueError, match=r"of shape \(2, 7\), where fit was given some"):
        model.transform(X[:2])
