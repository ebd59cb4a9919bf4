"""The baselines against their formulas: every check takes the initialiser, and every listed mutant fails one."""

import inspect
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.testing import assert_close

from common import initializers
from common.initializers import INITIALIZERS, fixup_, gain_of, kaiming_, lsuv_, weight_layers
from common.networks import Transformer, make_network


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def zoo() -> nn.Sequential:
    """One of everything that is a weight layer or a normalisation; no weight square."""
    return nn.Sequential(
        nn.Conv2d(8, 24, 3, padding=1),
        nn.BatchNorm2d(24),
        nn.Conv2d(24, 12, 3, groups=2),
        nn.ConvTranspose2d(12, 30, 2),
        nn.LayerNorm(5),
        nn.Linear(40, 100),
        nn.LSTM(20, 30),
        nn.MultiheadAttention(36, 2),
    )


# out, in, taps of the matrices each tensor of the zoo stacks, written by hand
SHAPES = {
    "0.weight": (24, 8, 9),
    "2.weight": (6, 12, 9),
    "3.weight": (30, 12, 4),
    "5.weight": (100, 40, 1),
    "6.weight_ih_l0": (30, 20, 1),
    "6.weight_hh_l0": (30, 30, 1),
    "7.in_proj_weight": (36, 36, 1),
    "7.out_proj.weight": (36, 36, 1),
}


def assert_moments(name: str, W: torch.Tensor, std: float, *, uniform: bool = False) -> None:
    """Mean 0 and the standard deviation, within five standard errors; a uniform law also within its bound."""
    n = W.numel()
    kurtosis = 1.8 if uniform else 3.0
    assert abs(W.mean().item()) < 5 * std / math.sqrt(n), name
    assert abs(W.std().item() / std - 1) < 5 * math.sqrt((kurtosis - 1) / (4 * n)), name
    largest = W.abs().max().item() / std
    if uniform:
        assert 0.98 * math.sqrt(3) < largest <= math.sqrt(3) * (1 + 1e-12), name
    else:
        assert largest > 2, name


def check_variance(initialise, std_of, *, uniform: bool = False) -> None:
    model = zoo()
    initialise(model, generator=seeded())
    for name, W, _ in weight_layers(model):
        out, into, taps = SHAPES[name]
        assert_moments(name, W, std_of(into * taps, out * taps), uniform=uniform)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
    assert torch.equal(model[1].weight, torch.ones(24))
    assert torch.equal(model[4].weight, torch.ones(5))


# --- The checks -------------------------------------------------------------------------------------------------------


def xavier_std(fan_in, fan_out):
    return 1.5 * math.sqrt(2 / (fan_in + fan_out))


def check_xavier(initialise):
    check_variance(partial(initialise, gain=1.5), xavier_std)


def check_xavier_uniform(initialise):
    check_variance(partial(initialise, gain=1.5, distribution="uniform"), xavier_std, uniform=True)


def check_kaiming(initialise):
    check_variance(initialise, lambda fan_in, fan_out: math.sqrt(2 / fan_in))


def check_kaiming_out(initialise):
    check_variance(partial(initialise, mode="fan_out"), lambda fan_in, fan_out: math.sqrt(2 / fan_out))


def check_kaiming_uniform_tanh(initialise):
    initialise = partial(initialise, distribution="uniform", nonlinearity="tanh")
    check_variance(initialise, lambda fan_in, fan_out: 1 / math.sqrt(fan_in), uniform=True)


def check_kaiming_norm(initialise):
    # ‖W‖²_F is a sum of out·fan_in squares of variance 2/fan_in: √(2·out), with a relative error of 1/√(2n).
    model = zoo()
    initialise(model, generator=seeded(1))
    for index, out in ((0, 24), (5, 100)):
        W = model[index].weight
        assert abs(W.norm().item() / math.sqrt(2 * out) - 1) < 5 / math.sqrt(2 * W.numel())


def check_torch_default(initialise):
    def build():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 5, 2), nn.Linear(40, 100), nn.Linear(7, 9))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        expected = build()
    model = build()
    initialise(model, generator=seeded(5))
    for got, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got, wanted)


def check_torch_default_of_stacked_layers(initialise):
    model = nn.ModuleList([nn.LSTM(20, 30), nn.MultiheadAttention(36, 2), nn.Embedding(200, 9, padding_idx=3)])
    initialise(model, generator=seeded())
    lstm, attention, embedding = model
    for name, parameter in lstm.named_parameters():
        assert_moments(name, parameter, 1 / math.sqrt(3 * 30), uniform=True)
    assert_moments("in_proj", attention.in_proj_weight, math.sqrt(2 / (36 + 108)), uniform=True)
    assert_moments("out_proj", attention.out_proj.weight, 1 / math.sqrt(3 * 36), uniform=True)
    assert not attention.in_proj_bias.any()
    assert not attention.out_proj.bias.any()
    assert not embedding.weight[3].any()
    assert_moments("embedding", embedding.weight[4:], 1.0)


def check_orthogonal(initialise):
    model = zoo()
    initialise(model, generator=seeded(), gain=1.5)
    assert not model[0].bias.any()
    matrices = [model[0].weight.flatten(1), model[5].weight, *model[2].weight.flatten(1).chunk(2)]
    matrices += [*model[6].weight_hh_l0.chunk(4), *model[7].in_proj_weight.chunk(3)]
    matrices.append(model[3].weight.transpose(0, 1).flatten(1))
    for W in matrices:
        gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
        assert_close(gram, 1.5**2 * torch.eye(len(gram)))


