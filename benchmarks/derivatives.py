"""What right derivatives cost in time and memory, as ratios measured side by side in one run.

    python -m benchmarks.derivatives [--only exact groups zoo micro overhead]

Results go to `benchmarks/results/derivatives-<device>.json`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torchvision
import tyro
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.measure import compare, compare_memory, peak_memory, run_sections
from benchmarks.zoo import ZOO, build
from common.batches import map_tensors
from common.derivatives import gradient, group_gradients, hvp, tape, taped_gradient
from common.functional import BatchNormMode, classification_loss, parameters_of, pure_loss
from common.networks import make_network
from common.record import device_of
from common.tree import tree_map, tree_vdot
from common.types import Batch, Params, PureLoss

Section = Literal["exact", "groups", "zoo", "micro", "overhead"]


@dataclass(frozen=True, kw_only=True)
class Config:
    only: tuple[Section, ...] = ("exact", "groups", "zoo", "micro", "overhead")
    """Which measurements to make."""
    rounds: int = 7
    """Rounds of each comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    save: bool = True
    """Write the results file."""
    child: str = ""
    """Used by this program itself: the variant whose peak memory a fresh process measures."""


# ---------------------------------------------------------------------------------------------- what is measured on
def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=10)


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=6, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10
    )


def small_cnn() -> nn.Module:
    return make_network("plain-4-16")


