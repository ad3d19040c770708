import pytest
import torch

from skperf.reprogramming.label_mapping import (
    bayesian,
    cooccurrence,
    one_to_one,
    random_mapping,
)

COUNTS = torch.tensor([[5.0, 1.0], [4.0, 3.0], [0.0, 0.0]])


def test_cooccurrence_counts_by_hand():
    logits = torch.tensor([[9.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    codes = torch.tensor([0, 1, 1, 1])
    expected = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    assert torch.equal(cooccurrence(logits, codes, 2), expected)
    weighted = cooccurrence(logits, codes, 2, weight=torch.tensor([2.0, 1, 1, 0]))
    assert torch.equal(weighted, torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 0.0]]))


def test_soft_cooccurrence_keeps_the_top_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    soft = cooccurrence(logits, torch.tensor([0, 1]), 2, top=2)
    p = logits.softmax(1)
    expected = torch.tensor([[p[0, 0], 0], [p[0, 1], p[1, 1]], [0, p[1, 2]]])
    torch.testing.assert_close(soft, expected)


def test_frequent_mapping_is_greedy_and_one_to_one():
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    assert torch.equal(one_to_one(COUNTS), expected)


def test_several_source_labels_are_averaged():
    mapping = one_to_one(torch.tensor([[5.0, 0], [4, 0], [0, 3], [0, 0]]), per_class=2)
    assert torch.equal(mapping.sum(0), torch.ones(2))
    assert torch.equal((mapping > 0).sum(1), torch.ones(4, dtype=torch.long))


def test_class_without_rows_takes_what_is_left():
    mapping = one_to_one(torch.tensor([[5.0, 0.0], [4.0, 0.0]]))
    assert torch.equal(mapping, torch.eye(2))


def test_bayesian_by_hand():
    # 5/(6+1), 4/(7+1) and 1/7, 3/8, each column over its sum
    a, b, c, d = 5 / 7, 4 / 8, 1 / 7, 3 / 8
    expected = torch.tensor([[a / (a + b), c / (c + d)], [b / (a + b), d / (c + d)], [0, 0]])
    torch.testing.assert_close(bayesian(COUNTS, 1.0), expected)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_bayesian_column_without_counts_is_uniform(smoothing):
    mapping = bayesian(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), smoothing)
    torch.testing.assert_close(mapping[:, 1], torch.full((2,), 0.5))
    torch.testing.assert_close(mapping.sum(0), torch.ones(2))


def test_random_mapping_uses_no_label_twice():
    mapping = random_mapping(7, 3, 2, torch.Generator().manual_seed(0))
    assert torch.equal(mapping.sum(0), torch.ones(3))
    assert mapping.sum(1).max() == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: one_to_one(torch.zeros(3, 2), per_class=2),
        lambda: random_mapping(3, 2, 2, torch.Generator()),
    ],
    ids=["frequent", "random"],
)
def test_too_few_source_labels(make):
    with pytest.raises(ValueError, match="needs 4; the encoder has 3"):
        make()
