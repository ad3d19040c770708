"""`Reprogrammer.released` beside the authors' procedure, written out plainly."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from skperf import Reprogrammer

STEPS, WARMUP, DECAY = 6, 2, 0.1
NAMES = ["cat", "dog", "bird"]


def placed(pictures):
    """First scaled to 6 pixels, then to the canvas of 12, by PIL and 8 bits."""
    bicubic = Image.Resampling.BICUBIC
    images = [Image.fromarray(np.moveaxis(x, 0, -1)) for x in pictures]
    images = [image.resize((6, 6), bicubic).resize((12, 12), bicubic) for image in images]
    return torch.stack([torch.tensor(np.array(x)).permute(2, 0, 1) for x in images]) / 255


def focal(logits):
    p = logits.softmax(1).diagonal()
    return (-0.8 * (1 - p) ** 4 * p.log()).mean()


class Released:
    """Border pixels by Adam, the whole token table and all positions by AdamW, contrast."""

    def __init__(self, towers, tokenizer, start):
        self.plain = copy.deepcopy(towers).eval()
        self.towers = copy.deepcopy(towers).eval()
        self.tokenizer = tokenizer
        self.outside = torch.ones(12, 12, dtype=torch.bool)
        self.outside[2:-2, 2:-2] = False
        self.weights = torch.zeros(3, 12, 12)
        self.weights[:, self.outside] = start
        self.weights.requires_grad_()

    def embed(self, towers, images):
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (towers.mean, towers.std))
        return torch.nn.functional.normalize(towers.encode_image((images - mean) / std), dim=1)

    def images(self, images):
        program = torch.tanh(self.weights * self.outside)
        return self.embed(self.towers, (images + program).clamp(0, 1))

    def texts(self, towers, names):
        ids = self.tokenizer([f"a photo of a {name}" for name in names])
        return torch.nn.functional.normalize(towers.encode_text(ids), dim=1)

    def fit(self, images, names):
        table = [self.towers.token_embedding.weight, self.towers.positional_embedding]
        first = [t.detach().clone() for t in table]
        border = torch.optim.Adam([self.weights], lr=5e-3, weight_decay=DECAY)
        text = torch.optim.AdamW(table, lr=5e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0)
        for step in range(STEPS):
            done = (step - WARMUP) / (STEPS - WARMUP)
            warm = (step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * done))
            border.param_groups[0]["lr"] = text.param_groups[0]["lr"] = 5e-3 * warm
            scale = self.towers.logit_scale.detach().exp()
            logits = scale * self.images(images) @ self.texts(self.towers, names).T
            loss = (focal(logits) + focal(logits.T)) / 2
            border.zero_grad()
            text.zero_grad()
            loss.backward()
            border.step()
            # the one difference: the decay goes towards the values before training
            with torch.no_grad():
                for tensor, start in zip(table, first, strict=True):
                    tensor -= 5e-3 * warm * DECAY * (tensor - start)
            text.step()
        return [t.detach() - start for t, start in zip(table, first, strict=True)]

    def logits(self, images, alpha=0.4):
        u, q = self.images(images), self.texts(self.towers, NAMES)
        u0, q0 = self.embed(self.plain, images), self.texts(self.plain, NAMES)
        mixes = (1 - alpha) * u + alpha * u0, (1 - alpha) * q + alpha * q0
        return self.towers.logit_scale.exp() * mixes[0] @ mixes[1].T


@pytest.mark.filterwarnings("ignore:ood_retention")
def test_released_equals_the_authors_procedure(towers, tokenizer, pictures):
    images, y = (pictures[0] * 255).astype(np.uint8), pictures[1]
    images[:, :, 4] = np.arange(0, 240, 20, dtype=np.uint8)
    sizes = {"border": 2, "shrink": 6, "warmup": WARMUP, "text_lr": 5e-3, "random_state": 3}
    names = {name: name for name in NAMES}
    model = Reprogrammer.released(
        towers, tokenizer=tokenizer, class_names=names, **sizes, max_epochs=STEPS
    )
    start = copy.deepcopy(model).set_params(max_epochs=0).fit(images[:90], y[:90])
    model.fit(images[:90], y[:90])
    loop = Released(towers, tokenizer, start.net_.module_.image.detach())
    table, positions = loop.fit(placed(images[:90]), y[:90])
    with torch.no_grad():
        program = torch.tanh(loop.weights * loop.outside).numpy()
        logits = loop.logits(placed(images[90:])).numpy()
    np.testing.assert_allclose(model.program_, program, atol=2e-4)
    used = model.used_tokens_
    assert {1, 2} <= set(used)  # start and end are trained too
    np.testing.assert_allclose(model.text_delta_[: len(used)], table[used], atol=2e-4)
    np.testing.assert_allclose(model.text_delta_[len(used) :], positions, atol=2e-4)
    assert np.abs(table[used].numpy()).max() > 5e-3
    order = np.searchsorted(NAMES, model.classes_, sorter=np.argsort(NAMES))
    order = np.argsort(NAMES)[order]
    np.testing.assert_allclose(model.decision_function(images[90:]), logits[:, order], atol=2e-3)
