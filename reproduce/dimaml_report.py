"""The experiments on DIMAML: from their records and laws to tables, intervals and figures.

Every metric is an error, so that lower is better. A "tenth" is after a tenth of a training's updates, and so on.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from papers.dimaml import InitDistribution
from reproduce.figures import log_scale, save_png
from reproduce.statistics import mean_and_deviation, paired_interval

Records = Sequence[dict[str, Any]]

LEARNED: Mapping[str, Literal["normal", "plif"]] = {"dimaml-normal": "normal", "dimaml-plif": "plif"}
"""Arms that are drawn from learned laws, and of which family these are."""

STARTS: Mapping[str, Sequence[str]] = {"dimaml-normal": ("kaiming", "fixup"), "dimaml-plif": ("default", "fixup")}
"""Which arm has the mean and deviation of every tensor that laws start from: the first that an experiment has.

Normal starts from what the poster calls Kaiming, PLIF from torch's own bounds; both from Fixup's deviations.
"""

LABELS = {
    "kaiming": "Kaiming (theirs)",
    "he": "Kaiming (He)",
    "default": "torch default",
    "fixup": "Fixup",
    "orthogonal": "orthogonal",
    "delta-orthogonal": "delta-orthogonal",
    "metainit": "MetaInit",
    "dimaml-normal": "DIMAML-Normal",
    "dimaml-plif": "DIMAML-PLIF",
}
COLOURS = {
    "kaiming": "#7f7f7f",
    "he": "#8c564b",
    "default": "#bcbd22",
    "fixup": "#17becf",
    "orthogonal": "#9467bd",
    "delta-orthogonal": "#9467bd",
    "metainit": "#ff7f0e",
    "dimaml-normal": "#1f77b4",
    "dimaml-plif": "#d62728",
}
PARTS = {"tenth": 0.1, "half": 0.5, "end": 1.0}
"""Of a training: what epochs 10, 50 and 100 are of the poster's 100."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a report says of one experiment.

    Attributes:
        metric: Key of the number that is compared, in a history's entries.
        title: What it is, with its unit.
        digits: After the point.
        names: Of data sets, for people.
        pairs: target ↦ source.
        arms: In the order of the table.
        poster: target ↦ (what the poster's columns are, {arm: three numbers}); none where it gives no numbers.
        differs: What is not as in the poster, in sentences.
        extra: A further number at the end of a training, (key, heading), shown without intervals.
    """

    metric: str
    title: str
    digits: int
    names: Mapping[str, str]
    pairs: Mapping[str, str]
    arms: Sequence[str]
    poster: Mapping[str, tuple[str, Mapping[str, tuple[float, float, float]]]]
    differs: str
    extra: tuple[str, str] | None = None


# ---------------------------------------------------------------------------------------------- numbers
def summarise(records: Records, shown: Shown) -> dict[str, Any]:
    """For each target every arm's numbers over seeds, and the learned arms against each baseline, seed by seed."""
    targets = {}
    for target, source in shown.pairs.items():
        own = trainings(records, target)
        by_arm = {arm: [r for r in own if r["arm"] == arm] for arm in shown.arms}
        arms = {arm: _arm(records, shown) for arm, records in by_arm.items() if records}
        targets[target] = {"source": source, "arms": arms, "comparisons": list(_comparisons(arms))}
    learning = [_learning(record) for record in learnings(records)]
    failed = [_failure(record, shown) for record in records if "failed" in record]
    return {"metric": shown.title, "targets": targets, "learning": learning, "failed": failed}


def trainings(records: Records, target: str) -> Records:
    """Those that were begun: not where an initialiser failed."""
    return [r for r in records if r["kind"] == "training" and r["target"] == target and "failed" not in r]


def _failure(record: dict[str, Any], shown: Shown) -> str:
    if record["kind"] == "laws":
        what = f"Learning {LABELS['dimaml-' + record['family']]} on {shown.names[record['source']]}"
    else:
        what = f"{LABELS[record['arm']]}, {shown.names[record['target']]}, seed {record['seed']}"
    return f"{what} failed. {record['failed']}"


def learnings(records: Records) -> Records:
    """The records of laws, in one order, whichever was finished first."""
    own = (r for r in records if r["kind"] == "laws" and "failed" not in r)
    return sorted(own, key=lambda r: (r["source"], r["family"]))


def _arm(records: Records, shown: Shown) -> dict[str, Any]:
    """Values by part of the training and seed; infinite where a training diverged."""
    first = records[0]
    values = {part: {r["seed"]: _value(r, share, shown.metric) for r in records} for part, share in PARTS.items()}
    over_seeds = {part: _over_seeds(list(own.values())) for part, own in values.items()}
    return {
        "seeds": [r["seed"] for r in records],
        "diverged": sum(r["diverged"] for r in records),
        "updates": [round(share * first["updates"] * first["evaluations"]) for share in PARTS.values()],
        "initialisation_seconds": mean_and_deviation([r["initialisation_seconds"] for r in records])[0],
        "values": values,
        "extra": _over_seeds([_value(r, 1.0, shown.extra[0]) for r in records]) if shown.extra else None,
        "mean": {part: mean for part, (mean, _) in over_seeds.items()},
        "deviation": {part: deviation for part, (_, deviation) in over_seeds.items()},
    }


def _over_seeds(values: list[float]) -> tuple[float, float]:
    """Mean and deviation; of values that are not all finite an infinite mean without one."""
    return mean_and_deviation(values) if np.isfinite(values).all() else (math.inf, math.nan)


def _value(record: dict[str, Any], share: float, metric: str) -> float:
    if record["diverged"]:
        return math.inf
    return float(record["history"][round(share * record["evaluations"]) - 1][metric])


def _comparisons(arms: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Learned minus baseline with its interval, at each part; the last pair is the two families."""
    learned = [arm for arm in arms if arm in LEARNED]
    pairs = [(arm, other) for arm in learned for other in arms if other not in LEARNED]
    pairs += [(learned[1], learned[0])] if len(learned) == 2 else []
    for arm, other in pairs:
        for part in PARTS:
            after, before = arms[arm]["values"][part], arms[other]["values"][part]
            seeds = [s for s in after if s in before and math.isfinite(after[s]) and math.isfinite(before[s])]
            low, high = paired_interval([after[s] for s in seeds], [before[s] for s in seeds])
            yield {
                "arm": arm,
                "against": other,
                "part": part,
                "difference": float(np.mean([after[s] - before[s] for s in seeds])) if seeds else math.nan,
                "low": low,
                "high": high,
                "pairs": len(seeds),
            }


def _learning(record: dict[str, Any]) -> dict[str, Any]:
    losses = [float(entry["loss"]) for entry in record["history"]]
    tenth = max(1, len(losses) // 10)
    finite = [[loss for loss in part if math.isfinite(loss)] for part in (losses[:tenth], losses[-tenth:])]
    first, last = (float(np.mean(part)) if part else math.nan for part in finite)
    return {
        "source": record["source"],
        "family": record["family"],
        "laws": record["laws"],
        "meta_steps": len(losses),
        "skipped": sum(float(entry["skipped"]) for entry in record["history"]),
        "first": first,
        "last": last,
        "seconds": record["seconds"],
    }


def verdict(comparison: Mapping[str, Any]) -> str:
    """No claim without an interval that carries it."""
    if not math.isfinite(comparison["low"]):
        return "no interval"
    return "lower" if comparison["high"] < 0 else "higher" if comparison["low"] > 0 else "not shown"


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any], shown: Shown) -> None:
    """For each target the table of arms, the poster's numbers beside them, and the differences with intervals.

    What differs from the poster stands under each table of arms.
    """
    for target, result in summary["targets"].items():
        names = f"{shown.names[result['source']]} → {shown.names[target]}"
        console.print(f"\n{names}\n{shown.title}, by updates")
        console.print(_arms_table(result, shown, target))
        console.print()
        console.print(_differences_table(result, shown))
        if lost := {arm: row["diverged"] for arm, row in result["arms"].items() if row["diverged"]}:
            console.print("Diverged: " + ", ".join(f"{n} of {LABELS[arm]}" for arm, n in lost.items()) + ".")
    for own in summary["learning"]:
        seconds = "resumed" if own["seconds"] is None else f"{own['seconds']:.0f} s"
        skipped = f", skipped: {own['skipped']:.0f}" if own["skipped"] else ""
        console.print(
            f"Learned {own['laws']} {own['family']} laws on {shown.names[own['source']]} in {own['meta_steps']} "
            f"meta-steps ({seconds}{skipped}): L_auc {own['first']:.3f} in the first tenth of them, {own['last']:.3f} "
            "in the last.",
            highlight=False,
        )
    for sentence in summary["failed"]:
        console.print(sentence, highlight=False, markup=False)
    seeds = max(len(row["seeds"]) for result in summary["targets"].values() for row in result["arms"].values())
    note = f"Mean ± standard deviation over {seeds} seeds" if seeds > 1 else "A single seed"
    console.print(
        f"\n{note}; the laws were learned once, so that no spread of learning is in it. Lower is better. Differences: "
        f"of pairs that share a seed and did not diverge, with their 95 % t-interval, each by itself; * where it "
        "leaves out 0.",
        style="dim",
    )


def _arms_table(result: dict[str, Any], shown: Shown, target: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("start", no_wrap=True)
    updates = next(iter(result["arms"].values()))["updates"]
    for count in updates:
        table.add_column(f"{count:,}", justify="right", no_wrap=True)
    if shown.extra:
        table.add_column(shown.extra[1], justify="right", no_wrap=True)
    heading, poster = shown.poster.get(target, ("", {}))
    for epoch in ("10", "50", "100") if poster else ():
        table.add_column(epoch, justify="right", no_wrap=True)
    for arm, row in result["arms"].items():
        own = [with_deviation(row["mean"][part], row["deviation"][part], shown.digits) for part in PARTS]
        told = [f"{value:.3f}" for value in poster[arm]] if arm in poster else [""] * 3 * bool(poster)
        own += [with_deviation(*row["extra"], digits=1)] if shown.extra else []
        table.add_row(LABELS[arm], *own, *told)
    table.caption = (f"10, 50, 100: the poster's, {heading}. " if poster else "") + shown.differs
    table.caption_justify = "left"
    return table


def with_deviation(mean: float, deviation: float, digits: int) -> str:
    """`1.876 ± 0.004`; no deviation for a single value, a dash where a training diverged."""
    if not math.isfinite(mean):
        return "–"
    return f"{mean:.{digits}f}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def _differences_table(result: dict[str, Any], shown: Shown) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("difference", no_wrap=True)
    for part in PARTS:
        table.add_column(f"at the {part}", no_wrap=True)
    rows: dict[tuple[str, str], list[str]] = {}
    for own in result["comparisons"]:
        rows.setdefault((own["arm"], own["against"]), []).append(_difference(own, shown.digits))
    short = {"dimaml-normal": "Normal", "dimaml-plif": "PLIF"}
    starts = {arm: start_of(arm, result["arms"]) for arm in LEARNED}
    for (arm, other), cells in rows.items():
        mark = " †" if other == starts[arm] else ""
        table.add_row(f"{short[arm]} − {short.get(other, LABELS[other])}{mark}", *cells)
    if any(other == starts[arm] for arm, other in rows):
        table.caption = "† the arm whose tensors have the mean and deviation that the laws started from"
        table.caption_justify = "left"
    return table


def start_of(arm: str, arms: Container[str]) -> str | None:
    """The baseline whose moments a learned arm's laws start from, where it was trained too.

    Example:
        >>> start_of("dimaml-plif", ["kaiming", "default"]), start_of("dimaml-plif", ["kaiming"])
        ('default', None)
    """
    return next((other for other in STARTS[arm] if other in arms), None)


def _difference(own: Mapping[str, Any], digits: int) -> str:
    """`-0.120 ± 0.031 *`: with half the width of its interval, which is symmetric; * where that leaves out 0."""
    if not math.isfinite(own["low"]):
        return "–" if not own["pairs"] else f"{own['difference']:+.{digits}f}"
    star = "" if verdict(own) == "not shown" else " *"
    return f"{own['difference']:+.{digits}f} ± {(own['high'] - own['low']) / 2:.{digits}f}{star}"


# ---------------------------------------------------------------------------------------------- figures
STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def save_figure(path: Path, records: Records, summary: dict[str, Any], shown: Shown) -> None:
    """Above the trainings on each target, below the learning of each family of laws."""
    laws = learnings(records)
    columns = max(len(shown.pairs), len(laws), 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * columns, 8.2), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
        axes = above.subplots(1, len(shown.pairs), squeeze=False)[0]
        for axis, target in zip(axes, shown.pairs, strict=True):
            draw_training(axis, trainings(records, target), shown, target)
        for axis, record in zip(below.subplots(1, max(1, len(laws)), squeeze=False)[0], laws, strict=False):
            draw_learning(axis, record, shown)
        figure.suptitle(f"DIMAML. {summary['data']}\n{summary['device']}", fontsize=8, wrap=True)
        save_png(figure, path, dpi=110)


def draw_training(axis: Axes, records: Records, shown: Shown, target: str) -> None:
    """Mean over seeds with a band of one standard deviation, against updates."""
    for arm in shown.arms:
        own = [r for r in records if r["arm"] == arm and not r["diverged"]]
        if not own:
            continue
        values = np.array([[float(entry[shown.metric]) for entry in r["history"]] for r in own])
        x = own[0]["updates"] * np.arange(1, values.shape[1] + 1)
        mean, spread = values.mean(0), values.std(0, ddof=1) if len(own) > 1 else np.zeros(values.shape[1])
        bold = arm in LEARNED
        axis.plot(
            x, mean, color=COLOURS[arm], linewidth=2.0 if bold else 1.3, linestyle="-" if bold else "--",
            label=f"{LABELS[arm]} ({len(own)})",
        )  # fmt: skip
        axis.fill_between(x, mean - spread, mean + spread, color=COLOURS[arm], alpha=0.15, linewidth=0)
    log_scale(axis, (1, 1.2, 1.5, 2, 3, 4, 5, 7))
    axis.set(xlabel="updates", ylabel=shown.title)
    axis.set_title(f"{shown.names[shown.pairs[target]]} → {shown.names[target]} (seeds)", loc="left", fontsize=9)
    if axis.lines:
        axis.legend(frameon=False, fontsize=7)


def draw_learning(axis: Axes, record: dict[str, Any], shown: Shown) -> None:
    """L_auc and the training loss of every meta-step, with their running means."""
    for key, colour, label in (("loss", "#1f77b4", "L_auc, held out"), ("train_loss", "0.55", "training")):
        values = np.array([float(entry[key]) for entry in record["history"]])
        steps = np.arange(1, len(values) + 1)
        axis.plot(steps, values, ".", color=colour, alpha=0.3, markersize=3)
        axis.plot(steps, running_mean(values), color=colour, label=label)
    axis.set(xlabel="meta-step", ylabel="loss of the inner trainings")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    family = LABELS[f"dimaml-{record['family']}"]
    axis.set_title(f"{family}, learned on {shown.names[record['source']]}", loc="left", fontsize=9)
    axis.legend(frameon=False, fontsize=7)


def running_mean(values: np.ndarray, span: int = 20) -> np.ndarray:
    """Exponentially weighted, of what is finite, with weights that sum to one from the start on; `span` as in pandas.

    Example:
        >>> running_mean(np.array([1.0, 3.0]), span=3)  # decay 1/2: (1/2 · 1 + 3)/(1/2 + 1)
        array([1.        , 2.33333333])
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total, decay * weight
        if math.isfinite(value):
            total, weight = total + value, weight + 1
        means.append(total / weight if weight else math.nan)
    return np.array(means)


def save_laws(path: Path, before: InitDistribution, after: InitDistribution, title: str) -> None:
    """A panel a tensor: quantile functions of PLIF, densities of Normal; dashed as it started, solid as learned."""
    keys = list(after.families)
    columns = min(6, len(keys))
    rows = -(-len(keys) // columns)
    with mpl.rc_context({**STYLE, "font.size": 7}):
        figure = Figure(figsize=(2.3 * columns, 1.75 * rows + 0.7), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, key in zip(grid, keys, strict=False):
            draw_law(axis, before.families[key], after.families[key])
            axis.set_title(key.removesuffix(".weight"), fontsize=7, loc="left")
        for axis in grid[len(keys) :]:
            axis.set_axis_off()
        what = "quantile functions Q(u)" if after.families[keys[0]].kind == "plif" else "densities of a weight"
        figure.suptitle(f"{title}: {what}; dashed: at the start, solid: learned", fontsize=9)
        save_png(figure, path, dpi=110)


def draw_law(axis: Axes, before: Any, after: Any) -> None:
    if after.kind == "plif":
        x = torch.linspace(0, 1, 1001, dtype=torch.float64)
        curves = [law.quantile(x) for law in (before, after)]
    else:
        moments = [tuple(float(value) for value in law.moments()) for law in (before, after)]
        low, high = (f(m + s * 3 * d for m, d in moments) for f, s in ((min, -1), (max, 1)))
        x = torch.linspace(low, high, 401, dtype=torch.float64)
        curves = [law.density(x) for law in (before, after)]
    axis.plot(x, curves[0].detach(), color="0.4", linestyle="--", linewidth=1)
    axis.plot(x, curves[1].detach(), color="#2ca02c", linewidth=1.4)
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.yaxis.set_major_locator(MaxNLocator(3))
