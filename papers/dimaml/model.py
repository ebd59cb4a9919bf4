"""The laws of a whole model's initial weights, by the names of its tensors: learned on one model, drawn for another.

A key is a parameter's name, or, in recurrent layers that stack the matrices of several gates, name and gate:
`lstm.weight_ih_l0[input]` is the law of that gate's rows. Shapes are no part of it: a law applies to whatever shape the
tensor of its name has, that of another vocabulary, say.

Source: the released code of DIMAML.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from common.functional import check_bare, load_parameters_, names_of
from common.initializers import CONVOLUTIONS, RECURRENT, TRANSPOSED
from common.options import check_choice, check_whole
from common.scales import Patterns, kinds_of, matches
from common.types import InitResult, NotFiniteError, Params
from papers.dimaml.distributions import PLIF, Family, Normal, Rule, Variant, lacking_spread
from papers.dimaml.files import read_distribution, write_distribution

Start = Family | Callable[[Tensor], Family]
"""What a tensor's law starts as: a law, or a function of the tensor's own values."""

GATES = {
    (nn.LSTM, nn.LSTMCell): ("input", "forget", "cell", "output"),
    (nn.GRU, nn.GRUCell): ("reset", "update", "new"),
}


class InitDistribution:
    """A law a tensor. Treat as immutable: learning makes a new one by `with_parameters`.

    Attributes:
        families: Normal or PLIF by key.
        skipped: Tensors of the model it was made from that have none, with the reason.
        history: What learning it recorded, a dictionary a meta-step; not part of the file.

    Example:
        >>> small, large = nn.Embedding(5, 3), nn.Embedding(50, 3)
        >>> law = InitDistribution.from_model(small)
        >>> list(law.initialize_(large, torch.Generator().manual_seed(0)).scales)
        ['weight']
    """

    def __init__(
        self,
        families: Mapping[str, Family],
        *,
        skipped: Mapping[str, str] | None = None,
        history: list[dict[str, float]] | None = None,
    ) -> None:
        for key, family in families.items():
            if not (isinstance(key, str) and isinstance(family, Family)):
                raise TypeError(
                    f"InitDistribution: `families` must map names to Normal or PLIF, got {key!r}: {family!r}."
                )
        self.families = dict(families)
        self.skipped = dict(skipped or {})
        self.history = list(history or [])

    def __repr__(self) -> str:
        lines = [f"  {key}: {family!r}" for key, family in self.families.items()]
        return "\n".join([f"InitDistribution of {len(lines)} laws", *lines])

    # ------------------------------------------------------------------------------------------ where it starts
    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        family: Literal["normal", "plif"] = "normal",
        *,
        pieces: int = 100,
        rule: Rule | None = None,
        known_bounds: bool | None = None,
        start: Mapping[str, Start] | None = None,
        include: Patterns | str = ("*",),
        exclude: Patterns | str = (),
        variant: Variant = "paper",
    ) -> Self:
        r"""A law for every trainable tensor, read off the values it has now.

        None get: frozen tensors; gains and shifts of normalisation layers, which stay 1 and 0; tensors, or gates, whose
        values are all equal (a layer that starts at zero), of one element, or not finite. `skipped` tells. A tied
        tensor has one law, under its first name. An embedding's padding row is left out.

        Args:
            model: Any bare module, freshly initialised; only read.
            family: "normal": the tensor's mean and standard deviation. "plif": a uniform law, see `PLIF.from_tensor`.
            pieces: K of PLIF.
            rule: Of PLIF.
            known_bounds: Whether biases of convolutions and linear layers (a = 1/√fan_in) and recurrent layers
                (a = 1/√hidden) start from the law U(±a) that torch draws them from rather than from their values, which
                may be few: U(±a) for PLIF, and Normal(0, a²/3), or as released Normal(0, a²), √3 wider. None: where
                `variant` is "released".
            start: Laws, or functions of a tensor's values, by kind ("embedding"), name pattern or key; the last that
                means a tensor counts, before any other rule but that of frozen tensors, `include` and `exclude`.
            include: Kinds ("conv", "linear", "bias", "embedding", "norm", "other"), name patterns or keys with a law.
            exclude: Those that get none.
            variant: "released": see `PLIF.from_tensor` and `known_bounds`.

        Raises:
            TypeError: A wrapped model; a start that gives no law.
            ValueError: An option out of range; a pattern that means no tensor; nothing to learn.
        """
        caller = "InitDistribution.from_model"
        check_bare(model, caller)
        check_choice(caller, "family", family, ("normal", "plif"))
        check_choice(caller, "rule", rule, (None, "moments", "range"))
        check_choice(caller, "known_bounds", known_bounds, (None, False, True))
        check_choice(caller, "variant", variant, ("paper", "released"))
        check_whole(caller, pieces=pieces, smallest=1)
        include, exclude = ((given,) if isinstance(given, str) else given for given in (include, exclude))
        start = start or {}
        known_bounds = variant == "released" if known_bounds is None else known_bounds
        plan = blocks_of(model)
        kinds = kinds_of(model)
        _check_patterns(caller, (*include, *exclude, *start), kinds, plan)
        of_norms = _norm_parameters(model)
        bounds = _bounds_of(model) if known_bounds else {}
        own_values = Normal.from_tensor if family == "normal" else _plif_of(pieces, rule, variant)
        families, skipped = {}, {}
        for block in plan:
            name, kind = block.name, kinds[block.name]
            told = [value for pattern, value in start.items() if _means(pattern, block, kind)]
            left_out = not any(_means(p, block, kind) for p in include) or any(_means(p, block, kind) for p in exclude)
            values = block.values()
            if not block.parameter.requires_grad:
                skipped[block.key] = "frozen: requires_grad is False"
            elif left_out:
                skipped[block.key] = "left out by `include` and `exclude`"
            elif told:
                families[block.key] = _started(caller, block, told[-1], values)
            elif name in of_norms:
                skipped[block.key] = "of a normalisation layer: stays as it is"
            elif reason := lacking_spread(values):
                skipped[block.key] = f"{reason}: stays as it is"
            elif name in bounds:
                law = _from_bound(bounds[name], family, pieces, variant)
                families[block.key] = _started(caller, block, law, values)
            else:
                families[block.key] = own_values(values)
        if not families:
            reasons = "; ".join(f"{key}: {why}" for key, why in list(skipped.items())[:5])
            raise ValueError(
                f"{caller}: at least one trainable tensor must have values with a spread, got none"
                f"{f' ({reasons})' if reasons else ''}. Initialise the model first, or pass laws by `start`."
            )
        return cls(families, skipped=skipped)

    # ------------------------------------------------------------------------------------------ its parameters
    def parameters(self) -> Params:
        """Every law's parameters in one dictionary: `fc.weight.mean`, `lstm.weight_ih_l0[input].scale`, …"""
        return {
            f"{key}.{field}": value
            for key, family in self.families.items()
            for field, value in family.parameters().items()
        }

    def with_parameters(self, parameters: Mapping[str, Tensor]) -> "InitDistribution":
        """The same laws with other parameters, named as in `parameters`; those may carry a graph.

        Raises:
            ValueError: A name too many or missing, or another shape than the law's parameter has.
        """
        own = self.parameters()
        if differing := own.keys() ^ parameters.keys():
            raise ValueError(
                f"InitDistribution.with_parameters: names must be those of `parameters()`, got a difference in "
                f"{_listed(sorted(differing))}."
            )
        for key, value in parameters.items():
            if value.shape != own[key].shape:
                raise ValueError(
                    f"InitDistribution.with_parameters: {key!r} must have shape {tuple(own[key].shape)}, got "
                    f"{tuple(value.shape)}."
                )
        families = {
            key: family.with_parameters({field: parameters[f"{key}.{field}"] for field in family.fields})
            for key, family in self.families.items()
        }
        return InitDistribution(families, skipped=self.skipped, history=self.history)

    # ------------------------------------------------------------------------------------------ what it is for
    def sample(
        self, model: nn.Module, generator: torch.Generator, *, antithetic: bool = False, ignore_extra: bool = False
    ) -> Params:
        """Initial weights for `model`, which is only read: differentiable in the laws' parameters.

        Args:
            model: Whose names, shapes, types and devices.
            generator: Of all noise: the same state gives the same weights. Tensors are independent of each other.
            antithetic: Mirror the noise, see `distributions.sample`.
            ignore_extra: Pass over laws of names that the model does not have.

        Returns:
            One tensor a trainable parameter that has a law, by its first name; gates and padding rows without one as
            the model has them. What is not there: `untouched`.

        Raises:
            TypeError: A wrapped model, or no generator.
            ValueError: Laws of names that the model does not have, or of none that it has; a complex tensor with a law.
        """
        caller = "InitDistribution.sample"
        check_bare(model, caller)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"{caller}: `generator` must be a torch.Generator, got {type(generator).__name__}.")
        drawn: dict[str, list[Tensor]] = {}
        plan = self._plan(caller, model, ignore_extra)
        touched = {block.name for block, law in plan if law and block.parameter.requires_grad}
        if other := [
            block.name for block, _ in plan if block.name in touched and not block.tensor().is_floating_point()
        ]:
            raise ValueError(
                f"{caller}: tensors with a law must be of real floating point, got another in {_listed(other)}."
            )
        for block, law in plan:
            if block.name in touched:
                drawn.setdefault(block.name, []).append(block.drawn(law, generator, antithetic=antithetic))
        return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in drawn.items()}

    def initialize_(
        self, model: nn.Module, generator: torch.Generator, *, antithetic: bool = False, ignore_extra: bool = False
    ) -> InitResult:
        """Draw initial weights and write them into `model`, in place: all of them or, on any error, none.

        Args: as for `sample`.

        Returns:
            `scales`: new norm over old norm of every tensor written (infinite where the old one was 0); `skipped`: what
            was left alone, with the reason.

        Raises:
            TypeError, ValueError: As `sample` does.
            NotFiniteError: A weight that is not finite (a ValueError too).
            RuntimeError: A parameter that cannot be written (an expanded view, say).
        """
        with torch.no_grad():
            drawn = self.sample(model, generator, antithetic=antithetic, ignore_extra=ignore_extra)
            own = {name: leaf for name, leaf in model.named_parameters() if name in drawn}
            if broken := [name for name, value in drawn.items() if not value.isfinite().all()]:
                raise NotFiniteError(
                    f"InitDistribution.initialize_: every weight must be finite, got another in {_listed(broken)}. "
                    "Likely causes: parameters that are not, or a short floating-point type. The model is unchanged."
                )
            scales = {name: _ratio(value.norm().item(), own[name].norm().item()) for name, value in drawn.items()}
            load_parameters_(model, drawn)
        return InitResult(scales, [], self.untouched(model, ignore_extra=ignore_extra))

    def untouched(self, model: nn.Module, *, ignore_extra: bool = False) -> dict[str, str]:
        """The tensors and gates of `model` that a draw leaves as they are, with the reason."""
        return {
            block.key: "frozen: requires_grad is False"
            if not block.parameter.requires_grad
            else self.skipped.get(block.key, "it has no law of this name")
            for block, law in self._plan("InitDistribution.untouched", model, ignore_extra)
            if law is None or not block.parameter.requires_grad
        }

    def _plan(self, caller: str, model: nn.Module, ignore_extra: bool) -> list[tuple["Block", Family | None]]:
        """Each block of the model with its law, if there is one under any of its names."""
        blocks = blocks_of(model)
        known = {key for block in blocks for key in block.keys}
        extra = [key for key in self.families if key not in known]
        if extra and (not ignore_extra or len(extra) == len(self.families)):
            remedy = (
                "None of its names fit: is it of another model?"
                if len(extra) == len(self.families)
                else "Rename the modules, or pass ignore_extra=True to initialise the others."
            )
            raise ValueError(
                f"{caller}: the model must have every tensor that there is a law for, lacks {_listed(extra)}; "
                f"its own are {_listed([block.key for block in blocks])}. {remedy}"
            )
        return [
            (block, next((self.families[key] for key in block.keys if key in self.families), None)) for block in blocks
        ]

    # ------------------------------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a header; whole, or not at all.

        Raises:
            ValueError: A parameter that is not finite.
            OSError: The file cannot be written.
        """
        write_distribution(Path(path), self.families, self.skipped)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, bit by bit. Nothing but tensors and JSON is read: a pickle never is.

        Raises:
            ValueError: The file is damaged, is none of `save`, or of another version.
            OSError: It is not there, or cannot be read.
        """
        families, skipped = read_distribution(Path(path))
        return cls(families, skipped=skipped)


