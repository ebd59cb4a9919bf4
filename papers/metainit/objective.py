r"""The gradient quotient: how much the gradient changes, relative to itself, along one step of descent.

Letters: theta parameters, g = ∇L(θ), H = ∇²L(θ), c the *change* of the gradient along the step, s = ±1 the sign of g
(with s(0) = +1), epsilon ε, eta η, N the number of scalars in θ.

Source: Dauphin & Schoenholz, "MetaInit: Initializing learning by learning to initialize", NeurIPS 2019, Eq. (1) and
Figure 2. The forms (★) and (♣) below are algebraically equal to theirs and derived in this package's README.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from common.derivatives import accumulate, gradient, hvp, linearized_gradient, tape, taped_gradient
from common.options import check_choice, check_positive
from common.tree import flatten, numel, tree_add, tree_map, tree_vdot
from common.types import Batch, Params, PureLoss

Form = Literal["taylor", "step"]
FORMS = ("taylor", "step")
Metrics = dict[str, Float[Tensor, ""]]
Linearize = Callable[[PureLoss, Params, Batch], tuple[Params, Callable[[Params], Params]]]


def sign(g: Tensor) -> Tensor:
    """s: the sign of g, +1 at zero, so that g + ε s never vanishes."""
    return torch.where(g >= 0, 1.0, -1.0).to(g.dtype)


def relative_change(g: Tensor, c: Tensor, *, epsilon: float) -> Tensor:
    r"""Entrywise | (g − c) / (g + ε s) − 1 | = | s c + ε | / ( |g| + ε ).   (★)

    Eq. (1) subtracts two nearly equal numbers; since s² = 1 the difference is exactly the right-hand side.
    An entry without gradient and without change (a dead unit, an unused embedding row) counts exactly 1; NaN at ε = 0.

    Args:
        g: Gradient, any shape.
        c: Its change along the step, same shape: H g (Taylor) or (g − g(θ − η g)) / η.
        epsilon: ε ≥ 0, in the gradient's unit.

    Example:
        >>> relative_change(torch.tensor([2.0, -4.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]), epsilon=1.0)
        tensor([0.6667, 0.0000, 1.0000])
    """
    return (sign(g) * c + epsilon).abs() / (g.abs() + epsilon)


def gradient_and_change(
    loss: PureLoss,
    theta: Params,
    batch: Batch,
    *,
    form: Form = "taylor",
    eta: float = 1.0,
    linearize: Linearize = linearized_gradient,
) -> tuple[Params, Params]:
    r"""g and its change c along one step: c = H g (`"taylor"`), or c = (g − g(θ − η g)) / η (`"step"`).

    Raises:
        ValueError: Another form, or η ≤ 0.
    """
    check_choice("gradient_and_change", "form", form, FORMS)
    check_positive("gradient_and_change", eta=eta)
    g, H = linearize(loss, theta, batch)  # θ → g, and v ↦ H v on the same graph
    if form == "taylor":
        return g, H(g)
    g_ahead = linearize(loss, tree_add(theta, g, scale=-eta), batch)[0]
    return g, tree_map(lambda now, ahead: (now - ahead) / eta, g, g_ahead)


def gradient_quotient(
    loss: PureLoss, theta: Params, batch: Batch, *, epsilon: float = 1e-5, form: Form = "taylor", eta: float = 1.0
) -> Float[Tensor, ""]:
    r"""GQ(L, θ) = 1/N · ‖ (g − c) / (g + ε s) − 1 ‖₁   Eq. (1), with c as in `gradient_and_change`.

    `"taylor"` is the form of Figure 2, third order when differentiated. `"step"` is the family GQ_η: η = 1 is the
    paper's definition, η → 0 the Taylor form; it is second order when differentiated and costs two thirds, but
    overflows where gradients explode.

    Args:
        loss: L, pure.
        theta: θ; every scalar of every tensor is one of the N entries.
        batch: Passed to `loss`.
        epsilon: ε.
        form: `"taylor"` or `"step"`.
        eta: η of `"step"`; not used by `"taylor"`.

    Returns:
        A scalar, differentiable in `theta`. It does not vanish for a linear loss: then it is mean ε / (|g| + ε).

    Raises:
        ValueError: Another form, or η ≤ 0.

    Example:
        >>> theta = {"w": torch.tensor([3.0, -1.0])}
        >>> quadratic = lambda t, _: 2.0 / 2 * (t["w"] ** 2).sum()   # λ/2 ‖θ‖² has GQ = λ
        >>> gradient_quotient(quadratic, theta, None, epsilon=0.0)
        tensor(2.)

    Reference:
        Dauphin & Schoenholz 2019, Eq. (1) and Figure 2.
    """
    g, c = gradient_and_change(loss, theta, batch, form=form, eta=eta)
    return relative_change(flatten(g), flatten(c), epsilon=epsilon).mean()


# ---------------------------------------------------------------------------------------------- its gradient
def meta_gradient(
    loss: PureLoss,
    theta: Params,
    batch: Batch,
    *,
    tuned: Iterable[str] | None = None,
    epsilon: float = 1e-5,
    form: Form = "taylor",
    eta: float = 1.0,
    micro_batch_size: int | None = None,
) -> tuple[Params, Metrics]:
    r"""∂GQ/∂θ_l for each tuned tensor l, and what GQ was made of.

    Without `micro_batch_size`, by differentiating `gradient_quotient` itself (about 27 forward passes' arithmetic).
    With it, by the split form, which is a sum over examples in each of its passes: 1.4 to 1.8 times the arithmetic, the
    memory of one micro-batch. Both give the same numbers.

    Args:
        loss: L, pure, the *mean* over the batch's examples; with `micro_batch_size`, no example may see another.
        theta: θ.
        batch: A pytree of tensors, examples along dimension 0.
        tuned: Names of the tensors to differentiate; all of them by default.
        epsilon: ε.
        form: `"taylor"` or `"step"`, as in `gradient_quotient`.
        eta: η of `"step"`.
        micro_batch_size: Examples a pass holds at once.

    Returns:
        `{name: ∂GQ/∂θ_name}` and scalars `gradient_quotient`, `live_gradient_quotient` (mean over entries with g ≠ 0),
        `dead_fraction` (share of entries with g = 0), `gradient_norm` (‖g‖₂).

    Raises:
        ValueError: Another form, η ≤ 0, or names that `theta` has not.
    """
    check_choice("meta_gradient", "form", form, FORMS)
    check_positive("meta_gradient", eta=eta)
    names = list(theta if tuned is None else tuned)
    if unknown := [name for name in names if name not in theta]:
        raise ValueError(f"meta_gradient: `tuned` must name tensors of `theta`, got {unknown[0]!r}.")
    if micro_batch_size is None:
        return _fused(loss, theta, batch, names, epsilon, form, eta)
    if form == "taylor":
        return _split_taylor(loss, theta, batch, names, epsilon, micro_batch_size)
    return _split_step(loss, theta, batch, names, epsilon, eta, micro_batch_size)


def _fused(
    loss: PureLoss, theta: Params, batch: Batch, names: list[str], epsilon: float, form: Form, eta: float
) -> tuple[Params, Metrics]:
    # On autograd's own tape: torch.func.grad would keep a fourth-order graph nobody asked for.
    theta = {name: leaf.detach().requires_grad_() for name, leaf in theta.items()}
    g, c = gradient_and_change(loss, theta, batch, form=form, eta=eta, linearize=taped_gradient)
    change = relative_change(flatten(g), flatten(c), epsilon=epsilon)
    tuned = {name: theta[name] for name in names}
    return tape(change.mean(), tuned, keep=False), diagnostics(flatten(g), change)


@torch.no_grad()
def diagnostics(g: Float[Tensor, "n"], change: Float[Tensor, "n"]) -> Metrics:
    """GQ, its mean over live entries (g ≠ 0), the share of dead ones, and ‖g‖₂, from all entries as one vector."""
    live = g != 0
    count = live.sum()
    return {
        "gradient_quotient": change.mean(),
        # where no entry is live, GQ of the dead ones, which is 1
        "live_gradient_quotient": torch.where(count > 0, (change * live).sum() / count.clamp(min=1), 1.0),
        "dead_fraction": 1 - count / len(g),
        "gradient_norm": torch.linalg.vector_norm(g),
    }


@torch.no_grad()
def cotangents(g: Params, c: Params, *, epsilon: float) -> tuple[Params, Params]:
    r"""w = N ∂GQ/∂c and u = N ∂GQ/∂g, entrywise:

    w = sign(c + ε s) / d,   u = − s |s c + ε| / d²,   d = |g| + ε.
    """
    w = tree_map(lambda g, c: torch.sign(c + epsilon * sign(g)) / (g.abs() + epsilon), g, c)
    u = tree_map(lambda g, c: -sign(g) * (sign(g) * c + epsilon).abs() / (g.abs() + epsilon).square(), g, c)
    return w, u


def _split_taylor(
    loss: PureLoss, theta: Params, batch: Batch, names: list[str], epsilon: float, size: int
) -> tuple[Params, Metrics]:
    r"""N ∇GQ = H v + D³L[g, w, ·] = ∇_θ ψ,   v = u + H w,   ψ(θ) = wᵀ H(θ) g + vᵀ ∇L(θ).   (♣)

    g, w and v are constants in ψ; each pass below is a weighted sum over micro-batches.
    """
    g = gradient(loss, theta, batch, micro_batch_size=size)  # θ → g
    Hg = hvp(loss, theta, g, batch, micro_batch_size=size)  # g → Hg
    w, u = cotangents(g, Hg, epsilon=epsilon)
    Hw = hvp(loss, theta, w, batch, micro_batch_size=size)  # w → Hw
    v = tree_add(u, Hw)

    def psi_gradient(piece: Batch) -> Params:
        leaves = {name: leaf.detach().requires_grad_() for name, leaf in theta.items()}
        g_piece, H = taped_gradient(loss, leaves, piece)
        psi = tree_vdot(H(w), g) + tree_vdot(v, g_piece)  # (♣); wᵀ H g = (H w)ᵀ g
        return tape(psi, {name: leaves[name] for name in names}, keep=False)

    N = numel(theta)
    total = accumulate(psi_gradient, batch, size)  # Σ_b w_b ∇ψ_b
    return tree_map(lambda leaf: leaf / N, total), diagnostics(
        flatten(g), relative_change(flatten(g), flatten(Hg), epsilon=epsilon)
    )


def _split_step(
    loss: PureLoss, theta: Params, batch: Batch, names: list[str], epsilon: float, eta: float, size: int
) -> tuple[Params, Metrics]:
    r"""N ∇GQ_η = H(θ) (u + w/η + z) − z/η,   z = H(θ − η g) w: two Hessian-vector products, second order."""
    g = gradient(loss, theta, batch, micro_batch_size=size)
    ahead = tree_add(theta, g, scale=-eta)
    g_ahead = gradient(loss, ahead, batch, micro_batch_size=size)
    c = tree_map(lambda now, later: (now - later) / eta, g, g_ahead)
    w, u = cotangents(g, c, epsilon=epsilon)
    z = hvp(loss, ahead, w, batch, micro_batch_size=size)
    direction = tree_map(lambda u, w, z: u + w / eta + z, u, w, z)
    Hd = hvp(loss, theta, direction, batch, micro_batch_size=size)
    N = numel(theta)
    return {name: (Hd[name] - z[name] / eta) / N for name in names}, diagnostics(
        flatten(g), relative_change(flatten(g), flatten(c), epsilon=epsilon)
    )
