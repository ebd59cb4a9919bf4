"""An `nn.Module` and a loss become one pure function of parameters and batch.

Everything that makes a module impure is decided here, once: train or eval, what BatchNorm normalises with, where
dropout's randomness comes from, which buffers may be written (none of the user's).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from common.exact import exact_derivatives
from common.types import Batch, NotFiniteError, Params, PureLoss, UserLoss

BatchNormMode = Literal["batch", "running"]


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of `model(x)` against class labels y, for `batch = (x, y)`: the default loss.

    Args:
        model: Maps x, shape (batch, …), to logits, shape (batch, classes).
        batch: `(x, y)` with y of shape (batch,), integers in 0 … classes − 1.
    """
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def parameters_of(model: nn.Module) -> Params:
    """The model's parameters, detached, a tied tensor under its first name only. They share the model's memory."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_parameters_(model: nn.Module, params: Params) -> None:
    """Write `params` into the model in place, so that ties, hooks and optimizers' references survive.

    Everything is checked before anything is written.

    Raises:
        ValueError: A name the model does not have, or a shape that differs.
    """
    own = dict(model.named_parameters())
    for name, value in params.items():
        if name not in own:
            raise ValueError(f"load_parameters_: names must be the model's parameters, got {name!r}.")
        if own[name].shape != value.shape:
            raise ValueError(
                f"load_parameters_: {name!r} must have shape {tuple(own[name].shape)}, got {tuple(value.shape)}."
            )
    for name, value in params.items():
        own[name].copy_(value)


def pure_loss(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    *,
    batch_norm: BatchNormMode = "batch",
    exact: bool = True,
    seed: int | None = None,
) -> PureLoss:
    """The loss as a function of parameters and batch that touches nothing but its arguments.

    Parameters absent from the dictionary (frozen ones, say) keep the model's own values. Buffers are cloned for each
    call, and train/eval flags are set on a structural copy: the model passed in is only ever read.

    Args:
        model: Any `nn.Module`, not wrapped by DDP, FSDP, DataParallel or `torch.compile`.
        loss_fn: `loss_fn(model, batch)`, the mean loss over examples, a scalar.
        batch_norm: `"batch"` normalises with the batch's own statistics, `"running"` with the stored ones.
        exact: Re-express fused kernels so that derivatives above the first are right (`common.exact`).
        seed: None turns dropout off; a number turns it on, with this seed at every call.

    Raises:
        TypeError: The model is wrapped.
        ValueError: Unknown `batch_norm`, or a model that cannot be copied.
    """
    check_bare(model, "pure_loss")
    if batch_norm not in ("batch", "running"):
        raise ValueError(f"pure_loss: `batch_norm` must be 'batch' or 'running', got {batch_norm!r}.")
    wrapped = _LossModule(_structural_copy(model), loss_fn)
    _set_modes(wrapped.model, batch_norm, dropout=seed is not None)
    buffers = dict(wrapped.named_buffers())
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})

    def evaluate(params: Params, batch: Batch) -> Tensor:
        state = {f"model.{name}": value for name, value in params.items()}
        state |= {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(wrapped, state, (batch,))

    def seeded(params: Params, batch: Batch) -> Tensor:
        if seed is None:
            return evaluate(params, batch)
        # Inside the function: a recomputation draws the same mask, and the caller's random state is left alone.
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return evaluate(params, batch)

    def loss(params: Params, batch: Batch) -> Tensor:
        if not exact:
            return seeded(params, batch)
        with exact_derivatives():
            return seeded(params, batch)

    return loss


class _LossModule(nn.Module):
    """Puts the whole loss under `functional_call`, so that `loss_fn` may use any method of the model."""

    def __init__(self, model: nn.Module, loss_fn: UserLoss) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


def _structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor, so that flags can be set without touching the original."""
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"pure_loss: the model must be copyable, got {type(model).__name__}, for which deepcopy says: {error} "
            "Old-style hooks such as torch.nn.utils.weight_norm are the usual cause; "
            "use torch.nn.utils.parametrizations instead."
        ) from error


