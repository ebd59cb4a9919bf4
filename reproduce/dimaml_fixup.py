"""Do initial laws of a Fixup ResNet-18, learned on CIFAR-10, make it train sooner on Tiny ImageNet?

A network without normalisation, whose residual branches start at zero. Only the tensors that Fixup draws have a law;
its zeros, scalars and the classifier stay as they are, so that the laws serve any number of classes.

    python -m reproduce.dimaml_fixup [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from common.functional import classification_loss
from common.initializers import torch_default_
from common.networks import FixupResNet18
from common.networks.fixup import FixupBasicBlock
from common.optimizers import sgd
from common.options import check_positive, check_whole
from common.training import TrainingConfig, classification_metrics
from common.types import Batch, UserLoss
from data import ImageData, ImageSplit, evaluation_batches, sample_batches
from papers.dimaml import InitDistribution
from papers.metainit import metainit
from reproduce.dimaml import Bench, FamilyName, Learn, Learning, Train, command, of_several, released_start
from reproduce.dimaml_images import (
    IMAGE_SETS,
    ImageOptions,
    checked_and_shrunk,
    delta_orthogonal_convolutions_,
    held_out_of,
    load_both,
)
from reproduce.dimaml_report import LEARNED, Shown

EXPERIMENT = "dimaml_fixup"
SCALARS = 0.1
"""As released: what the learning rate of Fixup's scalars is multiplied by."""
DROPS = (30 / 70, 50 / 70)
"""As released: the learning rate falls to a tenth at epochs 30 and 50 of 70."""


@dataclass(frozen=True, kw_only=True)
class Config(ImageOptions):
    """Options. A preset sets them all; each can be overridden."""

    classes: int | None = None
    """So many of the target's classes, the first; None, or more than it has: all."""
    width: int = 64
    """Channels of the first stage: as released."""
    learning_rate: float = 0.1
    """Of Nesterov's SGD with momentum 0.9 and weight decay 5e-4, inner and outer: as released."""
    clip_norm: float | None = 4.0
    """Of the outer training: as released."""


