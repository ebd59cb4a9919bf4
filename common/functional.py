"""An `nn.Module` and a loss become one pure function of parameters and batch.

Everything that makes a module impure is decided here, once: train or eval, what BatchNorm normalises with, where
dropout's randomness comes from, which buffers may be written (none of the user's).
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from common.batches import map_tensors, tensors_of
from common.batchnorm import CarriedStatistics, Slots, running_statistics
from common.derivatives import micro_batches
from common.diagnosis import explained, label
from common.exact import exact_derivatives
from common.options import check_choice
from common.precision import in_float64
from common.types import Batch, DerivativeError, NotFiniteError, Params, PureLoss, UserLoss

BatchNormMode = Literal["batch", "running"]


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of `model(x)` against class labels y, for `batch = (x, y)`: the default loss.

    Args:
        model: Maps x, shape (batch, …), to logits, shape (batch, classes).
        batch: `(x, y)` with y of shape (batch,), integers in 0 … classes − 1.
    """
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def parameters_of(model: nn.Module, *, dtype: torch.dtype | None = None) -> Params:
    """Copies of the parameters, detached, a tied one under its first name only; of type `dtype`, if it is given."""
    return {name: leaf.detach().to(dtype or leaf.dtype, copy=True) for name, leaf in model.named_parameters()}


