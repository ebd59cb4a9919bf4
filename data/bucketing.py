"""Batches of sentence pairs of similar length, bounded by tokens and not by sentences.

Axes: b sentences, s and t sub-words of the longest source and target. Every random number comes from the generator that
is passed in.
"""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.subwords import BOS, EOS, PAD, EncodedPair


class TranslationBatch(TypedDict):
    """A plain dict of two tensors, sentences along dim 0.

    Attributes:
        source: Each row ends in EOS, and PAD from there on.
        target: Each row begins with BOS and ends in EOS, and PAD from there on.
    """

    source: Int64[Tensor, "b s"]
    target: Int64[Tensor, "b t"]


def bucketed_batches(
    pairs: Sequence[EncodedPair],
    max_tokens: int,
    *,
    generator: torch.Generator,
    min_sentences: int = 3,
    device: torch.device | str | None = None,
) -> Iterator[TranslationBatch]:
    """One pass over some pairs, sentences of similar length together, the batches in random order.

    Which of many equally long sentences share a batch is drawn anew each pass. A last batch that is too small takes
    sentences from its neighbour; where the neighbour has none to spare, it sits this pass out. So every pair comes
    once, but for at most `min_sentences` − 1 of the shortest.

    Args:
        pairs: As `encode_pairs` gives them.
        max_tokens: The most a batch may hold: sentences × the longest source or target, special tokens and padding
            included.
        generator: Draws ties and order, at the first batch.
        min_sentences: The fewest a batch may hold, for objectives that divide or compare the sentences of a batch.
        device: Where the batches go; None is the CPU.

    Raises:
        ValueError: If there are too few pairs for a batch, or one is so long that `min_sentences` like it would not
            fit into `max_tokens`; the message names the pair.
    """
    if min_sentences < 1:
        raise ValueError(f"bucketed_batches: `min_sentences` must be at least 1, got {min_sentences}.")
    if len(pairs) < min_sentences:
        raise ValueError(
            f"bucketed_batches: `pairs` must hold at least {min_sentences} (`min_sentences`), got {len(pairs)}."
        )
    _check_lengths("bucketed_batches", pairs, max_tokens, min_sentences)
    # an inner generator function, so that the checks above are made at the call and not at the first batch
    return _epoch(pairs, max_tokens, generator, min_sentences, device)


def evaluation_text_batches(
    pairs: Sequence[EncodedPair], max_tokens: int, *, device: torch.device | str | None = None
) -> Iterator[tuple[TranslationBatch, list[int]]]:
    """Every pair exactly once, the longest first, and nothing random.

    Yields:
        A batch, and for each of its rows the index into `pairs`, by which translations are put back in order.

    Raises:
        ValueError: If a pair alone does not fit into `max_tokens`; the message names it.
    """
    _check_lengths("evaluation_text_batches", pairs, max_tokens, min_sentences=1)
    batches = _fill(pairs, range(len(pairs)), max_tokens)
    return ((_collate([pairs[index] for index in batch], device), batch) for batch in batches)


def _epoch(
    pairs: Sequence[EncodedPair],
    max_tokens: int,
    generator: torch.Generator,
    min_sentences: int,
    device: torch.device | str | None,
) -> Iterator[TranslationBatch]:
    def permutation(n: int) -> list[int]:
        return torch.randperm(n, generator=generator, device=generator.device).tolist()

    batches = _fill(pairs, permutation(len(pairs)), max_tokens)
    missing = min_sentences - len(batches[-1])
    if missing > 0:
        *_, neighbour, last = batches  # a neighbour there is: all pairs together would have been enough
        if len(neighbour) - missing >= min_sentences:
            batches[-2:] = neighbour[:-missing], neighbour[-missing:] + last
        else:
            batches.pop()
    for index in permutation(len(batches)):
        yield _collate([pairs[index] for index in batches[index]], device)


def _fill(pairs: Sequence[EncodedPair], order: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices in decreasing length, ties in the given order, cut where a batch is full."""

    def lengths(index: int) -> tuple[int, int, int]:
        source, target = pairs[index]
        return _length(pairs[index]), len(target), len(source)  # what counts, then what is computed on

    batches: list[list[int]] = []
    for index in sorted(order, key=lengths, reverse=True):
        # the first of a batch is its longest
        if not batches or (len(batches[-1]) + 1) * _length(pairs[batches[-1][0]]) > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def _length(pair: EncodedPair) -> int:
    """How many places of a batch the longer of the two takes, with its special tokens."""
    source, target = pair
    return max(len(source) + 1, len(target) + 2)  # EOS; BOS and EOS


def _collate(pairs: Sequence[EncodedPair], device: torch.device | str | None) -> TranslationBatch:
    def pad(rows: list[list[int]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD).to(device)

    return {
        "source": pad([[*source, EOS] for source, _ in pairs]),
        "target": pad([[BOS, *target, EOS] for _, target in pairs]),
    }


def _check_lengths(function: str, pairs: Sequence[EncodedPair], max_tokens: int, min_sentences: int) -> None:
    longest = max(range(len(pairs)), key=lambda index: _length(pairs[index]), default=None)
    if longest is not None and min_sentences * _length(pairs[longest]) > max_tokens:
        raise ValueError(
            f"{function}: `max_tokens` must hold {min_sentences} of the longest pair, which is number {longest} "
            f"with {_length(pairs[longest])} tokens, got {max_tokens}. "
            "Allow more tokens, or bound the length by `max_length` in encode_pairs."
        )
