r"""MetaInit: tune the norm of every weight tensor by sign-momentum descent on the gradient quotient.

Letters: θ_l the l-th tuned tensor, n_l = ‖θ_l‖, σ_l = sign ∂GQ/∂n_l, m_l its momentum, lr the learning rate, mu μ.

Source: Dauphin & Schoenholz, NeurIPS 2019, Figure 2.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from numbers import Integral
from typing import Literal

import torch
from jaxtyping import Float
from rich.progress import Progress
from torch import Tensor, nn

from common.batches import count_examples, endless
from common.derivatives import check_differentiable, micro_batches
from common.functional import (
    BatchNormMode,
    check_apart,
    check_bare,
    check_first_batch,
    check_loss,
    check_next_batch,
    classification_loss,
    load_parameters_,
    logits_of,
    pure_loss,
    unchanged_on_error,
    uses_batch_statistics,
)
from common.guard import naming_the_layer
from common.options import check_choice, check_number, check_positive, check_whole
from common.precision import check_precision, full_precision
from common.tree import tree_dots, tree_norms
from common.types import Batch, InitResult, NotFiniteError, Params, PureLoss, UserLoss
from papers.metainit.objective import FORMS, Form, meta_gradient

Update = Literal["linear", "log"]
UPDATES = ("linear", "log")


def noise_batches(
    input_shape: tuple[int, ...],
    num_classes: int,
    batch_size: int,
    *,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[Batch]:
    """Endless batches x ~ N(0, 1), y ~ Uniform{0 … C − 1}, independent: Figure 2 sees no real data.

    Args:
        input_shape: One example's shape, without the batch dimension.
        num_classes: C.
        batch_size: Examples a batch.
        generator: The only source of randomness; draws are made on its device.
        device: Where the batches go; the generator's device by default.
        dtype: Of x; torch's default dtype by default.

    Yields:
        `(x, y)`: x of shape (batch, *input_shape) y int64 of shape (batch,).

    Raises:
        TypeError: `input_shape` is no tuple of whole numbers, or `generator` no torch.Generator.
        ValueError: One of the sizes, `num_classes` or `batch_size` below 1.
    """
    _check_noise("noise_batches", input_shape, generator)
    if num_classes < 1 or batch_size < 1:
        raise ValueError(
            f"noise_batches: `num_classes` and `batch_size` must be at least 1, got {num_classes} and {batch_size}."
        )
    device = generator.device if device is None else device

    def draw() -> Iterator[Batch]:
        while True:
            x = torch.randn(batch_size, *input_shape, generator=generator, device=generator.device, dtype=dtype)
            y = torch.randint(num_classes, (batch_size,), generator=generator, device=generator.device)
            yield x.to(device), y.to(device)

    return draw()


def _check_noise(caller: str, input_shape: object, generator: object) -> None:
    if not isinstance(input_shape, (tuple, list)) or not all(isinstance(size, Integral) for size in input_shape):
        raise TypeError(
            f"{caller}: `input_shape` must be a tuple of whole numbers, as in (3, 32, 32), got {input_shape!r}."
        )
    if min(input_shape, default=1) < 1:
        raise ValueError(f"{caller}: sizes in `input_shape` must be 1 or more, got {input_shape}.")
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"{caller}: `generator` must be a torch.Generator, got {generator!r}.")


def sign_momentum_step(
    norms: Float[Tensor, "tensors"],
    momenta: Float[Tensor, "tensors"],
    sigma: Float[Tensor, "tensors"],
    *,
    lr: float,
    mu: float,
    update: Update = "linear",
    minimum_ratio: float | None = 0.1,
) -> tuple[Float[Tensor, "tensors"], Float[Tensor, "tensors"]]:
    r"""m ← μ m − lr σ, then n ← n + m (`"linear"`, Figure 2) or n ← n exp(m) (`"log"`, ours).

    Args:
        norms: n_l > 0, one a tuned tensor.
        momenta: m_l.
        sigma: σ_l in {−1, 0, 1}: the sign is taken *before* momentum, so |m_l| ≤ lr / (1 − μ).
        lr: In units of the norm (`"linear"`) or of its logarithm (`"log"`).
        mu: μ.
        update: Which of the two.
        minimum_ratio: ρ, the smallest n'/n a linear step may take; None lets a norm cross zero, as Figure 2 does.

    Returns:
        New norms and momenta.

    Raises:
        ValueError: Another `update`.

    Example:
        >>> one = torch.ones(1)
        >>> sign_momentum_step(2 * one, 0 * one, one, lr=0.5, mu=0.9)
        (tensor([1.5000]), tensor([-0.5000]))
    """
    check_choice("sign_momentum_step", "update", update, UPDATES)
    momenta = mu * momenta - lr * sigma
    if update == "log":
        return norms * momenta.exp(), momenta
    moved = norms + momenta
    return moved if minimum_ratio is None else torch.maximum(moved, minimum_ratio * norms), momenta


def tunable_tensors(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Names of the tensors Figure 2 tunes (two dimensions or more, trainable), and those left alone with the reason.

    A tensor whose norm is zero or not finite has no direction to rescale: it is skipped, never divided by.
    """
    params = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    # a frozen one need not be of a type that has a norm
    moving = {name: p.detach() for name, p in params.items() if p.requires_grad}
    norms = dict(zip(moving, tree_norms(moving, moving).tolist(), strict=True)) if moving else {}
    skipped = {}
    for name in params:
        if name not in moving:
            skipped[name] = "frozen: requires_grad is False"
        elif not math.isfinite(norms[name]):
            skipped[name] = f"its norm is not finite ({norms[name]})"
        elif norms[name] == 0:
            skipped[name] = "its norm is zero"
    return [name for name in params if name not in skipped], skipped


