"""Attributions on disk, with the names of components and without the network."""

import zlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from sklearn.utils import Bunch

from skperf.backbone.files import whole

_COLUMNS = ("module", "kind", "unit")
_BY_COMPONENT = ("attributions", "stderr")


class PairsBunch(Bunch):
    """What pairs of components do: a Bunch whose ``values`` are not the dictionary's."""

    @property
    def values(self) -> np.ndarray:  # type: ignore[override]
        """Second differences (n_examples, P)."""
        return np.asarray(self["values"])


def write_attributions(path: Any, components: np.recarray, **arrays: np.ndarray) -> None:
    """Write arrays beside the table of components to a file ``.npz`` or ``.parquet``."""
    table: dict[str, Any] = {name: np.asarray(components[name]) for name in _COLUMNS}
    both: dict[str, Any] = table | arrays
    with whole(_named(path)) as unfinished:
        if _named(path).suffix == ".npz":
            np.savez_compressed(unfinished, **both)
        else:
            _as_frame(table, arrays).to_parquet(unfinished)


def _named(path: Any) -> Path:
    path = Path(path)
    return path if path.suffix in (".npz", ".parquet") else path.with_name(f"{path.name}.npz")


def _as_frame(table: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    """Give a table with a row for each component, what is of no component in its attributes."""
    import pandas as pd

    columns = {**table, "names": arrays["names"]}
    for name in _BY_COMPONENT:
        values = arrays[name].reshape(-1, arrays[name].shape[-1])
        columns |= {f"{name}_{row}": column for row, column in enumerate(values)}
    frame = pd.DataFrame(columns)
    frame.attrs = {name: arrays[name].tolist() for name in ("intercept", "baseline_output")}
    return frame


def _from_frame(path: Path) -> dict[str, Any]:
    import pandas as pd

    frame = pd.read_parquet(path)
    held = {name: np.asarray(values) for name, values in frame.attrs.items()}
    for name in _BY_COMPONENT:
        own = frame[[column for column in frame if column.startswith(f"{name}_")]]
        held[name] = own.to_numpy().T.reshape(*held["intercept"].shape, len(frame))
    return (
        held
        | {name: frame[name].to_numpy(str) for name in ("module", "kind", "names")}
        | {"unit": frame["unit"].to_numpy()}
    )


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
        if _named(path).suffix == ".npz":
            with np.load(_named(path), allow_pickle=False) as stored:
                held = {name: stored[name] for name in stored.files}
        else:
            held = _from_frame(_named(path))
        columns = [np.arange(len(held["unit"])), *(held.pop(n) for n in _COLUMNS)]
        table = np.rec.fromarrays(columns, names="index,module,kind,unit")  # type: ignore[call-overload]
        if held["attributions"].shape[-1:] != table.shape:
            raise ValueError("it lacks components")
    except (ValueError, KeyError, EOFError, AttributeError, BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no attributions, or is damaged: {error}.") from error
    return Bunch(components=table, **held)
