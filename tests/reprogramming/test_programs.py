import pytest
import torch
from torch.func import functional_call

from skperf.reprogramming.encoders import open_encoder
from skperf.reprogramming.pixels import PixelPipeline
from skperf.reprogramming.programs import (
    ImageProgram,
    Prompts,
    clamp_inward,
    class_prompts,
    text_program,
)


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_zero_overlay_is_the_picture(images):
    program = ImageProgram(3, (8, 8), 2)
    placed = program.place(images)
    assert torch.equal(placed, images)
    assert torch.equal(program.add(placed, torch.zeros(program.shape)), images)


def test_overlay_is_the_clipped_sum(images):
    program = ImageProgram(3, (8, 8), 2)
    weights = torch.randn(program.shape, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(8, 8)
    mask[2:-2, 2:-2] = 0
    assert program.shape == (3, int(mask.sum()))
    canvas = torch.zeros(3, 8, 8)
    canvas[:, mask.bool()] = torch.tanh(weights)
    torch.testing.assert_close(program.picture(weights), canvas)
    expected = (images + canvas).clamp(0, 1)
    torch.testing.assert_close(program.add(images, weights), expected)


def test_pad_shrinks_into_the_border(images):
    program = ImageProgram(3, (8, 8), 2, layout="pad")
    placed = program.place(images)
    assert placed.shape == (4, 3, 8, 8)
    torch.testing.assert_close(placed[:, :, 2:-2, 2:-2], PixelPipeline().place(images, (4, 4)))
    assert placed[:, :, :2].abs().max() == 0


def test_one_channel_is_repeated(images):
    placed = ImageProgram(3, (8, 8), 2).place(images[:, :1])
    assert torch.equal(placed, images[:, :1].repeat(1, 3, 1, 1))


def test_resize_crops_the_middle_and_stays_in_range():
    wide = torch.zeros(1, 1, 8, 16)
    wide[..., 4:12] = 1
    assert torch.equal(PixelPipeline().place(wide, (8, 8)), torch.ones(1, 1, 8, 8))
    up = PixelPipeline().place(torch.rand(1, 1, 5, 7), (12, 12))
    assert up.shape == (1, 1, 12, 12)
    assert up.min() >= 0
    assert up.max() <= 1


@pytest.mark.parametrize("border", [-1, 4, 5])
def test_border_must_leave_a_picture(border):
    with pytest.raises(ValueError, match=f"border={border} does not fit a canvas of 8 x 8"):
        ImageProgram(3, (8, 8), border)


def test_clamp_gradient_leads_back_inside():
    values = torch.tensor([-1.0, -1.0, 0.5, 2.0, 2.0], requires_grad=True)
    # descent would move each value against these
    clamp_inward(values).backward(torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0]))
    assert values.grad.tolist() == [0.0, -1.0, 3.0, 1.0, 0.0]


def test_no_pixel_is_lost():
    """A border pixel that starts below black is still learned, unlike with a plain clamp."""
    images = torch.zeros(2, 1, 4, 4)
    for clip, moves in (("inward", True), ("plain", False)):
        program = ImageProgram(1, (4, 4), 1, clip=clip)
        weights = torch.full(program.shape, -0.5, requires_grad=True)
        (1 - program.add(images, weights)).square().mean().backward()
        assert bool(weights.grad.abs().max() > 0) is moves


@pytest.mark.parametrize("kind", ["bias", "position", "table", "table+position"])
def test_hook_equals_changed_weights(towers, tokenizer, kind):
    encoder = open_encoder(towers, tokenizer=tokenizer)
    ids = encoder.tokenize(["a photo of a cat", "a photo of a dog"])
    program = text_program(kind, encoder, ids)
    delta = torch.randn(program.shape, generator=torch.Generator().manual_seed(3))
    table = towers.token_embedding.weight.detach().clone()
    positions = towers.positional_embedding.detach().clone()
    n_used = len(program.used)
    table[program.used] += delta[:n_used]
    if kind == "bias":
        table += delta
    elif "position" in kind:
        positions += delta[n_used:]
    changed = {"token_embedding.weight": table, "positional_embedding": positions}

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = towers

        def forward(self, ids):
            return self.inner.encode_text(ids)

    expected = functional_call(Text(), {f"inner.{k}": v for k, v in changed.items()}, (ids.ids,))
    torch.testing.assert_close(encoder.encode_text(ids, program.hook(delta)), expected)
    assert not towers.token_embedding._forward_hooks


