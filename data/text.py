"""Streams of characters by name: the published word-level corpora letter by letter, and one text that needs no network.

Axes: n characters of a stream, b streams or windows side by side, t characters of a window. Every random number comes
from the generator that is passed in.
"""

import hashlib
import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Int64
from pyarrow import parquet
from torch import Tensor

from data.sources import VARIABLE, HubSet, Located, SourceUnavailableError, from_folder, locate

TextName = Literal["auto", "ptb", "wikitext2", "pydoc", "stdlib"]

CharacterBatch = tuple[Int64[Tensor, "b t"], Int64[Tensor, "b t"]]
"""Characters, and the character that follows each."""

SPLITS = ("train", "validation", "test")


# ---------------------------------------------------------------------------------------------- text by name
@dataclass(frozen=True)
class TextData:
    """A text in three parts, with its identity. Every line ends in a line feed.

    Attributes:
        name: What was loaded: "ptb", "wikitext2", "pydoc" or "stdlib".
        train: The text to train on.
        validation: The text to choose by.
        test: The held-out text.
        identity: One sentence for a figure's title: what this is, from where, how much.
        source: Where it came from, and for a stand-in why the real text could not be had.
    """

    name: str
    train: str
    validation: str
    test: str
    identity: str
    source: str

    def record(self) -> dict[str, Any]:
        """What `environment.json` says of the data, with a SHA-256 of every character."""
        parts = {split: getattr(self, split) for split in SPLITS}
        digest = hashlib.sha256()
        for text in parts.values():
            digest.update(json.dumps(text).encode())
        return {
            "name": self.name,
            "identity": self.identity,
            "source": self.source,
            **{f"{split}_rows": text.count("\n") for split, text in parts.items()},
            **{f"{split}_characters": len(text) for split, text in parts.items()},
            "sha256": digest.hexdigest(),
        }


@dataclass(frozen=True, kw_only=True)
class TextSet(HubSet):
    """A corpus on the hub, one line a row, or as the text files it was published in.

    Attributes:
        column: The rows' text.
        line: From a row, or a line of a text file, to the line as it was published, without its end.
        published: For each split, the names of the text files, which a folder may hold instead.
    """

    loader: str = "load_text"
    column: str
    line: Callable[[str], str]
    published: Mapping[str, tuple[str, ...]]

    def layout(self) -> str:
        *others, last = (f"{self.name}/{split}-*.parquet" for split in SPLITS)
        files = ", ".join(names[0] for names in self.published.values())
        return f"{', '.join(others)} and {last} (or {files}; the training split may be missing)"

    def in_folder(self, splits: Iterable[str]) -> "TextSet":
        """The same set where a user keeps it: in more layouts than the hub has, or with fewer splits."""
        files = {
            split: (*self.files[split], f"{split}-*.parquet", f"{split}/*.parquet", *self.published[split])
            for split in splits
        }
        return replace(self, files=files)


TEXT_SETS = {
    wanted.name: wanted
    for wanted in (
        TextSet(
            name="ptb",
            title="Penn Treebank",
            repository="ptb-text-only/ptb_text_only",
            revision="refs/convert/parquet",  # the main branch holds a script, which `datasets` no longer runs
            files={split: (f"penn_treebank/{split}/*.parquet", f"{split}/*.parquet") for split in SPLITS},
            rows={"train": 42_068, "validation": 3_370, "test": 3_761},
            column="sentence",
            # the published files have a space at both ends of every line, of which the hub's rows are stripped
            line=lambda row: f" {row.strip()} ",
            published={
                "train": ("ptb.train.txt",),
                "validation": ("ptb.valid.txt",),
                "test": ("ptb.test.txt",),
            },
        ),
        TextSet(
            name="wikitext2",
            title="WikiText-2",
            repository="Salesforce/wikitext",
            # the folder is named, or WikiText-103 would be downloaded as well
            files={split: (f"wikitext-2-raw-v1/{split}-*.parquet",) for split in SPLITS},
            rows={"train": 36_718, "validation": 3_760, "test": 4_358},
            column="text",
            # the published files have a space in every empty line, of which the hub's rows are stripped
            line=lambda row: row.removesuffix("\n") or " ",
            published={
                "train": ("wiki.train.raw", "wiki.train.tokens"),
                "validation": ("wiki.valid.raw", "wiki.valid.tokens"),
                "test": ("wiki.test.raw", "wiki.test.tokens"),
            },
        ),
    )
}


