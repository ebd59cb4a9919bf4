"""Table, sentences and figure of `reproduce.nio_cifar10`, from its records alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from reproduce import cifar_report
from reproduce.cifar_report import (
    COLOURS,
    KINDS,
    Records,
    draw_scales,
    draw_training,
    ends,
    mean_ends,
    print_tables,
    save_panels,
)
from reproduce.figures import log_scale
from reproduce.gradinit_report import of_searches, what_gradinit_did
from reproduce.statistics import mean_and_deviation

NIO = ("NIO, examples", "NIO, sub-batches")
CLAIMS = tuple(
    (key, arm, other, what)
    for arm in NIO
    for key, other, what in (
        ("first_epoch_accuracy", "own init", "After the first epoch"),
        ("first_epoch_accuracy", "GradInit", "After the first epoch"),
        ("best_accuracy", "own init", "Best epoch"),
        ("best_accuracy", "own init, longer", "Best epoch"),
    )
)


# ---------------------------------------------------------------------------------------------- numbers
def summarise(records: Records, arms: Sequence[str]) -> dict[str, Any]:
    """For each network and arm every seed's numbers; and the paired comparisons."""
    return cifar_report.summarise(records, arms, CLAIMS, _of_histories)


def _of_histories(histories: Sequence[list[dict[str, float]]]) -> dict[str, Any]:
    if "grad_cosine" not in histories[0][0]:
        return of_searches(histories)
    return {
        "constraint_share": [sum(entry["constraint"] for entry in h) / len(h) for h in histories],
        "cosine_before_after": [ends(h, "grad_cosine") for h in histories],
        "norm_before_after": [ends(h, "grad_norm") for h in histories],
        "floor": histories[0][0]["floor"],
    }


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """The tables, and what the methods did."""

    def said(arms: dict[str, Any]) -> Iterator[str]:
        for arm in NIO:
            if "floor" in arms[arm]:
                yield _what_nio_did(arm, arms[arm])
        if "loss_before_after" in arms["GradInit"]:
            yield what_gradinit_did(arms["GradInit"])

    note = (
        "NIO, examples: not defined with batch statistics. own init, longer: with the epochs added that NIO costs by "
        "arithmetic, the larger of both, to the nearest whole. Each interval stands by itself."
    )
    print_tables(console, summary, said, note)


def _what_nio_did(arm: str, row: dict[str, Any]) -> str:
    (c0, c1), (n0, n1) = mean_ends(row["cosine_before_after"]), mean_ends(row["norm_before_after"])
    share, cost = (mean_and_deviation(row[key])[0] for key in ("constraint_share", "epochs_worth"))
    return (
        f"{arm}, mean over {len(row['constraint_share'])} seeds: GradCosine {c0:.3f} → {c1:.3f} (floor "
        f"{row['floor']:.3f}), mean gradient norm {n0:.3g} → {n1:.3g} (first and last tenth of the iterations, three "
        f"at least); {100 * share:.0f} % of them on the constraint; arithmetic of {cost:.1f} epochs."
    )


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Five panels a network: GradCosine and its floor, the gradient norm, the scales, the shares, training."""
    arms = list(next(iter(summary["networks"].values()))["arms"])
    colours: dict[str, str] = dict(zip(arms, COLOURS, strict=False))  # as the last panel has them

    def draw(row: Sequence[Axes], own: Records, network: str) -> None:
        searches = [
            r for r in own if r["kind"] == "initialisation" and r["arm"] in NIO and "history" in r and r["seed"] == 0
        ]
        if searches:
            draw_cosine(row[0], {r["arm"]: r["history"] for r in searches}, colours, network)
            draw_norm(row[1], {r["arm"]: r["history"] for r in searches}, colours)
            first = searches[0]
            draw_scales(row[2], first["scales"], first["kinds"])
            row[2].set_title(f"Scales ({first['arm']}, first seed)", loc="left")
            draw_shares(row[3], first["history"], first["kinds"])
            row[3].set_title("Share of the gradient, first (open), last", loc="left")
        draw_training(row[4], own, arms, bold=NIO)

    save_panels(path, records, summary, "NIO", 5, draw)


def draw_cosine(axes: Axes, histories: dict[str, list[dict[str, float]]], colours: dict[str, str], title: str) -> None:
    """GradCosine against iteration, its floor dashed in the same colour."""
    for arm, history in histories.items():
        steps, colour = [entry["step"] for entry in history], colours[arm]
        axes.plot(steps, [entry["grad_cosine"] for entry in history], color=colour, label=arm)
        axes.axhline(history[0]["floor"], color=colour, linestyle=(0, (2, 4)), linewidth=1.2, label="its floor")
    axes.set(xlabel="NIO iteration", ylabel="GradCosine (without its diagonal)")
    axes.set_title(f"{title}: GradCosine (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def draw_norm(axes: Axes, histories: dict[str, list[dict[str, float]]], colours: dict[str, str]) -> None:
    """Mean gradient norm against iteration; iterations on the constraint have a mark."""
    for arm, history in histories.items():
        colour = colours[arm]
        axes.plot([e["step"] for e in history], [e["grad_norm"] for e in history], color=colour, label=arm)
        held = [(entry["step"], entry["grad_norm"]) for entry in history if entry["constraint"]]
        if held:
            axes.plot(*zip(*held, strict=True), "x", color=colour, markersize=4, label="on the constraint")
    log_scale(axes)
    axes.set(xlabel="NIO iteration", ylabel="mean gradient norm")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("Gradient norm (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7)


def draw_shares(axes: Axes, history: list[dict[str, float]], kinds: dict[str, str]) -> None:
    """Each tensor's share of the gradient in the first (open) and the last iteration (filled), by kind."""
    names = [key.removeprefix("share/") for key in history[0] if key.startswith("share/")]
    for kind, (colour, marker) in KINDS.items():
        for entry, filled in ((history[0], "none"), (history[-1], colour)):
            points = [
                (i, entry[f"share/{name}"])
                for i, name in enumerate(names, start=1)
                if kinds[name] == kind and entry[f"share/{name}"] > 1e-8
            ]
            if points:
                axes.plot(
                    *zip(*points, strict=True), marker, color=colour, markerfacecolor=filled, markersize=4,
                    linestyle="none", label=kind if filled != "none" else None,
                )  # fmt: skip
    log_scale(axes)
    axes.set(xlabel="tensor in the gradient, from input to output", ylabel="mean of ‖u_k‖²")
    axes.legend(frameon=False, fontsize=7)
