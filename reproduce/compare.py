"""Which initialisation serves a model and its data best, for the same time of training?

Every arm is an initialiser of `papers.METHODS`. At each seed all arms begin with the same draw of the model and train
on the same batches in the same order, once for each learning rate; what an initialiser costs is taken off the training
of its arm. Each arm is judged at the learning rate that is best for it, and compared with the reference, seed by seed.

Model, data and loss may be your own: `--model package.module:callable`, and likewise.

    python -m reproduce.compare --model torchvision:resnet18 --data cifar10 --methods kaiming lsuv gradinit nio \\
        --budget 2min --seeds 3 [--preset smoke|quick] [--data-dir FOLDER] [--output FOLDER]

How minutes are counted. A training that ended when a clock says so would give other numbers each time, and others again
when it is resumed. So updates of the model's own start are timed before anything else, and the budget becomes a number
of updates once and for all; so does the cost of each initialiser, its seconds over those of an update (for a learned
method, of updates timed again just before and after it). Both are recorded, and a resumed run goes by its records. A
training is cut into slices of equal length, each with an evaluation at its end, so that a cost is taken off to the
nearest update a slice; of a small budget there are fewer slices than evaluations were asked for where those would leave
updates over. An arm whose initialiser took the whole budget is evaluated untrained, and this is said. Evaluations cost
nothing.

Published, a learned method makes hundreds of steps, which cost more than many a budget. So a short trial times a step,
and the method makes as many as fit into `--init-share` of the budget; how many is recorded and said. Trials cost
nothing.

Small models could train all their seeds at once under vmap; they train one by one here.
"""

import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import Progress

from common.options import check_positive, check_whole
from common.record import Run, device_name, device_of, write_environment
from papers import METHODS
from reproduce.arms import FEWEST_STEPS, METHOD_OPTION, Bench, Config, Initialise, Timing, Train, Trial, needs_trial
from reproduce.bring import describe_model
from reproduce.command import begin, end_well, make_progress, options_of, parse
from reproduce.compare_page import write_report
from reproduce.compare_report import print_report, summarise
from reproduce.processes import Advance, Do, Here, Workers

EXPERIMENT = "compare"
Work = Trial | Initialise | Train
LEFT_OVER = 0.05
"""Less than this share of a budget is left over by slices of equal length. Ours."""

PRESETS = {
    "smoke": Config(
        preset="smoke",
        model="plain-4-4",
        data="digits",
        methods=("kaiming", "lsuv"),
        seeds=2,
        budget="12 updates",
        learning_rates=(0.03, 0.1),
        evaluations=3,
        batch_size=32,
        train_examples=256,
        test_examples=100,
    ),
    "quick": Config(preset="quick"),
}


# ---------------------------------------------------------------------------------------------- the budget
@dataclass(frozen=True)
class Budget:
    """What the training of a run may take."""

    amount: float
    unit: Literal["seconds", "epochs", "updates"]

    def updates(self, *, seconds_per_update: float, steps_per_epoch: int) -> float:
        worth = {"seconds": 1 / seconds_per_update, "epochs": steps_per_epoch, "updates": 1}
        return self.amount * worth[self.unit]


_UNITS: Mapping[str, tuple[float, Literal["seconds", "epochs", "updates"]]] = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), (1.0, "seconds")),
    **dict.fromkeys(("min", "minute", "minutes"), (60.0, "seconds")),
    **dict.fromkeys(("h", "hour", "hours"), (3600.0, "seconds")),
    **dict.fromkeys(("epoch", "epochs"), (1.0, "epochs")),
    **dict.fromkeys(("update", "updates"), (1.0, "updates")),
}


