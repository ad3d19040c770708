"""Pictures with captions to train the text-image encoder on, and their random distortions."""

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from benchmarks.data.archives import download, read_members
from benchmarks.data.conversions import EMOJI_STYLES, chosen_emoji
from benchmarks.data.recipes import RECIPES

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif")
FONTS += ("DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique", "STIXGeneral")
FONTS += ("STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmb10", "cmr10", "cmss10")
FONTS += ("cmtt10", "cmti10")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 64


@dataclass
class Pictures:
    """Pictures with transparency: pixels (n, 4, 64, 64) uint8 and the captions of each."""

    pixels: Tensor
    captions: list[list[str]]
    mirrored: bool  # whether a mirrored picture still shows what its caption says

    def __len__(self) -> int:
        return len(self.pixels)


def emoji_pictures(style: str) -> tuple[Pictures, list[dict]]:
    """Return the emoji of one style with their names, and their records."""
    archive = download(RECIPES[f"emoji_{style}"].archive)
    table = read_members(archive, "package/emoji.json".__eq__)["package/emoji.json"]
    records = chosen_emoji(json.loads(table))
    files = {Path(f"package/img/{style}/64") / each["image"] for each in records}
    images = read_members(archive, lambda name: Path(name) in files)
    pixels = [
        np.asarray(
            Image.open(io.BytesIO(images[f"package/img/{style}/64/{each['image']}"])).convert(
                "RGBA"
            )
        )
        for each in records
    ]
    captions = [captions_of(each) for each in records]
    return Pictures(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), captions, True), records


def captions_of(record: dict) -> list[str]:
    """Return the different names of an emoji as words."""
    names = [record["name"], *record["short_names"]]
    words = [
        name.lower().replace("_", " ").replace("-", " ").replace("\u2019", "") for name in names
    ]
    return list(dict.fromkeys(words))


def glyph_pictures() -> Pictures:
    """Draw the digits in several typefaces."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pixels, captions = [], []
    for digit, word in enumerate(DIGITS):
        for name in FONTS:
            font = ImageFont.truetype(str(folder / f"{name}.ttf"), 56)
            canvas = Image.new("L", (SIDE, SIDE))
            ImageDraw.Draw(canvas).text((32, 32), str(digit), 255, font, anchor="mm")
            ink = np.asarray(canvas)
            pixels.append(np.stack([0 * ink, 0 * ink, 0 * ink, ink]))
            captions.append(
                [str(digit), word, f"digit {digit}", f"number {word}", f"the digit {word}"]
            )
    return Pictures(torch.from_numpy(np.stack(pixels)), captions, False)


def on_white(pixels: Tensor, side: int) -> Tensor:
    """Return pictures (n, 3, side, side) in [0, 1] on white, undistorted."""
    rgba = pixels.float() / 255
    return F.avg_pool2d(rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:], SIDE // side)


def distort(pixels: Tensor, mirrored: bool, side: int) -> Tensor:
    """Return randomly moved, coloured and simplified pictures (n, 3, side, side) in [0, 1]."""
    rgba = move(pixels.float() / 255, mirrored)
    colour, ink = rgba[:, :3], rgba[:, 3:]
    n = len(pixels)
    grey = (colour * torch.tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)
    colour = torch.where(chance(n, 0.3), grey.expand(-1, 3, -1, -1), colour)
    shuffled = colour[torch.arange(n)[:, None], torch.rand(n, 3).argsort(1)]
    colour = torch.where(chance(n, 0.15), shuffled, colour)
    # Like product photographs and scanned digits: a bright object before black.
    low, high = 0.2 + 0.3 * torch.rand(n, 1, 1, 1), 0.7 + 0.3 * torch.rand(n, 1, 1, 1)
    bright = low + (high - low) * torch.where(chance(n, 0.5), grey, 1 - grey)
    before_black = chance(n, 0.25)
    colour = torch.where(before_black, bright.expand(-1, 3, -1, -1), colour)
    ground = torch.where(chance(n, 0.6), torch.ones(n, 3, 1, 1), torch.rand(n, 3, 1, 1))
    ground = torch.where(before_black, torch.zeros(n, 3, 1, 1), ground)
    images = F.avg_pool2d(colour * ink + ground * (1 - ink), SIDE // side)
    images = torch.where(chance(n, 0.08), outline(images), images)
    blurred = F.interpolate(F.avg_pool2d(images, 2), (side, side), mode="bilinear")
    images = torch.where(chance(n, 0.1), blurred, images)
    contrast = 0.7 + 0.6 * torch.rand(n, 1, 1, 1)
    images = (images - 0.5) * contrast + 0.5 + 0.2 * (torch.rand(n, 1, 1, 1) - 0.5)
    return (images + 0.05 * torch.rand(n, 1, 1, 1) * torch.randn_like(images)).clamp(0, 1)


def move(rgba: Tensor, mirrored: bool) -> Tensor:
    """Rotate, scale, shear, shift and (where allowed) mirror each picture at random."""
    n = len(rgba)
    angle = (torch.rand(n) - 0.5) * 2 * math.radians(15)
    scale = 0.75 + 0.5 * torch.rand(n)
    across = torch.where(torch.rand(n) < 0.5, -1.0, 1.0) if mirrored else torch.ones(n)
    stretch = 1 + 0.4 * (torch.rand(n) - 0.5)
    shear = 0.3 * (torch.rand(n) - 0.5)
    matrix = torch.zeros(n, 2, 3)
    matrix[:, 0, 0] = scale * angle.cos() * across * stretch
    matrix[:, 0, 1] = -scale * angle.sin() + shear
    matrix[:, 1, 0] = scale * angle.sin() * across
    matrix[:, 1, 1] = scale * angle.cos()
    matrix[:, :, 2] = 0.3 * (torch.rand(n, 2) - 0.5)
    # Premultiplied, so that transparent pixels do not bleed their colour into the edges.
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    grid = F.affine_grid(matrix, list(rgba.shape), align_corners=False)
    moved = F.grid_sample(premultiplied, grid, align_corners=False)
    return torch.cat([moved[:, :3] / moved[:, 3:].clamp_min(1e-3), moved[:, 3:]], 1).clamp(0, 1)


def outline(images: Tensor) -> Tensor:
    """Return the edges of images, dark on white."""
    grey = images.mean(1, keepdim=True)
    across = F.pad(grey, (0, 1, 0, 0), "replicate").diff(dim=3).abs()
    down = F.pad(grey, (0, 0, 0, 1), "replicate").diff(dim=2).abs()
    return (1 - 3 * (across + down)).clamp(0, 1).expand(-1, 3, -1, -1)


def chance(n: int, probability: float) -> Tensor:
    """Return a random condition per picture (n, 1, 1, 1)."""
    return torch.rand(n, 1, 1, 1) < probability


__all__ = ["EMOJI_STYLES", "Pictures", "distort", "emoji_pictures", "glyph_pictures", "on_white"]
