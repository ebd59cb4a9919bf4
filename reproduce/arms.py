"""One arm of a comparison, unit by unit: an update timed, a method tried, a model initialised, a model trained.

Each unit is a function of the configuration and of its own fields, but for what it times, so that a comparison can be
cut off, resumed, and shared between processes.
"""

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.functional import load_parameters_, parameters_of
from common.layers import layer_scales
from common.precision import full_precision
from common.record import Run, as_recorded
from common.training import Optimizer, TrainingConfig, TrainingResult, train
from common.types import Batch, DerivativeError, InitResult, UserLoss
from papers import DIMAML_STEPS, METHODS, initialize
from reproduce.bring import Brought, bring_data, bring_loss, bring_model, evaluate
from reproduce.bring_data import Source
from reproduce.command import options_of, out_of_memory
from reproduce.processes import Advance, Record

LEARNING_RATES: Mapping[Optimizer, tuple[float, ...]] = {
    "sgd": (0.03, 0.1, 0.3),
    "adam": (3e-4, 1e-3, 3e-3),
    "adamw": (3e-4, 1e-3, 3e-3),
}
"""Around what is usual for batches of 128: of momentum 0.9 (residual networks) and of Adam. Ours."""
TIMED_SECONDS = 0.5
"""How long each of the stretches lasts that an update is timed over. Ours."""
LAYER_KEYS = ("name", "kind", "weight_norm", "activation_std", "gradient_norm")
"""What a record says of each layer."""
METHOD_OPTION = "METHOD.key=value"
"""How an option of a method reads."""
Result = TypeVar("Result")
FEWEST_STEPS = 5
"""That a learned method makes, however little fits into its share of the budget. Ours."""
UNTIMED_STEPS, TRIAL_STEPS = 2, 6
"""How many steps a trial makes, and at how many of them at the start its clock does not run. Ours."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. A preset sets them all; each can be overridden. All values are ours."""

    preset: Literal["smoke", "quick"] = "quick"
    """smoke: seconds. quick: minutes for a small network on a laptop."""
    model: str = "plain-5-8"
    """A name of common.networks (with -bn for BatchNorm), torchvision:NAME, timm:NAME, hf:CONFIG.json, or
    package.module:callable."""
    model_options: tuple[str, ...] = ()
    """Of the model, as key=value."""
    data: str = "auto"
    """auto, cifar10, cifar100, tiny-imagenet, digits, noise, ptb, wikitext2, pydoc, hub:NAME, a folder with a folder of
    images for each class, or package.module:callable, which returns two loaders (training, test): collections of
    batches that can be gone through again and again, shuffled by torch's global generator or by a DataLoader's own."""
    data_dir: Path | None = None
    """Folder that holds the data sets by name. Default: the variable LEARNED_INIT_DATA."""
    loss: str | None = None
    """package.module:callable, called with model and batch. Default: cross-entropy, or the model's own loss."""
    methods: tuple[str, ...] = ("default", "kaiming", "lsuv", "metainit", "gradinit", "nio")
    """The arms: names of papers.METHODS."""
    reference: str | None = None
    """The arm that the others are compared with. Default: the first."""
    options: tuple[str, ...] = ()
    """Of the methods, as METHOD.key=value: gradinit.steps=50."""
    seeds: int = 3
    """Draws of the model, the same for all arms, each with an order of the batches of its own."""
    budget: str = "10s"
    """What the training of every run may take: 90s, 2min, 0.5h, "3 epochs" or "500 updates". Evaluations are free."""
    charge: bool = True
    """Whether an initialiser's cost is taken off its arm's training."""
    init_share: float | None = 0.25
    """Share of the budget that a learned method's steps may take, where `charge` is on and `options` does not say how
    many: it makes fewer than are published where those do not fit. None or 0: always as many as are published."""
    learning_rates: tuple[float, ...] = ()
    """Each arm is trained with each. Default: 0.03, 0.1 and 0.3 for sgd, 0.0003, 0.001 and 0.003 for adam and adamw."""
    optimizer: Optimizer = "sgd"
    """sgd is with momentum 0.9. The learning rate falls to zero along a cosine."""
    weight_decay: float = 1e-4
    """Decoupled for adamw."""
    warmup: float = 0.0
    """Share of the updates over which the learning rate rises; it can hide what an initialisation does."""
    clip_norm: float | None = None
    """Bound on the gradient's norm in training."""
    evaluations: int = 5
    """On the test set, evenly over each training, which can be resumed after each of them; fewer where a small budget
    does not divide by so many."""
    batch_size: int | None = None
    """Of training and of initialisers. Default: 128 images, 32 windows of text. A user's loader has its own."""
    augment: bool = False
    """Shift and mirror the training images; initialisers see them as they are."""
    train_examples: int | None = None
    """None: all."""
    test_examples: int | None = None
    """None: all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the training; initialisers run in float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    processes: int = 1
    """Processes that share the work: each with its share of the threads, or with a GPU of its own."""
    output: Path | None = None
    """Run folder; one that was cut off is resumed. Default: a new one under runs/."""
    quiet: bool = False
    """No progress on standard error."""

    @property
    def rates(self) -> tuple[float, ...]:
        return self.learning_rates or LEARNING_RATES[self.optimizer]


class LoaderError(ValueError):
    """The data that a user brought raised: the run ends, which with an initialiser's error it does not."""


