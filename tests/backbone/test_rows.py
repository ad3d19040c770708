"""Rows of every kind are sliced, gathered and moved alike."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from transformers import BatchEncoding

from skperf.backbone.rows import Rows, _inputs_of

A = np.arange(30.0).reshape(10, 3)
B = np.arange(10)


class Pairs(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return torch.tensor(A[i]), int(B[i])


class Named(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"a": A[i], "b": B[i], "label": 7}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(A)


FORMS = {
    "array": (lambda: A, [A]),
    "tensor": (lambda: torch.tensor(A, requires_grad=True), [A]),
    "list": (lambda: A.tolist(), [A]),
    "frame": (lambda: pd.DataFrame(A, columns=[*"abc"]), [A]),
    "tuple": (lambda: (A, B), [A, B]),
    "dict": (lambda: {"a": A, "b": B}, [A, B]),
    "encoding": (lambda: BatchEncoding({"a": A, "b": torch.tensor(B)}), [A, B]),
    "pairs": (Pairs, [A]),
    "tensors": (lambda: TensorDataset(torch.tensor(A), torch.tensor(B)), [A]),
    "subset": (lambda: Subset(Pairs(), range(10)), [A]),
    "named": (Named, [A, B]),
}


def values(rows):
    return [np.asarray(leaf) for leaf in rows.load().leaves]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "where", [slice(2, 7), np.array([5, 1, 1]), B % 3 == 1, torch.tensor([4, 0])]
)
def test_slices_and_gathers(form, where):
    made, expected = FORMS[form]
    rows = Rows.of(made())
    assert len(rows) == 10
    assert rows.shape == (10, 3)
    index = where.numpy() if isinstance(where, torch.Tensor) else where
    part = rows[where]
    assert len(part) == len(A[index])
    for actual, whole in zip(values(part), expected, strict=True):
        np.testing.assert_array_equal(actual, whole[index])
    # a slice of a slice
    for actual, whole in zip(values(rows[3:9][np.array([2, 0])]), expected, strict=True):
        np.testing.assert_array_equal(actual, whole[[5, 3]])


def test_a_data_set_stays_where_it_is():
    seen = []

    class Counting(Pairs):
        def __getitem__(self, i):
            seen.append(i)
            return super().__getitem__(i)

    rows = Rows.of(Counting())[np.array([7, 2])]
    assert seen == []
    np.testing.assert_array_equal(values(rows)[0], A[[7, 2]])
    assert set(seen) == {7, 2}


def test_a_memory_map_is_not_read_by_slicing(tmp_path):
    stored = np.memmap(tmp_path / "rows", np.float32, "w+", shape=(1000, 4))
    part = Rows.of(stored)[10:20]
    assert np.shares_memory(part.array, stored)


def test_vmap_maps_over_every_input():
    rows = Rows.of({"a": torch.tensor(A), "b": torch.tensor(B)})
    sums = torch.func.vmap(lambda row: row.tree["a"].sum() * row.tree["b"])(rows)
    np.testing.assert_allclose(sums, A.sum(1) * B)


def test_repeat_and_cat():
    rows = Rows.of((torch.tensor(A), torch.tensor(B)))
    twice = rows.repeat(2)
    np.testing.assert_array_equal(twice.leaves[1], np.tile(B, 2))
    again = Rows.cat([rows[:4], rows[4:]])
    assert again.key() == rows.key() != rows[1:].key()
    np.testing.assert_array_equal(again.leaves[0], A)


def test_keys_tell_contents_apart():
    assert Rows.of(A).key() == Rows.of(A.copy()).key()
    changed = A.copy()
    changed[9, 2] += 1e-9
    assert Rows.of(changed).key() != Rows.of(A).key()
    assert Rows.of({"a": A, "b": A}).key() != Rows.of((A, A)).key()


@pytest.mark.parametrize(
    ("X", "kind", "message"),
    [
        (DataLoader(Pairs()), TypeError, r"X=loader\.dataset"),
        (Stream(), TypeError, "map-style"),
        ([[1, 2], [3]], ValueError, "different lengths; pad"),
        ({"a": A, "b": B[:4]}, ValueError, r"different lengths, \[4, 10\]"),
        (3.0, ValueError, "one entry for each row"),
    ],
)
def test_other_things_are_refused_by_name(X, kind, message):
    with pytest.raises(kind, match=message):
        Rows.of(X)


def test_several_inputs_are_no_array():
    with pytest.raises(TypeError, match=r"several inputs \(\['a', 'b'\]\)"):
        _ = Rows.of({"a": A, "b": B}).array


@pytest.mark.parametrize("row", [0, 4, 9])
def test_the_key_tells_rows_apart_that_differ_in_one(row):
    changed = A.copy()
    changed[row, 1] += 1
    assert Rows.of(A).key() == Rows.of(A.copy()).key() != Rows.of(changed).key()


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
        ([], []),
        (([1.0, 2.0], 4), [1.0, 2.0]),
        (([[1.0], [2.0]], 0), [[1.0], [2.0]]),
        ([[1.0, 2.0], 1], [1.0, 2.0]),
        (({"a": [1, 2], "labels": 3}, 1), {"a": [1, 2]}),
        ((np.ones(2),), [1.0, 1.0]),
        (7.0, 7.0),
    ],
)
def test_items_of_data_sets_lose_their_target_and_nothing_else(item, expected):
    found = _inputs_of(item)
    if isinstance(expected, dict):
        assert {name: value.tolist() for name, value in found.items()} == expected
    else:
        np.testing.assert_array_equal(found, expected)


def test_two_inputs_and_a_target_are_two_inputs():
    first, second = _inputs_of((np.ones(2), np.zeros(3), 1))
    assert (first.shape, second.shape) == ((2,), (3,))
    assert len(_inputs_of((np.ones(2), np.zeros(3)))) == 2
