"""Numbers, sentences and the table on the screen of `reproduce.compare`, from its records alone."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy import stats

from reproduce.statistics import paired_interval

Records = Sequence[dict[str, Any]]
Summary = dict[str, Any]
Interval = tuple[float, float]

CONFIDENCE = 0.95
RESAMPLES = 9999
BETTER, WORSE, UNDECIDED = "better", "worse", "no difference shown"
ONE_SEED, NO_SPREAD = "one seed: no claim", "equal in all seeds: no claim"
FAILED, DIVERGED, NO_RUN = "failed: no claim", "diverged: no claim", "no run"

FALSE_CLAIMS = {"normal": 5, "exponential": 12}
"""Percent of arms that do not differ, and yet are called better or worse, by how differences are distributed.

Simulated, for 2 to 20 seeds: the most of these. The bootstrap alone would make it 50 with 2 seeds and 25 with 3.
"""


@dataclass(frozen=True)
class Metric:
    """How a number of the records is read and written.

    Attributes:
        name: Its key.
        title: For people, without a unit.
        higher_is_better: Of accuracies; not of losses.
        is_share: Written in percent.
    """

    name: str
    title: str
    higher_is_better: bool
    is_share: bool

    @property
    def label(self) -> str:
        return f"{self.title}, %" if self.is_share else self.title

    def text(self, value: float | None) -> str:
        if value is None:
            return "–"
        return f"{100 * value:.1f}" if self.is_share else f"{value:#.4g}".rstrip(".")

    def signed(self, value: float | None) -> str:
        if value is None:
            return "–"
        if self.is_share:
            return f"{100 * value:+.1f}"
        return f"{value:+.0f}" if abs(value) >= 99 else f"{value:+#.2g}".rstrip(".")

    def drawn(self, value: float) -> float:
        return 100 * value if self.is_share else value


def metric_of(name: str) -> Metric:
    """Accuracies are better the higher they are, everything else the lower."""
    is_accuracy = name.endswith("accuracy")
    return Metric(name, name.replace("_", " "), higher_is_better=is_accuracy, is_share=is_accuracy)


# ---------------------------------------------------------------------------------------------- statistics
def interquartile_mean(values: Any, axis: int = 0) -> Any:
    """The mean of what is left without the lowest and the highest quarter; of fewer than four values, their mean."""
    return stats.trim_mean(values, 0.25, axis=axis)


def bootstrap_interval(values: Sequence[float], statistic: Callable[..., Any] = np.mean) -> Interval:
    """Percentile bootstrap over seeds, of two finite values or more; always with the same resamples."""
    interval = stats.bootstrap(
        (list(values),), statistic, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile",
        vectorized=True, rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return float(interval.low), float(interval.high)


def verdict(bootstrap: Interval, student: Interval, *, higher_is_better: bool) -> str:
    """Of two intervals for arm − reference: a claim only where both leave out zero."""
    if any(low <= 0 <= high for low, high in (bootstrap, student)):
        return UNDECIDED
    return BETTER if (bootstrap[0] > 0) == higher_is_better else WORSE


def compare_arms(
    arm: str,
    other: str,
    after: Mapping[int, float],
    before: Mapping[int, float],
    *,
    failed: Collection[int] = (),
    higher_is_better: bool,
) -> dict[str, Any]:
    """One arm minus another, over the seeds both have: mean difference, both intervals, and what they show.

    Args:
        arm: Whose value is `after`.
        other: Whose value is `before`.
        after: By seed.
        before: By seed.
        failed: Seeds at which a training of either ended with an error: no result is not a bad one, nor left out.
        higher_is_better: Of the metric.
    """
    seeds = sorted(after.keys() & before.keys())
    # rounded, so that differences of shares that are equal are equal in floating point too
    differences = [round(after[seed] - before[seed], 12) for seed in seeds]
    nothing = {"difference": None, "low": None, "high": None, "t_low": None, "t_high": None}
    found: dict[str, Any] = {"arm": arm, "against": other, "pairs": len(seeds), **nothing}
    if not seeds:
        return found | {"verdict": NO_RUN}
    if not set(seeds).isdisjoint(failed):
        return found | {"verdict": FAILED}
    if not all(map(math.isfinite, differences)):
        return found | {"verdict": DIVERGED}
    found["difference"] = float(np.mean(differences))
    if len(seeds) < 2:
        return found | {"verdict": ONE_SEED}
    bootstrap = found["low"], found["high"] = bootstrap_interval(differences)
    student = found["t_low"], found["t_high"] = paired_interval(differences, [0.0] * len(seeds))
    if differences[0] != 0 and np.ptp(differences) == 0:  # on few test examples; of no spread, nothing is known
        return found | {"t_low": None, "t_high": None, "verdict": NO_SPREAD}
    return found | {"verdict": verdict(bootstrap, student, higher_is_better=higher_is_better)}


# ---------------------------------------------------------------------------------------------- numbers
def summarise(
    records: Records,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    learning_rates: Sequence[float],
    reference: str,
    metric: str,
    paired: bool = True,
) -> Summary:
    """For each arm its numbers at its own learning rate, its cost and its refusals; every arm against the reference.

    A run's result is the metric at its last evaluation. An arm's learning rate is the one with the best mean result
    over seeds, among the rates that most of its seeds were run at. A result that is not finite stands as None, and so
    does every mean over it; that of a training which failed too.

    Args:
        records: Of a run folder.
        arms: Their names, in the order of the table.
        seeds: That were asked for.
        learning_rates: That were tried for every arm.
        reference: The arm that the others are compared with.
        metric: A key of the histories; accuracies are better the higher, losses the lower.
        paired: Whether all arms of a seed saw the same batches.
    """
    chosen = metric_of(metric)
    rows = {arm: _row([r for r in records if r["arm"] == arm], learning_rates, chosen) for arm in arms}
    by_seed = {
        arm: {seed: number(value) for seed, value in zip(row["seeds"], row["values"], strict=True)}
        for arm, row in rows.items()
    }
    failed = {arm: _failed_seeds(row) for arm, row in rows.items()}
    return {
        "metric": metric,
        "higher_is_better": chosen.higher_is_better,
        "reference": reference,
        "seeds": list(seeds),
        "learning_rates": list(learning_rates),
        "confidence": CONFIDENCE,
        "paired": paired,
        "arms": rows,
        "comparisons": [
            compare_arms(
                arm, reference, by_seed[arm], by_seed[reference], failed=failed[arm] | failed[reference],
                higher_is_better=chosen.higher_is_better,
            )
            for arm in arms
            if arm != reference
        ],
    }  # fmt: skip


def _row(records: Records, learning_rates: Sequence[float], metric: Metric) -> dict[str, Any]:
    starts = [record for record in records if record["kind"] == "initialisation"]
    made = [record for record in starts if record["error"] is None]
    trained = sorted((r for r in records if r["kind"] == "training"), key=lambda record: record["seed"])
    grid = [
        _point(rate, own, metric)
        for rate in learning_rates
        if (own := [record for record in trained if record["learning_rate"] == rate])
    ]
    best = _best(grid, metric)
    ended = [record for record in trained if record.get("error") is None]
    own = [record for record in ended if best is not None and record["learning_rate"] == best["learning_rate"]]
    steps = ({"made": r["steps"], "published": r["published_steps"]} for r in starts if "steps" in r)
    return {
        **(best or _point(None, [], metric)),
        "grid": grid,
        "initialisation": {key: mean_or_none([record[key] for record in made]) for key in ("seconds", "updates")},
        "training": {key: mean_or_none([r[key] for r in own]) for key in ("seconds", "updates", "charged_updates")},
        "refused": {str(record["seed"]): record["error"] for record in starts if record["error"] is not None},
        "steps": next(steps, None),
        "failures": [
            {key: record[key] for key in ("seed", "learning_rate", "error")}
            for record in trained
            if record.get("error") is not None
        ],
    }


def _failed_seeds(row: Mapping[str, Any]) -> set[int]:
    """At the arm's learning rate."""
    return {one["seed"] for one in row["failures"] if one["learning_rate"] == row["learning_rate"]}


