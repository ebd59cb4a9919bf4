"""What GradInit's figures show."""

import math

import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Polygon, Rectangle

from reproduce.gradinit_report import draw_search, draw_variance


def spans(axes) -> list[tuple[float, float]]:
    """From where to where each patch of the full height goes."""
    boxes = [p.get_extents().transformed(axes.transData.inverted()) for p in axes.patches]
    assert all(isinstance(patch, Rectangle | Polygon) for patch in axes.patches)
    return sorted((box.x0, box.x1) for box in boxes)


def test_each_iteration_on_the_constraint_is_shaded():
    axes = Figure().subplots()
    history = [
        {"step": t, "constraint": float(t in (2, 5, 6)), "loss": 2.0, "gradient_norm": 1.0 + t, "look_ahead_loss": 1.5}
        for t in range(1, 8)
    ]
    draw_search(axes, history, "net")
    assert spans(axes) == [pytest.approx(span) for span in ((1.5, 2.5), (4.5, 5.5), (5.5, 6.5))]
    assert axes.get_xlim() == (0.5, 7.5)


def test_infinite_variances_stand_at_the_upper_edge_and_are_counted():
    axes = Figure().subplots()
    record = {
        "kinds": {"a": "conv", "b": "conv", "c": "bias"},
        "variance_before": {"a": None, "b": 2.0, "c": None},
        "variance_after": {"a": 3.0, "b": math.inf, "c": 1.0},
    }
    draw_variance(axes, record)
    top = axes.get_xaxis_transform()
    assert sorted(line.get_xdata()[0] for line in axes.lines if line.get_transform() == top) == [1, 2]
    assert "2 at the upper edge" in axes.get_xlabel()
