"""What is wrong with this model at initialisation? One model, one batch, no training, one page.

    python -m reproduce.examine --model torchvision:resnet18 --data cifar10 --data-dir FOLDER
    python -m reproduce.examine --model hf:config.json --data pydoc --method metainit --options steps=50

The loss beside chance, scales of weights, activations and gradients layer by layer, units that are dead or saturated,
parameters without a gradient, gradient quotient, GradCosine, GradSign, the loss after one step of any length, and
whether derivatives are right on this very model. What a model refuses stands on the page with the reason.
"""

import json
import math
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import Node

from common.batches import first_examples, length_of
from common.derivatives import check_differentiable, gradient, group_gradients, hvp
from common.descent import trainable
from common.functional import classification_loss, pure_loss, uses_batch_statistics
from common.guard import check_derivatives
from common.layers import Layers, examine_layers
from common.precision import full_precision
from common.record import as_recorded, device_name, device_of, write_environment
from common.tree import flatten, numel, tree_add
from common.types import Batch, Params, UserLoss
from papers import method_of
from papers.gradinit import gradient_norm, step_direction
from papers.metainit import relative_change
from papers.metainit.objective import diagnostics
from papers.nio import grad_cosine_floor, gradient_tensors, windows
from papers.nio.objective import statistics
from reproduce.apply import apply
from reproduce.bring import bring_data, bring_loss, bring_model, describe_model, keyword_loss
from reproduce.command import begin, end_well, make_progress, options_of
from reproduce.examine_report import TABLES, findings_of, print_report, write_report

EXPERIMENT = "examine"

SUB_BATCHES = 4
"""D, where BatchNorm couples the examples: NIO's default."""
EPSILON = 1e-5
"""ε of the gradient quotient: MetaInit's."""
STEPS = tuple(10 ** (k / 2) for k in range(-6, 3))
"""η of the look-ahead curve, lengths in parameter space: from 0.001 to 10, with GradInit's 0.1 in the middle."""
MEMORY = 1 << 30
"""Bytes that per-example gradients, or the graph of a second derivative, may take at once, roughly."""
GRAPH = 8
"""Bytes of a second derivative's graph for each byte of the layers' outputs: 5 on a ViT, 1 on residual networks."""
NOT_FINITE = "the gradient is not finite"
"""Why something is not measured."""
GUARD_SECONDS = 60.0
"""How long the derivative check may take without being asked for."""
GUARD_PASSES, GUARD_EXAMPLES = 200, 4
"""What the check costs, in forward and backward passes in float32, and of how many examples."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options."""

    model: str
    """A network of common.networks (resnet-20, plain-5-8-bn, charlstm), torchvision:NAME, timm:NAME, hf:CONFIG.json, or
    package.module:callable."""
    model_options: tuple[str, ...] = ()
    """Of the model, as key=value: image_size=224."""
    data: str = "auto"
    """auto, cifar10, cifar100, tiny-imagenet, digits, noise, ptb, wikitext2, pydoc, hub:NAME, a folder of images, or
    package.module:callable."""
    loss: str | None = None
    """package.module:callable, of (model, batch). Default: cross-entropy, or what the model returns as its loss."""
    method: str | None = None
    """Initialise by this method of papers.METHODS first. Default: as the model comes."""
    options: tuple[str, ...] = ()
    """Of the method, as key=value: gamma=10 steps=50. Default: as papers.initialize has them."""
    batch_size: int = 16
    """Examples of the one batch."""
    derivatives: Literal["auto", "always", "never"] = "auto"
    """Check derivatives against finite differences. auto: where that takes a minute or less, by estimate."""
    seed: int = 0
    """Of the model's weights, of what the method draws, and of the batch."""
    data_dir: Path | None = None
    """Folder that holds the data. Default: the variable LEARNED_INIT_DATA."""
    output: Path | None = None
    """Folder of the report. Default: a new one under runs/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    quiet: bool = False
    """No progress on standard error."""


# ---------------------------------------------------------------------------------------------- what is measured
class Problem:
    """A model's loss at its initialisation, on one batch, and how much of it fits into memory at once."""

    def __init__(self, model: nn.Module, loss_fn: UserLoss, batch: Batch, layers: Layers) -> None:
        self.model, self.batch = model, batch
        self.loss = pure_loss(model, loss_fn, order=2)
        self.theta: Params = {name: leaf.detach() for name, leaf in trainable(model).items()}
        self.is_coupled = uses_batch_statistics(model, "batch")
        self.entries = layers.entries

    @cached_property
    def size(self) -> int:
        return length_of(self.batch, EXPERIMENT, "An example must be a slice of every tensor.")

    @cached_property
    def micro_batch(self) -> int | None:
        """Examples of which a second derivative's graph is held at once; None where they cannot be divided."""
        if self.is_coupled:
            return None
        fitting = MEMORY // (GRAPH * 4 * max(1, self.entries // self.size))
        return None if fitting >= self.size else max(1, fitting)

    @cached_property
    def gradient(self) -> Params:
        return gradient(self.loss, self.theta, self.batch, micro_batch_size=self.micro_batch)

    def groups(self) -> list[slice]:
        """Single examples, or sub-batches where statistics are taken of a batch."""
        if self.is_coupled:
            return windows(self.size, SUB_BATCHES)
        return [slice(k, k + 1) for k in range(self.size)]

    def groups_at_once(self) -> int:
        of_graph = GRAPH * 4 * self.entries // len(self.groups()) // 2  # of a first derivative: half
        return max(1, MEMORY // max(4 * numel(self.theta), of_graph))


def find_not_finite(problem: Problem) -> dict[str, Any]:
    """Where the gradient is not finite: the `parameters`, and the `operation` of torch's graph that it begins in.

    The operation is the first, on the way back from the loss, that makes of a finite gradient one that is not; None
    where there is none, as where numbers grow too large for their sum of squares alone.
    """
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in problem.theta.items()}
    began: list[str] = []

    def watch(node: Node) -> None:
        name = node.name()

        def see(made: Sequence[Tensor | None], arrived: Sequence[Tensor | None]) -> None:
            if not began and _are_finite(arrived) and not _are_finite(made):
                began.append(name)

        node.register_hook(see)

    value = problem.loss(leaves, problem.batch)
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            watch(node)
            waiting += [following for following, _ in node.next_functions]
    found = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()), allow_unused=True), strict=True))
    return {
        "parameters": [name for name, leaf in found.items() if not _are_finite([leaf])],
        "operation": began[0] if began else None,
    }


