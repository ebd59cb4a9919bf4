"""ResNet-18 without normalisation, for small images, as DIMAML trains it: Fixup with leaky ReLUs."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import GlobalAveragePool, make_activation
from common.networks.resnet import ScalarBias


class FixupBasicBlock(nn.Module):
    r"""φ(α conv2(φ(conv1(x + b1) + b2) + b3) + b4 + s(x)) with scalars α, b1, …, b4.

    s is the identity, or where the shape changes a 1×1 convolution of x + b1 with the stride of conv1.
    """

    def __init__(self, before: int, channels: int, stride: int, *, activation: str) -> None:
        super().__init__()
        self.bias_conv1, self.bias_activation1 = ScalarBias(), ScalarBias()
        self.bias_conv2, self.bias_activation2 = ScalarBias(), ScalarBias()
        self.conv1 = nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=False)
        self.activation1 = make_activation(activation)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.scale = nn.Parameter(self.bias_conv1.bias.new_ones(1))
        changes = stride != 1 or before != channels
        self.downsample = nn.Conv2d(before, channels, 1, stride=stride, bias=False) if changes else None
        self.activation2 = make_activation(activation)

    def branch_layers(self) -> list[nn.Module]:
        """The weight layers of the residual branch, in the order of the forward pass; what Fixup needs to know."""
        return [self.conv1, self.conv2]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        shifted = self.bias_conv1(x)
        y = self.activation1(self.bias_activation1(self.conv1(shifted)))
        y = self.bias_activation2(self.scale * self.conv2(self.bias_conv2(y)))
        return self.activation2(y + (x if self.downsample is None else self.downsample(shifted)))


class FixupResNet18(nn.Module):
    r"""Four stages of two residual blocks, (b, in_channels, h, w) → (b, num_classes), no normalisation.

    3×3 stem convolution with stride 1 and no pooling after it, for images of 32 or 64 pixels → a scalar bias → φ
    → stages of width, 2·width, 4·width, 8·width channels, each later one at half the resolution → global average
    → a scalar bias → linear. 11,210,574 parameters for 100 classes, 11,261,874 for 200.

    Weights (L = 8 blocks): conv1 of every block N(0, 2/(9 · channels out)/L); conv2 and the classifier zero; the 1×1
    convolutions N(0, 2/channels out); the stem as torch has it; biases 0 and multipliers 1.
    `common.initializers.fixup_` gives the same but for the stem, where it has N(0, 2/(9 · channels out)).

    The scalars are the parameters of one element; DIMAML's inner loop trains them at a tenth of the learning rate.

    Args:
        width: Channels of the first stage.
        activation: φ, the name of an activation layer of `torch.nn`. The weights are as for ReLU, whatever it is.
    """

    def __init__(
        self, width: int = 64, *, activation: str = "leaky_relu", in_channels: int = 3, num_classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), ScalarBias(), make_activation(activation)
        )
        before, blocks = width, []
        for stage in range(4):
            for position in range(2):
                channels, stride = width * 2**stage, 2 if stage and not position else 1
                blocks.append(FixupBasicBlock(before, channels, stride, activation=activation))
                before = channels
        self.blocks = nn.Sequential(*blocks)
        self.pool, self.bias_classifier = GlobalAveragePool(), ScalarBias()
        self.classifier = nn.Linear(before, num_classes)

        for block in blocks:
            variance = 2 / (9 * block.conv1.out_channels)
            nn.init.normal_(block.conv1.weight, std=math.sqrt(variance / len(blocks)))
            nn.init.zeros_(block.conv2.weight)
            if block.downsample is not None:
                nn.init.normal_(block.downsample.weight, std=math.sqrt(2 / block.downsample.out_channels))
        for parameter in self.classifier.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.bias_classifier(self.pool(self.blocks(self.stem(x)))))
