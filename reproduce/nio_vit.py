"""Does NIO let a vision Transformer train without warm-up, and over how wide a range of learning rates?

A Swin or ViT trained by AdamW: from its default initialisation, without and with warm-up, after NIO without warm-up,
and from the default with the updates added that NIO costs. Each over a grid of peak learning rates.

The recipe is that of Swin as the authors of NIO released it, without what regularises 300 epochs of ImageNet: no
RandAugment, mixup, CutMix or random erasing, but a random crop and a mirror. They change neither the start nor the
first updates, which is what is asked about, and a run of fewer epochs does not need them; all arms go without.

    python -m reproduce.nio_vit [--preset smoke|quick|paper] [--model swin|vit] [--data-dir FOLDER] [--output FOLDER]
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from common.functional import parameters_of, pure_loss
from common.precision import full_precision
from common.record import Run, device_name, device_of, write_environment
from common.training import TrainingConfig, classification_metrics, train
from common.types import Batch, NotFiniteError
from data import epoch_batches
from papers.nio import EXAMPLES_AT_ONCE, measure, nio, windows
from papers.nio.objective import OBJECTIVES, Objective, forward_passes
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.images import Splits, prepare
from reproduce.nio_vit_report import best_learning_rate, print_report, save_figure, summarise
from reproduce.scales import rescaled, save_scales

EXPERIMENT = "nio_vit"
ModelName = Literal["swin", "vit"]


@dataclass(frozen=True)
class Arm:
    """One way to begin, and what is done besides."""

    name: str
    nio: bool = False
    warmup: bool = False
    extra: bool = False
    all_seeds: bool = True
    """Every seed at every learning rate; otherwise the first seed there, the others at the first one's best."""


