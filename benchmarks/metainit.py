"""What a MetaInit step costs in time and memory, as ratios measured side by side in one run.

    python -m benchmarks.metainit [--only step memory exact scaling training]

Two variants take turns, round after round; a ratio is taken in each round, and its median and range over the rounds are
reported. Peak memory is that of a fresh process a variant. Results go to `benchmarks/results/metainit-<device>.json`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks.measure import compare, compare_memory, peak_memory, run_sections, seconds, summarise
from common.functional import BatchNormMode, classification_loss, parameters_of, pure_loss
from common.networks import make_network
from common.record import device_of
from common.training import TrainingConfig, train
from common.types import Batch
from papers.metainit import meta_gradient, metainit
from papers.metainit.objective import Form

Section = Literal["step", "memory", "exact", "scaling", "training"]


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Section, ...] = ("step", "memory", "exact", "scaling", "training")
    """Which measurements to make."""
    rounds: int = 7
    """Rounds of each comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    training_networks: tuple[str, ...] = ("resnet20", "resnet110", "vgg19")
    """Of the training section."""
    training_precisions: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of the training section. A CPU without bfloat16 arithmetic needs minutes for the larger networks in it."""
    save: bool = True
    """Write the results file."""
    child: str = ""
    """Used by this program itself: the variant whose peak memory a fresh process measures."""


# ---------------------------------------------------------------------------------------------- what is compared
def figure_2_step(model: nn.Module, momenta: dict[str, float], batch: Batch) -> None:
    """One step as one would write it down from Figure 2: eager autograd, a tensor at a time, Python numbers."""
    x, y = batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = nn.functional.cross_entropy(model(x), y)
    g = torch.autograd.grad(loss, parameters, create_graph=True)
    half_square = torch.stack([(t**2).sum() / 2 for t in g]).sum()
    Hg = torch.autograd.grad(half_square, parameters, create_graph=True)
    terms = []
    for a, b in zip(g, Hg, strict=True):
        s = torch.where(a >= 0, 1.0, -1.0).to(a.dtype)
        terms.append(((a - b) / (a + 1e-5 * s) - 1).abs().sum())
    quotient = torch.stack(terms).sum() / sum(p.numel() for p in parameters)
    grads = torch.autograd.grad(quotient, parameters)
    with torch.no_grad():
        for (name, p), G in zip(model.named_parameters(), grads, strict=True):
            if p.ndim < 2:
                continue
            norm = p.norm().item()
            sign = torch.sign((p * G).sum() / norm).item()
            momenta[name] = 0.9 * momenta.get(name, 0.0) - 0.1 * sign
            p.mul_((norm + momenta[name]) / norm)


def meta_step(model: nn.Module, batch: Batch, **options: Any) -> Callable[[], object]:
    """The meta-gradient alone, of the tensors that MetaInit tunes."""
    theta = parameters_of(model)
    tuned = [name for name, leaf in theta.items() if leaf.ndim >= 2]
    return partial(meta_gradient, pure_loss(model, batch_norm="running"), theta, batch, tuned=tuned, **options)


def network(name: str, device: torch.device, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return make_network(name, **options).to(device).eval()


def noise(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 32, 32, generator=generator)
    return x.to(device), torch.randint(10, (size,), generator=generator).to(device)


def forward_of(model: nn.Module, batch: Batch) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> Tensor:
        return classification_loss(model, batch)

    return forward


# ---------------------------------------------------------------------------------------------- the sections
CASES = {
    "7 convolutions of 32 channels, batch 64": ("plain-8-32", {"stages": 1}, 64),
    "plain-12-16, batch 32": ("plain-12-16", {}, 32),
    "plain ResNet-20, batch 32": ("resnet20", {"skip": False}, 32),
}


def turn_by_turn(
    model: nn.Module, reference: nn.Module, batch: Batch, config: Config, device: torch.device, **how: Any
) -> dict[str, Any]:
    """Steps inside one call of `metainit`, each followed by a step of Figure 2 on a network of its own."""
    momenta: dict[str, float] = {}
    begun: list[float] = []
    ours: list[float] = []
    theirs: list[float] = []

    def between_steps(_: dict[str, float]) -> None:
        if begun:
            ours.append(time.perf_counter() - begun[-1])  # metainit's own step ends with a synchronisation
        theirs.append(seconds(lambda: figure_2_step(reference, momenta, batch), device))
        begun.append(time.perf_counter())

    metainit(model, batches=[batch], steps=config.rounds + 2, on_step=between_steps, progress=False, **how)
    return summarise(ours[1:], theirs[1:-1])  # the first of each is a warm-up


def section_step(config: Config, device: torch.device) -> dict[str, Any]:
    """A step inside `metainit`, bookkeeping included, turn by turn with one of Figure 2 written down."""
    variants: dict[str, dict[str, Any]] = {
        "taylor": {}, "step": {"form": "step"}, "taylor, micro-batches of 8": {"micro_batch_size": 8}
    }  # fmt: skip
    results = {}
    for label, (name, options, size) in CASES.items():
        batch = noise(size, device)
        for variant, how in variants.items():
            model, reference = (network(name, device, **options) for _ in range(2))
            results[f"{label}, {variant}"] = turn_by_turn(model, reference, batch, config, device, **how)
    return results


def section_memory(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak above what the process held before, batch 64: micro-batches of 8 against the fused form."""
    return {
        f"7 convolutions of 32 channels, batch 64 in eights, {form}": compare_memory(
            "benchmarks.metainit", f"split {form}", f"fused {form}", device
        )
        for form in ("taylor", "step")
    }


