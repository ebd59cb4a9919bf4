"""Small architectures, a row each, over which derivatives are swept: by layer, by loss, by library.

Networks are as small as their kind allows and every parameter is random, so that no derivative vanishes by symmetry.
Libraries are imported when a row is built. Nothing is downloaded.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map

from common.types import Batch, UserLoss

EXAMPLES, TIME, FEATURES, CLASSES, VOCABULARY = 4, 5, 4, 3, 11
LENGTHS = (5, 3, 4, 2)  # of padded sequences, an example each

Maker = Callable[[], nn.Module]
BatchMaker = Callable[[torch.Generator], Batch]


# ---------------------------------------------------------------------------------------------- losses
def smooth_loss(model: nn.Module, batch: Batch) -> Tensor:
    """A smooth, uneven function of every output: neither its mean, its sign nor its scale is lost."""
    outputs = model(*batch) if isinstance(batch, tuple) else model(batch)
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return torch.stack([(leaf + 0.3).sin().mean() + 0.1 * (leaf**3).mean() for leaf in leaves]).sum()


def target_loss(loss: Callable[..., Tensor], model: nn.Module, batch: Batch) -> Tensor:
    """`loss(model(x), *targets)` for `batch = (x, *targets)`."""
    x, *targets = batch
    return loss(model(x), *targets)


def sequence_class_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of one label a sequence, for a Hugging Face model."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"])


def token_loss(model: nn.Module, batch: Batch, *, shift: bool = False) -> Tensor:
    """Cross-entropy a token, averaged over each example's own tokens and then over examples. Label −100 is padding.

    Args:
        shift: Position t predicts the label at t + 1.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits, batch["labels"]
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return (each.sum(1) / (labels != -100).sum(1)).mean()


# ---------------------------------------------------------------------------------------------- rows
@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a network and what it is evaluated on."""

    group: str
    """Heading of the table's section."""
    make: Maker
    """Builds the module, in the default dtype."""
    batch: BatchMaker
    """A small batch in float64, examples along dimension 0 of every tensor."""
    loss_fn: UserLoss = smooth_loss
    """`loss_fn(model, batch)`: a mean over examples of each one's loss."""
    size: Literal["small", "large"] = "small"
    """large: examining it takes more than about fifteen seconds on one core."""


ZOO: dict[str, Case] = {}
"""Cases by the name a user would look for."""


def _add(group: str, makers: Mapping[str, Maker], batch: BatchMaker, **options: Any) -> None:
    if repeated := ZOO.keys() & makers.keys():
        raise ValueError(f"zoo: names must be unique, got {sorted(repeated)} twice.")
    ZOO.update({name: Case(group=group, make=make, batch=batch, **options) for name, make in makers.items()})


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Batch]:
    """The case's module in evaluation mode, its parameters random everywhere, and its batch.

    Biases and gains are random too, and stored statistics are those of the batch. Every `dtype` gets the same numbers,
    up to rounding. The global random state is left as it was.
    """
    case = ZOO[name]
    batch = case.batch(torch.Generator().manual_seed(seed))
    with torch.random.fork_rng(devices=[]), _default_dtype(torch.float64):
        torch.default_generator.manual_seed(seed)
        model = case.make().to(torch.float64)
        _perturb_(model)
        _set_statistics_(model, case.loss_fn, batch)
    cast = partial(tree_map, lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf)
    return model.to(dtype).eval(), cast(batch)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def _perturb_(model: nn.Module) -> None:
    for parameter in model.parameters():
        varies = parameter.ndim > 1 and parameter.numel() > 1 and parameter.std() > 0
        parameter.add_(0.2 * torch.randn_like(parameter) * (parameter.std() if varies else 1.0))


