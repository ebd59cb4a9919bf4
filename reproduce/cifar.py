"""What the CIFAR experiments of GradInit and NIO share: networks and recipes, arms, units of work, the run itself.

An experiment is a name, its arms and its report; everything is recorded unit by unit, so that a run can be resumed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from common.initializers import lsuv_
from common.networks import make_network
from common.record import Run, device_name, device_of, read_run, write_environment
from common.scales import kinds_of
from common.training import TrainingConfig
from common.types import Batch, InitResult, NotFiniteError
from data import cutout, epoch_batches, mixup
from papers.gradinit import gradinit
from papers.metainit import metainit
from reproduce.command import begin, make_progress
from reproduce.images import Splits, epochs_of, fit, prepare
from reproduce.scales import rescaled, save_scales


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
    "wrn-28-10": Recipe(3e-3, 780, 64, clip_norm=1.0, mixup=True),
    "wrn-28-10-bn": Recipe(3e-3, 780, 64, mixup=True),
}
"""The authors' settings, but for wrn-28-10, which they have with BatchNorm alone; ours takes those of its twin. Other
networks take the defaults, with clipping where there is no BatchNorm (ours)."""


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


def recipe_of(config: Config, network: str) -> Recipe:
    """The released recipe of the network, with what the configuration overrides."""
    recipe = RECIPES.get(network, Recipe(clip_norm=None if network.endswith("-bn") else 1.0))
    size = config.batch_size
    given = {
        "lr": config.meta_learning_rate, "steps": config.steps, "batch_size": size, "training_batch_size": size
    }  # fmt: skip
    return replace(recipe, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Arm:
    """One way to begin, and what is done besides."""

    name: str
    init: "Initialiser | None" = None
    """None: the network's own."""
    warmup: bool = False
    extra_of: tuple[str, ...] = ()
    """Arms whose cost in epochs, the largest of them, is added to the training."""
    carries_claim: bool = False
    """Whether every seed is run, before other arms."""
    independent_examples: bool = False
    """Whether it is for networks without BatchNorm alone."""
    shared: bool = False
    """Whether another experiment's arm of that name is the same, so that its records may stand for this one's."""

    def applies_to(self, network: str) -> bool:
        return not (self.independent_examples and network.endswith("-bn"))


@dataclass(frozen=True)
class Experiment:
    """What `run` computes and how it is shown.

    Attributes:
        name: Of the module, and of the folder under runs/.
        arms: In the order of work; an arm with `extra_of` needs to know what others cost with its seed.
        method: Whose scales are saved.
        summarise: Records and arm names to a summary, with an entry `networks`.
        save_figure: Path, records, summary.
        print_report: Console, summary.
    """

    name: str
    arms: tuple[Arm, ...]
    method: str
    summarise: Callable[[Sequence[dict[str, Any]], Sequence[str]], dict[str, Any]]
    save_figure: Callable[[Path, Sequence[dict[str, Any]], dict[str, Any]], None]
    print_report: Callable[[Console, dict[str, Any]], None]


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


@dataclass(frozen=True)
class Start:
    """What an initialiser is told besides the model."""

    config: "Config"
    network: str
    seed: int
    splits: Splits
    advance: Callable[[float], None]
    """To be called with the share of the work that is done since the last call."""

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.config, self.network)

    def stream(self, batch_size: int) -> "Stream":
        """The augmented batches that an initialiser of this seed sees."""
        return Stream(self.config, self.splits, batch_size, 900_000_000 + 1_000 * self.seed)


Initialiser = Callable[[nn.Module, Start], dict[str, Any]]
"""Changes the model, and returns what its record holds: `seconds`, and `scales` or `failed`."""


def recorded(work: Callable[[], InitResult]) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """The record of an initialiser that rescales, and its history; a start too bad for a method is a result."""
    start = time.perf_counter()
    try:
        result = work()
    except NotFiniteError as error:
        return {"seconds": time.perf_counter() - start, "failed": str(error)}, []
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "scales": result.scales, "skipped": result.skipped}, result.history


def by_gradinit(model: nn.Module, start: Start) -> dict[str, Any]:
    config, recipe = start.config, start.recipe
    record, history = recorded(
        lambda: gradinit(
            model,
            batches=start.stream(recipe.batch_size),
            eta=config.eta,
            gamma=config.gamma,
            steps=recipe.steps,
            lr=recipe.lr,
            exact=config.exact,
            engine=config.engine,
            on_step=lambda _: start.advance(1 / recipe.steps),
            progress=False,
        )
    )
    if history:
        record |= {"history": history, "epochs_worth": epochs_worth(config, history, recipe, start.splits)}
    return {"kinds": kinds_of(model)} | record


def by_metainit(model: nn.Module, start: Start) -> dict[str, Any]:
    config = start.config
    return recorded(
        lambda: metainit(
            model,
            steps=config.metainit_steps,
            lr=0.03,
            update="log",
            linear_decay=True,
            input_shape=tuple(start.splits.train.images.shape[1:]),
            batch_size=config.metainit_batch_size,
            batch_norm="batch",
            generator=torch.Generator().manual_seed(start.seed),
            on_step=lambda _: start.advance(1 / config.metainit_steps),
            progress=False,
        )
    )[0]


