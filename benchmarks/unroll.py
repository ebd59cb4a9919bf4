"""What a differentiated training loop costs in time and memory, as ratios measured side by side in one run.

    python -m benchmarks.unroll [--only memory time growth step naive largest curve meta-batch]

The inner loop is ordinary training (momentum) of a small convolutional auto-encoder with BatchNorm on noise (15,000
parameters; the paper's has its shape); the outer loss is taken halfway and at the end. Three schemes differentiate it,
all through the same step:

    ours      `common.unroll`: one step's graph at a time
    segments  torch.utils.checkpoint (reentrant) over m steps, whose graphs are held at once: the published scheme
    naive     one graph of everything

Peak memory is that of fresh processes, above what each held before. Everything is float32, without TF32. Results go to
`benchmarks/results/unroll-<device>.json`, from which `docs/dimaml_memory.png` is drawn.

The section meta-batch compares four trainings of a meta-step side by side, under vmap, with the same four in turn, for
the auto-encoder and for a small character LSTM.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import RESULTS, compare, compare_memory, measured_alike, peak_memory, run_sections
from common.functional import classification_loss, parameters_of, pure_loss
from common.networks import CharLSTM
from common.optimizers import Optimizer, adam, sgd
from common.precision import full_precision
from common.record import device_of
from common.training import TrainingConfig, make_optimizer
from common.types import Batch, UserLoss
from common.unroll import OuterLoss, State, TrainingStep, training_step, unroll
from papers.dimaml import dimaml
from reproduce.figures import log_scale, save_png

Section = Literal["memory", "time", "growth", "step", "naive", "largest", "curve", "meta-batch"]
Scheme = Literal["ours", "segments", "naive"]
FIGURE = Path(__file__).parents[1] / "docs" / "dimaml_memory.png"
BUDGET = 4 * 2**30
"""Bytes of the section largest."""


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Section, ...] = ("memory", "time", "growth", "step", "naive", "largest", "curve", "meta-batch")
    """Which measurements to make."""
    steps: int = 400
    """N of the sections memory, time and growth (which also takes 4 N)."""
    naive_steps: int = 24
    """N of the section naive."""
    batch_size: int = 32
    """Examples of an inner batch."""
    intervals: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    """m of the segments, among which the best in memory is looked for."""
    counts: tuple[int, ...] = (100, 900)
    """N at which the section largest measures the schemes that grow with √N; the naive one at a quarter of each."""
    lengths: tuple[int, ...] = (16, 64, 256, 1024)
    """N at which the section curve measures the peaks of each scheme; the naive one up to 256."""
    meta_batch_steps: int = 20
    """N of the section meta-batch."""
    rounds: int = 3
    """Rounds of each comparison; single peaks, which the sections curve and largest are made of, are measured once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    save: bool = True
    """Write the results file, and draw the figure from it."""
    child: str = ""
    """Used by this program itself: the scheme, N, m and batch size whose peak memory a fresh process measures."""


