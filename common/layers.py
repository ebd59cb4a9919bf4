"""Layer by layer, what one forward and one backward pass show: scales of weights, activations and gradients.

Nothing of the user's is written: the passes go through `pure_loss`, whose copy of the module tree carries the hooks.
Activation functions are watched wherever they are called, as modules and as functions, and their slope is taken by
differentiating them: an entry with (almost) no slope passes no gradient, whatever the function is called.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from common.batches import tensors_of
from common.functional import BatchNormMode, classification_loss, pure_loss
from common.initializers import CONVOLUTIONS, EMBEDDINGS, NORMS, TRANSPOSED, WEIGHT_LAYERS
from common.networks.layers import ACTIVATIONS
from common.scales import kinds_of
from common.types import Batch, UserLoss

SLOPE_OFF = 0.0025
"""An activation with a slope up to this is off: a hundredth of the sigmoid's steepest, a four-hundredth of ReLU's.
The sigmoid is there beyond |z| = 6, tanh beyond 3.7, GELU below −3.5."""

KEYS = ("name", "kind", "weight_norm", "activation_mean", "activation_std", "gradient_norm", "dead_share")
"""What every row of `layer_scales` has, besides what `Layers` explains."""

_CHANNELS_FIRST = (*CONVOLUTIONS, *TRANSPOSED, nn.modules.batchnorm._NormBase, nn.GroupNorm)
_ACTIVATION_MODULES = tuple(kind for kind in ACTIVATIONS.values() if kind is not nn.Identity)
# Activations that are written out in other operations there, which by themselves would be misread.
_ACTIVATION_LIBRARIES = ("transformers.activations", "timm.layers.activations")
_FUNCTION_NAMES = (
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "relu6", "selu",
    "sigmoid", "silu", "softplus", "softsign", "tanh",
)  # fmt: skip
_FUNCTIONS: dict[Any, str] = {
    getattr(owner, name + ending): name
    for owner in (torch, torch.Tensor, F)
    for name in _FUNCTION_NAMES
    for ending in ("", "_")
    if hasattr(owner, name + ending)
}


@dataclass(frozen=True)
class Layers:
    """What one batch shows of a model.

    Attributes:
        loss: L.
        gradient_norm: ‖∇L‖₂ over every trainable parameter.
        rows: A dictionary a layer or activation, in the order of the forward pass, layers that it does not call last:

            - `name`, `kind`: of the module (of a function, the module that calls it and the function).
            - `follows`: of an activation, the last layer with parameters before it.
            - `weight_norm`: ‖W‖_F over the layer's weights, biases left out.
            - `kaiming_ratio`: ‖W‖_F over what He's rule for ReLU (fan-in) gives on average, √(2 · out).
            - `activation_mean`, `activation_std`: of all entries of the output, over the batch.
            - `gradient_norm`: ‖∂L/∂θ‖₂ over the layer's own parameters.
            - `output_gradient_norm`: ‖∂L/∂output‖₂ over the batch, the latest call's; None where no gradient arrives.
            - `dead_share`: of an activation, the share of its `units` (channels, or features) whose slope is at most
              `SLOPE_OFF` for every example and position.
            - `dead_size`: the mean over those units of their largest |output|: 0 where they are dead, near 1 where a
              tanh is saturated.
            - `called`: whether the forward pass runs it.

            A number that a row has no use for is None.
        without_gradient: Trainable parameters whose gradient is not there or nothing, and which of these it is:
            "unused" (its layer is never called, or does not use it), "detached" (its layer is called, but no
            path that can be differentiated leads from its output to the loss), "no path" (either of the two, of a
            parameter that belongs to no layer, such as a class token) and "zero" (every entry is exactly 0).
        frozen: Parameters that do not require a gradient.
        entries: Numbers in all outputs: how much a graph of the pass holds, roughly.
    """

    loss: float
    gradient_norm: float
    rows: list[dict[str, Any]]
    without_gradient: dict[str, str]
    frozen: list[str]
    entries: int


def layer_scales(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batch: Batch = None,
    *,
    batch_norm: BatchNormMode = "batch",
) -> list[dict[str, Any]]:
    """The rows of `examine_layers`: name, kind, and scales of weight, activation and gradient for every layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> rows = layer_scales(model, batch=(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])))
        >>> [(row["name"], row["kind"]) for row in rows]
        [('0', 'Linear'), ('1', 'ReLU'), ('2', 'Linear')]
    """
    return examine_layers(model, loss_fn, batch, batch_norm=batch_norm).rows


def examine_layers(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batch: Batch = None,
    *,
    batch_norm: BatchNormMode = "batch",
) -> Layers:
    """One forward and one backward pass of a batch, watched; dropout is off.

    The model is only read, and the global random state is as before.

    Args:
        model: Any bare `nn.Module`.
        loss_fn: `loss_fn(model, batch)`, the mean over examples.
        batch: On the model's device.
        batch_norm: As in `pure_loss`.

    Raises:
        TypeError: A wrapped, quantised or lazy model.
        ValueError: No trainable parameter, or a loss that is no scalar.
    """
    trainable = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError(
            f"examine_layers: `model` must have a trainable parameter, got {type(model).__name__} without one. "
            "Is everything frozen (requires_grad=False)?"
        )
    watch = _Watch()

    def watched(model: nn.Module, batch: Batch) -> Tensor:
        with watch.over(model):
            return loss_fn(model, batch)

    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.enable_grad(), torch.random.fork_rng(devices):
        value = pure_loss(model, watched, batch_norm=batch_norm, exact=False)(trainable, batch)
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"examine_layers: `loss_fn` must return a scalar, the mean over examples, got {got}.")
        found = [None] * len(trainable)
        if value.requires_grad:
            found = torch.autograd.grad(value, list(trainable.values()), allow_unused=True)
    gradients = dict(zip(trainable, found, strict=True))
    return Layers(
        loss=value.item(),
        gradient_norm=_norm([g for g in gradients.values() if g is not None]),
        rows=_rows(model, watch, gradients),
        without_gradient=_without_gradient(model, watch, gradients),
        frozen=[name for name, p in model.named_parameters() if not p.requires_grad],
        entries=sum(seen.count for seen in watch.seen.values()),
    )


# ---------------------------------------------------------------------------------------------- which modules, and how
def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold parameters and work by themselves, by name: weight layers, norms, and leaves with any."""
    found: dict[str, nn.Module] = {}
    attention: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(f"{path}." if path else "") for path in attention):
            continue  # its output projection is used by attention itself, without a call
        if isinstance(module, nn.MultiheadAttention):
            attention.append(name)
        is_leaf = not any(True for _ in module.children())
        if any(True for _ in module.parameters()) and (
            is_leaf or isinstance(module, (*WEIGHT_LAYERS, *EMBEDDINGS, *NORMS))
        ):
            found[name] = module
    return found


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an elementwise activation of torch's, transformers' or timm's."""
    return isinstance(module, _ACTIVATION_MODULES) or type(module).__module__.startswith(_ACTIVATION_LIBRARIES)


