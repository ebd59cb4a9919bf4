"""How each network of `reproduce.metainit_cifar10` begins."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from common import initializers
from common.types import Batch

Start = Callable[[nn.Module, str, Batch, torch.Generator], None]
"""`start(model, activation, batch, generator)` draws the weights; `batch` is real, for those that look at data."""


def kaiming(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    initializers.kaiming_(model, nonlinearity=activation, generator=generator)


def quarter(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    kaiming(model, activation, batch, generator)
    initializers.scale_weights_(model, 0.25)


def gaussian(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    initializers.normal_(model, 0.1, generator=generator)


def one_layer(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    kaiming(model, activation, batch, generator)
    layers = len(initializers.weight_layers(model))
    initializers.scale_layer_(model, int(torch.randint(layers, (), generator=generator)), 10.0)


def orthogonal(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    initializers.orthogonal_(model, gain=initializers.gain_of(activation), generator=generator)


def delta_orthogonal(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    initializers.delta_orthogonal_(model, gain=initializers.gain_of(activation), generator=generator)


def lsuv(model: nn.Module, activation: str, batch: Batch, generator: torch.Generator) -> None:
    initializers.lsuv_(model, batch, generator=generator)


@dataclass(frozen=True)
class Arm:
    """One way to begin, and what is done besides."""

    name: str
    start: Start
    metainit: bool = False
    batch_norm: bool = False
    warmup: bool = False
    carries_claim: bool = False


ARMS = (
    Arm("Kaiming × ¼", quarter, carries_claim=True),
    Arm("Kaiming × ¼ + MetaInit", quarter, metainit=True, carries_claim=True),
    Arm("Kaiming", kaiming, carries_claim=True),
    Arm("Kaiming + MetaInit", kaiming, metainit=True, carries_claim=True),
    Arm("N(0, 0.1²)", gaussian),
    Arm("N(0, 0.1²) + MetaInit", gaussian, metainit=True),
    Arm("one layer × 10", one_layer),
    Arm("one layer × 10 + MetaInit", one_layer, metainit=True),
    Arm("orthogonal", orthogonal),
    Arm("delta-orthogonal", delta_orthogonal),
    Arm("LSUV", lsuv),
    Arm("Kaiming + BatchNorm", kaiming, batch_norm=True),
    Arm("Kaiming + warm-up", kaiming, warmup=True),
)
