"""Images as DIMAML's auto-encoder takes them: every pixel standardised by itself, and one shuffle of all pixels.

Axes: n images, b images of a batch, c channels, h height, w width.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PixelStatistics:
    """Mean and standard deviation of each pixel and channel, in units of full intensity (0 to 1).

    Attributes:
        mean: Over the training images.
        std: As `mean`; 0 where all training images agree.
    """

    mean: Float[Tensor, "c h w"]
    std: Float[Tensor, "c h w"]


def pixel_statistics(images: UInt8[Tensor, "n c h w"]) -> PixelStatistics:
    """Of each pixel and channel over some images, of the training split as a rule, in float64.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If there is no image.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"pixel_statistics: `images` must be uint8, got {images.dtype}. Likely normalised already.")
    n = len(images)
    if images.ndim != 4 or not n:
        raise ValueError(f"pixel_statistics: `images` must be (n, c, h, w), n ≥ 1, got shape {tuple(images.shape)}.")
    total, squares = (images.new_zeros(images.shape[1:], dtype=torch.int64) for _ in range(2))
    for chunk in images.split(1024):  # all of Tiny ImageNet as integers would take 10 GB
        total += chunk.sum(0, dtype=torch.int64)
        squares += chunk.to(torch.int64).square().sum(0)
    # in integers, so that a pixel which never changes has a deviation of exactly 0
    variance = (n * squares - total.square()).to(torch.float64) / (255 * n) ** 2
    return PixelStatistics(total.to(torch.float64) / (255 * n), variance.sqrt())


def standardise_pixels(
    images: UInt8[Tensor, "b c h w"], statistics: PixelStatistics, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b c h w"]:
    """(images / 255 − mean) / std, pixel by pixel and channel by channel.

    Where std is 0 nothing is divided: 0 for the value that every training image has there.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If the statistics are of images of another size.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"standardise_pixels: `images` must be uint8, got {images.dtype}. Likely standardised already.")
    if images.shape[1:] != statistics.mean.shape:
        raise ValueError(
            f"standardise_pixels: `statistics` must be of images like these, {tuple(images.shape[1:])}, "
            f"got {tuple(statistics.mean.shape)}."
        )
    std = torch.where(statistics.std > 0, statistics.std, 1.0)
    # the constants in double precision: a constant pixel is then 0 and not the round-off of 1/255
    factor, shift = (1 / (255 * std)).to(images.device, dtype), (255 * statistics.mean).to(images.device, dtype)
    return images.to(dtype).sub_(shift).mul_(factor)


def pixel_permutation(height: int, width: int, *, generator: torch.Generator) -> Int64[Tensor, "h*w"]:
    """A random order of the positions of an image, to be drawn once and kept for a whole data set.

    Raises:
        ValueError: If a side is below 1.
    """
    if min(height, width) < 1:
        raise ValueError(f"pixel_permutation: `height` and `width` must be at least 1, got {height} and {width}.")
    return torch.randperm(height * width, generator=generator, device=generator.device).cpu()


def shuffle_pixels(images: Tensor, permutation: Int64[Tensor, "h*w"]) -> Tensor:
    """Every image's pixels in one and the same new order, the channels of a pixel together.

    Position p of the result, row by row, holds what was at `permutation[p]`. A copy, of uint8 or of floats: shuffling
    before standardising (by the shuffled images' own statistics) or after it is the same. In DIMAML mirroring comes
    after the shuffle, so that half of the training images see the order mirrored.

    Args:
        images: (…, h, w).
        permutation: As `pixel_permutation` draws it.

    Raises:
        ValueError: If the permutation is not one of the images' h·w positions.
    """
    h, w = images.shape[-2:]
    if permutation.shape != (h * w,) or not torch.equal(permutation.sort().values.cpu(), torch.arange(h * w)):
        raise ValueError(
            f"shuffle_pixels: `permutation` must be an order of the {h * w} positions of {h}×{w} pixels, "
            f"got shape {tuple(permutation.shape)}. pixel_permutation({h}, {w}) draws one."
        )
    return images.flatten(-2)[..., permutation.to(images.device)].unflatten(-1, (h, w))
