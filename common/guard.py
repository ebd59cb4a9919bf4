r"""Are the derivatives right on this very model? A comparison with finite differences, in float64.

With θ moved along a random direction w, every quantity below is a number whose derivative along w is known twice: from
automatic differentiation, and from differences of the quantity one order lower, down to the loss itself.

    L(θ)                       →  ⟨g, w⟩             gradient
    ⟨g, v⟩                     →  ⟨H v, w⟩           Hessian-vector product, both modes
    ⟨v, H v⟩                   →  D³L[v, v, w]       third order, by torch.func and on autograd's own tape
    Σ_k ⟨g_k, v⟩²              →  its own gradient   through per-example gradients g_k, as NIO differentiates them
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.batches import first_examples, map_tensors, tensors_of
from common.derivatives import (
    GroupMode,
    HvpMode,
    gradient,
    group_gradients,
    hvp,
    linearized_gradient,
    tape,
    taped_gradient,
)
from common.diagnosis import label, way_out
from common.functional import (
    BatchNormMode,
    check_bare,
    check_first_batch,
    classification_loss,
    parameters_of,
    pure_loss,
    uses_batch_statistics,
)
from common.tree import tree_add, tree_map, tree_vdot
from common.types import Batch, DerivativeError, Params, PureLoss, UserLoss

QUANTITIES = {
    "gradient": "g = ∇L",
    "Hessian-vector product": "H v, reverse over reverse",
    "Hessian-vector product, forward": "H v, forward over reverse",
    "third order": "gradient of ⟨v, H v⟩ (MetaInit)",
    "per-example gradients": "vmap against a loop",
    "through per-example gradients": "gradient of a function of them (NIO)",
}


@dataclass(frozen=True)
class Check:
    """One quantity of one model.

    Attributes:
        error: Relative difference from finite differences (of per-example gradients: from the loop); NaN where nothing
            could be computed.
        tolerance: What it may be.
        note: Why there is no number, or what was done instead.
        layers: The modules that disagree by themselves, innermost first, each with the reason.
    """

    error: float
    tolerance: float
    note: str = ""
    layers: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        return self.error <= self.tolerance  # False for NaN

    @property
    def refused(self) -> bool:
        """Whether nothing could be computed."""
        return math.isnan(self.error)


@dataclass(frozen=True)
class DerivativeReport:
    """What `check_derivatives` found, a `Check` a quantity; printed, a table.

    Attributes:
        checks: By the names in `QUANTITIES`.
    """

    checks: dict[str, Check]

    @property
    def agrees(self) -> bool:
        """Whether everything does."""
        return all(check.agrees for check in self.checks.values())

    def __str__(self) -> str:
        width = max(map(len, self.checks))
        lines = [f"{'derivative':{width}}  relative error"]
        for name, check in self.checks.items():
            verdict = "right" if check.agrees else "refused" if check.refused else "WRONG"
            number = "–" if check.refused else f"{check.error:.1e}"
            if check.note == _NOT_EXAMINED:
                verdict = number = "–"
            lines.append(f"{name:{width}}  {number:>7}  {verdict:7}  {check.note}".rstrip())
            for layer, reason in check.layers.items():
                if layer not in check.note:
                    lines.append(f"{'':{width}}    {layer}" + (f": {reason}" if reason not in check.note else ""))
        return "\n".join(lines)


def check_derivatives(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batch: Batch = None,
    *,
    batch_norm: BatchNormMode = "batch",
    seed: int | None = None,
    exact: bool = True,
    tolerance: float = 1e-5,
    examples: int = 4,
    quantities: Sequence[str] = tuple(QUANTITIES),
    generator: torch.Generator | None = None,
) -> DerivativeReport:
    """Compare derivatives of `loss_fn(model, batch)` with finite differences, in float64, order by order.

    Where one disagrees or cannot be computed, every module is examined by itself, and the report names those at fault.
    The model is only read. Costs about a hundred forward and backward passes of `examples` examples.

    Args:
        model: Any bare `nn.Module`.
        loss_fn: `loss_fn(model, batch)`, the mean over examples.
        batch: A batch on the model's device.
        batch_norm: As in `pure_loss`.
        seed: As in `pure_loss`: None turns dropout off, a number fixes its mask.
        exact: False to see what torch's own kernels would give.
        tolerance: Bound on relative errors.
        examples: How many of the batch's examples are used, from the first on.
        quantities: Which of `QUANTITIES` to check.
        generator: Of the directions; by default one of its own, seeded with 0.

    Returns:
        A report to print, or to ask `report.agrees`.

    Raises:
        TypeError: A wrapped, quantised or lazy model.
        ValueError: No batch; unknown quantities; complex parameters; a loss that is not finite or not a scalar, or that
            differs between two evaluations at the same point.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
        >>> check_derivatives(model, batch=(torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1]))).agrees
        True
    """
    check_bare(model, "check_derivatives")
    if batch is None:
        raise ValueError("check_derivatives: `batch` must be a batch that `loss_fn` takes, got None.")
    if not quantities:
        raise ValueError("check_derivatives: `quantities` must name one at least, got none.")
    if unknown := set(quantities) - QUANTITIES.keys():
        raise ValueError(f"check_derivatives: `quantities` must be of {', '.join(QUANTITIES)}, got {min(unknown)!r}.")
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise ValueError(
                f"check_derivatives: parameters must be real, got {parameter.dtype} for {name!r}. "
                "Keep real and imaginary parts as two parameters."
            )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    group_size = 2 if uses_batch_statistics(model, batch_norm) else 1  # batch statistics are of two examples or more
    batch = first_examples(batch, examples)
    make_loss = partial(pure_loss, batch_norm=batch_norm, seed=seed, exact=exact, dtype=torch.float64)
    theta = parameters_of(model, dtype=torch.float64)
    with torch.enable_grad(), torch.random.fork_rng([p.device for p in model.parameters() if p.is_cuda][:1]):
        check_first_batch(model, loss_fn, batch, "check_derivatives", batch_norm=batch_norm, seed=seed)
        problem = _Problem(make_loss(model, loss_fn), theta, batch, generator, group_size=group_size)
        checks = {name: problem.check(name, tolerance) for name in quantities}
        if any(not check.agrees for check in checks.values()):
            # The finer question only where it arises: each module by itself, on the inputs that it meets.
            faults = _faults(model, loss_fn, batch, make_loss, quantities, tolerance) or {}
            checks = {name: check if check.agrees else _blamed(name, check, faults) for name, check in checks.items()}
    return DerivativeReport(checks)


@contextmanager
def naming_the_layer(
    model: nn.Module,
    loss_fn: UserLoss,
    batch: Batch,
    caller: str,
    *,
    batch_norm: BatchNormMode = "batch",
    exact: bool = True,
    order: Literal[2, 3] = 3,
) -> Iterator[None]:
    """Where a derivative that torch lacks ends an initialiser, say which layer lacks it, and what to do.

    Nothing is examined unless there is an error.

    Raises:
        DerivativeError: In the place of torch's own error, if it is one of these.
    """
    try:
        yield
    except RuntimeError as error:
        meaning = way_out(str(error))
        if meaning is None or isinstance(error, DerivativeError):
            raise
        make_loss = partial(pure_loss, batch_norm=batch_norm, exact=exact, dtype=torch.float64)
        examine = partial(_faults, model, loss_fn, make_loss=make_loss, quantities=[_OF_ORDER[order]], tolerance=1e-5)
        faults = examine(first_examples(batch, 4))  # which tell as well what a layer can do
        if faults is None:  # a loss that knows the batch's size cannot be called on a few
            faults = examine(batch) or {}
        where = "; ".join(faults) or "The loss function, or the code between layers"
        raise DerivativeError(
            f"{caller}: {where}: {meaning}. The model is unchanged. Torch says: {_torch_says(error)}"
        ) from error


# ---------------------------------------------------------------------------------------------- one loss, all orders
_OF_ORDER = {2: "Hessian-vector product", 3: "third order"}
_NOT_EXAMINED = "not examined: the batch cannot be split into groups of examples"
_STEPS = (1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10)


class _Problem:
    """A loss at a point, with two directions: each quantity's derivative by differentiation and by differences."""

    def __init__(
        self, loss: PureLoss, theta: Params, batch: Batch, generator: torch.Generator, *, group_size: int = 1
    ) -> None:
        self.loss, self.theta, self.batch, self.group_size = loss, theta, batch, group_size
        self.v, self.w = (_direction(theta, generator) for _ in range(2))
        self.good_step = _STEPS[0]
        # already taken: by quantity and step, two estimates of the slope and the size of the values
        self.differences: dict[tuple[str, float], tuple[tuple[float, float], float]] = {}

    # what is differenced: each a function of the step along w
    def values(self, which: str, step: float) -> float:
        moved = tree_add(self.theta, self.w, scale=step)
        if which == "loss":
            return self.loss(moved, self.batch).item()
        if which == "slope":
            return tree_vdot(gradient(self.loss, moved, self.batch), self.v).item()
        if which == "curvature":
            return tree_vdot(hvp(self.loss, moved, self.v, self.batch), self.v).item()
        return self.spread(moved, "loop").item()

    def groups(self) -> list[slice] | None:
        """The examples, one or more a group; None for a batch that cannot be split."""
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in tensors_of(self.batch)}
        if len(lengths) != 1 or min(lengths) < self.group_size:
            return None
        size = self.group_size
        return [slice(k, k + size) for k in range(0, lengths.pop() - size + 1, size)]

    def spread(self, theta: Params, mode: GroupMode) -> Tensor:
        """Σ_k ⟨g_k, v⟩²."""
        gradients = group_gradients(self.loss, theta, self.batch, self.groups(), mode=mode)
        along = [(leaf * self.v[name]).reshape(len(leaf), -1).sum(1) for name, leaf in gradients.items()]
        return torch.stack(along).sum(0).square().sum()

    # what is compared
    def check(self, quantity: str, tolerance: float) -> Check:
        try:
            return _CHECKS[quantity](self, tolerance)
        except Exception as error:  # refused, by whatever a model raises on single examples: the report says why
            return Check(float("nan"), tolerance, _in_short(error))

    def gradient(self, tolerance: float) -> Check:
        return self.against("loss", tree_vdot(gradient(self.loss, self.theta, self.batch), self.w), tolerance)

    def product(self, tolerance: float, *, mode: HvpMode) -> Check:
        if mode == "reverse":
            Hv = hvp(self.loss, self.theta, self.v, self.batch)
            leaves = _required(self.theta)
            taped = taped_gradient(self.loss, leaves, self.batch)[1](self.v)
            checks = [self.against("slope", tree_vdot(product, self.w), tolerance) for product in (Hv, taped)]
            return max(checks, key=_badness)
        try:
            Hv = torch.func.jvp(lambda t: gradient(self.loss, t, self.batch), (self.theta,), (self.v,))[1]
        except RuntimeError as error:
            Hv = hvp(self.loss, self.theta, self.v, self.batch, mode="forward")
            check = self.against("slope", tree_vdot(Hv, self.w), tolerance)
            return Check(check.error, tolerance, f"reverse instead: {_in_short(error)}")
        return self.against("slope", tree_vdot(Hv, self.w), tolerance)

    def third_order(self, tolerance: float) -> Check:
        def curvature(theta: Params) -> Tensor:
            return tree_vdot(linearized_gradient(self.loss, theta, self.batch)[1](self.v), self.v)

        leaves = _required(self.theta)
        taped = tape(tree_vdot(taped_gradient(self.loss, leaves, self.batch)[1](self.v), self.v), leaves, keep=False)
        checks = [
            self.against("curvature", tree_vdot(third, self.w), tolerance)
            for third in (torch.func.grad(curvature)(self.theta), taped)
        ]
        return max(checks, key=_badness)

    def per_example(self, tolerance: float) -> Check:
        if (groups := self.groups()) is None:
            return Check(0.0, tolerance, _NOT_EXAMINED)
        of = partial(group_gradients, self.loss, self.theta, self.batch, groups)
        loop = of(mode="loop")
        try:
            vmapped = of(mode="vmap")
        except RuntimeError as error:
            return Check(0.0, tolerance, f"a loop instead: {_in_short(error, mapped=True)}")
        difference = tree_add(vmapped, loop, scale=-1.0)
        size = tree_vdot(loop, loop).sqrt()
        return Check((tree_vdot(difference, difference).sqrt() / size.clamp(min=1e-300)).item(), tolerance)

    def through_per_example(self, tolerance: float) -> Check:
        if self.groups() is None:
            return Check(0.0, tolerance, _NOT_EXAMINED)
        leaves = _required(self.theta)
        slope = tape(self.spread(leaves, "auto"), leaves, keep=False)
        return self.against("spread", tree_vdot(slope, self.w), tolerance)

    def against(self, which: str, derivative: Tensor, tolerance: float) -> Check:
        """A derivative against central differences of fourth and second order, at steps from large to small.

        The best agreement counts. Kinks (ReLU, max-pooling) spoil large steps and round-off spoils small ones, but a
        wrong derivative is wrong at every step.
        """
        best, value = float("inf"), derivative.item()
        steepest = abs(value)  # slope seen at any step
        for step in sorted(_STEPS, key=lambda step: step != self.good_step):  # what was small enough before is first
            if (which, step) not in self.differences:
                a, b, c, d = (self.values(which, k * step) for k in (-2, -1, 1, 2))
                slopes = (a - 8 * b + 8 * c - d) / (12 * step), (c - b) / (2 * step)
                self.differences[which, step] = slopes, max(map(abs, (a, b, c, d)))
            slopes, size = self.differences[which, step]
            steepest = max(steepest, *map(abs, slopes))
            if step != _STEPS[0] and steepest * step <= 1e-14 * size:
                continue  # too small a step to see such a slope in numbers of this size
            noise = 2e-15 * size / step
            for slope in slopes:
                best = min(best, abs(slope - value) / max(abs(slope), abs(value), noise / tolerance, 1e-300))
            if best <= tolerance:
                self.good_step = step
                break
        return Check(best, tolerance)


