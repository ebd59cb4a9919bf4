"""Sentence pairs by name: the published translation sets, and a synthetic one that needs no network."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import torch
from pyarrow import parquet

from data.sources import VARIABLE, HubSet, SourceUnavailableError, locate

SentencePair = tuple[str, str]
"""A sentence and its translation."""

TranslationName = Literal["auto", "multi30k", "iwslt14", "reversed"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TranslationData:
    """Pairs of a sentence and its translation, with their identity.

    Attributes:
        name: What was loaded: "multi30k", "iwslt14" or "reversed".
        train: The training pairs, source before target.
        validation: The pairs to choose by.
        test: The held-out pairs.
        identity: One sentence for a figure's title: what this is, from where, how many pairs.
        source: Where it came from, and for a stand-in why the real set could not be had.
    """

    name: str
    train: tuple[SentencePair, ...]
    validation: tuple[SentencePair, ...]
    test: tuple[SentencePair, ...]
    identity: str
    source: str

    def record(self) -> dict[str, Any]:
        """What `environment.json` says of the data, with a SHA-256 of every sentence."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(json.dumps(getattr(self, split)).encode())
        return {
            "name": self.name,
            "identity": self.identity,
            "source": self.source,
            **{f"{split}_rows": len(getattr(self, split)) for split in SPLITS},
            "sha256": digest.hexdigest(),
        }


@dataclass(frozen=True, kw_only=True)
class TranslationSet(HubSet):
    """A translation set on the hub: parquet or JSON lines with one sentence a language.

    Attributes:
        languages: The columns, or the fields of `nested`.
        nested: The one column that holds all languages; None where each has its own.
    """

    loader: str = "load_translation"
    languages: tuple[str, ...] = ("de", "en")
    nested: str | None = None


TRANSLATION_SETS = {
    wanted.name: wanted
    for wanted in (
        TranslationSet(
            name="multi30k",
            title="Multi30k",
            repository="bentrevett/multi30k",
            files={
                "train": ("train-*.parquet", "train.jsonl"),
                "validation": ("validation-*.parquet", "val.jsonl"),
                "test": ("test-*.parquet", "test.jsonl"),
            },
            rows={"train": 29_000, "validation": 1_014, "test": 1_000},
        ),
        # the preparation that published results share: a twenty-third of the talks' sentences held out for validation
        TranslationSet(
            name="iwslt14",
            title="IWSLT'14 as prepared by fairseq",
            repository="bbaaaa/iwslt14-de-en-preprocess",
            revision="refs/convert/parquet",  # the main branch holds a script, which `datasets` no longer runs
            files={split: (f"{split}-*.parquet", f"{split}/*.parquet") for split in SPLITS},
            rows={"train": 160_239, "validation": 7_283, "test": 6_750},
            nested="translation",
        ),
    )
}


