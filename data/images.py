"""Labelled images by name: the published sets, and two that need no network."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from data.parquet import read_split
from data.sources import VARIABLE, HubSet, SourceUnavailableError, locate
from data.splits import ImageData, ImageSplit, channel_statistics, draw_balanced, subset_note

ImageName = Literal["auto", "cifar10", "cifar100", "tiny-imagenet", "digits", "noise"]


@dataclass(frozen=True, kw_only=True)
class ImageSet(HubSet):
    """A labelled image set on the hub: parquet files with encoded images and class labels."""

    files: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"train": ("train-*.parquet",), "test": ("test-*.parquet",)}
    )
    loader: str = "load_images"
    image_column: str
    label_column: str
    num_classes: int
    published_as: str = "pixels"
    """What the set was published as: raw pixels, of which a JPEG has lost something, or JPEG files."""
    note: str = ""
    """What a reader must know of its splits."""


IMAGE_SETS = {
    "cifar10": ImageSet(
        name="cifar10",
        title="CIFAR-10",
        repository="uoft-cs/cifar10",
        rows={"train": 50_000, "test": 10_000},
        image_column="img",
        label_column="label",
        num_classes=10,
    ),
    "cifar100": ImageSet(
        name="cifar100",
        title="CIFAR-100",
        repository="uoft-cs/cifar100",
        rows={"train": 50_000, "test": 10_000},
        image_column="img",
        label_column="fine_label",
        num_classes=100,
    ),
    "tiny-imagenet": ImageSet(
        name="tiny_imagenet",  # the folder's; the hub and people write a hyphen
        title="Tiny ImageNet",
        repository="zh-plus/tiny-imagenet",
        files={"train": ("train-*.parquet",), "test": ("valid-*.parquet", "validation-*.parquet")},
        rows={"train": 100_000, "test": 10_000},
        image_column="image",
        label_column="label",
        num_classes=200,
        published_as="JPEG",
        note="test is the validation split, as the test labels are not public",
    ),
}
"""By the name that a user asks for."""


def load_images(
    name: ImageName | str = "auto",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    train: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> ImageData:
    """An image set, in memory as uint8.

    A published set is taken from the folder `data_dir` (or else the environment variable LEARNED_INIT_DATA), or else
    from the local Hugging Face cache, or else from the hub. A folder that is given must hold the set.

    Args:
        name: "cifar10", "cifar100" or "tiny-imagenet" (64×64, 200 classes), which never fall back to anything else;
            "digits", scikit-learn's own, enlarged; "noise", Gaussian images whose labels mean nothing; "auto", CIFAR-10
            or, where it cannot be had, the digits.
        data_dir: A folder with `cifar10/train-*.parquet` and `cifar10/test-*.parquet` in the hub's schema, or that
            inner folder itself; for Tiny ImageNet `tiny_imagenet/train-*.parquet` and `valid-*.parquet`. Not used by
            "digits" and "noise".
        train: At most this many training images, class-balanced; the others are not even decoded. None: all.
        test: At most this many test images, likewise.
        seed: Draws the subset, and the noise.

    Raises:
        FileNotFoundError: If a named set cannot be had, or a folder that is given does not hold it.
        ValueError: If the name is unknown, or a file is damaged or holds something else.
    """
    for part, size in (("train", train), ("test", test)):
        if size is not None and size < 1:
            raise ValueError(f"load_images: `{part}` must be at least 1 image, got {size}. None takes all.")
    if name == "digits":
        return _at_most(_digits(), train, test, seed)
    if name == "noise":
        return _at_most(_noise(seed), train, test, seed)
    if name != "auto" and name not in IMAGE_SETS:
        raise ValueError(f"load_images: `name` must be one of {', '.join(get_args(ImageName))}, got {name!r}.")
    wanted = IMAGE_SETS["cifar10" if name == "auto" else name]
    try:
        located = locate(wanted, data_dir)
    except SourceUnavailableError as error:
        if name == "auto":
            return _at_most(_digits(instead_of=wanted.title, because=str(error)), train, test, seed)
        raise FileNotFoundError(
            f"load_images: '{name}' must be in a folder, in the Hugging Face cache or on the hub, got none of them. "
            f"Tried: {error}. Pass a folder that holds {wanted.layout()} as `data_dir` "
            f"or {VARIABLE}, connect to the network, or take 'digits' or 'auto'."
        ) from error
    parts = []
    for split, size in (("train", train), ("test", test)):
        generator = torch.Generator().manual_seed(seed)  # one a split: which test images does not depend on `train`
        part = read_split(
            located.files[split],
            image_column=wanted.image_column,
            label_column=wanted.label_column,
            num_classes=wanted.num_classes,
            choose=partial(_rows, size=size, num_classes=wanted.num_classes, generator=generator),
        )
        parts.append(part)
    if parts[0].split.images.shape[1:] != parts[1].split.images.shape[1:]:
        sizes = " and ".join(str(tuple(part.split.images.shape[1:])) for part in parts)
        raise ValueError(
            f"load_images: training and test images must have one size, got {sizes} from {located.origin}."
        )
    mean, std = channel_statistics(parts[0].split.images)
    identity = _identity(wanted, located.origin, parts[0].encodings | parts[1].encodings, parts[0].rows, parts[1].rows)
    if any(len(part.split) < part.rows for part in parts):
        identity += subset_note(len(parts[0].split), len(parts[1].split))
    return ImageData(
        name=name if name in IMAGE_SETS else wanted.name,
        train=parts[0].split,
        test=parts[1].split,
        class_names=parts[0].class_names or tuple(str(label) for label in range(wanted.num_classes)),
        mean=mean,
        std=std,
        identity=identity,
        source=located.origin,
    )


def _rows(labels: Tensor, *, size: int | None, num_classes: int, generator: torch.Generator) -> Tensor:
    if size is None or size >= len(labels):
        return torch.arange(len(labels))
    return draw_balanced(labels, size, num_classes, generator)


def _at_most(data: ImageData, train: int | None, test: int | None, seed: int) -> ImageData:
    if (train is None or train >= len(data.train)) and (test is None or test >= len(data.test)):
        return data
    parts = {}
    for part, split, size in (("train", data.train, train), ("test", data.test, test)):
        generator = torch.Generator().manual_seed(seed)  # one a split, as for the published sets
        rows = _rows(split.labels, size=size, num_classes=data.num_classes, generator=generator)
        parts[part] = split.take(rows)
    return replace(data, **parts, identity=data.identity + subset_note(len(parts["train"]), len(parts["test"])))


def _identity(wanted: ImageSet, origin: str, encodings: frozenset[str], train: int, test: int) -> str:
    if wanted.published_as == "JPEG":
        encoding = " and ".join(sorted(encodings)) + (
            "; published as JPEG" if encodings != {"JPEG"} else " as published"
        )
    else:  # a JPEG has lost something
        encoding = {
            frozenset({"JPEG"}): "JPEG re-encoded: lossy",
            frozenset({"PNG"}): "PNG: lossless",
        }.get(encodings, "JPEG and PNG: partly lossy")
    rows = wanted.count({"train": train, "test": test})
    return f"{wanted.title} from {origin} ({encoding}), {rows} images" + (f" ({wanted.note})" if wanted.note else "")


def _digits(*, instead_of: str = "", because: str = "") -> ImageData:
    # imported here: two seconds that only this set needs
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    grey = torch.tensor(bunch.images, dtype=torch.float32)[:, None] * (255 / 16)
    enlarged = F.interpolate(grey, (32, 32), mode="bilinear", align_corners=False)
    images = enlarged.round().byte().repeat(1, 3, 1, 1)
    # every fifth example of each class is held out: fixed, stratified, and without a random number
    by_class = labels.argsort(stable=True)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[by_class[4::5]] = True
    train, test = (ImageSplit(images[mask], labels[mask]) for mask in (~is_test, is_test))
    stand_in = f", standing in for {instead_of}" if instead_of else ""
    return _embedded(
        "digits",
        train,
        test,
        f"scikit-learn digits (embedded{stand_in}), 8×8 grey enlarged to 3×32×32",
        "embedded in scikit-learn" + (f"; {instead_of} tried: {because}" if instead_of else ""),
    )


def _noise(seed: int) -> ImageData:
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> ImageSplit:
        # a quarter of the range as deviation: one pixel in 22 is clipped to black or white
        pixels = 127.5 + 63.75 * torch.randn(n, 3, 32, 32, generator=generator, dtype=torch.float32)
        labels: Tensor = torch.arange(n) % 10
        return ImageSplit(pixels.round().clamp(0, 255).byte(), labels)

    train, test = draw(5_000), draw(1_000)
    return _embedded(
        "noise",
        train,
        test,
        f"Gaussian noise (generated, seed {seed}), labels independent of the images",
        f"generated from seed {seed}",
    )


def _embedded(name: str, train: ImageSplit, test: ImageSplit, what: str, source: str) -> ImageData:
    mean, std = channel_statistics(train.images)
    return ImageData(
        name=name,
        train=train,
        test=test,
        class_names=tuple(str(label) for label in range(10)),
        mean=mean,
        std=std,
        identity=f"{what}, {len(train):,} train + {len(test):,} test images",
        source=source,
    )
