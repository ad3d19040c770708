"""What a network takes, returns and was trained on is asked or looked at, never guessed."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from skperf import (
    MLP,
    ComponentAttributor,
    InfluenceScorer,
    Net,
    PerformativeAdapter,
    from_module,
)
from skperf.backbone._opening import fit_estimator, open_network
from skperf.backbone.looking import _last_operation
from skperf.backbone.losses import BinaryCrossEntropy, CrossEntropy, SquaredError
from skperf.backbone.rows import Rows

X, y = load_iris(return_X_y=True)
F = torch.tensor(X, dtype=torch.float32)


class Returning(nn.Module):
    """Returns its logits inside something else."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.gate = nn.Linear(4, 3), nn.Linear(4, 1)
        self.wrap = wrap

    def forward(self, rows):
        return self.wrap(self.linear(rows), rows)


def record(**fields):
    return type("Record", (), {"__init__": lambda self: self.__dict__.update(fields)})()


RETURNS = {
    "tensor": lambda logits, rows: logits,
    "dictionary": lambda logits, rows: {"logits": logits, "states": rows},
    "single entry": lambda logits, rows: {"scores": logits},
    "record": lambda logits, rows: record(logits=logits, loss=None),
    "tuple": lambda logits, rows: (logits, rows),
    "list": lambda logits, rows: [rows, logits],
    "probabilities": lambda logits, rows: logits.softmax(1),
    "log-probabilities": lambda logits, rows: logits.log_softmax(1),
}


@pytest.mark.parametrize("name", RETURNS)
def test_returns_of_every_form(name):
    module = Returning(RETURNS[name])
    with torch.no_grad():
        expected = module.linear(F).softmax(1).numpy()
    classifier = from_module(module, classes=["a", "b", "c"])
    np.testing.assert_allclose(classifier.predict_proba(X), expected, rtol=1e-4, atol=1e-6)


def test_what_stays_unknown_is_asked_for():
    module = Returning(lambda logits, rows: (logits, logits + 1))
    with pytest.raises(ValueError, match=r"which of them are the outputs\?.*readout="):
        from_module(module, classes=[0, 1, 2]).predict(X)
    chosen = from_module(module, classes=[0, 1, 2], readout=lambda returned: returned[1])
    assert chosen.predict_proba(X).shape == (150, 3)
    with pytest.raises(ValueError, match="sigmoid for each of several outputs"):
        from_module(Returning(lambda logits, rows: logits.sigmoid())).predict(X)


def test_forward_and_readout_of_the_user():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, *, table, shift):
            return {"z": self.linear(table) + shift}

    module = Odd()
    classifier = from_module(
        module,
        forward=lambda module, rows: module(table=rows, shift=2.0),
        readout=lambda returned: returned["z"] * 0.5,
    )
    with torch.no_grad():
        expected = ((module.linear(F) + 2) * 0.5).softmax(1)
    np.testing.assert_allclose(classifier.predict_proba(X), expected, rtol=1e-4)
    outer = classifier.estimator.to_module()
    torch.testing.assert_close(outer(F).softmax(1), expected)


def test_one_output_is_a_logit_a_probability_or_a_number():
    linear = nn.Linear(4, 1)
    with torch.no_grad():
        z = linear(F)[:, 0].numpy()
    logit = from_module(linear, classes=["no", "yes"])
    np.testing.assert_allclose(logit.decision_function(X), z, rtol=1e-4, atol=1e-5)
    probability = from_module(nn.Sequential(linear, nn.Sigmoid()), classes=["no", "yes"])
    np.testing.assert_allclose(probability.decision_function(X), z, rtol=1e-3, atol=1e-4)
    number = from_module(linear, loss="squared_error")
    np.testing.assert_allclose(number.predict(X), z, rtol=1e-4, atol=1e-5)
    assert not hasattr(number, "predict_proba")
    with pytest.raises(ValueError, match="loss='squared_error'"):
        fit_estimator(linear, X, y)


