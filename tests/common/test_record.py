"""A run folder that was cut off anywhere is resumed or refused, has one writer, and never reads as complete."""

import errno
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from common import record as record_module
from common.record import Run, device_name, open_run, read_run, write_environment
from tests.conftest import ROOT

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
    assert {path.name: path.stat().st_size > 0 for path in folder.iterdir()} == {
        "config.json": True, "metrics.jsonl": False
    }  # fmt: skip
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


def test_a_name_that_one_configuration_lacks_is_named(folder):
    reopen(folder, more=None).append({"step": 1})
    with pytest.raises(ValueError, match="other values of more"):
        reopen(folder)


def test_before_anything_is_computed_another_configuration_begins_anew(folder):
    write_environment(reopen(folder, model="resnt18", extra=1), DATA, CPU)
    run = reopen(folder, model="resnet18")
    assert run.records == []
    assert json.loads((folder / "config.json").read_text("utf-8")).keys() == CONFIG.keys() | {"model"}
    write_environment(run, DATA | {"sha256": "d2"}, CPU)  # other data too
    assert json.loads((folder / "environment.json").read_text("utf-8"))["data"]["sha256"] == "d2"


def test_a_checkpoint_before_the_first_record_is_work(folder):
    reopen(folder)
    (folder / "training.pt").touch()
    with pytest.raises(ValueError, match=r"resumed, got other values of extra\."):
        reopen(folder, extra=1)
    assert "extra" not in json.loads((folder / "config.json").read_text("utf-8"))


def test_a_folder_of_something_else_is_refused(folder):
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="must be empty or hold a run to be resumed, got other files"):
        reopen(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.partial", ".probe"])
def test_what_a_kill_at_the_start_leaves_is_no_other_file(folder, name):
    folder.mkdir(parents=True)
    (folder / name).touch()
    reopen(folder).append({"epoch": 1})
    assert lines(folder) == ['{"epoch": 1}']


def test_records_without_a_configuration_are_other_files(folder):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match="got other files"):
        reopen(folder)


