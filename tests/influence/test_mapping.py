"""At once or one after the other, the same."""

import pytest
import torch

from skperf.influence.mapping import mapped, plain


def branching(row):
    return row.sum() if float(row[0]) > 0 else -row.sum()  # vmap can't


@pytest.mark.parametrize("looped", [False, True])
def test_entries_of_trees_along_the_first_dimension(looped):
    a, b = torch.randn(5, 3), torch.randn(5, 3)
    found = mapped(
        lambda x, tree: {"sum": x + tree["b"], "dot": x @ tree["b"]}, a, {"b": b}, looped=looped
    )
    torch.testing.assert_close(found["sum"], a + b)
    torch.testing.assert_close(found["dot"], (a * b).sum(1))


def test_what_cannot_be_mapped_is_looped_over():
    rows = torch.tensor([[1.0, 2.0], [-1.0, 5.0], [3.0, -9.0]])
    torch.testing.assert_close(mapped(branching, rows), torch.tensor([3.0, -4.0, -6.0]))


def test_an_error_of_the_function_is_its_own_and_memory_is_never_looped_for():
    def fails(row):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mapped(fails, torch.ones(2, 1))
    calls = []

    def full(row):
        calls.append(1)
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError, match="full"):
        mapped(full, torch.ones(4, 1))
    assert len(calls) == 1


def test_chunks_give_the_same():
    rows = torch.arange(7.0)
    torch.testing.assert_close(mapped(lambda x: x**2, rows, chunk_size=3), rows**2)


@pytest.mark.parametrize("fast", [True, False])
def test_attention_is_plain_inside_and_as_before_outside(fast):
    before = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(fast)
        with plain():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
