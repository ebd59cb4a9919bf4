"""What the networks of this folder are built from: activations by name, their gains, He's rule, stems and heads.

Nothing here works in place and no layer looks at its data to decide what to do, so that every network goes through
`torch.func` (`functional_call`, `grad`, `jvp`, `vmap`) as it stands.
"""

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

# Not maps from one number to one number: they normalise, halve, mix, need arguments, or draw at random.
_NOT_ELEMENTWISE = {"GLU", "LogSoftmax", "MultiheadAttention", "RReLU", "Softmax", "Softmax2d", "Softmin", "Threshold"}

ACTIVATIONS: dict[str, type[nn.Module]] = {
    name.lower(): getattr(nn, name) for name in nn.modules.activation.__all__ if name not in _NOT_ELEMENTWISE
} | {"leaky_relu": nn.LeakyReLU, "identity": nn.Identity}


def make_activation(name: str) -> nn.Module:
    """A fresh, out-of-place activation layer by the name of its class in `torch.nn`, whatever its capitals.

    Raises:
        ValueError: The name is none of `ACTIVATIONS`.
    """
    kind = ACTIVATIONS.get(name.lower())
    if kind is None:
        raise ValueError(f"make_activation: `name` must be one of {', '.join(sorted(ACTIVATIONS))}, got {name!r}.")
    return kind()


@lru_cache
def gain_of(activation: str) -> float:
    r"""The gain γ of an activation φ: what multiplies 1/√fan in the standard deviation of the weights before it.

    γ = 1/√E[φ(z)²], z ~ N(0, 1), keeps a pre-activation of unit second moment at unit second moment: He's √2 for
    ReLU, √(2/(1 + a²)) for a leaky ReLU of slope a, 1 for the identity and, by its design, for SELU.

    tanh, softsign and hardtanh are the exception. They are bounded and the identity near 0, and mean-field theory
    puts their critical point, σ_w² E[φ'(√q* z)²] = 1 without biases, at σ_w² = 1 (with q* → 0): hence γ = 1. Torch's
    `nn.init.calculate_gain` says 5/3 for tanh (near this rule's 1.59, which is chaotic in deep networks) and 3/4 for
    SELU.

    Example:
        >>> round(gain_of("relu") ** 2, 12), gain_of("tanh")
        (2.0, 1.0)
    """
    name = activation.lower()
    exact = {"relu": math.sqrt(2), "identity": 1.0, "tanh": 1.0, "softsign": 1.0, "hardtanh": 1.0}
    # A network may be under construction on the meta device, and this must still yield a number.
    with torch.device("cpu"), torch.no_grad():
        phi = make_activation(name).double()
        z = torch.linspace(-12, 12, 24001, dtype=torch.float64)
        density = torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        return exact.get(name) or torch.trapezoid(phi(z) ** 2 * density, z).rsqrt().item()


@torch.no_grad()
def he_convolutions_(network: nn.Module, *, fan: Literal["in", "out"], activation: str) -> None:
    r"""Every convolution W ~ N(0, γ²/fan) with the gain γ of `activation`, every convolution's bias 0.

    Draws from the global generator, as constructors do; `common.initializers` is for what must be reproducible.
    """
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            fan_size = conv.weight[0].numel() if fan == "in" else conv.weight[:, 0].numel()
            nn.init.normal_(conv.weight, std=gain_of(activation) / math.sqrt(fan_size))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def make_norm(channels: int, batch_norm: bool, *, momentum: float = 0.1) -> nn.Module:
    """Batch normalisation over `channels`, or nothing."""
    return nn.BatchNorm2d(channels, momentum=momentum) if batch_norm else nn.Identity()


class GlobalAveragePool(nn.Module):
    """(batch, channels, height, width) → (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((-2, -1))
