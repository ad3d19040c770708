"""Networks of the shape and size of ResNet-50, ViT-B/16 and BERT-base.

    python -m benchmarks.shapes                 # every network through every task, on two cores
    python -m benchmarks.shapes bert heads      # one of them
    python -m benchmarks.shapes --cuda          # on the GPU, also with bfloat16 products

Random weights, real rows: Fashion-MNIST images at 224 pixels in three channels, and the shipped
e-mails at 128 tokens. On the CPU every task is a process of its own with two threads; on the GPU
one process runs them all after a small one that starts the device. Times are those of the task
without building the network. The memory is what the task adds to what network and rows took: the
peak of the process, on a GPU the peak of its allocator.
"""

import itertools
import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from benchmarks import runner
from benchmarks.timing import Peak, resident

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
    """Return n e-mails as ids and masks of 128 tokens, and whether they are spam."""
    from skperf.datasets import load_email_vectors, load_text_image_encoder
    from skperf.datasets._tokenizer import WordPieceTokenizer

    mails, pieces = load_email_vectors(), load_text_image_encoder()[1].pieces
    some = np.random.default_rng(0).permutation(len(mails.texts))[:n]
    whole = WordPieceTokenizer(pieces, 2000)([str(text) for text in mails.texts[some]])
    ids = np.zeros((n, 128), np.int64)
    given = np.asarray(whole)[:, :128]
    ids[:, : given.shape[1]] = given
    rows = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    return rows, mails.target[some]


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=10)), images


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=10)), images


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(num_labels=2)), texts


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


def adapted(network, rows, labels):
    """Influence on the low-rank changes that LoRA would train."""
    from peft import LoraConfig, get_peft_model

    module = network.estimator.module
    changed = get_peft_model(
        module,
        LoraConfig(target_modules=r".*(query|value|q_proj|v_proj)", r=8, init_lora_weights=False),
    )
    return influence(_opened(changed.eval(), "float32"), rows, labels, "all")


def reprogrammed(network, rows, labels):
    """One epoch of a border around the pictures, by the features of the network."""
    from torch import nn

    from skperf import Reprogrammer

    class Features(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, pixels):
            states = self.module(pixels, output_hidden_states=True).hidden_states[-1]
            return states.mean((2, 3)) if states.ndim == 4 else states[:, 0]

    model = Reprogrammer(
        Features(network.estimator.module), max_epochs=1, batch_size=16, head="linear"
    )
    model.set_params(random_state=0).fit(rows[: N_EXAMPLES * 8], labels[: N_EXAMPLES * 8])
    return {"trained pixels": int(np.prod(np.shape(model.program_)))}


def tasks(name):
    """Return what is done with a network, by name."""
    found = {
        "influence, head": lambda *given: influence(*given, "*classifier*"),
        "influence, last block": lambda *given: influence(*given, LAST_BLOCK[name]),
        "influence, all by projection": lambda *given: influence(*given, "all", "trak"),
        PARTS[name].split("_")[-1]: lambda *given: components(*given, PARTS[name]),
    }
    if name != "resnet":
        found["influence, LoRA"] = adapted
    if name != "bert":
        found["reprogramming"] = reprogrammed
    return found


def _take(rows, part):
    if isinstance(rows, dict):
        return {key: value[part] for key, value in rows.items()}
    return rows[part]


def _opened(module, kind):
    from skperf import from_module

    return from_module(module, forward=_mixed if kind == "mixed" else None, batch_size=16)


def _mixed(module, rows):
    """Products of matrices in bfloat16, all else in float32."""
    import torch

    with torch.autocast("cuda", torch.bfloat16):
        returned = module(**rows) if isinstance(rows, dict) else module(rows)
    return returned.logits.float()


def measure(name, task, device, kind):
    """Measure one task in this process."""
    import torch

    torch.set_num_threads(2)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    module, draw = NETWORKS[name]()
    rows, labels = draw(N_TRAIN + N_QUERIES)
    module = module.eval().to(device)
    if device == "cuda" and name == "resnet":
        module = module.to(memory_format=torch.channels_last)
    network, held = _opened(module, kind), resident
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.max_memory_allocated
    with Peak(held) as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        found = tasks(name)[task](network, rows, labels)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "network": NAMES[name],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "task": task,
        "type": kind,
        "seconds": round(wall, 1),
        "CPU seconds": round(cpu, 1),
        "GB": round((max(peak.highest, held()) - peak.before) / 1e9, 2),
    } | found


def point(*asked):
    """Measure in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.shapes", "--point", *asked]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr.splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(asked):
    if asked[:1] == ["--point"]:
        print(json.dumps(measure(*asked[1:])))
        return
    device = "cuda" if "--cuda" in asked else "cpu"
    asked = [word for word in asked if word != "--cuda"]
    results = RESULTS if device == "cpu" else RESULTS.with_name("shapes_gpu.json")
    kept = runner.load(results) if results.exists() else []
    kinds = ("float32", "mixed") if device == "cuda" else ("float32",)
    if device == "cuda":
        measure("bert", "influence, head", device, "float32")
    for kind, name in itertools.product(kinds, NETWORKS):
        for task in tasks(name):
            if any(word not in (name, *task.replace(",", "").split()) for word in asked):
                continue
            if kind == "mixed" and task in ("influence, LoRA", "reprogramming"):
                continue
            try:
                measured = point if device == "cpu" else measure
                row = measured(name, task, device, kind)
            except Exception as error:
                print(name, task, kind, f"{type(error).__name__}: {error}", flush=True)
                continue
            print(row, flush=True)
            same = [row[key] for key in ("network", "task", "type")]
            kept = [r for r in kept if [r[k] for k in ("network", "task", "type")] != same] + [row]
            runner.save(results, kept)


if __name__ == "__main__":
    main(sys.argv[1:])
