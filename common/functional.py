"""An `nn.Module` and a loss become one pure function of parameters and batch.

Everything that makes a module impure is decided here, once: train or eval, what BatchNorm normalises with, where
dropout's randomness comes from, which buffers may be written (none of the user's).
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

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
            torch.default_generator.manual_seed(seed)
            for index in devices:
                torch.cuda.default_generators[index].manual_seed(seed)
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
    """Gradients on, autocast off, float32 products in float32, and all as before afterwards.

    Initialisers run in the parameters' own precision: no TF32 on a GPU, no bfloat16 inside a CPU's matrix products.
    """
    cudnn = torch.backends.cudnn
    with ExitStack() as stack:
        try:
            if (before := torch.get_float32_matmul_precision()) != "highest":
                stack.callback(torch.set_float32_matmul_precision, before)
                torch.set_float32_matmul_precision("highest")
            if device.type == "cuda":
                stack.callback(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
                cudnn.allow_tf32 = False  # pyright: ignore[reportAttributeAccessIssue]
        except RuntimeError:  # set by the newer `fp32_precision`, with which the older switches refuse to be mixed
            backends: Any = torch.backends
            for switch in (backends.mkldnn.matmul, backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
                stack.callback(setattr, switch, "fp32_precision", switch.fp32_precision)
                switch.fp32_precision = "ieee"
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


# ---------------------------------------------------------------------------------------------- what entry points check
_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"}


def check_bare(model: nn.Module, caller: str) -> None:
    """Refuse what is not a bare `nn.Module`: `torch.func` does not work through wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: `model` must be an nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        where = f" at {name!r}" if name else ""
        kinds = {base.__name__ for base in type(module).__mro__}
        if wrapper := next(iter(kinds & _WRAPPERS), None):
            raise TypeError(
                f"{caller}: `model` must not be wrapped, got {wrapper}{where}. "
                "Pass the module inside it: `model.module`."
            )
        if "OptimizedModule" in kinds:
            raise TypeError(
                f"{caller}: `model` must not be compiled, got the result of torch.compile{where}. "
                "Pass the module inside it: `model._orig_mod`."
            )
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
    """One forward pass before anything is computed: devices agree, labels fit the model, the loss is finite."""
    check_devices(model, batch, caller)
    if loss_fn is classification_loss:
        _check_classification(model, batch, caller, batch_norm)
    value = pure_loss(model, loss_fn, batch_norm=batch_norm)({}, batch)
    if not isinstance(value, Tensor) or value.ndim != 0:
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{caller}: `loss_fn` must return a scalar tensor, the mean over examples, got {got}.")
    if not value.isfinite():
        raise NotFiniteError(
            f"{caller}: the loss must be finite, got {value.item()} at the first batch (step 1). Likely causes: "
            "weights so large that activations overflow (scale them down, or use float64), or a batch that holds NaN."
        )


def logits_of(model: nn.Module, x: Tensor, caller: str, batch_norm: BatchNormMode) -> Tensor:
    """`model(x)`, which the default loss needs to be logits of shape (batch, classes, …)."""
    logits = pure_loss(model, lambda model, x: model(x), batch_norm=batch_norm)({}, x)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{caller}: the default loss needs a model that returns logits (batch, classes), got {got}. "
            "Pass your own `loss_fn(model, batch)`."
        )
    return logits


def _check_classification(model: nn.Module, batch: Batch, caller: str, batch_norm: BatchNormMode) -> None:
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise ValueError(
            f"{caller}: the default loss needs batches (x, y) of two tensors, got {type(batch).__name__}. "
            "Pass your own `loss_fn(model, batch)` for other batches."
        )
    x, y = batch
    logits = logits_of(model, x, caller, batch_norm)
    expected = (logits.shape[0], *logits.shape[2:])
    if not y.is_floating_point() and (y.dtype != torch.int64 or tuple(y.shape) != expected):
        raise ValueError(
            f"{caller}: labels for logits of shape {tuple(logits.shape)} must be int64 of shape {expected}, got "
            f"{y.dtype} of shape {tuple(y.shape)}."
        )
    check_labels(y, logits.shape[1], caller)


def check_labels(y: Tensor, classes: int, caller: str) -> None:
    """Class labels in range, before a GPU meets them, where a bad one ends the process. One synchronisation."""
    if y.is_floating_point():  # class probabilities: cross-entropy checks their shape itself
        return
    low, high = torch.stack(torch.aminmax(y)).tolist()
    if low < 0 or high >= classes:
        raise ValueError(
            f"{caller}: labels must lie in 0 … {classes - 1} for a model with {classes} outputs, got labels from "
            f"{low} to {high}. Check the model's number of classes, or the labels."
        )
