"""Sentence pairs by name: the one reader on tiny sets, the order of the places, and what each refusal says."""

import json
import os
from fnmatch import fnmatch

import huggingface_hub
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from data import TranslationData, load_translation, sources

SIZES = {"train": 12, "validation": 4, "test": 5}
PARQUET, CONVERTED = "{}-00000-of-00001.parquet", "{}/0000.parquet"


def some_rows(split):
    return [{"en": f"{split} word {n}", "de": f"{split} Wörter {n}"} for n in range(SIZES[split])]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)


def write_set(folder, file=PARQUET, nested=False):
    for split in SIZES:
        rows = some_rows(split)
        name = file.format("val" if split == "validation" and file.endswith("jsonl") else split)
        write(folder / name, [{"translation": row} for row in rows] if nested else rows)


# ---- the reader, and the places ----


@pytest.mark.parametrize("file", [PARQUET, "{}.jsonl"])
def test_multi30k_is_read_from_parquet_and_from_json_lines(tmp_path, file):
    write_set(tmp_path / "multi30k", file)
    data = load_translation("multi30k", data_dir=tmp_path)
    for split in SIZES:
        assert getattr(data, split) == tuple((row["de"], row["en"]) for row in some_rows(split))
    assert data.name == "multi30k"
    assert data.identity == (
        "Multi30k, de to en, from the local folder 'multi30k', "
        "12 (of 29,000) train + 4 (of 1,014) validation + 5 (of 1,000) test sentence pairs"
    )
    backwards = load_translation("multi30k", data_dir=tmp_path, source="en", target="de")
    assert backwards.train == tuple((english, german) for german, english in data.train)
    assert "en to de" in backwards.identity


