"""Views: the same answers as the module's own, and a module that nobody has touched."""

import copy
import threading
import weakref

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from skperf.backbone.views import own_copy, view

# torch deprecates what users' networks still hold
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning"),
]


def normed():
    return nn.utils.weight_norm(nn.Linear(6, 6))


class Cached(nn.Module):
    """Makes a table at its first call and keeps it, as rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.net, self.table = nn.Linear(6, 6), None

    def forward(self, rows):
        if self.table is None:
            self.table = torch.linspace(0, 1, 6)
        return self.net(rows) * self.table


class Writing(nn.Module):
    """Writes to a buffer and assigns another in forward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(6, 6)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("last", torch.zeros(6))

    def forward(self, rows):
        self.count += 1
        self.last = rows.mean(0)
        return self.net(rows)


class Closing(nn.Module):
    """Holds itself in a closure, a weak reference, a list and a bound method."""

    def __init__(self):
        super().__init__()
        self.net, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)
        self.inner = lambda rows: self.drop(self.net(rows))
        self.parts = [self.net]
        self.up = weakref.ref(self)
        self.lock = threading.Lock()
        self.bound = self.run

    def run(self, rows):
        return self.up().inner(rows)

    def forward(self, rows):
        return self.bound(rows) + self.parts[0](rows)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, 2, dropout=0.5)

    def forward(self, rows):
        return self.lstm(rows)[0]


def shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


def hooked():
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    scale = net[0].weight
    net[0].register_forward_hook(lambda module, args, output: output + scale.sum())
    return net


NETWORKS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)),
    "shared": shared,
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "old weight norm": normed,
    "cached": Cached,
    "writing": Writing,
    "closing": Closing,
    "recurrent": Recurrent,
    "hooked": hooked,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))),
    "traced fx": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU())),
    "attention": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), 2, enable_nested_tensor=False
    ),
}


def state_of(module):
    return {
        "tensors": {n: t.detach().clone() for n, t in module.state_dict().items()},
        "modes": [part.training for part in module.modules()],
        "flags": [p.requires_grad for p in module.parameters()],
        "gradients": [p.grad for p in module.parameters()],
        "hooks": [len(part._forward_hooks) for part in module.modules()],
        "attributes": [dict(part.__dict__) for part in module.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before, after):
    assert before["tensors"].keys() == after["tensors"].keys()
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name])
    assert torch.equal(before["random"], after["random"])
    for key in ("modes", "flags", "hooks"):
        assert before[key] == after[key]
    assert all(a is b for a, b in zip(before["gradients"], after["gradients"], strict=True))
    for ours, theirs in zip(before["attributes"], after["attributes"], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in ours)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_view_answers_as_the_module_in_evaluation_mode_and_leaves_it_alone(name):
    torch.manual_seed(0)
    module = NETWORKS[name]().train()
    plain = getattr(module, "_orig_mod", module)
    rows = torch.randn(5, 3, 6) if name in ("recurrent", "attention") else torch.randn(5, 6)
    before = state_of(plain)
    opened = view(module)
    with torch.no_grad():
        actual = [opened(rows), opened(rows)]
    assert_same(before, state_of(plain))
    assert not any(part.training for part in opened.modules())
    shared_storage = {p.data_ptr() for p in plain.parameters()}
    assert all(p.data_ptr() in shared_storage for p in opened.parameters())
    ours = {id(part) for part in opened.modules()}
    assert not ours & {id(part) for part in plain.modules()}
    with torch.no_grad():
        expected = plain.eval()(rows)  # not through a compiler
    for outputs in actual:
        torch.testing.assert_close(outputs, expected)


def test_a_view_sees_later_changes_of_the_weights():
    module = nn.Linear(6, 6)
    opened = view(module)
    with torch.no_grad():
        module.weight.mul_(2)
    assert torch.equal(opened.weight, module.weight)


def test_ties_stay_ties_and_a_copy_owns_its_weights():
    module = shared()
    opened = view(module)
    assert opened[0] is opened[2]
    copied = own_copy(module)
    assert copied[0] is copied[2]
    assert copied[0].weight.data_ptr() != module[0].weight.data_ptr()
    assert all(p.requires_grad for p in copied.parameters())
    encoder = BertForSequenceClassification(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
        )
    )
    encoder.classifier.weight = encoder.bert.pooler.dense.weight
    opened = view(encoder)
    assert opened.classifier.weight is opened.bert.pooler.dense.weight


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(kind):
    module = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).to(kind).eval()
    rows = torch.randn(5, 6)
    with torch.no_grad():
        expected = copy.deepcopy(module).float()(rows)
        assert torch.equal(view(module)(rows), expected)
    assert own_copy(module)[0].weight.dtype is kind


def test_what_cannot_be_viewed_is_named():
    with pytest.raises(ValueError, match="lazy layer"):
        view(nn.Sequential(nn.LazyLinear(4)))
    scripted = torch.jit.trace(nn.Linear(6, 4), torch.zeros(2, 6))
    with pytest.warns(UserWarning, match="copied whole"):
        opened = view(scripted)
    rows = torch.randn(5, 6)
    torch.testing.assert_close(opened(rows), scripted(rows))
    assert all(p.requires_grad for p in scripted.parameters())


@pytest.mark.parametrize("norm", [None, nn.LayerNorm(8)])
def test_padded_positions_are_what_the_network_gives_when_it_is_used(norm):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    module = nn.TransformerEncoder(layer, 2, norm).eval()
    rows = torch.randn(3, 5, 8)
    behind = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]])
    before = behind.flip(1)
    opened = view(module)
    for padded in (behind, before, None):
        with torch.no_grad():
            expected = module(rows, src_key_padding_mask=padded)
            actual = opened(rows, src_key_padding_mask=padded)
            torch.testing.assert_close(actual, expected)
        # the same with gradients, where torch takes another path
        torch.testing.assert_close(opened(rows, src_key_padding_mask=padded), expected)


def test_a_view_asks_for_no_gradients_and_is_in_evaluation_mode():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Dropout())).train()
    copied = view(module)
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert not any(part.training for part in copied.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(part.training for part in module.modules())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is a scripted module:UserWarning")
def test_a_scripted_part_asks_for_no_gradients_either():
    scripted = torch.jit.trace(nn.Linear(3, 2), torch.ones(1, 3))
    copied = view(nn.Sequential(scripted))
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    assert all(parameter.requires_grad for parameter in scripted.parameters())


@pytest.mark.parametrize("table", [nn.Embedding, nn.EmbeddingBag])
def test_tables_with_sparse_gradients_have_dense_ones_in_the_view(table):
    words = table(7, 4, sparse=True)
    opened = view(words)
    weight = next(opened.parameters()).requires_grad_()
    rows = torch.tensor([[1, 1, 5], [2, 5, 5]])
    found = torch.autograd.grad(opened(rows).pow(2).sum(), weight)[0]
    dense = table(7, 4)
    dense.load_state_dict(words.state_dict())
    dense(rows).pow(2).sum().backward()
    torch.testing.assert_close(found, dense.weight.grad)
    assert words.sparse
