"""Batches of any nesting: tuples, lists, dictionaries; dataclasses and others that torch's pytrees take for leaves."""

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from common.types import Batch


def map_tensors(function: Callable[[Tensor], Any], batch: Batch) -> Batch:
    """`function` on every tensor of the batch; whatever else it holds is kept."""

    def of_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        is_instance = is_dataclass(leaf) and not isinstance(leaf, type)
        return _map_container(function, leaf) if is_instance or isinstance(leaf, (dict, list, UserDict)) else leaf

    return tree_map(of_leaf, batch, is_leaf=lambda node: isinstance(node, (Tensor, UserDict)))


def _map_container(function: Callable[[Tensor], Any], container: Any) -> Any:
    """A copy of what pytrees do not know, entry by entry and attribute by attribute, among which are its fields."""
    mapped = copy.copy(container)
    if isinstance(container, (dict, list)):
        for key in container if isinstance(container, dict) else range(len(container)):
            mapped[key] = map_tensors(function, container[key])
    attributes = getattr(container, "__dict__", {})
    if attributes is container:  # a dictionary whose entries are its attributes
        mapped.__dict__ = mapped
        return mapped
    own = [field.name for field in fields(container)] if is_dataclass(container) else []
    for name in dict.fromkeys((*own, *attributes)):  # fields may be slots, and an instance frozen
        object.__setattr__(mapped, name, map_tensors(function, getattr(container, name)))
    return mapped


def tensors_of(batch: Batch) -> list[Tensor]:
    """Every tensor of the batch, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, batch)
    return found


def first_examples(batch: Batch, count: int) -> Batch:
    """At most so many examples; a batch that cannot be divided stays as it is."""
    if len({leaf.shape[:1] for leaf in tensors_of(batch)}) != 1:
        return batch
    return map_tensors(lambda leaf: leaf[:count], batch)


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


class of_one_size:  # noqa: N801 - a generator that can be gone through again
    """Batches of the first one's size; a pass's last may fall short, and sits that pass out.

    Raises:
        ValueError: When iterated: another size, tensors that do not share one, or what belongs to single examples in a
            list; with the `remedy`.
    """

    def __init__(self, batches: Iterable[Batch], caller: str, remedy: str) -> None:
        self.batches, self.caller, self.remedy, self.size = batches, caller, remedy, None

    def __iter__(self) -> Iterator[Batch]:
        short: int | None = None
        for batch in self.batches:
            length = count_examples(batch, self.caller)
            self.size = length if self.size is None else self.size
            if short is not None or length > self.size:
                raise ValueError(
                    f"{self.caller}: batches must be of one size, got {short or length} examples after {self.size}; "
                    f"only a pass's last may fall short. {self.remedy}"
                )
            if length < self.size:
                short = length
                continue
            yield batch


def count_examples(batch: Batch, caller: str) -> int:
    """How many examples a batch holds that is to be divided.

    Raises:
        ValueError: Tensors that do not share one first dimension, or what belongs to single examples in a list.
    """
    length = length_of(batch, caller, "A batch must hold tensors whose examples lie along dimension 0.")
    _check_lists(batch, length, caller)
    return length


def _check_lists(part: Any, length: int, caller: str) -> None:
    """A list with an entry an example cannot be told from options that belong to all, and would not be divided."""
    inner = list(part.values()) if isinstance(part, (dict, UserDict)) else part
    if is_dataclass(part) and not isinstance(part, type):
        inner = [getattr(part, field.name) for field in fields(part)]
    if not isinstance(inner, (list, tuple)):
        return
    if isinstance(part, (list, tuple)) and len(part) == length > 1 and not tensors_of(list(part)):
        raise ValueError(
            f"{caller}: what belongs to single examples must be in tensors, got a {type(part).__name__} of {length}. "
            "Encode it as a tensor, or leave it out of the batch."
        )
    for entry in inner:
        _check_lists(entry, length, caller)
