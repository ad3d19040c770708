"""Where layers keep their rows."""

import pytest
import torch
from torch import nn

from skperf.backbone.network import Network
from skperf.backbone.parameters import select_parameters
from skperf.backbone.rows import Rows
from skperf.influence.layers import find_layers
from skperf.influence.placement import Place, _along, _places

ROW = Rows(torch.randn(1, 4))
SHARED = nn.Linear(4, 4)


def test_rows_lie_along_the_axis_that_shrinks_with_them():
    shape = torch.Size
    assert _along(shape((6, 3)), shape((5, 3)), 6) == Place(0, 1)
    assert _along(shape((3, 12)), shape((3, 10)), 6) == Place(1, 2)
    assert _along(shape((3, 4)), shape((3, 4)), 6) == Place(None)
    assert _along(shape((6, 6)), shape((5, 5)), 6) is None
    assert _along(shape((6, 3)), shape((4, 3)), 6) is None
    assert _along(shape((7, 3)), shape((5, 3)), 6) is None
    assert _along(shape((6, 3)), shape((5, 3, 1)), 6) is None


class Halved(nn.Module):
    """Runs a layer on all rows, then on their sum and on each row again."""

    def __init__(self, twice):
        super().__init__()
        self.layer, self.twice = nn.Linear(4, 4), twice

    def forward(self, rows):
        out = self.layer(rows)
        # sorted: the second call no longer knows whose row is whose
        return self.layer(out.sort(0).values) if self.twice else out


@pytest.mark.parametrize("twice", [False, True])
def test_a_layer_has_its_place_where_each_call_has_one(twice):
    network = Network(Halved(twice), None)
    (layer,) = find_layers(network.module, select_parameters(network.module))
    torch.manual_seed(0)
    found = _places(network, Rows(torch.randn(5, 4)), [layer])
    assert found == ({} if twice else {layer.names: (Place(0),)})
