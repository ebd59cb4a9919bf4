"""Table, sentences and figure of `reproduce.gradinit_cifar10`, from its records alone."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Console

from reproduce import cifar_report
from reproduce.cifar_report import (
    KINDS,
    Records,
    draw_scales,
    draw_training,
    ends,
    mean_ends,
    print_tables,
    save_panels,
)
from reproduce.figures import is_number, log_scale
from reproduce.statistics import mean_and_deviation

CLAIMS = (
    ("first_epoch_accuracy", "GradInit", "own init", "After the first epoch"),
    ("best_accuracy", "GradInit", "own init", "Best epoch"),
    ("best_accuracy", "GradInit", "own init, longer", "Best epoch"),
)


# ---------------------------------------------------------------------------------------------- numbers
def summarise(records: Records, arms: Sequence[str]) -> dict[str, Any]:
    """For each network and arm every seed's numbers; and the paired comparisons."""
    return cifar_report.summarise(records, arms, CLAIMS, of_searches)


def of_searches(histories: Sequence[list[dict[str, float]]]) -> dict[str, Any]:
    """What GradInit's iterations did, a seed each."""
    return {
        "constraint_share": [sum(entry["constraint"] for entry in h) / len(h) for h in histories],
        "norm_before_after": [ends(h, "gradient_norm") for h in histories],
        "loss_before_after": [ends(h, "loss") for h in histories],
    }


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """The tables, and what GradInit did."""

    def said(arms: dict[str, Any]) -> Iterator[str]:
        if "constraint_share" in arms["GradInit"]:
            yield what_gradinit_did(arms["GradInit"])

    note = "own init, longer: with the epochs added that GradInit costs by arithmetic, to the nearest whole."
    print_tables(console, summary, said, note)


def what_gradinit_did(row: dict[str, Any]) -> str:
    """One sentence from the row of its arm."""
    (n0, n1), (l0, l1) = mean_ends(row["norm_before_after"]), mean_ends(row["loss_before_after"])
    share, cost = (mean_and_deviation(row[key])[0] for key in ("constraint_share", "epochs_worth"))
    return (
        f"GradInit, mean over {len(row['constraint_share'])} seeds: gradient norm {n0:.3g} → {n1:.3g}, "
        f"loss {l0:.3g} → {l1:.3g} (first and last tenth of the iterations, three at least); "
        f"{100 * share:.0f} % of them on the constraint; arithmetic of {cost:.1f} epochs."
    )


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Four panels a network: the search, the scales, the gradient's variance, training."""
    arms = list(next(iter(summary["networks"].values()))["arms"])

    def draw(row: Sequence[Axes], own: Records, network: str) -> None:
        first = next((r for r in own if r["arm"] == "GradInit" and "history" in r and r["seed"] == 0), None)
        if first is not None and "scales" in first:
            draw_search(row[0], first["history"], network)
            draw_scales(row[1], first["scales"], first["kinds"])
            draw_variance(row[2], first)
        draw_training(row[3], own, arms, bold=("GradInit",))

    save_panels(path, records, summary, "GradInit", 4, draw)


def draw_search(axes: Axes, history: list[dict[str, float]], title: str) -> None:
    """Gradient norm and both losses against iteration; iterations on the constraint are shaded."""
    steps = [entry["step"] for entry in history]
    axes.plot(steps, [entry["gradient_norm"] for entry in history], color="#d62728", linewidth=1, label="gradient norm")
    axes.plot(steps, [entry["loss"] for entry in history], color="#1f77b4", linewidth=1, label="loss on S")
    ahead = [(entry["step"], entry["look_ahead_loss"]) for entry in history if is_number(entry["look_ahead_loss"])]
    if ahead:
        axes.plot(*zip(*ahead, strict=True), ".", color="#2ca02c", markersize=3, label="loss on S̃ after a step")
    log_scale(axes)
    for entry in (entry for entry in history if entry["constraint"]):
        axes.axvspan(entry["step"] - 0.5, entry["step"] + 0.5, color="0.8", linewidth=0, zorder=0)
    axes.fill_between([], [], color="0.8", linewidth=0, label="on the constraint")  # of all of them
    axes.set(xlabel="GradInit iteration", xlim=(0.5, max(2, len(steps)) + 0.5))
    axes.set_title(f"{title}: the search (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def draw_variance(axes: Axes, record: dict[str, Any], styles: Mapping[str, tuple[str, str]] = KINDS) -> None:
    """Relative gradient variance per tensor, before (open) and after (filled), biases left out; by kind in `styles`.

    Infinite ones, whose mean gradient cannot be told from zero, stand at the upper edge.
    """
    kinds, hidden = record["kinds"], 0
    names = [name for name in record["variance_before"] if kinds[name] != "bias"]
    for kind, (colour, marker) in styles.items():
        for when, filled in (("before", "none"), ("after", colour)):
            values = record[f"variance_{when}"]
            places = [(i, values[name]) for i, name in enumerate(names, start=1) if kinds[name] == kind]
            points = [(i, value) for i, value in places if is_number(value) and value > 0]
            style = {"color": colour, "markerfacecolor": filled, "markersize": 4, "linestyle": "none"}
            if points:
                label = kind if filled != "none" else None
                axes.plot(*zip(*points, strict=True), marker, label=label, **style)
            if infinite := [i for i, value in places if not is_number(value)]:
                axes.plot(
                    infinite,
                    [1.0] * len(infinite),
                    marker,
                    clip_on=False,
                    transform=axes.get_xaxis_transform(),
                    **style,
                )
                hidden += len(infinite)
    log_scale(axes)
    unseen = f"\n{hidden} at the upper edge: not told from ∞" if hidden else ""
    axes.set(xlabel=f"tensor, from input to output{unseen}", ylabel="relative gradient variance")
    axes.set_title("Gradient variance before (open) and after (filled)", loc="left")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
