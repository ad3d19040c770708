"""Loaders of the small trained networks that ship with the package."""

import json
from typing import TypeVar

import torch
from safetensors.torch import load_file

from skperf.backbone.architectures import RNet, SmallConvNet, SmallResNet, TextImageEncoder
from skperf.datasets._shipped import data_file
from skperf.datasets._tokenizer import WordPieceTokenizer

Module = TypeVar("Module", bound=torch.nn.Module)


def load_fashion_cnn() -> SmallConvNet:
    """Load a convolutional network trained on Fashion-MNIST (MIT licence).

    16,938 parameters, trained on the 60,000 training images; 88.3 % right on the 10,000 test
    images. It takes images with values in [0, 1] as (n, 28, 28), (n, 1, 28, 28) or flat rows, and
    returns logits in the order of ``load_fashion_mnist().target_names``.

    Returns
    -------
    SmallConvNet
        In eval mode, on the CPU.
    """
    return _with_shipped_weights(SmallConvNet(), "fashion_cnn")


def load_small_resnet() -> SmallResNet:
    """Load a residual network trained on Fashion-MNIST: 560 convolution filters, BatchNorm.

    91.5 % right on the 10,000 test images. Inputs, outputs and training rows are those of
    `load_fashion_cnn`.

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


def load_text_image_encoder() -> tuple[TextImageEncoder, WordPieceTokenizer]:
    """Load a small CLIP-like encoder of images and short texts, with its tokenizer.

    Trained from nothing on 1,336 Google emoji and on drawn digits, its text tower on vectors of
    MiniLM. It is like CLIP in form only: results on it say nothing about the figures of CLIP.
    Without further training it names 32 % of Fashion-MNIST and 56 % of MNIST, of neither of which
    it saw anything, and finds the names of 300 held-out emoji among the first ten for 49 % of them
    (drawn by Twitter, 37 %; chance 3 %).

    ``encode_image`` takes images of 32 x 32 normalised with the encoder's ``mean`` and ``std``,
    ``encode_text`` what the tokenizer returns.

    Returns
    -------
    encoder : TextImageEncoder
        In eval mode, on the CPU; 1.7 million parameters, embeddings of 256 numbers.
    tokenizer : WordPieceTokenizer
        Takes a list of texts, returns (n, 24) token ids.
    """
    description = json.loads(data_file("text_image_encoder.json").read_text())
    shape = description["shape"]
    tokenizer = WordPieceTokenizer(description["pieces"], shape["context_length"])
    encoder = TextImageEncoder(len(tokenizer.pieces), **shape)
    return _with_shipped_weights(encoder, "text_image_encoder"), tokenizer


def _with_shipped_weights(module: Module, name: str) -> Module:
    # load_state_dict casts what is stored in half precision to the module's own dtype.
    module.load_state_dict(load_file(data_file(f"{name}.safetensors")))
    return module.eval()
