"""Does NIO make a network's first epoch better than its own initialisation and GradInit do, and at what cost?

Networks with and without BatchNorm, trained by GradInit's recipe (the paper's own is not known) from
their own initialisation, after NIO over single examples and over sub-batches, after GradInit and MetaInit, with the
epochs that NIO costs added, and with warm-up.

NIO's own options begin with --nio; --gamma, --eta, --steps and --meta-learning-rate are GradInit's, the baseline's.
ResNet-110, WRN-28-10 and DenseNet-100 are the paper's; VGG-19 and the small networks of `quick` are ours.

    python -m reproduce.nio_cifar10 [--preset smoke|quick|acc1|paper] [--data cifar100] [--data-dir FOLDER]
        [--output FOLDER] [--beside FOLDER]
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from common.scales import kinds_of
from common.types import InitResult
from papers.nio import EXAMPLES_AT_ONCE, SUB_BATCHES_AT_ONCE, nio, windows
from papers.nio.objective import forward_passes
from reproduce import cifar
from reproduce.cifar import Arm, Experiment, Start, by_gradinit, by_metainit, recorded
from reproduce.command import end_well, parse
from reproduce.nio_report import print_report, save_figure, summarise


@dataclass(frozen=True, kw_only=True)
class Config(cifar.Config):
    """Options. A preset sets them all; each can be overridden."""

    networks: tuple[str, ...] = ("resnet-8", "resnet-8-bn")
    """Names of common.networks, with -bn for BatchNorm."""
    beside: Path | None = None
    """Run folder of gradinit_cifar10 with the same settings on the same data: what it holds of its own initialisation,
    GradInit, warm-up and MetaInit is taken from there."""
    nio_steps: int = 100
    """NIO: T, the released default."""
    nio_learning_rate: float = 1e-2
    """NIO: τ; ours, within the range of GradInit's released ones (the paper's for CIFAR is not known)."""
    nio_batch_size: int = 64
    """NIO: examples of S, as released for ImageNet."""
    nio_splits: int = 4
    """NIO: D of the arm with sub-batches, as released for ImageNet."""
    nio_overlap: float = 0.0
    """NIO: r of that arm. Ours: an overlap raises GradCosine by shared examples alone."""
    nio_objective: Literal["gc", "gc_gn", "gc_gn_sqrt", "gv", "gv_gn", "gv_gn_sqrt"] = "gc"
    """NIO: the paper's objective, or one of the released ones."""
    nio_norm_bound: float = 2.0
    """NIO: γ, as a multiple of the mean gradient norm at the start. Ours."""


PRESETS = {
    "smoke": Config(
        preset="smoke",
        networks=("resnet-8", "resnet-8-bn"),
        train_images=128,
        test_images=100,
        steps=4,
        nio_steps=3,
        nio_batch_size=16,
        metainit_steps=2,
        metainit_batch_size=8,
        seeds=2,
        epochs=1,
        batch_size=32,
        meta_learning_rate=0.05,
        nio_learning_rate=0.05,
        cutout=8,
    ),
    "quick": Config(
        preset="quick",
        train_images=1_000,
        test_images=1_000,
        steps=15,
        nio_steps=15,
        nio_batch_size=32,
        meta_learning_rate=0.03,
        nio_learning_rate=0.03,
        metainit_steps=20,
        metainit_batch_size=16,
        epochs=3,
        warmup=0.25,
        batch_size=50,
    ),
    "acc1": Config(
        preset="acc1",
        networks=("resnet110", "resnet110-bn", "vgg19", "vgg19-bn"),
        epochs=1,
        schedule="constant",
        warmup=0.5,
        precision="bfloat16",
        channels_last=True,
    ),
    "paper": Config(
        preset="paper",
        networks=(
            "resnet110", "resnet110-bn", "wrn-28-10", "wrn-28-10-bn", "densenet100", "densenet100-bn"
        ),
        metainit_steps=500,
        seeds=4,
        precision="bfloat16",
        channels_last=True,
    ),
}  # fmt: skip


def by_nio(model: nn.Module, start: Start, *, splits: int | Literal["examples"] | None = None) -> dict[str, Any]:
    """NIO over single examples, or over sub-batches (`splits` None: as configured)."""
    config = start.config
    assert isinstance(config, Config)
    run_nio = partial(
        nio,
        model,
        batches=start.stream(config.nio_batch_size),
        splits=splits or config.nio_splits,
        overlap=0.0 if splits else config.nio_overlap,
        objective=config.nio_objective,
        progress=False,
    )

    def work() -> InitResult:
        before = run_nio(steps=1, lr=0.0).history[0]["grad_norm"]  # changes nothing
        return run_nio(
            steps=config.nio_steps,
            lr=config.nio_learning_rate,
            gamma=config.nio_norm_bound * before,
            on_step=lambda _: start.advance(1 / config.nio_steps),
        )

    record, history = recorded(work)
    if history:
        record |= {
            "history": history,
            "epochs_worth": epochs_worth(config, splits == "examples", len(start.splits.train)),
        }
    return {"kinds": kinds_of(model)} | record


def epochs_worth(config: Config, by_example: bool, images: int) -> float:
    """What NIO costs in epochs of training, by arithmetic: forward passes an example, of which training takes 3.

    One iteration more than T, to measure the norm.
    """
    if by_example:
        passes = forward_passes(config.nio_batch_size, EXAMPLES_AT_ONCE)
    else:
        passes = forward_passes(config.nio_splits, SUB_BATCHES_AT_ONCE, config.nio_overlap)
    return passes * (config.nio_steps + 1) * config.nio_batch_size / (3 * images)


EXPERIMENT = Experiment(
    "nio_cifar10",
    (
        Arm("own init", carries_claim=True, shared=True),
        Arm("NIO, examples", partial(by_nio, splits="examples"), carries_claim=True, independent_examples=True),
        Arm("NIO, sub-batches", by_nio, carries_claim=True),
        Arm("GradInit", by_gradinit, carries_claim=True, shared=True),
        Arm("own init, longer", extra_of=("NIO, examples", "NIO, sub-batches"), carries_claim=True),
        Arm("own init, warm-up", warmup=True, shared=True),
        Arm("MetaInit", by_metainit, shared=True),
    ),
    "nio, gradinit, metainit",
    summarise,
    save_figure,
    print_report,
)


def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    for name in ("nio_steps", "nio_learning_rate", "nio_norm_bound"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{EXPERIMENT.name}: `{name}` must be positive, got {getattr(config, name)}.")
    groups = windows(config.nio_batch_size, config.nio_splits, config.nio_overlap)  # says what does not fit
    coupled = [network for network in config.networks if network.endswith("-bn")]
    if coupled and min(group.stop - group.start for group in groups) < 2:
        raise ValueError(
            f"{EXPERIMENT.name}: with BatchNorm a sub-batch must hold two images or more, got `nio_splits` "
            f"{config.nio_splits} of `nio_batch_size` {config.nio_batch_size} for {coupled[0]}."
        )


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then table, figure and summary from its records."""
    check_config(config)
    return cifar.run(config, EXPERIMENT, beside=config.beside, largest_batch=config.nio_batch_size)


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
