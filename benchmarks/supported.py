"""Which layers and models are differentiated right: measured, and written to docs/supported.md.

    python -m benchmarks.supported [--only ROW ...]    # measures, and writes the table
    python -m benchmarks.supported --check             # measures, and fails where the table says something else

Every row of `benchmarks.zoo` is examined by `common.guard.check_derivatives`, in evaluation mode and in training mode
(batch statistics, dropout with a fixed seed). The tests examine the same rows and hold the table to be current.
"""

import re
import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
import tyro
from rich.progress import track

from benchmarks.zoo import ZOO, build
from common.guard import QUANTITIES, Check, check_derivatives
from common.types import DerivativeError

TABLE = Path(__file__).parents[1] / "docs" / "supported.md"
MODES = {"eval": {"batch_norm": "running"}, "train": {"batch_norm": "batch", "seed": 3}}
HEADINGS = {
    "gradient": "gradient",
    "Hessian-vector product": "H v",
    "Hessian-vector product, forward": "H v, forward",
    "third order": "third order",
    "per-example gradients": "per-example",
    "through per-example gradients": "through per-example",
}

MARK = "<!-- The rest is written by python -m benchmarks.supported. -->"  # what stands above it is not


@dataclass(frozen=True)
class Row:
    """One line of the table: a cell a quantity, and what there is to say."""

    cells: dict[str, str]
    notes: tuple[str, ...]

    def line(self, name: str) -> str:
        return f"| {name} | {' | '.join(self.cells.values())} | {' '.join(self.notes)} |"


def verdict(check: Check) -> str:
    if check.refused:
        return "✗"
    if not check.agrees:
        return "WRONG"
    instead = re.match(r"a (loop) instead|(reverse) instead", check.note)
    return f"✓ {instead[1] or instead[2]}" if instead else "✓"


def measure(name: str) -> Row:
    """Examine one row of the zoo in both modes."""
    case = ZOO[name]
    # Differences of a deep network of kinks have five digits at best; a wrong derivative is off by percents.
    tolerance = 1e-4 if case.size == "large" else 1e-5
    verdicts: dict[str, dict[str, str]] = {}
    notes: dict[str, list[str]] = {}
    for mode, options in MODES.items():
        model, batch = build(name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of prototypes and slow paths, which a user sees from torch itself
                checks = check_derivatives(model, case.loss_fn, batch, tolerance=tolerance, **options).checks
        except (DerivativeError, ValueError) as error:  # refused before anything is computed
            checks = dict.fromkeys(QUANTITIES, Check(float("nan"), tolerance, str(error).split(": ", 1)[1]))
        verdicts[mode] = {quantity: verdict(check) for quantity, check in checks.items()}
        for check in checks.values():
            if check.note and mode not in notes.setdefault(in_words(check.note), []):
                notes[in_words(check.note)].append(mode)
    cells = {
        quantity: verdicts["eval"][quantity]
        if verdicts["eval"][quantity] == verdicts["train"][quantity]
        else f"eval {verdicts['eval'][quantity]}, train {verdicts['train'][quantity]}"
        for quantity in QUANTITIES
    }
    said = (note if len(modes) == 2 else f"{modes[0]}: {note}" for note, modes in notes.items())
    return Row(cells, tuple(said))


def in_words(note: str) -> str:
    """A note of the guard without the zoo's own names, as a sentence."""
    note = re.sub(r"^(a loop|reverse) instead: ", "", note)
    note = re.sub(r"(Layer '[^']*'|The model itself) \((\w+)\)", r"\2", note)
    note = re.sub(r"got \S+ and \S+: ", "got two values: ", note)
    note = note.replace("; no layer by itself, so the loss function or the code between layers", "")
    return note.rstrip(".").replace("|", "/") + "."


def documented() -> dict[str, str]:
    """The lines of the table by the names of their rows."""
    found = {}
    for line in TABLE.read_text("utf-8").splitlines():
        name, *cells = line.removeprefix("| ").split(" | ")
        if name in ZOO and len(cells) > len(QUANTITIES):
            found[name] = line
    return found


def documented_version() -> str:
    """The version of torch that the table was measured with."""
    found = re.search(r"torch (\d+\.\d+)", TABLE.read_text("utf-8"))
    return found[1] if found else ""


def render(lines: dict[str, str]) -> str:
    prose = TABLE.read_text("utf-8").split(MARK)[0]
    text = [prose + MARK, f"\nMeasured with torch {torch_version()}."]
    for group, names in groupby(ZOO, key=lambda name: ZOO[name].group):
        text += [f"\n## {group}\n", f"| | {' | '.join(HEADINGS.values())} | |", "|---" * (len(QUANTITIES) + 2) + "|"]
        text += [lines[name] for name in names if name in lines]
    return "\n".join(text) + "\n"


def torch_version() -> str:
    return ".".join(torch.__version__.split(".")[:2])


def main(*, only: tuple[str, ...] = (), check: bool = False) -> None:
    """Measure the derivatives of every row of the zoo.

    Args:
        only: Rows to measure, by their names; all by default. The others stay as they are in the table.
        check: Write nothing; fail where the table says something else.
    """
    unknown = [name for name in only if name not in ZOO]
    if unknown:
        sys.exit(f"supported: rows must be those of benchmarks/zoo.py, got {unknown[0]!r}.")
    names: Iterable[str] = only or ZOO
    measured = {name: measure(name).line(name) for name in track(list(names), "Rows")}
    before = documented()
    if check:
        differing = [name for name, line in measured.items() if before.get(name) != line]
        for name in differing:
            print(f"documented: {before.get(name)}\nmeasured:   {measured[name]}\n")
        sys.exit(f"{len(differing)} rows of {TABLE.name} are not current." if differing else 0)
    TABLE.write_text(render(before | measured), "utf-8")
    wrong = [name for name, line in measured.items() if "WRONG" in line]
    print(f"{len(measured)} rows written to {TABLE}; wrong: {', '.join(wrong) or 'none'}.")


if __name__ == "__main__":
    tyro.cli(main)
