"""Progress of a pass on disk."""

import torch

from skperf.influence.replay_store import Shelf


def shelf(folder, **directions):
    end = torch.arange(3.0)
    return Shelf(folder, end, directions.get("directions", torch.eye(3)))


def test_an_interrupted_pass_goes_on_where_it_was(tmp_path):
    kept = {"rows": torch.arange(4.0), "towards": torch.ones(2, 3)}
    shelf(tmp_path).save_progress(7, kept)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in kept.items()}
    assert shelf(tmp_path).resume(tensors, 20) == 7
    for name, tensor in kept.items():
        assert torch.equal(tensors[name], tensor)


def test_what_does_not_fit_the_pass_counts_as_never_written(tmp_path):
    shelf(tmp_path).save_progress(7, {"rows": torch.arange(4.0)})
    for tensors in ({"rows": torch.zeros(5)}, {"rows": torch.zeros(4), "more": torch.zeros(1)}):
        assert shelf(tmp_path).resume(tensors, 20) == 20
        assert not any(tensor.any() for tensor in tensors.values())
    other = shelf(tmp_path, directions=torch.zeros(3, 3))
    assert other.resume({"rows": torch.zeros(4)}, 20) == 20
    shelf(tmp_path).clear()
    assert shelf(tmp_path).resume({"rows": torch.zeros(4)}, 20) == 20
    assert not [*tmp_path.iterdir()]


def test_states_are_kept_by_step_and_go_with_the_pass(tmp_path):
    kept = shelf(tmp_path)
    assert 4 not in kept
    assert kept.get(4) is None
    for step, state in ((4, torch.randn(2, 3)), (12, torch.randn(2, 3).T)):
        kept[step] = state
        assert step in kept
        assert torch.equal(shelf(tmp_path).get(step), state)
    del kept[4]
    del kept[4]  # another process may have been first
    assert 4 not in kept
    assert 12 in kept
    kept.clear()
    kept.clear()
    assert not [*tmp_path.iterdir()]
