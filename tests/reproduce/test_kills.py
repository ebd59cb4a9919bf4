"""Killed at any moment, or out of disk space, every command goes on to the numbers of an undisturbed run."""

import json
import os
import random
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from reproduce import compare
from tests.conftest import ROOT
from tests.reproduce.commands import ENVIRONMENT

FULL_DISKS = 1


@dataclass(frozen=True)
class Command:
    """What is run, and when it is hurt: between two shares of an undisturbed run's time, drawn evenly."""

    module: str
    options: tuple[str, ...]
    first: float = 0.0
    last: float = 0.6
    kills: int = 10


LONG = 0.4
"""The last moment, of commands of more than eight seconds: ten kills need not go through all of them twice."""
COMMANDS = {
    "compare": Command("compare", ("--no-charge", "--processes", "1")),
    "metainit_cifar10": Command("metainit_cifar10", ("--epochs", "3", "--data", "digits")),
    "gradinit_cifar10": Command("gradinit_cifar10", ("--data", "digits"), last=LONG),
    "gradinit_multi30k": Command("gradinit_multi30k", ("--data", "reversed")),
    "gradinit_exactness": Command("gradinit_exactness", ("--data", "digits"), last=0.9),
    "nio_cifar10": Command("nio_cifar10", ("--data", "digits"), last=LONG),
    "nio_vit": Command("nio_vit", ("--data", "digits")),
    "nio_landscape": Command("nio_landscape", ("--data", "digits")),
    "nio_floor": Command("nio_floor", ("--data", "digits")),
    "dimaml_charlm": Command("dimaml_charlm", ("--data", "embedded", "--processes", "1"), last=LONG),
    "dimaml_autoencoder": Command("dimaml_autoencoder", ("--data", "digits", "--processes", "1"), last=LONG),
    "dimaml_fixup": Command("dimaml_fixup", ("--data", "digits", "--processes", "1"), last=LONG),
    # the workers' own imports take half of the time
    "workers": Command("compare", ("--no-charge", "--processes", "2"), first=0.4, last=0.8, kills=3),
}
SERVER = """
import importlib, json, os, sys
module = importlib.import_module(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.setsid()
        os.write(1, b"%d\\n" % os.getpid())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [sys.argv[1], *json.loads(line)]
        module.main()
        sys.exit()
    _, status = os.waitpid(child, 0)
    os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(status))
"""


class Starter:
    """A process that has imported a command, and forks where it is to run.

    Without the imports, which take seconds, a run can be killed often, and every kill finds it at work.
    """

    def __init__(self, module: str, *options: str) -> None:
        self.options = ["--preset", "smoke", "--device", "cpu", "--quiet", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, f"reproduce.{module}"], cwd=ROOT, env=ENVIRONMENT, bufsize=0,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)

    def __enter__(self) -> "Starter":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def begin(self, *options: str) -> int:
        """Start the command; the identifier of its process and of its group, in which its workers are too."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([*self.options, *options]).encode() + b"\n")
        return self._number()

    def ends_within(self, seconds: float) -> bool:
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], seconds)[0])

    def end(self) -> tuple[int, str]:
        """The exit status, negative after a signal, and what stood on standard error."""
        status = self._number()
        assert self.process.stderr is not None
        return status, (self.process.stderr.read() or b"").decode()

    def run(self, *options: str) -> tuple[int, str]:
        self.begin(*options)
        return self.end()

    def _number(self) -> int:
        assert self.ends_within(300)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return int(line)


@dataclass(frozen=True)
class Undisturbed:
    """A command, the folder of a run that nothing happened to, and how long that took."""

    command: Command
    starter: Starter
    folder: Path
    seconds: float

    def moments(self, name: str) -> Iterator[float]:
        """Seconds after the command's imports, always the same for a name."""
        times = random.Random(name)
        while True:
            yield self.seconds * times.uniform(self.command.first, self.command.last)


def make_undisturbed(command: Command, starter: Starter, folder: Path) -> Undisturbed:
    begun = time.monotonic()
    status, errors = starter.run("--output", str(folder))
    assert status == 0, errors
    return Undisturbed(command, starter, folder, time.monotonic() - begun)


