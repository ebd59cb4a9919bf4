"""What the three experiments on DIMAML share: laws learned on one data set, trainings from draws of them on another.

A unit of work is the learning of one family of laws on one source, or one training of one arm on one target. Each is a
function of the configuration and of itself alone, so that a run can be cut off, resumed, and shared between processes.
"""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from rich.console import Console
from torch import nn

from common.optimizers import Optimizer
from common.options import check_positive, check_whole
from common.precision import full_precision
from common.record import Run, as_recorded, device_name, device_of, write_environment
from common.training import TrainingConfig, train
from common.types import Batch, NotFiniteError, UserLoss
from papers.dimaml import PLIF, InitDistribution, Normal, dimaml, evaluation_steps
from papers.dimaml.algorithm import BatchNorm
from papers.dimaml.distributions import Family
from reproduce.command import begin, end_well, make_progress, parse
from reproduce.dimaml_report import LEARNED, Shown, print_report, save_figure, save_laws, summarise
from reproduce.processes import Advance, Do, Here, Record, Workers

FamilyName = Literal["normal", "plif"]
TRUNCATED = 0.008
"""What the released code cuts off of each tail where a PLIF starts from a Normal law."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all three. A preset sets them; each can be overridden."""

    preset: Literal["smoke", "quick", "paper"] = "quick"
    """smoke: seconds. quick: under twelve minutes on two cores. paper: the released settings, for a GPU."""
    data_dir: Path | None = None
    """Folder that holds the data sets by name. Default: the variable LEARNED_INIT_DATA."""
    output: Path | None = None
    """Run folder; one that was cut off is resumed. Default: a new one under runs/."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    processes: int = 2
    """Processes that share the work, each with its share of the threads; the numbers differ by round-off alone."""
    quiet: bool = False
    """No progress on standard error."""

    families: tuple[FamilyName, ...] = ("normal", "plif")
    """Which laws are learned."""
    pieces: int = 100
    """K of PLIF: as released."""
    inner_steps: int
    """N, steps of an inner training."""
    first_evaluation: int
    """The first of V, the steps after which an inner training is evaluated."""
    eval_every: int
    """Steps from one of V to the next."""
    meta_steps: int
    """How many steps the laws make."""
    meta_lr_normal: float
    """Of Adam on μ and σ."""
    meta_lr_plif: float
    """Of Adam on the parameters of PLIF."""
    draws: int
    """Trainings a meta-step, each from a draw of its own, all on one task, side by side; 1 as released."""
    antithetic: bool
    """Each draw with its mirror image; not so in the released code."""
    batch_size: int
    """Of training, inner and outer."""
    held_out_batch_size: int
    """Of an evaluation in V."""

    seeds: int
    """Trainings of every arm; 10 as released."""
    updates: int | None
    """Updates of a training from one evaluation to the next; None: one pass over the training set."""
    evaluations: int
    """On the test set, evenly over a training; a multiple of 10, for the table has the tenth, the half, the whole."""
    metainit_steps: int
    """Of the arm MetaInit; 200 as released, and 150 for some runs."""
    metainit_batch_size: int
    """Of its batches of noise."""

    @property
    def held_out_batches(self) -> int:
        """|V|, held-out batches of a task."""
        return len(evaluation_steps(self.inner_steps, self.eval_every, self.first_evaluation))


# ---------------------------------------------------------------------------------------------- units of work
@dataclass(frozen=True)
class Learn:
    """One family of laws, learned on one source."""

    source: str
    family: FamilyName

    @property
    def key(self) -> dict[str, Any]:
        return {"kind": "laws", "source": self.source, "family": self.family}

    def __str__(self) -> str:
        return f"learning {self.family} on {self.source}"


@dataclass(frozen=True)
class Train:
    """One training on one target; `source` is what the laws of a learned arm were learned on."""

    target: str
    arm: str
    seed: int
    source: str | None = None

    @property
    def key(self) -> dict[str, Any]:
        return {
            "kind": "training",
            "target": self.target,
            "arm": self.arm,
            "seed": self.seed,
            "source": self.source,
        }

    def __str__(self) -> str:
        return f"{self.arm} on {self.target}, seed {self.seed}"


Unit = Learn | Train


@dataclass(frozen=True)
class Learning:
    """What `dimaml` is told of a source."""

    model: nn.Module
    loss_fn: UserLoss
    task_sampler: Callable[[torch.Generator], tuple[Sequence[Batch], Sequence[Batch]]]
    start: InitDistribution
    inner: Optimizer
    batch_norm: BatchNorm = "batch"


def laws_path(folder: Path, name: Literal["start", "laws"], unit: Learn) -> Path:
    """Where the laws are kept, as they were at the start or as they were learned."""
    return folder / f"{name}-{unit.source}-{unit.family}.safetensors"


def learning_path(folder: Path, unit: Learn) -> Path:
    """Where a learning that is not recorded yet has its state."""
    return folder / f"learning-{unit.source}-{unit.family}.safetensors"


# ---------------------------------------------------------------------------------------------- an experiment
class Bench(ABC):
    """One experiment in one process: its data, its networks, and how its trainings go.

    Attributes:
        name: Of the experiment.
        baselines: The arms that are not learned.
        pairs: target ↦ source of the laws that it is trained from.
    """

    name: ClassVar[str]
    baselines: ClassVar[tuple[str, ...]]

    @classmethod
    @abstractmethod
    def check(cls, config: Any) -> None:
        """Mistakes in the experiment's own options.

        Raises:
            ValueError: There is one.
        """

    def __init__(self, config: Any, device: torch.device, folder: Path) -> None:
        self.config, self.device, self.folder = config, device, folder

    @property
    @abstractmethod
    def pairs(self) -> Mapping[str, str]: ...

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What `environment.json` says of the data."""

    @abstractmethod
    def shown(self) -> Shown:
        """What the report is to say of this experiment."""

    @abstractmethod
    def learning(self, unit: Learn) -> Learning:
        """The problem that laws are learned on."""

    @abstractmethod
    def make_model(self, target: str) -> nn.Module:
        """The network for a target as its class draws it, from the global generator."""

    @abstractmethod
    def start_baseline(self, model: nn.Module, unit: Train, generator: torch.Generator) -> None:
        """Draw the weights of an arm that is not learned, in place."""

    @abstractmethod
    def batches(self, target: str, seed: int, part: int) -> Iterable[Batch]:
        """The training batches between evaluation `part` and the next: a function of the arguments alone."""

    @abstractmethod
    def evaluate(self, model: nn.Module, target: str) -> dict[str, float]:
        """Numbers on the test set."""

    @abstractmethod
    def recipe(self, model: nn.Module) -> tuple[UserLoss, TrainingConfig]:
        """The loss and how it is trained; an epoch of the recipe lasts from one evaluation to the next."""

    @abstractmethod
    def updates(self, target: str) -> int:
        """From one evaluation to the next."""

    # ------------------------------------------------------------------------------------------ what is done
    def units(self) -> list[Unit]:
        """The learnings, which take longest, first; then seed by seed."""
        config, pairs = self.config, self.pairs
        learnings: list[Unit] = [Learn(source, f) for source in dict.fromkeys(pairs.values()) for f in config.families]
        learned = [arm for arm, family in LEARNED.items() if family in config.families]
        return learnings + [
            unit
            for seed in range(config.seeds)
            for target, source in pairs.items()
            for unit in (
                *(Train(target, arm, seed) for arm in self.baselines),
                *(Train(target, arm, seed, source) for arm in learned),
            )
        ]

    def weight(self, unit: Unit) -> float:
        """Roughly how long it takes, in updates."""
        config = self.config
        if isinstance(unit, Learn):  # an inner step costs about six updates
            return 6.0 * config.meta_steps * config.inner_steps * config.draws * (1 + config.antithetic)
        return float(config.evaluations * self.updates(unit.target))

    def do(self, unit: Unit, advance: Advance) -> Record:
        """The unit's record."""
        own = lambda share: advance(share * self.weight(unit))  # noqa: E731
        with full_precision(self.device), torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            return self.learn(unit, own) if isinstance(unit, Learn) else self.fit(unit, own)

    def learn(self, unit: Learn, advance: Advance) -> Record:
        config, begun = self.config, time.perf_counter()
        torch.manual_seed(0)
        told = self.learning(unit)
        checkpoint = learning_path(self.folder, unit)
        is_resumed = checkpoint.exists()
        try:
            learned = dimaml(
                told.model, told.loss_fn, told.task_sampler, inner=told.inner, start=told.start,
                inner_steps=config.inner_steps, eval_every=config.eval_every, first_evaluation=config.first_evaluation,
                meta_steps=config.meta_steps,
                meta_lr=config.meta_lr_normal if unit.family == "normal" else config.meta_lr_plif,
                batch_norm=told.batch_norm, draws=config.draws, antithetic=config.antithetic,
                vmap=config.draws > 1 or config.antithetic,
                generator=torch.Generator().manual_seed(0), checkpoint=checkpoint,
                on_step=lambda _: advance(1 / config.meta_steps), progress=False,
            )  # fmt: skip
        except NotFiniteError as error:  # a result: other families and the baselines are compared all the same
            return unit.key | {"failed": str(error), "seconds": None if is_resumed else time.perf_counter() - begun}
        told.start.save(laws_path(self.folder, "start", unit))
        learned.save(laws_path(self.folder, "laws", unit))
        for unfinished in self.folder.glob(f".*-{unit.source}-{unit.family}.safetensors.*.partial"):
            unfinished.unlink()  # of a process that was killed while it wrote
        return unit.key | {
            "history": [{key: as_recorded(value) for key, value in entry.items()} for entry in learned.history],
            "laws": len(learned.families),
            "skipped": learned.skipped,
            # of a resumed run, the time before is not known
            "seconds": None if is_resumed else time.perf_counter() - begun,
        }

    def fit(self, unit: Train, advance: Advance) -> Record:
        begun = time.perf_counter()
        torch.manual_seed(unit.seed)
        model = self.make_model(unit.target).to(self.device)
        generator = torch.Generator().manual_seed(1_000_003 * unit.seed + 1)
        if unit.source is None:
            try:
                self.start_baseline(model, unit, generator)
            except NotFiniteError as error:  # a result too
                return unit.key | {"failed": str(error)}
        else:
            laws = laws_path(self.folder, "laws", Learn(unit.source, LEARNED[unit.arm]))
            InitDistribution.load(laws).initialize_(model, generator)
        initialised = time.perf_counter() - begun
        torch.manual_seed(1_000_003 * unit.seed + 2)  # dropout's
        loss_fn, recipe = self.recipe(model)
        result = train(
            model,
            loss_fn,
            lambda part: self.batches(unit.target, unit.seed, part),
            lambda model: self.evaluate(model, unit.target),
            steps_per_epoch=self.updates(unit.target),
            config=recipe,
            checkpoint=self.folder / f"training-{unit.target}-{unit.arm}-{unit.seed}.pt",
            on_epoch=lambda _: advance(1 / recipe.epochs),
        )
        history = [{key: as_recorded(value) for key, value in entry.items()} for entry in result.history]
        return unit.key | {
            "updates": self.updates(unit.target),
            "evaluations": recipe.epochs,
            "history": history,
            "diverged": result.diverged,
            "initialisation_seconds": initialised,
            "seconds": result.seconds,
        }


