"""Does GradInit make a network's first epoch better, and does that outlast the epochs it costs?

The paper's CIFAR-10 networks with and without BatchNorm, trained by its recipe from their own initialisation, after
GradInit, with the epochs that GradInit costs added, with warm-up, and after LSUV and MetaInit.

    python -m reproduce.gradinit_cifar10 [--preset smoke|quick|acc1|paper] [--data-dir FOLDER] [--output FOLDER]
"""

from dataclasses import dataclass
from itertools import chain, count, islice
from typing import Any

from torch import nn

from common.functional import parameters_of, pure_loss
from common.precision import full_precision
from papers.gradinit import relative_gradient_variance
from reproduce import cifar
from reproduce.cifar import RECIPES, Arm, Experiment, Start, augmented, by_gradinit, by_lsuv, by_metainit
from reproduce.command import end_well, parse
from reproduce.gradinit_report import print_report, save_figure, summarise


@dataclass(frozen=True, kw_only=True)
class Config(cifar.Config):
    """Options. A preset sets them all; each can be overridden."""

    variance_batches: int = 16
    """Minibatches over which the gradient's variance is taken, first seed. Ours."""


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


def gradinit_and_variance(model: nn.Module, start: Start) -> dict[str, Any]:
    """GradInit, and with the first seed the gradient's variance before and after it."""
    if start.seed != 0:
        return by_gradinit(model, start)
    before = variance_of(model, start)
    record = by_gradinit(model, start) | {"variance_before": before}
    return record if "failed" in record else record | {"variance_after": variance_of(model, start)}


def variance_of(model: nn.Module, start: Start) -> dict[str, float]:
    config, splits = start.config, start.splits
    assert isinstance(config, Config)
    size = start.recipe.batch_size
    stream = chain.from_iterable(augmented(config, splits, size, seed) for seed in count(77))  # pass after pass
    with full_precision(splits.device):
        return relative_gradient_variance(
            pure_loss(model, exact=False), parameters_of(model), islice(stream, config.variance_batches)
        )


EXPERIMENT = Experiment(
    "gradinit_cifar10",
    (
        Arm("own init", carries_claim=True),
        Arm("GradInit", gradinit_and_variance, carries_claim=True),
        Arm("own init, longer", extra_of=("GradInit",), carries_claim=True),
        Arm("own init, warm-up", warmup=True),
        Arm("LSUV", by_lsuv),
        Arm("MetaInit", by_metainit),
    ),
    "gradinit, metainit",
    summarise,
    save_figure,
    print_report,
)


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    if config.variance_batches < 2:
        raise ValueError(f"{EXPERIMENT.name}: `variance_batches` must be at least 2, got {config.variance_batches}.")
    return cifar.run(config, EXPERIMENT)


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
