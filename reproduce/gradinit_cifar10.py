"""Does GradInit make a network's first epoch better, and does that outlast the epochs it costs?

The paper's CIFAR-10 networks with and without BatchNorm, trained by its recipe from their own initialisation, after
GradInit, with the epochs that GradInit costs added, with warm-up, and after LSUV and MetaInit.

    python -m reproduce.gradinit_cifar10 [--preset smoke|quick|acc1|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from common.functional import parameters_of, pure_loss
from common.initializers import lsuv_
from common.networks import make_network
from common.precision import full_precision
from common.record import Run, device_name, open_run, write_environment
from common.scales import kinds_of
from common.training import TrainingConfig
from common.types import Batch, NotFiniteError
from data import cutout, epoch_batches, mixup
from papers.gradinit import gradinit, relative_gradient_variance
from papers.metainit import metainit
from reproduce.command import end_well, make_progress, parse
from reproduce.gradinit_report import print_report, save_figure, summarise
from reproduce.images import Splits, epochs_of, fit, prepare
from reproduce.scales import rescaled, save_scales

EXPERIMENT = "gradinit_cifar10"


@dataclass(frozen=True)
class Recipe:
    """What the released launch scripts set for one network."""

    lr: float = 1e-2
    """GradInit's τ."""
    steps: int = 390
    """GradInit's T."""
    batch_size: int = 128
    """Of S and S̃."""
    training_batch_size: int = 128
    """Of training, whose learning rate is 0.1 at 128, in proportion."""
    clip_norm: float | None = None
    """Bound on the gradient's norm in training."""
    mixup: bool = False
    """Mixup in training (not in GradInit)."""


RECIPES = {
    "vgg19": Recipe(1e-2, clip_norm=1.0),
    "vgg19-bn": Recipe(1e-1),
    "resnet110": Recipe(5e-2, clip_norm=1.0),
    "resnet110-bn": Recipe(1e-3),
    "densenet100": Recipe(5e-3, 780, 64, 64),
    "densenet100-bn": Recipe(1e-2, 780, 64, 64),
    "wrn-28-10-bn": Recipe(3e-3, 780, 64, mixup=True),
}
"""The authors' settings. Other networks take the defaults, with clipping where there is no BatchNorm (ours)."""


@dataclass(frozen=True)
class Arm:
    """One way to begin, and what is done besides."""

    name: str
    init: Literal["own", "gradinit", "lsuv", "metainit"] = "own"
    warmup: bool = False
    extra: bool = False
    carries_claim: bool = False


