"""Masks, deals of the gates, budgets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skperf.components.designs import Plan, bernoulli_masks, path_gates, plan_budget


def test_a_mask_depends_on_the_seed_and_its_number_alone():
    together = bernoulli_masks(3, range(20), 50, 0.2)
    np.testing.assert_array_equal(together[7:9], bernoulli_masks(3, range(7, 9), 50, 0.2))
    assert not np.array_equal(together, bernoulli_masks(4, range(20), 50, 0.2))


def test_fresh_masks_are_others():
    fit, fresh = (bernoulli_masks(0, range(50), 40, 0.5, fresh=f) for f in (False, True))
    assert not (fit[:, None] == fresh[None]).all(2).any()


def test_masks_ablate_the_fraction():
    assert abs(1 - bernoulli_masks(0, range(400), 100, 0.07).mean() - 0.07) < 0.005


@given(st.integers(2, 12), st.integers(1, 40))
def test_a_round_tests_every_component_once(n_groups, n_components):
    tested = sum(
        path_gates(0, number, range(70), n_components, n_groups)[1] for number in range(n_groups)
    )
    assert (tested == 1).all()


def test_examples_have_deals_of_their_own_wherever_the_cut_is():
    gates, tested = path_gates(1, 5, range(130), 30, 4)
    later, _ = path_gates(1, 5, range(60, 70), 30, 4)
    np.testing.assert_array_equal(gates[60:70], later)
    assert not np.array_equal(tested[0], tested[1])
    assert (gates[~tested] == 1).all()


def test_points_on_the_path_are_spread_over_the_rounds():
    points = [path_gates(0, number, range(1), 9, 2) for number in range(40)]
    first = np.sort([gates[0, 0] for gates, tested in points if tested[0, 0]])
    assert len(first) == 20
    assert np.abs(first - (np.arange(20) + 0.5) / 20).max() < 0.1


@pytest.mark.parametrize("method", ["auto", "regression", "path_gradient"])
@pytest.mark.parametrize("budget", [12, 100, 511, 5000])
@pytest.mark.parametrize("fraction", [0.05, 0.3])
def test_a_plan_stays_within_its_budget(method, budget, fraction):
    plan = plan_budget(method, budget, 60, fraction)
    assert budget - 3 < plan.cost <= budget


def test_components_are_tried_alone_where_few_go_together_and_the_budget_pays_for_it():
    assert plan_budget("auto", 60, 60, 0.05).singles == 0
    assert plan_budget("auto", 61, 60, 0.05) == Plan(singles=60)
    assert plan_budget("auto", 85, 60, 0.05) == Plan(singles=60, masks=24)
    assert plan_budget("auto", 120, 60, 0.05) == Plan(singles=60, masks=32, gradients=9)
    assert plan_budget("auto", 85, 60, 0.3).singles == 0
    assert plan_budget("auto", 85, 60, 0.05, done=Plan(singles=60)) == Plan(masks=84)
    assert plan_budget("auto", 85, 60, 0.05, done=Plan(singles=50)).singles == 10


def test_fixed_plans_and_budgets_that_are_too_small():
    assert plan_budget("loo", 1, 7, 0.2) == Plan(singles=7)
    assert plan_budget("loo", 1, 7, 0.2, done=Plan(singles=7)) == Plan()
    assert plan_budget("auto", 50, 7, 0.2, differentiable=False) == Plan(singles=7, masks=42)
    with pytest.raises(ValueError, match="budget=2 is too small"):
        plan_budget("regression", 2, 7, 0.2)


def test_draws_are_those_of_earlier_releases():
    # attributions that were saved go on with the masks that they began with
    plain, fresh = (
        np.random.default_rng(np.random.SeedSequence(5, spawn_key=(purpose, 3))).random(9)
        for purpose in (0, 1)
    )
    np.testing.assert_array_equal(bernoulli_masks(5, range(3, 4), 9, 0.4)[0], plain >= 0.4)
    found = bernoulli_masks(5, range(3, 4), 9, 0.4, fresh=True)
    np.testing.assert_array_equal(found[0], fresh >= 0.4)
