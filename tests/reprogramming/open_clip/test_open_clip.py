"""The adapter against the real open_clip: its three kinds of text tower, randomly initialised."""

import json

import numpy as np
import open_clip
import pytest
import torch
from open_clip.model import CLIP, CustomTextCLIP
from torch.nn import functional
from transformers import BertConfig, BertTokenizer

from skperf.reprogramming import Reprogrammer, open_encoder

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def hugging_face_text(tmp_path_factory):
    """A folder with a tiny BERT configuration and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *["a", "photo", "of", "cat", "dog", "bird"],
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": len(words), "hidden_size": 16, "max_position_embeddings": 20}
    BertConfig(**sizes).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def build(kind, folder, tmp_path):
    """Build a model, write its state and load it into a second one."""
    text = dict(TEXT)
    if kind == "hugging face":
        text = {"hf_model_name": str(folder), "hf_model_pretrained": False, "context_length": 20}
        text |= {
            "hf_tokenizer_name": str(folder),
            "hf_proj_type": "linear",
            "hf_pooler_type": "mean_pooler",
        }
    make = CLIP if kind == "plain" else CustomTextCLIP
    torch.manual_seed(0)
    torch.save(make(16, VISION, text).state_dict(), tmp_path / "state.pt")
    torch.manual_seed(1)
    model = make(16, VISION, text)
    model.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    if kind == "hugging face":
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=20)
    else:
        tokenizer = open_clip.get_tokenizer("ViT-B-32")
    return model, tokenizer


@pytest.fixture(params=["plain", "custom", "hugging face"])
def pair(request, hugging_face_text, tmp_path):
    return build(request.param, hugging_face_text, tmp_path)


@pytest.fixture
def pictures():
    y = np.arange(60) % 3
    X = np.random.RandomState(0).uniform(0, 0.4, (60, 3, 32, 32)).astype(np.float32)
    for row, code in zip(X, y, strict=True):
        row[:, :, 10 * code : 10 * code + 10] += 0.5
    return X, np.array(["cat", "dog", "bird"])[y]


def test_zero_shot_equals_the_library(pair, pictures):
    model, tokenizer = pair
    X, y = pictures
    fitted = Reprogrammer(model, tokenizer=tokenizer, border=4, max_epochs=0).fit(X, y)
    encoder = fitted.encoder_
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    ids = tokenizer([f"a photo of a {name}" for name in fitted.classes_])
    with encoder.open(), torch.no_grad():
        images = model.encode_image((torch.tensor(X) - mean) / std, normalize=True)
        texts = functional.normalize(model.encode_text(ids), dim=-1)
        expected = model.logit_scale.exp() * images @ texts.T
    np.testing.assert_allclose(fitted.decision_function(X), expected.numpy(), atol=1e-4)


def test_training_leaves_the_model_and_lowers_the_loss(pair, pictures):
    model, tokenizer = pair
    X, y = pictures
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"border": 4, "max_epochs": 6, "batch_size": 32, "lr": 0.1, "random_state": 0}
    fitted = Reprogrammer(model, tokenizer=tokenizer, **options).fit(X, y)
    assert fitted.history_[-1, "train_loss"] < fitted.history_[0, "train_loss"]
    assert np.abs(fitted.text_delta_).sum() > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_other_words_keep_their_embeddings(pair, pictures):
    model, tokenizer = pair
    X, y = pictures
    names = {"cat": "cat", "dog": "dog", "bird": "cat"}
    options = {"prompts": "photo {}", "class_names": names, "border": 4, "max_epochs": 1}
    fitted = Reprogrammer(model, tokenizer=tokenizer, **options).fit(X, y)
    hook = fitted.net_.module_.text_program.hook(fitted.net_.module_.text)
    ids = tokenizer(["of bird"])
    with fitted.encoder_.open(), torch.no_grad():
        assert torch.equal(fitted.encoder_.encode_text(ids, hook), model.encode_text(ids))


def test_long_prompts_are_refused_though_the_library_cuts_them(hugging_face_text, tmp_path):
    model, tokenizer = build("plain", hugging_face_text, tmp_path)
    tokenize = open_encoder(model, tokenizer=tokenizer).tokenize
    assert tokenize(["cat " * 75]).shape == (1, 77)
    with pytest.raises(ValueError, match="the text tower takes 77"):
        tokenize(["cat " * 76])


def test_statistics_of_a_created_model(tmp_path):
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    (tmp_path / "skperf-tiny.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    model, _, _ = open_clip.create_model_and_transforms("skperf-tiny", pretrained=None)
    encoder = open_encoder(model, tokenizer=open_clip.get_tokenizer("skperf-tiny"))
    assert encoder.image_size == (32, 32)
    assert encoder.mean == pytest.approx(open_clip.OPENAI_DATASET_MEAN)


def test_wrong_size_is_explained(pair, pictures):
    model, tokenizer = pair
    options = {"canvas": 48, "border": 4, "max_epochs": 1}
    with pytest.raises(ValueError, match=r"does not take images of shape \(3, 48, 48\)"):
        Reprogrammer(model, tokenizer=tokenizer, **options).fit(*pictures)