def parse_budget(text: str) -> Budget:
    """`2min`, `90s`, `0.5h`, `3 epochs`, `500 updates`.

    Raises:
        ValueError: Another form, or nothing to spend.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]+)\s*", text, re.ASCII)
    if found is None or found[2] not in _UNITS or not 0 < float(found[1]) < math.inf:
        raise ValueError(
            f"{EXPERIMENT}: `budget` must be a positive number with a unit (s, min, h, epochs or updates), got "
            f'{text!r}. Write 90s, 2min, 0.5h, "3 epochs" or "500 updates".'
        )
    factor, unit = _UNITS[found[2]]
    return Budget(float(found[1]) * factor, unit)


def slice_length(budget: float, cost: float, slices: int) -> int:
    """Updates in each of the slices of a training: what the budget has left, evenly, and 0 where nothing is left.

    Args:
        budget: In updates.
        cost: Of the initialiser, in updates.
        slices: How many the training has.

    Example:
        >>> [slice_length(103, cost, 5) for cost in (0.0, 0.4, 13.0, 102.0, 500.0)]
        [20, 20, 18, 0, 0]
    """
    return min(round(max(0.0, budget - cost) / slices), int(budget / slices))


def slices_of(budget: int, evaluations: int) -> int:
    """How many slices a training has: as many as evaluations, fewer where a twentieth of the budget would be left over.

    Args:
        budget: In updates.
        evaluations: At the most.

    Example:
        >>> [slices_of(budget, 5) for budget in (3, 9, 14, 24, 49, 324)]
        [3, 3, 2, 4, 4, 5]
    """
    return next(slices for slices in range(min(evaluations, budget), 0, -1) if budget % slices < LEFT_OVER * budget)


@dataclass(frozen=True)
class Plan:
    """What the run's timing comes to: the same however often it is resumed."""

    seconds_per_update: float
    budget: int
    """In updates."""
    slices: int
    charge: bool
    init_share: float

    @property
    def longest(self) -> int:
        """Updates of a training whose initialisation costs nothing."""
        return self.slices * slice_length(self.budget, 0.0, self.slices)

    def training(self, unit: Train, initialisation: Mapping[str, Any]) -> Train:
        """The unit, with what its arm's initialisation has left of the budget."""
        cost = min(float(initialisation["updates"]), float(self.budget)) if self.charge else 0.0
        length = slice_length(self.budget, cost, self.slices)
        return replace(unit, slices=self.slices if length else 0, length=length, charged=cost)


def make_plan(config: Config, timing: Mapping[str, Any], steps_per_epoch: int) -> Plan:
    """The budget in updates.

    Raises:
        ValueError: It is not worth one.
    """
    seconds = float(timing["seconds_per_update"])
    budget = parse_budget(config.budget).updates(seconds_per_update=seconds, steps_per_epoch=steps_per_epoch)
    whole = int(budget + 1e-6)  # 0.1 epochs of 30 updates are 3, whatever floating point makes of them
    if whole < 1:
        raise ValueError(
            f"{EXPERIMENT}: `budget` must be worth an update at least, got {config.budget}, with {seconds:.3g} s an "
            f"update and {steps_per_epoch} updates an epoch."
        )
    slices = slices_of(whole, config.evaluations)
    return Plan(seconds, whole, slices, config.charge, config.init_share or 0.0)


# ---------------------------------------------------------------------------------------------- the run
def check_config(config: Config) -> None:
    """Mistakes that would otherwise show after minutes of work: before any data is loaded."""
    known = ", ".join(METHODS)
    if not config.methods:
        raise ValueError(f"{EXPERIMENT}: `methods` must name one or more, got none. There are {known}.")
    for name in config.methods:
        if name not in METHODS:
            raise ValueError(f"{EXPERIMENT}: `methods` must be among {known}, got {name!r}.")
        if config.methods.count(name) > 1:
            raise ValueError(f"{EXPERIMENT}: `methods` must name each once, got {name!r} twice.")
    if config.reference is not None and config.reference not in config.methods:
        raise ValueError(
            f"{EXPERIMENT}: `reference` must be one of the methods compared, {', '.join(config.methods)}, got "
            f"{config.reference!r}."
        )
    parse_budget(config.budget)
    check_whole(EXPERIMENT, smallest=1, seeds=config.seeds, evaluations=config.evaluations, processes=config.processes)
    for rate in config.learning_rates:
        check_positive(EXPERIMENT, learning_rates=rate)
    if len(set(config.learning_rates)) < len(config.learning_rates):
        raise ValueError(f"{EXPERIMENT}: `learning_rates` must differ, got {config.learning_rates}.")
    for name in ("batch_size", "train_examples", "test_examples"):
        if (value := getattr(config, name)) is not None:
            check_whole(EXPERIMENT, smallest=1, **{name: value})
    if config.clip_norm is not None:
        check_positive(EXPERIMENT, clip_norm=config.clip_norm)
    for name, highest in (("weight_decay", math.inf), ("warmup", 1.0), ("init_share", 1.0)):
        if not 0 <= (getattr(config, name) or 0.0) < highest:
            raise ValueError(f"{EXPERIMENT}: `{name}` must lie between 0 and {highest:g}, got {getattr(config, name)}.")
    options_of(config.model_options, EXPERIMENT)
    for name in options_of(config.options, EXPERIMENT, METHOD_OPTION):
        _check_option(name, config)
    _check_processes(config)


