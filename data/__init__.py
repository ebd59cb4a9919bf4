"""Data by name: loaders, embedded sets, augmentation, sub-words, characters and samplers."""

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
from data.pixels import PixelStatistics, pixel_permutation, pixel_statistics, shuffle_pixels, standardise_pixels
from data.splits import ImageData, ImageSplit, channel_statistics
from data.subwords import BOS, EOS, PAD, UNK, EncodedPair, Subwords, encode_pairs, train_subwords
from data.text import (
    CharacterBatch,
    CharacterTask,
    CharacterVocabulary,
    TextData,
    TextName,
    batchify,
    character_vocabulary,
    character_windows,
    load_text,
    sample_character_task,
)
from data.translation import SentencePair, TranslationData, TranslationName, load_translation

__all__ = [
    "BOS",
    "EOS",
    "PAD",
    "UNK",
    "CharacterBatch",
    "CharacterTask",
    "CharacterVocabulary",
    "EncodedPair",
    "ImageBatch",
    "ImageData",
    "ImageName",
    "ImageSplit",
    "PixelStatistics",
    "SentencePair",
    "Subwords",
    "TextData",
    "TextName",
    "TranslationBatch",
    "TranslationData",
    "TranslationName",
    "batchify",
    "bucketed_batches",
    "channel_statistics",
    "character_vocabulary",
    "character_windows",
    "cutout",
    "encode_pairs",
    "epoch_batches",
    "evaluation_batches",
    "evaluation_text_batches",
    "load_images",
    "load_text",
    "load_translation",
    "mixup",
    "normalize",
    "pixel_permutation",
    "pixel_statistics",
    "random_crop_flip",
    "sample_batches",
    "sample_character_task",
    "shuffle_pixels",
    "standardise_pixels",
    "train_subwords",
]
