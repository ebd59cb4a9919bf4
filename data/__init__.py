"""Data by name: loaders, embedded sets, augmentation, sub-words and samplers."""

from data.augment import (
    ImageBatch,
    cutout,
    epoch_batches,
    evaluation_batches,
    mixup,
    normalize,
    random_crop_flip,
    sample_batches,
)
from data.bucketing import TranslationBatch, bucketed_batches, evaluation_text_batches
from data.images import ImageName, load_images
from data.splits import ImageData, ImageSplit, channel_statistics
from data.subwords import BOS, EOS, PAD, UNK, EncodedPair, Subwords, encode_pairs, train_subwords
from data.translation import SentencePair, TranslationData, TranslationName, load_translation

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "UNK",
    "EncodedPair",
    "ImageBatch",
    "ImageData",
    "ImageName",
    "ImageSplit",
    "SentencePair",
    "Subwords",
    "TranslationBatch",
    "TranslationData",
    "TranslationName",
    "bucketed_batches",
    "channel_statistics",
    "cutout",
    "encode_pairs",
    "epoch_batches",
    "evaluation_batches",
    "evaluation_text_batches",
    "load_images",
    "load_translation",
    "mixup",
    "normalize",
    "random_crop_flip",
    "sample_batches",
    "train_subwords",
]
