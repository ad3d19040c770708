"""The released rule against plain torch, step by step."""

from copy import deepcopy

import numpy as np
import torch
from scipy.special import softmax

from skperf.performative.paper import FADE, LEARNING_RATE, fit_paper, new_map
from skperf.performative.response import Inputs

K = 4
EQUAL = np.log(np.full(K, 1 / K))


def rounds(n_rounds):
    """Statistics and label counts of a world that collects what is missed."""
    rng = np.random.default_rng(0)
    statistics, none = rng.uniform(0.2, 1.0, size=(n_rounds, K)), np.zeros((n_rounds, 0))
    counts = np.array([rng.multinomial(1000, softmax(-s / 0.3)) for s in statistics], float)
    unknown = np.full((n_rounds, 1, K), np.nan)
    return Inputs(statistics[:, None], unknown, unknown[:, 0], none, none), counts


def test_paper_adapter_makes_two_or_three_steps_a_round():
    inputs, counts = rounds(7)
    response = None
    for t in range(1, 8):
        response = fit_paper(inputs[:t], counts[:t], log_base=EQUAL, start=response)
    assert response.n_updates == 7
    steps = {state["step"].item() for state in response.optimizer.state.values()}
    assert steps == {sum(-(-t // max(1, t // 2)) for t in range(1, 8))}
    sizes = [p.numel() for p in response.module.parameters()]
    assert sum(sizes) == K * 256 + 256 + 256 * 256 + 256 + 256 * K + K


def test_paper_adapter_fades_positions_as_released():
    """Step by step in plain torch: coefficients belong to positions in the batch and persist."""
    inputs, counts = rounds(5)
    response = start = new_map(K, K, seed=0)
    module, coefficients = deepcopy(start.module), torch.ones(200)
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE)
    X = torch.as_tensor(inputs.statistics[:, 0], dtype=torch.float32)
    Y = torch.as_tensor(counts / counts.sum(axis=1, keepdims=True), dtype=torch.float32)
    for t in range(1, 6):
        response = fit_paper(inputs[:t], counts[:t], log_base=EQUAL, start=response)
        order = torch.randperm(t, generator=torch.Generator().manual_seed(t - 1))
        for rows in order.split(max(1, t // 2)):
            out = torch.nn.KLDivLoss(reduction="none")(module(X[rows]).log_softmax(1), Y[rows])
            loss = (out.mean(1) * coefficients[: len(rows)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            coefficients[: len(rows)] = coefficients[: len(rows)] * FADE
    expected = module(X).log_softmax(1).detach().double().numpy()
    np.testing.assert_allclose(response.log_prior(inputs), expected, atol=1e-5)
    np.testing.assert_allclose(response.coefficients.numpy(), coefficients[:5].numpy(), rtol=1e-6)


def test_paper_adapter_leaves_its_past_alone():
    inputs, counts = rounds(3)
    first = fit_paper(inputs, counts, log_base=EQUAL)
    before = first.log_prior(inputs)
    fit_paper(inputs, counts, log_base=EQUAL, start=first)
    np.testing.assert_array_equal(first.log_prior(inputs), before)


def test_rounds_without_labels_or_recalls_are_left_out():
    inputs, counts = rounds(6)
    gaps = inputs.statistics.copy()
    gaps[1, 0, 2] = np.nan
    holes = counts.copy()
    holes[4] = 0
    known = [0, 2, 3, 5]
    found = fit_paper(
        Inputs(gaps, inputs.mixes, inputs.shares, inputs.confusions, inputs.covariates),
        holes,
        log_base=EQUAL,
        seed=3,
    )
    expected = fit_paper(inputs[known], counts[known], log_base=EQUAL, seed=3)
    np.testing.assert_array_equal(found.log_prior(inputs), expected.log_prior(inputs))
    np.testing.assert_allclose(np.exp(found.log_prior(inputs)).sum(1), 1)
    assert len(found.coefficients) == 4


def test_a_seed_gives_the_start_and_the_global_stream_stays():
    before = torch.get_rng_state()
    one, two, other = (new_map(3, K, seed).module for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b, c in zip(one.parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
