"""Which score is chosen."""

import numpy as np
import pytest
import torch

from skperf.reprogramming import judging


# the mean gain, of 4 classes left out with a deviation of .2, is held against .2 / sqrt(4)
@pytest.mark.parametrize(("gain", "chosen"), [(0.06, False), (0.12, True)])
def test_another_score_is_chosen_beyond_one_standard_error(gain, chosen, monkeypatch):
    names = iter(judging.FEATURE_SCORES)
    other = next(name for name in judging.FEATURE_SCORES if name != "mahalanobis")
    around = np.array([-0.2, 0.2, -0.2, 0.2])

    def aurocs(*_):
        return np.full(4, 0.5) + (gain + around if next(names) == other else 0)

    monkeypatch.setattr(judging, "left_out_aurocs", aurocs)
    found = judging.best_score(torch.randn(40, 3), torch.arange(40) % 4)
    assert found == (other if chosen else "mahalanobis")
