"""Processes that are killed, disks that are full, files that are damaged, writers that meet."""

import contextlib
import errno
import hashlib
import os
import resource
import signal
import tempfile
import threading
import time
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skperf import ComponentAttributor, InfluenceScorer, Net, Reprogrammer
from skperf.backbone import files
from skperf.components import load_attributions
from skperf.datasets import _remote
from skperf.influence import Replay, read_checkpoints
from skperf.influence.replay_store import Shelf

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="forks, limits and kills as POSIX does"),
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*fork:DeprecationWarning"),
]
RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
y = (X[:, 0] > 0).astype(int) + (X[:, 1] > 0)
IMAGES = RNG.random((30, 1, 8, 8)).astype(np.float32)


def network(width=8):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).eval()


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 4)).eval()


@pytest.fixture(scope="module")
def program():
    model = Reprogrammer(encoder(), border=1, max_epochs=1, random_state=0)
    return model.fit(IMAGES, np.arange(30) % 3)


@pytest.fixture(scope="module")
def attributor():
    return ComponentAttributor(network(), budget=20, fraction=0.2, random_state=0).fit(X, y)


class Operation:
    """What writes a file, and what reads it."""

    def __init__(self, program, attributor):
        self.program, self.attributor = program, attributor

    def write(self, name, path):
        if name == "program":
            self.program.save_program(path)
        elif name == "attributions":
            self.attributor.save_attributions(path)
        elif name == "checkpoint of a run":
            Shelf(str(path.parent), torch.zeros(3), torch.ones(3))[2] = torch.ones(100_000)
        else:  # a download of what is not there
            (path / "rows.bin").unlink(missing_ok=True)
            _remote.fetched("mnist", path.parent, True)

    def read(self, name, path):
        if name == "program":
            return Reprogrammer(encoder()).load_program(path).predict(IMAGES[:3])
        if name == "attributions":
            return load_attributions(path).attributions
        if name == "checkpoint of a run":
            found = Shelf(str(path.parent), torch.zeros(3), torch.ones(3)).get(2)
            assert found is not None
            return found
        content = (path / "rows.bin").read_bytes()
        assert content == DOWNLOADED
        return np.frombuffer(content, np.uint8)


DOWNLOADED = bytes(400_000)
NAMES = {
    "program": "it.safetensors",
    "attributions": "it.npz",
    "checkpoint of a run": f"{Shelf('.', torch.zeros(3), torch.ones(3)).run}-2.safetensors",
    "data set": "mnist",
}


@pytest.fixture
def operation(program, attributor, monkeypatch):
    def retrieve(address, known, file, folder):
        with open(Path(folder) / file, "wb") as out:
            for start in range(0, len(DOWNLOADED), 1000):
                out.write(DOWNLOADED[start : start + 1000])
                out.flush()

    known = {"rows.bin": hashlib.sha256(DOWNLOADED).hexdigest()}
    monkeypatch.setitem(_remote.SOURCES, "mnist", ("http://nowhere/", known))
    monkeypatch.setattr(pytest.importorskip("pooch"), "retrieve", retrieve)
    return Operation(program, attributor)


