"""What every figure shares: how it is written, which numbers can be drawn, axes in plain numbers."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from common.record import put_in_place


def save_png(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write beside the file and rename, so that a figure is never half there."""
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=dpi, format="png")
    put_in_place(partial, path)


def is_number(value: float | None) -> bool:
    """Whether a point can be drawn."""
    return value is not None and math.isfinite(value)


def log_scale(axes: Axes, marks: tuple[float, ...] = (1, 2, 5)) -> None:
    """Logarithmic in y, with ticks at these multiples of powers of ten, in plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=marks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
