"""Real data and small real networks to try everything on.

Shipped, nothing to download:

- `load_fashion_mnist`: 3,000 images of Fashion-MNIST, 1,000 of its training and 2,000 of its
  test set.
- `load_fashion_cnn`: a convolutional network trained on Fashion-MNIST.
- `load_small_resnet`: a residual network with 560 filters trained on Fashion-MNIST.
- `load_faces`: 100 faces and 100 non-faces, 24 x 24.
- `load_rnet`: a face detector of 140 filters.
- `load_emoji`: 600 emoji in two drawing styles, with names and categories, 32 x 32.
- `load_text_image_encoder`: a CLIP-like encoder of images and short texts, and its tokenizer.
- `load_email_vectors`: 600 e-mails, half of them spam: sentence vectors and beginnings.

Downloaded when first asked for, with pooch, each file held to its sha256: `fetch_fashion_mnist`,
`fetch_mnist` and `fetch_imagenet_classes`.

A world that answers to the deployed model, made of real rows: `PerformativeStream`.

Sources and licences of the shipped files: ``skperf/datasets/data/LICENSES.md``.
"""

from skperf.datasets._models import (
    load_fashion_cnn,
    load_rnet,
    load_small_resnet,
    load_text_image_encoder,
)
from skperf.datasets._remote import fetch_fashion_mnist, fetch_imagenet_classes, fetch_mnist
from skperf.datasets._shipped import load_email_vectors, load_emoji, load_faces, load_fashion_mnist
from skperf.datasets._stream import PerformativeStream

__all__ = [
    "PerformativeStream",
    "fetch_fashion_mnist",
    "fetch_imagenet_classes",
    "fetch_mnist",
    "load_email_vectors",
    "load_emoji",
    "load_faces",
    "load_fashion_cnn",
    "load_fashion_mnist",
    "load_rnet",
    "load_small_resnet",
    "load_text_image_encoder",
]
