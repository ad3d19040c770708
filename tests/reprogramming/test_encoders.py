from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from skperf.reprogramming import Reprogrammer, open_encoder
from skperf.reprogramming.encoders import (
    CLIP_MEAN,
    FrozenEncoder,
    _open_two_towers,
    _same,
    _transformers_patches,
    examined,
    of_tokens,
    projected,
)

SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
TOWER = SMALL | {"num_attention_heads": 2}
VISION = TOWER | {"image_size": 12, "patch_size": 4}
TEXT = TOWER | {"vocab_size": 40, "max_position_embeddings": 9}


def test_what_comes_back_is_the_same_where_it_is_the_same_memory():
    whole = torch.arange(12.0).view(4, 3)
    assert _same(whole, whole.view(3, 4))
    assert not _same(whole, whole.clone())
    assert not _same(whole, whole[:2])
    assert not _same((whole,), whole)


class HuggingFaceTokenizer:
    """Exactly the calls that the adapters make of a transformers tokenizer."""

    def __init__(self, words):
        self.words = words

    def __call__(self, texts, padding="longest", max_length=None, return_tensors=None):
        rows = [[38, *(self.words.index(w) for w in text.split()), 39] for text in texts]
        length = max(map(len, rows)) if padding == "longest" else max_length
        ids = torch.tensor([row + [39] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": mask}

    def convert_ids_to_tokens(self, ids):
        return [self.words[i] for i in ids]


@pytest.fixture
def words():
    return HuggingFaceTokenizer(["a", "photo", "of", "cat", "dog", "bird", "very", "zebra"])


@pytest.fixture
def clip(tmp_path):
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=TEXT | {"bos_token_id": 38, "eos_token_id": 39, "pad_token_id": 39},
        vision_config=VISION,
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(tmp_path)
    return CLIPModel.from_pretrained(tmp_path)


@pytest.fixture
def siglip(tmp_path):
    torch.manual_seed(0)
    config = SiglipConfig(text_config=TEXT | {"projection_size": 16}, vision_config=VISION)
    SiglipModel(config).save_pretrained(tmp_path)
    return SiglipModel.from_pretrained(tmp_path)


def test_clip_equals_its_own_forward(clip, words):
    encoder = open_encoder(clip, tokenizer=words)
    assert (encoder.image_size, encoder.channels, encoder.mean) == ((12, 12), 3, CLIP_MEAN)
    images = torch.rand(4, 3, 12, 12)
    ids = encoder.tokenize(["a photo of a cat", "a dog"])
    assert ids.ids.shape == (2, 7)
    encoder = encoder._private()
    with torch.no_grad():
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
        out = clip(pixel_values=(images - mean) / std, input_ids=ids.ids)
        torch.testing.assert_close(
            nn.functional.normalize(encoder.encode_image(images), dim=-1), out.image_embeds
        )
        text = nn.functional.normalize(encoder.encode_text(ids), dim=-1)
        torch.testing.assert_close(text, out.text_embeds)
        similarity = encoder.logit_scale * out.image_embeds @ out.text_embeds.T
        torch.testing.assert_close(similarity, out.logits_per_image)


def test_siglip_equals_its_own_forward(siglip, words):
    encoder = open_encoder(siglip, tokenizer=words)
    ids = encoder.tokenize(["a cat", "a dog"])
    assert ids.ids.shape == (2, 9)  # it pools the last position
    images = torch.rand(4, 3, 12, 12)
    encoder = encoder._private()
    with torch.no_grad():
        texts = {"input_ids": ids.ids, "attention_mask": ids.mask}
        out = siglip(pixel_values=(images - 0.5) / 0.5, **texts)
        u = nn.functional.normalize(encoder.encode_image(images), dim=-1)
        q = nn.functional.normalize(encoder.encode_text(ids), dim=-1)
        logits = encoder.logit_scale * u @ q.T + encoder.logit_bias
        torch.testing.assert_close(logits, out.logits_per_image)


def test_image_statistics_come_from_the_processor(clip):
    processor = SimpleNamespace(
        image_processor=SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 3.0])
    )
    encoder = open_encoder(clip, processor=processor)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (1.0, 2.0, 3.0))


def test_both_return_styles_are_unwrapped():
    embeddings = torch.rand(2, 3)
    record = SimpleNamespace(pooler_output=embeddings, last_hidden_state=torch.rand(2, 5, 4))
    for output in (embeddings, record, (torch.rand(2, 5, 4), embeddings)):
        assert projected(output) is embeddings
    with pytest.raises(TypeError, match="neither embeddings nor a record"):
        projected(SimpleNamespace(last_hidden_state=torch.rand(2, 5, 4)))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_hugging_face_models_learn(family, words, pictures, request, tmp_path):
    model = request.getfixturevalue(family)
    X, y = pictures
    reprogrammer = Reprogrammer(
        model, tokenizer=words, border=3, max_epochs=8, batch_size=32, lr=0.1, random_state=0
    )
    before = clone(reprogrammer).set_params(max_epochs=0).fit(X, y)
    after = clone(reprogrammer).set_params(alpha=0.0).fit(X, y)
    assert after.encoder is model
    assert after.history_[-1, "train_loss"] < after.history_[0, "train_loss"]
    assert after.score(X, y) >= before.score(X, y)
    after.save_program(tmp_path / "program.safetensors")
    again = clone(reprogrammer).load_program(tmp_path / "program.safetensors")
    np.testing.assert_array_equal(again.predict_proba(X), after.predict_proba(X))


