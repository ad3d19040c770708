"""What each library of influence takes: losses, inputs and layers, every cell run.

    PYTHONPATH=PEERS python -m benchmarks.influence_takes  # peers.txt says what PEERS holds
    PYTHONPATH=PEERS python -m benchmarks.influence_takes --only captum skperf --cells GPT-2

Every library is asked, as its documentation shows, for a quantity of its own that brute force can
check: inner products of gradients (captum, kronfluence, Bergson and skperf), the damped inverse
Hessian between them (pyDVL, dattri), TRAK's score without a projection. The reference takes rows
one by one with plain autograd, in double precision. A cell is "right" where the two differ by less
than 1e-3 of the largest score; "right on 40 %" where they do once only the parameters of linear
and convolutional layers count, with the share of the parameters that these are: nothing is said
of the others. Each cell runs in a process of its own for two minutes at most. Inputs of several
parts are handed on one by one where a library has no dict; the language model's head is left out
where a library's own examples do so. With ``--pieces FILE --minutes 2`` it goes on where it was
cut. Writes results/influence_takes.json.
"""

import argparse
import io
import json
import logging
import multiprocessing
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import runner
from benchmarks.influence_use import Pieces

RESULT = Path(__file__).parent / "results" / "influence_takes.json"
N_TRAIN, N_QUERY, CLASSES, SECONDS = 12, 3, 3, 120


@dataclass
class Case:
    """A network, rows and a loss: what one cell of the table asks of every library."""

    module: nn.Module  # in float32, in eval mode
    parts: dict[str, torch.Tensor]  # inputs by name, (n, ...) each, training rows first
    targets: torch.Tensor  # (n, ...)
    loss: Callable  # (outputs, targets) -> (n,), as the network was trained
    called: str = "cross_entropy"  # the loss as skperf is told
    plain: Callable | None = None  # of queries, where the training loss has weights of rows
    mean_weight: float = 1.0  # of the training rows, by whose sum torch divides
    how: str = "one"  # "one" tensor, "tuple" or "dict"
    on_disk: bool = False
    tokens: bool = False  # a score for every token of a training row
    shared: bool = False  # whether a layer runs several times
    ridge: float = 1.0  # beyond the most negative curvature, so that float32 is enough


class Flat(nn.Module):
    """A network that takes its inputs one by one and returns a tensor."""

    def __init__(self, module, names, how):
        super().__init__()
        self.module, self.names, self.how = module, names, how

    def forward(self, *tensors):
        """Return logits."""
        if self.how == "dict":
            outputs = self.module(**dict(zip(self.names, tensors, strict=True)))
        else:
            outputs = self.module(*tensors)
        return getattr(outputs, "logits", outputs)


def flat(case):
    """Give a network of tensors, training rows and queries: (module, (*inputs, y), the same)."""
    module = Flat(deepcopy(case.module), list(case.parts), case.how)
    every = [*case.parts.values(), case.targets]
    rows = slice(0, N_TRAIN), slice(N_TRAIN, N_TRAIN + N_QUERY)
    return module, *(tuple(each[part] for each in every) for part in rows)


class OnDisk(Dataset):
    """Rows of an array in a file, read one at a time."""

    def __init__(self, path, targets):
        self.X, self.targets = np.load(path, mmap_mode="r"), targets

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, i):
        return torch.from_numpy(self.X[i].copy()), self.targets[i]


def dataset(case, tensors):
    """Give training rows as a dataset, on disk where the case says so."""
    if not case.on_disk:
        return TensorDataset(*tensors)
    path = Path(tempfile.mkdtemp()) / "rows.npy"
    np.save(path, tensors[0].numpy())
    return OnDisk(path, tensors[-1])


# the cases


def _mlp(n_outputs=CLASSES):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, n_outputs))


def _rows(*shape):
    return torch.randn(N_TRAIN + N_QUERY, *shape)


def _labels(n_classes=CLASSES):
    return torch.arange(N_TRAIN + N_QUERY) % n_classes


def _words(length=5, most=11):
    return torch.randint(1, most, (N_TRAIN + N_QUERY, length))


