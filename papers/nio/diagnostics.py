r"""What else the same gradients say of an initialisation: how dense and how consistent the examples' optima are.

Letters: g_i gradients by example, θ_i* the optimum of example i near θ₀, d_i = θ_i* − θ₀, H a bound on curvature,
eta η.

Eq. (3) takes an optimum for one step away, d_i ≈ −η g_i, so that everything here is a function of gradients by group.

Source: Yang et al., NeurIPS 2022, Eq. (1) to (3); Zhang & Jia, "GradSign: Model Performance Inference with Theoretical
Insights", ICLR 2022, for Ψ and GradSign.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from common.tree import tree_map
from common.types import Params
from papers.nio.objective import grad_cosine, group_norms


def optima(gradients: Params, *, eta: float = 1.0) -> Params:
    r"""d_i ≈ −η g_i: each example's optimum lies one gradient step away.  Eq. (3)

    Example:
        >>> optima({"w": torch.tensor([[1.0, -2.0]])}, eta=0.5)["w"]
        tensor([[-0.5000,  1.0000]])
    """
    return tree_map(lambda leaf: -eta * leaf, gradients)


def optima_density(displacements: Params, *, curvature: float = 1.0) -> Float[Tensor, ""]:
    r"""Ψ = √H/n² Σ_ij ‖θ_i* − θ_j*‖₁: how far apart the examples' optima lie.  Eq. (1)

    Σ_ij |x_i − x_j| = 2 Σ_k (2k − n + 1) x_(k) for sorted x_(0) ≤ … ≤ x_(n−1): n log n a coordinate, not n².

    Args:
        displacements: d_i by name, each with a leading dimension of n.
        curvature: H, a bound on every diagonal entry of every example's Hessian.

    Example:
        >>> optima_density({"w": torch.tensor([[0.0, 0.0], [1.0, -2.0]])}, curvature=4.0)  # 2 · 3 · √4 / 2²
        tensor(3.)

    Reference:
        Zhang & Jia 2022; Yang et al. 2022, Eq. (1).
    """
    n = len(next(iter(displacements.values())))

    def spread(leaf: Tensor) -> Tensor:
        ordered = leaf.reshape(n, -1).sort(0).values
        weights = 2 * torch.arange(n, device=leaf.device, dtype=leaf.dtype) - n + 1
        return 2 * (weights @ ordered).sum()

    return curvature**0.5 / n**2 * torch.stack([spread(leaf) for leaf in displacements.values()]).sum()


def optima_bound(displacements: Params, *, curvature: float = 1.0) -> Float[Tensor, ""]:
    r"""Θ = H α²/n Σ_ij (α/β − cos(d_i, d_j)), α = max ‖d_i‖, β = min ‖d_i‖: bounds the trained loss.  Eq. (2)

    Infinite where an example is at its optimum already (β = 0) and another is not.

    Why it bounds (a sketch): the mean of ℓ_i(θ_j*) over j is at most H/2n² Σ_ij ‖d_i − d_j‖², and
    ‖d_i − d_j‖² = ‖d_i‖‖d_j‖ (‖d_i‖/‖d_j‖ + ‖d_j‖/‖d_i‖ − 2cos) ≤ 2α² (α/β − cos). So the loss is at most Θ/n, if H
    bounds the Hessian's largest eigenvalue; the bound as published is loose by a factor n.

    Args:
        displacements: d_i by name, each with a leading dimension of n.
        curvature: H.

    Example:
        >>> optima_bound({"w": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})  # (4 − 2) / 2
        tensor(1.)

    Reference:
        Yang et al. 2022, Eq. (2) and Theorem 2.
    """
    r = group_norms(displacements)
    n, alpha, beta = len(r), r.max(), r.min()
    GC = grad_cosine(displacements, include_diagonal=True)
    bound = curvature * alpha**2 * n * (alpha / torch.where(beta > 0, beta, 1.0) - GC)
    return torch.where(alpha == 0, torch.zeros_like(alpha), torch.where(beta > 0, bound, torch.inf))


def grad_sign(gradients: Params) -> Float[Tensor, ""]:
    r"""GradSign: Σ_k |Σ_i sign [g_i]_k|, on how many coordinates examples agree which way to go; n N at most.

    It has no derivative, which is why the method maximises a cosine instead.

    Example:
        >>> grad_sign({"w": torch.tensor([[1.0, -3.0], [2.0, 4.0]])})
        tensor(2.)

    Reference:
        Zhang & Jia 2022.
    """
    return torch.stack([leaf.sign().sum(0).abs().sum() for leaf in gradients.values()]).sum()


def layer_cosines(gradients: Params, *, include_diagonal: bool = False) -> dict[str, Float[Tensor, ""]]:
    r"""GC of each tensor by itself.

    Two gradients' cosine is Σ_k √(s_ik s_jk) cos_k over tensors k, with s_ik = ‖g_ik‖²/‖g_i‖² their shares.

    Example:
        >>> layer_cosines({"w": torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "b": torch.tensor([1.0, -1.0])})
        {'w': tensor(1.), 'b': tensor(-1.)}
    """
    return {name: grad_cosine({name: leaf}, include_diagonal=include_diagonal) for name, leaf in gradients.items()}