@pytest.fixture(scope="module", params=COMMANDS.values(), ids=list(COMMANDS))
def undisturbed(request, tmp_path_factory) -> Iterator[Undisturbed]:
    with Starter(request.param.module, *request.param.options) as starter:
        yield make_undisturbed(request.param, starter, tmp_path_factory.mktemp("undisturbed") / "run")


# ---------------------------------------------------------------------------------------------- what must be equal
def timeless(value: Any) -> Any:
    """Without what a clock put there: seconds, and in a comparison the cost of an initialiser in updates."""
    if isinstance(value, list):
        return [timeless(item) for item in value]
    if not isinstance(value, dict):
        return value
    is_cost = value.keys() == {"seconds", "updates"} or {"seconds_per_update", "updates"} <= value.keys()
    return {
        key: timeless(item)
        for key, item in value.items()
        if not (key.endswith("seconds") or key.startswith("seconds_") or (is_cost and key == "updates"))
    }


def numbers_of(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves for programs: records in an order of their own, summary, tensors."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return {
        "records": sorted((timeless(json.loads(line)) for line in lines), key=json.dumps),
        "summary": timeless(json.loads((folder / "summary.json").read_text("utf-8"))),
        "tensors": {
            path.name: {name: tensor.tolist() for name, tensor in load_file(path).items()}
            for path in folder.glob("*.safetensors")
        },
        "files": sorted(path.name for path in folder.iterdir()),
    }


Hurt = Callable[[int, Path], None]
"""What is done to a run: to the process with that identifier, at work in that folder."""


def whole_records(folder: Path) -> bytes:
    path = folder / "metrics.jsonl"
    return path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""


def disturb(undisturbed: Undisturbed, parent: Path, hurts: Sequence[Hurt], *, name: str) -> list[int]:
    """Run, hurt the run at a moment, and run again, until all that is done; where a run ends before, begin anew.

    The machine may be faster or slower than it was for the undisturbed run, so that the moments are stretched where a
    run had no time for a record, and brought forward where it ended.

    Returns:
        How many of the records were there each time.
    """
    whole, moments = numbers_of(undisturbed.folder), undisturbed.moments(name)
    starter, found, begun = undisturbed.starter, [], 0
    folder, stretch = parent / "0", 1.0
    while True:
        before = whole_records(folder)
        process = starter.begin("--output", str(folder))
        hurt = hurts[len(found)] if len(found) < len(hurts) else None
        if hurt is not None and not starter.ends_within(stretch * next(moments)):
            hurt(process, folder)
        status, errors = starter.end()
        assert whole_records(folder).startswith(before)  # nothing finished is lost
        if status == 0:
            assert numbers_of(folder) == whole
            if len(found) == len(hurts):
                return found
            begun += 1
            folder, stretch = parent / str(begun), stretch / 1.5
        else:
            check_end(status, errors, hurt)
            found.append(len(whole_records(folder).splitlines()))
            if whole_records(folder) == before:
                stretch *= 1.5


def check_end(status: int, errors: str, hurt: Hurt | None) -> None:
    assert hurt is not None, errors
    if hurt is kill:
        assert status == -signal.SIGKILL, errors
    else:
        assert (status, errors.startswith("error: "), errors.count("\n")) == (2, True, 1), errors


def kill(process: int, _: Path) -> None:
    with suppress(ProcessLookupError):  # it ended in this very moment
        os.killpg(process, signal.SIGKILL)