def fan_in(layer: nn.Module, W: Tensor) -> int | None:
    """How many inputs one output of W sums over; None where W is no matrix or convolution of a layer that is known."""
    if isinstance(layer, CONVOLUTIONS):
        return math.prod(W.shape[1:])
    if isinstance(layer, TRANSPOSED):
        return W.shape[0] * math.prod(W.shape[2:]) // layer.groups
    kind = kinds_of(layer).get("weight")
    if W.ndim == 2 and (kind == "linear" or isinstance(layer, WEIGHT_LAYERS)):
        # transformers' Conv1D holds its matrix the other way round
        return W.shape[0] if type(layer).__name__ == "Conv1D" else W.shape[1]
    return None


def _weights(layer: nn.Module) -> list[Tensor]:
    """The layer's weights as its forward pass sees them, biases left out."""
    if computed := getattr(layer, "parametrizations", None):
        return [getattr(layer, name).detach() for name in computed if "bias" not in name]
    return [p.detach() for name, p in layer.named_parameters() if "bias" not in name.rpartition(".")[2]]


def _kaiming_ratio(layer: nn.Module, weights: Sequence[Tensor]) -> float | None:
    """‖W‖_F / √(Σ 2 · numel / fan_in): 1 on average under He's rule for ReLU."""
    expected = 0.0
    for W in weights:
        if (fan := fan_in(layer, W)) is None:
            return None
        if W.numel() == 0:
            continue
        expected += 2 * W.numel() / fan
    return _norm(weights) / math.sqrt(expected) if expected else None


