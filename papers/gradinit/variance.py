r"""How much the gradient differs from minibatch to minibatch, layer by layer: the quantity of the paper's Figure 1."""

from collections.abc import Iterable

import torch
from torch import Tensor

from common.derivatives import tape
from common.tree import tree_add, tree_map, tree_norms
from common.types import Batch, Params, PureLoss


def relative_gradient_variance(loss: PureLoss, theta: Params, batches: Iterable[Batch]) -> dict[str, float]:
    r"""E‖g_S − 𝔼g‖² / ‖𝔼g‖² of each tensor, g_S = ∇L(S; θ) on a random minibatch S.

    Both are estimated without bias from K minibatches: s² = Σ‖g_S − ḡ‖²/(K − 1), and ‖ḡ‖² − s²/K, as ḡ carries a K-th
    of the variance. Infinite where the mean cannot be told from zero, NaN where a gradient is not finite. The paper's
    normaliser is not known.

    Args:
        loss: L, pure.
        theta: θ.
        batches: The minibatches S, two or more.

    Raises:
        ValueError: Fewer than two batches.

    Example:
        >>> loss = lambda theta, x: (theta["w"] * x).sum()
        >>> relative_gradient_variance(loss, {"w": torch.ones(1)}, [torch.tensor([1.0]), torch.tensor([5.0])])
        {'w': 1.6}

    Reference:
        Zhu et al. 2021, Figure 1.
    """
    leaves = tree_map(lambda leaf: leaf.detach().requires_grad_(), theta)
    total: Params | None = None
    squares: list[Tensor] = []
    for batch in batches:
        g = tape(loss(leaves, batch), leaves, keep=False)
        squares.append(tree_norms(g).double() ** 2)
        total = g if total is None else tree_add(total, g)
    if total is None or len(squares) < 2:
        raise ValueError(
            f"relative_gradient_variance: `batches` must hold two or more, got {len(squares)}. A variance needs them."
        )
    K = len(squares)
    of_mean = (tree_norms(total).double() / K) ** 2
    variance = (torch.stack(squares).mean(0) - of_mean).clamp(min=0) * K / (K - 1)  # E‖g‖² − ‖ḡ‖²
    ratio = torch.where(variance == 0, 0.0, variance / (of_mean - variance / K).clamp(min=0))
    return dict(zip(theta, ratio.tolist(), strict=True))
