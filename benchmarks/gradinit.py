"""What a GradInit iteration costs in time and memory, as ratios measured side by side in one run.

    python -m benchmarks.gradinit [--only iteration memory run kernels share]

The reference is the released loop written down plainly: a graph of the gradient in every iteration, a look-ahead step
in place, norms, inner products and Adam one tensor at a time. Two variants take turns, round after round; a ratio is
taken in each round, and its median and range over the rounds are reported. Results go to
`benchmarks/results/gradinit-<device>.json`.
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

from benchmarks.measure import compare, compare_memory, device_of, peak_memory, run_sections, seconds
from common.functional import classification_loss, parameters_of, pure_loss
from common.networks import make_network
from common.scales import Branch, RescaleAdam
from common.tree import tree_norms
from common.types import Batch, Params
from data import load_images, sample_batches
from papers.gradinit import batch_pairs, gradinit, scale_gradients

Section = Literal["iteration", "memory", "run", "kernels", "share"]
CASES = {"vgg19": 128, "vgg19-bn": 128, "resnet110": 64, "resnet110-bn": 64}
"""Networks, with -bn for BatchNorm, and the batch size of S and S̃."""
GROWING = {"resnet20": 128, "resnet56": 128, "resnet110": 128, "vgg11": 128, "vgg19": 128}
"""Networks in the order of their size, and the batch size of training and GradInit."""


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Section, ...] = ("iteration", "memory", "run", "kernels", "share")
    """Which measurements to make."""
    networks: tuple[str, ...] = tuple(CASES)
    """Of all sections but the last."""
    growing: tuple[str, ...] = tuple(GROWING)
    """Of the section `share`."""
    batch_size: int | None = None
    """Examples of S; None: each network's own."""
    iterations: int = 16
    """Of a real run."""
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
def network(name: str, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return make_network(name.removesuffix("-bn"), batch_norm=name.endswith("-bn")).to(device)


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
        for gamma in (0.0, 1e9):
            model = network(name, device)
            ours = Ours(model).iteration(batch, lambda: other, gamma)
            theirs = ReleasedLoop(network(name, device)).iteration(batch, lambda: other, gamma)
            a, b = torch.stack(list(ours.values())).cpu(), torch.tensor(list(theirs.values()))
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


# ---------------------------------------------------------------------------------------------- the sections
def section_iteration(config: Config, device: torch.device) -> dict[str, Any]:
    """A whole iteration, update included, against the released loop's of the same branch."""
    variants: dict[str, tuple[float, Branch, dict[str, Any]]] = {
        "objective": (1e9, "objective", {}),
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
    gamma, few, batch = 0.0 if branch == "constraint" else 1e9, noise(2, device), noise(size, device)
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


def real_batches(config: Config, size: int, count: int, device: torch.device) -> list[Batch]:
    data = load_images("auto", data_dir=config.data_dir, train=max(1000, size * count), test=100)
    print(f"Batches of {data.identity}.")
    generator = torch.Generator().manual_seed(0)
    stream = sample_batches(data.train, size, mean=data.mean, std=data.std, generator=generator, device=device)
    return list(islice(stream, count))


def section_run(config: Config, device: torch.device) -> dict[str, Any]:
    """A real run, γ = 1, mean over its iterations, turn by turn with the released loop on the same batches."""
    results = {}
    for name in config.networks:
        size = config.batch_size or CASES[name]
        batches = real_batches(config, size, 2 * config.iterations + 4, device)
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
        share = sum(entry["constraint"] for entry in result.history) / len(result.history)
        own, reference = sum(ours), sum(theirs[1:])  # the first of each is a warm-up
        results[f"{name}, {config.iterations} iterations"] = {
            "ratio": own / reference,
            "range": [min(a / b for a, b in zip(ours, theirs[1:], strict=True)),
                      max(a / b for a, b in zip(ours, theirs[1:], strict=True))],
            "seconds": own / config.iterations,
            "reference_seconds": reference / config.iterations,
            "rounds": config.iterations,
            "constraint_share": share,
        }  # fmt: skip
    return results


def section_kernels(config: Config, device: torch.device) -> dict[str, Any]:
    """`exact_kernels` on against off, an iteration of each branch."""
    results = {}
    for name in config.networks:
        batch = noise(config.batch_size or CASES[name], device)
        on, off = (Ours(network(name, device), lr=0.0, exact_kernels=exact) for exact in (True, False))
        branches: tuple[tuple[Branch, float], ...] = (("objective", 1e9), ("constraint", 0.0))
        for branch, gamma in branches:
            results[f"{name}, {branch}"] = compare(
                *(partial(side.iteration, batch, lambda b=batch: b, gamma, branch) for side in (on, off)),
                config.rounds,
                device,
            )
    return results


def section_share(config: Config, device: torch.device) -> dict[str, Any]:
    """GradInit's 390 iterations against an epoch of 391 float32 updates at batch 128: one branch all along."""
    results = {}
    for name in config.growing:
        batch = noise(config.batch_size or GROWING[name], device)
        model, ours = network(name, device), Ours(network(name, device), lr=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

        def update(model=model, optimizer=optimizer, batch=batch) -> None:
            optimizer.zero_grad()
            classification_loss(model, batch).backward()
            optimizer.step()

        branches: tuple[tuple[Branch, float], ...] = (("objective", 1e9), ("constraint", 0.0))
        for branch, gamma in branches:
            row = compare(
                partial(ours.iteration, batch, lambda b=batch: b, gamma, branch), update, config.rounds, device
            )
            results[f"{name}, all {branch}"] = row | {
                "seconds": 390 * row["seconds"],
                "reference_seconds": 391 * row["reference_seconds"],
            }
    return results


SECTIONS: dict[str, Callable[[Config, torch.device], dict[str, Any]]] = {
    "iteration": section_iteration,
    "memory": section_memory,
    "run": section_run,
    "kernels": section_kernels,
    "share": section_share,
}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    device = device_of(config.device)
    if config.child:
        side, name, branch, size = config.child.split()
        print(memory_of(side, name, branch, int(size), device))
        return
    check_equals(device)
    sections = {name: partial(SECTIONS[name], config, device) for name in config.only}
    run_sections(sections, "gradinit", device, save=config.save)


if __name__ == "__main__":
    main()
