"""Table, sentences and figure of `reproduce.nio_vit`, from its records alone."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from rich.console import Console
from rich.table import Table

from reproduce.figures import is_number, log_scale, save_png
from reproduce.statistics import compare, conclude, mean_and_deviation, percent

Records = Sequence[dict[str, Any]]

COLOURS = {
    "default": "#1f77b4",
    "NIO": "#d62728",
    "default, warm-up": "#e377c2",
    "default, longer": "#17becf",
}
PARTS = {
    "norm": ("#d62728", "^"),
    "attention, in": ("#1f77b4", "o"),
    "attention, out": ("#17becf", "s"),
    "attention, positions": ("#8c564b", "v"),
    "MLP, in": ("#2ca02c", "D"),
    "MLP, out": ("#bcbd22", "d"),
    "merging": ("#9467bd", "P"),
    "embedding": ("black", "*"),
    "head": ("#ff7f0e", "X"),
    "bias": ("0.6", "x"),
}
"""What a tensor is, with its mark in the figure; `part_of` tells by the name."""

AGAINST = ("default", "default, longer", "default, warm-up")
"""What NIO is compared with, each arm at its own best learning rate."""


def part_of(name: str) -> str:
    """Of a tensor of torchvision's Swin or ViT.

    Example:
        >>> part_of("features.1.0.attn.qkv.weight")
        'attention, in'
    """
    own = name.rpartition(".")[2]
    if own == "relative_position_bias_table":
        return "attention, positions"
    if own in ("class_token", "pos_embedding"):
        return "embedding"
    if own == "bias" or own.endswith("_bias"):
        return "bias"
    patterns = {
        r"(norm\d?|features\.0\.2|ln(_\d)?)\.weight$": "norm",
        r"(qkv\.weight|in_proj_weight)$": "attention, in",
        r"(attn\.proj|out_proj)\.weight$": "attention, out",
        r"mlp\.0\.weight$": "MLP, in",
        r"mlp\.3\.weight$": "MLP, out",
        r"reduction\.weight$": "merging",
        r"(features\.0\.0|conv_proj)\.weight$": "embedding",
        r"head\.weight$": "head",
    }
    return next(part for pattern, part in patterns.items() if re.search(pattern, name))


def layer_of(name: str) -> str:
    """Of a tensor of torchvision's Swin ("2.1" is the second stage's first block) or ViT.

    Example:
        >>> layer_of("features.3.0.attn.qkv.weight"), layer_of("encoder.layers.encoder_layer_0.ln_1.bias")
        ('2.1', '1')
    """
    if block := re.match(r"encoder\.layers\.encoder_layer_(\d+)", name):
        return str(int(block[1]) + 1)
    if re.match(r"features\.0|conv_proj|class_token|encoder\.pos_embedding", name):
        return "patches"
    if re.match(r"features\.\d*[02468]\.", name):
        return f"merge {int(name.split('.')[1]) // 2}"
    if block := re.match(r"features\.(\d+)\.(\d+)", name):
        return f"{(int(block[1]) + 1) // 2}.{int(block[2]) + 1}"
    return "head" if "head" in name else "norm"


# ---------------------------------------------------------------------------------------------- numbers
def best_learning_rate(trained: Records) -> float:
    """Highest accuracy on held-out images at the end, mean over seeds, of the rates that most seeds were run at."""
    rates = sorted({record["learning_rate"] for record in trained})
    own = {rate: [r["validation_accuracy"] for r in trained if r["learning_rate"] == rate] for rate in rates}
    most = max(map(len, own.values()))
    return max((rate for rate in rates if len(own[rate]) == most), key=lambda rate: mean_and_deviation(own[rate])[0])


def summarise(records: Records, arms: Sequence[str]) -> dict[str, Any]:
    """For each arm the grid; NIO against the default at every rate, and against all at the best; what NIO did."""
    rows = {arm: _row([record for record in records if record["arm"] == arm]) for arm in arms}
    rates = sorted({point["learning_rate"] for row in rows.values() for point in row["grid"]})
    at_rates = [
        compare("NIO", "default", _at(rows["NIO"], rate), _at(rows["default"], rate)) | {"learning_rate": rate}
        for rate in rates
    ]
    at_best = [
        compare("NIO", other, _at(rows["NIO"], rows["NIO"]["best"]), _at(rows[other], rows[other]["best"]))
        for other in AGAINST
    ]
    control = compare(
        "default, warm-up", "default", *(_at(rows[arm], rows[arm]["best"]) for arm in ("default, warm-up", "default"))
    )
    starts = [r for r in records if r["kind"] == "initialisation" and "after" in r]
    searches = [
        {
            key: record[key] for key in ("seed", "gamma", "seconds", "updates_worth")
        } | {
            "constraint_share": mean_and_deviation([entry["constraint"] for entry in record["history"]])[0],
            "floor": record["history"][0]["floor"],
            "ends": {
                key: (record["before"][key], record["after"][key])
                for key in ("grad_cosine", "grad_norm", "norm_ratio", "grad_variance")
            },
        }
        for record in starts
    ]  # fmt: skip
    return {"arms": rows, "at_rates": at_rates, "at_best": [*at_best, control], "searches": searches}


def _row(records: Records) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    trained = [record for record in records if record["kind"] == "training"]
    grid = []
    for rate in sorted({record["learning_rate"] for record in trained}):
        own = sorted((r for r in trained if r["learning_rate"] == rate), key=lambda record: record["seed"])
        kept = ("seed", "final_accuracy", "best_accuracy", "validation_accuracy", "train_loss", "failed_run")
        grid.append({"learning_rate": rate, **{key: [record[key] for record in own] for key in kept}})
    return {
        "failed": [record["failed"] for record in starts if "failed" in record],
        "grid": grid,
        "best": best_learning_rate(trained) if trained else None,
        "failed_runs": sum(record["failed_run"] for record in trained),
        "diverged": sum(record["diverged"] for record in trained),
        "trainings": len(trained),
        "updates": max((record["updates"] for record in trained), default=None),  # fewer where a run diverged
        "initialisation_seconds": mean_and_deviation([r["seconds"] for r in starts])[0] if starts else None,
        "training_seconds": mean_and_deviation([r["seconds"] for r in trained])[0] if trained else None,
    }


def _at(row: dict[str, Any], rate: float | None) -> dict[int, float]:
    """Test accuracy at a learning rate, by seed."""
    return next(
        (
            dict(zip(point["seed"], point["final_accuracy"], strict=True))
            for point in row["grid"]
            if point["learning_rate"] == rate
        ),
        {},
    )


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: dict[str, Any]) -> None:
    """One table, narrow enough for 80 columns, and what may be concluded from it."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    rows = summary["arms"]
    table = Table(title="\nTest accuracy, %", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("peak lr", no_wrap=True)
    for arm in rows:
        table.add_column(arm, justify="right", no_wrap=True)
    for point in summary["at_rates"]:
        rate = point["learning_rate"]
        table.add_row(f"{rate:g}", *(_cell(row, rate) for row in rows.values()))
    table.add_row("failed", *(f"{row['failed_runs']} of {row['trainings']}" for row in rows.values()))
    table.add_row("updates", *("" if row["updates"] is None else f"{row['updates']:,}" for row in rows.values()))
    table.add_row("init s", *(_seconds(row["initialisation_seconds"]) for row in rows.values()))
    table.add_row("train s", *(_seconds(row["training_seconds"]) for row in rows.values()))
    console.print(table)
    console.print()
    say("At the same learning rate, final test accuracy:")
    for comparison in summary["at_rates"]:
        say(f"  {comparison['learning_rate']:g}: {conclude(comparison)}")
    say("Each arm at its best learning rate (*), chosen on held-out training images:")
    for comparison in summary["at_best"]:
        say(f"  {conclude(comparison)}")
    if summary["searches"]:
        say(what_nio_did(summary["searches"]))
    for arm, row in rows.items():
        rates = [point["learning_rate"] for point in row["grid"]]
        if len(rates) > 1 and row["best"] in (rates[0], rates[-1]):
            say(f"{arm}: best at an edge of the grid, and maybe beyond it.")
        if row["trainings"] and row["failed_runs"] == row["trainings"]:
            say(f"{arm} failed at every learning rate of the grid.")
        for message in dict.fromkeys(row["failed"]):
            say(f"{arm}: the initialisation failed. {message}")
    console.print(
        f"\n± is the standard deviation over seeds, no ± a single seed. ×n: n runs failed: ended not finite or "
        f"at {100 * summary['guessing']:.1f} % or less, three standard errors above guessing; their accuracies count. "
        "default, longer: with the updates added that NIO costs by arithmetic. The intervals are 95 % each, not "
        "corrected for their number. init, train: seconds on this machine.",
        style="dim",
        highlight=False,
    )


def _cell(row: dict[str, Any], rate: float) -> str:
    point = next((point for point in row["grid"] if point["learning_rate"] == rate), None)
    if point is None:
        return "failed" if row["failed"] else "–"
    failed = sum(point["failed_run"])
    return (
        percent(point["final_accuracy"])
        + (f" ×{failed}" if failed else "")
        + ("*" if rate == row["best"] else " ")
    )  # fmt: skip


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def what_nio_did(searches: Records) -> str:
    """One sentence; changes are of the same held-out images."""

    def mean(of: Callable[[dict[str, Any]], float]) -> float:
        return mean_and_deviation([of(search) for search in searches])[0]

    def ends(key: str) -> tuple[float, float]:
        return mean(lambda s: s["ends"][key][0]), mean(lambda s: s["ends"][key][1])

    (c0, c1), (n0, n1), (k0, k1) = (ends(key) for key in ("grad_cosine", "grad_norm", "norm_ratio"))
    bounds = [search["gamma"] for search in searches if search["gamma"] is not None]  # JSON has no infinity
    bound = f"bound {mean_and_deviation(bounds)[0]:.3g}" if bounds else "no bound"
    return (
        f"NIO, mean over {len(searches)} seed{'s' if len(searches) > 1 else ''}, gradients of single held-out images: "
        f"GradCosine {c0:.3f} → {c1:.3f} (floor 0), gradient norm {n0:.3g} → {n1:.3g} ("
        f"{bound}), largest over smallest norm {k0:.3g} → {k1:.3g}; "
        f"{100 * mean(lambda s: s['constraint_share']):.0f} % of the iterations on the constraint; arithmetic of "
        f"{mean(lambda s: s['updates_worth']):.0f} updates, which only 'default, longer' is given."
    )


# ---------------------------------------------------------------------------------------------- figure
def save_figure(path: Path, records: Records, summary: dict[str, Any]) -> None:
    """Six panels: two maps of learning rates; GradCosine and gradient norm while NIO works; scales; shares."""
    searches = [record for record in records if record["kind"] == "initialisation" and "after" in record]
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(16, 8.6), layout="constrained")
        axes = figure.subplots(2, 3)
        _draw_map(axes[0, 0], summary)
        _draw_losses(axes[1, 0], summary)
        if searches:
            _draw_cosine(axes[0, 1], searches)
            _draw_norm(axes[1, 1], searches)
            _draw_scales(axes[0, 2], searches[0])
            _draw_shares(axes[1, 2], searches[0])
        else:
            for empty in axes[:, 1:].flat:
                empty.set_axis_off()
        figure.suptitle(f"NIO, {summary['model']}. {summary['data']}\n{summary['device']}", fontsize=9)
        save_png(figure, path, dpi=120)


