"""Networks of the shape and size of ResNet-50, ViT-B/16 and BERT-base, on two cores.

    python -m benchmarks.shapes                # every network through every task
    python -m benchmarks.shapes bert heads     # one of them

Random weights, real rows: Fashion-MNIST images at 224 pixels in three channels, and texts of the
R8 news collection at 128 tokens. Every task is a process of its own with two threads. Seconds are
wall and CPU time of the task without building the network; the memory is the peak of the process
above what it held with network and rows in place.
"""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks import runner
from benchmarks.growth import _Peak, _resident

RESULTS = Path(__file__).parent / "results" / "shapes.json"
N_TRAIN, N_QUERIES, N_EXAMPLES, BUDGET = 200, 20, 10, 40


def images(n):
    """Return n images of Fashion-MNIST as (n, 3, 224, 224), and their labels."""
    import torch

    from skperf.datasets import load_fashion_mnist

    fashion = load_fashion_mnist(subset="test")
    small = torch.tensor(fashion.images[:n, None]).float() / 255
    large = torch.nn.functional.interpolate(small, size=224, mode="bilinear")
    return large.expand(-1, 3, -1, -1).numpy().copy(), fashion.target[:n]


def texts(n):
    """Return n texts of R8 as ids and masks of 128 tokens, and their labels."""
    from benchmarks.data import fetch_r8
    from skperf.datasets import load_text_image_encoder
    from skperf.datasets._tokenizer import WordPieceTokenizer

    pieces = load_text_image_encoder()[1].pieces
    bunch = fetch_r8(subset="train")
    whole = WordPieceTokenizer(pieces, 2000)([str(text) for text in bunch.data[:n]])
    ids = np.asarray(whole)[:, :128]
    rows = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    return rows, np.unique(bunch.target, return_inverse=True)[1][:n]


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=10)), images


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=10)), images


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=8)), texts


NETWORKS = {"resnet": resnet, "vit": vit, "bert": bert}
NAMES = {"resnet": "ResNet-50", "vit": "ViT-B/16", "bert": "BERT-base"}
LAST_BLOCK = {
    "resnet": "*stages.3.layers.2*",
    "vit": "*layer*.11.*",
    "bert": "*layer.11.*",
}
PARTS = {"resnet": "conv_filters", "vit": "attention_heads", "bert": "attention_heads"}


def influence(network, rows, labels, parameters, method="auto"):
    """Fit on the training rows, ask about the queries: -> what is asked, its size."""
    from skperf import InfluenceScorer

    scorer = InfluenceScorer(network, method=method, parameters=parameters, random_state=0)
    scorer.fit(_take(rows, slice(N_TRAIN)), labels[:N_TRAIN])
    found = scorer.influence(_take(rows, slice(N_TRAIN, None)), labels[N_TRAIN:])
    assert found.shape == (N_QUERIES, N_TRAIN)
    return {"covered": round(float(scorer.coverage_), 4)}


def components(network, rows, labels, kind):
    """Effects of filters or heads on a few rows."""
    from skperf import ComponentAttributor

    model = ComponentAttributor(network, components=kind, budget=BUDGET, random_state=0)
    model.fit(_take(rows, slice(N_EXAMPLES)), labels[:N_EXAMPLES])
    return {"components": int(model.attributions_.shape[1])}


def tasks(name):
    """Return what is done with a network, by name."""
    return {
        "influence, head": lambda *given: influence(*given, "*classifier*"),
        "influence, last block": lambda *given: influence(*given, LAST_BLOCK[name]),
        "influence, all by projection": lambda *given: influence(*given, "all", "trak"),
        PARTS[name].split("_")[-1]: lambda *given: components(*given, PARTS[name]),
    }


def _take(rows, part):
    if isinstance(rows, dict):
        return {key: value[part] for key, value in rows.items()}
    return rows[part]


def measure(name, task):
    """Measure one task in this process."""
    import torch

    from skperf import from_module

    torch.set_num_threads(2)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    module, draw = NETWORKS[name]()
    rows, labels = draw(N_TRAIN + N_QUERIES)
    network = from_module(module.eval(), batch_size=16)
    before, wall, cpu = _resident(), time.perf_counter(), time.process_time()
    with _Peak() as peak:
        found = tasks(name)[task](network, rows, labels)
    return {
        "network": NAMES[name],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "task": task,
        "minutes": round((time.perf_counter() - wall) / 60, 2),
        "CPU minutes": round((time.process_time() - cpu) / 60, 2),
        "GB": round((peak.highest - before) / 1e9, 2),
    } | found


def main(asked):
    if asked[:1] == ["--point"]:
        print(json.dumps(measure(*asked[1:])))
        return
    kept = runner.load(RESULTS) if RESULTS.exists() else []
    for name in NETWORKS:
        for task in tasks(name):
            if any(word not in (name, *task.replace(",", "").split()) for word in asked):
                continue
            command = [sys.executable, "-m", "benchmarks.shapes", "--point", name, task]
            environment = os.environ | {"OMP_NUM_THREADS": "2"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                print(name, task, done.stderr.splitlines()[-1:], flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            print(row, flush=True)
            same = (row["network"], row["task"])
            kept = [each for each in kept if (each["network"], each["task"]) != same] + [row]
            runner.save(RESULTS, kept)


if __name__ == "__main__":
    main(sys.argv[1:])