def check_haar(initialise):
    # Entries of a Haar matrix have mean 0 and variance 1/n; without the signs of R the diagonal is biased.
    layer, diagonal = nn.Linear(3, 3), []
    for seed in range(300):
        initialise(layer, generator=seeded(seed))
        diagonal.append(layer.weight.diagonal().clone())
    assert (torch.stack(diagonal).mean(0).abs() < 5 * math.sqrt(1 / 3 / 300)).all()


def check_deep_linear_isometry(initialise):
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(50)))
    initialise(model, generator=seeded())
    x = randn(5, 12)
    assert_close(model(x).norm(dim=1), x.norm(dim=1))


def check_delta_isometry(initialise):
    # Pointwise and with orthonormal columns, every pixel's norm is kept at every size and zero padding, up to the gain.
    for size in (1, 3, 5):
        conv = nn.Conv2d(4, 7, size, padding=size // 2)
        initialise(conv, generator=seeded(), gain=math.sqrt(2))
        x = randn(2, 4, 6, 6)
        assert_close(conv(x).norm(dim=1), math.sqrt(2) * x.norm(dim=1))
    linear = nn.Linear(4, 7)
    initialise(linear, generator=seeded(), gain=math.sqrt(2))
    assert_close(linear.weight.T @ linear.weight, 2 * torch.eye(4))


def check_delta_norm(initialise):
    model = zoo()
    initialise(model, generator=seeded(), gain=3.0)
    # ‖K‖_F = γ√min(in, out), a group at a time
    assert_close(model[0].weight.norm(), torch.tensor(3 * math.sqrt(8)))
    assert_close(model[2].weight.norm(), torch.tensor(3 * math.sqrt(2 * 6)))
    assert_close(model[3].weight.norm(), torch.tensor(3 * math.sqrt(12)))
    assert model[0].weight[:, :, 1, 1].count_nonzero() == 24 * 8
    assert model[0].weight.count_nonzero() == 24 * 8


def outputs(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        weight.layer.register_forward_hook(lambda _, __, y, name=weight.name: seen.update({name: y.detach()}))
        for weight in weight_layers(model)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return seen


def check_lsuv(initialise, name: str = "plain-9-6"):
    model = make_network(name)
    x = 3 * randn(16, 3, 12, 12) + 1
    initialise(model, (x,), generator=seeded(), tolerance=1e-6)
    stds = {name: y.std(correction=0) for name, y in outputs(model, x).items()}
    assert len(stds) == len(weight_layers(model))
    for std in stds.values():
        assert_close(std, torch.tensor(1.0), rtol=1e-6, atol=0.0)
    # The directions are those of an orthonormal matrix.
    for _, W, _ in weight_layers(model):
        gram = W.flatten(1) @ W.flatten(1).T if len(W) <= W[0].numel() else W.flatten(1).T @ W.flatten(1)
        assert_close(gram, gram[0, 0] * torch.eye(len(gram)))


def check_lsuv_tolerance(initialise):
    # White inputs of standard deviation √v keep it under an orthonormal layer: within 0.1 of 1 it is left alone.
    white = torch.linalg.qr(randn(64, 6) - randn(64, 6).mean(0)).Q * math.sqrt(64)
    for std, expected in ((1.08, 1.08), (0.92, 0.92), (1.2, 1.0), (0.8, 1.0)):
        layer = nn.Linear(6, 6)
        initialise(layer, (std * white,), generator=seeded(), tolerance=0.1)
        assert_close(layer(std * white).std(correction=0), torch.tensor(expected))


def check_lsuv_of_residual_network(initialise):
    check_lsuv(initialise, "resnet-8")


def check_fixup(initialise):
    model = make_network("resnet-20", branch="fixup", width=24)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.7)
    initialise(model, generator=seeded())
    L = 9  # branches of ResNet-20, of m = 2 layers each: L^(-1/(2m-2)) = 9^(-1/2) = 1/3
    assert_moments("stem", model.stem[1].weight, math.sqrt(2 / (9 * 24)))
    for block in model.blocks:
        assert_moments("conv1", block.conv1.weight, math.sqrt(2 / (9 * block.conv1.out_channels)) / math.sqrt(L))
        assert not block.conv2.weight.any()
        assert block.scale.item() == 1
        assert block.bias_conv1.bias.item() == block.bias_activation2.bias.item() == 0
    assert not model.classifier.weight.any()
    assert not model.bias_classifier.bias.any()
    assert not model(randn(2, 3, 8, 8)).any()


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(40, 50), nn.Linear(50, 60), nn.Linear(60, 40)])

    def branch_layers(self):
        return list(self.layers)


def check_fixup_gain(initialise):
    drawn = []
    for nonlinearity in ("relu", "tanh"):
        model = make_network("resnet-8", branch="fixup", width=4)
        initialise(model, nonlinearity=nonlinearity, generator=torch.Generator().manual_seed(0))
        drawn.append([weight.tensor.detach() for weight in weight_layers(model)])
    ratio = gain_of("tanh") / gain_of("relu")
    assert_close(drawn[1], [ratio * leaf for leaf in drawn[0]], rtol=1e-6, atol=0)