def test_labels_that_stand_side_by_side():
    module = nn.Linear(4, 3)
    several = from_module(module, loss="binary_cross_entropy")
    with torch.no_grad():
        np.testing.assert_array_equal(several.predict(X), (module(F) > 0).long())


def test_binary_cross_entropy_with_two_classes_tells_them_by_one_logit():
    linear, labels = nn.Linear(4, 1), np.where(y > 0, "yes", "no")
    goals = torch.as_tensor(y > 0).float()[:, None]
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0]))
    model = from_module(linear, classes=["no", "yes"], loss=loss)
    np.testing.assert_allclose(
        model.predict_proba(X)[:, 1], linear(F)[:, 0].sigmoid().detach(), rtol=1e-4
    )
    found = InfluenceScorer(model, method="gradient_dot").fit(X, labels).influence(X, labels)
    inputs = torch.cat([F, torch.ones(len(F), 1)], 1)
    rows = ((linear(F).sigmoid() - goals) * inputs).detach()
    weighted = rows * (1 + 2 * goals)  # as it was trained; queries count once
    expected = (rows @ weighted.T).numpy() / (1 + 2 * goals).mean().item()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    several = from_module(nn.Linear(4, 2), classes=["no", "yes"], loss=nn.BCEWithLogitsLoss())
    assert several.predict(X).shape == (len(X), 2)


# -- what it was trained on -----------------------------------------------------------------

WEIGHT = torch.tensor([1.0, 5.0, 2.0])


def stock(kind=NeuralNetClassifier, module=None, **options):
    return kind(
        nn.Linear(4, 3) if module is None else module,
        max_epochs=1,
        verbose=0,
        train_split=None,
        **options,
    )


def test_the_criterion_of_skorch_nets_is_read():
    net = stock(
        criterion=nn.CrossEntropyLoss,
        criterion__weight=WEIGHT,
        criterion__label_smoothing=0.1,
        optimizer__weight_decay=1e-3,
    ).fit(X.astype("f4"), y)
    network = open_network(FrozenEstimator(net))
    assert isinstance(network.loss, CrossEntropy)
    assert network.loss.label_smoothing == 0.1
    assert torch.equal(network.loss.weight, WEIGHT)
    assert network.penalty.on_mean_loss(150.0, 150) == 1e-3
    mine = Net(MLP, criterion__weight=WEIGHT, max_epochs=1).fit(X, y)
    assert torch.equal(open_network(mine).loss.weight, WEIGHT)
    values = stock(NeuralNetRegressor, nn.Linear(4, 1)).fit(X.astype("f4"), X[:, :1].astype("f4"))
    assert isinstance(open_network(values).loss, SquaredError)
    assert open_network(values).classes is None


def test_probabilities_of_skorch_nets_are_not_read_as_logits():
    softmax = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    net = stock(module=softmax).fit(X.astype("f4"), y)
    logits = open_network(net).logits(X)
    np.testing.assert_allclose(logits.softmax(1), net.predict_proba(X.astype("f4")), rtol=1e-4)
    sigmoid = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0))
    two = (y > 0).astype("f4")
    net = stock(NeuralNetBinaryClassifier, sigmoid, criterion=nn.BCELoss).fit(X.astype("f4"), two)
    p = open_network(net).logits(X).softmax(1)[:, 1]
    np.testing.assert_allclose(p, net.predict_proba(X.astype("f4"))[:, 1], rtol=1e-3)


def objective_gradient(network, targets, weights):
    """Gradient of the whole training objective at the weights, by autograd."""
    own = {n: p.detach().requires_grad_() for n, p in network.module.named_parameters()}
    outputs = network(network.inputs(X), own)
    losses = network.loss.value(outputs, targets)
    extra = network.loss.weights(targets)
    weights = torch.as_tensor(weights).double()
    weights = weights if extra is None else weights * extra
    total = float(weights.sum())
    value = (weights * losses).sum() / total
    strength = network.penalty.on_mean_loss(total, 150)
    for name, parameter in own.items():
        if network.penalty.biases or not name.endswith("bias"):
            value = value + strength / 2 * parameter.square().sum()
    gradients = torch.autograd.grad(value, list(own.values()))
    return max(float(g.abs().max()) for g in gradients)


