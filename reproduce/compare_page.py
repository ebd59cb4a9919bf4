"""Page and CSV of `reproduce.compare`, from its records alone."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from reproduce.compare_figures import (
    LAYER_QUANTITIES,
    ByPlace,
    at_the_end,
    curve_of,
    draw_by_place,
    draw_curves,
    draw_ends,
    draw_learning_rates,
    limits_of,
    names_of,
    values_by_place,
)
from reproduce.compare_report import (
    BETTER,
    Metric,
    Records,
    Summary,
    conclude,
    diverged_text,
    failures,
    how_chosen,
    how_sure,
    interval_text,
    marked,
    mean_text,
    metric_of,
    number,
    refusals,
    rounded,
    shortened,
    steps_text,
    unpaired,
)
from reproduce.page import (
    Cell,
    Code,
    Column,
    Part,
    Picture,
    Prose,
    Section,
    Table,
    footer_of,
    svg_of,
    write_csv,
    write_page,
)

CSV_COLUMNS = (
    "table", "arm", "against", "seed", "learning_rate", "epoch", "updates", "name", "quantity", "value"
)  # fmt: skip
QUANTITY_HELP = {
    "Scale": "What the arm multiplied each tensor by: new norm over old norm.",
    "Activation scale": "Standard deviation of what each layer gives out, after the initialisation.",
    "Gradient norm": "Norm of the loss's gradient with respect to each layer's weights, after the initialisation.",
    "Weight norm": "Norm of each layer's weights, after the initialisation.",
}
SEEDS_FOR_QUARTERS = 4
"""Of fewer seeds, the interquartile mean is the mean."""
ARROWS = " An arrow points to results beyond the axis; a number beside it is their mean."


def write_report(
    folder: Path,
    records: Records,
    summary: Summary,
    *,
    command: str,
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> Path:
    """Write `page.html` and `results.csv` into the run's folder, and return the page's path.

    Args:
        folder: Of the run.
        records: Of the run.
        summary: From `summarise`.
        command: What was typed, to be shown and typed again.
        config: Of the run; `model` and `data` stand in the title.
        environment: As in `environment.json`: data identity, device, versions.

    Verdicts stand beside what they must not be read without: arms that were not trained are marked wherever they are.
    """
    sections = [
        Section("Result", list(_result_parts(summary))),
        Section("Training", list(_training_parts(records, summary))),
        Section("What the initialisations did", list(_layer_parts(records, summary))),
        Section("Cost", [_cost_table(summary)]),
        Section("Refused", list(_refused_parts(summary))),
        Section("Failed", list(_failed_parts(summary))),
        Section("How to repeat this", list(_method_parts(summary, command, config, environment))),
    ]
    path = folder / "page.html"
    write_page(
        path,
        title=f"Initialisations of {config['model']} on {config['data']}",
        lead=" ".join([conclude(summary), *unpaired(summary)]),
        sections=[section for section in sections if section.parts],
        footer=footer_of(environment),
    )
    write_csv(folder / "results.csv", CSV_COLUMNS, list(_csv_rows(records, summary)))
    return path


# ---------------------------------------------------------------------------------------------- the result
def _result_parts(summary: Summary) -> Iterator[Part]:
    metric = metric_of(summary["metric"])
    yield _headline_table(summary, metric)
    yield Prose(f"{how_sure(summary)}\n\n{how_chosen(summary)}")
    drawn = [arm for arm, row in summary["arms"].items() if row["mean"] is not None]
    if drawn:
        yield Picture(
            svg_of(partial(draw_ends, summary, drawn)),
            f"{metric.label} at the end, by arm. "
            + "; ".join(f"{marked(summary, arm)} {metric.text(summary['arms'][arm]['mean'])}" for arm in drawn),
            "Mean over seeds with its interval; a small dot is one seed. The dotted line is the reference's mean."
            + (ARROWS if limits_of(summary, drawn) else ""),
        )
    if len(summary["learning_rates"]) > 1 and drawn:
        yield Picture(
            svg_of(partial(draw_learning_rates, summary)),
            f"{metric.label} at the end against the learning rate, one line an arm; the table below has the numbers.",
            "Mean over seeds at each learning rate; the large mark is the one chosen.",
        )
        yield _rate_table(summary, metric)
    if drawn and len(summary["seeds"]) >= SEEDS_FOR_QUARTERS:
        yield _mean_table(summary, metric)


def _headline_table(summary: Summary, metric: Metric) -> Table:
    reference, seeds = summary["reference"], len(summary["seeds"])
    unit = "percentage points" if metric.is_share else metric.title
    columns = [
        Column("arm", help="The initialisation."),
        Column("mean", True, f"{metric.label}, at the last evaluation, mean over seeds."),
        Column("95 %", True, "Interval of the mean: bootstrap over seeds."),
        Column(
            f"against {marked(summary, reference)}",
            help="Better or worse only where both intervals of the difference leave out 0.",
        ),
        Column("difference", True, f"Arm minus {reference}, {unit}: mean over the seeds that both were run with."),
        Column(
            "95 %, bootstrap", True, "Interval of the difference: bootstrap over the seeds that both were run with."
        ),
        Column("95 %, Student", True, "Interval of the difference: Student's t, wider with few seeds."),
        Column("rate", True, "The learning rate chosen for this arm."),
        *_ending_columns(summary["arms"].values()),
        Column("cost", True, "Of the initialisation, in training updates of the same time."),
    ]
    comparisons = {comparison["arm"]: comparison for comparison in summary["comparisons"]}
    rows = []
    for arm, row in summary["arms"].items():
        found = comparisons.get(arm, {"verdict": "reference"})
        is_better = found["verdict"] == BETTER
        rows.append(
            [
                Cell(marked(summary, arm), arm),
                Cell(mean_text(row, metric), number(row["mean"]), emphasis=is_better),
                _interval_cell(row["low"], row["high"], metric.text),
                Cell(found["verdict"], emphasis=is_better),
                _cell(found.get("difference"), metric.signed),
                _interval_cell(found.get("low"), found.get("high"), metric.signed),
                _interval_cell(found.get("t_low"), found.get("t_high"), metric.signed),
                row["learning_rate"],
                *_ending_cells(row, summary["arms"].values()),
                _cell(row["initialisation"]["updates"], rounded),
            ]
        )
    order = "Higher" if metric.higher_is_better else "Lower"
    said = [f"{order} is better; {seeds} {'seed' if seeds == 1 else 'seeds'}."]
    said += [] if _ending_columns(summary["arms"].values()) else ["No run at these rates diverged or failed."]
    caption = " ".join([*said, shortened(summary)]).strip()
    return Table(at_the_end(metric), columns, rows, caption)


def _rate_table(summary: Summary, metric: Metric) -> Table:
    names = ("learning rate", "mean", "95 % interval")
    points = [point for row in summary["arms"].values() for point in row["grid"]]
    numbers = [*(Column(name, is_number=True) for name in names), *_ending_columns(points)]
    columns = [Column("arm"), *numbers, Column("chosen")]
    rows = [
        [
            marked(summary, arm),
            point["learning_rate"],
            Cell(mean_text(point, metric), number(point["mean"])),
            _interval_cell(point["low"], point["high"], metric.text),
            *_ending_cells(point, points),
            "chosen" if point["learning_rate"] == row["learning_rate"] else "",
        ]
        for arm, row in summary["arms"].items()
        for point in row["grid"]
    ]
    return Table("Every learning rate", columns, rows, f"{metric.label.capitalize()} at the end.", is_folded=True)


def _mean_table(summary: Summary, metric: Metric) -> Table:
    """The mean and what is left of it without the quarters at both ends."""
    about = "Without the lowest and the highest quarter of the seeds, so that one odd seed does not decide."
    shown = {"mean": ("mean", "low", "high", ""), "interquartile mean": ("iqm", "iqm_low", "iqm_high", about)}
    columns = [Column("arm")]
    for name, (*_, about) in shown.items():
        columns += [Column(name, True, about), Column(f"95 %, {name}", True, "Bootstrap over seeds.")]
    rows: list[list[Cell | str | float | None]] = []
    for arm, row in summary["arms"].items():
        cells: list[Cell] = []
        for key, low, high, _ in shown.values():
            cells += [_cell(row[key], metric.text), _interval_cell(row[low], row[high], metric.text)]
        rows.append([marked(summary, arm), *cells])
    caption = f"{metric.label.capitalize()} at the end."
    return Table("Every arm's mean, and that without odd seeds", columns, rows, caption, is_folded=True)


def _cell(value: float | None, text: Callable[[float | None], str]) -> Cell:
    return Cell(text(value), number(value))


def _interval_cell(low: float | None, high: float | None, text: Callable[[float | None], str]) -> Cell:
    return Cell(interval_text(low, high, text), number(low))


def _diverged_cell(row: Mapping[str, Any]) -> Cell:
    return Cell(diverged_text(row), row["diverged"] / len(row["seeds"]) if row["seeds"] else math.nan)


def _ending_columns(shown: Iterable[Mapping[str, Any]]) -> list[Column]:
    """How runs ended that gave no number: two columns, or none where none did."""
    if not any(row["diverged"] or row["failed"] for row in shown):
        return []
    return [
        Column("diverged", True, "Of the runs at that learning rate."),
        Column("failed", True, "Of the runs at that learning rate: ended with an error."),
    ]


def _ending_cells(row: Mapping[str, Any], shown: Iterable[Mapping[str, Any]]) -> list[Cell]:
    failed = Cell(f"{row['failed']} of {len(row['seeds'])}" if row["seeds"] else "–", row["failed"])
    return [_diverged_cell(row), failed] if _ending_columns(shown) else []


# ---------------------------------------------------------------------------------------------- training
def _training_parts(records: Records, summary: Summary) -> Iterator[Part]:
    runs = {arm: _chosen_runs(records, arm, row) for arm, row in summary["arms"].items()}
    if not any(runs.values()):
        return
    for name in ("test_accuracy", "test_loss", "train_loss"):
        curves = {arm: curve_of(own, name) for arm, own in runs.items()}
        ends = {arm: curve["mean"][-1] for arm, curve in curves.items() if curve["mean"]}
        if ends:
            metric = metric_of(name)
            said = "; ".join(f"{arm} ends at {metric.text(value)}" for arm, value in ends.items())
            yield Picture(
                svg_of(partial(draw_curves, metric, curves)),
                f"{metric.label} against training updates, one line an arm: {said}.",
                f"{metric.title.capitalize()} against updates: mean over seeds; the band is the range of the seeds.",
            )
    yield Prose(
        "Every arm pays for its initialisation: its curve is moved to the right by what that cost, in training updates "
        "of the same time; a tick on the axis shows where its training begins. Where a run's number is no longer "
        "finite, the curve of its arm ends. Each arm is shown at its chosen learning rate."
    )


def _chosen_runs(records: Records, arm: str, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        record
        for record in records
        if record["kind"] == "training" and record["arm"] == arm and record["learning_rate"] == row["learning_rate"]
    ]


# ---------------------------------------------------------------------------------------------- initialisations
def _layer_parts(records: Records, summary: Summary) -> Iterator[Part]:
    """Pictures first, from input to output; the numbers behind them after."""
    shown = values_by_place(records, list(summary["arms"]))
    for title, (place, values) in shown.items():
        arms = ", ".join(arm for arm, own in values.items() if own)
        yield Picture(
            svg_of(partial(draw_by_place, values, place, title)),
            f"{title} of each {place}, from input to output, one line an arm: {arms}. The table has the numbers.",
            f"{QUANTITY_HELP[title]} Geometric mean over seeds; zeros are in the table only.",
        )
    for title, (place, values) in shown.items():
        yield _place_table(values, place, title)
    made = [record for record in records if record["kind"] == "initialisation" and record["error"] is None]
    if left := {(record["arm"], *item) for record in made for item in record["skipped"].items()}:
        columns = [Column("arm"), Column("tensor"), Column("reason")]
        yield Table("Tensors left as they were", columns, [list(row) for row in sorted(left)], is_folded=True)
    if unmeasured := {(record["arm"], record["layers_error"]) for record in made if "layers_error" in record}:
        rows = [list(row) for row in sorted(unmeasured)]
        yield Table("Layers that could not be measured", [Column("arm"), Column("message")], rows)


def _place_table(values: ByPlace, place: str, title: str) -> Table:
    arms = [arm for arm, own in values.items() if own]
    columns = [Column(place), Column("place", True), *(Column(arm, is_number=True) for arm in arms)]
    rows = [[name, i, *(values[arm].get(name) for arm in arms)] for i, name in enumerate(names_of(values), start=1)]
    return Table(f"{title} of each {place}", columns, rows, QUANTITY_HELP[title], is_folded=True)


def _cost_table(summary: Summary) -> Table:
    columns = [
        Column("arm"),
        Column("steps", True, "Of a learned method: made, and published. Fewer where more do not fit the budget."),
        Column("initialisation, s", True, "Mean over seeds, as measured."),
        Column("initialisation, updates", True, "The same, in training updates of the same time."),
        Column("training, updates", True, "At the chosen learning rate, mean over seeds."),
        Column("training, s", True, "Mean over seeds."),
        Column("initialisation, %", True, "Of the seconds of both together."),
    ]
    rows = []
    for arm, row in summary["arms"].items():
        start, training = row["initialisation"], row["training"]
        before, after = start["seconds"], training["seconds"]
        share = None if before is None or not after else 100 * before / (before + after)
        updates = (_cell(start["updates"], rounded), _cell(training["updates"], rounded))
        steps = Cell(steps_text(row), number(row["steps"] and row["steps"]["made"]))
        rows.append([arm, steps, before, *updates, after, _cell(share, rounded)])
    return Table("What each arm took", columns, rows)


def _refused_parts(summary: Summary) -> Iterator[Part]:
    if rows := [[arm, seeds, message] for arm, message, seeds in refusals(summary)]:
        columns = [Column("arm"), Column("seeds"), Column("message")]
        yield Table("What these initialisers said", columns, rows)


def _failed_parts(summary: Summary) -> Iterator[Part]:
    if rows := [[arm, trainings, message] for arm, message, trainings in failures(summary)]:
        columns = [Column("arm"), Column("trainings"), Column("message")]
        yield Table("What ended these trainings", columns, rows)


# ---------------------------------------------------------------------------------------------- the run
def _method_parts(
    summary: Summary, command: str, config: Mapping[str, Any], environment: Mapping[str, Any]
) -> Iterator[Part]:
    yield Code(command)
    fixed = (
        "A seed fixes the network's own initialisation, the batches that an initialiser sees and the order of "
        "training, for every arm alike: this is what makes differences paired."
        if summary["paired"]
        else "A seed fixes the network's own initialisation, for every arm alike, and nothing else."
    )
    said = " ".join([f"Seeds {', '.join(map(str, summary['seeds']))}. {fixed}", *unpaired(summary)])
    yield Prose(
        f"Model: {summary['model']}.\n\nData: {environment['data']['identity']}\n\n{said} Every number of this page is "
        "in results.csv, beside it, or follows from those."
    )
    yield Code(json.dumps(config, indent=2, default=str))


def _csv_rows(records: Records, summary: Summary) -> Iterator[list[str | float | None]]:
    """Long form: one number a row, with the keys it belongs to."""

    def row(table: str, quantity: str, value: Any, **keys: Any) -> list[Any]:
        return [*({"table": table, "quantity": quantity, "value": value, **keys}.get(c) for c in CSV_COLUMNS)]

    statistics = ("mean", "low", "high", "iqm", "iqm_low", "iqm_high", "diverged", "failed", "untrained")
    for arm, own in summary["arms"].items():
        for key in statistics:
            yield row("result", key, own[key], arm=arm, learning_rate=own["learning_rate"])
        for part in ("initialisation", "training"):
            for key, value in own[part].items():
                yield row(f"cost of {part}", key, value, arm=arm, learning_rate=own["learning_rate"])
        for point in own["grid"]:
            for key in statistics:
                yield row("learning rate", key, point[key], arm=arm, learning_rate=point["learning_rate"])
    for comparison in summary["comparisons"]:
        for key in ("difference", "low", "high", "t_low", "t_high", "pairs", "verdict"):
            yield row("difference", key, comparison[key], arm=comparison["arm"], against=comparison["against"])
    for record in records:
        keys = {"arm": record["arm"], "seed": record["seed"]}
        if record["kind"] == "training":
            keys["learning_rate"] = record["learning_rate"]
            for key in ("diverged", "updates", "charged_updates", "seconds", "error"):
                yield row("run", key, record.get(key), **keys)
            for entry in record["history"]:
                at = {key: entry[key] for key in ("epoch", "updates")}
                for key in (key for key in entry if key not in at):
                    yield row("history", key, entry[key], **keys, **at)
        else:
            for key in ("seconds", "updates", "error", "steps", "published_steps"):
                yield row("initialisation", key, record.get(key), **keys)
            for name, value in record["scales"].items():
                yield row("scale", "new norm over old", value, name=name, **keys)
            for layer in record["layers"]:
                for key in LAYER_QUANTITIES:
                    yield row("layer", key, layer[key], name=layer["name"], **keys)
