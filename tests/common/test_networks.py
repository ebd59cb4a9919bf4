"""The architectures: exact parameter counts, the released code's details, and torch.func through every one of them."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from common.networks import ACTIVATIONS, NETWORKS, PlainNet, ResNet, gain_of, make_activation, make_network
from common.networks.densenet import Bottleneck, Transition
from common.networks.resnet import BasicBlock, FixupBlock, SkipInitBlock
from common.networks.wide_resnet import WideBlock

TINY = {
    "plain": ("plain", {"depth": 6, "width": 3, "stem_stride": 2}),
    "vgg": ("vgg-11", {"width": 2}),
    "resnet": ("resnet-8", {"width": 3}),
    "resnet without skips": ("resnet-8", {"width": 3, "skip": False}),
    "skipinit": ("resnet-8", {"width": 3, "branch": "skipinit"}),
    "fixup": ("resnet-8", {"width": 3, "branch": "fixup"}),
    "wrn": ("wrn-10-1", {}),
    "wrn without skips": ("wrn-10-1", {"skip": False}),
    "densenet": ("densenet-16-3", {}),
}
NORMALISED = [name for name in TINY if name not in {"skipinit", "fixup"}]
SMOOTH = {"activation": "tanh"}


@pytest.fixture(autouse=True)
def _seed():
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(state)


def tiny(name: str, **options) -> nn.Module:
    family, sizes = TINY[name]
    return make_network(family, **sizes | options)


def images(count: int = 2, *, size: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


# --- Parameter counts, from the papers' tables of layers --------------------------------------------------------------


def conv(before: int, after: int, *, taps: int = 9, bias: bool = True) -> int:
    return taps * before * after + bias * after


def count_vgg19(batch_norm: bool) -> int:
    widths = [64, 64, 128, 128, *[256] * 4, *[512] * 8]
    convolutions = sum(conv(a, b) for a, b in pairwise([3, *widths]))
    return convolutions + batch_norm * 2 * sum(widths) + (512 * 10 + 10)


def count_resnet(depth: int, batch_norm: bool) -> int:
    n = (depth - 2) // 6
    widths = [16, *[16] * 2 * n, *[32] * 2 * n, *[64] * 2 * n]
    convolutions = sum(conv(a, b, bias=not batch_norm) for a, b in pairwise([3, *widths]))
    # A normalisation a convolution, and one on the old channels (16, then 32) of each shortcut that changes shape.
    return convolutions + batch_norm * 2 * (sum(widths) + 16 + 32) + (64 * 10 + 10)


def count_wrn(depth: int, widen: int, batch_norm: bool) -> int:
    n = (depth - 4) // 6
    ends = [16, *(16 * widen * 2**stage for stage in range(3))]
    total = conv(3, 16) + (ends[-1] * 10 + 10) + batch_norm * 2 * ends[-1]
    for before, after in pairwise(ends):
        total += conv(before, after) + (2 * n - 1) * conv(after, after) + conv(before, after, taps=1)
        total += batch_norm * 2 * (before + (2 * n - 1) * after)
    return total


def count_densenet(depth: int, growth: int, batch_norm: bool) -> int:
    n = (depth - 4) // 6
    channels = 2 * growth
    total = conv(3, channels, bias=not batch_norm)
    for block in range(3):
        if block:  # a transition halves the channels
            total += batch_norm * 2 * channels + conv(channels, channels // 2, taps=1, bias=not batch_norm)
            channels //= 2
        for _ in range(n):
            total += conv(channels, 4 * growth, taps=1, bias=not batch_norm)
            total += conv(4 * growth, growth, bias=not batch_norm) + batch_norm * 2 * (channels + 4 * growth)
            channels += growth
    return total + batch_norm * 2 * channels + channels * 10 + 10


COUNTS = [
    ("vgg19", count_vgg19, (), 20.03, 20.04),
    ("resnet20", count_resnet, (20,), 0.27, 0.27),
    ("resnet56", count_resnet, (56,), 0.85, 0.85),
    ("resnet110", count_resnet, (110,), 1.72, 1.73),
    ("wrn-28-10", count_wrn, (28, 10), 36.47, 36.49),
    ("densenet100", count_densenet, (100, 12), 0.75, 0.77),
]


@pytest.mark.parametrize(("name", "count", "sizes", "plain", "normalised"), COUNTS, ids=[row[0] for row in COUNTS])
def test_parameter_counts(name, count, sizes, plain, normalised):
    for batch_norm, millions in ((False, plain), (True, normalised)):
        with torch.device("meta"):
            network = make_network(name, batch_norm=batch_norm)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        assert parameters == count(*sizes, batch_norm)
        assert round(parameters / 1e6, 2) == millions


@pytest.mark.parametrize(("batch_norm", "blocks"), [(False, 110), (True, 221)])
def test_resnet110_has_the_released_number_of_scalable_tensors(batch_norm, blocks):
    # 109 convolutions and the classifier; with normalisation 109 gains and 2 of the shortcuts. Zeros cannot be scaled.
    network = make_network("resnet110", batch_norm=batch_norm)
    assert sum(bool(parameter.norm() > 0) for parameter in network.parameters()) == blocks


def test_skips_and_scalars_cost_what_they_should():
    def size(**options) -> int:
        return sum(parameter.numel() for parameter in ResNet(20, **options).parameters())

    plain = size()
    assert size(skip=False) == plain
    assert size(branch="skipinit") == plain + 9  # one α a branch
    # Fixup: no biases of convolutions (16 + 6·16 + 6·32 + 6·64); 4 biases and a multiplier a block; 3 biases outside.
    assert size(branch="fixup") == plain - 688 + 9 * 5 + 3
    assert size(num_classes=100) == plain + 90 * 65


# --- Forward and backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch_norm"), [*((name, False) for name in TINY), *((name, True) for name in NORMALISED)]
)
def test_forward_and_backward(name, batch_norm):
    network = tiny(name, num_classes=7, batch_norm=batch_norm, activation="gelu")
    x = images()
    before = x.clone()
    logits = network(x)
    assert logits.shape == (2, 7)
    cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", TINY)
def test_per_example_gradients_equal_a_loop(name):
    network = tiny(name, **SMOOTH)
    params = {key: p.detach() for key, p in network.named_parameters()}
    x, y = images(), torch.tensor([3, 5])

    def loss(theta, x, y):
        return cross_entropy(functional_call(network, theta, (x[None],)), y[None])

    together = vmap(grad(loss), (None, 0, 0))(params, x, y)
    for i in range(2):
        alone = torch.autograd.grad(cross_entropy(network(x[i : i + 1]), y[i : i + 1]), list(network.parameters()))
        for got, expected in zip(together.values(), alone, strict=True):
            assert_close(got[i], expected)


# As pyproject.toml has it for a DeprecationWarning, which newer versions of torch call a FutureWarning.
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", TINY)
def test_forward_mode_hessian_vector_product_equals_reverse_mode(name):
    network = tiny(name, **SMOOTH)
    params = {key: p.detach() for key, p in network.named_parameters()}
    vector = {key: torch.randn(p.shape) for key, p in params.items()}
    x, y = images(size=32 if name == "vgg" else 16), torch.tensor([3, 5])

    def loss(theta):
        return cross_entropy(functional_call(network, theta, (x,)), y)

    forward = jvp(grad(loss), (params,), (vector,))[1]
    backward = grad(lambda theta: sum((g * vector[key]).sum() for key, g in grad(loss)(theta).items()))(params)
    assert_close(forward, backward)


# --- Details of the papers and the released code ----------------------------------------------------------------------


def test_plain_net_layout():
    network = PlainNet(9, 4, stages=3, stem_stride=2)
    convolutions = [layer for layer in network.features if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [4, 4, 4, 8, 8, 8, 16, 16]
    assert [layer.stride[0] for layer in convolutions] == [2, 1, 1, 2, 1, 1, 2, 1]
    assert network.features(images()).shape == (2, 16, 4, 4)


@pytest.mark.parametrize("block", [BasicBlock, SkipInitBlock, FixupBlock])
def test_shortcut_subsamples_and_appends_zero_channels(block):
    layer = block(4, 6, 2, activation="identity", batch_norm=False, skip=True)
    for parameter in layer.conv2.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(2, 4, 6, 6)
    out = layer(x)
    assert torch.equal(out[:, :4], nn.functional.avg_pool2d(x, 1, stride=2))
    assert torch.equal(out[:, 4:], torch.zeros(2, 2, 3, 3))


def test_normalised_shortcut_leaves_its_zero_channels_zero():
    layer = BasicBlock(4, 6, 2, activation="identity", batch_norm=True, skip=True)
    nn.init.zeros_(layer.norm2.weight)
    nn.init.ones_(layer.shortcut_norm.bias)
    out = layer(torch.randn(5, 4, 6, 6))
    # Batch normalisation with gain 1 and shift 1 on the 4 old channels.
    assert_close(out[:, :4].mean((0, 2, 3)), torch.ones(4))
    assert torch.equal(out[:, 4:], torch.zeros(5, 2, 3, 3))
    assert isinstance(BasicBlock(4, 4, 1, activation="relu", batch_norm=True, skip=True).shortcut_norm, nn.Identity)


def test_skipinit_is_the_shortcut_at_first_and_the_residual_block_at_one():
    layer = SkipInitBlock(4, 4, 1, activation="tanh", batch_norm=False, skip=True)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(layer(x), x.tanh())
    nn.init.ones_(layer.alpha)
    assert_close(layer(x), BasicBlock.forward(layer, x))
    assert_close(layer(x), (layer.conv2(layer.conv1(x).tanh()) + x).tanh())


def test_fixup_block_by_hand():
    layer = FixupBlock(4, 4, 1, activation="tanh", batch_norm=False, skip=True)
    a, b, c, d = 0.3, -0.7, 1.1, -0.2
    biases = (layer.bias_conv1, layer.bias_activation1, layer.bias_conv2, layer.bias_activation2)
    for layer_bias, value in zip(biases, (a, b, c, d), strict=True):
        nn.init.constant_(layer_bias.bias, value)
    nn.init.constant_(layer.scale, 0.5)
    x = torch.randn(2, 4, 6, 6)
    hidden = (layer.conv1(x + a) + b).tanh()
    assert_close(layer(x), (0.5 * layer.conv2(hidden + c) + x + d).tanh())


def test_wide_block_is_preactivated_and_its_second_convolution_strides():
    layer = WideBlock(4, 6, 2, activation="tanh", batch_norm=False, skip=True)
    assert (layer.conv1.stride, layer.conv2.stride) == ((1, 1), (2, 2))
    x = torch.randn(2, 4, 6, 6)
    assert_close(layer(x), layer.conv2(layer.conv1(x.tanh()).tanh()) + layer.shortcut(x))
    without = WideBlock(4, 6, 2, activation="tanh", batch_norm=False, skip=False)
    assert_close(without(x), without.conv2(without.conv1(x.tanh()).tanh()))


def test_wrn_normalisation_momenta():
    network = make_network("wrn-10-1", batch_norm=True)
    momenta = {name: m.momentum for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert momenta.pop("norm") == 0.9
    assert set(momenta.values()) == {0.1}


def test_densenet_appends_its_preactivated_bottlenecks():
    layer = Bottleneck(5, 3, activation="tanh", batch_norm=False)
    x = torch.randn(2, 5, 6, 6)
    out = layer(x)
    assert torch.equal(out[:, :5], x)
    assert_close(out[:, 5:], layer.conv2(layer.conv1(x.tanh()).tanh()))
    assert (layer.conv1.out_channels, layer.conv1.kernel_size, layer.conv2.kernel_size) == (12, (1, 1), (3, 3))
    transition = Transition(5, 3, activation="tanh", batch_norm=False)
    assert_close(transition(x), nn.functional.avg_pool2d(transition.conv(x.tanh()), 2))


def test_densenet_channels():
    with torch.device("meta"):
        network = make_network("densenet100")
        # 10 in the stem, 3·5 more a block, rounded down in between: 25 → 7, 22 → 6, 21
        assert make_network("densenet-22-5", compression=0.3).classifier.in_features == 21
    # 24 in the stem, 16·12 more a block, half of them kept in between: 216 → 108, 300 → 150, 342
    assert [layer.conv.out_channels for layer in network.features if isinstance(layer, Transition)] == [108, 150]
    assert sum(isinstance(layer, Bottleneck) for layer in network.features) == 48
    assert network.classifier.in_features == 342


def stds_close(weight: torch.Tensor, std: float) -> bool:
    # The standard error of a normal sample's standard deviation is σ/√(2n).
    return abs(weight.std().item() / std - 1) < 5 / math.sqrt(2 * weight.numel())


@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
@pytest.mark.parametrize(
    ("name", "fan"), [("plain-5-12", "in"), ("vgg-11", "out"), ("resnet-8", "out"), ("densenet-16-8", "out")]
)
def test_default_weights(name, fan, activation):
    network = make_network(name, activation=activation)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            channels = layer.in_channels if fan == "in" else layer.out_channels
            taps = layer.weight[0, 0].numel()
            assert stds_close(layer.weight, gain_of(activation) / math.sqrt(taps * channels))
            assert not layer.bias.any()
    assert not network.classifier.bias.any()
    if name == "vgg-11":
        assert stds_close(network.classifier.weight, 0.01)


def test_wrn_keeps_torchs_default_weights_and_no_convolution_bias():
    network = make_network("wrn-10-2")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.98 * bound < layer.weight.abs().max() <= bound
            assert not layer.bias.any()
    assert network.classifier.bias.all()


# --- Names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_out_of_place_and_elementwise(name):
    x = torch.linspace(-3, 3, 12).reshape(3, 4)
    before = x.clone()
    y = make_activation(name)(x)
    assert torch.equal(x, before)
    assert_close(y[1:, ::2], make_activation(name)(x[1:, ::2]))


def test_activation_names():
    assert isinstance(make_activation("SiLU"), nn.SiLU)
    with pytest.raises(ValueError, match=r"make_activation: `name` must be one of .*relu.*, got 'rellu'"):
        make_activation("rellu")


def test_every_listed_name_builds():
    with torch.device("meta"):
        for name in NETWORKS:
            assert isinstance(make_network(name, num_classes=3), nn.Module)


def test_names_with_sizes():
    with torch.device("meta"):
        assert make_network("densenet-40-24").features[0].out_channels == 48
        wide = make_network("wrn-28-10")
        assert len(wide.blocks) == 12
        assert wide.classifier.in_features == 640
        assert len(make_network("resnet-32").blocks) == 15
        assert len(make_network("resnet56").blocks) == 27
        assert make_network("plain-20-32").classifier.in_features == 128
        assert make_network("plain-20", width=4).classifier.in_features == 16
        assert make_network("vgg16", width=8).classifier.in_features == 64


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, r"make_network: `name` must be one of plain, .*wrn-28-10.*, got 'resnet'"),
        ("resnet-21", {}, r"ResNet: `depth` must be 6n \+ 2 with n ≥ 1, got 21"),
        ("resnet20", {"branch": "rezero"}, r"ResNet: `branch` must be one of plain, skipinit, fixup, got 'rezero'"),
        ("resnet20", {"branch": "fixup", "skip": False}, r"ResNet: `branch='fixup'` needs shortcuts, got skip=False"),
        ("resnet20", {"branch": "skipinit", "batch_norm": True}, r"ResNet: .* replaces normalisation, got batch_norm"),
        ("wrn-27-1", {}, r"WideResNet: `depth` must be 6n \+ 4 with n ≥ 1, got 27"),
        ("wrn-16-0", {}, r"WideResNet: `widen` must be at least 1, got 0"),
        ("densenet-99-12", {}, r"DenseNet: `depth` must be 6n \+ 4 with n ≥ 1, got 99"),
        ("densenet-10-0", {}, r"DenseNet: `growth` must be at least 1 and .* got 0 and 0.5"),
        ("densenet100", {"compression": 0.0}, r"DenseNet: .* `compression` in \(0, 1\], got 12 and 0.0"),
        ("vgg-12", {}, r"VGG: `depth` must be one of 11, 13, 16, 19, got 12"),
        ("plain", {"depth": 1}, r"PlainNet: `depth` must be at least 2 and `stages` at least 1, got 1 and 3"),
    ],
)
def test_wrong_names_and_sizes(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_network(name, **options)


def test_the_shallowest_plain_network_has_as_many_stages_as_convolutions():
    model = make_network("plain-2-4")
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 4] == [(4, 3, 3, 3)]
    assert model(torch.zeros(2, 3, 8, 8, dtype=next(model.parameters()).dtype)).shape == (2, 10)