def test_iwslt14_comes_from_the_hubs_conversion(alone, tmp_path, monkeypatch):
    write_set(tmp_path / "snapshot" / "de-en", CONVERTED, nested=True)

    def download(repository, *, revision, allow_patterns, endpoint, **_):
        assert (repository, revision) == ("bbaaaa/iwslt14-de-en-preprocess", "refs/convert/parquet")
        assert endpoint == os.environ["HF_ENDPOINT"]
        assert all(any(fnmatch(f"de-en/{split}/0000.parquet", p) for p in allow_patterns) for split in SIZES)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(sources, "probe", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    data = load_translation("iwslt14")
    assert data.train == tuple((row["de"], row["en"]) for row in some_rows("train"))
    assert "IWSLT'14 as prepared by fairseq, de to en, from the hub's bbaaaa/iwslt14-de-en-preprocess" in data.identity


def test_the_cache_is_read(alone):
    write_set(alone / "datasets--bentrevett--multi30k" / "snapshots" / "aaaa", "{}.jsonl")
    assert "the local cache of the hub's bentrevett/multi30k" in load_translation().identity


def test_a_named_set_never_falls_back(alone):
    with pytest.raises(FileNotFoundError, match="load_translation: 'iwslt14' must be in a folder") as caught:
        load_translation("iwslt14")
    for reason in ("neither `data_dir` nor", "no whole copy of bbaaaa/", "cannot be reached", "or take 'reversed'"):
        assert reason in str(caught.value)


def test_auto_falls_back_and_says_so(alone):
    data = load_translation()
    assert data.name == "reversed"
    assert "word order reversed (synthetic, standing in for Multi30k; no second language)" in data.identity
    assert "Multi30k tried: " in data.source
    assert "cannot be reached" in data.source


@pytest.mark.parametrize("name", ["multi30k", "auto"])
def test_a_folder_without_a_split_is_an_error_even_for_auto(tmp_path, name):
    write_set(tmp_path / "multi30k")
    (tmp_path / "multi30k" / PARQUET.format("validation")).unlink()
    expected = r"must hold multi30k/train-\*.parquet, multi30k/validation-\*.parquet and multi30k/test-\*.parquet"
    with pytest.raises(FileNotFoundError, match="load_translation: `data_dir` " + expected):
        load_translation(name, data_dir=tmp_path)


def test_one_set_is_not_taken_for_another(tmp_path):
    write_set(tmp_path / "multi30k")
    with pytest.raises(ValueError, match=r"`de` and `en` inside `translation`, got \['de', 'en'\] in row 0. Another"):
        load_translation("iwslt14", data_dir=tmp_path)


# what is wrong: the file, its content, what is said
DAMAGED = {
    "other columns": ("train.jsonl", '{"de": "a", "fr": "b"}\n', r"columns `de` and `en`, got \['de', 'fr'\] in row 0"),
    "no sentence": (
        "val.jsonl",
        '{"de": "a", "en": "b"}\n{"de": null, "en": "b"}\n',
        "be text, got .None, 'b'. in row 1",
    ),
    "cut off": ("test.jsonl", '{"de": "a", "en": "b"}\n{"de": "a', "must be JSON objects, one a line, got JSONDecode"),
    "not an object": ("test.jsonl", "7\n", "must be JSON objects, one a line, got TypeError"),
    "empty": ("train.jsonl", "", "must hold a sentence pair, got no row"),
    "not parquet": (PARQUET.format("test"), "PAR1", "must be a parquet file, got Arrow"),
}


@pytest.mark.parametrize(("file", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_what_is_wrong_with_a_file_is_said(tmp_path, file, content, message):
    write_set(tmp_path, "{}.jsonl")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match="load_translation: .*" + message) as caught:
        load_translation("multi30k", data_dir=tmp_path)
    assert file in str(caught.value)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`name` must be one of auto, multi30k, iwslt14, reversed, got 'wmt14'"):
        load_translation("wmt14")
    with pytest.raises(ValueError, match="`source` and `target` must be two of de, en, got 'de' and 'fr'"):
        load_translation("multi30k", target="fr")
    with pytest.raises(ValueError, match="`source` and `target` must be two of de, en, got 'en' and 'en'"):
        load_translation("multi30k", source="en")
    with pytest.raises(ValueError, match=r"`validation` must be at least 1 pair, got 0. None takes all"):
        load_translation("reversed", validation=0)


def test_reversed_is_what_it_says():
    data = load_translation("reversed")
    pairs = data.train + data.validation + data.test
    assert all(source.split() == target.split()[::-1] for source, target in pairs)
    assert all(source == source.lower() and 3 <= len(source.split()) <= 20 for source, _ in pairs)
    assert len(set(pairs)) == len(pairs)
    assert len(data.train) > 500
    assert len(data.validation) == len(data.test) > 60
    assert data.identity.startswith("word order reversed (synthetic; no second language), English sentences of the doc")
    assert data.record()["sha256"] == load_translation("reversed").record()["sha256"]


def test_a_subset_is_the_seeds_alone_and_in_order():
    whole, state = load_translation("reversed"), torch.get_rng_state()
    first, again, other = (load_translation("reversed", train=50, test=9, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    rows = [whole.train.index(pair) for pair in first.train]
    assert rows == sorted(set(rows)) != list(range(50))
    assert first.validation == whole.validation
    assert first.test == load_translation("reversed", test=9).test
    assert first.identity.endswith(f"; random subset of 50 train + {len(whole.validation)} validation + 9 test")
    assert torch.equal(torch.get_rng_state(), state)


def test_the_record_holds_every_split():
    pairs = {"train": (("a b", "c"),), "validation": (("d", "e"), ("f", "g")), "test": (("h", "i"),)}
    record = TranslationData("tiny", **pairs, identity="what", source="where").record()
    assert {k: v for k, v in record.items() if k != "sha256"} == {
        "name": "tiny", "identity": "what", "source": "where", "train_rows": 1, "validation_rows": 2, "test_rows": 1,
    }  # fmt: skip
    for split in pairs:
        changed = pairs | {split: (("a", "b c"), *pairs[split][1:])}
        assert TranslationData("tiny", **changed, identity="", source="").record()["sha256"] != record["sha256"]


# ---- the real set ----


def test_multi30k(real_data):
    if not (real_data / "multi30k").is_dir():
        pytest.skip("no multi30k/ in the folder of real data")
    data = load_translation("multi30k", data_dir=real_data)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [29_000, 1_014, 1_000]
    assert data.train[0] == (
        "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
        "Two young, White males are outside near many bushes.",
    )
    assert "29,000 train + 1,014 validation + 1,000 test sentence pairs" in data.identity
