import copy
import pickle
import signal

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed, parallel_config
from scipy.sparse import csr_matrix
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from skorch.callbacks import Callback, EarlyStopping, EpochScoring, Initializer
from skorch.dataset import Dataset as SkorchDataset
from skorch.dataset import ValidSplit
from skorch.helper import predefined_split
from torch import nn
from torch.utils.data import TensorDataset

from skperf import MLP, Net, default_net
from skperf.backbone._batches import TensorBatches
from skperf.backbone._nets import seed_of
from skperf.backbone._stock import net_of
from skperf.backbone.sparse import Sparse

X, y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]


class Noise(nn.Module):
    def forward(self, inputs):
        return inputs + torch.randn_like(inputs) if self.training else inputs


def fitted_probabilities(seed):
    return Net(MLP, max_epochs=3, random_state=seed).fit(X, y).predict_proba(X)


@pytest.mark.parametrize("labels", [y, y + 7, y * 5, y.astype(float), NAMES, y == 2])
def test_any_labels(labels):
    net = default_net(random_state=0).fit(X, labels)
    assert net.classes_.tolist() == np.unique(labels).tolist()
    assert net.score(X, labels) > 0.9


def test_a_module_instance_is_copied_and_refits_start_from_it():
    torch.manual_seed(0)
    module = MLP(4, 3)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    net = Net(module, max_epochs=3, random_state=0).fit(X, y)
    first = net.predict_proba(X)
    assert all(torch.equal(t, module.state_dict()[n]) for n, t in weights.items())
    assert np.array_equal(first, net.fit(X, y).predict_proba(X))
    assert np.array_equal(first, clone(net).fit(X, y).predict_proba(X))


def test_a_module_instance_refuses_parameters_that_would_rebuild_it():
    with pytest.raises(ValueError, match=r"module__hidden.*would rebuild it without them"):
        Net(MLP(4, 3), module__hidden=(8,)).fit(X, y)


def test_rows_of_any_shape_fill_in_the_widths():
    images = X.reshape(len(X), 1, 2, 2)
    net = Net(MLP, max_epochs=3, random_state=0).fit(images, y)
    assert np.array_equal(net.predict_proba(images), fitted_probabilities(0))


def test_parameters_are_those_of_the_constructor():
    net = default_net(random_state=0)
    assert not [name for name in net.get_params() if name.startswith("_")]
    assert clone(net).fit(X, y).module_.hidden[0].weight.dtype == torch.float64


def test_all_rows_train():
    class Count(Callback):
        rows = 0

        def on_batch_end(self, net, batch, training, **kwargs):
            self.rows += len(batch[0])

    net = Net(MLP, max_epochs=1, callbacks=[("count", Count())]).fit(X, y)
    assert dict(net.callbacks_)["count"].rows == len(X)


def test_keyboard_interrupt_ends_fit():
    class Interrupted(MLP):
        def forward(self, inputs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Net(Interrupted).fit(X, y)


def test_early_stopping_on_a_hold_out():
    net = Net(
        MLP,
        lr=0.05,
        max_epochs=300,
        train_split=ValidSplit(5, stratified=True),
        callbacks=[EarlyStopping(patience=3)],
        random_state=0,
    ).fit(X, NAMES)
    assert len(net.history) < 300
    assert net.score(X, NAMES) > 0.9


@pytest.mark.parametrize("backend", ["threading", "loky"])
def test_the_seed_decides_under_every_backend(backend):
    state = torch.get_rng_state()
    with parallel_config(backend, n_jobs=2):
        results = Parallel()(delayed(fitted_probabilities)(seed) for seed in (0, 1, 0, 1))
    expected = [fitted_probabilities(0), fitted_probabilities(1)] * 2
    assert all(np.array_equal(a, b) for a, b in zip(results, expected, strict=True))
    assert not np.array_equal(expected[0], expected[1])
    assert torch.equal(state, torch.get_rng_state())


def test_dropout_is_seeded_too():
    def net():
        module = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))
        return Net(module, max_epochs=2, random_state=3)

    first = net()
    second = clone(first)
    assert np.array_equal(first.fit(X, y).predict_proba(X), second.fit(X, y).predict_proba(X))


