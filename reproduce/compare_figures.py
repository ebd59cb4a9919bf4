"""Figures of `reproduce.compare`, from its records: where arms end, learning rates, curves, layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from scipy import stats

from reproduce.compare_report import Interval, Metric, Records, Summary, marked, mean_or_none, metric_of, number
from reproduce.figures import log_scale
from reproduce.page import INK, MUTED, WIDTH, series_style

ByPlace = Mapping[str, Mapping[str, float | None]]
"""For each arm, a number for each layer or tensor, by its name."""

LAYER_QUANTITIES = {
    "activation_std": "Activation scale",
    "gradient_norm": "Gradient norm",
    "weight_norm": "Weight norm",
}
FAR = 2.0
"""How far beyond the better half of the arms an axis reaches, over that half's range: so much of it stays readable."""
MARGIN = 0.05
"""Of an axis that is cut, at both ends, over its length."""


# ---------------------------------------------------------------------------------------------- what is drawn
def curve_of(runs: Records, name: str) -> dict[str, Any]:
    """One arm's curve: at each evaluation that every run has, with a finite number, mean and range over the runs.

    Returns:
        `updates` (the initialisation's charge included), `mean`, `low`, `high`: a list each; and `start`, the charge,
        mean over the runs.
    """
    curve: dict[str, Any] = {"start": None, "updates": [], "mean": [], "low": [], "high": []}
    if not runs:
        return curve
    curve["start"] = mean_or_none([run["charged_updates"] for run in runs])
    for entries in zip(*(run["history"] for run in runs), strict=False):  # to the end of the shortest
        values = [number(entry.get(name)) for entry in entries]
        if not all(map(math.isfinite, values)):
            break
        charged = [run["charged_updates"] + entry["updates"] for run, entry in zip(runs, entries, strict=True)]
        for key, value in (
            ("updates", np.mean(charged)), ("mean", np.mean(values)), ("low", min(values)), ("high", max(values))
        ):  # fmt: skip
            curve[key].append(float(value))
    return curve


def values_by_place(records: Records, arms: Sequence[str]) -> dict[str, tuple[str, ByPlace]]:
    """Each quantity by its title: of which place it is (a tensor, or a layer), and its values, geometric over seeds."""
    made = {
        arm: [r for r in records if r["kind"] == "initialisation" and r["arm"] == arm and r["error"] is None]
        for arm in arms
    }
    found = {"Scale": ("tensor", {arm: _over_seeds([r["scales"] for r in own]) for arm, own in made.items()})}
    for key, title in LAYER_QUANTITIES.items():
        by_name = {
            arm: [{layer["name"]: layer[key] for layer in r["layers"]} for r in own] for arm, own in made.items()
        }
        found[title] = ("layer", {arm: _over_seeds(own) for arm, own in by_name.items()})
    return {title: (place, values) for title, (place, values) in found.items() if any(values.values())}


def _over_seeds(named: Sequence[Mapping[str, float | str | None]]) -> dict[str, float | None]:
    """Geometric mean of each name, over the records that have it."""
    names = dict.fromkeys(name for own in named for name in own)
    return {name: _geometric_mean([own[name] for own in named if name in own]) for name in names}


def _geometric_mean(values: Sequence[float | str | None]) -> float | None:
    """Of ratios and norms; zero where one is zero."""
    read = [number(value) for value in values]
    if not read or not all(map(math.isfinite, read)):
        return None
    return 0.0 if min(read) <= 0 else float(stats.gmean(read))


def names_of(values: ByPlace) -> list[str]:
    """Of all arms, each once, in the order of the model."""
    return list(dict.fromkeys(name for own in values.values() for name in own))


def limits_of(summary: Summary, arms: Sequence[str]) -> Interval | None:
    """Ends of an axis that one arm far behind does not squeeze; None where every result fits.

    The better half of the arms decides: the axis shows whatever lies within `FAR` times their range beyond it.

    Args:
        summary: From `summarise`.
        arms: Of those that have a mean.
    """
    rows = summary["arms"]
    sign = -1 if summary["higher_is_better"] else 1
    best = sorted(arms, key=lambda arm: sign * rows[arm]["mean"])[: max(2, math.ceil(len(arms) / 2))]
    low, high = _range_of(rows, best)
    reach = FAR * (high - low)
    lowest, highest = low - reach, high + reach
    all_low, all_high = _range_of(rows, arms)
    if reach == 0 or (lowest <= all_low and all_high <= highest):
        return None
    shown_low, shown_high = _range_of(rows, [arm for arm in arms if lowest <= rows[arm]["mean"] <= highest])
    return max(shown_low, lowest), min(shown_high, highest)


def _range_of(rows: Mapping[str, Any], arms: Sequence[str]) -> Interval:
    """Of the results of every seed; a mean and its interval lie within."""
    values = [value for arm in arms for value in rows[arm]["values"]]
    return min(values), max(values)


