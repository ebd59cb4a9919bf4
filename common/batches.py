"""Batches of any nesting: tuples, lists, dictionaries, and Hugging Face's, which torch's pytrees take for leaves."""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from common.types import Batch


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """`function` on every tensor of the batch; whatever else it holds is kept."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if isinstance(leaf, UserDict):  # transformers.BatchEncoding and its like
            mapped = copy.copy(leaf)
            mapped.data = map_tensors(function, dict(leaf.data))
            return mapped
        return leaf

    return tree_map(of_leaf, batch, is_leaf=lambda node: isinstance(node, (Tensor, UserDict)))


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of the batch, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def length_of(batch: Batch, caller: str, remedy: str) -> int:
    """How many examples the batch holds: the first dimension that all of its tensors share.

    Raises:
        ValueError: No tensor, or tensors that differ; with the `remedy`.
    """
    lengths = {leaf.shape[0] if leaf.ndim else None for leaf in tensors_of(batch)}
    if len(lengths) != 1 or None in lengths:
        raise ValueError(
            f"{caller}: every tensor of a batch must have the same first dimension, got {sorted(lengths, key=str)}. "
            + remedy
        )
    return lengths.pop()  # pyright: ignore[reportReturnType]


def endless(batches: Iterable[Batch], caller: str) -> Iterator[Batch]:
    """Goes through a collection again and again; a bare iterator only once, and then says so.

    Raises:
        ValueError: When there is no further batch.
    """
    count = 0
    while True:
        before = count
        for batch in batches:
            count += 1
            yield batch
        if count == before or isinstance(batches, Iterator):
            raise ValueError(
                f"{caller}: `batches` must last for every step, got {count} batches. "
                "Pass a collection or DataLoader (gone through again and again), or fewer `steps`."
            )