def _simple(module, shape=(4,), **more):
    given = {"targets": _labels(), "loss": cross_entropy} | more
    return Case(module.eval(), {"x": _rows(*shape)}, **given)


def cross_entropy(outputs, targets):
    """Of rows (n, K) at labels (n,)."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def token_entropy(outputs, targets):
    """Mean over the tokens of rows (n, L, V) at tokens (n, L)."""
    return functional.cross_entropy(outputs.mT, targets, reduction="none").mean(1)


def focal(outputs, targets):
    """Count rows that are right less."""
    losses = cross_entropy(outputs, targets)
    return (1 - torch.exp(-losses)) ** 2 * losses


def weighted():
    weights = torch.tensor([3.0, 1.0, 0.5])

    def loss(outputs, targets):
        own = weights.to(outputs.dtype)
        return functional.cross_entropy(outputs, targets, own, reduction="none")

    called = nn.CrossEntropyLoss(weights)
    return _simple(_mlp(), loss=loss, called=called, plain=cross_entropy, mean_weight=1.5)


def smoothed():
    def loss(outputs, targets):
        return functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)

    return _simple(_mlp(), loss=loss, called=nn.CrossEntropyLoss(label_smoothing=0.1))


def squared():
    def loss(outputs, targets):
        return (outputs - targets).square().mean(1)

    return _simple(_mlp(2), targets=_rows(2), loss=loss, called="squared_error")


def several_labels():
    def loss(outputs, targets):
        return functional.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(
            1
        )

    targets = (_rows(3) > 0).float()
    return _simple(_mlp(), targets=targets, loss=loss, called="binary_cross_entropy")


def soft():
    return _simple(_mlp(), targets=_rows(CLASSES).softmax(1))


class Masked(nn.Module):
    """Mean of the word vectors that a mask keeps."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4), nn.Linear(4, CLASSES)

    def forward(self, ids, mask):
        """Return logits (n, K)."""
        kept = mask[..., None].float()
        return self.head((self.embed(ids) * kept).sum(1) / kept.sum(1))


