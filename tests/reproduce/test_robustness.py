"""What a disk, another process, or a file from outside can do to a comparison: a message, and nothing lost.

Data and callables that are refused as such: test_bring.py. Kills: test_kills.py.
"""

import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import nn

from common.training import TrainingConfig, train
from reproduce import arms, compare
from tests.conftest import ROOT
from tests.data.conftest import alone, closed_port  # noqa: F401
from tests.reproduce.commands import ENVIRONMENT, whole_lines
from tests.reproduce.test_bring import write_parquet
from tests.reproduce.test_kills import Starter, numbers_of

OPTIONS = ("--no-charge", "--seeds", "1", "--learning-rates", "0.1")
LAST = "training-lsuv-0-0.checkpoint"


def main_here(*options: str) -> tuple[int, str]:
    """`python -m reproduce.compare` in `smoke`, in this process: its exit status, and what stood on standard error."""
    command = ["compare", "--preset", "smoke", "--device", "cpu", "--quiet", *OPTIONS, *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command)
        patch.setattr(arms, "TIMED_SECONDS", 0.01)
        torch.set_default_dtype(torch.float32)
        status = 0
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            try:
                compare.main()
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                torch.set_default_dtype(torch.float64)
    return status, errors.getvalue()


def check_refused(folder: Path, message: str, *options: str) -> None:
    """One sentence, status 2, and every file as it was before."""
    before = content_of(folder)
    status, errors = main_here("--output", str(folder), *options)
    assert status == 2
    assert errors.startswith("error: ")
    assert message in " ".join(errors.split())
    assert content_of(folder) == before


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def complete(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("complete") / "run"
    status, errors = main_here("--output", str(folder))
    assert status == 0, errors
    return folder


def cut_off(complete: Path, folder: Path) -> Path:
    """A copy of the run as it was before its last training."""
    shutil.copytree(complete, folder)
    for name in ("summary.json", "page.html", "results.csv"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    return folder


@pytest.fixture
def begun(complete, tmp_path) -> Path:
    return cut_off(complete, tmp_path / "run")


def check_goes_on(folder: Path, complete: Path) -> None:
    status, errors = main_here("--output", str(folder))
    assert status == 0, errors
    assert numbers_of(folder) == numbers_of(complete)


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    with Starter("compare", *OPTIONS) as starter:
        yield starter


# ---------------------------------------------------------------------------------------------- the disk
@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = None
    if shutil.which("mount"):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True)
    if mounted is None or mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all that is left."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return path
    raise AssertionError("the disk has no end")


def test_a_disk_that_fills_up_keeps_what_is_finished(starter, complete, small_disk):
    folder = small_disk / "run"
    starter.begin("--output", str(folder))
    wait_for(lambda: whole_lines(folder / "metrics.jsonl") >= 2)
    filler = fill(small_disk)
    status, errors = starter.end()
    assert (status, errors.count("\n")) == (2, 1), errors
    assert "No space left on device" in errors or "Is the disk full?" in errors
    kept = (folder / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
    status, errors = starter.run("--output", str(folder))
    assert status == 2
    assert "open_run: the output folder must be writable, got: No space left on device" in errors
    filler.unlink()
    status, errors = starter.run("--output", str(folder))
    assert status == 0, errors
    assert (folder / "metrics.jsonl").read_bytes().startswith(kept)
    assert numbers_of(folder) == numbers_of(complete)


def wait_for(is_time: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_time():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_read_only_folder_is_refused_and_kept(complete, small_disk):
    folder = cut_off(complete, small_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    check_refused(folder, "open_run: the output folder must be writable, got: Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    check_goes_on(folder, complete)


# ---------------------------------------------------------------------------------------------- another process
def test_a_second_process_is_refused_and_the_first_goes_on(starter, complete, tmp_path):
    folder = tmp_path / "run"
    starter.begin("--output", str(folder))
    wait_for((folder / "environment.json").exists)
    status, errors = main_here("--output", str(folder))
    assert not starter.ends_within(0)
    assert status == 2
    assert "a run folder must have one writer" in " ".join(errors.split())
    status, errors = starter.end()
    assert status == 0, errors
    assert numbers_of(folder) == numbers_of(complete)


# ---------------------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize(
    "tail",
    [b'{"kind": "training", "arm": "ls', b"\xff\xfe\x00garbage", b"\0" * 4096],
    ids=["half a line", "garbage", "zeros"],
)
def test_a_tail_without_an_end_is_dropped(complete, begun, tail):
    with (begun / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    check_goes_on(begun, complete)


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfegarbage", b"\0\0\0\0", b'{"kind": "training"', b"12", b"", b"[" * 200_000],
    ids=["garbage", "zeros", "half", "a number", "empty", "nested"],
)
def test_a_damaged_line_is_told_by_its_number(begun, line):
    path = begun / "metrics.jsonl"
    number = whole_lines(path) + 1
    with path.open("ab") as file:
        file.write(line + b"\n")
    check_refused(begun, f"line {number} of {path} must be a JSON object")


@pytest.mark.parametrize("name", ["config.json", "environment.json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b'{"seeds": '], ids=["empty", "garbage", "half"])
def test_a_damaged_file_is_told_by_its_name(begun, name, content):
    (begun / name).write_bytes(content)
    check_refused(begun, f"{begun / name} must be a JSON object as it was written")


def test_damaged_weights_are_refused(begun, complete):
    path = begun / "weights-lsuv-0.safetensors"
    whole = path.read_bytes()
    for content in (b"", b"\xff" * 100, whole[: len(whole) // 2], pickle.dumps(Planted(begun / "executed"))):
        path.write_bytes(content)
        check_refused(begun, f"the weights in {path} must be as they were written, got a damaged file")
    path.write_bytes(whole)
    check_goes_on(begun, complete)


# ---------------------------------------------------------------------------------------------- planted code
class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def planted_checkpoints(executed: Path) -> dict[str, bytes]:
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save({"model": Planted(executed), "history": []}, zipped)
    torch.save({"model": Planted(executed), "history": []}, legacy, _use_new_zipfile_serialization=False)
    whole = io.BytesIO()
    torch.save({"model": {}, "optimizer": {}, "history": [], "random": torch.zeros(1)}, whole)
    return {
        "zip": zipped.getvalue(),
        "legacy": legacy.getvalue(),
        "pickle": pickle.dumps(Planted(executed), protocol=2),
        "garbage": b"\xff" * 1000,
        "empty": b"",
        "cut off": whole.getvalue()[: len(whole.getvalue()) // 2],
        "of another model": whole.getvalue(),
    }


PLANTED = ["zip", "legacy", "pickle", "garbage", "empty", "cut off", "of another model"]


def test_the_planted_code_would_run(tmp_path):
    for kind in ("zip", "legacy", "pickle"):
        content = planted_checkpoints(tmp_path / kind)[kind]
        if kind == "pickle":
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        assert (tmp_path / kind).is_dir()


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_checkpoint_is_refused_and_nothing_in_it_is_run(begun, tmp_path, kind):
    (begun / LAST).write_bytes(planted_checkpoints(tmp_path / "executed")[kind])
    check_refused(begun, f"train: {begun / LAST} must be a checkpoint that this training wrote")
    assert not (tmp_path / "executed").exists()


def test_a_planted_checkpoint_taken_out_the_run_goes_on(begun, complete, tmp_path):
    (begun / LAST).write_bytes(planted_checkpoints(tmp_path / "executed")["zip"])
    assert main_here("--output", str(begun))[0] == 2
    (begun / LAST).unlink()
    check_goes_on(begun, complete)


@pytest.mark.parametrize("kind", PLANTED)
def test_any_training_refuses_it(tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(planted_checkpoints(tmp_path / "executed")[kind])
    model = nn.Linear(2, 2)
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    with pytest.raises(OSError, match="must be a checkpoint that this training wrote"):
        train(
            model, lambda *_: torch.zeros(()), lambda _: [], lambda _: {}, steps_per_epoch=1,
            config=TrainingConfig(epochs=1), checkpoint=path,
        )  # fmt: skip
    assert not (tmp_path / "executed").exists()
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


# ---------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize("name", ["../../away", "{tmp}/away", "..", "away\0.safetensors", "kaiming/../../away", ""])
@pytest.mark.parametrize(
    ("option", "form", "message"),
    [
        ("--methods", "{}", "`methods` must be among"),
        ("--reference", "{}", "`reference` must be one of the methods compared"),
        ("--options", "{}.steps=3", "an option must read METHOD.key=value"),
        ("--model", "{}:make", "`model` must have the form package.module:callable"),
        ("--loss", "{}:make", "`loss` must have the form package.module:callable"),
        ("--data", "hub:{}", "must be on the hub, or be a folder|must hold train-"),
    ],
)
def test_names_that_would_leave_the_folder_are_refused(tmp_path, monkeypatch, alone, option, form, message, name):  # noqa: F811
    here = tmp_path / "deep" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    status, errors = main_here("--output", str(here / "run"), option, form.format(name.format(tmp=tmp_path)))
    assert status == 2
    assert re.search(message, errors)
    assert {path.name for path in tmp_path.rglob("*") if path.parent != here / "run"} <= {"deep", "here", "run"}


# ---------------------------------------------------------------------------------------------- what was brought
LOADERS = """
import pathlib, torch

class Training(list):
    def __iter__(self):
        for number, (x, y) in enumerate(super().__iter__(), 1):
            fault = pathlib.Path("fault").read_text() if number == 10 and pathlib.Path("fault").exists() else ""
            if fault == "raises":
                raise KeyError("row 77")
            yield (x * torch.nan if fault == "nan" else x), y

def make():
    generator = torch.Generator().manual_seed(0)
    batch = lambda: (torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 2)
    return Training(batch() for _ in range(12)), [batch()]
"""


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A current directory of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def at_the_second_arm(patch: pytest.MonkeyPatch, fault: Callable[[], None]) -> None:
    """The fault happens before the second arm is trained: the first is finished."""
    do = arms.Train.do

    def do_or_break(self, bench, advance):
        if self.arm == "lsuv":
            fault()
        return do(self, bench, advance)

    patch.setattr(arms.Train, "do", do_or_break)


@pytest.mark.parametrize(("fault", "message"), [("raises", "got KeyError at batch 10"), ("nan", "got NaN in batch 10")])
def test_the_tenth_batch_costs_no_finished_arm(own, fault, message):
    (own / f"loaders_{fault}.py").write_text(LOADERS, "utf-8")
    options = ["--data", f"loaders_{fault}:make", "--batch-size", "None", "--train-examples", "None"]
    options += ["--test-examples", "None"]
    assert main_here("--output", str(own / "whole"), *options)[0] == 0
    with pytest.MonkeyPatch.context() as patch:
        at_the_second_arm(patch, lambda: (own / "fault").write_text(fault) and None)
        status, errors = main_here("--output", str(own / "run"), *options)
    assert status == 2
    assert message in " ".join(errors.split())
    assert "Everything finished is kept" in " ".join(errors.split())
    kept = (own / "run" / "metrics.jsonl").read_bytes()
    assert [json.loads(line)["kind"] for line in kept.splitlines()] == [
        "timing", "initialisation", "training", "initialisation"
    ]  # fmt: skip
    (own / "fault").unlink()
    assert main_here("--output", str(own / "run"), *options)[0] == 0
    assert (own / "run" / "metrics.jsonl").read_bytes().startswith(kept)
    assert numbers_of(own / "run") == numbers_of(own / "whole")


def test_a_callable_that_no_longer_imports_costs_no_finished_arm(own):
    path = own / "model_of_mine.py"
    code = textwrap.dedent("""
        from torch import nn
        def make():
            return nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    """)
    path.write_text(code.replace("192", "3 * 32 * 32"), "utf-8")
    options = ["--model", "model_of_mine:make", "--output", str(own / "run")]
    with pytest.MonkeyPatch.context() as patch:
        at_the_second_arm(patch, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main_here(*options)[0] == 130
    kept = (own / "run" / "metrics.jsonl").read_bytes()
    whole = path.read_text("utf-8")
    path.write_text("import a_package_that_is_nowhere\n" + whole, "utf-8")
    sys.modules.pop("model_of_mine")
    check_refused(own / "run", "model_of_mine", *options[:2])
    path.write_text(whole, "utf-8")
    status, errors = main_here(*options)
    assert status == 0, errors
    assert (own / "run" / "metrics.jsonl").read_bytes().startswith(kept)


def test_a_truncated_parquet_costs_no_finished_arm(own):
    path = own / "set" / "train.parquet"
    write_parquet(path, ["dog", "cat"] * 8)
    write_parquet(own / "set" / "test.parquet", ["dog", "cat"])
    options = ["--data", "hub:set", "--batch-size", "4", "--train-examples", "None", "--test-examples", "None"]
    with pytest.MonkeyPatch.context() as patch:
        at_the_second_arm(patch, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main_here("--output", str(own / "run"), *options)[0] == 130
    kept = (own / "run" / "metrics.jsonl").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    check_refused(own / "run", "train.parquet' must be a parquet file", *options)
    path.write_bytes(whole)
    status, errors = main_here("--output", str(own / "run"), *options)
    assert status == 0, errors
    assert (own / "run" / "metrics.jsonl").read_bytes().startswith(kept)


def test_a_users_own_modules_of_our_names_are_not_taken_for_ours(tmp_path):
    for name in ("common", "data", "papers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not ours')")
    done = subprocess.run(
        [sys.executable, "-m", "reproduce.apply", "--help"],
        cwd=tmp_path, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--method" in done.stdout
