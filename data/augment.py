"""Batches of images for training and evaluation, augmented on whatever device they are on.

Axes: b batch, h height, w width. Every random number comes from the generator that is passed in, drawn where that
generator lives, so a CPU generator gives the same batches on a CPU and on an accelerator.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

from data.splits import Channels, ImageSplit

ImageBatch = tuple[Float[Tensor, "b 3 h w"], Int64[Tensor, "b"]]


def random_crop_flip(
    images: UInt8[Tensor, "b c h w"], *, padding: int = 4, generator: torch.Generator
) -> UInt8[Tensor, "b c h w"]:
    """Each image shifted by up to `padding` pixels, black where it leaves the frame, and mirrored half the time.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If `padding` is negative.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"random_crop_flip: `images` must be uint8, got {images.dtype}. Augment before `normalize`.")
    if padding < 0:
        raise ValueError(f"random_crop_flip: `padding` must be at least 0 pixels, got {padding}.")
    b, c, h, w = images.shape
    device = images.device
    # all (2·padding + 1)² windows of the padded image, the last one included
    top, left = (_integers(2 * padding + 1, b, generator).to(device) for _ in range(2))
    mirrored = _integers(2, b, generator).to(device).bool()
    row = top[:, None] + torch.arange(h, device=device)
    column = torch.arange(w, device=device).expand(b, w)
    column = left[:, None] + torch.where(mirrored[:, None], w - 1 - column, column)
    # one flat gather: four times faster than indexing by row and column, and no loop over images
    padded = F.pad(images, (padding, padding, padding, padding)).flatten(2)
    pixel = row[:, :, None] * (w + 2 * padding) + column[:, None, :]
    return padded.gather(2, pixel.view(b, 1, h * w).expand(b, c, h * w)).view(b, c, h, w)


def cutout(x: Float[Tensor, "b c h w"], *, size: int, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """One square hole of zeros in each image, centred on any pixel, cut off at the borders (DeVries and Taylor 2017).

    Args:
        x: Normalised images, of which 0 is the mean.
        size: Side of the hole in pixels.
        generator: Draws the centres.

    Raises:
        ValueError: If `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"cutout: `size` must be at least 1 pixel, got {size}.")
    b, _, h, w = x.shape

    def covered(length: int) -> Tensor:
        centre = _integers(length, b, generator).to(x.device)
        first = centre[:, None] - size // 2
        at = torch.arange(length, device=x.device)
        return (at >= first) & (at < first + size)

    hole = covered(h)[:, None, :, None] & covered(w)[:, None, None, :]
    return x.masked_fill(hole, 0.0)


def mixup(
    batch: ImageBatch, num_classes: int, *, alpha: float = 1.0, generator: torch.Generator
) -> tuple[Float[Tensor, "b 3 h w"], Float[Tensor, "b k"]]:
    """Each example mixed with another of the batch: λ for both images and labels, one λ ~ Beta(α, α) a batch.

    Source: Zhang et al. 2018.

    Returns:
        Images, and labels as class probabilities.

    Raises:
        ValueError: If `alpha` is not positive.
    """
    if not alpha > 0:
        raise ValueError(f"mixup: `alpha` must be positive, got {alpha}.")
    x, y = batch
    # torch's distributions take no generator
    seed = int(_integers(2**31 - 1, 1, generator))
    share = np.random.default_rng(seed).beta(alpha, alpha)
    order = torch.randperm(len(y), generator=generator, device=generator.device).to(x.device)
    p = F.one_hot(y, num_classes).to(x.dtype)
    return share * x + (1 - share) * x[order], share * p + (1 - share) * p[order]


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: Channels, std: Channels, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b c h w"]:
    """(images / 255 − mean) / std, channel by channel.

    Raises:
        TypeError: If the images are not uint8.
        ValueError: If a deviation is not positive.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize: `images` must be uint8, got {images.dtype}. Likely normalised already.")
    if min(std) <= 0:
        raise ValueError(f"normalize: `std` must be positive, got {tuple(std)}. Likely a channel that is constant.")
    factor = torch.tensor([1 / (255 * s) for s in std], dtype=dtype, device=images.device)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], dtype=dtype, device=images.device)
    return images.to(dtype).mul_(factor[:, None, None]).sub_(shift[:, None, None])


