"""How an edit is searched for, in a circuit whose outputs are sums that anyone can do."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from skperf.backbone.losses import CrossEntropy
from skperf.backbone.rows import Rows
from skperf.components.edits import (
    Guarded,
    Search,
    Wish,
    _means,
    _right,
    raise_worst,
    rows_of,
    wish_of,
)
from skperf.components.gates import Asked
from skperf.components.measures import Measure

N, K, C = 12, 3, 5
RNG = np.random.default_rng(0)
BASE = RNG.normal(size=(N, K)) * 2
FALLS = RNG.normal(size=(N, C, K))
CODES = RNG.integers(K, size=N)
GROUPS = np.array(["a", "b", "b", "c"] * 3)
MASKS = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1], [0, 1, 1, 0, 1]], bool)


class Sums:
    """Outputs of a row are its base less what every ablated component gave it."""

    n_components = C

    def outputs(self, asked, both, gates):
        rows = asked.rows.array[:, 0].long()
        gone = 1 - gates.double()
        logits = torch.tensor(BASE)[rows][..., None] - torch.einsum(
            "nck,mc->nkm", torch.tensor(FALLS)[rows], gone
        )
        return torch.stack([both(logits[..., m], asked) for m in range(len(gates))], 2)


def logits(mask):
    return BASE - np.einsum("nck,c->nk", FALLS, 1.0 - mask)


def margins(mask, rows):
    values = logits(mask)[rows]
    own = values[np.arange(len(values)), CODES[rows]]
    others = [np.delete(v, c).max() for v, c in zip(values, CODES[rows], strict=True)]
    return own - others


def asked(rows=slice(None)):
    numbers = np.arange(N)[rows]
    return Asked(
        Rows(torch.tensor(numbers, dtype=torch.float64)[:, None]), torch.tensor(CODES[rows])
    )


def search(wish, groups=None, guard=slice(0, 8)):
    guarded = None if guard is None else Guarded(asked(guard), groups)
    return Search(Sums(), Measure("margin", CrossEntropy()), asked(), wish, guarded)


WISH = Wish(np.array([8, 9, 10]), np.array([0, 11]))


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("direction", ["increase", "decrease"])
def test_a_step_tells_outputs_and_accuracies_of_all_that_is_watched(direction):
    wish = Wish(WISH.targets, WISH.references, direction)
    found = search(wish)
    width = np.abs(margins(np.ones(C), wish.targets)).mean()
    assert found.width == pytest.approx(width)
    for mask, step in zip(MASKS, found.steps(MASKS), strict=True):
        assert step["k"] == (~mask).sum()
        for name, rows in (("target", wish.targets), ("reference", wish.references)):
            assert step[f"{name}_output"] == pytest.approx(margins(mask, rows).mean())
            hits = (logits(mask)[rows].argmax(1) == CODES[rows]).mean()
            assert step[f"{name}_accuracy"] == pytest.approx(hits)
        guard = np.arange(8)
        assert step["guard_score"] == pytest.approx(
            (logits(mask)[guard].argmax(1) == CODES[guard]).mean()
        )
        assert step["guard_smooth"] == pytest.approx(sigmoid(margins(mask, guard) / width).mean())
        aim = sigmoid(margins(mask, wish.targets) / width).mean()
        assert step["aim"] == pytest.approx(aim if direction == "increase" else -aim)


def test_without_a_guard_the_references_are_guarded():
    step = search(WISH, guard=None).steps(MASKS[1:2])[0]
    rows = WISH.references
    assert step["guard_score"] == (logits(MASKS[1])[rows].argmax(1) == CODES[rows]).mean()
    nothing = search(Wish(WISH.targets, np.array([], int)), guard=None).steps(MASKS[1:2])[0]
    assert (nothing["guard_score"], nothing["guard_smooth"]) == (1.0, 1.0)


def test_the_worst_group_is_told_and_aimed_at():
    wish = Wish(WISH.targets, WISH.references, worst_group=True)
    found = search(wish, GROUPS[:8])
    rows = np.arange(8)
    width = 0.3 * np.abs(margins(np.ones(C), rows)).mean()
    assert found.width == pytest.approx(width)
    for mask, step in zip(MASKS, found.steps(MASKS), strict=True):
        right = logits(mask)[rows].argmax(1) == CODES[rows]
        expected = {name: right[GROUPS[:8] == name].mean() for name in "abc"}
        assert step["groups"] == pytest.approx(expected)
        assert step["guard_score"] == pytest.approx(min(expected.values()))
        assert step["guard_mean"] == pytest.approx(np.mean([*expected.values()]))
        smooth = sigmoid(margins(mask, rows) / width)
        means = [smooth[GROUPS[:8] == name].mean() for name in "abc"]
        assert step["aim"] == pytest.approx(min(means) + 0.1 * np.mean(means))


def test_the_worst_group_is_raised_in_the_order_of_the_linear_models():
    wish = Wish(WISH.targets, WISH.references, worst_group=True)
    found = search(wish, GROUPS[:8])
    found.mask = MASKS[1].copy()  # one is gone already, and the models were fitted without it
    coefficients, outputs = RNG.normal(size=(N, C)), RNG.normal(size=N)
    fit = SimpleNamespace(coefficients=coefficients)
    orders = []
    found.further = lambda ranked, most, forced: orders.extend(ranked(m) for m in tried) or True
    tried = [MASKS[1], np.array([0, 0, 1, 1, 1], bool)]
    assert raise_worst(found, fit, outputs, GROUPS, 4, forced=False)
    for mask, order in zip(tried, orders, strict=True):
        newly = MASKS[1] & ~mask
        predicted = []
        for component in np.flatnonzero(mask):
            gone = [*np.flatnonzero(newly), component]
            fallen = outputs - coefficients[:, gone].sum(1)
            predicted.append(min(fallen[name == GROUPS].mean() for name in "abc"))
        expected = np.flatnonzero(mask)[np.argsort(-np.array(predicted), kind="stable")]
        np.testing.assert_array_equal(order, expected)


@pytest.mark.parametrize("direction", ["increase", "decrease"])
@pytest.mark.parametrize("guard", [slice(0, 8), None])
def test_what_is_left_is_ranked_by_models_from_where_rows_now_stand(direction, guard):
    wish = Wish(WISH.targets, WISH.references, direction)
    found = search(wish, guard=guard)
    coefficients = RNG.normal(size=(N, C))
    order = found.predicted(SimpleNamespace(coefficients=coefficients), MASKS[1])
    sign = 1 if direction == "increase" else -1
    ratio, harms = {}, []
    for component in range(C):
        change = {}
        for name, rows in (("target", wish.targets), ("reference", wish.references)):
            now = margins(MASKS[1], rows)
            after = sigmoid((now - coefficients[rows, component]) / found.width)
            change[name] = after - sigmoid(now / found.width)
        harms.append(np.maximum(-change["reference"], 0).mean())
        ratio[component] = sign * change["target"].mean()
    worth = {c: ratio[c] / max(harms[c], 0.2 * np.mean(harms)) for c in np.flatnonzero(MASKS[1])}
    best = [c for c in sorted(worth, key=lambda c: -worth[c]) if ratio[c] > 0]
    assert order[: len(best)].tolist() == best
    assert sorted(order) == np.flatnonzero(MASKS[1]).tolist()


def test_means_by_group():
    values = np.arange(4.0)
    assert _means(values, np.array([1, 0, 1, 0])) == {0: 2.0, 1: 1.0}
    assert _means(values, np.array(["x", "y", "y", "y"])) == {"x": 0.0, "y": 2.0}


def test_rows_are_right_where_the_largest_of_two_or_more_outputs_is_theirs():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    rows = Rows(torch.zeros(2, 1))
    assert _right(outputs, Asked(rows, torch.tensor([1, 1]))).tolist() == [True, False]
    unknown = [
        (outputs[:, :1], torch.tensor([0, 0])), (outputs, torch.tensor([0.5, 0.0])),
        (outputs, torch.tensor([[0, 1], [1, 0]])), (outputs, None),
        (outputs[:, 0], torch.tensor([0, 1])),
    ]  # fmt: skip
    for values, targets in unknown:
        assert torch.isnan(_right(values, Asked(rows, targets))).all()


def test_selections_of_rows():
    np.testing.assert_array_equal(rows_of(None, 4, "target"), range(4))
    np.testing.assert_array_equal(rows_of([-1, 0], 4, "target"), [3, 0])
    np.testing.assert_array_equal(rows_of(2, 4, "target"), [2])
    np.testing.assert_array_equal(rows_of([True, False, True, False], 4, "target"), [0, 2])
    for wrong, message in (
        ([False] * 4, "selects no row"), ([True] * 3, "boolean mask of shape"),
        ([0.5], "row indices or a boolean"), ([4], "names row 4"), (np.zeros(0, int), "no row"),
        ([[0, 1]], "row indices"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"target.*{message}|{message}"):
            rows_of(wrong, 4, "target")


def test_whoever_is_not_to_change_is_spared():
    wish = wish_of([1, -1], None, 4)
    np.testing.assert_array_equal(wish.targets, [1, 3])
    np.testing.assert_array_equal(wish.references, [0, 2])
    np.testing.assert_array_equal(wish_of([1], [0], 4).references, [0])


@pytest.mark.parametrize("criterion", ["budgeted", "welch"])
@pytest.mark.parametrize("known", [True, False])
def test_errors_of_coefficients_are_read_by_budgets_alone(criterion, known):
    rng = np.random.default_rng(1)
    coefficients = rng.normal(size=(N, C))
    stderr = np.full((N, C), 0.0)
    stderr[:, 0] = 50.0 if known else np.nan  # what is not known at all comes last
    wish = Wish(WISH.targets, np.array([], int), criterion=criterion)
    order = wish.order(SimpleNamespace(coefficients=coefficients, stderr=stderr), criterion)
    target = coefficients[wish.targets]
    if criterion == "welch":
        errors = target.std(0) / np.sqrt(3)
        expected = np.argsort(target.mean(0) / errors, kind="stable")
    else:
        gain = -target.mean(0)
        gain[0] = 0.0 if known else gain[0]
        positive = [i for i in np.argsort(-gain) if gain[i] > 0]
        expected = np.array(positive)
        order = order[: len(positive)]
    np.testing.assert_array_equal(order, expected)
