"""Numbers over seeds, against hand-worked values."""

import math

import pytest

from reproduce.statistics import compare, conclude, mean_and_deviation, paired_interval, percent


def test_mean_and_deviation():
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14 over n − 1 = 2
    assert mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0)))
    assert math.isnan(mean_and_deviation([4.0])[1])


def test_paired_interval():
    # differences 1, 2, 3: mean 2, s = 1, and t(0.975, 2) = 4.302653: 2 ± 4.302653/√3
    low, high = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert paired_interval([2.0], [1.0]) == (-math.inf, math.inf)
    assert paired_interval([2.0, 3.0], [1.0, 2.0]) == (-math.inf, math.inf)  # no spread: of it nothing is known
    assert paired_interval([0.3, 0.1 + 0.2], [0.1, 0.1]) == (-math.inf, math.inf)  # but for round-off
    assert paired_interval([2.0, 3.0], [2.0, 3.0]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("after", "before", "expected"),
    [
        ({0: 0.5}, {1: 0.4}, "A against B: nothing to compare."),
        ({0: 0.5}, {0: 0.4}, r"A against B: +10.0 points (one seed: no interval, no conclusion)."),
        ({0: 0.12, 1: 0.53}, {0: 0.10, 1: 0.51},
         "A against B: +2.0 points (the same at all 2 seeds, so that nothing is known of its spread: no interval, no "
         "conclusion)."),
        ({0: 0.5, 1: 0.6}, {0: 0.5, 1: 0.6},
         "A against B: +0.0 points, no difference shown (95 % t-interval +0.0 to +0.0, 2 paired seeds)."),
        ({0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.1, 1: 0.21, 2: 0.29},
         "A against B: +40.0 points, higher (95 % t-interval +37.5 to +42.5, 3 paired seeds)."),
    ],
)  # fmt: skip
def test_no_claim_without_an_interval(after, before, expected):
    assert conclude(compare("A", "B", after, before)) == expected


def test_percent():
    assert percent([0.1, 0.2]) == "15.0 ± 7.1"
    assert percent([0.123]) == "12.3"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_has_no_interval_and_no_conclusion(value):
    assert paired_interval([1.0, value, 2.0], [0.5, value, 0.5]) == (-math.inf, math.inf)
    assert math.isnan(mean_and_deviation([value, -value])[0])
    said = conclude(compare("a", "b", {0: 1.0, 1: value, 2: 0.5}, {0: 0.5, 1: 0.5, 2: 0.5}))
    assert said.endswith("(not finite at every seed: no interval, no conclusion).")
