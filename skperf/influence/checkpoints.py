"""Stages of a training run, read from the files that trainers leave."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")


def read_checkpoints(paths: Any) -> list[dict[str, Tensor]]:
    """Read state dicts for ``InfluenceScorer(method="tracin", checkpoints=...)``.

    Parameters
    ----------
    paths : path or list of paths
        Files of safetensors, of ``torch.save`` or of Lightning, folders of a Hugging Face
        checkpoint, or the output folder of a Hugging Face ``Trainer``, whose
        ``checkpoint-<step>`` folders are taken in order.

    Returns
    -------
    list of dict
        One state dict a checkpoint.

    Raises
    ------
    FileNotFoundError
        If a folder holds no weights.

    Examples
    --------
    >>> import torch, tempfile, pathlib
    >>> from skperf.influence import read_checkpoints
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "epoch1.pt"
    ...     torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    ...     [sorted(state) for state in read_checkpoints(path)]
    [['bias', 'weight']]
    """
    given = paths if isinstance(paths, list | tuple) else [paths]
    return [_read(file) for path in given for file in _files(Path(path))]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    stages = [p for p in path.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    folders = sorted(stages, key=lambda p: int(p.name.rpartition("-")[2])) or [path]
    found = []
    for folder in folders:
        files = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
        if not files:
            raise FileNotFoundError(
                f"{folder} holds none of {', '.join(_WEIGHTS)}: name the file itself, or join "
                "what is split into shards first."
            )
        found.append(files[0])
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"{path} can't be read as a checkpoint: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a state dict.")
    state = loaded.get("state_dict", loaded)  # Lightning keeps it beside its own state
    names = [name for name in state if name.startswith("model.")]
    if "state_dict" in loaded and len(names) == len(state):
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
