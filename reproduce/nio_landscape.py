"""Does GradCosine at initialisation predict how well a network trains? Random scalings of one network, ranked by both.

Every weight tensor of a small network is multiplied by a random factor of its own, many times over; the network as it
was drawn is one of them. GradCosine and what it competes with are measured before training, on the same minibatches
for all; then all are trained alike, for a short while. Reported is Spearman's rank correlation of each measure with the
training loss and the test accuracy that follow, with a bootstrap interval.

    python -m reproduce.nio_landscape [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from common.derivatives import group_gradients
from common.functional import classification_loss, parameters_of, pure_loss, uses_batch_statistics
from common.networks import make_network
from common.precision import full_precision
from common.record import Run, as_recorded, device_name, device_of, write_environment
from common.scales import scalable_tensors
from common.training import TrainingConfig, classification_metrics, train
from common.tree import numel
from common.types import Batch
from data import epoch_batches, sample_batches
from papers.metainit import gradient_quotient
from papers.nio import (
    grad_cosine,
    grad_cosine_floor,
    grad_norm,
    grad_sign,
    gradient_tensors,
    optima,
    optima_bound,
    optima_density,
    windows,
)
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.images import Splits, epochs_of, prepare
from reproduce.nio_landscape_report import print_report, save_figure, summarise
from reproduce.scales import rescaled

EXPERIMENT = "nio_landscape"
FAILED_ABOVE = 0.95
"""A run failed that diverged, or whose final training loss is above this share of ln(classes), a guess's. Ours."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden. All values are ours: the paper has no such study."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: six minutes on two cores. paper: all of CIFAR-10, ResNet-20, for a GPU (ours as well)."""
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

    networks: tuple[str, ...] = ("plain-5-8", "plain-5-8-bn")
    """Names of common.networks; with -bn appended, with BatchNorm."""
    stem_stride: int = 2
    """Stride of the first convolution of a plain-* network: 2 halves the resolution, for two cores."""
    seeds: int = 2
    """Draws of the network, each with scalings and an order of the training images of its own."""
    scalings: int = 31
    """Scalings of each draw; the first leaves it as it is."""
    spread: float = 4.0
    """The factor of a tensor is log-uniform between 1/spread and spread."""

    measure_batches: int = 4
    """Minibatches of training images that every measure is averaged over: the same for all runs."""
    measure_batch_size: int = 64
    """Their size."""
    splits: int = 4
    """D, sub-batches of such a minibatch whose gradients are compared; they do not overlap."""

    train_images: int | None = None
    """Training images, class-balanced; None: all. Not augmented."""
    test_images: int | None = None
    """Test images, class-balanced; None: all."""
    epochs: int = 10
    """More where a data set has fewer than `train_images`, for as many updates."""
    batch_size: int = 128
    """Of the training, by SGD with momentum 0.9, cosine schedule, weight decay 1e-4."""
    learning_rate: float = 0.1
    """One for all runs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training; measured is in float32 always."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        networks=("plain-4-4", "plain-4-4-bn"),
        seeds=1,
        scalings=4,
        measure_batches=1,
        measure_batch_size=16,
        train_images=256,
        test_images=100,
        epochs=1,
        batch_size=32,
    ),
    "quick": Config(preset="quick", train_images=2_000, test_images=1_000, epochs=4, batch_size=50, learning_rate=0.05),
    "paper": Config(preset="paper", networks=("resnet-20", "resnet-20-bn"), seeds=5, precision="bfloat16"),
}


# ---------------------------------------------------------------------------------------------- one unit of work
def make_model(config: Config, network: str, seed: int, num_classes: int) -> nn.Module:
    """The network as a seed draws it: the same on every device."""
    options: dict[str, Any] = {"stem_stride": config.stem_stride} if network.startswith("plain") else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_network(
            network.removesuffix("-bn"), batch_norm=network.endswith("-bn"), num_classes=num_classes, **options
        )


def draw_scales(model: nn.Module, spread: float, seed: int, scaling: int) -> dict[str, float]:
    """A factor for each tensor that NIO would scale, log-uniform in [1/spread, spread]; 1 for scaling 0."""
    names, _ = scalable_tensors(model)
    if scaling == 0:
        return dict.fromkeys(names, 1.0)
    generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + scaling)
    exponents = 2 * torch.rand(len(names), generator=generator, dtype=torch.float64) - 1
    return dict(zip(names, (spread**exponents).tolist(), strict=True))


def measure(model: nn.Module, batches: Sequence[Batch], splits: int) -> dict[str, float]:
    """What an initialisation is judged by, averaged over minibatches; by examples, or by sub-batches with BatchNorm.

    Ψ and Θ take H = 1 and Eq. (3) with η = 1: for one and the same H in all runs, neither changes a rank.
    """
    loss, theta = pure_loss(model), parameters_of(model)
    names = gradient_tensors(model, "without_batch_norm")  # those whose GradCosine NIO maximises
    coupled = uses_batch_statistics(model, "batch")
    rows = []
    for batch in batches:
        groups = windows(len(batch[1]), splits)
        g = group_gradients(loss, theta, batch, groups, mode="loop", wrt=names)
        row = {"grad_cosine_windows": grad_cosine(g)}  # whose floor is 0: they share no example
        if not coupled:
            g = group_gradients(loss, theta, batch, mode="vmap", chunk_size=32, wrt=names)
            row["grad_cosine_examples"] = grad_cosine(g)
        n, d = len(next(iter(g.values()))), optima(g)
        row |= {
            "grad_norm": grad_norm(g),
            "grad_sign": grad_sign(g) / (n * numel({name: theta[name] for name in names})),
            "gradient_quotient": gradient_quotient(loss, theta, batch),
            "optima_density": optima_density(d),
            "optima_bound": optima_bound(d),
        }
        rows.append({key: value.item() for key, value in row.items()})
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def fit(config: Config, model: nn.Module, seed: int, splits: Splits) -> dict[str, Any]:
    """Train; the loss on all training images and the test accuracy that it ends with."""

    def train_batches(epoch: int) -> Iterator[Batch]:
        # a function of seed and epoch alone: every scaling of a draw sees the same images in the same order
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return epoch_batches(
            splits.train, config.batch_size, mean=splits.data.mean, std=splits.data.std, generator=generator,
            augment=False,
        )  # fmt: skip

    recipe = TrainingConfig(epochs=config.epochs, learning_rate=config.learning_rate, precision=config.precision)
    result = train(
        model, classification_loss, train_batches, lambda _: {},
        steps_per_epoch=len(splits.train) // config.batch_size, config=recipe,
    )  # fmt: skip
    train_loss = classification_metrics(model, splits.batches(splits.train))["test_loss"]
    accuracy = classification_metrics(model, splits.batches(splits.test))["test_accuracy"]
    return ending(train_loss, accuracy, splits.data.num_classes, diverged=result.diverged)


def ending(train_loss: float, accuracy: float, num_classes: int, *, diverged: bool) -> dict[str, Any]:
    """How a run ended. One that diverged has an infinite loss and no accuracy: that of NaN logits means nothing."""
    diverged = diverged or not math.isfinite(train_loss)
    return {
        "train_loss": as_recorded(math.inf if diverged else train_loss),
        "test_accuracy": None if diverged else accuracy,
        "diverged": diverged,
        "failed": diverged or train_loss > FAILED_ABOVE * math.log(num_classes),
    }


def run_scaling(
    config: Config, network: str, seed: int, scaling: int, splits: Splits, batches: Sequence[Batch]
) -> dict[str, Any]:
    """Scale, measure, train: a function of its arguments alone."""
    start = time.perf_counter()
    model = make_model(config, network, seed, splits.data.num_classes)
    scales = draw_scales(model, config.spread, seed, scaling)
    model = rescaled(model, scales).to(splits.device)
    with full_precision(splits.device):
        measures = measure(model, batches, config.splits)
    ended = fit(config, model, seed, splits)
    return {
        "scales": scales,
        "measures": {key: as_recorded(value) for key, value in measures.items()},
        **ended,
        "seconds": time.perf_counter() - start,
    }


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    counts = ("stem_stride", "seeds", "measure_batches", "epochs", "batch_size", "learning_rate")
    for name in counts:
        if getattr(config, name) <= 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    for name in ("train_images", "test_images"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be at least 1, got {getattr(config, name)}.")
    if config.scalings < 2:
        raise ValueError(f"{EXPERIMENT}: `scalings` must be 2 or more to be ranked, got {config.scalings}.")
    if not 1 < config.spread < math.inf:
        raise ValueError(
            f"{EXPERIMENT}: `spread` must be above 1 and finite, got {config.spread}: factors lie in "
            "[1/spread, spread]."
        )
    if config.splits < 2 or config.measure_batch_size < 2 * config.splits:
        raise ValueError(
            f"{EXPERIMENT}: `splits` must be 2 or more and leave two examples of `measure_batch_size` to each, "
            f"got {config.splits} of {config.measure_batch_size}."
        )
    if not config.networks:
        raise ValueError(f"{EXPERIMENT}: `networks` must name one or more, got none.")
    device_of(config.device, EXPERIMENT)
    for network in config.networks:
        with torch.device("meta"):
            make_model(config, network, 0, 10)


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    splits = prepare(
        config.data, data_dir=config.data_dir, train=config.train_images, validation=0, test=config.test_images,
        batch_size=max(config.batch_size, config.measure_batch_size), device=device, caller=EXPERIMENT,
    )  # fmt: skip
    write_environment(folder, splits.data.record(), device)
    console.print(f"Data: {splits.data.identity}.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    epochs = epochs_of(config.epochs, config.train_images, len(splits.train))
    if epochs != config.epochs:
        console.print(f"Fewer images than asked for: {epochs} epochs instead of {config.epochs}, for as many updates.")
    with make_progress(quiet=config.quiet) as progress:
        compute(replace(config, epochs=epochs), folder, splits, progress)
    floor = grad_cosine_floor(windows(config.measure_batch_size, config.splits))
    summary = summarise(folder.records) | {"splits": config.splits, "floor": floor, "data": splits.data.identity}
    summary["device"] = device_name(device)
    save_figure(folder.folder / "figure.png", folder.records, summary)
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records and figure.png: {folder.folder}")
    return summary


def compute(config: Config, folder: Run, splits: Splits, progress: Progress) -> None:
    """A record a scaling; what one holds depends on the configuration alone, so that a run can be resumed."""
    stream = sample_batches(
        splits.train, config.measure_batch_size, mean=splits.data.mean, std=splits.data.std,
        generator=torch.Generator().manual_seed(0), augment=False,
    )  # fmt: skip
    batches = list(islice(stream, config.measure_batches))
    bar = progress.add_task("starting", total=len(config.networks) * config.seeds * config.scalings)
    for network in config.networks:
        for seed in range(config.seeds):
            for scaling in range(config.scalings):
                progress.update(bar, description=f"{network}, draw {seed}, scaling {scaling}")
                key = {"network": network, "seed": seed, "scaling": scaling}
                if folder.find(**key) is None:
                    folder.append(key | run_scaling(config, network, seed, scaling, splits, batches))
                progress.advance(bar)


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