def check_fixup_of_three_layers(initialise):
    model = nn.Sequential(*(Bottleneck() for _ in range(16)), nn.Linear(40, 5))
    initialise(model, generator=seeded())
    # m = 3: L^(-1/4) = 16^(-1/4) = 1/2
    assert_moments("first", model[3].layers[0].weight, math.sqrt(2 / 50) / 2)
    assert_moments("second", model[3].layers[1].weight, math.sqrt(2 / 60) / 2)
    assert not model[3].layers[2].weight.any()


def translator(**options) -> Transformer:
    sizes = {"dim": 96, "feedforward": 120, "encoder_layers": 6, "decoder_layers": 4, "padding": 5, "max_length": 9}
    return Transformer(400, **sizes | options)


def laws(model: Transformer, side: str) -> dict[str, torch.Tensor]:
    """All entries of one side's tensors of one role, such as "fc1.weight", those of both attentions together."""
    roles: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith(f"{side}.layers"):
            roles.setdefault(".".join(name.split(".")[-2:]), []).append(parameter.flatten())
    return {role: torch.cat(entries) for role, entries in roles.items()}


def as_built(model, *, generator):
    """The constructor's own start."""


def check_transformer(initialise):
    model = translator(norm="pre")
    if initialise is not as_built:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.7)
    initialise(model, generator=seeded())
    for side in ("encoder", "decoder"):
        embedding = getattr(model, side).embedding.weight
        assert not embedding[5].any()
        assert_moments(side, embedding[6:], 1 / math.sqrt(96))
        for role, W in laws(model, side).items():
            module, _, kind = role.partition(".")
            if module in {"q_proj", "k_proj", "v_proj"} and kind == "weight":
                assert_moments(role, W, math.sqrt(2 / (96 + 96)) / math.sqrt(2), uniform=True)
            elif role == "out_proj.weight":
                assert_moments(role, W, math.sqrt(2 / (96 + 96)), uniform=True)
            elif "norm" in module:
                assert ((W == 1) if kind == "weight" else (W == 0)).all()
            elif role == "out_proj.bias":
                assert not W.any()
            else:  # U(±1/√fan_in): biases, and the feedforward's weights
                assert_moments(role, W, 1 / math.sqrt(3 * (120 if module == "fc2" else 96)), uniform=True)


def check_tfixup(initialise):
    model = translator(norm="none")
    initialise(model, generator=seeded())
    # N_e = 6 and N_d = 4
    factors = {"encoder": 0.67 / 6**0.25, "decoder": 1 / 36**0.25}
    for side, embedding_factor in (("encoder", 1 / 54**0.25), ("decoder", 1 / 36**0.25)):
        embedding = getattr(model, side).embedding.weight
        assert not embedding[5].any()
        assert_moments(side, embedding[6:], embedding_factor / math.sqrt(96))
        for role, W in laws(model, side).items():
            module, _, kind = role.partition(".")
            if kind == "bias":
                assert not W.any(), role
            else:
                factor = 1.0 if module in {"q_proj", "k_proj"} else factors[side]
                fans = 96 + 120 if module in {"fc1", "fc2"} else 96 + 96
                assert_moments(role, W, factor * math.sqrt(2 / fans), uniform=True)


def check_normal(initialise):
    check_variance(partial(initialise, std=0.2), lambda fan_in, fan_out: 0.2)
    embedding = nn.Embedding(300, 7)
    initialise(embedding, std=0.2, generator=seeded())
    assert_moments("embedding", embedding.weight, 0.2)


def check_uniform(initialise):
    check_variance(partial(initialise, bound=0.2), lambda fan_in, fan_out: 0.2 / math.sqrt(3), uniform=True)


def check_gain(gain):
    assert_close(gain("relu"), math.sqrt(2))
    assert_close(gain("leaky_relu"), math.sqrt(2 / (1 + 0.01**2)), rtol=1e-7, atol=0)
    assert_close(gain("selu"), 1.0)
    assert gain("identity") == gain("tanh") == 1.0
    # Monte Carlo of E[φ(z)²] with 4e5 samples
    z = randn(400_000)
    for name, phi in (("gelu", nn.functional.gelu), ("silu", nn.functional.silu), ("elu", nn.functional.elu)):
        assert_close(gain(name) ** -2, phi(z).square().mean().item(), rtol=0.02, atol=0)


CHECKS = {
    "xavier": [check_xavier, check_xavier_uniform],
    "kaiming": [check_kaiming, check_kaiming_out, check_kaiming_uniform_tanh, check_kaiming_norm],
    "torch_default": [check_torch_default, check_torch_default_of_stacked_layers],
    "orthogonal": [check_orthogonal, check_haar, check_deep_linear_isometry],
    "delta_orthogonal": [check_delta_isometry, check_delta_norm],
    "lsuv": [check_lsuv, check_lsuv_tolerance, check_lsuv_of_residual_network],
    "fixup": [check_fixup, check_fixup_of_three_layers, check_fixup_gain],
    "transformer": [check_transformer],
    "tfixup": [check_tfixup],
    "normal": [check_normal],
    "uniform": [check_uniform],
    "gain": [check_gain],
}
SUBJECTS = INITIALIZERS | {"gain": gain_of}


