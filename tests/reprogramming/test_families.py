"""Text-image models of transformers, each against its own zero-shot classifier."""

import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn

from skperf.reprogramming import Reprogrammer

NAMES = ["cat", "great white shark", "dog", "sea bird of the north"]
WORDS = sorted({word for name in NAMES for word in name.split()})
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOWER |= {"num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
TEXT = TOWER | {"max_position_embeddings": 24, "pad_token_id": 0}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
FULL = {"padding": "max_length", "max_length": 16}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return transformers.BertTokenizer(str(path))


def clip(n):
    marks = {"bos_token_id": 2, "eos_token_id": 3, "vocab_size": n}
    return {"text_config": TEXT | marks, "vision_config": VISION, "projection_dim": 16}


def built(name, n):
    text = TEXT | {"vocab_size": n}
    both = {"text_config": text, "vision_config": VISION, "projection_dim": 16}
    square = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    crop = transformers.CLIPImageProcessor(**CROP)
    last = TOWER | {"vocab_size": n, "max_position_embeddings": 16, "projection_size": 32}
    if name == "SigLIP":
        config = transformers.SiglipConfig(text_config=last, vision_config=VISION)
        return transformers.SiglipModel(config), square, FULL
    if name == "SigLIP2":
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            Siglip2ImageProcessorPil,
        )

        patches = TOWER | {"patch_size": 8, "num_patches": 16}
        config = transformers.Siglip2Config(text_config=last, vision_config=patches)
        processor = Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        return transformers.Siglip2Model(config), processor, FULL
    if name == "ALIGN":
        small = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.2}
        small |= {"hidden_dim": 80, "num_hidden_layers": 4}
        config = transformers.AlignConfig(text_config=text, vision_config=small, projection_dim=80)
        return transformers.AlignModel(config), square, {}
    if name == "AltCLIP":
        more = {"project_dim": 16, "max_position_embeddings": 32, "bos_token_id": 2}
        config = transformers.AltCLIPConfig(**both | {"text_config": text | more})
        return transformers.AltCLIPModel(config), crop, {}
    if name == "ChineseCLIP":
        return transformers.ChineseCLIPModel(transformers.ChineseCLIPConfig(**both)), crop, {}
    if name == "BLIP":
        more = {"encoder_hidden_size": 32, "bos_token_id": 2, "sep_token_id": 3}
        config = transformers.BlipConfig(**both | {"text_config": text | more})
        return transformers.BlipModel(config), crop, {}
    if name == "dual":
        towers = transformers.Dinov2Model(transformers.Dinov2Config(**VISION))
        words = transformers.BertModel(transformers.BertConfig(**text))
        kind = transformers.VisionTextDualEncoderConfig
        config = kind.from_vision_text_configs(towers.config, words.config, projection_dim=16)
        kind = transformers.VisionTextDualEncoderModel
        return kind(config=config, vision_model=towers, text_model=words), crop, {}
    kinds = {
        "CLIP": ("CLIPModel", "CLIPConfig"),
        "MetaCLIP2": ("MetaClip2Model", "MetaClip2Config"),
    }
    model, config = (getattr(transformers, kind) for kind in kinds[name])
    return model(config(**clip(n))), crop, {}


FAMILIES = (
    *("CLIP", "MetaCLIP2", "SigLIP", "SigLIP2", "ALIGN", "AltCLIP", "ChineseCLIP"),
    *("BLIP", "dual"),
)


@pytest.fixture(scope="module")
def photos():
    arrays = np.random.RandomState(0).randint(0, 255, (8, 48, 40, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in arrays]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_shot_is_the_librarys_own(family, tokenizer, photos):
    torch.manual_seed(0)
    model, processor, padding = built(family, len(WORDS) + 5)
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)  # so that embeddings differ
        texts = tokenizer(NAMES, **({"padding": True} | padding), return_tensors="pt")
        texts = {name: texts[name] for name in ("input_ids", "attention_mask")}
        images = processor(photos, return_tensors="pt")
        own = model(**texts, **images).logits_per_image
    shared = {"tokenizer": tokenizer, "class_names": NAMES, "prompts": "{}", "max_epochs": 0}
    ours = Reprogrammer(model, processor=processor, border=4, **shared).fit(photos)
    np.testing.assert_allclose(ours.decision_function(photos), own, atol=1e-4)
    wrapped = Reprogrammer(nn.DataParallel(model), processor=processor, border=4, **shared)
    np.testing.assert_allclose(wrapped.fit(photos).decision_function(photos), own, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype, tokenizer, photos):
    torch.manual_seed(0)
    model, processor, _ = built("CLIP", len(WORDS) + 5)
    half = model.to(dtype)
    single = built("CLIP", len(WORDS) + 5)[0]
    single.load_state_dict({name: tensor.float() for name, tensor in half.state_dict().items()})
    shared = {"processor": processor, "tokenizer": tokenizer, "class_names": NAMES, "border": 4}
    shared |= {"prompts": "{}", "max_epochs": 1, "random_state": 0}
    y = np.arange(8) % 4
    for text in ("auto", "none"):
        fitted = [Reprogrammer(m, text=text, **shared).fit(photos, y) for m in (half, single)]
        np.testing.assert_array_equal(*(m.predict_proba(photos) for m in fitted))
    assert next(half.parameters()).dtype == dtype


def test_towers_of_different_widths_are_refused(tokenizer, photos):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, _ = built("ALIGN", len(WORDS) + 5)
    model.text_projection = nn.Linear(32, 64)
    asked = pytest.warns(UserWarning, match="AlignModel does not say how it wants its pictures")
    with asked, pytest.raises(ValueError, match="images in 80 dimensions and texts in 64"):
        Reprogrammer(model, tokenizer=tokenizer, class_names=NAMES, border=4).fit(photos)
