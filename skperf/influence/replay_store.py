"""Checkpoints on disk: whole files or none, and only those of the same pass."""

import hashlib
from collections import deque
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from skperf.backbone.files import whole
from skperf.backbone.training_run import Trainer, states_between


class Shelf:
    """States and progress of one pass back through a run, by step."""

    # The name of a file holds a digest of the run and the directions, so that no other pass reads
    # it. What is damaged, or removed by another process that has finished the same pass, counts as
    # never written.
    def __init__(self, folder: str, end: Tensor, directions: Tensor) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run = _digest(end)
        self.key = _digest(end, directions)

    def __contains__(self, step: object) -> bool:
        return self._state(step).exists()

    def get(self, step: int) -> Tensor | None:
        """Read a state, if it is there and whole."""
        return _read(self._state(step)).get("state")

    def __setitem__(self, step: int, state: Tensor) -> None:
        _write(self._state(step), {"state": state})

    def __delitem__(self, step: int) -> None:
        self._state(step).unlink(missing_ok=True)

    def save_progress(self, step: int, tensors: dict[str, Tensor]) -> None:
        """Keep how far the pass has come."""
        _write(self._progress, {**tensors, "step": torch.tensor(step)})

    def resume(self, tensors: dict[str, Tensor], last: int) -> int:
        """Go to where an interrupted pass had come, if there was one; gives the step."""
        kept = _read(self._progress)
        if any(name not in kept or kept[name].shape != own.shape for name, own in tensors.items()):
            return last
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


def state_at(at: int, kept: Any, trainer: Trainer, start: Tensor, first: int) -> Tensor:
    """Give the state at a step from what is kept, or from `start` (n_values,) at step `first`."""
    state: Tensor | None = kept.get(at)
    if state is None:
        return deque(states_between(trainer, start, first, at), maxlen=1).pop()
    return state.to(start.device)


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    with whole(path) as unfinished:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (FileNotFoundError, SafetensorError):
        return {}