def test_a_step_takes_the_weighted_sum_over_the_number_of_rows():
    weights = np.random.default_rng(0).uniform(0, 3, 150) * (np.arange(150) % 3 > 0)
    module = MLP(4, 3).double()
    params = {"optimizer": torch.optim.SGD, "lr": 0.05, "max_epochs": 3, "batch_size": 40}
    net = Net(module, **params, iterator_train__shuffle=False).fit(X, y, sample_weight=weights)
    by_hand = copy.deepcopy(module)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for _ in range(3):
        for rows in torch.arange(150).split(40):
            optimizer.zero_grad()
            losses = nn.functional.cross_entropy(
                by_hand(torch.tensor(X[rows])), torch.tensor(y[rows]), reduction="none"
            )
            ((losses * torch.tensor(weights[rows])).sum() / len(rows)).backward()
            optimizer.step()
    for own, theirs in zip(net.module_.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


def test_weights_of_one_change_no_bit():
    net = Net(MLP, max_epochs=3, random_state=0).fit(X, y)
    weighted = clone(net).fit(X, y, sample_weight=np.ones(150))
    assert np.array_equal(net.predict_proba(X), weighted.predict_proba(X))


def test_a_row_of_weight_zero_keeps_its_place_in_the_streams():
    module = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 3))

    def net():
        return Net(module, optimizer=torch.optim.SGD, lr=0.1, max_epochs=2, random_state=3)

    weights = np.ones(150)
    weights[7] = 0.0
    other = X.copy()
    other[7] = 100.0
    first = net().fit(X, y, sample_weight=weights)
    second = net().fit(other, y, sample_weight=weights)
    assert np.array_equal(first.predict_proba(X), second.predict_proba(X))


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), Noise()], ids=["dropout", "noise"])
def test_training_never_draws_from_the_global_stream(layer):
    module = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), layer, nn.Linear(16, 3))

    def net(seed):
        return Net(module, max_epochs=2, random_state=seed)

    state = torch.get_rng_state()
    first, again, other = (net(seed).fit(X, y).predict_proba(X) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert "forward" not in vars(net(0).fit(X, y).module_[2])


def test_a_clone_repeats_a_run_whose_seed_was_drawn():
    net = Net(MLP, max_epochs=2).fit(X, y)
    assert net.random_state is None
    assert np.array_equal(net.predict_proba(X), clone(net).fit(X, y).predict_proba(X))
    assert not np.array_equal(net.predict_proba(X), net.fit(X, y).predict_proba(X))


# At its door


def test_columns_are_held_to_their_names_and_width():
    frame = load_iris(as_frame=True).data
    net = Net(MLP, max_epochs=2, random_state=0).fit(frame, y)
    assert net.n_features_in_ == 4
    assert net.feature_names_in_.tolist() == frame.columns.tolist()
    with pytest.raises(ValueError, match="feature names should match"):
        net.predict(frame[frame.columns[::-1]])
    net = Net(MLP, max_epochs=2, random_state=0).fit(X, y)
    with pytest.raises(ValueError, match="X has 2 features, but Net is expecting 4"):
        net.predict_proba(X[:, :2])


@pytest.mark.parametrize("method", ["fit", "partial_fit", "predict"])
def test_rows_that_are_no_numbers_are_refused(method):
    bad = X.copy()
    bad[3, 1] = np.nan
    net = Net(MLP, max_epochs=1).fit(X, y)
    given = (bad,) if method == "predict" else (bad, y)
    with pytest.raises(ValueError, match="Input X contains NaN"):
        getattr(net, method)(*given)
    with pytest.raises(TypeError, match=r"[Ss]parse"):
        getattr(net, method)(csr_matrix(X), *given[1:])
    with pytest.raises(ValueError, match="beyond the largest number"):
        getattr(net, method)(X * 1e300, *given[1:])


def test_several_inputs_and_data_sets():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, left, right):
            return self.layer(torch.cat([left, right], 1))

    inputs = {"left": X[:, :2].astype("f4"), "right": X[:, 2:].astype("f4")}
    by_name = Net(Two, max_epochs=3, random_state=0).fit(inputs, y)
    by_place = Net(Two, max_epochs=3, random_state=0).fit(tuple(inputs.values()), y)
    assert np.array_equal(
        by_name.predict_proba(inputs), by_place.predict_proba(tuple(inputs.values()))
    )

    whole = Net(MLP, max_epochs=3, random_state=0).fit(X, y)
    items = TensorDataset(torch.tensor(X, dtype=torch.float32))
    lazy = Net(MLP, module__n_features=4, max_epochs=3, random_state=0).fit(items, y)
    assert np.array_equal(whole.predict_proba(X), lazy.predict_proba(items))
    assert np.array_equal(whole.predict(SkorchDataset(X)), whole.predict(X))


