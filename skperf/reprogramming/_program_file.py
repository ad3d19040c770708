"""A fitted program as a small file, for whoever has the same encoder."""

import json

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from skperf.reprogramming._judging import Choice, assemble
from skperf.reprogramming._net import ProgramNet
from skperf.reprogramming._task import settle
from skperf.reprogramming._training import module_params
from skperf.reprogramming.programmed import ProgrammedEncoder

#: Parameters that give a program its meaning; they travel with it.
_PARAMETERS = (
    "prompts",
    "image_shape",
    "channels",
    "input_range",
    "layout",
    "border",
    "bound",
    "clip",
    "text",
    "head",
    "renormalize",
    "ood_score",
    "ood_temperature",
    "ood_retention",
)


def write_program(estimator, path):
    """Write the program, text delta, head and decisions of a fitted estimator."""
    if estimator.encoder is None:
        raise ValueError(
            "encoder=None stands for a built-in encoder made from the training rows; there is "
            "nobody to load its program. Use pickle."
        )
    task = estimator._task
    description = {
        "encoder": estimator.encoder_.fingerprint(),
        "parameters": {name: _plain(getattr(estimator, name)) for name in _PARAMETERS},
        "classes": estimator.classes_.tolist(),
        "class_names": estimator.class_names_,
        "head": task.head,
        "text": estimator.text if estimator.text != "auto" or task.text is None else "table",
        "input_shape": task.image_shape,
        "n_features": getattr(estimator, "n_features_in_", None),
        "canvas": task.program.canvas,
        "alpha": estimator.alpha_,
        "logit_scale": estimator.logit_scale_,
        "ood_threshold": estimator.ood_threshold_,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in estimator.net_.module_.state_dict().items()
        if name != "zero_shot"
    }
    save_file(tensors, path, metadata={"skperf_program": json.dumps(description)})


def read_program(estimator, path):
    """Make an estimator fitted from a file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if "skperf_program" not in metadata:
            raise ValueError(f"{path} holds no program of a Reprogrammer.")
        description = json.loads(metadata["skperf_program"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    reader = type(estimator)(**{**estimator.get_params(deep=False), **description["parameters"]})
    reader.set_params(class_names=description["class_names"], head=description["head"])
    reader.set_params(text=description["text"] if description["text"] != "auto" else "none")
    reader.set_params(canvas=description["canvas"], alpha=description["alpha"])
    task = _settled(reader, description)
    exact = reader.gradient == "exact"
    params = module_params(task, init="zeros", exact=exact)
    net = ProgramNet(ProgrammedEncoder, device=str(task.encoder.device), **params)
    images = torch.zeros(1, *description["input_shape"])
    with task.encoder.open():
        net.begin(images, task.n_classes)
        net.module_.load_state_dict(tensors, strict=False)
        choice = Choice(
            description["alpha"], description["logit_scale"], description["ood_threshold"], None
        )
        classes = np.array(description["classes"])
        fitted = assemble(reader, net, task, classes, choice)
    estimator.set_params(**reader.get_params(deep=False))
    if description["n_features"] is not None:
        estimator.n_features_in_ = description["n_features"]
    estimator.__dict__.update(fitted)


def _settled(reader, description):
    images = torch.zeros(1, *description["input_shape"])
    task = settle(reader, images, np.array(description["classes"]))
    if task.encoder.fingerprint() != description["encoder"]:
        raise ValueError(
            "the program was made for another encoder: its fingerprint is "
            f"{description['encoder'][:16]}..., that of this encoder "
            f"{task.encoder.fingerprint()[:16]}..."
        )
    return task


def _plain(value):
    return np.asarray(value).tolist() if isinstance(value, np.ndarray) else value