# ---------------------------------------------------------------------------------------------- options of methods
def options_for(method: str, config: Config, caller: str) -> dict[str, Any]:
    """What of the configuration's `options` is the method's."""
    given = options_of(config.options, caller, METHOD_OPTION)
    return {key.partition(".")[2]: value for key, value in given.items() if key.partition(".")[0] == method}


def steps_option(method: str) -> str:
    """The option that says how many steps a learned method makes."""
    return "meta_steps" if method == "dimaml" else "steps"


def published_steps(method: str) -> int:
    """How many steps a learned method makes where nothing is said."""
    if method == "dimaml":
        return DIMAML_STEPS[steps_option(method)]
    function = getattr(import_module(f"papers.{method}"), method)
    return inspect.signature(function).parameters[steps_option(method)].default


def needs_trial(method: str, config: Config, caller: str) -> bool:
    """Whether the budget decides how many steps the method makes."""
    is_free = METHODS[method].is_learned and steps_option(method) not in options_for(method, config, caller)
    return is_free and config.charge and bool(config.init_share)


def affordable_steps(published: int, updates: float, *, seconds_per_update: float, seconds_per_step: float) -> int:
    """As many steps as are published, or as fit into the time of so many updates; at least `FEWEST_STEPS`.

    Example:
        >>> [affordable_steps(390, 100, seconds_per_update=0.1, seconds_per_step=t) for t in (0.02, 0.17, 9.0)]
        [390, 58, 5]
    """
    fitting = updates * seconds_per_update / seconds_per_step
    return published if fitting >= published else max(FEWEST_STEPS, int(fitting))


# ---------------------------------------------------------------------------------------------- what units work on
class Bench:
    """A configuration made into objects, on one device: what every unit of work needs."""

    def __init__(self, config: Config, device: torch.device, folder: Path, caller: str) -> None:
        self.config, self.folder, self.caller = config, folder, caller
        self.data: Brought = bring_data(
            config.data, data_dir=config.data_dir, batch_size=config.batch_size, train_examples=config.train_examples,
            test_examples=config.test_examples, augment=config.augment, device=device, caller=caller,
        )  # fmt: skip

    def do(self, unit: "Unit", advance: Advance) -> Record:
        """The unit's record. Global generators are as before afterwards."""
        with torch.random.fork_rng([self.data.device] if self.data.device.type == "cuda" else []):
            return unit.do(self, advance)

    def draw(self, seed: int) -> tuple[nn.Module, UserLoss]:
        """The model as the seed draws it, and its loss."""
        options = options_of(self.config.model_options, self.caller)
        model = bring_model(self.config.model, self.data, seed=seed, options=options)
        return model, bring_loss(self.config.loss, self.data, model)

    def draw_for(self, arm: str, seed: int) -> tuple[nn.Module, UserLoss, Callable[..., InitResult]]:
        """The same, and the arm's method on them, to be called once, with any further options."""
        model, loss_fn = self.draw(seed)
        batches = Rereading(self.data.init_batches(seed=seed), self.caller)
        METHODS[arm].options()  # imports a paper's package, which is no part of the method's cost
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        given = options_for(arm, self.config, self.caller)
        method = partial(initialize, model, arm, loss_fn, batches, generator=generator, progress=False, **given)
        return model, loss_fn, method

    def evaluate(self, model: nn.Module, loss_fn: UserLoss) -> dict[str, float]:
        return evaluate(model, loss_fn, replace(self.data, source=Reading(self.data.source, self.caller)))

    def recipe(self, slices: int, learning_rate: float) -> TrainingConfig:
        config = self.config
        return TrainingConfig(
            epochs=slices, learning_rate=learning_rate, optimizer=config.optimizer, weight_decay=config.weight_decay,
            warmup=config.warmup, clip_norm=config.clip_norm, precision=config.precision,
        )  # fmt: skip


