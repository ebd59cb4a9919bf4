"""Initialise a model by any method, and take the weights away.

    python -m reproduce.apply --model torchvision:resnet18 --data cifar10 --method gradinit --seed 0 \\
        --options gamma=10 steps=50 --output weights.safetensors

Model, data and loss may be your own: `--model package.module:callable`, and likewise. Beside the weights a JSON of the
same name tells what was done: each tensor's scale, what was left alone and why, configuration, data and versions.

Loading them back, a model with tied weights too:

    from safetensors.torch import load_model
    model = build()  # the same architecture, on the CPU
    load_model(model, "weights.safetensors")

A tensor that the model has under several names is in the file once; the file's metadata maps the others to it.
"""

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from common.record import as_recorded, device_name, device_of, put_in_place
from common.types import InitResult, UserLoss
from papers import initialize, method_of
from reproduce.bring import Brought, bring_data, bring_loss, bring_model, describe_model
from reproduce.command import NOTHING, end_well, options_of

EXPERIMENT = "apply"
SHOWN = 10
"""Rows of the table: the tensors that changed most."""
_PACKAGES = ("learned-init", "torch", "torchvision", "numpy", "safetensors", "timm", "transformers")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options. Values are ours, where nothing else is said."""

    model: str
    """A name of common.networks (with -bn for BatchNorm), torchvision:NAME, timm:NAME, hf:CONFIG.json, or
    package.module:callable."""
    model_options: tuple[str, ...] = ()
    """Of the model, as key=value."""
    data: str = "auto"
    """auto, cifar10, cifar100, tiny-imagenet, digits, noise, ptb, wikitext2, pydoc, hub:NAME, a folder with a folder of
    images for each class, or package.module:callable, which returns two loaders."""
    data_dir: Path | None = None
    """Folder that holds the data sets by name. Default: the variable LEARNED_INIT_DATA."""
    loss: str | None = None
    """package.module:callable, called with model and batch. Default: cross-entropy, or the model's own loss."""
    method: str
    """default, xavier, kaiming, torch_default, orthogonal, delta_orthogonal, lsuv, fixup, tfixup, skipinit, rezero,
    metainit, gradinit, nio or dimaml."""
    options: tuple[str, ...] = ()
    """Of the method, as key=value: gamma=10 steps=50. Default: as papers.initialize has them."""
    seed: int = 0
    """Of the model's own draw, of the batches, and of what the method draws."""
    batch_size: int | None = None
    """Of the method's batches. Default: 128 images, 32 windows of text. A user's loader has its own."""
    train_examples: int | None = None
    """None: all."""
    image_size: int | None = None
    """Side in pixels to which images are shrunk or resized. Default: as the data has them."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU where there is one."""
    output: Path = Path("weights.safetensors")
    """File of the weights; the JSON beside it has the same name."""
    overwrite: bool = False
    """Replace files that are there."""
    quiet: bool = False
    """No progress bar."""


