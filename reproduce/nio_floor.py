"""How much of a measured GradCosine is its floor, and does NIO raise it above the floor?

Sub-batches that share examples agree for that reason alone, on random gradients too. At the released run's settings
(four windows of 64 examples that reach a fifth into each other), on the windows of its code and on those that were
meant, and without overlap: GradCosine before and after NIO, on the batches that it saw and on others.

    python -m reproduce.nio_floor [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from common.derivatives import group_gradients
from common.functional import classification_loss, parameters_of, pure_loss
from common.networks import ResNet, make_network
from common.options import check_choice
from common.precision import full_precision
from common.record import Run, as_recorded, device_name, device_of, write_environment
from common.tree import tree_map
from common.types import Batch, NotFiniteError
from data import ImageData, load_images, sample_batches
from papers.nio import example_losses, grad_cosine, grad_cosine_floor, gradient_tensors, measure, nio, windows
from papers.nio.batching import Rule
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.nio_floor_report import print_report, save_figure, summarise
from reproduce.scales import save_scales

EXPERIMENT = "nio_floor"
MEASURED = ("grad_cosine", "grad_norm", "norm_ratio")
Objective = Literal["gc", "gc_gn_sqrt"]


@dataclass(frozen=True)
class Groups:
    """What a batch's gradients are taken of, by its name in the records."""

    splits: int | Literal["examples"]
    overlap: float = 0.0
    rule: Rule = "intended"

    def of(self, batch_size: int) -> list[slice]:
        if isinstance(self.splits, str):
            return [slice(k, k + 1) for k in range(batch_size)]
        return windows(batch_size, self.splits, self.overlap, rule=self.rule)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: minutes on two cores. paper: the released iterations and batches, for a GPU."""
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

    networks: tuple[str, ...] = ("resnet-8-bn", "resnet-8")
    """Names of common.networks; with -bn for BatchNorm, with -bn-zero for BatchNorm whose last gain in each
    residual block is zero, as in the released run. Those without BatchNorm are also compared by single examples."""
    width: int = 8
    """Channels of the first stage. Ours."""
    batch_size: int = 64
    """B; released."""
    splits: int = 4
    """D; released."""
    overlap: float = 0.2
    """r, of the windows that overlap; released."""
    objectives: tuple[Objective, ...] = ("gc", "gc_gn_sqrt")
    """The paper's, and that of the released configuration. γ is infinite: in the released run it was never reached."""
    steps: int = 15
    """T; the released run has 100. Each iteration sees a batch of its own."""
    learning_rate: float = 2e-2
    """τ; the released 3e-3 in proportion to T: a multiplier can move as far."""
    batches: int = 6
    """Batches on which everything is measured, before and after: so many of those fitted, so many held out."""
    grid_splits: tuple[int, ...] = (2, 4, 8)
    """D, of the comparison at initialisation."""
    grid_overlaps: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    """r, of the same."""
    grid_batches: int = 2
    """Held-out batches, of the same."""
    seeds: int = 3
    """Initialisations, each with batches of its own."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        networks=("plain-3-bn", "plain-3"),
        width=2,
        batch_size=16,
        steps=2,
        batches=2,
        grid_splits=(2, 4),
        grid_overlaps=(0.0, 0.6),
        grid_batches=1,
        seeds=2,
    ),
    "quick": Config(preset="quick"),
    "paper": Config(
        preset="paper",
        networks=("resnet110-bn", "resnet110-bn-zero", "resnet110"),
        width=16,
        steps=100,
        learning_rate=3e-3,
        batches=100,
        grid_batches=8,
        seeds=4,
    ),
}


def groups_of(config: Config, network: str) -> dict[str, Groups]:
    """By name: what NIO is run on."""
    own = {
        "released": Groups(config.splits, config.overlap, "released"),
        "intended": Groups(config.splits, config.overlap, "intended"),
        "no overlap": Groups(config.splits),
    }
    return own if has_batch_norm(network) else own | {"examples": Groups("examples")}


def has_batch_norm(network: str) -> bool:
    return network.removesuffix("-zero").endswith("-bn")


def make(network: str, width: int, num_classes: int) -> nn.Module:
    """A network by its name here."""
    base = network.removesuffix("-zero").removesuffix("-bn")
    model = make_network(base, width=width, batch_norm=has_batch_norm(network), num_classes=num_classes)
    if network.endswith("-zero"):
        if not (isinstance(model, ResNet) and has_batch_norm(network)):
            raise ValueError(f"{EXPERIMENT}: -zero needs a residual network with BatchNorm, got {network!r}.")
        for block in model.blocks:
            nn.init.zeros_(block.get_submodule("norm2").get_parameter("weight"))
    return model


# ---------------------------------------------------------------------------------------------- one unit of work
def initialise(config: Config, network: str, seed: int, data: ImageData, device: torch.device) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # on the CPU: the same weights on every device
        return make(network, config.width, data.num_classes).to(device)


def batches_of(
    config: Config, seed: int, data: ImageData, device: torch.device
) -> tuple[list[Batch], dict[str, list[Batch]]]:
    """The batches to fit; and by name those to measure on: the first of them, and others of images never fitted."""

    def draw(part: Any, count: int, own: int) -> list[Batch]:
        stream = sample_batches(
            part, config.batch_size, mean=data.mean, std=data.std,
            generator=torch.Generator().manual_seed(own), device=device,
        )  # fmt: skip
        return list(islice(stream, count))

    fitted = draw(data.train, config.steps, 2 * seed)
    held_out = draw(data.test, config.batches, 2 * seed + 1)
    return fitted, {"fitted": fitted[: config.batches], "held out": held_out}


def measured(config: Config, model: nn.Module, network: str, groups: Groups, batches: Sequence[Batch]) -> list[dict]:
    """GC, GN and κ of each batch."""
    shared = has_batch_norm(network)
    loss = pure_loss(model, example_losses if shared else classification_loss)
    of_batch = partial(
        measure,
        loss,
        parameters_of(model),
        groups=groups.of(config.batch_size),
        coupling="shared" if shared else "independent",
        grad_params=gradient_tensors(model, "released"),
    )
    rows = []
    for batch in batches:
        values = of_batch(batch)
        rows.append({key: as_recorded(values[key].item()) for key in MEASURED})
    return rows


def measure_grid(config: Config, model: nn.Module, network: str, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """GC of every D, r and window rule at initialisation, and of examples, on each batch.

    A window's gradient is the mean of its examples' (of their losses in one shared forward pass, with BatchNorm).
    """
    cells = [
        Groups(splits, overlap, rule)
        for rule in get_args(Rule)
        for splits in config.grid_splits
        for overlap in config.grid_overlaps
    ]
    cells.append(Groups("examples"))
    values: list[list[float | str]] = [[] for _ in cells]
    shared = has_batch_norm(network)
    loss = pure_loss(model, example_losses if shared else classification_loss)
    theta, names = parameters_of(model), gradient_tensors(model, "released")
    for batch in batches:
        of_examples = group_gradients(loss, theta, batch, mode="shared" if shared else "auto", wrt=names)
        for cell, own in zip(cells, values, strict=True):
            means = [tree_map(lambda leaf, k=k: leaf[k].mean(0), of_examples) for k in cell.of(config.batch_size)]
            GC = grad_cosine({name: torch.stack([mean[name] for mean in means]) for name in names}).item()
            own.append(as_recorded(GC))
    floors = [grad_cosine_floor(cell.of(config.batch_size)) for cell in cells]
    return [
        asdict(cell) | {"floor": floor, "grad_cosine": own}
        for cell, floor, own in zip(cells, floors, values, strict=True)
    ]


def optimise(
    config: Config,
    model: nn.Module,
    network: str,
    groups: Groups,
    objective: Objective,
    batches: Sequence[Batch],
    on_step: Callable[[dict[str, float]], None],
) -> dict[str, Any]:
    """NIO as released, but for what the configuration says."""
    start = time.perf_counter()
    try:
        result = nio(
            model,
            batches=batches,
            splits=groups.splits,
            overlap=groups.overlap,
            rule=groups.rule,
            objective=objective,
            steps=config.steps,
            lr=config.learning_rate,
            coupling="shared" if has_batch_norm(network) else "independent",  # the same without BatchNorm, and faster
            variant="released",
            on_step=on_step,
            progress=False,
        )
    except NotFiniteError as error:  # a norm that is rewarded without a bound may overflow: a result
        return {"failed": str(error), "seconds": time.perf_counter() - start}
    history = [{key: as_recorded(entry[key]) for key in ("step", *MEASURED)} for entry in result.history]
    return {"history": history, "scales": result.scales, "seconds": time.perf_counter() - start}


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    for name in ("seeds", "steps", "batches", "grid_batches", "width", "learning_rate"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    for name in ("networks", "objectives", "grid_splits", "grid_overlaps"):
        if not getattr(config, name):
            raise ValueError(f"{EXPERIMENT}: `{name}` must name one or more, got none.")
    for objective in config.objectives:
        check_choice(EXPERIMENT, "objectives", objective, get_args(Objective))
    if config.batches > config.steps:
        raise ValueError(
            f"{EXPERIMENT}: `batches` are fitted ones too, at most `steps`, got {config.batches} of {config.steps}."
        )
    for splits in (config.splits, *config.grid_splits):
        for overlap in (config.overlap, *config.grid_overlaps):
            windows(config.batch_size, splits, overlap)
    device_of(config.device, EXPERIMENT)
    for network in config.networks:
        with torch.device("meta"):
            make(network, config.width, 10)


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    # class-balanced, and enough for a batch an iteration
    wanted = [max(500, config.batch_size * count) for count in (config.steps, config.batches)]
    data = load_images(config.data, data_dir=config.data_dir, train=wanted[0], test=wanted[1])
    write_environment(folder, data.record(), device)
    console.print(f"Data: {data.identity}.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    with make_progress(quiet=config.quiet) as progress, full_precision(device):
        compute(config, folder, data, device, progress)
    summary = summarise(folder.records, config.batch_size) | {"data": data.identity, "device": device_name(device)}
    save_scales(folder, "network", "nio")
    save_figure(folder.folder / "figure.png", folder.records, summary)
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records, figure.png and scales.safetensors: {folder.folder}")
    return summary


def order_of_work(config: Config) -> Iterator[tuple[int, str]]:
    """Seed by seed, so that a run cut short holds whole comparisons."""
    for seed in range(config.seeds):
        for network in config.networks:
            yield seed, network


def compute(config: Config, folder: Run, data: ImageData, device: torch.device, progress: Progress) -> None:
    """Append a record for each unit of work that the folder lacks."""
    runs = sum(len(groups_of(config, network)) for network in config.networks) * len(config.objectives)
    bar = progress.add_task("starting", total=float(runs * config.seeds))
    for seed, network in order_of_work(config):
        fitted, batches = batches_of(config, seed, data, device)
        key: dict[str, Any] = {"network": network, "seed": seed}

        def initial(network: str = network, seed: int = seed) -> nn.Module:
            return initialise(config, network, seed, data, device)

        def everywhere(model: nn.Module, groups: Groups, network: str = network, batches: dict = batches) -> dict:
            return {name: measured(config, model, network, groups, own) for name, own in batches.items()}

        progress.update(bar, description=f"{network}, seed {seed}: D and r")
        if folder.find(kind="grid", **key) is None:
            cells = measure_grid(config, initial(), network, batches["held out"][: config.grid_batches])
            folder.append({"kind": "grid"} | key | {"cells": cells})
        for name, groups in groups_of(config, network).items():
            if folder.find(kind="before", groups=name, **key) is None:
                floor = 0.0 if groups.splits == "examples" else grad_cosine_floor(groups.of(config.batch_size))
                about = {"groups": name, **asdict(groups), "floor": floor}
                folder.append({"kind": "before"} | key | about | {"measured": everywhere(initial(), groups)})
            for objective in config.objectives:
                progress.update(bar, description=f"{network}, seed {seed}, {name}, {objective}")
                if folder.find(kind="after", groups=name, objective=objective, **key) is not None:
                    progress.advance(bar)
                    continue
                model = initial()
                tick = lambda _: progress.advance(bar, 1 / config.steps)  # noqa: E731
                record = optimise(config, model, network, groups, objective, fitted, tick)
                about: dict[str, Any] = {"groups": name, "objective": objective, "arm": f"{name}, {objective}"}
                if "failed" not in record:
                    about["measured"] = everywhere(model, groups)
                folder.append({"kind": "after"} | key | about | record)


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
