"""Table, sentences and figure of `reproduce.gradinit_multi30k`, from its records alone."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.table import Table

from reproduce.figures import is_number, save_png
from reproduce.gradinit_report import draw_search, draw_variance
from reproduce.statistics import compare, mean_and_deviation, no_interval

Records = Sequence[dict[str, Any]]

WITH_GRADINIT, WITH_WARMUP = "Post-LN + GradInit", "Post-LN, warm-up"
CLAIMS = ((WITH_GRADINIT, "Post-LN"), (WITH_GRADINIT, "Post-LN, longer"), (WITH_GRADINIT, WITH_WARMUP))
"""What is compared over shared seeds: an arm, and what it is compared with."""

COLOURS = {
    "Post-LN": "#1f77b4",
    WITH_GRADINIT: "#d62728",
    "Post-LN, longer": "#17becf",
    WITH_WARMUP: "#e377c2",
    "Pre-LN, warm-up": "#7f7f7f",
    "T-Fixup": "#2ca02c",
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
        return record["failed_run"], loss if is_number(loss) else math.inf

    return min(trained, key=badness)["learning_rate"]


def summarise(records: Records, arms: Sequence[str], optimizers: Sequence[str]) -> dict[str, Any]:
    """For each optimiser and arm: the grid, and every seed at the best rate and at the one that is best with warm-up.

    Both with what is claimed of GradInit, paired by seed.
    """
    summary: dict[str, Any] = {"optimizers": {}}
    for optimizer in optimizers:
        own = [record for record in records if record["optimizer"] == optimizer]
        rows = {arm: _row([r for r in own if r["arm"] == arm]) for arm in arms}
        rate = rows[WITH_WARMUP]["learning_rate"] if WITH_WARMUP in rows else None
        same = {arm: _at_rate([r for r in own if r["arm"] == arm and r["kind"] == "training"], rate) for arm in arms}
        summary["optimizers"][optimizer] = {
            "arms": rows,
            "comparisons": _comparisons(rows),
            "warm_up_rate": rate,
            "at_warm_up_rate": {"arms": same, "comparisons": _comparisons(same)},
        }
    return summary


def _comparisons(rows: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        compare(arm, other, _losses(rows[arm]), _losses(rows[other]))
        for arm, other in CLAIMS
        if arm in rows and other in rows
    ]


def _losses(row: dict[str, Any]) -> dict[int, float]:
    return {s: loss for s, loss in zip(row["seeds"], row["validation_loss"], strict=True) if is_number(loss)}


def _at_rate(trainings: Records, rate: float | None) -> dict[str, Any]:
    """Every seed that was trained at one learning rate."""
    kept = sorted((r for r in trainings if r["learning_rate"] == rate), key=lambda record: record["seed"])
    return {
        "seeds": [record["seed"] for record in kept],
        "validation_loss": [record["history"][-1]["validation_loss"] for record in kept],
        "failed_run": [record["failed_run"] for record in kept],
        "bleu": [record["bleu"] for record in kept],
    }


def _row(records: Records) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    trainings = [record for record in records if record["kind"] == "training"]
    # of the grid alone: arms that are repeated with other seeds are to be compared with those that are not
    first = min((record["seed"] for record in trainings), default=None)
    grid = sorted((r for r in trainings if r["seed"] == first), key=lambda record: record["learning_rate"])
    best = best_learning_rate(grid) if grid else None
    return _at_rate(trainings, best) | {
        "failed": [record["failed"] for record in starts if "failed" in record],
        "grid": [(r["learning_rate"], r["history"][-1]["validation_loss"], r["failed_run"]) for r in grid],
        "learning_rate": best,
        "failed_runs": sum(record["failed_run"] for record in grid),
        "diverged": sum(record["diverged"] for record in grid),
        "trainings": len(grid),
        "updates_worth": [record["updates_worth"] for record in starts if "updates_worth" in record],
        "extra_updates": max((record["extra_updates"] for record in trainings), default=0),
        "initialisation_seconds": mean_and_deviation([r["seconds"] for r in starts])[0] if starts else None,
        "training_seconds": mean_and_deviation([r["seconds"] for r in trainings])[0] if trainings else None,
    }


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """One table an optimiser, narrow enough for 80 columns, and what may be concluded from it."""
    for optimizer, result in summary["optimizers"].items():
        table = Table(title=f"\n{optimizer}, {summary['model']}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("start", no_wrap=True)
        for heading in ("failed", "diverged", "best lr", "valid. loss", "BLEU", "init s", "train s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm, row in result["arms"].items():
            if row["learning_rate"] is None:
                table.add_row(arm, "", "", "", "failed" if row["failed"] else "not run")
                continue
            table.add_row(
                arm,
                f"{row['failed_runs']}/{row['trainings']}",
                f"{row['diverged']}/{row['trainings']}",
                f"{row['learning_rate']:g}",
                _spread(row["validation_loss"], 2),
                _spread(row["bleu"], 1),
                f"{row['initialisation_seconds']:.1f}",
                f"{row['training_seconds']:.1f}",
            )
        console.print(table)
        console.print("\nEach at its own best learning rate:", highlight=False)
        for comparison in result["comparisons"]:
            console.print(f"- {conclude(comparison)}", highlight=False)
        _print_at_warm_up_rate(console, result)
        if worth := result["arms"][WITH_GRADINIT]["updates_worth"]:
            cost, extra = mean_and_deviation(worth)[0], result["arms"].get("Post-LN, longer", {}).get("extra_updates")
            given = f"; 'longer' is given {extra}, whole intervals between validations" if extra else ""
            console.print(f"GradInit's arithmetic is that of {cost:.0f} more updates{given}.", highlight=False)
        grids = {arm: row for arm, row in result["arms"].items() if len(row["grid"]) > 1 and _trained(row)}
        edge = [arm for arm, row in grids.items() if row["learning_rate"] in (row["grid"][0][0], row["grid"][-1][0])]
        if edge:
            console.print(f"Best at an edge of the grid, and maybe beyond it: {'; '.join(edge)}.", highlight=False)
        for arm, row in result["arms"].items():
            grid = ", ".join(
                f"{rate:g}: {loss:.2f}{' (failed)' if failed else ''}" if is_number(loss) else f"{rate:g}: diverged"
                for rate, loss, failed in row["grid"]
            )
            console.print(f"{arm}: {grid}" if grid else f"{arm}: nothing trained", highlight=False, style="dim")
            if row["grid"] and not _trained(row):
                console.print(f"{arm} failed at every learning rate of the grid.", highlight=False)
            for message in dict.fromkeys(row["failed"]):
                console.print(f"{arm}: GradInit failed. {message}", highlight=False, markup=False)
    console.print(
        "\nValidation loss: nats a sub-word, without smoothing; the lines give it for each learning rate. failed: runs "
        f"of the grid that ended not finite (diverged), or above {summary['unigram_loss']:.2f}, the loss of a model "
        "that knows word frequencies alone: untrained as yet. best lr: lowest validation loss, first seed. ± is the "
        "standard deviation over seeds, no ± a single seed. BLEU: sacreBLEU on the test sentences, 0 where the run "
        "failed. init, train: seconds on this machine.",
        style="dim",
    )


def _print_at_warm_up_rate(console: Console, result: dict[str, Any]) -> None:
    """The question itself: the rate that warm-up makes the most of, without warm-up, after GradInit and without it."""
    rate, same = result["warm_up_rate"], result["at_warm_up_rate"]
    if rate is None or not _trained(result["arms"][WITH_WARMUP]):
        return
    console.print(f"At {rate:g}, the best learning rate with warm-up:", highlight=False)
    for arm, row in same["arms"].items():
        if row["seeds"]:
            failed = f"{sum(row['failed_run'])} of {len(row['seeds'])} failed"
            console.print(f"- {arm}: {_spread(row['validation_loss'], 2)}, {failed}", highlight=False)
    for comparison in same["comparisons"]:
        console.print(f"- {conclude(comparison)}", highlight=False)


def _trained(row: dict[str, Any]) -> bool:
    """Whether one learning rate of the grid led anywhere."""
    return not all(failed for *_, failed in row["grid"])


def conclude(comparison: dict[str, Any]) -> str:
    """No claim without an interval that carries it."""
    what = f"{comparison['arm']} against {comparison['against']}"
    if comparison["pairs"] == 0:
        return f"{what}: nothing to compare."
    difference, low, high = (comparison[key] for key in ("difference", "low", "high"))
    if not math.isfinite(low):
        return f"{what}: {difference:+.2f} nats ({no_interval(comparison['pairs'], difference)})."
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
    return (
        f"{what}: {difference:+.2f} nats, {verdict} (95 % t-interval {low:+.2f} to {high:+.2f}, {comparison['pairs']} "
        "paired seeds)."
    )


def _spread(values: Sequence[float | None], digits: int) -> str:
    finite = [value for value in values if is_number(value)]
    if not finite:
        return "–"
    mean, deviation = mean_and_deviation(finite)  # pyright: ignore[reportArgumentType]
    lost = f" ({len(values) - len(finite)} lost)" if len(finite) < len(values) else ""
    return (f"{mean:.{digits}f}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}") + lost


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Five panels an optimiser: learning-rate map, training at one rate, search, scales, the gradient's variance."""
    optimizers = list(summary["optimizers"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 8.2 * len(optimizers)), layout="constrained")
        parts = figure.subfigures(len(optimizers), 1, squeeze=False)
        for part, optimizer in zip(parts[:, 0], optimizers, strict=True):
            own, result = [r for r in records if r["optimizer"] == optimizer], summary["optimizers"][optimizer]
            axes = part.subplot_mosaic(
                [["map"] * 2 + ["training"] * 2 + ["search"] * 2, ["scales"] * 3 + ["variance"] * 3]
            )
            _draw_map(axes["map"], own, result["arms"], summary["unigram_loss"], optimizer)
            _draw_training(axes["training"], own, result["warm_up_rate"], summary["unigram_loss"])
            first = next((r for r in own if "history" in r and "scales" in r and r["seed"] == 0), None)
            if first is not None:
                draw_search(axes["search"], first["history"], f"For {optimizer}")
                _draw_scales(axes["scales"], first["scales"])
                kinds = {name: part_of(name) for name in first["variance_before"]}
                draw_variance(axes["variance"], first | {"kinds": kinds}, PARTS)
        title = textwrap.fill(f"GradInit, {summary['model']}. {summary['data']}", 150) + f"\n{summary['device']}"
        figure.suptitle(title, fontsize=9)
        save_png(figure, path, dpi=120)


