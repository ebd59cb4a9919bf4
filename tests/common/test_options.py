"""Checks of single options: what they let pass, and what they say of the rest."""

import math

import numpy
import pytest
import torch

from common.options import check_choice, check_number, check_positive, check_whole


def test_what_is_in_range_passes():
    check_choice("f", "mode", "a", ("a", "b"))
    check_choice("f", "mode", None, (None, "b"))
    check_number("f", x=-math.inf, y=math.nan, z=0, w=numpy.float32(2))
    check_whole("f", x=0, y=numpy.int64(3))
    check_whole("f", smallest=2, x=2)
    check_positive("f", x=1e-300, y=3, z=numpy.float64(0.5))


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: check_choice("f", "mode", "c", ("a", 1), " Or none."), ValueError,
         r"f: `mode` must be one of 'a', 1, got 'c'\. Or none\."),
        (lambda: check_number("f", " Or inf.", x=1, y="1"), TypeError, r"f: `y` must be a number, got '1'\. Or inf\."),
        (lambda: check_number("f", x=None), TypeError, r"f: `x` must be a number, got None"),
        (lambda: check_number("f", x=torch.ones(())), TypeError, r"f: `x` must be a number, got tensor\(1\.\)"),
        (lambda: check_number("f", x=1j), TypeError, r"f: `x` must be a number, got 1j"),
        (lambda: check_whole("f", x=1, y=-1), ValueError, r"f: `y` must be a whole number, 0 or more, got -1"),
        (lambda: check_whole("f", " Or 'all'.", smallest=2, x=1), ValueError, r"2 or more, got 1\. Or 'all'\."),
        (lambda: check_whole("f", x=1.0), ValueError, r"f: `x` must be a whole number, 0 or more, got 1\.0"),
        (lambda: check_whole("f", x="1"), TypeError, r"f: `x` must be a number, got '1'"),
        (lambda: check_positive("f", x=0.0), ValueError, r"f: `x` must be positive and finite, got 0\.0"),
        (lambda: check_positive("f", x=1.0, y=-2), ValueError, r"f: `y` must be positive and finite, got -2"),
        (lambda: check_positive("f", " Or None.", x=math.inf), ValueError, r"and finite, got inf\. Or None\."),
        (lambda: check_positive("f", x=math.nan), ValueError, r"and finite, got nan"),
        (lambda: check_positive("f", x="0.1"), TypeError, r"f: `x` must be a number, got '0\.1'"),
    ],
)  # fmt: skip
def test_the_rest_is_named(check, error, message):
    with pytest.raises(error, match=message):
        check()
