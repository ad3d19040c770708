"""The paper's two halves, CIFAR-10 and ImageNet, from what a user has on disk.

CIFAR-10 from any folder that transformers' ``save_pretrained`` or a download of a CLIP checkpoint
left, and from the binary version of the data (``data_batch_1.bin`` ... ``test_batch.bin``). Beside
them, when they are there: CIFAR-10.1 (``cifar10.1_v6_data.npy`` and ``_labels.npy``) and foreign
pictures, a folder of files each in ``ood/``. Zero-shot, logistic regression on the embeddings, the
released recipe at alpha 0 and .4, and the default:

    python -m benchmarks.reprogramming_paper cifar10 --checkpoint FOLDER --data FOLDER

ImageNet's size without ImageNet: pictures of 3 x 224 x 224 bytes of 1,000 classes in a file, drawn
here, on an encoder of a CLIP's shape but few channels. Peak memory above what the process held
before ``fit``, for one file and for one of four times the rows, and for 80 prompts a class:

    python -m benchmarks.reprogramming_paper imagenet
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from benchmarks import runner
from benchmarks.timing import Peak, anonymous
from skperf.metrics import fpr_at_95_tpr, ood_auroc
from skperf.reprogramming import Reprogrammer

RESULTS = Path(__file__).parent / "results"
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SIDE, N_CLASSES, N_TEMPLATES = 224, 1000, 80


class PictureFiles:
    """Pictures of a folder, opened one at a time."""

    def __init__(self, folder):
        kinds = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
        self.paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in kinds)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        from PIL import Image

        with Image.open(self.paths[row]) as picture:
            return picture.convert("RGB")


def read_binary(paths):
    """Read CIFAR-10's binary files: images (n, 3, 32, 32) of bytes and codes (n,)."""
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(int)


def cifar10(checkpoint, data, *, seed=0, n_rows=None, max_epochs=25):
    """Yield one record a method: accuracies, and AUROC and FPR95 of every foreign folder."""
    import transformers

    data = Path(data)
    encoder = transformers.AutoModel.from_pretrained(checkpoint).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    X, y = read_binary(sorted(data.glob("data_batch_*.bin")))
    tests = {"CIFAR-10": read_binary([data / "test_batch.bin"])}
    if (data / "cifar10.1_v6_data.npy").exists():
        images = np.load(data / "cifar10.1_v6_data.npy").transpose(0, 3, 1, 2)
        tests["CIFAR-10.1"] = images, np.load(data / "cifar10.1_v6_labels.npy").astype(int)
    foreign = {path.name: PictureFiles(path) for path in sorted((data / "ood").glob("*"))}
    keep = np.random.RandomState(seed).permutation(len(X))[:n_rows]
    names = np.array(CIFAR)
    X, labels = X[keep], names[y[keep]]
    options = {"processor": processor, "class_names": CIFAR, "random_state": seed}
    side = encoder.config.vision_config.image_size
    # The authors' recipe for CIFAR-10: 32 pixels of the picture show, all else is program.
    paper = {"shrink": 32, "border": (side - 32) // 2, "max_epochs": max_epochs}
    released = {
        f"released, alpha {alpha}": Reprogrammer.released(encoder, **options | paper, alpha=alpha)
        for alpha in (0.0, 0.4)  # the same program twice; only what it is mixed with differs
    }
    plain = Reprogrammer(encoder, max_epochs=0, **options).fit(X, labels)
    probe = LogisticRegression(max_iter=1000).fit(plain.transform(X), labels)
    default = Reprogrammer(encoder, max_epochs=max_epochs, **options)
    methods = {
        "zero-shot": (plain.predict_proba, plain.score_samples),
        "logistic regression": (
            lambda rows: probe.predict_proba(plain.transform(rows)),
            lambda rows: probe.predict_proba(plain.transform(rows)).max(1),
        ),
    }
    for name, model in {**released, "default": default}.items():
        model.fit(X, labels)
        methods[name] = model.predict_proba, model.score_samples
    order = np.sort(names)
    for name, (probabilities, scores) in methods.items():
        row = {"method": name, "seed": seed, "rows": len(X)}
        for test, (images, codes) in tests.items():
            guess = order[probabilities(images).argmax(1)]
            row[test] = round(float((guess == names[codes]).mean()), 4)
        own = scores(tests["CIFAR-10"][0])
        for kind, pictures in foreign.items():
            other = scores(pictures)
            truth = np.repeat([1, 0], [len(own), len(other)])
            row[f"AUROC {kind}"] = round(ood_auroc(truth, np.r_[own, other]), 4)
            row[f"FPR95 {kind}"] = round(fpr_at_95_tpr(truth, np.r_[own, other]), 4)
        yield row


def words(n):
    """Make n names out of two letters and a number, for a tokenizer that spells."""
    return [f"{chr(97 + k % 26)}{chr(97 + k // 26 % 26)} {k}" for k in range(n)]


def small_clip(folder, side=SIDE, patch=32):
    """Make a CLIP of few channels, and a processor that spells: of side x side pictures."""
    import transformers

    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    codes = {token: code for code, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(codes))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer.model_max_length = 77
    ends = {"bos_token_id": len(codes) - 2, "eos_token_id": len(codes) - 1}
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    shape["num_hidden_layers"] = 2
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config=shape | ends | {"vocab_size": len(codes), "pad_token_id": len(codes) - 1},
        vision_config=shape | {"image_size": side, "patch_size": patch},
        projection_dim=64,
    )
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    images = transformers.CLIPImageProcessor(**size)
    return transformers.CLIPModel(config).eval(), transformers.CLIPProcessor(images, tokenizer)