def _lines(axes: Axes, summary: dict[str, Any], values: Callable[[dict[str, Any]], list[float]]) -> None:
    """A line an arm over the learning rates: mean, range over seeds, a cross where a run failed."""
    arms = summary["arms"]
    for k, (arm, row) in enumerate(arms.items()):
        # side by side, so that arms at one learning rate do not hide one another
        nudge = 1 + 0.04 * (k - (len(arms) - 1) / 2)
        for point in row["grid"]:
            if not all(map(is_number, values(point))):  # it has no height
                at = point["learning_rate"] * nudge
                axes.plot(at, 0.99, "x", color=COLOURS[arm], markersize=7, transform=axes.get_xaxis_transform())
        points = [(point, [v for v in values(point) if is_number(v)]) for point in row["grid"]]
        points = [(point, own) for point, own in points if own]
        if not points:
            continue
        x = [point["learning_rate"] * nudge for point, _ in points]
        means = [mean_and_deviation(own)[0] for _, own in points]
        bold = arm == "NIO"
        axes.plot(
            x, means, "-" if bold else "--", color=COLOURS[arm], label=arm, linewidth=2 if bold else 1.4,
            marker="o", markersize=4,
        )  # fmt: skip
        axes.vlines(
            x, [min(own) for _, own in points], [max(own) for _, own in points], color=COLOURS[arm], linewidth=1
        )
        for at, (point, _) in zip(x, points, strict=True):
            lost = [v for v, failed in zip(values(point), point["failed_run"], strict=True) if failed and is_number(v)]
            axes.plot([at] * len(lost), lost, "x", color=COLOURS[arm], markersize=7, markeredgewidth=1.5)
    axes.set_xscale("log")
    axes.set_xticks(sorted({point["learning_rate"] for row in arms.values() for point in row["grid"]}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("peak learning rate")


def _draw_map(axes: Axes, summary: dict[str, Any]) -> None:
    _lines(axes, summary, lambda point: [100 * value for value in point["final_accuracy"]])
    axes.axhline(100 * summary["guessing"], color="0.7", linewidth=0.8, linestyle=":")
    axes.set(ylabel="final test accuracy, %", ylim=(0, None))
    axes.set_title("Learning rates: mean and range over seeds (×: failed, dotted: guessing)", loc="left", fontsize=8.5)
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 0.08))


