"""Gradients and Hessian-vector products of a pure loss, whole or summed over micro-batches."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from common.tree import tree_add, tree_map
from common.types import Batch, Params, PureLoss


def gradient(loss: PureLoss, params: Params, batch: Batch) -> Params:
    """g = ∇L(θ), differentiable in θ.

    Example:
        >>> gradient(lambda theta, _: (theta["w"] ** 2).sum(), {"w": torch.tensor([1.0, -2.0])}, None)["w"]
        tensor([ 2., -4.])
    """
    return torch.func.grad(loss)(params, batch)


def linearized_gradient(loss: PureLoss, params: Params, batch: Batch) -> tuple[Params, Callable[[Params], Params]]:
    """g = ∇L(θ) and the map v ↦ H v, H = ∇²L(θ), from one forward pass and one graph (reverse over reverse)."""
    g, pull = torch.func.vjp(lambda theta: gradient(loss, theta, batch), params)[:2]
    return g, lambda v: pull(v)[0]  # H is symmetric: vᵀH is (H v)ᵀ


def hvp(loss: PureLoss, params: Params, vector: Params, batch: Batch) -> Params:
    """H v with H = ∇²L(θ); no Hessian is formed.

    Example:
        >>> loss = lambda theta, _: (theta["w"] ** 3).sum()
        >>> hvp(loss, {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([1.0, 1.0])}, None)["w"]
        tensor([  6., -12.])
    """
    return linearized_gradient(loss, params, batch)[1](vector)


def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[float, Batch]]:
    """The batch in pieces of at most `size` examples, each with its share of the examples (the shares sum to 1).

    A mean over the batch is the weighted sum of the pieces' means. None: the whole batch, with weight 1.
    """
    if size is None:
        yield 1.0, batch
        return
    if size < 1:
        raise ValueError(f"micro_batches: `size` must be at least 1, got {size}.")
    lengths = {leaf.shape[0] for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)}
    if len(lengths) != 1:
        raise ValueError(
            f"micro_batches: every tensor of a batch must have the same first dimension, got {sorted(lengths)}. "
            "Leave the micro-batch size unset for such batches."
        )
    (length,) = lengths
    for start in range(0, length, size):
        end = min(start + size, length)
        yield (end - start) / length, tree_map_only(Tensor, lambda leaf, a=start, b=end: leaf[a:b], batch)


def accumulate(term: Callable[[Batch], Params], batch: Batch, size: int | None) -> Params:
    """Σ_b w_b term(b) over micro-batches b: the whole batch's value of anything that is a mean over examples."""
    total: Params | None = None
    for weight, piece in micro_batches(batch, size):
        value = term(piece)
        total = (
            tree_map(lambda leaf, w=weight: w * leaf, value) if total is None else tree_add(total, value, scale=weight)
        )
    if total is None:
        raise ValueError("accumulate: a batch must hold an example, got an empty one.")
    return total
