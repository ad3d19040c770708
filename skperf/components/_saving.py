"""Attributions on disk, with the names of components and without the network."""

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from sklearn.utils import Bunch

from skperf.backbone.files import whole

_COLUMNS = ("module", "kind", "unit")


class PairsBunch(Bunch):
    """What pairs of components do: a Bunch whose ``values`` are not the dictionary's."""

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """Second differences (n_examples, P)."""
        return np.asarray(self["values"])


def write_attributions(path: Any, components: np.recarray, **arrays: np.ndarray) -> None:
    """Write arrays beside the table of components to a file ``.npz``."""
    table: dict[str, Any] = {name: np.asarray(components[name]) for name in _COLUMNS}
    table.update(arrays)
    with whole(Path(path).with_suffix(".npz")) as unfinished:
        np.savez_compressed(unfinished, **table)


def load_attributions(path: Any) -> Bunch:
    """Read attributions that :meth:`ComponentAttributor.save_attributions` has written.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    Bunch
        ``attributions``, ``intercept``, ``stderr``, ``baseline_output``, ``names`` and
        ``components`` (recarray: index, module, kind, unit).
    """
    try:
        with np.load(Path(path).with_suffix(".npz"), allow_pickle=False) as stored:
            held = {name: stored[name] for name in stored.files}
        columns = [np.arange(len(held["unit"])), *(held.pop(n) for n in _COLUMNS)]
        table = np.rec.fromarrays(columns, names="index,module,kind,unit")  # type: ignore[call-overload]
        if held["attributions"].shape[1:] != table.shape:
            raise ValueError("it lacks components")
    except (ValueError, KeyError, EOFError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no attributions, or is damaged: {error}.") from error
    return Bunch(components=table, **held)
