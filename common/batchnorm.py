r"""Running statistics that go into a loss and come out of it as tensors, with derivatives.

    μ ← (1 − ρ) μ + ρ m,    σ² ← (1 − ρ) σ² + ρ v · n/(n − 1)

m and v are mean and variance of a batch of n values a channel, ρ is the layer's momentum (1/k at its k-th batch where
that is None). Torch's layers write μ and σ² in place, without a history, and in evaluation have no derivative in them:
the path from a held-out loss through the statistics into earlier steps of training is cut.
`common.functional.tracking_loss` and `pure_loss(…, batch_norm="running")` have that path.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from common.types import DerivativeError, Params

Slots = list[tuple[dict, str]]
"""Where modules keep one tensor: the dictionary and the key."""


def running_statistics(model: nn.Module) -> Params:
    """The model's own buffers of running statistics by name: of every layer that tracks them, a tied one once."""
    tracked = {
        id(leaf)
        for module in model.modules()
        if isinstance(module, _NormBase) and module.track_running_stats and module.running_mean is not None
        for leaf in module.buffers(recurse=False)
    }
    return {name: leaf for name, leaf in model.named_buffers() if id(leaf) in tracked}


def fresh_statistics(model: nn.Module) -> Params:
    """Running statistics before the first batch: mean 0, variance 1, no batch counted; counts are on the CPU.

    By buffer name, of every layer that tracks them: batch norm's, and instance norm's where it does. There may be none.

    Example:
        >>> fresh_statistics(nn.BatchNorm1d(2))
        {'running_mean': tensor([0., 0.]), 'running_var': tensor([1., 1.]), 'num_batches_tracked': tensor(0)}
    """

    def of(name: str, leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.zeros_like(leaf, device="cpu")  # which is read at every batch, where momentum is None
        return torch.ones_like(leaf) if name.rpartition(".")[2] == "running_var" else torch.zeros_like(leaf)

    return {name: of(name, leaf) for name, leaf in running_statistics(model).items()}


class CarriedStatistics(TorchFunctionMode):
    """While it is active, norms differentiate in their running statistics, and put new ones in the place of the old.

    Args:
        slots: By buffer name, where the modules keep its tensor now; every other norm is left as it is.
    """

    def __init__(self, slots: Mapping[str, Slots]) -> None:
        super().__init__()
        self.names = dict(slots)
        self.known: dict[int, tuple[Tensor, int, Slots]] = {}
        for name, places in slots.items():
            self.put(self.now(name), places)

    def now(self, name: str) -> Tensor:
        store, key = self.names[name][0]
        return store[key]

    def put(self, leaf: Tensor, places: Slots) -> None:
        """`leaf` in all of its places, known by identity, with the version that tells of changes in place."""
        for store, key in places:
            store[key] = leaf
        self.known[id(leaf)] = leaf, leaf._version, places

    def after(self) -> Params:
        """The statistics that the layers leave behind.

        Raises:
            DerivativeError: Something else than torch's own functions has written them.
        """
        after = {name: self.now(name) for name in self.names}
        for name, leaf in after.items():
            version = self.known[id(leaf)][1] if id(leaf) in self.known else None
            if leaf.is_floating_point() and leaf._version != version:
                raise DerivativeError(
                    f"tracking_loss: running statistics must be moved by torch.nn.functional's norms, but {name!r} is "
                    "written by other means, which may have no derivative. Likely causes: a layer of your own, or "
                    "SyncBatchNorm over several processes. Use batch statistics there (`track_running_stats=False`)."
                )
        return after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _NORMS.get(func)
        return func(*args, **(kwargs or {})) if own is None else own(self, *args, **(kwargs or {}))

    def batch_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if running_mean is None or running_var is None or id(running_mean) not in self.known:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if not training:
            return evaluated(input, running_mean, running_var, weight, bias, eps)
        y = F.batch_norm(input, None, None, weight, bias, True, momentum, eps)
        x, axes = _at_least_float32(input), [0, *range(2, input.ndim)]
        self.move(running_mean, x.mean(axes), momentum)
        self.move(running_var, x.var(axes, correction=1), momentum)
        return y

    def torch_batch_norm(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        return self.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def instance_norm(
        self,
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if running_mean is None or running_var is None or id(running_mean) not in self.known:
            return F.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        if not use_input_stats:
            return evaluated(input, running_mean, running_var, weight, bias, eps)
        y = F.instance_norm(input, None, None, weight, bias, True, momentum, eps)
        x, axes = _at_least_float32(input), list(range(2, input.ndim))
        self.move(running_mean, x.mean(axes).mean(0), momentum)
        self.move(running_var, x.var(axes, correction=1).mean(0), momentum)
        return y

    def move(self, old: Tensor, of_batch: Tensor, momentum: float) -> None:
        """(1 − ρ) old + ρ of_batch, in every place of `old`."""
        new = torch.lerp(old, of_batch.to(old.dtype), momentum)
        self.put(new, self.known.pop(id(old))[2])


_NORMS: dict[Any, Any] = {
    F.batch_norm: CarriedStatistics.batch_norm,
    torch.batch_norm: CarriedStatistics.torch_batch_norm,
    F.instance_norm: CarriedStatistics.instance_norm,
}


def evaluated(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """γ (x − μ) / √(σ² + ε) + β a channel (dimension 1), differentiable in all of them.

    As torch's own kernel has it, one factor and one summand a channel.
    """
    shape = [1, -1] + [1] * (x.ndim - 2)
    factor = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
    shift = -mean * factor if bias is None else bias - mean * factor
    return (_at_least_float32(x) * factor.reshape(shape) + shift.reshape(shape)).to(x.dtype)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
