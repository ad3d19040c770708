"""How an encoder wants its pictures: size, crop, interpolation as PIL does it, normalisation."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Size = tuple[int, int]
RESIZES = ("cover", "squash", "contain", "none", "patches")


def _bicubic(x: float) -> float:
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


#: Filters of PIL and how far they reach, in pixels, where the window ends; "nearest" is none.
FILTERS: dict[str, tuple[Callable[[float], float], float]] = {
    "bilinear": (lambda x: max(0.0, 1 - abs(x)), 1),
    "bicubic": (_bicubic, 2),
    "lanczos": (lambda x: abs(x) < 3 and np.sinc(x) * np.sinc(x / 3), 3),
    "hamming": (lambda x: abs(x) < 1 and np.sinc(x) * (0.54 + 0.46 * np.cos(np.pi * x)), 1),
    "box": (lambda x: float(-0.5 < x <= 0.5), 0.5),
}
#: PIL's numbers of its filters, which transformers writes into its processors.
PIL_CODES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


@dataclass(frozen=True)
class PixelPipeline:
    """What happens to a picture between the file and the encoder."""

    size: Size | None = None  # what the encoder sees; None: the size of the pictures
    resize: str = "cover"
    scaled: Size | None = None  # cover: short edge twice; squash: before the crop
    interpolation: str = "bicubic"
    rounded_crop: bool = False  # torchvision rounds the crop's corner, transformers cuts it off
    fill: tuple[float, ...] = (0.0,)  # beside a picture that is contained
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    patch: int | None = None  # with "patches": their side and most of them
    max_patches: int = 256
    shrink: int | None = None  # a first resize, as the released code has it
    reversed_channels: bool = False  # blue first, as MobileViT has it

    def place(self, images: Tensor, size: Size | None = None) -> Tensor:
        """Bring pictures to the encoder's size: (n, channels, height, width) in [0, 1]."""
        if self.shrink is not None:
            first = replace(self, resize="cover", shrink=None, scaled=None, size=None)
            images = first.place(images, (self.shrink, self.shrink))
        height, width = images.shape[-2:]
        size = size or self.size or (height, width)
        scaled = self.scaled_size((height, width), size)
        window = [
            _window(have, wanted, self.rounded_crop)
            for have, wanted in zip(scaled, size, strict=True)
        ]
        placed = resampled(images, scaled, self.interpolation, *window)
        missing = [side - have for side, have in zip(size, placed.shape[-2:], strict=True)]
        if not any(missing):
            return placed
        extra = 0 if self.resize == "contain" or self.rounded_crop else 1
        top, left = ((side + extra) // 2 for side in missing)
        canvas = placed.new_tensor(self.fill).view(1, -1, 1, 1).expand(1, placed.shape[1], 1, 1)
        canvas = canvas.expand(len(placed), -1, *size).clone()
        canvas[..., top : top + placed.shape[-2], left : left + placed.shape[-1]] = placed
        return canvas

    def scaled_size(self, source: Size, size: Size) -> Size:
        """Size of a picture once scaled, before it is cropped or filled up to `size`."""
        height, width = source
        if self.resize == "none":
            return source
        own = self.size is None or size == self.size
        if self.resize in ("squash", "patches"):
            if self.resize == "patches":
                self._check_grid(source, size)
            return self.scaled if own and self.scaled else size
        if self.resize == "contain":
            ratio = max(height / size[0], width / size[1])
            return min(size[0], round(height / ratio)), min(size[1], round(width / ratio))
        if size[0] != size[1] and not (own and self.scaled is not None):
            ratio = max(size[0] / height, size[1] / width)
            return max(size[0], round(height * ratio)), max(size[1], round(width * ratio))
        short = size[0]
        if self.scaled is not None:
            share = 1 if own or self.size is None else size[0] / self.size[0]
            short = round(self.scaled[0] * share)
        # cut off, not rounded, by transformers and torchvision alike
        return (
            (short, int(short * width / height))
            if height <= width
            else (int(short * height / width), short)
        )

    def canvas(self, source: Size) -> Size:
        """Size that the encoder sees of pictures of a size."""
        if self.resize == "patches":
            assert self.patch is not None
            return patch_grid(source, self.patch, self.max_patches)
        return self.size or source

    def normalise(self, images: Tensor) -> Tensor:
        """Subtract the means and divide by the deviations: images (n, channels, ...)."""
        if self.reversed_channels:
            images = images.flip(1)
        if self.mean is None or self.std is None:
            return images
        mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    def _check_grid(self, source: Size, size: Size) -> None:
        if self.canvas(source) != size:
            raise ValueError(
                f"a picture of {source[0]} x {source[1]} pixels fills a grid of "
                f"{self.canvas(source)} for this encoder, which keeps the sides' proportion; the "
                f"program's is {size}. Give pictures of one proportion, or resize='squash'."
            )


#: Nothing known: cover the canvas, no normalisation.
PLAIN = PixelPipeline()


def _window(have: int, wanted: int, rounded: bool) -> slice:
    if have <= wanted:
        return slice(0, have)
    start = round((have - wanted) / 2) if rounded else (have - wanted) // 2
    return slice(start, start + wanted)


def patch_grid(source: Size, patch: int, most: int, eps: float = 1e-5) -> Size:
    """Largest size of whole patches, at most so many, that keeps a picture's proportion."""
    # the search of transformers' SigLIP 2 processor, step by step
    low, high = eps / 10, 100.0

    def grid(scale: float) -> Size:
        height, width = (max(patch, math.ceil(side * scale / patch) * patch) for side in source)
        return height, width

    while high - low >= eps:
        scale = (low + high) / 2
        height, width = grid(scale)
        low, high = (scale, high) if height // patch * (width // patch) <= most else (low, scale)
    return grid(low)


#: Bits of PIL's fixed-point weights.
_BITS = 22


@lru_cache(maxsize=128)
def _weights(n_in: int, n_out: int, interpolation: str) -> Tensor:
    """Weights of PIL's filters along one side, times 2 ** 22: -> (n_out, n_in)."""
    scale = n_in / n_out
    weights = np.zeros((n_out, n_in))
    if interpolation == "nearest":
        # PIL adds the step up, and its rounding with it
        places = np.cumsum([0.5 * scale] + [scale] * (n_out - 1)).astype(int)
        weights[np.arange(n_out), places.clip(0, n_in - 1)] = 2**_BITS
        return torch.from_numpy(weights)
    function, reach = FILTERS[interpolation]
    stretch = max(1.0, scale)
    for i in range(n_out):
        centre = (i + 0.5) * scale
        first = max(0, int(centre - reach * stretch + 0.5))
        last = min(n_in, int(centre + reach * stretch + 0.5))
        row = np.array([function((j - centre + 0.5) * (1 / stretch)) for j in range(first, last)])
        row = row * (1 / sum(row)) * 2**_BITS
        weights[i, first:last] = np.trunc(row + np.copysign(0.5, row))
    return torch.from_numpy(weights)


def resampled(
    images: Tensor, size: Size, interpolation: str, rows: slice, columns: slice
) -> Tensor:
    """Scale pictures as PIL does and cut a window out: (n, channels, height, width) in [0, 1]."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images[..., rows, columns]
    # whole numbers in double precision: exactly PIL's arithmetic, 8 bits after each pass
    levels = (images.double() * 255).round()
    across = _weights(width, size[1], interpolation)[columns].to(levels.device)
    down = _weights(height, size[0], interpolation)[rows].to(levels.device)

    def wide(levels: Tensor) -> Tensor:
        return levels[..., columns] if width == size[1] else _rounded(levels @ across.T)

    def high(levels: Tensor) -> Tensor:
        return levels[..., rows, :] if height == size[0] else _rounded(down @ levels)

    # PIL's order of the passes, found by trying it
    vertical_first = size[0] < height and 2 * (width - size[1]) < height - size[0]
    levels = wide(high(levels)) if vertical_first else high(wide(levels))
    return (levels / 255).to(images.dtype)


def _rounded(levels: Tensor) -> Tensor:
    return ((levels + 2 ** (_BITS - 1)) / 2**_BITS).floor().clamp(0, 255)


def read_processor(processor: Any, guess: PixelPipeline) -> PixelPipeline:
    """Read a processor of transformers, a torchvision composition or a configuration."""
    source = getattr(processor, "image_processor", processor)
    if hasattr(source, "transforms"):
        return _agreeing(source, _read_composition(source.transforms, guess))
    if isinstance(source, Mapping) or not hasattr(source, "image_mean"):
        read = read_configuration(source, guess)
        silent = all(_get(source, name) is None for name in _TOLD)
        if silent or (read == guess and callable(source)):
            raise ValueError(
                f"processor is a {type(source).__name__} that says nothing of size, mean and std. "
                "Give processor={'size': ..., 'mean': ..., 'std': ...}, or what it composes."
            )
        return read
    size, crop = _get(source, "size"), _get(source, "crop_size")
    known: dict[str, Any] = {"rounded_crop": False}
    if not getattr(source, "do_resize", size is not None):
        known["resize"] = "none"
    elif _get(size, "shortest_edge"):
        known["scaled"] = known["size"] = (int(_get(size, "shortest_edge")),) * 2
        known["resize"] = "cover"
    elif _get(size, "height"):
        known |= {
            "resize": "squash",
            "scaled": (int(_get(size, "height")), int(_get(size, "width"))),
        }
        known["size"] = known["scaled"]
    elif isinstance(size, int):
        known |= {"resize": "squash", "scaled": (size, size), "size": (size, size)}
    if _get(source, "do_center_crop") and crop is not None:
        height = _get(crop, "height", _get(crop, "shortest_edge", crop))
        known["size"] = (int(height), int(_get(crop, "width", height)))
    if _get(source, "max_num_patches") is not None:
        known |= {"resize": "patches", "max_patches": int(source.max_num_patches)}
        known |= {"patch": int(source.patch_size), "size": None, "scaled": None}
    resample = _get(source, "resample")
    if resample is not None:
        known["interpolation"] = _filter_name(resample)
    mean, std = _affine(source)
    flipped = bool(_get(source, "do_flip_channel_order", False))
    return _agreeing(source, replace(guess, **known, mean=mean, std=std, reversed_channels=flipped))


#: Mean difference to a processor's own pictures, in grey levels, above which a reading is wrong.
_MOST_LEVELS = 2.5
#: Longest side that a processor is believed.
_MOST_PIXELS = 3000


def _agreeing(source: Any, read: PixelPipeline) -> PixelPipeline:
    """Choose the reading that does what the processor does to two pictures, or refuse it."""
    if not callable(source) or read.resize == "patches":
        return read
    name, size = type(source).__name__, read.size or (224, 224)
    asked = "Give processor={'size': ..., 'mean': ..., 'std': ...} and pictures so prepared."
    if max(size) > _MOST_PIXELS:  # some say an area where others say an edge
        raise ValueError(f"processor {name} says {size[0]} x {size[1]} pixels. {asked}")
    readings = [read, replace(read, resize="squash")]
    if read.scaled is not None:
        # some processors enlarge `size` before they crop, in code and not in a setting
        larger = int(read.scaled[0] / _get(source, "crop_pct", 224 / 256))
        readings.append(replace(read, resize="cover", scaled=(larger, larger)))
    errors = np.zeros(len(readings))
    for sides in ((1.05, 1.4), (4.0, 0.8)):
        lines = (
            np.linspace(0, 255, round(a * min(b, 512))) for a, b in zip(sides, size, strict=True)
        )
        down, across = np.meshgrid(*lines, indexing="ij")
        probe = np.stack([down, across, 255 - down * across / 255], -1).astype(np.uint8)
        image = torch.from_numpy(probe).permute(2, 0, 1)[None].float() / 255
        try:
            own = _asked(source, probe)
        except Exception as error:  # of any class
            raise ValueError(
                f"processor {name} fails on a picture ({type(error).__name__}: {error}). {asked}"
            ) from error
        for i, one in enumerate(readings):
            ours = one.normalise(one.place(image)).numpy()
            if ours.shape != own.shape:
                errors[i] = 255
                continue
            levels = np.abs(ours - own).mean((0, 2, 3)) * 255 * np.array(one.std or 1.0)
            errors[i] = max(errors[i], levels.mean())
    best = int((errors * (errors > _MOST_LEVELS)).argmin())
    if errors[best] > _MOST_LEVELS:
        raise ValueError(
            f"processor {name} does more to a picture than its settings say: as read they differ "
            f"from its own output by {errors[best]:.0f} grey levels, or in size. {asked}"
        )
    return readings[best]


def _asked(source: Any, picture: NDArray[np.uint8]) -> NDArray[Any]:
    """Run a processor: picture (height, width, 3) -> (1, 3, height, width)."""
    if not hasattr(source, "transforms"):
        return np.asarray(source(images=picture, return_tensors="np")["pixel_values"])
    from PIL import Image  # comes with whatever composes such steps

    return np.asarray(source(Image.fromarray(picture)))[None]


def _affine(source: Any) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Means and deviations for pictures in [0, 1] of a processor that scales as it likes."""
    rescaled = getattr(source, "do_rescale", True)  # None is no, and no default
    factor = float(_get(source, "rescale_factor", 1 / 255)) if rescaled else 1.0
    offset = 1.0 if rescaled and _get(source, "rescale_offset", False) else 0.0
    mean, std = np.zeros(3), np.ones(3)
    if getattr(source, "do_normalize", True) and source.image_mean is not None:
        mean, std = (np.ravel(np.asarray(v, float)) for v in (source.image_mean, source.image_std))
        if _get(source, "include_top", False):  # of EfficientNet: divides a second time
            std = std * std
    elif not offset and abs(255 * factor - 1) < 1e-9:
        return None, None
    full = 255 * factor
    return tuple(map(float, (mean + offset) / full)), tuple(map(float, std / full))


#: What a configuration may say.
_SIZES = ("size", "input_size", "input_resolution", "image_size")
_TOLD = (*_SIZES, "mean", "std", "image_mean", "interpolation", "resize_mode", "crop_pct")


def read_configuration(source: Any, guess: PixelPipeline) -> PixelPipeline:
    """Read open_clip's ``preprocess_cfg``, timm's ``pretrained_cfg`` or bare statistics."""
    known: dict[str, Any] = {}
    sizes = [_get(source, name) for name in _SIZES]
    size = next((size for size in sizes if size is not None), None)
    if size is not None:
        known["size"] = pair(size[-2:] if isinstance(size, Sequence) else size)
    statistics = [(_get(source, "image_mean"), _get(source, "image_std"))]
    statistics.append((_get(source, "mean"), _get(source, "std")))
    for mean, std in statistics:
        if all(isinstance(v, Sequence | np.ndarray | Tensor) for v in (mean, std)):
            known |= {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
            break
    if _get(source, "interpolation") in PIL_CODES:
        known["interpolation"] = _get(source, "interpolation")
    mode = _get(source, "resize_mode")
    if mode is not None:  # open_clip
        rule = {"shortest": "cover", "longest": "contain", "squash": "squash"}
        fill = float(np.ravel(_get(source, "fill_color", 0) or 0)[0]) / 255
        known |= {"resize": rule[mode], "fill": (fill,), "rounded_crop": True}
    share = _get(source, "crop_pct")
    if share is not None and "size" in known:  # timm
        mode = _get(source, "crop_mode") or "center"
        scaled = tuple(math.floor(side / share) for side in known["size"])
        rule = {"center": "cover", "squash": "squash", "border": "contain"}
        known |= {"resize": rule[mode], "scaled": scaled, "rounded_crop": True}
        if mode == "border":
            known |= {"fill": known.get("mean", (0.0,)), "scaled": None}
    return replace(guess, **known)


def _read_composition(steps: Sequence[Any], guess: PixelPipeline) -> PixelPipeline:
    # steps of torchvision, told apart by what they hold, since it is not a dependency
    known: dict[str, Any] = {"rounded_crop": True, "resize": "none", "size": None, "scaled": None}
    for step in steps:
        if hasattr(step, "interpolation") and hasattr(step, "size"):
            short = isinstance(step.size, int) or len(step.size) == 1
            size = pair(int(np.ravel(step.size)[0]) if short else step.size)
            known |= {"resize": "cover" if short else "squash", "scaled": size, "size": size}
            known["interpolation"] = _filter_name(
                getattr(step.interpolation, "value", step.interpolation)
            )
        elif hasattr(step, "size"):
            known["size"] = pair(step.size)
        elif hasattr(step, "mean") and hasattr(step, "std"):
            known |= {"mean": tuple(map(float, step.mean)), "std": tuple(map(float, step.std))}
    return replace(guess, **known)


def _filter_name(value: Any) -> str:
    name = value.lower() if isinstance(value, str) else PIL_CODES[int(value)]
    if name not in PIL_CODES:
        raise ValueError(f"the processor's interpolation {value!r} is not one of {PIL_CODES}.")
    return name


def pair(size: Any) -> Size | None:
    """Height and width of a size given as one number or two."""
    if size is None or isinstance(size, int | np.integer):
        return None if size is None else (int(size), int(size))
    height, width = size
    return int(height), int(width)


def _get(source: Any, name: str, default: Any = None) -> Any:
    value = source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)
    return default if value is None else value
