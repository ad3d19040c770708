"""Small encoders with the libraries' real interfaces, and a task that a border can solve."""

import numpy as np
import pytest
import torch
from torch import nn

WORDS = [
    *("[pad]", "[start]", "[end]", "a", "photo", "of", "the", "cat", "dog", "bird"),
    *("fish", "horse", "zebra", "quux", "drawing", "red", "green", "blue"),
]


class WordTokenizer:
    """One token a word, in the manner of open_clip: padded to a fixed length and cut there."""

    def __init__(self, context_length=8):
        self.context_length = context_length

    def __call__(self, texts, context_length=None):
        length = context_length or self.context_length
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts, strict=True):
            words = [WORDS.index(word) for word in text.split()]
            ids = [1, *words[: length - 2], 2]
            row[: len(ids)] = torch.tensor(ids)
        return rows


class TwoTowers(nn.Module):
    """A CLIP-like model with open_clip's methods: frozen random features, 12 x 12 images."""

    def __init__(self, width=16):
        super().__init__()
        self.visual = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(8 * 25, width),
        )
        self.visual.image_size = 12
        self.token_embedding = nn.Embedding(len(WORDS), width)
        self.positional_embedding = nn.Parameter(torch.randn(8, width) * 0.1)
        self.mixer = nn.Sequential(nn.Linear(width, 32), nn.Tanh(), nn.Linear(32, width))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.context_length = 8
        self.mean, self.std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)

    def encode_image(self, pixels):
        return self.visual(pixels)

    def encode_text(self, ids):
        states = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        states = self.mixer(states) * (ids != 0)[:, :, None]
        return states.sum(1)


@pytest.fixture
def towers():
    torch.manual_seed(0)
    return TwoTowers().train()


@pytest.fixture
def tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def pictures():
    """Three classes of noisy 12 x 12 pictures: bright left, right or middle."""
    generator = np.random.RandomState(0)
    y = np.arange(120) % 3
    X = generator.uniform(0.0, 0.4, (120, 3, 12, 12)).astype(np.float32)
    for row, code in zip(X, y, strict=True):
        row[:, :, 4 * code : 4 * code + 4] += 0.5
    return X, np.array(["cat", "dog", "bird"])[y]


@pytest.fixture
def parameters(tokenizer):
    """What every fit of these tests shares."""
    return {
        "tokenizer": tokenizer,
        "border": 2,
        "max_epochs": 3,
        "batch_size": 32,
        "random_state": 0,
    }


def state_of(module):
    """Everything about a module that must not change."""
    return {
        "tensors": {k: v.clone() for k, v in module.state_dict().items()},
        "modes": [part.training for part in module.modules()],
        "hooks": [len(part._forward_hooks) for part in module.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in module.parameters()],
    }


def assert_same_state(before, after):
    assert before["modes"] == after["modes"]
    assert before["hooks"] == after["hooks"]
    assert before["gradients"] == after["gradients"]
    for name, tensor in before["tensors"].items():
        assert torch.equal(tensor, after["tensors"][name]), name
