"""The ordinary training loop every comparison uses.

SGD with momentum or Adam, a schedule by iteration, optional warm-up, one evaluation an epoch, resumable at every epoch.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from common.functional import in_evaluation_mode, names_of
from common.options import check_choice, check_number, check_whole
from common.record import put_in_place
from common.types import Batch, UserLoss

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a network is trained. The defaults are those of this project's comparisons."""

    epochs: int
    """Passes over the training set."""
    learning_rate: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Of `sgd`."""
    nesterov: bool = False
    """Nesterov's momentum instead of the heavy ball's."""
    weight_decay: float = 1e-4
    """Coupled L2 penalty (decoupled for `adamw`), on every parameter but those of `no_decay`."""
    optimizer: Optimizer = "sgd"
    """Update rule."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's moments."""
    schedule: Schedule = "cosine"
    """What follows the warm-up: a cosine or a line to zero, nothing, or √(W/t) after W warm-up steps (1 without)."""
    no_decay: tuple[str, ...] = ()
    """Name patterns (fnmatch) of parameters without weight decay."""
    lr_factors: tuple[tuple[str, float], ...] = ()
    """(name pattern, factor) of parameters with a learning rate of their own; the first that fits counts."""
    warmup: float = 0.0
    """Share of all iterations over which the learning rate rises linearly from zero."""
    drops: tuple[float, ...] = ()
    """Shares of all iterations after which the learning rate is a tenth of what it was, whatever the schedule."""
    clip_norm: float | None = None
    """Bound on the gradient's global norm."""
    diverged_above: float | None = None
    """A mean training loss of an epoch above it counts as diverged, as one that is not finite does."""
    precision: Precision = "float32"
    """Arithmetic of forward and backward (autocast); parameters stay float32."""
    channels_last: bool = False
    """Memory layout of convolutions."""

    def __post_init__(self) -> None:
        for name, choices in (("optimizer", Optimizer), ("schedule", Schedule), ("precision", Precision)):
            check_choice("TrainingConfig", name, getattr(self, name), get_args(choices))
        check_whole("TrainingConfig", smallest=1, epochs=self.epochs)
        check_number("TrainingConfig", warmup=self.warmup)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"TrainingConfig: `warmup` must lie in [0, 1], got {self.warmup}: a share of iterations.")
        for name in ("no_decay", "lr_factors", "drops"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"TrainingConfig: `{name}` must be a tuple, got the string {getattr(self, name)!r}.")


@dataclass(frozen=True)
class TrainingResult:
    """What a training run gave.

    Attributes:
        history: One dictionary an epoch: `epoch`, `train_loss`, `seconds` (training alone) and what was evaluated.
        diverged: An epoch's mean loss was not finite, or above `diverged_above`; the epochs that were left did not run.
    """

    history: list[dict[str, float]]
    diverged: bool

    @property
    def seconds(self) -> float:
        return sum(epoch["seconds"] for epoch in self.history)


def learning_rate_at(step: int, total: int, config: TrainingConfig) -> float:
    """Linear warm-up over W steps, then the schedule, by iteration t with p = (t − W)/(total − W).

    lr · (t + 1)/W, then lr · ½ (1 + cos π p), lr · (1 − p), lr, or lr · √(max(W, 1)/(t + 1)); each of `drops` that is
    past divides it by ten.
    """
    warm = round(config.warmup * total)
    peak = config.learning_rate * 0.1 ** sum(step >= round(share * total) for share in config.drops)
    if step < warm:
        return peak * (step + 1) / warm
    progress = (step - warm) / max(1, total - warm)
    factor = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
        "inverse_sqrt": math.sqrt(max(warm, 1) / (step + 1)),
    }
    return peak * factor[config.schedule]


