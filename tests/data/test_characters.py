"""Character streams: the one reader on tiny corpora, vocabularies, windows, tasks, and mistakes that must be caught."""

import hashlib
import importlib
import os
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from data import (
    CharacterVocabulary,
    TextData,
    batchify,
    character_vocabulary,
    character_windows,
    load_text,
    sample_character_task,
    sources,
    text,
)
from tests.mutation import mutated, survives

LINES = {
    "train": ["no <unk> it was n't", "a b", "the last"],
    "validation": ["v one", "v two", "v three"],
    "test": ["ß"],
}
HUB = {
    "ptb": ("penn_treebank/{}/0000.parquet", "sentence"),
    "wikitext2": ("wikitext-2-raw-v1/{}-00000-of-00001.parquet", "text"),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def write(path, rows, column):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({column: rows}), path)


def write_set(folder, name="ptb", *, file="{}-00000-of-00001.parquet", splits=tuple(LINES)):
    for split in splits:
        rows = LINES[split] if name == "ptb" else [f"{line}\n" for line in LINES[split]]
        write(folder / file.format(split), rows, HUB[name][1])


# ---- the reader, and the places ----


def test_a_row_becomes_the_published_line_again(tmp_path):
    write_set(tmp_path / "ptb")
    ptb = load_text("ptb", data_dir=tmp_path)
    assert (ptb.train, ptb.test) == (" no <unk> it was n't \n a b \n the last \n", " ß \n")
    assert ptb.identity == (
        "Penn Treebank from the local folder 'ptb', 3 (of 42,068) train + 3 (of 3,370) validation + 1 (of 3,761) test "
        "lines; 39 + 26 + 4 characters to train, validate and test on"
    )
    write(tmp_path / "wikitext2" / "train-0.parquet", ["", " = A = \n", "", " b\u2028c \n"], "text")
    for split in ("validation", "test"):
        write(tmp_path / "wikitext2" / f"{split}-0.parquet", [" a <unk> \n"], "text")
    wikitext = load_text("wikitext2", data_dir=tmp_path)
    assert wikitext.train == " \n = A = \n \n b\u2028c \n"
    assert "4 (of 36,718) train" in wikitext.identity
    assert "rare words written <unk>" in wikitext.identity


