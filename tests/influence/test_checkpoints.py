"""State dicts out of files that others wrote."""

import pytest
import torch
from influence_nets import mlp

from skperf.influence import read_checkpoints


def test_checkpoints_of_other_libraries_are_read(tmp_path):
    from safetensors.torch import save_file

    states = [{k: v.detach() for k, v in mlp(4, 3, seed=i).state_dict().items()} for i in range(3)]
    for step, state in zip((10, 200), states, strict=False):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file(state, folder / "model.safetensors")
    torch.save(
        {"state_dict": {f"model.{k}": v for k, v in states[2].items()}, "epoch": 3},
        tmp_path / "last.ckpt",
    )
    read = read_checkpoints([tmp_path / "run", tmp_path / "last.ckpt"])
    for found, expected in zip(read, states, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[k], expected[k]) for k in expected)
    with pytest.raises(FileNotFoundError, match="holds none of"):
        read_checkpoints(tmp_path)


def test_the_best_known_file_of_a_folder_is_taken_and_steps_count_as_numbers(tmp_path):
    from safetensors.torch import save_file

    for step, value in ((9, 1.0), (10, 2.0), (100, 3.0)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save({"w": torch.full((2,), -1.0)}, folder / "pytorch_model.bin")
        save_file({"w": torch.full((2,), value)}, folder / "model.safetensors")
    (tmp_path / "checkpoint-last").mkdir()  # no number
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    assert [float(state["w"][0]) for state in read_checkpoints(tmp_path)] == [1.0, 2.0, 3.0]
    (file,) = read_checkpoints(str(tmp_path / "pytorch_model.bin"))
    assert not file["w"].any()


def test_names_lose_what_lightning_puts_before_all_of_them_only(tmp_path):
    weights = {"model.a": torch.ones(1), "b": torch.ones(1), "epoch": 4}
    torch.save({"state_dict": weights}, tmp_path / "mixed.ckpt")
    torch.save({"model.a": torch.ones(1)}, tmp_path / "plain.pt")
    read = read_checkpoints([tmp_path / "mixed.ckpt", tmp_path / "plain.pt"])
    assert [sorted(state) for state in read] == [["b", "model.a"], ["model.a"]]


@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: path.write_bytes(b"no checkpoint"), "can't be read as a checkpoint"),
        (lambda path: torch.save([1, 2], path), "holds a list, not a state dict"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, write, said):
    path = tmp_path / "file.pt"
    write(path)
    with pytest.raises(ValueError, match=rf"file\.pt.*{said}"):
        read_checkpoints(path)
