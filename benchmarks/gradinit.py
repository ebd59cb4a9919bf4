"""What a GradInit iteration costs in time and memory, as ratios measured side by side in one run.

    python -m benchmarks.gradinit [--only iteration memory run kernels share flops]

The reference is the released loop written down plainly: a graph of the gradient in every iteration, a look-ahead step
in place, norms, inner products and Adam one tensor at a time. Two variants take turns, round after round; a ratio is
taken in each round, and its median and range over the rounds are reported. Everything is float32, without TF32.
Results go to `benchmarks/results/gradinit-<device>.json`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import compare, compare_memory, peak_memory, run_sections, seconds, summarise
from common.functional import classification_loss, parameters_of, pure_loss
from common.initializers import scale_weights_
from common.networks import make_network
from common.precision import full_precision
from common.record import device_of
from common.scales import Branch, RescaleAdam
from common.training import TrainingConfig, train
from common.tree import tree_norms
from common.types import Batch, Params
from data import load_images, sample_batches
from papers.gradinit import batch_pairs, gradinit, scale_gradients

Section = Literal["iteration", "memory", "run", "kernels", "share", "flops"]
CASES = {"vgg19": 128, "vgg19-bn": 128, "resnet110": 64, "resnet110-bn": 64}
"""Networks, with -bn for BatchNorm, and the batch size of S and S̃."""
GROWING = {"resnet20": 128, "resnet56": 128, "resnet110": 128, "vgg11": 128, "vgg19": 128}
"""Networks in the order of their size, and the batch size of training and GradInit."""


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Section, ...] = ("iteration", "memory", "run", "kernels", "share", "flops")
    """Which measurements to make."""
    networks: tuple[str, ...] = tuple(CASES)
    """Of the sections iteration, memory, run and kernels."""
    growing: tuple[str, ...] = tuple(GROWING)
    """Of the section share."""
    counted: tuple[str, ...] = ("resnet-20", "resnet-20-bn")
    """Of the section flops."""
    batch_size: int | None = None
    """Examples of S; None: each network's own, 64 in the section memory, 32 in flops."""
    iterations: int = 16
    """Of a real run, in the sections run and share."""
    rounds: int = 5
    """Rounds of each comparison."""
    data_dir: Path | None = None
    """Folder that holds cifar10/; without it, and without LEARNED_INIT_DATA, the hub's, or embedded digits."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    save: bool = True
    """Write the results file."""
    child: str = ""
    """Used by this program itself: the variant whose peak memory a fresh process measures."""


# ---------------------------------------------------------------------------------------------- what is compared
def network(name: str, device: torch.device, activation: str = "relu") -> nn.Module:
    """Without BatchNorm at 0.7 of its weights: as drawn, a deep one's activations leave float32's good range."""
    torch.manual_seed(0)
    model = make_network(name.removesuffix("-bn"), activation=activation, batch_norm=name.endswith("-bn"))
    if not name.endswith("-bn"):
        scale_weights_(model, 0.7)
    return model.to(device)


def noise(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 32, 32, generator=generator)
    return x.to(device), torch.randint(10, (size,), generator=generator).to(device)


@dataclass
class ReleasedLoop:
    """The released iteration on the module itself, a tensor and a number at a time."""

    model: nn.Module
    eta: float = 0.1
    lr: float = 1e-2
    branches: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):  # batch statistics, buffers left alone
                module.train()
                module.track_running_stats = False
                module.running_mean = module.running_var = None
        self.parameters = list(self.model.parameters())
        self.state: dict[int, dict[str, Any]] = {}

    def loss(self, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def slopes(self, batch: Batch, other: Callable[[], Batch], gamma: float) -> tuple[bool, tuple[Tensor, ...]]:
        g = torch.autograd.grad(self.loss(batch), self.parameters, create_graph=True)
        n = torch.stack([(leaf**2).sum() for leaf in g]).sum().sqrt()
        on_constraint = n.item() > gamma
        if on_constraint:
            return True, torch.autograd.grad(n, self.parameters, materialize_grads=True)
        saved = [p.detach().clone() for p in self.parameters]
        with torch.no_grad():
            for p, leaf in zip(self.parameters, g, strict=True):
                p.sub_(self.eta * leaf / n)
        u = torch.autograd.grad(self.loss(other()), self.parameters)
        with torch.no_grad():
            for p, old in zip(self.parameters, saved, strict=True):
                p.copy_(old)
        return False, tuple(leaf / self.eta for leaf in u)

    def iteration(self, batch: Batch, other: Callable[[], Batch], gamma: float) -> dict[int, float]:
        on_constraint, slopes = self.slopes(batch, other, gamma)
        self.branches.append(on_constraint)
        kind = "c" if on_constraint else "o"
        seen: dict[int, float] = {}
        with torch.no_grad():
            for index, (p, slope) in enumerate(zip(self.parameters, slopes, strict=True)):
                norm = p.norm().item()
                if norm == 0:
                    continue
                s = self.state.setdefault(
                    index, {"n0": norm, "m": 1.0, "mu": {"c": 0.0, "o": 0.0}, "nu": 0.0, "k": {"c": 0, "o": 0}}
                )
                d = (p * slope).sum().item() * s["n0"] / norm
                seen[index] = d
                d = max(-1.0, min(1.0, d))
                s["k"][kind] += 1
                s["mu"][kind] = 0.9 * s["mu"][kind] + 0.1 * d
                s["nu"] = 0.999 * s["nu"] + 0.001 * d * d
                root = math.sqrt(s["nu"] / (1 - 0.999 ** sum(s["k"].values()))) + 1e-8
                moved = s["m"] - self.lr / (1 - 0.9 ** s["k"][kind]) * s["mu"][kind] / root
                s["m"] = max(moved, 0.01)
                p.mul_(s["m"] * s["n0"] / norm)
        return seen


class Ours:
    """The same iteration by `scale_gradients` and `RescaleAdam`."""

    def __init__(self, model: nn.Module, lr: float = 1e-2, *, exact_kernels: bool = True, **options: Any) -> None:
        self.loss = pure_loss(model, classification_loss, exact=exact_kernels, order=2)
        self.theta0: Params = parameters_of(model)
        norms = tree_norms(self.theta0).tolist()
        self.names = [name for name, norm in zip(self.theta0, norms, strict=True) if norm > 0]
        self.m = torch.ones(len(self.names), device=next(iter(self.theta0.values())).device)
        self.adam, self.options = RescaleAdam(lr=lr), options
        self.state = self.adam.init(self.m)

    def iteration(
        self, batch: Batch, other: Callable[[], Batch], gamma: float, expected: Branch = "objective"
    ) -> dict[str, Tensor]:
        scales = dict(zip(self.names, self.m.unbind(), strict=True))
        branch, d, _ = scale_gradients(
            self.loss, self.theta0, scales, batch, other, gamma=gamma, expected=expected, **self.options
        )
        slopes = torch.stack(list(d.values()))
        self.m, self.state = self.adam.update(self.m, slopes, branch, self.state, lower=0.01)
        return d


def check_equals(device: torch.device) -> None:
    """Both sides compute the same numbers, or a comparison of their times says nothing."""
    batch, other = noise(8, device), noise(16, device)
    other = tuple(leaf[8:] for leaf in other)
    for name in ("resnet-8", "resnet-8-bn"):
        for gamma in (0.0, math.inf):
            # smooth: where a ReLU is near its kink, a rounding error turns into a per cent of the largest entry
            ours, theirs = Ours(network(name, device, "tanh")), ReleasedLoop(network(name, device, "tanh"))
            a = torch.stack(list(ours.iteration(batch, lambda: other, gamma).values())).cpu()
            b = torch.tensor(list(theirs.iteration(batch, lambda: other, gamma).values()))
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-4 * b.abs().max().item())


# ---------------------------------------------------------------------------------------------- the sections
def section_iteration(config: Config, device: torch.device) -> dict[str, Any]:
    """A whole iteration, update included, against the released loop's of the same branch."""
    variants: dict[str, tuple[float, Branch, dict[str, Any]]] = {
        "objective": (math.inf, "objective", {}),
        "constraint, foreseen": (0.0, "constraint", {}),
        "constraint, not foreseen": (0.0, "objective", {}),
        "constraint, nested": (0.0, "objective", {"engine": "nested"}),
        "constraint, finite difference": (0.0, "objective", {"engine": "finite_difference"}),
    }
    results = {}
    for name in config.networks:
        batch = noise(config.batch_size or CASES[name], device)
        released = ReleasedLoop(network(name, device), lr=0.0)
        for label, (gamma, expected, options) in variants.items():
            ours = Ours(network(name, device), lr=0.0, **options)
            results[f"{name}, {label}"] = compare(
                partial(ours.iteration, batch, lambda b=batch: b, gamma, expected),
                partial(released.iteration, batch, lambda b=batch: b, gamma),
                config.rounds,
                device,
            )
    return results