def by_lsuv(model: nn.Module, start: Start) -> dict[str, Any]:
    begun = time.perf_counter()
    lsuv_(
        model,
        next(start.splits.batches(start.splits.train, 256)),
        generator=torch.Generator().manual_seed(start.seed),
    )
    return {"seconds": time.perf_counter() - begun}


def epochs_worth(config: Config, history: list[dict[str, float]], recipe: Recipe, splits: Splits) -> float:
    """What GradInit cost in epochs of training, by arithmetic: forward passes an example, of which training takes 3."""
    objective = {"lazy": (6, 12), "nested": (9, 15), "finite_difference": (6, 9)}[config.engine][config.exact]
    foreseen, surprise = {"lazy": (9, 11), "nested": (12, 12), "finite_difference": (6, 6)}[config.engine]
    total, expected = 0.0, 0.0
    for entry in history:
        met = entry["constraint"] == expected or config.exact
        total += (foreseen if met else surprise) if entry["constraint"] else objective
        expected = entry["constraint"]
    return total * recipe.batch_size / (3 * len(splits.train))


def extra_epochs(costs: Sequence[float]) -> int:
    """The largest cost in whole epochs: the nearest number, and one at least where there is a cost."""
    largest = max(costs, default=0.0)
    return max(1, round(largest)) if largest > 0 else 0


def prepared(network: str, arm: Arm, seed: int, splits: Splits, start: dict[str, Any], config: Config) -> nn.Module:
    """The arm's network at the start of its training, again, from the record of its initialisation."""
    model = initialise(network, seed, splits)
    if arm.init is by_lsuv:  # which draws anew: there are no scales to keep
        by_lsuv(model, Start(config, network, seed, splits, lambda _: None))
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
    model = prepared(network, arm, seed, splits, start, config)
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
_POSITIVE = ("metainit_steps", "metainit_batch_size", "seeds", "epochs", "eta", "gamma", "learning_rate")
_POSITIVE_OR_NONE = ("train_images", "test_images", "steps", "meta_learning_rate", "batch_size")


def check_config(config: Config, caller: str) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    given = [name for name in _POSITIVE_OR_NONE if getattr(config, name) is not None]
    for name in (*_POSITIVE, *given):
        if not getattr(config, name) > 0:
            raise ValueError(f"{caller}: `{name}` must be positive, got {getattr(config, name)}.")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"{caller}: `warmup` must lie in [0, 1], got {config.warmup}: a share of the iterations.")
    if config.cutout < 0:
        raise ValueError(f"{caller}: `cutout` must be 0 or more pixels, got {config.cutout}.")
    if not config.networks:
        raise ValueError(f"{caller}: `networks` must name one or more, got none.")
    device_of(config.device, caller)
    for network in config.networks:
        if recipe_of(config, network).batch_size % 2:
            raise ValueError(f"{caller}: `batch_size` must be even, got {config.batch_size}: S̃ shares half of S.")
        with torch.device("meta"):
            make(network, 10)


def take_over(arms: Sequence[Arm], work: Sequence[tuple[int, str, Arm]], folder: Run, beside: Path) -> None:
    """What another experiment's run has of shared arms, into this run's records, each with where it comes from.

    Args:
        arms: Of this experiment.
        work: What this run is to compute. After an initialisation of its own, no other's training is taken.
        folder: This run.
        beside: The other run's folder, which may still be at work.

    Raises:
        ValueError: No run folder, other settings or other data.
    """
    ours, on, _ = read_run(folder.folder, "take_over")
    theirs, environment, records = read_run(beside, "take_over")
    free = {"preset", "data", "data_dir", "output", "device", "quiet", "networks", "seeds"}
    shared = {field.name for field in fields(Config)} - free
    if differing := sorted(name for name in shared if name not in theirs or theirs[name] != ours[name]):
        raise ValueError(
            f"take_over: {beside} must hold a run with the same settings, got other values of {', '.join(differing)}. "
            "Name another folder, or leave it out."
        )
    data = environment.get("data", {})
    if data.get("sha256") != on["data"]["sha256"]:
        raise ValueError(
            f"take_over: {beside} must hold a run on the same data, got {data.get('identity')}. "
            "Name another folder, or leave it out."
        )
    places = [environment, *environment.get("resumed", [])]
    computed_on = [{name: place.get(name) for name in ("commit", "device")} for place in places]
    origin = {"taken_from": {"command": environment.get("command"), "computed_on": computed_on}}
    for seed, network, arm in work:
        key = {"network": network, "arm": arm.name, "seed": seed}
        found = {r.get("kind"): r for r in records if all(r.get(name) == value for name, value in key.items())}
        if not arm.shared or "initialisation" not in found:
            continue
        start = folder.find(kind="initialisation", **key) or folder.append(origin | found["initialisation"])
        is_theirs = "taken_from" in start and start.get("scales") == found["initialisation"].get("scales")
        if is_theirs and "training" in found and folder.find(kind="training", **key) is None:
            folder.append(origin | found["training"])
            checkpoint_of(folder, arms, **key).unlink(missing_ok=True)


