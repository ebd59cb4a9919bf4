"""Data that a user names on the command line, made into batches on one device.

Axes: b batch, h height, w width, t characters of a window.
"""

import hashlib
import importlib
import inspect
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, get_args

import torch
from torch import Tensor

from common.batches import count_examples, map_tensors, tensors_of
from common.options import check_whole
from common.types import Batch
from data import (
    ImageData,
    ImageName,
    TextName,
    character_vocabulary,
    epoch_batches,
    evaluation_batches,
    load_images,
    load_text,
)
from reproduce.bring_images import load_folder, load_hub

IMAGES = get_args(ImageName)
CHARACTERS = tuple(name for name in get_args(TextName) if name != "auto")
WINDOW = 100
"""t, characters of an example of text, as in DIMAML."""
IMAGE_BATCH, TEXT_BATCH = 128, 32
IGNORED = -100
"""The label that torch's cross-entropy leaves out."""
IGNORED_IN_MASKS = 255
"""What stands for it in many published masks of segmentation."""
PATIENCE_SECONDS = 20.0
"""How long a data set is counted without a word."""


class Source(Protocol):
    """Where the batches of a `Brought` come from."""

    def one_pass(self, seed: int, *, augment: bool) -> Iterator[Batch]:
        """The training examples in an order that `seed` draws."""
        ...

    def test(self) -> Iterator[Batch]:
        """Every test example once."""
        ...


