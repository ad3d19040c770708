"""Files are whole or not there, and nothing is left beside them."""

import os
import platform
import subprocess
import sys

from skperf.backbone.files import beside


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
