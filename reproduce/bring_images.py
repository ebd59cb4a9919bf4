"""Labelled images that are no set of ours: a folder with a subfolder a class, or a Hugging Face set, in memory.

Every image becomes RGB, is cropped to its central square and resized to one size. Files are read as images only.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import torch
from huggingface_hub import constants
from PIL import Image, ImageOps
from pyarrow import parquet
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension, make_dataset

from data import ImageData, ImageSplit, channel_statistics
from data.sources import is_whole, probe
from data.splits import draw_balanced, subset_note

IMAGE_SIZE = 64
"""The largest side in pixels that is taken unasked."""
# not all that PIL opens: it runs Ghostscript for some
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")
HELD_OUT = ("test", "validation", "valid", "val")
"""Names that a test split may go by, in the order they are preferred."""
TEST_SHARE = 5
"""One image in so many is held out where a set has no test split."""


class Listing(NamedTuple):
    """A split before it is decoded: labels, the encoded image of a row, and what a message calls that row."""

    labels: Tensor
    read: Callable[[int], bytes]
    where: Callable[[int], str]


# ---------------------------------------------------------------------------------------------- a folder
def load_folder(
    folder: str | os.PathLike[str], *, train: int | None, test: int | None, image_size: int | None, caller: str
) -> ImageData:
    """Images in one subfolder a class, or in such subfolders of train/ and of test/, validation/, valid/ or val/.

    Where there is no test split, a fifth of each class is drawn, the same at every call. Files whose names do not end
    as an image's are left out, and `identity` names them.

    Raises:
        ValueError: No class, a single one, one without an image, a test class unknown to training, or a damaged image.
    """
    root = Path(folder).expanduser()
    has_splits = bool(_subfolders(root / "train"))
    training = root / "train" if has_splits else root
    class_names = tuple(_subfolders(training))
    if not class_names:
        raise ValueError(f"{caller}: '{root}' must hold one subfolder of images a class, got no subfolder in it.")
    held_out = next((root / name for name in HELD_OUT if _subfolders(root / name)), None) if has_splits else None
    listing, others = _list_files(training, class_names, caller)
    if missing := set(range(len(class_names))) - set(listing.labels.tolist()):
        raise ValueError(
            f"{caller}: every class must have an image, got none in '{training / class_names[min(missing)]}'. "
            f"Files of images end in {', '.join(IMG_EXTENSIONS)}."
        )
    test_listing = None
    if held_out is not None:
        if unknown := set(_subfolders(held_out)) - set(class_names):
            raise ValueError(
                f"{caller}: test classes must be among the training ones, got {min(unknown)!r} in '{held_out}' alone."
            )
        test_listing, more = _list_files(held_out, class_names, caller)
        others += more
    note = f"; left out, as no images: {', '.join(others[:3])}{' and others' if len(others) > 3 else ''}"
    return _in_memory(
        name=root.resolve().name, title=f"the folder '{root.resolve().name}'", source="a local folder",
        notes=note if others else "", listings=(listing, test_listing), class_names=class_names,
        sizes=(train, test), image_size=image_size, caller=caller,
    )  # fmt: skip


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    hidden = (".", "__")  # such as .ipynb_checkpoints and __MACOSX
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(hidden))


def _list_files(folder: Path, class_names: Sequence[str], caller: str) -> tuple[Listing, list[str]]:
    numbers = {name: number for number, name in enumerate(class_names)}
    found = make_dataset(
        folder, numbers, is_valid_file=lambda path: not os.path.basename(path).startswith("."), allow_empty=True
    )
    images = [(path, label) for path, label in found if has_file_allowed_extension(path, IMG_EXTENSIONS)]
    others = [
        os.path.relpath(path, folder) for path, _ in found if not has_file_allowed_extension(path, IMG_EXTENSIONS)
    ]
    if not images:
        raise ValueError(f"{caller}: '{folder}' must hold images, got none. They end in {', '.join(IMG_EXTENSIONS)}.")
    paths, labels = zip(*images, strict=True)
    return Listing(
        torch.tensor(labels), lambda row: Path(paths[row]).read_bytes(), lambda row: f"'{paths[row]}'"
    ), others


# ---------------------------------------------------------------------------------------------- the hub
class Rows(NamedTuple):
    """A split as it is stored, and what a message calls it."""

    table: pa.Table
    title: str


def load_hub(name: str, *, train: int | None, test: int | None, image_size: int | None, caller: str) -> ImageData:
    """A labelled image set of the hub, NAME or NAME:CONFIGURATION, or a local folder in the hub's parquet layout.

    The image column is the one of that type, the label column the one of class labels, or else the only one, or one
    called "label", of strings or whole numbers, which become 0, 1, … in increasing order. The test split is the one
    called test, unless it has no labels, or else validation or valid; where there is none, a fifth of each class is
    drawn, the same at every call. A folder is read in place; a set of the hub is kept where `datasets` keeps its own.

    Raises:
        FileNotFoundError: The hub cannot be reached, which shows within seconds, or does not have the set.
        ValueError: Columns or labels that leave a choice or are not what they should be; a damaged file or image.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        title, splits = f"the folder '{folder.resolve().name}'", _read_folder(folder, caller)
    else:
        title, splits = f"the hub's {name}", _from_hub(name, caller)
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{caller}: a set must have a split called train, got {', '.join(splits)} of {title}.")
    training = "train" if "train" in splits else next(iter(splits))
    features = datasets.Features.from_arrow_schema(splits[training].table.schema)
    image_column, label_column = _columns(features, title, caller)
    values: dict[str, list] = {}
    for key, (table, where) in splits.items():
        if missing := {image_column, label_column} - set(table.column_names):
            raise ValueError(f"{caller}: every split must have the column `{min(missing)}`, got none in {where}.")
        values[key] = table.column(label_column).to_pylist()
    numbers = _numbers(features[label_column], values[training], label_column, title, caller)
    # −1 is how sets on the hub mark labels that are not public
    labelled = [key for key in HELD_OUT if key in splits and key != training and set(values[key]) - {None, -1}]

    def listing(key: str) -> Listing:
        table, where = splits[key]
        images = table.column(image_column)
        return Listing(
            _numbered(values[key], numbers, label_column, where, caller),
            lambda row: _stored(images[row].as_py(), f"row {row} of {where}", caller),
            lambda row: f"row {row} of {where}",
        )

    names = features[label_column].names if isinstance(features[label_column], datasets.ClassLabel) else numbers
    return _in_memory(
        name=folder.resolve().name if folder.is_dir() else name, title=title,
        source="a local folder" if folder.is_dir() else "the Hugging Face hub", notes="",
        listings=(listing(training), listing(labelled[0]) if labelled else None),
        class_names=tuple(str(label) for label in names), sizes=(train, test), image_size=image_size, caller=caller,
    )  # fmt: skip


