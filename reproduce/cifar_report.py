"""What the reports of the CIFAR experiments share: rows, comparisons, the table, and panels of the figure."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from reproduce.figures import save_png
from reproduce.statistics import compare, conclude, mean_and_deviation, percent

Records = Sequence[dict[str, Any]]
Claim = tuple[str, str, str, str]
"""What is compared over shared seeds: (accuracy, arm, what it is compared with, in words)."""


# ---------------------------------------------------------------------------------------------- numbers
def summarise(
    records: Records,
    arms: Sequence[str],
    claims: Sequence[Claim],
    of_histories: Callable[[Sequence[list[dict[str, float]]]], dict[str, Any]],
) -> dict[str, Any]:
    """For each network and arm every seed's numbers; and the paired comparisons of arms that were run.

    Args:
        records: Of a run folder.
        arms: Their names, in the order of the table.
        claims: What is compared.
        of_histories: What the row of an arm says of its initialiser's histories, if it has any.
    """
    summary: dict[str, Any] = {"networks": {}}
    for network in dict.fromkeys(record["network"] for record in records):
        own = [record for record in records if record["network"] == network]
        rows = {arm: _row([r for r in own if r["arm"] == arm], of_histories) for arm in arms}
        begun = {record["arm"] for record in own}
        comparisons = [
            compare(arm, other, _by_seed(rows[arm], key), _by_seed(rows[other], key)) | {"what": what}
            for key, arm, other, what in claims
            if arm in begun
        ]
        summary["networks"][network] = {"arms": rows, "comparisons": comparisons, "taken": taken(own)}
    return summary


def taken(records: Records) -> list[str]:
    """A sentence for each run that trainings come from, other than this one."""
    arms: dict[str, dict[str, list[str]]] = {}  # in the order of the records
    for record in records:
        if record["kind"] == "training" and (origin := record.get("taken_from")) is not None:
            places = ", ".join(f"commit {place['commit']} on {place['device']}" for place in origin["computed_on"])
            of_run = arms.setdefault(f"{origin['command']} ({places})", {})
            of_run.setdefault(record["arm"], []).append(str(record["seed"]))
    return [
        f"Taken with its seconds from another run, {run}: "
        + "; ".join(f"{arm}, seed {' and '.join(seeds)}" for arm, seeds in of_run.items())
        + "."
        for run, of_run in arms.items()
    ]


def _by_seed(row: dict[str, Any], key: str) -> dict[int, float]:
    return dict(zip(row["seeds"], row[key], strict=True))


def _row(
    records: Records, of_histories: Callable[[Sequence[list[dict[str, float]]]], dict[str, Any]]
) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    trainings = sorted((r for r in records if r["kind"] == "training"), key=lambda record: record["seed"])
    histories = [record["history"] for record in starts if "history" in record]
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
    } | (of_histories(histories) if histories else {})


def ends(history: list[dict[str, float]], key: str) -> tuple[float, float]:
    """Mean over the first and the last tenth of the iterations, three at least: single minibatches are noisy."""
    tenth = max(3, len(history) // 10)
    first, last = (
        mean_and_deviation([entry[key] for entry in part])[0] for part in (history[:tenth], history[-tenth:])
    )
    return first, last


def mean_ends(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The same over seeds."""
    first, last = (mean_and_deviation(list(part))[0] for part in zip(*pairs, strict=True))
    return first, last


# ---------------------------------------------------------------------------------------------- on screen
def print_tables(
    console: Console, summary: dict[str, Any], said: Callable[[dict[str, Any]], Iterable[str]], note: str
) -> None:
    """One table a network, narrow enough for 80 columns, and what may be concluded from it.

    Args:
        console: Where to.
        summary: From `summarise`.
        said: Sentences about the initialisers, from the rows by arm.
        note: What the reader of the table must know of this experiment.
    """
    for network, result in summary["networks"].items():
        table = Table(title=f"\n{network}", title_justify="left", box=None, padding=(0, 1, 0, 0))
        table.add_column("start", no_wrap=True)
        for heading in ("epochs", "epoch 1 %", "best %", "final %", "init s", "train s"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm, row in result["arms"].items():
            if not row["seeds"]:
                table.add_row(arm, "", "", "failed" if row["failed"] else "–")
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
        for sentence in said(result["arms"]):
            console.print(sentence, highlight=False)
        for arm, own in result["arms"].items():
            for message in dict.fromkeys(own["failed"]):
                console.print(f"{arm} failed. {message}", highlight=False, markup=False)
        if lost := {arm: own["diverged"] for arm, own in result["arms"].items() if own["diverged"]}:
            console.print("Diverged: " + ", ".join(f"{count} of {arm}" for arm, count in lost.items()) + ".")
        repeated = max(len(own["seeds"]) for own in result["arms"].values())
        spread = f"; ± is the standard deviation over {repeated} seeds, no ± a single seed" if repeated > 1 else ""
        console.print(
            f"\nTest accuracy{spread}. best: of all epochs, chosen on the test set, as the paper reports it. {note} "
            "init, train: seconds on this machine.",
            style="dim",
        )
        for sentence in result["taken"]:
            console.print(sentence, style="dim", markup=False, highlight=False)


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
COLOURS = (
    "#1f77b4", "#d62728", "#17becf", "#e377c2", "#bcbd22", "#2ca02c", "#9467bd", "#8c564b"
)  # fmt: skip
"""Of arms, in their order."""

Panels = Callable[[Sequence[Axes], Records, str], None]
"""Draws one network's row of panels from its records."""


def save_panels(path: Path, records: Records, summary: dict[str, Any], method: str, columns: int, draw: Panels) -> None:
    """A row of panels a network, under a title that says data and device."""
    networks = list(summary["networks"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.75 * columns, 4.4 * len(networks)), layout="constrained")
        axes = figure.subplots(len(networks), columns, squeeze=False)
        for row, network in zip(axes, networks, strict=True):
            draw(row, [record for record in records if record["network"] == network], network)
        figure.suptitle(f"{method}. {summary['data']}\n{summary['device']}", fontsize=9)
        save_png(figure, path, dpi=120)


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


def draw_training(axes: Axes, records: Records, arms: Sequence[str], bold: Sequence[str]) -> None:
    """Test accuracy against epoch, mean over seeds; the arms in question are drawn bold."""
    for arm, colour in zip(arms, COLOURS, strict=False):
        curves = [r["history"] for r in records if r["kind"] == "training" and r["arm"] == arm]
        if not curves:
            continue
        longest = max(map(len, curves))
        means = [
            100 * mean_and_deviation([h[min(k, len(h) - 1)]["test_accuracy"] for h in curves])[0]
            for k in range(longest)
        ]
        style = {"linestyle": "-" if arm in bold else "--", "linewidth": 2.0 if arm in bold else 1.4}
        axes.plot(
            range(1, longest + 1), means, color=colour, marker="o" if longest < 10 else None, markersize=3,
            label=f"{arm} ({len(curves)})", **style,
        )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="test accuracy, % (mean over seeds)", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Training (seeds)", loc="left")
    if axes.lines:
        axes.legend(frameon=False, fontsize=7)
