"""Plain convolutional networks: no skip connection and, by default, no normalisation, of any depth."""

import math

from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import GlobalAveragePool, gain_of, he_convolutions_, make_activation, make_norm


class PlainNet(nn.Module):
    r"""A stack of 3×3 convolutions, the setting in which a bad initialisation shows: MetaInit's plain networks.

    (b, in_channels, h, w) → `depth - 1` convolutions in `stages` stages, the earlier stages taking what does not
    divide evenly; each later stage halves the resolution in its first convolution and doubles the channels
    → global average → linear → (b, num_classes). The architecture is ours; the paper's own plain networks are
    `ResNet` and `WideResNet` with `skip=False`.

    Weights: Kaiming normal over the fan-in, with the gain of the activation; biases zero.

    Args:
        depth: Weight layers, the classifier among them.
        width: Channels of the first stage.
        activation: Name of an activation layer of `torch.nn`.
        batch_norm: Batch normalisation after every convolution, which then has no bias.
        stages: Resolutions the convolutions work at.
        stem_stride: Stride of the first convolution; 2 makes everything about four times cheaper.
    """

    def __init__(
        self,
        depth: int = 12,
        width: int = 16,
        *,
        activation: str = "relu",
        batch_norm: bool = False,
        stages: int = 3,
        stem_stride: int = 1,
        in_channels: int = 3,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 2 or stages < 1:
            raise ValueError(
                f"PlainNet: `depth` must be at least 2 and `stages` at least 1, got {depth} and {stages}. "
                "A convolution and the classifier are the shallowest network."
            )
        stages = min(stages, depth - 1)  # every stage holds a convolution
        each, left_over = divmod(depth - 1, stages)
        layers: list[nn.Module] = []
        before = in_channels
        for stage in range(stages):
            channels = width * 2**stage
            for position in range(each + (stage < left_over)):
                stride = 1 if position else (2 if stage else stem_stride)
                layers += [
                    nn.Conv2d(before, channels, 3, stride=stride, padding=1, bias=not batch_norm),
                    *([make_norm(channels, True)] if batch_norm else []),
                    make_activation(activation),
                ]
                before = channels
        self.features = nn.Sequential(*layers)
        self.pool = GlobalAveragePool()
        self.classifier = nn.Linear(before, num_classes)

        he_convolutions_(self, fan="in", activation=activation)
        nn.init.normal_(self.classifier.weight, std=gain_of(activation) / math.sqrt(before))
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        return self.classifier(self.pool(self.features(x)))
