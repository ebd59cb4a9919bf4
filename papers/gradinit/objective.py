r"""The loss after one look-ahead step, the gradient norm that bounds it, and what each asks of the multipliers.

Letters: theta0 θ₀ the drawn parameters, m their multipliers (one a tensor b), theta = m ⊙ θ₀, S and S̃ two minibatches
(`batch`, `other_batch`), g = ∇L(S; θ), A[g] the direction of the target optimiser's first step, eta η its size,
gamma γ the bound on ‖g‖, H = ∇²L(S; θ), u = ∇L(S̃; θ') the gradient at the stepped θ' = θ − η A[g], d = ∂/∂m.

Costs are counted in F, one forward pass of a minibatch; a backward pass is 2F.

Source: Zhu, Ni, Xu, Kong, Huang & Goldstein, "GradInit: Learning to Initialize Neural Networks for Stable and Efficient
Training", NeurIPS 2021, and its released code.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from common.derivatives import gradient, tape
from common.options import check_choice
from common.scales import Branch, scaled
from common.tree import tree_add, tree_dots, tree_map
from common.types import Batch, NotFiniteError, Params, PureLoss

StepName = Literal["normalized_sgd", "sgd", "adam"]
Step = StepName | Callable[[Params], Params]
"""A[·]: by name, or a function of the gradient, differentiable where the exact objective is asked for."""

STEPS = ("normalized_sgd", "sgd", "adam")
NORMS = ("l1", "l2")
ENGINES = ("nested", "lazy", "finite_difference")
Norm = Literal["l1", "l2"]
Engine = Literal["nested", "lazy", "finite_difference"]
LookAhead = Callable[[Params, Params, Batch], Tensor]
"""`(θ', θ, S̃) ↦` the look-ahead loss, of which θ' alone is used unless the released code is followed."""


def norm_of(step: Step) -> Norm:
    """The norm of which ⟨g, A[g]⟩, the decrease that the linear model promises, is a function: ℓ1 for Adam, else ℓ2."""
    return "l1" if step == "adam" else "l2"


def gradient_norm(g: Params, norm: Norm) -> Float[Tensor, ""]:
    r"""‖g‖ over every entry of every tensor. Its derivative at g = 0 is 0.

    Example:
        >>> gradient_norm({"w": torch.tensor([3.0, -4.0])}, "l2"), gradient_norm({"w": torch.tensor([3.0, -4.0])}, "l1")
        (tensor(5.), tensor(7.))
    """
    check_choice("gradient_norm", "norm", norm, NORMS)
    order = 1 if norm == "l1" else 2
    # the norm of the tensors' norms, with which no copy of g is made
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(leaf, order) for leaf in g.values()]), order)


def step_direction(g: Params, step: Step) -> Params:
    r"""A[g]: g for `"sgd"`, g/‖g‖₂ for `"normalized_sgd"`, sign(g) for `"adam"` (its first step as ε → 0).

    Example:
        >>> step_direction({"w": torch.tensor([3.0, -4.0])}, "normalized_sgd")["w"]
        tensor([ 0.6000, -0.8000])
    """
    if callable(step):
        return step(g)
    check_choice("step_direction", "step", step, STEPS, " Or pass a function from gradients to a direction.")
    if step == "sgd":
        return g
    if step == "adam":
        return tree_map(torch.sign, g)
    n = gradient_norm(g, "l2")
    return tree_map(lambda leaf: leaf / torch.where(n > 0, n, 1.0), g)  # A[0] = 0


def look_ahead_loss(
    loss: PureLoss,
    theta: Params,
    batch: Batch,
    other_batch: Batch,
    *,
    step: Step = "normalized_sgd",
    eta: float = 0.1,
    exact: bool = False,
) -> Float[Tensor, ""]:
    r"""L(S̃; θ − η A[g]),  g = ∇L(S; θ): the objective.

    Args:
        loss: L, pure.
        theta: θ.
        batch: S.
        other_batch: S̃.
        step: A.
        eta: η.
        exact: Whether the step is differentiated too. The released code takes it for a constant.

    Example:
        >>> bowl = lambda theta, _: (theta["w"] ** 2).sum() / 2
        >>> look_ahead_loss(bowl, {"w": torch.tensor([3.0, -4.0])}, None, None, step="sgd", eta=0.5)  # half is left
        tensor(3.1250)
    """
    A = step_direction(gradient(loss, theta, batch), step)
    if not exact:
        A = tree_map(torch.Tensor.detach, A)  # released code: the displacement carries no derivative
    return loss(tree_add(theta, A, scale=-eta), other_batch)


