"""S and S̃: two minibatches of which half the examples are the same.

The released vision code draws half-batches A, B, C in turn from one shuffled stream: S = A ∪ B, S̃ = A ∪ C
(`"halves"`), or afresh, S̃ = A' ∪ C (`"disjoint"`). The translation code, whose batches differ in length, cuts
each in three: S = [0, 2q), S̃ = [q, N) with q = ⌊N/3⌋ (`"thirds"`).
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch

from common.batches import count_examples, endless, map_tensors, of_one_size, tensors_of
from common.types import Batch

Pairs = Literal["halves", "thirds", "disjoint"]
Pair = tuple[Batch, Callable[[], Batch]]
"""S, and a function that draws S̃: only an iteration that needs it uses up its examples."""


def batch_pairs(batches: Iterable[Batch], pairs: Pairs = "halves") -> Iterator[Pair]:
    """Pairs (S, S̃) without end from batches of n examples.

    A collection is gone through again and again. With `"halves"` and `"disjoint"` batches must be of one even size, of
    which a pass's last may fall short: it sits that pass out. An iteration uses n examples for S, and for S̃ n/2 more
    with `"halves"`, n with `"disjoint"`; `"thirds"` uses one batch for both, of any size from three on: smaller ones,
    where they are not the first, sit out.

    Args:
        batches: Any nesting of tensors, examples along dimension 0. A collection of a single batch has no other half:
            S̃ is then A twice, or A and B by turns.
        pairs: How S̃ shares its examples with S.

    Yields:
        S, and a function that gives S̃ when called.

    Raises:
        ValueError: When iterated: an odd, changing or too small size, tensors that cannot be joined, too few batches.

    Example:
        >>> S, other = next(batch_pairs([torch.arange(4), torch.arange(4, 8)]))
        >>> S, other()
        (tensor([0, 1, 2, 3]), tensor([0, 1, 4, 5]))
    """
    if pairs == "thirds":
        begun = False
        for batch in endless(batches, "gradinit"):
            N = count_examples(batch, "gradinit")
            if N < 3 and begun:  # what is left over at the end of a pass
                continue
            begun = True
            if N < 3:
                raise ValueError(
                    f"gradinit: pairs='thirds' needs batches of at least 3 examples, got {N}. Use larger batches."
                )
            q = N // 3
            yield _part(batch, 0, 2 * q), lambda batch=batch, q=q, N=N: _part(batch, q, N)
    remedy = "Use drop_last=True, or pairs='thirds' for batches of changing size."
    stream = _halves(endless(of_one_size(batches, "gradinit", remedy), "gradinit"))
    for A in stream:

        def other(A: Batch = A) -> Batch:
            return _join(A if pairs == "halves" else next(stream), next(stream))

        yield _join(A, next(stream)), other


def _halves(batches: Iterator[Batch]) -> Iterator[Batch]:
    for batch in batches:
        n = count_examples(batch, "gradinit")
        if n < 2 or n % 2:
            raise ValueError(
                f"gradinit: batches must hold an even number of examples, 2 or more, got {n}: S̃ shares half of S. "
                "Use an even batch size, or pairs='thirds' (3 or more)."
            )
        yield _part(batch, 0, n // 2)
        yield _part(batch, n // 2, n)


def _part(batch: Batch, start: int, end: int) -> Batch:
    return map_tensors(lambda leaf: leaf[start:end], batch)


def _join(a: Batch, b: Batch) -> Batch:
    """Example after example; whatever is no tensor is the first's."""
    ours, theirs = tensors_of(a), tensors_of(b)
    if [leaf.shape[1:] for leaf in ours] != [leaf.shape[1:] for leaf in theirs]:
        raise ValueError(
            "gradinit: batches must be alike to be joined, got tensors of shapes "
            f"{[tuple(leaf.shape) for leaf in ours]} and {[tuple(leaf.shape) for leaf in theirs]}. Pad them to one "
            "length, or use pairs='thirds', which cuts each batch by itself."
        )
    remaining = iter(theirs)
    return map_tensors(lambda leaf: torch.cat([leaf, next(remaining)]), a)
