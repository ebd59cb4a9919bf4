r"""GradInit: one multiplier a tensor, learned by descent on the loss after one step of the training to come.

Letters: theta0 θ₀ the drawn parameters, m their multipliers, S and S̃ two minibatches, g the gradient on S, d = ∂/∂m.

Source: Zhu et al., NeurIPS 2021, Algorithm 1, and its released code.
"""

import math
from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn

from common.derivatives import check_differentiable
from common.descent import Descent, trainable
from common.functional import (
    BatchNormMode,
    check_bare,
    check_first_batch,
    check_loss,
    check_next_batch,
    classification_loss,
    pure_loss,
    structural_copy,
)
from common.guard import naming_the_layer
from common.options import check_choice, check_number, check_positive
from common.scales import Bounds, Branch, Patterns, RescaleAdam
from common.types import Batch, DerivativeError, InitResult, Params, UserLoss
from papers.gradinit.batching import Pairs, batch_pairs
from papers.gradinit.objective import ENGINES, NORMS, STEPS, Engine, LookAhead, Norm, Step, scale_gradients

Variant = Literal["paper", "released"]


def gradinit(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batches: Iterable[Batch] | None = None,
    *,
    step: Step = "normalized_sgd",
    eta: float = 0.1,
    gamma: float = 1.0,
    steps: int = 390,
    lr: float = 1e-2,
    min_scale: float = 0.01,
    bounds: Bounds | None = None,
    clip: float | None = 1.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    shared_second_moment: bool = True,
    exact: bool = False,
    norm: Norm | None = None,
    engine: Engine = "lazy",
    pairs: Pairs = "halves",
    include: Patterns | str = ("*",),
    exclude: Patterns | str = (),
    variant: Variant = "paper",
    batch_norm: BatchNormMode = "batch",
    exact_kernels: bool = True,
    on_step: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> InitResult:
    r"""Rescale every tensor of `model` so that one step of its training lowers the loss most.

    Repeats Algorithm 1: draw S; where ‖∇L(S; θ)‖ > γ, descend on that norm; else draw S̃ and descend on
    L(S̃; θ − η A[∇L(S; θ)]); in both cases by `RescaleAdam` on the multipliers m of θ = m ⊙ θ₀. The defaults are those
    common to the released CIFAR-10 runs; `lr` is tuned there for each network, between 1e-3 and 1e-1.

    For training by Adam: `step="adam"` and a γ for the ℓ1 norm with η γ of about 1. The released translation run:
    η 1e-3, γ 1000, 780 iterations of τ 2.5e-3, `betas=(0.9, 0.98)`, `clip=None`, `shared_second_moment=False`,
    `pairs="thirds"`, `bounds={"norm": (0.01, 100)}`.

    The model's parameters are written once, at the end; buffers, modes and the global random state stay as they were;
    on any error the model is bit-identical to what was passed in.

    Args:
        model: Any bare `nn.Module`. Every trainable tensor has a multiplier, a tied one once, unless its norm is zero.
        loss_fn: `loss_fn(model, batch)`, mean over examples. Cross-entropy of `model(x)` by default.
        batches: Batches of one even size on the model's device, of which S takes one and S̃ half of another; a
            collection is gone through again and again. Augmented as in training, as the authors' are.
        step: A, the first step of the training to come: by name, or `gradients by name ↦ direction by name`.
        eta: η > 0, its size.
        gamma: γ > 0, the largest gradient norm; `float("inf")` drops the constraint.
        steps: T ≥ 0, iterations of either kind.
        lr: τ ≥ 0, about what a multiplier moves in one iteration; where a branch is entered late and the second moment
            is shared, up to √t τ at the t-th.
        min_scale: Smallest multiplier of weights and gains; that of biases is 0.
        bounds: (smallest, largest) by kind ("norm") or name pattern, in place of `min_scale` where it means a tensor.
        clip: Largest |d| of one multiplier; None: no bound.
        betas: Of RescaleAdam.
        eps: Of RescaleAdam.
        shared_second_moment: One second moment for both branches (the authors' vision code) or one each (translation).
        exact: Differentiate the step as well. Ours; the authors take it for a constant.
        norm: "l1" or "l2"; by default ℓ1 for Adam, else ℓ2.
        engine: See `scale_gradients`.
        pairs: How S̃ shares examples with S: see `batch_pairs`. "thirds" is for batches of changing size.
        include: Kinds ("conv", "linear", "norm", "bias", "embedding", "other") or name patterns that get a multiplier.
        exclude: Those that get none.
        variant: "released" steps a weight tied between modules in the first of them only, and leaves a multiplier at
            zero once it is there. The authors' other ways are options above, or not offered (this package's README).
        batch_norm: "batch" (as the authors) or "running" statistics.
        exact_kernels: See `common.exact`; False only to measure what it costs.
        on_step: Called after each iteration with its entry of the history.
        progress: Show a progress bar.

    Returns:
        `scales` (m), `history` (a dictionary an iteration: `step`, `constraint` 1 or 0, `loss` on S, `gradient_norm`,
        `look_ahead_loss` on S̃ or NaN where it was not needed; all *before* the iteration's update) and `skipped`.

    Raises:
        TypeError: A wrapped model (DDP, FSDP, DataParallel, `torch.compile`); a loss of another form; a step that is
            neither name nor function; an option of another type.
        ValueError: An option out of range; nothing to scale, or parameters that share memory; batches that do not fit
            the model, cannot be halved, change in size or end too soon.
        NotFiniteError: A loss or gradient that is not finite, with the step and the tensors (a ValueError too).
        DerivativeError: A layer stands in the way of a derivative; the message names it, and the way out.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(6, 4), torch.randint(3, (6,))
        >>> result = gradinit(model, batches=[batch], steps=2, progress=False)
        >>> sorted(result.scales)
        ['0.bias', '0.weight', '2.bias', '2.weight']

    Reference:
        Zhu et al. 2021, Algorithm 1.
    """
    check_bare(model, "gradinit")
    check_loss(loss_fn, "gradinit")
    include, exclude = ((given,) if isinstance(given, str) else given for given in (include, exclude))
    descent = Descent(
        caller="gradinit",
        steps=steps,
        adam=RescaleAdam(lr=lr, betas=betas, eps=eps, clip=clip, shared_second_moment=shared_second_moment),
        min_scale=min_scale,
        bounds=bounds,
        include=include,
        exclude=exclude,
        stuck_at_zero=variant == "released",
    )
    descent.check()
    _check_options(step, eta, gamma, norm, engine, pairs, variant, exact)
    if batches is None:
        raise ValueError(
            "gradinit: `batches` must be given, got None: the objective is the loss of real examples. "
            "Pass a DataLoader with an even batch size."
        )
    theta0 = trainable(model)
    loss = pure_loss(model, loss_fn, batch_norm=batch_norm, exact=exact_kernels, order=2)
    look_ahead = _half_stepped(model, loss_fn, batch_norm, exact_kernels) if variant == "released" else None
    stream = batch_pairs(batches, pairs)
    classes: int | None = None
    proven = engine == "finite_difference"  # that no layer lacks a second derivative, or that none is taken

    def slopes(t: int, m: Params, last: Branch) -> tuple[Branch, Params, dict[str, float | Tensor]]:
        nonlocal classes, proven
        batch, other = next(stream)
        if t == 1:
            classes = check_first_batch(model, loss_fn, batch, "gradinit", batch_norm=batch_norm, exact=exact_kernels)
            _check_step(step, theta0)
        check_next_batch(model, batch, classes, "gradinit")
        try:
            with naming_the_layer(
                model, loss_fn, batch, "gradinit", batch_norm=batch_norm, exact=exact_kernels, order=2
            ):
                branch, d, metrics = scale_gradients(
                    loss,
                    theta0,
                    m,
                    batch,
                    lambda: check_next_batch(model, other(), classes, "gradinit"),
                    step=step,
                    eta=eta,
                    gamma=gamma,
                    exact=exact,
                    norm=norm,
                    engine=engine,
                    expected=last,  # the last branch is a good forecast
                    look_ahead=look_ahead,
                )
                # not before it is needed, for its graph is as large as the constraint's; a sign's derivative is zero
                if not proven and ((exact and step != "adam") or branch == "constraint"):
                    check_differentiable(loss, theta0, batch, "gradinit")
                    proven = True
        except DerivativeError as error:
            if engine == "finite_difference":
                raise
            way_out = "Where it is a second derivative that fails: engine='finite_difference' needs none."
            raise DerivativeError(f"{error} {way_out}") from error
        if t == 1 and metrics["gradient_norm"] == 0:
            raise ValueError(
                "gradinit: the loss must depend on the model's parameters, got a gradient that is zero "
                "everywhere. Likely cause: `loss_fn` uses another model than the one it is given. "
                "The model is unchanged."
            )
        return (
            branch,
            d,
            {
                "loss": metrics["loss"].item(),
                "gradient_norm": metrics["gradient_norm"].item(),
                "look_ahead_loss": metrics.get("look_ahead_loss", math.nan),  # stays on its device until the end
            },
        )

    return descent.run(model, slopes, shown=("loss", "gradient_norm"), on_step=on_step, progress=progress)


# ---------------------------------------------------------------------------------------------- its small parts
def _half_stepped(
    model: nn.Module, loss_fn: UserLoss, batch_norm: BatchNormMode, exact_kernels: bool
) -> LookAhead | None:
    """The released look-ahead loss: a weight tied between modules is stepped in the first, not in the others."""
    untied = structural_copy(model)
    first = {id(parameter): name for name, parameter in untied.named_parameters()}

    def place(name: str) -> tuple[nn.Module, str]:
        path, _, own = name.rpartition(".")
        return untied.get_submodule(path), own

    others = {
        name: first[id(parameter)]
        for name, parameter in untied.named_parameters(remove_duplicate=False)
        if place(name) != place(first[id(parameter)])  # one module under two names has one weight, whatever is done
    }
    if not others:
        return None
    for name in others:
        owner, own = place(name)
        setattr(owner, own, nn.Parameter(owner.get_parameter(own).detach().clone()))
    loss = pure_loss(untied, loss_fn, batch_norm=batch_norm, exact=exact_kernels, order=2)

    def look_ahead(stepped: Params, theta: Params, batch: Batch) -> Tensor:
        return loss(stepped | {name: theta[tied_to] for name, tied_to in others.items() if tied_to in theta}, batch)

    return look_ahead


def _check_step(step: Step, theta0: Params) -> None:
    """A user's step is tried once, on a gradient of the parameters' own values."""
    if not callable(step):
        return
    given = {name: leaf.clone() for name, leaf in theta0.items()}
    tried = dict(given)
    versions = {name: leaf._version for name, leaf in given.items()}
    direction = step(tried)
    if changed := [
        name for name, leaf in given.items() if leaf._version != versions[name] or tried.get(name) is not leaf
    ]:
        raise ValueError(
            f"gradinit: a function for `step` must leave the gradient that it is given as it is, got one that changes "
            f"{changed[0]!r}. Return new tensors in a new dictionary."
        )
    if not isinstance(direction, dict) or direction.keys() != theta0.keys():
        raise ValueError(
            "gradinit: a function for `step` must map a gradient {name: tensor} to a direction with the same names, "
            f"got {type(direction).__name__}{' with other names' if isinstance(direction, dict) else ''}."
        )
    for name, leaf in theta0.items():
        if _form(direction[name]) != _form(leaf):
            raise ValueError(
                f"gradinit: a function for `step` must return tensors like those that it is given, got "
                f"{_form(direction[name])} for {name!r}, where the gradient is {_form(leaf)}."
            )


def _form(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)} on {value.device}"


def _check_options(
    step: object, eta: float, gamma: float, norm: str | None, engine: str, pairs: str, variant: str, exact: bool
) -> None:
    if not callable(step):
        if not isinstance(step, str):
            raise TypeError(f"gradinit: `step` must be a name or a function, got {type(step).__name__}.")
        check_choice("gradinit", "step", step, STEPS, " Or pass a function from gradients to a direction.")
    check_choice("gradinit", "norm", norm, (None, *NORMS))
    check_choice("gradinit", "engine", engine, ENGINES)
    check_choice("gradinit", "pairs", pairs, ("halves", "thirds", "disjoint"))
    check_choice("gradinit", "variant", variant, ("paper", "released"))
    check_positive("gradinit", eta=eta)
    check_number("gradinit", " Pass float('inf') to drop the constraint.", gamma=gamma)
    if not gamma > 0:
        raise ValueError(
            f"gradinit: `gamma` (the gradient-norm bound γ) must be positive, got {gamma}. "
            "Pass float('inf') to drop the constraint."
        )
    if exact and variant == "released":
        raise ValueError("gradinit: `exact` is not part of the released code, got both. Leave variant='paper'.")
