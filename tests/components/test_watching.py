"""Which parameters a watcher takes for tables of units of their own."""

import torch
from torch import nn

from skperf.components.watching import Watcher


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.scale = nn.Parameter(torch.ones(2, 3, 4)), nn.Parameter(torch.ones(3))
        self.conv, self.norm = nn.Conv1d(3, 2, 2), nn.LayerNorm(3)


def test_owners_are_parameters_of_three_axes_outside_layers_with_rows():
    module = Experts()
    assert Watcher(module).owners == {id(module.up): ("", "up")}
