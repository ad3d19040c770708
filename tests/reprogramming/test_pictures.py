"""Which arrays are pictures."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from skperf.reprogramming import Reprogrammer
from skperf.reprogramming.pictures import (
    PictureForm,
    Pictures,
    _check_channels,
    _in_range,
    _is_picture,
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


def test_pictures_are_brought_to_the_unit_range_from_their_own():
    values = np.array([[[-0.00005, 0.0, 0.5, 1.00005]]], np.float64)
    plain = _in_range(values, PictureForm())
    torch.testing.assert_close(plain, torch.tensor(values).float(), rtol=0, atol=0)
    halves = _in_range(values, PictureForm(low=0.0, high=0.5))
    torch.testing.assert_close(halves, torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    signed = _in_range(values, PictureForm(low=-1.0, high=1.0))
    torch.testing.assert_close(signed[0, 0, 1:3], torch.tensor([0.5, 0.75]))
    shifted = _in_range(values + 1, PictureForm(low=1.0, high=3.0))
    torch.testing.assert_close(shifted[0, 0, 1:3], torch.tensor([0.0, 0.25]))
    bytes_ = np.array([[[0, 51, 255]]], np.uint8)
    torch.testing.assert_close(
        _in_range(bytes_, PictureForm(low=-1.0, high=1.0)), torch.tensor([[[0.0, 0.2, 1.0]]])
    )
    rows = _in_range(values * 100, PictureForm(any_rows=True))
    assert rows.dtype == torch.float64
    np.testing.assert_array_equal(rows, values * 100)


def test_values_beyond_the_range_are_refused_on_either_side():
    for low, high in ((0.0, 1.0), (-1.0, 1.0)):
        form = PictureForm(low=low, high=high)
        good = np.full((1, 1, 2, 2), low)
        Pictures.of(good, form)
        for wrong in (low - 0.01, high + 0.01):
            with pytest.raises(ValueError, match="X holds values from"):
                Pictures.of(np.where(np.eye(2) > 0, wrong, good), form)


def test_what_pictures_and_tables_are():
    class Image:
        def getbands(self):
            return ("R",)

    for picture in (Image(), np.zeros((2, 2)), torch.zeros(3, 2, 2)):
        assert _is_picture(picture)
    for other in (np.zeros(3), np.zeros((1, 3, 2, 2)), 1.0, "a"):
        assert not _is_picture(other)
    pictures = np.empty(2, dtype=object)
    pictures[:] = [np.zeros((2, 2)), np.zeros((3, 3))]
    assert not is_table(pictures)
    assert is_table(np.array([["a", 1.0]], dtype=object))
    assert is_table(np.array([1.0, None], dtype=object))
    assert is_table(np.zeros((2, 5)))
    assert not is_table(np.zeros((2, 1, 5, 5)))
    assert is_table([])
    assert is_table(pd.DataFrame(np.zeros((2, 5))))
    assert not is_table([Image()])
    column = pd.Series([np.zeros((2, 2), np.uint8), np.ones((2, 2), np.uint8)], index=[7, 0])
    assert not is_table(column)
    assert is_table(pd.Series([1.0, 2.0]))
    (last,) = Pictures.of(column, PictureForm()).tensors([1])  # by place, not by its label
    assert last.shape == (1, 1, 2, 2)
    assert float(last.max()) == pytest.approx(1 / 255)


def test_arrays_are_read_at_once_and_lists_one_by_one():
    images = np.random.default_rng(0).random((4, 1, 3, 3)).astype(np.float32)
    some = np.array([2, 0])
    (whole,) = Pictures.of(images, PictureForm()).tensors(some)
    assert torch.equal(whole, torch.tensor(images[some]))
    one, two = Pictures.of([*images], PictureForm()).tensors(some)
    assert torch.equal(torch.cat([one, two]), whole)
    (last,) = Pictures.of(images, PictureForm())[np.array([3, 1])].tensors([1])
    assert torch.equal(last, torch.tensor(images[1:2]))


@pytest.mark.parametrize(
    ("value", "said"),
    [(np.nan, "X contains NaN"), (np.inf, "X contains infinity"), (-np.inf, "X contains infinity")],
)
def test_what_is_not_finite_is_said_by_its_name(value, said):
    X = np.full((3, 1, 2, 2), 0.5)
    X[2, 0, 1, 1] = value
    with pytest.raises(ValueError, match=said):
        Pictures.of(X, PictureForm())


def test_a_table_of_pictures_is_told_which_column_to_pass(towers, parameters):
    image = Image.fromarray(np.zeros((4, 4, 3), np.uint8))
    table = pd.DataFrame({"name": ["a", "b", "c"], "photo": [image] * 3})
    model = Reprogrammer(towers, **parameters)
    with pytest.raises(ValueError, match=r"pictures in a column: pass X\['photo'\] alone"):
        model.fit(table, ["cat", "dog", "bird"])
