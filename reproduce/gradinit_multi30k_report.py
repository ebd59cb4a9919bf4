"""Table, sentences and figure of `reproduce.gradinit_multi30k`, from its records alone."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

from reproduce.gradinit_report import draw_search, draw_variance
from reproduce.statistics import compare, mean_and_deviation

Records = Sequence[dict[str, Any]]

COLOURS = {
    "Post-LN": "#1f77b4",
    "Post-LN + GradInit": "#d62728",
    "T-Fixup": "#2ca02c",
    "Post-LN, warm-up": "#e377c2",
    "Pre-LN, warm-up": "#7f7f7f",
}
PARTS = {
    "norm": ("#d62728", "^"),
    "q_proj": ("#9467bd", "<"),
    "k_proj": ("#8c564b", ">"),
    "v_proj": ("#1f77b4", "o"),
    "out_proj": ("#17becf", "s"),
    "fc1": ("#2ca02c", "D"),
    "fc2": ("#bcbd22", "d"),
    "embedding": ("black", "*"),
    "bias": ("0.6", "x"),
}
"""What a tensor of the Transformer is, by a part of its name."""


def part_of(name: str) -> str:
    """Of a tensor's name: a bias first, then the parts above."""
    path = name.split(".")
    if path[-1] == "bias":
        return "bias"
    return next((part for part in PARTS if any(part in own for own in path)), "norm")


# ---------------------------------------------------------------------------------------------- numbers
def best_learning_rate(trained: Records) -> float:
    """The one with the lowest validation loss at the end; one that failed only where all did."""

    def badness(record: dict[str, Any]) -> tuple[bool, float]:
        loss = record["history"][-1]["validation_loss"]
        return record["failed_run"], loss if _is_number(loss) else math.inf

    return min(trained, key=badness)["learning_rate"]


def summarise(records: Records, arms: Sequence[str], optimizers: Sequence[str]) -> dict[str, Any]:
    """For each optimiser and arm: the grid, every seed at the best rate; and GradInit against the default, paired."""
    summary: dict[str, Any] = {"optimizers": {}}
    for optimizer in optimizers:
        own = [record for record in records if record["optimizer"] == optimizer]
        rows = {arm: _row([r for r in own if r["arm"] == arm]) for arm in arms}
        first, second = rows["Post-LN + GradInit"], rows["Post-LN"]
        comparison = compare("Post-LN + GradInit", "Post-LN", _losses(first), _losses(second))
        summary["optimizers"][optimizer] = {"arms": rows, "comparison": comparison}
    return summary


def _losses(row: dict[str, Any]) -> dict[int, float]:
    return {s: loss for s, loss in zip(row["seeds"], row["validation_loss"], strict=True) if _is_number(loss)}


