"""Files are whole or not there, and nothing is left beside them."""

import os
import platform
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from skperf.backbone import files
from skperf.backbone.files import beside, on_disk


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_not(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    name = f".kept.bin.{platform.node()}"
    left = tmp_path / f"{name}.{ended.pid}.0123abcd.part"
    held = tmp_path / f"{name}.{os.getpid()}.0123abcd.part"
    other = tmp_path / f".other.bin.{platform.node()}.{ended.pid}.0123abcd.part"
    for folder in (left, held, other):
        folder.mkdir()
        (folder / "piece").write_bytes(b"1")
    with beside(tmp_path / "kept.bin") as own:
        assert own.is_dir()
    assert sorted(tmp_path.iterdir()) == sorted([held, other])


@pytest.mark.parametrize("shape", [(3, 5), (1,), (0, 4)])
def test_an_array_on_disk_takes_what_it_needs_and_leaves_no_name(shape, tmp_path):
    found = on_disk(shape, np.dtype(np.float32), tmp_path)
    assert found.shape == shape
    found[:] = 2.5
    assert (found == 2.5).all()
    assert list(tmp_path.iterdir()) == []


def test_room_is_taken_before_anything_is_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(files, "reserve", lambda file, size, what: asked.append((size, what)))
    with suppress(ValueError):  # there is no room to map
        on_disk((3, 5), np.dtype(np.float64), tmp_path)
    with suppress(ValueError):
        on_disk((0, 5), np.dtype(np.float64), tmp_path)
    assert [size for size, _ in asked] == [120, 1]
    assert "an array of shape (3, 5) beyond memory_budget" in asked[0][1]