@torch.no_grad()
def _set_statistics_(model: nn.Module, loss_fn: UserLoss, batch: Batch) -> None:
    """Stored means and variances become the batch's, so that a deep network is not far off scale in evaluation mode."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    loss_fn(model.train(), batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


# ---------------------------------------------------------------------------------------------- batches
def normal(*shape: int, examples: int = EXAMPLES) -> BatchMaker:
    return lambda g: torch.randn(examples, *shape, generator=g, dtype=torch.float64)


def integers(high: int, *shape: int, examples: int = EXAMPLES) -> BatchMaker:
    return lambda g: torch.randint(high, (examples, *shape), generator=g)


def both(*makers: BatchMaker) -> BatchMaker:
    """A tuple with one entry a maker."""
    return lambda g: tuple(make(g) for make in makers)


def padding(g: torch.Generator) -> Tensor:
    """True where a sequence has ended."""
    return torch.arange(TIME) >= torch.tensor(LENGTHS)[:, None]


def lengths(g: torch.Generator) -> Tensor:
    return torch.tensor(LENGTHS)


def signs(*shape: int) -> BatchMaker:
    return lambda g: 2.0 * torch.randint(2, (EXAMPLES, *shape), generator=g).double() - 1


def probabilities(g: torch.Generator) -> Tensor:
    return normal(CLASSES)(g).softmax(1)


def binary(g: torch.Generator) -> Tensor:
    return (signs(CLASSES)(g) + 1) / 2


vectors, sequences, tokens = normal(FEATURES), normal(TIME, FEATURES), integers(VOCABULARY - 3, TIME)
IMAGES = {1: normal(2, 6), 2: normal(2, 6, 6), 3: normal(2, 6, 6, 6)}
images = IMAGES[2]

# ---------------------------------------------------------------------------------------------- feed-forward layers
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def mlp(middle: Maker = nn.Identity) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), middle(), nn.Tanh(), nn.Linear(6, CLASSES))


def around(middle: Maker, dims: int = 2, side: int = 6) -> nn.Module:
    """Convolution → `middle` → convolution → linear, whose sizes are those that `middle` gives."""
    first, between = CONV[dims](2, 4, 3), middle()
    with torch.no_grad():
        x = between(first(torch.randn(2, 2, *[side] * dims)))
        second = CONV[dims](x.shape[1], 3, 2)
        features = second(x)[0].numel()
    return nn.Sequential(first, between, second, nn.Flatten(), nn.Linear(features, CLASSES))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class TwoInputs(nn.Module):
    """Two linear maps of one input, joined by a layer of two arguments."""

    def __init__(self, join: nn.Module) -> None:
        super().__init__()
        self.left, self.right, self.join = nn.Linear(FEATURES, 3), nn.Linear(FEATURES, 3), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x), self.right(x))


_add("Linear and convolution", {"MLP": mlp, "Bilinear": lambda: TwoInputs(nn.Bilinear(3, 3, CLASSES))}, vectors)
for dims in (1, 2, 3):
    makers = {f"Conv{dims}d": partial(CONV[dims], 4, 4, 2)}
    if dims < 3:
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d)[dims - 1]
        makers[f"ConvTranspose{dims}d"] = partial(transposed, 4, 4, 3, stride=2, padding=1, output_padding=1)
    _add("Linear and convolution", {name: partial(around, make, dims) for name, make in makers.items()}, IMAGES[dims])
CONVOLUTIONS = {
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 1},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4},
    "padding 'same'": {"padding": "same"},
    "circular padding": {"padding": 1, "padding_mode": "circular"},
    "reflected padding": {"padding": 1, "padding_mode": "reflect"},
    "replicated padding": {"padding": 1, "padding_mode": "replicate"},
    "no bias": {"bias": False},
}
for name, options in CONVOLUTIONS.items():
    _add("Linear and convolution", {f"Conv2d, {name}": partial(around, partial(nn.Conv2d, 4, 4, 3, **options))}, images)
JOINS = {"CosineSimilarity": nn.CosineSimilarity, "PairwiseDistance": nn.PairwiseDistance}
_add("Linear and convolution", {name: lambda join=join: TwoInputs(join()) for name, join in JOINS.items()}, vectors)
_add("Linear and convolution", {"Residual block": partial(around, Residual)}, images)

ACTIVATIONS: dict[str, Maker] = {
    **{
        kind.__name__: kind
        for kind in (
            *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish),
            *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign, nn.Softshrink),
            *(nn.Hardshrink, nn.Tanhshrink, nn.LogSigmoid, nn.Softmax2d),
        )
    },
    "GELU, tanh approximation": partial(nn.GELU, approximate="tanh"),
    "PReLU, a slope a channel": partial(nn.PReLU, 4),
    "Threshold": partial(nn.Threshold, 0.1, -0.2),
    **{kind.__name__: partial(kind, dim=1) for kind in (nn.GLU, nn.Softmax, nn.LogSoftmax, nn.Softmin)},
}
_add("Activations", {name: partial(around, make) for name, make in ACTIVATIONS.items()}, images)


# ---------------------------------------------------------------------------------------------- pooling, resampling
class Unpooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.unpool(*self.pool(x))


POOLING: dict[int, dict[str, Any]] = {
    1: {
        "MaxPool1d": partial(nn.MaxPool1d, 2),
        "AvgPool1d": partial(nn.AvgPool1d, 2),
        "AdaptiveAvgPool1d": partial(nn.AdaptiveAvgPool1d, 3),
        "AdaptiveMaxPool1d": partial(nn.AdaptiveMaxPool1d, 3),
        "LPPool1d": partial(nn.LPPool1d, 2, 2),
        "Upsample, linear": partial(nn.Upsample, scale_factor=2, mode="linear"),
    },
    2: {
        "MaxPool2d": partial(nn.MaxPool2d, 2),
        "MaxPool2d, overlapping": partial(nn.MaxPool2d, 3, stride=2, padding=1),
        "AvgPool2d": partial(nn.AvgPool2d, 2),
        "AdaptiveAvgPool2d": partial(nn.AdaptiveAvgPool2d, 3),
        "AdaptiveMaxPool2d": partial(nn.AdaptiveMaxPool2d, 3),
        "LPPool2d": partial(nn.LPPool2d, 2, 2),
        "MaxUnpool2d": Unpooled,
        "Upsample, nearest": partial(nn.Upsample, scale_factor=2, mode="nearest"),
        "Upsample, bilinear": partial(nn.Upsample, scale_factor=2, mode="bilinear"),
        "Upsample, bicubic": partial(nn.Upsample, size=7, mode="bicubic", align_corners=True),
        "PixelShuffle": partial(nn.PixelShuffle, 2),
        "PixelUnshuffle": partial(nn.PixelUnshuffle, 2),
        "ChannelShuffle": partial(nn.ChannelShuffle, 2),
        "Unfold and Fold": lambda: nn.Sequential(nn.Unfold(2), nn.Fold((4, 4), 2)),
    },
    3: {
        "MaxPool3d": partial(nn.MaxPool3d, 2),
        "AvgPool3d": partial(nn.AvgPool3d, 2),
        "AdaptiveAvgPool3d": partial(nn.AdaptiveAvgPool3d, 3),
        "Upsample, trilinear": partial(nn.Upsample, scale_factor=2, mode="trilinear"),
    },
}
for dims, makers in POOLING.items():
    _add("Pooling and resampling", {name: partial(around, make, dims) for name, make in makers.items()}, IMAGES[dims])
# These draw their regions at random, in evaluation mode too. From 7 to 4 positions there is a choice, from 4 to 3 none.
for dims, pool in ((2, nn.FractionalMaxPool2d), (3, nn.FractionalMaxPool3d)):
    make = partial(around, partial(pool, 2, output_size=4), dims, side=9)
    _add("Pooling and resampling", {pool.__name__: make}, normal(2, *[9] * dims))

# ---------------------------------------------------------------------------------------------- normalisation
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
for dims in (1, 2, 3):
    makers = {
        f"BatchNorm{dims}d": partial(BATCH_NORM[dims], 4),
        f"BatchNorm{dims}d, no affine": partial(BATCH_NORM[dims], 4, affine=False),
        f"InstanceNorm{dims}d": partial(INSTANCE_NORM[dims], 4),
        f"InstanceNorm{dims}d, affine": partial(INSTANCE_NORM[dims], 4, affine=True),
    }
    _add("Normalisation", {name: partial(around, make, dims) for name, make in makers.items()}, IMAGES[dims])
NORMS: dict[str, Maker] = {
    "BatchNorm2d, no running statistics": partial(nn.BatchNorm2d, 4, track_running_stats=False),
    "InstanceNorm2d, running statistics": partial(nn.InstanceNorm2d, 4, affine=True, track_running_stats=True),
    "LayerNorm, over channels and space": partial(nn.LayerNorm, [4, 4, 4]),
    "GroupNorm": partial(nn.GroupNorm, 2, 4),
    "GroupNorm, no affine": partial(nn.GroupNorm, 2, 4, affine=False),
    "LocalResponseNorm": partial(nn.LocalResponseNorm, 3, alpha=0.5),
}
_add("Normalisation", {name: partial(around, make) for name, make in NORMS.items()}, images)
VECTOR_NORMS: dict[str, Maker] = {
    "BatchNorm1d, of vectors": partial(nn.BatchNorm1d, 6),
    "LayerNorm": partial(nn.LayerNorm, 6),
    "LayerNorm, no bias": partial(nn.LayerNorm, 6, bias=False),
    "LayerNorm, no affine": partial(nn.LayerNorm, 6, elementwise_affine=False),
    "RMSNorm": partial(nn.RMSNorm, 6),
    "RMSNorm, no affine": partial(nn.RMSNorm, 6, elementwise_affine=False),
}
_add("Normalisation", {name: partial(mlp, make) for name, make in VECTOR_NORMS.items()}, vectors)


# ---------------------------------------------------------------------------------------------- reparametrised weights
def reparametrised(wrap: Callable[[nn.Module], nn.Module], layer: Callable[..., nn.Module]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the hooks of torch.nn.utils are deprecated
        if layer is nn.Conv2d:
            return around(lambda: nn.Sequential(wrap(nn.Conv2d(4, 4, 3)), nn.Tanh()))
        return nn.Sequential(wrap(nn.Linear(FEATURES, 6)), nn.Tanh(), wrap(nn.Linear(6, CLASSES)))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal, Householder": partial(parametrizations.orthogonal, orthogonal_map="householder"),
    "orthogonal, Cayley": partial(parametrizations.orthogonal, orthogonal_map="cayley"),
    "weight_norm, hook of torch.nn.utils": nn.utils.weight_norm,
    "spectral_norm, hook of torch.nn.utils": nn.utils.spectral_norm,
}
_add("Reparametrisation", {name: partial(reparametrised, wrap, nn.Linear) for name, wrap in WRAPPERS.items()}, vectors)
CONV_WRAPPERS = {f"{name} of Conv2d": partial(reparametrised, WRAPPERS[name], nn.Conv2d) for name in list(WRAPPERS)[:2]}
_add("Reparametrisation", CONV_WRAPPERS, images)

# ---------------------------------------------------------------------------------------------- dropout
_add("Dropout", {kind.__name__: partial(mlp, kind) for kind in (nn.Dropout, nn.AlphaDropout)}, vectors)
for dims, kind in {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}.items():
    _add("Dropout", {kind.__name__: partial(around, kind, dims)}, IMAGES[dims])
_add("Dropout", {"FeatureAlphaDropout": partial(around, nn.FeatureAlphaDropout)}, images)


# ---------------------------------------------------------------------------------------------- embeddings
class Tied(nn.Module):
    """One matrix embeds tokens and, transposed, gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCABULARY, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.decode = nn.Linear(FEATURES, VOCABULARY)
        self.decode.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.mix(self.embed(x)).tanh())


