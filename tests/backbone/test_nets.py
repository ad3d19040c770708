import pickle

import numpy as np
import pytest
import torch
from joblib import Parallel, delayed, parallel_config
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback, EarlyStopping
from skorch.dataset import ValidSplit
from torch import nn

from skperf import MLP, Net, default_net
from skperf.backbone._nets import TensorBatches, seed_of

X, y = load_iris(return_X_y=True)
NAMES = np.array(["setosa", "versicolor", "virginica"])[y]


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


def test_zero_weights_are_absent_rows():
    params = {"random_state": 0, "batch_size": 1000, "max_epochs": 20, "lr": 0.05}
    keep = np.arange(150) % 3 > 0
    module = MLP(4, 3).double()
    weighted = Net(module, **params).fit(X, y, sample_weight=keep.astype(float))
    subset = Net(module, **params).fit(X[keep], y[keep])
    np.testing.assert_allclose(weighted.predict_proba(X), subset.predict_proba(X), atol=1e-10)


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
    class Rows:
        X = torch.arange(10)
        y = torch.arange(10) * 2

    batches = TensorBatches(Rows, batch_size=4, shuffle=True, generator=torch.Generator())
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
