"""What an output of the user's may return."""

import numpy as np
import pytest
import torch

from skperf.components.measures import _guarded, checked_output


@pytest.mark.parametrize(
    ("returned", "seen"),
    [
        (torch.zeros(4), r"\(4,\)"),
        (torch.zeros(3, 2, 1), r"\(3, 2, 1\)"),
        (torch.tensor(1.0), r"\(\)"),
        (np.zeros(3), "ndarray"),
    ],
    ids=["length", "axes", "number", "array"],
)
def test_other_shapes_and_types_are_named(returned, seen):
    with pytest.raises(ValueError, match=rf"shape \(3,\) or \(3, t\); it returned .*{seen}"):
        _guarded(returned, 3)


def test_numbers_and_rows_of_numbers_pass():
    for values in (torch.arange(3.0), torch.ones(3, 2)):
        assert _guarded(values, 3) is values
    with pytest.raises(ValueError, match="first at row 1"):
        _guarded(torch.tensor([0.0, torch.nan, torch.inf]), 3)


def test_outputs_are_known_by_name_or_are_functions():
    checked_output("margin")
    checked_output("value")
    checked_output(lambda outputs: outputs[:, 0])
    with pytest.raises(ValueError, match="output='margins' is unknown"):
        checked_output("margins")
