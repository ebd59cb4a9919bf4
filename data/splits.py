"""Labelled images in memory: two splits of uint8 tensors, and one honest sentence on what they are.

Axes: n examples, h height, w width; the channels are always three (red, green, blue).
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

Channels = tuple[float, float, float]


# eq=False: comparing tensors inside a generated __eq__ has no single truth value
@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images and their labels, example by example.

    Attributes:
        images: uint8, 0 is black and 255 full intensity.
        labels: Class indices, starting at 0.
    """

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int64[Tensor, "n"]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(
                "ImageSplit: `images` must be uint8 of shape (n, 3, h, w), "
                f"got {self.images.dtype} of shape {tuple(self.images.shape)}."
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"ImageSplit: `labels` must be int64 of shape ({len(self.images)},), one an image, "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "ImageSplit":
        """The examples at `index`, in its order."""
        return ImageSplit(self.images[index.to(self.images.device)], self.labels[index.to(self.labels.device)])

    def to(self, device: torch.device | str) -> "ImageSplit":
        """The same split on another device: uint8 CIFAR-10 is 184 MB, so it fits beside a model."""
        return ImageSplit(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image set with its identity.

    Attributes:
        name: What was loaded: "cifar10", "cifar100", "tiny-imagenet", "digits" or "noise".
        train: The training split.
        test: The held-out split.
        class_names: One name a class.
        mean: Per channel, over the training images, in units of full intensity (0 to 1).
        std: Per channel, as `mean`. A subset keeps its whole set's mean and std.
        identity: One sentence for a figure's title: what this is, from where, how encoded, how many rows.
        source: Where it came from, and for a stand-in why the real set could not be had.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    class_names: tuple[str, ...]
    mean: Channels
    std: Channels
    identity: str
    source: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def subset(
        self, *, train: int | None = None, test: int | None = None, generator: torch.Generator, balanced: bool = True
    ) -> "ImageData":
        """Fewer examples of each split, drawn without replacement and kept in their order.

        Args:
            train: How many training examples; None keeps all.
            test: How many test examples; None keeps all.
            generator: Draws the examples, the training split first.
            balanced: The same number of every class (one more for some drawn classes where it does not divide);
                False draws from all examples alike.

        Raises:
            ValueError: If a split, or a class of it, holds fewer examples than asked for.
        """
        parts = {}
        for part, size in (("train", train), ("test", test)):
            split: ImageSplit = getattr(self, part)
            if size is None:
                parts[part] = split
                continue
            if not 1 <= size <= len(split):
                raise ValueError(f"subset: `{part}` must lie between 1 and {len(split)} (all examples), got {size}.")
            draw = draw_balanced if balanced else _draw
            parts[part] = split.take(draw(split.labels.cpu(), size, self.num_classes, generator))
        note = subset_note(len(parts["train"]), len(parts["test"]), balanced=balanced)
        return replace(self, **parts, identity=self.identity + note)

    def of_classes(self, count: int) -> "ImageData":
        """The examples of the first `count` classes alone.

        Raises:
            ValueError: If there are fewer classes, or less than two are asked for.
        """
        if not 2 <= count <= self.num_classes:
            raise ValueError(f"of_classes: `count` must lie between 2 and {self.num_classes}, got {count}.")
        if count == self.num_classes:
            return self
        train, test = (split.take((split.labels < count).nonzero().flatten()) for split in (self.train, self.test))
        note = f"; the first {count} classes, {len(train):,} train + {len(test):,} test"
        return replace(
            self, train=train, test=test, class_names=self.class_names[:count], identity=self.identity + note
        )

    def resized(self, size: int) -> "ImageData":
        """The images shrunk to size × size, each new pixel the average of the area it covers.

        Raises:
            ValueError: If `size` is larger than the images: enlarging adds nothing.
        """
        height, width = self.train.images.shape[2:]
        if not 1 <= size <= min(height, width):
            raise ValueError(f"resized: `size` must lie between 1 and {min(height, width)} pixels, got {size}.")
        if size == height == width:
            return self
        train, test = (ImageSplit(_shrink(s.images, size), s.labels) for s in (self.train, self.test))
        mean, std = channel_statistics(train.images)
        identity = f"{self.identity}; downscaled to {size}×{size}"
        return replace(self, train=train, test=test, mean=mean, std=std, identity=identity)

    def record(self) -> dict[str, Any]:
        """What `environment.json` says of the data, with a SHA-256 of every pixel and label."""
        digest = hashlib.sha256()
        for tensor in (self.train.images, self.train.labels, self.test.images, self.test.labels):
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return {
            "name": self.name,
            "identity": self.identity,
            "source": self.source,
            "train_rows": len(self.train),
            "test_rows": len(self.test),
            "image_shape": list(self.train.images.shape[1:]),
            "num_classes": self.num_classes,
            "mean": list(self.mean),
            "std": list(self.std),
            "sha256": digest.hexdigest(),
        }


def channel_statistics(images: UInt8[Tensor, "n 3 h w"]) -> tuple[Channels, Channels]:
    """Mean and standard deviation of each channel over all pixels, in units of full intensity."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in range(3):
        # a histogram of 256 values is exact and needs no float copy of the images
        count = torch.bincount(images[:, channel].flatten(), minlength=256).cpu().to(torch.float64)
        share = count / count.sum()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append((share * (values - mean) ** 2).sum().sqrt().item())
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])


def subset_note(train: int, test: int, *, balanced: bool = True) -> str:
    """What a subset adds to the identity of the whole."""
    return f"; {'class-balanced' if balanced else 'random'} subset of {train:,} train + {test:,} test"


def _draw(labels: Tensor, size: int, num_classes: int, generator: torch.Generator) -> Tensor:
    return _permutation(len(labels), generator)[:size].sort().values


def draw_balanced(labels: Tensor, size: int, num_classes: int, generator: torch.Generator) -> Tensor:
    """Rows of `size` examples, as many of every class, in increasing order."""
    quota = torch.full((num_classes,), size // num_classes)
    quota[_permutation(num_classes, generator)[: size % num_classes]] += 1
    chosen = []
    for label in range(num_classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < quota[label]:
            raise ValueError(
                f"subset: every class must hold its share of {size} examples, got {len(members)} of class {label} "
                f"where {int(quota[label])} are needed. Ask for fewer, or pass balanced=False."
            )
        chosen.append(members[_permutation(len(members), generator)[: int(quota[label])]])
    return torch.cat(chosen).sort().values


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device).cpu()


def _shrink(images: Tensor, size: int) -> Tensor:
    # in chunks: a float copy of 50 000 images would take 614 MB
    chunks = (chunk.to(torch.float32) for chunk in images.split(4096))
    return torch.cat([F.interpolate(chunk, size, mode="area").round().byte() for chunk in chunks])
