"""Does MetaInit rescue a bad start, and how does the rescued network compare with the known initialisers?

Plain networks (no skip connection, no normalisation), trained from bad starts, from the same starts after MetaInit,
and from known initialisations. Every arm is trained at each learning rate of a grid with the first seed; the best on
held-out training images is kept, and the arms that carry the claim are repeated at it with the other seeds.

    python -m reproduce.metainit_cifar10 [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from common.derivatives import gradient, hvp
from common.functional import parameters_of, pure_loss, uses_batch_statistics
from common.networks import make_network
from common.precision import full_precision
from common.record import Run, device_name, device_of, write_environment
from common.training import TrainingConfig
from common.tree import flatten
from common.types import Batch, NotFiniteError
from data import epoch_batches
from papers.metainit import metainit, noise_batches
from papers.metainit.objective import relative_change
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.images import Splits, epochs_of, fit, prepare
from reproduce.metainit_arms import ARMS, Arm
from reproduce.metainit_report import best_learning_rate, print_report, save_figure, summarise
from reproduce.scales import rescaled, save_scales

EXPERIMENT = "metainit_cifar10"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: minutes on two cores. paper: plain WRN-28-10 and ResNet-110, 200 epochs, for a GPU."""
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

    networks: tuple[str, ...] = ("plain-10-8",)
    """Names of common.networks, without skips or normalisation: plain-DEPTH-WIDTH, resnet110, wrn-28-10, …"""
    activation: str = "tanh"
    """Any activation of torch.nn, by lower-case name."""
    stem_stride: int = 2
    """Stride of the first convolution of a plain-* network. Ours: halves the resolution, for two cores."""
    train_images: int | None = None
    """Training images, class-balanced; None: all that are not held out. Ours."""
    validation_images: int = 500
    """Training images held out to choose the learning rate. Ours."""
    test_images: int | None = None
    """Test images, class-balanced; None: all. Ours."""

    steps: int = 500
    """MetaInit: T, Figure 2."""
    meta_learning_rate: float = 0.1
    """MetaInit: learning rate of the norms, Figure 2 (linear update)."""
    momentum: float = 0.9
    """MetaInit: μ, Figure 2."""
    update: Literal["linear", "log"] = "linear"
    """MetaInit: linear is Figure 2; log takes relative steps (ours)."""
    linear_decay: bool = False
    """MetaInit: let its learning rate fall to zero (ours)."""
    form: Literal["taylor", "step"] = "taylor"
    """MetaInit: form of the gradient quotient; taylor is Figure 2."""
    micro_batch_size: int | None = None
    """MetaInit: examples held in memory at once."""
    noise_batch_size: int = 32
    """MetaInit: examples a noise batch; 32 is inferred from third parties for CIFAR."""

    seeds: int = 3
    """Seeds of the arms that carry the claim; the others run with the first."""
    learning_rates: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.003)
    """The grid. Ours."""
    epochs: int = 200
    """Ours, after the SGDR recipe. More where a data set has fewer than `train_images`, for as many updates."""
    batch_size: int = 128
    """Ours, after the SGDR recipe."""
    weight_decay: float = 5e-4
    """Ours, after the SGDR recipe."""
    warmup: float = 0.05
    """Share of the iterations that the warm-up arm warms up over. Ours."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training; initialisation is float32 always."""
    channels_last: bool = False
    """Memory layout of the training."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        networks=("plain-5-4",),
        train_images=256,
        validation_images=100,
        test_images=100,
        steps=4,
        noise_batch_size=8,
        update="log",
        meta_learning_rate=0.05,
        seeds=2,
        learning_rates=(0.1,),
        epochs=1,
        batch_size=64,
    ),
    "quick": Config(
        preset="quick",
        train_images=3_000,
        test_images=1_000,
        steps=100,
        update="log",
        meta_learning_rate=0.03,
        linear_decay=True,
        learning_rates=(0.3, 0.1, 0.03),
        epochs=4,
        batch_size=64,
    ),
    "paper": Config(
        preset="paper",
        networks=("wrn-28-10", "resnet110"),
        activation="relu",
        validation_images=5_000,
        precision="bfloat16",
        channels_last=True,
    ),
}


# ---------------------------------------------------------------------------------------------- one unit of work
def make(config: Config, network: str, num_classes: int, *, batch_norm: bool) -> nn.Module:
    """The network by its name, without skips."""
    options: dict[str, Any] = {"stem_stride": config.stem_stride} if network.startswith("plain") else {"skip": False}
    if network.startswith("vgg"):
        options = {}
    return make_network(
        network, activation=config.activation, batch_norm=batch_norm, num_classes=num_classes, **options
    )


def initialise(config: Config, network: str, arm: Arm, seed: int, splits: Splits) -> nn.Module:
    """The arm's network as it starts, before MetaInit: a function of its arguments alone."""
    model = make(config, network, splits.data.num_classes, batch_norm=arm.batch_norm).to(splits.device)
    device = splits.device
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same weights on every device
    with full_precision(device):
        arm.start(model, config.activation, next(splits.batches(splits.train, 256)), generator)
    return model