def test_table_leaves_other_words_alone(towers, tokenizer):
    encoder = open_encoder(towers, tokenizer=tokenizer)
    ids = encoder.tokenize(["a photo of a cat", "a photo of a dog"])
    program = text_program("table", encoder, ids)
    assert program.used.tolist() == [3, 4, 5, 7, 8]  # no padding, start or end
    hook = program.hook(torch.randn(program.shape))
    other, own = encoder.tokenize(["the zebra"]), encoder.tokenize(["the cat"])
    assert torch.equal(encoder.encode_text(other, hook), encoder.encode_text(other))
    assert not torch.equal(encoder.encode_text(own, hook), encoder.encode_text(own))


def test_prompts_in_pieces_have_the_gradient_of_all_at_once(towers, tokenizer, monkeypatch):
    encoder = open_encoder(towers.eval(), tokenizer=tokenizer)
    names = [["cat"], ["dog", "zebra"], ["fish"]]
    own = class_prompts(["a photo of a {}", "the {}"], names, [0, 1, 2])
    tokens = encoder.tokenize([text for texts in own for text in texts])
    groups = torch.repeat_interleave(torch.arange(3), torch.tensor([len(t) for t in own]))
    prompts = Prompts(tokens, groups, 3)
    target = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))

    def slope(at_once):
        monkeypatch.setattr("skperf.reprogramming.programs.PROMPTS_AT_ONCE", at_once)
        delta = torch.full((16,), 0.1, requires_grad=True)
        state, sizes = torch.random.get_rng_state(), []

        def hook(module, args, output):
            sizes.append(len(output))
            return output + delta

        (prompts.embeddings(encoder, hook) * target).sum().backward()
        assert torch.equal(torch.random.get_rng_state(), state)
        return delta.grad, sizes

    whole, once = slope(8)
    pieces, twice = slope(3)
    assert (once, twice) == ([8], [3, 3, 2, 2, 3, 3])  # the way back makes each piece again
    torch.testing.assert_close(pieces, whole)


def test_prompts_are_averaged_on_the_sphere(towers, tokenizer):
    encoder = open_encoder(towers, tokenizer=tokenizer)
    own = class_prompts(["a photo of a {}", "the {}"], [["cat"], ["dog", "zebra"]], [0, 1])
    assert own[0] == ["a photo of a cat", "the cat"]
    assert own[1] == ["a photo of a dog", "the dog", "a photo of a zebra", "the zebra"]
    tokens = encoder.tokenize([text for texts in own for text in texts])
    table = Prompts(tokens, torch.tensor([0, 0, 1, 1, 1, 1]), 2).embeddings(encoder)
    for row, texts in zip(table, own, strict=True):
        each = encoder.encode_text(encoder.tokenize(texts))
        mean = sum(e / e.norm() for e in each)
        torch.testing.assert_close(row, mean / mean.norm())


def test_prompt_needs_a_place_for_the_name():
    with pytest.raises(ValueError, match=r"'a photo' has no '\{\}'"):
        class_prompts(["a photo"], [["cat"]], [0])


def test_no_border_is_a_border_too():
    program = ImageProgram(3, (6, 8), 0)
    assert program.shape == (3, 0)
    images = torch.rand(2, 3, 6, 8)
    torch.testing.assert_close(program.add(program.place(images), torch.zeros(3, 0)), images)
    with pytest.raises(ValueError, match="border=-1"):
        ImageProgram(3, (6, 8), -1)
    assert ImageProgram(3, (6, 8), 2).shape == (3, 6 * 8 - 2 * 4)