@torch.no_grad()
def load_parameters_(model: nn.Module, params: Params) -> None:
    """Write `params` into the model in place, so that ties, hooks and optimizers' references survive.

    All of them or, on any error, none.

    Raises:
        ValueError: A name the model does not have, or a shape that differs.
        RuntimeError: A parameter that cannot be written (an expanded view, say).
    """
    own = dict(model.named_parameters())
    for name, value in params.items():
        if name not in own:
            raise ValueError(f"load_parameters_: names must be the model's parameters, got {name!r}.")
        if own[name].shape != value.shape:
            raise ValueError(
                f"load_parameters_: {name!r} must have shape {tuple(own[name].shape)}, got {tuple(value.shape)}."
            )
    with unchanged_on_error(own[name] for name in params):
        for name, value in params.items():
            own[name].copy_(value)


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """Every name of each parameter, several where it is tied, by its first."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    names: dict[str, list[str]] = {name: [] for name in first.values()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[first[id(parameter)]].append(name)
    return names


@contextmanager
def unchanged_on_error(leaves: Iterable[Tensor]) -> Iterator[None]:
    """On any error within, an interrupt too, the tensors have the values that they had before; but for sparse ones."""
    before = [(leaf, leaf.detach().clone()) for leaf in leaves if leaf.layout is torch.strided]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for leaf, value in before:
                put_back_(leaf, value)
        raise


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; afterwards each module is in the mode that it was in."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was in training:
            module.training = was


def put_back_(leaf: Tensor, value: Tensor) -> None:
    """Write only what has changed, bit for bit: a tensor that cannot be written (an expanded view) has not."""
    if not leaf.is_meta and not torch.equal(_bits(leaf), _bits(value)):
        leaf.copy_(value)


def _bits(leaf: Tensor) -> Tensor:
    return leaf.detach().contiguous().reshape(-1).view(torch.uint8)


def pure_loss(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    *,
    batch_norm: BatchNormMode = "batch",
    exact: bool = True,
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    order: Literal[2, 3] = 3,
) -> PureLoss:
    """The loss as a function of parameters and batch that touches nothing but its arguments.

    Parameters absent from the dictionary (frozen ones, say) keep the model's own values. Train/eval flags are set on a
    structural copy, and each call gets copies of the buffers and of whatever parameters share the model's memory: the
    model passed in is only ever read. Calls may come from several threads; those of one loss wait for one another.

    Args:
        model: Any `nn.Module`, not wrapped by DDP, FSDP, DataParallel or `torch.compile`.
        loss_fn: `loss_fn(model, batch)`, the mean loss over examples, a scalar.
        batch_norm: `"batch"` normalises with the batch's own statistics, `"running"` with the stored ones.
        exact: Re-express fused kernels so that derivatives above the first are right (`common.exact`).
        seed: None turns dropout off; a number turns it on, with this seed at every call. For a mask of its own at each
            step, `functools.partial(loss, seed=step)`.
        dtype: `torch.float64` evaluates in double precision, whatever the model's own is and whatever casts its layers
            make; parameters passed in keep their type, and so do their gradients. None: as the model is.
        order: 2 promises at most two reverse-mode derivatives, for which `exact` may keep torch's own norms; 3: any.

    Returns:
        `loss(params, batch)`. With `batch_norm="running"` also `loss(params, batch, statistics=S)`, where S takes the
        place of the stored statistics, all of those that `common.batchnorm.fresh_statistics` names: differentiable in
        them too.

    Raises:
        TypeError: The model is wrapped, quantised, or not yet initialised (lazy); a loss of another form.
        ValueError: Unknown `batch_norm`, `dtype` or `order`, or a model that cannot be copied. When called: a name that
            is none of the model's parameters, or statistics of other names than the model's.
        DerivativeError: When called: a layer does what `torch.func` cannot follow, or changes a parameter in place.
    """
    check_bare(model, "pure_loss")
    check_loss(loss_fn, "pure_loss")
    if batch_norm not in ("batch", "running"):
        raise ValueError(f"pure_loss: `batch_norm` must be 'batch' or 'running', got {batch_norm!r}.")
    if dtype not in (None, torch.float64):
        raise ValueError(f"pure_loss: `dtype` must be None or torch.float64, got {dtype}.")
    check_choice("pure_loss", "order", order, (2, 3))
    call = _pure_call(model, loss_fn, batch_norm, exact=exact, seed=seed, dtype=dtype, order=order)

    def loss(params: Params, batch: Batch, *, seed: int | None = seed, statistics: Params | None = None) -> Tensor:
        if statistics is not None and batch_norm != "running":
            raise ValueError(
                "pure_loss: statistics at a call need a loss made with batch_norm='running', got batch_norm="
                f"{batch_norm!r}. A loss that moves them is `tracking_loss`."
            )
        return call(params, batch, seed, statistics)[0]

    return loss


TrackingLoss = Callable[..., tuple[Tensor, Params]]
"""`loss(params, batch, statistics=S)`: the loss of a step of training, and the running statistics after it."""


def tracking_loss(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    *,
    exact: bool = True,
    seed: int | None = None,
    order: Literal[2, 3] = 3,
) -> TrackingLoss:
    """The loss in training mode together with the running statistics that its norms leave behind, as a pure function.

    The value is that of `pure_loss(…, batch_norm="batch")`, the statistics are what torch's layers would have written:
    unbiased variance, the layer's momentum, its cumulative average where that is None, one update a use. Both are
    differentiable, in parameters and statistics. Layers that track none have batch statistics, in evaluation too.

    Args:
        model: As `pure_loss`; its own statistics are neither read nor written.
        loss_fn: As `pure_loss`.
        exact: As `pure_loss`.
        seed: As `pure_loss`.
        order: As `pure_loss`.

    Returns:
        `loss(params, batch, statistics=S)` ↦ (L, S′), and with `seed` as `pure_loss`'s. S has all the names of
        `common.batchnorm.fresh_statistics`, to start from; `pure_loss(…, batch_norm="running")` evaluates with it.

    Raises:
        TypeError: As `pure_loss`.
        ValueError: A model that cannot be copied. When called: names that are not the model's.
        DerivativeError: As `pure_loss`; and when called: a layer writes its statistics by other means than torch's
            functions (one of your own, or SyncBatchNorm over several processes).

    Example:
        >>> from common.batchnorm import fresh_statistics
        >>> model, x = nn.BatchNorm1d(1), torch.tensor([[0.0], [2.0]])
        >>> loss = tracking_loss(model, lambda model, x: model(x).square().mean())
        >>> L, S = loss({}, x, statistics=fresh_statistics(model))
        >>> S["running_mean"], S["running_var"]  # 0.9 · 0 + 0.1 · 1, 0.9 · 1 + 0.1 · 2
        (tensor([0.1000]), tensor([1.1000]))
    """
    check_bare(model, "tracking_loss")
    check_loss(loss_fn, "tracking_loss")
    call = _pure_call(model, loss_fn, "tracked", exact=exact, seed=seed, dtype=None, order=order)

    def loss(params: Params, batch: Batch, *, statistics: Params, seed: int | None = seed) -> tuple[Tensor, Params]:
        return call(params, batch, seed, statistics)

    return loss


def _pure_call(
    model: nn.Module,
    loss_fn: UserLoss,
    mode: Literal["batch", "running", "tracked"],
    *,
    exact: bool,
    seed: int | None,
    dtype: torch.dtype | None,
    order: Literal[2, 3],
) -> Callable[[Params, Batch, int | None, Params | None], tuple[Tensor, Params]]:
    """(params, batch, seed, statistics) ↦ the loss and, in mode "tracked", the statistics after it."""
    caller = "tracking_loss" if mode == "tracked" else "pure_loss"
    wrapped = _LossModule(structural_copy(model), loss_fn)
    _set_modes(wrapped.model, mode, dropout=seed is not None)
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    memory = {_address(leaf) for leaf in own.values()} - {0}
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    # every name of every parameter, those of a tied one leading to its first
    names = {name: first[id(leaf)] for name, leaf in model.named_parameters(remove_duplicate=False)}
    # where the copy keeps its tensors: parameters by their first names, buffers by themselves
    places = [
        (store, key, leaf)
        for part in wrapped.modules()
        for store in (part._parameters, part._buffers)
        for key, leaf in store.items()
        if leaf is not None
    ]
    buffers = {id(leaf): leaf for leaf in wrapped.buffers()}
    tracked = running_statistics(model)
    slots: dict[str, Slots] = {
        name: [(store, key) for store, key, leaf in places if leaf is buffer] for name, buffer in tracked.items()
    }
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    dropout = seed is not None
    proven = False  # that a call leaves parameters as they are: until then it gets copies of all of them
    # One call at a time: parameters are put into one structural copy. A seed is torch's global generator's.
    lock = _SEEDING if dropout else threading.RLock()

    def cast(leaf: Tensor) -> Tensor:
        return leaf if dtype is None or not leaf.is_floating_point() else leaf.to(dtype)

    def call(params: Params, batch: Batch, seed: int | None, statistics: Params | None) -> tuple[Tensor, Params]:
        nonlocal proven
        if (seed is not None) != dropout:
            raise ValueError(
                f"{caller}: a seed at a call needs a loss made with one (dropout on), and none without, got {seed}."
            )
        if unknown := params.keys() - names.keys():
            raise ValueError(f"{caller}: names must be the model's parameters, got {min(unknown)!r}.")
        if statistics is not None and (odd := statistics.keys() ^ tracked.keys()):
            raise ValueError(
                f"{caller}: `statistics` must have the names of the model's own, got {min(odd)!r} "
                f"{'more' if min(odd) in statistics else 'less'}. `common.batchnorm.fresh_statistics` has them."
            )
        originals = own | {names[name]: value for name, value in params.items()}
        originals = {name: cast(leaf) for name, leaf in originals.items()}
        given = {
            name: leaf.clone() if not proven or _address(leaf) in memory else leaf for name, leaf in originals.items()
        }
        versions = {name: leaf._version for name, leaf in given.items()}
        state = {key: cast(buffer.clone()) for key, buffer in buffers.items()}
        state |= {key: given[name] for key, name in first.items()}
        if statistics is not None:
            state |= {id(leaf): cast(statistics[name].clone()) for name, leaf in tracked.items()}
        batch = batch if dtype is None else map_tensors(cast, batch)
        # Every context is entered in here: a recomputation during backward runs outside of any that surrounds the call.
        with lock, ExitStack() as stack:
            if seed is not None:
                # The same mask in a recomputation, and the caller's random state left alone.
                stack.enter_context(torch.random.fork_rng(devices))
                torch.default_generator.manual_seed(seed)
                for index in devices:
                    torch.cuda.default_generators[index].manual_seed(seed)
            if exact:
                stack.enter_context(exact_derivatives(order))
            if dtype is not None:
                stack.enter_context(in_float64())
            with suppress(RuntimeError):  # where hooks surround the call, as in a recomputation of all of it, they stay
                # for activation checkpointing, which during backward would find the copy's own tensors again
                stack.enter_context(torch.autograd.graph.disable_saved_tensors_hooks(_NO_RECOMPUTATION))
            stack.callback(_put, places, {})
            _put(places, state)
            carried = None if statistics is None else stack.enter_context(CarriedStatistics(slots))
            with explained(wrapped):
                value = wrapped(batch)
            after = carried.after() if carried is not None and mode == "tracked" else {}
        for name, leaf in given.items():
            if leaf._version != versions[name] or not (proven or _same_values(leaf, originals[name])):
                raise DerivativeError(
                    f"{caller}: a forward pass must leave parameters as they are, but {name!r} "
                    "is changed in place. Likely causes: weights clipped or renormalised in `forward`, or an embedding "
                    "with `max_norm`. Do it outside of the model, or by torch.nn.utils.parametrize."
                )
        proven = True
        return value, after

    return call


_SEEDING = threading.RLock()
_NO_RECOMPUTATION = "saved tensor hooks are off in a pure call: its parameters are gone when activations are recomputed"


def _put(places: list[tuple[dict, str, Tensor]], state: dict[int, Tensor]) -> None:
    """Put tensors in the place of a module's own, which `state` knows by identity; those that it lacks, back.

    As `torch.func.functional_call`, but for ties, which `state` has resolved, and for its cost on every call.
    """
    for store, key, leaf in places:
        store[key] = state.get(id(leaf), leaf)


def _address(leaf: Tensor) -> int:
    """Where a tensor's memory begins, beneath whatever transforms wrap it; 0 where it has none of its own."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(leaf):
        leaf = functorch.get_unwrapped(leaf)
    return leaf.untyped_storage().data_ptr() if leaf.device.type != "meta" else 0


