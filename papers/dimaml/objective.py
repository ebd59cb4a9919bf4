r"""What a law of initial weights is judged by: the held-out loss along the training that starts from a draw of it.

Letters: psi ψ the parameters of the laws; theta θ the weights, θ₀ ~ p_ψ as drawn and θ_t after t steps of training;
N inner steps; V those after which training is evaluated; L a batch's mean loss; λ₀ = ∂L_auc/∂θ₀.

Source: the poster and the released code of DIMAML (AutoML workshop at ICML 2021).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.batches import map_tensors, tensors_of
from common.derivatives import tape
from common.descent import trainable
from common.options import check_whole
from common.tree import tree_add, tree_map
from common.types import Batch, Params
from common.unroll import TrainingStep, unroll
from papers.dimaml.model import InitDistribution


def evaluation_steps(inner_steps: int, eval_every: int, first: int | None = None) -> list[int]:
    r"""V = {first, first + every, …, N}: how many steps were made when training is evaluated.

    The released experiments: (600, 50, 200) for the auto-encoder, (200, 40) for the others.

    Args:
        inner_steps: N ≥ 0.
        eval_every: Steps between two evaluations, 1 or more.
        first: Steps before the first; None: `eval_every`. 0 counts the loss of θ₀ itself.

    Raises:
        TypeError: No number.
        ValueError: A number out of range, or a schedule that does not end at N.

    Example:
        >>> evaluation_steps(200, 40), evaluation_steps(6, 2, first=0)
        ([40, 80, 120, 160, 200], [0, 2, 4, 6])
    """
    check_whole("evaluation_steps", inner_steps=inner_steps)
    check_whole("evaluation_steps", smallest=1, eval_every=eval_every)
    if first is None:
        first = eval_every
    check_whole("evaluation_steps", first=first)
    if first > inner_steps or (inner_steps - first) % eval_every:
        nearest = inner_steps % eval_every or min(eval_every, inner_steps)
        raise ValueError(
            f"evaluation_steps: evaluations every {eval_every} steps from step {first} must end at `inner_steps`, got "
            f"{inner_steps}: what comes after the last would count for nothing. A first step of {nearest} fits."
        )
    return list(range(first, inner_steps + 1, eval_every))


def loss_auc(
    theta0: Params,
    step: TrainingStep,
    loss: Callable[..., Tensor],
    train: Sequence[Batch],
    validation: Mapping[int, Batch],
    *,
    statistics: Params | None = None,
    **options: Any,
) -> Float[Tensor, ""]:
    r"""The area under the learning curve: the mean held-out loss over the scheduled steps of a training.

    L_auc(θ₀) = 1/|V| Σ_{t ∈ V} L(θ_t; S_t),  θ_{t+1} = step(θ_t, B_t),  t = 0 … N − 1

    Training losses are no part of it. The poster has the mean over all of 1 … N, the released code the one over V.

    Args:
        theta0: θ₀, every tensor that training moves. What it was computed from gets the gradient.
        step: Of `training_step`: with its seed, dropout is on, and with `first_order` the steps' Jacobians lack their
            Hessians.
        loss: L of a held-out batch, in evaluation mode.
        train: B_0 … B_{N−1}.
        validation: S_t by t ∈ V, how many steps were made before.
        statistics: BatchNorm's running statistics before the first step, as the released code has them: carried along
            and differentiated. Held-out losses are then L(θ_t, S_t, statistics=…) with those that t steps have left:
            `step` is of `tracking_loss`, and `loss` of `pure_loss(…, batch_norm="running")`. None: neither has any.
        options: Of `unroll`, whose adjoint is clipped and measured on the weights alone.

    Returns:
        L_auc, differentiable once and by plain autograd.

    Raises:
        NotFiniteError: A held-out loss, or during the backward pass an adjoint, is not finite.
        ValueError, TypeError: No held-out batch; and as `unroll` does, of a captured tensor that requires a gradient,
            for one.

    Example:
        >>> from common.optimizers import sgd
        >>> from common.unroll import training_step
        >>> half_square = lambda theta, _: theta["w"] ** 2 / 2
        >>> step = training_step(half_square, sgd(0.1))  # w ← 0.9 w
        >>> loss_auc({"w": torch.tensor(2.0)}, step, half_square, [None] * 2, {1: None, 2: None})  # (1.8² + 1.62²)/4
        tensor(1.4661)
    """

    if not validation:
        raise ValueError("loss_auc: `validation` must hold a held-out batch for one step at least, got none.")

    def evaluated(state: Any, batch: Batch) -> Tensor:
        carried = {} if statistics is None else {"statistics": state["statistics"]}
        return loss(state["params"], batch, **carried) / len(validation)

    def term(batch: Batch) -> Callable[[Any], Tensor]:
        return lambda state: evaluated(state, batch)

    outer = {t: term(batch) for t, batch in validation.items()}
    weights = lambda state: state["params"]  # noqa: E731
    return unroll(step, step.init(theta0, statistics), train, outer_losses=outer, part=weights, **options)[0]


def meta_gradient(
    distribution: InitDistribution,
    model: nn.Module,
    objective: Callable[[Params], Tensor],
    generator: torch.Generator,
    *,
    antithetic: bool = False,
) -> tuple[Float[Tensor, ""], Params]:
    r"""L_auc and its gradient in ψ through one draw, of which 𝔼 is that of the expected L_auc.

    θ₀ = θ₀(ψ, z),  ∂L_auc/∂ψ = λ₀ᵀ ∂θ₀/∂ψ  at the noise z as drawn

    Args:
        distribution: p_ψ.
        model: Where tensors without a law start from; only read.
        objective: θ₀ ↦ L_auc, of every trainable tensor.
        generator: Of z.
        antithetic: The means over z and its mirror image, −z or 1 − u: at twice the cost, free of what is odd in z.

    Returns:
        L_auc, without a graph, and ∂L_auc/∂ψ by the names of `distribution.parameters()`.

    Example:
        >>> from papers.dimaml.distributions import Normal
        >>> law = InitDistribution({"weight": Normal(1.0, 0.5)})
        >>> total, generator = lambda theta0: theta0["weight"].sum(), torch.Generator().manual_seed(0)
        >>> meta_gradient(law, nn.Linear(3, 2), total, generator, antithetic=True)  # 6 μ + σ Σ z, and the odd part gone
        (tensor(6.), {'weight.mean': tensor(6.), 'weight.std': tensor(0.)})
    """
    psi = {name: leaf.detach().requires_grad_() for name, leaf in distribution.parameters().items()}
    own = trainable(model)
    noise = generator.get_state()

    def of_draw(*, mirrored: bool) -> tuple[Tensor, Params]:
        generator.set_state(noise)  # the same z for both
        # ψ → θ₀ → L_auc → ∂L_auc/∂ψ
        theta0 = own | distribution.with_parameters(psi).sample(model, generator, antithetic=mirrored)
        L = objective(theta0)
        return L.detach(), tape(L, psi, keep=False)

    L, d = of_draw(mirrored=False)
    if not antithetic:
        return L, d
    L_mirrored, d_mirrored = of_draw(mirrored=True)
    return (L + L_mirrored) / 2, tree_map(lambda leaf: leaf / 2, tree_add(d, d_mirrored))


def losses_of_rows(loss: Callable[..., Any], *, shared: bool, tracking: bool = False) -> Callable[..., Any]:
    r"""L(θ_i; B_i) for rows i of stacked weights, in one vectorised pass: several trainings side by side.

    Their sum as a loss trains each row by itself, because no row's loss depends on another's weights.

    Args:
        loss: L, pure.
        shared: Whether all rows see one batch, as it stands; else its tensors are stacked too, see `stack_batches`.
        tracking: Whether L is one of `tracking_loss`, and gives statistics too.

    Returns:
        (theta, batch, **options) ↦ one value a row, and with `tracking` the stacked statistics. An option `statistics`
        is stacked too, but for counts, see `stack_statistics`. Under a seed, every row has dropout of its own.

    Example:
        >>> loss = lambda theta, x: (theta["w"] * x).square().mean()
        >>> losses_of_rows(loss, shared=True)({"w": torch.tensor([1.0, 3.0])}, torch.tensor([1.0, 2.0]))
        tensor([ 2.5000, 22.5000])
    """

    def losses(theta: Params, batch: Batch, *, statistics: Params | None = None, **options: Any) -> Any:
        axes = {name: 0 if leaf.is_floating_point() else None for name, leaf in (statistics or {}).items()}

        def of_row(row: Params, carried: Params, *leaves: Tensor) -> Any:
            pieces = iter(leaves)
            own = batch if shared else map_tensors(lambda _: next(pieces), batch)
            return loss(row, own, **options, **({} if statistics is None else {"statistics": carried}))

        stacks = [] if shared else tensors_of(batch)  # whatever else a batch holds is every row's
        mapped = torch.func.vmap(
            of_row,
            in_dims=(0, axes, *[0] * len(stacks)),
            out_dims=(0, axes) if tracking else 0,  # pyright: ignore[reportArgumentType]
            randomness="different",
        )
        return mapped(theta, statistics or {}, *stacks)

    return losses


def stack_statistics(statistics: Params, rows: int) -> Params:
    """The same running statistics for every row; counts of batches, which all rows share, stay one number."""
    return tree_map(
        lambda leaf: leaf.expand(rows, *leaf.shape).clone() if leaf.is_floating_point() else leaf, statistics
    )


def stack_batches(batches: Sequence[Batch]) -> Batch:
    """Batches of one shape as one, a row each: every tensor stacked along a new first dimension."""
    stacks = iter([torch.stack(leaves) for leaves in zip(*map(tensors_of, batches), strict=True)])
    return map_tensors(lambda _: next(stacks), batches[0])