def _are_finite(tensors: Sequence[Tensor | None]) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in tensors if leaf is not None)


def measure_quotient(problem: Problem) -> dict[str, float]:
    """GQ, with H g summed over micro-batches where a whole batch would not fit."""
    check_differentiable(problem.loss, problem.theta, first_examples(problem.batch, 2), "gradient_quotient")
    g = problem.gradient
    if not _are_finite(list(g.values())):
        raise ValueError(NOT_FINITE)
    Hg = hvp(problem.loss, problem.theta, g, problem.batch, micro_batch_size=problem.micro_batch)
    change = relative_change(flatten(g), flatten(Hg), epsilon=EPSILON)
    return {key: value.item() for key, value in diagnostics(flatten(g), change).items()}


def measure_agreement(problem: Problem) -> dict[str, Any]:
    """GradCosine with its floor, and GradSign, in one pass over the groups.

    `agreement` is GradSign over its largest value, n a coordinate, of coordinates in which any group has a gradient;
    NaN where a group's gradient is not finite, as NaN has no sign. `zero` and `not_finite` count such groups.
    """
    groups, at_once = problem.groups(), problem.groups_at_once()
    names = gradient_tensors(problem.model, "without_batch_norm")
    votes: dict[str, Tensor] = {}
    live: dict[str, Tensor] = {}

    def gradients() -> Iterator[Params]:
        for k in range(0, len(groups), at_once):
            own = group_gradients(problem.loss, problem.theta, problem.batch, groups[k : k + at_once], wrt=names)
            for name, leaf in own.items():
                votes[name] = votes.get(name, 0) + leaf.sign().sum(0)
                live[name] = live.get(name, False) | leaf.ne(0).any(0)
            yield own

    with torch.no_grad():
        seen = statistics(gradients())
        metrics = seen.metrics()
        agreed = sum(leaf.abs().sum().item() for leaf in votes.values())  # papers.nio.grad_sign, group by group
        entries = sum(leaf.sum().item() for leaf in live.values())
    n = len(groups)
    not_finite = int((~seen.r.isfinite()).sum())
    agreed = math.nan if not_finite else agreed
    return {
        "groups": n,
        "zero": int((seen.r == 0).sum()),
        "not_finite": not_finite,
        "of": "sub-batches" if problem.is_coupled else "examples",
        "grad_cosine": metrics["grad_cosine"].item(),
        "floor": grad_cosine_floor(groups),
        "grad_norm": metrics["grad_norm"].item(),
        "norm_ratio": math.nan if not_finite else metrics["norm_ratio"].item(),
        "grad_sign": agreed,
        "agreement": agreed / (n * entries) if entries else None,
        "agreement_by_chance": agreement_by_chance(n),
    }


