"""Memory of a fit on large networks: heads of BERT-base's and ViT-B/16's shape, random weights.

    python -m benchmarks.components_memory          # each in a process of its own
    python -m benchmarks.components_memory bert

What is counted is the most memory of the process, pages of files apart, during `fit` above what it
held before, with the network and the rows in place, so that the weights themselves are counted
apart; `share` is over the memory of the weights. The first passes of a process, which make torch's
own buffers, are made before.
"""

import argparse
import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np

from benchmarks import runner
from benchmarks.timing import Peak, anonymous

RESULTS = Path(__file__).parent / "results" / "components_memory.json"
ROWS = 2


def bert():
    import transformers

    rows = np.random.default_rng(0).integers(5, 30000, (ROWS, 64))
    return transformers.BertForSequenceClassification(transformers.BertConfig()), rows


def vit():
    import transformers

    rows = np.random.default_rng(0).normal(size=(ROWS, 3, 224, 224)).astype(np.float32)
    return transformers.ViTForImageClassification(transformers.ViTConfig()), rows


NETWORKS = {"bert": bert, "vit": vit}


def measure(name):
    """Fit in this process."""
    import torch

    from skperf import from_module
    from skperf.components import ComponentAttributor

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    module, rows = NETWORKS[name]()
    network = from_module(module.eval(), np.arange(2))
    network.predict(rows[:1])
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    model = ComponentAttributor(network, components="attention_heads", budget=12, random_state=0)
    with Peak(anonymous) as peak:
        model.fit(rows, np.arange(ROWS) % 2)
    above = peak.highest - peak.before
    return {
        "network": name,
        "components": model.n_components_,
        "rows": ROWS,
        "weights MB": round(weights / 1e6),
        "above MB": round(above / 1e6),
        "share": round(above / weights, 3),
        "verified": model.verified_,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--point")
    options = parser.parse_args()
    if options.point:
        print(json.dumps(measure(options.point)))
        return
    rows = []
    for name in options.networks:
        command = [sys.executable, "-m", "benchmarks.components_memory", "--point", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    if options.networks == list(NETWORKS):
        runner.save(RESULTS, rows)


if __name__ == "__main__":
    main()