ARMS = (
    Arm("own init", carries_claim=True),
    Arm("GradInit", "gradinit", carries_claim=True),
    Arm("own init, longer", extra=True, carries_claim=True),
    Arm("own init, warm-up", warmup=True),
    Arm("LSUV", "lsuv"),
    Arm("MetaInit", "metainit"),
)
"""In the order of work: an arm with `extra` needs to know what GradInit cost with its seed."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden."""

    preset: Literal["smoke", "quick", "acc1", "paper"] = "quick"
    """smoke: seconds. quick: minutes on two cores. acc1: the first epoch on all of CIFAR-10, hours on two cores.
    paper: 200 epochs, for a GPU."""
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

    networks: tuple[str, ...] = ("resnet20", "resnet20-bn")
    """Names of common.networks, with -bn for BatchNorm."""
    train_images: int | None = None
    """Training images, class-balanced; None: all. Ours."""
    test_images: int | None = None
    """Test images, class-balanced; None: all. Ours."""

    meta_learning_rate: float | None = None
    """GradInit: τ; None: the released one of each network."""
    steps: int | None = None
    """GradInit: T; None: the released one of each network."""
    eta: float = 0.1
    """GradInit: size of the normalised look-ahead step, as released for CIFAR-10."""
    gamma: float = 1.0
    """GradInit: bound on the gradient norm, as released for CIFAR-10."""
    exact: bool = False
    """GradInit: differentiate the look-ahead step too (ours)."""
    engine: Literal["lazy", "nested", "finite_difference"] = "lazy"
    """GradInit: how second derivatives are taken."""
    variance_batches: int = 16
    """Minibatches over which the gradient's variance is taken, first seed. Ours."""
    metainit_steps: int = 100
    """MetaInit: T, with relative steps of 0.03 falling to zero, on noise (ours)."""
    metainit_batch_size: int = 32
    """MetaInit: noise examples a step."""

    seeds: int = 3
    """Seeds of the arms that carry the claim; the others run with the first."""
    learning_rate: float = 0.1
    """At batches of 128, in proportion to the batch size; released."""
    epochs: int = 200
    """Released. More where a data set has fewer than `train_images`, for as many updates."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: to zero over all iterations, as released. constant: what the first of many epochs sees."""
    batch_size: int | None = None
    """None: the released one of each network."""
    weight_decay: float = 1e-4
    """Released; none on normalisation layers."""
    cutout: int = 16
    """Side of the hole in every training image, as released; 0: none."""
    warmup: float = 0.025
    """Share of the iterations that the warm-up arm warms up over: 5 of 200 epochs. Ours."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training; initialisation is float32 always."""
    channels_last: bool = False
    """Memory layout of the training."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        networks=("resnet-8", "resnet-8-bn"),
        train_images=128,
        test_images=100,
        steps=4,
        variance_batches=2,
        metainit_steps=2,
        metainit_batch_size=8,
        seeds=2,
        epochs=1,
        batch_size=32,
        meta_learning_rate=0.05,
        cutout=8,
    ),
    "quick": Config(
        preset="quick",
        train_images=1_500,
        test_images=1_000,
        steps=30,
        meta_learning_rate=0.03,
        variance_batches=8,
        metainit_steps=40,
        metainit_batch_size=16,
        epochs=4,
        warmup=0.25,
        batch_size=64,
    ),
    "acc1": Config(
        preset="acc1",
        networks=("vgg19", "resnet110", "vgg19-bn", "resnet110-bn"),
        epochs=1,
        schedule="constant",
        warmup=0.5,
        precision="bfloat16",
        channels_last=True,
    ),
    "paper": Config(
        preset="paper",
        networks=tuple(RECIPES),
        metainit_steps=500,
        seeds=4,
        precision="bfloat16",
        channels_last=True,
    ),
}


def recipe_of(config: Config, network: str) -> Recipe:
    """The released recipe of the network, with what the configuration overrides."""
    recipe = RECIPES.get(network, Recipe(clip_norm=None if network.endswith("-bn") else 1.0))
    size = config.batch_size
    given = {
        "lr": config.meta_learning_rate, "steps": config.steps, "batch_size": size, "training_batch_size": size
    }  # fmt: skip
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


def make(network: str, num_classes: int) -> nn.Module:
    return make_network(network.removesuffix("-bn"), batch_norm=network.endswith("-bn"), num_classes=num_classes)


# ---------------------------------------------------------------------------------------------- one unit of work
def initialise(network: str, seed: int, splits: Splits) -> nn.Module:
    """The network as its own rule draws it: a function of its arguments alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # on the CPU: the same weights on every device
        model = make(network, splits.data.num_classes)
    return model.to(splits.device)