@pytest.mark.parametrize("mode", ["fan_in", "fan_out"])
def test_kaiming_is_torchs_on_an_ordinary_convolution(mode):
    layer = nn.Conv2d(5, 7, 3)
    kaiming_(layer, generator=seeded(), mode=mode)
    expected = torch.empty(7, 5, 3, 3)
    nn.init.kaiming_normal_(expected, mode=mode, nonlinearity="relu", generator=seeded())
    assert_close(layer.weight, expected)


def test_a_transformer_is_built_as_its_rule_says():
    check_transformer(as_built)


@pytest.mark.parametrize(("name", "check"), [(name, check) for name, checks in CHECKS.items() for check in checks])
def test_formula(name, check):
    check(SUBJECTS[name])


# --- The mutants ------------------------------------------------------------------------------------------------------

SOURCE = inspect.getsource(initializers)
LAYERS = inspect.getsource(inspect.getmodule(gain_of))

# What is wrong · in which initialiser · the line · the line as a slip of the pen would have it
MUTANTS = [
    ("fan_out for fan_in", "kaiming", 'if mode == "fan_in"', 'if mode == "fan_out"'),
    ("both fans of the wrong side", "kaiming", "return W.shape[1] * taps, W.shape[0] * taps", "return W.shape[:2]"),
    ("fan without its taps", "kaiming", "taps = math.prod(W.shape[2:])", "taps = 1"),
    ("no gain", "kaiming", "std = gamma /", "std = 1 /"),
    ("gain squared", "kaiming", "std = gamma /", "std = gamma**2 /"),
    ("variance for std", "kaiming", "std = gamma / math.sqrt(", "std = gamma / ("),
    ("bound for std", "kaiming", "-math.sqrt(3) * std, math.sqrt(3) * std", "-std, std"),
    ("one-sided", "kaiming", "-math.sqrt(3) * std, math", "0.0, math"),
    ("groups ignored", "kaiming", "return tensor.chunk(layer.groups)", "return (tensor.transpose(0, 1),)"),
    ("transposed the wrong way", "kaiming", "group.transpose(0, 1) for", "group for"),
    ("gains of norms forgotten", "kaiming", "yield parameter, 1.0", "yield parameter, 0.0"),
    ("gain twice", "xavier", "draw(W, gain=gain, gen", "draw(W, gain=gain**2, gen"),
    ("gain lost", "xavier", "draw(W, gain=gain, gen", "draw(W, gen"),
    (
        "laws exchanged",
        "xavier",
        'if distribution == "normal" else nn.init.xav',
        'if distribution != "normal" else nn.init.xav',
    ),
    ("attention stacked", "xavier", "return tensor.chunk(3)", "return (tensor,)"),
    ("gates stacked", "xavier", "tensor.chunk(max(1, tensor.shape[0] // int(layer.hidden_size)))", "(tensor,)"),
    ("He's rule", "torch_default", "a=math.sqrt(5)", "a=0"),
    ("a = 5", "torch_default", "a=math.sqrt(5)", "a=5"),
    ("biases 0", "torch_default", "draw(bias, uniform)", "draw(bias, nn.init.zeros_)"),
    ("biases of fan_out", "torch_default", "else _fans(W)[0]", "else _fans(W)[1]"),
    ("hidden forgotten", "torch_default", "fan = int(layer.hidden_size) if", "fan = _fans(W)[0] if"),
    ("padding row drawn", "torch_default", "_clear_padding(pending[W], layer)", "pass"),
    ("attention's biases drawn", "torch_default", "if not isinstance(layer, ZERO_BIAS)", "if True"),
    (
        "gain lost",
        "orthogonal",
        "nn.init.orthogonal_(W, gain=gain, generator=generator)\n\n\n# --- Variance rules",
        "nn.init.orthogonal_(W, generator=generator)\n\n\n# --- Variance rules",
    ),
    (
        "merely Gaussian",
        "orthogonal",
        "W, _: nn.init.orthogonal_(W, gain=gain,",
        "W, _: nn.init.xavier_normal_(W, gain=gain,",
    ),
    (
        "signs of R forgotten",
        "orthogonal",
        "gain=gain, generator=generator)\n\n\n# --- Variance rules",
        "gain=gain, generator=generator).mul_(W.flatten()[0].sign())\n\n\n# --- Variance rules",
    ),
    ("tap off centre", "delta_orthogonal", "size // 2 for", "(size - 1) // 4 for"),
    ("gain lost", "delta_orthogonal", "W.shape[:2]), gain=gain, gen", "W.shape[:2]), gen"),
    ("not sparse", "delta_orthogonal", "        W.zero_()\n", "        W.fill_(0.01)\n"),
    (
        "every tap",
        "delta_orthogonal",
        "W[(..., *(size // 2 for size in W.shape[2:]))] = Q",
        "W.copy_(Q.T.reshape(Q.T.shape + (1,) * (W.ndim - 2)).transpose(0, 1))",
    ),
    ("variance for std", "lsuv", "output.var(correction=0).sqrt()", "output.var(correction=0)"),
    ("second moment", "lsuv", "output.var(correction=0).sqrt()", "output.square().mean().sqrt()"),
    ("per channel", "lsuv", "output.var(correction=0).sqrt()", "output.var(0, correction=0).mean().sqrt()"),
    ("multiplied", "lsuv", ".tensor.div_(std)", ".tensor.mul_(std)"),
    ("divided by the root", "lsuv", ".tensor.div_(std)", ".tensor.div_(math.sqrt(std)); break"),
    ("no tolerance", "lsuv", "abs(std - 1) <= tolerance", "abs(std - 1) <= 0"),
    ("tolerance of the variance", "lsuv", "abs(std - 1) <= tolerance", "abs(std**2 - 1) <= tolerance"),
    ("backwards", "lsuv", "    return list(called)", "    return list(called)[::-1]"),
    (
        "Gaussian at first",
        "lsuv",
        '"lsuv_", model, _orthogonal(1.0, generator)',
        '"lsuv_", model, _normal(0.1, generator)',
    ),
    ("1/(2m)", "fixup", "(2 * len(layers) - 2)", "(2 * len(layers))"),
    ("1/(m - 1)", "fixup", "(2 * len(layers) - 2)", "(len(layers) - 1)"),
    ("gain of ReLU", "fixup", "gamma = gain_of(nonlinearity)\n    L = ", 'gamma = gain_of("relu")\n    L = '),
    ("always L^(-1/2)", "fixup", "(2 * len(layers) - 2)", "2"),
    ("depth ignored", "fixup", "factor.get(layer, 1.0)", "1.0"),
    ("factor on the stem", "fixup", "factor.get(layer, 1.0)", "factor.get(layer, 1 / 3)"),
    ("fan_in", "fixup", "math.sqrt(_fans(W)[1])", "math.sqrt(_fans(W)[0])"),
    ("classifier not 0", "fixup", "zero = {linear[-1], *", "zero = {*"),
    ("first layers 0", "fixup", "*(layers[-1] for", "*(layers[0] for"),
    ("multiplier 0", "fixup", '"scale", 1.0', '"scale", 0.0'),
    ("scalar biases kept", "fixup", ', *_scalars(model, "bias", 0.0)', ""),
    ("gain 1", "transformer", "part.v_proj), 1 / math.sqrt(2))", "part.v_proj), 1.0)"),
    ("gain 1/2", "transformer", "part.v_proj), 1 / math.sqrt(2))", "part.v_proj), 1 / 2)"),
    ("attention all alike", "transformer", "{part.out_proj: 1.0}", "{part.out_proj: 1 / math.sqrt(2)}"),
    ("value forgotten", "transformer", "(part.q_proj, part.k_proj, part.v_proj)", "(part.q_proj, part.k_proj)"),
    ("feedforward Xavier", "transformer", "if layer in gains:", "if gains.setdefault(layer, 0.9):"),
    ("biases 0", "transformer", "nn.init.uniform_(new, -bound", "nn.init.uniform_(new * 0, 0 * -bound"),
    ("biases one-sided", "transformer", "nn.init.uniform_(new, -bound", "nn.init.uniform_(new, 0.0"),
    ("biases of fan_out", "transformer", "math.sqrt(layer.in_features)", "math.sqrt(layer.out_features)"),
    ("every bias drawn", "transformer", " and gains.get(layer) != 1.0", ""),
    ("padding row drawn", "transformer", "W[model.padding] = 0.0", "pass"),
    ("embeddings N(0, 1)", "transformer", " else source) / math.sqrt(model.dim)", " else source)"),
    ("variance for std", "transformer", "/ math.sqrt(model.dim)", "/ model.dim"),
    (
        "torch's embedding",
        "transformer",
        "generator=generator, embedding_rule=fill)",
        "generator=generator)",
    ),
    ("0.67 lost", "tfixup", "0.67 * N_e**-0.25", "N_e**-0.25"),
    ("root for fourth root, encoder", "tfixup", "0.67 * N_e**-0.25", "0.67 * N_e**-0.5"),
    ("root for fourth root, decoder", "tfixup", "(9 * N_d) ** -0.25)):", "(9 * N_d) ** -0.5)):"),
    ("9 lost", "tfixup", "(9 * N_d) ** -0.25)):", "N_d ** -0.25)):"),
    ("depths exchanged", "tfixup", "N_e, N_d = len", "N_d, N_e = len"),
    ("value unscaled", "tfixup", "{part.v_proj: value, part.out", "{part.out"),
    ("output unscaled", "tfixup", ", part.out_proj: value}", "}"),
    ("query scaled", "tfixup", "{part.v_proj: value,", "{part.q_proj: value, part.v_proj: value,"),
    ("fc1 unscaled", "tfixup", "{part.fc1: value, part", "{part"),
    ("fc2 unscaled", "tfixup", ", part.fc2: value}", "}"),
    ("source unscaled", "tfixup", "source=(9 * N_e) ** -0.25, ", ""),
    ("target unscaled", "tfixup", ", target=(9 * N_d) ** -0.25", ""),
    ("gain lost", "tfixup", "gain=factor.get(layer, 1.0)", "gain=1.0"),
    ("padding row drawn", "tfixup", "W[model.padding] = 0.0", "pass"),
    ("variance for std", "normal", "_normal(std, generator)", "_normal(std**2, generator)"),
    (
        "embeddings forgotten",
        "normal",
        "rule = _normal(std, generator)",
        "rule = _normal(std, generator); rule = None if isinstance(model, nn.Embedding) else rule",
    ),
    ("std for bound", "uniform", "uniform_(W, -bound, bound", "uniform_(W, -bound * 3**0.5, bound * 3**0.5"),
    ("one-sided", "uniform", "uniform_(W, -bound, bound", "uniform_(W, 0.0, bound"),
    ("no root", "gain", ", z).rsqrt()", ", z).reciprocal()"),
    ("first moment", "gain", "phi(z) ** 2", "phi(z)"),
    ("torch's tanh", "gain", '"tanh": 1.0', '"tanh": 5 / 3'),
    ("density too wide", "gain", "-(z**2) / 2)", "-(z**2))"),
]


