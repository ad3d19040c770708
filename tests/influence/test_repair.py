import numpy as np
import pytest
import torch
from influence_nets import brute_curvature, mlp
from sklearn.base import clone
from sklearn.datasets import load_digits

from skperf import MLP, EditedClassifier, Net
from skperf.backbone._opening import open_network
from skperf.backbone.losses import SquaredError
from skperf.backbone.network import Network
from skperf.backbone.parameters import fingerprint, select_parameters
from skperf.backbone.rows import Rows
from skperf.influence import GGN, InfluenceScorer, _actions, repair
from skperf.influence._actions import natural, products
from skperf.influence.captures import recording
from skperf.influence.repair import (
    Lesson,
    accuracy,
    best_scale,
    distance,
    harmonic_mean,
    smallest_flip,
)


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    return (X / 16).astype(np.float32), y


@pytest.fixture(scope="module")
def scorer(digits):
    X, y = digits
    net = Net(MLP, module__hidden=(32,), lr=0.01, max_epochs=15, random_state=0)
    return InfluenceScorer(net, random_state=0).fit(X[:700], y[:700])


def test_repair_flips_with_the_smallest_displacement_found(scorer, digits):
    X, y = digits
    before = fingerprint(scorer.estimator_.module_)
    wrong = np.flatnonzero(scorer.estimator_.predict(X[700:]) != y[700:])[:4] + 700
    guard = (X[1300:], y[1300:])
    for i in wrong:
        edited = scorer.repair(X[[i]], y[[i]], guard=guard, k=30, max_drop=0.02)
        report = edited.edit_report_
        assert isinstance(edited, EditedClassifier)
        assert report["flipped"].tolist() == [edited.predict(X[[i]])[0] == y[i]]
        accuracy = (edited.predict(guard[0]) == guard[1]).mean()
        assert accuracy == pytest.approx(report["guard_after"])
        assert report["guard_after"] >= report["guard_before"] - 0.02
        assert set(report["baselines"]) == {
            "same_class",
            "same_class_plain",
            "random",
            "nearest",
            "query_itself",
        }
        assert (y[report["baselines"]["same_class"]["indices"]] == y[i]).all()
        assert len(report["indices"]) == 30
        assert edited.revert() is scorer.estimator_
        assert clone(edited) is edited
    assert fingerprint(scorer.estimator_.module_) == before
    again = InfluenceScorer(edited).fit(X[:50], y[:50]).influence(X[:2], y[:2])
    assert again.shape == (2, 50)


@pytest.mark.parametrize("how", ["ascend", "relabel"])
def test_other_ways_to_repair(scorer, digits, how):
    X, y = digits
    wrong = np.flatnonzero(scorer.estimator_.predict(X[700:]) != y[700:])[:1] + 700
    edited = scorer.repair(X[wrong], y[wrong], how=how, k=10, max_steps=10, baselines=False)
    assert edited.edit_report_["action"] == f"repair:{how}"
    assert "baselines" not in edited.edit_report_
    with pytest.raises(ValueError, match="'how' parameter of repair must be"):
        scorer.repair(X[wrong], y[wrong], how="pray")


def test_many_training_rows_are_guarded_by_a_sample(scorer, digits, monkeypatch):
    X, y = digits
    monkeypatch.setattr(_actions, "_MOST_GUARDS", 120)
    wrong = np.flatnonzero(scorer.estimator_.predict(X[700:]) != y[700:])[:1] + 700
    judges = []

    def kept(*args, judge=_actions._judges):
        judges.append(judge(*args))
        return judges[-1]

    monkeypatch.setattr(_actions, "_judges", kept)
    report = scorer.repair(X[wrong], y[wrong], baselines=False).edit_report_
    guard, judged, held = (
        set(map(bytes, judges[0][k][0].array.numpy())) for k in ("guard", "judged", "kept")
    )
    trained = {bytes(row) for row in X[report["indices"]]}
    assert len(guard) == len(judged) == 120
    assert not (guard | held) & judged
    assert not trained & (guard | judged)


def test_a_path_stops_where_the_label_flips():
    """One weight, one query: the smallest step that flips is known."""
    module = torch.nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [0.0]]))
    network = Network(module, np.arange(2))
    start = select_parameters(module)
    row = torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    path = smallest_flip(network, start, Lesson(row), row, learning_rate=1.0, max_steps=200)
    assert path.flipped.all()
    # both weights move alike and meet in the middle
    assert path.length == pytest.approx(np.sqrt(0.5), rel=0.02)
    assert distance(start, path.parameters) == pytest.approx(path.length)


@pytest.mark.parametrize(("learning_rate", "n_paths"), [(1.0, 3), (0.015, 1)])
def test_smaller_steps_are_tried_where_they_can_get_there(monkeypatch, learning_rate, n_paths):
    module = torch.nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [0.0]]))
    row = torch.ones(1, 1, dtype=torch.float64), torch.tensor([1])
    taken = []

    def counted(*args, walk=repair._path):
        taken.append(walk(*args))
        return taken[-1]

    monkeypatch.setattr(repair, "_path", counted)
    start = select_parameters(module)
    network = Network(module, np.arange(2))
    path = smallest_flip(
        network, start, Lesson(row), row, learning_rate=learning_rate, max_steps=100
    )
    assert path.flipped.all()
    assert len(taken) == n_paths