ARMS = (
    Arm("default"),
    Arm("NIO", nio=True),
    Arm("default, warm-up", warmup=True),
    Arm("default, longer", extra=True, all_seeds=False),
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: minutes on two cores, a small Swin. paper: a Swin-T, for a GPU."""
    data: Literal["auto", "cifar10", "cifar100", "tiny-imagenet", "digits"] = "auto"
    """auto: CIFAR-10 from the folder, the Hugging Face cache or the hub, or else scikit-learn's embedded digits."""
    data_dir: Path | None = None
    """Folder that holds cifar10/train-*.parquet and so on. Default: the variable LEARNED_INIT_DATA."""
    output: Path | None = None
    """Run folder; one that was cut off is resumed. Default: a new one under runs/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    quiet: bool = False
    """No progress on standard error."""

    train_images: int | None = None
    """Training images, class-balanced; None: all but those held out."""
    validation_images: int = 5_000
    """Training images held out; learning rates are chosen on them, and gradients measured. Ours."""
    test_images: int | None = None
    """Test images, class-balanced; None: all."""

    model: ModelName = "swin"
    """torchvision's Swin, or its ViT; both drawn as Swin's authors do: truncated normal of 0.02, biases zero."""
    patch_size: int = 2
    """Side of a patch, pixels; 4 on ImageNet's 224 in the paper, here 2 on CIFAR-10's 32. Ours."""
    dim: int = 96
    """Channels: of Swin's first stage, which double from stage to stage; of ViT throughout. Swin-T."""
    depths: tuple[int, ...] = (2, 2, 6)
    """Blocks of each stage of Swin, whose last stage is left out for small images; ViT has as many in all."""
    head_dim: int = 32
    """Channels of an attention head. Swin-T."""
    window_size: int = 4
    """Side of Swin's windows, patches. Ours: a grid of 4 × 4 patches is the last stage's."""
    stochastic_depth: float = 0.2
    """Swin's, in training alone; released for Swin-T. torchvision's ViT has none."""

    steps: int = 100
    """NIO: T; released for ResNet-50, as for Swin no setting is known."""
    meta_learning_rate: float = 3e-3
    """NIO: τ; as above."""
    meta_batch_size: int = 64
    """NIO: B; as above."""
    splits: int | None = None
    """NIO: D sub-batches, whose gradients are compared; None: those of single examples."""
    overlap: float = 0.0
    """NIO: r of the sub-batches."""
    objective: Objective = "gc"
    """NIO: the paper's, or another of the released names."""
    gamma: float = 2.0
    """NIO: γ as a multiple of the mean gradient norm before; `inf`: no bound. Ours."""
    measured_images: int = 256
    """Held-out images on whose gradients NIO is judged before and after. Ours."""

    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Peak learning rates. Released: 1e-3 at batches of 1024; the grid is ours."""
    seeds: int = 3
    """The first alone runs the grid of an arm that carries no claim at every learning rate."""
    updates: int = 40_000
    """About 100 epochs of CIFAR-10; released: 300 epochs. Ours."""
    evaluations: int = 20
    """Evaluations in a run, evenly spaced."""
    batch_size: int = 128
    """Ours; released: 1024."""
    weight_decay: float = 0.05
    """Decoupled; none for norms, biases, position tables and the class token. Released."""
    clip_norm: float = 5.0
    """Bound on the gradient's global norm in training. Released."""
    label_smoothing: float = 0.1
    """In training and in NIO. Released."""
    warmup: float = 20 / 300
    """Share of the updates that the warm-up arm warms up over: 20 of 300 epochs. Released."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training; initialisation is float32 always."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        train_images=128,
        validation_images=40,
        test_images=100,
        model="vit",
        patch_size=8,
        dim=16,
        depths=(1,),
        head_dim=8,
        stochastic_depth=0.0,
        steps=3,
        meta_learning_rate=0.05,
        meta_batch_size=8,
        measured_images=12,
        learning_rates=(1e-3, 1e-2),
        seeds=2,
        updates=6,
        evaluations=2,
        batch_size=16,
        warmup=0.34,
    ),
    "quick": Config(
        preset="quick",
        train_images=4_000,
        validation_images=500,
        test_images=1_000,
        patch_size=4,
        dim=32,
        depths=(2, 2),
        head_dim=16,
        stochastic_depth=0.0,
        steps=20,
        meta_learning_rate=0.03,
        meta_batch_size=32,
        measured_images=128,
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        updates=120,
        evaluations=2,
        batch_size=32,
        warmup=0.2,
    ),
    "paper": Config(preset="paper", precision="bfloat16"),
}


# ---------------------------------------------------------------------------------------------- the network
def make(config: Config, image_size: int, num_classes: int) -> nn.Module:
    """The network, as its own rule draws it from torch's global generator.

    Raises:
        ValueError: Patches that do not fill the image, or stages that do not divide into windows.
    """
    grid = image_size // config.patch_size
    if image_size % config.patch_size:
        raise ValueError(
            f"{EXPERIMENT}: `patch_size` must divide the images' side of {image_size} pixels, got {config.patch_size}."
        )
    if config.model == "vit":
        model = VisionTransformer(
            image_size,
            config.patch_size,
            num_layers=sum(config.depths),
            num_heads=config.dim // config.head_dim,
            hidden_dim=config.dim,
            mlp_dim=4 * config.dim,
            num_classes=num_classes,
        )
    else:
        last = 2 ** (len(config.depths) - 1)
        if grid % (last * config.window_size):
            raise ValueError(
                f"{EXPERIMENT}: every stage must divide into windows of {config.window_size} × {config.window_size} "
                f"patches, got a grid of {grid} × {grid} for {len(config.depths)} stages. torchvision's Swin would let "
                "images attend to padding. Set `patch_size`, `window_size` or `depths` otherwise."
            )
        side = [config.window_size] * 2
        model = SwinTransformer(
            [config.patch_size] * 2,
            config.dim,
            list(config.depths),
            [config.dim * 2**stage // config.head_dim for stage in range(len(config.depths))],
            side,
            stochastic_depth_prob=config.stochastic_depth,
            num_classes=num_classes,
        )
    draw_(model)
    return model


@torch.no_grad()
def draw_(model: nn.Module) -> None:
    """As Swin's authors: linear layers, position tables and class token from a normal of 0.02, biases zero.

    torchvision's ViT begins with a head of zeros, which would leave every other tensor without a gradient.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.MultiheadAttention):
            nn.init.trunc_normal_(module.in_proj_weight, std=0.02)
    if isinstance(model, VisionTransformer):
        nn.init.trunc_normal_(model.class_token, std=0.02)


def undecayed(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters without weight decay: vectors, position tables and the class token."""
    tables = ("relative_position_bias_table", "pos_embedding", "class_token")
    return tuple(name for name, p in model.named_parameters() if p.ndim < 2 or name.endswith(tables))


def initialise(config: Config, seed: int, splits: Splits) -> nn.Module:
    """The network as it starts, before NIO: a function of its arguments alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # on the CPU: the same weights on every device
        model = make(config, splits.train.images.shape[-1], splits.data.num_classes)
    return model.to(splits.device)


# ---------------------------------------------------------------------------------------------- one unit of work
def loss_fn(config: Config) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy with label smoothing, of training and of NIO."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, label_smoothing=config.label_smoothing)

    return loss


def augmented(splits: Splits, batch_size: int, seed: int, first: int = 0) -> Iterator[Batch]:
    """Epoch after epoch of training images, shuffled, cropped and mirrored, from batch `first` on.

    A function of its arguments alone, so that every arm of a seed sees the same images in the same order, however long
    it trains and wherever it is resumed.
    """

    def epoch(k: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + k)
        return epoch_batches(splits.train, batch_size, mean=splits.data.mean, std=splits.data.std, generator=generator)

    begun, within = divmod(first, len(splits.train) // batch_size)
    return islice(chain.from_iterable(map(epoch, count(begun))), within, None)


def measured(config: Config, model: nn.Module, splits: Splits) -> dict[str, float]:
    """GradCosine, gradient norm and shares over single held-out images, the same for every start."""
    images = splits.validation.take(torch.arange(config.measured_images))
    x, y = next(splits.batches(images, config.measured_images))
    with full_precision(splits.device):
        found = measure(pure_loss(model, loss_fn(config)), parameters_of(model), (x, y), chunk_size=EXAMPLES_AT_ONCE)
    return {name: value.item() for name, value in found.items()}


def run_initialisation(
    config: Config, arm: Arm, seed: int, splits: Splits, on_step: Callable[[dict[str, float]], None]
) -> dict[str, Any]:
    """NIO's scales and what it did, or nothing for the other arms."""
    if not arm.nio:
        return {"seconds": 0.0}
    model = initialise(config, seed, splits)
    before = measured(config, model, splits)
    gamma = config.gamma * before["grad_norm"]
    start = time.perf_counter()
    try:
        result = nio(
            model,
            loss_fn(config),
            augmented(splits, config.meta_batch_size, 900 + seed),
            splits="examples" if config.splits is None else config.splits,
            overlap=config.overlap,
            objective=config.objective,
            gamma=gamma,
            steps=config.steps,
            lr=config.meta_learning_rate,
            chunk_size=EXAMPLES_AT_ONCE if config.splits is None else config.splits,
            on_step=on_step,
            progress=False,
        )
    except NotFiniteError as error:  # a result
        return {"seconds": time.perf_counter() - start, "before": before, "gamma": gamma, "failed": str(error)}
    return {
        "seconds": time.perf_counter() - start,
        "scales": result.scales,
        "skipped": result.skipped,
        # shares of single minibatches are noisy; those before and after are of the same held-out images
        "history": [{k: v for k, v in entry.items() if not k.startswith("share/")} for entry in result.history],
        "before": before,
        "after": measured(config, model, splits),
        "gamma": gamma,
        "updates_worth": updates_worth(config),
    }


def updates_worth(config: Config) -> float:
    """What NIO costs in updates of training, by arithmetic: forward passes an image, of which training takes 3.

    With the measurement that γ is set by, 3 an image.
    """
    if config.splits is None:
        passes = forward_passes(config.meta_batch_size, EXAMPLES_AT_ONCE)
    else:
        passes = forward_passes(config.splits, config.splits, config.overlap)
    images = passes * config.steps * config.meta_batch_size + 3 * config.measured_images
    return images / (3 * config.batch_size)


def run_training(
    config: Config, arm: Arm, learning_rate: float, seed: int, splits: Splits, start: dict[str, Any], extra: float,
    checkpoint: Path,
) -> dict[str, Any]:  # fmt: skip
    """Train from the arm's start; whether that failed is part of the result."""
    model = rescaled(initialise(config, seed, splits), start.get("scales", {}))
    steps = math.ceil((config.updates + extra) / config.evaluations)  # between evaluations
    recipe = TrainingConfig(
        epochs=config.evaluations,
        learning_rate=learning_rate,
        optimizer="adamw",
        weight_decay=config.weight_decay,
        no_decay=undecayed(model),
        schedule="cosine",
        warmup=config.warmup if arm.warmup else 0.0,
        clip_norm=config.clip_norm,
        precision=config.precision,
    )

    def evaluate(model: nn.Module) -> dict[str, float]:
        validation = classification_metrics(model, splits.batches(splits.validation))
        own = {"validation_accuracy": validation["test_accuracy"], "validation_loss": validation["test_loss"]}
        return own | classification_metrics(model, splits.batches(splits.test))

    with torch.random.fork_rng():
        torch.manual_seed(seed)  # stochastic depth's
        result = train(
            model,
            loss_fn(config),
            lambda part: islice(augmented(splits, config.batch_size, seed, part * steps), steps),
            evaluate,
            steps_per_epoch=steps,
            config=recipe,
            checkpoint=checkpoint,
        )
    final = result.history[-1]
    return {
        "updates": steps * len(result.history),
        "history": result.history,
        "diverged": result.diverged,
        "failed_run": result.diverged or final["test_accuracy"] <= guessing(splits.test.labels),
        "best_accuracy": max(entry["test_accuracy"] for entry in result.history),
        "final_accuracy": final["test_accuracy"],
        "validation_accuracy": final["validation_accuracy"],
        "train_loss": final["train_loss"],
        "seconds": result.seconds,
    }


def guessing(labels: Tensor) -> float:
    """The accuracy that guessing the commonest class hardly exceeds: three standard errors above its share p.

    p + 3 √(p (1 − p)/n) for n images. A run that ends no higher has not been trained.

    Example:
        >>> round(guessing(torch.arange(900) % 10), 6)  # 0.1 + 3 · 0.01
        0.13
    """
    p = (labels.bincount().max() / len(labels)).item()
    return p + 3 * math.sqrt(p * (1 - p) / len(labels))


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    for name in (
        "validation_images", "patch_size", "dim", "head_dim", "window_size", "steps", "meta_learning_rate", "gamma",
        "seeds", "updates", "evaluations", "batch_size", "clip_norm",
    ):  # fmt: skip
        if not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be positive, got {getattr(config, name)}.")
    for name in ("meta_batch_size", "measured_images", "splits"):
        if getattr(config, name) is not None and getattr(config, name) < 2:
            raise ValueError(f"{EXPERIMENT}: `{name}` must be 2 or more to compare, got {getattr(config, name)}.")
    if config.measured_images > config.validation_images:
        raise ValueError(
            f"{EXPERIMENT}: `measured_images` are held-out ones, at most `validation_images`, got "
            f"{config.measured_images} of {config.validation_images}."
        )
    if not config.depths or min(config.depths) < 1:
        raise ValueError(f"{EXPERIMENT}: `depths` must name one stage or more of a block or more, got {config.depths}.")
    if config.model == "swin" and sum(config.depths) < 2:
        raise ValueError(
            f"{EXPERIMENT}: torchvision's Swin must have two blocks or more, got `depths` {config.depths}."
        )
    if config.dim % config.head_dim:
        raise ValueError(
            f"{EXPERIMENT}: `head_dim` must divide `dim`, got {config.head_dim} for {config.dim} channels."
        )
    if not config.learning_rates or min(config.learning_rates) <= 0:
        raise ValueError(f"{EXPERIMENT}: `learning_rates` must be positive, one or more, got {config.learning_rates}.")
    if config.objective not in OBJECTIVES:
        raise ValueError(f"{EXPERIMENT}: `objective` must be one of {', '.join(OBJECTIVES)}, got {config.objective!r}.")
    for name, upper in (("overlap", 1.0), ("warmup", 1.0), ("label_smoothing", 1.0), ("stochastic_depth", 1.0)):
        if not 0 <= getattr(config, name) <= upper:
            raise ValueError(f"{EXPERIMENT}: `{name}` must lie in [0, 1], got {getattr(config, name)}.")
    if config.model not in get_args(ModelName):
        raise ValueError(
            f"{EXPERIMENT}: `model` must be one of {', '.join(get_args(ModelName))}, got {config.model!r}."
        )
    if config.splits is not None:
        windows(config.meta_batch_size, config.splits, config.overlap)  # says what does not fit
    elif config.overlap:
        raise ValueError(
            f"{EXPERIMENT}: `overlap` is what sub-batches share, got {config.overlap} for single examples. "
            "Set `splits`."
        )
    device_of(config.device, EXPERIMENT)


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
        batch_size=max(config.batch_size, config.meta_batch_size),
        device=device,
        caller=EXPERIMENT,
    )
    write_environment(folder, splits.data.record(), device)
    size = sum(p.numel() for p in initialise(config, 0, splits).parameters())
    model = f"{config.model}, {size / 1e6:.2g} M parameters, {config.updates:,} updates of {config.batch_size} images"
    console.print(f"Data: {splits.data.identity}; {len(splits.validation):,} of the training images held out.")
    console.print(f"Model: {model}. Device: {device_name(device)}. Run folder: {folder.folder}")
    with make_progress(quiet=config.quiet) as progress:
        compute(config, folder, splits, progress)
    save_scales(folder, "model", "nio")
    environment = {
        "data": splits.data.identity,
        "device": device_name(device),
        "model": model,
        "guessing": guessing(splits.test.labels),
        "updates": config.updates,
    }
    summary = summarise(folder.records, [arm.name for arm in ARMS]) | environment
    save_figure(folder.folder / "figure.png", folder.records, summary)
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records, figure.png and scales.safetensors: {folder.folder}")
    return summary


def compute(config: Config, folder: Run, splits: Splits, progress: Progress) -> None:
    """Each unit of work is a function of the configuration, recorded when it is whole: so a run can be resumed."""
    work = [(seed, arm) for seed in range(config.seeds) for arm in ARMS]
    bar = progress.add_task("starting", total=float(len(work)))
    best: dict[str, float] = {}
    for done, (seed, arm) in enumerate(work, start=1):
        key = {"model": config.model, "arm": arm.name, "seed": seed}
        progress.update(bar, description=f"{arm.name}, seed {seed}: initialise")
        start = folder.find(kind="initialisation", **key)
        if start is None:
            tick = lambda _: progress.advance(bar, 0.2 / config.steps)  # noqa: E731
            record = run_initialisation(config, arm, seed, splits, tick)
            start = folder.append({"kind": "initialisation"} | key | record)
        # where NIO failed there is no cost to make up for
        lost = arm.extra and any("failed" in record and record["seed"] == seed for record in folder.records)
        if "failed" not in start and not lost:
            extra = updates_worth(config) if arm.extra else 0.0
            # of an arm that failed with the first seed the whole grid is still to be run
            rates = config.learning_rates if arm.all_seeds or arm.name not in best else (best[arm.name],)
            trained = []
            for rate in rates:
                progress.update(bar, description=f"{arm.name}, seed {seed}: train at {rate:g}")
                record = folder.find(kind="training", learning_rate=rate, **key)
                if record is None:
                    checkpoint = folder.folder / f"{ARMS.index(arm)}-{seed}-{rate:g}.checkpoint"
                    result = run_training(config, arm, rate, seed, splits, start, extra, checkpoint)
                    record = folder.append({"kind": "training", "learning_rate": rate} | key | result)
                progress.advance(bar, 0.7 / len(rates))
                trained.append(record)
            best.setdefault(arm.name, best_learning_rate(trained))
        progress.update(bar, completed=float(done))


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