def _set_modes(model: nn.Module, batch_norm: BatchNormMode, *, dropout: bool) -> None:
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train(batch_norm == "batch")
            if batch_norm == "batch":
                # Without buffers there is nothing to update in place, which torch.func would refuse.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None


def uses_batch_statistics(model: nn.Module, batch_norm: BatchNormMode) -> bool:
    """Whether examples of one batch influence each other's loss, which forbids splitting it."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (batch_norm == "batch" or module.running_mean is None)
        for module in model.modules()
    )


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast and TF32 off, all as before afterwards: initialisers run in the parameters' own dtype."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before  # pyright: ignore[reportAttributeAccessIssue]


# ---------------------------------------------------------------------------------------------- what entry points check
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"}


def check_bare(model: nn.Module, caller: str) -> None:
    """Refuse what is not a bare `nn.Module`: `torch.func` does not work through wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: `model` must be an nn.Module, got {type(model).__name__}.")
    kind = next((base.__name__ for base in type(model).__mro__ if base.__name__ in _WRAPPERS), None)
    if kind is not None:
        raise TypeError(
            f"{caller}: `model` must not be wrapped, got {kind}. Pass the module inside it: `model.module`."
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise TypeError(f"{caller}: `model` must not be compiled. Pass the module inside it: `model._orig_mod`.")
    sharded = [
        name for name, p in model.named_parameters() if type(p).__name__ == "DTensor" or hasattr(p, "full_tensor")
    ]
    if sharded:
        raise TypeError(
            f"{caller}: `model` must hold whole tensors, got the sharded tensor {sharded[0]!r} (FSDP). "
            "Initialise before sharding."
        )


def check_devices(model: nn.Module, batch: Batch, caller: str) -> None:
    """The model's parameters and every tensor of the batch must be on one device."""
    devices = {p.device for p in model.parameters()}
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"{caller}: the batch must be on the model's device ({where}), got a tensor on {leaf.device}. "
                "Move one of them with `.to(device)`."
            )


@torch.no_grad()
def check_first_batch(
    model: nn.Module, loss_fn: UserLoss, batch: Batch, caller: str, *, batch_norm: BatchNormMode
) -> None:
    """One forward pass before anything is computed: devices agree, labels are in range, the loss is a finite scalar."""
    check_devices(model, batch, caller)
    if loss_fn is classification_loss:
        _check_labels(model, batch, caller, batch_norm)
    value = pure_loss(model, loss_fn, batch_norm=batch_norm)({}, batch)
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: `loss_fn` must return a scalar tensor, the mean over examples, got {got}.")
    if not value.isfinite():
        raise NotFiniteError(
            f"{caller}: the loss must be finite, got {value.item()} at the first batch (step 1). Likely causes: "
            "weights so large that activations overflow (scale them down, or use float64), or a batch that holds NaN."
        )


def _check_labels(model: nn.Module, batch: Batch, caller: str, batch_norm: BatchNormMode) -> None:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise ValueError(
            f"{caller}: the default loss needs batches (x, y) of two tensors, got {type(batch).__name__}. "
            "Pass your own `loss_fn(model, batch)` for other batches."
        )
    x, y = batch
    logits = pure_loss(model, lambda model, x: model(x), batch_norm=batch_norm)({}, x)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"{caller}: the default loss needs a model that returns logits, got {type(logits).__name__}. "
            "Pass your own `loss_fn(model, batch)`."
        )
    if y.is_floating_point():  # class probabilities: cross-entropy checks their shape itself
        return
    expected = (logits.shape[0], *logits.shape[2:])
    if y.dtype != torch.int64 or tuple(y.shape) != expected:
        raise ValueError(
            f"{caller}: labels for logits of shape {tuple(logits.shape)} must be int64 of shape {expected}, got "
            f"{y.dtype} of shape {tuple(y.shape)}."
        )
    classes = logits.shape[1]
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"{caller}: labels must lie in 0 … {classes - 1} for a model with {classes} outputs, got labels from "
            f"{y.min().item()} to {y.max().item()}. Check the model's number of classes, or the labels."
        )