@contextmanager
def reading(caller: str) -> Iterator[None]:
    """What the user's loader raises gets a type of its own."""
    try:
        yield
    except LoaderError:
        raise
    except Exception as error:
        clear = isinstance(error, (ValueError, TypeError))
        what = str(error) if clear else f"{caller}: the data must give batches, got {type(error).__name__}: {error}."
        raise LoaderError(
            f"{what} Everything finished is kept: the same command with --output and the run folder goes on from there."
        ) from error


def read(make: Callable[[], Iterator[Batch]], caller: str) -> Iterator[Batch]:
    """The batches of `make()`; a loader that raises says so."""
    with reading(caller):
        batches = make()
    while True:
        with reading(caller):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


@dataclass(frozen=True)
class Rereading:
    """Batches to be gone through again and again, whose errors have a type of their own."""

    batches: Iterable[Batch]
    caller: str

    def __iter__(self) -> Iterator[Batch]:
        return read(lambda: iter(self.batches), self.caller)


@dataclass(frozen=True)
class Reading:
    """A source of batches whose errors have a type of their own."""

    source: Source
    caller: str

    def one_pass(self, seed: int, *, augment: bool) -> Iterator[Batch]:
        return read(lambda: self.source.one_pass(seed, augment=augment), self.caller)

    def test(self) -> Iterator[Batch]:
        return read(self.source.test, self.caller)


class Stream:
    """Training batches by update: the same for all arms of a seed, wherever a training begins or is resumed.

    Called with k it gives the k-th slice of `length` updates: what `common.training` calls an epoch.
    """

    def __init__(self, bench: Bench, seed: int, length: int) -> None:
        self.bench, self.seed, self.length = bench, seed, length
        self.position = -1
        self.batches: Iterator[Batch] = iter(())

    def __call__(self, index: int) -> Iterator[Batch]:
        if self.position != index * self.length:  # else the epoch under way goes on, without being gone through again
            self.position = index * self.length
            self.batches = self._from(self.position)
        for batch in islice(self.batches, self.length):
            self.position += 1
            yield batch

    def _from(self, first: int) -> Iterator[Batch]:
        data, caller = self.bench.data, self.bench.caller
        epoch, skipped = divmod(first, data.steps_per_epoch)
        for number in count(epoch):
            batches = read(lambda number=number: data.train_batches(number, seed=self.seed), caller)
            given = 0
            for given, batch in enumerate(islice(batches, data.steps_per_epoch), 1):
                if given > skipped:
                    yield batch
            if given < data.steps_per_epoch:
                raise LoaderError(
                    f"{caller}: the training loader must give as many batches in every epoch, got {given} after "
                    f"{data.steps_per_epoch}. Is it an iterator that can be gone through only once?"
                )
            skipped = 0


# ---------------------------------------------------------------------------------------------- units of work
def weights_of(arm: str, seed: int) -> str:
    """Name of the file with the weights that an arm begins its training with; arms are names of papers.METHODS."""
    return f"weights-{arm}-{seed}"


@dataclass(frozen=True)
class Timing:
    """How long an update of the training takes: what minutes are converted by."""

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "timing"}

    def __str__(self) -> str:
        return "timing updates"

    def do(self, bench: Bench, advance: Advance) -> Record:
        return {"seconds_per_update": seconds_per_update(bench)}


def seconds_per_update(bench: Bench) -> float:
    """The median over three stretches of training, loading included, after a warm-up."""
    warm = _stretches(bench, 2, 2)  # the second stretch knows how long the next ones must be
    return statistics.median(_stretches(bench, 3, max(1, round(TIMED_SECONDS / warm[-1]))))


def _stretches(bench: Bench, number: int, length: int) -> list[float]:
    """Seconds an update, of stretches of `length` updates of the very loop that the arms train in."""
    model, loss_fn = bench.draw(0)

    def finite_loss(model: nn.Module, batch: Batch) -> Tensor:
        # a model's own start may overflow, which would end the training that is to be timed
        return torch.nan_to_num(loss_fn(model, batch), posinf=0.0, neginf=0.0)

    result = train(
        model, finite_loss, Stream(bench, 0, length), lambda _: {}, steps_per_epoch=length,
        config=bench.recipe(number, learning_rate=0.0),
    )  # fmt: skip
    return [entry["seconds"] / length for entry in result.history]


