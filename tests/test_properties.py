"""Public functions of the mathematics against loops and closed forms, and their invariances."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize_scalar
from sklearn.covariance import ShrunkCovariance
from sklearn.metrics import log_loss as sklearn_log_loss

from skperf import metrics
from skperf.components.designs import Plan, bernoulli_masks, path_gates, plan_budget
from skperf.components.estimation import mean_correlation, pair_effects, ridge
from skperf.components.priors import PathSums, Prior, path_prior, pooled_slopes, population
from skperf.influence.damping import noise_damping
from skperf.influence.neighbours import nearest
from skperf.influence.solvers import conjugate_gradient, neumann
from skperf.performative import label_shift
from skperf.performative.diagnostics import cycling, extrapolation, identifiability
from skperf.performative.equilibrium import plain_gaps, stable_prior
from skperf.performative.trajectory import smoothed_confusion, smoothed_shares
from skperf.reprogramming import rejection
from skperf.reprogramming.black_box import estimated_gradient
from skperf.reprogramming.label_mapping import bayesian, cooccurrence, one_to_one, random_mapping

SEEDS = range(5)
rng_of = np.random.default_rng


# Metrics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_datamodeling_score_is_the_mean_of_spearmans(seed):
    rng = rng_of(seed)
    influence, subsets = rng.normal(size=(4, 9)), rng.random((12, 9)) > 0.5
    losses = rng.normal(size=(12, 4)).round(1)  # some tie
    expected = [
        stats.spearmanr([influence[q] @ kept for kept in subsets], -losses[:, q]).statistic
        for q in range(4)
    ]
    found = metrics.linear_datamodeling_score(influence, subsets, losses)
    assert found == pytest.approx(np.mean(expected))
    assert metrics.linear_datamodeling_score(3 * influence, subsets, losses) == pytest.approx(found)
    assert metrics.linear_datamodeling_score(-influence, subsets, losses) == pytest.approx(-found)


@pytest.mark.parametrize("seed", SEEDS)
def test_counterfactual_correlation_is_the_mean_of_pearsons(seed):
    rng = rng_of(seed)
    predicted, actual = rng.normal(size=(2, 3, 7))
    expected = [np.corrcoef(p, a)[0, 1] for p, a in zip(predicted, actual, strict=True)]
    found = metrics.counterfactual_correlation(predicted, actual)
    assert found == pytest.approx(np.mean(expected))
    assert mean_correlation(predicted, actual) == pytest.approx(found)
    shifted = 2 * predicted + rng.normal(size=(3, 1))
    assert metrics.counterfactual_correlation(shifted, actual) == pytest.approx(found)
    actual[1] = 4.0
    left = (expected[0] + expected[2]) / 3
    assert metrics.counterfactual_correlation(predicted, actual) == pytest.approx(left)
    # where nothing is said of a row it does not count
    assert mean_correlation(predicted, actual) == pytest.approx(1.5 * left)


@pytest.mark.parametrize("seed", SEEDS)
def test_rejection_metrics_by_counting(seed):
    rng = rng_of(seed)
    labels = np.r_[np.ones(33), np.zeros(21)].astype(int)
    scores = rng.normal(labels, 1).round(1)
    inside, outside = scores[labels == 1], scores[labels == 0]
    wins = [(i > o) + 0.5 * (i == o) for i in inside for o in outside]
    assert metrics.ood_auroc(labels, scores) == pytest.approx(np.mean(wins))
    threshold = max(t for t in scores if (inside >= t).mean() >= 0.95)
    expected = (outside >= threshold).mean()
    assert metrics.fpr_at_95_tpr(labels, scores) == pytest.approx(expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_thresholded_confidence_is_exact_on_its_own_rows(seed):
    rng = rng_of(seed)
    scores, correct = rng.integers(0, 6, 40) / 6, rng.random(40) > 0.3
    assert metrics.atc_accuracy(scores, correct, scores) == pytest.approx(correct.mean())
    assert metrics.atc_accuracy(scores, correct, np.full(5, 2.0)) == 1
    assert metrics.atc_accuracy(scores, correct, np.full(5, -2.0)) == 0
    assert metrics.atc_accuracy(scores, np.ones(40, bool), np.full(3, scores.min())) == 1


# Label shift -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_corrections_follow_bayes_and_losses_are_scikit_learns(seed):
    rng = rng_of(seed)
    logits, codes = rng.normal(size=(30, 4)), rng.integers(0, 4, 30)
    one, two = np.log(rng.dirichlet(np.ones(4), 2))
    p = np.exp(logits) * np.exp(two - one)
    corrected = label_shift.probabilities(logits + two - one)
    np.testing.assert_allclose(corrected, p / p.sum(1, keepdims=True))
    weight = rng.uniform(0.1, 3, 30)
    expected = sklearn_log_loss(codes, corrected, sample_weight=weight, labels=range(4))
    found = label_shift.log_loss(logits + two - one, codes, weight)
    assert found == pytest.approx(expected)
    np.testing.assert_allclose(np.exp(label_shift.log_softmax(logits, axis=0)).sum(0), 1)
    confusion = label_shift.soft_confusion(corrected, codes, weight)
    naive = [(weight[codes == k, None] * corrected[codes == k]).sum(0) for k in range(4)]
    np.testing.assert_allclose(confusion, naive)


@pytest.mark.parametrize("seed", SEEDS)
def test_confusion_inversion_finds_the_mix_that_made_the_mean(seed):
    rng = rng_of(seed)
    confusion = rng.uniform(0, 10, (3, 3)) + 60 * np.eye(3)
    mix = rng.dirichlet(np.full(3, 4))
    filled = confusion + 2.0 * np.eye(3)
    proba = (mix @ (filled / filled.sum(1, keepdims=True)))[None]
    found = label_shift.bbse_prior(proba, confusion, pseudo_count=2.0)
    np.testing.assert_allclose(found, mix, atol=1e-5)


@pytest.mark.parametrize("l2", [0.5, 8.0])
def test_base_mix_minimises_its_penalised_loss(l2):
    rng = rng_of(0)
    logits, codes, weight = rng.normal(size=(60, 3)), rng.integers(0, 3, 60), rng.uniform(0, 2, 60)
    counts = np.array([weight[codes == k].sum() for k in range(3)])
    shares = (counts + 1 / 3) / (counts.sum() + 1)

    def at(heat, prior):  # the logarithm of a temperature
        scores = logits * np.exp(-heat) + np.log(counts / counts.sum()) - np.log(prior)
        chosen = scores[np.arange(60), codes] - np.log(np.exp(scores).sum(1))
        # the level of the log mix is free: the nearest to the centre
        distance = np.log(prior) - np.log(shares)
        penalty = ((distance - distance.mean()) ** 2).sum() + heat**2
        return -(weight * chosen).sum() + l2 / 2 * penalty

    def objective(prior):
        return minimize_scalar(at, args=(prior,), bounds=(-8, 8), method="bounded").fun

    found = label_shift.estimate_base_prior(logits, codes, l2=l2, weight=weight, max_iter=500)
    best = objective(found)
    for _ in range(200):
        assert best <= objective(rng.dirichlet(found * 400)) + 1e-4


# Records of rounds -----------------------------------------------------------------------------


def test_diagnostics_by_hand():
    rng = rng_of(0)
    statistics = rng.normal(size=(7, 2)) @ rng.normal(size=(2, 4)) + 3
    values = np.linalg.svd(statistics - statistics.mean(0), compute_uv=False) ** 2
    found = identifiability(statistics)
    assert found["rank"] == 2
    assert found["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert found["spread"] == pytest.approx(np.sqrt(statistics.var(0).sum()))
    assert identifiability(np.full((5, 3), 0.7)) == {"rank": 0, "effective_rank": 0, "spread": 0}

    seen, new = rng.normal(size=(6, 3)), rng.normal(size=3)
    apart = np.linalg.norm(seen[:, None] - seen, axis=2) + 99 * np.eye(6)
    expected = min(np.linalg.norm(new - one) for one in seen) / apart.min(0).max()
    assert extrapolation(new, seen) == pytest.approx(expected)
    assert extrapolation(new, seen[:1]) == 0

    counts = rng.integers(1, 50, (9, 3)).astype(float)
    shares = (counts + 1 / 3) / (counts.sum(1, keepdims=True) + 1)
    near = np.mean([abs(shares[t + 1] - shares[t]).sum() / 2 for t in range(8)])
    far = np.mean([abs(shares[t + 2] - shares[t]).sum() / 2 for t in range(7)])
    found = cycling(counts)
    assert found["tv_1"] == pytest.approx(near)
    assert found["tv_2"] == pytest.approx(far)
    assert found["cycling_index"] == pytest.approx(max(0, 1 - far / near))


@pytest.mark.parametrize("seed", SEEDS)
def test_smoothed_shares_and_confusions_by_counting(seed):
    rng = rng_of(seed)
    codes, predicted = rng.integers(0, 3, (2, 25))
    weight, right = rng.uniform(0.5, 2, 25), codes == predicted
    pooled = (weight * right).sum() / weight.sum()
    expected = [
        ((weight * right)[codes == k].sum() + 1.5 * pooled) / (weight[codes == k].sum() + 1.5)
        for k in range(4)
    ]
    found = smoothed_shares(codes, right, 4, weight, 1.5)
    np.testing.assert_allclose(found, expected)
    shares = [weight[predicted == k].sum() / weight.sum() for k in range(3)]
    table = [
        (weight[(codes == i) & (predicted == j)].sum() + 1.5 * shares[j])
        / (weight[codes == i].sum() + 1.5)
        for i, j in itertools.product(range(3), repeat=2)
    ]
    np.testing.assert_allclose(smoothed_confusion(codes, predicted, 3, weight, 1.5), table)


def test_rest_and_gaps_of_linear_answers():
    target, turn = np.array([0.5, 0.3, 0.2]), 0.4
    rest = stable_prior(lambda q: target + turn * (q - target), np.full(3, 1 / 3), tol=1e-4)
    np.testing.assert_allclose(rest["prior"], target, atol=1e-3)
    assert rest["converged"]
    assert rest["residual"] <= 1e-4
    # an answer that swaps two classes: one step apart it moves, two steps apart it does not
    swapped = np.array([0.7, 0.2, 0.1])
    one, two = plain_gaps(lambda q: q[[1, 0, 2]], swapped)
    assert one == pytest.approx(0.5)
    assert two == pytest.approx(0.0)
    early = stable_prior(lambda q: q[[1, 0, 2]], swapped, max_iter=1, tol=0)
    assert early["n_iter"] == 1
    np.testing.assert_allclose(early["prior"], swapped + 0.1 * (swapped[[1, 0, 2]] - swapped))
    assert not early["converged"]


# Designs and estimation ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_masks_and_gates_do_not_depend_on_how_they_are_cut(seed):
    whole = bernoulli_masks(seed, range(40), 30, 0.2)
    parts = [bernoulli_masks(seed, range(a, a + 8), 30, 0.2) for a in range(0, 40, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert abs((~whole).mean() - 0.2) < 0.05
    assert (bernoulli_masks(seed, range(40), 30, 0.2, fresh=True) != whole).any()
    assert bernoulli_masks(seed, range(0), 30, 0.2).shape == (0, 30)
    gates, tested = path_gates(seed, 7, range(50, 150), 11, 4)
    for rows in (range(50, 64), range(64, 128), range(100, 150)):
        own, under = path_gates(seed, 7, rows, 11, 4)
        where = slice(rows[0] - 50, rows[-1] - 49)
        np.testing.assert_array_equal(own, gates[where])
        np.testing.assert_array_equal(under, tested[where])


@pytest.mark.parametrize(("n_components", "n_groups"), [(11, 4), (8, 2), (3, 5)])
def test_every_component_is_tested_once_a_round_at_points_that_spread(n_components, n_groups):
    points = []
    for round_ in range(24):
        passes = [
            path_gates(3, n_groups * round_ + turn, range(5), n_components, n_groups)
            for turn in range(n_groups)
        ]
        tested = np.stack([under for _, under in passes])
        assert (tested.sum(0) == 1).all()
        assert tested.sum((1, 2)).max() <= 5 * -(-n_components // n_groups)
        assert all((gates[~under] == 1).all() for gates, under in passes)
        points.append(sum(np.where(under, gates, 0) for gates, under in passes))
    points = np.sort(np.stack(points), 0)
    # twenty-four points of a golden sequence leave no gap on the circle above twice the mean
    gaps = np.diff(np.concatenate([points, points[:1] + 1]), axis=0)
    assert gaps.max() < 2.7 / 24
    assert gaps.min() > 0.3 / 24


@pytest.mark.parametrize("method", ["auto", "regression", "path_gradient"])
@pytest.mark.parametrize("budget", [12, 40, 129, 1000])
@pytest.mark.parametrize("n_components", [7, 60, 900])
@pytest.mark.parametrize("differentiable", [True, False])
def test_budgets_are_kept_and_used_up(method, budget, n_components, differentiable):
    plan = plan_budget(method, budget, n_components, 0.1, differentiable=differentiable)
    assert budget - 3 < plan.cost <= budget
    assert min(plan.gradients, plan.masks, plan.singles) >= 0
    if method == "regression" or not differentiable:
        assert plan.gradients == 0 or method == "path_gradient"
    assert plan.singles in (0, n_components)
    assert Plan(2, 5, 7).cost == 1 + 3 * 2 + 5 + 7


def ridge_by_hand(V, Y, variance, penalty):
    """Coefficients and predictions of a generalised ridge with an intercept."""
    centre, level = V.mean(0), Y.mean(0)
    gram = (V - centre).T @ (V - centre) + penalty * np.diag(1 / variance)
    coefficients = np.linalg.solve(gram, (V - centre).T @ (Y - level)).T
    return coefficients, level - coefficients @ centre


@pytest.mark.parametrize(("m", "n"), [(30, 6), (9, 14)])
def test_ridge_is_its_normal_equations_and_its_errors_leave_masks_out(m, n):
    rng = rng_of(0)
    V, Y = (rng.random((m, n)) > 0.3).astype(float), rng.normal(size=(m, 4))
    variance, penalty = rng.uniform(0.5, 2, n), 1.7
    fit = ridge(V, Y, Prior([], variance, np.zeros((4, n))), penalty=penalty)
    coefficients, intercept = ridge_by_hand(V, Y, variance, penalty)
    np.testing.assert_allclose(fit.coefficients, coefficients)
    np.testing.assert_allclose(fit.intercept, intercept)
    assert fit.penalty == penalty
    # the hat matrix by brute force, an outcome at a time
    H = np.stack([
        np.add(*(part @ V.T if i == 0 else part[:, None] for i, part in
                 enumerate(ridge_by_hand(V, np.eye(m)[:, [k]], variance, penalty))))[0]
        for k in range(m)
    ], 1)  # fmt: skip
    residual = Y - H @ Y
    left_out = residual / (1 - np.diag(H))[:, None]
    np.testing.assert_allclose(
        fit.oob_score,
        np.mean([np.corrcoef(Y[:, j] - left_out[:, j], Y[:, j])[0, 1] for j in range(4)]),
    )
    noise = residual**2 / ((np.eye(m) - H) ** 2).sum(1)[:, None]
    moved = np.stack([ridge_by_hand(V, np.eye(m)[:, [k]], variance, penalty)[0][0]
                      for k in range(m)], 1)  # fmt: skip
    np.testing.assert_allclose(fit.stderr, np.sqrt(moved**2 @ noise).T)


def test_ridge_shrinks_towards_the_mixture_of_its_prior():
    rng = rng_of(1)
    V, Y = (rng.random((20, 5)) > 0.4).astype(float), rng.normal(size=(20, 3))
    guesses, slopes = list(rng.normal(size=(2, 3, 5))), np.array([0.7, -0.3])
    mean = 0.7 * guesses[0] - 0.3 * guesses[1]
    prior = Prior(guesses, np.ones(5), np.full((3, 5), 0.4))
    fit = ridge(V, Y, prior, slopes=slopes, penalty=2.0)
    around, _ = ridge_by_hand(V, Y - V @ mean.T, np.ones(5), 2.0)
    np.testing.assert_allclose(fit.coefficients, mean + around)
    np.testing.assert_allclose(fit.intercept, Y.mean(0) - fit.coefficients @ V.mean(0), atol=1e-12)
    stiff = ridge(V, Y, prior, slopes=slopes, penalty=1e12)
    np.testing.assert_allclose(stiff.coefficients, mean, atol=1e-6)
    # where nothing is moved, the noise of the first guess is what is left
    np.testing.assert_allclose(stiff.stderr, 0.7 * np.sqrt(0.4), rtol=1e-4)


def test_sums_over_passes_are_those_of_the_passes():
    rng = rng_of(0)
    gradients, tested = rng.normal(size=(9, 3, 5)), rng.random((9, 3, 5)) > 0.5
    tested[:, 0, 0], tested[:, 1, 1] = False, True
    whole, first, second = (PathSums(5, 3) for _ in range(3))
    for t in range(9):
        whole.add(gradients[t], tested[t])
        (first if t < 4 else second).add(gradients[t], tested[t])
    first.merge(second)
    for i, j in itertools.product(range(3), range(5)):
        inside = gradients[tested[:, i, j], i, j]
        outside = gradients[~tested[:, i, j], i, j]
        open_gate = outside.mean() if len(outside) else inside.mean()
        on_path = inside.mean() if len(inside) else open_gate
        for sums in (whole, first):
            means = sums.means()
            assert means[0][i, j] == pytest.approx(on_path)
            assert means[1][i, j] == pytest.approx(open_gate)
            spread = ((inside - on_path) ** 2).sum() if len(inside) > 1 else 0.0
            assert sums.spread(means[0])[i, j] == pytest.approx(spread, abs=1e-9)
    shared = population(whole)
    pooled = [gradients[:, :, j][tested[:, :, j]].mean() for j in range(5)]
    np.testing.assert_allclose(shared.on_path, pooled)
    np.testing.assert_allclose(shared.open_gate, whole.means()[1].mean(0))
    prior = path_prior(whole, shared)
    assert len(prior.guesses) == 4
    per_test = shared.single / np.maximum(tested.sum(0), 1)
    np.testing.assert_allclose(prior.variance, per_test.mean(0))


def test_pooled_slopes_are_one_regression_over_all_examples():
    rng = rng_of(0)
    observations, left, right = [], [], []
    for _ in range(3):
        features, noise = rng.normal(size=(2, 8, 5)), rng.normal(size=(8, 5))
        outcomes = 3 * features[0] - features[1] + 0.1 * noise
        observations.append((features, outcomes))
        scale = outcomes.std(0)
        left.append(((features - features.mean(1, keepdims=True)) / scale).reshape(2, -1))
        right.append(((outcomes - outcomes.mean(0)) / scale).ravel())
    expected = np.linalg.lstsq(np.hstack(left).T, np.concatenate(right), rcond=None)[0]
    np.testing.assert_allclose(pooled_slopes(observations), expected, rtol=2e-3)


def test_pairs_are_second_differences():
    masks = np.array(list(itertools.product([False, True], repeat=4)) * 3)
    V, rng = masks.astype(float), rng_of(0)
    linear, strength = rng.normal(size=(2, 4)), np.array([1.5, -0.7])
    outcomes = V @ linear.T + (V[:, 1] * V[:, 3])[:, None] * strength
    fit = ridge(V, outcomes, penalty=1e-9)
    pairs, values, _, together = pair_effects(masks, outcomes, fit, np.array([1, 2, 3]))
    assert pairs.tolist() == [[1, 2], [1, 3], [2, 3]]
    at = {tuple(row): outcomes[i] for i, row in enumerate(V[:16].astype(int))}
    expected = -(at[0, 1, 0, 1] - at[0, 1, 0, 0] - at[0, 0, 0, 1] + at[0, 0, 0, 0])
    np.testing.assert_allclose(values[:, 1], expected, rtol=1e-3)
    np.testing.assert_allclose(values[:, [0, 2]], 0, atol=1e-3)
    assert together.tolist() == [12, 12, 12]


# Influence -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_solvers_solve(seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / 12 + 0.3 * torch.eye(12)
    right = torch.randn(3, 12, generator=generator, dtype=torch.float64)
    right *= torch.tensor([[1.0], [1e-4], [1e3]])
    expected = torch.linalg.solve(matrix, right.T).T
    solved = conjugate_gradient(lambda v: v @ matrix, right, tol=1e-8)
    assert solved.converged
    torch.testing.assert_close(solved.values, expected, rtol=1e-5, atol=1e-9)
    left = (right - solved.values @ matrix).norm(dim=1) / right.norm(dim=1)
    assert float(left.max()) <= 1.1e-8
    cut = conjugate_gradient(lambda v: v @ matrix, right, tol=1e-8, max_iter=2)
    assert cut.n_iterations == 2
    assert not cut.converged
    torch.testing.assert_close(
        cut.residual, (right - cut.values @ matrix).norm(dim=1) / right.norm(dim=1)
    )
    scale = 1.1 * float(torch.linalg.eigvalsh(matrix)[-1])
    summed = neumann(lambda v, i: v @ matrix, right, scale=scale, tol=1e-10, max_iter=5000)
    torch.testing.assert_close(summed.values, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 30])
def test_nearest_rows_by_counting(k):
    generator = torch.Generator().manual_seed(0)
    train, queries = (torch.randn(n, 4, generator=generator) for n in (17, 5))
    groups = np.arange(17) % 3
    distances = np.array([[float((q - t).norm()) for t in train] for q in queries])
    found = nearest(train, queries, k, chunk=2)
    of_groups = nearest(train, queries, k, groups=groups)
    for i, row in enumerate(distances):
        assert set(found[i]) == set(np.argsort(row)[:k])
        best = [np.flatnonzero(groups == g)[np.argsort(row[groups == g])[:k]] for g in range(3)]
        assert set(of_groups[i]) == set(np.concatenate(best))


def test_damping_of_noise_by_hand():
    shares, weights = torch.tensor([0.5, 0.3, 0.2]), [torch.tensor([3.0]), torch.tensor([[4.0]])]
    expected = (7.0 * (0.25 + 0.09 + 0.04)) ** 0.5 / 5
    assert noise_damping(7.0, shares, weights) == pytest.approx(expected, rel=1e-6)
    assert noise_damping(28.0, shares, weights) == pytest.approx(2 * expected, rel=1e-6)
    assert noise_damping(0.0, shares, weights) == 1e-8


# Reprogramming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_rejection_scores_by_hand(temperature):
    s = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = np.exp(s.numpy() / temperature)
    total = p.sum(1)
    p = p / total[:, None]
    expected = {
        "mcm": p.max(1),
        "max_logit": s.numpy().max(1),
        "energy": temperature * np.log(total),
        "entropy": (p * np.log(p)).sum(1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(rejection.SCORES[name](s, temperature).numpy(), values)


def test_feature_scores_by_hand():
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(60) % 3 * 2  # a class without rows between
    centres = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    rows = centres[codes] + torch.randn(60, 4, generator=generator, dtype=torch.float64)
    new = torch.randn(7, 4, generator=generator, dtype=torch.float64)

    means = torch.stack([rows[codes == k].mean(0) for k in (0, 2, 4)])
    residuals = (rows - means[codes // 2]).numpy()
    share = 4 / 64
    fitted = ShrunkCovariance(shrinkage=share, assume_centered=True).fit(residuals)
    covariance = fitted.covariance_ * 60 / 57
    inverse = np.linalg.inv(covariance)
    differences = new.numpy()[:, None] - means.numpy()
    squared = np.einsum("nkd,de,nke->nk", differences, inverse, differences)
    found = rejection.Gaussians.fit(rows, codes).score(new)
    np.testing.assert_allclose(found.numpy(), -squared.min(1), rtol=1e-6)

    def unit(values):
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    cosines = np.sort(unit(new.numpy()) @ unit(rows.numpy()).T, 1)[:, ::-1]
    neighbours = rejection.Neighbours.fit(rows, codes)
    assert neighbours.k == 1
    np.testing.assert_allclose(neighbours.score(new).numpy(), cosines[:, 0], rtol=1e-6)
    further = rejection.Neighbours(neighbours.rows, 5)
    np.testing.assert_allclose(further.score(new).numpy(), cosines[:, 4], rtol=1e-6)
    many = rejection.Neighbours.fit(rows.repeat(5, 1), codes.repeat(5))
    assert many.k == 6

    flat = rows * torch.tensor([5.0, 4.0, 0.1, 0.1])  # two directions hold 95 %
    centred = (flat - flat.mean(0)).numpy()
    _, _, directions = np.linalg.svd(centred)
    apart = new.numpy() - flat.mean(0).numpy()
    outside = np.linalg.norm(apart @ directions[2:].T, axis=1) / np.linalg.norm(apart, axis=1)
    found = rejection.VirtualLogit.fit(flat, codes).score(new)
    np.testing.assert_allclose(found.numpy(), -outside, rtol=1e-6)


@pytest.mark.parametrize("retention", [0.8, 0.95])
def test_a_threshold_keeps_the_share_of_fresh_rows_that_was_asked_for(retention):
    rng = rng_of(0)
    kept = [
        1 - stats.norm.cdf(rejection.retention_threshold(rng.normal(size=39), retention))
        for _ in range(2000)
    ]
    assert np.mean(kept) == pytest.approx(retention, abs=0.004)


def test_left_out_aurocs_by_counting():
    codes = torch.tensor([0, 3, 3, 0, 5, 5, 3, 0, 0, 3, 5, 3])
    scores, asked_for = rng_of(0).integers(0, 4, 12).astype(float), []

    def score(known, asked):
        asked_for.append((known, asked))
        return torch.tensor(scores[asked])

    found = rejection.left_out_aurocs(score, codes, 3)
    assert len(found) == 3
    for value, code, (known, asked) in zip(found, (0, 3, 5), asked_for, strict=True):
        outside = np.flatnonzero(codes.numpy() == code)
        fresh = np.setdiff1d(asked, outside)
        assert sorted([*known, *asked]) == list(range(12))
        assert set(outside) <= set(asked)
        assert len(fresh) == max(1, (12 - len(outside)) // 5)
        wins = [
            float(scores[i] > scores[o]) + 0.5 * float(scores[i] == scores[o])
            for i in fresh
            for o in outside
        ]
        assert value == pytest.approx(np.mean(wins))
    asked_for.clear()
    assert len(rejection.left_out_aurocs(score, codes, 2)) == len(asked_for) == 2


@pytest.mark.parametrize("top", [None, 2, 50])
def test_cooccurrence_by_counting(top):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    codes, weight = torch.arange(20) % 3, torch.rand(20, generator=generator)
    expected = np.zeros((6, 3))
    for row, code, w in zip(logits, codes, weight, strict=True):
        p = torch.softmax(row, 0)
        best = row.argsort(descending=True)[: 1 if top is None else top]
        for label in best:
            expected[label, code] += float(w) * (1.0 if top is None else float(p[label]))
    found = cooccurrence(logits, codes, 3, weight=weight, top=top)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_mappings_by_hand():
    counts = torch.tensor([[9.0, 8.0], [7.0, 1.0], [2.0, 3.0], [0.0, 0.0], [1.0, 6.0]])
    assert one_to_one(counts).tolist() == [[1, 0], [0, 0], [0, 0], [0, 0], [0, 1]]
    assert one_to_one(counts, 2).tolist() == [[0.5, 0], [0.5, 0], [0, 0.5], [0, 0], [0, 0.5]]
    given = counts / (counts.sum(1, keepdim=True) + 2)
    torch.testing.assert_close(bayesian(counts, 2.0), given / given.sum(0))
    empty = torch.cat([counts, torch.zeros(5, 1)], 1)
    torch.testing.assert_close(bayesian(empty)[:, 2], torch.full((5,), 0.2))
    drawn = random_mapping(9, 4, 2, torch.Generator().manual_seed(0))
    assert (drawn.sum(0) == 1).all()
    assert ((drawn > 0).sum(1) <= 1).all()
    assert ((drawn > 0).sum(0) == 2).all()
    with pytest.raises(ValueError, match="needs 6; the encoder has 5"):
        one_to_one(counts, 3)
    assert one_to_one(counts[:, :1], 5).sum() == 1


@pytest.mark.parametrize("kind", ["rge", "spsa"])
def test_estimated_gradients_tend_to_the_gradient(kind):
    slope = torch.linspace(-1, 2, 6, dtype=torch.float64)
    curve = torch.linspace(0.5, 1, 6, dtype=torch.float64)

    def loss(point):
        return (slope * point).sum() + (curve * point.square()).sum() / 2

    point = torch.ones(6, dtype=torch.float64)
    found = estimated_gradient(
        kind,
        loss,
        point,
        loss(point),
        n_directions=5_000,
        step=1e-4,
        generator=torch.Generator().manual_seed(0),
    )
    torch.testing.assert_close(found, slope + curve, rtol=0, atol=0.24)
