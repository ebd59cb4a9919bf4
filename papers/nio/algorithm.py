r"""NIO: one multiplier a tensor, learned so that the gradients of single examples, or of sub-batches, agree.

Letters: theta0 θ₀ the drawn parameters, m their multipliers, S a minibatch of B examples, D windows of it, GC the mean
cosine of their gradients, GN their mean norm, gamma γ its bound, d = ∂/∂m.

Source: Yang et al., NeurIPS 2022, Algorithms 1 to 3, and its released code.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.batches import endless, length_of, map_tensors, of_one_size
from common.derivatives import Group, GroupMode, check_differentiable
from common.descent import Descent, trainable
from common.functional import (
    BatchNormMode,
    check_bare,
    check_first_batch,
    check_loss,
    check_next_batch,
    classification_loss,
    names_of,
    pure_loss,
    uses_batch_statistics,
)
from common.guard import naming_the_layer
from common.options import check_choice, check_number, check_positive, check_whole
from common.scales import Bounds, Branch, Patterns, RescaleAdam, check_patterns, kinds_of, matches
from common.types import Batch, InitResult, Params, PureLoss, UserLoss
from papers.nio.batching import Rule, grad_cosine_floor, windows
from papers.nio.objective import OBJECTIVES, Coupling, Objective, scale_gradients

Variant = Literal["paper", "released"]
EXAMPLES_AT_ONCE, SUB_BATCHES_AT_ONCE = 32, 4
"""Groups whose graphs are held at once, unless told."""
Splits = int | Literal["examples"]


def nio(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batches: Iterable[Batch] | None = None,
    *,
    splits: Splits | None = None,
    overlap: float = 0.0,
    objective: Objective | None = None,
    gamma: float = float("inf"),
    steps: int = 100,
    lr: float = 3e-3,
    min_scale: float = 0.01,
    bounds: Bounds | None = None,
    clip: float | None = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    shared_second_moment: bool = True,
    norm_weight: float = 1.0,
    include_diagonal: bool = False,
    rule: Rule | None = None,
    coupling: Coupling | None = None,
    grad_params: Patterns | str | None = None,
    include: Patterns | str = ("*",),
    exclude: Patterns | str = (),
    chunk_size: int | None = None,
    variant: Variant = "paper",
    batch_norm: BatchNormMode = "batch",
    exact_kernels: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> InitResult:
    r"""Rescale every tensor of `model` so that the gradients of examples, or of sub-batches, point the same way.

    Repeats: draw S; where GN > γ, descend on GN; else on the objective, −GC; by `RescaleAdam` on the multipliers m of
    θ = m ⊙ θ₀. With no options given: every example is a group of its own; where BatchNorm couples examples, the batch
    is cut into four sub-batches instead (into fewer, if it holds less than eight), and a warning says so.

    The model's parameters are written once, at the end; buffers, modes and the global random state stay as they were;
    on any error the model is bit-identical to what was passed in.

    Args:
        model: Any bare `nn.Module`. Every trainable tensor has a multiplier, a tied one once, unless its norm is zero.
        loss_fn: `loss_fn(model, batch)`, mean over examples; with `coupling="shared"` one value an example, shape
            (B,). Cross-entropy of `model(x)` by default, of either form.
        batches: Batches of one size on the model's device; a collection is gone through again and again, a pass's last
            batch left out where it falls short. Augmented as in training, as the authors' are.
        splits: D ≥ 2 sub-batches, or "examples"; None chooses.
        overlap: r in [0, 1], the share of a sub-batch's length that it takes of each neighbour. Raises GC's floor.
        objective: "gc" (the paper's), or another of the released names (`objective_value`). None: "gc".
        gamma: γ > 0, the largest mean gradient norm; `float("inf")` drops the constraint.
        steps: T ≥ 0, iterations of either kind.
        lr: τ ≥ 0, about what a multiplier moves in one iteration; where a branch is entered late and the second moment
            is shared, up to √t τ at the t-th.
        min_scale: Smallest multiplier of weights and gains; that of biases is 0.
        bounds: (smallest, largest) by kind ("norm") or name pattern, in place of `min_scale` where it means a tensor.
        clip: Largest |d| of one multiplier; None: no bound.
        betas: Of RescaleAdam.
        eps: Of RescaleAdam.
        shared_second_moment: One second moment for both branches (the authors' code) or one each.
        norm_weight: w, of the released objectives that reward the norm.
        include_diagonal: Count a gradient's cosine with itself in GC.
        rule: Of the windows, see `windows`; None: "intended".
        coupling: "independent": each group is a forward pass of its own. "shared": one forward pass, whose batch
            statistics all groups share. None: "independent".
        grad_params: The tensors that gradients are taken in: "all", "without_batch_norm" (BatchNorm's gains and
            shifts are scaled but not in the gradient), "released" (weights and biases of 2-D convolutions, linear
            layers and layer norms), or kinds and name patterns. None: "without_batch_norm".
        include: Kinds ("conv", "linear", "norm", "bias", "embedding", "other") or name patterns that get a multiplier.
        exclude: Those that get none.
        chunk_size: Groups whose graphs are held at once; None: 32 examples, or 4 sub-batches.
        variant: "released" takes, where they are None, the authors' `objective` ("gc_gn_sqrt"), `rule`, `coupling` and
            `grad_params` (each's "released", or "shared"), and leaves a multiplier at zero once it is there.
        batch_norm: "batch" (as the authors) or "running" statistics.
        exact_kernels: See `common.exact`; False only to measure what it costs.
        on_step: Called after each iteration with its entry of the history.
        progress: Show a progress bar.

    Returns:
        `scales` (m), `history` (a dictionary an iteration: `step`, `constraint` 1 or 0, `grad_cosine` with its `floor`,
        `grad_norm`, `grad_variance`, `norm_ratio`, and `share/NAME`, each tensor's share of the gradient; all *before*
        the iteration's update) and `skipped`.

    Raises:
        TypeError: A wrapped model (DDP, FSDP, DataParallel, `torch.compile`); a loss of another form; an option of
            another type.
        ValueError: An option out of range; "examples" where BatchNorm couples them; nothing to scale, or parameters
            that share memory; batches that do not fit the model, hold one example, change in size or end too soon.
        NotFiniteError: A loss or gradient that is not finite, with the step and the tensors (a ValueError too).
        DerivativeError: A layer stands in the way of a derivative; the message names it, and the way out.

    Warns:
        UserWarning: Once, where sub-batches took the place of examples, or a loop that of `torch.func.vmap`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(6, 4), torch.randint(3, (6,))
        >>> result = nio(model, batches=[batch], steps=2, progress=False)
        >>> sorted(result.scales)
        ['0.bias', '0.weight', '2.bias', '2.weight']

    Reference:
        Yang et al. 2022, Algorithm 3.
    """
    check_bare(model, "nio")
    check_loss(loss_fn, "nio")
    include, exclude = ((given,) if isinstance(given, str) else given for given in (include, exclude))
    descent = Descent(
        caller="nio",
        steps=steps,
        adam=RescaleAdam(lr=lr, betas=betas, eps=eps, clip=clip, shared_second_moment=shared_second_moment),
        min_scale=min_scale,
        bounds=bounds,
        include=include,
        exclude=exclude,
        stuck_at_zero=variant == "released",
    )
    descent.check()
    check_choice("nio", "variant", variant, ("paper", "released"))
    released = variant == "released"
    if objective is None:
        objective = "gc_gn_sqrt" if released else "gc"
    if rule is None:
        rule = "released" if released else "intended"
    if coupling is None:
        coupling = "shared" if released else "independent"
    if grad_params is None:
        grad_params = "released" if released else "without_batch_norm"
    in_gradient = gradient_tensors(model, grad_params)
    _check_options(splits, overlap, objective, gamma, norm_weight, rule, coupling, chunk_size)
    if batches is None:
        raise ValueError(
            "nio: `batches` must be given, got None: the objective compares gradients of real examples. "
            "Pass a DataLoader."
        )
    coupled = coupling == "independent" and uses_batch_statistics(model, batch_norm)
    chosen = _choose_splits(splits, overlap, coupled=coupled)
    by_example = chosen == "examples"
    chunk_size = chunk_size or (EXAMPLES_AT_ONCE if by_example else SUB_BATCHES_AT_ONCE)
    shared = coupling == "shared"
    user_loss = example_losses if shared and loss_fn is classification_loss else loss_fn
    make = partial(pure_loss, model, user_loss, batch_norm=batch_norm, exact=exact_kernels)
    theta0 = trainable(model)
    # a loop differentiates twice, in reverse, for which torch's own norms are right; vmap needs the re-expressed ones
    mode: GroupMode = "loop"
    loss = make(order=2)
    stream = endless(of_one_size(batches, "nio", "Use drop_last=True."), "nio")
    classes: int | None = None

    def slopes(t: int, m: Params, _: Branch) -> tuple[Branch, Params, dict[str, float | Tensor]]:
        nonlocal classes, loss, mode
        batch = next(stream)
        groups, floor = _groups(
            batch, chosen, overlap, rule, include_diagonal, coupled=coupled, or_fewer=splits is None
        )
        if t == 1:
            # what is built before the groups are gone through holds the graph of one of them, not of the batch
            first = batch if shared else map_tensors(lambda leaf: leaf[groups[0] if groups else slice(1)], batch)
            mean_loss = loss_fn if not shared or loss_fn is classification_loss else _mean_of(loss_fn)
            classes = check_first_batch(
                model, mean_loss, batch, "nio", batch_norm=batch_norm, exact=exact_kernels,
                micro_batch_size=chunk_size if by_example and not shared else None,
            )  # fmt: skip
            check_differentiable(_mean_of_pure(loss) if shared else loss, theta0, first, "nio")
        check_next_batch(model, batch, classes, "nio")
        if t == 1 and by_example and not shared:
            loss, mode = _vectorised(make(order=3), loss, theta0, batch, in_gradient)
        with naming_the_layer(
            model, _mean_of(user_loss) if shared else user_loss, batch, "nio", batch_norm=batch_norm,
            exact=exact_kernels, order=2,
        ):  # fmt: skip
            branch, d, metrics = scale_gradients(
                loss,
                theta0,
                m,
                batch,
                groups=groups,
                objective=objective,
                gamma=gamma,
                coupling=coupling,
                chunk_size=chunk_size,
                norm_weight=norm_weight,
                include_diagonal=include_diagonal,
                grad_params=in_gradient,
                mode=mode,
            )
        if t == 1 and metrics["grad_norm"] == 0:
            raise ValueError(
                "nio: the loss must depend on the tensors that gradients are taken in, got gradients that are zero "
                "everywhere. Likely cause: `loss_fn` uses another model than the one it is given. "
                "The model is unchanged."
            )
        at_hand = {name: metrics[name].item() for name in ("grad_cosine", "grad_norm")}
        return branch, d, {"floor": floor} | metrics | at_hand

    return descent.run(model, slopes, shown=("grad_cosine", "floor", "grad_norm"), on_step=on_step, progress=progress)


# ---------------------------------------------------------------------------------------------- its small parts
def _choose_splits(splits: Splits | None, overlap: float, *, coupled: bool) -> Splits:
    """Examples where they are independent, else four sub-batches."""
    if splits == "examples" and coupled:
        raise ValueError(
            "nio: an example alone has no batch statistics, got splits='examples' for a model with BatchNorm. Pass "
            "splits=4 (sub-batches, each with statistics of its own), coupling='shared' (one forward pass, whose "
            "statistics all examples share), or batch_norm='running'."
        )
    if splits is None and coupled:
        warnings.warn(
            "nio: BatchNorm couples the examples of a batch, so gradients of 4 sub-batches (fewer, where a batch holds "
            "less than 8) are compared, not of single examples. Pass splits=4 to choose this, or coupling='shared' or "
            "batch_norm='running' for examples.",
            stacklevel=3,
        )
        return 4
    if splits in (None, "examples") and overlap > 0:
        raise ValueError(
            f"nio: `overlap` is what sub-batches share, got {overlap} for single examples. Pass `splits`, a number."
        )
    return "examples" if splits is None else splits


def _groups(
    batch: Batch,
    splits: Splits,
    overlap: float,
    rule: Rule,
    include_diagonal: bool,
    *,
    coupled: bool,
    or_fewer: bool,
) -> tuple[Sequence[Group] | None, float]:
    """The groups of a batch, and the GC that shared examples alone would give."""
    B = length_of(batch, "nio", "A batch must hold tensors whose examples lie along dimension 0.")
    if B < 2:
        raise ValueError(f"nio: a batch must hold two examples or more to compare, got {B}. Use larger batches.")
    if isinstance(splits, str):
        n, off, groups = B, 0.0, None
    else:
        splits = max(2, min(splits, B // 2)) if or_fewer else splits
        groups = windows(B, splits, overlap, rule=rule)
        if coupled and min(group.stop - group.start for group in groups) < 2:
            raise ValueError(
                f"nio: a sub-batch must hold two examples or more to have batch statistics, got {splits} sub-batches "
                f"of {B} examples. Use larger batches, fewer `splits`, or coupling='shared'."
            )
        n, off = splits, grad_cosine_floor(groups)
    return groups, (1 + (n - 1) * off) / n if include_diagonal else off


def _vectorised(
    mapped: PureLoss, looped: PureLoss, theta0: Params, batch: Batch, in_gradient: list[str]
) -> tuple[PureLoss, GroupMode]:
    """Gradients of all examples in one vectorised pass, where two examples show that the model allows it."""
    two = map_tensors(lambda leaf: leaf[:2], batch)
    ones = {name: leaf.new_ones(()) for name, leaf in theta0.items()}
    try:
        scale_gradients(mapped, theta0, ones, two, grad_params=in_gradient, mode="vmap")
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # no batching rule, or control flow on data; whatever else is wrong comes again
        warnings.warn(
            "nio: torch.func.vmap cannot follow this model, so examples are gone through one by one, which is slower: "
            f"{str(error).strip().splitlines()[0][:160]}",
            stacklevel=5,
        )
        return looped, "loop"
    return mapped, "vmap"


def gradient_tensors(model: nn.Module, wanted: Patterns | str) -> list[str]:
    """Names of the trainable tensors that gradients are taken in.

    Args:
        model: Whose.
        wanted: "all", "without_batch_norm", "released" (weights and biases of 2-D convolutions, linear layers and layer
            norms), or kinds and name patterns.

    Raises:
        ValueError: A pattern that means no parameter, or nothing left.
    """
    kinds = kinds_of(model)
    of_batch_norm = _parameters_in(model, nn.modules.batchnorm._BatchNorm)
    if wanted == "all":
        chosen = set(kinds)
    elif wanted == "without_batch_norm":
        chosen = kinds.keys() - of_batch_norm
    elif wanted == "released":
        chosen = _parameters_in(model, (nn.Conv2d, nn.Linear, nn.LayerNorm))
    else:
        patterns = (wanted,) if isinstance(wanted, str) else wanted
        check_patterns(model, patterns, "nio")
        chosen = {name for name, every in names_of(model).items() if matches(every, kinds[name], patterns)}
    names = [name for name in trainable(model) if name in chosen]
    if not trainable(model):
        raise ValueError(
            "nio: at least one tensor must be trainable, got none. Set `requires_grad` of those to be scaled."
        )
    if not names:
        raise ValueError(
            f"nio: gradients must be taken in a trainable tensor at least, got none for grad_params={wanted!r}. "
            "Pass grad_params='all'."
        )
    return names


def _parameters_in(model: nn.Module, kinds: type | tuple[type, ...]) -> set[str]:
    owners = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters(False)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owners}


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each example, shape (B,); of further dimensions the mean."""
    x, y = batch
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    return losses.reshape(len(losses), -1).mean(1)


def _mean_of(loss_fn: UserLoss) -> UserLoss:
    """The mean over examples of a loss that returns one value each."""

    def mean(model: nn.Module, batch: Batch) -> Tensor:
        values = loss_fn(model, batch)
        B = length_of(batch, "nio", "")
        if not isinstance(values, Tensor) or values.shape != (B,):
            got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"nio: with coupling='shared' `loss_fn` must return one value an example, shape ({B},), got {got}. "
                "Use reduction='none', and a mean over any further dimensions."
            )
        return values.mean()

    return mean


def _mean_of_pure(loss: PureLoss) -> PureLoss:
    return lambda params, batch: loss(params, batch).mean()


def _check_options(
    splits: Splits | None,
    overlap: float,
    objective: str,
    gamma: float,
    norm_weight: float,
    rule: str,
    coupling: str,
    chunk_size: int | None,
) -> None:
    if splits is not None and splits != "examples":
        check_whole("nio", " Or pass splits='examples'.", smallest=2, splits=splits)
    check_choice("nio", "objective", objective, OBJECTIVES)
    check_choice("nio", "rule", rule, ("intended", "released"))
    check_choice("nio", "coupling", coupling, ("independent", "shared"))
    check_positive("nio", norm_weight=norm_weight)
    check_number("nio", overlap=overlap)
    if not 0 <= overlap <= 1:
        raise ValueError(f"nio: `overlap` must lie in [0, 1], got {overlap}: a share of a sub-batch's own length.")
    if chunk_size is not None:
        check_whole("nio", smallest=1, chunk_size=chunk_size)
    check_number("nio", " Pass float('inf') to drop the constraint.", gamma=gamma)
    if not gamma > 0:
        raise ValueError(
            f"nio: `gamma` (the bound γ on the mean gradient norm) must be positive, got {gamma}. "
            "Pass float('inf') to drop the constraint."
        )