class PaddedEmbedding(nn.Module):
    """Token 1 is padding: its row gets no gradient, and has no influence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.decode = nn.Embedding(VOCABULARY, FEATURES, padding_idx=1), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.embed(x).tanh() * (x != 1).unsqueeze(-1))


def embedded(embed: Callable[..., nn.Module], **options: Any) -> nn.Module:
    return nn.Sequential(embed(VOCABULARY, FEATURES, **options), nn.Tanh(), nn.Linear(FEATURES, CLASSES))


class WeightedBag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, FEATURES, mode="sum")

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        return self.bag(tokens, per_sample_weights=weights)


EMBEDDINGS = {  # tokens stop three short of the vocabulary: the last rows are never used
    "Embedding": partial(embedded, nn.Embedding),
    "Embedding, padding_idx": PaddedEmbedding,
    "Embedding, max_norm": partial(embedded, nn.Embedding, max_norm=1.0),
    "Embedding, sparse": partial(embedded, nn.Embedding, sparse=True),
    "Embedding, tied to the decoder": Tied,
    **{f"EmbeddingBag, {mode}": partial(embedded, nn.EmbeddingBag, mode=mode) for mode in ("sum", "mean", "max")},
}
_add("Embeddings", EMBEDDINGS, tokens)
_add("Embeddings", {"EmbeddingBag, weighted": WeightedBag}, both(tokens, normal(TIME)))


# ---------------------------------------------------------------------------------------------- recurrent layers
class Unrolled(nn.Module):
    """A cell over time, its first state left out."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