# Callbacks of skorch's


@pytest.mark.parametrize("labels", [y, NAMES])
@pytest.mark.parametrize("use_caching", [True, False])
def test_scoring_callbacks_read_labels(labels, use_caching):
    class Last(Callback):
        def on_epoch_end(self, net, dataset_valid, **kwargs):
            rows = np.asarray(dataset_valid.indices)
            self.expected = (net.predict(X[rows]) == labels[rows]).mean()

    scoring = EpochScoring("accuracy", lower_is_better=False, use_caching=use_caching)
    net = Net(
        MLP,
        lr=0.05,
        max_epochs=4,
        train_split=ValidSplit(5, stratified=True),
        callbacks=[
            ("accuracy", scoring),
            ("log_loss", EpochScoring("neg_log_loss", use_caching=use_caching)),
            ("last", Last()),
            ("stop", EarlyStopping("accuracy", patience=20, lower_is_better=False)),
        ],
        random_state=0,
    ).fit(X, labels, sample_weight=np.arange(150) % 2)
    assert net.history[-1, "accuracy"] == dict(net.callbacks_)["last"].expected
    assert net.history[-1, "neg_log_loss"] < 0


def test_a_hold_out_does_not_depend_on_weights():
    class Keep(Callback):
        def on_epoch_end(self, net, dataset_valid, **kwargs):
            self.rows = np.asarray(dataset_valid.indices)

    def held_out(weights):
        net = Net(
            MLP, max_epochs=1, train_split=ValidSplit(5, stratified=True), callbacks=[("k", Keep())]
        )
        return dict(net.fit(X, NAMES, sample_weight=weights).callbacks_)["k"].rows

    assert np.array_equal(held_out(None), held_out(np.arange(150.0)))


def test_a_validation_set_of_ones_own():
    held_out = SkorchDataset(X[100:].astype("f4"), NAMES[100:])
    net = Net(MLP, max_epochs=2, train_split=predefined_split(held_out), random_state=0)
    net.fit(X, NAMES)
    expected = -np.log(net.predict_proba(X[100:])[:, 2]).mean()
    assert net.history[-1, "valid_loss"] == pytest.approx(expected, rel=1e-5)


# Criteria


def test_probabilities_and_single_outputs_train_as_in_skorch():
    softmax = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3), nn.Softmax(1))
    settings = {"max_epochs": 3, "lr": 0.1, "train_split": None, "verbose": 0}
    stock = NeuralNetClassifier(copy.deepcopy(softmax), **settings).fit(X.astype("f4"), y)
    ours = net_of(NeuralNetClassifier(softmax, **settings)).fit(X, y)
    np.testing.assert_allclose(
        ours.predict_proba(X), stock.predict_proba(X.astype("f4")), rtol=1e-5
    )
    single = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    binary = NeuralNetBinaryClassifier(copy.deepcopy(single), **settings)
    binary.fit(X.astype("f4"), (y == 1).astype("f4"))
    ours = net_of(NeuralNetBinaryClassifier(single, **settings)).fit(X, y == 1)
    np.testing.assert_allclose(
        ours.predict_proba(X), binary.predict_proba(X.astype("f4")), rtol=1e-4, atol=1e-6
    )


