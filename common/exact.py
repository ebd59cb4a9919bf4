r"""Higher derivatives that are right.

Torch's fused layer, batch and instance norm save their mean and inverse deviation without a history. The second
derivative accounts for them by hand; one derivative further treats them as constants, and is silently wrong. Fused
attention and recurrent kernels have no second, or no forward-mode, derivative at all. Under `exact_derivatives()` these
functions are re-expressed in means, products and exponentials, whose derivatives of every order autograd gets right,
and the masks of dropout no longer depend on how their input lies in memory. Convolution and, outside of transforms,
batch norm have derivatives of our own, for speed (`common.convolution`, `common.normalisation`).

Function values are unchanged up to round-off. Nothing global is set: the mode is a thread-local
`torch.overrides.TorchFunctionMode`, so an exception, another thread or a nested use leaves no trace.
While any such mode is active, torch also turns off the Transformer's inference fast path by itself.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from common.convolution import convolution, mapped_problems, transposed_convolution
from common.normalisation import batch_norm

__all__ = ["exact_derivatives"]


# ---------------------------------------------------------------------------------------------- normalisation
def _standardise(x: Tensor, axes: list[int], eps: float) -> Tensor:
    """(x − mean) / √(variance + ε) over `axes`, both statistics in the graph; in float32 at least, as torch."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Gain and shift a channel, channels along dimension 1."""
    shape = [1, -1] + [1] * (x.ndim - 2)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(
    x: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    if tuple(x.shape[-len(normalized_shape) :]) != tuple(normalized_shape):  # torch says what is wrong
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    y = _standardise(x, list(range(-len(normalized_shape), 0)), eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _torch_layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    return _layer_norm(input, normalized_shape, weight, bias, eps)


def _is_written_out(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> bool:
    """Whether `common.normalisation` takes what torch would take: reverse mode, no transforms, no half precision."""
    statistics = [leaf for leaf in (running_mean, running_var) if leaf is not None]
    affine = [leaf for leaf in (weight, bias) if leaf is not None]
    return (
        torch.is_grad_enabled()
        and any(leaf.requires_grad for leaf in (x, *affine))
        and not any(leaf.requires_grad for leaf in statistics)
        and mapped_problems() is None
        and forward_ad._current_level < 0
        and x.dtype in (torch.float32, torch.float64)
        and x.ndim >= 2
        and x.numel() > x.shape[1]
        and all(leaf.dtype == x.dtype and leaf.shape == x.shape[1:2] for leaf in (*statistics, *affine))
        and eps > 0
    )


def _written_out_or(otherwise: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Batch norm by `common.normalisation` where it can be, and elsewhere by `otherwise`."""

    def norm(
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if training and _is_written_out(input, running_mean, running_var, weight, bias, eps):
            return batch_norm(input, running_mean, running_var, weight, bias, momentum, eps)
        return otherwise(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return norm


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    if not training:  # constants, no statistics to differentiate: torch's own formula is right
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = [0, *range(2, x.ndim)]
    count = x.numel() // x.shape[1]
    if count < 2:
        raise ValueError(
            f"batch_norm: batch statistics need more than one value a channel, got input of shape {tuple(x.shape)}. "
            "Use a larger batch or running statistics."
        )
    if running_mean is not None and running_var is not None:
        _update_running(running_mean, running_var, x, axes, momentum, count)
    return _affine(_standardise(x, axes, eps), weight, bias).to(x.dtype)


@torch.no_grad()
def _update_running(mean: Tensor, var: Tensor, x: Tensor, axes: list[int], momentum: float, count: int) -> None:
    """The buffers' moving averages, with torch's unbiased variance: what the replaced kernel does besides."""
    mean.lerp_(x.mean(axes).to(mean.dtype), momentum)
    var.lerp_((x.var(axes, correction=0) * (count / (count - 1))).to(var.dtype), momentum)


def _in_torchs_order(replacement: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.batch_norm` of a replacement for `torch.nn.functional.batch_norm`."""

    def reordered(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        return replacement(input, running_mean, running_var, weight, bias, training, momentum, eps)

    return reordered


def _instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    axes = list(range(2, x.ndim))
    count = math.prod(x.shape[2:])
    if count < 2:
        raise ValueError(
            "instance_norm: its statistics need more than one position a channel, got input of shape "
            f"{tuple(x.shape)}. Use a larger input."
        )
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            mean, var = x.mean(axes).mean(0), x.var(axes, correction=1).mean(0)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(var.to(running_var.dtype), momentum)
    return _affine(_standardise(x, axes, eps), weight, bias).to(x.dtype)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    return _instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g · v / ‖v‖ with one norm for each index of `dim` (−1: one for the whole tensor)."""
    axes = [axis for axis in range(v.ndim) if axis != dim % v.ndim or dim == -1]
    norm = v.square().sum(axes, keepdim=True).sqrt() if axes else v.abs()  # no axes would sum over all of them
    return v * (g / norm)


# ---------------------------------------------------------------------------------------------- embeddings
def _embedding(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Dense gradients: a sparse one cannot be differentiated again."""
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    options = dict(zip(names, args, strict=False)) | kwargs | {"sparse": False}
    return F.embedding(input, weight, **options)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sum, mean or maximum of embeddings a bag: torch's own has no second derivative."""
    rows = _embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    counted = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        counted = input != padding_idx % weight.shape[0]
        rows = rows.masked_fill(~counted.unsqueeze(-1), -math.inf if mode == "max" else 0.0)
    if offsets is None:  # (bags, entries)
        count = counted.sum(-1, keepdim=True)
        if mode == "max":
            return rows.amax(-2).masked_fill(count == 0, 0.0)
        return rows.sum(-2) if mode == "sum" else rows.sum(-2) / count.clamp(min=1)
    bags = len(offsets) - include_last_offset
    bag = torch.searchsorted(offsets[:bags], torch.arange(len(input), device=input.device), right=True) - 1
    count = counted.new_zeros(bags, dtype=torch.long).index_add(0, bag, counted.long()).unsqueeze(-1)
    if mode == "max":
        parts = [rows[bag == k].amax(0) if (bag == k).any() else rows.new_zeros(rows.shape[1]) for k in range(bags)]
        return torch.stack(parts).masked_fill(count == 0, 0.0)
    total = rows.new_zeros(bags, rows.shape[1]).index_add(0, bag, rows)
    return total if mode == "sum" else total / count.clamp(min=1)


# ---------------------------------------------------------------------------------------------- random masks
def _keep(input: Tensor, p: float) -> Tensor:
    """A mask for `input`: 1 with probability 1 − p and else 0, independently.

    Torch fills a mask in the order in which its input lies in memory. That order may differ between a pass with
    derivatives and one without, and the same seed then gives another mask: another function.
    """
    try:
        return torch.empty(tuple(input.shape), dtype=input.dtype, device=input.device).bernoulli_(1 - p)
    except RuntimeError:  # under vmap(randomness="different"), which wants a mask that is mapped
        return torch.empty_like(input, memory_format=torch.contiguous_format).bernoulli_(1 - p)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: the probability must lie in [0, 1], got {p}.")
    if not training or p == 0:
        return input
    keep = _keep(input, p) / (1 - p) if p < 1 else torch.zeros_like(input)
    return input.mul_(keep) if inplace else input * keep


def _alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """Dropped entries become SELU's limit at −∞, then mean and variance are restored (Klambauer et al. 2017)."""
    if not 0 <= p <= 1:
        raise ValueError(f"alpha_dropout: the probability must lie in [0, 1], got {p}.")
    if not training or p == 0:
        return input
    if p == 1:
        return input.mul_(0) if inplace else input * 0
    limit = -1.7580993408473766  # −λ α of SELU
    gain = 1 / math.sqrt((limit**2 * p + 1) * (1 - p))
    keep = _keep(input, p)
    scale, shift = keep * gain, ((1 - keep) * limit - limit * p) * gain
    return input.mul_(scale).add_(shift) if inplace else input * scale + shift


def _like(native: Callable) -> Callable:
    """`torch.rand_like` and its like, drawn in the order of the indices, not of the memory."""

    def draw(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return native(input, *args, **(kwargs | {"memory_format": torch.contiguous_format}))

    return draw


# ---------------------------------------------------------------------------------------------- activations, losses
def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    y = (input + 3).clamp(0, 6) / 6
    return input.copy_(y) if inplace else y


def _rrelu(
    input: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2, inplace)
    slope = torch.empty(tuple(input.shape), dtype=input.dtype, device=input.device).uniform_(lower, upper)
    y = torch.where(input >= 0, input, input * slope)
    return input.copy_(y) if inplace else y


def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    plain = size_average is None and reduce is None and weight is None and input.shape == target.shape
    if not plain or reduction not in ("mean", "sum", "none"):
        return F.mse_loss(input, target, size_average, reduce, reduction, *(() if weight is None else (weight,)))
    square = (input - target).square()
    return {"mean": square.mean, "sum": square.sum, "none": lambda: square}[reduction]()


# ---------------------------------------------------------------------------------------------- attention
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention: pass `attn_mask` or `is_causal`, got both.")
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        alive = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
        if attn_mask.dtype != torch.bool:
            scores = scores + attn_mask.masked_fill(~alive, 0.0)
        # A row with no key to attend to is zero in torch, not NaN: so the mask is finite, and applied once more after.
        weights = scores.masked_fill(~alive, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~alive, 0.0)
    return _dropout(weights, dropout_p) @ value


# Torch's own function, but for the attention it calls: the mode is off inside a function that it handles.
_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **vars(F),
        "scaled_dot_product_attention": _attention,
        "dropout": _dropout,
        "has_torch_function": lambda _: False,
    },
    argdefs=F.multi_head_attention_forward.__defaults__,
)


# ---------------------------------------------------------------------------------------------- recurrent layers
def _lstm_cell(
    input: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    h, c = hx
    i, f, g, o = (F.linear(input, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    x_r, x_z, x_n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    h_r, h_z, h_n = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    z = (x_z + h_z).sigmoid()
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (1 - z) * n + z * hx


def _rnn_cell(activation: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
        return activation(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))

    return cell


_CELLS: dict[str, Callable] = {
    "lstm": _lstm_cell,
    "gru": _gru_cell,
    "rnn_tanh": _rnn_cell(torch.tanh),
    "rnn_relu": _rnn_cell(torch.relu),
}


def _recurrent(kind: str) -> Callable:
    """`torch.lstm`, `torch.gru`, … as a loop over its cell: layers, directions, dropout, projections, packed input."""
    cell, has_memory = _CELLS[kind], kind == "lstm"

    def scan(x: Tensor, sizes: list[int] | None, state: Any, weights: list, reverse: bool) -> Any:
        # one layer, one direction; x is (time, batch, features), or (sum of sizes, features) where packed.
        # Packed sequences are sorted by length: at each time the first `sizes[t]` of the batch are alive.
        projection = weights.pop() if has_memory and len(weights) in (3, 5) else None
        steps = list(x.unbind(0)) if sizes is None else list(x.split(sizes))
        outputs = [x] * len(steps)
        for time in reversed(range(len(steps))) if reverse else range(len(steps)):
            alive = steps[time].shape[0]
            now = tuple(s[:alive] for s in state)
            new = cell(steps[time], now, *weights) if has_memory else (cell(steps[time], now[0], *weights),)
            if projection is not None:
                new = (F.linear(new[0], projection), *new[1:])
            ended = state[0].shape[0] > alive
            state = tuple(torch.cat([n, s[alive:]]) for n, s in zip(new, state, strict=True)) if ended else new
            outputs[time] = new[0]
        return (torch.stack(outputs) if sizes is None else torch.cat(outputs)), state

    def run(x, sizes, initial, flat, layers, dropout, train, bidirectional):
        directions = 2 if bidirectional else 1
        per = len(flat) // (layers * directions)
        final = []
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                index = layer * directions + direction
                weights = list(flat[index * per : (index + 1) * per])
                output, state = scan(x, sizes, tuple(s[index] for s in initial), weights, reverse=direction == 1)
                outputs.append(output)
                final.append(state)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout and train and layer < layers - 1:
                x = _dropout(x, dropout)
        return (x, *(torch.stack(parts) for parts in zip(*final, strict=True)))

    # has_biases: what there is of them is in `flat`
    def padded(x, hx, flat, has_biases, layers, dropout, train, bidirectional, batch_first):
        x = x.transpose(0, 1) if batch_first else x
        y, *final = run(x, None, hx if has_memory else (hx,), flat, layers, dropout, train, bidirectional)
        return (y.transpose(0, 1) if batch_first else y, *final)

    def packed(x, batch_sizes, hx, flat, has_biases, layers, dropout, train, bidirectional):
        sizes = batch_sizes.tolist()
        return run(x, sizes, hx if has_memory else (hx,), flat, layers, dropout, train, bidirectional)

    def recurrent(x, *args):
        # torch tells its two overloads apart by the type of the fourth argument: weights, or a flag
        return packed(x, *args) if isinstance(args[2], (list, tuple)) else padded(x, *args)

    return recurrent


# ---------------------------------------------------------------------------------------------- the mode
_REPLACEMENTS: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _torch_layer_norm,
    F.batch_norm: _written_out_or(_batch_norm),
    torch.batch_norm: _in_torchs_order(_written_out_or(_batch_norm)),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _torch_instance_norm,
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    # the check before the Transformer encoder's inference path, which has no batching rule: nothing is left-aligned
    torch._nested_tensor_from_mask_left_aligned: lambda *_: False,  # pyright: ignore[reportPrivateImportUsage]
    F.dropout: _dropout,
    torch.dropout: lambda input, p, train: _dropout(input, p, train),
    F.alpha_dropout: _alpha_dropout,
    torch.alpha_dropout: lambda input, p, train: _alpha_dropout(input, p, train),
    torch.rand_like: _like(torch.rand_like),
    torch.randn_like: _like(torch.randn_like),
    F.hardsigmoid: _hardsigmoid,
    F.rrelu: _rrelu,
    F.mse_loss: _mse_loss,
    **{native: convolution(native) for native in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **{
        native: transposed_convolution(native)
        for native in (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
    },
    **{getattr(torch, kind): _recurrent(kind) for kind in _CELLS},
    **{getattr(torch, f"{kind}_cell"): cell for kind, cell in _CELLS.items()},
}


# What torch differentiates right up to the second order in reverse mode, and faster than primitives are.
_RIGHT_TO_SECOND = {F.layer_norm, torch.layer_norm, F.instance_norm, torch.instance_norm}
_OF_ORDER: dict[int, dict[Callable, Callable]] = {
    2: {native: ours for native, ours in _REPLACEMENTS.items() if native not in _RIGHT_TO_SECOND}
    | {
        F.batch_norm: _written_out_or(F.batch_norm),
        torch.batch_norm: _in_torchs_order(_written_out_or(F.batch_norm)),
    },
    3: _REPLACEMENTS,
}


class _Exact(TorchFunctionMode):
    def __init__(self, replacements: dict[Callable, Callable]) -> None:
        super().__init__()
        self.replacements = replacements

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.replacements.get(func, func)(*args, **(kwargs or {}))  # pyright: ignore[reportOptionalCall]


@contextmanager
def exact_derivatives(order: Literal[2, 3] = 3) -> Iterator[None]:
    """A context in which derivatives of every order, forward, reverse or under vmap, are right.

    Enter it *inside* the function that is differentiated (`common.functional.pure_loss` does): a recomputation during
    backward runs outside any context that surrounds the call.

    Args:
        order: 3 for any order and mode. 2 for at most two reverse-mode derivatives (no forward mode, and no vmap
            inside of them), for which layer and instance norm, and batch norm under transforms, may stay torch's own,
            which are faster.

    A batch norm that was called outside of transforms is not to be differentiated under one that is entered after it.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64, requires_grad=True)
        >>> with exact_derivatives():
        ...     y = torch.nn.functional.layer_norm(x, (3,))
        >>> torch.allclose(y, torch.nn.functional.layer_norm(x, (3,)))
        True
    """
    with _Exact(_OF_ORDER[order]):
        yield
