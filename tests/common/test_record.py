"""A run folder that was cut off anywhere is resumed or refused, and never reads as complete."""

import errno
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from common.record import Run, device_name, open_run, write_environment

CONFIG = {"learning_rate": 0.1, "widths": (3, 5), "data": {"name": "digits"}, "output": Path("here")}
DATA = {"identity": "digits, 1797 rows", "rows": 1797, "sha256": "d1"}
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "deep" / "run"


def reopen(folder: Path, **changes) -> Run:
    return open_run("experiment", CONFIG | changes, seed=3, output=folder)


def lines(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text("utf-8").splitlines()


# ---------------------------------------------------------------------------------------------- new and reopened
def test_a_new_run_holds_its_configuration_alone(folder):
    run = reopen(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    written = json.loads((folder / "config.json").read_text("utf-8"))
    assert written == {"learning_rate": 0.1, "widths": [3, 5], "data": {"name": "digits"}, "output": "here"}
    assert run.records == []
    assert not run.is_complete


def test_without_a_folder_one_is_named_after_time_and_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = open_run("experiment", CONFIG, seed=3)
    assert run.folder.parent == Path("runs/experiment")
    assert run.folder.name.endswith("-3")


def test_a_run_is_resumed_after_its_last_record(folder):
    run = reopen(folder)
    first = run.append({"epoch": 1, "seed": 0, "widths": (2, 3)})
    assert first == {"epoch": 1, "seed": 0, "widths": [2, 3]}  # as it will be read again
    run.append({"epoch": 2, "seed": 0})
    again = reopen(folder)
    assert again.records == run.records
    assert again.find(epoch=2, seed=0) == {"epoch": 2, "seed": 0}
    assert again.find(epoch=2, seed=1) is None
    again.append({"epoch": 3, "seed": 0})
    assert [json.loads(line)["epoch"] for line in lines(folder)] == [1, 2, 3]


def test_a_record_is_on_disk_before_append_returns(folder):
    run = reopen(folder)
    run.append({"epoch": 1})
    assert lines(folder) == ['{"epoch": 1}']


def test_another_configuration_is_refused_by_the_names_that_differ(folder):
    reopen(folder).append({"epoch": 1})
    with pytest.raises(ValueError, match=r"resumed, got other values of extra, learning_rate\."):
        reopen(folder, learning_rate=0.2, extra=1)
    assert reopen(folder).records == [{"epoch": 1}]


def test_a_folder_of_something_else_is_refused(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold a run to be resumed, got other files"):
        reopen(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@given(st.integers(1, 40))
def test_a_line_cut_off_anywhere_is_dropped_and_taken_off_the_file(cut):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "run"
        run = reopen(folder)
        run.append({"epoch": 1, "note": "Kaiming–He, θ"})
        run.append({"epoch": 2, "loss": 0.12345})
        whole = (folder / "metrics.jsonl").read_bytes()
        last = whole.index(b"\n") + 1
        cut = min(cut, len(whole) - last)  # from the newline alone to the whole of the last line
        os.truncate(folder / "metrics.jsonl", len(whole) - cut)

        again = reopen(folder)
        assert again.records == run.records[:1]
        assert (folder / "metrics.jsonl").read_bytes() == whole[:last]
        again.append({"epoch": 2, "loss": 0.12345})
        assert (folder / "metrics.jsonl").read_bytes() == whole


# ---------------------------------------------------------------------------------------------- what is written
def test_a_run_is_complete_when_it_is_finished(folder):
    run = reopen(folder)
    run.append({"epoch": 1})
    assert not reopen(folder).is_complete
    run.finish({"accuracy": 0.5, "gap": math.inf})
    assert reopen(folder).is_complete
    assert json.loads((folder / "summary.json").read_text("utf-8")) == {"accuracy": 0.5, "gap": None}


def test_a_summary_cut_off_while_written_does_not_count(folder, monkeypatch):
    run = reopen(folder)
    write = Path.write_text

    def half(path, text, *args):
        write(path, text[: len(text) // 2], *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            run.finish({"accuracy": 0.5})
    assert not reopen(folder).is_complete
    run.finish({"accuracy": 0.5})
    assert reopen(folder).is_complete


def test_what_json_has_no_number_for_is_null(folder):
    record = reopen(folder).append({"loss": math.nan, "nested": [{"gap": -math.inf}, 1.5]})
    assert record == {"loss": None, "nested": [{"gap": None}, 1.5]}
    assert lines(folder) == ['{"loss": null, "nested": [{"gap": null}, 1.5]}']


def test_tensors_come_back_with_their_metadata(folder, generator):
    run = reopen(folder)
    tensors = {"scale": torch.randn(3, 2, generator=generator), "transposed": torch.randn(2, 5, generator=generator).T}
    run.save_tensors("learned", tensors, {"family": "normal"})
    path = folder / "learned.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"family": "normal"}
    assert not list(folder.glob("*.partial"))


def test_the_environment_says_what_was_measured_on(folder):
    run = reopen(folder)
    write_environment(run, DATA, CPU)
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    assert environment.keys() == {"data", "versions", "commit", "device", "threads", "platform", "command"}
    assert environment["data"] == DATA
    assert {"python", "torch", "numpy", "safetensors"} <= environment["versions"].keys()
    assert environment["device"] == device_name(CPU) != ""


def test_a_run_is_not_resumed_on_other_data(folder):
    write_environment(reopen(folder), DATA, CPU)
    before = (folder / "environment.json").read_bytes()
    # the same content from another place is the same data
    write_environment(reopen(folder), DATA | {"identity": "digits, from a cache"}, CPU)
    with pytest.raises(ValueError, match="begun with, digits, 1797 rows, got cifar10"):
        write_environment(reopen(folder), {"identity": "cifar10", "rows": 50000, "sha256": "c0"}, CPU)
    assert (folder / "environment.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------- nowhere to write
def refuse(code: int):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize(
    ("owner", "name", "code"),
    [(os, "fsync", errno.ENOSPC), (Path, "mkdir", errno.EROFS), (Path, "open", errno.EACCES)],
    ids=["full disk", "read-only folder", "no permission"],
)
def test_a_folder_that_cannot_be_written_is_noticed_first(folder, monkeypatch, owner, name, code):
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse(code))
        with pytest.raises(OSError, match=r"open_run: .* must be writable.*Give another folder") as caught:
            reopen(folder)
    assert caught.value.errno == code
    assert caught.value.filename == str(folder)
    assert not folder.exists() or list(folder.iterdir()) == []
    assert reopen(folder).records == []  # and nothing stands in the way of a second attempt


def test_an_output_that_is_a_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text("mine")
    with pytest.raises(OSError, match="the output folder must be writable"):
        reopen(path)
    with pytest.raises(OSError, match="the output folder must be writable"):
        reopen(path / "below")
    assert path.read_text() == "mine"