def drawn(path, n):
    """Draw n pictures into a file, and open it: (n, 3, 224, 224) of bytes, not in memory."""
    shape = (n, 3, SIDE, SIDE)
    rows = np.memmap(path, np.uint8, "w+", shape=shape)
    generator = np.random.RandomState(0)
    for first in range(0, n, 256):
        block = rows[first : first + 256]
        block[:] = generator.randint(0, 256, (len(block), 3, 1, SIDE), dtype=np.uint8)
    rows.flush()
    del rows
    return np.memmap(path, np.uint8, "r", shape=shape)


def imagenet_part(n, templates, batch_size):
    """Print peak memory and seconds of one fit and one prediction, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        encoder, processor = small_clip(Path(folder))
        X = drawn(Path(folder) / "rows.dat", n)
        y = np.arange(n) % N_CLASSES
        prompts = [f"a photo of a {{}}, {word}" for word in words(templates)]
        model = Reprogrammer(
            encoder,
            processor=processor,
            class_names=words(N_CLASSES),
            prompts=prompts,
            max_epochs=1,
            batch_size=batch_size,
            random_state=0,
        )
        seconds, peaks = [], []
        for work in (lambda: model.fit(X, y), lambda: model.predict(X[: n // 2])):
            gc.collect()
            start = time.perf_counter()
            with Peak(anonymous) as peak:
                work()
            seconds.append(round(time.perf_counter() - start))
            peaks.append(round((peak.highest - peak.before) / 2**20))
        found = {"rows": n, "prompts a class": templates, "file MiB": round(X.nbytes / 2**20)}
        found["batch MiB"] = round(batch_size * 3 * SIDE * SIDE * 4 / 2**20)
        found |= {"fit MiB": peaks[0], "predict MiB": peaks[1]}
        found |= {"fit s": seconds[0], "predict s": seconds[1]}
    print(json.dumps(found), flush=True)


def imagenet(sizes, batch_size):
    """Measure every size in a process of its own."""
    records = []
    for n, templates in sizes:
        command = [sys.executable, "-m", "benchmarks.reprogramming_paper", "part"]
        command += ["--rows", str(n), "--templates", str(templates)]
        command += ["--batch-size", str(batch_size)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        records.append(json.loads(output.splitlines()[-1]))
        runner.save(RESULTS / "reprogramming_imagenet.json", records, seeds=[0])
        print(records[-1], flush=True)


def main():
    """Run the asked half."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("half", choices=["cifar10", "imagenet", "part"])
    parser.add_argument("--checkpoint", help="folder of a CLIP checkpoint")
    parser.add_argument("--data", help="folder of CIFAR-10's binary files")
    parser.add_argument("--rows", type=int, help="train on so many; all where left out")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--templates", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    asked = parser.parse_args()
    if asked.half == "imagenet":
        imagenet([(1200, 1), (4800, 1), (1200, N_TEMPLATES)], asked.batch_size)
    elif asked.half == "part":
        torch.set_num_threads(1)
        imagenet_part(asked.rows, asked.templates, asked.batch_size)
    else:
        size = {"n_rows": asked.rows, "max_epochs": asked.epochs}
        records = []
        for record in cifar10(asked.checkpoint, asked.data, seed=asked.seed, **size):
            records.append(record)
            print(record, flush=True)
            runner.save(RESULTS / "reprogramming_cifar10.json", records)


if __name__ == "__main__":
    main()