class Full:
    """From now on the process can write no file beyond so many bytes: at times a line is cut off in the middle."""

    def __init__(self, name: str) -> None:
        self.sizes = random.Random(name)

    def __call__(self, process: int, folder: Path) -> None:
        path = folder / "metrics.jsonl"
        size = path.stat().st_size + self.sizes.randrange(200) if path.exists() and self.sizes.random() < 0.5 else 0
        with suppress(ProcessLookupError):
            resource.prlimit(process, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


# ---------------------------------------------------------------------------------------------- the tests
@pytest.mark.slow
def test_kills_change_no_number(undisturbed, tmp_path, request):
    """SIGKILL to the command and all its workers, ten times (with workers thrice), at moments drawn from a seed.

    Each time the same command goes on in the folder; where it was done before its kill, it begins anew in another.
    The last run is left to end. Whatever ended has the undisturbed run's records, summary and tensors, bit for bit.
    """
    command = undisturbed.command
    found = disturb(undisturbed, tmp_path, [kill] * command.kills, name=request.node.name)
    total = len(whole_records(undisturbed.folder).splitlines())
    assert any(records < total for records in found)  # not only while figures were drawn


@pytest.mark.slow
def test_a_charged_comparison_keeps_its_plan_whatever_kills_it(tmp_path):
    """Costs are timed, so that no two runs are equal; but each goes by what it recorded first, to the last training."""
    options = ("--methods", "kaiming", "gradinit", "nio", "--budget", "1.5s", "--processes", "1")
    folder, moments = tmp_path / "run", random.Random("charged")
    with Starter("compare", *options) as starter:
        undisturbed = make_undisturbed(Command("compare", options), starter, tmp_path / "undisturbed")
        kept: list[bytes] = []
        for _ in range(5):
            process = starter.begin("--output", str(folder))
            if not starter.ends_within(undisturbed.seconds * moments.uniform(0.1, 0.6)):
                kill(process, folder)
            starter.end()
            kept.append(whole_records(folder))
        status, errors = starter.run("--output", str(folder))
    assert status == 0, errors
    assert all(later.startswith(earlier) for earlier, later in pairwise([*kept, whole_records(folder)]))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    whole = [json.loads(line) for line in (undisturbed.folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    units = [
        [(r["kind"], r.get("arm"), r.get("seed"), r.get("learning_rate")) for r in own] for own in (records, whole)
    ]
    assert len(set(units[0])) == len(units[0])
    assert set(units[0]) == set(units[1])
    config = compare.Config(**json.loads((folder / "config.json").read_text("utf-8")))
    plan = compare.make_plan(config, next(r for r in records if r["kind"] == "timing"), steps_per_epoch=8)
    started = {(r["arm"], r["seed"]): r for r in records if r["kind"] == "initialisation"}
    for record in (r for r in records if r["kind"] == "training"):
        unit = compare.Train(record["arm"], record["seed"], record["learning_rate"], 0)
        own = plan.training(unit, started[record["arm"], record["seed"]])
        assert (record["updates"], record["charged_updates"]) == (own.slices * own.length, own.charged)


ON_LINUX = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="limits of another process need Linux")


@pytest.mark.slow
@ON_LINUX
def test_a_disk_that_is_full_from_any_moment_on_loses_nothing(undisturbed, tmp_path, request):
    """As above, with writes that fail from such a moment on, twice: one sentence and status 2, each time."""
    disturb(undisturbed, tmp_path, [Full(request.node.name)] * FULL_DISKS, name=request.node.name)


@ON_LINUX
def test_a_brief_run_killed_once_and_out_of_space_once(tmp_path):
    """What the slow tests do, of the shortest command."""
    command = COMMANDS["gradinit_exactness"]
    with Starter(command.module, *command.options) as starter:
        undisturbed = make_undisturbed(command, starter, tmp_path / "undisturbed")
        disturb(undisturbed, tmp_path, [kill, Full("brief")], name="brief")


def test_what_is_compared_is_no_time_and_all_the_rest():
    record = {"kind": "initialisation", "seconds": 1.0, "seconds_per_update": 0.1, "updates": 10.0, "scales": {"w": 2}}
    assert timeless(record) == {"kind": "initialisation", "scales": {"w": 2}}
    assert timeless({"initialisation": {"seconds": 1.0, "updates": 10.0}}) == {"initialisation": {}}
    assert timeless({"kind": "training", "updates": 12, "history": [{"seconds": 1.0, "loss": 0.5}]}) == {
        "kind": "training", "updates": 12, "history": [{"loss": 0.5}]
    }  # fmt: skip


def test_tensors_count(tmp_path):
    for name in ("metrics.jsonl", "summary.json"):
        (tmp_path / name).write_text("{}\n", "utf-8")
    before = numbers_of(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    first = numbers_of(tmp_path)
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    assert before != first != numbers_of(tmp_path)
