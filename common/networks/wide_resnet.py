"""Wide residual networks, as GradInit's released code has them."""

from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import GlobalAveragePool, make_activation, make_norm


class WideBlock(nn.Module):
    r"""F(x) + s(x), F = conv ∘ φ ∘ [norm] ∘ conv ∘ φ ∘ [norm]; without skip, F(x).

    The second convolution carries the stride. s is the identity, or where the shape changes a 1×1 convolution of
    the raw input.
    """

    def __init__(
        self, before: int, channels: int, stride: int, *, activation: str, batch_norm: bool, skip: bool
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(before, batch_norm)
        self.activation1 = make_activation(activation)
        self.conv1 = nn.Conv2d(before, channels, 3, padding=1)
        self.norm2 = make_norm(channels, batch_norm)
        self.activation2 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)
        self.skip = skip
        changes = skip and (stride > 1 or before != channels)
        self.shortcut = nn.Conv2d(before, channels, 1, stride=stride) if changes else nn.Identity()

    def branch_layers(self) -> list[nn.Module]:
        """The weight layers of the residual branch, in the order of the forward pass; what Fixup needs to know."""
        return [self.conv1, self.conv2]

    def branch(self, x: Tensor) -> Tensor:
        x = self.conv1(self.activation1(self.norm1(x)))
        return self.conv2(self.activation2(self.norm2(x)))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.branch(x) + self.shortcut(x) if self.skip else self.branch(x)


class WideResNet(nn.Module):
    r"""WRN-depth-widen (Zagoruyko and Komodakis 2016): pre-activation blocks, few and wide.

    (b, in_channels, h, w) → stem convolution, 16 channels → three stages of (depth - 4)/6 blocks with 16, 32 and 64
    times `widen` channels, the later two at half the resolution of the one before → [norm], φ → global average
    → linear → (b, num_classes).

    As GradInit's released code: every convolution has a bias, the 1×1 shortcuts too; no dropout; the last batch
    normalisation has momentum 0.9, the others 0.1; torch's default initialisation throughout, except that the
    convolutions' biases are zero (its first commit; the later ones leave them at torch's default).
    WRN-28-10: 36.5M parameters.

    Args:
        depth: 6n + 4: 10, 16, 22, 28, 40, …
        widen: Multiplier of the channels, the k of WRN-d-k.
        activation: Name of an activation layer of `torch.nn`. The initialisation does not depend on it.
        batch_norm: Batch normalisation before every activation.
        skip: False removes the shortcuts: the plain network of MetaInit.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        skip: bool = True,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 4, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"WideResNet: `depth` must be 6n + 4 with n ≥ 1, got {depth}. Try 16 or 28.")
        if widen < 1:
            raise ValueError(f"WideResNet: `widen` must be at least 1, got {widen}.")
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1)
        options = {"activation": activation, "batch_norm": batch_norm, "skip": skip}
        layers: list[nn.Module] = []
        before = 16
        for stage in range(3):
            for position in range(blocks):
                channels, stride = 16 * widen * 2**stage, 2 if stage and not position else 1
                layers.append(WideBlock(before, channels, stride, **options))
                before = channels
        self.blocks = nn.Sequential(*layers)
        self.norm = make_norm(before, batch_norm, momentum=0.9)
        self.activation = make_activation(activation)
        self.pool = GlobalAveragePool()
        self.classifier = nn.Linear(before, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.pool(self.activation(self.norm(self.blocks(self.stem(x))))))