def _row(records: Records) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    trainings = [record for record in records if record["kind"] == "training"]
    first = min((record["seed"] for record in trainings), default=None)
    grid = sorted((r for r in trainings if r["seed"] == first), key=lambda record: record["learning_rate"])
    best = best_learning_rate(grid) if grid else None
    kept = sorted((r for r in trainings if r["learning_rate"] == best), key=lambda record: record["seed"])
    return {
        "failed": [record["failed"] for record in starts if "failed" in record],
        "grid": [(r["learning_rate"], r["history"][-1]["validation_loss"], r["failed_run"]) for r in grid],
        "learning_rate": best,
        "seeds": [record["seed"] for record in kept],
        "validation_loss": [record["history"][-1]["validation_loss"] for record in kept],
        "bleu": [record["bleu"] for record in kept],
        # of the grid alone: arms that are repeated at their best rate are to be compared with those that are not
        "failed_runs": sum(record["failed_run"] for record in grid),
        "diverged": sum(record["diverged"] for record in grid),
        "trainings": len(grid),
        "updates_worth": [record["updates_worth"] for record in starts if "updates_worth" in record],
        "initialisation_seconds": mean_and_deviation([r["seconds"] for r in starts])[0] if starts else None,
        "training_seconds": mean_and_deviation([r["seconds"] for r in trainings])[0] if trainings else None,
    }


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """One table an optimiser, narrow enough for 80 columns, and what may be concluded from it."""
    for optimizer, result in summary["optimizers"].items():
        table = Table(title=f"\n{optimizer}, {summary['model']}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("start", no_wrap=True)
        for heading in ("failed", "best lr", "valid. loss", "BLEU", "init s", "train s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm, row in result["arms"].items():
            if row["learning_rate"] is None:
                table.add_row(arm, "", "", "failed" if row["failed"] else "not run")
                continue
            table.add_row(
                arm,
                f"{row['failed_runs']}/{row['trainings']}",
                f"{row['learning_rate']:g}",
                _spread(row["validation_loss"], 2),
                _spread(row["bleu"], 1),
                f"{row['initialisation_seconds']:.1f}",
                f"{row['training_seconds']:.1f}",
            )
        console.print(table)
        console.print()
        console.print(conclude(result["comparison"]), highlight=False)
        if worth := result["arms"]["Post-LN + GradInit"]["updates_worth"]:
            cost = mean_and_deviation(worth)[0]
            what = f"GradInit's arithmetic is that of {cost:.0f} more updates, which no other arm is given."
            console.print(what, highlight=False)
        edge = [
            arm for arm, row in result["arms"].items()
            if len(row["grid"]) > 1 and row["learning_rate"] in (row["grid"][0][0], row["grid"][-1][0])
        ]  # fmt: skip
        if edge:
            console.print(f"Best at an edge of the grid, and maybe beyond it: {'; '.join(edge)}.", highlight=False)
        for arm, row in result["arms"].items():
            grid = ", ".join(
                f"{rate:g}: {loss:.2f}{' (failed)' if failed else ''}" if _is_number(loss) else f"{rate:g}: diverged"
                for rate, loss, failed in row["grid"]
            )
            console.print(f"{arm}: {grid}" if grid else f"{arm}: nothing trained", highlight=False, style="dim")
            if row["grid"] and all(failed for *_, failed in row["grid"]):
                console.print(f"{arm} failed at every learning rate of the grid.", highlight=False)
            for message in dict.fromkeys(row["failed"]):
                console.print(f"{arm}: GradInit failed. {message}", highlight=False, markup=False)
    console.print(
        "\nValidation loss: nats a sub-word, without smoothing; the lines give it for each learning rate. failed: runs "
        f"of the grid that ended not finite, or above {summary['unigram_loss']:.2f}, the loss of a model that knows "
        "word frequencies alone. best lr: lowest validation loss, first seed. ± is the standard deviation over seeds, "
        "no ± a single seed. BLEU: sacreBLEU on the test sentences, 0 where the run failed. init, train: seconds on "
        "this machine.",
        style="dim",
    )


def conclude(comparison: dict[str, Any]) -> str:
    """No claim without an interval that carries it."""
    what = f"{comparison['arm']} against {comparison['against']}, each at its best learning rate"
    if comparison["pairs"] == 0:
        return f"{what}: nothing to compare."
    difference, low, high = (comparison[key] for key in ("difference", "low", "high"))
    if not math.isfinite(low):
        return f"{what}: {difference:+.2f} nats (one seed: no interval, no conclusion)."
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
    return (
        f"{what}: {difference:+.2f} nats, {verdict} (95 % t-interval {low:+.2f} to {high:+.2f}, {comparison['pairs']} "
        "paired seeds)."
    )


def _spread(values: Sequence[float | None], digits: int) -> str:
    finite = [value for value in values if _is_number(value)]
    if not finite:
        return "–"
    mean, deviation = mean_and_deviation(finite)  # pyright: ignore[reportArgumentType]
    lost = f" ({len(values) - len(finite)} lost)" if len(finite) < len(values) else ""
    return (f"{mean:.{digits}f}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}") + lost


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Four panels an optimiser: learning-rate map, the search, the scales, the gradient's variance."""
    optimizers = list(summary["optimizers"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(21, 4.4 * len(optimizers)), layout="constrained")
        axes = figure.subplots(len(optimizers), 4, squeeze=False)
        for row, optimizer in zip(axes, optimizers, strict=True):
            own = [record for record in records if record["optimizer"] == optimizer]
            _draw_map(row[0], summary["optimizers"][optimizer]["arms"], summary["unigram_loss"], optimizer)
            first = next((r for r in own if "history" in r and "scales" in r and r["seed"] == 0), None)
            if first is not None:
                draw_search(row[1], first["history"], f"for {optimizer}")
                _draw_scales(row[2], first["scales"])
                draw_variance(
                    row[3], first | {"kinds": {name: part_of(name) for name in first["variance_before"]}}, PARTS
                )
        title = f"GradInit, {summary['model']}. {summary['data']}\n{summary['device']}"
        figure.suptitle(title, fontsize=9)
        partial = path.with_suffix(".partial")
        figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def _draw_map(axes: Axes, rows: dict[str, Any], unigram_loss: float, optimizer: str) -> None:
    """Validation loss against peak learning rate; runs that were not finite stand at the top."""
    finite = [loss for row in rows.values() for _, loss, _ in row["grid"] if _is_number(loss)]
    top = max([unigram_loss, *finite]) * 1.03
    for arm, row in rows.items():
        rates = [rate for rate, *_ in row["grid"]]
        losses = [min(loss, top) if _is_number(loss) else top for _, loss, _ in row["grid"]]
        line = "-" if "GradInit" in arm else "--"
        axes.plot(rates, losses, line, color=COLOURS[arm], label=arm, linewidth=2 if "GradInit" in arm else 1.4)
        for rate, loss, (*_, failed) in zip(rates, losses, row["grid"], strict=True):
            axes.plot(rate, loss, "x" if failed else "o", color=COLOURS[arm], markersize=6 if failed else 4)
    axes.axhline(unigram_loss, color="0.7", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(sorted({rate for row in rows.values() for rate, *_ in row["grid"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="peak learning rate", ylabel="validation loss, nats a sub-word")
    axes.set_title(f"{optimizer}: learning rates (×: failed, dotted: word frequencies)", loc="left", fontsize=8)
    axes.legend(frameon=False, fontsize=7)


def _draw_scales(axes: Axes, scales: dict[str, float]) -> None:
    """m of every tensor by part, in the order of the model."""
    for part, (colour, marker) in PARTS.items():
        points = [(i, scale) for i, (name, scale) in enumerate(scales.items(), start=1) if part_of(name) == part]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=4, linestyle="none", label=part)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    if boundary := next((i for i, name in enumerate(scales, start=1) if name.startswith("decoder")), None):
        axes.axvline(boundary - 0.5, color="0.8", linewidth=0.8)
    axes.set(xlabel="tensor: encoder, then decoder", ylabel="scale m")
    axes.set_title("Scales (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
