"""What the experiments on images share: the same examples, held out alike, and one training run as a record."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.functional import classification_loss
from common.training import TrainingConfig, classification_metrics, train
from common.types import Batch
from data import ImageData, ImageName, ImageSplit, evaluation_batches, load_images


@dataclass(frozen=True)
class Splits:
    """The images, on the training device."""

    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit
    data: ImageData

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    def batches(self, split: ImageSplit, size: int = 1000) -> Iterator[Batch]:
        return evaluation_batches(split, size, mean=self.data.mean, std=self.data.std)


def prepare(
    name: ImageName,
    *,
    data_dir: Path | None,
    train: int | None,
    validation: int,
    test: int | None,
    batch_size: int,
    device: torch.device,
    caller: str,
) -> Splits:
    """Load, hold out, take subsets: the same images for every arm and seed.

    Raises:
        ValueError: Too many held out to leave a batch.
    """
    data = load_images(name, data_dir=data_dir, train=None if train is None else train + validation, test=test)
    if validation + batch_size > len(data.train):
        held = f"{validation} of {len(data.train)} held out" if validation else f"{len(data.train)} in all"
        remedy = "Set `validation_images` lower" if validation else "Take more `train_images`"
        raise ValueError(
            f"{caller}: there must be a batch of {batch_size} training images, got {held}. "
            f"{remedy}, or smaller batches."
        )
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    held_out, kept = (data.train.take(part) for part in order.split([validation, len(order) - validation]))
    return Splits(kept.to(device), held_out.to(device), data.test.to(device), data)


def epochs_of(epochs: int, wanted: int | None, images: int) -> int:
    """As many updates on a set that is smaller than asked for, such as the embedded digits."""
    return epochs if wanted is None else round(epochs * wanted / images)


def fit(
    model: nn.Module,
    train_batches: Callable[[int], Iterable[Batch]],
    splits: Splits,
    recipe: TrainingConfig,
    batch_size: int,
    checkpoint: Path,
    on_epoch: Callable[[dict[str, float]], None],
) -> dict[str, Any]:
    """Train and evaluate after each epoch; what a record of it holds."""

    def evaluate(model: nn.Module) -> dict[str, float]:
        metrics = classification_metrics(model, splits.batches(splits.test))
        if len(splits.validation) == 0:
            return metrics
        validation = classification_metrics(model, splits.batches(splits.validation))
        return metrics | {"validation_accuracy": validation["test_accuracy"]}

    result = train(
        model,
        classification_loss,
        train_batches,
        evaluate,
        steps_per_epoch=len(splits.train) // batch_size,
        config=recipe,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
    )
    return {"history": result.history, "diverged": result.diverged, "seconds": result.seconds}