@torch.no_grad()
def _same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, beneath whatever transforms wrap them; NaN equals NaN."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(a) and functorch.is_functorch_wrapped_tensor(b):
        a, b = functorch.get_unwrapped(a), functorch.get_unwrapped(b)
    return torch.equal(a, b) or bool((a.isnan() & b.isnan() | (a == b)).all())


class _LossModule(nn.Module):
    """Model and loss as one module, so that `loss_fn` may be a module with buffers too."""

    def __init__(self, model: nn.Module, loss_fn: UserLoss) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Batch) -> Tensor:
        return self.loss_fn(self.model, batch)


def structural_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor, so that flags can be set without touching the original."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        # Results of a computation kept as attributes, which deepcopy refuses: the weight that an old-style
        # torch.nn.utils.weight_norm leaves for its hook to renew, say.
        shared |= {id(v): v.detach().clone() for v in vars(module).values() if isinstance(v, Tensor) and not v.is_leaf}
    try:
        return copy.deepcopy(model, shared)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"pure_loss: the model must be copyable, got {type(model).__name__}, for which deepcopy says: {error} "
            "Attributes that hold locks, files or results of a computation are the usual cause."
        ) from error


def _set_modes(model: nn.Module, mode: Literal["batch", "running", "tracked"], *, dropout: bool) -> None:
    model.train(dropout)
    for module in model.modules():
        if isinstance(module, _NormBase):
            module.train(mode != "running")
            if mode == "batch":
                # Without buffers there is nothing to update in place, which torch.func would refuse.
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
        if isinstance(module, nn.RNNBase):
            # cuDNN's layout moves the weights, which are the caller's, and asks for addresses that they do not have
            # under torch.func. Without `exact` cuDNN compacts them at each call, of which torch warns.
            module.flatten_parameters = lambda: None
        # Training moves the power iteration, a step that is not differentiated: derivatives would not be the loss's.
        if isinstance(module, _SpectralNorm):
            module.eval()
        for key, hook in module._forward_pre_hooks.items():
            if isinstance(hook, SpectralNorm):
                module._forward_pre_hooks[key] = partial(_renew_weight, hook)


