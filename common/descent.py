"""Multipliers learned step by step, whatever they are learned from: the loop that GradInit and NIO share.

Letters: m multipliers, θ₀ the drawn parameters, d = ∂F/∂m, T steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from numbers import Real

import torch
from rich.progress import Progress
from torch import Tensor, nn

from common.functional import check_apart, load_parameters_, names_of, unchanged_on_error
from common.options import check_number, check_positive, check_whole
from common.precision import check_precision, full_precision
from common.scales import (
    Bounds,
    Branch,
    Patterns,
    RescaleAdam,
    bounds_of,
    check_patterns,
    kinds_of,
    scalable_tensors,
)
from common.types import InitResult, NotFiniteError, Params

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
        check_number(caller, lr=adam.lr, min_scale=self.min_scale)
        if not (adam.lr >= 0 and math.isfinite(adam.lr)):
            raise ValueError(f"{caller}: `lr` must be finite, 0 or more, got {adam.lr}.")
        if not 0 <= self.min_scale <= 1:
            raise ValueError(f"{caller}: `min_scale` must lie in [0, 1], got {self.min_scale}: multipliers start at 1.")
        if adam.clip is not None:
            check_number(caller, " Pass None for no bound.", clip=adam.clip)
            if not adam.clip > 0:
                raise ValueError(f"{caller}: `clip` must be positive, got {adam.clip}. Pass None for no bound.")
        if not _is_pair(adam.betas):
            raise TypeError(f"{caller}: `betas` must be a pair of numbers, got {adam.betas!r}.")
        if not all(0 <= beta < 1 for beta in adam.betas):
            raise ValueError(f"{caller}: `betas` must lie in [0, 1), got {adam.betas}.")
        if not isinstance(self.bounds or {}, Mapping):
            raise TypeError(
                f"{caller}: `bounds` must be a dictionary, got {self.bounds!r}. As in {{'norm': (0.01, 100)}}."
            )
        for pattern, pair in (self.bounds or {}).items():
            if not _is_pair(pair):
                raise TypeError(
                    f"{caller}: `bounds` must be pairs of numbers (smallest, largest), got {pair!r} for {pattern!r}."
                )
            if not 0 <= pair[0] <= 1 <= pair[1]:
                raise ValueError(
                    f"{caller}: `bounds` must be pairs (smallest, largest) with 0 ≤ smallest ≤ 1 ≤ largest, got "
                    f"{pair} for {pattern!r}."
                )

    def tensors_of(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        """`scalable_tensors`, of which there must be one.

        Raises:
            ValueError: None, a pattern that means no parameter, or parameters that share memory or are of a short type.
        """
        check_patterns(model, (*self.include, *self.exclude, *(self.bounds or {})), self.caller)
        check_apart(model, self.caller)
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
        with ExitStack() as stack:
            stack.enter_context(full_precision(device))
            stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
            # which only a loss that calls the model itself, not the one that it is given, can change
            stack.enter_context(unchanged_on_error(model.buffers()))
            m = torch.ones(len(tuned), device=device, dtype=theta0[tuned[0]].dtype)
            names = names_of(model)
            limits = bounds_of(
                {name: names[name] for name in tuned}, kinds_of(model), min_scale=self.min_scale, bounds=self.bounds
            )
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
            result = InitResult(scales, _plain(entries), skipped)
            load_parameters_(model, {name: m[k] * theta0[name] for k, name in enumerate(tuned)})
        return result

    def _not_finite(self, t: int, error: NotFiniteError, m: Tensor, tuned: list[str]) -> str:
        """What went wrong at step t: its own numbers, or the multipliers that the step before left."""
        if broken := [name for name, scale in zip(tuned, m.tolist(), strict=True) if not math.isfinite(scale)]:
            return (
                f"{self.caller}: the gradient of every multiplier must be finite, got another at step {t - 1} for "
                f"{', '.join(broken[:3])}{' and others' if len(broken) > 3 else ''}. Likely cause: a second "
                "derivative or a look-ahead step that overflows (smaller weights or a smaller step, or float64). "
                "The model is unchanged."
            )
        return (
            f"{self.caller}: at step {t}: {str(error).split(': ', 1)[-1]} Likely causes: activations that overflow "
            "(start from smaller weights, a smaller `lr`, or float64), or a batch that holds NaN. "
            "The model is unchanged."
        )


def _is_pair(value: object) -> bool:
    """Two numbers."""
    return isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(part, Real) for part in value)


def trainable(model: nn.Module) -> Params:
    """θ₀: the parameters that training will move, detached, sharing the model's memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def _plain(entries: list[dict[str, float | Tensor]]) -> list[dict[str, float]]:
    """All numbers that are still on the device, in one transfer."""
    waiting = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else [])
    return [{key: next(numbers) if isinstance(v, Tensor) else v for key, v in entry.items()} for entry in entries]
