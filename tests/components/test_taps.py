"""Which dimension of a layer's output holds its channels."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from skperf.components.taps import row_layer


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Linear(4, 5), torch.zeros(2, 3, 4)),
        (Conv1D(5, 4), torch.zeros(2, 3, 4)),
        (nn.Conv1d(4, 5, 2), torch.zeros(2, 4, 6)),
        (nn.Conv2d(4, 5, (2, 3)), torch.zeros(2, 4, 6, 7)),
        (nn.ConvTranspose2d(4, 5, 3), torch.zeros(2, 4, 6, 7)),
    ],
)
def test_the_dimension_of_the_channels_is_where_a_layer_puts_them(layer, rows):
    kind, outputs, inputs, dimension = row_layer(layer)
    assert kind == ("conv_filter" if "Conv" in type(layer).__name__ and rows.ndim > 2
                    and not isinstance(layer, Conv1D) else "neuron")  # fmt: skip
    assert (outputs, inputs) == (5, 4)
    assert dimension < 0
    assert layer(rows).shape[dimension] == 5


def test_other_layers_have_none():
    assert row_layer(nn.BatchNorm1d(4)) is None
