"""Table, sentences and figure of `reproduce.metainit_cifar10`, from its records alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from reproduce.figures import log_scale, save_png
from reproduce.statistics import compare, conclude, mean_and_deviation, percent

Records = Sequence[dict[str, Any]]

RESCUES = (
    ("Kaiming × ¼ + MetaInit", "Kaiming × ¼"),
    ("Kaiming + MetaInit", "Kaiming"),
    ("Kaiming × ¼ + MetaInit", "Kaiming"),
)
"""The comparisons that carry the claim: (arm, what it is compared with), over shared seeds."""


# ---------------------------------------------------------------------------------------------- numbers
def summarise(records: Records, arms: Sequence[str]) -> dict[str, Any]:
    """For each network and arm at its best learning rate: every seed's numbers; and the paired comparisons."""
    networks = list(dict.fromkeys(record["network"] for record in records))
    summary: dict[str, Any] = {"networks": {}}
    for network in networks:
        rows = {arm: _row([r for r in records if r["network"] == network and r["arm"] == arm]) for arm in arms}
        comparisons = [compare(arm, other, _by_seed(rows[arm]), _by_seed(rows[other])) for arm, other in RESCUES]
        summary["networks"][network] = {"arms": rows, "comparisons": comparisons}
    return summary


def _by_seed(row: dict[str, Any]) -> dict[int, float]:
    """Final test accuracy."""
    return dict(zip(row["seeds"], row["test_accuracy"], strict=True))


def best_learning_rate(trained: Records) -> float:
    """The one that did best on held-out training images at the end; one that diverged only if all did."""
    return max(trained, key=lambda r: (not r["diverged"], r["history"][-1]["validation_accuracy"]))["learning_rate"]


