"""Where a published set is found: a folder, the local Hugging Face cache, the hub. Each gives files, split by split."""

import os
import queue
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
)

VARIABLE = "LEARNED_INIT_DATA"
PROBE_SECONDS = 5.0
"""How long the hub may take to answer once before it counts as out of reach; its own retries take half a minute."""


@dataclass(frozen=True, kw_only=True)
class HubSet:
    """A set on the hub, and what a whole copy of it holds.

    Attributes:
        name: What a user asks for, and the folder it lies in.
        title: What a figure calls it.
        repository: Where the hub has it.
        revision: The branch that holds the files; None is the main one.
        files: For each split, the patterns its files may go by, the customary one first.
        rows: For each split, how many examples were published.
        loader: The function that a message speaks for.
    """

    name: str
    title: str
    repository: str
    revision: str | None = None
    files: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]
    loader: str

    def layout(self) -> str:
        """The files a folder must hold, for a message."""
        *others, last = (f"{self.name}/{patterns[0]}" for patterns in self.files.values())
        return f"{', '.join(others)} and {last}"

    def count(self, rows: Mapping[str, int]) -> str:
        """How many rows there are of each split, and of how many where some are missing."""
        return " + ".join(
            f"{n:,} {split}" if n == self.rows[split] else f"{n:,} (of {self.rows[split]:,}) {split}"
            for split, n in rows.items()
        )


@dataclass(frozen=True)
class Located:
    """The files of every split, and a phrase that says where they were found."""

    files: Mapping[str, tuple[Path, ...]]
    origin: str


class SourceUnavailableError(FileNotFoundError):
    """A set is in none of the places that were tried; the message gives each place with its reason."""


def locate(wanted: HubSet, data_dir: str | os.PathLike[str] | None = None) -> Located:
    """The files of a set: from the folder the user points at, or else from the cache, or else from the hub.

    Raises:
        FileNotFoundError: If the user points at a folder that does not hold the set; nothing else is tried then.
        SourceUnavailableError: If no folder is given and neither the cache nor the hub has the set.
    """
    if data_dir is not None:
        return from_folder(wanted, Path(data_dir), "`data_dir`")
    if os.environ.get(VARIABLE):
        return from_folder(wanted, Path(os.environ[VARIABLE]), VARIABLE)
    tried = [f"folder (neither `data_dir` nor {VARIABLE} is set)"]
    for place, look in (("Hugging Face cache", from_cache), ("hub", from_hub)):
        try:
            return look(wanted)
        except SourceUnavailableError as error:
            tried.append(f"{place} ({error})")
    raise SourceUnavailableError("; ".join(tried))


def from_folder(wanted: HubSet, folder: Path, setting: str) -> Located:
    """The set in `folder/<name>`, or in `folder` itself."""
    folder = folder.expanduser()
    inner = folder / wanted.name
    for candidate in (inner, folder):
        found = _whole_splits(wanted, candidate)
        if found:
            return Located(found, origin=f"the local folder '{candidate.resolve().name}'")
    raise FileNotFoundError(
        f"{wanted.loader}: {setting} must hold {wanted.layout()}, all parts of each, "
        f"got '{folder}' with {_contents(inner if inner.is_dir() else folder)}. Point it at the folder above "
        f"{wanted.name}/, or leave it unset to use the Hugging Face cache or the hub."
    )


def from_cache(wanted: HubSet) -> Located:
    """The set among the snapshots that an earlier download left in the local cache; nothing is written."""
    repository = "datasets--" + wanted.repository.replace("/", "--")  # the cache's documented layout
    snapshots = Path(constants.HF_HUB_CACHE) / repository / "snapshots"
    try:
        # all snapshots, not only the one a branch names: `datasets` downloads by commit and names no branch
        for snapshot in sorted(snapshots.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True):
            found = _whole_splits(wanted, snapshot)
            if found:
                return Located(found, origin=f"the local cache of the hub's {wanted.repository}")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise SourceUnavailableError(f"unreadable: {type(error).__name__}") from error
    raise SourceUnavailableError(f"holds no whole copy of {wanted.repository}")


def from_hub(wanted: HubSet) -> Located:
    """The set downloaded into the local cache, after one quick question whether the hub is there at all."""
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in constants.ENV_VARS_TRUE_VALUES:
        raise SourceUnavailableError("HF_HUB_OFFLINE is set")
    # read now as well as at the import of huggingface_hub, so that a mirror set by a notebook is used
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    obstacle = probe(f"{endpoint}/api/datasets/{wanted.repository}")
    if obstacle:
        raise SourceUnavailableError(f"{endpoint} {obstacle}")
    try:
        with _no_progress_bars():
            snapshot = huggingface_hub.snapshot_download(
                wanted.repository,
                repo_type="dataset",
                revision=wanted.revision,
                allow_patterns=[f"*{pattern}" for patterns in wanted.files.values() for pattern in patterns],
                endpoint=endpoint,
            )
    except Exception as error:  # whichever HTTP library the hub's client uses raises its own
        raise SourceUnavailableError(f"download failed: {type(error).__name__}") from error
    found = _whole_splits(wanted, Path(snapshot))
    if not found:
        raise SourceUnavailableError(f"{wanted.repository} lacks whole files of {', '.join(wanted.files)}")
    return Located(found, origin=f"the hub's {wanted.repository}")


def _whole_splits(wanted: HubSet, folder: Path) -> dict[str, tuple[Path, ...]] | None:
    """The parts of every split, side by side in `folder` or one level below (a configuration's folder)."""
    if not folder.is_dir():
        return None
    for parent in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        found = {split: _parts(parent, patterns) for split, patterns in wanted.files.items()}
        if all(found.values()):
            return found
    return None


def _parts(parent: Path, patterns: tuple[str, ...]) -> tuple[Path, ...]:
    for pattern in patterns:
        parts = tuple(sorted(path for path in parent.glob(pattern) if path.is_file()))
        if is_whole(parts):
            return parts
    return ()


def is_whole(parts: tuple[Path, ...]) -> bool:
    # "train-00000-of-00002.parquet": a download cut off between parts must not be read as the set
    totals = {int(total) for path in parts for total in re.findall(r"-of-(\d+)", path.name)}
    return bool(parts) and totals <= {len(parts)}


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:8]) + (", …" if len(names) > 8 else "")) or "nothing in it"


def probe(url: str) -> str | None:
    """Ask once, through the hub client's own proxies and certificates. Returns what is in the way, or None."""
    answers: queue.Queue[str | None] = queue.Queue()

    def ask() -> None:
        try:
            status = get_session().get(url, headers=build_hf_headers(), timeout=PROBE_SECONDS).status_code
            answers.put(None if status == 200 else f"answered with status {status}")
        except Exception as error:  # as above; and in this thread nobody else would see it
            answers.put(f"cannot be reached: {type(error).__name__}")

    # a thread, because no timeout of a request covers the name look-up and every address in turn
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        return f"did not answer within {PROBE_SECONDS:g} s"


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    # a user's HF_HUB_DISABLE_PROGRESS_BARS, either way, is left in charge
    ours = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if ours:
        disable_progress_bars()
    try:
        yield
    finally:
        if ours:
            enable_progress_bars()
