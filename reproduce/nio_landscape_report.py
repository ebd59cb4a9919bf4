"""`nio_landscape`: from its records to rank correlations, a table and a figure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from reproduce.figures import save_png

Records = Sequence[dict[str, Any]]
RESAMPLES = 2_000
FEWEST = 10  # runs: resamples of fewer say too little, and of a perfect ranking that it is certain
PANELS = 4  # a row of the figure


@dataclass(frozen=True)
class Measure:
    """How a measure is called, what the theory behind it wants, and on what axis it is drawn."""

    label: str
    is_high_good: bool
    is_log: bool = False


MEASURES = {
    "grad_cosine_examples": Measure("GradCosine, examples", True),
    "grad_cosine_windows": Measure("GradCosine, windows", True),
    "grad_norm": Measure("gradient norm", False, is_log=True),
    "grad_sign": Measure("GradSign", True),
    "gradient_quotient": Measure("gradient quotient", False, is_log=True),
    "optima_density": Measure("optima density Ψ", False, is_log=True),
    "optima_bound": Measure("optima bound Θ", False, is_log=True),
}
"""By their names in the records; the order of table and figure."""


# ---------------------------------------------------------------------------------------------- numbers
def rank_correlation(x: ArrayLike, y: ArrayLike, axis: int = -1) -> NDArray[np.float64]:
    """Spearman's ρ along an axis, ties at their mean rank, infinities ranked as such; 0 where nothing is to be ranked.

    Unlike scipy's, it is defined for resamples that hold one value only, which a bootstrap of few runs draws.
    """
    centred = []
    for values in (x, y):
        ranks = stats.rankdata(values, axis=axis)
        centred.append(ranks - ranks.mean(axis, keepdims=True))
    a, b = centred
    norm = np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
    return np.where(norm > 0, (a * b).sum(axis) / np.where(norm > 0, norm, 1.0), 0.0)


def spearman(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """ρ with its 95 % percentile interval from resampled pairs.

    Percentiles, not BCa, which is undefined where all resamples agree. A pair that has a NaN is left out: `runs` counts
    the others. ρ is NaN where three pairs or any spread are lacking, the interval below `FEWEST` pairs.
    """
    kept = [(a, b) for a, b in zip(x, y, strict=True) if not (math.isnan(a) or math.isnan(b))]
    nothing = {"rho": math.nan, "low": math.nan, "high": math.nan, "runs": len(kept)}
    if len(kept) < 3:
        return nothing
    pairs = np.array(kept).T
    if any(len(np.unique(values)) < 2 for values in pairs):
        return nothing
    rho = float(rank_correlation(*pairs))
    if len(kept) < FEWEST:
        return nothing | {"rho": rho}
    interval = stats.bootstrap(
        tuple(pairs), rank_correlation, paired=True, vectorized=True, n_resamples=RESAMPLES, method="percentile",
        confidence_level=0.95, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return {"rho": rho, "low": float(interval.low), "high": float(interval.high), "runs": len(kept)}


def loss_of(record: dict[str, Any]) -> float:
    """The final training loss; infinite if the run diverged."""
    return float(record["train_loss"])


def accuracy_of(record: dict[str, Any]) -> float:
    """The test accuracy; below every other if the run diverged."""
    return -math.inf if record["diverged"] else record["test_accuracy"]


def correlate(records: Records, key: str) -> dict[str, dict[str, float]]:
    """A measure's ρ with training loss and with test accuracy."""
    x = [float(record["measures"][key]) for record in records]
    return {
        "loss": spearman(x, [loss_of(record) for record in records]),
        "accuracy": spearman(x, [accuracy_of(record) for record in records]),
    }


def summarise(records: Records) -> dict[str, Any]:
    """By network: how many runs there are and how they ended, and every measure's correlations.

    Under `all` those over all runs; under `learned` over those that did not fail, because two groups of runs far apart
    make a rank correlation by themselves.
    """
    summary: dict[str, Any] = {"networks": {}}
    for network in dict.fromkeys(record["network"] for record in records):
        own = [record for record in records if record["network"] == network]
        learned = [record for record in own if not record["failed"]]
        accuracies = [record["test_accuracy"] for record in own if not record["diverged"]]
        summary["networks"][network] = {
            "runs": len(own),
            "seeds": len({record["seed"] for record in own}),
            "failed": len(own) - len(learned),
            "diverged": sum(record["diverged"] for record in own),
            "default_accuracy": [record["test_accuracy"] for record in own if record["scaling"] == 0],
            "largest_accuracy": max(accuracies, default=None),
            "measures": {
                key: {"all": correlate(own, key), "learned": correlate(learned, key)}
                for key in MEASURES
                if key in own[0]["measures"]
            },
        }
    return summary


