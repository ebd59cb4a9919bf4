"""Workers that share a run's work: what they do, what they say, and how they end."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.types import DerivativeError
from reproduce.processes import Workers, _deaf_to_interrupts
from tests.conftest import ROOT
from tests.reproduce.commands import ENVIRONMENT


def make_do(index: int):
    """Of a worker: says who it is, raises, ends, or works for ever."""

    def do(unit, advance):
        advance(0.5)
        if unit == "mistake":
            raise ValueError("a user's mistake")
        if unit == "layer":
            raise DerivativeError("a layer is in the way")
        if unit == "memory":
            raise torch.OutOfMemoryError("Tried\nto allocate.")
        if unit == "error":
            raise KeyError("a bug")
        if unit == "end":
            os._exit(3)
        if unit == "for ever":
            time.sleep(600)
        return {"index": index, "threads": torch.get_num_threads(), "pid": os.getpid()}

    return do


def test_interrupts_are_ignored_for_a_while_and_only_where_that_can_be_said():
    before = signal.getsignal(signal.SIGINT)
    with _deaf_to_interrupts():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is before
    with ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(lambda: _deaf_to_interrupts().__enter__()).result() is None


def test_workers_do_units_and_say_what_went_wrong():
    advanced: list[float] = []
    with Workers(make_do, 2, advanced.append) as workers:
        assert [record["threads"] for record in workers.everywhere("who")] == [1, 1]
        assert advanced == [0.5, 0.5]
        assert workers.has_room
        assert not workers.is_busy
        workers.start("first")
        workers.start("second")
        assert not workers.has_room
        done = dict(workers.next_done() for _ in range(2))
        assert {done[unit]["index"] for unit in ("first", "second")} == {0, 1}
        for unit, kind, message in (
            ("mistake", ValueError, "a user's mistake"),
            ("layer", ValueError, "a layer is in the way"),
            ("memory", ValueError, "the memory must hold the computation, got: Tried to allocate. Take smaller"),
            ("error", RuntimeError, r"a unit of work raised.\n(?s:.*)KeyError: 'a bug'"),
            ("end", RuntimeError, "a worker must live as long as the run, got exit status 3"),
        ):
            if unit == "error":  # what another has finished meanwhile is not lost
                workers.start(unit)
                workers.start("third")
                time.sleep(1.0)
                assert workers.next_done()[0] == "third"
                with pytest.raises(kind, match=message):
                    workers.next_done()
                workers.units.clear()
            workers.start(unit)
            with pytest.raises(kind, match=message):
                workers.next_done()
            workers.units.clear()
        ended = list(workers.processes.values())
    assert not any(process.is_alive() for process in ended)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "from reproduce.processes import Workers; from tests.reproduce.test_processes import make_do\n"
        "if __name__ == '__main__':\n"
        "    workers = Workers(make_do, 1, lambda _: None); print(workers.everywhere('who')[0]['pid'], flush=True)\n"
        "    workers.start('for ever'); workers.next_done()\n"
    )
    (tmp_path / "parent.py").write_text(code, "utf-8")
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")  # one that nobody has waited for has ended all the same
    return not (status.exists() and status.read_text("utf-8").rpartition(")")[2].split()[0] == "Z")
