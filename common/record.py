"""One folder a run: what was asked, what came out, and on what.

    config.json        the configuration, written first
    environment.json   versions, commit, device, data identity
    metrics.jsonl      one line a finished unit of work; a line is whole or it is not there
    summary.json       written last: a folder without it is not a complete run

A run that was cut off is opened again with the same configuration and goes on after its last whole line. Its folder is
one process's alone as long as that works on it.
"""

import errno
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # on Windows: without locks
    fcntl = None

_PACKAGES = ("torch", "torchvision", "numpy", "datasets", "safetensors")
_PROBE_BYTES = 1 << 20
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


class Run:
    """A run folder. Make one with `open_run`: no other process can then open it as long as the object lives."""

    def __init__(self, folder: Path, records: list[dict[str, Any]], lock: "_Lock | None" = None) -> None:
        self.folder = folder
        self.records = records
        self._lock = lock

    @property
    def is_complete(self) -> bool:
        return (self.folder / "summary.json").exists()

    def find(self, **keys: Any) -> dict[str, Any] | None:
        """The finished record that carries all of `keys`, if there is one."""
        return next((r for r in self.records if all(r.get(key) == value for key, value in keys.items())), None)

    def append(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Add one finished unit of work: on disk before this returns."""
        line = json.dumps(_plain(record))
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(json.loads(line))  # as a resumed run would read it
        return self.records[-1]

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        partial = self.folder / f"{name}.partial"
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, partial, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"Run.save_tensors: {partial} must be writable, got: {error}. Is the disk full?") from error
        put_in_place(partial, self.folder / f"{name}.safetensors")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`: from here on the run reads as complete."""
        _write_json(self.folder / "summary.json", summary)


def open_run(experiment: str, config: Mapping[str, Any], *, seed: int, output: Path | None = None) -> Run:
    """Make the folder of a new run, or reopen the folder of one that was cut off.

    Args:
        experiment: Names the parent folder: `runs/<experiment>/<time>-<seed>/`.
        config: Everything the numbers depend on.
        seed: Stands in the folder's name.
        output: The folder itself, instead of a new one under `runs/`. If it holds a run with the same configuration,
            that run is resumed. One that ended before anything was computed, for a mistake in its options, is begun
            anew with these.

    Raises:
        ValueError: The folder holds work of another configuration, or something that is no run; or another process
            is at work in it. This one may open it again.
        OSError: The folder cannot be written, or the disk is full; noticed before anything is computed.
    """
    folder = output or Path("runs") / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-{seed}"
    wanted = _plain(config)
    _check_writable(folder)
    _check_resumable(folder, wanted)  # before the lock, whose file must not be left in a folder that is refused
    lock = _lock(folder)
    _check_resumable(folder, wanted)  # another process may have begun a run in between
    if not (folder / "config.json").exists() or _is_without_work(folder):
        (folder / "environment.json").unlink(missing_ok=True)
        (folder / "metrics.jsonl").touch()  # which tells a run's folder from others, where there are no locks too
        _write_json(folder / "config.json", wanted)
    return Run(folder, _whole_lines(folder / "metrics.jsonl"), lock)


def read_run(folder: Path, caller: str) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """Configuration, environment and records of a run folder, which is left as it is; another process may be at work.

    Args:
        folder: As `open_run` made it.
        caller: For messages.

    Raises:
        ValueError: It holds no run that has begun to compute, or is damaged.
    """
    config, environment, metrics = (folder / name for name in ("config.json", "environment.json", "metrics.jsonl"))
    for path in (config, environment, metrics):
        if not path.is_file():
            raise ValueError(
                f"{caller}: {folder} must be a run folder, got none with {path.name}. Name another folder."
            )
    begun, on = (_read_object(path, path.read_bytes(), caller) for path in (config, environment))
    return begun, on, _records(metrics, metrics.read_bytes(), caller)


def write_environment(run: Run, data: Mapping[str, Any], device: torch.device) -> None:
    """`environment.json`: enough to know what a number was measured on.

    A run that is resumed keeps its first, and adds under `resumed` on what it goes on, where that is something else.

    Args:
        run: Where to write.
        data: What was used, with a fingerprint of its content under `sha256`.
        device: Where the run computes.

    Raises:
        ValueError: The run is resumed on other data than it was begun with.
    """
    path = run.folder / "environment.json"
    now = {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "commit": _commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }
    if not path.exists():
        _write_json(path, {"data": data} | now | {"command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])})
        return
    begun = _read_object(path, path.read_bytes(), "write_environment")
    # the content alone: the same images may come from the hub at first and from its cache later
    if begun["data"]["sha256"] != data["sha256"]:
        first, identity = begun["data"].get("identity"), data.get("identity")
        got = identity if identity != first else "other content by that name, changed since or drawn without a seed"
        raise ValueError(
            f"write_environment: a run must be resumed on the data it was begun with, {first}, got {got}. "
            "Name the same data, or give another folder."
        )
    last = begun.get("resumed", [begun])[-1]
    if any(last.get(name) != value for name, value in now.items()):
        _write_json(path, begun | {"resumed": [*begun.get("resumed", []), now]})


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a file that was written beside; on disk first, so that one of both is whole after a power cut too."""
    with partial.open("r+b") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_text(path: Path, text: str) -> None:
    """Written beside and renamed: whole, or as it was before."""
    partial = path.with_suffix(".partial")
    partial.write_text(text, "utf-8", newline="\n")
    put_in_place(partial, path)


def as_recorded(value: float) -> float | str:
    """JSON has no infinity: "inf" and "nan", which `float` reads."""
    return value if math.isfinite(value) else str(value)


def device_of(name: str, caller: str) -> torch.device:
    """The device of that name; "auto": the GPU where there is one.

    Raises:
        ValueError: "cuda" where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{caller}: `device` must be there, got 'cuda' without a GPU that torch sees. Try 'auto'.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def device_name(device: torch.device) -> str:
    """What a number was measured on, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _check_writable(folder: Path) -> None:
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"\0" * _PROBE_BYTES)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"open_run: the output folder must be writable, got: {error.strerror}. Give another folder",
            str(folder),
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink()


def _check_resumable(folder: Path, wanted: Mapping[str, Any]) -> None:
    """A run of that configuration, or nothing yet."""
    path = folder / "config.json"
    if path.exists():
        found = _read_object(path, path.read_bytes(), "open_run")
        if found != wanted and not _is_without_work(folder):
            names, absent = found.keys() | wanted.keys(), object()
            differing = sorted(name for name in names if found.get(name, absent) != wanted.get(name, absent))
            raise ValueError(
                f"open_run: {folder} must hold a run with the same configuration to be resumed, got other values of "
                f"{', '.join(differing)}. Give another folder, or repeat the options of the run that is there."
            )
    elif not all(map(_is_of_a_start, folder.iterdir())):
        raise ValueError(
            f"open_run: {folder} must be empty or hold a run to be resumed, got other files. Give another folder."
        )


def _is_of_a_start(path: Path) -> bool:
    """What a process that is just beginning a run, or was killed at that, has in the folder."""
    return path.name in ("config.partial", ".probe") or (path.name == "metrics.jsonl" and path.stat().st_size == 0)


def _is_without_work(folder: Path) -> bool:
    """Whether it holds a run of ours, and nothing computed."""
    others = [path for path in folder.iterdir() if path.name not in ("config.json", "environment.json")]
    # without a file of records, which every run of ours has, a config.json may be anyone's
    return (folder / "metrics.jsonl").exists() and all(map(_is_of_a_start, others))


class _Lock:
    """On a run folder: held until the object is gone, or the process, by SIGKILL too; none is ever left behind."""

    def __init__(self, file: IO[bytes]) -> None:
        weakref.finalize(self, file.close)


_held: weakref.WeakValueDictionary[tuple[int, int], _Lock] = weakref.WeakValueDictionary()
"""This process's locks, by device and inode of their files."""


def _lock(folder: Path) -> _Lock | None:
    """The folder is this process's alone; None where the system has no locks.

    Raises:
        ValueError: Another process holds it.
    """
    if fcntl is None:
        return None
    file = (folder / "metrics.jsonl").open("ab")
    status = os.fstat(file.fileno())
    key = status.st_dev, status.st_ino
    if (held := _held.get(key)) is not None:
        file.close()
        return held
    lock = _Lock(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"open_run: a run folder must have one writer, got {folder}, in which another process is at work. Wait for "
            "it or stop it, or give another folder."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"open_run: the file system of {folder} has no locks: see to it that no other process writes there.",
            stacklevel=3,
        )
    _held[key] = lock
    return lock


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records on disk. A line cut off in the middle is taken off the file, so that the next append is whole."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    return _records(path, text, "open_run")


def _records(path: Path, text: bytes, caller: str) -> list[dict[str, Any]]:
    """Of the file's whole lines."""
    return [_read_object(path, line, caller, number) for number, line in enumerate(text.split(b"\n")[:-1], start=1)]


def _read_object(path: Path, text: bytes, caller: str, line: int | None = None) -> dict[str, Any]:
    """The object that the text, a line of the file or all of it, was written from.

    Raises:
        ValueError: It is damaged: what follows from it is not known.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no UTF-8, no JSON, or nested without end
        value = None
    if not isinstance(value, dict):
        where = path if line is None else f"line {line} of {path}"
        raise ValueError(
            f"{caller}: {where} must be a JSON object as it was written, got {text[:40]!r}. The file is damaged: mend "
            "it or take it out, or give another folder."
        )
    return value


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    """JSON's own types; a number that is not finite becomes null, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def _commit() -> str | None:
    """The checkout's commit, with a plus where it was edited; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=root, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
