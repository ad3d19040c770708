import pytest
import torch
from torch import nn

from skperf.backbone.architectures import (
    MLP,
    RNet,
    SmallConvNet,
    SmallResNet,
    TextImageEncoder,
)


def count(module):
    return sum(each.numel() for each in module.parameters())


def n_filters(module):
    return sum(each.out_channels for each in module.modules() if isinstance(each, nn.Conv2d))


def test_mlp_is_what_its_formula_says():
    network = MLP(6, 3, hidden=(5,))
    inputs = torch.randn(4, 6)
    first, last = network.hidden[0], network.output
    expected = (inputs @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
    torch.testing.assert_close(network(inputs), expected)
    torch.testing.assert_close(network(inputs.view(4, 2, 3)), expected)


def test_mlp_without_hidden_layers_is_linear():
    assert count(MLP(6, 3, hidden=())) == 6 * 3 + 3


@pytest.mark.parametrize(
    ("module", "shape", "parameters", "filters"),
    [
        (SmallConvNet(), (28, 28), 16_938, 80),
        (SmallConvNet(3, 3, 32), (3, 32, 32), None, 80),
        (SmallResNet(), (28, 28), 174_970, 560),
        (SmallResNet(image_size=8, width=8, stem_stride=1), (8, 8), None, 280),
        (RNet(), (3, 24, 24), 99_662, 140),
    ],
)
def test_sizes(module, shape, parameters, filters):
    logits = module.eval()(torch.rand(2, *shape))
    assert logits.shape == (2, module.output.out_features)
    assert parameters is None or count(module) == parameters
    assert n_filters(module) == filters


@pytest.mark.parametrize("module", [SmallConvNet(), SmallResNet()])
def test_images_may_come_flat_or_with_a_channel(module):
    images = torch.rand(2, 28, 28)
    expected = module.eval()(images)
    torch.testing.assert_close(module(images[:, None]), expected)
    torch.testing.assert_close(module(images.flatten(1)), expected)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return TextImageEncoder(50, 16, image_widths=(4, 8), text_width=12, text_heads=2).eval()


def test_text_embedding_ignores_padding_and_other_rows(encoder):
    alone = encoder.encode_text(torch.tensor([[1, 7, 9]]))
    among = encoder.encode_text(torch.tensor([[1, 7, 9, 0, 0], [1, 3, 4, 5, 6]]))
    torch.testing.assert_close(among[:1], alone)


def test_text_embedding_depends_on_order(encoder):
    ids = torch.tensor([[1, 7, 9], [1, 9, 7]])
    first, second = encoder.encode_text(ids)
    assert not torch.allclose(first, second, atol=1e-4)


def test_normalize_gives_unit_length(encoder):
    pixels, ids = torch.randn(3, 3, 32, 32), torch.tensor([[1, 2]])
    images, texts, scale = encoder(pixels, ids)
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(1))
    plain = encoder.encode_image(pixels)
    torch.testing.assert_close(plain / plain.norm(dim=1, keepdim=True), images)
    torch.testing.assert_close(scale, encoder.logit_scale.exp())