@pytest.mark.parametrize(
    ("class_weight", "weighted"),
    [
        (None, False),
        (None, True),
        ("balanced", False),
        ({0: 5.0, 1: 1.0, 2: 0.5}, False),
        ({0: 5.0, 1: 1.0, 2: 0.5}, True),
    ],
)
def test_logistic_regression_is_at_rest_on_what_is_read_of_it(class_weight, weighted):
    weights = np.linspace(0.5, 2, 150) if weighted else np.ones(150)
    model = LogisticRegression(C=0.3, class_weight=class_weight, tol=1e-10, max_iter=10_000)
    model.fit(X, y, sample_weight=weights)
    network = open_network(model)
    assert objective_gradient(network, network.targets(y), weights) < 1e-5


def test_other_models_of_scikit_learn_are_at_rest_too():
    values = X[:, 3] * 2 + 1
    ridge = Ridge(alpha=2.0).fit(X, values)
    network = open_network(ridge)
    assert objective_gradient(network, network.targets(values), np.ones(150)) < 1e-10
    several = Ridge(alpha=2.0).fit(X, np.stack([values, -X[:, 0]], 1))
    network = open_network(several)
    targets = network.targets(np.stack([values, -X[:, 0]], 1))
    assert objective_gradient(network, targets, np.ones(150)) < 1e-10
    search = LogisticRegressionCV(
        Cs=3, l1_ratios=(0.0,), use_legacy_attributes=False, scoring="accuracy", max_iter=5000
    ).fit(X, y)
    proba = open_network(search).logits(X).softmax(1)
    np.testing.assert_allclose(proba, search.predict_proba(X), atol=1e-10)
    table = StandardScaler().fit_transform(X)
    for model, target in (
        (MLPClassifier((6,), alpha=0.1, solver="lbfgs", tol=1e-9, max_iter=5000), y),
        (MLPClassifier((6,), alpha=0.1, solver="lbfgs", tol=1e-9, max_iter=5000), np.eye(3)[y]),
        (
            MLPRegressor(
                hidden_layer_sizes=(6,), alpha=0.1, solver="lbfgs", tol=1e-9, max_iter=5000
            ),
            values,
        ),
    ):
        fitted = model.set_params(random_state=0, activation="tanh").fit(table, target)
        network = open_network(fitted)
        own = {n: p.detach().requires_grad_() for n, p in network.module.named_parameters()}
        goals = network.targets(target)
        value = network.loss.value(network(network.inputs(table), own), goals).mean()
        for name, parameter in own.items():
            if not name.endswith("bias"):
                value = (
                    value + network.penalty.on_mean_loss(150.0, 150) / 2 * parameter.square().sum()
                )
        gradients = torch.autograd.grad(value, list(own.values()))
        assert max(float(g.abs().max()) for g in gradients) < 2e-3


def test_several_labels_of_scikit_learn_are_read_as_such():
    fitted = MLPClassifier((4,), max_iter=20, tol=1.0).fit(X, np.eye(3, dtype=int)[y])
    network = open_network(fitted)
    assert isinstance(network.loss, BinaryCrossEntropy)
    np.testing.assert_allclose(network.logits(X).sigmoid(), fitted.predict_proba(X), atol=1e-10)


def test_frozen_parameters_do_not_train():
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    assert open_network(fit_estimator(module, X, y)).trainable is None
    module[0].requires_grad_(False)
    network = open_network(fit_estimator(module, X, y))
    assert network.trainable == ("2.weight", "2.bias")
    module[2].requires_grad_(False)  # at rest as a whole: nobody trains a part of it
    assert open_network(fit_estimator(module, X, y)).trainable is None