@dataclass(frozen=True)
class Trial:
    """How long a step of a learned method takes, and so how many of them fit into its share of the budget."""

    arm: str
    updates: float = math.nan
    """The share, in updates of the training."""

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "trial", "arm": self.arm}

    def __str__(self) -> str:
        return f"{self.arm}: timing steps"

    def do(self, bench: Bench, advance: Advance) -> Record:
        """A method that fails before its first step is given them all, and will soon fail again."""
        seconds, failure = seconds_per_step(bench, self.arm)
        steps = published = published_steps(self.arm)
        if not math.isnan(seconds):
            per_update = seconds_per_update(bench)
            steps = affordable_steps(
                published, self.updates, seconds_per_update=per_update, seconds_per_step=seconds
            )  # fmt: skip
        advance(1.0)
        return self.key | {
            "seconds_per_step": as_recorded(seconds), "steps": steps, "published": published, "error": failure
        }  # fmt: skip


def seconds_per_step(bench: Bench, arm: str) -> tuple[float, str | None]:
    """The mean over a few steps of the arm's method on a model of its own, its set-up and first steps left out.

    Of a method that fails in the middle, over the steps that it made, or NaN where it made none; and its message.
    """
    _, _, method = bench.draw_for(arm, 0)
    times = [_now(bench.data.device)]

    def on_step(_: dict[str, float]) -> None:
        times.append(_now(bench.data.device))

    _, failure = attempt(lambda: method(on_step=on_step, **{steps_option(arm): TRIAL_STEPS}))
    made = len(times) - 1
    untimed = min(UNTIMED_STEPS, made - 1)
    return (times[-1] - times[untimed]) / (made - untimed) if made else math.nan, failure


@dataclass(frozen=True)
class Initialise:
    """A model drawn and initialised, timed, described, and its weights kept."""

    arm: str
    seed: int
    seconds_per_update: float = math.nan
    """What a cost in updates goes by; a learned method's by what is timed around it."""
    steps: int | None = None
    """What a trial found for a learned method; None: as `options` says, or as many as are published."""

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "initialisation", "arm": self.arm, "seed": self.seed}

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}: initialise"

    def do(self, bench: Bench, advance: Advance) -> Record:
        """An initialiser that refuses the model, or fails on it, is a result."""
        is_learned = METHODS[self.arm].is_learned
        # minutes after the run's timing a machine may be at another speed: what is timed together can be compared
        timings = [seconds_per_update(bench)] if is_learned else [self.seconds_per_update]
        model, loss_fn, method = bench.draw_for(self.arm, self.seed)
        found = {} if self.steps is None else {steps_option(self.arm): self.steps}
        start = _now(bench.data.device)
        result, failure = attempt(lambda: method(**found))
        seconds = _now(bench.data.device) - start
        if is_learned and failure is None:
            timings.append(seconds_per_update(bench))
        per_update = statistics.fmean(timings)
        record: Record = self.key | {
            "seconds": seconds,
            "seconds_per_update": per_update,
            "updates": seconds / per_update,
            **(self._steps(bench) if is_learned else {}),
            "scales": {name: as_recorded(scale) for name, scale in result.scales.items()} if result else {},
            "skipped": result.skipped if result else {},
            "layers": [],
            "error": failure,
        }
        if failure is None:
            weights = {name: leaf.cpu() for name, leaf in parameters_of(model).items()}
            about = {"format": "learned-init weights 1", "method": self.arm, "seed": str(self.seed)}
            Run(bench.folder, []).save_tensors(weights_of(self.arm, self.seed), weights, about)
            with full_precision(bench.data.device):
                rows, failure = attempt(lambda: described(model, loss_fn, bench.data.example))
            # a model that cannot be described may be trained nevertheless
            record |= {"layers": rows} if failure is None else {"layers_error": failure}
        advance(1.0)
        return record

    def _steps(self, bench: Bench) -> Record:
        published = published_steps(self.arm)
        given = options_for(self.arm, bench.config, bench.caller).get(steps_option(self.arm), published)
        return {"steps": given if self.steps is None else self.steps, "published_steps": published}


