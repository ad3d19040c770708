"""Package archives that hold data and weights: download, check, read."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from skperf.datasets._remote import cache_folder


@dataclass(frozen=True)
class Archive:
    """One file of a package registry, fixed by its checksum."""

    registry: str
    requirement: str
    filename: str
    sha256: str
    size: int
    licence: str


def download(archive: Archive) -> Path:
    """Return the path of an archive in the cache, downloading it when it is not there."""
    path = cache_folder() / "archives" / archive.filename
    if path.exists():
        check(path, archive)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        CLIENTS[archive.registry](archive, folder)
        downloaded = Path(folder) / archive.filename
        if not downloaded.exists():
            got = sorted(os.listdir(folder))
            raise OSError(f"{archive.requirement}: expected {archive.filename}, got {got}")
        check(downloaded, archive)
        downloaded.replace(path)
    return path


def check(path: Path, archive: Archive) -> None:
    """Refuse a file whose checksum is not the recorded one."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != archive.sha256:
        raise OSError(
            f"{path} is not the expected file: sha256 {found}, expected {archive.sha256}. "
            "Delete it and fetch again."
        )


def _download_from_pip(archive: Archive, folder: str) -> None:
    # Platform and Python are those of the recorded file, not of this machine: it is only read.
    target = ["--python-version", "3.11"]
    for platform in ("any", "manylinux2014_x86_64", "manylinux_2_28_x86_64"):
        target += ["--platform", platform]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary", ":all:", *target, "-d", ".", archive.requirement]
    _run(command, folder)


def _download_from_npm(archive: Archive, folder: str) -> None:
    _run(["npm", "pack", "--silent", "--ignore-scripts", archive.requirement], folder)


def _download_from_apt(archive: Archive, folder: str) -> None:
    command = ["apt-get", "download", "-q", archive.requirement]
    try:
        _run(command, folder)
    except OSError:  # the machine may not have its package lists yet
        _run(["apt-get", "update", "-q"], folder)
        _run(command, folder)


CLIENTS: dict[str, Callable[[Archive, str], None]] = {
    "pip": _download_from_pip,
    "npm": _download_from_npm,
    "apt": _download_from_apt,
}


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise OSError(f"{command[0]} is needed for this download and is not installed") from None
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)} failed:\n{done.stderr.strip()[-1000:]}")


def read_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Read files out of a wheel, a ``.tgz`` or a ``.deb`` without unpacking it."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if wanted(name)}
    if path.suffix == ".deb":
        with tarfile.open(fileobj=io.BytesIO(_data_of_deb(path.read_bytes()))) as tar:
            return dict(_members_of_tar(tar, wanted))
    with tarfile.open(path) as tar:
        return dict(_members_of_tar(tar, wanted))


def _members_of_tar(
    tar: tarfile.TarFile, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        file = tar.extractfile(member) if member.isfile() and wanted(member.name) else None
        if file is not None:
            yield member.name, file.read()


def _data_of_deb(content: bytes) -> bytes:
    # An ar archive: an 8-byte mark, then members of a 60-byte header each, padded to even length.
    position = 8
    while position < len(content):
        name = content[position : position + 16].decode().strip(" /")
        size = int(content[position + 48 : position + 58])
        start = position + 60
        if name.startswith("data.tar"):
            return content[start : start + size]
        position = start + size + size % 2
    raise OSError("the .deb archive has no data.tar member")
