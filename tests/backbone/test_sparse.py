"""Which entries train, by gradients of rows taken one by one."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.losses import resolve_loss
from skperf.backbone.rows import Rows
from skperf.backbone.sparse import SALIENCIES, Sparse, chosen_entries

LOSS = resolve_loss(nn.CrossEntropyLoss())


def case(n=9):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return module, X, torch.arange(n) % 3


def moments(module, X, y):
    """Mean and mean square of the gradients, a row at a time."""
    each = [
        torch.autograd.grad(
            nn.functional.cross_entropy(module(X[i : i + 1]), y[i : i + 1]),
            list(module.parameters()),
        )
        for i in range(len(X))
    ]
    names = [name for name, _ in module.named_parameters()]
    stacked = {n: torch.stack(g) for n, g in zip(names, zip(*each, strict=True), strict=True)}
    return {n: g.mean(0) for n, g in stacked.items()}, {
        n: g.square().mean(0) for n, g in stacked.items()
    }


@pytest.mark.parametrize("name", SALIENCIES)
@pytest.mark.parametrize("ratio", [0.02, 0.2, 1.0])
def test_the_entries_of_largest_saliency_train(name, ratio):
    module, X, y = case()
    found = chosen_entries(Sparse(ratio, name), module, LOSS, Rows.of(X), y)
    gradients, squares = moments(module, X, y)
    floor = 1e-3 * max(float(s.mean()) for s in squares.values()) + 1e-30
    if name == "sam":
        values = {n: g**2 / (squares[n] + floor) for n, g in gradients.items()}
    else:
        values = {n: g.abs() for n, g in gradients.items()}
    every = np.concatenate([v.flatten().numpy() for v in values.values()])
    k = max(1, round(ratio * len(every)))
    threshold = np.sort(every)[-k]
    expected = {n: v >= threshold for n, v in values.items() if bool((v >= threshold).any())}
    assert found.keys() == expected.keys()
    for n, mask in expected.items():
        assert torch.equal(found[n], mask)
    assert sum(int(mask.sum()) for mask in found.values()) == k


def test_a_function_of_ones_own_gets_means_and_mean_squares():
    module, X, y = case()
    seen = []

    def own(gradients, squares):
        seen.append((gradients, squares))
        return {n: torch.full_like(g, float(n == "2.bias")) for n, g in gradients.items()}

    found = chosen_entries(Sparse(3 / 43, own), module, LOSS, Rows.of(X), y)
    assert {n: mask.tolist() for n, mask in found.items()} == {"2.bias": [True] * 3}
    for ours, theirs in zip(seen[0], moments(module, X, y), strict=True):
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value)


def test_of_many_rows_256_are_looked_at_and_what_is_frozen_is_not():
    module, X, y = case(300)
    module[0].weight.requires_grad_(False)
    seen = {}
    chosen_entries(Sparse(0.5, lambda g, s: seen.update(g) or g), module, LOSS, Rows.of(X), y)
    some = torch.linspace(0, 299, 256).long()
    module[0].weight.requires_grad_(True)
    expected, _ = moments(module, X[some], y[some])
    assert "0.weight" not in seen
    torch.testing.assert_close(seen["2.weight"], expected["2.weight"])


def test_patterns_and_masks_are_taken_as_given():
    module, X, y = case()
    found = chosen_entries(["2.*"], module, LOSS, Rows.of(X), y)
    assert sorted(found) == ["2.bias", "2.weight"]
    assert all(bool(mask.all()) for mask in found.values())
    mask = np.array([True, False, True])
    found = chosen_entries({"2.bias": mask}, module, LOSS, Rows.of(X), y)
    assert found["2.bias"].tolist() == mask.tolist()


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"3.bias": np.ones(3, bool)}, ValueError, r"names '3\.bias', which is no parameter"),
        ({"2.bias": np.ones(2, bool)}, ValueError, r"boolean mask of shape \(3,\), got"),
        ({"2.bias": np.ones(3)}, ValueError, r"got torch\.float64 of shape \(3,\)"),
        (Sparse(0.0), ValueError, r"ratio must lie in \(0, 1\], got 0\.0"),
        (Sparse(1.5), ValueError, r"ratio must lie in \(0, 1\], got 1\.5"),
        (Sparse(0.5, "large"), ValueError, "saliency='large' is unknown"),
        (7, TypeError, "got int"),
    ],
)
def test_what_says_no_entries_is_refused(given, error, said):
    module, X, y = case()
    with pytest.raises(error, match=said):
        chosen_entries(given, module, LOSS, Rows.of(X), y)