def released_start(law: Literal["normal", "uniform"], scale: float, family: FamilyName, pieces: int) -> Family:
    """Where the released experiments begin a tensor whose law is known.

    Normal begins at N(0, scale²) for either law: of a uniform law `scale` is the bound, √3 larger than its deviation.
    PLIF begins at U(−scale, scale), or at N(0, scale²) without its tails, stretched to the deviation `scale`, of which
    the released code leaves 0.946.

    Example:
        >>> released_start("uniform", 0.5, "normal", 100)
        Normal(mean=0, std=0.5)
    """
    if family == "normal":
        return Normal(0.0, scale)
    if law == "normal":
        return PLIF.from_quantiles(torch.special.ndtri, pieces, TRUNCATED, moments=(0.0, 1.0), scale=scale)
    return PLIF.from_quantiles(lambda u: 2 * u - 1, pieces, 0.0, scale=scale)


def of_several(records: list[dict[str, Any]]) -> dict[str, Any]:
    """One record of several data sets, with a fingerprint of all of them."""
    digest = hashlib.sha256("".join(record["sha256"] for record in records).encode()).hexdigest()
    identity = "; ".join(dict.fromkeys(record["identity"] for record in records))
    return {"identity": identity, "sets": records, "sha256": digest}


# ---------------------------------------------------------------------------------------------- the run
def command(make: type[Bench], presets: Mapping[str, Options], description: str) -> None:
    """What `python -m reproduce.NAME` does."""
    end_well(lambda: run(make, parse(presets, description)))