def forked(work):
    """Run work in a child that never comes back by itself."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    return child


def over_and_over(work):
    while True:
        work()


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_writer_leaves_a_whole_file_and_the_next_one_clears_up(name, operation, tmp_path):
    path = tmp_path / NAMES[name]
    operation.write(name, path)
    before = {each.name for each in tmp_path.iterdir()}
    rng = np.random.default_rng(1)
    for _ in range(6):
        child = forked(lambda: over_and_over(lambda: operation.write(name, path)))
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if name != "data set" or (path / "rows.bin").exists():
            operation.read(name, path)
    operation.write(name, path)
    operation.read(name, path)
    assert {each.name for each in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", NAMES)
def test_writers_of_one_path_never_show_a_reader_half_a_file(name, operation, tmp_path):
    if name == "data set":
        # a download that is there and whole is read, not written again
        pytest.skip("is written once, where there is none")
    path = tmp_path / NAMES[name]
    operation.write(name, path)
    expected = np.asarray(operation.read(name, path))
    writers = [forked(lambda: over_and_over(lambda: operation.write(name, path))) for _ in range(2)]
    try:
        for _ in range(10):
            np.testing.assert_array_equal(np.asarray(operation.read(name, path)), expected)
    finally:
        for child in writers:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


# Full disks and read-only folders --------------------------------------------------------------


@contextlib.contextmanager
def full_disk(n_bytes):
    """Files can't grow beyond so much, with the error of a full disk in all but its number."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_an_error_that_leaves_the_old_file(name, operation, tmp_path):
    path = tmp_path / NAMES[name]
    operation.write(name, path)
    expected = np.asarray(operation.read(name, path))
    before = {each.name for each in tmp_path.iterdir()}
    with full_disk(100), pytest.raises(Exception, match=r"(?i)file too large|space|written"):
        operation.write(name, path)
    if name != "data set":
        np.testing.assert_array_equal(np.asarray(operation.read(name, path)), expected)
    assert {each.name for each in tmp_path.iterdir()} == before


def test_gradients_that_the_disk_has_no_room_for_are_refused(tmp_path):
    scorer = InfluenceScorer(network(), method="gradient_dot", memory_budget=2000, storage=tmp_path)
    message = rf"beyond memory_budget, kept in {tmp_path}, takes [\d,]+ bytes on disk"
    with full_disk(1000), pytest.raises(OSError, match=message):
        scorer.fit(X, y)
    assert not hasattr(scorer, "self_influence_")
    assert list(tmp_path.iterdir()) == []
    scorer.fit(X, y)


