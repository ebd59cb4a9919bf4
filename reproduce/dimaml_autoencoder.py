"""Do initial laws of a convolutional auto-encoder, learned on one image set, serve on others that look different?

Learned on Tiny ImageNet, tested on CIFAR-10, and on CIFAR-10 with all pixels in one other order, where nothing of an
image's neighbourhoods is left. Pixels are standardised one by one, so that an error of 1 is what the mean image has.

    python -m reproduce.dimaml_autoencoder [--preset smoke|quick|paper] [--data-dir FOLDER] [--output FOLDER]
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from common.initializers import kaiming_
from common.networks import Autoencoder, reconstruction_loss
from common.optimizers import sgd
from common.options import check_positive, check_whole
from common.training import TrainingConfig
from common.types import Batch, UserLoss
from data import ImageData, pixel_permutation, pixel_statistics, shuffle_pixels, standardise_pixels
from data.pixels import PixelStatistics
from papers.dimaml import InitDistribution
from papers.metainit import metainit
from reproduce.dimaml import Bench, Learn, Learning, Train, command, of_several
from reproduce.dimaml_images import (
    IMAGE_SETS,
    ImageOptions,
    checked_and_shrunk,
    delta_orthogonal_convolutions_,
    held_out_of,
    load_both,
)
from reproduce.dimaml_report import LEARNED, Shown

EXPERIMENT = "dimaml_autoencoder"


@dataclass(frozen=True, kw_only=True)
class Config(ImageOptions):
    """Options. A preset sets them all; each can be overridden."""

    test_images: int | None = None
    """Test images of each target; None: all."""
    width: int = 32
    """Channels of the first convolution: as released."""
    code: int = 64
    """Numbers of the code: as released."""
    task_epochs: int = 3
    """How often an inner training sees each of its images: as released."""
    learning_rate: float = 0.01
    """Of SGD with momentum 0.9, inner and outer: as released."""


PRESETS = {
    "smoke": Config(
        preset="smoke", image_size=32, train_images=40, held_out_images=10, test_images=20, width=2, code=3, pieces=5,
        inner_steps=4, first_evaluation=2, eval_every=2, task_epochs=2, meta_steps=2, meta_lr_normal=1e-3,
        meta_lr_plif=1e-1, draws=1, antithetic=False, batch_size=8, held_out_batch_size=8, seeds=2, updates=1,
        evaluations=10, metainit_steps=2, metainit_batch_size=4, processes=1,
    ),
    "quick": Config(
        preset="quick", image_size=32, train_images=4000, held_out_images=1000, test_images=1000, width=8, code=32,
        learning_rate=0.03, inner_steps=80, first_evaluation=20, eval_every=20, task_epochs=2, meta_steps=60,
        meta_lr_normal=1e-3, meta_lr_plif=1e-2, draws=1, antithetic=False, batch_size=32, held_out_batch_size=64,
        seeds=5, updates=40, evaluations=10, metainit_steps=50, metainit_batch_size=16,
    ),
    "paper": Config(
        preset="paper", image_size=32, held_out_images=10_000,
        inner_steps=600, first_evaluation=200, eval_every=50, meta_steps=3000, meta_lr_normal=1e-4,
        meta_lr_plif=1e-4, draws=1, antithetic=False, batch_size=128, held_out_batch_size=256, seeds=10, updates=None,
        evaluations=100, metainit_steps=200, metainit_batch_size=128, processes=1,
    ),
}  # fmt: skip

POSTER = {
    "cifar10": (
        "AnimeFaces, after those epochs",
        {
            "kaiming": (0.471, 0.383, 0.369),
            "delta-orthogonal": (0.496, 0.392, 0.377),
            "metainit": (0.552, 0.437, 0.398),
            "dimaml-normal": (0.386, 0.352, 0.344),
            "dimaml-plif": (0.386, 0.350, 0.344),
        },
    ),
    "shuffled": (
        "AnimeFaces with shuffled pixels, after those epochs",
        {
            "kaiming": (0.823, 0.643, 0.590),
            "delta-orthogonal": (0.842, 0.743, 0.652),
            "metainit": (0.859, 0.792, 0.708),
            "dimaml-normal": (0.814, 0.570, 0.546),
            "dimaml-plif": (0.812, 0.567, 0.545),
        },
    ),
}
"""The poster's table, of Tiny ImageNet as the source; it gives no spread."""


