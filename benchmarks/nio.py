"""What a NIO iteration costs in time and memory, as ratios measured side by side in one run.

    python -m benchmarks.nio [--only splits memory examples streaming scaling]

The reference is the released loop written down plainly: one forward pass of the batch, a backward pass of the whole
batch with a graph for every group, all gradients as rows of one matrix, a cosine for every pair, and GradInit's update
one tensor at a time. Variants take turns, round after round; a ratio is taken in each round, and its median and range
over the rounds are reported. Everything is float32, without TF32. Results go to `benchmarks/results/nio-<device>.json`,
from which `docs/nio_cost.png` is drawn.
"""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import torchvision
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import gradinit
from benchmarks.gradinit import noise
from benchmarks.measure import (
    RESULTS,
    compare_memory,
    measured_alike,
    peak_memory,
    run_sections,
    seconds,
    summarise,
)
from common.derivatives import GroupMode
from common.functional import classification_loss, parameters_of, pure_loss
from common.initializers import scale_weights_
from common.networks import make_activation, make_network
from common.precision import full_precision
from common.record import device_of
from common.scales import RescaleAdam
from common.tree import tree_norms
from common.types import Batch, Params
from papers.nio import example_losses, gradient_tensors, scale_gradients, windows
from papers.nio.objective import Coupling
from reproduce.figures import log_scale, save_png

Section = Literal["splits", "memory", "examples", "streaming", "scaling"]
FIGURE = Path(__file__).parents[1] / "docs" / "nio_cost.png"


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Section, ...] = ("splits", "memory", "examples", "streaming", "scaling")
    """Which measurements to make."""
    convolutional: tuple[str, ...] = ("resnet20", "vgg-11/32")
    """Of the sections splits and memory, each without and with BatchNorm: NETWORK or NETWORK/WIDTH."""
    by_example: tuple[str, ...] = ("mlp", "vit", "resnet-8/8")
    """Of the sections examples and streaming."""
    batch_size: int = 64
    """Examples of S; in the sections examples and scaling as many groups."""
    rounds: int = 3
    """Rounds of each comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    save: bool = True
    """Write the results file, and draw the figure from it."""
    child: str = ""
    """Used by this program itself: the variant whose peak memory a fresh process measures."""


# ---------------------------------------------------------------------------------------------- what is compared
def network(name: str, device: torch.device, activation: str = "relu") -> nn.Module:
    """`NAME`, or `NAME/WIDTH`, with `-bn` after either for BatchNorm."""
    torch.manual_seed(0)
    base, _, width = name.removesuffix("-bn").partition("/")
    if base == "mlp":
        size = int(width or 128)
        layers = [
            nn.Linear(3072, size),
            make_activation(activation),
            nn.Linear(size, size),
            make_activation(activation),
        ]
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(size, 10)).to(device)
    if base == "vit":
        size = int(width or 64)
        model = torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=4, num_heads=4, hidden_dim=size, mlp_dim=4 * size, num_classes=10
        )
        nn.init.normal_(
            model.heads.get_parameter("head.weight"), std=0.1
        )  # torchvision's zeros would leave nothing but the head moving
        return model.to(device)
    sizes = {"width": int(width)} if width else {}
    model = make_network(base, activation=activation, batch_norm=name.endswith("-bn"), **sizes)
    if not name.endswith("-bn"):
        scale_weights_(model, 0.7)
    return model.to(device)


class ReleasedLoop(gradinit.ReleasedLoop):
    """The released iteration on the module itself; the update of the multipliers is GradInit's, as it is there.

    It is given what costs nothing to give: a pair's cosine once, not twice, each norm once, and rows of the matrix by
    one `unbind`, whose derivative is one matrix, where that of an index is a matrix a time.
    """

    def __init__(self, model: nn.Module, groups: Sequence[slice], lr: float = 0.0) -> None:
        super().__init__(model, lr=lr)
        named = dict(self.model.named_parameters())
        self.groups, self.moving = groups, [named[name] for name in gradient_tensors(model, "without_batch_norm")]

    def slopes(self, batch: Batch, other: Callable[[], Batch], gamma: float) -> tuple[bool, tuple[Tensor, ...]]:
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
            values = example_losses(self.model, batch)
        rows = []
        for group in self.groups:
            g = torch.autograd.grad(values[group].mean(), self.moving, create_graph=True)
            rows.append(torch.cat([leaf.reshape(-1) for leaf in g]))
        G = torch.stack(rows)
        g, r = G.unbind(), G.norm(dim=1)
        cosines = [g[i] @ g[j] / (r[i] * r[j]) for i, j in combinations(range(len(g)), 2)]
        GC, GN = torch.stack(cosines).mean(), r.mean()
        on_constraint = GN.item() > gamma
        J = GN if on_constraint else -GC
        return on_constraint, torch.autograd.grad(J, self.parameters, materialize_grads=True)

    def step(self, batch: Batch, gamma: float = math.inf) -> dict[int, float]:
        return self.iteration(batch, lambda: batch, gamma)


class Ours:
    """The same iteration by `scale_gradients` and `RescaleAdam`."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[slice],
        *,
        mode: GroupMode = "loop",
        chunk_size: int | None = None,
        coupling: Coupling = "independent",
        lr: float = 0.0,
    ) -> None:
        loss_fn = example_losses if coupling == "shared" else classification_loss
        self.loss = pure_loss(model, loss_fn, order=3 if mode == "vmap" else 2)
        self.theta0: Params = parameters_of(model)
        norms = tree_norms(self.theta0).tolist()
        self.names = [name for name, norm in zip(self.theta0, norms, strict=True) if norm > 0]
        self.m = next(iter(self.theta0.values())).new_ones(len(self.names))
        self.options: dict[str, Any] = {
            "groups": groups,
            "mode": mode,
            "chunk_size": chunk_size,
            "coupling": coupling,
            "grad_params": gradient_tensors(model, "without_batch_norm"),
        }
        self.adam = RescaleAdam(lr=lr)
        self.state = self.adam.init(self.m)

    def step(self, batch: Batch, gamma: float = math.inf) -> dict[str, Tensor]:
        scales = dict(zip(self.names, self.m.unbind(), strict=True))
        branch, d, _ = scale_gradients(self.loss, self.theta0, scales, batch, gamma=gamma, **self.options)
        slopes = torch.stack(list(d.values()))
        self.m, self.state = self.adam.update(self.m, slopes, branch, self.state, lower=0.01)
        return d


