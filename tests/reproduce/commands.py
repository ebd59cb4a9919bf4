"""Running an experiment as a user does, and reading what it left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
ENVIRONMENT.pop("LEARNED_INIT_DATA", None)


def run_command(module: str, *options: str) -> subprocess.CompletedProcess:
    """`python -m reproduce.<module>` in `smoke` on the CPU."""
    return subprocess.run(
        _command(module, options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


def run_until(module: str, *options: str, is_time: Callable[[], bool], sign: signal.Signals) -> tuple[int, str]:
    """The same, with a signal as soon as it is time; the exit status, and what stood on standard error."""
    process = subprocess.Popen(
        _command(module, options), cwd=ROOT, env=ENVIRONMENT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def _command(module: str, options: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", f"reproduce.{module}", "--preset", "smoke", "--device", "cpu", "--quiet", *options]


def records_of(folder: Path) -> list[dict]:
    """The records, without what a clock put there."""

    def timeless(value):
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key != "seconds"}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
