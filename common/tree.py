"""Arithmetic on parameter dictionaries `{name: tensor}`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from common.types import Params


def tree_map(function: Callable[..., Tensor], first: Params, *others: Params) -> Params:
    """`function` applied leaf by leaf; all trees carry the same names."""
    return {name: function(leaf, *(other[name] for other in others)) for name, leaf in first.items()}


def tree_add(a: Params, b: Params, *, scale: float = 1.0) -> Params:
    """a + scale · b."""
    return tree_map(lambda x, y: torch.add(x, y, alpha=scale), a, b)


def tree_vdot(a: Params, b: Params) -> Tensor:
    """⟨a, b⟩ over every entry of every tensor."""
    return torch.stack([(leaf * b[name]).sum() for name, leaf in a.items()]).sum()


def tree_dots(a: Params, b: Params, names: Iterable[str]) -> Tensor:
    """⟨a_l, b_l⟩ for each named tensor l, as one vector (and so without a device synchronisation a tensor)."""
    return torch.stack([(a[name] * b[name]).sum() for name in names])


def tree_norms(tree: Params, names: Iterable[str] | None = None) -> Tensor:
    """‖a_l‖_F for each (named) tensor, as one vector."""
    names = tree if names is None else names
    return torch.stack([torch.linalg.vector_norm(tree[name]) for name in names])


def flatten(tree: Params) -> Tensor:
    """Every entry of every tensor as one vector of N scalars: what an equation over all of θ is written on."""
    return torch.cat([leaf.flatten() for leaf in tree.values()])


def numel(tree: Params) -> int:
    """N: how many scalars the tree holds."""
    return sum(leaf.numel() for leaf in tree.values())