def make_step(way: str, name: str, groups: Sequence[slice], device: torch.device) -> Callable[[Batch], object]:
    """An iteration by "released", "shared", "forward", or by "vmap" or "loop", "vmap:4" with 4 groups at once."""
    model = network(name, device)
    if way == "forward":
        return torch.no_grad()(partial(classification_loss, model.eval()))
    if way == "released":
        return ReleasedLoop(model, groups).step
    kind, _, chunk = way.partition(":")
    mode: GroupMode = "vmap" if kind == "vmap" else "loop"
    coupling: Coupling = "shared" if kind == "shared" else "independent"
    return Ours(model, groups, mode=mode, chunk_size=int(chunk) if chunk else None, coupling=coupling).step


def in_words(way: str) -> str:
    kind, _, chunk = way.partition(":")
    return f"{kind}, {chunk} at once" if chunk else f"{kind}, all at once"


def singles(count: int) -> list[slice]:
    """Every example a group."""
    return [slice(k, k + 1) for k in range(count)]


def check_equals(device: torch.device) -> None:
    """Both sides compute the same numbers, or a comparison of their times says nothing."""
    size = 6
    x, y = noise(size, device)
    batch = x.double(), y
    cases: list[tuple[str, list[slice], dict[str, Any]]] = [
        (name, groups, options)
        for name in ("mlp/16", "resnet-8/4", "vit/16")
        for groups in (windows(size, 3), singles(size))
        for options in ({}, {"chunk_size": 2}, {"mode": "vmap"}, {"mode": "vmap", "chunk_size": 2})
    ]
    cases.append(("resnet-8/4-bn", windows(size, 3, 0.5, rule="released"), {"coupling": "shared"}))
    for name, groups, options in cases:
        for gamma in (0.0, math.inf):
            # smooth: where a ReLU is near its kink, a rounding error turns into a per cent of the largest entry
            ours = Ours(network(name, device, "tanh").double(), groups, **options)
            theirs = ReleasedLoop(network(name, device, "tanh").double(), groups)
            a = torch.stack(list(ours.step(batch, gamma).values())).cpu()
            b = torch.tensor(list(theirs.step(batch, gamma).values()), dtype=torch.float64)
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-9 * b.abs().max().item())