# ---------------------------------------------------------------------------------------------- files
def check_output(config: Config) -> Path:
    """The JSON's path, where both files may be written.

    Raises:
        ValueError: Another suffix than .safetensors, or no folder to write in.
        FileExistsError: A file is there that may not be overwritten.
        IsADirectoryError: A folder is.
    """
    output = config.output
    if output.suffix != ".safetensors":
        raise ValueError(f"{EXPERIMENT}: `output` must end in .safetensors, got {output}.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(f"{EXPERIMENT}: `output` must be in a folder that can be written, got {output.parent}.")
    paths = (output, output.with_suffix(".json"))
    for path in paths:
        if path.is_dir():
            raise IsADirectoryError(f"{EXPERIMENT}: `output` must be a file, got {path}, which is a folder.")
        if path.exists() and not config.overwrite:
            raise FileExistsError(
                f"{EXPERIMENT}: `output` must be new, got {path}, which exists. Pass --overwrite, or another name."
            )
    return paths[1]


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to be written, which then takes its name: `path` is whole, or as it was before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        put_in_place(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def distinct(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor once, contiguous, in CPU memory of its own; and for each further name of it the one that is kept.

    Raises:
        ValueError: The state holds something else than tensors.
    """
    first: dict[Any, str] = {}
    tensors, ties = {}, {}
    for name, leaf in state.items():
        if not isinstance(leaf, Tensor):
            raise ValueError(
                f"{EXPERIMENT}: the model's state must be made of tensors, got {type(leaf).__name__} for {name!r}. "
                "Leave it out of the model's `state_dict`."
            )
        memory = (leaf.device, leaf.data_ptr(), leaf.dtype, leaf.shape, leaf.stride()) if leaf.numel() else name
        if (kept := first.setdefault(memory, name)) == name:
            tensors[name] = leaf.detach().to("cpu", copy=True).contiguous()
        else:
            ties[name] = kept
    return tensors, ties


def write(output: Path, beside: Path, model: nn.Module, record: Mapping[str, Any]) -> None:
    """Weights and JSON: both are complete on the disk before either takes its name.

    Raises:
        OSError: One cannot be written.
    """
    tensors, ties = distinct(model.state_dict())
    with whole(beside) as text, whole(output) as weights:
        try:
            save_file(tensors, weights, {"format": "pt", **ties})
        except SafetensorError as error:
            raise OSError(f"{EXPERIMENT}: {output} must be writable, got: {error}. Is the disk full?") from error
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        about = {"file": output.name, "sha256": digest, "tensors": len(tensors), "ties": ties}
        text.write_text(json.dumps({"weights": about, **record}, indent=2) + "\n", "utf-8")


def recorded(value: Any) -> Any:
    """JSON's own types; numbers that are not finite as "nan" and "inf"."""
    if isinstance(value, Mapping):
        return {str(key): recorded(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [recorded(part) for part in value]
    if isinstance(value, float):
        return as_recorded(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# ---------------------------------------------------------------------------------------------- the command
def run(config: Config) -> InitResult:
    """Initialise, write, and say what was done."""
    beside = check_output(config)
    options = options_of(config.options, EXPERIMENT)
    model_options = options_of(config.model_options, EXPERIMENT)
    method = method_of(config.method)
    method.check_options(options)
    device = device_of(config.device, EXPERIMENT)
    console = Console(highlight=False)
    console.print(f"Loading data ({config.data}); from the hub this may take a minute the first time.", markup=False)
    data = bring_data(
        config.data, data_dir=config.data_dir, batch_size=config.batch_size, train_examples=config.train_examples,
        image_size=config.image_size, device=device, caller=EXPERIMENT,
    )  # fmt: skip
    model = bring_model(config.model, data, seed=config.seed, options=model_options)
    loss_fn = bring_loss(config.loss, data, model)
    description = describe_model(config.model, model, data)
    console.print(f"Model: {description}.", markup=False)
    console.print(f"Data: {data.identity}.", markup=False)
    console.print(f"Device: {device_name(device)}. Initialising by {method.title}.", markup=False)
    start = time.perf_counter()
    result = apply(model, loss_fn, data, config.method, options, seed=config.seed, quiet=config.quiet)
    record = {
        "method": method.name,
        "scales": result.scales,
        "skipped": result.skipped,
        "steps": len(result.history),
        "last": result.history[-1] if result.history else None,
        "seconds": time.perf_counter() - start,
        "config": asdict(config),
        "model": description,
        "data": {"identity": data.identity, **data.record},
        "device": device_name(device),
        "versions": versions(),
    }
    write(config.output, beside, model, recorded(record))
    report(console, result, method.title)
    console.print(f"Weights: {config.output}. What was done: {beside}. To load them:", markup=False)
    console.print("    from safetensors.torch import load_model", markup=False)
    console.print(f"    load_model(model, {str(config.output)!r})  # on the CPU", markup=False, soft_wrap=True)
    return result


def apply(
    model: nn.Module,
    loss_fn: UserLoss,
    data: Brought,
    method: str,
    options: Mapping[str, Any],
    *,
    seed: int,
    quiet: bool,
) -> InitResult:
    """The method on the model: on the data's batches, or as MetaInit's paper has it, where `input_shape` is given."""
    batches = None if "input_shape" in options else data.init_batches(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return initialize(model, method, loss_fn, batches, generator=generator, progress=not quiet, **options)


def report(console: Console, result: InitResult, title: str) -> None:
    """How many tensors were changed, and those that were most."""

    def change(item: tuple[str, float]) -> float:
        return abs(math.log(item[1])) if 0 < item[1] < math.inf else math.inf

    ranked = sorted(result.scales.items(), key=change, reverse=True)
    count, skipped = len(ranked), len(result.skipped)
    console.print(f"{title}: {count} tensors written, {skipped} left alone.", markup=False)
    table = Table()
    table.add_column("Tensor" if count <= SHOWN else f"The {SHOWN} tensors that changed most", overflow="fold")
    table.add_column("New norm / old norm", justify="right")
    for name, scale in ranked[:SHOWN]:
        table.add_row(name, f"{scale:.4g}")
    console.print(table)


def main() -> None:
    end_well(lambda: run(tyro.cli(Config, description=__doc__)), interrupted=NOTHING)


if __name__ == "__main__":
    main()