class Packed(nn.Module):
    """A layer that sees no padding, and gives its last states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor):
        return self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]


RECURRENT: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "RNN, tanh": (nn.RNN, {}),
    "RNN, relu": (nn.RNN, {"nonlinearity": "relu"}),
    "GRU": (nn.GRU, {}),
    "GRU, 2 layers, bidirectional": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "LSTM": (nn.LSTM, {}),
    "LSTM, 2 layers, bidirectional": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    "LSTM, 2 layers, dropout": (nn.LSTM, {"num_layers": 2, "dropout": 0.2}),
    "LSTM, projected": (nn.LSTM, {"proj_size": 2}),
}
for name, (kind, options) in RECURRENT.items():
    _add("Recurrent", {name: partial(kind, FEATURES, 6, batch_first=True, **options)}, sequences)
for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    _add("Recurrent", {kind.__name__: lambda kind=kind: Unrolled(kind(FEATURES, 6))}, sequences)
for kind in (nn.GRU, nn.LSTM):
    name = f"{kind.__name__}, packed sequences"
    _add("Recurrent", {name: lambda kind=kind: Packed(kind(FEATURES, 6, batch_first=True))}, both(sequences, lengths))


# ---------------------------------------------------------------------------------------------- attention
def after(device: torch.device | None = None) -> Tensor:
    """True where a key lies after its query."""
    return torch.ones(TIME, TIME, dtype=torch.bool, device=device).triu(1)


class MultiHead(nn.Module):
    """Self-attention, its weights part of the output where they are asked for."""

    def __init__(self, *, causal: bool = False, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True, **options)
        self.need_weights, self.causal = need_weights, causal

    def forward(self, x: Tensor, padding: Tensor | None = None):
        mask = after(x.device) if self.causal else None
        return self.attention(x, x, x, padding, need_weights=self.need_weights, attn_mask=mask)


class DotProduct(nn.Module):
    """`F.scaled_dot_product_attention` of projected queries, keys and values."""

    mask: Tensor | None

    def __init__(
        self, heads: int = 2, kv_heads: int = 2, *, dropout: float = 0.0, mask: Tensor | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.heads, self.dropout, self.options = [heads, kv_heads, kv_heads], dropout, options
        self.project, self.output = nn.Linear(FEATURES, 3 * sum(self.heads)), nn.Linear(3 * heads, CLASSES)
        self.register_buffer("mask", mask)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, self.mask, dropout, **self.options)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (-1, 3)).transpose(-2, -3).split(self.heads, -3)
        return self.output(self.attend(query, key, value).transpose(-2, -3).flatten(-2))


class LearnedBias(DotProduct):
    """Attention scores shifted by parameters, one a pair of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, TIME, TIME))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, self.bias)


