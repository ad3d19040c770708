"""Rows that stand for the curvature at many outputs."""

import torch

from skperf.backbone.losses import CrossEntropy
from skperf.influence.output_rows import sampled_rows


def test_examples_are_drawn_in_proportion_to_their_weights_by_even_steps():
    weights, targets = torch.tensor([2.0, 1.0, 1.0]), torch.zeros(3, 4, dtype=torch.long)
    rows = sampled_rows(CrossEntropy(), weights, targets, n_rows=3, seed=0)
    # places 1/6, 3/6 and 5/6 on a line of which the examples hold 1/2, 1/4 and 1/4
    assert rows.examples.tolist() == [0, 0, 2]
