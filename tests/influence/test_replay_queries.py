"""Gradients of queries at the end of a run."""

import pytest
import torch
from torch import nn

from skperf.backbone.losses import CrossEntropy
from skperf.backbone.rows import Rows
from skperf.backbone.training_run import Data, Run, Step
from skperf.influence.replay_queries import query_gradients


@pytest.mark.parametrize("aggregate", [False, True])
def test_more_queries_than_a_batch_equal_autograd_row_by_row(aggregate):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(70, 3, dtype=torch.float64), torch.arange(70) % 2
    names = tuple(name for name, _ in module.named_parameters())
    base = torch.optim.SGD(module.parameters(), lr=0.1).defaults
    data = Data(Rows(inputs), targets, torch.ones(70, dtype=torch.float64))
    steps = [Step(torch.arange(70).int(), (base,), None)]
    run = Run(module, CrossEntropy(), torch.optim.SGD, (names,), steps, data, None, {})
    end = torch.cat([p.detach().flatten() for p in module.parameters()])
    found = query_gradients(run, end, Rows(inputs), targets, aggregate=aggregate)
    rows = []
    for row, code in zip(inputs, targets, strict=True):
        value = nn.functional.cross_entropy(module(row[None]), code[None])
        slopes = torch.autograd.grad(value, [*module.parameters()])
        rows.append(torch.cat([slope.flatten() for slope in slopes]))
    expected = torch.stack(rows)
    expected = expected.mean(0, keepdim=True) if aggregate else expected
    torch.testing.assert_close(found, expected)
