"""Which scores a fitted program can compute."""

import pytest
import torch
from torch import nn

from skperf.reprogramming import Reprogrammer
from skperf.reprogramming.fitted import SCORES


def test_disagreement_is_for_encoders_that_compare(towers, pictures, parameters):
    X, y = pictures
    quick = parameters | {"max_epochs": 0, "head": "linear"}
    compared = Reprogrammer(towers, **quick).fit(X, y)
    assert {*SCORES, "disagreement"} <= {*compared._record().score_names}
    assert compared.score_samples(X[:4], ood_score="disagreement").shape == (4,)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(36, 5))
    plain = Reprogrammer(net, border=2, max_epochs=0, random_state=0).fit(X, y)
    assert {*SCORES} <= {*plain._record().score_names}
    assert "disagreement" not in plain._record().score_names
    with pytest.raises(ValueError, match="disagreement"):
        plain.score_samples(X[:4], ood_score="disagreement")