def test_other_canvas_is_interpolated_by_hugging_face(clip, words, pictures):
    X, y = pictures
    model = Reprogrammer(clip, tokenizer=words, canvas=16, border=2, max_epochs=0).fit(X, y)
    assert model.reprogram(X[:2]).shape == (2, 3, 16, 16)


def test_prompt_longer_than_the_context(clip, words, towers, tokenizer, pictures):
    X, y = pictures
    with pytest.raises(ValueError, match="needs 10 tokens or more; the text tower takes 9"):
        Reprogrammer(clip, tokenizer=words, border=2, prompts="very " * 7 + "{}").fit(X, y)
    with pytest.raises(ValueError, match="needs 9 tokens or more; the text tower takes 8"):
        Reprogrammer(towers, tokenizer=tokenizer, border=2, prompts="a " * 7 + "{}").fit(X, y)


def test_custom_text_tower_and_hugging_face_text_tower_are_found(towers):
    inner = nn.Embedding(5, 4)
    text, custom = nn.Module(), nn.Module()
    text.transformer, custom.token_embedding = nn.Sequential(inner), inner
    text.transformer.get_input_embeddings = lambda: inner

    class TextInside(nn.Module):
        def __init__(self, visual, text):
            super().__init__()
            self.visual, self.text = visual, text

        def encode_image(self, pixels):
            return pixels

        def encode_text(self, ids):
            return ids

    for tower in (text, custom):
        model = TextInside(towers.visual, tower)
        encoder = open_encoder(model)
        assert model.get_submodule(encoder.token_embedding) is inner


def test_modules_are_told_apart_by_their_last_layer():
    logits = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1))
    images = torch.rand(1, 1, 4, 4)
    assert examined(open_encoder(logits), images).outputs == "logits"
    assert examined(open_encoder(features), images).outputs == "features"
    assert open_encoder(logits).channels == 1
    assert open_encoder(features).encode_image(torch.rand(3, 1, 6, 6)).shape == (3, 2)


def test_unknown_encoder_is_told_what_was_tried(pictures):
    with pytest.raises(TypeError, match=r"encoder is a int; tried, in this order: .*open_clip"):
        Reprogrammer(3).fit(*pictures)


def test_fingerprints_tell_encoders_apart(clip, siglip):
    assert open_encoder(clip)._fingerprint() == open_encoder(clip)._fingerprint()
    assert open_encoder(clip)._fingerprint() != open_encoder(siglip)._fingerprint()
    assert open_encoder(np.sum)._fingerprint() != open_encoder(np.mean)._fingerprint()


def test_patches_of_pictures_that_are_no_squares_stay_in_order():
    class Model:
        config = SimpleNamespace(vision_config=SimpleNamespace(patch_size=2))

        def get_image_features(self, pixel_values, pixel_attention_mask, spatial_shapes):
            self.seen = pixel_values, pixel_attention_mask, spatial_shapes
            return pixel_values.sum(1)

    model, pixels = Model(), torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    _transformers_patches(model, pixels)
    patches, mask, shapes = model.seen
    assert shapes.tolist() == [[2, 3], [2, 3]]
    assert mask.shape == (2, 6)
    for place, (row, column) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        own = pixels[:, :, row : row + 2, column : column + 2].permute(0, 2, 3, 1)
        torch.testing.assert_close(patches[:, place], own.reshape(2, 12))


def test_texts_are_opened_by_the_first_table_of_tokens_and_others_refused():
    texts = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))
    opened = of_tokens(FrozenEncoder(texts, lambda model, ids: model(ids), "unknown"))
    assert opened.token_embedding == "0"
    ids, shift = torch.tensor([[1, 2, 3]]), torch.randn(1, 3, 4)
    rows = torch.cat([shift, ids[..., None].float()], 2)
    by_hand = texts[2]((texts[0](ids) + shift).flatten(1))
    torch.testing.assert_close(opened.image(texts, rows), by_hand)
    with pytest.raises(TypeError, match="no token embedding"):
        of_tokens(FrozenEncoder(nn.Linear(3, 2), lambda model, rows: model(rows), "unknown"))


class Told(nn.Module):
    """A text tower that comes first and convolves, and a tower of grey pictures."""

    def __init__(self):
        super().__init__()
        self.mixer = nn.Conv1d(7, 4, 1)
        self.token_embedding = nn.Embedding(5, 4)
        self.visual = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten())


def test_channels_are_those_of_the_visual_tower():
    opened = _open_two_towers(Told(), None, None)
    assert (opened.channels, opened.token_embedding) == (1, "token_embedding")


@pytest.mark.parametrize("returned", [(3,), (2, 4), (4,)])
def test_outputs_that_are_no_row_for_each_image_are_refused(returned):
    encoder = open_encoder(lambda images: np.zeros(returned, np.float32))
    with pytest.raises(ValueError, match="the encoder turned 3 images into an array of shape"):
        encoder.encode_image(torch.zeros(3, 1, 2, 2))