def _check_option(name: str, config: Config) -> None:
    method, _, key = name.partition(".")
    if method not in config.methods:
        raise ValueError(f"{EXPERIMENT}: `options` must be of methods that are compared, got {name!r}.")
    if key not in METHODS[method].options():
        raise ValueError(
            f"{EXPERIMENT}: an option of {method!r} must be one of {', '.join(METHODS[method].options()) or '(none)'}, "
            f"got {key!r}."
        )


def _check_processes(config: Config) -> None:
    device = device_of(config.device, EXPERIMENT)
    if device.type == "cuda" and config.processes > torch.cuda.device_count():
        raise ValueError(
            f"{EXPERIMENT}: `processes` must leave a GPU to each, got {config.processes} for "
            f"{torch.cuda.device_count()}."
        )


def run(config: Config) -> dict[str, Any]:
    """Everything: compute what the folder does not hold yet, then page, summary and table from its records."""
    check_config(config)
    console = Console()
    device = device_of(config.device, EXPERIMENT)
    folder = begin(EXPERIMENT, config, console)
    # the device is the workers', where there are any
    bench = Bench(config, device if config.processes == 1 else torch.device("cpu"), folder.folder, EXPERIMENT)
    write_environment(folder, bench.data.record | {"identity": bench.data.identity}, device)
    console.print(f"Data: {bench.data.identity}.", markup=False)
    console.print(f"Device: {device_name(device)}. Run folder: {folder.folder}", markup=False)
    # a model or loss that cannot be had says so now
    description = describe_model(config.model, bench.draw(0)[0], bench.data)
    console.print(f"Model: {description}.", markup=False)
    with make_progress(quiet=config.quiet) as progress:
        compute(config, folder, bench, progress, console)
    return report(
        config, folder, console, {"model": description, "data": bench.data.identity, "device": device_name(device)}
    )


def report(config: Config, folder: Run, console: Console, about: dict[str, Any]) -> dict[str, Any]:
    """Page, file of numbers and summary, from the records alone; then the table.

    Args:
        config: Of the run.
        folder: With its records.
        console: Printed to last of all: whoever reads it may be gone, as `head` is.
        about: What else the summary says.
    """
    environment = json.loads((folder.folder / "environment.json").read_text("utf-8"))
    records = [record for record in folder.records if record["kind"] in ("initialisation", "training")]
    ended = [record for record in records if record["kind"] == "training" and record["error"] is None]
    is_classification = any("test_accuracy" in record["history"][-1] for record in ended)
    summary = summarise(
        records, arms=config.methods, seeds=range(config.seeds), learning_rates=config.rates,
        reference=config.reference or config.methods[0],
        metric="test_accuracy" if is_classification else "test_loss",
        paired=environment["data"].get("is_repeatable", True),
    ) | about  # fmt: skip
    command = shlex.join(["python", "-m", "reproduce.compare", *sys.argv[1:]])
    page = write_report(
        folder.folder, records, summary, command=command, config=asdict(config), environment=environment
    )  # fmt: skip
    folder.finish(summary)
    print_report(console, summary)
    console.print(f"Records, weights, results.csv and {page.name}: {folder.folder}", markup=False)
    return summary


def order_of_work(config: Config) -> Iterator[Work]:
    """Seed by seed, so that a run cut off has compared all arms; each arm's initialisation before its trainings."""
    for seed in range(config.seeds):
        for arm in config.methods:
            if seed == 0 and needs_trial(arm, config, EXPERIMENT):
                yield Trial(arm)
            yield Initialise(arm, seed)
            for index, rate in enumerate(config.rates):
                yield Train(arm, seed, rate, index)