def mutate(subject: str, line: str, slip: str):
    """The initialiser from the module's source with one line replaced."""
    source = LAYERS if subject == "gain" else SOURCE
    assert source.count(line) >= 1, f"the line is gone: {line}"
    namespace: dict = {"__name__": "mutant"}
    exec(compile(source.replace(line, slip), "mutant", "exec"), namespace)
    return namespace["gain_of"] if subject == "gain" else namespace["INITIALIZERS"][subject]


def fails(check, subject) -> bool:
    try:
        check(subject)
    except (AssertionError, ValueError):  # a mutant may also run into the initialiser's own complaint
        return True
    return False


@pytest.mark.parametrize(
    ("subject", "line", "slip"), [row[1:] for row in MUTANTS], ids=[f"{row[1]}: {row[0]}" for row in MUTANTS]
)
def test_every_mutant_is_caught(subject, line, slip):
    mutant = mutate(subject, line, slip)
    assert any(fails(check, mutant) for check in CHECKS[subject])


# --- What all of them share -------------------------------------------------------------------------------------------


def subject_of(name: str) -> tuple[nn.Module, partial]:
    """A model the initialiser applies to, and the initialiser short of its generator."""
    initialise = INITIALIZERS[name]
    if name == "lsuv":
        return make_network("plain-4-3", batch_norm=True).train(), partial(initialise, batch=(randn(4, 3, 8, 8),))
    if name in {"fixup", "skipinit"}:
        return make_network("resnet-8", width=3, branch=name), initialise
    if name in {"transformer", "tfixup"}:
        return translator(dim=8, feedforward=12, norm="none"), initialise
    model = zoo()
    if name == "rezero":
        model.resweight = nn.Parameter(torch.ones(1))
    return model, initialise