def measure_quotient(config: Config, model: nn.Module, splits: Splits, seed: int) -> float:
    """GQ, the median over five noise batches that every arm shares; BatchNorm as it would be in training."""
    device = splits.device
    generator = torch.Generator().manual_seed(10_000 + seed)
    noise = noise_batches(
        shape_of(splits), splits.data.num_classes, config.noise_batch_size, generator=generator, device=device
    )
    loss, theta = pure_loss(model), parameters_of(model)
    size = None if uses_batch_statistics(model, "batch") else config.micro_batch_size

    def quotient(batch: Batch) -> float:
        g = gradient(loss, theta, batch, micro_batch_size=size)
        Hg = hvp(loss, theta, g, batch, micro_batch_size=size)
        return relative_change(flatten(g), flatten(Hg), epsilon=1e-5).mean().item()

    with full_precision(device):
        return statistics.median(quotient(next(noise)) for _ in range(5))


def shape_of(splits: Splits) -> tuple[int, ...]:
    return tuple(splits.train.images.shape[1:])


def norms_of(model: nn.Module) -> dict[str, float]:
    return {name: leaf.norm().item() for name, leaf in parameters_of(model).items() if leaf.ndim >= 2}


def run_initialisation(
    config: Config, network: str, arm: Arm, seed: int, splits: Splits, on_step: Callable[[dict[str, float]], None]
) -> dict[str, Any]:
    start = time.perf_counter()
    model = initialise(config, network, arm, seed, splits)
    seconds = time.perf_counter() - start
    record = {
        "gradient_quotient_before": measure_quotient(config, model, splits, seed),
        "norms_before": norms_of(model),
    }
    if arm.metainit:
        start = time.perf_counter()
        try:
            result = metainit(
                model,
                steps=config.steps,
                lr=config.meta_learning_rate,
                momentum=config.momentum,
                update=config.update,
                linear_decay=config.linear_decay,
                form=config.form,
                micro_batch_size=config.micro_batch_size,
                input_shape=shape_of(splits),
                batch_size=config.noise_batch_size,
                generator=torch.Generator().manual_seed(seed),
                on_step=on_step,
                progress=False,
            )
        except NotFiniteError as error:  # a start too bad for MetaInit is a result
            return record | {"seconds": seconds + time.perf_counter() - start, "failed": str(error)}
        seconds += time.perf_counter() - start
        record |= {
            "gradient_quotient_after": measure_quotient(config, model, splits, seed),
            "norms_after": norms_of(model),
            "scales": result.scales,
            "skipped": result.skipped,
            "history": result.history,
        }
    return record | {"seconds": seconds}