def compute(config: Config, folder: Run, bench: Bench, progress: Progress, console: Console) -> None:
    """A record a unit of work, from as many processes as asked for; this one alone writes them."""
    todo = [unit for unit in order_of_work(config) if folder.find(**unit.key) is None]
    if not todo:
        return
    bar = progress.add_task("starting", total=float(len(todo)))
    trainings = sum(isinstance(unit, Train) for unit in todo)
    with ExitStack() as stack:
        work = make_work(config, bench, lambda share: progress.advance(bar, share), stack)
        progress.update(bar, description=str(Timing()))
        plan = make_plan(config, timed(folder, work), bench.data.steps_per_epoch)
        console.print(foreseen(plan, config, trainings), markup=False)
        while todo or work.is_busy:
            todo = [unit for unit in todo if not is_void(unit, folder)]
            while work.has_room and (unit := next((unit for unit in todo if is_ready(unit, config, folder)), None)):
                todo.remove(unit)
                progress.update(bar, description=str(unit))
                work.start(completed(unit, plan, folder))
            if work.is_busy:
                record = folder.append(work.next_done()[1])
                if record["kind"] == "trial" and record["steps"] < record["published"]:
                    title, share = METHODS[record["arm"]].title, f"{100 * plan.init_share:g} % of the budget"
                    made = f"{title}, {record['steps']} of {record['published']} steps"
                    console.print(f"{made}: as many as fit into {share}, or {FEWEST_STEPS}.", markup=False)


def make_work(config: Config, bench: Bench, advance: Advance, stack: ExitStack) -> Here | Workers:
    if config.processes == 1:
        return Here(bench.do, advance)
    return stack.enter_context(Workers(partial(make_do, config, bench.folder), config.processes, advance))


def make_do(config: Config, folder: Path, index: int) -> Do:
    """What worker `index` does units with: on a GPU of its own, where there are any."""
    device = device_of(config.device, EXPERIMENT)
    if device.type == "cuda":
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
    return Bench(config, device, folder, EXPERIMENT).do


def timed(folder: Run, work: Here | Workers) -> dict[str, Any]:
    """The record of the timing: made once, with all processes at work."""
    found = folder.find(**Timing().key)
    if found is None:
        seconds = [record["seconds_per_update"] for record in work.everywhere(Timing())]
        found = folder.append(Timing().key | {"seconds_per_update": statistics.fmean(seconds)})
    return found


def initialisation_of(unit: Train, folder: Run) -> dict[str, Any] | None:
    return folder.find(**Initialise(unit.arm, unit.seed).key)


def is_ready(unit: Work, config: Config, folder: Run) -> bool:
    """Whether what it goes by is recorded."""
    if isinstance(unit, Initialise):
        return not needs_trial(unit.arm, config, EXPERIMENT) or folder.find(**Trial(unit.arm).key) is not None
    return isinstance(unit, Trial) or initialisation_of(unit, folder) is not None


def is_void(unit: Work, folder: Run) -> bool:
    """A training whose initialiser failed."""
    found = initialisation_of(unit, folder) if isinstance(unit, Train) else None
    return found is not None and found["error"] is not None


def completed(unit: Work, plan: Plan, folder: Run) -> Work:
    """The unit, told what the plan and the records say."""
    if isinstance(unit, Trial):
        return replace(unit, updates=plan.init_share * plan.budget)
    if isinstance(unit, Initialise):
        trial = folder.find(**Trial(unit.arm).key)
        steps = None if trial is None else trial["steps"]
        return replace(unit, seconds_per_update=plan.seconds_per_update, steps=steps)
    found = initialisation_of(unit, folder)
    assert found is not None
    return plan.training(unit, found)


def foreseen(plan: Plan, config: Config, trainings: int) -> str:
    """What the user is in for."""
    seconds = round(trainings * plan.longest * plan.seconds_per_update / config.processes)
    evaluations = f"{plan.slices} {'evaluation' if plan.slices == 1 else 'evaluations'}"
    cost = ", less what its initialisation costs" if plan.charge else ""
    return (
        f"Each training makes {plan.longest} updates of {plan.seconds_per_update:.3g} s{cost}, with {evaluations}. "
        f"Left to do: {trainings} trainings, {timedelta(seconds=seconds)} at most without evaluations."
    )


def main() -> None:
    end_well(lambda: run(parse(PRESETS, __doc__ or "")))


if __name__ == "__main__":
    main()