@given(seed=st.integers(0, 2**31), other=st.integers(0, 2**31), name=st.sampled_from(sorted(INITIALIZERS)))
def test_a_function_of_the_generator_alone(seed, other, name):
    def run(global_seed: int) -> nn.Module:
        torch.manual_seed(global_seed)
        model, initialise = subject_of(name)
        objects = [id(parameter) for parameter in model.parameters()]
        buffers = [buffer.clone() for buffer in model.buffers()]
        modes = [module.training for module in model.modules()]
        state = torch.random.get_rng_state()
        initialise(model, generator=seeded(seed))
        assert torch.equal(state, torch.random.get_rng_state())
        assert objects == [id(parameter) for parameter in model.parameters()]
        assert all(map(torch.equal, buffers, model.buffers()))
        assert modes == [module.training for module in model.modules()]
        assert not any(module._forward_hooks for module in model.modules())
        return model

    with torch.random.fork_rng(devices=[]):
        first, second = run(other), run(other + 1)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.requires_grad
        assert a.grad_fn is None


@pytest.mark.parametrize("name", sorted(INITIALIZERS))
def test_another_seed_is_another_start(name):
    model, initialise = subject_of(name)
    initialise(model, generator=seeded(0))
    first = [W.clone() for _, W, _ in weight_layers(model)]
    initialise(model, generator=seeded(1))
    for old, (_, new, _) in zip(first, weight_layers(model), strict=True):
        assert not torch.equal(old, new) or not new.any()  # Fixup's zeros


def test_ties_are_drawn_once_and_kept():
    embedding, head = nn.Embedding(50, 20), nn.Linear(20, 50, bias=False)
    head.weight = embedding.weight
    model = nn.ModuleList([embedding, head])
    assert len(weight_layers(model)) == 1
    kaiming_(model, generator=seeded())
    assert embedding.weight is head.weight
    assert_moments("tied", head.weight, math.sqrt(2 / 20))  # the linear layer's rule
    before = head.weight.clone()
    initializers.scale_weights_(model, 2.0)
    assert_close(head.weight, 2 * before)


def test_embeddings_and_their_padding():
    embedding = nn.Embedding(200, 10, padding_idx=7)
    initializers.xavier_(nn.ModuleList([embedding, nn.Linear(10, 3)]), generator=seeded())
    assert not embedding.weight[7].any()
    assert_moments("embedding", embedding.weight[8:], 1.0)


def test_what_belongs_to_no_layer_is_left_alone():
    model = nn.Sequential(nn.Linear(3, 4))
    model.token = nn.Parameter(randn(1, 4))
    before = model.token.clone()
    kaiming_(model, generator=seeded())
    assert torch.equal(model.token, before)


def test_the_meta_device():
    with torch.device("meta"):
        model = make_network("resnet20")
    kaiming_(model, generator=seeded())
    assert model.classifier.weight.is_meta
    with pytest.raises(ValueError, match="`mode` must be one of"):
        kaiming_(model, generator=seeded(), mode="fan")