def run_training(
    config: Config,
    model: nn.Module,
    arm: Arm,
    seed: int,
    learning_rate: float,
    splits: Splits,
    checkpoint: Path,
    on_epoch: Callable[[dict[str, float]], None],
) -> dict[str, Any]:
    recipe = TrainingConfig(
        epochs=config.epochs,
        learning_rate=learning_rate,
        weight_decay=config.weight_decay,
        warmup=config.warmup if arm.warmup else 0.0,
        precision=config.precision,
        channels_last=config.channels_last,
    )

    def train_batches(epoch: int) -> Iterator[Batch]:
        # a function of seed and epoch alone: every arm of a seed sees the same images in the same order
        generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        return epoch_batches(
            splits.train, config.batch_size, mean=splits.data.mean, std=splits.data.std, generator=generator
        )

    return fit(model, train_batches, splits, recipe, config.batch_size, checkpoint, on_epoch)


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    counts = ("validation_images", "steps", "noise_batch_size", "seeds", "epochs", "batch_size", "stem_stride")
    for name in (*counts, "meta_learning_rate"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    for name in ("train_images", "test_images", "micro_batch_size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be at least 1, got {getattr(config, name)}.")
    if not 0 <= config.momentum < 1:
        raise ValueError(f"{EXPERIMENT}: `momentum` must lie in [0, 1), got {config.momentum}.")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"{EXPERIMENT}: `warmup` must lie in [0, 1], got {config.warmup}: a share of the iterations.")
    if not config.networks:
        raise ValueError(f"{EXPERIMENT}: `networks` must name one or more, got none.")
    if not config.learning_rates or min(config.learning_rates) <= 0:
        raise ValueError(f"{EXPERIMENT}: `learning_rates` must be positive, got {config.learning_rates}.")
    device_of(config.device, EXPERIMENT)
    for network in config.networks:
        with torch.device("meta"):
            make(config, network, 10, batch_norm=True)


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    splits = prepare(
        config.data,
        data_dir=config.data_dir,
        train=config.train_images,
        validation=config.validation_images,
        test=config.test_images,
        batch_size=config.batch_size,
        device=device,
        caller=EXPERIMENT,
    )
    write_environment(folder, splits.data.record(), device)
    console.print(f"Data: {splits.data.identity}; {len(splits.validation):,} of the training images held out.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    epochs = epochs_of(config.epochs, config.train_images, len(splits.train))
    if epochs != config.epochs:
        console.print(f"Fewer images than asked for: {epochs} epochs instead of {config.epochs}, for as many updates.")
    with make_progress(quiet=config.quiet) as progress:
        compute(replace(config, epochs=epochs), folder, splits, progress)
    save_scales(folder, "network", "metainit")
    environment = {"data": splits.data.identity, "device": device_name(device)}
    summary = summarise(folder.records, [arm.name for arm in ARMS]) | environment
    save_figure(folder.folder / "figure.png", folder.records, summary)
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records, figure.png and scales.safetensors: {folder.folder}")
    return summary


def compute(config: Config, folder: Run, splits: Splits, progress: Progress) -> None:
    """Each unit of work is a function of the configuration, recorded when it is whole: so a run can be resumed."""
    training_work = config.epochs * float(len(splits.train))  # in gradients of one example
    # about nine gradients' arithmetic an example and step, and as much again in overhead on small networks
    meta_work = 15.0 * config.steps * config.noise_batch_size
    bar = progress.add_task("starting", total=total_work(config, meta_work, training_work))

    def unit(label: str, work: float, parts: int, work_on: Callable[..., dict[str, Any]], **key: Any) -> dict[str, Any]:
        progress.update(bar, description=label)
        record = folder.find(**key)
        if record is not None:
            progress.advance(bar, work)
            return record
        return folder.append(key | work_on(lambda _: progress.advance(bar, work / parts)))

    for network in config.networks:
        best: dict[str, float] = {}
        for seed in range(config.seeds):
            for arm in ARMS:
                if seed > 0 and not arm.carries_claim:
                    continue
                key = {"network": network, "arm": arm.name, "seed": seed}
                start = unit(
                    f"{arm.name}, seed {seed}: initialise",
                    meta_work if arm.metainit else 0.0,
                    config.steps,
                    lambda tick, n=network, a=arm, s=seed: run_initialisation(config, n, a, s, splits, tick),
                    kind="initialisation",
                    **key,
                )
                if "failed" in start:
                    continue
                # the grid with the arm's first seed that can be trained, its best rate with the others
                rates = (best[arm.name],) if arm.name in best else config.learning_rates
                trained = []
                for rate in rates:

                    def trained_at(tick, network=network, arm=arm, seed=seed, rate=rate, start=start) -> dict[str, Any]:
                        model = rescaled(initialise(config, network, arm, seed, splits), start.get("scales", {}))
                        checkpoint = folder.folder / f"{network}-{ARMS.index(arm)}-{seed}-{rate:g}.checkpoint"
                        return run_training(config, model, arm, seed, rate, splits, checkpoint, tick)

                    label = f"{arm.name}, seed {seed}: train at {rate:g}"
                    trained.append(
                        unit(
                            label, training_work, config.epochs, trained_at, kind="training", learning_rate=rate, **key
                        )
                    )
                best.setdefault(arm.name, best_learning_rate(trained))


def total_work(config: Config, meta_work: float, training_work: float) -> float:
    """Of the whole run, for the time that is left."""
    total = 0.0
    for arm in ARMS:
        seeds = config.seeds if arm.carries_claim else 1
        total += seeds * meta_work if arm.metainit else 0.0
        total += (len(config.learning_rates) + seeds - 1) * training_work
    return total * len(config.networks)


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
