"""Rankings of components and the search for their number."""

import numpy as np

from skperf.components.edits import Search, Wish, budgeted_order, grid_of_k, welch_order

rng = np.random.default_rng(0)


class Known(Search):
    """A search whose outcomes are a function of the components that are gone."""

    def __init__(self, n_components, outcome, **options):
        self.outcome, self.wish = outcome, Wish(np.arange(1), np.arange(0), **options)
        self.mask, self.beyond = np.ones(n_components, bool), []
        self.path = self.steps(self.mask[None])

    def steps(self, masks):
        gone = [set(np.flatnonzero(~mask).tolist()) for mask in masks]
        return [
            {"k": len(which), "aim": aim, "guard_score": score, "guard_smooth": score}
            for which in gone
            for aim, score in [self.outcome(which)]
        ]


def test_welch_equals_its_formula():
    target, reference = rng.normal(size=(6, 9)), rng.normal(size=(20, 9))
    error = np.sqrt(target.var(0) / 6 + reference.var(0) / 20)
    score = (target.mean(0) - reference.mean(0)) / error
    np.testing.assert_array_equal(
        welch_order(target, reference, increase=True), np.argsort(score, kind="stable")
    )
    assert welch_order(target, reference, increase=False)[0] == np.argmax(score)


def test_welch_survives_vanishing_variances():
    target = np.array([[0.0, -1.0, 0.0]])
    order = welch_order(target, np.zeros((3, 3)), increase=True)
    assert order[0] == 1
    assert len(welch_order(target, None, increase=True)) == 3


def test_budgeted_weighs_gain_against_harm_to_single_examples():
    target = np.array([[-1.0, -3.0, -2.0, 1.0]])
    reference = np.array([[0.1, 9.0, 1.0, -5.0], [0.1, -9.0, 1.0, -5.0]])
    np.testing.assert_array_equal(budgeted_order(target, reference, increase=True), [0, 2, 1, 3])
    np.testing.assert_array_equal(budgeted_order(target, None, increase=True), [1, 2, 0, 3])


def test_budgeted_does_not_trust_gains_below_their_error():
    target, error = np.array([[-1.0, -0.5]]), np.array([[2.0, 0.1]])
    assert budgeted_order(target, None, increase=True, target_error=error)[0] == 1


def test_the_search_keeps_the_best_that_is_allowed():
    outcomes = {0: (0.0, 0.9), 1: (1.0, 0.9), 2: (2.0, 0.895), 3: (3.0, 0.8), 4: (9.0, 0.5)}
    search = Known(6, lambda gone: outcomes[len(gone)], max_drop=0.01)
    search.along(np.arange(6), [0, 1, 2, 3, 4])
    assert search.k == 2
    assert [step["k"] for step in search.report()["path"]] == [0, 1, 2, 3]


def test_nothing_is_ablated_where_nothing_helps():
    search = Known(4, lambda gone: (-len(gone), 1.0), max_drop=0.1)
    search.along(np.arange(4), [0, 1, 2])
    assert not search.further(lambda mask: np.flatnonzero(mask), 4)
    assert search.k == 0


def test_another_ranking_and_single_steps_are_taken_where_they_are_better():
    def outcome(gone):  # the components 1 and 3 help, the others do harm
        return len(gone & {1, 3}) - 0.5 * len(gone - {1, 3}), 1.0 - 0.2 * (2 in gone)

    search = Known(4, outcome)
    search.along(np.array([2, 0, 3, 1]), [0, 1, 2, 3])
    assert search.k == 0
    search.along(np.array([3, 0, 2, 1]), [0, 1, 2, 3])
    assert search.further(lambda mask: np.flatnonzero(mask), 4)
    assert np.flatnonzero(~search.mask).tolist() == [1, 3]
    assert [step["k"] for step in search.path] == [0, 1, 2]


def test_more_goes_together_while_it_keeps_half_of_the_best_ones_worth():
    # four that cost nothing, one that wins most and costs most, one that costs too much
    gains, costs = [1.0, 0.9, 0.8, 0.1, 3.0, 9.0], [0.0, 0.0, 0.0, 0.0, 0.04, 0.2]

    def outcome(gone):
        return sum(gains[i] for i in gone), 1.0 - sum(costs[i] for i in gone)

    search, asked = Known(6, outcome, max_drop=0.05), []

    def ranked(mask):
        asked.append((~mask).sum())
        return np.flatnonzero(mask)

    assert search.further(ranked, 6)
    assert np.flatnonzero(~search.mask).tolist() == [0, 1, 2, 3, 4]
    assert search.path[1]["k"] in (3, 4)  # the free ones, in one pass of singles
    assert len(asked) <= 4
    few = Known(6, outcome, max_drop=0.05)
    few.further(lambda mask: np.flatnonzero(mask), 2)
    assert few.k == 2
    forced = Known(6, lambda gone: (-sum(gone), 0.0), max_drop=0.0)
    assert forced.further(lambda mask: np.flatnonzero(mask), 3, forced=True)
    assert np.flatnonzero(~forced.mask).tolist() == [0, 1, 2]


def test_the_grid_starts_at_zero_and_ends_where_asked():
    assert grid_of_k(1) == [0, 1]
    grid = grid_of_k(1000, 300)
    assert grid[:4] == [0, 1, 2, 3]
    assert grid[-1] == 300
    assert len(grid) < 25


def test_a_ranking_is_left_where_it_has_cost_the_intact_network_far_too_much():
    outcomes = {0: (0.0, 0.9), 1: (1.0, 0.82), 2: (2.0, 0.75), 3: (9.0, 0.895)}
    search = Known(4, lambda gone: outcomes[len(gone)], max_drop=0.01)
    search.along(np.arange(4), [0, 1, 2, 3])
    assert search.k == 0  # what came later was not looked at
    assert [step["k"] for step in search.beyond] == [1, 2]