def _read_folder(folder: Path, caller: str) -> dict[str, Rows]:
    """Parquet files named after their splits, in the folder, in its data/, or in that of a configuration."""
    splits = ("train", *HELD_OUT)
    for parent in (folder, *(folder / name for name in _subfolders(folder))):
        files = {
            split: sorted(parent.glob(f"{split}[-.]*parquet")) or sorted((parent / split).glob("*.parquet"))
            for split in splits
        }
        if not files["train"] and parent.name not in splits:  # files of any other name are all there is
            others = [path for path in sorted(parent.glob("*.parquet")) if re.split("[-.]", path.name)[0] not in splits]
            files = {"train": others}
        files = {split: paths for split, paths in files.items() if paths}
        for split, paths in files.items():
            if not is_whole(tuple(paths)):
                raise ValueError(
                    f"{caller}: a split must be whole, got {len(paths)} of the parts of {split} in '{parent}'. "
                    "Likely a download cut off: fetch it again."
                )
        if files:
            return {
                split: Rows(
                    _read_parquet(paths, caller), f"'{paths[0]}'" if len(paths) == 1 else f"{split} in '{parent}'"
                )
                for split, paths in files.items()
            }
    raise ValueError(
        f"{caller}: '{folder}' must hold train-*.parquet, as the hub has it, got no such file. "
        "For a folder of image files leave out hub:."
    )


def _read_parquet(paths: list[Path], caller: str) -> pa.Table:
    tables = []
    for path in paths:
        try:
            tables.append(parquet.read_table(path))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{caller}: '{path}' must be a parquet file, got {type(error).__name__}: {error}. "
                "Likely a broken download: fetch it again."
            ) from error
    try:
        return pa.concat_tables(tables)
    except pa.ArrowException as error:
        raise ValueError(f"{caller}: the parts of '{paths[0]}' must have the same columns, got {error}.") from error


