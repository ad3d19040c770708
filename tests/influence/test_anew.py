"""Workers that share no memory compute large gradients anew, with the same scores."""

import numpy as np
import pytest
import torch
from joblib import parallel_config
from torch import nn

from skperf import InfluenceScorer, from_module
from skperf.influence import anew


@pytest.fixture(scope="module")
def convolutional():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(288, 3)
    )
    rng = np.random.default_rng(0)
    X = rng.normal(size=(40, 1, 8, 8)).astype(np.float32)
    return from_module(module.double(), np.arange(3)), X, rng.integers(0, 3, 40)


OPTIONS = {
    "gradient_dot": {"method": "gradient_dot"},
    "ggn": {"method": "ggn", "damping": 0.1},
    "flow": {"method": "ggn", "damping": "flow", "horizon": 20, "learning_rate": 0.05},
    "margin": {"method": "ggn", "damping": 0.1, "output": "margin"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_are_those_of_one_process(convolutional, options, monkeypatch):
    network, X, y = convolutional
    scorer = InfluenceScorer(network, n_jobs=2, random_state=0, **options).fit(
        X[:30], y[:30], sample_weight=np.linspace(0.5, 2, 30)
    )
    with parallel_config("threading"):
        alone = scorer.influence(X[30:], y[30:])
    used = []
    monkeypatch.setattr(anew, "DEARER", 1)
    tiles_anew = anew.tiles_anew
    monkeypatch.setattr(
        anew, "tiles_anew", lambda *args, **given: used.append(1) or tiles_anew(*args, **given)
    )
    with parallel_config("loky"):
        spread = scorer.influence(X[30:], y[30:])
    assert used
    np.testing.assert_allclose(spread, alone, rtol=1e-9, atol=1e-12)


def test_small_gradients_and_changed_ones_are_sent(convolutional):
    network, X, y = convolutional
    with parallel_config("loky"):
        for options in ({"method": "ekfac"}, {"method": "gradient_dot", "parameters": "last"}):
            scorer = InfluenceScorer(network, n_jobs=2, **options).fit(X[:30], y[:30])
            (member,) = scorer._learned.opened().members
            assert not anew.worth_it(member.problem, member.fit, 2, "threads")
