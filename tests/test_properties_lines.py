"""Single lines of the mathematics that changes of the code went through unnoticed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.network import (
    Network,
    first_column,
    log_odds_of_probability,
    logits_of_shares,
)
from skperf.backbone.rows import Rows
from skperf.components import designs
from skperf.components.edits import Search
from skperf.influence.generalized import generalized_query
from skperf.influence.gradients import Dense, Outer, written_out
from skperf.influence.inverses import _damped_cholesky
from skperf.influence.methods import Projected
from skperf.influence.neighbours import last_layer
from skperf.influence.projections import Projection, TwoSided
from skperf.influence.repair import doubt
from skperf.performative import report
from skperf.performative.label_shift import estimate_base_prior
from skperf.performative.ranking import RECENT, gains_of
from skperf.performative.trajectory import measure_by_name
from skperf.reprogramming.rejection import Gaussians, VirtualLogit

RNG = np.random.default_rng(0)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_stored_rows_are_projected_as_their_matrices_are():
    left, right = normal(4, 3, seed=1), normal(5, 2, seed=2)
    rows = [Outer(normal(7, 4), normal(7, 5, seed=3)), Dense(normal(7, 6, seed=4))]
    maps = [TwoSided(left, right, (5, 4)), TwoSided(None, normal(6, 3, seed=5), None)]
    (found,) = Projected(Projection((), 9, 0, maps), torch.eye(9)).store(None, rows)
    matrices = written_out(rows[0]).view(7, 5, 4)
    expected = torch.einsum("noi,ok,il->nkl", matrices, right, left).flatten(1)
    torch.testing.assert_close(found.values[:, :6], expected)
    torch.testing.assert_close(found.values[:, 6:], rows[1].values @ maps[1].outputs)


@pytest.mark.parametrize("output", ["margin", "logit"])
def test_an_edit_follows_chances_for_margins_and_the_outputs_themselves_else(output):
    search = SimpleNamespace(measure=SimpleNamespace(output=output), width=2.0)
    outputs = np.array([-3.0, 0.5, 4.0])
    expected = 1 / (1 + np.exp(-outputs / 2)) if output == "margin" else outputs / 2
    np.testing.assert_allclose(Search._smooth(search, outputs), expected)


def test_a_generalised_query_takes_fifty_steps_unless_told():
    values = torch.logspace(0, -6, 120, dtype=torch.float64)
    basis = torch.linalg.qr(normal(120, 120).double())[0]
    matrix = basis @ torch.diag(values) @ basis.T
    arguments = (lambda v: v @ matrix, torch.ones(120, dtype=torch.bool), normal(2, 120).double())
    found, fifty, more = (
        generalized_query(*arguments, ridge=1e-9, tol=0.0, **steps)
        for steps in ({}, {"max_iter": 50}, {"max_iter": 51})
    )
    torch.testing.assert_close(found, fifty, rtol=0, atol=0)
    assert not torch.allclose(found, more, rtol=1e-6)


@pytest.mark.parametrize(("p_value", "told"), [(0.009, True), (0.015, False)])
def test_a_report_tells_of_classes_that_look_different_below_one_in_a_hundred(
    p_value, told, monkeypatch
):
    monkeypatch.setattr(report, "conditional_shift_p_value", lambda counts, hits: p_value)
    monkeypatch.setattr(report, "answers_the_model", lambda record: False)
    empty = SimpleNamespace(counts=np.ones((1, 2)), hits=np.ones((1, 2)), rounds=[4])
    losses = [{"none": 1.0, "adapter": 0.5, "worst_recall": 0.25, "gain_all": np.nan}]
    record = SimpleNamespace(
        anticipation=SimpleNamespace(leader="recall", trajectory=empty),
        corrector=SimpleNamespace(choice=SimpleNamespace(strength=0.5)),
        losses=losses,
    )
    notes = " ".join(str(value) for value in report._answer(record, 0).values())
    assert ("look different now" in notes) is told
    assert "worst recall of a class in the last round: 0.25" in notes


def test_a_network_computes_in_the_type_of_its_parameters_not_of_its_buffers():
    module = nn.Linear(3, 2).double()
    module.register_buffer("kept", torch.zeros(2))
    assert Network(module, None).dtype == torch.float64


def test_the_last_fifty_rounds_say_whether_the_mix_answers():
    assert RECENT == 50
    names = ("gain_all", "gain_model_free", "gain_last")
    losses = [dict.fromkeys(names, float(i)) for i in range(80)]
    losses.insert(70, dict.fromkeys(names, np.nan))
    for gains in gains_of(SimpleNamespace(losses=losses)).values():
        np.testing.assert_array_equal(gains, np.arange(30.0, 80.0))


def test_groups_of_a_seed_are_those_of_numpys_own_stream():
    source = np.random.SeedSequence(5, spawn_key=(2, 3, 1))
    draws = np.random.default_rng(source).random((64, 9), np.float32)
    expected = np.array([np.argsort(np.argsort(row)) for row in draws]) % 4
    np.testing.assert_array_equal(designs._deal(5, 3, 1, 9, 4), expected)


def test_certain_probabilities_have_finite_logits():
    certain = torch.tensor([0.0, 0.5, 1.0])
    found = log_odds_of_probability(certain)
    assert torch.isfinite(found).all()
    assert (found[:, 0] == 0).all()
    assert found[0, 1] < -80
    assert found[1, 1] == 0
    assert found[2, 1] == pytest.approx(16.6, abs=0.1)
    shares = logits_of_shares(certain[None])
    assert torch.isfinite(shares).all()
    assert shares[0, 2] == pytest.approx(16.6, abs=0.1)
    assert first_column(torch.ones(4, 3)).shape == (4, 1)


def test_doubt_of_yes_or_no_labels_is_the_mean_log_odds_against_them():
    outputs, targets = normal(5, 3), (normal(5, 3, seed=1) > 0).float()
    against = torch.where(targets > 0, -outputs, outputs).mean(1)
    torch.testing.assert_close(doubt(outputs, targets), against)


def test_a_confusion_counts_predictions_of_each_true_class():
    codes, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([1, 1, 0, 1, 2, 2])
    found = measure_by_name("confusion", codes, predicted, np.zeros((6, 3)), smoothing=0.0)
    plain = np.zeros((3, 3))
    np.add.at(plain, (codes, predicted), 1)
    expected = plain / plain.sum(1, keepdims=True)
    np.testing.assert_allclose(np.reshape(found, (3, 3)), expected, atol=1e-9)


def test_a_base_mix_is_drawn_to_the_counts_by_its_penalty():
    logits = RNG.normal(size=(200, 3)) + np.array([2.0, 0.0, -1.0])
    codes = RNG.choice(3, 200, p=[0.2, 0.3, 0.5])
    counts = np.bincount(codes, minlength=3)
    held = estimate_base_prior(logits, codes, l2=1e6)
    np.testing.assert_allclose(held, counts / 200, atol=0.02)
    free = estimate_base_prior(logits, codes, l2=1e-6)
    assert np.abs(free - counts / 200).max() > 0.1


def test_the_last_layer_is_the_last_that_trains():
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    rows = Rows(np.ones((2, 4), np.float32))
    assert last_layer(Network(module, None), rows)[0] == "2"
    below = Network(module, None, trainable=("0.weight", "0.bias"))
    assert last_layer(below, rows)[0] == "0"


def test_indefinite_curvature_is_refused_by_its_smallest_eigenvalue():
    with pytest.raises(ValueError, match=r"smallest eigenvalue -1\.5\)"):
        _damped_cholesky(torch.diag(torch.tensor([-2.0, 1.0, 3.0])), torch.full((3,), 0.5))


def test_distances_to_classes_and_shares_outside_are_those_of_the_centred_rows():
    outputs, codes = normal(60, 6) + 5, torch.arange(60) % 3
    outputs = outputs * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]) + codes[:, None]
    numbers, labels = outputs.double().numpy(), codes.numpy()
    means = np.stack([numbers[labels == c].mean(0) for c in range(3)])
    residuals = numbers - means[labels]
    covariance = residuals.T @ residuals / (60 - 3)
    share = max(0.05, 6 / 66)
    shrunk = (1 - share) * covariance + share * np.trace(covariance) / 6 * np.eye(6)
    asked = normal(5, 6, seed=2) * 4
    gaussians = Gaussians.fit(outputs, codes)
    # the least direction is not kept, and has its own size
    away = asked.double().numpy()[:, None] - means
    expected = -np.einsum("qcd,de,qce->qc", away, np.linalg.inv(shrunk), away).min(1)
    np.testing.assert_allclose(gaussians.score(asked), expected, rtol=2e-2)

    centred = numbers - numbers.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / 60)
    kept = int((np.cumsum(values[::-1]) < 0.95 * values.sum()).sum()) + 1
    rest = vectors[:, : 6 - kept]
    moved = asked.double().numpy() - numbers.mean(0)
    outside = np.linalg.norm(moved @ rest, axis=1) / np.linalg.norm(moved, axis=1)
    np.testing.assert_allclose(VirtualLogit.fit(outputs, codes).score(asked), -outside, rtol=1e-3)
