"""Scales layer by layer, against numbers worked by hand and against autograd with every output retained."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from common.functional import classification_loss
from common.initializers import kaiming_
from common.layers import KEYS, examine_layers, fan_in, is_activation, layer_scales, layers_of
from common.networks import make_network

X = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0]], dtype=torch.float64)
Y = torch.tensor([0, 1, 1])


def mean_output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).mean()


def by_name(rows: list[dict]) -> dict[str, dict]:
    return {row["name"]: row for row in rows}


def linear(weight: list[list[float]], bias: list[float]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.copy_(torch.tensor(bias))
    return layer


# ---------------------------------------------------------------------------------------------- scales
def test_one_layer_by_hand():
    # outputs 3x + 4y + 1: −4, 12, 14; L is their mean, so ∂L/∂output = 1/3 each, ∂L/∂W = mean x = (1, 2.5/3), ∂L/∂b = 1
    layers = examine_layers(nn.Sequential(linear([[3.0, 4.0]], [1.0])), mean_output, X)
    (row,) = layers.rows
    assert set(KEYS) <= row.keys()
    assert (row["name"], row["kind"], row["dead_share"], row["called"]) == ("0", "Linear", None, True)
    assert row["weight_norm"] == pytest.approx(5.0)
    assert row["kaiming_ratio"] == pytest.approx(5 / math.sqrt(2))  # √(2 · out)
    assert layers.loss == row["activation_mean"] == pytest.approx(22 / 3)
    assert row["activation_std"] == pytest.approx(math.sqrt((16 + 144 + 196) / 3 - (22 / 3) ** 2))
    assert row["output_gradient_norm"] == pytest.approx(math.sqrt(1 / 3))
    assert layers.gradient_norm == row["gradient_norm"] == pytest.approx(math.sqrt(1 + (2.5 / 3) ** 2 + 1))
    assert layers.entries == 3


@pytest.mark.parametrize("inplace", [False, True])
def test_scales_are_those_of_every_retained_output(inplace, generator):
    # an in-place ReLU overwrites what the layer before put out: moments and gradient are of what was there before
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(6, 2, 5, 5, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    rows = by_name(layer_scales(model, classification_loss, (x, y)))
    outputs = {}
    hidden = x
    for name, module in model.named_children():
        hidden = F.relu(hidden) if name == "2" else module(hidden)
        hidden.retain_grad()
        outputs[name] = hidden
    F.cross_entropy(hidden, y).backward()
    assert list(rows) == ["0", "1", "2", "4"]  # nn.Flatten is no layer
    for name, row in rows.items():
        assert row["activation_mean"] == pytest.approx(outputs[name].mean().item())
        assert row["activation_std"] == pytest.approx(outputs[name].std(correction=0).item())
        assert row["output_gradient_norm"] == pytest.approx(outputs[name].grad.norm().item())
    for name in ("0", "1", "4"):
        own = torch.cat([p.grad.flatten() for p in model[int(name)].parameters()])
        # the bias before BatchNorm has a gradient of rounding only
        assert rows[name]["gradient_norm"] == pytest.approx(own.norm().item())


def test_he_s_rule_has_a_ratio_of_one(generator):
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3, groups=2), nn.ConvTranspose2d(16, 64, 3), nn.Linear(100, 200), nn.MultiheadAttention(64, 2),
        nn.Embedding(7, 5), nn.LayerNorm(9),
    )  # fmt: skip
    kaiming_(model, generator=generator)
    rows = by_name(layer_scales(model, lambda m, x: m[2](x).mean(), torch.randn(3, 100, generator=generator)))
    for name in ("0", "1", "2", "3"):
        assert rows[name]["kaiming_ratio"] == pytest.approx(1.0, abs=0.05), (
            name
        )  # 2000 draws or more: 5 standard errors
    assert rows["4"]["kaiming_ratio"] is None
    assert rows["5"]["kaiming_ratio"] is None
    assert [name for name, row in rows.items() if row["called"]] == ["2"]
    assert list(rows) == ["2", "0", "1", "3", "4", "5"]  # what is called first


def test_fan_in_of_a_matrix_that_is_held_the_other_way_round():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    assert fan_in(Conv1D(6, 4), torch.zeros(4, 6)) == 4
    assert fan_in(nn.Linear(4, 6), torch.zeros(6, 4)) == 4
    assert fan_in(nn.LayerNorm((4, 6)), torch.zeros(4, 6)) is None


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("layer", [lambda: nn.Linear(0, 3), lambda: nn.Linear(3, 0)], ids=["inputs", "outputs"])
def test_a_layer_without_entries_has_no_ratio(layer):
    model = nn.Module()
    model.used, model.empty = nn.Linear(2, 1), layer()
    rows = by_name(layer_scales(model, lambda m, x: m.used(x).mean(), X))
    assert rows["empty"]["kaiming_ratio"] is None
    assert fan_in(nn.Conv2d(3, 2, 5), torch.empty(0, 3, 5, 5)) == 75


def test_a_parametrised_weight_counts_as_the_forward_pass_sees_it():
    layer = nn.utils.parametrizations.weight_norm(linear([[3.0, 4.0]], [0.0]))
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(10.0)
    (row,) = layer_scales(nn.Sequential(layer), mean_output, X)
    assert row["weight_norm"] == pytest.approx(10.0)


def test_an_activation_with_parameters_is_one_row():
    # outputs 3x + 4y + 1: −4, 12, 14, of which PReLU makes −1, 12, 14; ∂L/∂slope = −4/3, the mean of what is below 0
    model = nn.Sequential(linear([[3.0, 4.0]], [1.0]), nn.PReLU(), nn.PReLU())
    model[2].weight = nn.Parameter(torch.tensor([1.0]))
    layers = examine_layers(model, lambda m, x: m[1](m[0](x)).mean(), X)
    rows = by_name(layers.rows)
    assert list(rows) == ["0", "1", "2"]
    row = rows["1"]
    assert (row["kind"], row["follows"], row["called"], row["units"]) == ("PReLU", "0", True, 1)
    assert row["activation_mean"] == pytest.approx(25 / 3)
    assert row["gradient_norm"] == pytest.approx(4 / 3)
    assert row["weight_norm"] == pytest.approx(0.25)
    assert not rows["2"]["called"]
    assert layers.without_gradient == {"2.weight": "unused"}
    cut = examine_layers(model, lambda m, x: m[2](m[1](m[0](x)).detach()).mean() + 0 * m[1].weight.sum(), X)
    assert cut.without_gradient == {"0.weight": "detached", "0.bias": "detached", "1.weight": "zero"}


def test_an_expert_without_examples_is_no_error():
    model = nn.ModuleList([nn.Sequential(linear([[1.0, 2.0]], [0.0]), nn.ReLU()) for _ in range(2)])
    rows = by_name(layer_scales(model, lambda m, x: m[0](x).mean() + m[1](x[:0]).sum(), X))
    assert rows["0.1"]["units"] == 1
    assert "1.1" not in rows
    assert not rows["1.0"]["called"]


def test_layers_are_what_holds_parameters_and_works_by_itself():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.MultiheadAttention(4, 2), nn.LSTM(2, 3), nn.ReLU())
    assert list(layers_of(model)) == ["0.0", "1", "2"]
    assert is_activation(model[3])
    assert not is_activation(nn.Identity())
    assert not is_activation(nn.Softmax(-1))


# ---------------------------------------------------------------------------------------------- units that are off
def test_units_that_are_zero_for_every_example():
    # pre-activations x and −x − 5: the second is negative for all of 1, 3, −1; the third, x − 2, for two of three only
    model = nn.Sequential(linear([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]], [0.0, -5.0, -2.0]), nn.ReLU())
    row = by_name(layer_scales(model, mean_output, X))["1"]
    assert (row["units"], row["dead_share"], row["dead_size"], row["follows"]) == (3, pytest.approx(1 / 3), 0.0, "0")


@pytest.mark.parametrize(
    ("phi", "share", "size"), [(nn.Tanh(), 1.0, 1.0), (nn.Sigmoid(), 1.0, 0.5), (nn.GELU(), 0.5, 0.0)]
)
def test_saturated_units(phi, share, size):
    # at ±10: tanh (±1) and the sigmoid (0 and 1) are flat on both sides, GELU on one (0)
    model = nn.Sequential(linear([[0.0, 0.0], [0.0, 0.0]], [10.0, -10.0]), phi)
    row = by_name(layer_scales(model, lambda m, x: m(x).sum(), X))["1"]
    assert row["dead_share"] == share
    assert row["dead_size"] == pytest.approx(size, abs=1e-4)


@pytest.mark.parametrize(
    ("phi", "on", "off"), [(nn.Sigmoid(), 5.9, 6.1), (nn.Tanh(), 3.6, 3.8), (nn.GELU(), -3.4, -3.7)], ids=str
)
def test_a_unit_is_off_where_its_slope_is_a_hundredth_of_the_sigmoids_steepest(phi, on, off):
    for z, share in ((on, 0.0), (off, 1.0)):
        model = nn.Sequential(linear([[0.0, 0.0]], [z]), phi)
        assert by_name(layer_scales(model, lambda m, x: m(x).sum(), X))["1"]["dead_share"] == share


@pytest.mark.parametrize("mode", ["batch", "running"])
def test_statistics_are_those_that_are_asked_for(mode):
    model = nn.Sequential(linear([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(7.0)
    for examine in (layer_scales, lambda *a, **o: examine_layers(*a, **o).rows):
        row = by_name(examine(model, lambda m, x: m(x).square().sum(), X, batch_norm=mode))["1"]
        expected = 0.0 if mode == "batch" else (X.mean().item() - 7) / (1 + 1e-5) ** 0.5
        assert row["activation_mean"] == pytest.approx(expected, abs=1e-9)


def test_a_unit_of_a_convolution_is_a_channel_and_of_a_sequence_a_feature(generator):
    conv = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU())
    with torch.no_grad():
        conv[0].bias.copy_(torch.tensor([-1e3, 1e3, 1e3, 1e3]))
    row = by_name(layer_scales(conv, mean_output, torch.randn(5, 1, 3, 3, generator=generator)))["1"]
    assert (row["units"], row["dead_share"]) == (4, 0.25)
    sequence = nn.Sequential(nn.Linear(2, 4), nn.ReLU())
    with torch.no_grad():
        sequence[0].bias.copy_(torch.tensor([-1e3, 1e3, 1e3, 1e3]))
    row = by_name(layer_scales(sequence, mean_output, torch.randn(5, 3, 2, generator=generator)))["1"]
    assert (row["units"], row["dead_share"]) == (4, 0.25)


class Block(nn.Module):
    """One ReLU module at two places, and one ReLU function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(2, 4), nn.Linear(4, 3), nn.Linear(3, 5)
        self.phi = nn.ReLU()
        with torch.no_grad():
            self.second.bias.fill_(-1e3)

    def forward(self, x):
        return F.relu(self.third(self.phi(self.second(self.phi(self.first(x)))))).sum(1)