def test_scaling():
    model = make_network("plain-4-3")
    names = [name for name, _, _ in weight_layers(model)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    initializers.scale_weights_(model, 0.25)
    initializers.scale_layer_(model, -1, 10.0)
    initializers.scale_layer_(model, 1, 8.0)
    factors = dict.fromkeys(names, 0.25) | {"classifier.weight": 2.5, names[1]: 2.0}
    for name, parameter in model.named_parameters():
        assert_close(parameter, factors.get(name, 1.0) * before[name])


# --- LSUV, Fixup and SkipInit on their own ----------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[list[torch.Tensor], list[bool], int]:
    tensors = [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    return tensors, [module.training for module in model.modules()], hooks


def assert_as_it_was(model: nn.Module, before) -> None:
    now = snapshot(model)
    assert all(map(torch.equal, before[0], now[0]))
    assert before[1:] == now[1:]


@pytest.mark.parametrize("failing_call", [0, 1, 4])
def test_lsuv_undoes_everything_when_the_forward_fails(failing_call):
    model = make_network("plain-5-3", batch_norm=True)
    model.features[1].eval()
    calls = iter(range(100))

    def forward(model, batch):
        torch.rand(3)  # a forward pass may draw from the global generator
        model(batch["x"])
        if next(calls) == failing_call:
            raise RuntimeError("out of memory")

    before, state = snapshot(model), torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory"):
        lsuv_(model, {"x": randn(4, 3, 8, 8)}, generator=seeded(), forward=forward)
    assert_as_it_was(model, before)
    assert torch.equal(state, torch.random.get_rng_state())
    lsuv_(model, {"x": randn(4, 3, 8, 8)}, generator=seeded(), forward=lambda model, batch: model(batch["x"]))
    assert snapshot(model)[1:] == before[1:]


@pytest.mark.parametrize(
    ("x", "activation", "message"),
    [
        (torch.zeros(8, 4), nn.ReLU(), r"got a standard deviation of 0.0 at '0.weight'"),
        (torch.full((8, 4), float("nan")), nn.ReLU(), r"got a standard deviation of nan at '0.weight'"),
        (torch.eye(4), nn.Threshold(1e9, 0.0), r"got a standard deviation of 0.0 at '2.weight'"),  # nothing passes
    ],
    ids=["zero inputs", "not finite", "dead units"],
)
def test_lsuv_reports_a_dead_layer(x, activation, message):
    model = nn.Sequential(nn.Linear(4, 6), activation, nn.Linear(6, 3))
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"lsuv_: every layer's output must vary over the batch, {message}"):
        lsuv_(model, (x.to(torch.get_default_dtype()),), generator=seeded())
    assert_as_it_was(model, before)


def test_lsuv_runs_in_the_order_of_calls_and_leaves_what_is_not_called():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.unused, self.first = nn.Linear(9, 5), nn.Linear(4, 9), nn.Linear(4, 9)

        def forward(self, x):
            return self.last(self.first(x).relu())

    model, x = Backwards(), 4 * randn(64, 4)
    lsuv_(model, (x,), generator=seeded(), tolerance=1e-9)
    seen = outputs(model, x)
    assert_close(seen["first.weight"].std(correction=0), torch.tensor(1.0))
    assert_close(seen["last.weight"].std(correction=0), torch.tensor(1.0))
    assert_close(model.unused.weight.T @ model.unused.weight, torch.eye(4))


def test_lsuv_of_a_layer_used_twice_stops_trying():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(super().forward(x))

    model = Twice(6, 6)
    forwards = []
    lsuv_(
        model,
        (5 * randn(9, 6),),
        generator=seeded(),
        max_tries=3,
        tolerance=1e-12,
        forward=lambda model, batch: forwards.append(model(batch[0])),
    )
    assert len(forwards) == 1 + 3


@pytest.mark.parametrize("name", ["resnet-8", "wrn-10-1"])
def test_fixup_without_scalars(name):
    model = make_network(name)
    fixup_(model, generator=seeded())
    assert not model(randn(2, 3, 8, 8)).any()
    assert all(block.conv1.weight.any() and not block.conv2.weight.any() for block in model.blocks)


def test_skipinit_and_rezero_set_their_scalars_and_nothing_else_without_a_generator():
    model = make_network("resnet-8", branch="skipinit")
    before = {name: p.clone() for name, p in model.named_parameters()}
    initializers.skipinit_(model, 0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, torch.full((1,), 0.5) if name.endswith("alpha") else before[name])
    initializers.skipinit_(model, generator=seeded())
    assert not any(block.alpha.any() for block in model.blocks)
    assert_moments("stem", model.stem[1].weight, math.sqrt(2 / 27))

    layer = nn.Linear(20, 30)
    layer_model = nn.Sequential(layer)
    layer_model.resweight = nn.Parameter(torch.ones(1))
    initializers.rezero_(layer_model, generator=seeded())
    assert layer_model.resweight.item() == 0
    assert_moments("xavier", layer.weight, math.sqrt(2 / 50))


# --- Errors -----------------------------------------------------------------------------------------------------------

LINEAR = partial(nn.Linear, 3, 4)
ERRORS = [
    (partial(initializers.xavier_, gain=0.0), LINEAR, r"xavier_: `gain` must be positive and finite, got 0.0"),
    (partial(initializers.xavier_, distribution="cauchy"), LINEAR, r"xavier_: `distribution` must be one of 'normal'"),
    (partial(kaiming_, mode="fan"), LINEAR, r"kaiming_: `mode` must be one of 'fan_in', 'fan_out', got 'fan'"),
    (partial(kaiming_, nonlinearity="rel"), LINEAR, r"make_activation: `name` must be one of"),
    (partial(kaiming_, distribution="cauchy"), LINEAR, r"kaiming_: `distribution` must be one of 'normal', 'uniform'"),
    (partial(initializers.orthogonal_, gain=float("nan")), LINEAR, r"orthogonal_: `gain` must be positive .* got nan"),
    (partial(initializers.delta_orthogonal_, gain=-1.0), LINEAR, r"delta_orthogonal_: `gain` must be positive"),
    (partial(initializers.normal_, std=-0.1), LINEAR, r"normal_: `std` must be positive and finite, got -0.1"),
    (partial(initializers.uniform_, bound=0.0), LINEAR, r"uniform_: `bound` must be positive and finite, got 0.0"),
    (partial(lsuv_, batch=(torch.ones(2, 3),), tolerance=0.0), LINEAR, r"lsuv_: `tolerance` must be positive"),
    (
        partial(lsuv_, batch=(torch.ones(2, 3),), max_tries=0),
        LINEAR,
        r"lsuv_: `max_tries` must be a whole number, 1 or more",
    ),
    (fixup_, LINEAR, r"fixup_: `model` must have residual blocks and a linear classifier, got 0 and 1"),
    (
        fixup_,
        partial(make_network, "resnet-8", batch_norm=True),
        r"fixup_: `model` must be free of normalisation, got one with it. Fixup replaces it",
    ),
    (partial(initializers.skipinit_, alpha=math.inf), LINEAR, r"skipinit_: `alpha` must be finite, got inf"),
    (initializers.skipinit_, LINEAR, r"skipinit_: `model` must have residual scalars, got no .* called `alpha`"),
    (
        initializers.tfixup_,
        partial(translator, norm="pre"),
        r"tfixup_: `model` must be free of normalisation, got norm='pre'. Build it with norm='none'",
    ),
    (initializers.rezero_, LINEAR, r"rezero_: `model` must have residual scalars, got no .* called `resweight`"),
    (kaiming_, nn.ReLU, r"kaiming_: `model` must have a weight layer, got ReLU without any"),
    (initializers.torch_default_, nn.ReLU, r"torch_default_: `model` must have a weight layer, got ReLU"),
    (kaiming_, lambda: nn.LazyLinear(3), r"kaiming_: every weight must be an ordinary parameter, got a lazy"),
    (
        kaiming_,
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LazyBatchNorm1d()),
        r"kaiming_: every weight must be an ordinary parameter, got a lazy or parametrised one in '1'",
    ),
    (
        kaiming_,
        lambda: prune.identity(nn.Linear(3, 4), "weight"),
        r"kaiming_: every weight must be an ordinary parameter, got a lazy or parametrised one in 'Linear'",
    ),
    (
        kaiming_,
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))),
        r"kaiming_: every weight must be an ordinary parameter, got a lazy or parametrised one in '0'",
    ),
]