# ---------------------------------------------------------------------------------------------- figures
def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def at_the_end(metric: Metric) -> str:
    return f"{metric.title.capitalize()} at the end{', %' if metric.is_share else ''}"


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    rows = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _scale_for(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the numbers span more than a factor of five."""
    if values and min(values) > 0 and max(values) > 5 * min(values):
        log_scale(axes, (1,) if max(values) > 1000 * min(values) else (1, 2, 5))


def draw_ends(summary: Summary, arms: Sequence[str]) -> Figure:
    """Each arm's mean, interval and seeds, on a line of its own; an arrow to what lies beyond the axis."""
    metric = metric_of(summary["metric"])
    figure, axes = _figure(0.9 + 0.3 * len(arms))
    axes.grid(visible=False)
    axes.grid(visible=True, axis="x")
    limits = limits_of(summary, arms)
    all_arms = list(summary["arms"])
    for place, arm in enumerate(arms):
        row, style = summary["arms"][arm], series_style(all_arms.index(arm))
        colour = style["color"]
        values = [metric.drawn(value) for value in row["values"]]
        axes.plot(values, [place] * len(values), ".", color=colour, markersize=4, alpha=0.6)
        if row["low"] is not None:
            axes.plot([metric.drawn(row["low"]), metric.drawn(row["high"])], [place] * 2, color=colour, linewidth=2)
        axes.plot(metric.drawn(row["mean"]), place, marker=style["marker"], color=colour, markersize=7)
        if limits is not None:
            _point_beyond(axes, row, place, limits, metric, colour)
    reference = summary["arms"][summary["reference"]]["mean"]
    if reference is not None:
        axes.axvline(metric.drawn(reference), color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    axes.set(title=at_the_end(metric), yticks=range(len(arms)), ylim=(len(arms) - 0.5, -0.5))
    if limits is not None:
        low, high = map(metric.drawn, limits)
        axes.set_xlim(low - MARGIN * (high - low), high + MARGIN * (high - low))
    axes.set_yticklabels([marked(summary, arm) for arm in arms])
    axes.tick_params(axis="y", length=0)
    return figure


def _point_beyond(
    axes: Axes, row: Mapping[str, Any], place: int, limits: Interval, metric: Metric, colour: str
) -> None:
    """An arrow at the end of the axis that results lie beyond, with the mean where that lies there too."""
    across = axes.get_yaxis_transform()  # x in shares of the axis, y in places
    for end, sign, marker in ((0, -1, "<"), (1, 1, ">")):
        if max(sign * value for value in row["values"]) <= sign * limits[end]:
            continue
        edge = end - sign * MARGIN / 2
        axes.plot(edge, place, marker, color=colour, markersize=7, transform=across)
        if sign * row["mean"] > sign * limits[end]:
            axes.annotate(
                metric.text(row["mean"]), (edge, place), (-sign * 7, 0), xycoords=across, textcoords="offset points",
                ha=("left", "right")[end], va="center", color=INK,
            )  # fmt: skip


def draw_learning_rates(summary: Summary) -> Figure:
    metric = metric_of(summary["metric"])
    figure, axes = _figure(2.6)
    shown = []
    for index, (arm, row) in enumerate(summary["arms"].items()):
        points = [(p["learning_rate"], metric.drawn(p["mean"])) for p in row["grid"] if p["mean"] is not None]
        if not points:
            continue
        style = series_style(index)
        axes.plot(*zip(*points, strict=True), **style, linewidth=1.5, markersize=4, label=arm)
        if row["mean"] is not None:
            marked = {"marker": style["marker"], "color": style["color"], "markersize": 9, "linestyle": "none"}
            axes.plot(row["learning_rate"], metric.drawn(row["mean"]), **marked)
        shown += [value for _, value in points]
    axes.set_xscale("log")
    axes.set(xlabel="learning rate", title=metric.label.capitalize())
    axes.set_xticks(summary["learning_rates"])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if not metric.is_share:
        _scale_for(axes, shown)
    _legend(figure, axes)
    return figure


def draw_curves(metric: Metric, curves: Mapping[str, dict[str, Any]]) -> Figure:
    figure, axes = _figure(2.6)
    shown = []
    for index, (arm, curve) in enumerate(curves.items()):
        if not curve["updates"]:
            continue
        style = series_style(index)
        mean, low, high = ([metric.drawn(value) for value in curve[key]] for key in ("mean", "low", "high"))
        axes.fill_between(curve["updates"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        every = max(1, len(mean) // 6)
        axes.plot(curve["updates"], mean, **style, linewidth=1.5, markersize=4, markevery=every, label=arm)
        if curve["start"]:
            tick = {"marker": "|", "color": style["color"], "markersize": 9, "markeredgewidth": 2, "clip_on": False}
            axes.plot(curve["start"], 0, transform=axes.get_xaxis_transform(), linestyle="none", **tick)
        shown += low + high
    axes.set(xlabel="training updates, initialisation included", title=metric.label.capitalize(), xlim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if not metric.is_share:
        _scale_for(axes, shown)
    _legend(figure, axes)
    return figure


def draw_by_place(values: ByPlace, place: str, title: str) -> Figure:
    figure, axes = _figure(2.6)
    names, shown = names_of(values), []
    for index, (arm, own) in enumerate(values.items()):
        points = [(i, value) for i, name in enumerate(names, start=1) if (value := own.get(name)) is not None]
        points = [(i, value) for i, value in points if value > 0]
        if points:
            axes.plot(*zip(*points, strict=True), **series_style(index), linewidth=0.9, markersize=3, label=arm)
            shown += [value for _, value in points]
    if title == "Scale":
        axes.axhline(1.0, color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    axes.set(xlabel=f"{place}, from input to output", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _scale_for(axes, shown)
    _legend(figure, axes)
    return figure
