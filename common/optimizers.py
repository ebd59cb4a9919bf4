r"""Optimiser steps as pure functions of parameter dictionaries: torch.optim's numbers, differentiable in all they get.

    optimizer = adam(1e-3)
    state = optimizer.init(params)
    params, state = optimizer.update(params, gradients, state)

A state is a dictionary of tensors only, so that a loop can carry it, keep it and differentiate through it: the number
of steps made (int64, on the CPU, where reading it waits for nothing), the rule's buffers, and under `"hyper"` every
hyperparameter that was given as a tensor. `update` reads those from the state, never from the optimiser, so that a
gradient reaches them wherever the state came from.

Letters: θ parameters, g gradients, t steps made before, k = t + 1, τ learning rate, λ weight decay, μ momentum,
β decay rates, ε and ε_root.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor

from common.options import check_number, check_whole
from common.types import Params

Number = float | Tensor
"""A constant, or a scalar tensor, which goes into the state and gets a gradient."""

OptimizerState = dict[str, Any]
"""`{"step": (), "hyper": {name: ()}}` and the rule's buffers, each of them like the parameters."""

Schedule = Callable[[Tensor], Tensor]
"""t, a float64 scalar, ↦ what the learning rate is multiplied by."""


# ---------------------------------------------------------------------------------------------- schedules
def constant() -> Schedule:
    """1 at every step."""
    return torch.ones_like


def cosine(total: int, *, final: float = 0.0) -> Schedule:
    """final + (1 − final) · ½ (1 + cos π p) with p = t / total, and `final` from there on.

    Example:
        >>> cosine(4)(torch.tensor(2.0))
        tensor(0.5000)
    """
    check_whole("cosine", smallest=1, total=total)
    check_number("cosine", final=final)
    return lambda t: final + (1 - final) * 0.5 * (1 + torch.cos(torch.pi * (t / total).clamp(0, 1)))


def step_decay(milestones: Sequence[int], *, gamma: float = 0.1) -> Schedule:
    """γ to the power of how many milestones lie at or before t: torch's MultiStepLR.

    Example:
        >>> step_decay([2, 5], gamma=0.5)(torch.tensor(5.0))
        tensor(0.2500)
    """
    for milestone in milestones:
        check_whole("step_decay", milestone=milestone)
    check_number("step_decay", gamma=gamma)
    return lambda t: torch.full_like(t, gamma) ** sum((t >= milestone).to(t.dtype) for milestone in milestones)


def warm_up(steps: int, then: Schedule | None = None) -> Schedule:
    """(t + 1) / W over the first W steps, then another schedule from its own beginning, or 1.

    Example:
        >>> warm_up(4)(torch.tensor(1.0))
        tensor(0.5000)
    """
    check_whole("warm_up", steps=steps)
    then = constant() if then is None else then
    return lambda t: torch.where(t < steps, (t + 1) / max(steps, 1), then(t - steps))


# ---------------------------------------------------------------------------------------------- what all rules share
def root(x: Tensor) -> Tensor:
    """√x with the derivative 0 where x = 0, where torch's is infinite.

    There a second moment is zero because no gradient was ever seen, and 0 · ∞ would make every meta-gradient NaN.
    """
    zero = x == 0  # not x > 0: NaN must stay NaN
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


def clip_norm(gradients: Params, bound: Number) -> Params:
    """g · min(1, c / (‖g‖ + 10⁻⁶)), ‖·‖ over all tensors: torch's clip_grad_norm_, differentiable at g = 0 too."""
    squares = torch.stack([(g**2).sum() for g in gradients.values()])
    factor = (bound / (root(squares.sum()) + 1e-6)).clamp(max=1.0)
    return {name: factor * g for name, g in gradients.items()}


