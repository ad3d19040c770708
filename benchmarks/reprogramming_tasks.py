"""Encoders and tasks of the benchmarks of Reprogrammer."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from benchmarks.data import (
    fetch_efficientnet_lite0,
    fetch_emoji,
    fetch_fashion_mnist,
    fetch_minilm,
    fetch_mnist,
)

FASHION = ["t-shirt", "trousers", "pullover", "dress", "coat"]
FASHION += ["sandal", "shirt", "sneaker", "bag", "boot"]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PROMPT = "a picture of a {}"


@dataclass
class Task:
    """Rows to learn, to be tested on, shifted ones, and two sets of foreign pictures."""

    name: str
    classes: list[str]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    shifted: tuple[np.ndarray, np.ndarray]
    foreign: dict[str, np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """Emoji in two drawing styles, with the split that an encoder needs."""

    google: np.ndarray
    twitter: np.ndarray
    target: np.ndarray
    names: list[str]
    learn: np.ndarray
    held_out: np.ndarray


@cache
def lite0_minilm():
    """Join EfficientNet-Lite0 and MiniLM by a ridge map fitted on Google's emoji.

    The map takes the image features to the sentence vectors of the emoji's names, both
    centred; 300 of the 1,636 emoji are left out for testing.
    """
    google, twitter = fetch_emoji(style="google"), fetch_emoji(style="twitter")
    rows = np.random.RandomState(0).permutation(len(google.images))
    held_out, learn, aligned = rows[:300], rows[300:600], rows[300:]
    encoder, tokenizer = Lite0MiniLM(), MiniLMTokenizer()
    encoder.align(
        google.images[aligned],
        tokenizer([f"a picture of a {google.names[row]}" for row in aligned]),
    )
    names = _words(google.target_names)
    return (
        encoder,
        tokenizer,
        Pictures(google.images, twitter.images, google.target, names, learn, held_out),
    )


class MiniLMTokenizer:
    """MiniLM's tokens, padded with zeros to the longest text."""

    def __init__(self):
        self.tokenizer = AutoTokenizer.from_pretrained(fetch_minilm())

    def __call__(self, texts):
        """Tokenize."""
        return self.tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]


class _ImageTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = fetch_efficientnet_lite0()
        self.projection = nn.Linear(1280, 384)

    def forward(self, images):
        return self.projection(self.features.embed(images))


class Lite0MiniLM(nn.Module):
    """Two towers that know nothing of each other, in the manner of open_clip."""

    def __init__(self):
        super().__init__()
        self.visual = _ImageTower()
        self.text_tower = AutoModel.from_pretrained(fetch_minilm())
        self.token_embedding = self.text_tower.get_input_embeddings()
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.05).log())
        self.register_buffer("text_mean", torch.zeros(384))
        self.image_size, self.mean, self.std = 64, (0.0,) * 3, (1.0,) * 3
        self.eval()

    def encode_image(self, pixels):
        """Embed images in [0, 1]."""
        return self.visual(pixels)

    def encode_text(self, ids, normalize=False):
        """Embed texts: the mean over the tokens, centred."""
        mask = (ids != 0).float()
        states = self.text_tower(input_ids=ids, attention_mask=mask).last_hidden_state
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        centred = functional.normalize(means, dim=-1) - self.text_mean
        return functional.normalize(centred, dim=-1) if normalize else centred

    @torch.no_grad()
    def align(self, images, ids, strength=1.0):
        """Fit the map from image features to texts by ridge regression."""
        batches = torch.as_tensor(images).float().div(255).split(64)
        features = torch.cat([self.visual.features.embed(batch) for batch in batches]).double()
        texts = torch.cat([self.encode_text(part) for part in ids.split(64)])
        self.text_mean += texts.mean(0)
        centred, targets = features - features.mean(0), (texts - texts.mean(0)).double()
        gram = centred.T @ centred
        gram += strength * gram.diagonal().mean() * torch.eye(len(gram))
        weight = torch.linalg.solve(gram, centred.T @ targets).T
        self.visual.projection.weight.copy_(weight)
        self.visual.projection.bias.copy_(-weight @ features.mean(0))


def to_canvas(images, side):
    """Bring uint8 images to 3 x side x side floats in [0, 1], as every method sees them."""
    x = torch.as_tensor(np.asarray(images, dtype=np.float32)) / 255
    x = x[:, None] if x.ndim == 3 else x
    if x.shape[-1] != side:
        shrink = x.shape[-1] > side
        x = functional.interpolate(
            x, (side, side), mode="bicubic", align_corners=False, antialias=shrink
        )
    return x.clamp(0, 1).expand(-1, 3, -1, -1).numpy()


def rotated(images, degrees):
    """Turn images around their middle."""
    angle = torch.tensor(degrees * np.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    matrix = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = functional.affine_grid(matrix, images.shape, align_corners=False)
    turned = functional.grid_sample(torch.as_tensor(images), grid, align_corners=False)
    return turned.numpy()


def make_tasks(pictures, side, seed, n_train, n_test):
    """Draw the three tasks."""
    draw = np.random.RandomState(seed)
    fashion, mnist, uci = fetch_fashion_mnist(subset="all"), fetch_mnist(), load_digits()
    rows = draw.permutation(len(fashion.images))[: n_train + n_test]
    fashion_x, fashion_y = to_canvas(fashion.images[rows], side), fashion.target[rows]
    rows = draw.permutation(len(mnist.images))[: n_train + n_test]
    mnist_x, mnist_y = to_canvas(mnist.images[rows], side), mnist.target[rows]
    some = draw.permutation(len(uci.images))[:n_test]
    uci_x, uci_y = to_canvas(np.clip(uci.images[some] * 16, 0, 255), side), uci.target[some]
    learn = pictures.learn[:n_train]
    held = pictures.held_out[:n_test]
    emoji = to_canvas(pictures.google[np.r_[learn, held]][:n_test], side)
    cut = slice(0, n_train), slice(n_train, n_train + n_test)
    return [
        Task(
            "MNIST",
            DIGITS,
            (mnist_x[cut[0]], mnist_y[cut[0]]),
            (mnist_x[cut[1]], mnist_y[cut[1]]),
            (uci_x, uci_y),
            {"Fashion-MNIST": fashion_x[cut[1]], "emoji": emoji},
        ),
        Task(
            "Fashion-MNIST",
            FASHION,
            (fashion_x[cut[0]], fashion_y[cut[0]]),
            (fashion_x[cut[1]], fashion_y[cut[1]]),
            (rotated(fashion_x[cut[1]], 20), fashion_y[cut[1]]),
            {"MNIST": mnist_x[cut[1]], "emoji": emoji},
        ),
        Task(
            "emoji",
            pictures.names,
            (to_canvas(pictures.google[learn], side), pictures.target[learn]),
            (to_canvas(pictures.google[held], side), pictures.target[held]),
            (to_canvas(pictures.twitter[held], side), pictures.target[held]),
            {"MNIST": mnist_x[cut[1]], "Fashion-MNIST": fashion_x[cut[1]]},
        ),
    ]


def _words(names):
    return [str(name).lower().replace("&", "and") for name in names]
