"""What the diagnostics of `examine` mean: findings, a table on the screen, one page, and CSV.

Every threshold was set beside networks that train well as they are, on 32 images of CIFAR-10: plain-5-8, plain-20-8,
resnet-20, VGG-16, MobileNetV3, torchvision's ResNet-18, timm's ViT-Tiny, and a GPT-2 of four layers on random
characters. "Healthy" below is what these gave.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from rich import box
from rich.console import Console
from rich.table import Table as ScreenTable
from rich.text import Text

from common.layers import SLOPE_OFF
from reproduce.figures import is_number, log_scale
from reproduce.page import (
    INK,
    MUTED,
    SERIES,
    WIDTH,
    Cell,
    Code,
    Column,
    Part,
    Picture,
    Prose,
    Section,
    Table,
    footer_of,
    svg_of,
    write_csv,
    write_page,
)

Result = dict[str, Any]
Row = dict[str, Any]

LOSS_ABOVE = 3.0
"""Nats above a guess at which the classifier is far too sure of itself: it gives the right class 20 times less than a
guess would. Healthy: up to 1.6 (He's rule without normalisation, whose outputs vary by about 1)."""
LOSS_BELOW = 0.5
"""Nats below a guess, which no weights drawn at random should reach: the input tells the label."""
DEAD_SHARE = 0.5
"""Units of one activation that are off for the whole batch. Healthy: up to 0.09, and 0.5 in MobileNet's gates, which
see one position an example."""
DEAD_SIZE = 0.01
"""Largest |output| up to which a unit that is off counts as dead, not as saturated."""
WEIGHT_LARGE = 10.0
"""‖W‖ over He's, of a layer and relative to the model's median layer. Healthy: up to 2.5 (MobileNet's depth-wise
convolutions), and 3 times the median."""
WEIGHT_SMALL = 0.01
"""‖W‖ over He's below which a layer passes next to nothing on. Healthy: 0.04 and more."""
ACTIVATION_RANGE = 1000.0
"""Largest over smallest standard deviation of the weight layers' outputs. Healthy: up to 260 (MobileNet)."""
GRADIENT_RANGE = 1e4
"""Largest over smallest gradient norm at the weight layers' outputs. Healthy: up to 1200 (MobileNet)."""
QUOTIENT_LARGE = 1e4
"""Gradient quotient. Healthy: 9 (plain-5-8 with BatchNorm) to 4300 (resnet-20 without); MetaInit ends below 1."""
DECREASE = 0.01
"""Share of the loss that the best of all normalised steps must take off. Healthy: 0.02 (GPT-2) to 0.4."""
STEP_SMALL = 0.01
"""Length of the best step, in parameter space, below which the loss is too sharp to step on. Healthy: 0.1 to 3."""
LISTED = 4
"""Names that a finding lists before it counts the rest."""
FEWER_STEPS = "with --options steps=50 where its hundreds of steps take too long"
GUARDED = (
    "Look there for a root, a norm, a power, a logarithm or a quotient at exactly 0, whose slope is infinite: add a "
    "small number inside it, as in sqrt(x + 1e-12). torch.where after it does not help, as 0 times infinity is NaN."
)
MEND = "Mend what is said above of the gradient first"
"""Parts of what to try."""

HEALTHY = {
    "loss": (
        "close to ln(classes), the loss of a guess; up to about 1.5 above it without normalisation.",
        "Too high: scale the last layer down, or start with --method metainit or gradinit.",
    ),
    "gradient norm": (
        "finite, and neither 0 nor far beyond 50; alone it says little, the look-ahead says more.",
        "Huge: --method gradinit, which bounds it; zero: see the parameters without gradient.",
    ),
    "layers": (
        "weights within a factor of ten of He's rule or, in networks with normalisation, somewhat below; activations "
        "and gradients that neither shrink nor grow steadily from layer to layer.",
        "A steady slope: --method kaiming, orthogonal or lsuv; one layer out of line: its own initialisation.",
    ),
    "dead": (
        "no activation with more than half of its units off for the whole batch.",
        "Dead: biases of 0 and He's rule in the layer before; saturated: smaller weights, or Xavier.",
    ),
    "gradients": (
        "every trainable parameter receives a gradient that is not zero.",
        "Unused or detached: mend the model. Zero: a zero layer or dead units lie between the parameter and the loss.",
    ),
    "gradient quotient": (
        "1 to a few thousand, the lower the better: how much the gradient changes along one step, relative to itself.",
        f"High: --method metainit, which descends on it, {FEWER_STEPS}.",
    ),
    "zero entries": (
        "few, but for what the input never reaches: rows of an embedding, or a kernel's border where images are small "
        "(62 % in torchvision's ResNet-18 on 32×32).",
        "Many more: look for dead units and zero layers.",
    ),
    "gradient agreement": (
        "at its floor, which examples shared between groups give by themselves, or above; near it is usual for a batch "
        "with balanced classes.",
        "Low: --method nio, which raises it.",
    ),
    "signs": (
        "at chance or above: the share of votes, one a group and coordinate, that agree beyond cancelling.",
        "Low: --method nio, as for GradCosine.",
    ),
    "look-ahead": (
        "a valley, whose lowest point lies at a step of length 0.1 or more and clearly below the start.",
        "No valley, or only at tiny steps: --method gradinit, which descends on it; or warm-up.",
    ),
    "learning rate": (
        "what that step is as the first learning rate of SGD, η/‖g‖.",
        "Begin a search for the learning rate near it.",
    ),
    "derivatives": (
        "every quantity right, against finite differences in float64.",
        "Wrong or refused: write the layer that is named in elementary operations, or use a method that needs no such "
        "derivative (kaiming, orthogonal, lsuv).",
    ),
}
"""By diagnostic: what is healthy, and what to try where it is not."""


def explained(key: str) -> str:
    """Both, as a paragraph."""
    healthy, remedy = HEALTHY[key]
    return f"Healthy: {healthy} {remedy}"


# ---------------------------------------------------------------------------------------------- findings
def findings_of(result: Result) -> list[dict[str, str]]:
    """What is wrong, the gravest first: `what` was found, and what to `try`, a sentence or two each."""
    found: list[dict[str, str]] = []
    for finder in FINDERS:
        found += [{"what": what, "try": remedy} for what, remedy in finder(result)]
    return found


Found = Iterator[tuple[str, str]]


def not_finite(result: Result) -> Found:
    if math.isfinite(result["loss"]):
        return
    broken = next((row["name"] for row in result["layers"] if row["called"] and not _is_finite(row)), None)
    where = f", and {_layer(broken)} is the first whose output is not finite" if broken else ""
    yield (
        f"The loss is {result['loss']}{where}.",
        "Scale weights down (--method kaiming), or look for NaN in the batch; nothing else can be measured before.",
    )


def _is_finite(row: Row) -> bool:
    return math.isfinite(row["activation_std"]) and math.isfinite(row["activation_mean"])


def gradient_not_finite(result: Result) -> Found:
    if result["not_finite"] is None:
        return
    names, where = result["not_finite"]["parameters"], _where_it_begins(result)
    if names:
        own = result["gradient agreement"]
        groups = f" It is so for {own['not_finite']} of {own['groups']} {own['of']}." if own else ""
        yield (
            f"The gradient is not finite in {len(names)} of {result['tensors']} parameters: "
            f"{_list(map(_quoted, names))}. {where}{groups} The loss is finite, but one step of training makes these "
            "weights NaN.",
            f"{GUARDED} If there is nothing of the kind, numbers overflow: --method kaiming.",
        )
    elif not math.isfinite(result["gradient_norm"]):
        yield (
            f"The norm of the gradient is {result['gradient_norm']}. {where}".rstrip(),
            "Numbers overflow: scale weights down (--method kaiming), or look for a quotient by next to nothing.",
        )
    else:
        yield (
            f"A gradient on the way back from the loss is not finite, although that of every parameter is. {where} "
            "What metainit, gradinit and nio differentiate once more is NaN there, as a rule.",
            GUARDED,
        )


def _where_it_begins(result: Result) -> str:
    """The last layer that a gradient which is not finite arrives at: what makes it lies between that and the
    loss, or, where the gradient at its output is finite, within."""
    rows, operation = result["layers"], result["not_finite"]["operation"]
    in_torch = f", in torch's {operation}" if operation else ""
    for row in reversed(rows):
        name = _layer(row["name"]) if row["units"] is None else _small(_activation(row))
        if not _finite_or_none(row["output_gradient_norm"]):
            return f"It begins between {name} and the loss{in_torch}."
        if not _finite_or_none(row["gradient_norm"]):
            return f"It begins in {name}{in_torch}."
    return f"It begins in torch's {operation}." if operation else ""


def _finite_or_none(value: float | None) -> bool:
    return value is None or math.isfinite(value)


def layers_not_finite(result: Result) -> Found:
    """Weights and outputs, where the loss is finite all the same."""
    rows = result["layers"]
    if names := [row["name"] for row in rows if not _finite_or_none(row["weight_norm"])]:
        yield (
            f"Weights are not finite: layer{'s' if len(names) > 1 else ''} {_list(map(_quoted, names))}.",
            "Initialise by a rule that draws them anew (--method kaiming), or look at where they were loaded from.",
        )
    names = [row["name"] for row in rows if row["called"] and not _is_finite(row)]
    if names and math.isfinite(result["loss"]):
        yield (
            f"Outputs are not finite, although the loss is: {_list(map(_quoted, names))}.",
            "Look for a logarithm or a quotient of 0, or numbers that overflow; what is masked afterwards still spoils "
            "derivatives.",
        )


def loss_against_chance(result: Result) -> Found:
    loss, chance = result["loss"], result["chance"]
    if chance is None or not math.isfinite(loss):
        return
    if loss > chance + LOSS_ABOVE:
        yield (
            f"The loss is {_number(loss)}, beside the {chance:.3g} of a guess among {_classes(chance)} classes: the "
            "model is sure of what it cannot know.",
            "Scale the last layer down, or tame the scale that grows towards it: --method metainit or gradinit.",
        )
    if loss < chance - LOSS_BELOW:
        yield (
            f"The loss is {_number(loss)} before any training, below the {chance:.3g} of a guess among "
            f"{_classes(chance)} classes.",
            "Check whether the input holds the label, whether weights are trained ones, and how labels are balanced.",
        )


def _classes(chance: float) -> str:
    return f"{round(math.exp(chance))}"


def dead_units(result: Result) -> Found:
    rows = [row for row in result["layers"] if (row["dead_share"] or 0.0) > DEAD_SHARE]
    behind = [row for row in rows if _is_constant(result, row["follows"])]
    for row in (row for row in rows if row not in behind or row is rows[0]):
        units = f"{_percent(row['dead_share'])} of its {row['units']} units"
        if row["dead_size"] > DEAD_SIZE:
            yield (
                f"{_activation(row)}: {units} are saturated for {_batch(result)}, and pass next to no gradient.",
                "Scale down the weights before it (--method xavier or lsuv), or standardise its input.",
            )
            continue
        follows = f" of {_quoted(row['follows'])}" if row["follows"] is not None else " before it"
        also = [_activation(other) for other in behind] if row is rows[0] and row["dead_share"] == 1 else []
        consequence = f" For that reason alone, so are those of {', '.join(map(_small, also))}." if also else ""
        yield (
            f"{_activation(row)}: {units} are zero for {_batch(result)}: nothing passes through them, and no gradient."
            + consequence,
            f"Set the biases{follows} to 0 and its weights by He's rule (--method kaiming); check for inputs of one "
            "sign.",
        )


def _is_constant(result: Result, name: str | None) -> bool:
    """Whether a layer puts out the same number everywhere, as one without weights or behind dead units does."""
    return any(row["name"] == name and row["activation_std"] == 0 for row in result["layers"])


def _activation(row: Row) -> str:
    """An activation by its own name, or, where it is a function, by the module that calls it."""
    where = f"Activation in {_quoted(row['name'])}" if row["kind"].islower() else f"Activation {_quoted(row['name'])}"
    after = "" if row["follows"] is None else f" after {_quoted(row['follows'])}"
    return f"{where} ({row['kind']}{after})"


def _small(text: str) -> str:
    return text[0].lower() + text[1:]


def _batch(result: Result) -> str:
    return f"all {result['examples']} examples" if result["examples"] else "the whole batch"


def parameters_without_gradient(result: Result) -> Found:
    by_reason: dict[str, list[str]] = {}
    for name, reason in result["without_gradient"].items():
        by_reason.setdefault(reason, []).append(name)
    count = result["tensors"]
    if names := by_reason.get("unused"):
        yield (
            f"{_tensors(names, count)} no gradient at all, because the loss never uses {_them(names)}: "
            f"{_list(map(_quoted, names))}.",
            "Use the layer in `forward`, or leave it out of the model; freeze it (requires_grad=False) if it is meant.",
        )
    if names := by_reason.get("detached"):
        yield (
            f"{_tensors(names, count)} no gradient at all, although the forward pass uses {_them(names)}: "
            f"{_list(map(_quoted, names))}. What the layer puts out is detached, or not used for the loss.",
            "Look for detach(), no_grad(), .data, .item(), argmax or rounding between the layer and the loss, or for "
            "an output that is dropped.",
        )
    if names := by_reason.get("no path"):
        yield (
            f"{_tensors(names, count)} no gradient at all: {_list(map(_quoted, names))}. No path that can be "
            f"differentiated leads from {_them(names)} to the loss.",
            "Look whether `forward` uses them, and for detach(), no_grad() or .data where it does.",
        )
    if names := by_reason.get("zero"):
        zero = [_layer(row["name"]) for row in result["layers"] if row["weight_norm"] == 0]
        dead = [_small(_activation(row)) for row in result["layers"] if row["dead_share"] == 1]
        cause = f" In the way: {_list(zero + dead)}." if zero + dead else ""
        remedy = "Look for what multiplies by 0 between these parameters and the loss."
        if zero:
            remedy = (
                "A zero layer is often meant (ViT's head, Fixup, zero-γ) and ends with the first step; but methods "
                "that learn from the gradient at initialisation (metainit, gradinit, nio) see nothing behind it: give "
                "it small weights first."
            )
        elif dead:
            remedy = "Revive the units, as said above."
        yield f"{_tensors(names, count)} a gradient of exactly 0: {_list(map(_quoted, names))}.{cause}", remedy


def _tensors(names: Sequence[str], count: int) -> str:
    return f"{len(names)} of {count} parameters receive{'s' if len(names) == 1 else ''}"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"


def weights_out_of_line(result: Result) -> Found:
    ratios = {r["name"]: r["kaiming_ratio"] for r in result["layers"] if r["kaiming_ratio"]}
    ratios = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    if not ratios:
        return
    median = median_low(ratios.values())  # of two layers, not the one that may be out of line
    large = {n: r for n, r in ratios.items() if r > max(1.0, WEIGHT_LARGE * median)}
    if median > WEIGHT_LARGE:
        yield (
            f"Weights are {_number(median)} times as large as He's rule makes them, in the median of {len(ratios)} "
            "layers.",
            "Initialise by a rule that knows the fan-in: --method kaiming, xavier or torch_default.",
        )
    for name, ratio in large.items():
        yield (
            f"Layer {_quoted(name)}: its weights are {_number(ratio)} times as large as He's rule makes them; the "
            f"median of the model's layers is {median:.2g}.",
            f"Initialise it like the others, or divide its weights by about {_number(ratio / median)}.",
        )
    small = {n: r for n, r in ratios.items() if r < WEIGHT_SMALL}
    if small:
        names = list(small)
        yield (
            f"Layer{'s' if len(names) > 1 else ''} {_list(map(_quoted, names))}: weights are less than a hundredth "
            f"of what He's rule makes them ({min(small.values()):.2g} times), and pass next to nothing on.",
            "Initialise by a rule that knows the fan-in (--method kaiming), unless the layer is meant to start near 0.",
        )


def scale_of_activations(result: Result) -> Found:
    rows = _weight_rows(result)
    stds = {row["name"]: row["activation_std"] for row in rows if row["activation_std"]}
    yield from _spread(
        stds, ACTIVATION_RANGE, "outputs", "a standard deviation of",
        "Keep the scale from layer to layer: --method kaiming, orthogonal or lsuv, or normalisation.",
    )  # fmt: skip


def scale_of_gradients(result: Result) -> Found:
    norms = {row["name"]: row["output_gradient_norm"] for row in _weight_rows(result) if row["output_gradient_norm"]}
    yield from _spread(
        norms, GRADIENT_RANGE, "gradients at the outputs", "a norm of",
        "Keep the scale from layer to layer: --method kaiming or orthogonal, skip connections, or normalisation.",
    )  # fmt: skip


def _spread(values: dict[str, float], bound: float, what: str, measure: str, remedy: str) -> Found:
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return
    low, high = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    ratio = values[high] / values[low]
    if ratio > bound:
        yield (
            f"The layers' {what} differ in scale by a factor of {_number(ratio)}: {measure} {_number(values[low])} "
            f"at {_quoted(low)}, of {_number(values[high])} at {_quoted(high)}.",
            remedy,
        )


def _weight_rows(result: Result) -> list[Row]:
    return [row for row in result["layers"] if row["kaiming_ratio"] is not None and row["called"]]


def quotient(result: Result) -> Found:
    own = result["gradient quotient"]
    if own and not math.isfinite(own["gradient_quotient"]):
        yield (
            f"The gradient quotient is {own['gradient_quotient']}: the gradient is finite, but its change along a step "
            "(a Hessian-vector product) is not.",
            f"{f'{MEND}.' if result['not_finite'] else GUARDED} Until then metainit, gradinit and nio cannot be used.",
        )
    elif own and own["gradient_quotient"] > QUOTIENT_LARGE:
        yield (
            f"The gradient quotient is {_number(own['gradient_quotient'])}: along one step the gradient changes by far "
            "more than itself.",
            f"Use --method metainit, which descends on it, {FEWER_STEPS}.",
        )


def agreement(result: Result) -> Found:
    own = result["gradient agreement"]
    if not own:
        return
    if own["zero"]:
        yield (
            f"{own['zero']} of {own['groups']} {own['of']} have a gradient of exactly 0.",
            "Look for units that are dead for these inputs, and for a loss that masks them.",
        )
    values = [own[key] for key in ("grad_cosine", "grad_norm", "grad_sign")]
    if result["not_finite"] and result["not_finite"]["parameters"]:
        return  # it is said there
    if own["not_finite"]:
        yield (
            f"{own['not_finite']} of {own['groups']} {own['of']} have a gradient that is not finite, taken by "
            "themselves.",
            f"{GUARDED} Until then nio cannot be used.",
        )
    elif not all(map(math.isfinite, values)):
        yield (
            f"GradCosine is {own['grad_cosine']}, and the mean norm of the {own['of']}' gradients {own['grad_norm']}: "
            "numbers overflow.",
            "Scale weights down: --method kaiming.",
        )


def look_ahead(result: Result) -> Found:
    own = result["look-ahead"]
    if not own:
        return
    if own["best_loss"] is None:
        yield (
            f"The loss is not finite after any step along the gradient, whatever its length from {own['steps'][0]:g} "
            f"to {own['steps'][-1]:g}.",
            "Look for a root, a logarithm or a quotient of what a step makes negative or 0, and for numbers that "
            "overflow.",
        )
        return
    broken = [eta for eta, loss in zip(own["steps"], own["losses"], strict=True) if not is_number(loss)]
    if broken:
        yield (
            "The loss is not finite after a step along the gradient of length "
            f"{', '.join(f'{eta:.3g}' for eta in broken)}.",
            "Look for a root, a logarithm or a quotient of what such a step makes negative or 0, and for numbers that "
            "overflow; stay well below, or bound the gradient's norm in training.",
        )
    if own["loss"] - own["best_loss"] < DECREASE * abs(own["loss"]):
        yield (
            f"No step along the gradient lowers the loss by more than {100 * DECREASE:.0f} %, whatever its length "
            f"from {own['steps'][0]:g} to {own['steps'][-1]:g}.",
            "Look at the gradient first: is it zero where it should not be, or of one layer alone? Then try --method "
            f"gradinit, {FEWER_STEPS}.",
        )
    elif own["best_step"] < STEP_SMALL:
        yield (
            f"The loss falls only along steps shorter than {STEP_SMALL:g}: it is lowest after one of "
            f"{own['best_step']:.2g}, and higher again beyond.",
            f"Use --method gradinit or metainit ({FEWER_STEPS}); or begin at a learning rate of "
            f"{own['learning_rate']:.1g}, with warm-up.",
        )


def wrong_derivatives(result: Result) -> Found:
    checks = result["derivatives"] or {}
    own = result["gradient quotient"]
    is_known = result["not_finite"] is not None or (own is not None and not math.isfinite(own["gradient_quotient"]))
    first = (
        "Mend what is said above first: a detached layer, and units that sit exactly on ReLU's kink, differ too. "
        if any("no gradient" in what for what, _ in (*parameters_without_gradient(result), *dead_units(result)))
        else ""
    )
    trusted = "until then, methods that need these derivatives are not to be trusted here"
    wrong = {name: own for name, own in checks.items() if own["verdict"] == "wrong"}
    if wrong:
        finite = [own["error"] for own in wrong.values() if math.isfinite(own["error"])]
        infinite = len(wrong) - len(finite)  # where a derivative is NaN, the check's error is infinite
        size = f", by up to {max(finite):.1e} of their size" if finite else ""
        also = f" ({infinite} of these {'is' if infinite == 1 else 'are'} not finite)" if infinite else ""
        remedy = MEND if infinite and is_known else f"{first}Write the layer in elementary operations"
        yield (
            f"{len(wrong)} of {len(checks)} derivatives differ from finite differences{size}{also}: "
            f"{', '.join(wrong)}.{_at_fault(wrong)}",
            f"{remedy}; {trusted}.",
        )
    refused = {name: own for name, own in checks.items() if own["verdict"] == "refused"}
    if refused:
        said = next((own["note"] for own in refused.values() if own["note"]), None)
        remedy = (
            "Write the layer in elementary operations, or use a method that needs no derivative of this order "
            "(kaiming, orthogonal, lsuv)"
        )
        yield (
            f"{len(refused)} of {len(checks)} derivatives cannot be computed: {', '.join(refused)}."
            f"{_at_fault(refused)} {said or 'What comes out is not finite.'}",
            f"{MEND if said is None and is_known else remedy}.",
        )


def _at_fault(checks: dict[str, dict[str, Any]]) -> str:
    layers = dict.fromkeys(layer for own in checks.values() for layer in own["layers"])
    return f" At fault: {_list(layers)}." if layers else ""


FINDERS: tuple[Callable[[Result], Found], ...] = (
    not_finite, gradient_not_finite, layers_not_finite, dead_units, parameters_without_gradient, weights_out_of_line,
    loss_against_chance, scale_of_activations, scale_of_gradients, look_ahead, quotient, agreement, wrong_derivatives,
)  # fmt: skip


def _quoted(name: str) -> str:
    return f"'{name}'"


def _layer(name: str) -> str:
    return f"layer {_quoted(name)}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _number(value: float) -> str:
    """Three digits, in full where that is as short."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _list(names: Iterable[str]) -> str:
    """The first of them, and how many there are besides."""
    names = list(names)
    shown = ", ".join(names[:LISTED])
    return shown if len(names) <= LISTED else f"{shown} and {len(names) - LISTED} more"


# ---------------------------------------------------------------------------------------------- numbers in words
def numbers(result: Result) -> list[tuple[str, str, str]]:
    """Diagnostic by diagnostic: its name, its value, and the key of `HEALTHY` that explains it."""
    return [(own.name, own.text, own.key) for own in _diagnostics(result)]


def number_rows(result: Result) -> list[list[Any]]:
    """The same for programs, by `NUMBER_COLUMNS`: a row a quantity of a diagnostic, or the reason why there is none."""
    return [
        [own.name, quantity, value, own.missing]
        for own in _diagnostics(result)
        for quantity, value in (own.values or {None: None}).items()
    ]


class Diagnostic(NamedTuple):
    """A row of "Every number"."""

    name: str
    text: str
    key: str
    values: Mapping[str, Any]
    missing: str | None = None


def _diagnostics(result: Result) -> Iterator[Diagnostic]:
    yield Diagnostic("Loss", _loss(result), "loss", {"loss": result["loss"], "chance": result["chance"]})
    norm = result["gradient_norm"]
    yield Diagnostic("Gradient norm", f"{norm:.4g}", "gradient norm", {"gradient_norm": norm})
    shares = [row["dead_share"] for row in result["layers"] if row["dead_share"] is not None]
    text = f"{100 * max(shares):.0f} %" if shares else "no activation"
    yield Diagnostic("Units off, worst activation", text, "dead", {"dead_share": max(shares, default=None)})
    lacking = {"without_gradient": len(result["without_gradient"]), "tensors": result["tensors"]}
    text = f"{lacking['without_gradient']} of {lacking['tensors']}"
    yield Diagnostic("Parameters without gradient", text, "gradients", lacking)
    for part, rows in PART_NUMBERS.items():
        own = result[part]
        if own is None:
            name, _, key, _ = rows[0]
            yield Diagnostic(name, f"none: {result['refused'][part]}", key, {}, result["refused"][part])
            continue
        for name, text_of, key, quantities in rows:
            values = {quantity: own[quantity] for quantity in quantities} if part != "derivatives" else _counted(own)
            yield Diagnostic(name, text_of(own), key, values)


def _cosine(own: dict[str, Any]) -> str:
    return f"{own['grad_cosine']:.4f} (floor {own['floor']:.4g}; {own['groups']} {own['of']})"


def _loss(result: Result) -> str:
    chance = result["chance"]
    return f"{result['loss']:.4g}" + ("" if chance is None else f" (a guess: ln {_classes(chance)} = {chance:.4g})")


def _agreement(own: dict[str, Any]) -> str:
    if own["agreement"] is None:
        return "no gradient in any coordinate"
    if not math.isfinite(own["agreement"]):
        return "none: a gradient is not finite"
    return f"{100 * own['agreement']:.0f} % (by chance {100 * own['agreement_by_chance']:.0f} %)"


def _best_step(own: dict[str, Any]) -> str:
    if own["best_step"] is None:
        return f"none: loss {own['loss']:.4g}, and not finite after any step"
    return f"length {own['best_step']:.3g}: loss {own['loss']:.4g} → {own['best_loss']:.4g}"


def _learning_rate(own: dict[str, Any]) -> str:
    return "none" if own["learning_rate"] is None else f"{own['learning_rate']:.2g}"


def _verdicts(own: dict[str, dict[str, Any]]) -> str:
    wrong = [name for name, check in own.items() if check["verdict"] != "right"]
    return f"all {len(own)} right" if not wrong else f"not right: {', '.join(wrong)}"


def _counted(own: dict[str, dict[str, Any]]) -> dict[str, int]:
    verdicts = [check["verdict"] for check in own.values()]
    return {verdict: verdicts.count(verdict) for verdict in ("right", "wrong", "refused")}


PART_NUMBERS: dict[str, list[tuple[str, Callable[[dict[str, Any]], str], str, Sequence[str]]]] = {
    "gradient quotient": [
        (
            "Gradient quotient", lambda own: f"{own['gradient_quotient']:.4g}", "gradient quotient",
            ("gradient_quotient", "live_gradient_quotient"),
        ),
        ("Gradient entries exactly 0", lambda own: _percent(own["dead_fraction"]), "zero entries", ["dead_fraction"]),
    ],
    "gradient agreement": [
        (
            "GradCosine", _cosine, "gradient agreement",
            ("grad_cosine", "floor", "groups", "of", "zero", "not_finite", "grad_norm", "norm_ratio"),
        ),
        (
            "GradSign: agreement of signs", _agreement, "signs",
            ("agreement", "agreement_by_chance", "grad_sign"),
        ),
    ],
    "look-ahead": [
        ("Best normalised step", _best_step, "look-ahead", ("best_step", "loss", "best_loss", "gradient_norm")),
        ("… as a learning rate of SGD", _learning_rate, "learning rate", ("learning_rate",)),
    ],
    "derivatives": [("Derivatives", _verdicts, "derivatives", ())],
}  # fmt: skip
"""By part of `examine`: names and values of what it measures, the key of `HEALTHY`, and its quantities in the CSV."""


# ---------------------------------------------------------------------------------------------- the screen
def print_report(console: Console, result: Result) -> None:
    """Findings, then the numbers."""
    console.print()
    console.print(Text(headline(result), style="bold"))
    for number, finding in enumerate(result["findings"], start=1):
        console.print(Text(f"{number}. {finding['what']}"))
        console.print(Text(f"   Try: {finding['try']}", style="italic"))
    table = ScreenTable(box=box.SIMPLE_HEAD, title=f"{result['model']} at initialisation", title_justify="left")
    table.add_column("diagnostic", overflow="fold")
    table.add_column("value", overflow="fold")
    for name, value, _ in numbers(result):
        table.add_row(Text(name), Text(value))
    console.print(table)


def headline(result: Result) -> str:
    count = len(result["findings"])
    return "No findings." if count == 0 else f"{count} finding{'s' if count > 1 else ''}."


# ---------------------------------------------------------------------------------------------- the page
LAYER_COLUMNS = (
    Column("layer", help="The module's name; of a function, the module that calls it."),
    Column("kind"),
    Column("number", True, "In the order of the forward pass: the figure's axis."),
    Column("‖W‖", True, "Frobenius norm of the weights, biases left out."),
    Column("× He", True, "‖W‖ over what He's rule for ReLU (fan-in) gives: 1 is He's, 0.41 torch's default."),
    Column("mean", True, "Of every entry of the output, over the batch."),
    Column("deviation", True, "Standard deviation of the same."),
    Column("‖∂L/∂θ‖", True, "Norm of the gradient in the layer's own parameters."),
    Column("‖∂L/∂output‖", True, "Norm of the gradient that arrives at the output."),
    Column(
        "off",
        True,
        f"Share of an activation's units with a slope of at most {SLOPE_OFF} for every example and position.",
    ),
)
LAYER_CSV_COLUMNS = (
    "name", "kind", "follows", "called", "weight_norm", "kaiming_ratio", "activation_mean", "activation_std",
    "gradient_norm", "output_gradient_norm", "units", "dead_share", "dead_size",
)  # fmt: skip


NUMBER_COLUMNS = ("diagnostic", "quantity", "value", "missing")
LOOK_AHEAD_COLUMNS = ("step", "loss", "promised")
DERIVATIVE_COLUMNS = ("quantity", "verdict", "error", "note", "layers")
TABLES = ("numbers.csv", "layers.csv", "look_ahead.csv", "derivatives.csv")
"""What stands beside the page: every number of it, in full."""


def write_report(
    folder: Path, result: Result, *, command: str, config: Mapping[str, Any], environment: Mapping[str, Any]
) -> Path:
    """`page.html` and `TABLES` in the folder; the page's path.

    Args:
        folder: Of the run.
        result: From `examine`, with what was asked.
        command: What was typed, to be shown and typed again.
        config: Of the run.
        environment: As in `environment.json`: data identity, device, versions.
    """
    tables = {
        "numbers.csv": (NUMBER_COLUMNS, number_rows(result)),
        "layers.csv": (LAYER_CSV_COLUMNS, [[row[key] for key in LAYER_CSV_COLUMNS] for row in result["layers"]]),
        "look_ahead.csv": (LOOK_AHEAD_COLUMNS, look_ahead_rows(result["look-ahead"])),
        "derivatives.csv": (DERIVATIVE_COLUMNS, derivative_rows(result["derivatives"])),
    }
    for name in TABLES:
        columns, rows = tables[name]
        write_csv(folder / name, columns, [list(map(_csv, row)) for row in rows])
    path = folder / "page.html"
    repeat = Section("How to repeat this", list(_repeat_parts(command, config, environment)))
    write_page(
        path,
        title=f"{result['model']} at initialisation",
        lead=f"{headline(result)} {_lead(result)}",
        sections=[*sections_of(result), repeat],
        footer=footer_of(environment),
    )
    return path


def look_ahead_rows(own: dict[str, Any] | None) -> list[list[float]]:
    """A row a length, from 0: the loss after the step, and what the gradient promises of it."""
    if own is None:
        return []
    points = [(0.0, own["loss"]), *zip(own["steps"], own["losses"], strict=True)]
    return [[eta, loss, own["loss"] - eta * own["gradient_norm"]] for eta, loss in points]


def derivative_rows(own: dict[str, dict[str, Any]] | None) -> list[list[Any]]:
    """A row a quantity that was checked."""
    return [
        [name, check["verdict"], check["error"], check["note"] or None, "; ".join(check["layers"]) or None]
        for name, check in (own or {}).items()
    ]


def _repeat_parts(command: str, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Iterator[Part]:
    yield Code(command)
    yield Prose(
        f"Data: {environment['data']['identity']}\n\n"
        "The seed fixes the model's own draw, what the method draws, and the batch. Every number of this page is in "
        f"{', '.join(TABLES[:-1])} and {TABLES[-1]}, beside it."
    )
    yield Code(json.dumps(config, indent=2, default=str))


def _csv(value: Any) -> Any:
    return str(value) if isinstance(value, bool) else value


def _lead(result: Result) -> str:
    options = f" ({' '.join(result['options'])})" if result["options"] else ""
    first = f"initialised by {result['method']}{options}" if result["method"] else "as it comes"
    return (
        f"{result['description']}, {first}; one batch of {result['dataset']}, "
        f"{result['examples'] or 'an unknown number of'} examples, no training."
    )


def sections_of(result: Result) -> list[Section]:
    """The page's parts."""
    findings = [Prose("\n\n".join(f"{k}. {f['what']} Try: {f['try']}" for k, f in enumerate(result["findings"], 1)))]
    if not result["findings"]:
        findings = [Prose("Nothing is out of the ranges that healthy networks have.")]
    rows = [[name, value, *_in_cells(HEALTHY[key])] for name, value, key in numbers(result)]
    columns = [Column("diagnostic"), Column("value"), Column("what is healthy"), Column("what to try")]
    table = Table("Every number", columns, rows, is_prose=True)
    sections = [
        Section("Findings", findings),
        Section("In numbers", [table]),
        Section("Layer by layer", [Prose(explained("layers")), *layer_parts(result)]),
    ]
    if result["look-ahead"] and any(map(is_number, result["look-ahead"]["losses"])):
        sections.append(Section("One step along the gradient", [look_ahead_picture(result["look-ahead"])]))
    if result["without_gradient"]:
        rows = [[name, reason] for name, reason in result["without_gradient"].items()]
        lacking = Table("Parameters without gradient", [Column("parameter"), Column("reason")], rows, is_folded=True)
        sections.append(Section("Gradients that are not there", [Prose(explained("gradients")), lacking]))
    if result["derivatives"]:
        sections.append(Section("Derivatives", [Prose(explained("derivatives")), derivative_table(result)]))
    return sections


def _in_cells(texts: tuple[str, str]) -> list[str]:
    return [text[0].upper() + text[1:] for text in texts]


def layer_parts(result: Result) -> list[Part]:
    parts: list[Part] = []
    if _weight_rows(result):
        parts.append(
            Picture(
                svg_of(lambda: draw_scales(result)),
                "Three panels over the layers in the order of the forward pass: weight norm over He's, standard "
                "deviation of the output, and norm of the gradient at the output, on logarithmic axes.",
                "Weight layers in the order of the forward pass, by their numbers in the table. What is 0 or not "
                "finite is left out.",
            )
        )
    rows = [
        [
            row["name"], row["kind"], float(number), row["weight_norm"], _ratio(row["kaiming_ratio"]),
            row["activation_mean"], row["activation_std"], row["gradient_norm"], row["output_gradient_norm"],
            _share(row["dead_share"]),
        ]
        for number, row in enumerate(result["layers"], start=1)
    ]  # fmt: skip
    caption = explained("dead")
    parts.append(Table("Layers and activations", LAYER_COLUMNS, rows, caption, is_folded=len(rows) > 24))
    return parts


def _ratio(ratio: float | None) -> Cell | None:
    if ratio is None:
        return None
    return Cell(f"{ratio:.3g}", ratio, ratio > WEIGHT_LARGE or ratio < WEIGHT_SMALL)


def _share(share: float | None) -> Cell | None:
    return None if share is None else Cell(f"{100 * share:.0f} %", share, share > DEAD_SHARE)


def derivative_table(result: Result) -> Table:
    columns = [Column("quantity"), Column("verdict"), Column("relative error", True), Column("note")]
    rows = [
        [name, Cell(own["verdict"], emphasis=own["verdict"] != "right"), own["error"], own["note"] or None]
        for name, own in result["derivatives"].items()
    ]
    return Table("Against finite differences", columns, rows)


def look_ahead_picture(own: dict[str, Any]) -> Picture:
    return Picture(
        svg_of(lambda: draw_look_ahead(own)),
        f"Loss after one step along the normalised gradient against its length, from {own['steps'][0]:g} to "
        f"{own['steps'][-1]:g}: lowest, {own['best_loss']:.4g}, at {own['best_step']:.2g}; {own['loss']:.4g} before.",
        "Loss after θ ← θ − η g/‖g‖ on the same batch, and what the gradient promises, L − η‖g‖. "
        + explained("look-ahead"),
    )


# ---------------------------------------------------------------------------------------------- figures
def draw_scales(result: Result) -> Figure:
    """Weights over He's, activations and gradients of the weight layers, one above the other."""
    numbered = [(k, row) for k, row in enumerate(result["layers"], start=1) if row in _weight_rows(result)]
    figure = Figure(figsize=(1.6 * WIDTH, 4.8), layout="constrained")
    panels = figure.subplots(3, sharex=True)
    titles = {
        "kaiming_ratio": "‖W‖ over He's",
        "activation_std": "Standard deviation of the output",
        "output_gradient_norm": "‖∂L/∂output‖",
    }
    for number, (axes, (key, title)) in enumerate(zip(panels, titles.items(), strict=True)):
        points = [(k, row[key]) for k, row in numbered if is_number(row[key]) and row[key] > 0]
        axes.set_title(title)
        if key == "kaiming_ratio":
            axes.axhline(1.0, color=MUTED, linewidth=0.9, linestyle="--")
        if points:
            axes.plot(*zip(*points, strict=True), color=SERIES[number], marker="o", markersize=3.5, linewidth=1)
        _decades(axes)
    panels[-1].set_xlabel("number of the layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _decades(axes: Axes) -> None:
    """Logarithmic in y, a decade at least, so that what hardly varies looks so."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    middle = math.sqrt(low * high)
    low, high = min(low, middle / math.sqrt(10)), max(high, middle * math.sqrt(10))
    log_scale(axes, (1.0,) if high > 100 * low else (1, 2, 5))
    axes.set_ylim(low, high)


def draw_look_ahead(own: dict[str, Any]) -> Figure:
    """Loss against the length of a normalised step, with where it starts and what a linear model promises."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    points = [(eta, loss) for eta, loss in zip(own["steps"], own["losses"], strict=True) if is_number(loss)]
    axes.axhline(own["loss"], color=MUTED, linewidth=0.9, linestyle="--", label="before")
    promised = [(eta, own["loss"] - eta * own["gradient_norm"]) for eta, _ in points]
    axes.plot(
        *zip(*promised, strict=True), color=SERIES[1], linewidth=1, linestyle=":", label="promised by the gradient"
    )
    axes.plot(*zip(*points, strict=True), color=SERIES[0], marker="o", markersize=4, label="after the step")
    low = min(min(loss for _, loss in points), own["loss"])
    span = max(own["loss"] - low, 0.05 * abs(own["loss"])) or 1.0
    axes.set(xscale="log", xlabel="length η of the step", ylabel="loss", ylim=(low - 0.3 * span, own["loss"] + span))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(loc="upper left", labelcolor=INK)
    return figure
