"""Projections that never form a gradient, against matrices written out."""

from types import SimpleNamespace

import pytest
import torch

from skperf.influence.gradients import Dense, Outer, Tokens, written_out
from skperf.influence.projections import TwoSided, project, projections


def test_layers_get_projections_by_the_root_of_their_size():
    factors = [Dense(torch.randn(2, size)) for size in (100, 400)]
    layers = [SimpleNamespace(matrix_shape=None, n_weights=size) for size in (100, 400)]
    maps = projections(factors, layers, 30, torch.Generator().manual_seed(0))
    assert [two.outputs.shape for two in maps] == [(100, 10), (400, 20)]
    # products of projections are those of gradients in the mean, so entries have variance 1 / k
    assert float(maps[1].outputs.var()) == pytest.approx(1 / 20, rel=0.1)


def test_embeddings_are_projected_without_what_is_padded():
    torch.manual_seed(0)
    indices = torch.tensor([[0, 3, -1], [4, 4, 1]])
    factor = Tokens(indices, torch.randn(2, 3, 5), 6)
    two = TwoSided(torch.randn(6, 2), torch.randn(5, 4), None)
    tables = written_out(factor).view(2, 6, 5)
    expected = torch.einsum("nvd,do,vi->noi", tables, two.outputs, two.inputs).flatten(1)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(project([factor], [two]), expected)


@pytest.mark.parametrize("positions", [None, 3])
def test_outer_products_are_projected_on_both_sides(positions):
    torch.manual_seed(0)
    middle = () if positions is None else (positions,)
    factor = Outer(torch.randn(2, *middle, 4), torch.randn(2, *middle, 5))
    matrices = written_out(factor).view(2, 5, 4)
    for inputs, outputs in ((torch.randn(4, 2), torch.randn(5, 3)), (None, torch.randn(5, 3))):
        two = TwoSided(inputs, outputs, (5, 4))
        expected = outputs.T @ (matrices if inputs is None else matrices @ inputs)
        torch.testing.assert_close(project([factor], [two]), expected.flatten(1))
        dense = Dense(written_out(factor))
        torch.testing.assert_close(project([dense], [two]), expected.flatten(1))
