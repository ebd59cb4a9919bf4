"""Table, sentences and figure of `reproduce.gradinit_cifar10`, from its records alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from reproduce.statistics import compare, conclude, mean_and_deviation, percent

Records = Sequence[dict[str, Any]]

CLAIMS = (
    ("first_epoch_accuracy", "GradInit", "own init", "After the first epoch"),
    ("best_accuracy", "GradInit", "own init", "Best epoch"),
    ("best_accuracy", "GradInit", "own init, longer", "Best epoch"),
)
"""What is compared over shared seeds: (accuracy, arm, what it is compared with, in words)."""


# ---------------------------------------------------------------------------------------------- numbers
def summarise(records: Records, arms: Sequence[str]) -> dict[str, Any]:
    """For each network and arm every seed's numbers; and the paired comparisons."""
    networks = list(dict.fromkeys(record["network"] for record in records))
    summary: dict[str, Any] = {"networks": {}}
    for network in networks:
        rows = {arm: _row([r for r in records if r["network"] == network and r["arm"] == arm]) for arm in arms}
        comparisons = [
            compare(arm, other, _by_seed(rows[arm], key), _by_seed(rows[other], key)) | {"what": what}
            for key, arm, other, what in CLAIMS
        ]
        summary["networks"][network] = {"arms": rows, "comparisons": comparisons}
    return summary


def _by_seed(row: dict[str, Any], key: str) -> dict[int, float]:
    return dict(zip(row["seeds"], row[key], strict=True))


def _row(records: Records) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    trainings = sorted((r for r in records if r["kind"] == "training"), key=lambda record: record["seed"])
    histories = [record["history"] for record in starts if "history" in record and record["arm"] == "GradInit"]
    return {
        "failed": [record["failed"] for record in starts if "failed" in record],
        "seeds": [record["seed"] for record in trainings],
        "epochs": [len(record["history"]) for record in trainings],
        "first_epoch_accuracy": [record["history"][0]["test_accuracy"] for record in trainings],
        "best_accuracy": [max(entry["test_accuracy"] for entry in record["history"]) for record in trainings],
        "final_accuracy": [record["history"][-1]["test_accuracy"] for record in trainings],
        "diverged": sum(record["diverged"] for record in trainings),
        "initialisation_seconds": mean_and_deviation([r["seconds"] for r in starts])[0] if starts else None,
        "training_seconds": mean_and_deviation([r["seconds"] for r in trainings])[0] if trainings else None,
        "epochs_worth": [record["epochs_worth"] for record in starts if "epochs_worth" in record],
        "constraint_share": [sum(entry["constraint"] for entry in h) / len(h) for h in histories],
        "norm_before_after": [_ends(h, "gradient_norm") for h in histories],
        "loss_before_after": [_ends(h, "loss") for h in histories],
    }