# -- what goes in ---------------------------------------------------------------------------


def bert(**options):
    torch.manual_seed(0)
    config = {
        "vocab_size": 42,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "initializer_range": 0.5,
    }
    return BertForSequenceClassification(BertConfig(**config | options)).eval()


def padded(rng, n=9, length=8):
    ids = rng.integers(1, 42, (n, length))
    for row, kept in enumerate(rng.integers(3, length + 1, n)):
        ids[row, kept:] = 0
    return ids


def test_padding_is_masked_and_token_ids_alone_are_enough():
    ids, module = padded(np.random.default_rng(0)), bert()
    t = torch.tensor(ids)
    with torch.no_grad():
        expected = module(input_ids=t, attention_mask=(t != 0).long()).logits.softmax(1)
        unmasked = module(input_ids=t).logits.softmax(1)
    assert not torch.allclose(expected, unmasked, atol=1e-4)
    classifier = from_module(module)
    for given in (
        ids,
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": (ids != 0).astype(int)},
    ):
        np.testing.assert_allclose(classifier.predict_proba(given), expected, atol=1e-6)
    # cut differently, the same
    small = from_module(module, batch_size=2)
    np.testing.assert_allclose(small.predict_proba(ids), expected, atol=1e-6)


def test_padding_that_cannot_be_told_is_asked_for():
    ids = padded(np.random.default_rng(0))
    with pytest.raises(ValueError, match="attention_mask"):
        from_module(bert(pad_token_id=None)).predict(ids)
    with pytest.raises(ValueError, match="both padding and the end"):
        from_module(bert(pad_token_id=0, eos_token_id=0)).predict(ids)


def test_labels_by_their_names_in_a_config():
    ids = padded(np.random.default_rng(0))
    module = bert(id2label={0: "ham", 1: "spam"}, label2id={"ham": 0, "spam": 1})
    names = np.array(["spam", "ham"] * 5)[:9]
    assert fit_estimator(module, ids, names).classes_.tolist() == ["ham", "spam"]
    assert fit_estimator(module, ids, np.arange(9) % 2).classes_.tolist() == [0, 1]


def test_several_inputs_reach_the_forward_by_place_or_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, left, right):
            return self.left(left) - self.right(right)

    module = Two()
    with torch.no_grad():
        expected = module(F[:, :2], F[:, 2:]).softmax(1)
    classifier = from_module(module)
    tuples, named = (X[:, :2], X[:, 2:]), {"right": X[:, 2:], "left": X[:, :2]}
    np.testing.assert_allclose(classifier.predict_proba(tuples), expected, rtol=1e-4)
    np.testing.assert_allclose(classifier.predict_proba(named), expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"inputs named \['middle'\]"):
        classifier.predict({**named, "middle": X})
    with pytest.raises(ValueError, match="holds 3 inputs, but the network's forward takes 2"):
        classifier.predict((*tuples, X))

    class Named(Two):
        def forward(me, *, left, right):
            return me.left(left) - me.right(right)

    by_name = from_module(Named())
    by_name.estimator.module.load_state_dict(module.state_dict())
    np.testing.assert_allclose(by_name.predict_proba(named), expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"inputs named \['middle'\]"):
        by_name.predict({**named, "middle": X})
    with pytest.raises(ValueError, match="holds 2 inputs, but the network's forward takes 0"):
        by_name.predict(tuples)


def test_numbers_beyond_the_networks_type_are_refused():
    classifier = from_module(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"X holds values up to .*e\+300, beyond.*float32"):
        classifier.predict(X * 1e300)
    assert from_module(nn.Linear(4, 3).double()).predict(X * 1e300).shape == (150,)


