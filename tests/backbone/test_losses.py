"""Losses against torch's own modules, differentiated by autograd."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.losses import CrossEntropy, Focal, Own, SquaredError, resolve_loss

N, K = 7, 4
CODES = torch.tensor([0, 1, 2, 3, 1, 1, 2])
SHARES = torch.softmax(torch.arange(N * K, dtype=torch.float64).reshape(N, K).sin(), 1)
LABELS = (torch.arange(N * K).reshape(N, K) % 3 == 0).double()
WEIGHT = torch.tensor([0.5, 3.0, 1.0, 2.0], dtype=torch.float64)

CASES = {
    "cross-entropy": (nn.CrossEntropyLoss(), CODES),
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), CODES),
    "soft labels": (nn.CrossEntropyLoss(), SHARES),
    "binary": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), LABELS),
    "binary weighted": (nn.BCEWithLogitsLoss(weight=WEIGHT), LABELS),
    "squared": (nn.MSELoss(), SHARES),
    "margin": (nn.MultiMarginLoss(p=2, margin=0.7), CODES),
    "huber": (nn.HuberLoss(delta=0.3), SHARES),
    "smooth l1": (nn.SmoothL1Loss(), SHARES),
}


def outputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_values_slopes_and_curvature_are_the_modules_own(name):
    module, targets = CASES[name]
    loss, z = resolve_loss(module), outputs()
    values = torch.stack([module(z[i : i + 1], targets[i : i + 1]) for i in range(N)])
    torch.testing.assert_close(loss.value(z, targets), values)
    torch.testing.assert_close(loss.value(z, targets).mean(), module(z, targets))
    for i in range(N):

        def alone(row, i=i):
            return module(row[None], targets[i : i + 1])

        slope = torch.autograd.functional.jacobian(alone, z[i])
        torch.testing.assert_close(loss.slope(z, targets)[i], slope)
        if name == "margin":  # torch has no second derivative of it
            continue
        hessian = torch.autograd.functional.hessian(alone, z[i])
        torch.testing.assert_close(loss.hessian(z, targets)[i], hessian)


def test_class_weights_weigh_training_rows_and_not_a_loss():
    module = nn.CrossEntropyLoss(weight=WEIGHT)
    loss, z = resolve_loss(module), outputs()
    weights = loss.weights(CODES)
    torch.testing.assert_close(weights, WEIGHT[CODES])
    mean = (weights * loss.value(z, CODES)).sum() / weights.sum()
    torch.testing.assert_close(mean, module(z, CODES))
    assert CrossEntropy().weights(CODES) is None


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    expected = compute_class_weight("balanced", classes=np.arange(K), y=CODES.numpy())
    np.testing.assert_allclose(CrossEntropy(balanced=True).weights(CODES), expected[CODES])


def test_tokens_and_maps_have_the_mean_over_their_positions():
    z = torch.randn(3, 5, K, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 2, 3, 0], [1, 1, -100, -100, -100], [3, 2, 1, 0, -100]])
    loss = resolve_loss("cross_entropy")
    for i in range(3):
        expected = nn.functional.cross_entropy(z[i], tokens[i])
        torch.testing.assert_close(loss.value(z, tokens)[i], expected)
    maps = z.movedim(-1, 1)[..., None]
    torch.testing.assert_close(loss.value(maps, tokens[..., None]), loss.value(z, tokens))


def test_focal_with_gamma_zero_is_cross_entropy_and_falls_with_confidence():
    z = outputs()
    plain = CrossEntropy().value(z, CODES)
    torch.testing.assert_close(Focal(0.0).value(z, CODES), plain)
    p = (-plain).exp()
    torch.testing.assert_close(Focal(1.5).value(z, CODES), (1 - p) ** 1.5 * plain)


def test_own_functions_return_one_number_a_row():
    loss = resolve_loss(lambda z, t: ((z - t) ** 4).sum(1))
    assert isinstance(loss, Own)
    torch.testing.assert_close(
        loss.slope(outputs(), SHARES), 4 * (outputs() - SHARES) ** 3, rtol=1e-9, atol=1e-9
    )
    with pytest.raises(ValueError, match="must not average over rows"):
        resolve_loss(lambda z, t: ((z - t) ** 2).mean()).value(outputs(), SHARES)


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [("hinge", ValueError, "is unknown; use one of"), (3, TypeError, "got int")],
)
def test_others_are_refused_by_name(given, kind, message):
    with pytest.raises(kind, match=message):
        resolve_loss(given)


def test_one_output_a_row():
    loss, z, t = SquaredError(), torch.tensor([1.0, 4.0]), torch.tensor([[3.0], [1.0]])
    torch.testing.assert_close(loss.value(z, t), torch.tensor([4.0, 9.0]))
    torch.testing.assert_close(loss.slope(z, t), torch.tensor([-4.0, 6.0]))


@pytest.mark.parametrize("shape", [(), (5,), (4, 3)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_class_weights_are_torchs_whatever_the_targets(shape, shared, smoothing):
    generator = torch.Generator().manual_seed(0)
    n, weight = 6, torch.tensor([5.0, 1.0, 0.5])
    outputs = torch.randn(n, 3, *shape, generator=generator)
    targets = torch.randint(0, 3, (n, *shape), generator=generator)
    if shared:
        targets = torch.randn(n, 3, *shape, generator=generator).softmax(1)
    module = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    loss = resolve_loss(module)
    alone = torch.stack([module(o[None], t[None]) for o, t in zip(outputs, targets, strict=True)])
    torch.testing.assert_close(loss.value(outputs, targets), alone)
    weights = loss.weights(targets)
    weights = torch.ones(n) if weights is None else weights
    torch.testing.assert_close((weights * alone).sum() / weights.sum(), module(outputs, targets))
    if not shape:
        for o, t, own in zip(outputs, targets, loss.hessian(outputs, targets), strict=True):
            expected = torch.autograd.functional.hessian(lambda z, t=t: module(z[None], t[None]), o)
            torch.testing.assert_close(own, expected)


def test_class_weights_of_the_squared_margin_are_not_squared():
    module = nn.MultiMarginLoss(p=2, weight=torch.tensor([5.0, 1.0, 0.5]))
    outputs, loss = (
        torch.randn(3, 3, generator=torch.Generator().manual_seed(0)),
        resolve_loss(module),
    )
    codes = torch.arange(3)
    found = (loss.value(outputs, codes) * loss.weights(codes)).mean()
    torch.testing.assert_close(found, module(outputs, codes))


def test_a_mean_over_rows_alone_keeps_the_sum_over_outputs():
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(5, 3, generator=generator).log_softmax(1)
    targets = torch.rand(5, 3, generator=generator).softmax(1)
    module = nn.KLDivLoss(reduction="batchmean")
    values = resolve_loss(module).value(outputs, targets)
    torch.testing.assert_close(values.mean(), module(outputs, targets))
    plain = resolve_loss(nn.KLDivLoss()).value(outputs, targets)
    torch.testing.assert_close(plain * 3, values)


@pytest.mark.parametrize(
    ("module", "needed"), [(nn.GaussianNLLLoss(), "var"), (nn.CosineEmbeddingLoss(), "input2")]
)
def test_a_loss_of_more_than_outputs_and_targets_is_refused(module, needed):
    with pytest.raises(TypeError, match=f"loss={type(module).__name__} takes .*{needed}"):
        resolve_loss(module)


def test_a_loss_without_a_second_derivative_is_named():
    loss = resolve_loss(nn.MultiLabelMarginLoss())
    outputs, targets = torch.randn(2, 3), torch.tensor([[1, 0, -1], [2, -1, -1]])
    assert loss.slope(outputs, targets).shape == (2, 3)
    with pytest.raises(ValueError, match="MultiLabelMarginLoss cannot be differentiated twice"):
        loss.hessian(outputs, targets)


class Plain(nn.Module):
    """A loss without a reduction, one number a row."""

    def forward(self, outputs, targets):
        return (outputs - targets[:, None]).abs().amax(1)


def test_a_module_without_a_reduction_is_taken_as_it_is():
    loss, values = resolve_loss(Plain()), outputs()
    assert loss.name == "Plain"
    expected = (values - CODES[:, None]).abs().amax(1)
    torch.testing.assert_close(loss.value(values, CODES), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_the_curvature_of_a_squared_error_is_the_same_for_every_row(n):
    targets = torch.zeros(n, 2, dtype=torch.float64)
    found = resolve_loss(nn.MSELoss()).hessian(torch.ones(n, 2, dtype=torch.float64), targets)
    torch.testing.assert_close(found, torch.eye(2, dtype=torch.float64).repeat(n, 1, 1))