def _from_hub(name: str, caller: str) -> dict[str, Rows]:
    repository, _, configuration = name.partition(":")
    obstacle = None
    if not constants.HF_HUB_OFFLINE:  # then `datasets` reads its cache, and asks nobody
        endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        obstacle = probe(f"{endpoint}/api/datasets/{repository}")
        obstacle = obstacle and f"{endpoint} {obstacle}"
    if obstacle:
        raise FileNotFoundError(
            f"{caller}: hub:{name} must be on the hub, or be a folder with parquet files, got neither: {obstacle}. "
            "Connect to the network, log in where a set is not public, set HF_HUB_OFFLINE=1 to use an earlier "
            "download, or name a folder: hub:FOLDER."
        )
    try:
        loaded: Any = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # whichever HTTP library and file format are behind it raise their own
        raise FileNotFoundError(
            f"{caller}: hub:{name} must be loadable, got {type(error).__name__}: {error} "
            "A configuration is named after a colon: hub:NAME:CONFIGURATION."
        ) from error
    # the features are put beside the table, whatever of them it came with
    return {
        key: Rows(split.data.table.cast(split.features.arrow_schema), f"the split {key} of {name}")
        for key, split in loaded.items()
    }


def _columns(features: datasets.Features, title: str, caller: str) -> tuple[str, str]:
    """Which column holds the images, and which the labels."""

    def is_image(feature: Any) -> bool:  # a struct, where the file was not written by `datasets`
        return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and "bytes" in feature)

    def is_plain(feature: Any) -> bool:
        return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "string", "large_str"))

    def one(kind: str, candidates: list[str], customary: tuple[str, ...]) -> str:
        chosen = candidates if len(candidates) == 1 else [name for name in candidates if name in customary]
        if len(chosen) != 1:
            raise ValueError(
                f"{caller}: there must be one column of {kind} in {title}, or one called {' or '.join(customary)}, got "
                f"{', '.join(candidates) or 'none'} among {', '.join(features)}. Write a loader of your own, "
                "package.module:callable, that chooses."
            )
        return chosen[0]

    images = one("images", [name for name, feature in features.items() if is_image(feature)], ("image", "img"))
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name, feature in features.items() if is_plain(feature)]
    return images, one("labels", classes or plain, ("label", "labels"))


def _numbers(feature: Any, values: list, column: str, title: str, caller: str) -> dict[Any, int]:
    """From a label as stored to its class."""
    if isinstance(feature, datasets.ClassLabel):
        return {number: number for number in range(len(feature.names))}
    distinct = sorted(set(values) - {None})
    if len(distinct) == len(values) > 1:
        raise ValueError(
            f"{caller}: labels must repeat, got another one in each of the {len(values)} rows of `{column}` of "
            f"{title}. It seems to name the images, not their classes."
        )
    return {value: number for number, value in enumerate(distinct)}


def _numbered(values: list, numbers: Mapping[Any, int], column: str, where: str, caller: str) -> Tensor:
    for row, value in enumerate(values):
        if value not in numbers:
            known = list(numbers)
            raise ValueError(
                f"{caller}: labels must be among the {len(known)} classes of the training split "
                f"({', '.join(map(repr, known[:3]))}{', …' if len(known) > 3 else ''}), got {value!r} in `{column}`, "
                f"row {row} of {where}."
            )
    return torch.tensor([numbers[value] for value in values], dtype=torch.int64)


def _stored(image: dict[str, Any] | None, where: str, caller: str) -> bytes:
    """The encoded bytes, or those of the file that stands in their place in a set of image files on the hub."""
    if image and image["bytes"] is not None:
        return image["bytes"]
    if image and image.get("path") and Path(image["path"]).is_file():
        return Path(image["path"]).read_bytes()
    raise ValueError(f"{caller}: an image must be stored in the set itself, got nothing in {where}.")