def _draw_map(axes: Axes, records: Records, rows: dict[str, Any], unigram_loss: float, optimizer: str) -> None:
    """Validation loss against peak learning rate, the first seed joined by a line, the others beside it.

    Runs that were not finite stand at the top.
    """
    trainings = [record for record in records if record["kind"] == "training"]
    losses = {id(record): record["history"][-1]["validation_loss"] for record in trainings}
    finite = [loss for loss in losses.values() if is_number(loss)]
    top = max([unigram_loss, *finite]) * 1.03
    for arm, row in rows.items():
        grid = [(rate, min(loss, top) if is_number(loss) else top) for rate, loss, _ in row["grid"]]
        line, width = ("-", 2) if arm == WITH_GRADINIT else ("--", 1.4)
        if grid:
            axes.plot(*zip(*grid, strict=True), line, color=COLOURS[arm], label=arm, linewidth=width)
        for record in trainings:
            if record["arm"] == arm:
                loss = losses[id(record)]
                axes.plot(
                    record["learning_rate"],
                    min(loss, top) if is_number(loss) else top,
                    "x" if record["failed_run"] else "o",
                    color=COLOURS[arm],
                    markersize=6 if record["failed_run"] else 4,
                    markerfacecolor=COLOURS[arm] if record["seed"] == 0 else "white",
                )
    axes.axhline(unigram_loss, color="0.7", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(sorted({rate for row in rows.values() for rate, *_ in row["grid"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="peak learning rate", ylabel="validation loss, nats a sub-word")
    axes.set_title(f"{optimizer}, at the end (×: failed; open: other seeds)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def _draw_training(axes: Axes, records: Records, rate: float | None, unigram_loss: float) -> None:
    """Validation loss against updates at one learning rate, every seed."""
    axes.axhline(unigram_loss, color="0.7", linewidth=0.8, linestyle=":")
    axes.text(0.99, unigram_loss, "word frequencies", fontsize=7, color="0.5", ha="right", va="bottom",
              transform=axes.get_yaxis_transform())  # fmt: skip
    for record in sorted(records, key=lambda record: list(COLOURS).index(record["arm"])):
        if record["kind"] == "training" and record["learning_rate"] == rate:
            curve = [(entry["updates"], entry["validation_loss"]) for entry in record["history"]]
            curve = [point for point in curve if is_number(point[1])]
            width, label = (1.8, record["arm"]) if record["seed"] == 0 else (0.8, None)
            if curve:
                axes.plot(*zip(*curve, strict=True), color=COLOURS[record["arm"]], linewidth=width, label=label)
    axes.set(xlabel="updates", ylabel="validation loss, nats a sub-word")
    if rate is not None:
        axes.set_title(f"At {rate:g}, the best rate with warm-up (thin: other seeds)", loc="left")
    if axes.get_legend_handles_labels()[0]:
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