def _row(records: Records) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    trainings = [record for record in records if record["kind"] == "training"]
    first = min((record["seed"] for record in trainings), default=None)
    grid = [record for record in trainings if record["seed"] == first]
    # none was trained where MetaInit met numbers that are not finite
    best = best_learning_rate(grid) if grid else None
    kept = sorted((r for r in trainings if r["learning_rate"] == best), key=lambda record: record["seed"])
    return {
        "failed": [record["failed"] for record in starts if "failed" in record],
        "learning_rate": best,
        "seeds": [record["seed"] for record in kept],
        "gradient_quotient_before": [record["gradient_quotient_before"] for record in starts],
        "gradient_quotient_after": [r["gradient_quotient_after"] for r in starts if "gradient_quotient_after" in r],
        "first_epoch_accuracy": [record["history"][0]["test_accuracy"] for record in kept],
        "test_accuracy": [record["history"][-1]["test_accuracy"] for record in kept],
        "initialisation_seconds": mean_and_deviation([record["seconds"] for record in starts])[0],
        "training_seconds": mean_and_deviation([record["seconds"] for record in kept])[0] if kept else None,
        "diverged": sum(record["diverged"] for record in trainings),
        "trainings": len(trainings),
    }


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """One table a network, narrow enough for 80 columns, and what may be concluded from it."""
    for network, result in summary["networks"].items():
        title = f"\n{network}, no skip connections"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("start", no_wrap=True)
        for heading in ("GQ", "lr", "epoch 1 %", "final %", "init", "train"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm, row in result["arms"].items():
            before, after = (_mean(row[f"gradient_quotient_{when}"]) for when in ("before", "after"))
            if row["learning_rate"] is None:
                table.add_row(arm, before, "", "", "failed", f"{row['initialisation_seconds']:.1f}")
                continue
            table.add_row(
                arm,
                f"{before} → {after}" if after else before,
                f"{row['learning_rate']:g}",
                percent(row["first_epoch_accuracy"]),
                percent(row["test_accuracy"]),
                f"{row['initialisation_seconds']:.1f}",
                f"{row['training_seconds']:.1f}",
            )
        console.print(table)
        console.print()
        for comparison in result["comparisons"]:
            console.print(conclude(comparison), highlight=False)
        for arm, row in result["arms"].items():
            for message in dict.fromkeys(row["failed"]):
                console.print(f"{arm} failed. {message}", highlight=False, markup=False)
        lost = {arm: row["diverged"] for arm, row in result["arms"].items() if row["diverged"]}
        if lost:
            console.print("Diverged: " + ", ".join(f"{count} of {arm}" for arm, count in lost.items()) + ".")
        repeated = max(len(row["seeds"]) for row in result["arms"].values())
        spread = f"; ± is the standard deviation over {repeated} seeds, no ± a single seed" if repeated > 1 else ""
        console.print(
            f"\nTest accuracy{spread}. "
            "lr: best of the grid on held-out training images, first seed. "
            "GQ: gradient quotient before → after MetaInit, median of five noise batches. "
            "init, train: seconds on this machine.",
            style="dim",
        )


def _mean(values: Sequence[float]) -> str:
    """Two digits, without an exponent where that is short."""
    finite = [value for value in values if value is not None]
    if not finite:
        return ""
    mean, _ = mean_and_deviation(finite)
    return f"{mean:.0f}" if 10 <= mean < 100_000 else f"{mean:.2g}"


# ---------------------------------------------------------------------------------------------- figure
COLOURS = {
    "Kaiming × ¼": "#d62728",
    "Kaiming": "#1f77b4",
    "N(0, 0.1²)": "#9467bd",
    "one layer × 10": "#8c564b",
    "orthogonal": "#17becf",
    "delta-orthogonal": "#2ca02c",
    "LSUV": "#bcbd22",
    "Kaiming + BatchNorm": "#7f7f7f",
    "Kaiming + warm-up": "#e377c2",
}


def _style(arm: str) -> dict[str, Any]:
    """One colour a start; solid after MetaInit, dashed before or without."""
    after = arm.endswith(" + MetaInit")
    base = arm.removesuffix(" + MetaInit")
    return {
        "color": COLOURS.get(base, "black"),
        "linestyle": "-" if after else "--",
        "linewidth": 2.0 if after else 1.4,
    }


def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Three panels a network: GQ against step; norms per layer before, after, and Kaiming's; training curves."""
    networks = list(summary["networks"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 4.9 * len(networks)), layout="constrained")
        axes = figure.subplots(len(networks), 3, squeeze=False)
        for row, network in zip(axes, networks, strict=True):
            own = [record for record in records if record["network"] == network]
            _draw_quotients(row[0], own, network)
            _draw_norms(row[1], own)
            _draw_training(row[2], own, summary["networks"][network]["arms"])
        figure.suptitle(f"MetaInit. {summary['data']}\n{summary['device']}", fontsize=9)
        save_png(figure, path, dpi=140)


def _draw_quotients(axes: Axes, records: Records, network: str) -> None:
    for record in records:
        if "history" in record and record["kind"] == "initialisation":
            history = record["history"]
            label = record["arm"].removesuffix(" + MetaInit") if record["seed"] == 0 else None
            axes.plot(
                [entry["step"] for entry in history],
                [entry["gradient_quotient"] for entry in history],
                color=_style(record["arm"])["color"],
                linewidth=1.2 if record["seed"] == 0 else 0.6,
                alpha=1.0 if record["seed"] == 0 else 0.5,
                label=label,
            )
    axes.set(xlabel="MetaInit step", ylabel="gradient quotient (its noise batch)")
    log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{network}: gradient quotient, by start", loc="left")
    axes.legend(frameon=False, title="start (thin: other seeds)")


def _draw_norms(axes: Axes, records: Records) -> None:
    starts = {r["arm"]: r for r in records if r["kind"] == "initialisation" and r["seed"] == 0}
    for base in ("Kaiming × ¼", "Kaiming"):
        tuned = starts[f"{base} + MetaInit"]
        before, after = starts[base]["norms_before"], tuned.get("norms_after")
        marker = "o" if len(before) <= 40 else None
        for arm, norms in ((base, before), (f"{base} + MetaInit", after)):
            if norms is not None:
                x, y = range(1, len(norms) + 1), list(norms.values())
                axes.plot(x, y, label=arm, marker=marker, markersize=3, **_style(arm))
    axes.set(xlabel="weight tensor, from input to output", ylabel="Frobenius norm")
    log_scale(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Norms per layer (first seed)", loc="left")
    axes.legend(frameon=False)


def _draw_training(axes: Axes, records: Records, rows: dict[str, Any]) -> None:
    for arm, row in rows.items():
        if row["learning_rate"] is None:
            continue
        curves = [
            [entry["test_accuracy"] for entry in record["history"]]
            for record in records
            if record["kind"] == "training" and record["arm"] == arm and record["learning_rate"] == row["learning_rate"]
        ]
        longest = max(map(len, curves))
        whole = [
            curve + [curve[-1]] * (longest - len(curve)) for curve in curves
        ]  # a diverged run stays where it ended
        means = [100 * mean_and_deviation(values)[0] for values in zip(*whole, strict=True)]
        marker = "o" if longest == 1 else None
        axes.plot(
            range(1, longest + 1), means, label=f"{arm} (lr {row['learning_rate']:g})", marker=marker, **_style(arm)
        )
    axes.set(xlabel="epoch", ylabel="test accuracy, % (mean over seeds)", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Training, each arm at its best learning rate", loc="left")
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