# ---------------------------------------------------------------------------------------------- in memory
def _in_memory(
    *,
    name: str,
    title: str,
    source: str,
    notes: str,
    listings: tuple[Listing, Listing | None],
    class_names: tuple[str, ...],
    sizes: tuple[int | None, int | None],
    image_size: int | None,
    caller: str,
) -> ImageData:
    """Choose the examples, and decode these alone."""
    if len(class_names) < 2:
        raise ValueError(
            f"{caller}: classification needs two classes, got {len(class_names)} in {title}: "
            f"{', '.join(class_names) or 'no label'}. A folder must have one subfolder a class."
        )
    training, held_out = listings
    rows = torch.arange(len(training.labels))
    if held_out is None:
        held_out, (rows, test_rows) = training, _drawn(training.labels, caller)
        notes = f"; no test split there: one in {TEST_SHARE} of each class is drawn to test on, with seed 0{notes}"
    else:
        test_rows = torch.arange(len(held_out.labels))
    whole = len(rows), len(test_rows)
    rows, is_balanced = _at_most(training.labels, rows, sizes[0], len(class_names))
    test_rows, is_test_balanced = _at_most(held_out.labels, test_rows, sizes[1], len(class_names))
    if not (len(rows) and len(test_rows)):
        raise ValueError(f"{caller}: both splits must hold an image, got {len(rows)} and {len(test_rows)} of {title}.")
    if (len(rows), len(test_rows)) != whole:
        notes += subset_note(len(rows), len(test_rows), balanced=is_balanced and is_test_balanced)
    size = image_size or min(IMAGE_SIZE, _usual_side(training, rows, caller))
    train, test = _decoded(training, rows, size, caller), _decoded(held_out, test_rows, size, caller)
    mean, std = channel_statistics(train.images)
    return ImageData(
        name=name, train=train, test=test, class_names=class_names, mean=mean, std=std, source=source,
        identity=f"{title}, {whole[0]:,} train + {whole[1]:,} test images of {len(class_names)} classes, "
        f"central squares resized to {size}×{size}{notes}",
    )  # fmt: skip


def _drawn(labels: Tensor, caller: str) -> tuple[Tensor, Tensor]:
    """Rows to train and to test on: of every class one in `TEST_SHARE`, but one at least, is held out."""
    generator = torch.Generator().manual_seed(0)
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise ValueError(
                f"{caller}: every class must have two images for a test split to be drawn, got one of class "
                f"{int(label)}. Add images, or a test split."
            )
        order = torch.randperm(len(members), generator=generator)
        is_test[members[order[: max(1, len(members) // TEST_SHARE)]]] = True
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def _at_most(labels: Tensor, rows: Tensor, size: int | None, num_classes: int) -> tuple[Tensor, bool]:
    """At most `size` of the rows, as many of every class if each has enough, and whether that is so."""
    if size is None or size >= len(rows):
        return rows, True
    generator = torch.Generator().manual_seed(0)
    own = labels[rows]
    if own.bincount(minlength=num_classes).min() >= -(-size // num_classes):
        return rows[draw_balanced(own, size, num_classes, generator)], True
    return rows[torch.randperm(len(rows), generator=generator)[:size].sort().values], False


def _usual_side(listing: Listing, rows: Tensor, caller: str) -> int:
    """The median of the images' shorter sides in pixels, of a thousand or two of them."""
    some = rows[:: max(1, len(rows) // 1000)]
    return int(median(min(_opened(listing, row, caller).size) for row in some.tolist()))


def _opened(listing: Listing, row: int, caller: str) -> Image.Image:
    encoded = listing.read(row)
    try:
        return Image.open(BytesIO(encoded), formats=FORMATS)
    except Exception as error:  # whatever PIL's parsers trip over
        raise _no_image(listing.where(row), error, caller) from error


def _no_image(where: str, error: Exception, caller: str) -> ValueError:
    return ValueError(
        f"{caller}: an image must be a whole {', '.join(FORMATS)}, got {type(error).__name__} in {where}. "
        "Likely a broken file: fetch it again, or remove it."
    )


def _decoded(listing: Listing, rows: Tensor, size: int, caller: str) -> ImageSplit:
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for place, row in enumerate(rows.tolist()):
        image = _opened(listing, row, caller)
        if image.mode.startswith(("I", "F")):  # PIL would clip, not scale, these to 8 bits
            raise ValueError(
                f"{caller}: an image must have 8 bits a channel, got mode {image.mode} in {listing.where(row)}."
            )
        try:
            square = _square(image, size)
        except Exception as error:  # as above; PIL decodes no earlier
            raise _no_image(listing.where(row), error, caller) from error
        images[place] = (
            torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
        )
    return ImageSplit(images, listing.labels[rows])


def _square(image: Image.Image, size: int) -> Image.Image:
    # a palette with transparency goes through RGBA, or PIL warns; transparency itself is dropped, as ImageFolder does
    image = image.convert("RGBA") if "transparency" in image.info else image
    return ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