# ---------------------------------------------------------------------------------------------- which rows are whose
class Block(NamedTuple):
    """A tensor that is drawn from one law: a parameter, or the rows of one gate in it.

    Attributes:
        names: Every name of the parameter, several where it is tied, the first first.
        gate: Which, if it is one.
        parameter: The whole parameter.
        rows: The gate's rows; None: all.
        padding: The row of an embedding that stays as it is.
    """

    names: tuple[str, ...]
    gate: str | None
    parameter: Tensor
    rows: slice | None
    padding: int | None

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def keys(self) -> tuple[str, ...]:
        """What its law may be called."""
        return self.names if self.gate is None else tuple(f"{name}[{self.gate}]" for name in self.names)

    @property
    def key(self) -> str:
        return self.keys[0]

    def tensor(self) -> Tensor:
        leaf = self.parameter.detach()
        return leaf if self.rows is None else leaf[self.rows]

    def values(self) -> Tensor:
        """What a law is read off."""
        leaf = self.tensor()
        return leaf if self.padding is None else torch.cat([leaf[: self.padding], leaf[self.padding + 1 :]])

    def drawn(self, law: Family | None, generator: torch.Generator, *, antithetic: bool) -> Tensor:
        own = self.tensor()
        if law is None:
            return own.clone()
        new = law.sample(own.shape, generator, antithetic=antithetic, dtype=own.dtype, device=own.device)
        if self.padding is None:
            return new
        is_padding = torch.arange(len(own), device=own.device) == self.padding
        return torch.where(is_padding[:, None], own, new)