def constraint(loss: PureLoss, theta: Params, batch: Batch, *, norm: Norm = "l2") -> Float[Tensor, ""]:
    r"""‖∇L(S; θ)‖, which is to stay at or below γ; its gradient in θ is a second-order quantity.

    Example:
        >>> bowl = lambda theta, _: (theta["w"] ** 2).sum() / 2
        >>> constraint(bowl, {"w": torch.tensor([3.0, -4.0])}, None)
        tensor(5.)
    """
    return gradient_norm(gradient(loss, theta, batch), norm)


def scale_gradients(
    loss: PureLoss,
    theta0: Params,
    scales: Params,
    batch: Batch,
    other_batch: Batch | Callable[[], Batch],
    *,
    step: Step = "normalized_sgd",
    eta: float = 0.1,
    gamma: float = 1.0,
    exact: bool = False,
    norm: Norm | None = None,
    engine: Engine = "lazy",
    expected: Branch = "objective",
    difference_step: float = 1e-3,
    look_ahead: LookAhead | None = None,
) -> tuple[Branch, Params, Params]:
    r"""The branch that an iteration takes, and ∂/∂m of what it descends on.

    n = ‖g‖ > γ: constraint, d_b = ∂n/∂m_b = ⟨θ₀_b, (H ∂n/∂g)_b⟩.
    Else:        objective,  d_b = 1/η · ∂L(S̃; θ − η A[g])/∂m_b = 1/η · ⟨θ₀_b, u_b⟩, and with `exact` (A's Jacobian J)
                             1/η · ⟨θ₀_b, (u − η H Jᵀ u)_b⟩.

    Every engine decides by g alone; a graph of it is kept only where H is expected to be multiplied. What they cost:

    | engine                | constraint                       | objective | exact objective |
    |-----------------------|----------------------------------|-----------|-----------------|
    | `"lazy"`              | 9F where `expected`, or else 11F | 6F        | 12F             |
    | `"nested"`            | 12F                              | 9F        | 15F             |
    | `"finite_difference"` | 6F                               | 6F        | 9F              |

    `"lazy"` reads the tape of the one forward pass again where H is needed. `"nested"` differentiates `constraint` and
    `look_ahead_loss` as they stand above. `"finite_difference"` takes H v = (g(θ + h v) − g(θ))/h: it asks nothing of
    the layers beyond a gradient and keeps no second graph, with an error of about 1e-3 of the largest |d| where
    activations are smooth. Where they have kinks, g jumps there, and a deep ReLU network with BatchNorm crosses so many
    that d is off by several times its largest entry (this package's README). Forward-over-reverse would cost 12F.

    Args:
        loss: L, pure, not under a `torch.func` transform; for at most two reverse-mode derivatives.
        theta0: θ₀: all parameters that the norm is over and the step moves.
        scales: m_b, scalars by name, of the tensors that have one.
        batch: S.
        other_batch: S̃, or a function that draws it, called where the objective is taken.
        step: A.
        eta: η > 0.
        gamma: γ ≥ 0. A norm equal to it goes to the objective.
        exact: Differentiate the step as well (ours; the released code does not). The same for Adam's.
        norm: Of the constraint; by default the one that belongs to the step.
        engine: How H is multiplied.
        expected: The branch that `"lazy"` prepares for; the last one is a good forecast.
        difference_step: Length of h v in the ℓ2 norm, for `"finite_difference"`.
        look_ahead: Replaces L(S̃; θ') by a function of (θ', θ, S̃); not with `exact`.

    Returns:
        The branch; d_b by name, scalars, the objective's with the released factor 1/η; and `loss` L(S; θ),
        `gradient_norm` n (both on the CPU, from the one synchronisation) and, of the objective, `look_ahead_loss`.

    Raises:
        ValueError: A step, norm, engine or branch of another name; `exact` together with `look_ahead`.
        NotFiniteError: A loss or gradient that is not finite; the message names the tensors.

    Example:
        >>> bowl = lambda theta, _: (theta["w"] ** 2).sum() / 2
        >>> theta0, m = {"w": torch.tensor([3.0, -4.0])}, {"w": torch.tensor(1.0)}
        >>> branch, d, _ = scale_gradients(bowl, theta0, m, None, None, gamma=4.0)  # n = ‖θ₀‖ m
        >>> branch, d["w"]
        ('constraint', tensor(5.))

    Reference:
        Zhu et al. 2021, Algorithm 1; the released code for A's missing derivative and the factor 1/η.
    """
    norm = norm_of(step) if norm is None else norm
    check_choice("scale_gradients", "engine", engine, ENGINES)
    check_choice("scale_gradients", "expected", expected, ("objective", "constraint"))
    if exact and look_ahead is not None:
        raise ValueError(
            "scale_gradients: `exact` differentiates L(S̃; θ') alone, got a `look_ahead` too. Leave one out."
        )
    theta = tree_map(lambda leaf: leaf.detach().requires_grad_(), scaled(theta0, scales))
    # θ → L(S; θ) → g, with a graph of g only where H is to be multiplied
    second = exact and step != "adam"  # a sign has no derivative
    keep = engine == "lazy" and (second or expected == "constraint")
    value = loss(theta, batch)
    g = tape(value, theta, keep=keep, retain=keep or engine == "lazy")
    g_now = tree_map(torch.Tensor.detach, g)  # the branch, and a step that is a constant (released code), need no graph
    n = gradient_norm(g_now, norm)
    at_hand, n = torch.stack([value.detach().to(n.dtype), n]).cpu()
    _check_finite(at_hand, n, g_now)
    metrics = {"loss": at_hand, "gradient_norm": n}

    def hessian_times(v: Params) -> Params:
        if engine == "finite_difference":
            return _difference(loss, theta, g_now, v, batch, difference_step)
        return tape(g if keep else tape(value, theta), theta, v, keep=False)

    if n > gamma:
        if engine == "nested":
            d = torch.func.grad(lambda m: constraint(loss, scaled(theta0, m), batch, norm=norm))(scales)
            return "constraint", d, metrics
        v = torch.func.grad(gradient_norm)(g_now, norm)  # sign(g) or g/‖g‖
        return "constraint", _along(theta0, hessian_times(v), scales), metrics

    if not second:
        del value, g  # the tape of S, before that of S̃ is recorded
    other_batch = other_batch() if callable(other_batch) else other_batch
    if engine == "nested" and look_ahead is None:
        of = partial(look_ahead_loss, loss, batch=batch, other_batch=other_batch, step=step, eta=eta, exact=exact)
        d, ahead = torch.func.grad_and_value(lambda m: of(scaled(theta0, m)))(scales)
        return "objective", tree_map(lambda leaf: leaf / eta, d), metrics | {"look_ahead_loss": ahead}
    stepped = tree_add(theta, step_direction(g_now, step), scale=-eta)
    if look_ahead is None:
        # A is a constant (released code), so that ∂/∂θ is ∂/∂θ'; leaves of their own let go of θ and g
        stepped = tree_map(lambda leaf: leaf.detach().requires_grad_(), stepped)
        ahead, leaves = loss(stepped, other_batch), stepped
    else:
        ahead, leaves = look_ahead(stepped, theta, other_batch), theta
    if not second:
        del theta, g_now, stepped
    u = tape(ahead, leaves, keep=False)
    if second:
        w = torch.func.vjp(lambda g: step_direction(g, step), g_now)[1](u)[0]  # pyright: ignore[reportPossiblyUnboundVariable]
        u = tree_add(u, hessian_times(w), scale=-eta)
    d = tree_map(lambda leaf: leaf / eta, _along(theta0, u, scales))
    return "objective", d, metrics | {"look_ahead_loss": ahead.detach()}