PRESETS = {
    "smoke": Config(
        preset="smoke", image_size=8, classes=3, train_images=40, held_out_images=10, width=2, pieces=5,
        inner_steps=4, first_evaluation=2, eval_every=2, meta_steps=2, meta_lr_normal=1e-3, meta_lr_plif=1e-1,
        draws=1, antithetic=False, batch_size=8, held_out_batch_size=8, seeds=2, updates=1, evaluations=10,
        metainit_steps=2, metainit_batch_size=4, processes=1,
    ),
    "quick": Config(
        preset="quick", image_size=16, classes=20, train_images=4000, held_out_images=1000, width=8,
        learning_rate=0.03, inner_steps=100, first_evaluation=50, eval_every=25, meta_steps=20, meta_lr_normal=1e-3,
        meta_lr_plif=1e-2,
        draws=1, antithetic=False, batch_size=32, held_out_batch_size=64, seeds=5, updates=31, evaluations=10,
        metainit_steps=50, metainit_batch_size=16,
    ),
    "paper": Config(
        preset="paper", inner_steps=200, first_evaluation=40, eval_every=40, meta_steps=3000, meta_lr_normal=1e-4,
        meta_lr_plif=1e-3, draws=1, antithetic=False, batch_size=128, held_out_batch_size=128, seeds=10, updates=None,
        evaluations=70, metainit_steps=200, metainit_batch_size=64, processes=1,
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- the experiment
class FixupBench(Bench):
    name = EXPERIMENT
    baselines = ("fixup", "delta-orthogonal", "metainit")
    config: Config

    @classmethod
    def check(cls, config: Config) -> None:
        check_whole(
            EXPERIMENT, smallest=1, held_out_images=config.held_out_images, width=config.width,
            train_images=1 if config.train_images is None else config.train_images,
            image_size=1 if config.image_size is None else config.image_size,
        )  # fmt: skip
        check_positive(EXPERIMENT, learning_rate=config.learning_rate)
        if config.clip_norm is not None:
            check_positive(EXPERIMENT, " Pass None for no bound.", clip_norm=config.clip_norm)
        if config.classes is not None:
            check_whole(EXPERIMENT, smallest=2, classes=config.classes)

    @cached_property
    def loaded(self) -> tuple[ImageData, ImageData]:
        """Source and target."""
        return load_pair(self.config)

    @cached_property
    def parts(self) -> tuple[ImageSplit, ImageSplit]:
        """Of the source: what is trained on, and what is held out."""
        split = self.loaded[0].train
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
        count = held_out_of(len(order), self.config.held_out_images)
        held_out, train = order[:count], order[count:]
        return split.take(train).to(self.device), split.take(held_out).to(self.device)

    @cached_property
    def target(self) -> ImageData:
        return self.loaded[1]

    @property
    def pairs(self) -> Mapping[str, str]:
        return {"target": "source"}

    def record(self) -> dict[str, Any]:
        return of_several([data.record() for data in self.loaded])

    def shown(self) -> Shown:
        config = self.config
        source, target = (IMAGE_SETS[data.name] for data in self.loaded)
        size = self.target.train.images.shape[-1]
        return Shown(
            metric="test_loss",
            title="cross-entropy (nats, test)",
            digits=3,
            names={"source": source, "target": f"{target} ({self.target.num_classes} classes)"},
            pairs=self.pairs,
            arms=(*self.baselines, *LEARNED),
            poster={},
            extra=("test_error", "error at the end %"),
            differs=(
                "The poster gives curves without numbers: DIMAML is ahead in the first epochs, and level with Fixup "
                "later. It learns on CIFAR-100, with width 64, N = 200 and 2000 to 3000 meta-steps, and trains on all "
                "of Tiny ImageNet at 64×64, with colour jitter and rotation, for 70 epochs. Ours: "
                f"{len(self.parts[0]):,} images of {source}, {len(self.target.train):,} of {target} at {size}×{size}, "
                f"shifted and mirrored, width {config.width}, N = {config.inner_steps}, {config.meta_steps} meta-steps."
            ),
        )

    # ------------------------------------------------------------------------------------------ learning
    def make_model(self, target: str) -> FixupResNet18:
        classes = self.loaded[target == "target"].num_classes
        return FixupResNet18(self.config.width, num_classes=classes)

    def learning(self, unit: Learn) -> Learning:
        config, data = self.config, self.loaded[0]
        train, held_out = self.parts
        model = self.make_model("source").to(self.device)
        evaluations = config.held_out_batches
        sample = partial(sample_batches, mean=data.mean, std=data.std)

        def sampler(generator: torch.Generator) -> tuple[list[Batch], list[Batch]]:
            batches = sample(train, config.batch_size, generator=generator)
            tested = sample(held_out, config.held_out_batch_size, generator=generator, augment=False)
            return list(islice(batches, config.inner_steps)), list(islice(tested, evaluations))

        scalars = tuple((name, SCALARS) for name, leaf in model.named_parameters() if leaf.numel() == 1)
        inner = sgd(config.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4, lr_factors=scalars)
        return Learning(model, classification_loss, sampler, self.start(model, unit.family), inner)

    def start(self, model: FixupResNet18, family: FamilyName) -> InitDistribution:
        """As released: what Fixup draws by its own Normal laws, the stem by its own values."""
        known = {}
        for k, block in enumerate(model.blocks):
            assert isinstance(block, FixupBasicBlock)
            first, skip = block.conv1, block.downsample
            known[f"blocks.{k}.conv1.weight"] = math.sqrt(2 / (9 * first.out_channels) / len(model.blocks))
            if skip is not None:
                known[f"blocks.{k}.downsample.weight"] = math.sqrt(2 / skip.out_channels)
        pieces = self.config.pieces
        start = {name: released_start("normal", std, family, pieces) for name, std in known.items()}
        return InitDistribution.from_model(model, family, pieces=pieces, start=start, include=["conv"])

    # ------------------------------------------------------------------------------------------ training
    def start_baseline(self, model: nn.Module, unit: Train, generator: torch.Generator) -> None:
        config = self.config
        if unit.arm == "delta-orthogonal":
            delta_orthogonal_convolutions_(model, generator)
        elif unit.arm == "metainit":  # as released: from torch's own start, not Fixup's
            torch_default_(model, generator=generator)
            shape = tuple(self.target.train.images.shape[1:])
            metainit(
                model, steps=config.metainit_steps, input_shape=shape, num_classes=self.target.num_classes,
                batch_size=config.metainit_batch_size, generator=generator, progress=False,
            )  # fmt: skip

    def batches(self, target: str, seed: int, part: int) -> Iterator[Batch]:
        data = self.target
        generator = torch.Generator().manual_seed(1_000_003 * seed + part)
        batches = sample_batches(
            data.train, self.config.batch_size, mean=data.mean, std=data.std, generator=generator, device=self.device
        )
        return islice(batches, self.updates(target))

    def updates(self, target: str) -> int:
        return self.config.updates or len(self.target.train) // self.config.batch_size

    def recipe(self, model: nn.Module) -> tuple[UserLoss, TrainingConfig]:
        config = self.config
        return classification_loss, TrainingConfig(
            epochs=config.evaluations, learning_rate=config.learning_rate, nesterov=True, weight_decay=5e-4,
            schedule="constant", drops=DROPS, clip_norm=config.clip_norm,
            lr_factors=tuple((name, SCALARS) for name, leaf in model.named_parameters() if leaf.numel() == 1),
        )  # fmt: skip

    def evaluate(self, model: nn.Module, target: str) -> dict[str, float]:
        data = self.target
        batches = evaluation_batches(data.test, 500, mean=data.mean, std=data.std, device=self.device)
        metrics = classification_metrics(model, batches)
        return {"test_loss": metrics["test_loss"], "test_error": 100 * (1 - metrics["test_accuracy"])}


def load_pair(config: Config) -> tuple[ImageData, ImageData]:
    """Source and target, as `load_both` and `checked_and_shrunk` say; of the target, the classes asked for."""
    source, target = load_both(config, cifar10={"train": config.source_images}, tiny_imagenet={})
    if config.classes is not None:
        target = target.of_classes(min(config.classes, target.num_classes))
    return checked_and_shrunk(source, target, config, EXPERIMENT)


def main() -> None:
    command(FixupBench, PRESETS, __doc__ or "")


if __name__ == "__main__":
    main()