def augmented(config: Config, splits: Splits, batch_size: int, seed: int) -> Iterator[Batch]:
    """One epoch of training images, shuffled, cropped, mirrored and cut out: a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    mean, std = splits.data.mean, splits.data.std
    for x, y in epoch_batches(splits.train, batch_size, mean=mean, std=std, generator=generator):
        yield (cutout(x, size=config.cutout, generator=generator) if config.cutout else x), y


class Stream:
    """Augmented epochs, one after the other, each in a new order."""

    def __init__(self, config: Config, splits: Splits, batch_size: int, seed: int) -> None:
        self.arguments, self.seed = (config, splits, batch_size), seed

    def __iter__(self) -> Iterator[Batch]:
        self.seed += 1
        return augmented(*self.arguments, self.seed)


def variance_of(config: Config, network: str, model: nn.Module, splits: Splits) -> dict[str, float]:
    stream = augmented(config, splits, recipe_of(config, network).batch_size, 77)
    with full_precision(splits.device):
        return relative_gradient_variance(
            pure_loss(model, exact=False), parameters_of(model), islice(stream, config.variance_batches)
        )


def run_initialisation(
    config: Config, network: str, arm: Arm, seed: int, splits: Splits, on_step: Callable[[dict[str, float]], None]
) -> dict[str, Any]:
    recipe = recipe_of(config, network)
    model = initialise(network, seed, splits)
    record: dict[str, Any] = {}
    if arm.init == "gradinit":
        record["kinds"] = kinds_of(model)
        if seed == 0:
            record["variance_before"] = variance_of(config, network, model, splits)
    start = time.perf_counter()
    try:
        if arm.init == "gradinit":
            result = gradinit(
                model,
                batches=Stream(config, splits, recipe.batch_size, 900_000_000 + 1_000 * seed),
                eta=config.eta,
                gamma=config.gamma,
                steps=recipe.steps,
                lr=recipe.lr,
                exact=config.exact,
                engine=config.engine,
                on_step=on_step,
                progress=False,
            )
            record |= {"history": result.history, "epochs_worth": epochs_worth(config, result.history, recipe, splits)}
        elif arm.init == "metainit":
            result = metainit(
                model,
                steps=config.metainit_steps,
                lr=0.03,
                update="log",
                linear_decay=True,
                input_shape=tuple(splits.train.images.shape[1:]),
                batch_size=config.metainit_batch_size,
                batch_norm="batch",
                generator=torch.Generator().manual_seed(seed),
                on_step=on_step,
                progress=False,
            )
        elif arm.init == "lsuv":
            batch = next(splits.batches(splits.train, 256))
            lsuv_(model, batch, generator=torch.Generator().manual_seed(seed))
            return record | {"seconds": time.perf_counter() - start}
        else:
            return record | {"seconds": 0.0}
    except NotFiniteError as error:  # a start too bad for a method is a result
        return record | {"seconds": time.perf_counter() - start, "failed": str(error)}
    record |= {"seconds": time.perf_counter() - start, "scales": result.scales, "skipped": result.skipped}
    if "variance_before" in record:
        record["variance_after"] = variance_of(config, network, model, splits)
    return record


def epochs_worth(config: Config, history: list[dict[str, float]], recipe: Recipe, splits: Splits) -> float:
    """What GradInit cost in epochs of training, by arithmetic: forward passes an example, of which training takes 3."""
    objective = {"lazy": (6, 12), "nested": (6, 15), "finite_difference": (6, 9)}[config.engine][config.exact]
    foreseen, surprise = {"lazy": (9, 11), "nested": (12, 12), "finite_difference": (6, 6)}[config.engine]
    total, expected = 0.0, 0.0
    for entry in history:
        met = entry["constraint"] == expected or config.exact
        total += (foreseen if met else surprise) if entry["constraint"] else objective
        expected = entry["constraint"]
    return total * recipe.batch_size / (3 * len(splits.train))


def prepared(network: str, arm: Arm, seed: int, splits: Splits, start: dict[str, Any]) -> nn.Module:
    """The arm's network at the start of its training, again, from the record of its initialisation."""
    model = initialise(network, seed, splits)
    if arm.init == "lsuv":
        lsuv_(model, next(splits.batches(splits.train, 256)), generator=torch.Generator().manual_seed(seed))
    return rescaled(model, start.get("scales", {}))


