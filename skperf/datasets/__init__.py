"""Real data and small real networks to try everything on.

Shipped, nothing to download:

- `load_fashion_mnist`: 3,000 images of Fashion-MNIST, 1,000 of its training and 2,000 of its
  test set.
- `load_fashion_cnn`: a convolutional network trained on Fashion-MNIST.
- `load_small_resnet`: a residual network with 560 filters trained on Fashion-MNIST.
- `load_faces`: 100 faces and 100 non-faces, 24 x 24.
- `load_rnet`: a face detector of 140 filters.
"""

from skperf.datasets._models import load_fashion_cnn, load_rnet, load_small_resnet
from skperf.datasets._shipped import load_faces, load_fashion_mnist

__all__ = [
    "load_faces",
    "load_fashion_cnn",
    "load_fashion_mnist",
    "load_rnet",
    "load_small_resnet",
]