class Two(nn.Module):
    """Two towers, joined."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)
        self.head = nn.Linear(3, CLASSES)

    def forward(self, left, right):
        """Return logits (n, K)."""
        return self.head(torch.tanh(self.left(left) + self.right(right)))


class Attention(nn.Module):
    """Self-attention of torch's own layer."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        """Return logits (n, K)."""
        return self.head(self.attend(x, x, x)[0].mean(1))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.head = kind(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        """Return logits (n, K)."""
        return self.head(self.body(x)[0][:, -1])


class Twice(nn.Module):
    """One layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        """Return logits (n, K)."""
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


def masked():
    ids = _words()
    mask = (torch.arange(5) < torch.randint(2, 6, (len(ids), 1))).long()
    parts = {"ids": ids, "mask": mask}
    return Case(Masked().eval(), parts, _labels(), cross_entropy, how="dict")


def in_a_tuple():
    parts = {"left": _rows(4), "right": _rows(2)}
    return Case(Two().eval(), parts, _labels(), cross_entropy, how="tuple")


def of_tokens():
    module = nn.Sequential(
        nn.Embedding(11, 3), nn.Flatten(), nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, CLASSES)
    )
    return Case(module.eval(), {"ids": _words()}, _labels(), cross_entropy)


def convolution():
    layers = nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, CLASSES)
    return _simple(nn.Sequential(*layers), (1, 5, 5))


def normalised():
    layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)
    module = nn.Sequential(*layers).train()
    for _ in range(20):
        module(torch.randn(32, 4))
    return _simple(module)


def low_rank():
    from peft import LoraConfig, get_peft_model

    module = get_peft_model(_mlp(), LoraConfig(r=2, target_modules=["0", "2"]))
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)  # they begin at zero
    return _simple(module)


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=6, max_position_embeddings=6, num_labels=CLASSES,
        attn_implementation="eager",
    )  # fmt: skip
    ids = _words()
    mask = (torch.arange(5) < torch.randint(2, 6, (len(ids), 1))).long()
    parts = {"input_ids": ids, "attention_mask": mask}
    module = BertForSequenceClassification(config).eval()
    return Case(module, parts, _labels(), cross_entropy, how="dict", ridge=60.0)


def gpt2(tokens=False):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=11, n_embd=4, n_layer=1, n_head=2, n_positions=6, attn_implementation="eager"
    )
    ids = _words(6)
    module = GPT2LMHeadModel(config).eval()
    parts = {"input_ids": ids[:, :-1]}
    return Case(module, parts, ids[:, 1:], token_entropy, how="dict", tokens=tokens, ridge=60.0)


CASES: dict[tuple[str, str], Callable[[], Case]] = {
    ("loss", "cross-entropy"): lambda: _simple(_mlp()),
    ("loss", "class weights"): weighted,
    ("loss", "label smoothing"): smoothed,
    ("loss", "squared error"): squared,
    ("loss", "several labels"): several_labels,
    ("loss", "soft labels"): soft,
    ("loss", "a function of one's own"): lambda: _simple(_mlp(), loss=focal, called=focal),
    ("input", "one tensor"): lambda: _simple(_mlp()),
    ("input", "dict with a mask"): masked,
    ("input", "tuple"): in_a_tuple,
    ("input", "word numbers"): of_tokens,
    ("input", "a file on disk"): lambda: _simple(_mlp(), on_disk=True),
    ("layer", "linear"): lambda: _simple(nn.Linear(4, CLASSES)),
    ("layer", "convolution"): convolution,
    ("layer", "embedding"): of_tokens,
    ("layer", "nn.MultiheadAttention"): lambda: _simple(Attention(), (5, 4)),
    ("layer", "LSTM"): lambda: _simple(Recurrent(nn.LSTM), (5, 3)),
    ("layer", "GRU"): lambda: _simple(Recurrent(nn.GRU), (5, 3)),
    ("layer", "one layer, run twice"): lambda: _simple(Twice(), shared=True),
    ("layer", "batch normalisation"): normalised,
    ("layer", "LoRA of peft"): low_rank,
    ("network", "BERT"): bert,
    ("network", "GPT-2"): gpt2,
    ("network", "GPT-2, by token"): lambda: gpt2(tokens=True),
}


# the libraries: each gives scores (n_query, n_train), or (n_query, n_train, length) by token


def captum(case):
    from captum.influence import TracInCP

    module, train, queries = flat(case)
    path = str(Path(tempfile.mkdtemp()) / "checkpoint.pt")
    torch.save(module.state_dict(), path)

    def load(model, name):
        model.load_state_dict(torch.load(name))
        return 1.0

    frozen = any(not p.requires_grad for p in module.parameters())
    trains = [
        name
        for name, part in module.named_modules()
        if any(p.requires_grad for p in part.parameters(recurse=False))
    ]
    tracin = TracInCP(
        module, dataset(case, train), [path], load, loss_fn=case.loss, batch_size=N_TRAIN,
        layers=trains if frozen else None,
    )  # fmt: skip
    return tracin.influence(queries).detach()


def kronfluence(case):
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Own(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return case.loss(model(*batch[:-1]), batch[-1]).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return known

    module, train, queries = flat(case)
    _as_linear(module)
    known = _named(module, (nn.Linear, nn.Conv2d))
    model = prepare_model(module, task := Own())
    analyzer = Analyzer(
        "run", model, task, cpu=True, output_dir=tempfile.mkdtemp(), disable_model_save=True,
        disable_tqdm=True,
    )  # fmt: skip
    rows, asked = dataset(case, train), TensorDataset(*queries)
    own = FactorArguments(strategy="identity", has_shared_parameters=case.shared)
    analyzer.fit_all_factors("f", rows, per_device_batch_size=N_TRAIN, factor_args=own)
    analyzer.compute_pairwise_scores(
        "s", "f", asked, rows, N_QUERY, per_device_train_batch_size=N_TRAIN,
        score_args=ScoreArguments(compute_per_token_scores=case.tokens),
    )  # fmt: skip
    return analyzer.load_pairwise_scores("s")["all_modules"]


def _named(module, kinds):
    """Name layers that train, as both libraries' examples do, of language models but the head."""
    every = [name for name, part in module.named_modules() if type(part) in kinds]
    trains = [
        n for n in every if all(p.requires_grad for p in module.get_submodule(n).parameters())
    ]
    return [name for name in trains if not name.endswith("lm_head")]


def _as_linear(module):
    """Put linear layers in the place of transformers' Conv1D, as kronfluence's examples do."""
    for part in list(module.modules()):
        for name, layer in list(part.named_children()):
            if type(layer).__name__ == "Conv1D":
                linear = nn.Linear(*layer.weight.shape)
                linear.weight.data, linear.bias.data = layer.weight.data.T, layer.bias.data
                setattr(part, name, linear)


def pydvl(case):
    from pydvl.influence.torch import CgInfluence, DirectInfluence

    module, train, queries = flat(case)
    loss = lambda outputs, targets: case.loss(outputs, targets).mean()  # noqa: E731
    loader = DataLoader(dataset(case, train), batch_size=N_TRAIN)
    try:
        model = DirectInfluence(module, loss, regularization=case.ridge).fit(loader)
        return model.influences(*queries, *train).detach()
    except Exception:  # of any library
        model = CgInfluence(module, loss, regularization=case.ridge, maxiter=500, rtol=1e-7)
        return model.fit(loader).influences(*queries, *train).detach()


def trak(case):
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput
    from trak.projectors import NoOpProjector

    module, train, queries = flat(case)

    class Own(AbstractModelOutput):
        def __init__(self):
            pass

        @staticmethod
        def get_output(model, weights, buffers, *row):
            *inputs, target = (part[None] for part in row)
            outputs = torch.func.functional_call(model, (weights, buffers), tuple(inputs))
            return case.loss(outputs, target).sum()

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    traker = TRAKer(
        module, Own(), N_TRAIN, save_dir=tempfile.mkdtemp(), device="cpu", lambda_reg=case.ridge,
        projector=NoOpProjector(device="cpu"), proj_dim=sum(p.numel() for p in _own(module)),
        use_half_precision=False, logging_level=logging.ERROR,
        grad_wrt=[n for n, p in module.named_parameters() if p.requires_grad],
    )  # fmt: skip
    traker.load_checkpoint(module.state_dict(), model_id=0)
    for batch in DataLoader(dataset(case, train), batch_size=N_TRAIN):
        traker.featurize(batch=list(batch), num_samples=N_TRAIN)
    traker.finalize_features()
    traker.start_scoring_checkpoint("s", module.state_dict(), model_id=0, num_targets=N_QUERY)
    traker.score(batch=list(queries), num_samples=N_QUERY)
    return torch.as_tensor(np.array(traker.finalize_scores("s"))).T


def dattri(case):
    from dattri.algorithm import IFAttributorCG, IFAttributorExplicit
    from dattri.task import AttributionTask

    module, train, queries = flat(case)

    def loss(params, data):
        single = data[0].ndim == case_ndim  # a row alone, under vmap
        *inputs, targets = (part[None] for part in data) if single else data
        outputs = torch.func.functional_call(module, params, tuple(inputs))
        return case.loss(outputs, targets).mean()

    case_ndim = train[0].ndim - 1
    task = AttributionTask(loss, module, module.state_dict())
    loaders = (
        DataLoader(rows, batch_size=N_TRAIN)
        for rows in (dataset(case, train), TensorDataset(*queries))
    )
    rows, asked = loaders
    try:
        attributor = IFAttributorExplicit(task, regularization=case.ridge)
        attributor.cache(rows)
        return attributor.attribute(rows, asked).detach().T
    except Exception:  # of any library
        attributor = IFAttributorCG(task, regularization=case.ridge, max_iter=20)
        attributor.cache(rows)
        return attributor.attribute(rows, asked).detach().T


def bergson(case):
    from bergson import GradientProcessor
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.gradients import LayerAdapter

    module, train, queries = flat(case)
    module.device = torch.device("cpu")
    # its layers take sequences: rows that are vectors are sequences of one
    alone = len(train) == 2 and train[0].ndim == 2 and train[0].is_floating_point()

    def outputs_of(inputs):
        return module(inputs[0][:, None])[:, 0] if alone else module(*inputs)

    def gradients(rows):
        collector = TraceCollector(
            model=module,
            processor=GradientProcessor(projection_dim=None, include_bias=True),
            target_modules=set(_named(module, LayerAdapter.supported_modules)),
            attribute_tokens=case.tokens and len(rows[0]) == N_TRAIN,
            device="cpu",
            dtype=torch.float32,
        )
        every = torch.ones(rows[-1].shape, dtype=torch.bool) if case.tokens else None
        with collector.with_batch(every):
            case.loss(outputs_of(rows[:-1]), rows[-1]).sum().backward()
        return {name: torch.cat(found).flatten(1) for name, found in collector.mod_grads.items()}

    batch = next(iter(DataLoader(dataset(case, train), batch_size=N_TRAIN)))
    one, two = gradients(queries), gradients(batch)
    if not one:
        raise ValueError("no layer that it knows")
    scores = sum(one[name] @ two[name].T for name in one)
    return scores.unflatten(1, (N_TRAIN, -1)) if case.tokens else scores


def skperf(case):
    from skperf.influence import InfluenceScorer

    rows = slice(0, N_TRAIN), slice(N_TRAIN, N_TRAIN + N_QUERY)

    def inputs(part):
        own = {name: each[part].numpy() for name, each in case.parts.items()}
        if case.on_disk:
            path = Path(tempfile.mkdtemp()) / "rows.npy"
            np.save(path, own["x"])
            return np.load(path, mmap_mode="r")
        return own if case.how == "dict" else (*own.values(),) if len(own) > 1 else own.popitem()[1]

    y = case.targets.numpy()
    scorer = InfluenceScorer(deepcopy(case.module), method="gradient_dot", loss=case.called)
    scorer.fit(inputs(rows[0]), y[rows[0]])
    more = {"tokens": "rows"} if case.tokens else {}
    return torch.as_tensor(scorer.influence(inputs(rows[1]), y[rows[1]], **more))


LIBRARIES = {
    "skperf": (skperf, "gradients", "skperf"),
    "captum": (captum, "gradients", "captum"),
    "kronfluence": (kronfluence, "gradients", "kronfluence"),
    "Bergson": (bergson, "gradients", "bergson"),
    "pyDVL": (pydvl, "hessian", "pyDVL"),
    "dattri": (dattri, "hessian", "dattri"),
    "TRAK": (trak, "features", "traker"),
}


# the reference


def _own(module):
    return [p for p in module.parameters() if p.requires_grad]


def _each(module, loss, rows):
    """Gradients of single rows by plain autograd: -> (n, p)."""
    found = []
    for i in range(len(rows[0])):
        *inputs, targets = (part[i : i + 1] for part in rows)
        value = loss(module(*inputs), targets).sum()
        gradients = torch.autograd.grad(
            value, _own(module), materialize_grads=True, allow_unused=True
        )
        found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


def _hessian(module, loss, rows):
    """Of the mean loss, by differentiating twice: -> (p, p)."""
    parameters = _own(module)
    value = loss(module(*rows[:-1]), rows[-1]).mean()
    first = torch.autograd.grad(
        value, parameters, create_graph=True, allow_unused=True, materialize_grads=True
    )
    columns = []
    for entry in torch.cat([g.flatten() for g in first]):
        if not entry.requires_grad:
            columns.append(torch.zeros(sum(p.numel() for p in parameters)))
            continue
        second = torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        columns.append(torch.cat([g.flatten() for g in second]))
    return torch.stack(columns)


def references(case, quantity, own_queries):
    """Scores by brute force, of all parameters and of linear and convolutional layers alone."""
    module, train, queries = flat(case)
    module = module.double()
    train, queries = (
        tuple(part.double() if part.is_floating_point() else part for part in rows)
        for rows in (train, queries)
    )
    loss = case.loss
    asked = case.plain if own_queries and case.plain else loss
    left, right = _each(module, asked, queries), _each(module, loss, train)
    right = right / (case.mean_weight if own_queries else 1.0)
    known = tuple(
        f"{name}."
        for name, part in module.named_modules()
        if type(part) in (nn.Linear, nn.Conv2d) or type(part).__name__ == "Conv1D"
    )
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    sizes = [p.numel() for p in _own(module)]
    heads = [n.startswith(known) and "in_proj" not in n for n in names]
    weights = [head and n.endswith("weight") for head, n in zip(heads, names, strict=True)]
    for chosen in ([True] * len(names), heads, weights):
        mask = torch.repeat_interleave(torch.tensor(chosen), torch.tensor(sizes))
        one, two = left[:, mask], right[:, mask]
        if quantity == "hessian":
            both = _hessian(module, loss, train)[mask][:, mask]
            one = torch.linalg.solve(both + case.ridge * torch.eye(len(both)).to(both), one.T).T
        elif quantity == "features":
            two = two / len(left[0]) ** 0.5
            one = torch.linalg.solve(
                two.T @ two + case.ridge * torch.eye(len(two.T)).to(two), one.T
            ).T
        yield float(mask.double().mean()), one @ two.T
        if quantity != "gradients":
            return


def difference(found, reference, quantity):
    """Largest difference beside the largest score, up to a positive factor for TRAK."""
    found = found.double().sum(2) if found.ndim == 3 else found.double()
    if found.shape != reference.shape:
        return float("inf")
    if quantity == "features":
        found = found * ((found * reference).sum() / found.square().sum()).clamp_min(0)
    if quantity == "hessian" and float((found * reference).sum()) < 0:
        found = -found  # a matter of convention: rows left out, or put in
    return float((found - reference).abs().max() / reference.abs().max())


def cell(library, key):
    """Run one cell: -> its outcome, with the difference or the first line of the message."""
    function, quantity, _ = LIBRARIES[library]
    torch.manual_seed(0)
    case = CASES[key]()
    if case.tokens and library not in ("skperf", "kronfluence", "Bergson"):
        return {"outcome": "no", "message": "it has no scores of tokens"}
    try:
        found = function(deepcopy(case))
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"outcome": "refused", "message": f"{type(error).__name__}: {lines[0][:200]}"}
    if not bool(torch.isfinite(found).all()):
        return {"outcome": "wrong", "message": "scores that are not finite"}
    apart = []
    for share, reference in references(case, quantity, library == "skperf"):
        apart.append(difference(found, reference, quantity))
        if apart[-1] < 1e-3:
            outcome = "right" if share == 1 else f"right on {100 * share:.0f} %"
            return {"outcome": outcome, "difference": apart[-1]}
    return {"outcome": "wrong", "difference": min(apart)}


