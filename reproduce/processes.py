"""A run's processes, where several share the work.

Workers are started afresh (spawn), one unit of work at a time each; records come back to the process that started them,
the only one to write `metrics.jsonl`. They end with it, however it ends.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from threading import Thread, current_thread, main_thread
from typing import Any

import torch

from reproduce.command import mistake_of, tell_warnings

Record = dict[str, Any]
Advance = Callable[[float], None]
"""To be called with the share of the unit that is done since the last call."""
Do = Callable[[Any, Advance], Record]
"""Does one unit of work, and returns its record."""


class Here:
    """This process does the work itself."""

    def __init__(self, do: Do, advance: Advance) -> None:
        self.do, self.advance = do, advance
        self.unit: Any = None

    @property
    def has_room(self) -> bool:
        return self.unit is None

    @property
    def is_busy(self) -> bool:
        return self.unit is not None

    def start(self, unit: Any) -> None:
        self.unit = unit

    def next_done(self) -> tuple[Any, Record]:
        """A unit that was started, and its record."""
        unit, self.unit = self.unit, None
        return unit, self.do(unit, self.advance)

    def everywhere(self, unit: Any) -> list[Record]:
        """The unit's record from every process."""
        return [self.do(unit, lambda _: None)]


class Workers:
    """Several processes do it, each with its share of this one's threads.

    Args:
        make: `make(k)`, called in worker k, gives what does the work there. To be pickled.
        count: How many workers.
        advance: Called in this process as units of work advance.
    """

    def __init__(self, make: Callable[[int], Do], count: int, advance: Advance) -> None:
        context = multiprocessing.get_context("spawn")
        self.advance = advance
        self.units: dict[Connection, Any] = {}
        self.finished: list[tuple[Connection, Record]] = []
        self.failure: Exception | None = None
        self.processes: dict[Connection, Any] = {}
        threads = max(1, torch.get_num_threads() // count)
        for index in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, partial(make, index), threads))
            with _deaf_to_interrupts():
                process.start()
            theirs.close()  # or the end of the worker would go unnoticed
            self.processes[ours] = process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        """What is under way is given up: finished units are recorded, and trainings have their checkpoints."""
        for connection, process in self.processes.items():
            process.kill()
            process.join()
            connection.close()

    @property
    def has_room(self) -> bool:
        return len(self.units) < len(self.processes) and self.failure is None

    @property
    def is_busy(self) -> bool:
        return bool(self.units)

    def start(self, unit: Any) -> None:
        free = next(connection for connection in self.processes if connection not in self.units)
        self._send(free, unit)

    def next_done(self) -> tuple[Any, Record]:
        """A unit that was started, and its record. What others have finished comes before what went wrong in one.

        Raises:
            ValueError: What a user can mend went wrong in a worker.
            RuntimeError: Something else did, or the worker ended.
        """
        while not self.finished:
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            for connection in wait(list(self.units)):
                assert isinstance(connection, Connection)
                try:
                    said, content = self._receive(connection)
                except RuntimeError as error:
                    self.failure = self.failure or error
                    continue
                if said == "advance":
                    self.advance(content)
                elif said == "done":
                    self.finished.append((connection, content))
                else:
                    error = ValueError(content) if said == "mistake" else RuntimeError(content)
                    self.failure = self.failure or error
        connection, record = self.finished.pop(0)
        return self.units.pop(connection), record

    def everywhere(self, unit: Any) -> list[Record]:
        """The unit's record from every process; all of them do it at the same time."""
        records = []
        for each in (None, unit):  # None: none begins before all are ready
            for connection in self.processes:
                self._send(connection, each)
            records = [self.next_done()[1] for _ in self.processes]
        return records

    def _send(self, connection: Connection, unit: Any) -> None:
        try:
            connection.send(unit)
        except BrokenPipeError as error:
            raise self._lost(connection) from error
        self.units[connection] = unit

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        try:
            return connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._lost(connection) from error

    def _lost(self, connection: Connection) -> RuntimeError:
        process = self.processes[connection]
        process.join()
        return RuntimeError(
            f"Workers: a worker must live as long as the run, got exit status {process.exitcode} in the middle of it. "
            "Was it killed for its memory? Everything finished is kept; fewer `processes` take less."
        )


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Ctrl-C reaches the whole group, and the parent decides: what is begun in here ignores it from its first line.

    Where the system hands signals' handlers on, and in the main thread, which alone may set them.
    """
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work(connection: Connection, make: Callable[[], Do], threads: int) -> None:
    """What a worker does: one unit after another, until it is ended. A unit None only makes it ready."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tell_warnings()
    do: Do | None = None
    while True:
        unit = connection.recv()
        try:
            do = do or make()
            record = {} if unit is None else do(unit, lambda share: connection.send(("advance", share)))
        except Exception as error:
            told = f"Workers: a unit of work raised.\n{traceback.format_exc()}"
            sentence = mistake_of(error)
            connection.send(("error", told) if sentence is None else ("mistake", sentence))
        else:
            connection.send(("done", record))


def _end_with_parent() -> None:
    """An orphan would go on writing its checkpoint while the resumed run writes the same one."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
