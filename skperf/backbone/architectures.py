"""Small networks: the built-in default, and the architectures of the shipped weights."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Fully connected network with ReLU, from flattened inputs to logits.

    Parameters
    ----------
    n_features : int
        Number of values of one example once flattened.
    n_classes : int
        Number of logits.
    hidden : sequence of int, default=(64,)
        Widths of the hidden layers; empty for a linear classifier.
    dtype : torch.dtype, default=torch.float32
        Of the parameters.
    """

    def __init__(
        self,
        n_features: int,
        n_classes: int,
        hidden: Sequence[int] = (64,),
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        widths = [n_features, *hidden]
        layers: list[nn.Module] = []
        for n_in, n_out in itertools.pairwise(widths):
            layers += [nn.Linear(n_in, n_out, dtype=dtype), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        self.output = nn.Linear(widths[-1], n_classes, dtype=dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of a batch.

        Parameters
        ----------
        inputs : Tensor of shape (n, n_features) or (n, ...)
            A batch; further axes are flattened.

        Returns
        -------
        Tensor of shape (n, n_classes)
            Logits.
        """
        logits: Tensor = self.output(self.hidden(inputs.flatten(1)))
        return logits


class SmallConvNet(nn.Module):
    """Three convolutions with max-pooling and one linear layer; 16,938 parameters by default."""

    def __init__(
        self,
        n_classes: int = 10,
        n_channels: int = 1,
        image_size: int = 28,
        widths: Sequence[int] = (16, 32, 32),
    ) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.image_size = image_size
        layers: list[nn.Module] = []
        for n_in, n_out in zip([n_channels, *widths[:-1]], widths, strict=True):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        side = image_size // 2 ** len(widths)
        self.output = nn.Linear(widths[-1] * side**2, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images: (n, C, H, W), (n, H, W) or (n, C * H * W) -> (n, n_classes)."""
        images = _as_image_batch(images, self.n_channels, self.image_size)
        logits: Tensor = self.output(self.features(images).flatten(1))
        return logits


class SmallResNet(nn.Module):
    """Residual network with batch normalisation; 560 convolution filters by default."""

    # A stem, three stages of `n_blocks` residual blocks with `width`, `2 * width` and `4 *
    # width` filters (the second and third halve the image), global average pooling and one
    # linear layer.

    def __init__(
        self,
        n_classes: int = 10,
        n_channels: int = 1,
        image_size: int = 28,
        width: int = 16,
        n_blocks: int = 2,
        stem_stride: int = 2,
    ) -> None:
        super().__init__()
        self.n_channels = n_channels
        self.image_size = image_size
        self.stem = nn.Sequential(
            nn.Conv2d(n_channels, width, 3, stem_stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        n_in = width
        for stage in range(3):
            n_out = width * 2**stage
            for block in range(n_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(_ResidualBlock(n_in, n_out, stride))
                n_in = n_out
        self.blocks = nn.Sequential(*blocks)
        self.output = nn.Linear(n_in, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images: (n, C, H, W), (n, H, W) or (n, C * H * W) -> (n, n_classes)."""
        images = _as_image_batch(images, self.n_channels, self.image_size)
        features = self.blocks(self.stem(images))
        logits: Tensor = self.output(features.mean((2, 3)))
        return logits


class _ResidualBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)
        self.relu2 = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != n_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out)
            )

    def forward(self, features: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(features)))))
        result: Tensor = self.relu2(inner + self.shortcut(features))
        return result


class RNet(nn.Module):
    """R-Net, the second stage of the MTCNN face detector, as a two-class network."""

    # 140 convolution filters. The softmax of the published network is left off, so the outputs
    # are logits (of "not a face" and "face"), and so is its second head, which refines boxes.

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 28, 3)
        self.prelu1 = nn.PReLU(28)
        self.pool1 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv2 = nn.Conv2d(28, 48, 3)
        self.prelu2 = nn.PReLU(48)
        self.pool2 = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.conv3 = nn.Conv2d(48, 64, 2)
        self.prelu3 = nn.PReLU(64)
        self.dense = nn.Linear(576, 128)
        self.prelu4 = nn.PReLU(128)
        self.output = nn.Linear(128, 2)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images: images (n, 3, 24, 24) -> (n, 2)."""
        features = (images * 255 - 127.5) / 128
        features = self.pool1(self.prelu1(self.conv1(features)))
        features = self.pool2(self.prelu2(self.conv2(features)))
        features = self.prelu3(self.conv3(features))
        logits: Tensor = self.output(self.prelu4(self.dense(features.flatten(1))))
        return logits


class TextImageEncoder(nn.Module):
    """Two towers that map images and short texts into one space, in the manner of CLIP."""

    # The image tower is six convolutions with batch normalisation, average pooling and a linear
    # map. The text tower is a small transformer whose outputs are averaged over the tokens that
    # are not padding (id 0). The methods are named as in open_clip. Similarity of an image and a
    # text is the cosine of their embeddings times `exp(logit_scale)`.

    def __init__(
        self,
        vocabulary_size: int,
        embed_dim: int = 256,
        *,
        image_size: int = 32,
        image_widths: Sequence[int] = (32, 64, 64, 128, 128, 256),
        text_width: int = 128,
        text_layers: int = 2,
        text_heads: int = 4,
        context_length: int = 16,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.context_length = context_length
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.visual = _ImageTower(image_widths, embed_dim)
        self.token_embedding = nn.Embedding(vocabulary_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = nn.ModuleList(
            _TransformerBlock(text_width, text_heads) for _ in range(text_layers)
        )
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Linear(text_width, embed_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, pixels: Tensor, normalize: bool = False) -> Tensor:
        """Return embeddings: pixels (n, 3, image_size, image_size) -> (n, embed_dim)."""
        embeddings: Tensor = self.visual(pixels)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Return the embeddings of tokenized texts: ids (n, length) -> (n, embed_dim)."""
        kept = ids != 0
        states = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        for block in self.transformer:
            states = block(states, kept)
        weights = kept.to(states.dtype)[:, :, None]
        pooled = (self.ln_final(states) * weights).sum(1) / weights.sum(1)
        embeddings: Tensor = self.text_projection(pooled)
        return F.normalize(embeddings, dim=-1) if normalize else embeddings

    def forward(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings of images (n, 3, size, size), texts (k, length), and a scale."""
        images = self.encode_image(pixels, normalize=True)
        texts = self.encode_text(ids, normalize=True)
        return images, texts, self.logit_scale.exp()


class _ImageTower(nn.Module):
    def __init__(self, widths: Sequence[int], embed_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for depth, (n_in, n_out) in enumerate(zip([3, *widths[:-1]], widths, strict=True)):
            convolution = nn.Conv2d(n_in, n_out, 3, 1 + depth % 2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(n_out), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.projection = nn.Linear(widths[-1], embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.projection(self.features(pixels).mean((2, 3)))
        return embeddings


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, states: Tensor, kept: Tensor) -> Tensor:
        states = states + self._attend(self.norm1(states), kept)
        result: Tensor = states + self.mlp(self.norm2(states))
        return result

    def _attend(self, states: Tensor, kept: Tensor) -> Tensor:
        n, length, width = states.shape
        heads = self.qkv(states).view(n, length, 3, self.n_heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (n, heads, length, head width)
        mixed = F.scaled_dot_product_attention(query, key, value, kept[:, None, None, :])
        result: Tensor = self.attention_output(mixed.transpose(1, 2).reshape(n, length, width))
        return result


def _as_image_batch(images: Tensor, n_channels: int, image_size: int) -> Tensor:
    return images.reshape(images.shape[0], n_channels, image_size, image_size)
