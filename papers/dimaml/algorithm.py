r"""DIMAML: the laws of a model's initial weights, learned by descent on how well training from a draw of them goes.

Letters: psi ψ the parameters of the laws; θ₀ ~ p_ψ the drawn weights; N inner steps, after those in V of which training
is evaluated; G the meta-gradient ∂L_auc/∂ψ; c its largest norm.

Source: the poster and the released code of DIMAML (AutoML workshop at ICML 2021).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from common.batches import length_of, tensors_of
from common.batchnorm import fresh_statistics
from common.derivatives import check_differentiable, tape
from common.descent import trainable
from common.functional import (
    BatchNormMode,
    check_apart,
    check_bare,
    check_first_batch,
    check_loss,
    check_next_batch,
    classification_loss,
    logits_of,
    pure_loss,
    tracking_loss,
    unchanged_on_error,
)
from common.guard import naming_the_layer
from common.optimizers import Adam, Optimizer, OptimizerState, adam, clip_norm, sgd
from common.options import check_choice, check_number, check_positive, check_whole
from common.precision import check_precision, full_precision
from common.scales import Patterns
from common.tree import numel, tree_add, tree_map
from common.types import Batch, DerivativeError, NotFiniteError, Params, PureLoss, UserLoss
from common.unroll import training_step
from papers.dimaml.distributions import Family, Variant
from papers.dimaml.files import ENTRY, fingerprint, write_whole
from papers.dimaml.model import InitDistribution, Start, blocks_of
from papers.dimaml.objective import (
    evaluation_steps,
    loss_auc,
    losses_of_rows,
    meta_gradient,
    stack_batches,
    stack_statistics,
)

Task = tuple[Sequence[Batch], Sequence[Batch]]
"""Training batches, one an inner step, and held-out batches, one an evaluation."""

TaskSampler = Callable[[torch.Generator], Task] | Iterable[Task]

BatchNorm = Literal["batch", "running", "carried"]
"""Statistics of training and of evaluation; see `dimaml`."""

_MODES: dict[BatchNorm, tuple[BatchNormMode, BatchNormMode]] = {
    "batch": ("batch", "batch"),
    "running": ("running", "running"),
    "carried": ("batch", "running"),
}

MEASURED = ("loss", "last_loss", "train_loss", "gradient_norm")

META_LR = {"normal": 1e-4, "plif": 1e-3}
"""Of two of the three released experiments; the language model has 3e-4 for Normal, the auto-encoder 1e-4 for PLIF."""


# ---------------------------------------------------------------------------------------------- inner optimisers
def released_inner(name: str, model: nn.Module) -> Optimizer:
    """The inner optimiser of a released experiment.

    "momentum" of the auto-encoder, "adam" of the language model, "nesterov" of the Fixup ResNet, where tensors of one
    element (Fixup's scalars) have a tenth of the learning rate.

    Example:
        >>> released_inner("momentum", nn.Linear(2, 2)).lr
        0.01
    """
    check_choice("dimaml", "inner", name, ("momentum", "nesterov", "adam"), " Or pass one of common.optimizers.")
    if name == "momentum":
        return sgd(0.01, momentum=0.9)
    if name == "adam":
        return adam(1e-3)
    scalars = tuple((key, 0.1) for key, leaf in model.named_parameters() if leaf.numel() == 1)
    return sgd(0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, lr_factors=scalars)


def _tensors_with_law(model: nn.Module, laws: InitDistribution) -> list[str]:
    """By name: what is learned of.

    Raises:
        ValueError: None, as all that have a law are frozen; or a law of a name that the model does not have.
    """
    names = list(laws.sample(model, torch.Generator()))
    if not names:
        raise ValueError(
            "dimaml: a trainable tensor must have a law, got none (laws of frozen ones, if any). Set `requires_grad` "
            "of those that are to be learned, or start from laws of others."
        )
    return names


def _checked_inner(inner: object, model: nn.Module) -> Optimizer:
    if isinstance(inner, str):
        return released_inner(inner, model)
    if not isinstance(inner, Optimizer):
        kind = inner if isinstance(inner, type) else type(inner)
        own = kind.__name__.lower()
        known = own if own in ("sgd", "adam", "adamw", "rmsprop") else "sgd"
        of_torch = issubclass(kind, torch.optim.Optimizer)
        why = ", whose step is done in place and cannot be differentiated" if of_torch else ""
        raise TypeError(
            f"dimaml: `inner` must be an optimizer of common.optimizers or a name, got {kind.__module__}."
            f"{kind.__qualname__}{why}. Use common.optimizers.{known}(lr, …): the same steps as torch.optim."
        )
    for part in fields(inner):
        value = getattr(inner, part.name)
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"dimaml: the inner optimizer's numbers are constants, got `{part.name}` that requires a gradient. "
                "Detach it; to learn it as well, write the loop around `papers.dimaml.loss_auc`."
            )
    return inner


# ---------------------------------------------------------------------------------------------- the loop
def dimaml(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    task_sampler: TaskSampler | None = None,
    *,
    inner_steps: int,
    eval_every: int,
    meta_steps: int,
    inner: Optimizer | str = "momentum",
    first_evaluation: int | None = None,
    family: Literal["normal", "plif"] = "normal",
    pieces: int = 100,
    start: InitDistribution | Mapping[str, Start] | None = None,
    include: Patterns | str = ("*",),
    exclude: Patterns | str = (),
    meta_lr: float | None = None,
    betas: tuple[float, float] = (0.9, 0.997),
    eps: float = 1e-8,
    clip: float | None = 10.0,
    tasks: int = 1,
    draws: int = 1,
    antithetic: bool = False,
    vmap: bool = False,
    first_order: bool = False,
    truncate: int | None = None,
    clip_adjoint: float | None = None,
    patience: int = 10,
    variant: Variant = "paper",
    batch_norm: BatchNorm = "batch",
    exact_kernels: bool = True,
    keep_every: int | None = None,
    keep_on_cpu: bool = False,
    generator: torch.Generator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1,
    on_step: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> InitDistribution:
    r"""Learn the law of every tensor's initial weights, so that training from a draw of it is fast and ends well.

    Repeats: draw a task and θ₀ ~ p_ψ; train N steps; G = ∂L_auc/∂ψ through all of them; scale G to a norm of at most
    c; a step of Adam on ψ. Released: N = 600, evaluated every 50 steps from 200, by "momentum" (auto-encoder); N = 200,
    every 40, by "adam" (language model) or "nesterov" (Fixup ResNet); 1500 to 3000 meta-steps.

    The model is only read: `dimaml(…).initialize_(model, generator)` writes a draw into it, or into one of the same
    names and other shapes. Tensors without a law start every training from the values they have. Dropout is on in
    training and off in evaluation; for BatchNorm see `batch_norm`.

    Args:
        model: Any bare `nn.Module`, freshly initialised: the laws start from its values.
        loss_fn: `loss_fn(model, batch)`, mean over examples. Cross-entropy of `model(x)` by default.
        task_sampler: `task_sampler(generator)` ↦ (N training batches, |V| held-out batches), all on the model's device;
            each part a list, or anything with a length and items that are the same whenever they are asked for. All
            batches of a part, in all tasks, have one shape; of integers (examples, length) the length may vary, unless
            `vmap` stacks several `tasks`. Or such tasks themselves: a collection is gone through again and again.
            Torch's global generators are seeded from `generator` before each task; what else is random in a sampler
            cannot be resumed.
        inner_steps: N.
        eval_every: Steps between two evaluations; see `evaluation_steps`.
        meta_steps: How many steps ψ makes.
        inner: One of `common.optimizers`, or a name, see `released_inner`.
        first_evaluation: Steps before the first evaluation; None: `eval_every`.
        family: "normal" or "plif", what laws there are.
        pieces: K of PLIF.
        start: Laws to start from by kind, name pattern or key, see `InitDistribution.from_model`; or all of them as an
            `InitDistribution`, which `family`, `pieces`, `include` and `exclude` then do not change.
        include: Kinds ("conv", "linear", "bias", "embedding", "norm", "other"), name patterns or keys with a law.
        exclude: Those that get none.
        meta_lr: Of ψ; None: 1e-4 for Normal and 1e-3 for PLIF. It is what μ and σ move by in a step.
        betas: Of the meta-Adam.
        eps: Of the meta-Adam.
        clip: c, the largest norm of G; None: no bound.
        tasks: Tasks a meta-step; G is the mean over them.
        draws: Draws of θ₀ a task, each with dropout of its own.
        antithetic: Each draw with its mirror image: twice the cost, less noise.
        vmap: Train all tasks and draws of a meta-step side by side, by `torch.func.vmap`, instead of one after the
            other: the same G (up to round-off, and other masks of dropout), sooner where the model is small, in as many
            times the memory.
        first_order: Leave the Hessians out: cheaper, and another gradient.
        truncate: K of `unroll`: differentiate the last K steps alone.
        clip_adjoint: Largest norm of the weights' adjoint at each step on the way back; see `unroll`.
        patience: After how many steps in a row that were not finite the run ends.
        variant: "released" has the authors' softplus and starts, and where G is not finite zeroes such entries, leaves
            the others unclipped, and takes the step.
        batch_norm: "batch": the statistics of each batch, in training and in evaluation. "running": the model's own, in
            both. "carried": the authors', batch statistics in training, in evaluation their running averages, which
            start afresh with every training (mean 0, variance 1) and are differentiated through its steps.
        exact_kernels: See `common.exact`; False only to measure what it costs.
        keep_every: m of `unroll`: inner steps between states that are kept; None: about √N.
        keep_on_cpu: Keep them in the CPU's memory.
        generator: Of everything drawn; None: one of its own, seeded with 0.
        checkpoint: File that holds the state of the run after each meta-step. Where it exists, the run goes on from it
            and gives the same numbers, to the last bit, as if it had not been interrupted.
        checkpoint_every: Meta-steps between two writings of it; it is written at the end too.
        on_step: Called after each meta-step with its entry of the history.
        progress: Show a progress bar, with the time left.

    Returns:
        The learned laws. `history` has a dictionary a meta-step: `step`, `loss` (L_auc), `last_loss` (held out, after N
        steps), `train_loss` (mean over the inner steps), `gradient_norm` (of G, before it is clipped), `skipped` (1
        where it was not finite and nothing moved) and `zeroed` (entries of G set to zero). NaN is what was not reached.

    Raises:
        TypeError: A wrapped model; a loss of another form; an optimizer of torch.optim; an option of another type.
        ValueError: An option out of range; nothing to learn, or parameters that share memory; a loss that does not
            depend on a tensor with a law; tasks that do not fit or end too soon; a captured tensor that requires a
            gradient; a checkpoint of another run.
        NotFiniteError: The first batch's loss, or `patience` meta-steps in a row, are not finite (a ValueError too).
        DerivativeError: A layer stands in the way of a derivative; the message names it.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> batch = torch.randn(6, 4), torch.randint(3, (6,))
        >>> task = [batch] * 4, [batch] * 2
        >>> law = dimaml(model, task_sampler=[task], inner_steps=4, eval_every=2, meta_steps=2, progress=False)
        >>> sorted(law.families)
        ['0.bias', '0.weight', '2.bias', '2.weight']
    """
    check_bare(model, "dimaml")
    check_loss(loss_fn, "dimaml")
    check_apart(model, "dimaml")
    V = evaluation_steps(inner_steps, eval_every, first_evaluation)
    check_choice("dimaml", "variant", variant, ("paper", "released"))
    _check_options(meta_steps, tasks, draws, patience, checkpoint_every, clip, truncate, clip_adjoint, keep_every)
    check_choice("dimaml", "vmap", vmap, (False, True))
    if vmap and clip_adjoint is not None:
        raise ValueError(
            f"dimaml: `clip_adjoint` bounds the adjoint of each training, got {clip_adjoint} with `vmap`, where all "
            "of a meta-step have one together. Pass vmap=False."
        )
    meta = _meta_adam(meta_lr, betas, eps)
    inner = _checked_inner(inner, model)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    _check_sources(task_sampler, generator, start)
    check_precision(trainable(model), "dimaml")
    laws = (
        start
        if isinstance(start, InitDistribution)
        else InitDistribution.from_model(
            model, family, pieces=pieces, start=start, include=include, exclude=exclude, variant=variant
        )
    )
    with_law = _tensors_with_law(model, laws)
    if meta_lr is None:
        meta = replace(meta, lr=min(META_LR[law.kind] for law in laws.families.values()))
    check_choice("dimaml", "batch_norm", batch_norm, tuple(_MODES))
    make = partial(pure_loss, model, loss_fn, exact=exact_kernels, order=2)
    in_training, in_evaluation = _MODES[batch_norm]
    source = _Tasks(
        model=model,
        loss_fn=loss_fn,
        train_loss=make(batch_norm=in_training, seed=0),  # a seed turns dropout on; each step has its own
        held_out_loss=make(batch_norm=in_evaluation),
        stream=_stream(task_sampler, generator),
        counts=(inner_steps, len(V)),
        with_law=with_law,
        batch_norm=batch_norm,
        exact=exact_kernels,
        first_order=first_order,
        vmap=vmap,
        stacked=vmap and tasks > 1,
    )
    meta_step = _MetaGradient(
        source=source,
        inner=inner,
        V=V,
        generator=generator,
        tasks=tasks,
        draws=draws,
        antithetic=antithetic,
        vmap=vmap,
        first_order=first_order,
        step_loss=source.train_loss,
        statistics=None,
        through={
            "checkpoint_every": keep_every,
            "keep_on_cpu": keep_on_cpu,
            "truncate": truncate,
            "clip_adjoint": clip_adjoint,
        },
    )
    if batch_norm == "carried":
        tracking = tracking_loss(model, loss_fn, exact=exact_kernels, seed=0, order=2)
        meta_step = replace(meta_step, step_loss=tracking, statistics=fresh_statistics(model))
    psi = {name: leaf.detach().clone() for name, leaf in laws.parameters().items()}
    state = _State(psi, meta.init(psi))
    path, options = None, {}
    if checkpoint is not None:
        path = _checked_path(checkpoint)
        options = meta_step.described() | {
            "meta": _described(meta, 0),
            "clip": clip,
            "variant": variant,
            "laws": {key: _description(law) for key, law in laws.families.items()},
            "model": _fingerprint(model, laws, batch_norm),
            "start": _start_fingerprint(start),
        }
        options = json.loads(json.dumps(options, default=lambda number: number.item()))  # NumPy's numbers too
        if path.exists():
            state = _read(path, state, options, generator, most=meta_steps)
            if state.lost_in_a_row >= patience and len(state.history) == meta_steps:
                raise NotFiniteError(
                    f"dimaml: the last {state.lost_in_a_row} meta-steps that {path} holds were not finite, and none is "
                    "left to make. A larger `patience` takes what was learned before them; another file starts anew. "
                    "The model is unchanged."
                )

    device = next(iter(trainable(model).values())).device
    with ExitStack() as stack:
        stack.enter_context(full_precision(device))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        # which only a loss that calls the model itself, not the one that it is given, can change
        stack.enter_context(unchanged_on_error(model.buffers()))
        if state.history:
            source.go_on_after(state.seeds, generator, skip=not callable(task_sampler))
        bar = stack.enter_context(Progress(transient=True)) if progress else None
        shown = None if bar is None else bar.add_task("dimaml", total=meta_steps, completed=len(state.history))
        for t in range(len(state.history) + 1, meta_steps + 1):
            G, measured, odd = meta_step.of(laws.with_parameters(state.psi))
            state.seeds = source.seeds
            entry = {"step": float(t), **dict.fromkeys(MEASURED, math.nan), "skipped": 0.0, "zeroed": 0.0} | measured
            if G is not None:
                norm = entry["gradient_norm"] = torch.nn.utils.get_total_norm(list(G.values())).item()
                odd = "" if math.isfinite(norm) else _odd_entries(G, norm)
            moving, entry["zeroed"] = _moving(G, state.psi, is_finite=not odd, clip=clip, variant=variant)
            if moving is not None:
                with torch.no_grad():
                    state.psi, state.adam = meta.update(state.psi, moving, state.adam)
            entry["skipped"] = float(moving is None)
            lost = moving is None or entry["zeroed"] == numel(state.psi)
            state.lost_in_a_row = state.lost_in_a_row + 1 if lost else 0
            state.history.append(entry)
            if path is not None and (t % checkpoint_every == 0 or t == meta_steps):
                _write(path, state, options, generator)
            if on_step is not None:
                on_step(dict(entry))
            if bar is not None and shown is not None:
                words = f"dimaml  loss {entry['loss']:.4g}, gradient norm {entry['gradient_norm']:.3g}"
                bar.update(shown, advance=1, description=words)
            if state.lost_in_a_row >= patience:
                raise NotFiniteError(
                    f"dimaml: {state.lost_in_a_row} meta-steps in a row were not finite, the last of them step {t}: "
                    f"{odd} Or laws so wide that training diverges: a smaller `meta_lr`, or others to `start` from. "
                    "The model is unchanged."
                )
    learned = laws.with_parameters(state.psi)
    return InitDistribution(learned.families, skipped=learned.skipped, history=state.history)


# ---------------------------------------------------------------------------------------------- one meta-step
@dataclass(frozen=True, kw_only=True)
class _MetaGradient:
    """G of a meta-step: the mean over tasks and over draws of each, one unroll after the other or one of all."""

    source: "_Tasks"
    inner: Optimizer
    V: list[int]
    generator: torch.Generator
    tasks: int
    draws: int
    antithetic: bool
    vmap: bool
    first_order: bool
    step_loss: Callable[..., Any]
    """Of a step of training: `source.train_loss`, or where statistics are carried one that gives them too."""
    statistics: Params | None
    """What carried statistics start from."""
    through: dict[str, Any]

    def of(self, laws: InitDistribution) -> tuple[Params | None, dict[str, float], str]:
        """G and what was measured; or no G, and what was not finite."""
        return self.side_by_side(laws) if self.vmap else self.in_turn(laws)

    def in_turn(self, laws: InitDistribution) -> tuple[Params | None, dict[str, float], str]:
        G: Params | None = None
        trace, losses = _Trace(self.V[-1], len(self.V)), []
        for _ in range(self.tasks):
            train, held_out = self.source.draw(_seed(self.generator))
            for _ in range(self.draws):
                step = training_step(
                    self.step_loss, self.inner, seed=_seed(self.generator), first_order=self.first_order
                )
                objective = partial(
                    loss_auc,
                    step=step,
                    loss=self.source.held_out_loss,
                    train=train,
                    validation=dict(zip(self.V, held_out, strict=True)),
                    statistics=self.statistics,
                    on_state=trace,
                    **self.through,
                )
                try:
                    with self.source.naming_the_layer(held_out[0]):
                        L, d = meta_gradient(
                            laws, self.source.model, objective, self.generator, antithetic=self.antithetic
                        )
                except NotFiniteError as error:
                    return _nothing(error)
                losses.append(L)
                G = d if G is None else tree_add(G, d)
        measured, odd = trace.measured()
        measured["loss"] = torch.stack(losses).mean().item()
        return (None if odd or G is None else tree_map(lambda leaf: leaf / len(losses), G)), measured, odd

    def side_by_side(self, laws: InitDistribution) -> tuple[Params | None, dict[str, float], str]:
        """All trainings in one unroll of stacked weights: the same tasks and draws as `in_turn`."""
        psi = {name: leaf.detach().requires_grad_() for name, leaf in laws.parameters().items()}
        model, drawn, own = self.source.model, laws.with_parameters(psi), trainable(self.source.model)
        rows, tasks, seeds = [], [], []
        for _ in range(self.tasks):
            task = self.source.draw(_seed(self.generator))
            for _ in range(self.draws):
                seeds.append(_seed(self.generator))
                noise = self.generator.get_state()
                for mirrored in (False, True) if self.antithetic else (False,):
                    self.generator.set_state(noise)  # the same z for both
                    rows.append(own | drawn.sample(model, self.generator, antithetic=mirrored))
                    tasks.append(task)
        shared = self.tasks == 1
        tracking = self.statistics is not None
        losses = losses_of_rows(self.step_loss, shared=shared, tracking=tracking)
        held_out_losses = losses_of_rows(self.source.held_out_loss, shared=shared)

        def sum_of_rows(theta: Params, batch: Batch, **options: Any) -> Any:
            if not tracking:
                return losses(theta, batch, **options).sum()
            values, after = losses(theta, batch, **options)
            return values.sum(), after

        step = training_step(sum_of_rows, self.inner, seed=seeds[0], first_order=self.first_order)
        train, held_out = tasks[0] if shared else (_Stacked([task[part] for task in tasks]) for part in (0, 1))
        trace = _Trace(self.V[-1], len(self.V), rows=len(rows))
        try:
            with self.source.naming_the_layer(tasks[0][1][0]):
                L = loss_auc(
                    {name: torch.stack([row[name] for row in rows]) for name in rows[0]},
                    step,
                    lambda theta, batch, **carried: held_out_losses(theta, batch, **carried).mean(),
                    train,
                    {t: held_out[k] for k, t in enumerate(self.V)},
                    statistics=None if self.statistics is None else stack_statistics(self.statistics, len(rows)),
                    on_state=trace,
                    **self.through,
                )
                G = tape(L, psi, keep=False)
        except NotFiniteError as error:
            return _nothing(error)
        measured, odd = trace.measured()
        measured["loss"] = L.item()
        return (None if odd else G), measured, odd

    def described(self) -> dict[str, Any]:
        """What makes two runs the same, in JSON's types; how states are kept does not."""
        return {
            "inner": _described(self.inner, self.V[-1]),
            "evaluations": self.V,
            "tasks": self.tasks,
            "draws": self.draws,
            "antithetic": self.antithetic,
            "vmap": self.vmap,
            "first_order": self.first_order,
            "truncate": self.through["truncate"],
            "clip_adjoint": self.through["clip_adjoint"],
            "batch_norm": self.source.batch_norm,
            "exact_kernels": self.source.exact,
            "generator": self.generator.device.type,
        }


def _nothing(error: NotFiniteError) -> tuple[None, dict[str, float], str]:
    """No meta-gradient, nothing measured, and why."""
    return None, {}, str(error).removeprefix("unroll: ")


def _moving(
    G: Params | None, psi: Params, *, is_finite: bool, clip: float | None, variant: Variant
) -> tuple[Params | None, float]:
    """What Adam gets, and how many entries of it were set to zero; None: the step is skipped.

    Released: entries that are not finite become zero (without G, all of them), and the others are not clipped.
    """
    if is_finite and G is not None:
        return G if clip is None else clip_norm(G, clip), 0.0
    if variant != "released":
        return None, 0.0
    G = tree_map(lambda leaf: torch.full_like(leaf, math.nan), psi) if G is None else G
    count = sum(int((~leaf.isfinite()).sum()) for leaf in G.values())
    return tree_map(lambda leaf: torch.where(leaf.isfinite(), leaf, 0.0), G), float(count)


# ---------------------------------------------------------------------------------------------- tasks
@dataclass(frozen=True)
class _Stacked(Sequence[Batch]):
    """Batches of several tasks side by side; each is stacked when it is asked for."""

    parts: list[Sequence[Batch]]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, k: Any) -> Batch:
        return stack_batches([part[k] for part in self.parts])


