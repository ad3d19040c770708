"""A pattern times a mask drawn from each picture, against the same in torch layers."""

import numpy as np
import pytest
import torch
from torch import nn

from skperf.reprogramming.masks import MaskProgram


def test_a_mask_holds_a_pattern_of_the_canvas_and_two_layers_between():
    program = MaskProgram(2, (5, 7))
    weights = program.start("zeros", torch.Generator().manual_seed(0))
    layers = [(8, 2, 3, 3), (16, 8, 3, 3), (2, 16, 3, 3)]
    assert program.shape == weights.shape
    assert len(weights) == 2 * 5 * 7 + sum(np.prod(layer) + layer[0] for layer in layers)
    assert not weights[:70].any()
    assert weights[70:].any()


def in_layers(program, weights):
    """The mask's network of torch's own layers, with the weights read off one after the other."""
    channels = program.channels
    parts = [nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)]
    parts.append(nn.Conv2d(16, channels, 3, padding=1))
    rest = weights[channels * program.canvas[0] * program.canvas[1] :]
    for part in parts:
        for tensor in (part.weight, part.bias):
            own, rest = rest[: tensor.numel()], rest[tensor.numel() :]
            tensor.data = own.view(tensor.shape)
    assert not len(rest)
    pool = nn.MaxPool2d(2, ceil_mode=True)
    first, second, third = parts
    return lambda x: third(pool(second(pool(first(x).relu())).relu()))


@pytest.mark.parametrize("clip", ["inward", "hard"])
@pytest.mark.parametrize("bound", ["tanh", "none"])
def test_what_is_added_is_the_pattern_times_the_mask_of_the_picture(clip, bound):
    program = MaskProgram(3, (6, 10), bound=bound, clip=clip)
    weights = torch.randn(program.shape, generator=torch.Generator().manual_seed(0)) * 0.5
    pictures = torch.rand(4, 3, 6, 10, generator=torch.Generator().manual_seed(1))
    small = in_layers(program, weights)(pictures)  # a quarter of the side, rounded up
    assert small.shape == (4, 3, 2, 3)
    rows, columns = np.arange(6) * 2 // 6, np.arange(10) * 3 // 10
    mask = small[:, :, rows][:, :, :, columns]
    torch.testing.assert_close(program.mask(pictures, weights), mask)
    pattern = weights[:180].view(3, 6, 10)
    pattern = pattern.tanh() if bound == "tanh" else pattern
    torch.testing.assert_close(program.picture(weights), pattern)
    expected = (pictures + pattern * mask).clamp(0, 1)
    torch.testing.assert_close(program.add(pictures, weights), expected)


def test_kernels_start_by_their_fan_in_and_grey_pictures_get_all_channels():
    program = MaskProgram(3, (4, 4))
    weights = program.start("normal", torch.Generator().manual_seed(0))
    assert weights[:48].std() == pytest.approx(1, abs=0.3)
    kernel = weights[48 : 48 + 8 * 27]
    assert kernel.std() == pytest.approx((2 / 27) ** 0.5, rel=0.15)
    assert not weights[48 + 8 * 27 : 48 + 8 * 27 + 8].any()  # biases
    second = weights[48 + 8 * 28 : 48 + 8 * 28 + 16 * 72]
    assert second.std() == pytest.approx((2 / 72) ** 0.5, rel=0.1)
    placed = program.place(torch.rand(2, 1, 4, 4))
    assert placed.shape == (2, 3, 4, 4)
    assert torch.equal(placed[:, 0], placed[:, 2])