def check_options(config: Options, experiment: str) -> None:
    """Mistakes that would otherwise show after minutes of work."""
    check_whole(
        experiment, smallest=1, pieces=config.pieces, draws=config.draws, batch_size=config.batch_size,
        held_out_batch_size=config.held_out_batch_size, seeds=config.seeds, processes=config.processes,
        metainit_steps=config.metainit_steps, metainit_batch_size=config.metainit_batch_size,
        meta_steps=config.meta_steps, evaluations=config.evaluations,
        updates=1 if config.updates is None else config.updates,
    )  # fmt: skip
    check_positive(experiment, meta_lr_normal=config.meta_lr_normal, meta_lr_plif=config.meta_lr_plif)
    evaluation_steps(config.inner_steps, config.eval_every, config.first_evaluation)
    if config.evaluations % 10:
        raise ValueError(
            f"{experiment}: `evaluations` must be a multiple of 10, for a tenth and a half of a training are "
            f"reported, got {config.evaluations}."
        )
    if not config.families or len(set(config.families)) < len(config.families):
        raise ValueError(f"{experiment}: `families` must name one or both once, got {config.families}.")
    device_of(config.device, experiment)


def run(make: type[Bench], config: Any) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then tables, figures and summary from its records."""
    check_options(config, make.name)
    make.check(config)
    console = Console()
    device = device_of(config.device, make.name)
    folder = begin(make.name, config, console)
    bench = make(config, device, folder.folder)
    data = bench.record()
    write_environment(folder, data, device)
    console.print(f"Data: {data['identity']}.")
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}")
    compute(bench, folder)
    shown = bench.shown()
    summary = summarise(folder.records, shown) | {"data": data["identity"], "device": device_name(device)}
    save_figure(folder.folder / "figure.png", folder.records, summary, shown)
    for record in folder.records:
        if record["kind"] == "laws" and "failed" not in record:
            unit = Learn(record["source"], record["family"])
            before, after = (InitDistribution.load(laws_path(folder.folder, k, unit)) for k in ("start", "laws"))
            title = f"{make.name}, learned on {shown.names[unit.source]}"
            save_laws(folder.folder / f"laws-{unit.source}-{unit.family}.png", before, after, title)
    folder.finish(summary)
    print_report(console, summary, shown)
    console.print(f"Records, laws (*.safetensors) and figures: {folder.folder}")
    return summary


def compute(bench: Bench, folder: Run) -> None:
    """A record a unit of work, from as many processes as asked for; this one alone writes them."""
    todo = _left(bench.units(), folder)
    if not todo:
        return
    config = bench.config
    with ExitStack() as stack:
        progress = stack.enter_context(make_progress(quiet=config.quiet))
        bar = progress.add_task("starting", total=sum(map(bench.weight, todo)))
        advance: Advance = lambda amount: progress.advance(bar, amount)  # noqa: E731
        work = Here(bench.do, advance)
        if config.processes > 1 and len(todo) > 1:
            make = partial(_do, type(bench), config, folder.folder)
            work = stack.enter_context(Workers(make, config.processes, advance))
        while todo or work.is_busy:
            while work.has_room and (unit := next((unit for unit in todo if _is_ready(unit, folder)), None)):
                todo.remove(unit)
                progress.update(bar, description=str(unit))
                work.start(unit)
            unit, record = work.next_done()
            folder.append(record)
            if isinstance(unit, Learn):
                learning_path(folder.folder, unit).unlink(missing_ok=True)
                todo = _left(todo, folder)


def _left(units: Sequence[Unit], folder: Run) -> list[Unit]:
    """Those without a record whose laws can still be had; the state of a learning that is recorded is deleted."""
    for unit in units:
        if isinstance(unit, Learn) and folder.find(**unit.key) is not None:
            learning_path(folder.folder, unit).unlink(missing_ok=True)
    return [
        unit for unit in units if folder.find(**unit.key) is None and "failed" not in (_laws_of(unit, folder) or {})
    ]


def _laws_of(unit: Unit, folder: Run) -> Record | None:
    """The record of the laws that a training is drawn from; None where there is none, or none yet."""
    if isinstance(unit, Learn) or unit.source is None:
        return None
    return folder.find(**Learn(unit.source, LEARNED[unit.arm]).key)


def _is_ready(unit: Unit, folder: Run) -> bool:
    """Whether the laws that it is to be drawn from have been learned."""
    return isinstance(unit, Learn) or unit.source is None or _laws_of(unit, folder) is not None


def _do(make: type[Bench], config: Any, folder: Path, index: int) -> Do:
    """What a worker does units with."""
    return make(config, device_of(config.device, make.name), folder).do
