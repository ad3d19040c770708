"""Projections that never form a gradient, against matrices written out."""

import pytest
import torch

from skperf.influence.gradients import Dense, Outer, Tokens, written_out
from skperf.influence.projections import Projection, TwoSided


def test_layers_get_projections_by_the_root_of_their_size():
    factors = [Dense(torch.randn(2, size)) for size in (100, 400)]
    projection = Projection([(None, 100), (None, 400)], 30, 0)
    (found,) = projection(factors)
    maps = projection.maps
    expected = torch.cat([f.values @ two.outputs for f, two in zip(factors, maps, strict=True)], 1)
    torch.testing.assert_close(found.values, expected)
    # the same maps for the rows that come next
    torch.testing.assert_close(projection(factors)[0].values, expected)
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
    torch.testing.assert_close(Projection((), 9, 0, [two])([factor])[0].values, expected)


@pytest.mark.parametrize("positions", [None, 3])
def test_outer_products_are_projected_on_both_sides(positions):
    torch.manual_seed(0)
    middle = () if positions is None else (positions,)
    factor = Outer(torch.randn(2, *middle, 4), torch.randn(2, *middle, 5))
    matrices = written_out(factor).view(2, 5, 4)
    for inputs, outputs in ((torch.randn(4, 2), torch.randn(5, 3)), (None, torch.randn(5, 3))):
        two = TwoSided(inputs, outputs, (5, 4))
        expected = outputs.T @ (matrices if inputs is None else matrices @ inputs)
        torch.testing.assert_close(
            Projection((), 9, 0, [two])([factor])[0].values, expected.flatten(1)
        )
        dense = Dense(written_out(factor))
        torch.testing.assert_close(
            Projection((), 9, 0, [two])([dense])[0].values, expected.flatten(1)
        )