def _renew_weight(hook: SpectralNorm, module: nn.Module, _: Any) -> None:
    setattr(module, hook.name, hook.compute_weight(module, do_power_iteration=False))


def uses_batch_statistics(model: nn.Module, batch_norm: BatchNormMode) -> bool:
    """Whether examples of one batch influence each other's loss, which forbids splitting it."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and (batch_norm == "batch" or module.running_mean is None)
        for module in model.modules()
    )


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
        if "quantized" in type(module).__module__.split("."):
            raise TypeError(
                f"{caller}: `model` must not be quantised, got {type(module).__name__}{where}. "
                "Initialise the float model and quantise afterwards."
            )
    for what, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, leaf in tensors:
            if is_lazy(leaf):
                raise TypeError(
                    f"{caller}: `model` must have its shapes, got the uninitialised {what} {name!r} of a lazy module. "
                    "Run one forward pass first."
                )
    sharded = [
        name for name, p in model.named_parameters() if type(p).__name__ == "DTensor" or hasattr(p, "full_tensor")
    ]
    if sharded:
        raise TypeError(
            f"{caller}: `model` must hold whole tensors, got the sharded tensor {sharded[0]!r} (FSDP). "
            "Initialise before sharding."
        )


def check_loss(loss_fn: object, caller: str) -> None:
    """A function of model and batch: the slips are a criterion of torch's, and batches in its place."""
    if type(loss_fn).__module__ == nn.modules.loss.__name__:
        name = type(loss_fn).__name__
        raise TypeError(
            f"{caller}: `loss_fn` must be a function of model and batch, got {name}, a function of outputs and labels. "
            "Pass `lambda model, batch: criterion(model(batch[0]), batch[1])`."
        )
    if not callable(loss_fn):
        raise TypeError(
            f"{caller}: `loss_fn` must be a function of model and batch, got {type(loss_fn).__name__}. Batches come "
            "after it."
        )