class ByHand(DotProduct):
    """Attention in products and a softmax."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return scores.masked_fill(after(query.device), -math.inf).softmax(-1) @ value


class Transformer(nn.Module):
    """Encoder, decoder or both; source and target are padded, the target is causal."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, source: Tensor, padding: Tensor, target: Tensor | None = None) -> Tensor:
        causal = after(source.device)
        if isinstance(self.body, nn.TransformerEncoder):
            return self.body(source, mask=causal, src_key_padding_mask=padding)
        masks = {"tgt_mask": causal, "tgt_key_padding_mask": padding, "memory_key_padding_mask": padding}
        masks["memory_mask"] = causal.roll(1, 1)
        if isinstance(self.body, nn.Transformer):
            masks["src_key_padding_mask"] = padding
            return self.body(source, target, **masks)
        return self.body(target, source, **masks)


def encoder(**options: Any) -> nn.Module:
    layer = nn.TransformerEncoderLayer(FEATURES, 2, 6, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder(**options: Any) -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(FEATURES, 2, 6, batch_first=True, **options), 2)


ATTENTION: dict[str, Maker] = {
    "MultiheadAttention": MultiHead,
    "MultiheadAttention, need_weights": partial(MultiHead, need_weights=True),
    "MultiheadAttention, causal": partial(MultiHead, causal=True),
    "MultiheadAttention, add_bias_kv and add_zero_attn": partial(MultiHead, add_bias_kv=True, add_zero_attn=True),
    "TransformerEncoder, post-norm": encoder,
    "TransformerEncoder, pre-norm": partial(encoder, norm_first=True),
    "TransformerEncoder, GELU": partial(encoder, activation="gelu"),
    "scaled_dot_product_attention": DotProduct,
    "scaled_dot_product_attention, causal": partial(DotProduct, is_causal=True),
    "scaled_dot_product_attention, boolean mask": lambda: DotProduct(mask=~after()),
    "scaled_dot_product_attention, float mask": lambda: DotProduct(mask=torch.randn(TIME, TIME)),
    "scaled_dot_product_attention, learned bias": LearnedBias,
    "scaled_dot_product_attention, grouped queries": partial(DotProduct, heads=4, enable_gqa=True),
    "scaled_dot_product_attention, dropout": partial(DotProduct, dropout=0.2),
    "Attention by hand": ByHand,
}
_add("Attention", ATTENTION, sequences)
PADDED: dict[str, Maker] = {
    "MultiheadAttention, key_padding_mask": MultiHead,
    "MultiheadAttention, causal and key_padding_mask": partial(MultiHead, causal=True),
    "TransformerEncoder, post-norm, masks": lambda: Transformer(encoder()),
    "TransformerEncoder, pre-norm, masks": lambda: Transformer(encoder(norm_first=True)),
}
_add("Attention", PADDED, both(sequences, padding))
DECODERS: dict[str, Maker] = {
    "TransformerDecoder, post-norm": lambda: Transformer(decoder()),
    "TransformerDecoder, pre-norm": lambda: Transformer(decoder(norm_first=True)),
    "Transformer": lambda: Transformer(nn.Transformer(FEATURES, 2, 1, 1, 6, batch_first=True)),
}
_add("Attention", DECODERS, both(sequences, padding, sequences))

