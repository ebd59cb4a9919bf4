r"""θ = m ⊙ θ₀: every tensor keeps the direction it was drawn with, and its size is one multiplier to be learned.

θ₀ is never touched: θ is formed from it anew at each step, so that no rounding builds up in the direction, and a
multiplier that reaches zero can leave it again.

Letters: m multipliers, d = ∂F/∂m, k step counts, mu and nu first and second moments, beta their decay, lr τ.

Source: the meta-optimiser of Zhu et al., NeurIPS 2021 (GradInit), which NIO uses too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor, nn

from common.functional import load_parameters_, parameters_of
from common.options import check_positive, check_whole
from common.precision import check_precision, full_precision
from common.tree import tree_norms
from common.types import InitResult, NotFiniteError, Params

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


def matches(name: str, kind: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter is meant by any of the patterns."""
    return any(kind == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def scalable_tensors(
    model: nn.Module, *, include: Patterns = ("*",), exclude: Patterns = ()
) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors that get a multiplier, and those that get none with the reason.

    Every trainable tensor does, whatever its kind and shape, unless a pattern leaves it out. One whose norm is zero (a
    bias or gain that starts there) or not finite has no direction to keep, and stays as it is.

    Raises:
        ValueError: A pattern that means no parameter.
    """
    kinds = kinds_of(model)
    check_patterns(model, (*include, *exclude), "scalable_tensors")
    norms = dict(zip(kinds, tree_norms(parameters_of(model)).tolist(), strict=True)) if kinds else {}
    skipped = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            skipped[name] = "frozen: requires_grad is False"
        elif not matches(name, kinds[name], include) or matches(name, kinds[name], exclude):
            skipped[name] = "left out by `include` and `exclude`"
        elif norms[name] == 0:
            skipped[name] = "its norm is zero"
        elif not norms[name] < float("inf"):
            skipped[name] = f"its norm is not finite ({norms[name]})"
    return [name for name in kinds if name not in skipped], skipped


def check_patterns(model: nn.Module, patterns: Patterns, caller: str) -> None:
    """Every pattern must mean a parameter: one that means none is a slip."""
    kinds = kinds_of(model)
    for pattern in patterns:
        if pattern != "*" and not any(matches(name, kind, [pattern]) for name, kind in kinds.items()):
            raise ValueError(
                f"{caller}: a pattern must mean at least one parameter, got {pattern!r}. Patterns are a kind "
                f"({', '.join(sorted(set(kinds.values())))}) or names with wildcards, as {next(iter(kinds), '*')!r}."
            )


Bounds = Mapping[str, tuple[float, float]]
"""(smallest, largest) multiplier by pattern; the last pattern that means a tensor counts."""


def bounds_of(
    names: Sequence[str], kinds: Mapping[str, str], *, min_scale: float, bounds: Bounds | None = None
) -> tuple[list[float], list[float]]:
    """Smallest and largest multiplier of each tensor: `min_scale` for weights and gains, 0 for biases, unless told."""
    lower, upper = [], []
    for name in names:
        own = (0.0 if kinds[name] == "bias" else min_scale, float("inf"))
        for pattern, given in (bounds or {}).items():
            own = given if matches(name, kinds[name], [pattern]) else own
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


# ---------------------------------------------------------------------------------------------- the descent
Slopes = Callable[[int, Params, Branch], tuple[Branch, Params, Mapping[str, float | Tensor]]]
"""(step from 1, multipliers m, the branch before) ↦ branch, ∂F/∂m by name, and what the history says of the step."""


@dataclass(frozen=True, kw_only=True)
class Descent:
    """How multipliers are learned, whatever is learned from.

    Attributes:
        caller: The method's name, which begins its errors.
        steps: T ≥ 0, iterations of either branch.
        adam: The meta-optimiser.
        min_scale: Smallest multiplier of weights and gains; that of biases is 0.
        bounds: (smallest, largest) by kind or name pattern, in place of `min_scale` where it means a tensor.
        include: Kinds or name patterns that get a multiplier.
        exclude: Those that get none.
        stuck_at_zero: A multiplier at zero stays there, as where tensors are rescaled in place.
    """

    caller: str
    steps: int
    adam: RescaleAdam
    min_scale: float = 0.01
    bounds: Bounds | None = None
    include: Patterns = ("*",)
    exclude: Patterns = ()
    stuck_at_zero: bool = False

    def check(self) -> None:
        """Every option in its range.

        Raises:
            TypeError: A value of another type than its option has.
            ValueError: One out of range.
        """
        adam, caller = self.adam, self.caller
        check_whole(caller, steps=self.steps)
        check_positive(caller, eps=adam.eps)
        if not (adam.lr >= 0 and math.isfinite(adam.lr)):
            raise ValueError(f"{caller}: `lr` must be finite, 0 or more, got {adam.lr}.")
        if not 0 <= self.min_scale <= 1:
            raise ValueError(f"{caller}: `min_scale` must lie in [0, 1], got {self.min_scale}: multipliers start at 1.")
        if adam.clip is not None and not adam.clip > 0:
            raise ValueError(f"{caller}: `clip` must be positive, got {adam.clip}. Pass None for no bound.")
        if not isinstance(adam.betas, (tuple, list)) or len(adam.betas) != 2:
            raise TypeError(f"{caller}: `betas` must be a pair of numbers, got {adam.betas!r}.")
        if not all(0 <= beta < 1 for beta in adam.betas):
            raise ValueError(f"{caller}: `betas` must lie in [0, 1), got {adam.betas}.")
        if not isinstance(self.bounds or {}, Mapping):
            raise TypeError(
                f"{caller}: `bounds` must be a dictionary, got {self.bounds!r}. As in {{'norm': (0.01, 100)}}."
            )
        for pattern, pair in (self.bounds or {}).items():
            if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not 0 <= pair[0] <= 1 <= pair[1]:
                raise ValueError(
                    f"{caller}: `bounds` must be pairs (smallest, largest) with 0 ≤ smallest ≤ 1 ≤ largest, got "
                    f"{pair} for {pattern!r}."
                )

    def tensors_of(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        """`scalable_tensors`, of which there must be one.

        Raises:
            ValueError: None, a pattern that means no parameter, or parameters in a short type.
        """
        check_patterns(model, (*self.include, *self.exclude, *(self.bounds or {})), self.caller)
        tuned, skipped = scalable_tensors(model, include=self.include, exclude=self.exclude)
        if not tuned:
            raise ValueError(
                f"{self.caller}: at least one trainable tensor must have a non-zero, finite norm and not be left out, "
                f"got none{': ' + '; '.join(f'{n}, {why}' for n, why in list(skipped.items())[:5]) if skipped else ''}."
            )
        check_precision(trainable(model), self.caller)
        return tuned, skipped

    def run(
        self,
        model: nn.Module,
        slopes: Slopes,
        *,
        shown: Sequence[str],
        on_step: Callable[[dict[str, float]], None] | None,
        progress: bool,
    ) -> InitResult:
        """Descend from m = 1, and write m ⊙ θ₀ into the model at the very end.

        Args:
            model: Only read until then.
            slopes: May draw batches: the global random state is the caller's again afterwards. A number that is to be
                shown is on the CPU; others may stay on their device until the end.
            shown: Entries of the history beside the progress bar.
            on_step: Called after each iteration with its entry of the history.
            progress: Whether there is a bar.

        Raises:
            NotFiniteError: From `slopes`, with the step; or a multiplier that is not finite.
        """
        tuned, skipped = self.tensors_of(model)
        theta0 = trainable(model)
        device = theta0[tuned[0]].device
        with full_precision(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            m = torch.ones(len(tuned), device=device, dtype=theta0[tuned[0]].dtype)
            limits = bounds_of(tuned, kinds_of(model), min_scale=self.min_scale, bounds=self.bounds)
            lower, upper = map(m.new_tensor, limits)
            state, branch = self.adam.init(m), "objective"
            entries: list[dict[str, float | Tensor]] = []
            with Progress(transient=True) if progress else nullcontext() as bar:
                task = bar.add_task(self.caller, total=self.steps) if bar is not None else None
                for t in range(1, self.steps + 1):
                    try:
                        branch, d, entry = slopes(t, dict(zip(tuned, m.unbind(), strict=True)), branch)
                    except NotFiniteError as error:
                        raise NotFiniteError(self._not_finite(t, error, m, tuned)) from error
                    moved, state = self.adam.update(
                        m, torch.stack([d[name] for name in tuned]), branch, state, lower=lower, upper=upper
                    )
                    m = torch.where(m == 0, m, moved) if self.stuck_at_zero else moved
                    entries.append({"step": float(t), "constraint": float(branch == "constraint"), **entry})
                    if on_step is not None:
                        on_step(_plain(entries[-1:])[0])
                    if bar is not None and task is not None:
                        words = ", ".join(f"{key.replace('_', ' ')} {entries[-1][key]:.3g}" for key in shown)
                        bar.update(task, advance=1, description=f"{self.caller}  {words}")
            scales = dict(zip(tuned, m.tolist(), strict=True))
            if broken := [name for name, scale in scales.items() if not math.isfinite(scale)]:
                raise NotFiniteError(
                    f"{self.caller}: every multiplier must end finite, got another for {', '.join(broken[:3])} after "
                    "the last step. Likely cause: a second derivative that overflows (start from smaller weights, or "
                    "use float64). The model is unchanged."
                )
            load_parameters_(model, {name: m[k] * theta0[name] for k, name in enumerate(tuned)})
        return InitResult(scales, _plain(entries), skipped)

    def _not_finite(self, t: int, error: NotFiniteError, m: Tensor, tuned: list[str]) -> str:
        """What went wrong at step t: its own numbers, or the multipliers that the step before left."""
        if broken := [name for name, scale in zip(tuned, m.tolist(), strict=True) if not math.isfinite(scale)]:
            return (
                f"{self.caller}: the gradient of every multiplier must be finite, got another at step {t - 1} for "
                f"{', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''}. Likely cause: a look-ahead step "
                "or a second derivative that overflows (a smaller step or weights, or float64). The model is unchanged."
            )
        return (
            f"{self.caller}: at step {t}: {str(error).split(': ', 1)[-1]} Likely causes: activations that overflow "
            "(start from smaller weights, a smaller `lr`, or float64), or a batch that holds NaN. "
            "The model is unchanged."
        )


def trainable(model: nn.Module) -> Params:
    """θ₀: the parameters that training will move, detached, sharing the model's memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _plain(entries: list[dict[str, float | Tensor]]) -> list[dict[str, float]]:
    """All numbers that are still on the device, in one transfer."""
    waiting = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else [])
    return [{key: next(numbers) if isinstance(v, Tensor) else v for key, v in entry.items()} for entry in entries]
