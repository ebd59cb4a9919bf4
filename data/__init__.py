"""Data by name: loaders, embedded sets, augmentation and samplers."""

from data.augment import (
    ImageBatch,
    epoch_batches,
    evaluation_batches,
    normalize,
    random_crop_flip,
    sample_batches,
)
from data.images import ImageName, load_images
from data.splits import ImageData, ImageSplit, channel_statistics

__all__ = [
    "ImageBatch",
    "ImageData",
    "ImageName",
    "ImageSplit",
    "channel_statistics",
    "epoch_batches",
    "evaluation_batches",
    "load_images",
    "normalize",
    "random_crop_flip",
    "sample_batches",
]
