"""Loaders of the small real data sets that ship with the package."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.utils import Bunch

FASHION_NAMES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


def load_fashion_mnist(*, subset: str = "all", return_X_y: bool = False) -> Any:
    """Load 3,000 images of Fashion-MNIST, balanced over the ten classes.

    The first 1,000 rows are from the training set, on which the networks of `load_fashion_cnn`
    and `load_small_resnet` were trained; the other 2,000 are from the test set, which they
    never saw.

    Parameters
    ----------
    subset : {"all", "train", "test"}, default="all"
        Which of these rows.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data`` (n, 784) float32 in [0, 1], ``images`` (n, 28, 28) uint8, ``target`` (n,)
        int, ``target_names`` (10,), ``is_train`` (n,) bool and ``DESCR``.

    Raises
    ------
    ValueError
        If `subset` is none of the three.

    References
    ----------
    Xiao, Rasul, Vollgraf: Fashion-MNIST: a novel image dataset for benchmarking machine learning
    algorithms. arXiv:1708.07747. Copyright 2017 Zalando SE, MIT licence.
    """
    description = "3,000 images of Fashion-MNIST; MIT licence, copyright 2017 Zalando SE."
    arrays = load_arrays(data_file("fashion_mnist.npz"))
    return subset_bunch(arrays, subset, FASHION_NAMES, description, return_X_y=return_X_y)


def load_faces(*, return_X_y: bool = False) -> Any:
    """Load 100 faces and 100 pieces of background, to try `load_rnet` on.

    Parameters
    ----------
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data`` (200, 1728) float32 in [0, 1], ``images`` (200, 3, 24, 24) uint8 (grey, three
        equal channels), ``target`` (200,) int, ``target_names`` and ``DESCR``.

    References
    ----------
    Huang, Mattar, Lee, Learned-Miller: Learning to align from scratch. NIPS 2012. Cut out of
    Labeled Faces in the Wild by scikit-image, which distributes them under the BSD licence;
    reduced to 24 x 24 pixels.
    """
    arrays = load_arrays(data_file("faces.npz"))
    return image_bunch(
        np.repeat(arrays["images"][:, None], 3, axis=1),
        arrays["target"],
        ("not a face", "face"),
        "100 faces and 100 non-faces out of Labeled Faces in the Wild, from scikit-image (BSD).",
        return_X_y=return_X_y,
    )


def load_emoji(style: str = "google", *, subset: str = "all", return_X_y: bool = False) -> Any:
    """Load 600 emoji of 32 x 32 pixels, labelled with their category.

    Half of them are pictures that `load_text_image_encoder` was trained on (in the Google style
    only), half were held out of its training. Row i is the same emoji in both styles.

    Parameters
    ----------
    style : {"google", "twitter"}, default="google"
        Who drew them: Google (Noto Emoji, Apache-2.0) or Twitter (Twemoji, copyright Twitter, Inc.
        and other contributors, CC-BY-4.0; reduced in size, laid on white).
    subset : {"all", "train", "test"}, default="all"
        All of them, those of the training or those held out.
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data`` (n, 3072) float32 in [0, 1], ``images`` (n, 3, 32, 32) uint8, ``target``
        (n,) int, ``target_names`` (8 categories), ``names`` (n,), ``is_train`` (n,) bool and
        ``DESCR``.

    Raises
    ------
    ValueError
        If `style` or `subset` is unknown.
    """
    if style not in ("google", "twitter"):
        raise ValueError(f"style must be 'google' or 'twitter', got {style!r}")
    chosen = chosen_subsets(subset)
    arrays = load_arrays(data_file("emoji.npz"))
    kept = np.isin(np.where(arrays["is_train"], "train", "test"), chosen)
    names, target = np.unique(arrays["categories"], return_inverse=True)
    return image_bunch(
        arrays[f"images_{style}"][kept],
        target[kept],
        names,
        "Emoji drawn by Google (Apache-2.0) or Twitter (CC-BY-4.0), reduced to 32 x 32.",
        return_X_y=return_X_y,
        names=arrays["names"][kept],
        is_train=arrays["is_train"][kept],
    )


def load_email_vectors(*, return_X_y: bool = False) -> Any:
    """Load the sentence vectors of 600 e-mails, half of them spam.

    Made by all-MiniLM-L6-v2 of the bodies of e-mails of the SpamAssassin public corpus (CC0).

    Parameters
    ----------
    return_X_y : bool, default=False
        Whether to return ``(data, target)`` instead of a Bunch.

    Returns
    -------
    Bunch or tuple
        With ``data`` (600, 384) float32, ``target`` (600,) int, ``target_names``, ``texts`` (their
        first 300 characters, addresses and long numbers replaced), ``groups`` (the folders of the
        corpus; "hard-ham-1" looks like spam) and ``DESCR``.
    """
    arrays = load_arrays(data_file("email_vectors.npz"))
    data, target = arrays["vectors"].astype(np.float32), arrays["target"].astype(np.int64)
    if return_X_y:
        return data, target
    return Bunch(
        data=data,
        target=target,
        target_names=np.array(["ham", "spam"]),
        texts=arrays["texts"],
        groups=arrays["groups"],
        DESCR="MiniLM vectors of 600 e-mails of the SpamAssassin public corpus; CC0.",
    )


def chosen_subsets(subset: str) -> tuple[str, ...]:
    """Return the names of the parts that a subset is made of."""
    if subset not in ("all", "train", "test"):
        raise ValueError(f"subset must be 'all', 'train' or 'test', got {subset!r}")
    return ("train", "test") if subset == "all" else (subset,)


def image_bunch(
    images: np.ndarray,
    target: np.ndarray,
    target_names: Any,
    description: str,
    *,
    return_X_y: bool = False,
    **more: Any,
) -> Any:
    """Give images (n, ...) and labels (n,) in the form that scikit-learn's loaders return."""
    data = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
    target = target.astype(np.int64)
    if return_X_y:
        return data, target
    return Bunch(
        data=data,
        images=images,
        target=target,
        target_names=np.array(target_names),
        DESCR=description,
        **more,
    )


def subset_bunch(
    arrays: dict[str, np.ndarray],
    subset: str,
    target_names: Any,
    description: str,
    *,
    return_X_y: bool,
) -> Any:
    """Put the rows of a subset, of "train" and "test", into the form of a loader."""
    chosen = chosen_subsets(subset)
    targets = [arrays[f"target_{each}"] for each in chosen]
    return image_bunch(
        np.concatenate([arrays[f"images_{each}"] for each in chosen]),
        np.concatenate(targets),
        target_names,
        description,
        return_X_y=return_X_y,
        is_train=np.repeat([each == "train" for each in chosen], [len(t) for t in targets]),
    )


def data_file(name: str) -> Path:
    """Return the path of a shipped file."""
    return Path(str(files("skperf.datasets") / "data" / name))


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file; nothing in it is ever unpickled."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)