def test_a_configuration_of_something_else_is_left_alone(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["ViT"]}')
    with pytest.raises(ValueError, match=r"got other values of architectures, data, learning_rate"):
        reopen(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


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


# ---------------------------------------------------------------------------------------------- one writer
HOLDER = """
import sys, time
from pathlib import Path
from common.record import open_run
run = open_run("experiment", {"seeds": 3}, seed=0, output=Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(folder):
    """Another process at work in the folder."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(folder, holder):
    with pytest.raises(ValueError, match=r"open_run: a run folder must have one writer.*another process is at work"):
        open_run("experiment", {"seeds": 3}, seed=0, output=folder)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    run = open_run("experiment", {"seeds": 3}, seed=0, output=folder)
    assert run.append({"epoch": 1}) == {"epoch": 1}


def is_free(folder: Path) -> bool:
    """For a process that does not hold it yet."""
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    done = subprocess.run([sys.executable, "-c", code, str(folder / "metrics.jsonl")], stderr=subprocess.PIPE)
    assert done.returncode == 0 or b"BlockingIOError" in done.stderr
    return done.returncode == 0


def test_a_folder_is_its_process_s_until_the_last_run_object_is_gone(folder):
    first = reopen(folder)
    second = reopen(folder)
    second.append({"epoch": 1})  # which opens and closes the file
    second.finish({})
    del first
    assert not is_free(folder)
    del second
    assert is_free(folder)


def test_a_folder_made_anew_is_locked_anew(folder):
    old = reopen(folder)
    folder.rename(folder.with_name("old"))
    new = reopen(folder)
    assert not is_free(folder)
    assert not is_free(folder.with_name("old"))
    del old, new
    assert is_free(folder)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_warned_of(folder, monkeypatch, number):
    monkeypatch.setattr(record_module.fcntl, "flock", refuse(number))
    with pytest.warns(UserWarning, match="has no locks: see to it that no other process") as caught:
        assert reopen(folder).records == []
    assert caught[0].filename == __file__


def test_other_errors_of_a_lock_are_raised(folder, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(record_module.fcntl, "flock", refuse(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            reopen(folder)
    assert reopen(folder).records == []


def test_a_system_without_fcntl_has_no_locks(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # importing it fails, as on Windows
    spec = importlib.util.spec_from_file_location("record_without_fcntl", record_module.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = module.open_run("experiment", CONFIG, seed=3, output=folder)
    module.write_environment(run, DATA, CPU)
    assert module.read_run(folder, "take_over")[2] == []  # as other processes see it before its first record
    (folder / "environment.json").unlink()
    assert run.append({"epoch": 1}) == {"epoch": 1}
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl"}
    assert module.open_run("experiment", CONFIG, seed=3, output=folder).records == run.records


def test_a_run_is_read_and_left_as_it_is_while_another_process_writes(folder):
    run = reopen(folder)
    write_environment(run, DATA, CPU)
    run.append({"step": 1, "loss": 0.5})
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')  # as a writer leaves it for a moment
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    config, environment, records = read_run(folder, "test")
    assert config["widths"] == [3, 5]
    assert environment["data"] == DATA
    assert records == [{"step": 1, "loss": 0.5}]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("missing", ["config.json", "environment.json", "metrics.jsonl"])
def test_what_is_no_run_is_not_read(folder, missing):
    run = reopen(folder)
    write_environment(run, DATA, CPU)
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"test: .* must be a run folder, got none with {missing}"):
        read_run(folder, "test")


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

    def half(path, text, *args, **options):
        write(path, text[: len(text) // 2], *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            run.finish({"accuracy": 0.5})
    assert not reopen(folder).is_complete
    run.finish({"accuracy": 0.5})
    assert reopen(folder).is_complete


def test_what_takes_a_files_place_is_on_disk_before_it_does(tmp_path, monkeypatch):
    calls = []
    partial, path = tmp_path / "a.partial", tmp_path / "a.json"

    def fsync(descriptor):
        assert path.read_text("utf-8") == "old"
        calls.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(record_module.os, "fsync", fsync)
    partial.write_text("new", "utf-8")
    path.write_text("old", "utf-8")
    number = partial.stat().st_ino
    record_module.put_in_place(partial, path)
    assert calls == [number]
    assert [(p.name, p.read_text("utf-8")) for p in tmp_path.iterdir()] == [("a.json", "new")]


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


def test_tensors_that_cannot_be_written_are_an_error_of_the_disk(folder, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    run = reopen(folder)
    monkeypatch.setattr(record_module, "save_file", full)
    with pytest.raises(OSError, match=r"must be writable, got: No space left on device\. Is the disk full\?"):
        run.save_tensors("learned", {"scale": torch.ones(2)}, {})
    assert not (folder / "learned.safetensors").exists()


def test_the_environment_says_what_was_measured_on(folder):
    run = reopen(folder)
    write_environment(run, DATA, CPU)
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    assert environment.keys() == {"data", "versions", "commit", "device", "threads", "platform", "command"}
    assert environment["data"] == DATA
    assert {"python", "torch", "numpy", "safetensors"} <= environment["versions"].keys()
    assert environment["device"] == device_name(CPU) != ""


def test_a_run_that_is_resumed_elsewhere_says_so(folder, monkeypatch):
    run = reopen(folder)
    write_environment(run, DATA, CPU)
    first = json.loads((folder / "environment.json").read_text("utf-8"))
    write_environment(run, DATA, CPU)
    assert json.loads((folder / "environment.json").read_text("utf-8")) == first
    for commit in ("c1", "c1", "c2"):
        monkeypatch.setattr(record_module, "_commit", lambda commit=commit: commit)
        write_environment(run, DATA, CPU)
    environment = json.loads((folder / "environment.json").read_text("utf-8"))
    resumed = environment.pop("resumed")
    assert environment == first
    assert [entry["commit"] for entry in resumed] == ["c1", "c2"]
    assert resumed[0] | {"commit": first["commit"]} == {name: first[name] for name in resumed[0]}


def test_a_run_is_not_resumed_on_other_data(folder):
    run = reopen(folder)
    write_environment(run, DATA, CPU)
    run.append({"epoch": 1})
    before = (folder / "environment.json").read_bytes()
    # the same content from another place is the same data
    write_environment(reopen(folder), DATA | {"identity": "digits, from a cache"}, CPU)
    with pytest.raises(ValueError, match="begun with, digits, 1797 rows, got cifar10"):
        write_environment(reopen(folder), {"identity": "cifar10", "rows": 50000, "sha256": "c0"}, CPU)
    with pytest.raises(
        ValueError, match="begun with, digits, 1797 rows, got other content by that name, changed since"
    ):
        write_environment(reopen(folder), DATA | {"sha256": "c0"}, CPU)
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