@dataclass(kw_only=True)
class _Tasks:
    """Tasks one after the other, each checked before it is trained on."""

    model: nn.Module
    loss_fn: UserLoss
    train_loss: PureLoss
    held_out_loss: PureLoss
    stream: Iterator[Any]
    counts: tuple[int, int]
    with_law: list[str]
    batch_norm: BatchNorm
    exact: bool
    first_order: bool
    vmap: bool
    stacked: bool
    seeds: list[int] = field(default_factory=list)
    shapes: dict[str, tuple[str, list[tuple[int, ...]]]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    classes: int | None = None
    checked: bool = False
    resumed: bool = False

    def go_on_after(self, used: list[int], generator: torch.Generator, *, skip: bool) -> None:
        """Pass over the tasks of a collection that the run has used before it was interrupted, each under its seed."""
        self.resumed, self.seeds = True, list(used)
        before = generator.get_state()
        if skip:
            for seed in used:
                _seed_globally(seed, next(self.model.parameters()).device)
                next(self.stream)
        generator.set_state(before)  # which an iterator of the user's may draw from

    def draw(self, seed: int) -> Task:
        """The training batches and the held-out ones."""
        _seed_globally(seed, next(self.model.parameters()).device)
        task = next(self.stream)
        self.seeds.append(seed)
        if not isinstance(task, (tuple, list)) or len(task) != 2:
            got = type(task).__name__ + (f" of {len(task)}" if isinstance(task, (tuple, list)) else "")
            raise ValueError(
                f"dimaml: a task must be a pair (training batches, held-out batches), got {got}. "
                "`task_sampler` takes the generator and returns one."
            )
        parts = {}
        for kind, part, wanted in zip(("training", "held-out"), task, self.counts, strict=True):
            listed = hasattr(part, "__len__") and hasattr(part, "__getitem__")
            parts[kind] = part = part if listed else list(part)
            if len(part) != wanted:
                why = "one an inner step" if kind == "training" else "one an evaluation (`evaluation_steps` lists them)"
                raise ValueError(f"dimaml: a task must have {wanted} {kind} batches, {why}, got {len(part)}.")
        if not self.checked:
            for kind, part in parts.items():  # before any is computed with
                for k in range(len(part)):
                    self.check_shapes(part[k], kind, k)
            self.check_first(parts["training"], parts["held-out"])
        for kind, part in parts.items():
            for k in range(len(part)):
                batch = check_next_batch(self.model, part[k], self.classes, "dimaml")
                self.check_shapes(batch, kind, k)
                size = length_of(batch, "dimaml", "A batch must hold tensors whose examples lie along dimension 0.")
                if size != self.sizes.setdefault(kind, size):
                    raise ValueError(
                        f"dimaml: {kind} batches must be of one size, got {size} examples after {self.sizes[kind]}. "
                        "Use drop_last=True."
                    )
        self.checked = True
        return parts["training"], parts["held-out"]

    def check_shapes(self, batch: Batch, kind: str, k: int) -> None:
        """All but the number of examples, which has a message of its own."""
        leaves = tensors_of(batch)
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        fixed = [_fixed(leaf, stacked=self.stacked) for leaf in leaves]
        first, fixed_first = self.shapes.setdefault(kind, (shapes, fixed))
        if fixed == fixed_first:
            return
        only = " only without `vmap`, which stacks several tasks: pass vmap=False." if self.stacked else "."
        raise ValueError(
            f"dimaml: {kind} batches must be of one shape in all tasks, got {shapes} in batch {k + 1} of task "
            f"{len(self.seeds)} after {first} in the first. Crop, resize or pad to one shape; the length of sequences "
            f"of integers, (examples, length), may vary{only}"
        )

    def naming_the_layer(self, batch: Batch) -> AbstractContextManager[None]:
        return naming_the_layer(
            self.model, self.loss_fn, batch, "dimaml", batch_norm=_MODES[self.batch_norm][0], exact=self.exact, order=2
        )

    def check_first(self, train: Sequence[Batch], held_out: Sequence[Batch]) -> None:
        """What the first task tells of all of them."""
        model, loss_fn = self.model, self.loss_fn
        in_training, in_evaluation = _MODES[self.batch_norm]
        parts: list[tuple[Batch, BatchNormMode]] = [(train[0], in_training)] if len(train) else []
        parts.append((held_out[0], in_evaluation))
        first = [batch for batch, _ in parts]
        for batch, batch_norm in parts:
            # an uninterrupted run would skip the step here
            with suppress(NotFiniteError) if self.resumed else nullcontext():
                check_first_batch(model, loss_fn, batch, "dimaml", batch_norm=batch_norm, exact=self.exact)
        if loss_fn is classification_loss:  # also where a check of a resumed run met what is not finite
            self.classes = logits_of(model, first[0][0], "dimaml", parts[0][1]).shape[1]
        theta = tree_map(lambda leaf: leaf.clone().requires_grad_(), trainable(model))
        with self.naming_the_layer(first[0]):
            if len(train) and not self.first_order:
                check_differentiable(self.train_loss, theta, train[0], "dimaml")
            if self.vmap:
                self.check_vmap(theta, train[0] if len(train) else None, held_out[0])
            unused = [] if self.resumed else self.with_law
            for loss, part in ((self.train_loss, train), (self.held_out_loss, held_out)):
                for k in range(len(part)):
                    if unused:
                        unused = _unused(loss, theta, part[k], unused)
        if unused:
            shown = ", ".join(map(repr, unused[:3])) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
            remedy = (
                "Likely cause: `loss_fn` uses another model than the one it is given."
                if len(unused) == len(self.with_law)
                else "Freeze them by requires_grad_(False), or name them in `exclude`."
            )
            raise ValueError(
                f"dimaml: the loss must depend on every tensor that has a law, does not on {shown}. {remedy} "
                "The model is unchanged."
            )

    def check_vmap(self, theta: Params, train: Batch | None, held_out: Batch) -> None:
        """A layer that cannot be vectorised is found on one row; torch's own message tells what it does."""
        row = tree_map(lambda leaf: leaf.detach()[None], theta)
        try:
            if train is not None:
                losses_of_rows(self.train_loss, shared=True)(row, train, seed=0)
            losses_of_rows(self.held_out_loss, shared=True)(row, held_out)
        except RuntimeError as error:
            raise DerivativeError(
                f"dimaml: with `vmap` every layer must be one that torch.func.vmap can follow, got: {error} "
                "Pass vmap=False: the same, one training after the other. The model is unchanged."
            ) from error


def _fixed(leaf: Tensor, *, stacked: bool) -> tuple[int, ...]:
    """What may not vary of a shape: all but the number of examples and, unless stacked, of integers the length."""
    is_sequence = leaf.ndim == 2 and not leaf.is_floating_point()
    return leaf.ndim, *leaf.shape[2 if is_sequence and not stacked else 1 :]


def _unused(loss: PureLoss, theta: Params, batch: Batch, names: list[str]) -> list[str]:
    value = loss(theta, batch)
    if not value.requires_grad:
        return names
    slopes = torch.autograd.grad(value, [theta[name] for name in names], allow_unused=True)
    return [name for name, slope in zip(names, slopes, strict=True) if slope is None]


def _stream(task_sampler: Any, generator: torch.Generator) -> Iterator[Any]:
    """One task after the other, for as long as they are asked for."""
    count = 0
    ended = "dimaml: `task_sampler` must last for every meta-step, ended after {} tasks. "
    while callable(task_sampler):
        try:
            task = task_sampler(generator)
        except StopIteration as error:
            raise ValueError(ended.format(count) + "Make it draw a task at every call.") from error
        count += 1
        yield task
    while True:
        before = count
        for task in task_sampler:
            count += 1
            yield task
        if count == before or isinstance(task_sampler, Iterator):
            raise ValueError(
                ended.format(count) + "Pass a collection (gone through again and again), a function, or fewer steps."
            )


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**31, (), generator=generator, device=generator.device))