_CHECKS: dict[str, Callable[[_Problem, float], Check]] = {
    "gradient": _Problem.gradient,
    "Hessian-vector product": partial(_Problem.product, mode="reverse"),
    "Hessian-vector product, forward": partial(_Problem.product, mode="forward"),
    "third order": _Problem.third_order,
    "per-example gradients": _Problem.per_example,
    "through per-example gradients": _Problem.through_per_example,
}


def _direction(like: Params, generator: torch.Generator) -> Params:
    """Random, and as large as the parameters are: a step of 1e-3 along it moves each tensor by a thousandth."""

    def of(leaf: Tensor) -> Tensor:
        size = leaf.square().mean().sqrt() if leaf.numel() else leaf.sum()
        noise = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype).to(leaf.device)
        return noise * torch.where(size > 0, size, 0.1)

    return tree_map(of, like)


def _required(theta: Params) -> Params:
    return {name: leaf.detach().requires_grad_() for name, leaf in theta.items()}


def _badness(check: Check) -> float:
    return math.inf if check.refused else check.error


def _in_short(error: Exception, *, mapped: bool = False) -> str:
    """The way out where one is known, else the first line of what torch says."""
    if isinstance(error, DerivativeError):
        return str(error).split(" Torch says")[0]
    return way_out(str(error), mapped=mapped) or _torch_says(error)


