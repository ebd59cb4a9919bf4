"""The residual networks of CIFAR (depth 6n + 2), with what replaces their normalisation: SkipInit and Fixup."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import GlobalAveragePool, he_convolutions_, make_activation, make_norm


class ScalarBias(nn.Module):
    """x ↦ x + b with one learnable number b, zero at first: Fixup's substitute for a normalisation's shift."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class BasicBlock(nn.Module):
    r"""φ(F(x) + s(x)), F = [norm] ∘ conv ∘ φ ∘ [norm] ∘ conv; without skip, φ(F(x)).

    s is the identity, or where the shape changes: every second pixel, [normalised], and zeros for the new channels.
    """

    conv_bias = True

    def __init__(
        self, before: int, channels: int, stride: int, *, activation: str, batch_norm: bool, skip: bool
    ) -> None:
        super().__init__()
        bias = self.conv_bias and not batch_norm
        self.conv1 = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=bias)
        self.norm1 = make_norm(channels, batch_norm)
        self.activation1 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.norm2 = make_norm(channels, batch_norm)
        self.activation2 = make_activation(activation)
        self.skip, self.stride, self.new_channels = skip, stride, channels - before
        # On the old channels: the zeros that follow are not normalised.
        self.shortcut_norm = make_norm(before, batch_norm and skip and stride > 1)

    def branch_layers(self) -> list[nn.Module]:
        """The weight layers of the residual branch, in the order of the forward pass; what Fixup needs to know."""
        return [self.conv1, self.conv2]

    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(self.activation1(self.norm1(self.conv1(x)))))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        x = self.shortcut_norm(x[:, :, :: self.stride, :: self.stride])
        return nn.functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.activation2(self.branch(x) + self.shortcut(x) if self.skip else self.branch(x))


class SkipInitBlock(BasicBlock):
    """φ(α F(x) + s(x)) with one learnable α a branch, zero at first (De and Smith 2020)."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.alpha = nn.Parameter(torch.zeros(1))

    def branch(self, x: Tensor) -> Tensor:
        return self.alpha * super().branch(x)


class FixupBlock(BasicBlock):
    """A scalar bias before every convolution and activation, one multiplier a branch (Zhang, Dauphin and Ma 2019).

    The convolutions have no biases of their own. The shortcut takes x as it comes.
    """

    conv_bias = False

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.bias_conv1, self.bias_activation1 = ScalarBias(), ScalarBias()
        self.bias_conv2, self.bias_activation2 = ScalarBias(), ScalarBias()
        self.scale = nn.Parameter(torch.ones(1))

    def branch(self, x: Tensor) -> Tensor:
        x = self.activation1(self.bias_activation1(self.conv1(self.bias_conv1(x))))
        return self.scale * self.conv2(self.bias_conv2(x))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.activation2(self.bias_activation2(self.branch(x) + self.shortcut(x)))


BRANCHES: dict[str, type[BasicBlock]] = {"plain": BasicBlock, "skipinit": SkipInitBlock, "fixup": FixupBlock}


class ResNet(nn.Module):
    r"""ResNet-(6n+2) for CIFAR (He et al. 2016), as GradInit's released code has it.

    (b, in_channels, h, w) → stem convolution, width channels → three stages of n blocks, width, 2·width, 4·width
    channels, the later two at half the resolution of the one before → global average → linear → (b, num_classes).

    As the released code: the shortcut that changes shape has no weights (every second pixel, then batch
    normalisation where there is any, then zero channels); convolutions have biases only without normalisation.
    Convolutions Kaiming normal over the fan-out, biases zero; classifier torch's default weights, bias zero.
    ResNet-110: 1.72M parameters, 1.73M with batch normalisation.

    `branch` chooses the *architecture* of the residual branches; `common.initializers.fixup_` and `skipinit_` set
    their values. "fixup" puts its scalar biases where the paper says, before *every* convolution, the stem included.

    Args:
        depth: 6n + 2 weight layers: 20, 32, 44, 56, 110, …
        width: Channels of the first stage.
        activation: Name of an activation layer of `torch.nn`; its gain replaces ReLU's √2.
        batch_norm: Batch normalisation after every convolution.
        skip: False removes the shortcuts: the plain network of MetaInit.
        branch: "plain"; "skipinit", a multiplier α = 0 a branch; or "fixup", scalar biases and multipliers.
    """

    def __init__(
        self,
        depth: int = 20,
        width: int = 16,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        skip: bool = True,
        branch: str = "plain",
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        blocks, remainder = divmod(depth - 2, 6)
        if blocks < 1 or remainder:
            raise ValueError(f"ResNet: `depth` must be 6n + 2 with n ≥ 1, got {depth}. Try 20, 56 or 110.")
        if branch not in BRANCHES:
            raise ValueError(f"ResNet: `branch` must be one of {', '.join(BRANCHES)}, got {branch!r}.")
        if branch != "plain" and not skip:
            raise ValueError(f"ResNet: `branch={branch!r}` needs shortcuts, got skip=False. Use branch='plain'.")
        if branch != "plain" and batch_norm:
            raise ValueError(
                f"ResNet: `branch={branch!r}` replaces normalisation, got batch_norm=True. Pass batch_norm=False."
            )
        block, fixup = BRANCHES[branch], branch == "fixup"
        bias = block.conv_bias and not batch_norm

        self.stem = nn.Sequential(
            ScalarBias() if fixup else nn.Identity(),
            nn.Conv2d(in_channels, width, 3, padding=1, bias=bias),
            ScalarBias() if fixup else make_norm(width, batch_norm),
            make_activation(activation),
        )
        options = {"activation": activation, "batch_norm": batch_norm, "skip": skip}
        layers: list[nn.Module] = []
        before = width
        for stage in range(3):
            for position in range(blocks):
                channels, stride = width * 2**stage, 2 if stage and not position else 1
                layers.append(block(before, channels, stride, **options))
                before = channels
        self.blocks = nn.Sequential(*layers)
        self.pool = GlobalAveragePool()
        self.bias_classifier = ScalarBias() if fixup else nn.Identity()
        self.classifier = nn.Linear(before, num_classes)

        he_convolutions_(self, fan="out", activation=activation)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.bias_classifier(self.pool(self.blocks(self.stem(x)))))