def _seed_globally(seed: int, device: torch.device) -> None:
    """What a sampler draws from torch's global generators is part of the run, then, and can be resumed."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


# ---------------------------------------------------------------------------------------------- what is measured
@dataclass
class _Trace:
    """Training losses and the last held-out one of every unroll of a meta-step, read off the device at its end."""

    N: int
    evaluations: int
    rows: int = 1
    train: list[Tensor] = field(default_factory=list)
    last: list[Tensor] = field(default_factory=list)

    def __call__(self, t: int, state: Any, value: Tensor | None) -> None:
        if t > 0:
            self.train.append(state["loss"] / self.rows)  # the sum over rows, of the step before
        if t == self.N and value is not None:
            self.last.append(value * self.evaluations)

    def measured(self) -> tuple[dict[str, float], str]:
        """Their means, and what is not finite: a step may go on from a loss that is none."""
        last = torch.stack(self.last).mean().item()
        if not self.train:
            return {"last_loss": last}, ""
        values = torch.stack(self.train)
        entry = {"last_loss": last, "train_loss": values.mean().item()}
        if math.isfinite(entry["train_loss"]):
            return entry, ""
        odd = [k for k, value in enumerate(values.tolist()) if not math.isfinite(value)] or [0]
        return entry, (
            f"the training loss must be finite, got {values[odd[0]].item()} at inner step {odd[0] % self.N + 1}. "
            "Likely causes: an inner learning rate at which training diverges, or a batch that holds NaN."
        )


def _odd_entries(G: Params, norm: float) -> str:
    odd = [name for name, leaf in G.items() if not leaf.isfinite().all()]
    where = f", in {', '.join(odd[:3])}{' and others' if len(odd) > 3 else ''}" if odd else ""
    return (
        f"the meta-gradient must be finite, got a norm of {norm}{where}. Likely cause: an unroll so long that "
        "it overflows (use `clip_adjoint` or `truncate`)."
    )


# ---------------------------------------------------------------------------------------------- checks
def _meta_adam(meta_lr: float | None, betas: tuple[float, float], eps: float) -> Adam:
    lr = 0.0 if meta_lr is None else meta_lr  # until the laws are known
    check_number("dimaml", meta_lr=lr)
    if not 0 <= lr < math.inf:
        raise ValueError(f"dimaml: `meta_lr` must be finite, 0 or more, got {meta_lr}.")
    check_positive("dimaml", eps=eps)
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise TypeError(f"dimaml: `betas` must be a pair of numbers, got {betas!r}.")
    for beta in betas:
        check_number("dimaml", betas=beta)
        if not 0 <= beta < 1:
            raise ValueError(f"dimaml: `betas` must lie in [0, 1), got {betas}.")
    return adam(lr, betas=(betas[0], betas[1]), eps=eps)


def _check_options(
    meta_steps: int,
    tasks: int,
    draws: int,
    patience: int,
    checkpoint_every: int,
    clip: float | None,
    truncate: int | None,
    clip_adjoint: float | None,
    keep_every: int | None,
) -> None:
    check_whole("dimaml", meta_steps=meta_steps, truncate=truncate or 0)
    check_whole("dimaml", smallest=1, tasks=tasks, draws=draws, patience=patience, checkpoint_every=checkpoint_every)
    if keep_every is not None:
        check_whole("dimaml", smallest=1, keep_every=keep_every)
    for name, bound in (("clip", clip), ("clip_adjoint", clip_adjoint)):
        if bound is not None:
            check_positive("dimaml", " Pass None for no bound.", **{name: bound})


def _check_sources(task_sampler: object, generator: object, start: object) -> None:
    if task_sampler is None:
        raise ValueError("dimaml: `task_sampler` must be given, got None: the objective is training on real examples.")
    if not callable(task_sampler) and not isinstance(task_sampler, Iterable):
        raise TypeError(
            "dimaml: `task_sampler` must be a function of a generator, or an iterable of tasks, got "
            f"{type(task_sampler).__name__}."
        )
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"dimaml: `generator` must be a torch.Generator, got {type(generator).__name__}.")
    if not isinstance(start, (InitDistribution, Mapping, type(None))):
        raise TypeError(
            f"dimaml: `start` must be an InitDistribution or a dictionary of laws, got {type(start).__name__}."
        )


# ---------------------------------------------------------------------------------------------- between meta-steps
@dataclass
class _State:
    """All that a meta-step hands on to the next, but for the generator's own state."""

    psi: Params
    adam: OptimizerState
    history: list[dict[str, float]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)  # of the tasks drawn: a step ends at the first that is not finite
    lost_in_a_row: int = 0