# ---------------------------------------------------------------------------------------------- losses
classes, reals, sign = integers(CLASSES), normal(CLASSES), signs()
LOSSES: dict[str, tuple[Callable[..., Tensor], BatchMaker]] = {  # of three outputs an example, and of its target
    "cross_entropy": (F.cross_entropy, classes),
    "cross_entropy, label smoothing": (partial(F.cross_entropy, label_smoothing=0.1), classes),
    "cross_entropy, class probabilities": (F.cross_entropy, probabilities),
    "nll_loss": (lambda out, y: F.nll_loss(out.log_softmax(1), y), classes),
    "mse_loss": (F.mse_loss, reals),
    "l1_loss": (F.l1_loss, reals),
    "smooth_l1_loss": (F.smooth_l1_loss, reals),
    "huber_loss": (partial(F.huber_loss, delta=0.7), reals),
    "binary_cross_entropy_with_logits": (F.binary_cross_entropy_with_logits, binary),
    "binary_cross_entropy": (lambda out, y: F.binary_cross_entropy(out.sigmoid(), y), binary),
    "kl_div": (lambda out, y: F.kl_div(out.log_softmax(1), y, reduction="batchmean"), probabilities),
    "gaussian_nll_loss": (lambda out, y: F.gaussian_nll_loss(out[:, 0], y[:, 0], out[:, 1].exp()), reals),
    "poisson_nll_loss": (F.poisson_nll_loss, integers(4, CLASSES)),
    "soft_margin_loss": (F.soft_margin_loss, signs(CLASSES)),
    "multi_margin_loss": (F.multi_margin_loss, classes),
    "multilabel_margin_loss": (F.multilabel_margin_loss, integers(CLASSES, CLASSES)),
    "multilabel_soft_margin_loss": (F.multilabel_soft_margin_loss, binary),
    "hinge_embedding_loss": (F.hinge_embedding_loss, signs(CLASSES)),
    "margin_ranking_loss": (lambda out, y: F.margin_ranking_loss(out[:, 0], out[:, 1], y, margin=0.5), sign),
}
for name, (loss, target) in LOSSES.items():
    _add("Losses", {name: mlp}, both(vectors, target), loss_fn=partial(target_loss, loss))