def agreement_by_chance(n: int) -> float:
    r"""𝔼|Σ s_i| / n for n fair signs s_i: (n−1 choose ⌊(n−1)/2⌋) / 2ⁿ⁻¹.

    Example:
        >>> agreement_by_chance(2), agreement_by_chance(4)
        (0.5, 0.375)
    """
    return math.comb(n - 1, (n - 1) // 2) / 2 ** (n - 1)


@torch.no_grad()
def measure_look_ahead(problem: Problem) -> dict[str, Any]:
    """L(θ − η g/‖g‖) for every η of `STEPS`, on the batch that g is of.

    `best_step`, `best_loss` and `learning_rate` are None where no step leads to a loss that is finite.
    """
    g = problem.gradient
    norm = gradient_norm(g, "l2").item()
    if not math.isfinite(norm):
        raise ValueError(f"{NOT_FINITE}, so that there is no direction to step along")
    if norm == 0:
        raise ValueError("the gradient is zero, so that there is no direction to step along")
    A = step_direction(g, "normalized_sgd")

    def ahead(eta: float) -> float:
        return problem.loss(tree_add(problem.theta, A, scale=-eta), problem.batch).item()

    losses = [ahead(eta) for eta in STEPS]
    before = ahead(0.0)
    finite = [(loss, eta) for loss, eta in zip(losses, STEPS, strict=True) if math.isfinite(loss)]
    best_loss, best_step = min(finite, default=(None, None))
    return {
        "loss": before,
        "gradient_norm": norm,
        "steps": list(STEPS),
        "losses": losses,
        "best_step": best_step,
        "best_loss": best_loss,
        "learning_rate": None if best_step is None else best_step / norm,
    }


def measure_derivatives(model: nn.Module, loss_fn: UserLoss, batch: Batch) -> dict[str, Any]:
    """The exactness guard's report, by quantity."""
    with warnings.catch_warnings():
        # torch compiles its own forward-mode formulas at first use, and deprecates how it does so
        warnings.filterwarnings("ignore", "`torch.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", "`torch.jit", category=DeprecationWarning)
        report = check_derivatives(model, loss_fn, batch, examples=GUARD_EXAMPLES)
    return {
        name: {
            "error": check.error,
            "verdict": "right" if check.agrees else "refused" if check.refused else "wrong",
            "note": check.note,
            "layers": check.layers,
        }
        for name, check in report.checks.items()
    }


def examine(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batch: Batch = None,
    *,
    num_classes: int | None = None,
    derivatives: Literal["auto", "always", "never"] = "auto",
    on_part: Callable[[str], None] = lambda part: None,
) -> dict[str, Any]:
    """Every diagnostic of one model on one batch; the model is only read.

    Args:
        model: Any bare `nn.Module`, dropout off, BatchNorm with the batch's statistics.
        loss_fn: `loss_fn(model, batch)`, the mean over examples.
        batch: On the model's device.
        num_classes: Of a classification by cross-entropy, for the loss of a guess; None: unknown.
        derivatives: Whether they are checked, as in `Config`.
        on_part: Called with the name of each part before it begins.

    Returns:
        What `findings_of` and the report read: `layers` and numbers by diagnostic; `refused`, by diagnostic, why a
        number is missing; `not_finite`, where a gradient is not, from `find_not_finite`, else None; `findings`.

    Raises:
        TypeError: A wrapped, quantised or lazy model.
        ValueError: No trainable parameter, or a loss that is no scalar.
    """
    on_part("layers")
    start = time.perf_counter()
    layers = examine_layers(model, loss_fn, batch)
    seconds = time.perf_counter() - start
    problem = Problem(model, loss_fn, batch, layers)
    result: dict[str, Any] = {
        "loss": layers.loss,
        "chance": None if num_classes is None else math.log(num_classes),
        "gradient_norm": layers.gradient_norm,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(problem.theta),
        "layers": layers.rows,
        "without_gradient": layers.without_gradient,
        "frozen": layers.frozen,
        "refused": {},
    }
    parts: dict[str, Callable[[], Any]] = {
        "gradient quotient": lambda: measure_quotient(problem),
        "gradient agreement": lambda: measure_agreement(problem),
        "look-ahead": lambda: measure_look_ahead(problem),
        "derivatives": lambda: measure_derivatives(model, loss_fn, batch),
    }
    result["examples"] = len_or_none(problem)
    for part, measure in parts.items():
        on_part(part)
        reason = None
        if not math.isfinite(layers.loss):
            reason = f"the loss is {layers.loss}"
        elif part == "derivatives":
            reason = too_long(seconds, result["examples"], derivatives)
        result[part] = None
        if reason is None:
            try:
                result[part] = measure()
            except Exception as error:  # whatever a model raises on a piece of its batch: the page says why
                reason = in_short(error)
        if reason is not None:
            result["refused"][part] = reason
    result["not_finite"] = where_not_finite(problem, layers, result["refused"])
    result["findings"] = findings_of(result)
    return result


def where_not_finite(problem: Problem, layers: Layers, refused: Mapping[str, str]) -> dict[str, Any] | None:
    """What `find_not_finite` finds, asked only where the loss is finite and a gradient is not."""
    gradients = [layers.gradient_norm, *(row["output_gradient_norm"] or 0.0 for row in layers.rows)]
    # the layers' pass goes through torch's fused kernels, the measurements through what they are made of
    is_said = any(reason.startswith(NOT_FINITE) for reason in refused.values())
    if not math.isfinite(layers.loss) or (all(map(math.isfinite, gradients)) and not is_said):
        return None
    try:
        return find_not_finite(problem)
    except Exception:  # found all the same: the layers say about where
        return {"parameters": [], "operation": None}


PARTS = ("layers", "gradient quotient", "gradient agreement", "look-ahead", "derivatives")


def len_or_none(problem: Problem) -> int | None:
    """How many examples the batch holds, where its tensors agree on that."""
    try:
        return problem.size
    except ValueError:
        return None


def too_long(seconds: float, examples: int | None, asked: str) -> str | None:
    """Why the derivative check is left out, if it is."""
    if asked == "never":
        return "not asked for (--derivatives never)"
    estimate = GUARD_PASSES * seconds * min(1.0, GUARD_EXAMPLES / (examples or GUARD_EXAMPLES))
    if asked == "auto" and estimate > GUARD_SECONDS:
        return f"left out, as it would take about {estimate / 60:.0f} minutes; --derivatives always runs it"
    return None


def in_short(error: Exception) -> str:
    """The first lines of what torch or a check says."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else f"{text[:400]} …"


# ---------------------------------------------------------------------------------------------- the command
def run(config: Config) -> dict[str, Any]:
    """Bring, initialise, examine; table, page, CSV and summary."""
    if config.batch_size < 2:
        raise ValueError(f"{EXPERIMENT}: `batch_size` must be 2 or more, to compare examples, got {config.batch_size}.")
    model_options = options_of(config.model_options, EXPERIMENT)
    options = options_of(config.options, EXPERIMENT)
    if config.method is not None:
        method_of(config.method).check_options(options)
    elif options:
        raise ValueError(
            f"{EXPERIMENT}: `options` are a method's, got {' '.join(config.options)} without one. Name it by --method; "
            "the model's own are --model-options."
        )
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    data = bring_data(
        config.data, data_dir=config.data_dir, batch_size=config.batch_size, device=device, caller=EXPERIMENT
    )
    model = bring_model(config.model, data, seed=config.seed, options=model_options)
    loss_fn = bring_loss(config.loss, data, model)
    write_environment(folder, data.record | {"identity": data.identity}, device)
    description = describe_model(config.model, model, data)
    console.print(f"Model: {description}.", markup=False)
    console.print(f"Data: {data.identity}.", markup=False)
    console.print(f"Device: {device_name(device)}. Folder: {folder.folder}", markup=False)
    if config.method is not None:
        apply(model, loss_fn, data, config.method, options, seed=config.seed, quiet=config.quiet)
    with make_progress(quiet=config.quiet) as progress, full_precision(device):
        bar = progress.add_task("examining", total=float(len(PARTS)))
        done = iter(range(len(PARTS)))
        result = examine(
            model,
            loss_fn,
            first_examples(next(iter(data.init_batches(seed=config.seed))), config.batch_size),
            num_classes=data.num_classes if loss_fn in (classification_loss, keyword_loss) else None,
            derivatives=config.derivatives,
            on_part=lambda part: progress.update(bar, description=part, completed=next(done)),
        )
    result = (
        {"description": description, "data": data.identity, "device": device_name(device)} | _asked(config) | result
    )
    environment = json.loads((folder.folder / "environment.json").read_text("utf-8"))
    command = shlex.join(["python", "-m", "reproduce.examine", *sys.argv[1:]])
    page = write_report(folder.folder, result, command=command, config=asdict(config), environment=environment)
    folder.finish(recorded(result))
    print_report(console, result)  # last: a closed pipe ends the process
    console.print(f"Page: {page}. Beside it: {', '.join(TABLES)} and summary.json.", markup=False)
    return result


def _asked(config: Config) -> dict[str, Any]:
    return {
        "model": config.model,
        "dataset": config.data,
        "loss_function": config.loss,
        "method": config.method,
        "options": list(config.options),
        "batch_size": config.batch_size,
        "seed": config.seed,
    }


def recorded(value: Any) -> Any:
    """With "nan" and "inf" for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: recorded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [recorded(item) for item in value]
    return as_recorded(value) if isinstance(value, float) else value


def main() -> None:
    end_well(lambda: run(tyro.cli(Config, description=__doc__ or "")), interrupted="Interrupted. No page was written.")


if __name__ == "__main__":
    main()
