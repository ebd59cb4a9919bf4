"""The few names every module shares."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Params = dict[str, Tensor]
"""Parameters by name, from `model.named_parameters()`: a tied tensor appears once."""

Batch = Any
"""Any pytree of tensors with examples along dimension 0: `(x, y)`, a dict of a Hugging Face model, …"""

UserLoss = Callable[[nn.Module, Batch], Tensor]
"""`loss_fn(model, batch)`: the mean loss over the batch's examples, a scalar."""

PureLoss = Callable[[Params, Batch], Tensor]
"""`loss(params, batch)`: the same number, touching nothing but its arguments."""


class NotFiniteError(ValueError):
    """A loss or a derivative overflowed, or was NaN: of the weights or the data, not of a wrong option."""


class DerivativeError(RuntimeError):
    """A layer stands in the way of a derivative; the message names it, and the way out."""


@dataclass(frozen=True)
class InitResult:
    """What an initialiser did to a model.

    Attributes:
        scales: New norm over old norm, one number a tuned tensor, by parameter name.
        history: One dictionary a step; its keys are explained in the README of the paper.
        skipped: Tensors that were left alone although their kind is tuned, with the reason.
    """

    scales: dict[str, float]
    history: list[dict[str, float]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