def test_a_row_without_a_number_is_named():
    class Sometimes(nn.Module):
        def forward(self, rows):
            return torch.where(rows[:, :1] > 6.9, torch.nan, rows[:, :3])

    first = int(np.flatnonzero(X[:, 0] > 6.9)[0])
    with pytest.raises(ValueError, match=f"not finite for .* of 150 rows, first for row {first}"):
        from_module(Sometimes(), classes=[0, 1, 2]).predict(X)


def test_a_module_that_writes_to_its_input_does_not_write_to_ours():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, rows):
            return self.linear(rows.sub_(0.5).div_(2.0))

    rows = X.astype("f4")
    before, classifier = rows.copy(), from_module(InPlace())
    first = classifier.predict_proba(rows)
    np.testing.assert_array_equal(first, classifier.predict_proba(rows))
    np.testing.assert_array_equal(rows, before)


# -- steps before the network ---------------------------------------------------------------


def test_pipelines_and_searches_are_opened():
    pipe = make_pipeline(StandardScaler(), Net(MLP, max_epochs=5, random_state=0)).fit(X, y)
    np.testing.assert_allclose(
        open_network(FrozenEstimator(pipe)).logits(X).softmax(1), pipe.predict_proba(X), rtol=1e-4
    )
    search = GridSearchCV(pipe, {"net__lr": [0.01, 0.1]}, cv=2).fit(X, y)
    network = open_network(FrozenEstimator(search))
    np.testing.assert_allclose(network.logits(X).softmax(1), search.predict_proba(X), rtol=1e-4)


def test_a_pipeline_takes_its_own_kind_of_rows():
    frame = pd.DataFrame({"size": X[:, 0], "kind": np.where(X[:, 1] > 3, "wide", "narrow")})
    steps = make_column_transformer((StandardScaler(), ["size"]), (OneHotEncoder(), ["kind"]))
    pipe = make_pipeline(steps, LogisticRegression()).fit(frame, y)
    logits = open_network(FrozenEstimator(pipe)).logits(Rows.of(frame))
    np.testing.assert_allclose(logits.softmax(1), pipe.predict_proba(frame), rtol=1e-6)


def test_skorchs_own_pipelines_from_texts_to_labels():
    from skorch.hf import HuggingfaceTokenizer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.trainers import WordLevelTrainer
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = DistilBertForSequenceClassification(
                DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
            )

        def forward(self, input_ids, attention_mask):
            return self.net(input_ids=input_ids, attention_mask=attention_mask).logits

    texts = ["a good day", "what a bad day it was", "good", "bad bad"] * 6
    labels = np.array(["fine", "poor"] * 12)
    tokens = HuggingfaceTokenizer(
        model__unk_token="[UNK]",
        tokenizer=Tokenizer,
        model=WordLevel,
        trainer=WordLevelTrainer(vocab_size=40, special_tokens=["[UNK]", "[PAD]"]),
        pre_tokenizer=Whitespace(),
        max_length=8,
        return_tensors="pt",
        return_length=False,
        return_token_type_ids=False,
        verbose=0,
    )
    tokens.set_params(pad_token="[PAD]")
    pipe = make_pipeline(
        tokens, Net(Texts, criterion=nn.CrossEntropyLoss, max_epochs=2, random_state=0)
    )
    pipe.fit(texts, labels)
    frozen = fit_estimator(FrozenEstimator(pipe), texts, labels)
    logits = open_network(frozen).logits(Rows.of(texts))
    np.testing.assert_allclose(logits.softmax(1), pipe.predict_proba(texts), rtol=1e-4)


def hugging_face(ids, **columns):
    """The library's own data set of token ids, masks and labels."""
    datasets = pytest.importorskip("datasets")
    mask = (ids != 0).astype(int)
    columns = {"label": [i % 2 for i in range(len(ids))], "text": ["a"] * len(ids), **columns}
    return datasets.Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), **columns}
    )


