"""Which scores a fitted program can compute."""

import numpy as np
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


def test_inliers_are_told_by_plus_and_minus_one(towers, pictures, parameters):
    X, y = pictures
    fitted = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    record, noise = fitted._record(), np.random.default_rng(0).random(X.shape, np.float32)
    rows = np.concatenate([X, noise])
    name = record.known_score(None)
    scores = fitted.score_samples(rows)
    found = fitted.predict_inlier(rows)
    assert {*found.tolist()} == {-1, 1}
    np.testing.assert_array_equal(found > 0, scores >= record.choice.thresholds[name])


def test_similarities_are_products_with_the_classes_or_the_heads_logits(
    towers, pictures, parameters
):
    X, y = pictures
    record = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)._record().open()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        classes = record.classes()
        outputs = torch.randn(5, classes.shape[1], generator=generator)
        torch.testing.assert_close(record.similarities(outputs), outputs @ classes.T)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(36, 5))
    plain = Reprogrammer(net, border=2, max_epochs=0, random_state=0).fit(X, y)._record().open()
    assert plain.classes() is None
    with torch.no_grad():
        outputs = torch.randn(4, 5, generator=generator)
        expected = plain.programmed.logits(outputs)
        torch.testing.assert_close(plain.similarities(outputs), expected)