def make_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.Optimizer:
    """The recipe's optimiser: a group for each pair of weight decay and learning-rate factor, the key `lr_factor`.

    A group without that key has the factor 1.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    every = names_of(model)  # a tied parameter is meant by each of its names

    def is_meant(name: str, pattern: str) -> bool:
        return any(fnmatchcase(known, pattern) for known in every[name])

    for name, parameter in model.named_parameters():
        factor = next((f for pattern, f in config.lr_factors if is_meant(name, pattern)), 1.0)
        decayed = not any(is_meant(name, pattern) for pattern in config.no_decay)
        groups.setdefault((factor, config.weight_decay if decayed else 0.0), []).append(parameter)
    parameters: list[dict[str, Any]] = [
        {"params": members, "weight_decay": decay} | ({} if factor == 1 else {"lr_factor": factor})
        for (factor, decay), members in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=config.momentum, nesterov=config.nesterov)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.learning_rate, betas=config.betas)


def train(
    model: nn.Module,
    loss_fn: UserLoss,
    train_batches: Callable[[int], Iterable[Batch]],
    evaluate: Callable[[nn.Module], dict[str, float]],
    *,
    steps_per_epoch: int,
    config: TrainingConfig,
    checkpoint: Path | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainingResult:
    """Train `model` in place.

    Args:
        model: Any module.
        loss_fn: `loss_fn(model, batch)`, mean over examples.
        train_batches: `train_batches(epoch)` gives that epoch's batches on the model's device. It must depend on the
            epoch's number alone, so that a resumed run sees what an uninterrupted one would.
        evaluate: Numbers to record after each epoch; `classification_metrics` for one.
        steps_per_epoch: How many batches `train_batches` gives; it fixes the schedule.
        config: The recipe.
        checkpoint: Where to keep the state after each epoch; if the file is there, training goes on from it.
        on_epoch: Called after each epoch with its entry of the history.

    Returns:
        The history, and whether the run diverged (a result, not an error).

    Raises:
        ValueError: An epoch without a batch.
        OSError: The checkpoint cannot be written, or is not one of this training: it is kept, and nothing in it is run.
    """
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = make_optimizer(model, config)
    recipe = asdict(config) | {"steps_per_epoch": steps_per_epoch}
    history = _resume(checkpoint, model, optimizer, recipe)
    total = config.epochs * steps_per_epoch
    device = next(model.parameters()).device
    for epoch in range(len(history), config.epochs):
        start = time.perf_counter()
        model.train()
        # Losses stay on the device: one synchronisation an epoch.
        losses: list[Tensor] = []
        for step, batch in enumerate(train_batches(epoch), epoch * steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = group.get("lr_factor", 1.0) * learning_rate_at(step, total, config)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                loss = loss_fn(model, batch)
            loss.backward()
            if config.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            losses.append(loss.detach())
        if not losses:
            raise ValueError(f"train: `train_batches` must give batches, got none in epoch {epoch}.")
        train_loss = torch.stack(losses).double().mean().item()
        training_seconds = time.perf_counter() - start
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            metrics = evaluate(model)
        history.append({"epoch": epoch + 1, "train_loss": train_loss, **metrics, "seconds": training_seconds})
        if on_epoch is not None:
            on_epoch(history[-1])
        if _has_diverged(train_loss, config):
            break
        if checkpoint is not None and epoch + 1 < config.epochs:
            _save(checkpoint, model, optimizer, history, recipe)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return TrainingResult(history, diverged=_has_diverged(history[-1]["train_loss"], config))


def _has_diverged(train_loss: float, config: TrainingConfig) -> bool:
    bound = math.inf if config.diverged_above is None else config.diverged_above
    return not math.isfinite(train_loss) or train_loss > bound


@torch.no_grad()
def classification_metrics(model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
    """`test_loss` (cross-entropy, nats) and `test_accuracy` (share) over all examples, in evaluation mode."""
    loss, correct, count = [], [], 0
    with in_evaluation_mode(model):
        for x, y in batches:
            logits = model(x).float()
            loss.append(nn.functional.cross_entropy(logits, y, reduction="sum"))
            correct.append((logits.argmax(1) == y).sum())
            count += len(y)
    return {
        "test_loss": torch.stack(loss).double().sum().item() / count,
        "test_accuracy": torch.stack(correct).sum().item() / count,
    }


# ---------------------------------------------------------------------------------------------- between epochs
def _save(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    history: list[dict[str, float]],
    recipe: dict[str, Any],
) -> None:
    """Written beside and renamed, so that a checkpoint is whole or absent."""
    partial = path.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "recipe": recipe,
        "random": torch.get_rng_state(),  # dropout's
        "cuda_random": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    try:
        torch.save(state, partial)
    except RuntimeError as error:  # torch has no type of its own for a file that it cannot write
        raise OSError(f"train: the checkpoint {path} must be writable, got: {error} Is the disk full?") from error
    put_in_place(partial, path)


def _resume(
    path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict[str, Any]
) -> list[dict[str, float]]:
    if path is None or not path.exists():
        return []
    try:
        # tensors and plain numbers only: no pickled code is run
        state = torch.load(path, weights_only=True, map_location="cpu")
        written = state["recipe"]
    except Exception as error:  # torch has many types for what a file may have that it did not write
        raise _not_ours(path, error) from error
    if differing := sorted(name for name in recipe if written.get(name) != recipe[name]):
        raise OSError(
            f"train: {path} must be a checkpoint of the same recipe, got other values of {', '.join(differing)}. "
            "Delete it: the training then begins anew."
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available():  # with fewer GPUs than it was written on, perhaps
            torch.cuda.set_rng_state_all(state["cuda_random"][: torch.cuda.device_count()])
        return state["history"]
    except Exception as error:
        raise _not_ours(path, error) from error


def _not_ours(path: Path, error: Exception) -> OSError:
    return OSError(
        f"train: {path} must be a checkpoint that this training wrote, got a file that is damaged or of another kind "
        f"({type(error).__name__}). Delete it: the training then begins anew."
    )