def _answer(library, key, path):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        found = cell(library, key)
    Path(path).write_text(json.dumps(found))


def asked(library, key):
    """Run one cell in a process of its own."""
    context = multiprocessing.get_context("fork")
    path = Path(tempfile.mkdtemp()) / "found"
    child = context.Process(target=_answer, args=(library, key, path))
    child.start()
    child.join(SECONDS)
    if child.is_alive():
        child.kill()
        return {"outcome": "refused", "message": f"no answer within {SECONDS} s"}
    if not path.exists():
        return {"outcome": "refused", "message": f"the process ended with {child.exitcode}"}
    found: dict = json.loads(path.read_text())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES))
    parser.add_argument("--cells", default="", help="part of their names; nothing is saved then")
    parser.add_argument("--pieces", type=Path, help="file of what has been found so far")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell later")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import peft  # noqa: F401 (loaded once, before the processes part)
    import transformers  # noqa: F401

    known, rows, start = Pieces(arguments.pieces), [], time.monotonic()
    for part, what in (key for key in CASES if arguments.cells in " ".join(key)):
        for library in arguments.only:
            _, quantity, package = LIBRARIES[library]
            key = [part, what, library]
            if key not in known:
                if time.monotonic() - start > 60 * arguments.minutes:
                    raise SystemExit(f"{key} waits; run it again.")
                known.add(key, asked(library, (part, what)))
                print(part, what, library, known[key], flush=True)
            row = {"part": part, "what": what, "library": library, **known[key]}
            rows.append(row | {"quantity": quantity, "version": _version(package)})
    if arguments.only == list(LIBRARIES) and not arguments.cells:
        runner.save(RESULT, rows, seeds=[0])


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return "this commit"


if __name__ == "__main__":
    main()
