r"""Convolution whose derivatives of every order are convolutions of its own size.

Torch's second derivative of a convolution forms the weight's part by a convolution whose *kernel is an image*, for
which no library is made. None is needed. With y = x ∗ w the number T(x, w, h) = ⟨h, x ∗ w⟩ is linear in each of x, w
and h, and its three gradients (the output ∂T/∂h, the input's gradient ∂T/∂x, the weight's gradient ∂T/∂w) are all that
differentiation can ever lead to: the derivative of one of them in an operand is another of them.

The same holds for per-example gradients under `vmap`, where torch makes one convolution with a group for each example:
here ∂T/∂w for many examples is one batched matrix product over unfolded patches.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

__all__ = ["convolution", "mapped_problems", "transposed_convolution"]


class Geometry(NamedTuple):
    """All that a convolution is besides its operands; `shapes` are those of x and w, by which a gradient is sized."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def arguments(self) -> tuple:
        """As torch's own operators take them: not transposed, no output padding."""
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups


Operands = dict[str, Tensor]  # two of "x" (b, c, …), "w" (o, c / groups, …), "h" (b, o, …)


def contract(operands: Operands, geometry: Geometry) -> Tensor:
    """∂T/∂(the operand that is missing), T(x, w, h) = ⟨h, x ∗ w⟩: differentiable to any order, forward and reverse."""
    return _Contract.apply(*(operands.get(name) for name in "xwh"), geometry)  # pyright: ignore[reportReturnType]


class _Contract(Function):
    @staticmethod
    def forward(x: Tensor | None, w: Tensor | None, h: Tensor | None, geometry: Geometry) -> Tensor:
        if h is None:
            return torch.ops.aten.convolution(x, w, None, *geometry.arguments)
        absent = "x" if x is None else "w"
        like = h.new_empty(geometry.shapes[absent])  # of an operand that is not there only the shape is read
        x, w = (like if operand is None else operand for operand in (x, w))
        wanted = [absent == "x", absent == "w", False]
        gradients = torch.ops.aten.convolution_backward(h, x, w, None, *geometry.arguments, wanted)
        return gradients["xw".index(absent)]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *operands, ctx.geometry = inputs
        ctx.names = [name for name, operand in zip("xwh", operands, strict=True) if operand is not None]
        present = [operand for operand in operands if operand is not None]
        ctx.save_for_backward(*present)
        ctx.save_for_forward(*present)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (missing,) = set("xwh") - set(ctx.names)
        all_three = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | {missing: cotangent}
        needed = dict(zip("xwh", ctx.needs_input_grad, strict=False))
        if missing == "h" and needed["x"] and needed["w"] and not torch.is_grad_enabled():
            # nothing will be differentiated again: both at once, as torch has them
            x, w = all_three["x"], all_three["w"]
            wanted = [True, True, False]
            dx, dw, _ = torch.ops.aten.convolution_backward(cotangent, x, w, None, *ctx.geometry.arguments, wanted)
            return dx, dw, None, None
        gradients = [
            contract({other: all_three[other] for other in "xwh" if other != name}, ctx.geometry)
            if name != missing and needed[name]
            else None
            for name in "xwh"
        ]
        return *gradients, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        operands = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        moved = {name: tangent for name, tangent in zip("xwh", tangents, strict=False) if tangent is not None}
        return sum(contract(operands | {name: tangent}, ctx.geometry) for name, tangent in moved.items())  # pyright: ignore

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> tuple[Tensor, int]:
        *given, geometry = inputs
        axes = dict(zip("xwh", in_dims, strict=False))
        # every mapped operand with its mapped axis first
        operands = {
            name: operand if axes[name] is None else operand.movedim(axes[name], 0)
            for name, operand in zip("xwh", given, strict=True)
            if operand is not None
        }
        return _mapped(operands, {name for name in operands if axes[name] is not None}, info.batch_size, geometry), 0


def _mapped(operands: Operands, mapped: set[str], n: int, geometry: Geometry) -> Tensor:
    """`contract` for each of `n` problems; the operands named in `mapped` have a leading axis of them."""
    if "w" not in mapped and "w" in operands:  # one kernel: the problems are more examples
        folded = {name: leaf.flatten(0, 1) if name in mapped else leaf for name, leaf in operands.items()}
        batch, *size = geometry.shapes["x"]
        many = geometry._replace(shapes=geometry.shapes | {"x": (n * batch, *size)})
        return contract(folded, many).unflatten(0, (n, -1))
    operands = {name: leaf if name in mapped else leaf.expand(n, *leaf.shape) for name, leaf in operands.items()}
    if "w" not in operands and len(geometry.stride) <= 2:
        return _weight_gradients(operands["x"], operands["h"], geometry)
    # a kernel a problem: the problems are more groups of channels
    folded = {
        name: leaf.flatten(0, 1) if name == "w" else leaf.transpose(0, 1).flatten(1, 2)
        for name, leaf in operands.items()
    }
    (batch, channels, *size), (out, *kernel) = geometry.shapes["x"], geometry.shapes["w"]
    shapes = {"x": (batch, n * channels, *size), "w": (n * out, *kernel)}
    result = contract(folded, geometry._replace(groups=n * geometry.groups, shapes=shapes))
    return result.unflatten(0, (n, -1)) if "w" not in operands else result.unflatten(1, (n, -1)).transpose(0, 1)