def epoch_batches(
    split: ImageSplit,
    batch_size: int,
    *,
    mean: Channels,
    std: Channels,
    generator: torch.Generator | None = None,
    augment: bool = True,
    shuffle: bool = True,
    drop_last: bool = True,
    device: torch.device | str | None = None,
) -> Iterator[ImageBatch]:
    """One pass over a split as normalised float32 batches, each example at most once.

    Args:
        split: On any device; examples are taken there and augmented on `device`.
        batch_size: Examples a batch.
        mean: Per channel, as in `ImageData.mean`.
        std: Per channel, as in `ImageData.std`.
        generator: Draws the order at the first batch, and the augmentation batch by batch: two passes that share one
            generator and take turns see each other's draws. Not needed without `shuffle` and `augment`.
        augment: Whether to apply `random_crop_flip`.
        shuffle: Whether to draw a new order; otherwise the split's own.
        drop_last: Whether to leave out what does not fill the last batch.
        device: Where the batches go; None is where the split is.

    Raises:
        TypeError: If a generator is needed and there is none.
        ValueError: If there would be no batch at all.
    """
    if generator is None and (augment or shuffle):
        raise TypeError(
            "epoch_batches: `generator` must be a torch.Generator to shuffle or augment, got None. "
            "Pass augment=False, shuffle=False, drop_last=False to evaluate."
        )
    if batch_size < 1 or (drop_last and batch_size > len(split)):
        raise ValueError(
            f"epoch_batches: `batch_size` must lie between 1 and {len(split)} (the split's size), got {batch_size}. "
            "Take a smaller batch, or pass drop_last=False."
        )
    # an inner generator function, so that the checks above are made at the call and not at the first batch
    return _epoch(
        split,
        batch_size,
        mean,
        std,
        generator if shuffle else None,
        generator if augment else None,
        drop_last,
        split.images.device if device is None else device,
    )


def evaluation_batches(
    split: ImageSplit,
    batch_size: int,
    *,
    mean: Channels,
    std: Channels,
    device: torch.device | str | None = None,
) -> Iterator[ImageBatch]:
    """Every example exactly once, in order and as it is; the last batch may be smaller."""
    return epoch_batches(
        split, batch_size, mean=mean, std=std, augment=False, shuffle=False, drop_last=False, device=device
    )


def sample_batches(
    split: ImageSplit,
    batch_size: int,
    *,
    mean: Channels,
    std: Channels,
    generator: torch.Generator,
    augment: bool = True,
    device: torch.device | str | None = None,
) -> Iterator[ImageBatch]:
    """Full batches without end: pass after pass of `epoch_batches`, each in a new order.

    Within a pass no example comes twice, no batch spans two passes, and what does not fill a batch sits that pass out.
    """
    options = {"mean": mean, "std": std, "generator": generator, "augment": augment, "device": device}
    first = epoch_batches(split, batch_size, **options)

    def endless() -> Iterator[ImageBatch]:
        yield from first
        while True:
            yield from epoch_batches(split, batch_size, **options)

    return endless()


def _epoch(
    split: ImageSplit,
    batch_size: int,
    mean: Channels,
    std: Channels,
    order_generator: torch.Generator | None,
    augment_generator: torch.Generator | None,
    drop_last: bool,
    device: torch.device | str,
) -> Iterator[ImageBatch]:
    n = len(split)
    if order_generator is None:
        order = torch.arange(n)
    else:
        order = torch.randperm(n, generator=order_generator, device=order_generator.device)
    for index in order[: n - n % batch_size if drop_last else n].split(batch_size):
        batch = split.take(index).to(device)
        images = batch.images
        if augment_generator is not None:
            images = random_crop_flip(images, generator=augment_generator)
        yield normalize(images, mean, std), batch.labels


def _integers(high: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)
