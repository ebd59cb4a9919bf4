"""Gradients, Hessian-vector products and per-group gradients of a pure loss, whole or summed over micro-batches.

Each is a pure function, differentiable in `params`, and composes with `torch.func`'s transforms (`taped_gradient` and
`tape`, which live on autograd's own tape, excepted).
"""

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from types import FunctionType
from typing import Literal
from weakref import WeakSet

import torch
from torch import Tensor

from common.batches import length_of, map_tensors, tensors_of
from common.tree import tree_add, tree_map
from common.types import Batch, DerivativeError, Params, PureLoss

HvpMode = Literal["reverse", "forward"]
GroupMode = Literal["auto", "vmap", "loop", "shared"]
Group = slice | Tensor
"""Examples of a batch: a slice, or a vector of indices or booleans."""


def gradient(loss: PureLoss, params: Params, batch: Batch, *, micro_batch_size: int | None = None) -> Params:
    """g = ∇L(θ), differentiable in θ.

    Args:
        loss: L, pure; with `micro_batch_size` the mean of its examples' losses, none of which may see another.
        params: θ.
        batch: Passed to `loss`.
        micro_batch_size: Examples of which a graph is held at once; any size, the last piece may be smaller.

    Example:
        >>> gradient(lambda theta, _: (theta["w"] ** 2).sum(), {"w": torch.tensor([1.0, -2.0])}, None)["w"]
        tensor([ 2., -4.])
    """
    if micro_batch_size is not None:
        return accumulate(lambda piece: gradient(loss, params, piece), batch, micro_batch_size)
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