def blocks_of(model: nn.Module) -> list[Block]:
    """All parameters of a model as the blocks that are drawn by themselves, a tied one once, in order."""
    names = names_of(model)
    paddings = {
        id(layer.weight): layer.padding_idx
        for layer in model.modules()
        if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.padding_idx is not None
    }
    blocks = []
    for name, parameter in model.named_parameters():
        known_as, padding = tuple(names[name]), paddings.get(id(parameter))
        gates = _gates_of(model, name)
        if not gates:
            blocks.append(Block(known_as, None, parameter, None, padding))
        h = len(parameter) // len(gates) if gates else 0
        for g, gate in enumerate(gates):
            blocks.append(Block(known_as, gate, parameter, slice(g * h, (g + 1) * h), padding))
    return blocks


def _gates_of(model: nn.Module, name: str) -> tuple[str, ...]:
    """The gates that a parameter of a recurrent layer stacks; an LSTM's projection (`weight_hr`) has none."""
    path, _, own = name.rpartition(".")
    layer = model.get_submodule(path)
    if not own.startswith(("weight_ih", "weight_hh", "bias_ih", "bias_hh")):
        return ()
    return next((gates for kinds, gates in GATES.items() if isinstance(layer, kinds)), ())


# ---------------------------------------------------------------------------------------------- small parts
def _norm_parameters(model: nn.Module) -> set[str]:
    """Gains and shifts of normalisation layers, as `kinds_of` tells them; it calls the shifts biases."""
    layers = {path for path, layer in model.named_modules() if "norm" in type(layer).__name__.lower()}
    return {name for name in kinds_of(model) if name.rpartition(".")[0] in layers}