def section_memory(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak above what the process held before, of one iteration."""
    size = config.batch_size or 64
    return {
        f"{name}, batch {size}, {branch}": compare_memory(
            "benchmarks.gradinit", f"ours {name} {branch} {size}", f"released {name} {branch} {size}", device
        )
        for name in config.networks
        for branch in ("objective", "constraint")
    }


def memory_of(side: str, name: str, branch: str, size: int, device: torch.device) -> int:
    """Of an iteration, in the fresh process that this is."""
    gamma, few, batch = 0.0 if branch == "constraint" else math.inf, noise(2, device), noise(size, device)
    expected: Branch = "constraint" if branch == "constraint" else "objective"
    model = network(name, device)
    step: Callable[[Batch], object]
    if side == "ours":
        ours = Ours(model)
        step = lambda b: ours.iteration(b, lambda: b, gamma, expected)  # noqa: E731
    else:
        released = ReleasedLoop(model)
        step = lambda b: released.iteration(b, lambda: b, gamma)  # noqa: E731
    step(few)  # libraries loaded, moments in place
    return peak_memory(lambda: step(batch), device)


def real_batches(config: Config, size: int, count: int, device: torch.device) -> tuple[list[Batch], str]:
    """That many batches of CIFAR-10, or of the digits embedded in its place, and which of the two they are."""
    data = load_images("auto", data_dir=config.data_dir, train=max(1000, size * count), test=100)
    generator = torch.Generator().manual_seed(0)
    stream = sample_batches(data.train, size, mean=data.mean, std=data.std, generator=generator, device=device)
    return list(islice(stream, count)), data.identity


def section_run(config: Config, device: torch.device) -> dict[str, Any]:
    """A real run, γ = 1, mean over its iterations, turn by turn with the released loop on the same batches."""
    results = {}
    for name in config.networks:
        batches, identity = real_batches(config, config.batch_size or CASES[name], 2 * config.iterations + 4, device)
        released = ReleasedLoop(network(name, device))
        pairs = batch_pairs(batches)
        ours: list[float] = []
        theirs: list[float] = []
        begun: list[float] = []

        def between(_: dict[str, float], ours=ours, theirs=theirs, begun=begun, released=released, pairs=pairs) -> None:
            if begun:
                ours.append(time.perf_counter() - begun[-1])  # an iteration ends with a synchronisation for this call
            S, other = next(pairs)
            theirs.append(seconds(lambda: released.iteration(S, other, 1.0), device))
            begun.append(time.perf_counter())

        result = gradinit(
            network(name, device), batches=batches, steps=config.iterations + 1, on_step=between, progress=False
        )
        row = summarise(ours, theirs[1:])  # the first of each is a warm-up
        results[f"{name}, {config.iterations} iterations"] = row | {
            "ratio": sum(ours) / sum(theirs[1:]),
            "seconds": sum(ours) / len(ours),
            "reference_seconds": sum(theirs[1:]) / len(ours),
            "constraint_share": constraint_share(result.history),
            "reference_constraint_share": sum(released.branches) / len(released.branches),
            "data": identity,
        }
    return results


def constraint_share(history: list[dict[str, float]]) -> float:
    return sum(entry["constraint"] for entry in history) / len(history)


def section_kernels(config: Config, device: torch.device) -> dict[str, Any]:
    """`exact_kernels` on against off, an iteration of each branch."""
    results = {}
    for name in config.networks:
        batch = noise(config.batch_size or CASES[name], device)
        on, off = (Ours(network(name, device), lr=0.0, exact_kernels=exact) for exact in (True, False))
        branches: tuple[tuple[Branch, float], ...] = (("objective", math.inf), ("constraint", 0.0))
        for branch, gamma in branches:
            ours, torchs = (partial(side.iteration, batch, lambda b=batch: b, gamma, branch) for side in (on, off))
            results[f"{name}, {branch}"] = compare(ours, torchs, config.rounds, device)
    return results


def section_share(config: Config, device: torch.device) -> dict[str, Any]:
    """GradInit's 390 iterations against the 391 updates of an epoch of ordinary training at the same batch size."""
    results = {}
    for name in config.growing:
        size = config.batch_size or GROWING[name]
        batches, identity = real_batches(config, size, 2 * config.iterations + 4, device)
        history = gradinit(network(name, device), batches=batches, steps=config.iterations, progress=False).history
        share = constraint_share(history)
        S, S_tilde = batches[:2]
        ours, model = Ours(network(name, device), lr=0.0), network(name, device)
        steps: dict[str, Callable[[], object]] = {
            "objective": partial(ours.iteration, S, lambda b=S_tilde: b, math.inf, "objective"),
            "constraint": partial(ours.iteration, S, lambda b=S_tilde: b, 0.0, "constraint"),
            "update": partial(
                train, model, classification_loss, lambda _, S=S: [S], lambda _: {},
                steps_per_epoch=1, config=TrainingConfig(epochs=1, learning_rate=0.01),
            ),
        }  # fmt: skip
        times: dict[str, list[float]] = {label: [] for label in steps}
        for turn in range(config.rounds + 1):
            for label in steps if turn % 2 else reversed(steps):
                elapsed = seconds(steps[label], device)
                if turn > 0:  # the first chooses kernels and takes memory
                    times[label].append(elapsed)
        for label, c in {"all objective": 0.0, "all constraint": 1.0, "as in a real run": share}.items():
            own = [390 * ((1 - c) * a + c * b) for a, b in zip(times["objective"], times["constraint"], strict=True)]
            row = summarise(own, [391 * elapsed for elapsed in times["update"]])
            results[f"{name}, {label}"] = row | {"constraint_share": c, "data": identity}
    return results


def section_flops(config: Config, device: torch.device) -> dict[str, Any]:
    """Each engine's branches against one forward pass F, in time; the arithmetic, counted in F, ends the label."""
    branches: dict[str, tuple[float, Branch, dict[str, Any]]] = {
        "objective": (math.inf, "objective", {}),
        "exact objective": (math.inf, "objective", {"exact": True}),
        "constraint": (0.0, "objective", {}),
        "constraint, foreseen": (0.0, "constraint", {}),
    }
    results = {}
    for name in config.counted:
        batch = noise(config.batch_size or 32, device)
        steps: dict[str, Callable[[], object]] = {}
        for engine in ("lazy", "nested", "finite_difference"):
            for branch, (gamma, expected, options) in branches.items():
                if engine != "lazy" and branch == "constraint, foreseen":
                    continue  # they prepare for nothing
                ours = Ours(network(name, device), lr=0.0, engine=engine, **options)
                steps[f"{engine}, {branch}"] = partial(ours.iteration, batch, lambda b=batch: b, gamma, expected)
        released = ReleasedLoop(network(name, device), lr=0.0)
        for branch, gamma in {"objective": math.inf, "constraint": 0.0}.items():
            steps[f"released loop, {branch}"] = partial(released.iteration, batch, lambda b=batch: b, gamma)
        forward = torch.no_grad()(partial(classification_loss, network(name, device), batch))
        F = flops(forward)
        for label, step in steps.items():
            row = compare(step, forward, config.rounds, device)
            count = flops(step) / F
            results[f"{name}, {label}: {count:.1f} F"] = row | {"forward_passes": count}
    return results


def flops(step: Callable[[], object]) -> int:
    """Of matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


SECTIONS: dict[str, Callable[[Config, torch.device], dict[str, Any]]] = {
    "iteration": section_iteration,
    "memory": section_memory,
    "run": section_run,
    "kernels": section_kernels,
    "share": section_share,
    "flops": section_flops,
}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    device = device_of(config.device, "benchmarks.gradinit")
    with full_precision(device):
        if config.child:
            side, name, branch, size = config.child.split()
            print(memory_of(side, name, branch, int(size), device))
            return
        check_equals(device)
        sections = {name: partial(SECTIONS[name], config, device) for name in config.only}
        run_sections(sections, "gradinit", device, save=config.save, batch_size=config.batch_size)


if __name__ == "__main__":
    main()
