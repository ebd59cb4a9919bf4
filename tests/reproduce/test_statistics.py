"""Numbers over seeds, against hand-worked values."""

import math

import pytest

from reproduce.statistics import mean_and_deviation, paired_interval, percent


def test_mean_and_deviation():
    # 1, 2, 6: mean 3, squared deviations 4 + 1 + 9 = 14 over n − 1 = 2
    assert mean_and_deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7.0)))
    assert math.isnan(mean_and_deviation([4.0])[1])


def test_paired_interval():
    # differences 1, 2, 3: mean 2, s = 1, and t(0.975, 2) = 4.302653: 2 ± 4.302653/√3
    low, high = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), rel=1e-6)
    assert paired_interval([2.0], [1.0]) == (-math.inf, math.inf)
    assert paired_interval([2.0, 3.0], [1.0, 2.0]) == (1.0, 1.0)


def test_percent():
    assert percent([0.1, 0.2]) == "15.0 ± 7.1"
    assert percent([0.123]) == "12.3"