def _norm(tensors: Sequence[Tensor]) -> float:
    """‖·‖₂ over every entry of all of them."""
    return (
        torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in tensors])).item() if tensors else 0.0
    )


# ---------------------------------------------------------------------------------------------- what is seen of a pass
@dataclass
class _Seen:
    """What one layer or activation puts out, summed over its calls."""

    name: str
    kind: str
    layer: nn.Module | None = None
    follows: str | None = None
    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    gradient: Tensor | None = None
    off: Tensor | None = None
    largest: Tensor | None = None

    def add(self, output: Tensor) -> None:
        """The moments of one more output, whose gradient will be told to us."""
        values = output.detach().double()
        self.count += values.numel()
        self.total = self.total + values.sum()
        self.squares = self.squares + values.square().sum()
        if output.requires_grad:
            # before an in-place activation overwrites the output, so that the gradient is of what is seen here
            output.register_hook(self._receive)

    def _receive(self, gradient: Tensor) -> None:
        self.gradient = torch.linalg.vector_norm(gradient.detach())

    def add_units(self, off: Tensor, size: Tensor) -> None:
        """Units that are off in this call, and their largest |output|; across calls both must be so in each."""
        self.off = off if self.off is None else self.off & off
        self.largest = size if self.largest is None else torch.maximum(self.largest, size)

    def row(self) -> dict[str, Any]:
        mean = std = None
        if self.count:
            mean = float(self.total) / self.count
            variance = float(self.squares) / self.count - mean**2
            std = math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else variance
        weights = [] if self.layer is None else _weights(self.layer)
        dead = None if self.off is None else self.off.double().mean().item()
        return {
            "name": self.name,
            "kind": self.kind,
            "follows": self.follows,
            "weight_norm": _norm(weights) if weights else None,
            "kaiming_ratio": None if self.layer is None else _kaiming_ratio(self.layer, weights),
            "activation_mean": mean,
            "activation_std": std,
            "gradient_norm": None,
            "output_gradient_norm": None if self.gradient is None else self.gradient.item(),
            "units": None if self.off is None else len(self.off),
            "dead_share": dead,
            "dead_size": self.largest[self.off].mean().item() if dead and self.largest is not None else None,
            "called": self.count > 0,
        }