@dataclass
class InitBatches:
    """To be gone through again and again: each time one pass over the training examples, in a new order.

    Of a user's loader whose batches vary in size, those of the first one's size.
    """

    name: str
    source: "Source"
    seed: int
    passes: int = 0
    size: int | None = None

    def __iter__(self) -> Iterator[Batch]:
        number, found = self.passes, False
        self.passes += 1
        # apart from the seeds of training, so that an initialiser does not see the first epoch's batches
        for batch in self.source.one_pass(500_000_000 + 1_000_003 * self.seed + number, augment=False):
            length = count_examples(batch, self.name)
            self.size = length if self.size is None else self.size
            if length == self.size:
                found = True
                yield batch
        if not found:
            raise ValueError(
                f"{self.name}: every pass must have a batch of one size, got none of {self.size} examples in pass "
                f"{number + 1}. Let the loader make batches of one size."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Brought:
    """Training and test batches by name, on their device.

    Attributes:
        name: What the user named.
        identity: One sentence: what this is, from where, how much.
        record: What `environment.json` says of the data; `sha256` is of every example, or of what `sha256_of` says.
        device: Where every batch is.
        example: The first training batch.
        num_classes: How many classes, or different characters, there are; None where labels are not whole numbers.
        input_shape: Of one example's input, (3, h, w) or (t,); None where batches are not pairs (x, y).
        steps_per_epoch: Batches of a pass over the training examples.
        batch_size: Examples of a training batch.
        augment: Whether training images are shifted and mirrored.
        source: Gives the batches.
    """

    name: str
    identity: str
    record: dict[str, Any]
    device: torch.device
    example: Batch
    num_classes: int | None
    input_shape: tuple[int, ...] | None
    steps_per_epoch: int
    batch_size: int
    augment: bool = False
    source: Source

    @property
    def is_text(self) -> bool:
        """Whether these are our own characters, batches (ids, next ids)."""
        return isinstance(self.source, _Windows)

    def train_batches(self, epoch: int, *, seed: int) -> Iterator[Batch]:
        """One pass over the training examples: a function of seed and epoch alone."""
        return self.source.one_pass(1_000_003 * seed + epoch, augment=self.augment)

    def init_batches(self, *, seed: int) -> "InitBatches":
        """Training examples, not augmented, in batches of one size: for initialisers and diagnostics."""
        return InitBatches(self.name, self.source, seed)

    def test_batches(self) -> Iterator[Batch]:
        """Every test example once; the last batch may be smaller."""
        return self.source.test()


def bring_data(
    spec: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    image_size: int | None = None,
    augment: bool = False,
    device: torch.device | str,
    caller: str,
) -> Brought:
    """The data that `spec` names.

    Images are kept as uint8 on the device and normalised by the training images' mean and deviation of each channel.
    Text is cut into windows of 100 characters, the examples. Training batches are shuffled anew each epoch, and what
    does not fill the last one sits that epoch out.

    Args:
        spec: One of
            auto, cifar10, cifar100, tiny-imagenet, digits, noise: images and their classes;
            ptb, wikitext2, pydoc: characters, as batches (ids, next ids), both (b, 100);
            hub:NAME or hub:NAME:CONFIGURATION: a labelled image set of the Hugging Face hub, or hub:FOLDER, one saved
            in the hub's parquet layout;
            a folder with one subfolder of images a class, or with such folders in train/ and test/, val/ or valid/;
            package.module:callable: called without arguments, returns (train_loader, test_loader), two collections of
            batches, any pytree of tensors, that can be gone through again and again. They are shuffled, if at all, by
            torch's global generator or by one that the loader or its sampler has as `generator`: both are seeded at
            every pass. The current directory is searched too.
        data_dir: Where a published set lies; `data.load_images` and `data.load_text` say how.
        batch_size: Examples a batch; None: 128 images, or 32 windows of text. A user's loaders make their own.
        train_examples: At most so many, class-balanced where the classes have enough. None: all.
        test_examples: Likewise.
        image_size: Side in pixels to which images are shrunk, those of folders and the hub resized. None: as they are
            for a published set; of folders and the hub the median of the images' shorter sides, 64 at the most.
        augment: Shift training images by up to 4 pixels and mirror half of them. Not for `init_batches`.
        device: Where the batches go.
        caller: The command that messages speak for.

    Raises:
        FileNotFoundError: The data cannot be had; the message says what was tried.
        ValueError: The name is unknown, or the data is damaged or does not fit what is asked for.
        TypeError: The user's callable returns something else than two loaders of batches of tensors.

    Warns:
        UserWarning: The user's training loader gives other batches though the seed is the same.
    """
    counts = {
        "batch_size": batch_size, "train_examples": train_examples, "test_examples": test_examples,
        "image_size": image_size,
    }  # fmt: skip
    check_whole(caller, "", smallest=1, **{name: value for name, value in counts.items() if value is not None})
    device = torch.device(device)
    is_user = not spec.startswith("hub:") and not os.path.isdir(spec) and ":" in spec
    if (is_user or spec in CHARACTERS) and (augment or image_size):
        raise ValueError(
            f"{caller}: `augment` and `image_size` are for images that are loaded here, got them for {spec!r}. "
            "Leave them out, or do both in the loader."
        )
    if is_user:
        if train_examples or test_examples:
            raise ValueError(
                f"{caller}: a user's loaders decide how many examples there are, got `train_examples` or "
                f"`test_examples` for {spec!r}. Leave them out, or take a subset in the loader."
            )
        return _from_loaders(spec, device, caller)
    if spec in CHARACTERS:
        return _characters(spec, data_dir, batch_size or TEXT_BATCH, train_examples, test_examples, device, caller)
    if spec in IMAGES:
        data = load_images(spec, data_dir=data_dir, train=train_examples, test=test_examples)
        data = data if image_size is None else data.resized(image_size)
    elif spec.startswith("hub:") or os.path.isdir(spec):
        load = load_hub if spec.startswith("hub:") else load_folder
        data = load(
            spec.removeprefix("hub:"), train=train_examples, test=test_examples, image_size=image_size, caller=caller
        )
    else:
        raise ValueError(
            f"{caller}: `data` must be one of {', '.join((*IMAGES, *CHARACTERS))}, a folder of images, hub:NAME or "
            f"package.module:callable, got {spec!r}, which is no folder here. Check the spelling and the path."
        )
    return _images(data, batch_size or IMAGE_BATCH, augment, device, caller)


# ---------------------------------------------------------------------------------------------- images
@dataclass(frozen=True, eq=False)
class _Images:
    data: ImageData
    batch_size: int

    def one_pass(self, seed: int, *, augment: bool) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same batches on every device
        return epoch_batches(
            self.data.train, self.batch_size, mean=self.data.mean, std=self.data.std, generator=generator,
            augment=augment,
        )  # fmt: skip

    def test(self) -> Iterator[Batch]:
        return evaluation_batches(self.data.test, self.batch_size, mean=self.data.mean, std=self.data.std)


def _images(data: ImageData, batch_size: int, augment: bool, device: torch.device, caller: str) -> Brought:
    _check_batch_size(batch_size, len(data.train), caller)
    record = data.record()
    source = _Images(replace(data, train=data.train.to(device), test=data.test.to(device)), batch_size)
    return Brought(
        name=data.name, identity=data.identity, record=record, device=device,
        example=next(source.one_pass(0, augment=False)), num_classes=data.num_classes,
        input_shape=tuple(data.train.images.shape[1:]), steps_per_epoch=len(data.train) // batch_size,
        batch_size=batch_size, augment=augment, source=source,
    )  # fmt: skip


def _check_batch_size(batch_size: int, examples: int, caller: str) -> None:
    if batch_size > examples:
        raise ValueError(
            f"{caller}: there must be a batch of {batch_size} training examples, got {examples} in all. "
            "Take more of them, or a smaller `batch_size`."
        )


# ---------------------------------------------------------------------------------------------- characters
@dataclass(frozen=True, eq=False)
class _Windows:
    """Windows of characters, one more than t of them each, (n, t + 1)."""

    train: Tensor
    held_out: Tensor
    batch_size: int

    def one_pass(self, seed: int, *, augment: bool) -> Iterator[Batch]:
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        full = len(order) - len(order) % self.batch_size
        return (_shifted(self.train[part.to(self.train.device)]) for part in order[:full].split(self.batch_size))

    def test(self) -> Iterator[Batch]:
        return (_shifted(part) for part in self.held_out.split(self.batch_size))


def _shifted(windows: Tensor) -> tuple[Tensor, Tensor]:
    return windows[:, :-1], windows[:, 1:]


def _characters(
    spec: str,
    data_dir: str | os.PathLike[str] | None,
    batch_size: int,
    train: int | None,
    test: int | None,
    device: torch.device,
    caller: str,
) -> Brought:
    counts = {part: n and n * WINDOW + 1 for part, n in (("train", train), ("test", test))}
    text = load_text(spec, data_dir=data_dir, **counts)
    vocabulary = character_vocabulary(text.train)

    def windows(part: str) -> Tensor:
        ids = vocabulary.encode(getattr(text, part))
        if len(ids) <= WINDOW:
            raise ValueError(f"{caller}: text must hold a window of {WINDOW + 1} characters, got {len(ids)} to {part}.")
        # the last character of a window is the first of the next one, so that each but the first is a target once
        return ids.unfold(0, WINDOW + 1, WINDOW).contiguous().to(device)

    source = _Windows(windows("train"), windows("test"), batch_size)
    _check_batch_size(batch_size, len(source.train), caller)
    return Brought(
        name=text.name,
        identity=f"{text.identity}, in windows of {WINDOW}",
        record=text.record() | {"window": WINDOW, "vocabulary_size": len(vocabulary)},
        device=device,
        example=next(source.one_pass(0, augment=False)),
        num_classes=len(vocabulary),
        input_shape=(WINDOW,),
        steps_per_epoch=len(source.train) // batch_size,
        batch_size=batch_size,
        source=source,
    )


# ---------------------------------------------------------------------------------------------- a user's loaders
@dataclass(frozen=True, eq=False)
class _Loaders:
    """Two collections of batches, gone through with torch's global random numbers and the loader's own set by the seed.

    So every arm sees the same batches in the same order, unless a loader draws from NumPy, say. The numbers outside are
    left as they are.
    """

    spec: str
    train: Iterable[Batch]
    held_out: Iterable[Batch]
    device: torch.device
    caller: str
    num_classes: int | None

    def one_pass(self, seed: int, *, augment: bool) -> Iterator[Batch]:
        return self._checked("training", self.train, seed)

    def test(self) -> Iterator[Batch]:
        return self._checked("test", self.held_out, 0)

    def _checked(self, part: str, loader: Iterable[Batch], seed: int) -> Iterator[Batch]:
        number, what = 0, f"the {part} loader of {self.spec}"
        for number, batch in enumerate(_gone_through(self.caller, what, loader, seed), 1):
            _check_batch(batch, f"batch {number} of {what}", self.num_classes, self.caller)
            yield map_tensors(lambda leaf: leaf.to(self.device, non_blocking=True), batch)
        if not number:
            raise ValueError(
                f"{self.caller}: {what} must give a batch at every pass, got none. "
                "It is empty, or an iterator that was gone through before: return a DataLoader or a list."
            )


def _gone_through(caller: str, what: str, loader: Iterable[Batch], seed: int) -> Iterator[Batch]:
    generators = _generators_of(loader)
    states = [torch.Generator(generator.device).manual_seed(seed).get_state() for generator in generators]
    iterator = None
    for number in count(1):
        outside = [generator.get_state() for generator in generators]
        _set_states(generators, states)
        try:
            iterator = iter(loader) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise ValueError(
                f"{caller}: {what} must give every batch, got {type(error).__name__} at batch {number}: {error}"
            ) from error
        finally:
            # passes may take turns: a training is under way while the test loader is gone through
            states = [generator.get_state() for generator in generators]
            _set_states(generators, outside)
        yield batch


def _generators_of(loader: Iterable[Batch]) -> list[torch.Generator]:
    """Each once: torch's global one, and what a DataLoader and its samplers draw from."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    holders = (loader, getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    own = [getattr(holder, "generator", None) for holder in holders]
    found = [torch.default_generator, *(one for one in own if isinstance(one, torch.Generator))]
    return list({id(generator): generator for generator in found}.values())


def _set_states(generators: list[torch.Generator], states: list[Tensor]) -> None:
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def _check_batch(batch: Batch, where: str, num_classes: int | None, caller: str) -> None:
    """On the device where the loader leaves it, before anything is computed with it."""
    leaves = tensors_of(batch)
    if not leaves:
        raise TypeError(
            f"{caller}: {where} must hold tensors, got {type(batch).__name__}. Likely a loader of single examples, or "
            "of NumPy arrays: wrap it in a torch.utils.data.DataLoader."
        )
    if count_examples(batch, f"{caller}: {where}") == 0:
        raise ValueError(f"{caller}: {where} must hold an example, got none.")
    for leaf in leaves:
        if leaf.is_floating_point() and leaf.isnan().any():  # infinity has its uses, in masks
            raise ValueError(
                f"{caller}: batches must hold numbers, got NaN in {where}: {int(leaf.isnan().sum())} of {leaf.numel()} "
                f"of a tensor of shape {tuple(leaf.shape)}. Clean the data, or leave these examples out."
            )
    labels = _labels(batch)
    if labels is None or num_classes is None or not labels.numel():
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"{caller}: labels must lie in 0 … {num_classes - 1} for {num_classes} classes, got labels from {low} to "
            f"{high} in {where}. Number the classes from 0 without gaps."
        )


def _labels(batch: Batch) -> Tensor | None:
    """The class labels y of a pair (x, y), if that is what it is; for symbols (x, next x) those of both."""
    if not is_pair(batch) or batch[1].dtype != torch.int64:
        return None
    x, y = batch
    numbers = torch.cat([x.flatten(), y.flatten()]) if x.dtype == y.dtype and x.shape == y.shape else y.flatten()
    return numbers[numbers != IGNORED]


def is_pair(batch: Batch) -> bool:
    """Whether a batch is (x, y), two tensors."""
    return isinstance(batch, (tuple, list)) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)


def _from_loaders(spec: str, device: torch.device, caller: str) -> Brought:
    made = call_named(spec, "data", caller)
    if not isinstance(made, (tuple, list)) or len(made) != 2:
        raise TypeError(
            f"{caller}: {spec} must return (train_loader, test_loader), got {_told(made)}. Return two collections of "
            "batches."
        )
    for part, loader in zip(("training", "test"), made, strict=True):
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise TypeError(
                f"{caller}: the {part} loader of {spec} must be a collection that can be gone through again, got "
                f"{type(loader).__name__}. Return a DataLoader or a list of batches."
            )
    train, held_out = made
    first, steps, num_classes = _sizes(spec, train, caller)
    source = _Loaders(spec, train, held_out, device, caller, num_classes)
    example, test_example = next(source.one_pass(0, augment=False)), next(source.test())
    is_repeatable = _digest([first]) == _digest([example])
    if not is_repeatable:
        warnings.warn(
            f"{caller}: the training loader of {spec} should give the same batches at every pass with one seed, got "
            "another first batch at the second pass: different initialisers see different batches, and a run that is "
            "resumed or repeated gives other numbers. Have it draw from torch's random numbers alone, which are seeded "
            "at every pass: leave out what shuffles with NumPy, with Python's random or with a generator that is "
            "hidden in it, or give it a sampler that draws from torch's global generator.",
            stacklevel=3,
        )
    size = count_examples(example, caller)
    return Brought(
        name=spec,
        identity=f"batches of {spec}, {steps:,} training batches of {size} examples",
        record={
            "name": spec,
            "train_batches": steps,
            "batch_size": size,
            "num_classes": num_classes,
            "is_repeatable": is_repeatable,
            "sha256": _digest([example, test_example], content=is_repeatable),
            "sha256_of": f"{'' if is_repeatable else 'the kinds of tensors in '}the first training batch and the first "
            "test batch",
        },
        device=device,
        example=example,
        num_classes=num_classes,
        input_shape=tuple(example[0].shape[1:]) if is_pair(example) else None,
        steps_per_epoch=steps,
        batch_size=size,
        source=source,
    )


def _sizes(spec: str, loader: Any, caller: str) -> tuple[Batch, int, int | None]:
    """The first batch of seed 0, and how many batches and classes: as the loader says, or by going through it once."""
    what = f"the training loader of {spec}"
    first = next(_gone_through(caller, what, loader, 0), None)
    if first is None:
        raise ValueError(f"{caller}: {what} must give a batch, got none. Is its data set empty?")
    _check_batch(first, f"batch 1 of {what}", None, caller)
    is_labelled = _labels(first) is not None
    dataset = getattr(loader, "dataset", None)
    while isinstance(dataset, torch.utils.data.Subset):
        dataset = dataset.dataset
    classes = getattr(dataset, "classes", None)  # as torchvision's data sets have it
    try:
        steps = len(loader)
    except TypeError:  # no length, or a DataLoader of a data set without one
        steps = None
    if steps is not None and (classes is not None or not is_labelled):
        return first, steps, len(classes) if classes is not None and is_labelled else None
    is_mask = is_pair(first) and first[1].ndim > 2
    number, largest, below, asked_at = 0, -1, -1, time.monotonic()
    for number, batch in enumerate(_gone_through(caller, what, loader, 0), 1):
        _check_batch(batch, f"batch {number} of {what}", None, caller)
        labels = _labels(batch)
        if labels is not None and labels.numel():
            largest = max(largest, int(labels.max()))
        if labels is not None and is_mask and (others := labels[labels < IGNORED_IN_MASKS]).numel():
            below = max(below, int(others.max()))
        if time.monotonic() - asked_at > PATIENCE_SECONDS:
            asked_at = math.inf
            warnings.warn(
                f"{caller}: {what} is gone through to count its batches and classes, {number:,} batches so far. It is "
                "not, and need not end, where its data set has a length and, with labels, `classes`.",
                stacklevel=4,
            )
    if is_mask and largest == IGNORED_IN_MASKS and below < IGNORED_IN_MASKS - 1:
        raise ValueError(
            f"{caller}: masks must hold classes, got {IGNORED_IN_MASKS} above {below} in {what}, which often marks "
            f"what is to be ignored. Mark that by {IGNORED}, or give the data set its `classes`."
        )
    return first, number, largest + 1 if is_labelled else None


def _digest(batches: list[Batch], *, content: bool = True) -> str:
    """Of all that they hold; without `content` of what is the same whichever examples are drawn."""
    digest = hashlib.sha256()
    for leaf in tensors_of(batches):
        digest.update(f"{leaf.dtype} {tuple(leaf.shape) if content else leaf.ndim}".encode())
        if content:
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------- what a user names
_NAMED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def named(spec: str, what: str, caller: str) -> Callable[..., Any]:
    """What `package.module:callable` names; the current directory is searched as well, last.

    Raises:
        ValueError: The name has another form, or does not import; the message says what was tried.
        TypeError: It is not callable.
    """
    if not _NAMED.fullmatch(spec):
        raise ValueError(f"{caller}: `{what}` must have the form package.module:callable, got {spec!r}.")
    module, _, attribute = spec.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module may raise anything when it is imported
        first = module.partition(".")[0]
        taken = f" {first!r} is a package of this library: give your module another name."
        raise ValueError(
            f"{caller}: `{what}` must be importable, got {type(error).__name__}: {error}, for {attribute!r} of the "
            f"module {module!r}. Tried the installed packages and the current directory."
            + (taken if first in ("common", "data", "papers", "reproduce") else "")
        ) from error
    if not callable(found):
        raise TypeError(f"{caller}: `{what}` must be callable, got {_told(found)} for {spec}.")
    return found


def call_named(spec: str, what: str, caller: str, options: Mapping[str, Any] = {}) -> Any:
    """What the user's callable returns.

    Raises:
        ValueError: It cannot be had, or fails.
        TypeError: It is not callable.
    """
    function = named(spec, what, caller)
    try:
        return function(**options)
    except Exception as error:
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(
            f"{caller}: {spec} must work when called as {spec.partition(':')[2]}({given}), got {type(error).__name__}: "
            f"{error}"
        ) from error


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of that name."""
    try:
        return name in inspect.signature(function).parameters
    except ValueError:  # some that are written in C do not tell
        return False


def _told(value: object) -> str:
    length = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return type(value).__name__ + length