def test_a_criterion_that_knows_batches_only():
    class Mean(nn.Module):
        def forward(self, outputs, codes):
            return nn.functional.cross_entropy(outputs, codes)

    own = Net(MLP, criterion=Mean, max_epochs=3, random_state=0).fit(X, y)
    np.testing.assert_allclose(own.predict_proba(X), fitted_probabilities(0), rtol=1e-5)
    with pytest.raises(ValueError, match="one number for each row"):
        Net(MLP, criterion=Mean, max_epochs=1).fit(X, y, sample_weight=np.ones(150))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterator_train__collate_fn": list}, "iterator_train__collate_fn"),
        ({"predict_nonlinearity": None}, "predict_nonlinearity"),
        ({"warm_start": True}, "warm_start"),
        ({"iterator_valid": list}, "iterator_valid"),
    ],
)
def test_what_a_net_cannot_take_over_is_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        net_of(NeuralNetClassifier(MLP, **settings))


def test_a_stock_net_of_ones_own_class_is_refused_by_name():
    class Own(NeuralNetClassifier):
        def get_loss(self, *args, **kwargs):
            return super().get_loss(*args, **kwargs)

    with pytest.raises(TypeError, match=r"Own.*\['get_loss'\] would be lost"):
        net_of(Own(MLP))
    net = net_of(NeuralNetClassifier(MLP, iterator_train__num_workers=2, lr=0.3))
    assert (net.lr, net.iterator_train__shuffle) == (0.3, False)
    assert net.train_split is not None


# Parts that train


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_only_what_is_named_trains(optimizer):
    module = MLP(4, 3, hidden=(8,))
    net = Net(
        module,
        train_only="output.*",
        optimizer=optimizer,
        optimizer__weight_decay=0.1,
        lr=0.05,
        max_epochs=2,
    ).fit(X, y)
    assert torch.equal(net.module_.hidden[0].weight, module.hidden[0].weight)
    assert not torch.equal(net.module_.output.weight, module.output.weight)
    assert module.output.weight.requires_grad


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_masks_hold_entries_in_place(optimizer):
    module = MLP(4, 3, hidden=(8,))
    mask = np.random.default_rng(0).random((8, 4)) < 0.3
    net = Net(
        module,
        train_only={"hidden.0.weight": mask},
        optimizer=optimizer,
        optimizer__weight_decay=0.1,
        lr=0.05,
        max_epochs=2,
        random_state=0,
    ).fit(X, y)
    moved = (net.module_.hidden[0].weight != module.hidden[0].weight).numpy()
    assert np.array_equal(moved, mask)
    assert torch.equal(net.module_.output.weight, module.output.weight)


@pytest.mark.parametrize("saliency", ["sam", "gradient"])
def test_the_entries_of_largest_saliency_train(saliency):
    module = MLP(4, 3, hidden=(8,)).double()
    net = Net(module, train_only=Sparse(0.1, saliency), lr=0.05, max_epochs=1).fit(X, y)
    moved = torch.cat(
        [
            (own != old).flatten()
            for own, old in zip(net.module_.parameters(), module.parameters(), strict=True)
        ]
    )
    each = []
    for row, target in zip(torch.tensor(X), torch.tensor(y), strict=True):
        loss = nn.functional.cross_entropy(module(row[None]), target[None])
        each.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
        )
    gradients = torch.stack(each)
    squares = gradients.square().mean(0)
    sizes = [p.numel() for p in module.parameters()]
    floor = max(float(part.mean()) for part in squares.split(sizes)) * 1e-3
    values = (
        gradients.mean(0).abs()
        if saliency == "gradient"
        else gradients.mean(0) ** 2 / (squares + floor)
    )
    k = round(0.1 * len(values))
    assert moved.sum() == k
    assert set(moved.nonzero().flatten().tolist()) == set(values.topk(k).indices.tolist())


