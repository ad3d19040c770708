"""Convert R-Net and the faces to try it on.

Writes rnet.safetensors (from the facenet-pytorch wheel, MIT) and faces.npz (from the scikit-image
wheel, BSD-3-Clause) to skperf/datasets/data and prints how well the one tells the other apart:

    PYTHONPATH=. python scripts/convert_rnet.py
"""

import io
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, roc_auc_score
from torch import Tensor
from torch.nn import functional as F

from benchmarks.data.archives import Archive, download, read_members
from skperf.backbone.architectures import RNet

DATA = Path(__file__).parents[1] / "skperf" / "datasets" / "data"
FACENET = Archive(
    "pip",
    "facenet-pytorch==2.6.0",
    "facenet_pytorch-2.6.0-py3-none-any.whl",
    "ecb82b27beb226d106f2219efe8f829b01b87a8595badd01545679bdb9f19cca",
    1_881_930,
    "MIT",
)
SCIKIT_IMAGE = Archive(
    "pip",
    "scikit-image==0.26.0",
    "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    13_711_217,
    "BSD-3-Clause",
)


def convert_weights() -> dict[str, Tensor]:
    """Return the weights of the published network under the names of `RNet`."""
    (content,) = read_members(download(FACENET), "facenet_pytorch/data/rnet.pt".__eq__).values()
    theirs = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # Published: flattened in the order width, height, channel; ours: channel, height, width.
    dense = theirs.pop("dense4.weight").reshape(128, 3, 3, 64).permute(0, 3, 2, 1).reshape(128, 576)
    names = {"dense4": "dense", "dense5_1": "output"}
    ours = {"dense.weight": dense.contiguous()}
    for name, tensor in theirs.items():
        layer, kind = name.split(".")
        if layer != "dense5_2":
            ours[f"{names.get(layer, layer)}.{kind}"] = tensor.contiguous()
    return ours


def convert_faces() -> np.ndarray:
    """Return 100 faces and 100 non-faces as (200, 24, 24) uint8."""
    (content,) = read_members(download(SCIKIT_IMAGE), "skimage/data/lfw_subset.npy".__eq__).values()
    images = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)).float()
    print("original", tuple(images.shape), float(images.min()), float(images.max()))
    small = F.interpolate(images[:, None], (24, 24), mode="bilinear", antialias=True)[:, 0]
    return (small * 255).round().clamp(0, 255).byte().numpy()


def main() -> None:
    """Convert both and compare."""
    save_file(convert_weights(), DATA / "rnet.safetensors")
    network = RNet().eval()
    network.load_state_dict(convert_weights())
    images = convert_faces()
    target = np.repeat(np.array([1, 0], np.uint8), 100)
    np.savez_compressed(DATA / "faces.npz", images=images, target=target)
    with torch.inference_mode():
        inputs = torch.from_numpy(images).float()[:, None].expand(-1, 3, -1, -1) / 255
        logits = network(inputs).numpy()
    print(f"AUC {roc_auc_score(target, logits[:, 1] - logits[:, 0]):.4f}")
    print(f"accuracy {accuracy_score(target, logits.argmax(1)):.4f}")


if __name__ == "__main__":
    main()