_FORMAT = "dimaml.checkpoint"
_VERSION = 2


def _described(optimizer: Optimizer, steps: int) -> dict[str, Any]:
    """An optimiser in JSON's types: a schedule by its values."""
    told: dict[str, Any] = {"rule": type(optimizer).__name__}
    for part in fields(optimizer):
        value = getattr(optimizer, part.name)
        if part.name == "schedule" and value is not None:
            value = [float(value(torch.tensor(float(t), dtype=torch.float64))) for t in range(steps)]
        told[part.name] = value.item() if isinstance(value, Tensor) else value
    return told


def _description(law: Family) -> list[Any]:
    parts = [[str(leaf.dtype), list(leaf.shape)] for leaf in law.parameters().values()]
    return [law.kind, getattr(law, "variant", ""), parts]


def _fingerprint(model: nn.Module, laws: InitDistribution, batch_norm: BatchNorm) -> str:
    """SHA-256 of all in a model that a run depends on: shapes, and the values of whatever no law draws."""
    digest = hashlib.sha256()

    def add(name: str, leaf: Tensor, *, values: bool) -> None:
        digest.update(json.dumps([name, str(leaf.dtype), list(leaf.shape), values]).encode())
        if values:
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())

    for block in blocks_of(model):
        own = block.tensor()
        is_drawn = block.parameter.requires_grad and any(key in laws.families for key in block.keys)
        add(block.key, own, values=not is_drawn)
        if is_drawn and block.padding is not None:
            add(block.key, own[block.padding], values=True)
    statistics = {
        id(leaf) for module in model.modules() if isinstance(module, _NormBase) for leaf in module.buffers(False)
    }
    for name, leaf in model.named_buffers():
        if id(leaf) not in statistics or batch_norm == "running":
            add(name, leaf, values=True)
    return digest.hexdigest()