def memory_of(variant: str, form: Any, device: torch.device) -> int:
    """Of a step, in the fresh process that this is."""
    name, options, size = CASES["7 convolutions of 32 channels, batch 64"]
    model = network(name, device, **options)
    batch = noise(size, device)
    meta_step(
        model, noise(2, device), form=form, micro_batch_size=1 if variant == "split" else None
    )()  # libraries loaded
    return peak_memory(meta_step(model, batch, form=form, micro_batch_size=8 if variant == "split" else None), device)


class SmallTransformer(nn.Module):
    """Layer norm and attention, small: what `exact` re-expresses on a Transformer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu", dropout=0.0)
        self.embed, self.encoder = nn.Linear(48, 64), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 64, 48)
        return self.head(self.encoder(self.embed(patches)).mean(1))


def section_exact(config: Config, device: torch.device) -> dict[str, Any]:
    """`exact` on against off; off, torch refuses batch statistics at third order, and attention altogether."""
    batch = noise(32, device)
    results = {}
    modes: tuple[tuple[str, nn.Module, BatchNormMode, Form], ...] = (
        ("plain-12-16", network("plain-12-16", device), "running", "taylor"),
        ("ResNet-20, batch statistics, form='step'", network("resnet20", device, batch_norm=True), "batch", "step"),
        ("ResNet-20, running statistics", network("resnet20", device, batch_norm=True), "running", "taylor"),
    )
    for label, model, batch_norm, form in modes:
        theta = parameters_of(model)
        on, off = (pure_loss(model, batch_norm=batch_norm, exact=exact) for exact in (True, False))
        ours, torchs = (partial(meta_gradient, loss, theta, batch, form=form) for loss in (on, off))
        results[label] = compare(ours, torchs, config.rounds, device)
    torch.manual_seed(0)
    model = SmallTransformer().to(device)
    loss, theta = pure_loss(model), parameters_of(model)
    results["two Transformer layers, width 64, against its own forward pass"] = compare(
        lambda: meta_gradient(loss, theta, batch), forward_of(model.eval(), batch), config.rounds, device
    )
    return results


def section_scaling(config: Config, device: torch.device) -> dict[str, Any]:
    """A step against one forward pass of the same batch, as batch, depth and width grow."""
    results = {}
    few = min(config.rounds, 5)
    base = {"batch": 32, "depth": 8, "width": 16}
    for axis, values in {"batch": (8, 32, 128), "depth": (4, 8, 16), "width": (8, 16, 32)}.items():
        for value in values:
            sizes = base | {axis: value}
            model = network(f"plain-{sizes['depth']}-{sizes['width']}", device)
            batch = noise(sizes["batch"], device)
            label = f"{axis} {value} (batch {sizes['batch']}, depth {sizes['depth']}, width {sizes['width']})"
            results[label] = compare(meta_step(model, batch), forward_of(model, batch), few, device)
    return results


def section_training(config: Config, device: torch.device) -> dict[str, Any]:
    """Seconds for 50 000 images at batch 128, from one batch a round, against float32 in torch's default layout."""
    batch, rounds = noise(128, device), 5
    results: dict[str, Any] = {}
    for name in config.training_networks:
        recipes = {
            f"{precision}, {'channels-last' if last else 'NCHW'}": TrainingConfig(
                epochs=1, learning_rate=0.01, precision=precision, channels_last=last
            )
            for precision in dict.fromkeys(("float32", *config.training_precisions))  # the reference is float32
            for last in (False, True)
        }
        models = {label: network(name, device, batch_norm=True) for label in recipes}
        epoch: dict[str, list[float]] = {label: [] for label in recipes}
        for turn in range(rounds + 1):
            for label, recipe in recipes.items():
                result = train(
                    models[label],
                    classification_loss,
                    lambda _: [batch],
                    lambda _: {},
                    steps_per_epoch=1,
                    config=recipe,
                )
                if turn > 0:  # the first chooses kernels and takes memory
                    epoch[label].append(result.seconds * 50_000 / 128)
        for label, values in epoch.items():
            results[f"{name} with BatchNorm, {label}"] = summarise(values, epoch["float32, NCHW"])
    return results


SECTIONS: dict[str, Callable[[Config, torch.device], dict[str, Any]]] = {
    "step": section_step,
    "memory": section_memory,
    "exact": section_exact,
    "scaling": section_scaling,
    "training": section_training,
}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    device = device_of(config.device, "benchmarks.metainit")
    if config.child:
        variant, form = config.child.split()
        print(memory_of(variant, form, device))
        return
    sections = {name: partial(SECTIONS[name], config, device) for name in config.only}
    run_sections(sections, "metainit", device, save=config.save)


if __name__ == "__main__":
    main()
