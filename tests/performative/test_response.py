"""Response maps against closed forms, brute force and known worlds."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

from skperf.performative._neural import fit_neural
from skperf.performative._options import MAPS
from skperf.performative.response import (
    SLOPE_SHARE,
    Form,
    Inputs,
    deviance,
    dispersion,
    fit_map,
    known_rounds,
)
from skperf.performative.trajectory import Trajectory

K, R = 4, 40
EQUAL = np.log(np.full(K, 1 / K))
FORMS = {kind: form for kind, name, _, form, _ in MAPS if not name}


def rounds(answer, *, n_rounds=R, size=1000, seed=0):
    rng = np.random.default_rng(seed)
    statistics = rng.uniform(0.2, 1.0, size=(n_rounds, K))
    counts = np.array([rng.multinomial(size, answer(s)) for s in statistics], float)
    return at(statistics), counts


def fit(name, inputs, counts, **keywords):
    form = FORMS[name] if isinstance(name, str) else name
    return fit_map(inputs, counts, form=form, log_base=EQUAL, **keywords)


def at(statistics, n_classes=K):
    """Statistics (R, S) of which nothing else is known."""
    n, none = len(statistics), np.zeros((len(statistics), 0))
    unknown = np.full((n, 1, n_classes), np.nan)
    return Inputs(statistics[:, None], unknown, unknown[:, 0], none, none)


def adversarial(temperature=0.3):
    return lambda s: softmax(-s / temperature)


def divergence(p, log_q):
    return np.sum(p * (np.log(p) - log_q), axis=1).mean()


def test_fixed_map_is_the_pooled_mix():
    inputs, counts = rounds(adversarial())
    response = fit("fixed", inputs, counts, l2=1e-9)
    pooled = counts.sum(axis=0) / counts.sum()
    np.testing.assert_allclose(np.exp(response.log_prior(inputs[:1])[0]), pooled, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_tied_slope_is_recovered(temperature):
    inputs, counts = rounds(adversarial(temperature), n_rounds=30)
    response = fit("tied", inputs, counts)
    assert -response.coefficients[0] == pytest.approx(1 / temperature, rel=0.1)
    fresh = np.random.default_rng(1).uniform(0.2, 1.0, size=(50, K))
    truth = softmax(-fresh / temperature, axis=1)
    assert divergence(truth, response.log_prior(at(fresh))) < 0.01


def test_tied_map_is_the_minimum_of_its_objective():
    inputs, counts = rounds(adversarial(), n_rounds=6, size=30)

    def objective(theta):
        log_prior = log_softmax(EQUAL + theta[:K] + theta[K] * inputs.statistics[:, 0], axis=1)
        return -np.sum(counts * log_prior) + 0.5 * (
            theta[:K] @ theta[:K] + SLOPE_SHARE * theta[K] ** 2
        )

    brute = minimize(objective, np.zeros(K + 1), tol=1e-10).x
    response = fit("tied", inputs, counts, l2=1.0)
    assert response.coefficients[0] == pytest.approx(brute[K], abs=1e-3)
    np.testing.assert_allclose(response.offset, brute[:K], atol=1e-3)


@pytest.mark.parametrize("n_rounds", [5, 40], ids=["fewer rounds than classes", "more"])
def test_maps_of_many_classes_are_the_minimum_of_their_objectives(n_rounds):
    rng, k = np.random.default_rng(0), 12
    base = np.log(rng.dirichlet(np.full(k, 3.0)))
    statistics = rng.uniform(0.2, 1.0, size=(n_rounds, k))
    counts = np.array([rng.multinomial(50, softmax(-s / 0.3)) for s in statistics], float)
    inputs, own = at(statistics, k), statistics - statistics.mean(axis=1)[:, None]

    def tied(theta):
        log_prior = log_softmax(base + theta[:k] + theta[k] * own, axis=1)
        cost = theta[:k] @ theta[:k] + SLOPE_SHARE * theta[k] ** 2
        return -np.sum(counts * log_prior) + 0.5 * cost

    brute = minimize(tied, np.zeros(k + 1), options={"gtol": 1e-6}).x
    shared = fit_map(inputs, counts, form=FORMS["tied"], log_base=base)
    np.testing.assert_allclose(shared.offset, brute[:k], atol=1e-4)
    assert shared.coefficients[0] == pytest.approx(brute[k], abs=1e-4)

    # a matrix is fitted on top of the offsets alone
    fixed = base + fit_map(inputs, counts, form=Form(), log_base=base).offset
    columns = np.column_stack([np.ones(n_rounds), statistics - statistics.mean(axis=0)])

    def free(theta):
        log_prior = log_softmax(fixed + columns @ theta.reshape(k, -1).T, axis=1)
        return -np.sum(counts * log_prior) + 0.5 * theta @ theta

    linear = fit_map(inputs, counts, form=Form((), ("statistic",)), log_base=base)
    theta = np.column_stack([base + linear.offset - fixed, linear.matrix]).ravel()
    assert free(theta) < minimize(free, np.zeros(k * (k + 1)), options={"gtol": 1e-3}).fun + 1e-3


def test_linear_map_is_the_minimum_of_its_objective():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(K, K)) * 2
    inputs, counts = rounds(lambda s: softmax(matrix @ s), n_rounds=200)
    response = fit("linear", inputs, counts)
    fresh = rng.uniform(0.2, 1.0, size=(50, K))
    assert divergence(softmax(fresh @ matrix.T, axis=1), response.log_prior(at(fresh))) < 1e-3
    restarted = fit("linear", inputs, counts, start=response)
    expected, found = (np.exp(one.log_prior(at(fresh))) for one in (response, restarted))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_curve_follows_what_a_slope_cannot():
    def bent(s):
        return softmax(-np.tanh(6 * (s - s.mean())) / 0.3)

    inputs, counts = rounds(bent, n_rounds=60)
    fresh = np.random.default_rng(1).uniform(0.2, 1.0, size=(50, K))
    truth = np.array([bent(s) for s in fresh])
    straight = divergence(truth, fit("tied", inputs, counts).log_prior(at(fresh)))
    curved = divergence(truth, fit("curve", inputs, counts).log_prior(at(fresh)))
    assert curved < 0.25 * straight
    assert curved < 0.05


@pytest.mark.parametrize("name", FORMS)
def test_a_class_that_never_occurs_keeps_a_share(name):
    inputs, counts = rounds(lambda s: np.array([0.5, 0.3, 0.2, 0.0]))
    response = fit(name, inputs, counts)
    log_prior = response.log_prior(inputs)
    assert np.isfinite(log_prior).all()
    np.testing.assert_allclose(np.exp(log_prior).sum(axis=1), 1.0)


@pytest.mark.parametrize("name", FORMS)
def test_one_round_of_one_label_moves_little(name):
    half = at(np.full((1, K), 0.5))
    response = fit(name, half, np.eye(K)[:1])
    moved = 0.5 * np.abs(np.exp(response.log_prior(half)[0]) - 1 / K).sum()
    assert moved < 0.35


def test_linear_map_takes_any_statistic():
    rng = np.random.default_rng(0)
    statistics = rng.normal(size=(60, 2))
    matrix = rng.normal(size=(K, 2))
    truth = softmax(statistics @ matrix.T, axis=1)
    response = fit(Form(free=("statistic",)), at(statistics), 1000 * truth)
    assert divergence(truth, response.log_prior(at(statistics))) < 1e-3


def lived(step, n_rounds=80, seed=0):
    """Counts of a world whose log mixes follow a rule of their own, and what was known before."""
    rng = np.random.default_rng(seed)
    logs, record = [rng.normal(size=K), rng.normal(size=K)], Trajectory.empty(K, K)
    for t in range(n_rounds):
        logs.append(step(logs, t))
        counts = rng.multinomial(2000, softmax(logs[-1])).astype(float)
        record = record.append(t, rng.uniform(0.2, 1.0, size=K), counts)
    return *record.pairs(), softmax(np.array(logs[3:]), axis=1)


@pytest.mark.parametrize(
    ("form", "step"),
    [
        (Form((), (), "previous"), lambda logs, t: logs[-1] + np.array([0.03, 0, -0.01, -0.02])),
        (
            Form(("change",), (), "previous"),
            lambda logs, t: logs[-1] + 0.9 * (logs[-1] - logs[-2]),
        ),
        (
            Form(("mix", "mix_2", "mix_3"), (), "previous"),
            lambda logs, t: np.sin(2 * np.pi * t / 12 + np.arange(K)),
        ),
    ],
    ids=["trend", "momentum", "season"],
)
def test_what_mixes_do_on_their_own_is_followed(form, step):
    inputs, counts, truth = lived(step)
    fixed = divergence(truth[60:], fit("fixed", inputs[:60], counts[:60]).log_prior(inputs[60:]))
    response = fit(form, inputs[:60], counts[:60])
    assert divergence(truth[60:], response.log_prior(inputs[60:])) < max(0.02, 0.1 * fixed)
    # the first rounds have no past: nothing is said of them
    assert np.isnan(response.log_prior(Trajectory.empty(K, K).coming())).all()


def test_shares_confusions_and_covariates_are_read():
    rng = np.random.default_rng(0)
    n = 120
    shares = rng.dirichlet(np.full(K, 3.0), size=n)
    tables = rng.dirichlet(np.ones(K), size=(n, K))
    taken = tables.sum(axis=1) - np.diagonal(tables, axis1=1, axis2=2)
    covariates = rng.normal(size=(n, 2)) * [1.0, 100.0]
    inputs = Inputs(
        np.full((n, 2, K), np.nan),
        np.full((n, 3, K), np.nan),
        shares,
        tables.reshape(n, -1),
        covariates,
    )
    matrix = rng.normal(size=(K, 2)) / [1.0, 100.0]
    for form, truth in (
        (Form(("shares",)), softmax(-4 * shares, axis=1)),
        (Form(("taken",)), softmax(2 * taken, axis=1)),
        (Form((), ("covariates",)), softmax(covariates @ matrix.T, axis=1)),
    ):
        counts = np.array([rng.multinomial(3000, mix) for mix in truth], float)
        response = fit(form, inputs[:90], counts[:90])
        assert divergence(truth[90:], response.log_prior(inputs[90:])) < 0.005


def test_dispersion_of_pure_and_of_noisy_rounds():
    inputs, counts = rounds(adversarial(), n_rounds=200)
    response = fit("tied", inputs, counts)
    assert dispersion(response, inputs, counts) < 1.3
    rng = np.random.default_rng(0)
    noisy = np.array([rng.multinomial(1000, p) for p in rng.dirichlet(np.full(K, 5.0), 200)])
    level = fit("fixed", inputs, noisy.astype(float))
    # a Dirichlet of total A inflates the variance of n labels by (n + A) / (1 + A)
    assert dispersion(level, inputs, noisy) == pytest.approx(1020 / 21, rel=0.25)


def test_deviance_of_the_realised_mix_is_zero():
    counts = np.array([[3.0, 1.0, 0.0, 0.0]])
    realised = np.log(np.maximum(counts / 4, 1e-300))
    np.testing.assert_allclose(deviance(realised, counts), 0.0, atol=1e-12)
    expected = 2 * (3 * np.log(0.75 * K) + np.log(0.25 * K))
    np.testing.assert_allclose(deviance(EQUAL[None], counts), expected)


def test_neural_map_learns_and_is_reproducible():
    inputs, counts = rounds(adversarial(), n_rounds=100)
    one, two = (
        fit_neural(inputs, counts, log_base=EQUAL, hidden=(32,), max_epochs=60, seed=3)
        for _ in range(2)
    )
    fresh = np.random.default_rng(1).uniform(0.3, 0.9, size=(50, K))
    np.testing.assert_array_equal(one.log_prior(at(fresh)), two.log_prior(at(fresh)))
    truth = softmax(-fresh / 0.3, axis=1)
    assert divergence(truth, one.log_prior(at(fresh))) < 0.3 * divergence(truth, EQUAL[None])
    further = fit_neural(inputs, counts, log_base=EQUAL, hidden=(32,), max_epochs=60, start=one)
    assert divergence(truth, further.log_prior(at(fresh))) < divergence(truth, EQUAL[None])


@pytest.mark.parametrize("same", [True, False])
def test_candidates_are_put_in_force_before_the_coming_round(same):
    rng = np.random.default_rng(0)
    now = Inputs(*(rng.normal(size=(1, *s)) for s in ((2, 5), (3, K), (K,), (K * K,), (2,))))
    asked = now.statistics[:, 0] if same else rng.normal(size=(3, 5))
    found = now.at(asked)
    for i, row in enumerate(asked):
        np.testing.assert_array_equal(found.statistics[i], [row, now.statistics[0, 1]])
        np.testing.assert_array_equal(found.mixes[i], now.mixes[0])
        np.testing.assert_array_equal(found.covariates[i], now.covariates[0])
        for name in ("shares", "confusions"):  # of another model than the one asked about
            known = getattr(now, name)[0]
            told = known if same else np.full_like(known, np.nan)
            np.testing.assert_array_equal(getattr(found, name)[i], told)
    assert {len(getattr(found, name)) for name in ("shares", "confusions", "mixes")} == {len(asked)}


def test_rounds_are_known_where_all_inputs_of_a_form_are():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(4, *s)) for s in ((2, K), (3, K), (K,), (K * K,), (2,))]
    arrays[0][0, 0, 1], arrays[1][1, 0, 2], arrays[4][2, 1] = np.nan, np.nan, np.nan
    known = [known_rounds(Inputs(*arrays), form).tolist() for form in (
        Form(), Form(("statistic",)), Form((), ("covariates",)),
        Form(("statistic",), ("covariates",)), Form(anchor="previous"),
    )]  # fmt: skip
    assert known == [
        [True] * 4,
        [False, True, True, True],
        [True, True, False, True],
        [False, True, False, True],
        [True, False, True, True],
    ]
