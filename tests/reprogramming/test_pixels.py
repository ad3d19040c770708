"""Pictures on their way to the encoder, held against PIL and the libraries' own processors."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    ConvNextImageProcessor,
    LevitImageProcessor,
    MobileViTImageProcessor,
    PoolFormerImageProcessor,
    Qwen2VLImageProcessor,
    SamImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from skperf.reprogramming.pixels import (
    PIL_CODES,
    PLAIN,
    PixelPipeline,
    patch_grid,
    read_configuration,
    read_processor,
)


def picture(height, width, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)


def placed(pipeline, array, size=None):
    tensor = torch.tensor(array.transpose(2, 0, 1))[None].float() / 255
    return pipeline.place(tensor, size)[0].numpy() * 255


@pytest.mark.parametrize("name", PIL_CODES)
@pytest.mark.parametrize("source", [(48, 40), (31, 77), (5, 7), (300, 100)])
def test_filters_are_those_of_pil(name, source):
    for size in ((32, 32), (224, 224), (33, 50)):
        array = picture(*source)
        image = Image.fromarray(array).resize(size[::-1], PIL_CODES.index(name))
        ours = placed(PixelPipeline(resize="squash", interpolation=name), array, size)
        assert np.abs(ours - np.asarray(image).transpose(2, 0, 1)).max() <= 1


PROCESSORS = [
    CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}),
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 24}),
    CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 32, "width": 33}),
    CLIPImageProcessor(do_resize=False, crop_size={"height": 32, "width": 32}),
    SiglipImageProcessor(size={"height": 40, "width": 36}),
    ViTImageProcessor(size={"height": 48, "width": 48}),
    # these enlarge the size before they crop, in code and not in a setting
    ConvNextImageProcessor(size={"shortest_edge": 32}),
    ConvNextImageProcessor(size={"shortest_edge": 384}),
    LevitImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 36, "width": 36}, do_normalize=False
    ),
    PoolFormerImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, crop_pct=0.8
    ),
    MobileViTImageProcessor(
        size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}, do_rescale=True
    ),
]


@pytest.mark.parametrize("processor", PROCESSORS, ids=range(len(PROCESSORS)))
@pytest.mark.parametrize("source", [(48, 40), (31, 77), (100, 33), (32, 32)])
def test_processors_of_transformers_are_read_whole(processor, source):
    array, pipeline = picture(*source), read_processor(processor, PLAIN)
    options = {"return_tensors": "np"}
    plain = processor(Image.fromarray(array), do_rescale=False, do_normalize=False, **options)
    if pipeline.reversed_channels:  # a part of the normalisation, here
        plain["pixel_values"] = plain["pixel_values"][:, ::-1]
    assert np.abs(placed(pipeline, array) - plain["pixel_values"][0]).max() <= 1
    whole = processor(Image.fromarray(array), **options)["pixel_values"][0]
    ours = pipeline.normalise(torch.tensor(placed(pipeline, array) / 255)[None])[0]
    np.testing.assert_allclose(ours, whole, atol=0.02)


def test_a_processor_that_does_more_than_its_settings_say_is_refused():
    both = {"shortest_edge": 32, "longest_edge": 48}  # keeps the long edge below 48
    processor = CLIPImageProcessor(size=both, crop_size={"height": 32, "width": 32})
    with pytest.raises(ValueError, match=r"CLIPImageProcessor.* does more to a picture"):
        read_processor(processor, PLAIN)


def test_a_processor_that_tells_nothing_or_fails_is_refused():
    with pytest.raises(ValueError, match=r"processor is a function that says nothing of size"):
        read_processor(lambda image: image, PLAIN)
    # says no size, and brings every picture to 1,024 pixels
    with pytest.raises(ValueError, match=r"SamImageProcessor.* does more to a picture"):
        read_processor(SamImageProcessor(), PLAIN)
    # an area, where others say an edge
    with pytest.raises(ValueError, match=r"says 3136 x 3136 pixels"):
        read_processor(Qwen2VLImageProcessor(), PLAIN)
    processor = SiglipImageProcessor(size={"height": 8, "width": 8})
    processor.preprocess = None
    with pytest.raises(ValueError, match=r"SiglipImageProcessor\w* fails on a picture \(TypeError"):
        read_processor(processor, PLAIN)


class Composed:
    """Steps one after the other, as torchvision composes them."""

    def __init__(self, *transforms):
        self.transforms = transforms

    def __call__(self, image):
        for step in self.transforms:
            image = step(image)
        return image


class Resized:
    size, interpolation = (40, 36), SimpleNamespace(value="bicubic")

    def __call__(self, image):
        return image.resize(self.size[::-1], Image.BICUBIC)


class Normalised:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)

    def __call__(self, image):
        levels = (np.asarray(image) / 255 - self.mean) / self.std
        return torch.tensor(levels.transpose(2, 0, 1))


def test_a_composition_is_run_and_a_step_that_is_not_known_refused():
    read = read_processor(Composed(Resized(), Normalised()), PLAIN)
    assert (read.size, read.resize, read.std) == ((40, 36), "squash", Normalised.std)

    def grey(image):
        return image.convert("L").convert("RGB")

    with pytest.raises(ValueError, match=r"Composed does more to a picture"):
        read_processor(Composed(Resized(), grey, Normalised()), PLAIN)


def test_configurations_of_open_clip_timm_and_openai():
    # stand-ins with the fields that these libraries write: they import torchvision
    open_clip = {"size": 24, "mean": (0.1,) * 3, "std": (0.2,) * 3, "interpolation": "bilinear"}
    for mode, rule in (("shortest", "cover"), ("longest", "contain"), ("squash", "squash")):
        read = read_configuration(open_clip | {"resize_mode": mode, "fill_color": 51}, PLAIN)
        assert (read.size, read.resize, read.interpolation) == ((24, 24), rule, "bilinear")
        assert read.fill == (0.2,)
    timm = {"input_size": (3, 224, 224), "crop_pct": 0.875, "interpolation": "bicubic"}
    read = read_configuration(SimpleNamespace(**timm, mean=(0.5,) * 3, std=(0.5,) * 3), PLAIN)
    assert (read.size, read.scaled, read.resize) == ((224, 224), (256, 256), "cover")
    assert read_configuration(SimpleNamespace(input_resolution=32), PLAIN).size == (32, 32)
    steps = [
        SimpleNamespace(size=36, interpolation=SimpleNamespace(value="bicubic")),
        SimpleNamespace(size=(32, 32)),
        SimpleNamespace(mean=(0.5,) * 3, std=(0.25,) * 3),
    ]
    read = read_processor(SimpleNamespace(transforms=steps), PLAIN)
    assert (read.scaled, read.size, read.std) == ((36, 36), (32, 32), (0.25,) * 3)
    assert read.rounded_crop


def test_contained_pictures_are_filled_up():
    wide = np.full((8, 16, 3), 255, dtype=np.uint8)
    ours = placed(PixelPipeline(resize="contain", fill=(0.2,)), wide, (16, 16))
    assert (ours[:, 4:12] == 255).all()
    np.testing.assert_allclose(ours[:, [0, 3, 12, 15]], 51, rtol=1e-6)


@pytest.mark.parametrize(("source", "most"), product([(48, 40), (20, 90), (7, 7)], [16, 50, 256]))
def test_patch_grids_are_those_of_siglip_2(source, most):
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    theirs = module.get_image_size_for_max_num_patches(*source, 8, most)
    assert patch_grid(source, 8, most) == theirs


def test_first_size_of_the_released_code():
    array = picture(64, 64)
    small = Image.fromarray(array).resize((16, 16), 3).resize((32, 32), 3)
    ours = placed(PixelPipeline(size=(32, 32), shrink=16), array)
    assert np.abs(ours - np.asarray(small).transpose(2, 0, 1)).max() <= 1


def test_a_processor_that_says_nothing_is_refused_by_name_and_a_size_has_several_names():
    plain = PixelPipeline(size=(9, 9))
    for silent in ("openai/clip-vit-base-patch32", {}, {"url": "x"}):
        with pytest.raises(ValueError, match=f"processor is a {type(silent).__name__} that says"):
            read_processor(silent, plain)
    for name in ("size", "input_size", "input_resolution", "image_size"):
        assert read_processor({name: 32}, plain).size == (32, 32)
