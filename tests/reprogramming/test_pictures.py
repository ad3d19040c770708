"""Which arrays are pictures."""

import numpy as np
import pytest
import torch

from skperf.reprogramming.pictures import (
    PictureForm,
    Pictures,
    _check_channels,
    is_array,
    is_table,
)


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


def test_arrays_that_are_no_pictures_are_refused_as_they_are_read():
    form = PictureForm()
    good = np.full((2, 3, 8, 8), 0.5, np.float32)
    assert len(Pictures.of(good, form)) == 2
    for wrong in (np.where(good > 0, np.nan, 0), good * 1000):
        with pytest.raises(ValueError, match="X "):
            Pictures.of(wrong.astype(np.float32), form)
    with pytest.raises(ValueError, match="X has 2 channels"):
        Pictures.of(good[:, :2], form)
    assert not is_table([good[0]])
    assert not is_table([good[0, 0]])
    assert is_table([[0.0, 1.0]])
    assert is_table([np.zeros(3)])
