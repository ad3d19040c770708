"""Checkpoints on disk: whole files or none, and only those of the same pass."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


class Shelf:
    """States and progress of one pass back through a run, by step."""

    # A file appears under its name only once it is whole (written beside it, then renamed), and
    # its name holds a digest of the run and the directions, so that no other pass reads it.
    def __init__(self, folder: str, end: Tensor, directions: Tensor) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = _digest(end)
        self.key = _digest(end, directions)

    def __contains__(self, step: object) -> bool:
        return self._state(step).exists()

    def __getitem__(self, step: int) -> Tensor:
        return _read(self._state(step))["state"]

    def __setitem__(self, step: int, state: Tensor) -> None:
        _write(self._state(step), {"state": state})

    def __delitem__(self, step: int) -> None:
        self._state(step).unlink(missing_ok=True)

    def save_progress(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Keep how far the pass has come."""
        _write(self._progress, {**tensors, "step": torch.tensor(step)})

    def resume(self, tensors: dict[str, Tensor], last: int) -> int:
        """Go to where an interrupted pass had come, if there was one; gives the step."""
        if not self._progress.exists():
            return last
        kept = _read(self._progress)
        for name, own in tensors.items():
            own.copy_(kept[name])
        return int(kept["step"])

    def clear(self) -> None:
        """Remove what a finished pass leaves behind."""
        for path in [*self.folder.glob(f"{self.run}-*"), self._progress]:
            path.unlink(missing_ok=True)

    def _state(self, step: Any) -> Path:
        return self.folder / f"{self.run}-{step}.safetensors"

    @property
    def _progress(self) -> Path:
        return self.folder / f"{self.key}.safetensors"


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    os.replace(beside, path)


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
