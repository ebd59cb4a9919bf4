r"""A differentiable training loop whose memory grows with √N: s_{t+1} = Φ(s_t, x_t), and the adjoint λ_t = ∂F/∂s_t.

    forward    s_0 → s_1 → … → s_N without a graph; every m-th state is kept
    backward   λ_t ← λ_t + ∂f_t/∂s_t where there is an outer loss f_t, then λ_{t−1} = (∂s_t/∂s_{t−1})ᵀ λ_t

The backward pass holds the graph of *one* step at a time, and that of its gradient with it; the states between two
kept ones are computed again, m of them. So the memory is that of N/m + m states and of one step, where a naive unroll
holds N graphs, and checkpointing of whole segments m. Of the two ways to pull λ back through a step, autograd's own
tape and `torch.func.vjp`, the tape is used: it wraps nothing, and it lets a step call `torch.autograd.grad` inside.

Letters: s state, x inputs, t steps made, N all of them, m interval between kept states, f outer losses, F their sum,
λ adjoint, K steps that are differentiated.
"""

import dis
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import TreeSpec, keystr, tree_flatten, tree_flatten_with_path, tree_unflatten

from common.batches import tensors_of
from common.derivatives import tape
from common.optimizers import Optimizer
from common.optimizers import clip_norm as clipped
from common.options import check_positive, check_whole
from common.tree import tree_map
from common.types import Batch, DerivativeError, NotFiniteError, Params

State = Any
"""Any pytree of tensors."""

Step = Callable[[State, Any], State]
"""Φ(s_t, x_t) = s_{t+1}: pure, and of the same tree, shapes and types."""

OuterLoss = Callable[[State], Tensor]
"""f(s_t), a scalar."""

Adjoint = list[Tensor | None]
"""λ by the leaves of the state; None stands for zero."""