def metainit(
    model: nn.Module,
    loss_fn: UserLoss = classification_loss,
    batches: Iterable[Batch] | None = None,
    *,
    steps: int = 500,
    lr: float = 0.1,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    form: Form = "taylor",
    eta: float = 1.0,
    update: Update = "linear",
    linear_decay: bool = False,
    allow_sign_flip: bool = False,
    minimum_ratio: float = 0.1,
    micro_batch_size: int | None = None,
    batch_norm: BatchNormMode = "running",
    exact: bool = True,
    input_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
    progress: bool = True,
) -> InitResult:
    r"""Rescale every weight tensor of `model` so that its gradient changes little along a step of descent.

    Repeats Figure 2: a fresh batch; σ_l = sign ∂GQ/∂n_l; m_l ← μ m_l − lr σ_l; n_l ← n_l + m_l; θ_l keeps its
    direction. The defaults are the paper's, with one guard (`minimum_ratio`), named in this package's README.

    The model's parameters are written once, at the end; buffers, modes and the global random state stay as they were;
    on any error the model is bit-identical to what was passed in.

    Args:
        model: Any bare `nn.Module`. Trainable tensors of two or more dimensions are tuned, a tied one once.
        loss_fn: `loss_fn(model, batch)`, mean over examples. Cross-entropy of `model(x)` by default.
        batches: Batches on the model's device, one a step; a finite collection is gone through again and again. By
            default noise of `input_shape` with random labels, for the default loss.
        steps: T > 0.
        lr: lr > 0: norm units a step; for `update="log"` a relative step, of which 0.02 is a good size.
        momentum: μ in [0, 1).
        epsilon: ε > 0 of the gradient quotient.
        form: `"taylor"` (Figure 2) or `"step"` (two thirds of the cost; overflows where gradients explode).
        eta: Step size η > 0 of `form="step"`.
        update: `"linear"` (Figure 2) or `"log"`, whose relative steps treat small and large tensors alike.
        linear_decay: Let lr fall linearly to zero over the steps.
        allow_sign_flip: Let a norm cross zero and so flip its tensor's sign, as Figure 2 does.
        minimum_ratio: ρ in (0, 1): without sign flips, the smallest fraction of its norm a tensor keeps in one step.
        micro_batch_size: Examples held in memory at once; the same result at 1.4 to 1.8 times the arithmetic, for a
            loss that is a mean over examples (not over the tokens of examples that differ in length, say).
        batch_norm: `"running"` (Figure 2: evaluation mode, in which fresh BatchNorm is the identity) or `"batch"`.
        exact: See `common.exact`; False only to measure what it costs.
        input_shape: One example's shape, for noise batches; not with `batches`.
        num_classes: Classes of the noise labels; by default the number of the model's outputs. Not with `batches`.
        batch_size: Examples a noise batch.
        generator: Source of the noise; by default one of its own, seeded with 0.
        on_step: Called after each step with that step's entry of the history.
        progress: Show a progress bar.

    Returns:
        `scales` (new norm over old), `history` (a dictionary a step: `step`, `gradient_quotient`,
        `live_gradient_quotient`, `dead_fraction`, `gradient_norm`, `sign_flips`, `lr`; the objective's values are those
        *before* the step's update) and `skipped`.

    Raises:
        TypeError: A wrapped model (DDP, FSDP, DataParallel, `torch.compile`); a loss of another form; an option of
            another type.
        ValueError: An option out of range; nothing to tune, or parameters that share memory; batches that do not fit
            the model or end too soon; with `micro_batch_size` a loss that is no mean over examples.
        NotFiniteError: A loss, quotient or meta-gradient that is not finite, with the step at which it happened (a
            ValueError too).
        DerivativeError: A layer stands in the way of a derivative; the message names it, and the way out.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> result = metainit(model, input_shape=(4,), steps=2, progress=False)
        >>> sorted(result.scales)
        ['0.weight', '2.weight']

    Reference:
        Dauphin & Schoenholz 2019, Figure 2.
    """
    check_bare(model, "metainit")
    check_loss(loss_fn, "metainit")
    _check_options(steps, lr, momentum, epsilon, form, eta, update, minimum_ratio, micro_batch_size, batch_size)
    if batches is not None and (input_shape is not None or num_classes is not None):
        raise ValueError(
            "metainit: `input_shape` and `num_classes` are noise's, got one with `batches`. Leave one or the other out."
        )
    if micro_batch_size is not None and uses_batch_statistics(model, batch_norm):
        raise ValueError(
            "metainit: `micro_batch_size` needs examples that do not influence each other, got a model with BatchNorm "
            "in batch statistics. Use batch_norm='running', or the whole batch at once."
        )
    tuned, skipped = tunable_tensors(model)
    if not tuned:
        raise ValueError(
            "metainit: `model` must have a trainable tensor of two or more dimensions with a non-zero, finite norm, "
            f"got none{': ' + '; '.join(f'{name}, {why}' for name, why in skipped.items()) if skipped else ''}."
        )
    check_apart(model, "metainit")
    theta0 = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    check_precision(theta0, "metainit")
    device = theta0[tuned[0]].device
    cuda_devices = [device] if device.type == "cuda" else []
    with ExitStack() as stack:
        stack.enter_context(full_precision(device))
        stack.enter_context(torch.random.fork_rng(cuda_devices))  # a DataLoader draws from the global generator
        # which only a loss that calls the model itself, not the one that it is given, can change
        stack.enter_context(unchanged_on_error(model.buffers()))
        if batches is None:
            batches = _default_noise(model, loss_fn, input_shape, num_classes, batch_size, generator, batch_norm)
        stream = endless(batches, "metainit")
        first = next(stream)
        classes = check_first_batch(
            model, loss_fn, first, "metainit", batch_norm=batch_norm, exact=exact, micro_batch_size=micro_batch_size
        )
        loss = pure_loss(model, loss_fn, batch_norm=batch_norm, exact=exact)
        if micro_batch_size is not None:
            _check_mean(loss, first, micro_batch_size)
        order: Literal[2, 3] = 3 if form == "taylor" else 2
        naming = partial(
            naming_the_layer, model, loss_fn, caller="metainit", batch_norm=batch_norm, exact=exact, order=order
        )
        with naming(first):
            piece = next(micro_batches(first, micro_batch_size))[1]
            check_differentiable(loss, theta0, piece, "metainit", order=order)

        n0 = tree_norms(theta0, tuned)
        nu, m = n0.clone(), torch.zeros_like(n0)  # ν_l = ±n_l, negative once a norm has crossed zero (Figure 2 lets it)
        history: list[dict[str, float]] = []
        with Progress(transient=True) if progress else nullcontext() as bar:
            task = bar.add_task("MetaInit", total=steps) if bar is not None else None
            for t, batch in enumerate(itertools.islice(itertools.chain([first], stream), steps), start=1):
                check_next_batch(model, batch, classes, "metainit")
                theta = _rescaled(theta0, tuned, nu / n0)
                with naming(batch):
                    G, metrics = meta_gradient(
                        loss,
                        theta,
                        batch,
                        tuned=tuned,
                        epsilon=epsilon,
                        form=form,
                        eta=eta,
                        micro_batch_size=micro_batch_size,
                    )
                slopes = tree_dots(theta, G, tuned)  # n_l ∂GQ/∂n_l = ⟨θ_l, G_l⟩: only its sign is used
                lr_t = lr * (1 - (t - 1) / steps) if linear_decay else lr
                n, m = sign_momentum_step(
                    nu.abs(),
                    m,
                    slopes.sign(),
                    lr=lr_t,
                    mu=momentum,
                    update=update,
                    minimum_ratio=None if allow_sign_flip else minimum_ratio,
                )
                nu = torch.where(nu < 0, -n, n)
                metrics["sign_flips"] = (n < 0).sum()
                history.append(_to_host(t, metrics, slopes, tuned) | {"lr": lr_t})  # all numbers in one transfer
                if on_step is not None:
                    on_step(dict(history[-1]))
                if bar is not None and task is not None:
                    quotient = history[-1]["gradient_quotient"]
                    bar.update(task, advance=1, description=f"MetaInit  GQ {quotient:.3g}")

        scales = dict(zip(tuned, (nu / n0).tolist(), strict=True))
        for name, scale in scales.items():
            if not math.isfinite(scale) or scale == 0:
                raise NotFiniteError(
                    f"metainit: every norm must end finite and non-zero, got {scale} times its start for {name!r}. "
                    "Lower `lr` (0.02 is a good size for update='log'). The model is unchanged."
                )
        final = _rescaled(theta0, tuned, nu / n0)
        load_parameters_(model, {name: final[name] for name in tuned})
    return InitResult({name: abs(scale) for name, scale in scales.items()}, history, skipped)


