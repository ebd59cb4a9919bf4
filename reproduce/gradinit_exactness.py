"""Does it matter that GradInit takes its look-ahead step for a constant? First-order against exact scale gradients.

The meta-optimiser normalises each multiplier's gradient by itself, so its *sign* is what counts. At initialisation, on
networks with and without BatchNorm, over sizes η of the step: how often do both signs agree? And how far off, by the
same measures, is the finite-difference engine on the constraint?

    python -m reproduce.gradinit_exactness [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from common.functional import parameters_of, pure_loss
from common.networks import make_network
from common.precision import full_precision
from common.record import Run, device_name, device_of, write_environment
from common.scales import scalable_tensors
from common.types import NotFiniteError
from data import ImageData, load_images, sample_batches
from papers.gradinit import batch_pairs, scale_gradients
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.figures import save_png
from reproduce.statistics import mean_and_deviation, percent

EXPERIMENT = "gradinit_exactness"
Records = Sequence[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: two minutes on two cores. paper: the paper's networks too, and more seeds, for a GPU."""
    data: Literal["auto", "cifar10", "cifar100", "digits", "noise"] = "auto"
    """auto: CIFAR-10 from the folder, the Hugging Face cache or the hub, or else scikit-learn's embedded digits."""
    data_dir: Path | None = None
    """Folder that holds cifar10/train-*.parquet and test-*.parquet. Default: the variable LEARNED_INIT_DATA."""
    output: Path | None = None
    """Run folder; one that was cut off is resumed. Default: a new one under runs/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    quiet: bool = False
    """No progress on standard error."""

    networks: tuple[str, ...] = ("plain-8-16", "resnet-20")
    """Names of common.networks; each without and with BatchNorm."""
    etas: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Sizes of the normalised look-ahead step; the released one is 0.1."""
    batch_size: int = 32
    """Examples of S, and of S̃, which shares half of them."""
    seeds: int = 5
    """Initialisations, each with minibatches of its own."""


PRESETS = {
    "smoke": Config(preset="smoke", networks=("plain-4-4",), etas=(0.1, 1.0), batch_size=8, seeds=2),
    "quick": Config(preset="quick"),
    "paper": Config(
        preset="paper",
        networks=(*Config().networks, "vgg19", "resnet110", "densenet100", "wrn-28-10"),
        batch_size=128,
        seeds=10,
    ),
}


NOT_FINITE = {"cosine": math.nan, "same_sign": math.nan, "error": math.nan}
"""How two slopes agree of which one overflowed."""


# ---------------------------------------------------------------------------------------------- one unit of work
def agreement(d: Tensor, reference: Tensor) -> dict[str, float]:
    """How alike two scale gradients are: cosine, share of equal signs, largest difference over the largest entry."""
    d, reference = d.double(), reference.double()  # on a bad start their squares may leave float32's range
    if not (d.isfinite().all() and reference.isfinite().all()):
        return dict(NOT_FINITE)
    return {
        "cosine": torch.nn.functional.cosine_similarity(d, reference, dim=0).item(),
        "same_sign": (d.sign() == reference.sign()).double().mean().item(),
        "error": ((d - reference).abs().max() / reference.abs().max()).item(),
    }


def measure(config: Config, network: str, seed: int, data: ImageData, device: torch.device) -> list[dict[str, Any]]:
    """Every comparison of one network as one seed draws it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_network(
            network.removesuffix("-bn"), batch_norm=network.endswith("-bn"), num_classes=data.num_classes
        ).to(device)
    names, _ = scalable_tensors(model)
    theta0, loss = parameters_of(model), pure_loss(model, order=2)
    scales = {name: torch.ones((), device=device) for name in names}
    generator = torch.Generator().manual_seed(seed)
    stream = sample_batches(
        data.train, config.batch_size, mean=data.mean, std=data.std, generator=generator, device=device
    )
    S, other = next(batch_pairs(stream))
    S_tilde = other()

    def slopes(**options: Any) -> Tensor:
        return torch.stack(list(scale_gradients(loss, theta0, scales, S, S_tilde, **options)[1].values()))

    def compared(*both: dict[str, Any]) -> dict[str, float]:
        try:
            return agreement(*(slopes(**options) for options in both))
        except NotFiniteError:  # a result
            return dict(NOT_FINITE)

    with full_precision(device):
        rows = [
            {"comparison": "step", "eta": eta}
            | compared(*({"gamma": math.inf, "eta": eta, "exact": exact} for exact in (False, True)))
            for eta in config.etas
        ]
        differences = compared(*({"gamma": 0.0, "engine": engine} for engine in ("finite_difference", "lazy")))
    return [*rows, {"comparison": "finite difference", "eta": None} | differences]


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    if config.seeds < 1:
        raise ValueError(f"{EXPERIMENT}: `seeds` must be positive, got {config.seeds}.")
    if not config.networks:
        raise ValueError(f"{EXPERIMENT}: `networks` must name one or more, got none.")
    if config.batch_size < 2 or config.batch_size % 2:
        raise ValueError(f"{EXPERIMENT}: `batch_size` must be even, got {config.batch_size}: S̃ shares half of S.")
    if not config.etas or not all(eta > 0 for eta in config.etas):
        raise ValueError(f"{EXPERIMENT}: `etas` must be positive, one or more, got {config.etas}.")
    device_of(config.device, EXPERIMENT)
    for network in config.networks:
        with torch.device("meta"):
            make_network(network)


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    # two minibatches a seed: a thousand examples to draw them from
    data = load_images(config.data, data_dir=config.data_dir, train=max(1000, 4 * config.batch_size), test=100)
    write_environment(folder, data.record(), device)
    console.print(f"Data: {data.identity}.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    with make_progress(quiet=config.quiet) as progress:
        compute(config, folder, lambda network, seed: measure(config, network, seed, data, device), progress)
    summary = summarise(folder.records) | {"data": data.identity, "device": device_name(device)}
    save_figure(folder.folder / "figure.png", summary)
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records and figure.png: {folder.folder}")
    return summary


def compute(
    config: Config, folder: Run, work_on: Callable[[str, int], list[dict[str, Any]]], progress: Progress
) -> None:
    networks = [network + norm for network in config.networks for norm in ("", "-bn")]
    bar = progress.add_task("starting", total=len(networks) * config.seeds)
    for network in networks:
        for seed in range(config.seeds):
            progress.update(bar, description=f"{network}, seed {seed}")
            if folder.find(network=network, seed=seed) is None:
                folder.append({"network": network, "seed": seed, "comparisons": work_on(network, seed)})
            progress.advance(bar)


# ---------------------------------------------------------------------------------------------- numbers, table, figure
def summarise(records: Records) -> dict[str, Any]:
    """For each network and comparison, every seed's numbers, and how many seeds have none, as slopes overflowed."""
    summary: dict[str, Any] = {"networks": {}}
    for record in records:
        rows = summary["networks"].setdefault(record["network"], {})
        for comparison in record["comparisons"]:
            label = comparison["comparison"] if comparison["eta"] is None else f"{comparison['eta']:g}"
            row = rows.setdefault(label, {"cosine": [], "same_sign": [], "error": [], "not_finite": 0})
            if comparison["error"] is None:
                row["not_finite"] += 1
                continue
            for key in ("cosine", "same_sign", "error"):
                row[key].append(comparison[key])
    return summary


