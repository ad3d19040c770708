"""EfficientNet-Lite0, the architecture of fetched weights."""

from torch import Tensor, nn
from torch.nn import functional as F

# Of each stage: number of blocks, kernel size, stride, expansion, output channels.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: inverted residual blocks with ReLU6, without squeeze-and-excitation."""

    # 49 convolutions with 21,008 filters.

    def __init__(self, n_classes: int = 1000) -> None:
        super().__init__()
        self.stem = _convolution(3, 32, 3, 2)
        blocks: list[nn.Module] = []
        n_in = 32
        for n_blocks, kernel_size, stride, expansion, n_out in STAGES:
            for block in range(n_blocks):
                first = block == 0
                blocks.append(
                    _InvertedResidual(n_in, n_out, kernel_size, stride if first else 1, expansion)
                )
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.head = _convolution(n_in, 1280, 1)
        self.output = nn.Linear(1280, n_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Return the features before the last layer: images (n, 3, H, W) -> (n, 1280)."""
        features: Tensor = self.head(self.blocks(self.stem(images * 2 - 1)))
        return features.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images: images (n, 3, H, W) -> (n, n_classes)."""
        logits: Tensor = self.output(self.embed(images))
        return logits


class _InvertedResidual(nn.Module):
    def __init__(
        self, n_in: int, n_out: int, kernel_size: int, stride: int, expansion: int
    ) -> None:
        super().__init__()
        width = n_in * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers.append(_convolution(n_in, width, 1))
        layers.append(_convolution(width, width, kernel_size, stride, groups=width))
        layers.append(_convolution(width, n_out, 1, activation=False))
        self.layers = nn.Sequential(*layers)
        self.has_shortcut = stride == 1 and n_in == n_out

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.layers(features)
        return features + result if self.has_shortcut else result


class _SamePaddedConv2d(nn.Conv2d):
    # TensorFlow pads the surplus row and column of a stride behind the image, torch in front.
    def forward(self, features: Tensor) -> Tensor:
        height, width = (self._surplus(axis, features.shape[2 + axis]) for axis in (0, 1))
        padding = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(F.pad(features, padding))

    def _surplus(self, axis: int, length: int) -> int:
        stride = self.stride[axis]
        return max((-(-length // stride) - 1) * stride + self.kernel_size[axis] - length, 0)


def _convolution(
    n_in: int,
    n_out: int,
    kernel_size: int,
    stride: int = 1,
    *,
    groups: int = 1,
    activation: bool = True,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        _SamePaddedConv2d(n_in, n_out, kernel_size, stride, groups=groups, bias=False),
        nn.BatchNorm2d(n_out, eps=1e-3),
    ]
    if activation:
        layers.append(nn.ReLU6())
    return nn.Sequential(*layers)