def test_a_memmap_that_the_disk_has_no_room_for_is_refused(tmp_path, monkeypatch):
    scorer = InfluenceScorer(network(), method="gradient_dot").fit(X, y)
    out = np.memmap(tmp_path / "scores", np.float32, "w+", shape=(20, 40))

    def full(file, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        message = "out=.*scores takes 3,200 bytes on disk, which gives: No space"
        with pytest.raises(OSError, match=message):
            scorer.influence(X[:20], y[:20], out=out)
    assert not out.any()
    scorer.influence(X[:20], y[:20], out=out)
    assert out.any()


@pytest.mark.parametrize("fallocate", [True, False], ids=["fallocate", "statvfs"])
def test_room_is_asked_for_on_every_system(fallocate, tmp_path, monkeypatch):
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    message = rf"\(1000000, 10000000\).* kept in {tmp_path}.*bytes on disk"
    with pytest.raises(OSError, match=message):
        files.on_disk((10**6, 10**7), np.dtype(np.float64), tmp_path)
    assert files.on_disk((3, 5), np.dtype(np.float32), tmp_path).shape == (3, 5)
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def read_only_folder():
    """A folder in which nobody may write, root being somebody else for a while."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


@pytest.mark.parametrize("name", [*NAMES, "gradients"])
def test_a_read_only_folder_is_an_error_that_names_it(name, operation):
    with read_only_folder() as folder:
        if name == "gradients":
            scorer = InfluenceScorer(network(), memory_budget=2000, storage=folder)
            with pytest.raises(OSError, match=folder.name):
                scorer.fit(X, y)
            return
        with pytest.raises(Exception, match=r"(?i)permission denied|read-only"):
            operation.write(name, folder / NAMES[name])
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "where"), [("gradient_dot", "storage"), (Replay(folder="nowhere\0"), "folder")]
)
def test_a_folder_that_is_none_is_refused(method, where, tmp_path):
    made = InfluenceScorer(
        Net(network(), max_epochs=1), method=method, memory_budget=2000, storage=tmp_path / "none"
    )
    with pytest.raises((OSError, ValueError)):
        made.fit(X, y).influence(X[:2], y[:2])


# Damaged files ---------------------------------------------------------------------------------


def cut(content):
    return content[: len(content) // 2]


DAMAGES = {
    "cut": cut,
    "empty": lambda content: b"",
    "text": lambda content: b"label,value\n1,2\n" * 20,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["program", "attributions"])
def test_damaged_files_are_refused_by_name(name, damage, operation, tmp_path):
    path = tmp_path / NAMES[name]
    operation.write(name, path)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises((ValueError, OSError), match=rf"{path.name}.* (is damaged|holds no)"):
        operation.read(name, path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_download_is_fetched_again(damage, operation, tmp_path):
    (path,) = _remote.fetched("mnist", tmp_path, True)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert _remote.fetched("mnist", tmp_path, True) == [path]
    operation.read("data set", tmp_path / "mnist")
    assert list((tmp_path / "mnist").iterdir()) == [path]


@pytest.mark.parametrize("name", ["program", "attributions"])
def test_one_byte_that_turned_is_refused_or_was_of_no_account(name, operation, tmp_path):
    path = tmp_path / NAMES[name]
    operation.write(name, path)
    expected, content = np.asarray(operation.read(name, path)), path.read_bytes()
    refused = 0
    for at in np.random.default_rng(0).integers(0, len(content), 12):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            np.testing.assert_array_equal(np.asarray(operation.read(name, path)), expected)
        except (ValueError, OSError) as error:
            assert path.name in str(error)  # noqa: PT017
            refused += 1
    assert refused >= 6


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_checkpoints_are_refused_by_name(damage, suffix, tmp_path):
    path = tmp_path / f"epoch.{suffix}"
    if suffix == "pt":
        torch.save(network().state_dict(), path)
    else:
        save_file(network().state_dict(), path)
    assert len(read_checkpoints(path)[0]) == 4
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{path.name} can't be read as a checkpoint"):
        read_checkpoints(path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        read_checkpoints(tmp_path / "list.pt")


class Trap:
    """A pickle of it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_loader_runs_what_a_pickle_says(tmp_path):
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    torch.save({"weight": Trap(sprung)}, trap.with_suffix(".pt"))
    with pytest.raises(ValueError, match="can't be read as a checkpoint"):
        read_checkpoints(trap.with_suffix(".pt"))
    np.savez(trap.with_suffix(".npz"), attributions=np.array([Trap(sprung)], dtype=object))
    with pytest.raises(ValueError, match="holds no attributions"):
        load_attributions(trap.with_suffix(".npz"))
    joblib.dump(Trap(sprung), trap)
    with pytest.raises(ValueError, match="holds no program"):
        Reprogrammer(encoder()).load_program(trap)
    assert not sprung.exists()


# Workers that die ------------------------------------------------------------------------------


class Deadly:
    """An output whose first worker process dies while it computes it."""

    def __init__(self, folder):
        self.folder, self.parent = str(folder), os.getpid()

    def __call__(self, logits, y):
        armed = Path(self.folder) / "armed"
        if os.getpid() != self.parent and armed.exists():
            armed.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return logits[:, 0]


@pytest.mark.slow
def test_a_dead_process_is_an_error_and_the_next_call_works(tmp_path):
    def fitted():
        params = {"output": Deadly(tmp_path), "budget": 40, "fraction": 0.2, "random_state": 0}
        with joblib.parallel_config("loky"):
            model = ComponentAttributor(network(), n_jobs=2, method="regression", **params)
            return model.fit(X, y)

    expected = fitted().attributions_
    (tmp_path / "armed").touch()
    with pytest.raises(Exception, match="worker process"):
        fitted()
    assert not (tmp_path / "armed").exists()
    np.testing.assert_allclose(fitted().attributions_, expected, rtol=1e-5, atol=1e-7)


def test_threads_saving_to_one_path_all_succeed(program, tmp_path):
    errors = []

    def save():
        try:
            for _ in range(10):
                program.save_program(tmp_path / "it.safetensors")
        except Exception as error:  # whatever it is, it is a failure here
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [each.name for each in tmp_path.iterdir()] == ["it.safetensors"]