def _point(rate: float | None, records: Records, metric: Metric) -> dict[str, Any]:
    """An arm at one learning rate."""
    values = [_result(record, metric.name) for record in records]
    mean = mean_or_none(values)
    has_interval = len(values) > 1 and all(map(math.isfinite, values))
    low, high = bootstrap_interval(values) if has_interval else (None, None)
    iqm_low, iqm_high = bootstrap_interval(values, interquartile_mean) if has_interval else (None, None)
    return {
        "learning_rate": rate,
        "seeds": [record["seed"] for record in records],
        "values": [value if math.isfinite(value) else None for value in values],
        "mean": mean,
        "low": low,
        "high": high,
        "iqm": None if mean is None else float(interquartile_mean(values)),
        "iqm_low": iqm_low,
        "iqm_high": iqm_high,
        "diverged": sum(record["diverged"] for record in records),
        "failed": sum(record.get("error") is not None for record in records),
        "untrained": sum(record.get("error") is None and record["updates"] == 0 for record in records),
    }


def _best(grid: Sequence[dict[str, Any]], metric: Metric) -> dict[str, Any] | None:
    """The point of the best mean among those that most seeds were run at: one good seed does not win."""
    if not grid:
        return None
    most = max(len(point["seeds"]) for point in grid)
    sign = 1 if metric.higher_is_better else -1
    complete = [point for point in grid if len(point["seeds"]) == most]
    return max(complete, key=lambda point: -math.inf if point["mean"] is None else sign * point["mean"])