def unroll(
    step: Step,
    state: State,
    inputs: Sequence[Any],
    *,
    outer_losses: Mapping[int, OuterLoss] | None = None,
    checkpoint_every: int | None = None,
    keep_on_cpu: bool = False,
    truncate: int | None = None,
    clip_adjoint: float | None = None,
    part: Callable[[State], Any] | None = None,
    on_adjoint: Callable[[int, Tensor], None] | None = None,
    on_state: Callable[[int, State, Tensor | None], None] | None = None,
) -> tuple[Tensor, State]:
    r"""F = Σ_t f_t(s_t) and s_N, for s_{t+1} = step(s_t, inputs[t]); both differentiable in `state`.

    One function of plain autograd: `F.backward()` and `torch.autograd.grad` work, a second derivative and
    `torch.func` transforms around it are refused. Whatever is to get a gradient (a learned learning rate, say) goes
    through the state; a captured tensor could get none, and is refused: by the first step and the earliest outer loss
    at once, by each other one when the backward pass differentiates it. So it goes unnoticed where none is: in steps
    before the last K (`truncate`), after the first where no tensor of the state requires a gradient, and behind what
    a step computes without a graph (`first_order`). Tensors of integers and booleans are carried without gradient.

    Args:
        step: Φ. It is called again during the backward pass and must then give the same, so whatever is random in it
            takes its seed from the state or from `inputs[t]`.
        state: s_0.
        inputs: x_0 … x_{N−1}: a list, or anything with a length and items that are the same whenever they are asked
            for. Their tensors get no gradient.
        outer_losses: f_t by t, the number of steps made before, 0 ≤ t ≤ N. Called as often as `step`, so pure too.
        checkpoint_every: m; 1 keeps every state and computes none again. None: about √N.
        keep_on_cpu: Move kept states to the CPU, and back one at a time.
        truncate: K: only the last K steps are differentiated. Through the N − K before them λ goes as if each were the
            identity, so that the gradient in `state` is λ_{N−K}, and the slopes ∂f_t/∂s_t of earlier outer losses as
            they are. Of a tensor that every step hands on unchanged (a learning rate), that is the hypergradient of
            the last K steps; of parameters, a first-order step: what would improve s_{N−K} is done to s_0.
        clip_adjoint: c: λ_t ← λ_t · c / max(c, ‖λ_t‖) for t = N … 0, after its outer loss is added.
        part: The part of a state whose adjoint is measured and clipped, as `lambda s: s["params"]`. None: all of it.
        on_adjoint: Called with t and ‖λ_t‖ (before it is clipped) for t = N … N − K during the backward pass.
        on_state: Called with t, s_t and f_t(s_t), or None without one, for t = 0 … N during the forward pass: where
            to record from. Nothing it is given has a graph, and nothing of it may be changed.

    Returns:
        F, a scalar (0 without outer losses), and s_N.

    Raises:
        TypeError: A state that holds anything but tensors, or a `torch.func` transform around the call.
        ValueError: An option or time out of range; a step that changes its state in place, the tree, a shape or a
            type, or draws global random numbers; an outer loss that is no scalar; a captured or an input's tensor that
            requires a gradient.
        NotFiniteError: An outer loss, or during the backward pass an adjoint, is not finite; with the step.
        DerivativeError: During the backward pass: `create_graph=True`.

    Example:
        >>> s = torch.tensor(2.0, requires_grad=True)
        >>> halve = lambda s, x: 0.5 * s + x
        >>> F, s3 = unroll(halve, s, [torch.tensor(1.0)] * 3, outer_losses={3: lambda s: s**2})
        >>> F, torch.autograd.grad(F, s)
        (tensor(4., grad_fn=<_UnrolledBackward>), (tensor(0.5000),))
    """
    leaves, spec = tree_flatten(state)
    _check_state(leaves, state)
    outer = dict(outer_losses or {})
    N = len(inputs)
    for t in outer:
        if not isinstance(t, int) or not 0 <= t <= N:
            raise ValueError(f"unroll: times of `outer_losses` must be whole numbers from 0 to {N}, got {t!r}.")
    if checkpoint_every is not None:
        check_whole("unroll", smallest=1, checkpoint_every=checkpoint_every)
    if truncate is not None:
        check_whole("unroll", truncate=truncate)
    if clip_adjoint is not None and clip_adjoint != math.inf:
        check_positive("unroll", clip_adjoint=clip_adjoint)
    start = 0 if truncate is None else max(0, N - truncate)
    interval = checkpoint_every or max(1, round(math.sqrt(N - start)))
    indices = list(range(len(leaves)))
    watched = indices if part is None else tree_flatten(part(tree_unflatten(indices, spec)))[0]
    devices = [leaf.device for leaf in leaves]
    loop = _Loop(
        step, inputs, outer, N, spec, devices, start, interval, keep_on_cpu, clip_adjoint, watched, on_adjoint, on_state
    )
    if not torch.is_grad_enabled():
        F, last, _ = loop.forward(leaves, keep=False)
        return F, tree_unflatten(last, spec)
    loop.check_captures([leaf.detach() for leaf in leaves])
    F, *last = _Unrolled.apply(loop, any(leaf.requires_grad for leaf in leaves), *leaves)  # pyright: ignore
    return F, tree_unflatten(last, spec)