def _weight_gradients(x: Tensor, h: Tensor, geometry: Geometry) -> Tensor:
    """∂T/∂w for each of n problems, x (n, b, c, …) and h (n, b, o, …): patches against outputs, one batched product."""
    n, groups = x.shape[0], geometry.groups
    kernel = geometry.shapes["w"][2:]
    line = [1] * (2 - len(kernel))  # a convolution over one axis is one over two, the first of length one
    patches = F.unfold(
        x.flatten(0, 1).reshape(-1, x.shape[2], *line, *x.shape[3:]),
        (*line, *kernel),
        dilation=(*line, *geometry.dilation),
        padding=(*(0 for _ in line), *geometry.padding),
        stride=(*line, *geometry.stride),
    )  # (n b, c · kernel, positions), channels outermost
    patches = patches.reshape(n, -1, groups, patches.shape[1] // groups, patches.shape[2])
    h = h.reshape(n, patches.shape[1], groups, -1, math.prod(h.shape[3:]))
    return torch.einsum("nbgcp,nbgop->ngoc", patches, h).reshape(n, *geometry.shapes["w"])


def mapped_problems() -> int | None:
    """How many problems the `vmap`s around the call map over; 0 under other transforms alone, None under none."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    levels = functorch.get_interpreter_stack()
    if not levels:
        return None
    sizes = [functorch.CVmapInterpreterPtr(level).batchSize() for level in levels if level.key().name == "Vmap"]
    return math.prod(sizes) if sizes else 0


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * axes if len(value) == 1 else value


# Entries of all problems' weight gradients from which on `contract` is faster under vmap than torch's own, which makes
# a group of each problem. Below, what functorch does around a Python function costs more: two milliseconds a layer.
_WORTH_MAPPING = 10_000_000


def _is_wanted(input: Tensor, weight: Tensor, axes: int) -> bool:
    """Whether `contract` is possible, and the faster way.

    It is not where no derivative is asked for, nor under transforms that do not map, nor under autocast, whose casts
    the derivatives would miss.
    """
    if not (input.ndim == weight.ndim == axes + 2 and input.is_floating_point() and input.numel() > 0):
        return False
    if _is_cast(input):
        return False
    problems = mapped_problems()
    if problems is None:
        return input.requires_grad or weight.requires_grad
    return problems > 0 and problems * weight.numel() >= _WORTH_MAPPING


def _is_cast(input: Tensor) -> bool:
    """Whether autocast is at work where the tensor is."""
    device = input.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _with_bias(y: Tensor, bias: Tensor | None, axes: int) -> Tensor:
    return y if bias is None else y + bias.reshape(-1, *[1] * axes)


def convolution(native: Any) -> Any:
    """`torch.conv1d`, `conv2d` or `conv3d`, in a form that is differentiated as described above."""
    axes = int(native.__name__[4])

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Tensor:
        if isinstance(padding, str) or not _is_wanted(input, weight, axes):
            return native(input, weight, bias, stride, padding, dilation, groups)
        shapes = {"x": tuple(input.shape), "w": tuple(weight.shape)}
        strides, paddings, dilations = (_per_axis(value, axes) for value in (stride, padding, dilation))
        y = contract({"x": input, "w": weight}, Geometry(strides, paddings, dilations, groups, shapes))
        return _with_bias(y, bias, axes)

    return conv


def transposed_convolution(native: Any) -> Any:
    """`torch.conv_transpose1d`, … : ∂T/∂x, its input taken for h.

    With `output_padding` torch's own has no third derivative (an error), so then this one is taken; but torch's own for
    one as large as the stride, which no convolution inverts.
    """
    axes = int(native.__name__[14])

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Tensor:
        strides, paddings, extra, dilations = (
            _per_axis(value, axes) for value in (stride, padding, output_padding, dilation)
        )
        batched = input.ndim == axes + 2 and input.is_floating_point() and input.numel() > 0
        # an output that is no convolution's input, torch's own alone can make (or refuse)
        invertible = all(more < step for more, step in zip(extra, strides, strict=True))
        if not invertible or not (_is_wanted(input, weight, axes) or (any(extra) and batched and not _is_cast(input))):
            return native(input, weight, bias, stride, padding, output_padding, groups, dilation)
        size = [
            (length - 1) * step - 2 * pad + spread * (kernel - 1) + more + 1
            for length, step, pad, spread, kernel, more in zip(
                input.shape[2:], strides, paddings, dilations, weight.shape[2:], extra, strict=True
            )
        ]
        shapes = {"x": (input.shape[0], weight.shape[1] * groups, *size), "w": tuple(weight.shape)}
        y = contract({"h": input, "w": weight}, Geometry(strides, paddings, dilations, groups, shapes))
        return _with_bias(y, bias, axes)

    return conv