# ---------------------------------------------------------------------------------------------- what is compared
def autoencoder() -> nn.Module:
    """3 × 32 × 32 to 16 numbers and back; strided convolutions, BatchNorm and ReLU, as the paper's in small."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 16),
        nn.Linear(16, 256, bias=False),
        nn.Unflatten(1, (16, 4, 4)),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1),
    )


def reconstruction(model: nn.Module, x: Batch) -> Tensor:
    return nn.functional.mse_loss(model(x), x)


class Problem:
    """An inner loop of N steps over a few batches, taken in turn."""

    def __init__(self, steps: int, batch_size: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = autoencoder().to(device)
        loss = pure_loss(self.model, reconstruction, order=2)
        self.batches = [torch.randn(batch_size, 3, 32, 32, generator=generator).to(device) for _ in range(8)]
        self.inputs = [self.batches[t % 8] for t in range(steps)]
        self.step: TrainingStep = training_step(loss, sgd(0.01, momentum=0.9))
        validation = torch.randn(batch_size, 3, 32, 32, generator=generator).to(device)
        outer: OuterLoss = lambda state: loss(state["params"], validation)  # noqa: E731
        self.outer = {steps // 2: outer, steps: outer}

    def state(self) -> State:
        params = {name: leaf.requires_grad_() for name, leaf in parameters_of(self.model).items()}
        return self.step.init(params)


def gradients(problem: Problem, scheme: Scheme, interval: int = 0) -> list[Tensor]:
    """∂F/∂θ_0 by one of the schemes; interval 0: the default."""
    state = problem.state()
    if scheme == "ours":
        F, _ = unroll(
            problem.step, state, problem.inputs, outer_losses=problem.outer, checkpoint_every=interval or None
        )
    elif scheme == "segments":
        F = by_segments(problem, state, interval or round(math.sqrt(len(problem.inputs))))
    else:
        F = torch.zeros((), device=problem.inputs[0].device)
        now = state
        for t, x in enumerate(problem.inputs, 1):
            now = problem.step(now, x)
            F = F + problem.outer[t](now) if t in problem.outer else F
    F.backward()
    return [leaf.grad for leaf in state["params"].values()]  # pyright: ignore[reportReturnType]


def by_segments(problem: Problem, state: State, interval: int) -> Tensor:
    """The published scheme: m steps a checkpoint; without a graph forwards, with that of all m backwards."""
    leaves, spec = tree_flatten(state)

    def segment(start: int, stop: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        state, F = tree_unflatten(list(leaves), spec), torch.zeros((), device=leaves[-1].device)
        for t in range(start, stop):
            state = problem.step(state, problem.inputs[t])
            F = F + problem.outer[t + 1](state) if t + 1 in problem.outer else F
        return F, *tree_flatten(state)[0]

    total = torch.zeros((), device=problem.inputs[0].device)
    N = len(problem.inputs)
    for start in range(0, N, interval):
        F, *leaves = checkpoint(
            segment, start, min(start + interval, N), *leaves, use_reentrant=True, preserve_rng_state=False
        )  # pyright: ignore[reportGeneralTypeIssues]
        total = total + F
    return total


def check_equals(device: torch.device) -> None:
    """All schemes compute the same numbers, or a comparison of their costs says nothing."""
    problem = Problem(7, 4, device)
    expected = gradients(problem, "naive")
    others: tuple[tuple[Scheme, int], ...] = (("ours", 0), ("ours", 7), ("segments", 3))
    for scheme, interval in others:
        torch.testing.assert_close(gradients(problem, scheme, interval), expected, rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------------------------------------- the sections
def child(scheme: Scheme, steps: int, interval: int, config: Config) -> str:
    return f"{scheme} {steps} {interval} {config.batch_size}"


def memory_of(scheme: Scheme, steps: int, interval: int, batch_size: int, device: torch.device) -> int:
    """Of one meta-gradient, in the fresh process that this is."""
    gradients(Problem(4, 2, device), scheme, 2)  # libraries loaded
    problem = Problem(steps, batch_size, device)
    return peak_memory(lambda: gradients(problem, scheme, interval), device)


def peaks(device: torch.device, one: str, other: str, rounds: int = 1) -> dict[str, Any]:
    return compare_memory("benchmarks.unroll", one, other, device, rounds)


@cache
def best_interval(config: Config, steps: int, device: torch.device) -> int:
    """m at which the segments need the least memory, of those in the configuration.

    Where N/m states take what the graphs of m steps do, m is √N times a number of the network: here about a quarter.
    """
    megabytes = {}
    for m in [m for m in config.intervals if steps <= 64 * m**2 <= 16 * steps] or config.intervals:
        one = child("segments", steps, m, config)
        megabytes[m] = peaks(device, one, one)["megabytes"]
    return min(megabytes, key=megabytes.__getitem__)


def section_memory(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak of one meta-gradient, against segments at their best interval."""
    m = best_interval(config, config.steps, device)
    one, other = child("ours", config.steps, 0, config), child("segments", config.steps, m, config)
    row = peaks(device, one, other, config.rounds)
    return {f"N = {config.steps}, against segments at their best": row | {"interval": m}}


