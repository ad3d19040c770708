import hashlib
from pathlib import Path

import pytest

from benchmarks.data import archives
from benchmarks.data.archives import Archive, check, download, read_members
from benchmarks.data.recipes import RECIPES
from skperf.datasets._remote import cache_folder

CONTENT = b"what the registry sends"


@pytest.fixture
def archive():
    digest = hashlib.sha256(CONTENT).hexdigest()
    return Archive("fake", "thing==1.0", "thing-1.0.whl", digest, len(CONTENT), "CC0-1.0")


@pytest.fixture
def registry(monkeypatch):
    """A registry without a network: set `sends` to what it delivers."""

    class Registry:
        def __init__(self):
            self.sends = {"thing-1.0.whl": CONTENT}
            self.n_calls = 0

        def __call__(self, archive, folder):
            self.n_calls += 1
            for name, content in self.sends.items():
                (Path(folder) / name).write_bytes(content)

    fake = Registry()
    monkeypatch.setitem(archives.CLIENTS, "fake", fake)
    return fake


def test_cache_folder_is_the_environment_variable_or_in_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SKPERF_DATA", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("SKPERF_DATA")
    assert cache_folder() == Path.home() / ".cache" / "skperf"


def test_download_once(cache, registry, archive):
    path = download(archive)
    assert path == cache / "archives" / "thing-1.0.whl"
    assert path.read_bytes() == CONTENT
    assert download(archive) == path
    assert registry.n_calls == 1


def test_wrong_checksum_is_refused_and_not_kept(cache, registry, archive):
    registry.sends = {"thing-1.0.whl": CONTENT + b"!"}
    with pytest.raises(
        OSError, match=r"is not the expected file: sha256 .*, expected " + archive.sha256
    ):
        download(archive)
    assert list((cache / "archives").iterdir()) == []


def test_file_changed_in_the_cache_is_refused(cache, registry, archive):
    path = download(archive)
    path.write_bytes(b"tampered")
    with pytest.raises(OSError, match="Delete it and fetch again"):
        download(archive)


def test_another_file_than_expected_is_named(cache, registry, archive):
    registry.sends = {"thing-1.1.whl": CONTENT}
    with pytest.raises(OSError, match=r"expected thing-1.0.whl, got \['thing-1.1.whl'\]"):
        download(archive)


def test_check_accepts_the_right_file(tmp_path, archive):
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    check(path, archive)


def test_missing_client_is_named(tmp_path, monkeypatch, archive):
    monkeypatch.setenv("PATH", str(tmp_path))
    for registry, client in (("npm", "npm"), ("apt", "apt-get")):
        with pytest.raises(OSError, match=f"{client} is needed for this download"):
            archives.CLIENTS[registry](archive, str(tmp_path))


def test_failing_client_is_quoted(tmp_path):
    with pytest.raises(OSError, match=r"failed:\n.*No such file"):
        archives._run(["ls", "no-such-file"], str(tmp_path))


@pytest.mark.parametrize("name", ["a.whl", "a.tgz", "a.deb"])
def test_members_are_read_out_of_any_archive(make_archive, name):
    path = make_archive(name, {"package/a.txt": b"first", "package/b.txt": b"second"})
    assert read_members(path, lambda member: member.endswith("b.txt")) == {
        "package/b.txt": b"second"
    }


def test_deb_without_data_is_refused(tmp_path):
    path = tmp_path / "a.deb"
    path.write_bytes(b"!<arch>\n")
    with pytest.raises(OSError, match=r"no data\.tar member"):
        read_members(path, lambda member: True)


@pytest.mark.parametrize("name", RECIPES)
def test_recorded_archives_are_complete(name):
    archive = RECIPES[name].archive
    assert archive.registry in archives.CLIENTS
    assert len(bytes.fromhex(archive.sha256)) == 32
    assert archive.size > 100_000
    assert archive.licence
    version = archive.requirement.split("=")[-1].split("@")[-1]
    assert version in archive.filename