OTHER_LOSSES: dict[str, tuple[Callable[..., Tensor], BatchMaker]] = {
    "cosine_embedding_loss": (partial(F.cosine_embedding_loss, margin=-0.9), both(vectors, reals, sign)),
    "triplet_margin_loss": (F.triplet_margin_loss, both(vectors, reals, reals)),
    "cross_entropy, a label a position": (
        lambda out, y: F.cross_entropy(out.transpose(1, 2), y),
        both(sequences, integers(CLASSES, TIME)),
    ),
    "ctc_loss": (
        lambda out, y, *sizes: F.ctc_loss(out.log_softmax(-1).transpose(0, 1), y, *sizes),
        both(sequences, lambda g: 1 + integers(CLASSES - 1, 2)(g), lengths, lambda g: torch.tensor([2, 1, 2, 1])),
    ),
}
for name, (loss, batch) in OTHER_LOSSES.items():
    _add("Losses", {name: mlp}, batch, loss_fn=partial(target_loss, loss))


class AdaptiveSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 6), nn.AdaptiveLogSoftmaxWithLoss(6, VOCABULARY, [4])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.body(x).tanh(), y).output


_add("Losses", {"AdaptiveLogSoftmaxWithLoss": AdaptiveSoftmax}, both(vectors, integers(VOCABULARY)))


# ---------------------------------------------------------------------------------------------- torchvision and timm
def torchvision_model(kind: str, **options: Any) -> nn.Module:
    from torchvision import models

    return getattr(models, kind)(**options, num_classes=CLASSES)


