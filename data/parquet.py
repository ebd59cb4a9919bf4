"""The one reader for folder, cache and hub: parquet files with the hub's encoded images and class labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import datasets
import pyarrow as pa
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor

from data.splits import ImageSplit


@dataclass(frozen=True, eq=False)
class Decoded:
    """A split as read: its examples, how they were encoded, and the class names where the files give them."""

    split: ImageSplit
    encodings: frozenset[str]
    rows: int
    """How many examples the files hold, of which `split` may be a part."""
    class_names: tuple[str, ...] | None


def read_split(
    files: Sequence[Path],
    *,
    image_column: str,
    label_column: str,
    num_classes: int,
    choose: Callable[[Tensor], Tensor] | None = None,
) -> Decoded:
    """Decode the images of some parquet files into one tensor. Nothing is written, here or in the user's home.

    Args:
        files: The parts of one split, in order.
        image_column: Encoded images.
        label_column: Class labels.
        num_classes: How many classes there are.
        choose: From all labels to the rows to decode, in increasing order; by default all of them.

    Raises:
        ValueError: If a file, a column, an image or a label is not what it should be; the message names file and row.
    """
    tables, labels, class_names = [], [], None
    for path in files:
        table = _read_table(path, image_column, label_column)
        # not `datasets.Dataset.from_parquet`, which writes a second copy of the set into the user's home
        feature = datasets.Features.from_arrow_schema(table.schema)[label_column]
        if isinstance(feature, datasets.ClassLabel):
            class_names = tuple(feature.names)
            if len(class_names) != num_classes:
                raise ValueError(
                    f"load_images: `{label_column}` must have {num_classes} classes, got {len(class_names)} "
                    f"in '{path}'. Another set seems to lie in this folder."
                )
        labels.append(_labels(table.column(label_column), path, num_classes))
        tables.append(table)
    all_labels = torch.cat(labels)
    rows = torch.arange(len(all_labels)) if choose is None else choose(all_labels)
    chosen, first = set(rows.tolist()), 0
    pixels, size, encodings = bytearray(), None, set()
    for path, table in zip(files, tables, strict=True):
        for row, encoded in enumerate(_encoded(table.column(image_column))):
            if first + row not in chosen:
                continue
            where = f"row {row} of '{path}'"
            image = _decode(encoded.as_py(), where)
            size = size or image.size
            if image.size != size:
                raise ValueError(
                    f"load_images: all images must have one size, got {image.size} after {size} in {where}."
                )
            encodings.add(image.format)
            pixels += (image if image.mode == "RGB" else image.convert("RGB")).tobytes()
        first += len(table)
    if size is None:
        raise ValueError(f"load_images: a split must hold an image, got no row in {[str(path) for path in files]}.")
    width, height = size
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3).permute(0, 3, 1, 2).contiguous()
    return Decoded(ImageSplit(images, all_labels[rows]), frozenset(encodings), len(all_labels), class_names)


def _read_table(path: Path, image_column: str, label_column: str) -> pa.Table:
    try:
        schema = parquet.read_schema(path)
        missing = [column for column in (image_column, label_column) if column not in schema.names]
        if missing:
            raise ValueError(
                f"load_images: '{path}' must have the columns `{image_column}` and `{label_column}`, "
                f"got {schema.names}. Another set seems to lie in this folder."
            )
        kind = schema.field(image_column).type
        if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
            raise ValueError(f"load_images: `{image_column}` must hold encoded images, got {kind} in '{path}'.")
        return parquet.read_table(path, columns=[image_column, label_column])
    except (pa.ArrowException, OSError) as error:  # an Arrow error in itself is a ValueError without the file's name
        raise ValueError(
            f"load_images: '{path}' must be a parquet file, got {type(error).__name__}: {error}. "
            "Likely a broken download: fetch it again."
        ) from error


def _labels(column: pa.ChunkedArray, path: Path, num_classes: int) -> Tensor:
    if not pa.types.is_integer(column.type):
        raise ValueError(f"load_images: labels must be integers, got {column.type} in '{path}'.")
    for row, label in enumerate(column.to_pylist()):
        if label is None or not 0 <= label < num_classes:
            raise ValueError(
                f"load_images: labels must lie between 0 and {num_classes - 1}, got {label} in row {row} of '{path}'."
            )
    return torch.tensor(column.to_pylist(), dtype=torch.int64)


def _encoded(column: pa.ChunkedArray) -> Iterator[pa.Scalar]:
    """The images' bytes, not copied until one asks for them."""
    for chunk in column.chunks:
        yield from chunk.field("bytes")


def _decode(encoded: bytes | None, where: str) -> Image.Image:
    if encoded is None:
        raise ValueError(f"load_images: an image must be stored in the file itself, got nothing in {where}.")
    try:
        # PIL: torchvision's decoder takes half the time, but is deprecated
        image = Image.open(BytesIO(encoded), formats=("JPEG", "PNG"))
        image.load()
    except Exception as error:  # whatever PIL's parsers trip over: OSError, SyntaxError, struct.error, …
        raise ValueError(
            f"load_images: an image must be a whole JPEG or PNG, got {type(error).__name__} in {where}. "
            "Likely a broken download: fetch it again."
        ) from error
    if image.mode.startswith(("I", "F")):  # PIL would clip, not scale, these to 8 bits
        raise ValueError(f"load_images: an image must have 8 bits a channel, got mode {image.mode} in {where}.")
    return image