# ---------------------------------------------------------------------------------------------- its small parts
def _rescaled(theta0: Params, tuned: list[str], alpha: Float[Tensor, "tensors"]) -> Params:
    return theta0 | {name: theta0[name] * scale for name, scale in zip(tuned, alpha.unbind(), strict=True)}


def _to_host(step: int, metrics: dict[str, Tensor], slopes: Tensor, tuned: list[str]) -> dict[str, float]:
    """All of a step's numbers in one transfer; raises where one is not finite."""
    numbers = torch.cat([torch.stack([value.to(slopes.dtype) for value in metrics.values()]), slopes]).tolist()
    entry = dict(zip(metrics, numbers, strict=False))
    if not math.isfinite(entry["gradient_quotient"]):
        raise NotFiniteError(
            f"metainit: the gradient quotient must be finite, got {entry['gradient_quotient']} at step {step}. Likely "
            "causes: gradients that overflow (start from smaller weights, use form='taylor', update='log' or float64), "
            "or a batch that holds NaN. The model is unchanged."
        )
    if step == 1 and entry["dead_fraction"] == 1:
        raise ValueError(
            "metainit: the loss must depend on the model's parameters, got a gradient that is zero everywhere. Likely "
            "cause: `loss_fn` uses another model than the one it is given. The model is unchanged."
        )
    broken = [name for name, slope in zip(tuned, numbers[len(metrics) :], strict=True) if not math.isfinite(slope)]
    if broken:
        raise NotFiniteError(
            f"metainit: the meta-gradient must be finite, got none at step {step} for {', '.join(broken[:3])}"
            f"{' and others' if len(broken) > 3 else ''}. Likely cause: third derivatives that overflow in "
            "this precision (start from smaller weights, or use float64). The model is unchanged."
        )
    return {"step": float(step)} | entry