def test_the_published_text_files_are_the_same_text(tmp_path):
    write_set(tmp_path / "rows" / "ptb")
    files = {"train": "ptb.train.txt", "validation": "ptb.valid.txt", "test": "ptb.test.txt"}
    folder = tmp_path / "files" / "ptb"
    folder.mkdir(parents=True)
    for split, file in files.items():
        (folder / file).write_bytes("".join(f" {line} \r\n" for line in LINES[split]).encode())
    from_rows, from_files = (load_text("ptb", data_dir=tmp_path / place) for place in ("rows", "files"))
    assert from_rows.record()["sha256"] == from_files.record()["sha256"]
    assert load_text("ptb", data_dir=folder) == from_files  # the inner folder itself
    wiki = tmp_path / "wikitext2"
    wiki.mkdir()
    for split in ("train", "valid", "test"):
        (wiki / f"wiki.{split}.raw").write_text(" \n = é = \n \n", encoding="utf-8")
    assert load_text("wikitext2", data_dir=tmp_path).validation == " \n = é = \n \n"


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_own_layout(alone, tmp_path, monkeypatch, name):
    file, _ = HUB[name]
    snapshot = tmp_path / "snapshot"
    write_set(snapshot, name, file=file)
    for split in LINES:  # beside it, what must not be read, nor even downloaded
        write(snapshot / "wikitext-103-raw-v1" / f"{split}-00000-of-00001.parquet", ["wrong\n"], "text")

    def download(repository, *, revision, allow_patterns, endpoint, **_):
        assert endpoint == os.environ["HF_ENDPOINT"]
        assert (repository, revision) in {
            ("ptb-text-only/ptb_text_only", "refs/convert/parquet"), ("Salesforce/wikitext", None),
        }  # fmt: skip
        assert all(any(fnmatch(file.format(split), pattern) for pattern in allow_patterns) for split in LINES)
        wrong = "wikitext-103-raw-v1/train-00000-of-00001.parquet"
        assert not any(fnmatch(wrong, pattern) for pattern in allow_patterns)
        return str(snapshot)

    monkeypatch.setattr(sources, "probe", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    data = load_text(name)
    assert data.train.count("\n") == 3
    assert f"from the hub's {text.TEXT_SETS[name].repository}" in data.identity
    if name == "wikitext2":  # a clone of the repository given as a folder: the right configuration out of several
        assert load_text(name, data_dir=snapshot).train == data.train


def test_the_cache_is_read(alone):
    write_set(alone / "datasets--ptb-text-only--ptb_text_only" / "snapshots" / "aaaa", file=HUB["ptb"][0])
    assert "the local cache of the hub's ptb-text-only/ptb_text_only" in load_text().identity


def test_without_a_training_split(tmp_path):
    write_set(tmp_path / "ptb", splits=("validation", "test"))
    # beside it a whole set that is not to be taken for this one
    write_set(tmp_path / "other")
    data = load_text("ptb", data_dir=tmp_path)
    assert (data.train, data.validation, data.test) == (" v one \n v two \n", " v three \n", " ß \n")
    assert "3 (of 3,370) validation + 1 (of 3,761) test lines; no training split there: nine tenths of" in data.identity
    # a download cut off is no corpus without a training split
    write_set(tmp_path / "ptb", file="{}-00000-of-00002.parquet", splits=("train",))
    with pytest.raises(FileNotFoundError, match="must hold ptb/train"):
        load_text("ptb", data_dir=tmp_path)


def test_a_single_line_is_not_cut_in_two(tmp_path):
    write(tmp_path / "validation-0.parquet", ["one"], "sentence")
    write(tmp_path / "test-0.parquet", ["one"], "sentence")
    with pytest.raises(ValueError, match="to be cut in two must hold two lines, got"):
        load_text("ptb", data_dir=tmp_path)


def test_a_named_set_never_falls_back(alone):
    with pytest.raises(FileNotFoundError, match="load_text: 'wikitext2' must be in a folder") as caught:
        load_text("wikitext2")
    for reason in ("neither `data_dir` nor", "no whole copy of Salesforce/", "cannot be reached", "or take 'pydoc'"):
        assert reason in str(caught.value)


def test_auto_falls_back_and_says_so(alone):
    data = load_text()
    assert data.name == "pydoc"
    assert "(embedded, standing in for Penn Treebank), in English" in data.identity
    assert "Penn Treebank tried: " in data.source
    assert "cannot be reached" in data.source


@pytest.mark.parametrize("name", ["ptb", "auto"])
def test_a_folder_without_the_set_is_an_error_even_for_auto(tmp_path, monkeypatch, name):
    write_set(tmp_path / "ptb", splits=("validation",))
    with pytest.raises(
        FileNotFoundError, match=r"load_text: `data_dir` must hold ptb/train-\*.parquet, .*ptb.train.txt"
    ):
        load_text(name, data_dir=tmp_path)
    monkeypatch.setenv("LEARNED_INIT_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="load_text: LEARNED_INIT_DATA must hold ptb/train"):
        load_text(name)


# what is wrong: the file, its content, what is said
DAMAGED = {
    "empty": ("ptb.train.txt", b"", "must hold some text, got none"),
    "blank": ("ptb.valid.txt", b" \n\n", "must hold some text, got none"),
    "not UTF-8": ("ptb.train.txt", "naïve\n".encode("latin-1"), "must be text in UTF-8, got UnicodeDecodeError"),
    "not parquet": ("test-0.parquet", b"PAR1", "must be a parquet file, got Arrow"),
}


@pytest.mark.parametrize(("file", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_with_a_file_is_said(tmp_path, file, content, message):
    for own in ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"):
        (tmp_path / own).write_text(" a b \n")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match="load_text: .*" + message) as caught:
        load_text("ptb", data_dir=tmp_path)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"text": ["a"]}, r"must have the column `sentence`, got \['text'\]. Another set"),
        ({"sentence": ["a", None]}, "a row must be text, got None in row 1"),
        ({"sentence": pa.array([], pa.string())}, "must hold some text, got none"),
    ],
)
def test_what_is_wrong_with_the_rows_is_said(tmp_path, table, message):
    write_set(tmp_path)
    parquet.write_table(pa.table(table), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="load_text: .*" + message):
        load_text("ptb", data_dir=tmp_path)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`name` must be one of auto, ptb, wikitext2, pydoc, stdlib, got 'enwik8'"):
        load_text("enwik8")
    with pytest.raises(ValueError, match=r"`test` must be at least 1 character, got 0. None takes all"):
        load_text("pydoc", test=0)


