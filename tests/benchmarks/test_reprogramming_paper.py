"""The script of the paper's two halves runs on what a user has on disk."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import reprogramming_paper as paper

pytest.importorskip("transformers")


@pytest.fixture
def folders(tmp_path):
    """A checkpoint and CIFAR-10's files, of three classes that differ in colour."""
    checkpoint, data = tmp_path / "clip", tmp_path / "data"
    (data / "ood" / "noise").mkdir(parents=True)
    checkpoint.mkdir()
    encoder, processor = paper.small_clip(checkpoint, side=48, patch=16)
    encoder.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    generator = np.random.RandomState(0)
    for name, n in {"data_batch_1.bin": 30, "data_batch_2.bin": 10, "test_batch.bin": 20}.items():
        codes = (np.arange(n) % 10).astype(np.uint8)
        images = generator.randint(0, 60, (n, 3, 1024)).astype(np.uint8)
        images += (codes * 18)[:, None, None].astype(np.uint8)
        np.concatenate([codes[:, None], images.reshape(n, -1)], 1).tofile(data / name)
    images, codes = paper.read_binary([data / "test_batch.bin"])
    np.save(data / "cifar10.1_v6_data.npy", images[::2].transpose(0, 2, 3, 1))
    np.save(data / "cifar10.1_v6_labels.npy", codes[::2])
    for k in range(6):
        noise = generator.randint(0, 256, (40, 50, 3)).astype(np.uint8)
        Image.fromarray(noise).save(data / "ood" / "noise" / f"{k}.png")
    return checkpoint, data


def test_binary_files_are_read_in_order(tmp_path):
    rows = np.arange(2 * 3073).astype(np.uint8).reshape(2, 3073)
    rows[0].tofile(tmp_path / "data_batch_1.bin")
    rows[1].tofile(tmp_path / "data_batch_2.bin")
    images, codes = paper.read_binary(sorted(tmp_path.glob("*.bin")))
    assert codes.tolist() == rows[:, 0].tolist()
    assert np.array_equal(images[1, 2, 31], rows[1, -32:])


def test_cifar10_runs_from_a_checkpoint_folder(folders):
    checkpoint, data = folders
    records = list(paper.cifar10(checkpoint, data, max_epochs=1))
    methods = ["zero-shot", "logistic regression", "released, alpha 0.0", "released, alpha 0.4"]
    assert [record["method"] for record in records] == [*methods, "default"]
    columns = {"CIFAR-10", "CIFAR-10.1", "AUROC noise", "FPR95 noise"}
    assert all(columns <= set(record) for record in records)

    import transformers

    encoder = transformers.AutoModel.from_pretrained(checkpoint).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    images, codes = paper.read_binary([data / "test_batch.bin"])
    prompts = processor.tokenizer(
        [f"a photo of a {name}" for name in paper.CIFAR], padding=True, return_tensors="pt"
    )
    pictures = [Image.fromarray(image.transpose(1, 2, 0)) for image in images]
    pixels = processor.image_processor(pictures, return_tensors="pt")
    guess = encoder(**prompts, **pixels).logits_per_image.argmax(1).numpy()
    assert records[0]["CIFAR-10"] == round(float((guess == codes).mean()), 4)


def test_folders_of_pictures_are_rows(folders):
    pictures = paper.PictureFiles(folders[1] / "ood" / "noise")
    assert len(pictures) == 6
    assert pictures[3].size == (50, 40)


def test_imagenet_by_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "SIDE", 32)
    monkeypatch.setattr(paper, "N_CLASSES", 20)
    rows = paper.drawn(tmp_path / "rows.dat", 3)
    assert rows.shape == (3, 3, 32, 32)
    assert not rows.flags.writeable
    paper.imagenet_part(40, 3, 8)
    found = json.loads(capsys.readouterr().out)
    assert found["prompts a class"] == 3
    assert found["fit MiB"] >= 0
