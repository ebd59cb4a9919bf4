"""What DIMAML's two experiments on images share: a source and a target, and which images are held out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from common.functional import load_parameters_
from common.initializers import delta_orthogonal_
from data import ImageData, load_images
from reproduce.dimaml import Options

IMAGE_SETS = {"tiny-imagenet": "Tiny ImageNet", "cifar10": "CIFAR-10", "digits": "digits"}
"""For people."""


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Options of both. A preset sets them; each can be overridden."""

    data: Literal["auto", "images", "digits"] = "auto"
    """images: CIFAR-10 and Tiny ImageNet, from the folder, the Hugging Face cache or the hub. digits: scikit-learn's,
    for both. auto: the images, or else the digits."""
    image_size: int | None = None
    """Images are shrunk to so many pixels a side; None: as they are."""
    train_images: int | None = None
    """Training images of each set that is cut short, class-balanced; None: all."""
    held_out_images: int = 10_000
    """Further training images of the source, for the evaluations in V; a fifth of what there is at most."""

    @property
    def source_images(self) -> int | None:
        """Training images of the source with those that will be held out; None: all."""
        return self.train_images and self.train_images + self.held_out_images


def load_both(
    config: ImageOptions, *, cifar10: Mapping[str, Any], tiny_imagenet: Mapping[str, Any]
) -> tuple[ImageData, ImageData]:
    """CIFAR-10 and Tiny ImageNet, each with its options of `load_images`, at their own size.

    Both are the digits where there are no images to be had.

    Raises:
        FileNotFoundError: One cannot be had, and either it was asked for or the other one is there.
    """
    name = {"auto": "auto", "images": "cifar10", "digits": "digits"}[config.data]
    first = load_images(name, data_dir=config.data_dir, **cifar10)
    second = "digits" if first.name == "digits" else "tiny-imagenet"
    return first, load_images(second, data_dir=config.data_dir, **tiny_imagenet)


def checked_and_shrunk(
    source: ImageData, target: ImageData, config: ImageOptions, experiment: str
) -> tuple[ImageData, ImageData]:
    """Source and target at the size asked for.

    Raises:
        ValueError: Too few images for a batch of training, or for one of evaluation.
    """
    held_out = held_out_of(len(source.train), config.held_out_images)
    left = len(source.train) - held_out
    if min(left, len(target.train)) < config.batch_size or held_out < config.held_out_batch_size:
        raise ValueError(
            f"{experiment}: source and target must have a batch of {config.batch_size} training images, and those held "
            f"out be one of {config.held_out_batch_size}, got {left} and {held_out} of {source.identity}, and "
            f"{len(target.train)} of {target.identity}. Use smaller batches."
        )
    if config.image_size is None:
        return source, target
    return source.resized(config.image_size), target.resized(config.image_size)


def held_out_of(images: int, wanted: int) -> int:
    """How many of a source's images are held out: as many as wanted, and a fifth at most (the digits are few)."""
    return min(wanted, max(1, images // 5))


def delta_orthogonal_convolutions_(model: nn.Module, generator: torch.Generator) -> None:
    """As released: convolutions alone, transposed ones among them, with gain √2; all else stays as it is."""
    others = {name: leaf.detach().clone() for name, leaf in model.named_parameters() if leaf.ndim != 4}
    delta_orthogonal_(model, generator=generator, gain=2**0.5)
    load_parameters_(model, others)