@dataclass(frozen=True, kw_only=True, eq=False)
class Optimizer(ABC):
    """One pure step: θ ← θ − τ f s(t) u, with u from the rule of the subclass.

    Attributes:
        lr: τ ≥ 0.
        weight_decay: λ ≥ 0: g + λ θ in place of g, or θ − τ f s(t) λ θ before the step where `decoupled`.
        decoupled: Which of the two.
        schedule: s, of the steps made; None: 1.
        lr_factors: (name pattern, f) of parameters with a learning rate of their own; the first that fits counts.
    """

    lr: Number
    weight_decay: Number = 0.0
    decoupled: bool = False
    schedule: Schedule | None = None
    lr_factors: tuple[tuple[str, float], ...] = ()

    caller: ClassVar[str]

    def __post_init__(self) -> None:
        for name in self._hyperparameters:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                if value.ndim or not value.is_floating_point():
                    raise ValueError(
                        f"{self.caller}: `{name}` must be a scalar of floating point where it is a tensor, got shape "
                        f"{tuple(value.shape)} of {value.dtype}."
                    )
                continue
            check_number(self.caller, **{name: value})
            below_one = name in ("beta1", "beta2", "alpha")
            if not (0 <= value < (1 if below_one else float("inf"))):
                bounds = "in [0, 1)" if below_one else "finite and not negative"
                raise ValueError(f"{self.caller}: `{name}` must be {bounds}, got {value}.")
        for pattern, factor in self.lr_factors:
            if not 0 <= factor < float("inf"):
                raise ValueError(
                    f"{self.caller}: a factor of `lr_factors` must be finite and not negative, got {factor} for "
                    f"{pattern!r}."
                )

    @property
    def _hyperparameters(self) -> list[str]:
        return [f.name for f in fields(self) if f.type == Number]

    @property
    @abstractmethod
    def buffers(self) -> tuple[str, ...]:
        """Names of what the rule remembers of each parameter."""

    @abstractmethod
    def rule(self, g: Tensor, buffers: tuple[Tensor, ...], hyper: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """u and the buffers after the step, of one tensor."""

    def at(self, k: Tensor, hyper: dict[str, Any]) -> dict[str, Any]:
        """The numbers that the rule reads at its k-th step, k = 1, 2, …: those of `hyper`, and what follows from k."""
        return hyper

    def init(self, params: Params) -> OptimizerState:
        """No step made, buffers of zeros, and the hyperparameters that are tensors."""
        tensors = {name: getattr(self, name) for name in self._hyperparameters}
        state: OptimizerState = {
            "step": torch.zeros((), dtype=torch.int64, device="cpu"),
            "hyper": {name: value for name, value in tensors.items() if isinstance(value, Tensor)},
        }
        for buffer in self.buffers:
            state[buffer] = {name: torch.zeros_like(leaf, requires_grad=False) for name, leaf in params.items()}
        return state

    def update(self, params: Params, gradients: Params, state: OptimizerState) -> tuple[Params, OptimizerState]:
        """θ and the state after one step; nothing that was passed in changes.

        Example:
            >>> optimizer = sgd(0.1, momentum=0.5)
            >>> theta = {"w": torch.tensor(1.0)}
            >>> theta, state = optimizer.update(theta, {"w": torch.tensor(2.0)}, optimizer.init(theta))
            >>> optimizer.update(theta, {"w": torch.tensor(2.0)}, state)[0]["w"]
            tensor(0.5000)
        """
        numbers = {name: getattr(self, name) for name in self._hyperparameters}
        k = state["step"] + 1
        hyper = self.at(k.double(), numbers | state["hyper"])
        lr, decay = hyper["lr"], hyper["weight_decay"]
        if self.schedule is not None:
            lr = lr * self.schedule(state["step"].double())
        decays = isinstance(decay, Tensor) or decay != 0
        stepped: Params = {}
        buffers: dict[str, Params] = {buffer: {} for buffer in self.buffers}
        for name, theta in params.items():
            factor = next((f for pattern, f in self.lr_factors if fnmatchcase(name, pattern)), 1.0)
            rate = lr if factor == 1 else lr * factor
            g = gradients[name]
            if decays and not self.decoupled:
                g = g + decay * theta
            u, after = self.rule(g, tuple(state[buffer][name] for buffer in self.buffers), hyper)
            if decays and self.decoupled:
                theta = theta - rate * decay * theta
            # the types as they were: beside a parameter of no dimension a float64 scalar would win
            stepped[name] = (theta - rate * u).to(theta.dtype)
            for buffer, leaf in zip(self.buffers, after, strict=True):
                buffers[buffer][name] = leaf.to(theta.dtype)
        return stepped, {"step": k, "hyper": state["hyper"]} | buffers


def _is_off(momentum: Number) -> bool:
    return not isinstance(momentum, Tensor) and momentum == 0


# ---------------------------------------------------------------------------------------------- the rules
@dataclass(frozen=True, kw_only=True, eq=False)
class SGD(Optimizer):
    """v ← μ v + g from v = 0 (so v = g at the first step);  u = v, or g + μ v with `nesterov`, or g without momentum.

    Attributes:
        momentum: μ ≥ 0.
        nesterov: Nesterov's u.
    """

    momentum: Number = 0.0
    nesterov: bool = False

    caller = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and _is_off(self.momentum):
            raise ValueError(f"sgd: `nesterov` needs a momentum above zero, got {self.momentum}.")

    @property
    def buffers(self) -> tuple[str, ...]:
        return () if _is_off(self.momentum) else ("velocity",)

    def rule(self, g: Tensor, buffers: tuple[Tensor, ...], hyper: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not buffers:
            return g, ()
        v = hyper["momentum"] * buffers[0] + g
        return (g + hyper["momentum"] * v if self.nesterov else v), (v,)


@dataclass(frozen=True, kw_only=True, eq=False)
class Adam(Optimizer):
    """m ← β₁ m + (1 − β₁) g;  w ← β₂ w + (1 − β₂) g²;  u = m̂ / (√(ŵ + ε_root) + ε), m̂ = m/(1 − β₁^k), ŵ = w/(1 − β₂^k).

    An entry that has only seen gradients of zero has u = 0 and, by `root`, finite derivatives. They are large all the
    same where ε is small (du/dm = 1/ε); ε_root > 0 makes them moderate, and moves u.

    Attributes:
        beta1: β₁.
        beta2: β₂.
        eps: ε.
        eps_root: ε_root; 0 is torch's rule.
    """

    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-8
    eps_root: Number = 0.0

    caller = "adam"

    @property
    def buffers(self) -> tuple[str, ...]:
        return "first_moment", "second_moment"

    def at(self, k: Tensor, hyper: dict[str, Any]) -> dict[str, Any]:
        return hyper | {"bias1": 1 - hyper["beta1"] ** k, "bias2": 1 - hyper["beta2"] ** k}

    def rule(self, g: Tensor, buffers: tuple[Tensor, ...], hyper: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        m = beta1 * buffers[0] + (1 - beta1) * g
        w = beta2 * buffers[1] + (1 - beta2) * g**2
        m_hat, w_hat = m / hyper["bias1"], w / hyper["bias2"]
        return m_hat / (root(w_hat + hyper["eps_root"]) + hyper["eps"]), (m, w)


@dataclass(frozen=True, kw_only=True, eq=False)
class RMSprop(Optimizer):
    """w ← α w + (1 − α) g²;  r = g / (√(w + ε_root) + ε);  u = r, or v ← μ v + r and u = v with momentum.

    Attributes:
        momentum: μ ≥ 0, of the scaled gradient.
        alpha: α.
        eps: ε.
        eps_root: ε_root; 0 is torch's rule.
    """

    momentum: Number = 0.0
    alpha: Number = 0.99
    eps: Number = 1e-8
    eps_root: Number = 0.0

    caller = "rmsprop"

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("second_moment",) if _is_off(self.momentum) else ("second_moment", "velocity")

    def rule(self, g: Tensor, buffers: tuple[Tensor, ...], hyper: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
        w = hyper["alpha"] * buffers[0] + (1 - hyper["alpha"]) * g**2
        r = g / (root(w + hyper["eps_root"]) + hyper["eps"])
        if len(buffers) == 1:
            return r, (w,)
        v = hyper["momentum"] * buffers[1] + r
        return v, (w, v)


# ---------------------------------------------------------------------------------------------- as torch.optim has them
def sgd(
    lr: Number, *, momentum: Number = 0.0, nesterov: bool = False, weight_decay: Number = 0.0, **options: Any
) -> SGD:
    """Gradient descent, with momentum or Nesterov's; `options` are `Optimizer`'s.

    Raises:
        ValueError: A negative or infinite number, a tensor that is no scalar, or `nesterov` without momentum.
        TypeError: No number.
    """
    return SGD(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, **options)


def adam(
    lr: Number,
    *,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    weight_decay: Number = 0.0,
    **options: Any,
) -> Adam:
    """Adam; its weight decay is added to the gradient unless `decoupled=True`. `options` are `Optimizer`'s.

    Raises:
        ValueError: A number out of range, or a tensor that is no scalar.
        TypeError: No number.
    """
    beta1, beta2 = betas
    return Adam(lr=lr, beta1=beta1, beta2=beta2, eps=eps, eps_root=eps_root, weight_decay=weight_decay, **options)


def adamw(
    lr: Number,
    *,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    weight_decay: Number = 1e-2,
    **options: Any,
) -> Adam:
    """Adam with decoupled weight decay.

    Raises:
        ValueError: A number out of range, or a tensor that is no scalar.
        TypeError: No number.
    """
    return adam(lr, betas=betas, eps=eps, eps_root=eps_root, weight_decay=weight_decay, decoupled=True, **options)


def rmsprop(
    lr: Number,
    *,
    alpha: Number = 0.99,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    momentum: Number = 0.0,
    weight_decay: Number = 0.0,
    **options: Any,
) -> RMSprop:
    """RMSprop, not centred; `options` are `Optimizer`'s.

    Raises:
        ValueError: A number out of range, or a tensor that is no scalar.
        TypeError: No number.
    """
    return RMSprop(
        lr=lr, alpha=alpha, eps=eps, eps_root=eps_root, momentum=momentum, weight_decay=weight_decay, **options
    )