def test_what_should_train_is_asked_for_by_name():
    for train_only, message in [
        ("head.*", "matches no parameter"),
        ({"head": [True]}, "no parameter of MLP"),
        ({"output.bias": [True]}, r"shape \(3,\)"),
        (Sparse(2.0), "ratio must lie"),
        (Sparse(0.1, "best"), "saliency='best'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Net(MLP, train_only=train_only, max_epochs=1).fit(X, y)
    with pytest.raises(TypeError, match="train_only must be"):
        Net(MLP, train_only=3, max_epochs=1).fit(X, y)


def test_partial_fit_trains_on():
    net = Net(MLP, max_epochs=5, random_state=0)
    net.partial_fit(X[:100], NAMES[:100], classes=np.unique(NAMES))
    loss = net.history[-1, "train_loss"]
    net.partial_fit(X[:100], NAMES[:100])
    assert len(net.history) == 10
    assert net.history[-1, "train_loss"] < loss
    assert net.predict_proba(X).shape == (150, 3)


def test_grid_search_and_pickle():
    search = GridSearchCV(
        Net(MLP, max_epochs=5, random_state=0), {"module__hidden": [(8,), (16,)]}, cv=2, n_jobs=2
    ).fit(X, NAMES)
    loaded = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(loaded.predict(X), search.predict(X))
    loaded.partial_fit(X, NAMES)


def test_one_class():
    net = default_net(random_state=0).fit(X[:50], NAMES[:50])
    assert net.predict_proba(X).shape == (150, 1)
    assert (net.predict(X) == "setosa").all()


def test_tensor_batches_cover_the_rows_once():
    rows = SkorchDataset(torch.arange(10), torch.arange(10) * 2)
    batches = TensorBatches(rows, batch_size=4, shuffle=True, generator=torch.Generator())
    assert len(batches) == 3
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert inputs.tolist() != list(range(10))
    assert sorted(inputs.tolist()) == list(range(10))
    assert torch.equal(targets, inputs * 2)


def test_seed_of():
    assert seed_of(3) == seed_of(3) != seed_of(4)
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    assert seed_of(None) != seed_of(None)
    assert np.array_equal(before, np.random.get_state()[1])


class Weightless(nn.Module):
    def forward(self, inputs):
        return inputs[:, :3]


ONE_IS_NOTHING = torch.tensor([0.0, 1.0, 1.0])
REFUSED = {
    "nothing is held out": ({"callbacks": [EarlyStopping()]}, "watches 'valid_loss'.*train_split"),
    "negative epochs": ({"max_epochs": -1}, "max_epochs must be a whole number from 0, got -1"),
    "no whole batch": (
        {"iterator_train__drop_last": True, "batch_size": 1000},
        "drop_last=True leaves no batch: batch_size=1000, but there are 150 rows",
    ),
    "another width": ({"module": nn.Linear(5, 3)}, "Linear does not train on the first rows of X"),
    "no parameters": ({"module": Weightless()}, "module: Weightless has no parameters"),
    "weights of other classes": (
        {"criterion__weight": torch.ones(2)},
        "criterion__weight holds 2 weights for 3 classes",
    ),
    "no device": ({"device": "nonsense"}, "device='nonsense' can't be computed on"),
    "a class of weight 0, smoothed": (
        {"criterion__weight": ONE_IS_NOTHING, "criterion__label_smoothing": 0.1},
        "a class has weight 0 beside label_smoothing",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_train_nothing_or_break_are_refused_by_name(name):
    settings, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        Net(**({"module": MLP, "max_epochs": 2} | settings)).fit(*load_iris(return_X_y=True))


def test_hidden_entries_are_refused_and_masks_without_any_pass():
    X, y = load_iris(return_X_y=True)
    hidden, shown = np.ma.masked_array(X, mask=X > 7), np.ma.masked_array(X)
    net = Net(MLP, max_epochs=2, random_state=0)
    for rows in (hidden, {"inputs": hidden}):
        with pytest.raises(ValueError, match=r"X(\['inputs'\])? is a masked array"):
            net.fit(rows, y)
    with pytest.raises(ValueError, match="y is a masked array"):
        net.fit(X, np.ma.masked_array(y, mask=y == 1))
    plain = clone(net).fit(X, y).predict_proba(X)
    np.testing.assert_array_equal(net.fit(shown, y).predict_proba(shown), plain)


def test_decision_function_is_the_log_odds_of_predict_proba():
    X, y = load_iris(return_X_y=True)
    for n_classes in (2, 3):
        some = y < n_classes
        net = Net(MLP, max_epochs=2, random_state=0).fit(X[some], y[some])
        scores, proba = net.decision_function(X), net.predict_proba(X)
        expected = np.log(proba[:, 1:] / proba[:, :1])
        found = scores[:, None] if n_classes == 2 else scores[:, 1:] - scores[:, :1]
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("moment", ["on_train_begin", "on_epoch_end", "on_batch_end"])
def test_ctrl_c_that_falls_into_a_callback_is_the_users(moment, request):
    # a process that was started in the background ignores it
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))

    class Stopping(Callback):
        def stop(self, *_, **__):
            raise KeyboardInterrupt

    class Interrupted(Callback):
        def stop(self, *_, **__):
            signal.raise_signal(signal.SIGINT)

    for kind in (Stopping, Interrupted):
        setattr(kind, moment, kind.stop)
    X, y = np.eye(8, dtype=np.float32), np.arange(8) % 2
    stopped = Net(MLP, max_epochs=3, callbacks=[Stopping()]).fit(X, y)
    assert len(stopped.history) == (0 if moment == "on_train_begin" else 1)
    with pytest.raises(KeyboardInterrupt):
        Net(MLP, max_epochs=3, callbacks=[Interrupted()]).fit(X, y)


class Wide(nn.Module):
    def __init__(self, n_inputs=2, n_classes=3):
        super().__init__()
        self.linear = nn.Linear(n_inputs, n_classes)

    def forward(self, X):
        return self.linear(X)


class ToTheWidth(Callback):
    """skorch's recipe for a module that fits the rows."""

    def on_train_begin(self, net, X=None, y=None, **kwargs):
        self.labels_ = y
        net.set_params(module__n_inputs=X.shape[-1])


def test_a_callback_may_build_the_module_for_the_rows_it_sees():
    rows = np.random.RandomState(0).randn(30, 7).astype(np.float32)
    labels = np.array(["a", "b", "c"])[np.arange(30) % 3]
    before = torch.get_rng_state()
    nets = [
        Net(Wide, max_epochs=2, callbacks=[ToTheWidth(), draws], random_state=0).fit(rows, labels)
        for draws in [Initializer("*.bias", fn=nn.init.normal_)] * 2
    ]
    assert nets[0].module_.linear.weight.shape == (3, 7)
    callback = next(c for _, c in nets[0].callbacks_ if isinstance(c, ToTheWidth))
    np.testing.assert_array_equal(callback.labels_, labels)
    np.testing.assert_array_equal(*(net.predict_proba(rows) for net in nets))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("entry", ["nonsense", 3, ("stops", None)])
def test_what_is_no_callback_is_named(entry):
    with pytest.raises(TypeError, match=r"callbacks holds .* is no callback of skorch"):
        Net(Wide, callbacks=[entry]).fit(np.zeros((4, 2), np.float32), [0, 1, 2, 0])
