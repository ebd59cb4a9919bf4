"""Table, sentences and figure of `reproduce.nio_floor`, from its records alone."""

import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table

from papers.nio import signal_of, windows
from reproduce.figures import save_png
from reproduce.statistics import mean_and_deviation, paired_interval

Records = Sequence[dict[str, Any]]
COLOURS = {"released": "#d62728", "intended": "#1f77b4", "no overlap": "#2ca02c", "examples": "#9467bd"}
"""By groups, whose floor has the same colour."""
LINES = {"gc": "-", "gc_gn_sqrt": (0, (1, 1.2))}
"""By objective; dashed is the floor."""


# ---------------------------------------------------------------------------------------------- numbers
def estimate(by_seed: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean of a difference known for every batch of every seed, with 95 % t-intervals.

    Over the seeds' means, for what holds of other initialisations too; and over all batches, for these alone.
    """
    means = [mean_and_deviation(values)[0] for values in by_seed]
    pooled = list(chain.from_iterable(by_seed))
    return {
        "mean": mean_and_deviation(means)[0],
        "seeds": paired_interval(means, [0.0] * len(means)),
        "batches": paired_interval(pooled, [0.0] * len(pooled)),
    }


def summarise(records: Records, batch_size: int) -> dict[str, Any]:
    """For each network and kind of groups: before, and after each objective, on fitted and held-out batches."""
    summary: dict[str, Any] = {"networks": {}}
    for network in dict.fromkeys(record["network"] for record in records):
        own = [record for record in records if record["network"] == network]
        names = dict.fromkeys(record["groups"] for record in own if record["kind"] == "before")
        summary["networks"][network] = {
            "seeds": len({record["seed"] for record in own}),
            "groups": {name: _summary_of([r for r in own if r.get("groups") == name], batch_size) for name in names},
        }
    return summary


def _summary_of(records: Records, batch_size: int) -> dict[str, Any]:
    befores = sorted((r for r in records if r["kind"] == "before"), key=lambda record: record["seed"])
    floor, about = befores[0]["floor"], befores[0]
    batches = len(befores[0]["measured"]["held out"])
    result: dict[str, Any] = {"floor": floor, "batches": batches, "objectives": {}, "failed": {}}
    result["before"] = {where: _at(befores, where, floor, about, batch_size) for where in befores[0]["measured"]}
    for objective in dict.fromkeys(record["objective"] for record in records if record["kind"] == "after"):
        ended = {r["seed"]: r for r in records if r.get("objective") == objective}
        failures = {seed: message for seed, record in ended.items() if (message := failure(record))}
        if failures:
            result["failed"][objective] = {"searches": len(ended), "messages": [*failures.values()]}
        pairs = [(ended[b["seed"]], b) for b in befores if b["seed"] in ended.keys() - failures.keys()]
        if not pairs:
            continue
        result["objectives"][objective] = {
            where: _at([after for after, _ in pairs], where, floor, about, batch_size)
            | {
                f"{key}_change": estimate(
                    [
                        [
                            float(a[key]) - float(b[key])
                            for a, b in zip(*(r["measured"][where] for r in pair), strict=True)
                        ]
                        for pair in pairs
                    ]
                )
                for key in ("grad_cosine", "grad_norm")
            }
            for where in befores[0]["measured"]
        }
    return result


def failure(after: dict[str, Any]) -> str | None:
    """Why a search left nothing to compare, if it did not."""
    values = [value for rows in after.get("measured", {}).values() for row in rows for value in row.values()]
    if all(math.isfinite(float(value)) for value in values):
        return after.get("failed")
    return "What it left is not finite on one or more of the batches."


def _at(records: Records, where: str, floor: float, about: dict[str, Any], batch_size: int) -> dict[str, Any]:
    """Means over seeds and batches, what lies above the floor, and the signal ρ' that GC stands for."""
    values = {
        key: [[float(row[key]) for row in record["measured"][where]] for record in records]
        for key in ("grad_cosine", "grad_norm", "norm_ratio")
    }
    means = {key: mean_and_deviation([mean_and_deviation(v)[0] for v in own])[0] for key, own in values.items()}
    above = estimate([[value - floor for value in own] for own in values["grad_cosine"]])
    return means | {"above_floor": above, "signal": signal_of(means["grad_cosine"], groups_in(about, batch_size))}


def groups_in(about: dict[str, Any], batch_size: int) -> list[slice]:
    """The groups that a record tells of."""
    if about["splits"] == "examples":
        return [slice(k, k + 1) for k in range(batch_size)]
    return windows(batch_size, about["splits"], about["overlap"], rule=about["rule"])


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Two tables a network, narrow enough for 80 columns, and what may be concluded from them."""
    for network, result in summary["networks"].items():
        table = _table(f"{network}: held-out batches", "floor", "GC", "GC − floor", "ρ'", "GN", "κ")
        changes = _table("Change of GC by NIO", "held out", "fitted")
        for name, row in result["groups"].items():
            states = {"at the start": row["before"], **{f"after {own}": at for own, at in row["objectives"].items()}}
            for number, (state, places) in enumerate(states.items()):
                at = places["held out"]
                table.add_row(
                    "" if number else name,
                    state,
                    f"{row['floor']:.3f}",
                    f"{at['grad_cosine']:.3f}",
                    f"{at['above_floor']['mean']:+.3f}",
                    f"{at['signal']:.1e}",
                    f"{at['grad_norm']:.2f}",
                    f"{at['norm_ratio']:.1f}",
                )
                if number:
                    cells = (_number(places[where]["grad_cosine_change"], "seeds") for where in ("held out", "fitted"))
                    changes.add_row("" if number > 1 else name, state.removeprefix("after "), *cells)
        console.print(table)
        console.print(changes)
        console.print()
        for name, row in result["groups"].items():
            console.print(sentence(name, row), highlight=False)
            for objective, failed in row["failed"].items():
                said = f"{name}, {objective}: {len(failed['messages'])} of {failed['searches']} searches failed."
                said = " ".join([said, *dict.fromkeys(failed["messages"])])
                console.print(said, highlight=False, markup=False)
    seeds = max(result["seeds"] for result in summary["networks"].values())
    batches = max(row["batches"] for result in summary["networks"].values() for row in result["groups"].values())
    lost = any(row["failed"] for result in summary["networks"].values() for row in result["groups"].values())
    others = " After NIO: of the searches that did not fail." if lost else ""
    console.print(
        f"\nMeans over {batches} batches of {seeds} seed{'s' if seeds > 1 else ''}.{others} GC: mean cosine of two "
        "groups' gradients. floor: GC of orthogonal examples of one length. ρ': the signal that GC stands for, "
        "squared length of the mean gradient over the variance of an example's. GN: mean norm, κ: largest over "
        "smallest. Brackets: 95 % t-interval over seeds; it carries the words, or where they say so, the one over all "
        "batches. Each interval stands by itself: of twenty such words one may be wrong.",
        style="dim",
    )


def _table(title: str, *headings: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for heading in ("groups", ""):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


ABOVE = "above the floor", "below the floor", "not shown to differ from the floor"
CHANGE = "raised", "lowered", "not shown to change"


def sentence(name: str, row: dict[str, Any]) -> str:
    """What the numbers of one kind of groups say: no claim without an interval that carries it."""
    start, floor = row["before"]["held out"], row["floor"]
    share = (
        f" (the floor is {100 * floor / start['grad_cosine']:.0f} % of GC)" if start["above_floor"]["mean"] > 0 else ""
    )
    said = f"{name}{share if floor else ''}: at the start {_verdict(start['above_floor'], *ABOVE)}."
    for objective, places in row["objectives"].items():
        held_out, fitted = (_verdict(places[where]["grad_cosine_change"], *CHANGE) for where in ("held out", "fitted"))
        end = _verdict(places["held out"]["above_floor"], *ABOVE)
        norm = _verdict(places["held out"]["grad_norm_change"], *CHANGE)
        said += f" After {objective}: held out {held_out}, {end}; fitted {fitted}; GN {norm}."
    return said


def _number(value: dict[str, Any], over: str) -> str:
    """`+0.0116 [-0.0342, +0.0574]`; no interval where there is none."""
    low, high = value[over]
    return f"{value['mean']:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if math.isfinite(low) else "")


def _verdict(value: dict[str, Any], higher: str, lower: str, neither: str) -> str:
    for over, scope in (("seeds", ""), ("batches", " (in these seeds)")):
        low, high = value[over]
        if low > 0 or high < 0:
            return (higher if low > 0 else lower) + scope
    return neither


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """A row a network: GC and GN against iteration, and GC at initialisation against D and r by both window rules."""
    networks = list(summary["networks"])
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(17, 4.2 * len(networks)), layout="constrained")
        axes = figure.subplots(len(networks), 4, squeeze=False)
        for row, network in zip(axes, networks, strict=True):
            own = [record for record in records if record["network"] == network]
            floors = {name: entry["floor"] for name, entry in summary["networks"][network]["groups"].items()}
            draw_search(row[0], own, "grad_cosine", floors)
            draw_search(row[1], own, "grad_norm", {})
            row[0].set(ylabel="GradCosine of the iteration's batch (dashed: floor)")
            row[0].set_title(f"{network}: GradCosine during NIO", loc="left")
            row[1].set(ylabel="mean gradient norm")
            row[1].set_title("Gradient norm during NIO", loc="left")
            _legend(row[1], own)
            for panel, rule in zip(row[2:], ("intended", "released"), strict=True):
                draw_grid(panel, own, rule)
            row[3].sharey(row[2])
        seeds = max(entry["seeds"] for entry in summary["networks"].values())
        figure.suptitle(
            f"NIO and the floor of GradCosine, mean over {seeds} seed{'s' if seeds > 1 else ''}. "
            f"{summary['data']}\n{summary['device']}",
            fontsize=9,
        )
        save_png(figure, path, dpi=120)


def draw_search(axes: Axes, records: Records, key: str, floors: dict[str, float]) -> None:
    """Mean over seeds against iteration: a colour for the groups, a line for the objective."""
    for name, colour in COLOURS.items():
        for objective, line in LINES.items():
            histories = [
                r["history"]
                for r in records
                if r["kind"] == "after" and r["groups"] == name and r["objective"] == objective and "history" in r
            ]
            if histories:
                means = [
                    mean_and_deviation([float(entry[key]) for entry in step])[0]
                    for step in zip(*histories, strict=True)
                ]
                axes.plot(range(1, len(means) + 1), means, color=colour, linestyle=line, linewidth=1.3)
        if name in floors:
            axes.axhline(floors[name], color=colour, linestyle="--", linewidth=0.9)
    axes.set(xlabel="NIO iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _legend(axes: Axes, records: Records) -> None:
    names = dict.fromkeys(r["groups"] for r in records if r["kind"] == "after")
    objectives = dict.fromkeys(r["objective"] for r in records if r["kind"] == "after")
    handles = [Line2D([], [], color=COLOURS[name], label=name) for name in names]
    handles += [Line2D([], [], color="0.3", linestyle=LINES[objective], label=objective) for objective in objectives]
    axes.legend(handles=handles, frameon=False, fontsize=7)


def draw_grid(axes: Axes, records: Records, rule: str) -> None:
    """GC of fresh networks against r, a colour for D, its floor dashed; and of single examples."""
    grids = [record["cells"] for record in records if record["kind"] == "grid"]
    columns = list(zip(*grids, strict=True))
    means = [
        cells[0]
        | {"mean": mean_and_deviation([mean_and_deviation([*map(float, c["grad_cosine"])])[0] for c in cells])[0]}
        for cells in columns
    ]
    splits = dict.fromkeys(cell["splits"] for cell in means if cell["rule"] == rule and cell["splits"] != "examples")
    for number, D in enumerate(splits):
        points = [cell for cell in means if cell["splits"] == D and cell["rule"] == rule]
        r = [cell["overlap"] for cell in points]
        axes.plot(r, [c["mean"] for c in points], color=f"C{number}", marker="o", markersize=4, label=f"D = {D}")
        axes.plot(r, [c["floor"] for c in points], color=f"C{number}", linestyle="--", linewidth=1)
    for cell in means:
        if cell["splits"] == "examples":
            axes.axhline(cell["mean"], color=COLOURS["examples"], linewidth=1.3, label="examples (floor 0)")
    axes.set(xlabel="overlap r", ylabel="GradCosine (dashed: floor)", ylim=(min(0.0, axes.get_ylim()[0]), None))
    axes.set_title(f"At initialisation, {rule} windows", loc="left")
    axes.legend(frameon=False, fontsize=7)
