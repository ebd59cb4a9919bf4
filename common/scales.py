r"""θ = m ⊙ θ₀: every tensor keeps the direction it was drawn with, and its size is one multiplier to be learned.

θ₀ is never touched: θ is formed from it anew at each step, so that no rounding builds up in the direction, and a
multiplier that reaches zero can leave it again.

Letters: m multipliers, d = ∂F/∂m, k step counts, mu and nu first and second moments, beta their decay, lr τ.

Source: the meta-optimiser of Zhu et al., NeurIPS 2021 (GradInit), which NIO uses too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.functional import names_of
from common.tree import tree_norms
from common.types import Params

Branch = Literal["objective", "constraint"]
Kind = Literal["bias", "norm", "conv", "linear", "embedding", "other"]
Patterns = Sequence[str]
"""Kinds of tensors ("conv"), or names with wildcards ("encoder.*.weight"), as `fnmatch` reads them."""


def scaled(theta0: Params, scales: Params) -> Params:
    """θ with θ_b = m_b θ₀_b where there is a multiplier m_b, and θ₀_b where there is none."""
    return theta0 | {name: scale * theta0[name] for name, scale in scales.items()}


# ---------------------------------------------------------------------------------------------- which tensors
def kinds_of(model: nn.Module) -> dict[str, Kind]:
    """What each parameter is: a bias by its own name, any other by the module that holds it; a tied one by its first.

    Example:
        >>> kinds_of(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        {'0.weight': 'conv', '0.bias': 'bias', '1.weight': 'norm', '1.bias': 'bias'}
    """
    modules = dict(model.named_modules())
    kinds: dict[str, Kind] = {}
    for name, _ in model.named_parameters():
        path, _, own = name.rpartition(".")
        kinds[name] = "bias" if "bias" in own.split("_") else _kind_of(modules[path])
    return kinds


def _kind_of(module: nn.Module) -> Kind:
    name = type(module).__name__.lower()
    if "norm" in name:
        return "norm"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    # Conv1D: the transposed linear layer of transformers' GPT-2
    return (
        "linear" if isinstance(module, (nn.Linear, nn.Bilinear, nn.MultiheadAttention)) or name == "conv1d" else "other"
    )


def matches(names: Iterable[str], kind: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter of these names is meant by any of the patterns."""
    names = tuple(names)
    return any(kind == pattern or any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)


def scalable_tensors(
    model: nn.Module, *, include: Patterns = ("*",), exclude: Patterns = ()
) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors that get a multiplier, and those that get none with the reason.

    Every trainable tensor does, whatever its kind and shape, unless a pattern leaves it out. One whose norm is zero (a
    bias or gain that starts there) or not finite has no direction to keep, and stays as it is.

    Raises:
        ValueError: A pattern that means no parameter.
    """
    kinds, names = kinds_of(model), names_of(model)
    check_patterns(model, (*include, *exclude), "scalable_tensors")
    # a frozen one need not be of a type that has a norm, nor on the device of the others
    moving = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    norms = dict(zip(moving, tree_norms(moving).tolist(), strict=True)) if moving else {}
    skipped = {}
    for name in kinds:
        if name not in moving:
            skipped[name] = "frozen: requires_grad is False"
        elif not matches(names[name], kinds[name], include) or matches(names[name], kinds[name], exclude):
            skipped[name] = "left out by `include` and `exclude`"
        elif norms[name] == 0:
            skipped[name] = "its norm is zero"
        elif not norms[name] < float("inf"):
            skipped[name] = f"its norm is not finite ({norms[name]})"
    return [name for name in kinds if name not in skipped], skipped


def check_patterns(model: nn.Module, patterns: Patterns, caller: str) -> None:
    """Every pattern must mean a parameter: one that means none is a slip."""
    kinds, names = kinds_of(model), names_of(model)
    for pattern in patterns:
        if pattern != "*" and not any(matches(names[name], kind, [pattern]) for name, kind in kinds.items()):
            raise ValueError(
                f"{caller}: a pattern must mean at least one parameter, got {pattern!r}. Patterns are a kind "
                f"({', '.join(sorted(set(kinds.values())))}) or names with wildcards, as {next(iter(kinds), '*')!r}."
            )


Bounds = Mapping[str, tuple[float, float]]
"""(smallest, largest) multiplier by pattern; the last pattern that means a tensor counts."""


def bounds_of(
    names: Mapping[str, Sequence[str]], kinds: Mapping[str, str], *, min_scale: float, bounds: Bounds | None = None
) -> tuple[list[float], list[float]]:
    """Smallest and largest multiplier of each tensor: `min_scale` for weights and gains, 0 for biases, unless told.

    Args:
        names: Every name of each tensor, by its first.
        kinds: By first name.
        min_scale: Of what is no bias.
        bounds: What is told.
    """
    lower, upper = [], []
    for name, every in names.items():
        own = (0.0 if kinds[name] == "bias" else min_scale, float("inf"))
        for pattern, given in (bounds or {}).items():
            own = given if matches(every, kinds[name], [pattern]) else own
        lower.append(own[0])
        upper.append(own[1])
    return lower, upper


# ---------------------------------------------------------------------------------------------- the meta-optimiser
class RescaleState(NamedTuple):
    """Moments and step counts, by branch; a second moment that both share stands under both names."""

    mu: dict[str, Float[Tensor, "tensors"]]
    nu: dict[str, Float[Tensor, "tensors"]]
    k: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class RescaleAdam:
    r"""Adam on multipliers, with a first moment a branch.

    d ← clip(d, ±c);  μ_x ← β₁ μ_x + (1 − β₁) d;  ν ← β₂ ν + (1 − β₂) d²
    m ← clamp(m − τ/(1 − β₁^k_x) · μ_x / (√(ν/(1 − β₂^K)) + ε), lower, upper)

    for a step of branch x: k_x counts its steps and K those that ν has seen. A first step moves every multiplier by τ.

    Attributes:
        lr: τ.
        betas: (β₁, β₂).
        eps: ε.
        clip: c, the largest |d| of one multiplier; None: no bound.
        shared_second_moment: ν is one for both branches (the authors' vision code), or one a branch (translation).
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float | None = 1.0
    shared_second_moment: bool = True

    def init(self, m: Float[Tensor, "tensors"]) -> RescaleState:
        """Nothing seen yet."""
        zero = torch.zeros_like(m)
        return RescaleState(
            {"objective": zero, "constraint": zero},
            {"objective": zero, "constraint": zero},
            {"objective": 0, "constraint": 0},
        )

    def update(
        self,
        m: Float[Tensor, "tensors"],
        d: Float[Tensor, "tensors"],
        branch: Branch,
        state: RescaleState,
        *,
        lower: Float[Tensor, "tensors"] | float = 0.0,
        upper: Float[Tensor, "tensors"] | float = float("inf"),
    ) -> tuple[Float[Tensor, "tensors"], RescaleState]:
        """One step of every multiplier at once, without a device synchronisation. A d that is not finite gives NaN.

        Example:
            >>> adam = RescaleAdam(lr=0.1)
            >>> m = torch.ones(2)
            >>> adam.update(m, torch.tensor([3.0, -0.5]), "objective", adam.init(m))[0]
            tensor([0.9000, 1.1000])
        """
        beta1, beta2 = self.betas
        d = torch.where(d.isfinite(), d, torch.nan)  # which no clipping makes a number of
        d = d if self.clip is None else d.clamp(-self.clip, self.clip)
        k = state.k | {branch: state.k[branch] + 1}
        mu = beta1 * state.mu[branch] + (1 - beta1) * d
        nu = beta2 * state.nu[branch] + (1 - beta2) * d**2
        K = sum(k.values()) if self.shared_second_moment else k[branch]
        m = m - self.lr / (1 - beta1 ** k[branch]) * mu / ((nu / (1 - beta2**K)).sqrt() + self.eps)
        lower, upper = (torch.as_tensor(bound, dtype=m.dtype, device=m.device) for bound in (lower, upper))
        seen = ["objective", "constraint"] if self.shared_second_moment else [branch]
        state = RescaleState(state.mu | {branch: mu}, state.nu | dict.fromkeys(seen, nu), k)
        return torch.minimum(torch.maximum(m, lower), upper), state