def run(
    config: Config, experiment: Experiment, *, beside: Path | None = None, largest_batch: int = 1
) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records.

    Args:
        config: What to compute.
        experiment: Of which.
        beside: A run of another experiment from which records of shared arms are taken first.
        largest_batch: Of the experiment's own arms.
    """
    check_config(config, experiment.name)
    console = Console()
    device = device_of(config.device, experiment.name)
    folder = begin(experiment.name, config, console)
    recipes = [recipe_of(config, network) for network in config.networks]
    sizes = [(recipe.batch_size, recipe.training_batch_size) for recipe in recipes]
    splits = prepare(
        config.data,
        data_dir=config.data_dir,
        train=config.train_images,
        validation=0,
        test=config.test_images,
        batch_size=max(largest_batch, config.metainit_batch_size, *chain.from_iterable(sizes)),
        device=device,
        caller=experiment.name,
    )
    write_environment(folder, splits.data.record(), device)
    console.print(f"Data: {splits.data.identity}.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    epochs = epochs_of(config.epochs, config.train_images, len(splits.train))
    if epochs != config.epochs:
        console.print(f"Fewer images than asked for: {epochs} epochs instead of {config.epochs}, for as many updates.")
    work = list(order_of_work(config, experiment.arms))
    if beside is not None:
        take_over(experiment.arms, work, folder, beside)
    with make_progress(quiet=config.quiet) as progress:
        compute(replace(config, epochs=epochs), experiment.arms, work, folder, splits, progress)
    save_scales(folder, "network", experiment.method)
    environment = {"data": splits.data.identity, "device": device_name(device), "schedule": config.schedule}
    summary = experiment.summarise(folder.records, [arm.name for arm in experiment.arms]) | environment
    experiment.save_figure(folder.folder / "figure.png", folder.records, summary)
    folder.finish(summary)
    experiment.print_report(console, summary)
    console.print(f"Records, figure.png and scales.safetensors: {folder.folder}")
    return summary


def order_of_work(config: Config, arms: Sequence[Arm]) -> Iterator[tuple[int, str, Arm]]:
    """(seed, network, arm): what carries the claim first, seed by seed, so that a run cut off has said something."""
    claims = [arm for arm in arms if arm.carries_claim]
    groups = (
        ([arm for arm in claims if not arm.extra_of], config.seeds),
        ([arm for arm in claims if arm.extra_of], config.seeds),
        ([arm for arm in arms if not arm.carries_claim], 1),
    )
    for group, seeds in groups:
        for seed in range(seeds):
            for network in config.networks:
                for arm in group:
                    if arm.applies_to(network):
                        yield seed, network, arm


def checkpoint_of(folder: Run, arms: Sequence[Arm], network: str, arm: str, seed: int) -> Path:
    """What a training that is not whole has learnt so far."""
    return folder.folder / f"{network}-{[each.name for each in arms].index(arm)}-{seed}.checkpoint"


def compute(
    config: Config,
    arms: Sequence[Arm],
    work: Sequence[tuple[int, str, Arm]],
    folder: Run,
    splits: Splits,
    progress: Progress,
) -> None:
    """Each unit of work is a function of the configuration, recorded when it is whole: so a run can be resumed."""
    bar = progress.add_task("starting", total=float(len(work)))
    for done, (seed, network, arm) in enumerate(work):
        key = {"network": network, "arm": arm.name, "seed": seed}
        progress.update(bar, description=f"{network}, {arm.name}, seed {seed}: initialise")
        start = folder.find(kind="initialisation", **key)
        if start is None:
            record: dict[str, Any] = {"seconds": 0.0}
            if arm.init is not None:
                told = Start(config, network, seed, splits, lambda share: progress.advance(bar, share / 2))
                record = arm.init(initialise(network, seed, splits), told)
            start = folder.append({"kind": "initialisation"} | key | record)
        progress.update(bar, description=f"{network}, {arm.name}, seed {seed}: train")
        if "failed" not in start and folder.find(kind="training", **key) is None:
            others = [folder.find(kind="initialisation", network=network, arm=a, seed=seed) for a in arm.extra_of]
            costs = [other["epochs_worth"] for other in others if other and "epochs_worth" in other]
            if arm.extra_of and not costs:  # every method failed: there is no cost to make up for
                progress.update(bar, completed=done + 1.0)
                continue
            extra = extra_epochs(costs)
            checkpoint = checkpoint_of(folder, arms, **key)
            epochs = config.epochs + extra
            tick = lambda _, epochs=epochs: progress.advance(bar, 0.5 / epochs)  # noqa: E731
            record = run_training(config, network, arm, seed, splits, start, extra, checkpoint, tick)
            folder.append({"kind": "training", "extra_epochs": extra} | key | record)
        progress.update(bar, completed=done + 1.0)