def timm_model(kind: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(kind, pretrained=False, num_classes=CLASSES, **options)


def photographs(side: int, examples: int = EXAMPLES) -> BatchMaker:
    return both(normal(3, side, side, examples=examples), integers(CLASSES, examples=examples))


cross_entropy_loss = partial(target_loss, F.cross_entropy)
VIT = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 12, "mlp_dim": 16}
VISION: dict[str, tuple[Maker, BatchMaker]] = {
    # At least 2 × 2 positions are left at the end, so that a channel's batch statistics are those of 16 numbers.
    "ResNet-18": (partial(torchvision_model, "resnet18"), photographs(48)),
    "DenseNet-121": (partial(torchvision_model, "densenet121"), photographs(64)),
    "MobileNetV3 small": (partial(torchvision_model, "mobilenet_v3_small"), photographs(48)),
    "EfficientNet-B0": (partial(torchvision_model, "efficientnet_b0"), photographs(64)),
    "ShuffleNetV2 x0.5": (partial(torchvision_model, "shufflenet_v2_x0_5"), photographs(48)),
    "RegNetY-400MF": (partial(torchvision_model, "regnet_y_400mf"), photographs(48)),
    "SqueezeNet 1.1": (partial(torchvision_model, "squeezenet1_1"), photographs(32)),
    "ConvNeXt-T": (partial(torchvision_model, "convnext_tiny"), photographs(32, 2)),
    "Swin-T": (partial(torchvision_model, "swin_t"), photographs(32, 2)),
    "ViT, reduced": (partial(torchvision_model, "VisionTransformer", **VIT), photographs(32)),
}
TIMM = {
    "ViT-Ti/16": (partial(timm_model, "vit_tiny_patch16_224", img_size=32), photographs(32, 2)),
    "ConvNeXt-Atto": (partial(timm_model, "convnext_atto"), photographs(32, 2)),
    "ResNet-10-T": (partial(timm_model, "resnet10t"), photographs(64)),
    "Mixer-S/32": (partial(timm_model, "mixer_s32_224", img_size=64), photographs(64, 2)),
}
LARGE = {"ResNet-18", "DenseNet-121", "EfficientNet-B0", "RegNetY-400MF", "ConvNeXt-T", "Swin-T"}
LARGE |= {"ResNet-10-T", "Mixer-S/32"}
for library, models in {"torchvision": VISION, "timm": TIMM}.items():
    for name, (make, batch) in models.items():
        size = "large" if name in LARGE else "small"
        _add(library, {f"{name} ({library})": make}, batch, loss_fn=cross_entropy_loss, size=size)


# ---------------------------------------------------------------------------------------------- transformers
def transformers_model(kind: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(vocab_size=VOCABULARY, **options))


def text(g: torch.Generator) -> dict[str, Tensor]:
    """Token numbers, 0 where a sequence has ended, as a tokenizer gives them."""
    mask = ~padding(g)
    ids = 1 + integers(VOCABULARY - 1, TIME)(g)
    return {"input_ids": ids * mask, "attention_mask": mask.long(), "labels": ids.where(mask, -100)}


def translation(g: torch.Generator) -> dict[str, Tensor]:
    """A source and a target; the decoder sees the target one position late."""
    source, target = text(g), text(g)
    late = target["input_ids"].roll(1, 1)
    late[:, 0] = 0
    return source | {"decoder_input_ids": late, "labels": target["labels"]}


def labelled_text(g: torch.Generator) -> dict[str, Tensor]:
    return text(g) | {"labels": classes(g)}


def masked_text(g: torch.Generator) -> dict[str, Tensor]:
    """Every other token is hidden, and only hidden ones have labels."""
    batch, hidden = text(g), torch.arange(TIME) % 2 == 0
    return batch | {
        "input_ids": batch["input_ids"].where(~hidden, VOCABULARY - 1) * batch["attention_mask"],
        "labels": batch["labels"].where(hidden, -100),
    }


WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 20, "max_position_embeddings": 8}
WIDTHS |= {"initializer_range": 0.3}  # at a width of 16, the usual 0.02 would leave activations near zero
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "initializer_range": 0.3}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
LLAMA = {**WIDTHS, "num_attention_heads": 4, "num_key_value_heads": 2}
BERT = {**WIDTHS, "num_attention_heads": 2, "num_labels": CLASSES}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2}
next_token_loss = partial(token_loss, shift=True)
TEXT: dict[str, tuple[str, str, dict[str, Any], BatchMaker, UserLoss]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, text, next_token_loss),
    "Llama, grouped queries": ("LlamaForCausalLM", "LlamaConfig", LLAMA, text, next_token_loss),
    "BERT, masked tokens": ("BertForMaskedLM", "BertConfig", BERT, masked_text, token_loss),
    "BERT, classification": ("BertForSequenceClassification", "BertConfig", BERT, labelled_text, sequence_class_loss),
    "T5": ("T5ForConditionalGeneration", "T5Config", T5, translation, token_loss),
}
for name, (kind, config, options, batch, loss_fn) in TEXT.items():
    make = partial(transformers_model, kind, config, **options)
    _add("transformers", {f"{name} (transformers)": make}, batch, loss_fn=loss_fn)
