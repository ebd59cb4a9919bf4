"""How the benchmarks measure: two variants turn by turn, peak memory in fresh processes, results as JSON and tables."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from common.record import device_name, write_text

RESULTS = Path(__file__).parent / "results"


def seconds(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(
    variant: Callable[[], object], reference: Callable[[], object], rounds: int, device: torch.device
) -> dict[str, Any]:
    """Turn by turn, each going first as often; median and range of the rounds' ratios."""
    for step in (variant, reference):
        step()  # warm: kernels chosen, memory taken
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds):
        order = (0, 1) if turn % 2 else (1, 0)
        for which in order:
            times[which].append(seconds((variant, reference)[which], device))
    return summarise(*times)


def summarise(own: list[float], reference: list[float]) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "seconds": statistics.median(own),
        "reference_seconds": statistics.median(reference),
        "rounds": len(ratios),
    }


def compare_memory(module: str, variant: str, reference: str, device: torch.device, rounds: int = 3) -> dict[str, Any]:
    """Peaks of `python -m module --child …` for two variants, each in fresh processes, turn by turn."""
    peaks: dict[str, list[int]] = {variant: [], reference: []}
    for _ in range(rounds):
        for name, values in peaks.items():
            command = [sys.executable, "-m", module, "--child", name, "--device", device.type]
            # on Linux: what is freed goes back to the system, so that the peak is that of what is held at once
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            values.append(int(done.stdout))
    ratios = [a / b for a, b in zip(peaks[variant], peaks[reference], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "megabytes": statistics.median(peaks[variant]) / 1e6,
        "reference_megabytes": statistics.median(peaks[reference]) / 1e6,
        "rounds": rounds,
    }


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """Bytes above what was held before the step; in a fresh process, its libraries already loaded."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text("utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"_resident: /proc/self/status must have the line {field}, got none.")


def run_sections(
    sections: dict[str, Callable[[], dict[str, Any]]], name: str, device: torch.device, *, save: bool, **options: Any
) -> None:
    """Measure, show and record each section; rows that were not measured this time stay in the file.

    Each row says where, when and with which `options` it was measured; the section says so of those measured last.
    """
    console = Console(width=110)
    path = RESULTS / f"{name}-{device.type}.json"
    results: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for section, measure in sections.items():
        measured = measure()
        about = (getattr(measure, "func", measure).__doc__ or "").strip()
        old = results.get(section, {})
        then = {key: value for key, value in old.items() if key not in ("about", "results")}
        now = {"machine": device_name(device), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), **options}
        kept = {label: then | row for label, row in old.get("results", {}).items()}
        rows = kept | {label: row | now for label, row in measured.items()}
        results[section] = {"about": about, **now, "results": rows}
        if save:
            write_text(path, json.dumps(results, indent=2) + "\n")
        show(console, f"{section}: {about}", measured)  # last: a closed pipe ends the process


def measured_alike(section: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a section of the results file that may be compared: of its last machine, torch and options."""
    setting = {key: value for key, value in section.items() if key not in ("about", "results", "date")}
    return {
        label: row
        for label, row in section["results"].items()
        if all(row.get(key, value) == value for key, value in setting.items())
    }


def show(console: Console, title: str, results: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left")
    for heading in ("case", "ratio", "range", "ours", "reference"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for label, row in results.items():
        quantity, unit = ("megabytes", "MB") if "megabytes" in row else ("seconds", "s")
        low, high = row["range"]
        amounts = (f"{row[key]:.3g} {unit}" for key in (quantity, f"reference_{quantity}"))
        table.add_row(label, f"{row['ratio']:.2f}", f"{low:.2f} to {high:.2f}", *amounts)
    console.print(table)