def fits(correlation: dict[str, float], predicted: int) -> str:
    """`yes` or `no` where the interval carries it, on the side of the predicted sign or on the other; else `open`."""
    low, high = sorted(predicted * correlation[end] for end in ("low", "high"))
    return "yes" if low > 0 else "no" if high < 0 else "open"


# ---------------------------------------------------------------------------------------------- on screen
def with_interval(correlation: dict[str, float]) -> str:
    """`-0.62 [-0.78, -0.40]`; `-0.62` where there is no interval, a dash where there is nothing."""
    if math.isnan(correlation["rho"]):
        return "–"
    if math.isnan(correlation["low"]):
        return f"{correlation['rho']:+.2f}"
    return f"{correlation['rho']:+.2f} [{correlation['low']:+.2f}, {correlation['high']:+.2f}]"


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Two tables a network, narrow enough for 80 columns: all runs, and those that did not fail."""
    for network, result in summary["networks"].items():
        learned = result["runs"] - result["failed"]
        titles = {
            "all": f"{network}: all {result['runs']} runs",
            "learned": f"{network}: the {learned} runs that did not fail",
        }
        for which, title in titles.items():
            if which == "learned" and (not result["failed"] or learned < 3):
                continue  # the same runs, or too few to be ranked
            console.print(make_table(title, result["measures"], which))
            left_out = {
                MEASURES[key].label: missing
                for key, row in result["measures"].items()
                if (missing := (result["runs"] if which == "all" else learned) - row[which]["loss"]["runs"])
            }
            if left_out:
                listed = ", ".join(f"{count} of {label}" for label, count in left_out.items())
                console.print(f"Left out, not a number: {listed}.", highlight=False)
        console.print(f"\n{endings(result)}", highlight=False)
    console.print(
        "\nSpearman's ρ of a measure at initialisation with the training loss and the test accuracy after training, "
        "with its 95 % bootstrap interval over runs, each interval by itself. good: what the theory wants the measure "
        "to be. fits: whether the interval lies on the side that this predicts (yes), on the other (no), or holds 0 "
        f"(open). windows: {summary['splits']} sub-batches that share no examples, so that the floor of their "
        f"GradCosine is {summary['floor']:g}, as that of examples is. With BatchNorm every measure but the gradient "
        "quotient is of windows, without it of examples.",
        style="dim",
    )


def make_table(title: str, rows: dict[str, Any], which: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("measure", no_wrap=True)
    table.add_column("good", no_wrap=True)
    for target in ("loss", "accuracy"):
        table.add_column(f"ρ with {target}", no_wrap=True)
        table.add_column("fits", no_wrap=True)
    for key, row in rows.items():
        loss, accuracy = row[which]["loss"], row[which]["accuracy"]
        sign = 1 if MEASURES[key].is_high_good else -1
        table.add_row(
            MEASURES[key].label,
            "high" if sign > 0 else "low",
            with_interval(loss),
            fits(loss, -sign),
            with_interval(accuracy),
            fits(accuracy, sign),
        )
    return table


def endings(result: dict[str, Any]) -> str:
    """How many runs failed, and how far apart the others are."""
    draws = f"{result['seeds']} draw{'s' if result['seeds'] > 1 else ''}"
    text = f"{result['failed']} of {result['runs']} runs ({draws}) failed, {result['diverged']} of them diverged."
    unscaled = ", ".join("diverged" if a is None else f"{100 * a:.1f} %" for a in result["default_accuracy"])
    if result["largest_accuracy"] is None:
        return f"{text} Unscaled: {unscaled}."
    return f"{text} Test accuracy: unscaled {unscaled}; largest {100 * result['largest_accuracy']:.1f} %."


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Test accuracy against each measure, a panel each; two rows a network."""
    networks = summary["networks"]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(15, 7.6 * len(networks) + 0.6), layout="constrained")
        parts = figure.subfigures(len(networks), 1, squeeze=False)[:, 0]
        for part, (network, result) in zip(parts, networks.items(), strict=True):
            own = [record for record in records if record["network"] == network]
            rows = -(-(len(result["measures"]) + 1) // PANELS)  # and one for the legend
            axes = part.subplots(rows, PANELS, sharey=True).flatten()
            for axis, (key, row) in zip(axes, result["measures"].items(), strict=False):
                draw_panel(axis, own, key, row)
            for axis in axes[::PANELS]:
                axis.set_ylabel("test accuracy, %")
            axes[0].set_ylim(-3, 6 + 100 * (result["largest_accuracy"] or 0.1))
            for axis in axes[len(result["measures"]) :]:
                axis.set_axis_off()
            draw_legend(axes[-1])
            part.suptitle(f"{network}. {endings(result)}", fontsize=11)
        figure.suptitle(
            f"Measured at initialisation, trained afterwards. {summary['data']}\n{summary['device']}", fontsize=8
        )
        save_png(figure, path, dpi=110)


STYLES = {
    "learned": {"color": "#1f77b4", "marker": "o", "s": 22, "linewidths": 0, "alpha": 0.7},
    "failed": {"color": "#d62728", "marker": "x", "s": 22, "linewidths": 1.1},
    "diverged": {"color": "black", "marker": "+", "s": 34, "linewidths": 1.1},
    "unscaled": {"facecolors": "none", "edgecolors": "black", "marker": "s", "s": 70, "linewidths": 1.2},
}


def draw_panel(axis: Axes, records: Records, key: str, row: dict[str, Any]) -> None:
    """One measure; ρ with accuracy, over all runs and over those that did not fail, above it."""
    groups: dict[str, list[tuple[float, float]]] = {name: [] for name in STYLES}
    hidden = 0
    for record in records:
        x = float(record["measures"][key])
        y = 0.0 if record["diverged"] else 100 * record["test_accuracy"]
        if not math.isfinite(x) or (MEASURES[key].is_log and x <= 0):
            hidden += 1
            continue
        groups["diverged" if record["diverged"] else "failed" if record["failed"] else "learned"].append((x, y))
        if record["scaling"] == 0:
            groups["unscaled"].append((x, y))
    for name, points in groups.items():
        axis.scatter(*zip(*points, strict=True) if points else ([], []), **STYLES[name])
    set_scale(axis, [x for name in ("learned", "failed", "diverged") for x, _ in groups[name]], MEASURES[key].is_log)
    good = "high" if MEASURES[key].is_high_good else "low"
    axis.set_xlabel(f"{good} is good by theory" + (f"; {hidden} beyond the axis" if hidden else ""))
    axis.set_title(
        f"{MEASURES[key].label}\nall: ρ = {with_interval(row['all']['accuracy'])}\n"
        f"not failed: ρ = {with_interval(row['learned']['accuracy'])}",
        loc="left", fontsize=9,
    )  # fmt: skip


def set_scale(axis: Axes, values: Sequence[float], is_log: bool) -> None:
    """Few ticks with plain numbers; on a log axis the powers of ten, and 2 and 5 where it is short."""
    if not is_log or not values:
        axis.xaxis.set_major_locator(MaxNLocator(5))
        return
    axis.set_xscale("log")
    is_short = max(values) < 100 * min(values)
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if is_short else (1.0,), numticks=7))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def draw_legend(axis: Axes) -> None:
    labels = {
        "learned": "a scaling that learned",
        "failed": "failed: a loss close to a guess's, or above",
        "diverged": "diverged (drawn at 0)",
        "unscaled": "the network as drawn",
    }
    handles = [
        Line2D(
            [], [], linestyle="none", marker=STYLES[name]["marker"], label=label,
            color=STYLES[name].get("color", "black"), markersize=7, fillstyle="none" if name == "unscaled" else "full",
        )
        for name, label in labels.items()
    ]  # fmt: skip
    axis.legend(handles=handles, frameon=False, loc="center", title="ρ: Spearman, with test accuracy\n[95 % bootstrap]")