def check_apart(model: nn.Module, caller: str) -> None:
    """No trainable parameter may overlap another in memory: two that share it are tied without torch's knowledge.

    Neighbours in one piece of memory, as cuDNN and optimizers lay weights out, do not overlap.
    """
    by_memory: dict[int, list[tuple[int, int, str, Tensor]]] = {}
    for name, leaf in model.named_parameters():
        if leaf.layout is torch.strided and not leaf.is_meta and leaf.numel():
            begin = int(leaf.storage_offset())
            end = begin + _reach(leaf) + 1
            own = by_memory.setdefault(leaf.untyped_storage().data_ptr(), [])
            own.append((begin * leaf.element_size(), end * leaf.element_size(), name, leaf))
    for neighbours in by_memory.values():
        reaching: list[tuple[int, int, str, Tensor]] = []
        for begin, end, name, leaf in sorted(neighbours, key=lambda own: own[:2]):
            reaching = [other for other in reaching if other[1] > begin]
            for _, _, other_name, other in reaching:
                if (leaf.requires_grad or other.requires_grad) and _share_entries(other, leaf):
                    raise ValueError(
                        f"{caller}: parameters must not share memory, got {other_name!r} and {name!r}. To tie them "
                        "assign one nn.Parameter to both names; to keep them apart clone one."
                    )
            reaching.append((begin, end, name, leaf))


def _reach(leaf: Tensor) -> int:
    """How far in memory a tensor's last entry is from its first."""
    return sum((size - 1) * int(step) for size, step in zip(leaf.shape, leaf.stride(), strict=True))


def _share_entries(a: Tensor, b: Tensor) -> bool:
    """Of two tensors in one piece of memory that reach into each other, whether an entry is both's."""
    if a.element_size() != b.element_size():
        return True
    first = min(a.storage_offset(), b.storage_offset())
    taken = []
    for leaf in (a, b):
        shape = [size if step else 1 for size, step in zip(leaf.shape, leaf.stride(), strict=True)]
        begin = leaf.storage_offset() - first
        mask = torch.zeros(begin + _reach(leaf) + 1, dtype=torch.bool, device="cpu")
        mask.as_strided(shape, leaf.stride(), begin).fill_(True)
        taken.append(mask)
    length = min(map(len, taken))
    return bool((taken[0][:length] & taken[1][:length]).any())


def check_devices(model: nn.Module, batch: Batch, caller: str) -> None:
    """The model's parameters and every tensor of the batch must be on one device."""
    devices = {p.device for p in model.parameters()}
    for leaf in tensors_of(batch):
        if leaf.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            may_be_lengths = leaf.ndim == 1 and not leaf.is_floating_point()
            raise ValueError(
                f"{caller}: the batch must be on the model's device ({where}), got a tensor on {leaf.device}. "
                "Move one of them with `.to(device)`"
                + (
                    ", and lengths that torch wants on the CPU back by `.cpu()` in `loss_fn`."
                    if may_be_lengths
                    else "."
                )
            )


def check_next_batch(model: nn.Module, batch: Batch, classes: int | None, caller: str) -> Batch:
    """A batch after the first: its device, and its labels where their number of classes is known."""
    check_devices(model, batch, caller)
    # On a GPU labels are checked at the first step alone: each check waits for the device.
    if classes is not None and batch[1].device.type == "cpu":
        check_labels(batch[1], classes, caller)
    return batch


