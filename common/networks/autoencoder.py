"""The convolutional auto-encoder of DIMAML, and the loss it is trained by."""

from itertools import pairwise

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.networks.layers import make_norm
from common.types import Batch


class Autoencoder(nn.Module):
    r"""Images through a code of a few numbers, and back: (b, c, s, s) → (b, `code`) → (b, c, s, s).

    Encoder: four 5×5 convolutions, stride 2, padding 1, of width, 2·width, 4·width, 8·width channels, each with
    normalisation and ReLU, then a linear layer with a bias and no activation.
    Decoder: a linear layer to 4·width channels, normalisation, ReLU; three transposed 5×5 convolutions, stride 2,
    padding 1, to 2·width, width, width/2 channels, each with normalisation and ReLU; a transposed 4×4 convolution,
    stride 2, no padding, whose output is the image.
    64×64 images shrink to 31, 15, 7, 3 pixels a side and grow back the same way.

    Of the convolutions the last alone has a bias, of the linear layers the encoder's. Weights as torch has them.
    1,569,859 parameters at the defaults, 1,440 of them gains and shifts of the normalisation.

    Args:
        image_size: s, a multiple of 16 from 32 on: what the decoder gets back exactly.
        width: Channels of the first convolution, an even number.
        code: How many numbers an image is reduced to.
        batch_norm: False leaves the normalisation out, and nothing in its place.
        in_channels: c.
    """

    def __init__(
        self,
        image_size: int = 64,
        *,
        width: int = 32,
        code: int = 64,
        batch_norm: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if image_size < 32 or image_size % 16:
            raise ValueError(
                f"Autoencoder: `image_size` must be a multiple of 16 from 32 on, got {image_size}. "
                "Other sizes do not come out of the decoder as they went in: resize the images."
            )
        if width < 2 or width % 2 or code < 1:
            raise ValueError(
                f"Autoencoder: `width` must be even and positive, and `code` at least 1, got {width} and {code}."
            )
        inner = image_size // 16 - 1  # pixels a side after four convolutions
        widths = [in_channels, *(width * 2**k for k in range(4))]
        self.encoder = nn.Sequential()
        for before, after in pairwise(widths):
            self.encoder.extend(
                [
                    nn.Conv2d(before, after, 5, stride=2, padding=1, bias=False),
                    make_norm(after, batch_norm),
                    nn.ReLU(),
                ]
            )
        self.to_code = nn.Linear(widths[-1] * inner**2, code)
        widths = [4 * width, 2 * width, width, width // 2]
        self.from_code = nn.Linear(code, widths[0] * inner**2, bias=False)
        self.decoder = nn.Sequential(nn.Unflatten(1, (widths[0], inner, inner)), make_norm(widths[0], batch_norm))
        self.decoder.append(nn.ReLU())
        for before, after in pairwise(widths):
            self.decoder.extend(
                [
                    nn.ConvTranspose2d(before, after, 5, stride=2, padding=1, bias=False),
                    make_norm(after, batch_norm),
                    nn.ReLU(),
                ]
            )
        self.decoder.append(nn.ConvTranspose2d(widths[-1], in_channels, 4, stride=2))

    def encode(self, x: Float[Tensor, "b c s s"]) -> Float[Tensor, "b k"]:
        """The code of each image."""
        return self.to_code(self.encoder(x).flatten(1))

    def forward(self, x: Float[Tensor, "b c s s"]) -> Float[Tensor, "b c s s"]:
        return self.decoder(self.from_code(self.encode(x)))


def reconstruction_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error a pixel and channel between images and what `model` makes of them.

    Of images standardised pixel by pixel, 1 is what predicting their mean would give.

    Args:
        model: Maps images to images.
        batch: The images, (b, c, s, s), or a tuple that begins with them; labels are not read.
    """
    x = batch if isinstance(batch, Tensor) else batch[0]
    return F.mse_loss(model(x), x)
