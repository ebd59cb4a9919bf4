"""Numbers over seeds, with what they do and do not show."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for a single value)."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
    return float(np.mean(values)), deviation


def paired_interval(
    after: Sequence[float], before: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float]:
    """Student's interval for the mean of after − before, pairs sharing a seed. Infinite with fewer than two pairs."""
    differences = np.subtract(after, before)
    if len(differences) < 2:
        return -math.inf, math.inf
    if np.ptp(differences) == 0:  # no spread to estimate from: the interval is the point itself
        return float(differences[0]), float(differences[0])
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(confidence)
    return float(interval.low), float(interval.high)


def percent(values: Sequence[float]) -> str:
    """`45.1 ± 0.8`: mean and standard deviation in percent; no deviation for a single value."""
    mean, deviation = mean_and_deviation(values)
    return f"{100 * mean:.1f}" if math.isnan(deviation) else f"{100 * mean:.1f} ± {100 * deviation:.1f}"
