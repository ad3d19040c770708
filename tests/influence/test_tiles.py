import numpy as np
import pytest
import torch
from torch import nn

from skperf.backbone.files import on_disk
from skperf.backbone.network import Network
from skperf.backbone.rows import Rows
from skperf.influence import tiles
from skperf.influence.gradients import Dense, Outer, Tokens
from skperf.influence.placement import plan
from skperf.influence.tiles import (
    Largest,
    Shelf,
    _batches,
    block,
    budget_in_bytes,
    bytes_of_row,
    only_candidates,
    scored_tiles,
    tile_lengths,
)


def test_budgets_are_read():
    assert budget_in_bytes("2GB") == 2 * 10**9
    assert budget_in_bytes(" 1.5 kb") == 1500
    assert budget_in_bytes(77) == 77
    for wrong in ("much", "-1GB"):
        with pytest.raises(ValueError, match="memory_budget"):
            budget_in_bytes(wrong)


def test_examples_are_grouped_by_how_often_they_are_asked_for():
    examples = torch.tensor([4, 0, 1, 4, 2, 4, 1])
    seen, passes = [], 0
    for members, positions in _batches(examples, 4):
        assert (examples[positions] == members[:, None]).all()
        seen += positions.flatten().tolist()
        passes += positions.shape[1]
    assert sorted(seen) == list(range(7))
    assert passes == 1 + 2 + 3
    assert list(_batches(torch.arange(0), 4)) == []


def test_examples_too_few_to_fill_a_batch_run_once_for_each_cotangent():
    examples = torch.tensor([4, 0, 1, 4, 2, 4, 1])
    ((members, positions),) = _batches(examples, 16)
    assert members.tolist() == examples.tolist()
    assert positions[:, 0].tolist() == list(range(7))


def test_gradients_beyond_the_budget_go_to_files_without_names(tmp_path, monkeypatch):
    stored = []

    def noted(shape, kind, folder):
        stored.append((shape, folder))
        return on_disk(shape, kind, folder)

    monkeypatch.setattr(tiles, "on_disk", noted)
    shelf = Shelf(1000, tmp_path)
    small = shelf.empty(10, Dense(torch.zeros(1, 20)))
    large = shelf.empty(10, Outer(torch.zeros(1, 30), torch.zeros(1, 4)))
    tokens = shelf.empty(3, Tokens(torch.zeros(1, 2).long(), torch.zeros(1, 2, 5), 9))
    assert stored == [((10, 30), tmp_path), ((3, 2), tmp_path), ((3, 2, 5), tmp_path)]
    assert list(tmp_path.iterdir()) == []
    for factor in (small, large, tokens):
        for tensor in factor.tensors:
            tensor.fill_(3)
            assert float(tensor.double().mean()) == 3
    assert tokens.n_embeddings == 9
    del shelf
    assert float(large.outputs.sum()) == 120


def test_tiles_fit_the_budget():
    for budget in (10**4, 10**6, 10**9):
        queries, rows = tile_lengths(500, 5000, 400, budget)
        assert (queries + rows) * 400 + 24 * queries * rows <= budget
    assert tile_lengths(3, 2, 400, 10**9) == (3, 2)
    with pytest.raises(ValueError, match="smallest budget that fits is 824 bytes"):
        tile_lengths(500, 5000, 400, 800)
    assert tile_lengths(500, 5000, 400, 824) == (1, 1)


def test_tiles_are_the_whole():
    generator = torch.Generator().manual_seed(0)
    train = [Dense(torch.randn(53, 7, generator=generator))]
    terms = [(0, Dense(torch.randn(9, 7, generator=generator)))]
    whole = block(terms, train, 2.0, torch.device("cpu"))
    for n_jobs in (None, 2):
        result = np.zeros_like(whole)
        options = {"scale": 2.0, "length": 20, "device": torch.device("cpu"), "n_jobs": n_jobs}
        for rows, scores in scored_tiles(terms, train, **options):
            result[:, rows] = scores
        np.testing.assert_allclose(result, whole, rtol=1e-5, atol=1e-6)
    assert bytes_of_row(train) == 28


def test_the_largest_are_kept_in_the_order_of_the_rows():
    scores = np.array([[3.0, 1.0, 3.0, 2.0, 3.0], [0.0, 5.0, 1.0, 5.0, 2.0]])
    best = Largest(3)
    for start in range(0, 5, 2):
        best.add(slice(start, min(start + 2, 5)), scores[:, start : start + 2])
    assert best.indices.tolist() == [[0, 2, 4], [1, 3, 4]]
    assert best.values.tolist() == [[3, 3, 3], [5, 5, 2]]


def test_candidates_of_a_tile():
    kept = only_candidates(np.ones((2, 3)), np.array([[4, 9], [5, 6]]), slice(4, 7), -1.0)
    assert kept.tolist() == [[1, -1, -1], [-1, 1, 1]]


def test_a_shelf_fills_up_with_what_is_put_on_it(tmp_path):
    shelf, factor = Shelf(200, tmp_path), Outer(torch.zeros(1, 3), torch.zeros(1, 2).double())
    assert shelf.used == 0
    room = shelf.empty(7, factor)
    assert [tensor.shape for tensor in room.tensors] == [(7, 3), (7, 2)]
    assert [tensor.dtype for tensor in room.tensors] == [torch.float32, torch.float64]
    assert shelf.used == 7 * (3 * 4 + 2 * 8)
    again = shelf.empty(7, factor)  # beyond the budget, on disk
    assert shelf.used == 196
    again.tensors[0][:] = 1.0
    assert float(again.tensors[0].sum()) == 21


def test_a_budget_of_nothing_is_refused():
    for wrong in (0, -5, "0GB"):
        with pytest.raises(ValueError, match="must be positive"):
            budget_in_bytes(wrong)


@pytest.mark.parametrize("fill", [0.0, -np.inf])
def test_only_candidates_of_each_query_keep_their_scores(fill):
    scores = np.random.default_rng(0).normal(size=(3, 4))
    close = np.array([[5, 9], [2, 8], [7, 6]])
    found = only_candidates(scores, close, slice(5, 9), fill)
    expected = np.full((3, 4), fill)
    for query, column in ((0, 0), (1, 3), (2, 2), (2, 1)):
        expected[query, column] = scores[query, column]
    np.testing.assert_array_equal(found, expected)


def test_fewer_rows_run_at_once_where_each_leaves_much_behind():
    module = nn.Sequential(nn.Linear(3, 50_000), nn.ReLU(), nn.Linear(50_000, 2)).eval()
    network = Network(module, np.arange(2))
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    planned = plan(network, Rows.of(np.zeros((9, 3), np.float32)), parameters, "auto")
    assert planned.at_once == 2**29 // (1 + 4 * (2 * 50_000 + 2)) + 1