def _result(record: Mapping[str, Any], metric: str) -> float:
    return number(record["history"][-1][metric]) if record["history"] else math.nan


def number(value: float | str | None) -> float:
    """As the records hold it: "nan", "inf", or null for what was not finite."""
    return math.nan if value is None else float(value)


def mean_or_none(values: Sequence[float | str | None]) -> float | None:
    """None of nothing, and where one value is not finite: no number would say what that means."""
    read = [number(value) for value in values]
    return float(np.mean(read)) if read and all(map(math.isfinite, read)) else None


# ---------------------------------------------------------------------------------------------- in words
def conclude(summary: Summary) -> str:
    """What the comparison shows, in a few sentences."""
    label, reference = metric_of(summary["metric"]).title, summary["reference"]
    if not summary["arms"][reference]["seeds"]:
        return f"The reference, {reference}, was not run or refused this model: nothing is compared."
    by_verdict: dict[str, list[str]] = {}
    for comparison in summary["comparisons"]:
        by_verdict.setdefault(comparison["verdict"], []).append(marked(summary, comparison["arm"]))
    said = [
        f"{before}: {', '.join(by_verdict[key])}."
        for key, before in (
            (BETTER, "Better"),
            (WORSE, "Worse"),
            (UNDECIDED, "No difference shown"),
            (ONE_SEED, "No claim from a single seed"),
            (NO_SPREAD, "No claim, because the difference is equal in all seeds"),
            (FAILED, "No claim, because trainings failed"),
            (DIVERGED, "No claim, because runs diverged"),
            (NO_RUN, "Not run, or refused"),
        )
        if key in by_verdict
    ]
    if not said:
        said = [f"Only {marked(summary, reference)} was run: nothing to compare it with."]
    else:
        said.insert(0, f"Against {marked(summary, reference)}, by {label} at the end of training.")
        if summary["arms"][reference]["mean"] is None:
            went = "failed" if summary["arms"][reference]["failed"] else "diverged"
            said.append(f"Of {reference} itself, trainings {went}: no arm has anything to be compared with.")
    return " ".join([*said, *untrained(summary)])


def marked(summary: Summary, arm: str) -> str:
    """The arm's name, with a remark where its result is one without training."""
    row = summary["arms"][arm]
    return f"{arm} (untrained{_untrained_share(row)})" if row["untrained"] else arm


def _untrained_share(row: Mapping[str, Any]) -> str:
    count, seeds = row["untrained"], len(row["seeds"])
    return "" if count == seeds else f" at {count} of {seeds} seeds"


def untrained(summary: Summary) -> list[str]:
    """The sentence on arms whose initialisation left no training, or none."""
    arms = [f"{arm}{_untrained_share(row)}" for arm, row in summary["arms"].items() if row["untrained"]]
    if not arms:
        return []
    return [
        f"Not trained, as the initialisation took the whole budget: {', '.join(arms)}. Give a larger --budget, or "
        "fewer steps by --options, or compare with --no-charge."
    ]


def unpaired(summary: Summary) -> list[str]:
    """The sentence on data that no seed fixes, or none."""
    if summary["paired"]:
        return []
    return [
        "The training loader gives other batches at each pass, whatever the seed: arms share their draws of the model "
        "alone, not the batches nor their order, and a run that is resumed or repeated gives other numbers."
    ]


def how_sure(summary: Summary) -> str:
    """By which rule an arm is called better or worse, and how often wrongly."""
    if len(summary["seeds"]) < 2:
        return "With one seed there is no interval and no claim: repeat with --seeds 3 or more."
    if max((c["pairs"] for c in summary["comparisons"]), default=2) < 2:
        return "Of no two arms two seeds were finished with a result, so that nothing can be compared."
    return (
        f"An arm is better or worse only where both {100 * CONFIDENCE:.0f} % intervals of its difference, seed by "
        f"seed, leave out 0: the percentile bootstrap's over seeds ({RESAMPLES} resamples) and Student's t, which "
        f"allows for few seeds. Of arms that do not differ from the reference, about {FALSE_CLAIMS['normal']} in 100 "
        f"are called so all the same, up to {FALSE_CLAIMS['exponential']} where differences are skewed: the more "
        "arms, the more likely is one of them. No difference shown does not mean that there is none: few seeds show "
        "only large ones."
    )


