"""VGG for CIFAR, as GradInit's released code has it."""

from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import GlobalAveragePool, he_convolutions_, make_activation, make_norm

# Convolutions a stage; the stages have 1, 2, 4, 8 and 8 times the width, and a 2×2 max pool ends each.
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(nn.Module):
    r"""VGG (Simonyan and Zisserman 2015) with a single linear layer: GradInit's VGG-19 at the defaults.

    (b, in_channels, 32, 32) → five stages of 3×3 convolutions, 64-128-256-512-512 channels, a max pool after each
    → (b, 512, 1, 1) → linear → (b, num_classes). Larger images are averaged over what is left of their extent.

    As the released code: every convolution has a bias, *also before batch normalisation*; no dropout and no hidden
    linear layer; convolutions Kaiming normal over the fan-out, biases zero; classifier N(0, 0.01²), bias zero.
    20.03M parameters, 20.04M with batch normalisation.

    Args:
        depth: 11, 13, 16 or 19 weight layers in the original's count, which has two linear layers more.
        width: Channels of the first stage.
        activation: Name of an activation layer of `torch.nn`; its gain replaces ReLU's √2.
        batch_norm: Batch normalisation after every convolution.
    """

    def __init__(
        self,
        depth: int = 19,
        width: int = 64,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"VGG: `depth` must be one of {', '.join(map(str, STAGES))}, got {depth}.")
        layers: list[nn.Module] = []
        before = in_channels
        for multiple, convolutions in zip((1, 2, 4, 8, 8), STAGES[depth], strict=True):
            for _ in range(convolutions):
                layers += [
                    nn.Conv2d(before, multiple * width, 3, padding=1),
                    *([make_norm(multiple * width, True)] if batch_norm else []),
                    make_activation(activation),
                ]
                before = multiple * width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = GlobalAveragePool()
        self.classifier = nn.Linear(before, num_classes)

        he_convolutions_(self, fan="out", activation=activation)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.pool(self.features(x)))