def _along(theta0: Params, slopes: Params, scales: Params) -> Params:
    """⟨θ₀_b, ∂F/∂θ_b⟩ = ∂F/∂m_b."""
    return dict(zip(scales, tree_dots(theta0, slopes, scales).unbind(), strict=True))


def _difference(loss: PureLoss, theta: Params, g: Params, v: Params, batch: Batch, length: float) -> Params:
    """H v = (g(θ + h v) − g(θ)) / h with ‖h v‖₂ = `length`; H 0 = 0."""
    size = gradient_norm(v, "l2")
    h = length / torch.where(size > 0, size, 1.0)
    moved = tree_map(lambda leaf, along: (leaf.detach() + h * along).requires_grad_(), theta, v)
    return tree_map(lambda there, here: (there - here) / h, tape(loss(moved, batch), moved, keep=False), g)


def _check_finite(value: Tensor, n: Tensor, g: Params) -> None:
    if value.isfinite() and n.isfinite():
        return
    broken = [name for name, leaf in g.items() if not leaf.isfinite().all()]
    where = f"a gradient that is not, in {', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''}"
    got = where if broken else f"a gradient norm of {n.item()}" if math.isfinite(value) else f"a loss of {value.item()}"
    raise NotFiniteError(f"scale_gradients: loss and gradient must be finite, got {got} (loss {value.item():g}).")