def _ends(history: list[dict[str, float]], key: str) -> tuple[float, float]:
    """Mean over the first and the last tenth of the iterations: single minibatches are noisy."""
    tenth = max(1, len(history) // 10)
    return tuple(mean_and_deviation([entry[key] for entry in part])[0] for part in (history[:tenth], history[-tenth:]))  # pyright: ignore[reportReturnType]


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """One table a network, narrow enough for 80 columns, and what may be concluded from it."""
    for network, result in summary["networks"].items():
        table = Table(title=f"\n{network}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("start", no_wrap=True)
        for heading in ("epochs", "epoch 1 %", "best %", "final %", "init s", "train s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm, row in result["arms"].items():
            if not row["seeds"]:
                table.add_row(arm, "", "", "failed" if row["failed"] else "not run")
                continue
            table.add_row(
                arm,
                _range(row["epochs"]),
                percent(row["first_epoch_accuracy"]),
                percent(row["best_accuracy"]),
                percent(row["final_accuracy"]),
                f"{row['initialisation_seconds']:.1f}",
                f"{row['training_seconds']:.1f}",
            )
        console.print(table)
        console.print()
        for comparison in result["comparisons"]:
            console.print(f"{comparison['what']}: {conclude(comparison)}", highlight=False)
        row = result["arms"]["GradInit"]
        if row["constraint_share"]:
            console.print(_what_gradinit_did(row), highlight=False)
        for arm, own in result["arms"].items():
            for message in dict.fromkeys(own["failed"]):
                console.print(f"{arm} failed. {message}", highlight=False, markup=False)
        if lost := {arm: own["diverged"] for arm, own in result["arms"].items() if own["diverged"]}:
            console.print("Diverged: " + ", ".join(f"{count} of {arm}" for arm, count in lost.items()) + ".")
        repeated = max(len(own["seeds"]) for own in result["arms"].values())
        spread = f"; ± is the standard deviation over {repeated} seeds, no ± a single seed" if repeated > 1 else ""
        console.print(
            f"\nTest accuracy{spread}. best: of all epochs, chosen on the test set, as the paper reports it. own init, "
            "longer: with the epochs added that GradInit costs by arithmetic. init, train: seconds on this machine.",
            style="dim",
        )


def _what_gradinit_did(row: dict[str, Any]) -> str:
    def mean(values: Sequence[float]) -> float:
        return mean_and_deviation(list(values))[0]

    (n0, n1), (l0, l1) = (
        [mean(part) for part in zip(*row[key], strict=True)] for key in ("norm_before_after", "loss_before_after")
    )
    return (
        f"GradInit, mean over {len(row['constraint_share'])} seeds: gradient norm {n0:.3g} → {n1:.3g}, "
        f"loss {l0:.3g} → {l1:.3g} (first and last tenth of the iterations); "
        f"{100 * mean(row['constraint_share']):.0f} % of them on the constraint; "
        f"arithmetic of {mean(row['epochs_worth']):.1f} epochs."
    )


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


# ---------------------------------------------------------------------------------------------- figure
KINDS = {
    "conv": ("#1f77b4", "o"),
    "norm": ("#d62728", "^"),
    "linear": ("#2ca02c", "s"),
    "bias": ("#7f7f7f", "x"),
    "embedding": ("#9467bd", "D"),
    "other": ("#8c564b", "v"),
}
COLOURS = {
    "own init": "#1f77b4",
    "GradInit": "#d62728",
    "own init, longer": "#17becf",
    "own init, warm-up": "#e377c2",
    "LSUV": "#bcbd22",
    "MetaInit": "#2ca02c",
}


def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Four panels a network: the search, the scales, the gradient's variance, training."""
    networks = list(summary["networks"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(19, 4.4 * len(networks)), layout="constrained")
        axes = figure.subplots(len(networks), 4, squeeze=False)
        for row, network in zip(axes, networks, strict=True):
            own = [record for record in records if record["network"] == network]
            first = next((r for r in own if r["arm"] == "GradInit" and "history" in r and r["seed"] == 0), None)
            if first is not None:
                draw_search(row[0], first["history"], network)
                draw_scales(row[1], first["scales"], first["kinds"])
                draw_variance(row[2], first)
            _draw_training(row[3], own)
        figure.suptitle(f"GradInit. {summary['data']}\n{summary['device']}", fontsize=9)
        partial = path.with_suffix(".partial")
        figure.savefig(partial, dpi=120, format="png")
    partial.replace(path)


def draw_search(axes: Axes, history: list[dict[str, float]], title: str) -> None:
    """Gradient norm and both losses against iteration; iterations on the constraint are shaded."""
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["gradient_norm"] for entry in history], color="#d62728", linewidth=1, label="gradient norm")
    axes.plot(steps, [entry["loss"] for entry in history], color="#1f77b4", linewidth=1, label="loss on S")
    ahead = [(entry["step"], entry["look_ahead_loss"]) for entry in history if _is_number(entry["look_ahead_loss"])]
    if ahead:
        axes.plot(*zip(*ahead, strict=True), ".", color="#2ca02c", markersize=3, label="loss on S̃ after a step")
    _log_scale(axes)
    on_constraint = [bool(entry["constraint"]) for entry in history]
    # shading the full height needs the data's own limits fixed first
    bottom, top = axes.get_ylim()
    axes.fill_between(
        steps, bottom, top, where=on_constraint, step="mid", color="0.88", linewidth=0, label="on the constraint"
    )
    axes.set(xlabel="GradInit iteration", xlim=(1, max(2, len(steps))), ylim=(bottom, top))
    axes.set_title(f"{title}: the search (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def draw_scales(axes: Axes, scales: dict[str, float], kinds: dict[str, str]) -> None:
    """m of every tensor, in the order of the model, by kind."""
    for kind, (colour, marker) in KINDS.items():
        points = [(i, scales[name]) for i, name in enumerate(scales, start=1) if kinds[name] == kind]
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, linestyle="none", label=kind)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    axes.set(xlabel="tensor, from input to output", ylabel="scale m")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Scales (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def draw_variance(axes: Axes, record: dict[str, Any], styles: Mapping[str, tuple[str, str]] = KINDS) -> None:
    """Relative gradient variance per tensor, before (open) and after (filled), biases left out; by kind in `styles`."""
    kinds = record["kinds"]
    names = [name for name in record["variance_before"] if kinds[name] != "bias"]
    for kind, (colour, marker) in styles.items():
        for when, filled in (("before", "none"), ("after", colour)):
            values = record[f"variance_{when}"]
            points = [(i, values[name]) for i, name in enumerate(names, start=1) if kinds[name] == kind]
            points = [point for point in points if _is_number(point[1]) and point[1] > 0]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    marker,
                    color=colour,
                    markerfacecolor=filled,
                    markersize=4,
                    linestyle="none",
                    label=kind if filled != "none" else None,
                )
    _log_scale(axes)
    axes.set(xlabel="tensor, from input to output", ylabel="mean ‖g − ḡ‖² / ‖ḡ‖² over minibatches")
    axes.set_title("Gradient variance before (open) and after (filled)", loc="left")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_training(axes: Axes, records: Records) -> None:
    for arm, colour in COLOURS.items():
        curves = [r["history"] for r in records if r["kind"] == "training" and r["arm"] == arm]
        if not curves:
            continue
        longest = max(map(len, curves))
        means = [
            100 * mean_and_deviation([h[min(k, len(h) - 1)]["test_accuracy"] for h in curves])[0]
            for k in range(longest)
        ]
        style = {"linestyle": "-" if arm == "GradInit" else "--", "linewidth": 2.0 if arm == "GradInit" else 1.4}
        axes.plot(
            range(1, longest + 1), means, color=colour, marker="o" if longest < 10 else None, markersize=3,
            label=f"{arm} ({len(curves)})", **style,
        )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="test accuracy, % (mean over seeds)", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Training (seeds)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