# ---------------------------------------------------------------------------------------------- the sections
def times_of(
    ways: Sequence[str], name: str, groups: Sequence[slice], batch: Batch, rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of an iteration by each way, in turns whose order is reversed every second round."""
    steps = {way: make_step(way, name, groups, device) for way in ways}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for step in steps.values():
        step(batch)  # warm: kernels chosen, memory taken
    for turn in range(rounds):
        for way in ways if turn % 2 else reversed(ways):
            times[way].append(seconds(partial(steps[way], batch), device))
    return times


def section_splits(config: Config, device: torch.device) -> dict[str, Any]:
    """Four sub-batches (r = 0) against the released loop. loop: each has its own statistics; shared: the batch's."""
    results = {}
    groups, batch = windows(config.batch_size, 4), noise(config.batch_size, device)
    for name in (f"{base}{norm}" for base in config.convolutional for norm in ("", "-bn")):
        ours = ["loop", "loop:1", *(["shared"] if name.endswith("-bn") else [])]
        times = times_of([*ours, "released"], name, groups, batch, config.rounds, device)
        results |= {f"{name}, {in_words(way)}": summarise(times[way], times["released"]) for way in ours}
    return results


def section_memory(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak above what the process held before, of an iteration on four sub-batches (r = 0)."""
    size, results = config.batch_size, {}
    for name in (f"{base}{norm}" for base in config.convolutional for norm in ("", "-bn")):
        for way in ("loop", "loop:1"):
            variant, reference = (f"{side} {name} 4 {size}" for side in (way, "released"))
            results[f"{name}, {in_words(way)}"] = compare_memory("benchmarks.nio", variant, reference, device, 2)
    return results


def section_examples(config: Config, device: torch.device) -> dict[str, Any]:
    """Every example a group, against the released loop."""
    results, size = {}, config.batch_size
    ours = ["vmap", "vmap:32", "vmap:8", "loop", "loop:8"]
    for name in config.by_example:
        times = times_of([*ours, "released"], name, singles(size), noise(size, device), config.rounds, device)
        results |= {f"{name}, {in_words(way)}": summarise(times[way], times["released"]) for way in ours}
    return results


def section_streaming(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak above what the process held before: 1024 examples against 32 (every one a group), 32 at once."""
    return {
        f"{name}, {in_words(way)}": compare_memory(
            "benchmarks.nio", f"{way} {name} examples 1024", f"{way} {name} examples 32", device, 2
        )
        for name in config.by_example
        for way in (("vmap:32", "loop:32") if name.startswith("resnet") else ("vmap:32",))
    }


def memory_of(way: str, name: str, splits: str, size: int, device: torch.device) -> int:
    """Of an iteration, in the fresh process that this is."""

    def groups(size: int) -> list[slice]:
        return singles(size) if splits == "examples" else windows(size, int(splits))

    make_step(way, name, groups(4), device)(noise(4, device))  # libraries loaded
    step, batch = make_step(way, name, groups(size), device), noise(size, device)
    return peak_memory(partial(step, batch), device)


SCALING: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "n": ("resnet-8/8", "n examples of a batch of n", (4, 8, 16, 32, 64)),
    "D": ("resnet-8/8", "D sub-batches of {} examples", (2, 4, 8, 16, 32)),
    "width": ("resnet-8", "channels; 4 sub-batches of {} examples", (4, 8, 16, 32)),
}
"""By what grows: the network, in words, and its values."""
FORMS = {"released loop": "#d62728", "streaming": "#2ca02c", "fused": "#1f77b4"}
"""And their colours in the figure."""
FORWARD_PASSES: dict[str, Callable[[int], float]] = {
    "released loop": lambda groups: 3 * (1 + 2 * groups),
    "streaming": lambda _: 12,
    "fused": lambda _: 9,
}
"""The arithmetic of an iteration."""


def way_of(form: str, axis: str) -> str:
    if axis == "n":
        return {"released loop": "released", "streaming": "vmap:8", "fused": "vmap"}[form]
    return {"released loop": "released", "streaming": "loop:1", "fused": "loop"}[form]


def section_scaling(config: Config, device: torch.device) -> dict[str, Any]:
    """Against the released loop, as the number of groups or the width grows; `forward_seconds`: one forward pass."""
    results = {}
    for axis, (base, _, values) in SCALING.items():
        for at in values:
            size = at if axis == "n" else config.batch_size
            name = f"{base}/{at}" if axis == "width" else base
            groups = singles(at) if axis == "n" else windows(size, at if axis == "D" else 4)
            ways = {form: way_of(form, axis) for form in FORMS}
            times = times_of([*ways.values(), "forward"], name, groups, noise(size, device), config.rounds, device)
            for form in ("fused", "streaming"):
                row = summarise(times[ways[form]], times["released"])
                about = {"axis": axis, "at": at, "form": form, "forward_seconds": statistics.median(times["forward"])}
                results[f"{base}, {axis} = {at}, {form}"] = row | about
    return results


# ---------------------------------------------------------------------------------------------- the figure
def save_figure(path: Path, section: Mapping[str, Any]) -> None:
    """Cost in forward passes against the number of groups, and in seconds against width, from the results file."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4), layout="constrained")
        for axes, axis in zip(figure.subplots(1, 3), SCALING, strict=True):
            rows = [row for row in measured_alike(section).values() if row["axis"] == axis]
            draw(axes, axis, rows, section["batch_size"])
        figure.suptitle(f"One NIO iteration: {section['machine']}, torch {section['torch']}, float32", fontsize=9)
        save_png(figure, path, dpi=140)


def draw(axes: Axes, axis: str, rows: Sequence[Mapping[str, Any]], batch_size: int) -> None:
    name, in_words, _ = SCALING[axis]
    for form, colour in FORMS.items():
        # the released loop is every row's reference: any one form's rows hold it
        key, own = ("reference_seconds", "fused") if form == "released loop" else ("seconds", form)
        points = sorted((row["at"], row[key], row["forward_seconds"]) for row in rows if row["form"] == own)
        at = [point[0] for point in points]
        in_seconds = axis == "width"
        cost = [seconds if in_seconds else seconds / forward for _, seconds, forward in points]
        axes.plot(at, cost, color=colour, marker="o", markersize=4, linewidth=1.5, label=form)
        if not in_seconds:
            axes.plot(at, [FORWARD_PASSES[form](k) for k in at], color=colour, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    log_scale(axes)
    cost_label = "seconds" if axis == "width" else "forward passes of the batch (dotted: arithmetic)"
    axes.set(xlabel=in_words.format(batch_size), ylabel=cost_label)
    axes.set_title(name, loc="left")
    axes.legend(frameon=False, fontsize=8)


SECTIONS: dict[str, Callable[[Config, torch.device], dict[str, Any]]] = {
    "splits": section_splits,
    "memory": section_memory,
    "examples": section_examples,
    "streaming": section_streaming,
    "scaling": section_scaling,
}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    device = device_of(config.device, "benchmarks.nio")
    with full_precision(device):
        if config.child:
            way, name, splits, size = config.child.split()
            print(memory_of(way, name, splits, int(size), device))
            return
        check_equals(device)
        sections = {name: partial(SECTIONS[name], config, device) for name in config.only}
        run_sections(sections, "nio", device, save=config.save, batch_size=config.batch_size)
        if config.save and "scaling" in config.only:
            results = json.loads((RESULTS / f"nio-{device.type}.json").read_text("utf-8"))
            save_figure(FIGURE, results["scaling"])


if __name__ == "__main__":
    main()