def pairs_of(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Each network's name, and its rows without and with BatchNorm."""
    for network, rows in summary["networks"].items():
        if not network.endswith("-bn"):
            yield network, rows, summary["networks"][f"{network}-bn"]


def make_table(title: str, *columns: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    return table


def print_report(console: Console, summary: dict[str, Any]) -> None:
    table = make_table(
        "First order against exact, on the objective",
        "network", "η", "equal\nsigns, %", "cosine", "BatchNorm:\nequal signs, %", "BatchNorm:\ncosine",
    )  # fmt: skip
    for network, *pair in pairs_of(summary):
        for number, eta in enumerate(label for label in pair[0] if label != "finite difference"):
            cells = [
                cell
                for rows in pair
                for cell in (shown(percent, rows[eta]["same_sign"]), shown(with_deviation, rows[eta]["cosine"]))
            ]
            table.add_row("" if number else network, eta, *cells)
    console.print(table)
    table = make_table(
        "Finite differences against exact, on the constraint",
        "network", "equal\nsigns, %", "largest\nerror, %", "BatchNorm:\nequal signs, %", "BatchNorm:\nlargest error, %",
    )  # fmt: skip
    for network, *pair in pairs_of(summary):
        rows = [row["finite difference"] for row in pair]
        table.add_row(network, *(shown(percent, row[key]) for row in rows for key in ("same_sign", "error")))
    console.print(table)
    every = {(network, label): row for network, rows in summary["networks"].items() for label, row in rows.items()}
    seeds = max(len(row["cosine"]) + row["not_finite"] for row in every.values())
    for (network, label), row in every.items():
        if row["not_finite"]:
            what = label if label == "finite difference" else f"η = {label}"
            console.print(
                f"{network}, {what}: not finite with {row['not_finite']} of {seeds} seeds, which are left out."
            )
    console.print(
        f"\nScale gradients at initialisation: mean ± standard deviation over {seeds} seed{'s' if seeds > 1 else ''}. "
        "η: size of the normalised look-ahead step. Errors in percent of the largest entry.",
        style="dim",
    )


def shown(form: Callable[[Sequence[float]], str], values: Sequence[float]) -> str:
    return form(values) if values else "–"


def with_deviation(values: Sequence[float]) -> str:
    """`0.991 ± 0.004`; no deviation for a single value."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.3f}" if math.isnan(deviation) else f"{mean:.3f} ± {deviation:.3f}"


def save_figure(path: Path, summary: dict[str, Any]) -> None:
    """Equal signs and cosine against η: a colour a network, dashed with BatchNorm."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        axes = figure.subplots(1, 2)
        panels = ("same_sign", 100, "equal signs, % of tensors"), ("cosine", 1, "cosine")
        for axis, (key, factor, label) in zip(axes, panels, strict=True):
            for number, (network, *pair) in enumerate(pairs_of(summary)):
                for rows, name, style in zip(pair, (network, f"{network}-bn"), ("-", "--"), strict=True):
                    etas = [eta for eta, row in rows.items() if eta != "finite difference" and row["cosine"]]
                    points = [mean_and_deviation([factor * value for value in rows[eta][key]]) for eta in etas]
                    axis.errorbar(
                        [float(eta) for eta in etas],
                        [mean for mean, _ in points],
                        [0.0 if math.isnan(deviation) else deviation for _, deviation in points],
                        color=f"C{number}", linestyle=style, marker="o", markersize=3, linewidth=1.4, elinewidth=0.6,
                        label=name,
                    )  # fmt: skip
            axis.set_xscale("log")
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set(xlabel="size η of the normalised look-ahead step", ylabel=label)
        axes[0].set_title("First order against exact (dashed: with BatchNorm)", loc="left")
        axes[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.suptitle(f"GradInit at initialisation. {summary['data']}\n{summary['device']}", fontsize=8)
        save_png(figure, path, dpi=140)


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