def section_time(config: Config, device: torch.device) -> dict[str, Any]:
    """One meta-gradient, against segments at their best interval in memory; with every state kept, too."""
    problem = Problem(config.steps, config.batch_size, device)
    m = best_interval(config, config.steps, device)
    rows = {}
    for label, own in {"states computed again": 0, "every state kept": 1}.items():
        ours, theirs = partial(gradients, problem, "ours", own), partial(gradients, problem, "segments", m)
        rows[f"N = {config.steps}, {label}"] = compare(ours, theirs, config.rounds, device) | {"interval": m}
    return rows


def section_growth(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak of 4 N steps against that of N."""
    many, few = (child("ours", N, 0, config) for N in (4 * config.steps, config.steps))
    row = peaks(device, many, few, config.rounds)
    return {f"N = {4 * config.steps} against N = {config.steps}": row}


def section_step(config: Config, device: torch.device) -> dict[str, Any]:
    """Time of a meta-gradient a step, against a step of ordinary training (torch.optim), by kept states."""
    steps = max(4, config.steps // 4)
    problem, model = Problem(steps, config.batch_size, device), autoencoder().to(device)
    optimizer = make_optimizer(model, TrainingConfig(epochs=1, learning_rate=0.01, weight_decay=0.0))

    def ordinary() -> None:
        for x in problem.inputs:
            optimizer.zero_grad(set_to_none=True)
            reconstruction(model, x).backward()
            optimizer.step()

    cases = {"states computed again": 0, "every state kept": 1}
    return {
        f"N = {steps}, {label}": compare(partial(gradients, problem, "ours", m), ordinary, config.rounds, device)
        for label, m in cases.items()
    }


def section_naive(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak and time of one meta-gradient, against one graph of everything."""
    N = config.naive_steps
    problem = Problem(N, config.batch_size, device)
    return {
        f"N = {N}, peak": peaks(device, child("ours", N, 0, config), child("naive", N, 0, config), config.rounds),
        f"N = {N}, time": compare(
            partial(gradients, problem, "ours"), partial(gradients, problem, "naive"), config.rounds, device
        ),
    }


def section_largest(config: Config, device: torch.device) -> dict[str, Any]:
    """How many times another scheme's steps fit in 4 GiB, extrapolated by a + b √N (naive: a + b N) from two peaks."""
    few, many = config.counts

    def peak(scheme: Scheme, steps: int) -> float:
        m = best_interval(config, steps, device) if scheme == "segments" else 0
        one = child(scheme, steps, m, config)
        return 1e6 * peaks(device, one, one, config.rounds)["megabytes"]

    largest = {}
    for scheme in ("ours", "segments", "naive"):
        power, shrink = (1.0, 4) if scheme == "naive" else (0.5, 1)
        x, y = (max(1, N // shrink) for N in (few, many))
        low, high = peak(scheme, x), peak(scheme, y)
        b = (high - low) / (y**power - x**power)
        if b <= 0:
            raise ValueError(
                f"section_largest: peaks must grow with N, got {low:.3g} bytes at {x} steps and {high:.3g} at {y} "
                f"({scheme}). Take larger `counts`, or a larger batch."
            )
        largest[scheme] = ((BUDGET - low) / b + x**power) ** (1 / power)
    return {
        f"steps in 4 GiB, against {scheme}": {
            "ratio": (ratio := largest["ours"] / largest[scheme]),
            "range": [ratio, ratio],
            "megabytes": BUDGET / 1e6,
            "reference_megabytes": BUDGET / 1e6,
            "rounds": 1,
            "largest": largest["ours"],
            "reference_largest": largest[scheme],
        }
        for scheme in ("segments", "naive")
    }


LONGEST_NAIVE = 256


def section_curve(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak of one meta-gradient by N, against segments at their best interval and against one graph of everything."""
    rows = {}
    for N in config.lengths:
        m = best_interval(config, N, device)
        one = child("ours", N, 0, config)
        rows[f"N = {N}, against segments"] = peaks(device, one, child("segments", N, m, config)) | {"interval": m}
        if N <= LONGEST_NAIVE:
            rows[f"N = {N}, against naive"] = peaks(device, one, child("naive", N, 0, config))
    return rows


def section_meta_batch(config: Config, device: torch.device) -> dict[str, Any]:
    """Time of a meta-step over four draws side by side, against the same four in turn."""
    N, generator = config.meta_batch_steps, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    images = torch.randn(N + 1, config.batch_size, 3, 32, 32, generator=generator).to(device)
    text = torch.randint(50, (N + 1, 16, 33), generator=generator).to(device)
    pairs = [(ids[:, :-1], ids[:, 1:]) for ids in text]
    problems: dict[str, tuple[nn.Module, UserLoss, Sequence[Any], Optimizer]] = {
        f"auto-encoder, batch {config.batch_size}": (
            autoencoder().to(device), reconstruction, list(images), sgd(0.01, momentum=0.9)
        ),
        "character LSTM, 64 channels, 16 windows of 32": (
            CharLSTM(50, embedding=32, hidden=64).to(device), classification_loss, pairs, adam(1e-3)
        ),
    }  # fmt: skip

    def meta_step(problem: tuple[nn.Module, UserLoss, Sequence[Any], Optimizer], vmap: bool) -> object:
        model, loss_fn, batches, inner = problem
        task = list(batches[:N]), list(batches[N:])
        return dimaml(
            model, loss_fn, [task], inner=inner, inner_steps=N, eval_every=N, meta_steps=1, draws=4, vmap=vmap,
            progress=False,
        )  # fmt: skip

    return {
        f"four draws, N = {N}, {label}": compare(
            partial(meta_step, problem, True), partial(meta_step, problem, False), config.rounds, device
        )
        for label, problem in problems.items()
    }


SECTIONS: dict[str, Callable[[Config, torch.device], dict[str, Any]]] = {
    "memory": section_memory,
    "time": section_time,
    "growth": section_growth,
    "step": section_step,
    "naive": section_naive,
    "largest": section_largest,
    "curve": section_curve,
    "meta-batch": section_meta_batch,
}


# ---------------------------------------------------------------------------------------------- the figure
def save_figure(path: Path, section: Mapping[str, Any]) -> None:
    """Peak memory against N of the three schemes, from the section curve of a results file."""
    points: dict[str, dict[int, float]] = {"ours": {}, "segments": {}, "naive": {}}
    for label, row in measured_alike(section).items():
        head, other = label.split(", against ")
        N = int(head.removeprefix("N = "))
        points["ours"][N] = row["megabytes"]
        points[other][N] = row["reference_megabytes"]
    styles = {
        "naive": ("0.5", "--", "naive: one graph of everything"),
        "segments": ("#ff7f0e", "-.", "segments, at their best interval"),
        "ours": ("#1f77b4", "-", "ours: one step's graph at a time"),
    }
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.2, 4), layout="constrained")
        axes = figure.subplots()
        for scheme, (colour, line, label) in styles.items():
            own = sorted(points[scheme].items())
            axes.plot(*zip(*own, strict=True), marker="o", markersize=4, color=colour, linestyle=line, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        log_scale(axes)
        axes.set(xlabel="N, inner steps", ylabel="peak memory of a meta-gradient, MB")
        setting = f"A small convolutional auto-encoder, batch {section['batch_size']}. {section['machine']}, torch "
        axes.set_title(f"{setting}{section['torch']}", fontsize=8, loc="left")
        axes.legend(frameon=False)
        save_png(figure, path, dpi=130)


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    device = device_of(config.device, "benchmarks.unroll")
    with full_precision(device):
        if config.child:
            scheme, *numbers = config.child.split()
            print(memory_of(scheme, *map(int, numbers), device))  # pyright: ignore
            return
        check_equals(device)
        sections = {name: partial(SECTIONS[name], config, device) for name in config.only}
        run_sections(sections, "unroll", device, save=config.save, batch_size=config.batch_size)
        if config.save and "curve" in config.only:
            results = json.loads((RESULTS / f"unroll-{device.type}.json").read_text("utf-8"))
            save_figure(FIGURE, results["curve"])


if __name__ == "__main__":
    main()
