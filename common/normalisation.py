r"""Batch norm whose second derivative is written out.

Torch composes the second derivative of its fused batch norm of more than fifty passes over the activations; in a deep
network they can take as long as all convolutions. Fourteen are enough. For one channel of M entries let ρ be the
inverse deviation, x̂ = ρ (x − mean x), y = w x̂ + b, h the cotangent of y, and let a bar or an average run over the M
entries:

    g_x = ρ w (h − h̄ − δ x̂),   g_w = M δ,   g_b = M h̄,   δ = avg(h x̂).

With cotangents v, v_w, v_b of these three, β = avg(v x̂) and κ = avg(v h) − v̄ h̄, the number
⟨v, g_x⟩ + v_w g_w + v_b g_b is M (ρ w (κ − β δ) + v_w δ + v_b h̄), and its derivatives are

    in h:  ρ w (v − v̄ − β x̂) + v_w x̂ + v_b
    in w:  M ρ (κ − β δ)
    in x:  ρ² w ((3 β δ − κ) x̂ − δ (v − v̄) − β (h − h̄)) + ρ v_w (h − h̄ − δ x̂).

Where these are differentiated once more, they are formed of x itself, so that every order is right.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """`torch.nn.functional.batch_norm` by the batch's statistics: differentiable in reverse mode, to any order.

    Neither call nor derivatives may stand under transforms of torch.func, nor be taken in forward mode.

    Args:
        x: (n, channels, …) in float32 or float64, with more than one value a channel.
        running_mean: (channels,), moved towards the batch's; None: not kept.
        running_var: As `running_mean`.
        weight: (channels,). None: one.
        bias: (channels,). None: zero.
        momentum: By how much of the way the running statistics move.
        eps: Added to the variance; positive.
    """
    weight = x.new_ones(x.shape[1]) if weight is None else weight
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps)  # pyright: ignore[reportReturnType]


class _BatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, running_mean, running_var, momentum, eps) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        y, mean, inverse = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        g_x, g_w, g_b = _Gradients.apply(h, *ctx.saved_tensors, ctx.eps)  # pyright: ignore[reportGeneralTypeIssues]
        return g_x, g_w, g_b if ctx.has_bias else None, None, None, None, None


class _Gradients(Function):
    """(h, x, w) to (g_x, g_w, g_b)."""

    @staticmethod
    def forward(ctx: Any, h, x, weight, mean, inverse, eps) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wanted = [True, True, True]
        g = torch.ops.aten.native_batch_norm_backward(h, x, weight, None, None, mean, inverse, True, eps, wanted)
        ctx.save_for_backward(h, x, weight, mean, inverse, *g[1:])
        ctx.eps = eps
        return g

    @staticmethod
    def backward(ctx: Any, v: Tensor, v_w: Tensor, v_b: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, x, w, mean, inverse, g_w, g_b = ctx.saved_tensors
        axes, one = [0, *range(2, x.ndim)], (-1, *[1] * (x.ndim - 2))
        M = x.numel() // x.shape[1]
        if torch.is_grad_enabled():
            mean, inverse = x.mean(axes), torch.rsqrt(x.var(axes, correction=0) + ctx.eps)  # with their history
        x_hat = (x - mean.view(one)).mul_(inverse.view(one))
        v_mean, h_mean, delta, beta = v.mean(axes), g_b / M, g_w / M, (v * x_hat).mean(axes)
        kappa = (v * h).mean(axes) - v_mean * h_mean

        of_h = of_x = None
        if ctx.needs_input_grad[0]:
            a = inverse * w
            of_h = (v * a.view(one)).addcmul_(x_hat, (v_w - a * beta).view(one)).add_((v_b - a * v_mean).view(one))
        if ctx.needs_input_grad[1]:
            a = -inverse.square() * w
            b, c = a * delta, a * beta + inverse * v_w  # of v and of h
            d = a * (kappa - 3 * beta * delta) - inverse * v_w * delta  # of x̂
            of_x = (v * b.view(one)).addcmul_(h, c.view(one)).addcmul_(x_hat, d.view(one))
            of_x = of_x.sub_((b * v_mean + c * h_mean).view(one))
        return of_h, of_x, M * inverse * (kappa - beta * delta), None, None, None