def run_training(
    config: Config,
    network: str,
    arm: Arm,
    seed: int,
    splits: Splits,
    start: dict[str, Any],
    extra_epochs: int,
    checkpoint: Path,
    on_epoch: Callable[[dict[str, float]], None],
) -> dict[str, Any]:
    recipe = recipe_of(config, network)
    model = prepared(network, arm, seed, splits, start)
    has_norm = network.endswith("-bn")
    norms = [
        f"{path}.{own}"
        for path, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for own, _ in module.named_parameters(recurse=False)
    ]
    training = TrainingConfig(
        epochs=config.epochs + extra_epochs,
        learning_rate=config.learning_rate * recipe.training_batch_size / 128,
        weight_decay=config.weight_decay,
        no_decay=tuple(norms),
        lr_factors=(("*bias", 0.1),) if network.startswith("resnet") and not has_norm else (),
        schedule=config.schedule,
        warmup=config.warmup if arm.warmup else 0.0,
        clip_norm=recipe.clip_norm,
        precision=config.precision,
        channels_last=config.channels_last,
    )

    def train_batches(epoch: int) -> Iterator[Batch]:
        # a function of seed and epoch alone: every arm of a seed sees the same images in the same order
        own = 1_000_003 * seed + epoch
        generator = torch.Generator().manual_seed(500_000_000 + own)
        for batch in augmented(config, splits, recipe.training_batch_size, own):
            yield mixup(batch, splits.data.num_classes, generator=generator) if recipe.mixup else batch

    return fit(model, train_batches, splits, training, recipe.training_batch_size, checkpoint, on_epoch)


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    for name in ("metainit_steps", "metainit_batch_size", "seeds", "epochs", "eta", "gamma", "learning_rate"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    for name in ("train_images", "test_images", "steps", "meta_learning_rate", "batch_size"):
        if getattr(config, name) is not None and not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    if config.variance_batches < 2:
        raise ValueError(f"{EXPERIMENT}: `variance_batches` must be at least 2, got {config.variance_batches}.")
    if config.cutout < 0:
        raise ValueError(f"{EXPERIMENT}: `cutout` must be 0 or more pixels, got {config.cutout}.")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{EXPERIMENT}: `device` must be there, got 'cuda' without a GPU that torch sees. Try 'auto'.")
    for network in config.networks:
        if recipe_of(config, network).batch_size % 2:
            raise ValueError(f"{EXPERIMENT}: `batch_size` must be even, got {config.batch_size}: S̃ shares half of S.")
        with torch.device("meta"):
            make(network, 10)


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    console = Console()
    device = torch.device(
        ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    )
    # the numbers do not depend on where the data and the folder are, nor on what is shown
    asked = asdict(replace(config, data_dir=None, output=None, quiet=False))
    folder = open_run(EXPERIMENT, asked, seed=0, output=config.output)
    console.print(f"Loading data ({config.data}); from the hub this may take a minute the first time.")
    splits = prepare(
        config.data,
        data_dir=config.data_dir,
        train=config.train_images,
        validation=0,
        test=config.test_images,
        batch_size=max(recipe_of(config, network).training_batch_size for network in config.networks),
        device=device,
        caller=EXPERIMENT,
    )
    write_environment(folder, splits.data.record(), device)
    console.print(f"Data: {splits.data.identity}.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    epochs = epochs_of(config.epochs, config.train_images, len(splits.train))
    if epochs != config.epochs:
        console.print(f"Fewer images than asked for: {epochs} epochs instead of {config.epochs}, for as many updates.")
    with make_progress(quiet=config.quiet) as progress:
        compute(replace(config, epochs=epochs), folder, splits, progress)
    save_scales(folder, "network", "gradinit, metainit")
    environment = {"data": splits.data.identity, "device": device_name(device), "schedule": config.schedule}
    summary = summarise(folder.records, [arm.name for arm in ARMS]) | environment
    save_figure(folder.folder / "figure.png", folder.records, summary)
    print_report(console, summary)
    folder.finish(summary)
    console.print(f"Records, figure.png and scales.safetensors: {folder.folder}")
    return summary


def order_of_work(config: Config) -> Iterator[tuple[int, str, Arm]]:
    """(seed, network, arm): what carries the claim first, seed by seed, so that a run cut off has said something."""
    for group in (ARMS[:2], ARMS[2:3]):
        for seed in range(config.seeds):
            for network in config.networks:
                for arm in group:
                    yield seed, network, arm
    for network in config.networks:
        for arm in ARMS[3:]:
            yield 0, network, arm


def compute(config: Config, folder: Run, splits: Splits, progress: Progress) -> None:
    """Each unit of work is a function of the configuration, recorded when it is whole: so a run can be resumed."""
    work = list(order_of_work(config))
    bar = progress.add_task("starting", total=float(len(work)))
    for seed, network, arm in work:
        key = {"network": network, "arm": arm.name, "seed": seed}
        recipe = recipe_of(config, network)
        steps = {"gradinit": recipe.steps, "metainit": config.metainit_steps}.get(arm.init, 1)
        progress.update(bar, description=f"{network}, {arm.name}, seed {seed}: initialise")
        start = folder.find(kind="initialisation", **key)
        if start is None:
            tick = lambda _, steps=steps: progress.advance(bar, 0.5 / steps)  # noqa: E731
            record = run_initialisation(config, network, arm, seed, splits, tick)
            start = folder.append({"kind": "initialisation"} | key | record)
        progress.update(bar, description=f"{network}, {arm.name}, seed {seed}: train")
        if "failed" not in start and folder.find(kind="training", **key) is None:
            extra = 0
            if arm.extra:
                cost = folder.find(kind="initialisation", network=network, arm="GradInit", seed=seed) or {}
                extra = math.ceil(cost.get("epochs_worth", 0.0))
            checkpoint = folder.folder / f"{network}-{ARMS.index(arm)}-{seed}.checkpoint"
            record = run_training(config, network, arm, seed, splits, start, extra, checkpoint, lambda _: None)
            folder.append({"kind": "training", "extra_epochs": extra} | key | record)
        progress.update(bar, completed=float(work.index((seed, network, arm)) + 1))


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