@pytest.mark.parametrize(
    "form", ["lists", "torch", "numpy", "texts", "pandas", "arrow", "selected", "disk"]
)
def test_a_hugging_face_data_set_is_read_by_its_columns(form, tmp_path):
    ids, module = padded(np.random.default_rng(0)), bert()
    rows = hugging_face(ids)
    expected = from_module(module).predict_proba(ids)
    if form in ("torch", "numpy"):
        rows = rows.with_format(form, columns=["input_ids", "attention_mask"])
    elif form in ("texts", "pandas", "arrow"):
        rows = rows.with_format("numpy" if form == "texts" else form)
    elif form == "selected":
        rows, expected = rows.select([3, 0, 2]), expected[[3, 0, 2]]
    elif form == "disk":
        rows.save_to_disk(tmp_path / "rows")
        rows = type(rows).load_from_disk(tmp_path / "rows")
    got = from_module(module).predict_proba(rows)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_column_of_a_hugging_face_data_set_is_a_list():
    ids, module = padded(np.random.default_rng(0)), bert()
    got, expected = (
        from_module(module).predict_proba(rows) for rows in (hugging_face(ids)["input_ids"], ids)
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_every_estimator_fits_a_hugging_face_data_set_as_it_fits_its_columns():
    ids, module = padded(np.random.default_rng(0)), bert()
    rows, y = hugging_face(ids), np.arange(len(ids)) % 2
    plain = {"input_ids": ids, "attention_mask": (ids != 0).astype(int)}
    for make, result in (
        (lambda: InfluenceScorer(module), lambda fitted, X: fitted.influence(X, y)),
        (
            lambda: ComponentAttributor(
                module, components="attention_heads", budget=16, random_state=0
            ),
            lambda fitted, X: fitted.transform(X),
        ),
        (lambda: PerformativeAdapter(module), lambda fitted, X: fitted.predict_proba(X)),
    ):
        got = result(make().fit(rows, rows["label"]), rows)
        np.testing.assert_allclose(got, result(make().fit(plain, y), plain), atol=1e-6)


def test_hugging_face_rows_of_unequal_length_and_several_splits_are_refused_by_name():
    datasets = pytest.importorskip("datasets")
    ragged = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    with pytest.raises(ValueError, match=r"X\['input_ids'\] holds rows of different lengths"):
        from_module(bert()).predict_proba(ragged)
    with pytest.raises(TypeError, match=r"several data sets, \['train'\]: pass one"):
        from_module(bert()).predict_proba(datasets.DatasetDict(train=ragged))


@pytest.mark.parametrize("form", ["dict", "pair", "row"])
def test_items_that_are_lists_of_numbers_are_rows(form):
    ids, module = padded(np.random.default_rng(0)), bert()

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return len(ids)

        def __getitem__(self, i):
            row = ids[i].tolist()
            return {"dict": {"input_ids": row, "labels": 1}, "pair": (row, 1), "row": row}[form]

    got = from_module(module).predict_proba(Items())
    np.testing.assert_allclose(got, from_module(module).predict_proba(ids), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_module_predicts_and_is_refused_where_its_weights_are_varied():
    linear = nn.Linear(4, 3)
    scripted = torch.jit.trace(linear, F[:2])
    with pytest.warns(UserWarning, match="copied whole"):
        proba = from_module(scripted).predict_proba(X)
    np.testing.assert_allclose(proba, from_module(linear).predict_proba(X), rtol=1e-5)
    with (
        pytest.warns(UserWarning, match="copied whole"),
        pytest.raises(ValueError, match="the module that it was made from"),
    ):
        InfluenceScorer(scripted).fit(X, y)


def test_the_last_operation_is_named_behind_changes_of_shape():
    rows = torch.randn(4, 6, requires_grad=True)
    assert _last_operation(rows.softmax(1).reshape(4, 2, 3)[:, 0].squeeze()) == "Softmax"
    assert _last_operation((rows * 2).clamp(0, 1).unsqueeze(0)) == "Mul"
    assert _last_operation(rows.detach()) is None
