r"""What GradCosine sees that the density of optima does not: the schematic of NIO's Figure 1, computed.

Four sets of sample losses ℓ_i(θ) = ½ ‖θ − θ_i*‖² on two parameters (ours; H = 1). One gradient step with η = 1 lands
on a sample's optimum, so that Eq. (3) holds exactly and −g_i is the path from θ₀ to θ_i*. Optima are sparse in (a) and
dense in (b). (c) and (d) are the same set of optima, seen from two starting points: inconsistent paths, and consistent.

    python -m reproduce.nio_schematic [--output FILE]
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import torch
import tyro
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

from common.derivatives import group_gradients
from common.types import Params
from papers.nio import grad_cosine, optima_bound, optima_density
from reproduce.command import NOTHING, end_well
from reproduce.figures import save_png


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    output: Path = Path("runs/nio_schematic.png")
    """The figure."""


@dataclass(frozen=True)
class Panel:
    """One starting point and its sample optima, as displacements θ_i* − θ₀ (n, 2), with what is computed from them.

    Attributes:
        title: What is to be seen.
        theta_star: θ_i*; θ₀ is the origin.
        gradients: g_i at θ₀, (n, 2).
        density: Ψ, of the displacements.
        bound: Θ, of the displacements.
        cosine: GradCosine without its diagonal, of the gradients.
    """

    title: str
    theta_star: Float[Tensor, "n 2"]
    gradients: Float[Tensor, "n 2"]
    density: float
    bound: float
    cosine: float


def sample_loss(theta: Params, theta_star: Float[Tensor, "b 2"]) -> Float[Tensor, ""]:
    r"""Mean over samples of ½ ‖θ − θ_i*‖²."""
    return (theta["w"] - theta_star).square().sum(1).mean() / 2


def make_panel(title: str, theta_star: Float[Tensor, "n 2"]) -> Panel:
    """Everything from the gradients and displacements at θ₀ = 0, by the functions that the method itself uses."""
    theta0 = {"w": theta_star.new_zeros(2)}
    gradients = group_gradients(sample_loss, theta0, theta_star)
    displacements = {"w": theta_star - theta0["w"]}
    return Panel(
        title,
        theta_star,
        gradients["w"],
        optima_density(displacements).item(),
        optima_bound(displacements).item(),
        grad_cosine(gradients).item(),
    )


def make_panels() -> list[Panel]:
    """(a) to (d). (c) is (d) moved so that θ₀ lies among the optima: distances between optima stay what they are."""
    ring = torch.tensor([[math.cos(a), math.sin(a)] for a in torch.linspace(0.3, 0.3 + 2 * math.pi, 6)[:5].tolist()])
    centre = torch.tensor([1.6, 0.9])
    # about equally far from θ₀, so that unequal paths hardly raise Θ of (d)
    angles, radii = torch.tensor([-0.55, -0.35, 0.0, 0.30, 0.60]) + 0.5, torch.tensor([1.6, 2.1, 2.2, 1.7, 2.0])
    arc = radii[:, None] * torch.stack([angles.cos(), angles.sin()], 1)
    among = arc.mean(0) + torch.tensor([0.02, 0.05])
    return [
        make_panel("(a) sparse optima", centre + 0.9 * ring),
        make_panel("(b) dense optima", centre + 0.3 * ring),
        make_panel("(c) equal density, inconsistent paths", arc - among),
        make_panel("(d) equal density, consistent paths", arc),
    ]


def save_figure(path: Path, panels: list[Panel]) -> None:
    """A panel each, on axes of one size: optima, contours of the mean loss, and −g_i as arrows from θ₀."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(14, 4.3), layout="constrained")
        for axis, panel in zip(figure.subplots(1, len(panels)), panels, strict=True):
            draw_panel(axis, panel)
        figure.suptitle("Ψ cannot tell (c) from (d); GradCosine can", fontsize=11)
        save_png(figure, path, dpi=140)


def draw_panel(axis: Axes, panel: Panel) -> None:
    centre = panel.theta_star.mean(0)  # where the mean loss is smallest
    side = 3.8
    middle = (centre / 2).tolist()
    x, y = (torch.linspace(value - side / 2, value + side / 2, 80) for value in middle)
    grid = torch.cartesian_prod(x, y)
    loss = (grid - centre).square().sum(1).reshape(80, 80).T / 2  # up to a constant
    axis.contour(x.tolist(), y.tolist(), loss.tolist(), levels=9, colors="0.85", linewidths=0.7, zorder=0)
    for g in panel.gradients.tolist():
        axis.annotate(
            "", xy=(-g[0], -g[1]), xytext=(0, 0),
            arrowprops={"arrowstyle": "-|>", "color": "#1f77b4", "linewidth": 1.3, "shrinkA": 3, "shrinkB": 4},
        )  # fmt: skip
    axis.scatter(*panel.theta_star.T.tolist(), color="#d62728", s=34, zorder=3, label="θᵢ*, optimum of sample i")
    axis.scatter([0], [0], color="black", marker="s", s=34, zorder=3, label="θ₀")
    axis.plot([], [], color="#1f77b4", linewidth=1.3, label="−gᵢ at θ₀")
    axis.set(xlim=(x[0].item(), x[-1].item()), ylim=(y[0].item(), y[-1].item()), aspect="equal", xticks=[], yticks=[])
    axis.set_title(
        f"{panel.title}\nΨ = {panel.density:.2f}   Θ = {panel.bound:.2f}   GradCosine = {panel.cosine:+.2f}",
        loc="left", fontsize=9,
    )  # fmt: skip
    axis.legend(frameon=False, loc="lower right", fontsize=8)


def run(config: Config) -> list[Panel]:
    """Compute, draw, and say where the figure is."""
    panels = make_panels()
    config.output.parent.mkdir(parents=True, exist_ok=True)
    save_figure(config.output, panels)
    console = Console()
    for panel in panels:
        console.print(
            f"{panel.title}: Ψ = {panel.density:.3f}, Θ = {panel.bound:.3f}, GradCosine = {panel.cosine:+.3f}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(f"Figure: {config.output}", soft_wrap=True)
    return panels


def main() -> None:
    end_well(lambda: run(tyro.cli(Config, description=__doc__)), interrupted=NOTHING)


if __name__ == "__main__":
    main()
