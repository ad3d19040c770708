"""Which arrays are pictures."""

import numpy as np
import pytest
import torch

from skperf.reprogramming.pictures import _check_channels, is_array


def test_pictures_have_one_channel_or_three():
    for n in (1, 3):
        _check_channels(n, (5, n, 8, 8))
    for n in (2, 4, 8):
        with pytest.raises(ValueError, match=rf"X has {n} channels, expected 1 or 3"):
            _check_channels(n, (5, n, 8, 8))


def test_arrays_of_numbers_are_arrays():
    assert is_array(np.zeros((2, 3)))
    assert is_array(torch.zeros(2, 3))
    assert not is_array(np.array([1, None], dtype=object))
    assert not is_array([[0.0]])
