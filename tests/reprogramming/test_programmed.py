"""The module that `to_module` gives, and the logit of "none of these"."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from skperf import InfluenceScorer
from skperf.reprogramming import Reprogrammer
from tests.reprogramming.conftest import assert_same_state, state_of


@pytest.fixture
def fitted(towers, pictures, parameters):
    return Reprogrammer(towers, alpha=0.3, **parameters).fit(*pictures)


def test_program_and_text_are_parameters_of_the_module(fitted, towers, pictures):
    X, _ = pictures
    module, before = fitted.to_module(), state_of(towers)
    names = [name for name, _ in module.named_parameters() if not name.startswith("model.")]
    assert names == ["programmed.image", "programmed.text", "programmed.head.weight"]
    loss = functional.cross_entropy(module(torch.tensor(X[:20])), torch.arange(20) % 3)
    loss.backward()
    assert all(module.get_parameter(name).grad.abs().sum() > 0 for name in names)
    assert_same_state(before, state_of(towers))


def test_logits_follow_the_text_delta(fitted, pictures):
    images = torch.tensor(pictures[0][:5])
    module = fitted.to_module()
    with torch.no_grad():
        logits = module(images)
        module.programmed.text += 1
        moved = module(images)
        module.programmed.text -= 1
        torch.testing.assert_close(module(images), logits)
    assert not torch.allclose(moved, logits)
    np.testing.assert_allclose(fitted.decision_function(images), logits, atol=1e-5)


def test_copies_of_the_module_stand_on_their_own(fitted, towers, pictures):
    images = torch.tensor(pictures[0][:5])
    twin = copy.deepcopy(fitted.to_module())
    assert twin.model is not towers
    with torch.no_grad():
        logits = fitted.to_module()(images)
        torch.testing.assert_close(twin.eval()(images), logits)
        twin.programmed.text += 1  # so that its own text tower has to run
        moved = twin(images)
        twin.model.mixer[0].weight.zero_()
        assert not torch.allclose(twin(images), moved)
        torch.testing.assert_close(fitted.to_module()(images), logits)


def test_influence_on_the_programs(fitted, towers, pictures):
    X, y = pictures
    before = state_of(towers)
    scorer = InfluenceScorer(
        fitted, method="gradient_dot", parameters="*program*", gradients="reference"
    )
    influence = scorer.fit(X, y).influence(X[:3], y[:3])
    assert_same_state(before, state_of(towers))
    module, codes = fitted.to_module(), np.searchsorted(fitted.classes_, y)
    programs = list(module.programmed.parameters())

    def gradient(row):
        logits = module(torch.tensor(X[row : row + 1]))
        loss = functional.cross_entropy(logits, torch.tensor(codes[row : row + 1]))
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, programs)])

    if True:
        expected = [[float(gradient(i) @ gradient(j)) for j in range(8)] for i in range(3)]
    ratio = influence[:, :8] / np.array(expected)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_classes_are_of_unit_length(towers, pictures, parameters):
    model = Reprogrammer(towers, alpha=0.0, **parameters).fit(*pictures)
    np.testing.assert_allclose(np.linalg.norm(model.class_embeddings_, axis=1), 1, atol=1e-5)


def test_level_of_none_of_these(towers, pictures, parameters):
    X, y = pictures
    parameters |= {"validation_fraction": 0.0, "alpha": 0.0}
    zero_shot = Reprogrammer(towers, **parameters | {"max_epochs": 0}).fit(X, y)
    largest = (zero_shot.transform(X) @ zero_shot.class_embeddings_.T).max(1)
    weight = np.arange(len(X)) % 2
    model = Reprogrammer(towers, none_margin=2.0, **parameters).fit(X, y, sample_weight=weight)
    module = model.net_.module_
    expected = largest[weight > 0].mean() + 2.0 / model.encoder_.logit_scale
    assert float(module.none_level) == pytest.approx(expected, abs=1e-5)
    images, plain = torch.tensor(X[:4]), torch.tensor(zero_shot.transform(X[:4]))
    with torch.no_grad():
        logits = module(images, plain)
    assert logits.shape == (2, 4, 4)
    assert torch.allclose(logits[..., 3] / model.encoder_.logit_scale, module.none_level)
    assert model.predict_proba(X).shape == (len(X), 3)


def test_none_of_these_raises_the_similarity_of_the_tasks_own_pictures(
    towers, pictures, parameters
):
    X, y = pictures
    parameters |= {"alpha": 0.0, "max_epochs": 5, "head": "linear", "ood_score": "max_logit"}
    without, with_ = (
        Reprogrammer(towers, none_margin=margin, **parameters).fit(X, y).score_samples(X).mean()
        for margin in (None, 3.0)
    )
    assert with_ > without


def test_logits_are_those_of_what_the_program_makes_of_the_pictures(fitted, pictures):
    images = torch.tensor(pictures[0][:5])
    programmed = fitted.to_module().programmed
    with torch.no_grad():
        placed = programmed.program.place(images)
        seen = programmed.encode(placed, programmed.image)
        plain = programmed.encode(placed, None)
        assert not torch.allclose(seen, plain, atol=1e-3)
        classes = torch.tensor([2, 0])
        expected = programmed.logits(seen, plain, classes)
        torch.testing.assert_close(programmed(placed, plain, classes), expected)
        # both representations, each with the logit of "none of these"
        assert expected.shape == (2, 5, 3)