def made(make: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return make().to(device)


def images(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, 3, 32, 32, generator=generator)
    return x.to(device), torch.randint(10, (size,), generator=generator).to(device)


# ---------------------------------------------------------------------------------------------- the sections
def third_order(loss: PureLoss, theta: Params, batch: Batch) -> Params:
    """∇⟨g, H g⟩ on autograd's own tape, as MetaInit differentiates."""
    leaves = tree_map(lambda leaf: leaf.detach().requires_grad_(), theta)
    g, H = taped_gradient(loss, leaves, batch)
    return tape(tree_vdot(H(g), g), leaves, keep=False)


def third_order_by_func(loss: PureLoss, theta: Params, batch: Batch) -> Params:
    """∇⟨θ, H θ⟩, nested transforms."""
    return torch.func.grad(lambda theta: tree_vdot(hvp(loss, theta, theta, batch), theta))(theta)


def product(loss: PureLoss, theta: Params, batch: Batch) -> Params:
    return hvp(loss, theta, theta, batch)


def section_exact(config: Config, device: torch.device) -> dict[str, Any]:
    """`exact` on against off (off, third orders are wrong, and attention needs torch's math kernel chosen by hand)."""

    def by_hand(model: nn.Module, batch: Batch) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return classification_loss(model, batch)

    results = {}
    cases: dict[str, tuple[Callable[[], nn.Module], BatchNormMode]] = {
        "ResNet-18, batch statistics": (resnet18, "batch"),
        "ResNet-18, running statistics": (resnet18, "running"),
        "ViT, 6 layers of width 192": (vit, "running"),
    }
    for name, (make, batch_norm) in cases.items():
        model, batch = made(make, device), images(16, device)
        on = pure_loss(model, batch_norm=batch_norm)
        off = pure_loss(model, by_hand, batch_norm=batch_norm, exact=False)
        theta = parameters_of(model)
        for quantity, of in {"gradient": gradient, "H v": product, "third order": third_order}.items():
            label = f"{name}, {quantity}"
            try:
                of(off, theta, batch)
            except RuntimeError:  # torch 2.15 refuses a third order of its batch norm on the tape
                of, label = third_order_by_func, f"{label}, by torch.func"
            ours, torchs = (partial(of, loss, theta, batch) for loss in (on, off))
            results[label] = compare(ours, torchs, config.rounds, device)
    return results


def section_groups(config: Config, device: torch.device) -> dict[str, Any]:
    """Per-example gradients of 32 images, mode="auto" against mode="loop"."""
    results = {}
    for name, make in {"ResNet-18": resnet18, "small CNN": small_cnn, "ViT, 6 layers of width 192": vit}.items():
        model, batch = made(make, device), images(32, device)
        loss, theta = pure_loss(model, batch_norm="running"), parameters_of(model)
        auto, loop = (partial(group_gradients, loss, theta, batch, mode=mode) for mode in ("auto", "loop"))
        results[name] = compare(auto, loop, config.rounds, device)
    return results


def section_zoo(config: Config, device: torch.device) -> dict[str, Any]:
    """Per-example gradients of the sweep's networks, mode="auto" against mode="loop", their own small batches."""
    results = {}
    for name, case in ZOO.items():
        model, batch = build(name, dtype=torch.float32)
        model = model.to(device)
        batch = map_tensors(lambda leaf: leaf.to(device, torch.float32 if leaf.is_floating_point() else None), batch)
        loss, theta = pure_loss(model, case.loss_fn, batch_norm="running"), parameters_of(model)
        auto, loop = (partial(group_gradients, loss, theta, batch, mode=mode) for mode in ("auto", "loop"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of vmap's slow paths, whose cost is what is measured
            try:
                loop()
            except RuntimeError:  # refused, as docs/supported.md says
                continue
            results[name] = compare(auto, loop, config.rounds, device)
    return results


def section_micro(config: Config, device: torch.device) -> dict[str, Any]:
    """Peak memory of a Hessian-vector product of ResNet-18, micro-batches of 8 against the whole batch."""
    return {
        f"batch {size}, {mode}": compare_memory(
            "benchmarks.derivatives", f"{size} {mode} 8", f"{size} {mode} {size}", device
        )
        for size in (16, 64, 256)
        for mode in ("reverse", "forward")
    }


def memory_of(size: int, mode: Any, micro_batch_size: int, device: torch.device) -> int:
    """Of a Hessian-vector product, in the fresh process that this is."""
    model = made(resnet18, device)
    loss, theta = pure_loss(model, batch_norm="running"), parameters_of(model)
    batch = images(size, device)
    hvp(loss, theta, theta, images(1, device), mode=mode)  # libraries loaded
    return peak_memory(partial(hvp, loss, theta, theta, batch, mode=mode, micro_batch_size=micro_batch_size), device)


def section_overhead(config: Config, device: torch.device) -> dict[str, Any]:
    """`pure_loss` against calling ResNet-18 itself: forward, and forward with a gradient."""
    results = {}
    for size in (32, 128):
        model, batch = made(resnet18, device).eval(), images(size, device)
        loss, theta = pure_loss(model, batch_norm="running"), parameters_of(model)
        parameters = list(model.parameters())
        leaves = tree_map(lambda leaf: leaf.requires_grad_(), parameters_of(model))

        @torch.no_grad()
        def pure(loss: PureLoss = loss, theta: Params = theta, batch: Batch = batch) -> Tensor:
            return loss(theta, batch)

        @torch.no_grad()
        def called(model: nn.Module = model, batch: Batch = batch) -> Tensor:
            return classification_loss(model, batch)

        def pure_gradient(loss: PureLoss = loss, leaves: Params = leaves, batch: Batch = batch) -> Params:
            return tape(loss(leaves, batch), leaves, keep=False)

        def called_gradient(model: nn.Module = model, batch: Batch = batch, parameters: list = parameters) -> tuple:
            return torch.autograd.grad(classification_loss(model, batch), parameters)

        results[f"forward, batch {size}"] = compare(pure, called, 3 * config.rounds, device)
        results[f"gradient, batch {size}"] = compare(pure_gradient, called_gradient, 3 * config.rounds, device)
    return results


SECTIONS: dict[str, Callable[[Config, torch.device], dict[str, Any]]] = {
    "exact": section_exact,
    "groups": section_groups,
    "zoo": section_zoo,
    "micro": section_micro,
    "overhead": section_overhead,
}


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    device = device_of(config.device, "benchmarks.derivatives")
    if config.child:
        size, mode, micro_batch_size = config.child.split()
        print(memory_of(int(size), mode, int(micro_batch_size), device))
        return
    sections = {name: partial(SECTIONS[name], config, device) for name in config.only}
    run_sections(sections, "derivatives", device, save=config.save)


if __name__ == "__main__":
    main()