@dataclass(frozen=True, eq=False)
class Images:
    """One set, on the device, with the statistics of its training images."""

    train: Tensor
    test: Tensor
    statistics: PixelStatistics

    def standardised(self, images: Tensor) -> Tensor:
        return standardise_pixels(images, self.statistics)


# ---------------------------------------------------------------------------------------------- the experiment
class AutoencoderBench(Bench):
    name = EXPERIMENT
    baselines = ("kaiming", "he", "default", "delta-orthogonal", "metainit")
    config: Config

    @classmethod
    def check(cls, config: Config) -> None:
        check_whole(
            EXPERIMENT, smallest=1, held_out_images=config.held_out_images, task_epochs=config.task_epochs,
            train_images=1 if config.train_images is None else config.train_images,
            test_images=1 if config.test_images is None else config.test_images, code=config.code,
        )  # fmt: skip
        check_positive(EXPERIMENT, learning_rate=config.learning_rate)
        Autoencoder(
            32 if config.image_size is None else config.image_size, width=config.width, code=config.code
        )  # which says what it cannot be
        if config.inner_steps % config.task_epochs:
            raise ValueError(
                f"{EXPERIMENT}: `inner_steps` must be a multiple of `task_epochs`, got {config.inner_steps} and "
                f"{config.task_epochs}."
            )

    @cached_property
    def loaded(self) -> tuple[ImageData, ImageData]:
        """Source and target."""
        return load_pair(self.config)

    @cached_property
    def held_out(self) -> Tensor:
        """Training images of the source that no inner training sees."""
        return self.source_order[: held_out_of(len(self.source_order), self.config.held_out_images)]

    @cached_property
    def source_order(self) -> Tensor:
        images = self.loaded[0].train.images
        return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))].to(self.device)

    @cached_property
    def sets(self) -> dict[str, Images]:
        source, target = self.loaded
        train = self.source_order[len(self.held_out) :]
        h, w = target.train.images.shape[2:]
        order = pixel_permutation(h, w, generator=torch.Generator().manual_seed(0))
        plain = target.train.images.to(self.device), target.test.images.to(self.device)
        shuffled = [shuffle_pixels(images, order) for images in plain]
        return {
            "source": Images(train, source.test.images.to(self.device), pixel_statistics(train)),
            "cifar10": Images(*plain, pixel_statistics(plain[0])),
            "shuffled": Images(shuffled[0], shuffled[1], pixel_statistics(shuffled[0])),
        }

    @property
    def pairs(self) -> Mapping[str, str]:
        return {"cifar10": "source", "shuffled": "source"}

    def record(self) -> dict[str, Any]:
        return of_several([data.record() for data in self.loaded])

    def shown(self) -> Shown:
        config, sets = self.config, self.sets
        source, target = (IMAGE_SETS[data.name] for data in self.loaded)
        size = sets["cifar10"].train.shape[-1]
        return Shown(
            metric="test_error",
            title="error (MSE a standardised pixel, test)",
            digits=3,
            names={"source": source, "cifar10": target, "shuffled": f"{target}, shuffled"},
            pairs=self.pairs,
            arms=(*self.baselines, *LEARNED),
            poster=POSTER,
            differs=(
                "The poster's are of other targets (AnimeFaces, plain and shuffled, at 64×64) and of another size: "
                "100,000 training images of the source, width 32, code 64, N = 600, 2000 to 3000 meta-steps, 100 "
                "epochs, 10 runs, no spread given. "
                f"Ours: {len(sets['source'].train):,} images of {source}, {len(sets['cifar10'].train):,} of {target} "
                f"at {size}×{size}, width {config.width}, code {config.code}, N = {config.inner_steps}, "
                f"{config.meta_steps} meta-steps."
            ),
        )

    # ------------------------------------------------------------------------------------------ learning
    def make_model(self, target: str) -> Autoencoder:
        size = self.sets[target].train.shape[-1]
        return Autoencoder(size, width=self.config.width, code=self.config.code)

    def learning(self, unit: Learn) -> Learning:
        config, own = self.config, self.sets["source"]
        model = self.make_model("source").to(self.device)
        evaluations = config.held_out_batches
        batches = config.inner_steps // config.task_epochs

        def sampler(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
            """As released: few images, augmented once, in a new order each time; held-out ones as they are."""
            images = draw(own.train, batches * config.batch_size, generator)
            images = own.standardised(mirrored(images, generator))
            train = []
            for _ in range(config.task_epochs):
                order = torch.randperm(len(images), generator=generator)
                train += [images[index] for index in order.split(config.batch_size)]
            held_out = draw(self.held_out, evaluations * config.held_out_batch_size, generator)
            return train, list(own.standardised(held_out).split(config.held_out_batch_size))

        start = InitDistribution.from_model(model, unit.family, pieces=config.pieces)
        inner = sgd(config.learning_rate, momentum=0.9)
        # as released: learned on the losses that a network in evaluation has, as it is tested
        return Learning(model, reconstruction_loss, sampler, start, inner, batch_norm="carried")

    # ------------------------------------------------------------------------------------------ training
    def start_baseline(self, model: nn.Module, unit: Train, generator: torch.Generator) -> None:
        config = self.config
        if unit.arm == "kaiming":  # as the authors have it: torch's own moments, in a Normal law
            InitDistribution.from_model(model).initialize_(model, generator)
        elif unit.arm == "he":
            kaiming_(model, generator=generator)
        elif unit.arm == "delta-orthogonal":
            delta_orthogonal_convolutions_(model, generator)
        elif unit.arm == "metainit":
            shape = (config.metainit_batch_size, *self.sets[unit.target].train.shape[1:])
            noise = images_of_noise(shape, generator, self.device)
            metainit(model, reconstruction_loss, noise, steps=config.metainit_steps, progress=False)

    def batches(self, target: str, seed: int, part: int) -> Iterator[Batch]:
        own, size = self.sets[target], self.config.batch_size
        generator = torch.Generator().manual_seed(1_000_003 * seed + part)

        def endless() -> Iterator[Tensor]:
            while True:
                order = torch.randperm(len(own.train), generator=generator)
                for index in order[: len(order) - len(order) % size].split(size):
                    # mirrored after the shuffle, as released
                    yield own.standardised(mirrored(own.train[index.to(self.device)], generator))

        return islice(endless(), self.updates(target))

    def updates(self, target: str) -> int:
        return self.config.updates or len(self.sets[target].train) // self.config.batch_size

    def recipe(self, model: nn.Module) -> tuple[UserLoss, TrainingConfig]:
        return reconstruction_loss, TrainingConfig(
            epochs=self.config.evaluations, learning_rate=self.config.learning_rate, weight_decay=0.0,
            schedule="constant",
        )  # fmt: skip

    @torch.no_grad()
    def evaluate(self, model: nn.Module, target: str) -> dict[str, float]:
        own = self.sets[target]
        model.eval()
        errors = [reconstruction_loss(model, own.standardised(part)) * len(part) for part in own.test.split(500)]
        return {"test_error": (torch.stack(errors).sum() / len(own.test)).item()}


def load_pair(config: Config) -> tuple[ImageData, ImageData]:
    """Source and target, as `load_both` and `checked_and_shrunk` say."""
    target, source = load_both(
        config,
        cifar10={"train": config.train_images, "test": config.test_images},
        tiny_imagenet={"train": config.source_images, "test": config.test_images},
    )
    return checked_and_shrunk(source, target, config, EXPERIMENT)


def draw(images: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """n of them: none twice, unless there are fewer than n."""
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(-(-n // len(images)))])
    return images[order[:n].to(images.device)]


def mirrored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each flipped from left to right with probability 1/2."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(flip.to(images.device)[:, None, None, None], images.flip(-1), images)


def images_of_noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of N(0, 1): what MetaInit sees."""
    while True:
        yield torch.randn(shape, generator=generator).to(device)


def main() -> None:
    command(AutoencoderBench, PRESETS, __doc__ or "")


if __name__ == "__main__":
    main()