def load_translation(
    name: TranslationName | str = "auto",
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: str = "de",
    target: str = "en",
    train: int | None = None,
    validation: int | None = None,
    test: int | None = None,
    seed: int = 0,
) -> TranslationData:
    """A translation set, in memory as pairs of sentences.

    A published set is taken from the folder `data_dir` (or else the environment variable LEARNED_INIT_DATA), or else
    from the local Hugging Face cache, or else from the hub. A folder that is given must hold the set.

    Args:
        name: "multi30k" or "iwslt14", which never fall back to anything else; "reversed", English sentences to be
            written backwards, word by word; "auto", Multi30k or, where it cannot be had, "reversed".
        data_dir: A folder with `multi30k/train-*.parquet`, `validation-*.parquet` and `test-*.parquet`, or the hub's
            own files, or that inner folder itself. Not used by "reversed".
        source: The language to translate from. Not used by "reversed".
        target: The language to translate into, likewise.
        train: At most this many training pairs, drawn without replacement and kept in their order. None: all.
        validation: At most this many validation pairs, likewise.
        test: At most this many test pairs, likewise.
        seed: Draws the subsets.

    Raises:
        FileNotFoundError: If a named set cannot be had, or a folder that is given does not hold it.
        ValueError: If a name or a language is unknown, or a file is damaged or holds something else.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    for split, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"load_translation: `{split}` must be at least 1 pair, got {size}. None takes all.")
    if name not in get_args(TranslationName):
        names = ", ".join(get_args(TranslationName))
        raise ValueError(f"load_translation: `name` must be one of {names}, got {name!r}.")
    if name == "reversed":
        return _reversed(sizes, seed)
    wanted = TRANSLATION_SETS["multi30k" if name == "auto" else name]
    if source == target or not {source, target} <= set(wanted.languages):
        raise ValueError(
            f"load_translation: `source` and `target` must be two of {', '.join(wanted.languages)}, "
            f"got {source!r} and {target!r}."
        )
    try:
        located = locate(wanted, data_dir)
    except SourceUnavailableError as error:
        if name == "auto":
            return _reversed(sizes, seed, instead_of=wanted.title, because=str(error))
        raise FileNotFoundError(
            f"load_translation: '{name}' must be in a folder, in the Hugging Face cache or on the hub, got none of "
            f"them. Tried: {error}. Pass a folder that holds {wanted.layout()} as `data_dir` or {VARIABLE}, connect "
            "to the network, or take 'reversed' or 'auto'."
        ) from error
    pairs = {
        split: tuple(pair for path in located.files[split] for pair in read_pairs(path, wanted, source, target))
        for split in SPLITS
    }
    rows = wanted.count({split: len(pairs[split]) for split in SPLITS})
    return _at_most(
        wanted.name,
        pairs,
        sizes,
        seed,
        identity=f"{wanted.title}, {source} to {target}, from {located.origin}, {rows} sentence pairs",
        source=located.origin,
    )


def read_pairs(path: Path, wanted: TranslationSet, source: str, target: str) -> list[SentencePair]:
    """The sentence pairs of one file, parquet or JSON lines.

    Raises:
        ValueError: If the file, a column or a sentence is not what it should be; the message names file and row.
    """
    rows = _rows_of(path)
    if not rows:
        raise ValueError(f"load_translation: a file must hold a sentence pair, got no row in '{path}'.")
    pairs = []
    for number, row in enumerate(rows):
        by_language = row if wanted.nested is None else row.get(wanted.nested)
        if not isinstance(by_language, dict) or not {source, target} <= by_language.keys():
            columns = f"`{source}` and `{target}`" + (f" inside `{wanted.nested}`" if wanted.nested else "")
            raise ValueError(
                f"load_translation: '{path}' must have the columns {columns}, got {sorted(row)} in row {number}. "
                "Another set seems to lie in this folder."
            )
        pair = by_language[source], by_language[target]
        if not all(isinstance(sentence, str) for sentence in pair):
            raise ValueError(f"load_translation: a sentence must be text, got {pair} in row {number} of '{path}'.")
        pairs.append(pair)
    return pairs


def _rows_of(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".parquet":
            return parquet.read_table(path).to_pylist()
        with path.open(encoding="utf-8") as lines:
            return [dict(json.loads(line)) for line in lines if line.strip()]
    # a line that is not JSON, or not an object, is a ValueError or TypeError without the file's name
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        kind = "a parquet file" if path.suffix == ".parquet" else "JSON objects, one a line"
        raise ValueError(
            f"load_translation: '{path}' must be {kind}, got {type(error).__name__}: {error}. "
            "Likely a broken download: fetch it again."
        ) from error


def _at_most(
    name: str,
    pairs: Mapping[str, Sequence[SentencePair]],
    sizes: Mapping[str, int | None],
    seed: int,
    *,
    identity: str,
    source: str,
) -> TranslationData:
    chosen = {}
    for split, size in sizes.items():
        generator = torch.Generator().manual_seed(seed)  # one a split: which test pairs does not depend on `train`
        n = len(pairs[split])
        rows = range(n) if size is None or size >= n else sorted(torch.randperm(n, generator=generator)[:size].tolist())
        chosen[split] = tuple(pairs[split][row] for row in rows)
    if any(len(chosen[split]) < len(pairs[split]) for split in SPLITS):
        identity += "; random subset of " + " + ".join(f"{len(chosen[split]):,} {split}" for split in SPLITS)
    return TranslationData(name=name, **chosen, identity=identity, source=source)


def _reversed(
    sizes: Mapping[str, int | None], seed: int, *, instead_of: str = "", because: str = ""
) -> TranslationData:
    sentences = _english_sentences()
    # of ten sentences in a row the last two are held out: fixed, and without a random number
    held_out = {"validation": 8, "test": 9}
    pairs = {split: [] for split in SPLITS}
    for number, words in enumerate(sentences):
        split = next((split for split, turn in held_out.items() if number % 10 == turn), "train")
        pairs[split].append((" ".join(words), " ".join(reversed(words))))
    rows = " + ".join(f"{len(pairs[split]):,} {split}" for split in SPLITS)
    stand_in = f", standing in for {instead_of}" if instead_of else ""
    return _at_most(
        "reversed",
        pairs,
        sizes,
        seed,
        identity=(
            f"word order reversed (synthetic{stand_in}; no second language), English sentences of the "
            f"documentation of CPython {platform.python_version()} (embedded), {rows} sentence pairs"
        ),
        source="embedded in CPython" + (f"; {instead_of} tried: {because}" if instead_of else ""),
    )


def _english_sentences() -> list[tuple[str, ...]]:
    # imported here: half a megabyte of text that only this set needs
    from pydoc_data.topics import topics

    sentences = {}  # a dict for its order, and so that no sentence comes twice, and none in two splits
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            for sentence in re.split(r"[.!?:;](?:\s+|$)", paragraph):
                # anything but words and the plainest punctuation is code, grammar or markup
                if re.fullmatch(r"[\w\s,'\"`()/-]+", sentence):
                    words = tuple(re.findall(r"\w+(?:['-]\w+)*", sentence.lower()))
                    if 3 <= len(words) <= 20:
                        sentences[words] = None
    return list(sentences)