@torch.no_grad()
def check_first_batch(
    model: nn.Module,
    loss_fn: UserLoss,
    batch: Batch,
    caller: str,
    *,
    batch_norm: BatchNormMode,
    seed: int | None = None,
    exact: bool = True,
    micro_batch_size: int | None = None,
) -> int | None:
    """Before anything is computed: devices agree, labels fit, the loss is one finite number, and the same twice.

    Three forward passes without a graph, or two where the loss is the user's; `micro_batch_size` examples at a time.

    Returns:
        The number of classes, where the loss is `classification_loss`.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            f"{caller}: it must be called outside of torch.inference_mode, where nothing can be differentiated, got a "
            "call within. torch.no_grad is no hindrance."
        )
    check_devices(model, batch, caller)
    classes = None
    if loss_fn is classification_loss:
        classes = _check_classification(model, batch, caller, batch_norm, micro_batch_size)
    of_piece = pure_loss(model, loss_fn, batch_norm=batch_norm, seed=seed, exact=exact)

    def loss() -> Tensor:
        total: Tensor | None = None
        for weight, piece in micro_batches(batch, micro_batch_size):
            value = of_piece({}, piece)
            if not isinstance(value, Tensor) or value.ndim != 0:
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{caller}: `loss_fn` must return a scalar tensor, the mean over examples, got {got}.")
            total = weight * value if total is None else total + weight * value
        assert total is not None
        return total

    value = loss()
    if not value.isfinite():
        raise NotFiniteError(
            f"{caller}: the loss must be finite, got {value.item()} at the first batch (step 1). Likely causes: "
            "weights so large that activations overflow (scale them down, or use float64), or a batch that holds NaN."
        )
    again = loss()
    if not torch.isclose(value, again, rtol=1e-5, atol=1e-7):  # on a GPU equal up to the order of sums
        piece = next(micro_batches(batch, micro_batch_size))[1]
        raise ValueError(
            f"{caller}: the loss must be the same at every evaluation, got {value.item():g} and {again.item():g}: "
            f"{_first_to_differ(model, loss_fn, piece, batch_norm)} draws random numbers in evaluation mode. "
            "Turn them off there (`pure_loss` and `check_derivatives` also take a `seed`)."
        )
    return classes


def _first_to_differ(model: nn.Module, loss_fn: UserLoss, batch: Batch, batch_norm: BatchNormMode) -> str:
    """The innermost layer whose output differs between two evaluations."""
    outputs: list[list[tuple[str, list[Tensor]]]] = []

    def recording(model: nn.Module, batch: Batch) -> Tensor:
        outputs.append([])
        handles = [
            module.register_forward_hook(lambda m, _, y, n=name: outputs[-1].append((label(n, m), tensors_of(y))))
            for name, module in model.named_modules()
        ]
        try:
            return loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    for _ in range(2):
        pure_loss(model, recording, batch_norm=batch_norm)({}, batch)
    for (name, first), (_, second) in zip(*outputs, strict=False):
        if not all(torch.allclose(a, b, equal_nan=True) for a, b in zip(first, second, strict=True)):
            return name
    return "the loss function, or a model that it calls in the place of the one that it is given,"


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


def _check_classification(
    model: nn.Module, batch: Batch, caller: str, batch_norm: BatchNormMode, micro_batch_size: int | None
) -> int:
    """How many classes the logits have."""
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        raise ValueError(
            f"{caller}: the default loss needs batches (x, y) of two tensors, got {type(batch).__name__}. "
            "Pass your own `loss_fn(model, batch)` for other batches."
        )
    x, y = batch
    logits = logits_of(model, next(micro_batches(x, micro_batch_size))[1], caller, batch_norm)
    expected = (logits.shape[0] if micro_batch_size is None else len(x), *logits.shape[2:])
    if not y.is_floating_point() and (y.dtype != torch.int64 or tuple(y.shape) != expected):
        raise ValueError(
            f"{caller}: labels for logits of shape {(expected[0], *logits.shape[1:])} must be int64 of shape "
            f"{expected}, got {y.dtype} of shape {tuple(y.shape)}."
        )
    check_labels(y, logits.shape[1], caller)
    return logits.shape[1]


def check_labels(y: Tensor, classes: int, caller: str) -> None:
    """Class labels in range, before a GPU meets them, where a bad one ends the process. One synchronisation."""
    if y.is_floating_point():  # class probabilities: cross-entropy checks their shape itself
        return
    low, high = torch.stack(torch.aminmax(y)).tolist()
    if low < 0 or high >= classes:
        raise ValueError(
            f"{caller}: labels must lie in 0 … {classes - 1} for a model with {classes} outputs, got labels from "
            f"{low} to {high}. Check the model's number of classes, or the labels. Labels that are to be ignored need "
            "a `loss_fn` of your own."
        )
