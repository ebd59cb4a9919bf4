"""How each network of MetaInit's experiment begins, against what its name says."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from common.initializers import gain_of, kaiming_, weight_layers
from reproduce.metainit_arms import ARMS

STARTS = {arm.name: arm.start for arm in ARMS}


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def begin(name: str, activation: str = "relu", seed: int = 0) -> list[torch.Tensor]:
    model = network()
    batch = torch.randn(16, 3, 2, 2), torch.randint(10, (16,))
    STARTS[name](model, activation, batch, torch.Generator().manual_seed(seed))
    return [weight.tensor.detach() for weight in weight_layers(model)]


def kaiming(activation: str = "relu", seed: int = 0) -> list[torch.Tensor]:
    model = network()
    kaiming_(model, nonlinearity=activation, generator=torch.Generator().manual_seed(seed))
    return [weight.tensor.detach() for weight in weight_layers(model)]


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_kaiming_and_its_quarter(activation):
    for own, quarter, expected in zip(
        begin("Kaiming", activation), begin("Kaiming × ¼", activation), kaiming(activation), strict=True
    ):
        assert_close(own, expected)
        assert_close(quarter, expected / 4)


def test_gaussian():
    leaves = torch.cat([leaf.flatten() for leaf in begin("N(0, 0.1²)")])
    assert leaves.std().item() == pytest.approx(0.1, rel=0.1)
    assert abs(leaves.mean().item()) < 0.02


def test_one_layer_is_ten_times_as_large():
    larger = set()
    for seed in range(20):
        ratios = [
            (own.norm() / expected.norm()).item()
            for own, expected in zip(begin("one layer × 10", seed=seed), kaiming(seed=seed), strict=True)
        ]
        assert sorted(ratios) == pytest.approx([1.0, 1.0, 10.0], rel=1e-9)
        larger.add(ratios.index(max(ratios)))
    assert larger == {0, 1, 2}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_orthogonal_starts_have_the_activations_gain(activation):
    gain = gain_of(activation)
    *_, last = begin("orthogonal", activation)
    assert_close(last @ last.T, gain**2 * torch.eye(10))
    _, square, last = begin("delta-orthogonal", activation)
    centre = square[:, :, 1, 1]
    assert_close(centre @ centre.T, gain**2 * torch.eye(8))
    assert_close(square.norm(), centre.norm())  # nothing around it
    assert_close(last @ last.T, gain**2 * torch.eye(10))


def test_lsuv_looks_at_the_data():
    model = network()
    batch = 3 * torch.randn(64, 3, 2, 2), torch.randint(10, (64,))
    copied = copy.deepcopy(model)
    STARTS["LSUV"](copied, "relu", batch, torch.Generator().manual_seed(0))
    # to `lsuv_`'s own tolerance
    assert copied(batch[0]).std().item() == pytest.approx(1.0, rel=0.1)
    assert copied[0](batch[0]).std().item() == pytest.approx(1.0, rel=0.1)