def test_scale_is_chosen_by_the_harmonic_mean():
    assert harmonic_mean(1.0, 0.5) == pytest.approx(2 / 3)
    assert harmonic_mean(0.0, 0.0) == 0
    module = torch.nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [0.0]]))
    direction = {"weight": torch.tensor([[0.0], [1.0]], dtype=torch.float64)}
    ones = torch.ones(3, 1, dtype=torch.float64)
    removed, others = (ones, torch.zeros(3).long()), (-ones, torch.ones(3).long())
    scale, f1 = best_scale(
        Network(module, np.arange(2)),
        select_parameters(module),
        direction,
        removed,
        others,
        [0.5, 1.5, 4.0],
    )
    assert f1 == 0 or scale > 1


@pytest.mark.parametrize("how", ["gif", "freeze", "project", "plain", "ascent"])
def test_a_class_is_forgotten(scorer, digits, how):
    X, y = digits
    before = fingerprint(scorer.estimator_.module_)
    edited = scorer.remove(class_=3, how=how, ratio=0.1, max_iter=20)
    report = edited.edit_report_
    assert (edited.predict(X[700:][y[700:] == 3]) == 3).mean() < 0.2
    kept = y[700:] != 3
    assert (edited.predict(X[700:][kept]) == y[700:][kept]).mean() > 0.8
    assert report["removed_accuracy_before"] > 0.9
    assert report["share_changed"] <= (1.0 if how == "plain" else 0.1)
    assert ("baseline" in report) == (how != "ascent")
    assert fingerprint(scorer.estimator_.module_) == before


def test_rows_are_forgotten_as_far_as_the_guard_allows(scorer, digits):
    X, y = digits
    guard = (X[700:], y[700:])
    for rows in (np.arange(20), np.arange(700) < 20):
        edited = scorer.remove(rows, guard=guard, max_drop=0.005, max_iter=20)
        report = edited.edit_report_
        assert report["n_removed"] == 20
        assert 0 < report["scale"] <= 1
        assert report["guard_after"] >= report["guard_before"] - 0.005


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either indices or class_"),
        ({"indices": [1], "class_": 3}, "either indices or class_"),
        ({"class_": 77}, "none of the classes"),
        ({"indices": [5000]}, "between 0 and 699"),
        ({"indices": []}, "not none or all"),
        ({"indices": [1], "how": "magic"}, "'how' parameter of remove"),
    ],
)
def test_what_cannot_be_removed(scorer, arguments, message):
    with pytest.raises(ValueError, match=message):
        scorer.remove(**arguments)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("damping", [0.0, 0.5, None])
def test_removal_multiplies_by_the_curvature(digits, curvature, damping):
    X, y = digits
    X, y = X[:60, 16:40].astype(np.float64), y[:60] % 3
    scorer = InfluenceScorer(mlp(24, 5, 3), method="cg", damping=0.2).fit(X, y)
    problem = scorer._learned.plain_problem()
    vectors = torch.randn(2, 143, dtype=torch.float64)
    with recording(problem.network.module):
        multiplied = products(problem, curvature, damping, kept_trace=1.0, max_rows=None)(vectors)
        expected = problem.product(curvature, 0.2 if damping is None else damping)(vectors)
    torch.testing.assert_close(multiplied, expected)


def test_natural_steps_are_those_of_the_damped_inverse(digits):
    X, y = digits
    X, y = X[:60, 16:40].astype(np.float64), y[:60] % 3
    module = mlp(24, 5, 3)
    scorer = InfluenceScorer(module, damping=0.2, method=GGN(1.0, None)).fit(X, y)
    network = open_network(scorer.estimator_)
    shares = torch.full((60,), 1 / 60, dtype=torch.float64)
    curvature = brute_curvature(network, torch.as_tensor(X), shares)
    gradient = {name: torch.randn_like(p) for name, p in select_parameters(module).items()}
    vector = torch.cat([g.flatten() for g in gradient.values()])
    expected = torch.linalg.solve(curvature + 0.2 * torch.eye(len(vector)), vector)
    stepped = torch.cat([g.flatten() for g in natural(scorer._learned)(gradient).values()])
    torch.testing.assert_close(stepped, expected, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="precondition=True needs"):
        InfluenceScorer(module, method="gradient_dot").fit(X, y).repair(
            X[:1], y[:1], precondition=True
        )


def test_without_labels_accuracy_is_minus_the_mean_loss():
    torch.manual_seed(0)
    module = mlp(3, 4, 2)
    network = Network(module, None, batch_size=2, loss=SquaredError())
    inputs, targets = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    own = ((module(inputs) - targets) ** 2).mean(1)
    found = accuracy(network, select_parameters(module), (Rows(inputs), targets))
    assert found == pytest.approx(-network.loss.value(module(inputs), targets).mean().item())
    ratio = network.loss.value(module(inputs), targets) / own
    torch.testing.assert_close(ratio, ratio[0].expand(5))