def _start_fingerprint(start: InitDistribution | Mapping[str, Any] | None) -> str | None:
    """SHA-256 of the laws that a run was told to start from: functions of a tensor by their names alone."""
    if start is None:
        return None
    digest = hashlib.sha256()
    laws = start.families if isinstance(start, InitDistribution) else start
    for key, law in laws.items():  # in their order: of patterns the last that fits counts
        leaves = {} if callable(law) else law.parameters()
        told = getattr(law, "__qualname__", type(law).__name__) if callable(law) else _description(law)
        digest.update(json.dumps([key, told]).encode())
        for leaf in leaves.values():
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _checked_path(checkpoint: str | os.PathLike[str]) -> Path:
    path = Path(checkpoint)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"dimaml: `checkpoint` must be a file in a folder that exists, got {path}.")
    return path


def _tensors_of(state: _State) -> dict[str, Tensor]:
    trees = {"psi": state.psi} | {name: tree for name, tree in state.adam.items() if name not in ("step", "hyper")}
    return {f"{tree}/{name}": leaf for tree, leaves in trees.items() for name, leaf in leaves.items()}


def _write(path: Path, state: _State, options: Mapping[str, Any], generator: torch.Generator) -> None:
    """Written beside and renamed: whole, or as it was before."""
    columns = list(state.history[0])
    tensors = {name: leaf.detach().to("cpu", copy=True).contiguous() for name, leaf in _tensors_of(state).items()}
    tensors["generator"] = generator.get_state()
    tensors["history"] = torch.tensor([[e[key] for key in columns] for e in state.history], dtype=torch.float64)
    header: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "options": dict(options),
        "columns": columns,
        "adam_steps": int(state.adam["step"]),
        "lost_in_a_row": state.lost_in_a_row,
        "seeds": state.seeds,
    }
    write_whole(path, header, tensors)