def tape(
    outputs: Tensor | Params,
    params: Params,
    cotangents: Params | None = None,
    *,
    keep: bool = True,
    retain: bool | None = None,
) -> Params:
    """Σ_l ⟨cotangent_l, output_l⟩ differentiated in `params`: zeros, not None, where nothing depends on them.

    Args:
        outputs: A scalar, or tensors by name.
        params: Tensors that `outputs` were computed from.
        cotangents: By the names of `outputs`.
        keep: Whether the result is to be differentiated itself.
        retain: Whether the tape of `outputs` is to be read again, which `keep` implies.
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
        retain_graph=keep if retain is None else retain,
        allow_unused=True,
    )
    # zeros made by torch's materialize_grads would require a gradient, as if something depended on them
    return {
        name: torch.zeros_like(leaf) if slope is None else slope
        for (name, leaf), slope in zip(params.items(), gradients, strict=True)
    }


def check_differentiable(
    loss: PureLoss, params: Params, batch: Batch, caller: str, *, order: Literal[2, 3] = 2
) -> None:
    """Refuse what torch would differentiate in part, without a word: a gradient, or with order 3 a product H g too.

    A backward marked `once_differentiable` leaves a node that raises when it is run, and a gradient for named tensors
    does not run it.

    Raises:
        DerivativeError: The loss holds such a layer.
    """
    leaves = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
    outputs = tape(loss(leaves, batch), leaves)
    _refuse_once_differentiable(outputs, caller, "second")
    if order == 3:
        # along g itself: a direction that requires no gradient would leave no such node
        _refuse_once_differentiable(tape(outputs, leaves, outputs), caller, "third")


def _refuse_once_differentiable(outputs: Params, caller: str, ordinal: str) -> None:
    waiting = [leaf.grad_fn for leaf in outputs.values()]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("autograd::Error"):
            raise DerivativeError(
                f"{caller}: every layer must have a {ordinal} derivative, got a backward that is once_differentiable: "
                "torch would leave it out, without a word. `common.guard.check_derivatives` names it. Write it in "
                "differentiable operations. The model is unchanged."
            )
        waiting += [following for following, _ in node.next_functions]


def hvp(
    loss: PureLoss,
    params: Params,
    vector: Params,
    batch: Batch,
    *,
    mode: HvpMode = "reverse",
    micro_batch_size: int | None = None,
) -> Params:
    """H v with H = ∇²L(θ); no Hessian is formed.

    Args:
        loss: L, pure; with `micro_batch_size` the mean of its examples' losses, none of which may see another.
        params: θ.
        vector: v, with the names and shapes of θ.
        batch: Passed to `loss`.
        mode: `"reverse"` (over reverse) has the widest coverage. `"forward"` (over reverse) keeps no second graph, and
            so needs less memory; where an operator has no forward-mode formula, the reverse mode is taken instead.
        micro_batch_size: Examples of which a graph is held at once.

    Raises:
        ValueError: Unknown `mode`, or a `vector` that is not like `params`.

    Example:
        >>> loss = lambda theta, _: (theta["w"] ** 3).sum()
        >>> hvp(loss, {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([1.0, 1.0])}, None)["w"]
        tensor([  6., -12.])
    """
    if mode not in ("reverse", "forward"):
        raise ValueError(f"hvp: `mode` must be 'reverse' or 'forward', got {mode!r}.")
    odd = [name for name in params | vector if name not in params or name not in vector]
    odd = odd or [name for name, leaf in params.items() if leaf.shape != vector[name].shape]
    if odd:
        raise ValueError(f"hvp: `vector` must have the names and shapes of `params`, got a difference at {odd[0]!r}.")
    if micro_batch_size is not None:
        return accumulate(lambda piece: hvp(loss, params, vector, piece, mode=mode), batch, micro_batch_size)
    if mode == "forward":
        try:
            return torch.func.jvp(lambda theta: gradient(loss, theta, batch), (params,), (vector,))[1]
        except RuntimeError:  # no forward-mode formula; what is wrong with the loss itself is raised below again
            pass
    return linearized_gradient(loss, params, batch)[1](vector)


# ---------------------------------------------------------------------------------------------- a gradient a group
def group_gradients(
    loss: PureLoss,
    params: Params,
    batch: Batch,
    groups: Sequence[Group] | None = None,
    *,
    mode: GroupMode = "auto",
    chunk_size: int | None = None,
    wrt: Iterable[str] | None = None,
) -> Params:
    """∇L_k(θ) for each group k of the batch's examples, differentiable in θ.

    Args:
        loss: Pure, the mean over a batch's examples. For `mode="shared"` one value an example, shape (b,).
        params: θ.
        batch: Any nesting of tensors, examples along dimension 0.
        groups: Slices, or vectors of indices or booleans; they may overlap. None: each example is a group.
        mode: What a group is to a layer that looks across examples, and how it is computed:

            - `"loop"` evaluates the loss on each group alone, so that BatchNorm takes each group's own statistics. It
              asks no more of the model than `torch.func.grad` does.
            - `"vmap"` is the same numbers from one vectorised pass; groups must be of one size, and the model free of
              control flow that depends on data.
            - `"shared"` evaluates the loss once on the whole batch, whose statistics all groups share, and
              differentiates the mean of each group's values.
            - `"auto"` is `"vmap"` where that is possible, else `"loop"`: the same numbers up to round-off.
        chunk_size: Groups held in memory at once by `"vmap"`, and by `"shared"` in its backward passes; None: all of
            them, and for `"shared"` one.
        wrt: Names of the parameters that gradients are taken in; None: all.

    Returns:
        `{name: (groups, *shape of the parameter)}`.

    Raises:
        ValueError: An unknown mode, no group, an empty one or one beyond the batch, groups of different sizes under
            `"vmap"`, a batch without a common first dimension, or a loss of the wrong shape.

    Example:
        >>> loss = lambda theta, x: (theta["w"] * x).square().mean()
        >>> group_gradients(loss, {"w": torch.tensor(3.0)}, torch.tensor([1.0, 2.0]))["w"]
        tensor([ 6., 24.])
    """
    if mode not in ("auto", "vmap", "loop", "shared"):
        raise ValueError(f"group_gradients: `mode` must be 'auto', 'vmap', 'loop' or 'shared', got {mode!r}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"group_gradients: `chunk_size` must be at least 1, got {chunk_size}.")
    length = length_of(batch, "group_gradients", "A gradient an example or group needs tensors that can be split.")
    groups = [slice(k, k + 1) for k in range(length)] if groups is None else [_plain(k, length) for k in groups]
    if beyond := [k for k in groups if isinstance(k, slice) and k.stop is not None and k.stop > length]:
        raise ValueError(f"group_gradients: groups must lie in the batch of {length} examples, got {beyond[0]}.")
    sizes = [len(range(length)[k]) if isinstance(k, slice) else len(k) for k in groups]
    if not sizes or 0 in sizes:
        raise ValueError(f"group_gradients: every group must hold an example, got groups of sizes {sizes}.")
    moving, still = params, {}
    if wrt is not None:
        wrt = list(wrt)
        if unknown := [name for name in wrt if name not in params]:
            raise ValueError(f"group_gradients: `wrt` must name parameters, got {unknown[0]!r}.")
        moving = {name: params[name] for name in wrt}
        still = {name: leaf for name, leaf in params.items() if name not in moving}
    of_moving = (lambda theta, batch: loss(still | theta, batch)) if still else loss
    if mode == "shared":
        return _shared(of_moving, moving, batch, groups, chunk_size, length)
    equal = len(set(sizes)) == 1
    if mode == "vmap" and not equal:
        raise ValueError(
            f"group_gradients: mode='vmap' needs groups of one size, got sizes {sizes}. Use mode='loop' or 'auto'."
        )
    if mode == "vmap":
        return _vmapped(of_moving, moving, batch, groups, chunk_size)
    underlying, failed = _underlying(loss), False
    is_known = isinstance(underlying, Hashable) and underlying in _UNMAPPABLE
    if mode == "auto" and equal and len(groups) > 1 and not is_known:
        try:
            return _vmapped(of_moving, moving, batch, groups, chunk_size)
        except RuntimeError as error:  # no batching rule, or control flow on data; the loop raises what else is wrong
            failed = not isinstance(error, torch.OutOfMemoryError)  # which a smaller batch need not meet
    by_loop = _stacked([gradient(of_moving, moving, map_tensors(lambda leaf, k=k: leaf[k], batch)) for k in groups])
    if failed and isinstance(underlying, FunctionType):  # what pure_loss makes; others may not take a weak reference
        _UNMAPPABLE.add(underlying)
    return by_loop


def _plain(group: Group, length: int) -> Group:
    """A slice that goes forward, or a vector of indices."""
    if isinstance(group, slice):
        indices = range(length)[group]
        return group if indices.step > 0 else torch.tensor(list(indices))
    if group.ndim != 1:
        raise ValueError(
            "group_gradients: a group must be a slice, or a vector of indices or of booleans, got shape "
            f"{tuple(group.shape)}."
        )
    return group.nonzero().flatten() if group.dtype == torch.bool else group


# Losses that vmap could not follow, so that "auto" does not try again: the result is the same, only sooner.
_UNMAPPABLE: WeakSet[Callable] = WeakSet()


def _underlying(loss: Callable) -> Callable:
    """The loss without what `partial` has fixed of it: a seed a step, say."""
    return _underlying(loss.func) if isinstance(loss, partial) else loss


def _stacked(trees: list[Params]) -> Params:
    return tree_map(lambda *leaves: torch.stack(leaves), *trees)


def _vmapped(loss: PureLoss, params: Params, batch: Batch, groups: Sequence[Group], chunk_size: int | None) -> Params:
    # Only tensors are mapped; whatever else the batch holds is every group's.
    stacks = [torch.stack([leaf[k] for k in groups]) for leaf in tensors_of(batch)]

    def of_group(*leaves: Tensor) -> Params:
        pieces = iter(leaves)
        return gradient(loss, params, map_tensors(lambda _: next(pieces), batch))

    with warnings.catch_warnings():
        # torch goes through an operator without a batching rule one by one, which is right, and says so
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        # "same": under a seed every group draws what it would draw alone
        return torch.func.vmap(of_group, randomness="same", chunk_size=chunk_size)(*stacks)


def _shared(
    loss: PureLoss, params: Params, batch: Batch, groups: Sequence[Group], chunk_size: int | None, length: int
) -> Params:
    def means(theta: Params) -> Tensor:
        values = loss(theta, batch)
        if values.shape != (length,):
            raise ValueError(
                f"group_gradients: for mode='shared' the loss must return one value an example, shape ({length},), got "
                f"shape {tuple(values.shape)}. Use reduction='none', and a mean over any further dimensions."
            )
        return torch.stack([values[k].mean() for k in groups])

    values, pull = torch.func.vjp(means, params)[:2]
    rows = torch.eye(len(groups), dtype=values.dtype, device=values.device)
    if chunk_size is None:
        return _stacked([pull(row)[0] for row in rows])
    return torch.func.vmap(lambda row: pull(row)[0], chunk_size=chunk_size)(rows)


# ---------------------------------------------------------------------------------------------- micro-batches
def micro_batches(batch: Batch, size: int | None) -> Iterator[tuple[float, Batch]]:
    """The batch in pieces of at most `size` examples, each with its share of the examples (the shares sum to 1).

    A mean over the batch is the weighted sum of the pieces' means. None: the whole batch, with weight 1.
    """
    if size is None:
        yield 1.0, batch
        return
    if size < 1:
        raise ValueError(f"micro_batches: `size` must be at least 1, got {size}.")
    length = length_of(batch, "micro_batches", "Leave the micro-batch size unset for such batches.")
    for start in range(0, length, size):
        end = min(start + size, length)
        yield (end - start) / length, map_tensors(lambda leaf, a=start, b=end: leaf[a:b], batch)


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