def _check_mean(loss: PureLoss, batch: Batch, size: int) -> None:
    """A loss that is no mean over examples is not the mean of its micro-batches' losses."""
    count_examples(batch, "metainit")
    piece = next(micro_batches(batch, max(size, 2)))[1]
    whole = loss({}, piece)
    summed = torch.stack([share * loss({}, part) for share, part in micro_batches(piece, max(1, size // 2))]).sum()
    if not torch.isclose(whole, summed, rtol=1e-4, atol=1e-6):
        raise ValueError(
            "metainit: with `micro_batch_size` the loss must be the mean of its examples' losses, got "
            f"{whole.item():g} for some examples and {summed.item():g} as the mean over parts of them. Likely causes: "
            "a mean over tokens of sequences that differ in length, class weights, a loss that compares examples. "
            "Return the mean over examples, or leave the micro-batch size unset."
        )


def _default_noise(
    model: nn.Module,
    loss_fn: UserLoss,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    batch_size: int,
    generator: torch.Generator | None,
    batch_norm: BatchNormMode,
) -> Iterator[Batch]:
    if input_shape is None or loss_fn is not classification_loss:
        raise ValueError(
            "metainit: without `batches`, `input_shape` (one example's shape) must be given and `loss_fn` left at its "
            f"default, got input_shape={input_shape}. Pass one of the two."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    _check_noise("metainit", input_shape, generator)
    device, dtype = next((p.device, p.dtype) for p in model.parameters())
    if num_classes is None:
        with torch.no_grad():
            probe = torch.zeros(2, *input_shape, device=device, dtype=dtype)
            num_classes = logits_of(model, probe, "metainit", batch_norm).shape[1]
    return noise_batches(input_shape, num_classes, batch_size, generator=generator, device=device, dtype=dtype)


def _check_options(
    steps: int,
    lr: float,
    momentum: float,
    epsilon: float,
    form: str,
    eta: float,
    update: str,
    minimum_ratio: float,
    micro_batch_size: int | None,
    batch_size: int,
) -> None:
    check_whole("metainit", smallest=1, steps=steps, batch_size=batch_size)
    if micro_batch_size is not None:
        check_whole("metainit", smallest=1, micro_batch_size=micro_batch_size)
    check_positive("metainit", lr=lr, epsilon=epsilon, eta=eta)
    check_number("metainit", momentum=momentum, minimum_ratio=minimum_ratio)
    if not 0 <= momentum < 1:
        raise ValueError(f"metainit: `momentum` must lie in [0, 1), got {momentum}.")
    if not 0 < minimum_ratio < 1:
        raise ValueError(
            f"metainit: `minimum_ratio` must lie in (0, 1), got {minimum_ratio}. "
            "Pass allow_sign_flip=True for Figure 2 without the guard."
        )
    check_choice("metainit", "form", form, FORMS)
    check_choice("metainit", "update", update, UPDATES)