def test_activations_are_told_apart_by_place_and_found_as_functions():
    rows = layer_scales(Block(), mean_output, X)
    names = [row["name"] for row in rows]
    assert names == ["first", "phi", "second", "phi (ReLU after second)", "third", "model"]
    rows = by_name(rows)
    assert rows["phi (ReLU after second)"]["dead_share"] == 1.0
    assert rows["phi"]["dead_share"] < 1.0
    assert (rows["model"]["kind"], rows["model"]["follows"], rows["model"]["units"]) == ("relu", "third", 5)


# ---------------------------------------------------------------------------------------------- missing gradients
class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.cut, self.never, self.frozen = (nn.Linear(2, 2) for _ in range(4))
        self.zero, self.free = nn.Linear(2, 2), nn.Parameter(torch.ones(2))
        self.frozen.requires_grad_(False)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        h = self.used(x) + self.cut(x).detach() + self.frozen(x)
        return h + self.zero(self.used(x) * 0)


def test_why_a_parameter_has_no_gradient():
    layers = examine_layers(Cut(), mean_output, X)
    assert layers.without_gradient == {
        "free": "no path", "cut.weight": "detached", "cut.bias": "detached", "never.weight": "unused",
        "never.bias": "unused", "zero.weight": "zero",
    }  # fmt: skip
    assert layers.frozen == ["frozen.weight", "frozen.bias"]
    rows = by_name(layers.rows)
    assert rows["cut"]["gradient_norm"] is None
    assert rows["cut"]["output_gradient_norm"] is None
    assert not rows["never"]["called"]


