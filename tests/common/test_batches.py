"""Batches of any nesting: every tensor is reached, and the user's own containers stay what they were."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from common.batches import count_examples, first_examples, map_tensors, tensors_of


class Named(NamedTuple):
    x: torch.Tensor
    name: str


class Inputs(dict):
    """As some libraries' batches."""


class Lines(list):
    pass


@dataclass(frozen=True)
class ModelInput:
    ids: torch.Tensor
    parts: list[torch.Tensor]
    padding: str = "right"


class Attributes(dict):
    """Whose entries are its attributes, as many configurations' and batches'."""

    def __init__(self, **entries) -> None:
        super().__init__(**entries)
        self.__dict__ = self


@dataclass
class Derived:
    """With a tensor that is no field."""

    x: torch.Tensor

    def __post_init__(self) -> None:
        self.last = self.x[:, 0].clone()


@dataclass(slots=True)
class Slotted:
    a: torch.Tensor
    b: torch.Tensor


def make(kind: str):
    a, b = torch.arange(6.0).reshape(3, 2), torch.arange(3.0)
    return {
        "tuple": (a, [b, "name"]),
        "named tuple": (Named(a, "name"), b),
        "dictionary": {"a": a, "b": (b, 3)},
        "ordered": OrderedDict(a=a, b=b),
        "user dictionary": UserDict(a=a, b={"c": b}),
        "own dictionary": (Inputs(a=a, name="x"), b),
        "own list": Lines([a, Inputs(b=b)]),
        "attributes": Attributes(a=a, b=b),
        "derived": Derived(a),
        "slots": Slotted(a, b),
        "dataclass": ModelInput(a, [b]),
        "dataclass inside": (ModelInput(a, []), b),
    }[kind]


KINDS = (
    "tuple", "named tuple", "dictionary", "ordered", "user dictionary", "own dictionary", "own list", "attributes",
    "derived", "slots", "dataclass", "dataclass inside",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_reached_in_order_and_the_batch_stays(kind):
    batch = make(kind)
    before = [leaf.clone() for leaf in tensors_of(batch)]
    assert [leaf.shape for leaf in before] == [(3, 2), (3,)]
    doubled = map_tensors(lambda leaf: 2 * leaf, batch)
    assert type(doubled) is type(batch)
    assert all(torch.equal(leaf, 2 * old) for leaf, old in zip(tensors_of(doubled), before, strict=True))
    assert all(map(torch.equal, tensors_of(batch), before))
    assert count_examples(batch, "nio") == 3
    assert [leaf.shape for leaf in tensors_of(first_examples(batch, 2))] == [(2, 2), (2,)]


def test_attributes_are_those_of_the_examples_that_are_left():
    batch = first_examples(make("attributes"), 1)
    assert batch.a is batch["a"]
    assert len(batch.b) == 1
    assert len(first_examples(make("derived"), 1).last) == 1


def test_whatever_is_no_tensor_is_kept():
    doubled = map_tensors(lambda leaf: 2 * leaf, make("dataclass"))
    assert doubled.padding == "right"
    assert map_tensors(lambda leaf: leaf, make("own dictionary"))[0]["name"] == "x"
    assert map_tensors(lambda leaf: leaf, ModelInput) is ModelInput


def test_a_list_with_an_entry_an_example_is_refused_wherever_it_is():
    for batch in (ModelInput(torch.ones(2, 3), ["a", "b"]), Inputs(x=torch.ones(2, 3), names=["a", "b"])):
        with pytest.raises(
            ValueError, match="nio: what belongs to single examples must be in tensors, got a list of 2"
        ):
            count_examples(batch, "nio")