def how_chosen(summary: Summary) -> str:
    """By which rule an arm got its learning rate."""
    rates = summary["learning_rates"]
    if len(rates) < 2:
        return f"Every arm was trained with the learning rate {rates[0]:g}."
    return (
        f"Each arm has its own learning rate, of {', '.join(f'{rate:g}' for rate in rates)}: the one with the best "
        f"mean {metric_of(summary['metric']).title} at the end over seeds. It is chosen on the numbers that are "
        "reported, which flatters an arm, and the more so, the more of its rates train about equally well."
        f"{at_edge(summary)}"
    )


def at_edge(summary: Summary) -> str:
    """Which arms may do better beyond the learning rates that were tried."""
    rates = summary["learning_rates"]
    ends = {"smallest": min(rates), "largest": max(rates)}
    arms = {
        end: [a for a, row in summary["arms"].items() if row["learning_rate"] == rate and row["mean"] is not None]
        for end, rate in ends.items()
    }
    said = [f"the {end} for {', '.join(of_end)}" for end, of_end in arms.items() if of_end]
    return f" Best at an edge of them, and maybe beyond it: {'; '.join(said)}." if said else ""


# ---------------------------------------------------------------------------------------------- on screen
def print_report(console: Console, summary: Summary) -> None:
    """The table, narrow enough for 80 columns, and what may be concluded from it."""
    metric = metric_of(summary["metric"])
    table = Table(title=f"\n{metric.label}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("arm", no_wrap=True)
    for heading in ("lr", "mean", "95 %", "diverged", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"against {marked(summary, summary['reference'])}")
    verdicts = {comparison["arm"]: comparison for comparison in summary["comparisons"]}
    for arm, row in summary["arms"].items():
        table.add_row(
            marked(summary, arm),
            "" if row["learning_rate"] is None else f"{row['learning_rate']:g}",
            mean_text(row, metric),
            interval_text(row["low"], row["high"], metric.text),
            diverged_text(row),
            rounded(row["initialisation"]["updates"]),
            _against(verdicts.get(arm), metric),
        )
    console.print(table)
    console.print()
    said = [conclude(summary), *unpaired(summary), how_sure(summary), how_chosen(summary)]
    said += [shortened(summary)] if shortened(summary) else []
    said += [f"Refused, {arm}: {message}" for arm, message, _ in refusals(summary)]
    said += [f"Training failed, {arm} ({where}): {message}" for arm, message, where in failures(summary)]
    said.append("cost: what the initialisation took, in training updates of the same time.")
    for sentence in said:
        console.print(sentence, highlight=False, markup=False)


def mean_text(row: Mapping[str, Any], metric: Metric) -> str:
    if not row["seeds"]:
        return "refused" if row.get("refused") else "–"
    if row["mean"] is None:
        return "failed" if row.get("failed") else "not finite"
    return metric.text(row["mean"])


def interval_text(low: float | None, high: float | None, text: Callable[[float | None], str]) -> str:
    return "–" if low is None else f"{text(low)} to {text(high)}"


def diverged_text(row: Mapping[str, Any]) -> str:
    return f"{row['diverged']} of {len(row['seeds'])}" if row["seeds"] else "–"


def rounded(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _against(comparison: Mapping[str, Any] | None, metric: Metric) -> str:
    if comparison is None:
        return "(reference)"
    if comparison["difference"] is None:
        return comparison["verdict"]
    return f"{metric.signed(comparison['difference'])} {comparison['verdict']}"


def refusals(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """Arm, message, and the seeds that gave it."""
    for arm, row in summary["arms"].items():
        for message in dict.fromkeys(row["refused"].values()):
            yield arm, message, ", ".join(seed for seed, own in row["refused"].items() if own == message)


def failures(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """Arm, message, and the trainings that ended with it."""
    for arm, row in summary["arms"].items():
        for message in dict.fromkeys(failure["error"] for failure in row.get("failures", [])):
            own = [failure for failure in row["failures"] if failure["error"] == message]
            yield arm, message, ", ".join(f"seed {one['seed']} at {one['learning_rate']:g}" for one in own)


def steps_text(row: Mapping[str, Any]) -> str:
    """How many steps a learned method made, of how many that are published."""
    steps = row.get("steps")
    return "–" if steps is None else f"{steps['made']} of {steps['published']}"


def shortened(summary: Summary) -> str:
    """Which learned methods made another number of steps than is published; empty where none did."""
    rows = {arm: row for arm, row in summary["arms"].items() if row.get("steps")}
    said = [f"{a}, {steps_text(r)} steps" for a, r in rows.items() if r["steps"]["made"] != r["steps"]["published"]]
    return f"Other numbers of steps than are published: {'; '.join(said)}." if said else ""
