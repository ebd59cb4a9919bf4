"""The four methods side by side: what each descends on, on one small network and scikit-learn's embedded digits.

python -m reproduce.overview [--output FILE.png]
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from common.functional import classification_loss
from common.initializers import scale_weights_
from common.networks import make_network
from common.optimizers import sgd
from papers import initialize
from reproduce.bring_data import bring_data
from reproduce.command import NOTHING, end_well
from reproduce.figures import save_png


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    output: Path = Path("overview.png")
    """Where the figure goes."""


@dataclass(frozen=True)
class Panel:
    """One method: how it is called here, and which number of its history is shown."""

    method: str
    title: str
    key: str
    label: str
    options: dict


PANELS = (
    Panel(
        "metainit", "MetaInit\nthe gradient changes little along a step of its own", "gradient_quotient",
        "gradient quotient", {"steps": 60},
    ),
    Panel(
        "gradinit", "GradInit\none step of the optimiser lowers the loss most", "look_ahead_loss",
        "loss after one step", {"steps": 60, "lr": 0.03, "gamma": math.inf},
    ),
    Panel(
        "nio", "NIO (GradCosine)\nexamples pull the same way", "grad_cosine",
        "mean cosine of gradients", {"steps": 60, "lr": 0.03},
    ),
    Panel(
        "dimaml", "DIMAML\nwhole trainings from a draw end well", "loss",
        "held-out loss in training",
        {"inner": sgd(0.1, momentum=0.9), "inner_steps": 10, "eval_every": 5, "meta_steps": 60, "meta_lr": 2e-3},
    ),
)  # fmt: skip


def history_of(panel: Panel) -> list[float]:
    """The shown number at each step of the method, from one draw of a plain tanh network at half of Kaiming's scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_network("plain-5-8", activation="tanh", stem_stride=2)
        scale_weights_(model, 0.5)
    # 22 batches a pass: a task of DIMAML, 10 to train on and 2 held out, lies within one
    batches = bring_data("digits", batch_size=64, device="cpu", caller="overview").init_batches(seed=0)
    result = initialize(model, panel.method, classification_loss, batches, progress=False, **panel.options)
    return [entry[panel.key] for entry in result.history]


def save_figure(path: Path, histories: list[list[float]]) -> None:
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 5.4), layout="constrained")
        for axis, panel, values in zip(figure.subplots(2, 2).flatten(), PANELS, histories, strict=True):
            draw_panel(axis, panel, values)
        save_png(figure, path, dpi=130)


def draw_panel(axis: Axes, panel: Panel, values: list[float]) -> None:
    axis.plot(range(1, len(values) + 1), values, ".", color="#1f77b4", markersize=4, alpha=0.45)
    window = 8
    means = [sum(part) / len(part) for k in range(len(values)) if (part := values[max(0, k - window + 1) : k + 1])]
    axis.plot(range(1, len(values) + 1), means, color="#1f77b4", linewidth=2)
    axis.set(xlabel="step of the method", ylabel=panel.label)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(panel.title, loc="left", fontsize=9)


def run(config: Config) -> list[list[float]]:
    """Compute, draw, and say where the figure is."""
    histories = [history_of(panel) for panel in PANELS]
    config.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(config.output, histories)
    Console().print(f"Figure: {config.output}", soft_wrap=True)
    return histories


def main() -> None:
    end_well(lambda: run(tyro.cli(Config, description=__doc__)), interrupted=NOTHING)


if __name__ == "__main__":
    main()
