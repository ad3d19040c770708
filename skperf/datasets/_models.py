"""Loaders of the small trained networks that ship with the package."""

from typing import TypeVar

import torch
from safetensors.torch import load_file

from skperf.backbone.architectures import RNet, SmallConvNet, SmallResNet
from skperf.datasets._shipped import data_file

Module = TypeVar("Module", bound=torch.nn.Module)


def load_fashion_cnn() -> SmallConvNet:
    """Load a convolutional network trained on Fashion-MNIST (MIT licence).

    16,938 parameters, trained on the 60,000 training images. It takes images with values in
    [0, 1] as (n, 28, 28), (n, 1, 28, 28) or flat rows, and returns logits in the order of
    ``load_fashion_mnist().target_names``.

    Returns
    -------
    SmallConvNet
        In eval mode, on the CPU.
    """
    return _with_shipped_weights(SmallConvNet(), "fashion_cnn")


def load_small_resnet() -> SmallResNet:
    """Load a residual network trained on Fashion-MNIST: 560 convolution filters, BatchNorm.

    Inputs, outputs and training rows are those of `load_fashion_cnn`.

    Returns
    -------
    SmallResNet
        In eval mode, on the CPU.
    """
    return _with_shipped_weights(SmallResNet(), "fashion_resnet")


def load_rnet() -> RNet:
    """Load R-Net, a face detector of 140 convolution filters (from facenet-pytorch, MIT licence).

    It takes images with values in [0, 1] as (n, 3, 24, 24) and returns the logits of "not a face"
    and "face", the order of ``load_faces().target_names``.

    Returns
    -------
    RNet
        In eval mode, on the CPU.
    """
    return _with_shipped_weights(RNet(), "rnet")


def _with_shipped_weights(module: Module, name: str) -> Module:
    # load_state_dict casts what is stored in half precision to the module's own dtype.
    module.load_state_dict(load_file(data_file(f"{name}.safetensors")))
    return module.eval()
