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


def taped_gradient(loss: PureLoss, params: Params, batch: Batch) -> tuple[Params, Callable[[Params], Params]]:
    """`linearized_gradient` on autograd's own tape, for code that differentiates the result with `torch.autograd.grad`.

    `params` require gradients. No transform surrounds the loss, so that nothing is wrapped, and convolutions are
    differentiated by `common.convolution`: faster, but out of reach of an outer `torch.func` transform.
    """
    g = tape(loss(params, batch), params)
    return g, lambda v: tape(g, params, v)


def tape(outputs: Tensor | Params, params: Params, cotangents: Params | None = None, *, keep: bool = True) -> Params:
    """Σ_l ⟨cotangent_l, output_l⟩ differentiated in `params`: zeros, not None, where nothing depends on them.

    Args:
        outputs: A scalar, or tensors by name.
        params: Tensors that `outputs` were computed from.
        cotangents: By the names of `outputs`.
        keep: Whether the result is to be differentiated itself.
    """
    named = {"": outputs} if isinstance(outputs, Tensor) else outputs
    live = [name for name, leaf in named.items() if leaf.requires_grad]  # linear in θ: nothing to differentiate
    if not live:
        return tree_map(torch.zeros_like, params)
    gradients = torch.autograd.grad(
        [named[name] for name in live],
        list(params.values()),
        None if cotangents is None else [cotangents[name] for name in live],
        create_graph=keep,
        materialize_grads=True,
    )
    return dict(zip(params, gradients, strict=True))


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