def test_pydoc_is_english_and_its_parts_share_no_paragraph():
    data = load_text("pydoc")
    parts = [data.train, data.validation, data.test]
    assert min(map(len, parts)) > 20_000
    assert 0.7 < len(data.train) / sum(map(len, parts)) < 0.9
    paragraphs = [paragraph for part in parts for paragraph in part.removesuffix("\n\n").split("\n\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert data.train.lower().count(" the ") > 1000
    assert 'The "assert" statement' in " ".join(" ".join(parts).split())
    assert data.identity.startswith("language documentation of CPython 3")
    assert data.record()["sha256"] == load_text("pydoc").record()["sha256"]


def test_stdlib_is_source_code_in_three_parts_of_every_module():
    data = load_text("stdlib")
    parts = [data.train, data.validation, data.test]
    assert data.name == "stdlib"
    assert data.identity.startswith(f"source code of {len(text.MODULES)} modules of CPython 3")
    assert data.source == "embedded in CPython"
    assert min(map(len, parts)) > 50_000
    assert 0.75 < len(data.train) / sum(map(len, parts)) < 0.85
    assert all(part.endswith("\n") for part in parts)
    # of every module the first four fifths of its lines, the tenth after them, and the rest: no line is in two parts
    expected: list[list[str]] = [[], [], []]
    for name in text.MODULES:
        lines = Path(importlib.import_module(name).__file__ or "").read_text("utf-8").splitlines()
        train = round(0.8 * len(lines))
        validation = train + round(0.5 * (len(lines) - train))
        for part, own in zip(expected, (lines[:train], lines[train:validation], lines[validation:]), strict=True):
            part += own
    assert [part.split("\n")[:-1] for part in parts] == expected
    assert data.record()["sha256"] == load_text("stdlib").record()["sha256"]
    assert load_text("stdlib", train=1000).train == data.train[:1000]


def test_stdlib_and_pydoc_are_of_different_characters():
    one, other = (character_vocabulary(load_text(name).train) for name in ("pydoc", "stdlib"))
    assert len(one) != len(other)


def test_a_python_without_its_sources_is_told(monkeypatch):
    monkeypatch.setattr(text, "MODULES", ("argparse", "sys"))
    with pytest.raises(FileNotFoundError, match=r"'stdlib' needs the source code of the module 'sys', .* Take 'pydoc'"):
        load_text("stdlib")


def test_fewer_characters_are_the_first():
    whole, part = load_text("pydoc"), load_text("pydoc", train=1000, test=10**9)
    assert (part.train, part.validation, part.test) == (whole.train[:1000], whole.validation, whole.test)
    assert part.identity.endswith(
        f"; the first 1,000 + {len(whole.validation):,} + {len(whole.test):,} characters to train, validate and test on"
    )


def test_the_record_holds_every_split():
    parts = {"train": "a b\nc\n", "validation": "d\n", "test": "ß\n"}
    record = TextData("tiny", **parts, identity="what", source="where").record()
    expected = hashlib.sha256(b'"a b\\nc\\n""d\\n""\\u00df\\n"').hexdigest()
    assert record == {
        "name": "tiny", "identity": "what", "source": "where", "sha256": expected,
        "train_rows": 2, "validation_rows": 1, "test_rows": 1,
        "train_characters": 6, "validation_characters": 2, "test_characters": 2,
    }  # fmt: skip


# ---- characters as numbers ----


@given(st.text(), st.text())
def test_text_survives_the_way_there_and_back(seen, other):
    if not set(seen) - {"\n"}:
        with pytest.raises(ValueError, match="character_vocabulary: `text` must hold a character, got"):
            character_vocabulary(seen)
        return
    vocabulary = character_vocabulary(seen)
    ids = vocabulary.encode(seen)
    assert ids.shape == (len(seen),)
    assert vocabulary.decode(ids) == seen
    assert vocabulary == CharacterVocabulary(vocabulary.characters)
    # by definition, one character at a time
    table = {"\n": 2} | {character: 3 + n for n, character in enumerate(sorted(set(seen) - {"\n"}))}
    assert vocabulary.encode(other).tolist() == [table.get(character, 1) for character in other]
    assert vocabulary.decode(vocabulary.encode(other)) == "".join(c if c in table else "\ufffd" for c in other)
    assert len(vocabulary) == 3 + len(table) - 1
    assert vocabulary.decode([*ids.tolist(), 0, 0]) == seen


def test_words_of_the_corpus_are_characters_like_any_other():
    vocabulary = character_vocabulary("a <unk>\n")
    assert vocabulary.characters == " <>aknu"
    assert vocabulary.encode("<unk>\n").tolist() == [4, 9, 8, 7, 5, 2]


@pytest.mark.parametrize("characters", ["ba", "aa", "\na"])
def test_a_vocabulary_is_in_order(characters):
    with pytest.raises(ValueError, match="CharacterVocabulary: `characters` must come once each, in increasing order"):
        CharacterVocabulary(characters)


# ---- streams and windows: checks that take the module ----


def check_batchify(module):
    ids = torch.arange(23)
    assert module.batchify(ids, 4).tolist() == [list(range(5 * k, 5 * k + 5)) for k in range(4)]
    assert module.batchify(ids, 4, padding=99).tolist() == torch.tensor([*range(23), 99]).view(4, 6).tolist()
    assert module.batchify(ids[:20], 4, padding=99).tolist() == module.batchify(ids[:20], 4).tolist()


def streams_of(b, n):
    return torch.arange(b)[:, None] * 1000 + torch.arange(n)  # every number says where it stands


def check_one_pass(module, b, n, length, seed, full):
    if full and n <= length:
        return
    streams = streams_of(b, n)
    for generator in (None, seeded(seed)):
        batches = list(module.character_windows(streams, length, generator=generator, full=full))
        assert batches
        for x, y in batches:
            assert x.shape == y.shape
            assert x.shape[0] == b
            assert x.shape[1] == length if full else 1 <= x.shape[1] <= length
            assert torch.equal(y, x + 1)
            assert torch.equal(x, x[:1] + torch.arange(b)[:, None] * 1000)
        targets = torch.cat([y[0] for _, y in batches])
        if full:
            assert len(set(targets.tolist())) == len(targets)
            assert len(targets) > n - 1 - 2 * length
        else:
            assert sorted(targets.tolist()) == list(range(1, n))
        if generator is None:
            assert targets.tolist() == list(range(1, len(targets) + 1))
            assert all(x.shape[1] == length for x, _ in batches[:-1])


def check_windows(module):
    for b, n, length in ((2, 23, 5), (1, 21, 5), (3, 4, 1), (2, 3, 7), (1, 11, 10), (1, 2, 1)):
        for seed in range(3):
            for full in (False, True):
                check_one_pass(module, b, n, length, seed, full)


def check_offsets_and_order(module):
    firsts, orders, generator = set(), set(), seeded()
    for _ in range(200):
        batches = list(module.character_windows(streams_of(1, 41), 10, generator=generator, full=True))
        starts = [int(x[0, 0]) for x, _ in batches]
        firsts.add(min(starts))
        orders.add(tuple(starts))
        assert len(batches) == (4 if min(starts) == 0 else 3)
    assert firsts == set(range(10))
    assert len(orders) > 50
    # where only one offset leaves a full window, and where there are two
    for n, expected in ((11, {0}), (12, {0, 1})):
        found = {
            int(next(iter(module.character_windows(streams_of(1, n), 10, generator=generator, full=True)))[0][0, 0])
            for _ in range(40)
        }
        assert found == expected


def check_one_task(module, train, validation, batch_size, length, validation_batch_size, spare, seed):
    b = validation_batch_size or batch_size
    n = (train * batch_size + validation * b) * (length + 1) + spare
    options = {"train": train, "validation": validation, "batch_size": batch_size, "length": length}
    options |= {"validation_batch_size": validation_batch_size}
    task = module.sample_character_task(torch.arange(n), generator=seeded(seed), **options)
    assert [x.shape for x, _ in task.train] == [(batch_size, length)] * train
    assert [x.shape for x, _ in task.validation] == [(b, length)] * validation
    met = []
    for x, y in [*task.train, *task.validation]:
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert torch.equal(y, x + 1)
        met += torch.cat([x, y[:, -1:]], 1).flatten().tolist()
    # no two windows share a character, not even a target
    assert len(set(met)) == len(met)
    assert set(met) <= set(range(n))
    # another stream for validation: each stream is drawn from alone
    split = module.sample_character_task(
        torch.arange(n), validation_ids=torch.arange(n, 2 * n), generator=seeded(seed), **options
    )
    assert all(int(y.max()) < n for _, y in split.train)
    assert all(int(x.min()) >= n for x, _ in split.validation)
    one_less = torch.arange(n - spare - 1)
    with pytest.raises(ValueError, match=r"sample_character_task: `ids` must be one stream of at least \d+ characters"):
        module.sample_character_task(one_less, generator=seeded(seed), **options)


def check_task(module):
    for sizes in ((1, 1, 1, 1, None), (3, 2, 2, 4, None), (2, 1, 4, 3, 1), (1, 3, 1, 6, 2)):
        for spare in (0, 1, 17):
            check_one_task(module, *sizes, spare, seed=spare)


def check_placements_are_uniform(module):
    # 2 windows of 3 in 8 characters: (8 − 4 choose 2) = 6 placements, each in 2 orders: 12 equally likely outcomes
    counts, generator, draws = {}, seeded(), 2400
    for _ in range(draws):
        task = module.sample_character_task(
            torch.arange(8), train=1, validation=1, batch_size=1, length=2, generator=generator
        )
        outcome = int(task.train[0][0][0, 0]), int(task.validation[0][0][0, 0])
        counts[outcome] = counts.get(outcome, 0) + 1
    assert sorted(counts) == sorted((a, b) for a in range(6) for b in range(6) if abs(a - b) >= 3)
    # χ² of 11 degrees of freedom: 31.3 at one in a thousand
    assert sum((count - draws / 12) ** 2 / (draws / 12) for count in counts.values()) < 31.3


CHECKS = [check_batchify, check_windows, check_offsets_and_order, check_task, check_placements_are_uniform]
MUTANTS = {
    "streams interleaved": ("% streams].view(streams, -1)", "% streams].view(-1, streams).T"),
    "padded at the front": ("(0, -len(ids) % streams)", "(-len(ids) % streams, 0)"),
    "target is the character": ("streams[:, a + 1 : z + 1]", "streams[:, a:z]"),
    "target two further": ("streams[:, a + 1 : z + 1]", "streams[:, a + 2 : z + 2]"),
    "last target lost": ("last = n - 1  #", "last = n - 2  #"),
    "windows overlap": ("range(offset - length, last, length)", "range(offset - length, last, max(length - 1, 1))"),
    "no offset": ("offset = 0 if generator is None else", "offset = 0 if True else"),
    "offset too small": ("_integer(min(length, n - length", "_integer(min(max(length - 1, 1), n - length"),
    "offset too large": ("n - length if full else last", "n if full else last"),
    "first window lost": ("[(max(a, 0), min(", "[(a, min("),
    "no order": ("if generator is not None:\n        pieces", "if False:\n        pieces"),
    "short windows kept": (">= (length if full else 1)]", ">= 1]"),
    "task's target not shifted": ("(batch[:, :-1], batch[:, 1:])", "(batch[:, :-1], batch[:, :-1])"),
    "validation on training windows": ("both[to_train:]", "both[:to_validate]"),
    "validation by the train stream": ('"validation_ids", validation_ids,', '"validation_ids", ids,'),
    "windows share their last target": ("starts = places + rank * (width - 1)", "starts = places + rank * (width - 2)"),
    "windows not widened": ("starts = places + rank * (width - 1)", "starts = places"),
    "placed in order": (
        "rank = places.argsort().argsort()", "places = places.sort().values; rank = torch.arange(count)"
    ),
    "the end never drawn": (
        "len(ids) - count * (width - 1), generator", "max(len(ids) - count * (width - 1) - 1, count), generator"
    ),
    "a permutation for a rank": ("places.argsort().argsort()", "places.argsort()"),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_windows(check):
    check(text)


@given(st.integers(1, 4), st.integers(2, 60), st.integers(1, 70), st.integers(0, 99), st.booleans())
def test_windows_of_any_size(b, n, length, seed, full):
    check_one_pass(text, b, n, length, seed, full)


@given(
    *(st.integers(1, most) for most in (4, 3, 4, 9)),
    st.none() | st.integers(1, 4),
    st.integers(0, 30),
    st.integers(0, 99),
)
def test_tasks_of_any_size(train, validation, batch_size, length, validation_batch_size, spare, seed):
    check_one_task(text, train, validation, batch_size, length, validation_batch_size, spare, seed)


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_caught(mutant):
    assert not survives(CHECKS, mutated(text, *mutant))


def test_only_the_generator_decides():
    ids, state, generator = torch.arange(500), torch.get_rng_state(), seeded(3)

    def task(generator):
        return sample_character_task(ids, train=2, validation=1, batch_size=3, length=5, generator=generator)

    first, second, again = task(generator), task(generator), task(seeded(3))
    flat = [[t.tolist() for part in one for pair in part for t in pair] for one in (first, second, again)]
    assert flat[0] == flat[2] != flat[1]
    passes = [
        [x.tolist() for x, _ in character_windows(batchify(ids, 2), 9, generator=generator)]
        for generator in (seeded(1), seeded(1), seeded(2))
    ]
    assert passes[0] == passes[1] != passes[2]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: batchify(torch.arange(7), 4), r"batchify: `ids` must be one .*got shape \(7,\) and 4"),
        (lambda: batchify(torch.arange(7), 0), r"batchify: .*got shape \(7,\) and 0"),
        (lambda: batchify(torch.zeros(2, 9), 2), r"batchify: .*got shape \(2, 9\) and 2"),
        (lambda: character_windows(streams_of(2, 1), 5), "got 5 for 2 streams of 1 characters"),
        (lambda: character_windows(streams_of(2, 9), 0), "`length` must be at least 1 .*got 0 for 2 streams"),
        (lambda: character_windows(streams_of(2, 9), 9, full=True), "got 9 for 2 streams of 9 characters"),
        (lambda: sample_character_task(torch.arange(9), generator=seeded()), "at least 2650240 characters, for 26240"),
        (lambda: sample_character_task(torch.arange(9), train=0, generator=seeded()), "`train` must be at .*, got 0"),
        (
            lambda: sample_character_task(
                torch.arange(9), validation_ids=torch.arange(2), train=1, batch_size=2, length=3, generator=seeded()
            ),
            r"`validation_ids` must be one stream of at least 40 characters, for 10 windows of 4 .*got shape \(2,\)",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_at_the_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- the real corpora ----


def test_ptb_and_wikitext2(real_data):
    # the sizes of the published files in bytes: with the spaces and line ends that the hub's rows have lost
    for name, validation, test in (("ptb", 399_782, 449_945), ("wikitext2", 1_121_681, 1_256_449)):
        if not (real_data / name).is_dir():
            pytest.skip(f"no {name}/ in the folder of real data")
        data = load_text(name, data_dir=real_data)
        assert len(data.test.encode()) == test
        whole = (data.train + data.validation) if "no training split" in data.identity else data.validation
        assert len(whole.encode()) == validation
        vocabulary = character_vocabulary(data.train)
        assert vocabulary.decode(vocabulary.encode(data.train)) == data.train
        assert (vocabulary.encode(data.test) == vocabulary.UNKNOWN).double().mean() < 1e-3
        assert "<unk>" in data.test
