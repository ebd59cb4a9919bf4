"""Numbers over seeds, with what they do and do not show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for a single value, or where one is not finite)."""
    with np.errstate(invalid="ignore"):
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return float(np.mean(values)), deviation


def paired_interval(
    after: Sequence[float], before: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Student's interval for the mean of after − before, pairs sharing a seed.

    Infinite with fewer than two pairs, where one is not finite, and where the differences are all the same and not 0:
    on few test examples they may be, and nothing is known of their spread.
    """
    with np.errstate(invalid="ignore"):
        differences = np.subtract(after, before)
    if len(differences) < 2 or not np.isfinite(differences).all():
        return -math.inf, math.inf
    if np.ptp(differences) <= 1e-12 * np.abs(differences).max():  # but for round-off
        return (-math.inf, math.inf) if differences.any() else (0.0, 0.0)
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def percent(values: Sequence[float], digits: int = 1) -> str:
    """`45.1 ± 0.8`: mean and standard deviation in percent; no deviation for a single value."""
    mean, deviation = (100 * value for value in mean_and_deviation(values))
    return f"{mean:.{digits}f}" if math.isnan(deviation) else f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def compare(arm: str, other: str, after: Mapping[int, float], before: Mapping[int, float]) -> dict[str, Any]:
    """One arm minus another, over the seeds that both were run with; shares, not percent."""
    seeds = sorted(after.keys() & before.keys())
    pairs = [after[seed] for seed in seeds], [before[seed] for seed in seeds]
    low, high = paired_interval(*pairs)
    difference = mean_and_deviation([a - b for a, b in zip(*pairs, strict=True)])[0] if seeds else math.nan
    return {"arm": arm, "against": other, "difference": difference, "low": low, "high": high, "pairs": len(seeds)}


def no_interval(pairs: int, difference: float) -> str:
    """Why there is none."""
    why = "one seed" if pairs == 1 else f"the same at all {pairs} seeds, so that nothing is known of its spread"
    why = why if math.isfinite(difference) else "not finite at every seed"
    return f"{why}: no interval, no conclusion"


def conclude(comparison: Mapping[str, Any]) -> str:
    """No claim without an interval that carries it."""
    difference, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
    what = f"{comparison['arm']} against {comparison['against']}: {difference:+.1f} points"
    if comparison["pairs"] == 0:
        return f"{comparison['arm']} against {comparison['against']}: nothing to compare."
    if not math.isfinite(low):
        return f"{what} ({no_interval(comparison['pairs'], difference)})."
    verdict = "higher" if low > 0 else "lower" if high < 0 else "no difference shown"
    return f"{what}, {verdict} (95 % t-interval {low:+.1f} to {high:+.1f}, {comparison['pairs']} paired seeds)."
