import pytest
import torch
from torch import nn

from skperf.backbone.architectures import (
    MLP,
    RNet,
    SmallConvNet,
    SmallResNet,
    TextImageEncoder,
    _ImageTower,
    _ResidualBlock,
    _TransformerBlock,
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


def normed(norm, values):
    """Batch normalisation in evaluation mode."""
    mean, variance, scale, shift = (
        tensor[:, None, None]
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (values - mean) / (variance + norm.eps).sqrt() * scale + shift


@pytest.mark.parametrize(("n_in", "n_out", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2)])
def test_a_residual_block_adds_its_shortcut(n_in, n_out, stride):
    torch.manual_seed(0)
    block = _ResidualBlock(n_in, n_out, stride).eval()
    for part in block.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.running_mean, part.weight.data, part.bias.data):
                tensor.normal_()
            part.running_var.uniform_(0.5, 2)
    images, conv = torch.randn(2, n_in, 6, 6), nn.functional.conv2d
    inner = normed(block.norm1, conv(images, block.conv1.weight, None, stride, 1)).relu()
    inner = normed(block.norm2, conv(inner, block.conv2.weight, None, 1, 1))
    shortcut = images
    if (n_in, stride) != (n_out, 1):
        shortcut = normed(block.shortcut[1], conv(images, block.shortcut[0].weight, None, stride))
    torch.testing.assert_close(block(images), (inner + shortcut).relu(), rtol=1e-4, atol=1e-4)


def test_defaults_of_the_built_in_networks():
    assert MLP(6, 3).hidden[0].out_features == 64
    convolutions = [p for p in _ImageTower((4, 5, 6, 7), 3).modules() if isinstance(p, nn.Conv2d)]
    assert [c.stride[0] for c in convolutions] == [1, 2, 1, 2]
    assert {(c.kernel_size, c.padding) for c in convolutions} == {((3, 3), (1, 1))}
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [
        (3, 4),
        (4, 5),
        (5, 6),
        (6, 7),
    ]
    strides = [block.conv1.stride[0] for block in SmallResNet().blocks]
    assert strides == [1, 1, 2, 1, 2, 1]
    assert SmallResNet().stem[0].stride == (2, 2)
    assert {block.conv1.padding for block in SmallResNet().blocks} == {(1, 1)}


def test_a_transformer_block_is_torch_s_own_that_normalises_first():
    torch.manual_seed(0)
    block = _TransformerBlock(8, 2).eval()
    plain = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).eval()
    pairs = {
        "self_attn.in_proj_weight": block.qkv.weight, "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.attention_output.weight,
        "self_attn.out_proj.bias": block.attention_output.bias,
        "linear1.weight": block.mlp[0].weight, "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[2].weight, "linear2.bias": block.mlp[2].bias,
        "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
        "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
    }  # fmt: skip
    plain.load_state_dict(pairs)
    states = torch.randn(3, 5, 8)
    kept = torch.ones(3, 5, dtype=torch.bool)
    kept[0, 3:] = False
    expected = plain(states, src_key_padding_mask=~kept)
    torch.testing.assert_close(block(states, kept)[kept], expected[kept], rtol=1e-4, atol=1e-5)