def _read(path: Path, start: _State, options: Mapping[str, Any], generator: torch.Generator, *, most: int) -> _State:
    """The state of a run with the same options, after `most` steps at most, and the generator as it was then."""
    refused = f"dimaml: {path} must be a checkpoint of this function, "
    remedy = "Delete it to start anew."
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata[ENTRY])
        kind, stated = (header["format"], header["version"]), header.pop("sha256")
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{refused}but it is damaged or of another kind ({error}). {remedy}") from error
    if kind != (_FORMAT, _VERSION):
        raise ValueError(f"{refused}but it is {kind[0]!r} of version {kind[1]!r}. {remedy}")
    if stated != fingerprint(header, tensors):
        raise ValueError(f"{refused}but its content is not what was written: the checksum differs. {remedy}")
    told, here = header["options"], json.loads(json.dumps(options))
    for key, value in here.items():
        if told.get(key) != value:
            between = f"{told.get(key)!r} there and {value!r} here"
            raise ValueError(
                f"dimaml: the checkpoint {path} must be of the same run, but `{key}` differs"
                f"{_MEANING[key] if key in _MEANING else ': ' + between}. Pass the same, or another file to start anew."
            )
    if (done := len(tensors["history"])) > most:
        raise ValueError(
            f"dimaml: `meta_steps` must be at least the {done} that {path} has made, got {most}. "
            "Another file starts anew."
        )
    adam = {"step": torch.tensor(header["adam_steps"]), "hyper": start.adam["hyper"]}
    state = _State(dict(start.psi), dict(start.adam) | adam, lost_in_a_row=header["lost_in_a_row"])
    state.seeds = header["seeds"]
    for tree, leaves in [("psi", start.psi), *((key, start.adam[key]) for key in start.adam if key not in adam)]:
        read = {name: tensors[f"{tree}/{name}"].to(leaf) for name, leaf in leaves.items()}
        if tree == "psi":
            state.psi = read
        else:
            state.adam[tree] = read
    state.history = [dict(zip(header["columns"], row, strict=True)) for row in tensors["history"].tolist()]
    generator.set_state(tensors["generator"])
    return state


_MEANING = {
    "start": ": other laws to start from",
    "laws": ": other tensors have laws, or laws of another kind or number of pieces",
    "model": ": other shapes, or other values of what no law draws (tensors without one, frozen tensors, buffers)",
}