def test_a_loss_that_depends_on_nothing():
    layers = examine_layers(nn.Sequential(nn.Linear(2, 2)), lambda m, x: m(x).detach().mean(), X)
    assert set(layers.without_gradient.values()) == {"detached"}
    assert layers.gradient_norm == 0.0


# ---------------------------------------------------------------------------------------------- the user's model
def state(model: nn.Module) -> dict:
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    return {"hooks": hooks, "grads": grads, "tensors": tensors, "modes": [m.training for m in model.modules()]}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_the_model_changes(fails, generator):
    model = nn.Sequential(make_network("plain-3-2", batch_norm=True), nn.Dropout(0.5), nn.ReLU(inplace=True))
    model[0].features[0].eval()
    batch = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])
    classification_loss(model, batch).backward()
    before, random = state(model), torch.get_rng_state()

    def loss(model, batch):
        torch.rand(3)
        value = classification_loss(model, batch)
        if fails:
            raise KeyError("late")
        return value

    if fails:
        with pytest.raises(KeyError):
            layer_scales(model, loss, batch)
    else:
        assert layer_scales(model, loss, batch) == layer_scales(model, loss, batch)
    after = state(model)
    assert torch.equal(random, torch.get_rng_state())
    assert (before["hooks"], before["modes"]) == (after["hooks"], after["modes"])
    assert_close(before["tensors"], after["tensors"], rtol=0, atol=0)
    assert_close(before["grads"], after["grads"], rtol=0, atol=0)


def test_what_is_refused():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="must have a trainable parameter, got Linear"):
        layer_scales(frozen, mean_output, X)
    with pytest.raises(
        ValueError, match=r"must return a scalar, the mean over examples, got a tensor of shape \(3, 2\)"
    ):
        layer_scales(nn.Linear(2, 2), lambda m, x: m(x), X)
