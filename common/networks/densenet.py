"""Densely connected networks for CIFAR, as GradInit's released code has them."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import GlobalAveragePool, he_convolutions_, make_activation, make_norm


class Bottleneck(nn.Module):
    r"""[x, F(x)] along the channels, F = 3×3 conv ∘ φ ∘ [norm] ∘ 1×1 conv ∘ φ ∘ [norm], 4·growth channels between."""

    def __init__(self, before: int, growth: int, *, activation: str, batch_norm: bool) -> None:
        super().__init__()
        self.norm1 = make_norm(before, batch_norm)
        self.activation1 = make_activation(activation)
        self.conv1 = nn.Conv2d(before, 4 * growth, 1, bias=not batch_norm)
        self.norm2 = make_norm(4 * growth, batch_norm)
        self.activation2 = make_activation(activation)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=not batch_norm)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        new = self.conv1(self.activation1(self.norm1(x)))
        new = self.conv2(self.activation2(self.norm2(new)))
        return torch.cat([x, new], 1)


class Transition(nn.Module):
    """Fewer channels at half the resolution: 2×2 average ∘ 1×1 conv ∘ φ ∘ [norm]."""

    def __init__(self, before: int, channels: int, *, activation: str, batch_norm: bool) -> None:
        super().__init__()
        self.norm = make_norm(before, batch_norm)
        self.activation = make_activation(activation)
        self.conv = nn.Conv2d(before, channels, 1, bias=not batch_norm)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.pool(self.conv(self.activation(self.norm(x))))


class DenseNet(nn.Module):
    r"""DenseNet-BC (Huang et al. 2017): every layer sees all layers before it, through bottlenecks and compression.

    (b, in_channels, h, w) → stem convolution, 2·growth channels → three blocks of (depth - 4)/6 bottlenecks, each of
    which appends `growth` channels; between blocks a transition keeps the share `compression` of the channels at half
    the resolution → [norm], φ → global average → linear → (b, num_classes).

    As GradInit's released code: convolutions have biases only without normalisation; convolutions Kaiming normal over
    the fan-out, biases zero; classifier torch's default weights, bias zero. DenseNet-100 with growth 12: 0.77M
    parameters with batch normalisation, 0.75M without.

    Args:
        depth: 6n + 4 weight layers: 22, 40, 100, …
        growth: Channels a bottleneck adds, the paper's k.
        activation: Name of an activation layer of `torch.nn`; its gain replaces ReLU's √2.
        batch_norm: Batch normalisation before every activation.
        compression: Share of the channels that a transition keeps, the paper's θ.
    """

    def __init__(
        self,
        depth: int = 100,
        growth: int = 12,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        compression: float = 0.5,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        bottlenecks, remainder = divmod(depth - 4, 6)
        if bottlenecks < 1 or remainder:
            raise ValueError(f"DenseNet: `depth` must be 6n + 4 with n ≥ 1, got {depth}. Try 40 or 100.")
        if growth < 1 or not 0 < compression <= 1:
            raise ValueError(
                "DenseNet: `growth` must be at least 1 and `compression` in (0, 1], "
                f"got {growth} and {compression}. The paper has 12 and 0.5."
            )
        options = {"activation": activation, "batch_norm": batch_norm}
        channels = 2 * growth
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels, 3, padding=1, bias=not batch_norm)]
        for block in range(3):
            if block:
                before, channels = channels, int(channels * compression)
                layers.append(Transition(before, channels, **options))
            for _ in range(bottlenecks):
                layers.append(Bottleneck(channels, growth, **options))
                channels += growth
        self.features = nn.Sequential(*layers)
        self.norm = make_norm(channels, batch_norm)
        self.activation = make_activation(activation)
        self.pool = GlobalAveragePool()
        self.classifier = nn.Linear(channels, num_classes)

        he_convolutions_(self, fan="out", activation=activation)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.pool(self.activation(self.norm(self.features(x)))))