def _bounds_of(model: nn.Module) -> dict[str, float]:
    """a of torch's U(±a): for biases 1/√fan_in, as torch counts it from the weight's shape; 1/√hidden if recurrent."""
    bounds = {}
    for path, layer in model.named_modules():
        if isinstance(layer, RECURRENT):
            own = dict(layer.named_parameters(path, recurse=False))
            bounds |= dict.fromkeys(own, int(layer.hidden_size) ** -0.5)
        elif isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
            bounds[f"{path}.bias".removeprefix(".")] = math.prod(layer.weight.shape[1:]) ** -0.5
    return bounds


def _from_bound(a: float, family: str, pieces: int, variant: Variant) -> Family:
    if family == "normal":
        std = a if variant == "released" else a / math.sqrt(3)
        return Normal(torch.zeros((), dtype=torch.float64), torch.tensor(std, dtype=torch.float64))
    return PLIF.from_quantiles(lambda u: 2 * u - 1, pieces, 0.0, scale=a, variant=variant, dtype=torch.float64)


def _plif_of(pieces: int, rule: Rule | None, variant: Variant) -> Callable[[Tensor], Family]:
    return lambda values: PLIF.from_tensor(values, pieces=pieces, rule=rule, variant=variant)


def _started(caller: str, block: Block, start: Start, values: Tensor) -> Family:
    """A law of the block's own, where its tensor is."""
    law = start if isinstance(start, Family) else start(values) if callable(start) else None
    if not isinstance(law, Family):
        raise TypeError(
            f"{caller}: `start` must give a Normal or a PLIF for {block.key!r}, got "
            f"{type(start if law is None else law).__name__}."
        )
    if not values.is_floating_point():
        raise TypeError(f"{caller}: {block.key!r} must be of floating point to have a law, got {values.dtype}.")
    dtype = torch.promote_types(values.dtype, torch.float32)
    return law.with_parameters(
        {field: value.detach().to(values.device, dtype, copy=True) for field, value in law.parameters().items()}
    )


def _means(pattern: str, block: Block, kind: str) -> bool:
    return pattern in block.keys or matches(block.names, kind, [pattern])


def _check_patterns(caller: str, patterns: Patterns, kinds: Mapping[str, str], plan: list[Block]) -> None:
    for pattern in patterns:
        if pattern != "*" and not any(_means(pattern, block, kinds[block.name]) for block in plan):
            raise ValueError(
                f"{caller}: a pattern must mean at least one tensor, got {pattern!r}. Patterns are a kind "
                f"({', '.join(sorted(set(kinds.values())))}), a name with wildcards, or a key, of which the model has "
                f"{_listed([block.key for block in plan])}."
            )


def _ratio(new: float, old: float) -> float:
    return new / old if old else math.inf if new else 1.0


def _listed(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "none"