def load_text(
    name: TextName | str = "auto",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
) -> TextData:
    """A text in memory, as it was published: a corpus from the hub's rows is the file they came from, to the character.

    The word-level corpora are read letter by letter. What they write in place of a word, `<unk>` or `N`, is characters
    like any other, as in DIMAML; the end of a line alone becomes a symbol of its own (`CharacterVocabulary`).

    A corpus is taken from the folder `data_dir` (or else the environment variable LEARNED_INIT_DATA), or else from the
    local Hugging Face cache, or else from the hub. A folder that is given must hold it, all but the training split:
    without it, the first nine tenths of the validation split are trained on and the rest validates, and `identity`
    says so.

    Args:
        name: "ptb" (Penn Treebank, lower case) or "wikitext2" (raw, or where a folder holds it so, tokenised), which
            never fall back to anything else; "pydoc", the documentation of CPython's own language, in English;
            "stdlib", the source code of some of its modules; "auto", Penn Treebank or, where it cannot be had, "pydoc".
        data_dir: A folder with `ptb/train-*.parquet`, `validation-*.parquet` and `test-*.parquet`, or `ptb.train.txt`,
            `ptb.valid.txt` and `ptb.test.txt` (`wiki.train.raw` or `wiki.train.tokens` and so on for "wikitext2"), or
            that inner folder itself. Not used by "pydoc" and "stdlib".
        train: At most this many characters, from the beginning. None: all.
        validation: At most this many characters, likewise.
        test: At most this many characters, likewise.

    Raises:
        FileNotFoundError: If a named corpus cannot be had, or a folder that is given does not hold it.
        ValueError: If the name is unknown, or a file is damaged, empty, not UTF-8, or holds something else.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    for split, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"load_text: `{split}` must be at least 1 character, got {size}. None takes all.")
    if name not in get_args(TextName):
        raise ValueError(f"load_text: `name` must be one of {', '.join(get_args(TextName))}, got {name!r}.")
    if name in ("pydoc", "stdlib"):
        return _at_most(_pydoc() if name == "pydoc" else _stdlib(), sizes)
    wanted = TEXT_SETS["ptb" if name == "auto" else name]
    try:
        located = _locate(wanted, data_dir)
    except SourceUnavailableError as error:
        if name == "auto":
            return _at_most(_pydoc(instead_of=wanted.title, because=str(error)), sizes)
        raise FileNotFoundError(
            f"load_text: '{name}' must be in a folder, in the Hugging Face cache or on the hub, got none of them. "
            f"Tried: {error}. Pass a folder that holds {wanted.layout()} as `data_dir` or {VARIABLE}, connect to the "
            "network, or take 'pydoc' or 'auto'."
        ) from error
    lines = {
        split: [line for path in files for line in read_lines(path, wanted)] for split, files in located.files.items()
    }
    rows = wanted.count({split: len(lines[split]) for split in lines})
    identity = f"{wanted.title} from {located.origin}, {rows} lines"
    if any("<unk>" in line for line in lines["validation"]):
        identity += ", rare words written <unk>"
    if "train" not in lines:
        lines["train"], lines["validation"] = _cut(lines["validation"], 0.9)
        identity += "; no training split there: nine tenths of the validation split train, the rest of it validates"
    texts = {split: "".join(f"{line}\n" for line in lines[split]) for split in SPLITS}
    return _at_most(TextData(wanted.name, **texts, identity=identity, source=located.origin), sizes)


def read_lines(path: Path, wanted: TextSet) -> list[str]:
    """The lines of one file, parquet or text, as they were published and without their ends.

    Raises:
        ValueError: If the file or the column is not what it should be, or has no text; the message names the file.
    """
    if path.suffix == ".parquet":
        lines = _rows_of(path, wanted.column)
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise ValueError(
                f"load_text: '{path}' must be text in UTF-8, got {type(error).__name__}: {error}. "
                "Convert it, or fetch it again if it is a broken download."
            ) from error
        lines = text.removesuffix("\n").split("\n")  # not `splitlines`, which breaks lines at other characters too
    if not any(line.strip() for line in lines):
        raise ValueError(f"load_text: a file must hold some text, got none in '{path}'.")
    return [wanted.line(line) for line in lines]


def _rows_of(path: Path, column: str) -> list[str]:
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"load_text: '{path}' must be a parquet file, got {type(error).__name__}: {error}. "
            "Likely a broken download: fetch it again."
        ) from error
    if column not in table.column_names:
        raise ValueError(
            f"load_text: '{path}' must have the column `{column}`, got {table.column_names}. "
            "Another set seems to lie in this folder."
        )
    rows = table.column(column).to_pylist()
    for number, row in enumerate(rows):
        if not isinstance(row, str):
            raise ValueError(f"load_text: a row must be text, got {row!r} in row {number} of '{path}'.")
    return rows


def _locate(wanted: TextSet, data_dir: str | os.PathLike[str] | None) -> Located:
    if data_dir is None and not os.environ.get(VARIABLE):
        return locate(wanted)
    setting = VARIABLE if data_dir is None else "`data_dir`"
    folder = Path(os.environ[VARIABLE] if data_dir is None else data_dir).expanduser()
    # The corpus's own folder first and alone: without a training split there, one would be looked for beside it.
    folder = folder / wanted.name if (folder / wanted.name).is_dir() else folder
    try:
        return from_folder(wanted.in_folder(SPLITS), folder, setting)
    except FileNotFoundError:
        if any(folder.glob("*train*")):  # a download cut off must not be read as a corpus without the split
            raise
        return from_folder(wanted.in_folder(("validation", "test")), folder, setting)


def _at_most(data: TextData, sizes: Mapping[str, int | None]) -> TextData:
    parts = {split: getattr(data, split)[:size] for split, size in sizes.items()}
    counts = " + ".join(f"{len(text):,}" for text in parts.values())
    cut = "the first " if any(len(parts[split]) < len(getattr(data, split)) for split in SPLITS) else ""
    return replace(data, **parts, identity=f"{data.identity}; {cut}{counts} characters to train, validate and test on")


def _cut(lines: list[str], share: float) -> tuple[list[str], list[str]]:
    """In two, of which none is empty, the first part of about that share of the lines."""
    if len(lines) < 2:
        raise ValueError(f"load_text: a split to be cut in two must hold two lines, got {lines}.")
    first = min(max(round(share * len(lines)), 1), len(lines) - 1)
    return lines[:first], lines[first:]


def _pydoc(*, instead_of: str = "", because: str = "") -> TextData:
    # imported here: half a megabyte of text that only this set needs
    from pydoc_data.topics import topics

    # a dict for its order, and because some topics repeat others: no paragraph may come twice, and none in two splits
    paragraphs = dict.fromkeys(
        paragraph.strip("\n") for topic in sorted(topics) for paragraph in re.split(r"\n\s*\n", topics[topic])
    )
    train, held_out = _cut([f"{paragraph}\n\n" for paragraph in paragraphs if paragraph], 0.8)
    validation, test = _cut(held_out, 0.5)
    stand_in = f", standing in for {instead_of}" if instead_of else ""
    return TextData(
        name="pydoc",
        train="".join(train),
        validation="".join(validation),
        test="".join(test),
        identity=f"language documentation of CPython {platform.python_version()} (embedded{stand_in}), in English",
        source="embedded in CPython" + (f"; {instead_of} tried: {because}" if instead_of else ""),
    )


MODULES = ("argparse", "ast", "dataclasses", "difflib", "doctest", "inspect", "pickle", "tarfile", "typing", "zipfile")
"""Whose source code "stdlib" is: large ones, half of them comments and documentation."""


def _stdlib() -> TextData:
    sources = {}
    for module in MODULES:
        spec = importlib.util.find_spec(module)
        origin = None if spec is None else spec.origin
        if origin is None or not origin.endswith(".py"):
            raise FileNotFoundError(
                f"load_text: 'stdlib' needs the source code of the module {module!r}, which this Python does not "
                "carry. Take 'pydoc'."
            )
        sources[module] = Path(origin).read_text("utf-8")
    lines = {module: [f"{line}\n" for line in source.splitlines()] for module, source in sources.items()}
    parts: dict[str, list[str]] = {split: [] for split in SPLITS}
    for own in lines.values():  # of every module the beginning trains, so that all splits hold all of them
        train, held_out = _cut(own, 0.8)
        validation, test = _cut(held_out, 0.5)
        for split, part in zip(SPLITS, (train, validation, test), strict=True):
            parts[split] += part
    return TextData(
        name="stdlib",
        **{split: "".join(part) for split, part in parts.items()},
        identity=f"source code of {len(MODULES)} modules of CPython {platform.python_version()} (embedded)",
        source="embedded in CPython",
    )


# ---------------------------------------------------------------------------------------------- characters as numbers
@dataclass(frozen=True)
class CharacterVocabulary:
    """Characters to numbers and back: three special symbols, then the characters in their order.

    The end of a line is one symbol, `END_OF_LINE`. A character that is none of `characters` is `UNKNOWN`. `PAD` fills
    streams up and stands for nothing.

    Attributes:
        characters: Each once, in increasing order, without the line feed; what to keep in a record.

    Raises:
        ValueError: If characters come twice, out of order, or with a line feed among them.
    """

    characters: str

    PAD: ClassVar[int] = 0
    UNKNOWN: ClassVar[int] = 1
    END_OF_LINE: ClassVar[int] = 2
    _FIRST: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if "\n" in self.characters or list(self.characters) != sorted(set(self.characters)):
            raise ValueError(
                "CharacterVocabulary: `characters` must come once each, in increasing order and without a line feed, "
                f"got {self.characters!r}. character_vocabulary(text) makes one."
            )

    def __len__(self) -> int:
        """How many different numbers there are, the special ones among them: a model's vocabulary size."""
        return self._FIRST + len(self.characters)

    def encode(self, text: str) -> Int64[Tensor, "n"]:
        """One number a character, on the CPU."""
        known = _code_points("\n" + self.characters)
        numbers = np.full(int(known.max()) + 2, self.UNKNOWN)  # the last one is for all that is beyond the largest
        numbers[known] = [self.END_OF_LINE, *range(self._FIRST, len(self))]
        return torch.from_numpy(numbers[_code_points(text).clip(max=len(numbers) - 1)])

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text: a line feed for the end of a line, U+FFFD for an unknown character, nothing for `PAD`."""
        symbols = ["", "\N{REPLACEMENT CHARACTER}", "\n", *self.characters]
        return "".join(symbols[number] for number in (ids.tolist() if isinstance(ids, Tensor) else ids))


def character_vocabulary(text: str) -> CharacterVocabulary:
    """The vocabulary of a text, to be taken of the training text alone.

    Raises:
        ValueError: If there is no character besides the ends of lines.
    """
    characters = "".join(sorted(set(text) - {"\n"}))
    if not characters:
        raise ValueError(f"character_vocabulary: `text` must hold a character, got {text[:20]!r}.")
    return CharacterVocabulary(characters)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4").astype(np.int64)


# ---------------------------------------------------------------------------------------------- streams and windows
def batchify(ids: Int64[Tensor, "n"], streams: int, *, padding: int | None = None) -> Int64[Tensor, "b n_b"]:
    """A stream folded into `streams` streams of equal length, each the continuation of the one before it.

    Args:
        ids: The stream.
        streams: How many.
        padding: The symbol that fills the last stream up, as in DIMAML's code; None leaves out the end of the text
            instead, less than one character a stream.

    Raises:
        ValueError: If there are not two characters for every stream.
    """
    if streams < 1 or ids.ndim != 1 or len(ids) < 2 * streams:
        raise ValueError(
            f"batchify: `ids` must be one stream with two characters for each of `streams`, got shape "
            f"{tuple(ids.shape)} and {streams}. Take more text, or fewer streams."
        )
    if padding is None:
        return ids[: len(ids) - len(ids) % streams].view(streams, -1)
    return torch.nn.functional.pad(ids, (0, -len(ids) % streams), value=padding).view(streams, -1)


def character_windows(
    streams: Int64[Tensor, "b n"],
    length: int,
    *,
    generator: torch.Generator | None = None,
    full: bool = False,
    device: torch.device | str | None = None,
) -> Iterator[CharacterBatch]:
    """One pass over parallel streams: every character but the first of each stream is a target once.

    Args:
        streams: As `batchify` folds them.
        length: t, characters of a window.
        generator: Draws where the first window ends and in which order the windows come, anew each pass. None: all in
            order, `length` characters each from the first on, as in DIMAML's code.
        full: Whether to leave out windows shorter than `length`: the last one, and with a generator the first.
        device: Where the batches go; None is where the streams are.

    Returns:
        Batches (characters, the characters that follow), both (b, t), t = `length` but for the shorter ones.

    Raises:
        ValueError: If `length` is below 1, or there would be no window.
    """
    b, n = streams.shape
    last = n - 1  # the last character has none that follows it
    if length < 1 or last < (length if full else 1):
        raise ValueError(
            f"character_windows: `length` must be at least 1 and no more than fits into `streams`, got {length} for "
            f"{b} streams of {n} characters, the last of which is only a target. "
            "Take more text, fewer streams or shorter windows."
        )
    # where the first window ends; of full windows one at least fits behind it
    offset = 0 if generator is None else _integer(min(length, n - length if full else last), generator)
    pieces = [(max(a, 0), min(a + length, last)) for a in range(offset - length, last, length)]
    pieces = [(a, z) for a, z in pieces if z - a >= (length if full else 1)]
    if generator is not None:
        pieces = [pieces[index] for index in _permutation(len(pieces), generator).tolist()]
    return ((streams[:, a:z].to(device), streams[:, a + 1 : z + 1].to(device)) for a, z in pieces)


class CharacterTask(NamedTuple):
    """What one inner training run of DIMAML sees: batches to train on and batches to measure it on.

    Attributes:
        train: Batches (characters, the characters that follow), both of shape (b, t).
        validation: Likewise; no character of them is in a training batch.
    """

    train: list[CharacterBatch]
    validation: list[CharacterBatch]


def sample_character_task(
    ids: Int64[Tensor, "n"],
    *,
    train: int = 200,
    validation: int = 5,
    batch_size: int = 128,
    validation_batch_size: int | None = None,
    length: int = 100,
    generator: torch.Generator,
    validation_ids: Int64[Tensor, "m"] | None = None,
    device: torch.device | str | None = None,
) -> CharacterTask:
    """Windows from anywhere in a stream, as a new task each time: no two of them share a character.

    All placements of so many disjoint windows are equally likely, and so is every way to share them out among the
    batches. The defaults are DIMAML's. Its released code instead trains every task on the same first windows of the
    text, and validates on four batches of these and one of its own.

    Args:
        ids: The stream.
        train: How many training batches.
        validation: How many validation batches.
        batch_size: b, windows of a training batch.
        validation_batch_size: b, windows of a validation batch; None: as many.
        length: t, characters of a window; one more is taken for the last target.
        generator: Draws everything.
        validation_ids: Another stream, to draw the validation windows from; None: the same.
        device: Where the batches go; None is where the streams are.

    Raises:
        ValueError: If a number is below 1, or a stream too short for its windows.

    Example:
        >>> ids = torch.arange(1000)
        >>> task = sample_character_task(
        ...     ids, train=3, validation=2, batch_size=4, length=10, generator=torch.Generator()
        ... )
        >>> [tuple(x.shape) for x, _ in task.train], [tuple(y.shape) for _, y in task.validation]
        ([(4, 10), (4, 10), (4, 10)], [(4, 10), (4, 10)])
    """
    validation_batch_size = batch_size if validation_batch_size is None else validation_batch_size
    numbers = {
        "train": train,
        "validation": validation,
        "batch_size": batch_size,
        "validation_batch_size": validation_batch_size,
        "length": length,
    }
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"sample_character_task: `{name}` must be at least 1, got {number}.")
    to_train, to_validate = train * batch_size, validation * validation_batch_size
    if validation_ids is None:
        both = _disjoint_windows("ids", ids, to_train + to_validate, length + 1, generator)
        train_windows, validation_windows = both[:to_train], both[to_train:]
    else:
        train_windows = _disjoint_windows("ids", ids, to_train, length + 1, generator)
        validation_windows = _disjoint_windows("validation_ids", validation_ids, to_validate, length + 1, generator)

    def batches(drawn: Tensor, size: int) -> list[CharacterBatch]:
        return [(batch[:, :-1], batch[:, 1:]) for batch in drawn.to(device).split(size)]

    return CharacterTask(batches(train_windows, batch_size), batches(validation_windows, validation_batch_size))


def _disjoint_windows(name: str, ids: Tensor, count: int, width: int, generator: torch.Generator) -> Tensor:
    """`count` windows of `width` characters, (count, width), in random order."""
    if ids.ndim != 1 or len(ids) < count * width:
        raise ValueError(
            f"sample_character_task: `{name}` must be one stream of at least {count * width} characters, for {count} "
            f"windows of {width} that share none, got shape {tuple(ids.shape)}. "
            "Take more text, or fewer, smaller or shorter batches."
        )
    # One place a window, were each a single character: any distinct places will do, and widening each window moves
    # those behind it.
    places = _permutation(len(ids) - count * (width - 1), generator)[:count]
    rank = places.argsort().argsort()
    starts = places + rank * (width - 1)
    return ids[(starts[:, None] + torch.arange(width)).to(ids.device)]


def _permutation(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device).cpu()


def _integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator, device=generator.device))