def _draw_losses(axes: Axes, summary: dict[str, Any]) -> None:
    _lines(axes, summary, lambda point: point["train_loss"])
    axes.set(ylabel="training loss at the end, nats")
    axes.set_title("The same runs: training loss, with smoothing, over the last part", loc="left", fontsize=8.5)


def _draw_search(axes: Axes, searches: Records, key: str) -> None:
    """A quantity on NIO's own minibatches, a line a seed, and on the held-out images at both ends."""
    last = max(len(record["history"]) for record in searches)
    for k, record in enumerate(searches):
        steps = [entry["step"] for entry in record["history"]]
        axes.plot(
            steps, [entry[key] for entry in record["history"]], color="#d62728", alpha=0.9 if k == 0 else 0.35,
            linewidth=1.2, label="minibatches, before each step (a line a seed)" if k == 0 else None,
        )  # fmt: skip
        axes.plot(
            [0, last + 1], [record["before"][key], record["after"][key]], "D", color="black", markersize=4,
            clip_on=False, zorder=3, label="held-out images, before and after" if k == 0 else None,
        )  # fmt: skip
    axes.set(xlabel="NIO iteration", xlim=(0, last + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_cosine(axes: Axes, searches: Records) -> None:
    _draw_search(axes, searches, "grad_cosine")
    floor = searches[0]["history"][0]["floor"]
    axes.axhline(floor, color="0.4", linewidth=1, linestyle="--", label=f"floor, {floor:.2g}: shared images alone")
    low, high = axes.get_ylim()
    axes.set(ylabel="GradCosine", ylim=(low, high + 0.3 * (high - low)))  # room for the legend
    axes.set_title("Do gradients of images agree?", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_norm(axes: Axes, searches: Records) -> None:
    _draw_search(axes, searches, "grad_norm")
    highest = max(entry["grad_norm"] for record in searches for entry in record["history"])
    for k, record in enumerate(searches):
        if is_number(record["gamma"]) and record["gamma"] < 3 * highest:
            axes.axhline(
                record["gamma"],
                color="0.4",
                linewidth=0.8,
                linestyle="--",
                label="bound γ, a seed each" if k == 0 else None,
            )
    log_scale(axes, (1, 2, 3, 5))
    low, high = axes.get_ylim()
    axes.set(ylabel="mean gradient norm", ylim=(low, high * (high / low) ** 0.3))
    axes.set_title("Gradient norm", loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_scales(axes: Axes, record: dict[str, Any]) -> None:
    """m of every tensor that is not a bias, by what it is, layer after layer."""
    names = [name for name in record["scales"] if part_of(name) != "bias"]
    layers = list(dict.fromkeys(map(layer_of, names)))
    for part, (colour, marker) in PARTS.items():
        own = [name for name in names if part_of(name) == part]
        if own:
            x = [_within(names, name, layers) for name in own]
            y = [record["scales"][name] for name in own]
            axes.plot(x, y, marker, color=colour, markersize=5, linestyle="none", label=part)
    axes.axhline(1.0, color="0.6", linewidth=0.8)
    _layer_axis(axes, layers)
    axes.set_ylabel("scale m")
    axes.set_title("Scales (first seed)", loc="left")
    axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _within(names: Sequence[str], name: str, layers: Sequence[str]) -> float:
    """Where a tensor stands: its layer's place, and within it the order of the model."""
    own = [other for other in names if layer_of(other) == layer_of(name)]
    return layers.index(layer_of(name)) + 0.7 * ((own.index(name) + 0.5) / len(own) - 0.5)


def _draw_shares(axes: Axes, record: dict[str, Any]) -> None:
    """Each layer's share of the squared gradient, mean over held-out images, before and after."""
    shares: dict[str, dict[str, float]] = {}
    for when in ("before", "after"):
        shares[when] = {}
        for key, value in record[when].items():
            if key.startswith("share/"):
                layer = layer_of(key.removeprefix("share/"))
                shares[when][layer] = shares[when].get(layer, 0.0) + value
    layers = list(shares["before"])
    for k, (when, colour) in enumerate((("before", "0.7"), ("after", "#d62728"))):
        heights = [100 * shares[when][layer] for layer in layers]
        axes.bar([i + 0.4 * (k - 0.5) for i in range(len(layers))], heights, 0.4, color=colour, label=f"{when} NIO")
    _layer_axis(axes, layers)
    axes.set_ylabel("share of the squared gradient, %")
    axes.set_title("Where the gradient is (held-out images, first seed)", loc="left")
    axes.legend(frameon=False, fontsize=8)


def _layer_axis(axes: Axes, layers: Sequence[str]) -> None:
    axes.set_xticks(range(len(layers)), layers, rotation=45 if len(layers) > 8 else 0)
    axes.set(xlabel="layer, from input to output", xlim=(-0.6, len(layers) - 0.4))