def _torch_says(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


# ---------------------------------------------------------------------------------------------- each module by itself
def _faults(
    model: nn.Module,
    loss_fn: UserLoss,
    batch: Batch,
    make_loss: Callable[..., PureLoss],
    quantities: Sequence[str],
    tolerance: float,
) -> dict[str, dict[str, str]] | None:
    """`{module: {quantity: what is wrong}}` for the innermost modules at fault, on the inputs they meet in the loss.

    None: the loss could not be called, in double precision, say.
    """
    calls: dict[str, tuple[tuple, dict]] = {}
    ended: list[str] = []

    def recording(model: nn.Module, batch: Batch) -> Tensor:
        def begin(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            # before the module may change them in place
            calls.setdefault(name, map_tensors(lambda leaf: leaf.detach().clone(), (args, kwargs)))

        def end(name: str, *_: object) -> None:
            ended.append(name)

        handles = [
            handle
            for name, module in model.named_modules()
            for handle in (
                module.register_forward_pre_hook(partial(begin, name), with_kwargs=True),
                module.register_forward_hook(partial(end, name)),
            )
        ]
        try:
            return loss_fn(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    try:
        with torch.no_grad():
            make_loss(model, recording)({}, batch)
    except Exception:  # what is known is said without a layer
        return None
    modules = dict(model.named_modules())
    faults: dict[str, dict[str, str]] = {}
    examined: dict[str, dict[str, str]] = {}  # of modules that are alike, one is enough
    at_fault: list[str] = []
    for name in dict.fromkeys(ended):  # a module ends after those it calls, so the innermost come first
        if any(inner != name and (inner.startswith(f"{name}.") or not name) for inner in at_fault):
            continue
        shapes = [tuple(leaf.shape) for leaf in tensors_of(calls[name])]
        # alike: torch's own layers that print alike; of others nothing is known by their print
        own = all(type(part).__module__.startswith("torch.nn.") for part in modules[name].modules())
        alike = f"{modules[name]!r} {shapes}" if own else name
        if alike not in examined:
            examined[alike] = _examine(modules[name], calls[name], make_loss, quantities, tolerance)
        if examined[alike]:
            at_fault.append(name)
            faults[label(name, modules[name])] = examined[alike]
    return faults


def _examine(
    module: nn.Module,
    call: tuple[tuple, dict],
    make_loss: Callable[..., PureLoss],
    quantities: Sequence[str],
    tolerance: float,
) -> dict[str, str]:
    """What is wrong with one module, in its parameters and in its inputs, which move along a random direction."""
    generator = torch.Generator().manual_seed(0)

    def noise(leaf: Tensor) -> Tensor:
        if not leaf.is_floating_point():
            return torch.zeros((leaf.shape[0] if leaf.ndim else 1,), dtype=torch.float64, device=leaf.device)
        return torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)

    noises = [noise(leaf) for leaf in tensors_of(call)]
    theta = parameters_of(module, dtype=torch.float64)

    def loss(theta: Params, batch: Batch) -> Tensor:
        call, noises = batch
        step, remaining = theta["shift of inputs"] - 1, iter(noises)

        def moved(leaf: Tensor) -> Tensor:
            by = next(remaining)
            return leaf + step * by if leaf.is_floating_point() else leaf

        return own({name: leaf for name, leaf in theta.items() if name != "shift of inputs"}, map_tensors(moved, call))

    try:
        own = make_loss(module, _smooth)
        problem = _Problem(
            loss,
            theta | {"shift of inputs": torch.ones((), dtype=torch.float64, device=_device_of(call))},
            (call, noises),
            generator,
            group_size=2 if uses_batch_statistics(module, "batch") else 1,
        )
        problem.values("loss", 0.0)
    except Exception:  # a module that cannot be called by itself is not examined: what contains it is
        return {}
    found = {}
    for quantity in quantities:
        check = problem.check(quantity, tolerance)
        if not check.agrees:
            said = check.note.split("): ", 1)[-1]  # without the module's own name
            found[quantity] = said if check.refused else f"differs from finite differences by {check.error:.1e}"
    return found


def _device_of(call: tuple[tuple, dict]) -> torch.device:
    return next((leaf.device for leaf in tensors_of(call)), torch.device("cpu"))


def _smooth(module: nn.Module, call: tuple[tuple, dict]) -> Tensor:
    """A number of a module's output that loses nothing of it: neither its mean, nor its scale, nor a sign."""
    args, kwargs = call
    outputs = [leaf for leaf in tensors_of(module(*args, **kwargs)) if leaf.is_floating_point()]
    return torch.stack([(leaf + 0.3).sin().mean() + 0.1 * (leaf**3).mean() for leaf in outputs]).sum()


def _blamed(name: str, check: Check, faults: dict[str, dict[str, str]]) -> Check:
    # a layer may be wrong in a lower order alone, which its own higher orders then agree with
    exactly = {layer: found[name] for layer, found in faults.items() if name in found}
    layers = exactly or {
        layer: f"{quantity}: {reason}"
        for layer, found in faults.items()
        for quantity, reason in [next(iter(found.items()))]
    }
    if not layers:
        note = "no layer by itself, so the loss function or the code between layers"
        return replace(check, note=f"{check.note}; {note}" if check.note else note)
    return replace(check, layers=layers)
