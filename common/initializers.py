"""The baselines: Xavier, Kaiming, orthogonal, delta-orthogonal, LSUV, Fixup, SkipInit, T-Fixup, MetaInit's bad starts.

What they share. A *weight layer* is a convolution (transposed or not), a linear layer, a recurrent layer or an
attention layer. Each rule below fills W, of shape (out, in, *taps), with

    fan_in = in · taps,    fan_out = out · taps,

where a tensor that stacks several matrices (a convolution's groups, a recurrent layer's gates, attention's query, key
and value) is filled matrix by matrix, and a transposed convolution counts `in` and `out` in the direction of its
forward pass. Unless a function says otherwise, biases become 0, gains of normalisation layers 1 and their shifts 0.
An embedding is a linear layer on one-hot inputs, whose fan-in is therefore 1: N(0, 1) as torch has it, its padding
row 0; one that is tied to a linear layer follows the linear layer's rule. Parameters of other modules (a residual
scalar, a class token) are left alone.

Everything random comes from `generator`, on whose device the numbers are drawn, so that a model starts the same on
every device. On an error the model is as it was. Writing is in place: the parameters stay the same objects, and a tied
one is initialised once.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from common.functional import unchanged_on_error
from common.networks.layers import gain_of
from common.networks.transformer import Attention, Transformer, TransformerLayer
from common.options import check_choice, check_positive, check_whole
from common.types import Batch

__all__ = [
    "INITIALIZERS",
    "delta_orthogonal_",
    "fixup_",
    "gain_of",
    "kaiming_",
    "lsuv_",
    "normal_",
    "orthogonal_",
    "rezero_",
    "scale_layer_",
    "scale_weights_",
    "skipinit_",
    "tfixup_",
    "torch_default_",
    "transformer_",
    "uniform_",
    "weight_layers",
    "xavier_",
]

Arguments = ParamSpec("Arguments")


def _all_or_nothing(
    initialise: Callable[Concatenate[nn.Module, Arguments], None],
) -> Callable[Concatenate[nn.Module, Arguments], None]:
    """On any error, also of a parameter that cannot be written and of an interrupt, no parameter is another."""

    @wraps(initialise)
    def whole(model: nn.Module, *args: Arguments.args, **options: Arguments.kwargs) -> None:
        # lazy ones are refused, and have no values
        with unchanged_on_error(leaf for leaf in model.parameters() if not is_lazy(leaf)):
            initialise(model, *args, **options)

    return whole


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Attention's output projection is a linear layer of its own class.
ZERO_BIAS = (nn.MultiheadAttention, nn.modules.linear.NonDynamicallyQuantizableLinear)
WEIGHT_LAYERS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, *RECURRENT, nn.MultiheadAttention)

Rule = Callable[[Tensor, nn.Module], Any]
"""Fills one contiguous matrix (out, in, *taps) of a layer in place."""


class Weight(NamedTuple):
    """One weight tensor of the model: where it is, and what it is."""

    name: str
    tensor: Tensor
    layer: nn.Module


@runtime_checkable
class ResidualBlock(Protocol):
    """A module with a residual branch, as `fixup_` needs to know it."""

    def branch_layers(self) -> list[nn.Module]:
        """The weight layers of the branch, in the order of the forward pass."""
        ...


# --- Walking over a model ---------------------------------------------------------------------------------------------


def weight_layers(model: nn.Module, *, caller: str = "weight_layers") -> list[Weight]:
    """Every weight tensor of the model once, in the order of registration, embeddings among them.

    Raises:
        ValueError: There is none, or one is not an ordinary parameter (lazy, or computed by a parametrisation).
    """
    found: dict[int, Weight] = {}
    for path, layer in model.named_modules():
        own = dict(layer.named_parameters(path, recurse=False))
        lazy = any(map(is_lazy, own.values()))  # a normalisation's too
        if not (lazy or isinstance(layer, (*WEIGHT_LAYERS, *EMBEDDINGS))):
            continue
        matrices = {name: p for name, p in own.items() if "weight" in name.rpartition(".")[2]}
        computed = hasattr(layer, "parametrizations") or any(name.endswith(("_g", "_v", "_orig")) for name in matrices)
        if lazy or computed:
            raise ValueError(
                f"{caller}: every weight must be an ordinary parameter, got a lazy or parametrised one in "
                f"{path or type(model).__name__!r}. Run one forward pass, or remove the parametrisation, first."
            )
        for name, parameter in matrices.items():
            # A tied embedding follows the rule of the linear layer it is tied to.
            if id(parameter) not in found or isinstance(found[id(parameter)].layer, EMBEDDINGS):
                found[id(parameter)] = Weight(name, parameter, layer)
    if not found:
        raise ValueError(
            f"{caller}: `model` must have a weight layer, got {type(model).__name__} without any. "
            "Convolutions, linear, recurrent, attention and embedding layers count."
        )
    return list(found.values())


def _matrices(weight: Weight) -> tuple[Tensor, ...]:
    """Views of one weight tensor as the matrices (out, in, *taps) it stacks."""
    _, tensor, layer = weight
    if isinstance(layer, CONVOLUTIONS):
        return tensor.chunk(layer.groups)
    if isinstance(layer, TRANSPOSED):
        return tuple(group.transpose(0, 1) for group in tensor.chunk(layer.groups))
    if isinstance(layer, RECURRENT):
        return tensor.chunk(max(1, tensor.shape[0] // int(layer.hidden_size)))  # gates; an LSTM's projection is one
    if isinstance(layer, nn.MultiheadAttention) and weight.name.endswith("in_proj_weight"):
        return tensor.chunk(3)
    return (tensor,)


def _clear_padding(W: Tensor, layer: nn.Module) -> None:
    if isinstance(layer, EMBEDDINGS) and layer.padding_idx is not None:
        W[layer.padding_idx] = 0.0


def _shifts_and_gains(model: nn.Module) -> Iterator[tuple[Tensor, float]]:
    """The vectors every baseline sets: biases and a normalisation's shifts to 0, a normalisation's gains to 1."""
    for layer in model.modules():
        if isinstance(layer, (*WEIGHT_LAYERS, *NORMS)):
            for name, parameter in layer.named_parameters(recurse=False):
                if "bias" in name:
                    yield parameter, 0.0
                elif isinstance(layer, NORMS):
                    yield parameter, 1.0


def _fans(W: Tensor) -> tuple[int, int]:
    taps = math.prod(W.shape[2:])
    return W.shape[1] * taps, W.shape[0] * taps


@torch.no_grad()
def _fill_(
    caller: str,
    model: nn.Module,
    rule: Rule,
    *,
    generator: torch.Generator,
    embedding_rule: Rule | None = None,
) -> None:
    """`rule` on every matrix of every weight layer, `embedding_rule` on embeddings, zeros and ones elsewhere."""
    pending: list[tuple[Tensor, Tensor]] = []
    for weight in weight_layers(model, caller=caller):
        fill = rule
        if isinstance(weight.layer, EMBEDDINGS):
            fill = embedding_rule or _normal(1.0, generator)
        for matrix in _matrices(weight):
            if matrix.numel() == 0:  # of a layer without inputs, say
                continue
            # Contiguous, whatever the view, and where the generator is.
            new = torch.empty(matrix.shape, dtype=matrix.dtype, device=generator.device)
            fill(new, weight.layer)
            _clear_padding(new, weight.layer)
            pending.append((matrix, new))
    for matrix, new in pending:
        matrix.copy_(new)
    for vector, value in _shifts_and_gains(model):
        vector.fill_(value)


def _normal(std: float, generator: torch.Generator) -> Rule:
    return lambda W, _: nn.init.normal_(W, std=std, generator=generator)


def _orthogonal(gain: float, generator: torch.Generator) -> Rule:
    return lambda W, _: nn.init.orthogonal_(W, gain=gain, generator=generator)


# --- Variance rules ---------------------------------------------------------------------------------------------------


@_all_or_nothing
def xavier_(model: nn.Module, *, generator: torch.Generator, gain: float = 1.0, distribution: str = "normal") -> None:
    r"""W ~ N(0, γ²·2/(fan_in + fan_out)), or U(±γ√(6/(fan_in + fan_out))), with γ = `gain`.

    Between what keeps the variance of activations and what keeps that of gradients, for φ linear at 0.

    Reference: Glorot and Bengio, AISTATS 2010.
    """
    check_positive("xavier_", gain=gain)
    check_choice("xavier_", "distribution", distribution, ("normal", "uniform"))
    draw = nn.init.xavier_normal_ if distribution == "normal" else nn.init.xavier_uniform_
    _fill_("xavier_", model, lambda W, _: draw(W, gain=gain, generator=generator), generator=generator)


@_all_or_nothing
def kaiming_(
    model: nn.Module,
    *,
    generator: torch.Generator,
    mode: str = "fan_in",
    nonlinearity: str = "relu",
    distribution: str = "normal",
) -> None:
    r"""W ~ N(0, γ²/fan), or U(±γ√(3/fan)), with γ = `gain_of(nonlinearity)` and the fan that `mode` names.

    fan_in keeps the second moment of activations, fan_out that of gradients. With fan_in, ‖W‖_F ≈ γ√out.
    This is He's rule, *not* the default of torch's layers: that is `torch_default_`.

    Reference: He et al., ICCV 2015.
    """
    check_choice("kaiming_", "mode", mode, ("fan_in", "fan_out"))
    check_choice("kaiming_", "distribution", distribution, ("normal", "uniform"))
    gamma = gain_of(nonlinearity)

    def draw(W: Tensor, _: nn.Module) -> None:
        fan_in, fan_out = _fans(W)
        std = gamma / math.sqrt(fan_in if mode == "fan_in" else fan_out)
        if distribution == "normal":
            nn.init.normal_(W, std=std, generator=generator)
        else:
            nn.init.uniform_(W, -math.sqrt(3) * std, math.sqrt(3) * std, generator=generator)

    _fill_("kaiming_", model, draw, generator=generator)


@_all_or_nothing
@torch.no_grad()
def torch_default_(model: nn.Module, *, generator: torch.Generator) -> None:
    r"""What torch's own layers start from, drawn from `generator`.

    Convolutions and linear layers: Kaiming uniform with a = √5, which is W ~ U(±1/√fan_in), a standard deviation of
    1/√(3 fan_in) or √6 less than He's; biases U(±1/√fan_in), not 0. Recurrent layers: everything U(±1/√hidden).
    Attention's input projections: Xavier uniform on the stacked matrix; its biases 0. Embeddings: N(0, 1).
    As in torch, the fan-in of a transposed convolution is counted against its forward pass.

    The draws come in the order of torch's constructors: weights and biases of convolutions and linear layers are bit
    by bit those of a sequential model built after `torch.manual_seed`, given a generator of the same seed.
    """
    pending: dict[Tensor, Tensor] = {}

    def draw(old: Tensor, fill: Callable[[Tensor], Any]) -> None:
        if old not in pending:
            pending[old] = torch.empty(old.shape, dtype=old.dtype, device=generator.device)
            if old.numel():
                fill(pending[old])

    for _, W, layer in weight_layers(model, caller="torch_default_"):
        fan = int(layer.hidden_size) if isinstance(layer, RECURRENT) else _fans(W)[0]
        bound = 1 / math.sqrt(fan) if fan else 0.0
        uniform = partial(nn.init.uniform_, a=-bound, b=bound, generator=generator)
        if isinstance(layer, EMBEDDINGS):
            draw(W, partial(nn.init.normal_, generator=generator))
            _clear_padding(pending[W], layer)
        elif isinstance(layer, nn.MultiheadAttention):
            draw(W, partial(nn.init.xavier_uniform_, generator=generator))
        elif isinstance(layer, RECURRENT):
            draw(W, uniform)
        else:
            draw(W, partial(nn.init.kaiming_uniform_, a=math.sqrt(5), generator=generator))
        if not isinstance(layer, ZERO_BIAS):
            for name, bias in layer.named_parameters(recurse=False):
                if "bias" in name:
                    draw(bias, uniform)
    for vector, value in _shifts_and_gains(model):
        vector.fill_(value)
    for old, new in pending.items():
        old.copy_(new)


# --- Orthogonal rules -------------------------------------------------------------------------------------------------


@_all_or_nothing
def orthogonal_(model: nn.Module, *, generator: torch.Generator, gain: float = 1.0) -> None:
    r"""W = γ Q, Q the Haar-distributed (out × fan_in) matrix with orthonormal rows or, where it is tall, columns.

    A ~ N(0, 1), A = QR, Q ← Q diag(sign diag R): every singular value is γ = `gain`. A recurrent layer's gates are
    orthogonal one by one.

    Reference: Saxe, McClelland and Ganguli, ICLR 2014.
    """
    check_positive("orthogonal_", gain=gain)
    _fill_("orthogonal_", model, _orthogonal(gain, generator), generator=generator)


@_all_or_nothing
def delta_orthogonal_(model: nn.Module, *, generator: torch.Generator, gain: float = 1.0) -> None:
    r"""K[:, :, c, c] = γ Q at the centre tap c = ⌊size/2⌋ and 0 elsewhere; linear layers W = γ Q.

    A convolution of stride 1 then acts on every pixel by itself, as γ times an isometry where in ≤ out; where
    in > out the rows of Q are orthonormal instead and norms shrink. ‖K‖_F = γ√min(in, out). For ReLU γ = √2, for tanh
    its critical γ = 1.

    Reference: Xiao et al., ICML 2018.
    """
    check_positive("delta_orthogonal_", gain=gain)

    def draw(W: Tensor, _: nn.Module) -> None:
        Q = nn.init.orthogonal_(W.new_empty(W.shape[:2]), gain=gain, generator=generator)
        W.zero_()
        W[(..., *(size // 2 for size in W.shape[2:]))] = Q

    _fill_("delta_orthogonal_", model, draw, generator=generator)


# --- LSUV -------------------------------------------------------------------------------------------------------------


@_all_or_nothing
@torch.no_grad()
def lsuv_(
    model: nn.Module,
    batch: Batch,
    *,
    generator: torch.Generator,
    tolerance: float = 0.1,
    max_tries: int = 10,
    forward: Callable[[nn.Module, Batch], Any] = lambda model, batch: model(batch[0]),
) -> None:
    r"""Layer-sequential unit variance: orthonormal weights, then every layer's output rescaled to variance 1.

    For each convolution and linear layer in the order of the forward pass, with v the variance of all elements of
    its output (before any activation) on `batch`: while |√v − 1| > tolerance, at most `max_tries` times, W ← W/√v.
    With zero biases once is enough, unless a layer is used more than once; its first use counts.

    Batch normalisation uses batch statistics meanwhile, everything else is in evaluation mode. Layers that `forward`
    does not call as modules (inside fused attention, say) keep their orthonormal weights.

    Args:
        batch: What `forward` takes; by default `(inputs, …)`.
        forward: Runs the model on the batch; its result is not used.

    Raises:
        ValueError: A layer's output is constant or not finite, so that no scale helps. The model is as it was.

    Reference: Mishkin and Matas, ICLR 2016.
    """
    check_positive("lsuv_", tolerance=tolerance)
    check_whole("lsuv_", smallest=1, max_tries=max_tries)
    layers: dict[nn.Module, Weight] = {
        weight.layer: weight
        for weight in weight_layers(model, caller="lsuv_")
        if isinstance(weight.layer, (*CONVOLUTIONS, *TRANSPOSED, nn.Linear))
    }
    with _undone(model):
        _fill_("lsuv_", model, _orthogonal(1.0, generator), generator=generator)
        for layer in _order_of_calls(layers, lambda: forward(model, batch)):
            for _ in range(max_tries):
                std = _output_std(layer, lambda: forward(model, batch))
                if not (math.isfinite(std) and std > 0):
                    raise ValueError(
                        f"lsuv_: every layer's output must vary over the batch, got a standard deviation of {std} at "
                        f"{layers[layer].name!r}. Are its inputs dead, or the batch a constant?"
                    )
                if abs(std - 1) <= tolerance:
                    break
                layers[layer].tensor.div_(std)


@contextmanager
def _undone(model: nn.Module) -> Iterator[None]:
    """Buffers, modes and the global generators afterwards as before."""
    buffers = [(b, b.clone()) for b in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng([index for index in devices if index is not None]):
            for module in model.modules():
                module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
            yield
    finally:
        for buffer, old in buffers:
            buffer.copy_(old)
        for module, training in modes:
            module.training = training


def _order_of_calls(layers: Iterable[nn.Module], run: Callable[[], Any]) -> list[nn.Module]:
    called: dict[nn.Module, None] = {}

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        called.setdefault(layer)

    hooks = [layer.register_forward_hook(record) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


def _output_std(layer: nn.Module, run: Callable[[], Any]) -> float:
    stds: list[float] = []

    def record(layer: nn.Module, inputs: Any, output: Any) -> None:
        stds.append(output.var(correction=0).sqrt().item())

    hook = layer.register_forward_hook(record)
    try:
        run()
    finally:
        hook.remove()
    return stds[0]


# --- Residual networks without normalisation --------------------------------------------------------------------------


@_all_or_nothing
def fixup_(model: nn.Module, *, generator: torch.Generator, nonlinearity: str = "relu") -> None:
    r"""Fixup: each step of SGD changes a residual network's function by Θ(η), whatever its depth.

    With L residual branches of m weight layers each:

    1. the classifier (the last linear layer) and the last layer of every branch: 0;
    2. a branch's other layers: Kaiming normal over the fan-out, times L^(−1/(2m − 2)); every other layer: the same
       without the factor;
    3. the branch's multiplier 1, and the scalar biases 0 (`ResNet(branch="fixup")` has them).

    A module is a residual block if it has `branch_layers()`, its branch's weight layers in forward order, as the blocks
    of `ResNet` and `WideResNet` do.

    Raises:
        ValueError: The model has normalisation layers, no residual block, or no linear layer.

    Reference: Zhang, Dauphin and Ma, ICLR 2019.
    """
    branches = [block.branch_layers() for block in model.modules() if isinstance(block, ResidualBlock)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not branches or not linear:
        raise ValueError(
            f"fixup_: `model` must have residual blocks and a linear classifier, got {len(branches)} and {len(linear)} "
            "of them. A block is a module with `branch_layers()`, its weight layers in forward order."
        )
    if any(isinstance(module, NORMS) for module in model.modules()):
        raise ValueError("fixup_: `model` must be free of normalisation, got one with it. Fixup replaces it.")
    if any(getattr(block, "skip", True) is False for block in model.modules() if isinstance(block, ResidualBlock)):
        raise ValueError(
            "fixup_: blocks must have their skip connections, got one without: zero branches would cut it."
        )
    gamma = gain_of(nonlinearity)
    L = len(branches)
    zero = {linear[-1], *(layers[-1] for layers in branches)}
    factor = {layer: L ** (-1 / (2 * len(layers) - 2)) for layers in branches for layer in layers[:-1]}

    def rule(W: Tensor, layer: nn.Module) -> None:
        std = 0.0 if layer in zero else gamma * factor.get(layer, 1.0) / math.sqrt(_fans(W)[1])
        nn.init.normal_(W, std=std, generator=generator)

    _fill_("fixup_", model, rule, generator=generator)
    with torch.no_grad():
        for scalar, value in [*_scalars(model, "scale", 1.0), *_scalars(model, "bias", 0.0)]:
            scalar.fill_(value)


def _scalars(model: nn.Module, name: str, value: float) -> list[tuple[Tensor, float]]:
    """The one-element parameters of that name that belong to no ordinary layer, with the value they shall have."""
    return [
        (parameter, value)
        for module in model.modules()
        if not isinstance(module, (*WEIGHT_LAYERS, *EMBEDDINGS, *NORMS))
        for own, parameter in module.named_parameters(recurse=False)
        if own == name and parameter.numel() == 1
    ]


@_all_or_nothing
def skipinit_(model: nn.Module, alpha: float = 0.0, *, generator: torch.Generator | None = None) -> None:
    r"""SkipInit: h ← h + α F(h), every branch's α set to `alpha`: 0, or anything up to 1/√(branches).

    α is a one-element parameter called `alpha` (`ResNet(branch="skipinit")`). Given a generator, everything else is
    initialised by `kaiming_` first; without one it stays as it is. At α = 0 the branches' weights have no gradient:
    a method that learns from gradients at initialisation should start from 1/√(branches).

    Raises:
        ValueError: `alpha` is not finite, or the model has no such parameter.

    Reference: De and Smith, NeurIPS 2020.
    """
    _residual_scalars_("skipinit_", model, "alpha", alpha, kaiming_, generator)


@_all_or_nothing
def rezero_(model: nn.Module, alpha: float = 0.0, *, generator: torch.Generator | None = None) -> None:
    r"""ReZero: SkipInit's rule for Transformers, h ← h + α F(h), with α called `resweight` as in its released code.

    Given a generator, everything else is initialised by `xavier_` first, the Transformer's custom.

    Raises:
        ValueError: `alpha` is not finite, or the model has no such parameter.

    Reference: Bachlechner et al., UAI 2021.
    """
    _residual_scalars_("rezero_", model, "resweight", alpha, xavier_, generator)


@torch.no_grad()
def _residual_scalars_(
    caller: str,
    model: nn.Module,
    name: str,
    alpha: float,
    others: Callable[..., None],
    generator: torch.Generator | None,
) -> None:
    if not math.isfinite(alpha):
        raise ValueError(f"{caller}: `alpha` must be finite, got {alpha}.")
    scalars = _scalars(model, name, alpha)
    if not scalars:
        raise ValueError(
            f"{caller}: `model` must have residual scalars, got no one-element parameter called `{name}`. "
            "make_network('resnet20', branch='skipinit') has them, called `alpha`."
        )
    if generator is not None:
        others(model, generator=generator)
    for scalar, value in scalars:
        scalar.fill_(value)


# --- Transformers -----------------------------------------------------------------------------------------------------


@_all_or_nothing
@torch.no_grad()
def transformer_(model: nn.Module, *, generator: torch.Generator) -> None:
    r"""What a `Transformer` of this project starts from, as fairseq's and hence GradInit's does.

    Both embeddings N(0, 1/d), their padding rows 0; query, key and value projections Xavier uniform with γ = 1/√2;
    output projections of attention the same with γ = 1, their biases 0; every other linear layer torch's default
    U(±1/√fan_in), as are the biases of all but attention's output.

    Raises:
        TypeError: The model is no `common.networks.Transformer`.
    """
    model = _check_transformer("transformer_", model)
    gains = {}
    for part in model.modules():
        if isinstance(part, Attention):
            gains |= dict.fromkeys((part.q_proj, part.k_proj, part.v_proj), 1 / math.sqrt(2)) | {part.out_proj: 1.0}

    def rule(W: Tensor, layer: nn.Module) -> None:
        if layer in gains:
            nn.init.xavier_uniform_(W, gain=gains[layer], generator=generator)
        else:
            nn.init.kaiming_uniform_(W, a=math.sqrt(5), generator=generator)

    _fill_transformer_("transformer_", model, rule, generator)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None and gains.get(layer) != 1.0:
            new = torch.empty(layer.bias.shape, dtype=layer.bias.dtype, device=generator.device)
            bound = 1 / math.sqrt(layer.in_features)
            layer.bias.copy_(nn.init.uniform_(new, -bound, bound, generator=generator))


@_all_or_nothing
def tfixup_(model: nn.Module, *, generator: torch.Generator) -> None:
    r"""T-Fixup: a Transformer without normalisation that trains without warm-up.

    With N_e and N_d layers in encoder and decoder:

    1. embeddings N(0, 1/d), their padding rows 0; every other weight Xavier uniform, γ = 1; biases 0;
    2. an encoder layer's value and output projection, fc1 and fc2: times 0.67 N_e^(−1/4);
    3. a decoder layer's, those of both its attentions: times (9 N_d)^(−1/4);
    4. the embeddings: times (9 N_e)^(−1/4) and (9 N_d)^(−1/4).

    The paper has one N; its code has both, as here. Its code leaves query and key at fairseq's γ = 1/√2 and the biases
    of query, key and value at torch's default; the paper says Xavier for all, which is what this does.

    Raises:
        TypeError: The model is no `common.networks.Transformer`.
        ValueError: It has layer normalisation, which T-Fixup replaces.

    Reference: Huang, Pérez, Ba and Volkovs, ICML 2020.
    """
    model = _check_transformer("tfixup_", model)
    if model.norm != "none":
        raise ValueError(
            f"tfixup_: `model` must be free of normalisation, got norm={model.norm!r}. Build it with norm='none'."
        )
    N_e, N_d = len(model.encoder.layers), len(model.decoder.layers)
    factor: dict[nn.Module, float] = {}
    for layers, value in ((model.encoder.layers, 0.67 * N_e**-0.25), (model.decoder.layers, (9 * N_d) ** -0.25)):
        for part in layers.modules():
            if isinstance(part, Attention):
                factor |= {part.v_proj: value, part.out_proj: value}
            elif isinstance(part, TransformerLayer):
                factor |= {part.fc1: value, part.fc2: value}

    def rule(W: Tensor, layer: nn.Module) -> None:
        nn.init.xavier_uniform_(W, gain=factor.get(layer, 1.0), generator=generator)

    _fill_transformer_("tfixup_", model, rule, generator, source=(9 * N_e) ** -0.25, target=(9 * N_d) ** -0.25)


def _check_transformer(caller: str, model: nn.Module) -> Transformer:
    if not isinstance(model, Transformer):
        raise TypeError(
            f"{caller}: `model` must be a common.networks.Transformer, got {type(model).__name__}. "
            "The rule goes by the roles of its layers."
        )
    return model


def _fill_transformer_(
    caller: str,
    model: Transformer,
    rule: Rule,
    generator: torch.Generator,
    *,
    source: float = 1.0,
    target: float = 1.0,
) -> None:
    """`rule` on every weight but the embeddings: those are N(0, 1/d) times `source` or `target`, their padding 0."""

    def fill(W: Tensor, layer: nn.Module) -> None:
        # the target's embedding is the output projection's weight
        if layer in (model.encoder.embedding, model.output):
            std = (target if layer is model.output else source) / math.sqrt(model.dim)
            nn.init.normal_(W, std=std, generator=generator)
            W[model.padding] = 0.0
        else:
            rule(W, layer)

    _fill_(caller, model, fill, generator=generator, embedding_rule=fill)


# --- Bad starts (MetaInit's protocol) ---------------------------------------------------------------------------------


@_all_or_nothing
def normal_(model: nn.Module, std: float = 0.1, *, generator: torch.Generator) -> None:
    r"""W ~ N(0, `std`²) in every layer, embeddings too, whatever its fan: the bad start MetaInit corrects."""
    check_positive("normal_", std=std)
    rule = _normal(std, generator)
    _fill_("normal_", model, rule, generator=generator, embedding_rule=rule)


@_all_or_nothing
def uniform_(model: nn.Module, bound: float = 0.1, *, generator: torch.Generator) -> None:
    r"""W ~ U(±`bound`) in every layer, embeddings too, whatever its fan; the standard deviation is bound/√3."""
    check_positive("uniform_", bound=bound)

    def rule(W: Tensor, _: nn.Module) -> None:
        nn.init.uniform_(W, -bound, bound, generator=generator)

    _fill_("uniform_", model, rule, generator=generator, embedding_rule=rule)


@_all_or_nothing
@torch.no_grad()
def scale_weights_(model: nn.Module, factor: float) -> None:
    r"""W ← `factor` · W for every weight tensor; biases and normalisation layers stay as they are."""
    check_positive("scale_weights_", factor=factor)
    for weight in weight_layers(model, caller="scale_weights_"):
        weight.tensor.mul_(factor)


@_all_or_nothing
@torch.no_grad()
def scale_layer_(model: nn.Module, index: int, factor: float) -> None:
    r"""W ← `factor` · W for one weight tensor, counted in the order of registration, from the end if negative.

    Raises:
        ValueError: `factor` is not positive and finite, or there is no such layer.
    """
    check_positive("scale_layer_", factor=factor)
    weights = weight_layers(model, caller="scale_layer_")
    if not -len(weights) <= index < len(weights):
        raise ValueError(f"scale_layer_: `index` must be in [{-len(weights)}, {len(weights)}), got {index}.")
    weights[index].tensor.mul_(factor)


INITIALIZERS: dict[str, Callable[..., None]] = {
    "xavier": xavier_,
    "kaiming": kaiming_,
    "torch_default": torch_default_,
    "orthogonal": orthogonal_,
    "delta_orthogonal": delta_orthogonal_,
    "lsuv": lsuv_,
    "fixup": fixup_,
    "skipinit": skipinit_,
    "rezero": rezero_,
    "transformer": transformer_,
    "tfixup": tfixup_,
    "normal": normal_,
    "uniform": uniform_,
}
"""By name. Each takes `(model, generator=generator)` and its own options; "lsuv" takes `(model, batch, …)`."""