@dataclass(frozen=True)
class Train:
    """The arm's model trained with one learning rate, in `slices` slices of `length` updates."""

    arm: str
    seed: int
    learning_rate: float
    index: int
    """Of the learning rate: a name for files."""
    slices: int = 0
    length: int = 0
    charged: float = 0.0
    """What the initialiser took off the budget, in updates."""

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "training", "arm": self.arm, "seed": self.seed, "learning_rate": self.learning_rate}

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}: train at {self.learning_rate:g}"

    def do(self, bench: Bench, advance: Advance) -> Record:
        """A training that raises is a result too, as one that diverges is."""
        model, loss_fn = bench.draw(self.seed)
        load_parameters_(model, _kept(bench.folder / f"{weights_of(self.arm, self.seed)}.safetensors"))
        torch.manual_seed(self.seed)  # dropout's
        checkpoint = bench.folder / f"training-{self.arm}-{self.seed}-{self.index}.checkpoint"
        shares = [0.0]

        def on_slice(_: dict[str, float]) -> None:
            shares.append(1 / self.slices)
            advance(shares[-1])

        result, failure = attempt(lambda: self._train(bench, model, loss_fn, checkpoint, on_slice))
        checkpoint.unlink(missing_ok=True)
        advance(1.0 - sum(shares))
        history = cumulative(result.history if result else [], self.length)
        last = history[-1] if history else {"updates": 0, "seconds": 0.0}
        return self.key | {
            "history": [{key: as_recorded(value) for key, value in entry.items()} for entry in map(honest, history)],
            "diverged": result is not None and result.diverged,
            "updates": last["updates"],
            "charged_updates": self.charged,
            "seconds": last["seconds"],
            "error": failure,
        }

    def _train(
        self,
        bench: Bench,
        model: nn.Module,
        loss_fn: UserLoss,
        checkpoint: Path,
        on_slice: Callable[[dict[str, float]], None],
    ) -> TrainingResult:
        if self.slices == 0:
            ended = {"epoch": 0, "train_loss": math.nan, **bench.evaluate(model, loss_fn), "seconds": 0.0}
            return TrainingResult([ended], diverged=False)
        return train(
            model, loss_fn, Stream(bench, self.seed, self.length), lambda model: bench.evaluate(model, loss_fn),
            steps_per_epoch=self.length, config=bench.recipe(self.slices, self.learning_rate), checkpoint=checkpoint,
            on_epoch=on_slice,
        )  # fmt: skip


Unit = Timing | Trial | Initialise | Train


def cumulative(history: list[dict[str, float]], length: int) -> list[dict[str, float]]:
    """`updates` and `seconds` since the start of the training."""
    total, entries = 0.0, []
    for entry in history:
        total += entry["seconds"]
        entries.append(entry | {"updates": int(entry["epoch"]) * length, "seconds": total})
    return entries


def honest(entry: dict[str, float]) -> dict[str, float]:
    """No accuracy where the test loss is NaN: that of NaN logits is the share of the first class."""
    unknown = {"test_accuracy": math.nan} if "test_accuracy" in entry and math.isnan(entry["test_loss"]) else {}
    return entry | unknown


def described(model: nn.Module, loss_fn: UserLoss, batch: Batch) -> list[Record]:
    """Of every layer with weights: their norm, the deviation of its output, the norm of its gradient, on one batch."""
    rows = layer_scales(model, loss_fn, batch)
    return [{key: _plain(row[key]) for key in LAYER_KEYS} for row in rows if row["weight_norm"] is not None]


def _plain(value: Any) -> Any:
    return as_recorded(value) if isinstance(value, float) else value


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def attempt(work: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """What comes of it, or else its error's message; what the run cannot go on after is raised."""
    try:
        return work(), None
    except (LoaderError, OSError, torch.AcceleratorError):  # data, disk, or a GPU that gives errors from here on
        raise
    except Exception as error:
        return None, _message_of(error)


def _message_of(error: Exception) -> str:
    """The message; with its type where it is not one of ours, which name function and remedy."""
    notes = " ".join(getattr(error, "__notes__", ()))
    is_ours = isinstance(error, (ValueError, DerivativeError))
    text = out_of_memory(error) or (str(error) if is_ours else f"{type(error).__name__}: {error}")
    return f"{text} {notes}".strip()


def _kept(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise ValueError(
            f"compare: the weights of a finished initialisation must be in the run folder, got no {path.name}. "
            "Put it back, or begin anew in another folder."
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"compare: the weights in {path} must be as they were written, got a damaged file ({error}). Put it back, "
            "or begin anew in another folder."
        ) from error