@pytest.mark.parametrize(("initialise", "build", "message"), ERRORS)
def test_errors_leave_the_model_as_it_was(initialise, build, message):
    model = build()
    real = nn.ParameterList(leaf for leaf in model.parameters() if not is_lazy(leaf))  # others have no values
    before = snapshot(real)
    with pytest.raises(ValueError, match=message):
        initialise(model, generator=seeded())
    assert_as_it_was(real, before)


@pytest.mark.parametrize("name", ["kaiming_", "xavier_", "orthogonal_", "normal_", "torch_default_"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
@pytest.mark.filterwarnings("error")
def test_layers_without_inputs_or_outputs_are_passed_over(name, shape):
    alone, beside = nn.Sequential(nn.Linear(3, 4)), nn.Sequential(nn.Linear(3, 4))
    with warnings.catch_warnings(action="ignore"):  # torch's own, of a layer without entries
        beside.append(nn.Linear(*shape))
    for model in (alone, beside):
        getattr(initializers, name)(model, generator=seeded())
    assert torch.equal(alone[0].weight, beside[0].weight)
    assert not beside[1].bias.any()


@pytest.mark.parametrize("name", ["transformer_", "tfixup_"])
def test_the_transformers_rules_are_for_it_alone(name):
    model = nn.Transformer(8, 2, 1, 1, 12, batch_first=True)
    before = snapshot(model)
    with pytest.raises(TypeError, match=rf"{name}: `model` must be a common.networks.Transformer, got Transformer\."):
        getattr(initializers, name)(model, generator=seeded())
    assert_as_it_was(model, before)


def test_a_transformer_keeps_its_tie():
    for initialise in (initializers.transformer_, initializers.tfixup_):
        model = translator(norm="none")
        initialise(model, generator=seeded())
        assert model.output.weight is model.decoder.embedding.weight


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_scaling_errors(factor):
    model = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"scale_weights_: `factor` must be positive and finite, got"):
        initializers.scale_weights_(model, factor)
    with pytest.raises(ValueError, match=r"scale_layer_: `factor` must be positive and finite, got"):
        initializers.scale_layer_(model, 0, factor)
    with pytest.raises(ValueError, match=r"scale_layer_: `index` must be in \[-1, 1\), got 1"):
        initializers.scale_layer_(model, 1, 2.0)


def test_fixup_refuses_blocks_without_their_skips():
    # its zero layers would cut such a network in two
    with pytest.raises(ValueError, match="blocks must have their skip connections, got one without"):
        fixup_(make_network("resnet-8", skip=False), generator=torch.Generator())
