import pytest
import torch
from torch.nn import functional

from skperf.reprogramming.residual import AlphaCurve, Representations, alpha_curve, mixed


def unit(*shape, seed=0):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
    return functional.normalize(values, dim=-1)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.4, 1.0])
def test_disagreement_shortens_the_mix(alpha):
    u, zero = unit(9, 5), unit(9, 5, seed=1)
    cosine = (u * zero).sum(1)
    expected = 1 - 2 * alpha * (1 - alpha) * (1 - cosine)
    torch.testing.assert_close(mixed(u, zero, alpha).square().sum(1), expected)
    renormalized = mixed(u, zero, alpha, renormalize=True).norm(dim=1)
    torch.testing.assert_close(renormalized, torch.ones(9).double())


def test_curve_equals_direct_computation():
    r = Representations(unit(30, 4), unit(30, 4, seed=1), unit(3, 4, seed=2), unit(3, 4, seed=3))
    codes = torch.arange(30) % 3
    curve = alpha_curve([r], codes, (0.0, 0.4, 1.0), scale=7.0)
    for alpha, accuracy, loss in zip(curve.alphas, curve.accuracy, curve.loss, strict=True):
        images = (1 - alpha) * r.images + alpha * r.images_zero
        classes = (1 - alpha) * r.classes + alpha * r.classes_zero
        logits = 7.0 * images @ classes.T
        assert accuracy == pytest.approx((logits.argmax(1) == codes).double().mean().item())
        assert loss == pytest.approx(functional.cross_entropy(logits, codes).item(), rel=1e-6)


def test_of_the_most_accurate_alphas_that_of_least_loss_is_chosen():
    curve = AlphaCurve((0.0, 0.2, 0.4, 1.0), (0.8, 0.85, 0.85, 0.3), (0.5, 1.0, 1.1, 0.4))
    assert curve.best() == 0.2


def test_accuracies_are_compared_to_six_digits():
    assert AlphaCurve((0.0, 0.5, 1.0), (0.5, 0.5000002, 0.4), (2.0, 3.0, 1.0)).best() == 0.0
    assert AlphaCurve((0.0, 0.5, 1.0), (0.5, 0.500002, 0.4), (2.0, 3.0, 1.0)).best() == 0.5