@dataclass
class _Watch:
    """One forward pass: which module runs, what each layer and each activation puts out."""

    seen: dict[tuple, _Seen] = field(default_factory=dict)
    called: set[str] = field(default_factory=set)
    running: list[str] = field(default_factory=list)
    inside: int = 0  # activations that run: what they call is theirs
    follows: str | None = None
    channel: int = -1  # the dimension of units
    last: _Seen = field(default_factory=lambda: _Seen("", ""))  # the activation that runs

    def of(self, name: str, layer: nn.Module) -> list[_Seen]:
        """What was seen of a layer; of an activation with parameters, wherever it stands."""
        return [seen for key, seen in self.seen.items() if key[0] == name and _tells_of(key, layer)]

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        layers = layers_of(model)
        with ExitStack() as stack:
            for name, module in model.named_modules():
                handles = (
                    module.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True),
                    module.register_forward_hook(partial(self._end, name, name in layers)),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(_Functions(self))
            yield

    def _begin(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.running.append(name)
        self.called.add(name)
        if is_activation(module):
            if self.inside == 0:
                self._activation(name, type(module).__name__, module.forward, tensors_of((args, kwargs)))
            self.inside += 1

    def _end(self, name: str, is_layer: bool, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()
        outputs = [leaf for leaf in tensors_of(output) if leaf.is_floating_point()]
        if is_activation(module):  # one with parameters, such as PReLU, is a layer in `_rows`
            self.inside -= 1
            if self.inside == 0 and outputs:
                self.last.add(outputs[0])
        elif is_layer and outputs:
            self.seen.setdefault((name,), _Seen(name or "model", type(module).__name__)).add(outputs[0])
            if not isinstance(module, EMBEDDINGS):
                self.follows = name
                self.channel = 1 if isinstance(module, _CHANNELS_FIRST) else -1

    def function(self, func: Callable[..., Tensor], args: tuple, kwargs: dict) -> Any:
        """An activation function's call, wherever it stands."""
        self._activation(
            self.running[-1] if self.running else "",
            _FUNCTIONS[func],
            lambda z: func(z, *args[1:], **kwargs),
            [args[0]],
        )
        self.inside += 1
        try:
            output = func(*args, **kwargs)
        finally:
            self.inside -= 1
        self.last.add(output)
        return output

    def _activation(self, name: str, kind: str, phi: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> None:
        """Slope and size of an activation, unit by unit, taken before the call, which may overwrite its input."""
        self.last = _Seen(name, kind)  # kept only where the input is a tensor that has slopes
        if not inputs or not inputs[0].is_floating_point() or not inputs[0].numel():  # an expert without examples
            return
        self.inside += 1
        try:
            with torch.enable_grad():
                z = inputs[0].detach().clone().requires_grad_()
                y = phi(z.clone())
                slope = torch.autograd.grad(y.sum(), z)[0]
        finally:
            self.inside -= 1
        off, size = self._by_unit(slope.abs() <= SLOPE_OFF).all(0), self._by_unit(y.detach().abs()).amax(0)
        key = (name, kind, self.follows, len(off))
        self.last = self.seen.setdefault(key, _Seen(name or "model", kind, follows=self.follows))
        self.last.add_units(off, size)

    def _by_unit(self, values: Tensor) -> Tensor:
        """(examples and positions, units)."""
        if values.ndim < 2:
            return values.reshape(-1, 1)
        return values.movedim(self.channel, -1).flatten(0, -2)


def _tells_of(key: tuple, layer: nn.Module) -> bool:
    """Whether what was seen is the layer's own, not of an activation function that it calls."""
    return len(key) == 1 or is_activation(layer)


class _Functions(TorchFunctionMode):
    """Tells of every activation function that is called outside of an activation module."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.watch.inside == 0 and func in _FUNCTIONS and args and isinstance(args[0], Tensor):
            return self.watch.function(func, args, kwargs)
        return func(*args, **kwargs)


# ---------------------------------------------------------------------------------------------- what it comes to
def _rows(model: nn.Module, watch: _Watch, gradients: dict[str, Tensor | None]) -> list[dict[str, Any]]:
    first = {id(p): name for name, p in model.named_parameters()}
    layers = layers_of(model)
    for name, layer in layers.items():
        if not watch.of(name, layer):
            watch.seen[(name,)] = _Seen(name or "model", type(layer).__name__)
    rows: list[dict[str, Any]] = []
    taken: set[str] = set()
    for key, seen in watch.seen.items():
        layer = layers.get(key[0])
        seen.layer = layer if layer is not None and _tells_of(key, layer) else None
        row = seen.row()
        if seen.layer is not None:
            own = [gradients.get(first[id(p)]) for p in seen.layer.parameters()]
            row["gradient_norm"] = _norm([g for g in own if g is not None]) if any(g is not None for g in own) else None
        row["name"] = _unique(seen, taken)
        rows.append(row)
    return rows


def _unique(seen: _Seen, taken: set[str]) -> str:
    """A module's name, said more precisely where it is called at several places."""
    name = seen.name if seen.name not in taken else f"{seen.name} ({seen.kind} after {seen.follows})"
    number, unique = 2, name
    while unique in taken:
        number, unique = number + 1, f"{name} {number}"
    taken.add(unique)
    return unique


def _without_gradient(model: nn.Module, watch: _Watch, gradients: dict[str, Tensor | None]) -> dict[str, str]:
    found: dict[str, str] = {}
    layers = layers_of(model)
    owners = {id(p): name for name, layer in reversed(layers.items()) for p in layer.parameters()}
    parameters = dict(model.named_parameters())
    for name, gradient in gradients.items():
        owner = owners.get(id(parameters[name]))
        if gradient is not None:
            if not gradient.any():
                found[name] = "zero"
        elif owner is None:
            found[name] = "no path"
        else:
            arrives = any(seen.gradient is not None for seen in watch.of(owner, layers[owner]))
            found[name] = "detached" if owner in watch.called and not arrives else "unused"
    return found