class _Unrolled(Function):
    """The loop as one node of autograd's graph, on flat tensors."""

    @staticmethod
    def forward(ctx: Any, loop: "_Loop", keep: bool, *leaves: Tensor) -> tuple[Tensor, ...]:
        F, last, kept = loop.forward([leaf.detach() for leaf in leaves], keep=keep)
        own = {leaf.untyped_storage().data_ptr() for leaf in leaves}
        # handed on unchanged: a result must not share memory with what was passed in
        last = [leaf.clone() if leaf.untyped_storage().data_ptr() in own else leaf for leaf in last]
        ctx.loop, ctx.times = loop, list(kept)
        # by autograd's own means: freed after the backward pass, kept by retain_graph, guarded against changes in place
        ctx.save_for_backward(*(leaf for state in kept.values() for leaf in state))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(leaf for leaf in last if not leaf.is_floating_point()))
        return F, *last

    @staticmethod
    def backward(ctx: Any, dF: Tensor | None, *adjoint: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise DerivativeError(
                "unroll: only a first derivative can be taken, got `create_graph=True`. Its graph would hold every "
                "step again; for a second derivative write the loop as a plain one."
            )
        saved = iter(ctx.saved_tensors)
        kept = {t: [next(saved) for _ in adjoint] for t in ctx.times}
        return None, None, *ctx.loop.backward(kept, dF, list(adjoint))


@dataclass(frozen=True)
class _Loop:
    """All that the two passes share, on the leaves of the state."""

    step: Step
    inputs: Sequence[Any]
    outer: dict[int, OuterLoss]
    N: int
    spec: TreeSpec
    devices: list[torch.device]
    start: int
    interval: int
    keep_on_cpu: bool
    clip: float | None
    watched: list[int]
    on_adjoint: Callable[[int, Tensor], None] | None
    on_state: Callable[[int, State, Tensor | None], None] | None

    # ------------------------------------------------------------------------------------------ s_t → s_{t+1}, f_t
    def advance(self, leaves: list[Tensor], t: int) -> list[Tensor]:
        """The leaves of s_{t+1}, of s_t's."""
        x = self.inputs[t]
        if any(leaf.requires_grad for leaf in tensors_of(x)):
            raise ValueError(
                f"unroll: tensors of `inputs` get no gradient and must not require one, got one in inputs[{t}]. "
                "Detach it, or carry it in the state."
            )
        versions = [leaf._version for leaf in leaves]
        after, spec = tree_flatten(self.step(tree_unflatten(leaves, self.spec), x))
        if spec != self.spec:
            before, now = _paths(self.spec), _paths(spec)
            odd = [
                f"state{path} " + ("more" if path in now else "less")
                for path in now + before
                if path not in before or path not in now
            ]
            got = f"one with {odd[0]}" if odd else "other containers"
            raise ValueError(f"unroll: `step` must return a state of the same tree, got {got}.")
        for index, (old, new) in enumerate(zip(leaves, after, strict=True)):
            if not isinstance(new, Tensor) or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                got = f"{tuple(new.shape)} of {new.dtype} on {new.device}" if isinstance(new, Tensor) else repr(new)
                raise ValueError(
                    f"unroll: `step` must keep shapes, types and devices, got {got} for {tuple(old.shape)} of "
                    f"{old.dtype} on {old.device} at state{self.name(index)}."
                )
            if old._version != versions[index]:
                raise ValueError(
                    f"unroll: `step` must leave the state it is given as it is, but changes state{self.name(index)} "
                    "in place. Return new tensors."
                )
        return after

    def outer_loss(self, leaves: list[Tensor], t: int) -> Tensor:
        """f_t(s_t)."""
        value = self.outer[t](tree_unflatten(leaves, self.spec))
        if not isinstance(value, Tensor) or value.ndim:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(f"unroll: an outer loss must be a scalar tensor, got {got} at t = {t}.")
        return value

    def name(self, index: int) -> str:
        """Where a leaf stands in the state, as Python would write it."""
        return _paths(self.spec)[index]

    def tracked(self, leaves: list[Tensor]) -> list[Tensor]:
        """The same numbers as the beginnings of a graph."""
        return [leaf.detach().requires_grad_(leaf.is_floating_point()) for leaf in leaves]

    # ------------------------------------------------------------------------------------------ forward
    def forward(self, leaves: list[Tensor], *, keep: bool) -> tuple[Tensor, list[Tensor], dict[int, list[Tensor]]]:
        """F, the leaves of s_N, and the kept states by t."""
        wanted = {*range(self.start, self.N, self.interval), *(t for t in self.outer if t < self.start or t == self.N)}
        kept: dict[int, list[Tensor]] = {}
        values: list[Tensor] = []
        for t in range(self.N + 1):
            value = None
            if t in self.outer:
                value = self.outer_loss(leaves, t).detach()
                self.check_finite(value, leaves, t)
                values.append(value)
            if self.on_state is not None:
                self.on_state(t, tree_unflatten(leaves, self.spec), value)
            if keep and t in wanted:
                kept[t] = [leaf.cpu() for leaf in leaves] if self.keep_on_cpu else leaves
            if t < self.N:
                leaves = [leaf.detach() if leaf.requires_grad else leaf for leaf in self.advance(leaves, t)]
        F = torch.stack(values).sum() if values else torch.zeros((), device=leaves[0].device)
        return F, leaves, kept

    def check_finite(self, value: Tensor, leaves: list[Tensor], t: int) -> None:
        if value.isfinite():
            return
        odd = [k for k, leaf in enumerate(leaves) if leaf.is_floating_point() and not leaf.isfinite().all()]
        where = f"state{self.name(odd[0])} is not finite there" if odd else "the state is finite there"
        raise NotFiniteError(
            f"unroll: the outer loss must be finite, got {value.item()} after {t} of {self.N} steps; {where}. Likely "
            "causes: an inner learning rate at which training diverges, or a batch that holds NaN."
        )

    # ------------------------------------------------------------------------------------------ backward
    def backward(self, kept: dict[int, list[Tensor]], dF: Tensor | None, adjoint: Adjoint) -> Adjoint:
        """λ_0, or what `truncate` puts in its place."""
        norms: dict[int, Tensor] = {}
        segment: dict[int, list[Tensor]] = {}

        def state_at(t: int) -> list[Tensor]:
            """s_t; asked for with t falling, so that the rest of a segment is computed when its last state is."""
            for later in [s for s in segment if s > t]:
                del segment[later]
            if t not in segment:
                begin = t if t in kept else max(s for s in kept if s < t)
                # a copy only where it was moved to the CPU
                segment[begin] = [leaf.to(device) for leaf, device in zip(kept[begin], self.devices, strict=True)]
                for s in range(begin, t):
                    segment[s + 1] = [leaf.detach() for leaf in self.advance(segment[s], s)]
            return segment[t]

        for t in range(self.N, -1, -1):
            if t in self.outer and dF is not None:
                adjoint = _plus(adjoint, self.slope(state_at(t), t, dF))
            if t >= self.start:
                adjoint = self.measured(adjoint, t, norms)
            if t > self.start and any(slope is not None for slope in adjoint):
                adjoint = self.pulled(state_at(t - 1), t - 1, adjoint)
        self.check_norms(norms)
        return adjoint

    def pulled(self, leaves: list[Tensor], t: int, adjoint: Adjoint) -> Adjoint:
        """λ_t = (∂s_{t+1}/∂s_t)ᵀ λ_{t+1}: the only place where a step has a graph."""
        with torch.enable_grad():
            leaves = self.tracked(leaves)
            after = self.advance(leaves, t)
            _check_graph(after, leaves, self.step, f"`step` at t = {t}")
        return _slopes(after, leaves, adjoint)

    def slope(self, leaves: list[Tensor], t: int, dF: Tensor) -> Adjoint:
        """dF · ∂f_t/∂s_t."""
        with torch.enable_grad():
            leaves = self.tracked(leaves)
            value = self.outer_loss(leaves, t)
            _check_graph([value], leaves, self.outer[t], f"the outer loss at t = {t}")
        return _slopes([value], leaves, [dF.to(value)])

    def measured(self, adjoint: Adjoint, t: int, norms: dict[int, Tensor]) -> Adjoint:
        """λ_t, clipped; its norm is noted."""
        own = [slope for k in self.watched if (slope := adjoint[k]) is not None]
        if not own:
            return adjoint
        norm = norms[t] = torch.nn.utils.get_total_norm(own)
        if self.on_adjoint is not None:
            self.on_adjoint(t, norm)
        if self.clip is None or self.clip == math.inf:
            return adjoint
        factor = self.clip / norm.clamp(min=self.clip)
        scaled = list(adjoint)
        for k in self.watched:
            if (slope := adjoint[k]) is not None:
                scaled[k] = slope * factor.to(slope.device)
        return scaled

    def check_norms(self, norms: dict[int, Tensor]) -> None:
        """Once, after the pass: a check a step would wait for the device a step."""
        if not norms or (finite := torch.stack(list(norms.values())).isfinite()).all():
            return
        t = next(t for t, good in zip(norms, finite.tolist(), strict=True) if not good)
        raise NotFiniteError(
            f"unroll: the adjoint must be finite, got a norm of {norms[t].item()} after {t} of {self.N} steps, going "
            "back from the last. Likely causes: an unroll so long that its gradient explodes (use `clip_adjoint`, "
            "`truncate`, or a smaller inner learning rate), or Adam at gradients of zero (use `eps_root`)."
        )

    # ------------------------------------------------------------------------------------------ before the first step
    def check_captures(self, leaves: list[Tensor]) -> None:
        """Refuse what would go wrong without a word: captured tensors, random numbers without a seed."""
        outer = {t: (f"the outer loss at t = {t}", function) for t, function in sorted(self.outer.items())}
        for what, function in [("`step`", self.step), *outer.values()]:
            for name, leaf in _captured(function):
                if leaf.requires_grad:
                    raise _capture_error(what, f"{name}, shape {tuple(leaf.shape)},")
        if outer:  # the earliest; the others when they are differentiated
            t = next(iter(outer))
            with torch.enable_grad():
                tracked = self.tracked(leaves)
                _check_graph([self.outer_loss(tracked, t)], tracked, self.outer[t], f"the outer loss at t = {t}")
        if self.N == 0:
            return
        devices = sorted({leaf.device.index for leaf in leaves if leaf.device.type == "cuda"})
        with torch.random.fork_rng(devices), torch.enable_grad():
            before = _random_state(devices)
            tracked = self.tracked(leaves)
            once = self.advance(tracked, 0)
            _check_graph(once, tracked, self.step, "`step`")
            once = [leaf.detach() for leaf in once]
            with torch.no_grad():
                again = self.advance(leaves, 0)
            drawn = any(not torch.equal(a, b) for a, b in zip(before, _random_state(devices), strict=True))
        if drawn or _differ(leaves, once, again):
            what = "draws from the global random generator" if drawn else "gives another state when it is called again"
            raise ValueError(
                f"unroll: `step` must be a function of the state and of `inputs[t]` alone, but it {what}. Its states "
                "are computed again during the backward pass: take the seed of dropout and the like from the state or "
                "from `inputs[t]`, and set it inside (`training_step(…, seed=…)` does)."
            )


def _slopes(outputs: Sequence[Tensor], leaves: list[Tensor], adjoint: Sequence[Tensor | None]) -> Adjoint:
    """Σ ⟨adjoint, output⟩ differentiated in the leaves."""
    live = [(y, a) for y, a in zip(outputs, adjoint, strict=True) if a is not None and y.requires_grad]
    if not live:
        return [None] * len(leaves)
    moving = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = iter(torch.autograd.grad([y for y, _ in live], moving, [a for _, a in live], allow_unused=True))
    return [next(gradients) if leaf.requires_grad else None for leaf in leaves]


def _paths(spec: TreeSpec) -> list[str]:
    return [keystr(path) for path, _ in tree_flatten_with_path(tree_unflatten([0] * spec.num_leaves, spec))[0]]


def _plus(a: Adjoint, b: Adjoint) -> Adjoint:
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


# ---------------------------------------------------------------------------------------------- checks
def _check_state(leaves: list[Any], state: State) -> None:
    odd = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if odd or not leaves:
        got = type(odd[0]).__name__ if odd else repr(state)
        raise TypeError(f"unroll: `state` must be a pytree of tensors alone, got {got}. Make numbers tensors.")
    if any(leaf.is_complex() for leaf in leaves):
        raise TypeError(
            "unroll: tensors of `state` must be real, got a complex one, which would silently get no gradient. Carry "
            "`torch.view_as_real` of it."
        )
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if any(functorch.is_functorch_wrapped_tensor(leaf) for leaf in leaves):
        raise TypeError(
            "unroll: the derivative of an unroll must be plain autograd's, got a torch.func transform around the call. "
            "torch.func.grad keeps every graph and would undo all that is saved: use torch.autograd.grad there."
        )


def _random_state(devices: list[int]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]


def _differ(before: list[Tensor], a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two results of one step differ by more than a tenth of the step: round-off, even ReLU's, is far less."""
    moving = [k for k, leaf in enumerate(before) if leaf.is_floating_point() and leaf.numel()]
    if not moving:
        return False
    norm = torch.nn.utils.get_total_norm
    rounding = 100 * norm([torch.finfo(a[k].dtype).eps * a[k].nan_to_num() for k in moving])
    # NaN is no number of either: the loss before the first step, say
    apart = norm([(a[k] - b[k]).nan_to_num() for k in moving])
    return bool(apart > 0.1 * norm([(a[k] - before[k]).nan_to_num() for k in moving]) + rounding)


def _captured(
    holder: Any, *, deep: bool = False, path: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a function holds apart from its arguments, each with where it is.

    In its closure, default and partial arguments, and globals that it names. `deep`: in functions, attributes of
    objects and parameters of modules found there too. Such a one need not be used (a pure loss keeps the model's
    parameters to put them back), so only a graph tells.
    """
    seen = set() if seen is None else seen
    if id(holder) in seen:
        return
    seen.add(id(holder))
    for where, value in _held(holder, deep):
        for key, leaf in tree_flatten_with_path(value)[0]:
            name = f"{path}{where}{keystr(key)}"
            if isinstance(leaf, Tensor):
                yield name, leaf
            elif deep or where in ("the partial's function", "the method"):
                yield from _captured(leaf, deep=deep, path=f"{name} → ", seen=seen)


def _held(holder: Any, deep: bool) -> Iterator[tuple[str, Any]]:
    if isinstance(holder, partial):
        yield "the partial's function", holder.func
        yield from ((f"the partial's argument {k}", value) for k, value in enumerate(holder.args))
        yield from ((f"the partial's argument {k!r}", value) for k, value in holder.keywords.items())
    elif isinstance(holder, MethodType):
        yield "the method", holder.__func__
        if deep:
            yield "the method's object", holder.__self__
    elif isinstance(holder, FunctionType):
        code = holder.__code__
        for name, cell in zip(code.co_freevars, holder.__closure__ or (), strict=True):
            try:
                yield f"the captured {name!r}", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        defaults = holder.__defaults__ or ()
        arguments = code.co_varnames[: code.co_argcount]
        yield from ((f"the default of {k!r}", v) for k, v in zip(arguments[::-1], defaults[::-1], strict=False))
        yield from ((f"the default of {k!r}", v) for k, v in (holder.__kwdefaults__ or {}).items())
        # not all of `co_names`, in which attributes stand too
        for name in {i.argval: None for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}:
            value = holder.__globals__.get(name)
            if isinstance(value, (Tensor, dict, list, tuple)):
                yield f"the global {name!r}", value
    elif deep and isinstance(holder, nn.Module):
        yield from ((f"the parameter {name!r}", leaf) for name, leaf in holder.named_parameters())
        yield from ((f"its {name!r}", value) for name, value in vars(holder).items() if not name.startswith("_"))
    elif deep and hasattr(holder, "__dict__") and not isinstance(holder, type):
        yield from ((f"its {name!r}", value) for name, value in vars(holder).items())


def _check_graph(outputs: Sequence[Tensor], leaves: list[Tensor], function: Callable, what: str) -> None:
    """Nothing but the state may stand at the beginning of the graph; of every step, at a few hundredths of its time."""
    own = {id(leaf) for leaf in leaves}
    foreign = [y for y in outputs if y.requires_grad and y.is_leaf and id(y) not in own]
    seen: set[Any] = {y.grad_fn for y in outputs if y.grad_fn is not None}
    waiting = list(seen)
    while waiting:
        node = waiting.pop()
        behind = node.next_functions
        if not behind and node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in own:
            foreign.append(node.variable)
        for following, _ in behind:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    if not foreign:
        return
    for name, leaf in _captured(function, deep=True):
        if any(leaf is other for other in foreign) or (leaf.grad_fn is not None and leaf.grad_fn in seen):
            raise _capture_error(what, f"{name}, shape {tuple(leaf.shape)},")
    raise _capture_error(what, f"a tensor of shape {tuple(foreign[0].shape)} that it made or holds")


def _capture_error(what: str, name: str) -> ValueError:
    return ValueError(
        f"unroll: {what} must get every tensor that requires a gradient by the state, but {name} requires one outside "
        "of it and would silently get none. Carry it in the state (hand it on unchanged), or detach it."
    )


# ---------------------------------------------------------------------------------------------- a step of training
@dataclass(frozen=True)
class TrainingStep:
    """Φ of ordinary training: a gradient, an optimiser's step; see `training_step`."""

    loss: Callable[..., Any]
    optimizer: Optimizer
    seed: int | None
    clip: float | None
    first_order: bool

    def init(self, params: Params, statistics: Params | None = None) -> State:
        """`{"params", "optimizer", "loss"}` before the first step; the loss is that of the step before, NaN here.

        With `statistics`, of `common.batchnorm.fresh_statistics` say, it has `"statistics"` too, and each step moves
        them; `loss` must then be one of `tracking_loss`.
        """
        like = next(iter(params.values()))
        loss = torch.full((), math.nan, dtype=like.dtype, device=like.device)
        state = {"params": params, "optimizer": self.optimizer.init(params), "loss": loss}
        return state if statistics is None else state | {"statistics": statistics}

    def __call__(self, state: State, batch: Batch) -> State:
        loss = self.loss
        if self.seed is not None:
            t = int(state["optimizer"]["step"])  # on the CPU: nothing waits
            loss = partial(loss, seed=seed_of_step(self.seed, t))
        value, g, moved = self.gradient(loss, state["params"], batch, state.get("statistics"))
        if self.clip is not None:
            g = clipped(g, self.clip)
        params, optimizer = self.optimizer.update(state["params"], g, state["optimizer"])
        after = {"params": params, "optimizer": optimizer, "loss": value.to(state["loss"].dtype)}
        return after if moved is None else after | {"statistics": moved}

    def gradient(
        self, loss: Callable[..., Any], params: Params, batch: Batch, statistics: Params | None = None
    ) -> tuple[Tensor, Params, Params | None]:
        """L, g = ∇L(θ) and the statistics after; g with a graph only where the caller records one, not in first order.

        Statistics that a graph is recorded of have one in first order too: of first derivatives alone.
        """
        keep = torch.is_grad_enabled() and not self.first_order and any(leaf.requires_grad for leaf in params.values())
        through = keep
        if statistics is not None and torch.is_grad_enabled():
            through = any(leaf.requires_grad for leaf in (*params.values(), *statistics.values()))
        theta = params if through else tree_map(torch.Tensor.detach, params)
        theta = tree_map(lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(), theta)
        with torch.enable_grad():
            if statistics is None:
                value, moved = loss(theta, batch), None
            else:
                value, moved = loss(theta, batch, statistics=statistics)
        g = tape(value, theta, keep=keep, retain=through)
        if moved is not None and not through:
            moved = tree_map(torch.Tensor.detach, moved)
        return value.detach(), g, moved


def training_step(
    loss: Callable[..., Any],
    optimizer: Optimizer,
    *,
    seed: int | None = None,
    clip_norm: float | None = None,
    first_order: bool = False,
) -> TrainingStep:
    """The step of ordinary training, for `unroll` or for a naive loop: `state = step(state, batch)`.

    It starts from `step.init(params)`, `{"params": θ, "optimizer": its state, "loss": ()}`, where `"loss"` is the last
    step's training loss, to be recorded (`on_state`), not differentiated.

    From `step.init(params, statistics)` BatchNorm's running statistics are carried and differentiated as well, in
    `"statistics"` by buffer name; outer losses evaluate with them. Otherwise they are no part of it.

    Args:
        loss: `loss(params, batch)`, pure, as `pure_loss(…, batch_norm="batch")` makes it; where statistics are carried
            `loss(params, batch, statistics=…)` ↦ (L, statistics after), as `tracking_loss` makes it.
        optimizer: One of `common.optimizers`.
        seed: Dropout's, for a loss made with a seed: step t calls `loss(params, batch, seed=seed_of_step(seed, t))`.
        clip_norm: c of `common.optimizers.clip_norm`, on the gradient.
        first_order: Take g for a constant: ∂s_{t+1}/∂s_t without the Hessian, at the cost of ordinary training. What
            statistics are carried keep their own first derivatives.

    Example:
        >>> from common.optimizers import sgd
        >>> step = training_step(lambda theta, x: 0.5 * x * theta["w"] ** 2, sgd(0.1))
        >>> state = step.init({"w": torch.tensor(2.0, requires_grad=True)})
        >>> F, _ = unroll(step, state, [1.0, 5.0], outer_losses={2: lambda s: s["params"]["w"]})
        >>> F.backward()
        >>> state["params"]["w"].grad  # (1 − 0.1 · 1)(1 − 0.1 · 5)
        tensor(0.4500)
    """
    if clip_norm is not None:
        check_positive("training_step", clip_norm=clip_norm)
    if seed is not None:
        check_whole("training_step", seed=seed)
    return TrainingStep(loss, optimizer, seed, clip_norm, first_order)


def seed_of_step(seed: int, t: int) -> int:
    """A seed of step t: 32 bits, which is all that torch's CPU generator reads; runs of near seeds share none soon."""
    return (seed * 0x9E3779B1 + t) % 2**32
