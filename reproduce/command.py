"""What every command shares: presets, options as text, progress, and how it ends."""

import ast
import json
import os
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, TextIO, TypeVar

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.record import Run, open_run
from common.types import DerivativeError

Config = TypeVar("Config")
INTERRUPTED = 130  # the shell's own status for Ctrl-C
TRACEBACK = "LEARNED_INIT_TRACEBACK"
"""The variable that, set to anything, has a user's mistake end in its traceback, as a bug does."""
MADE_HERE = ("digits", "noise", "pydoc", "stdlib", "embedded", "reversed")
"""Data that no network is asked for."""
GO_ON = "Interrupted. The same command with --output and the run folder named above goes on from here."
NOTHING = "Interrupted. Nothing was written."


def parse(presets: Mapping[str, Config], description: str, args: list[str] | None = None) -> Config:
    """`--preset NAME` chooses where the other options' defaults come from; every other option overrides it."""
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="quick")
    chosen, _ = chooser.parse_known_args(args)
    # An unknown preset goes on to tyro, whose message lists the ones there are.
    default = presets.get(chosen.preset, presets["quick"])
    return tyro.cli(type(default), default=default, args=args, description=description)


def value_of(text: str) -> Any:
    """JSON or a Python literal, lists as tuples; a number ("inf" too); or else the text itself."""
    for read in (json.loads, ast.literal_eval, float):
        try:
            return _tuples(read(text))
        except (ValueError, SyntaxError):
            continue
    return text


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(part) for part in value)
    return {key: _tuples(part) for key, part in value.items()} if isinstance(value, dict) else value


def options_of(texts: Iterable[str], caller: str, form: str = "key=value") -> dict[str, Any]:
    """Options as they are typed, taken apart.

    Args:
        texts: One `key=value` each.
        caller: For messages.
        form: What each must read: every key has as many dots as this one's.

    Raises:
        ValueError: Another form, or a key twice.
    """
    options: dict[str, Any] = {}
    for option in texts:
        key, _, text = option.partition("=")
        names = key.split(".")
        is_form = len(names) == form.count(".") + 1 and all(map(str.isidentifier, names)) and text
        if not is_form or key in options:
            why = "given twice" if key in options else "as in gamma=10"
            raise ValueError(f"{caller}: an option must read {form}, each key once, got {option!r} ({why}).")
        options[key] = value_of(text)
    return options


def begin(experiment: str, config: Any, console: Console) -> Run:
    """The run folder, new or resumed.

    The numbers in it do not depend on where data and folder are, nor on `quiet`, nor on how many `processes` share the
    work (a run that was cut off for want of memory goes on with fewer), nor on the run `beside` that has some of them.
    """
    free = {"data_dir": None, "output": None, "quiet": False, "processes": 1}
    settings = {name: free.get(name, value) for name, value in asdict(config).items() if name != "beside"}
    folder = open_run(experiment, settings, seed=0, output=config.output)
    hub = "; from the hub this may take a minute the first time" if may_ask_hub(config.data) else ""
    console.print(f"Loading data ({config.data}){hub}.", markup=False)
    return folder


def may_ask_hub(data: str) -> bool:
    """Whether data of that name may come from the Hugging Face hub: no folder, nothing made here, no user's loaders.

    Example:
        >>> [may_ask_hub(name) for name in ("auto", "cifar10", "hub:mnist", "digits", "my.data:make")]
        [True, True, True, False, False]
    """
    name = data.removeprefix("hub:")
    is_user = name == data and ":" in data
    return not (is_user or data in MADE_HERE or os.path.isdir(name))


def make_progress(*, quiet: bool) -> Progress:
    """Work done and time left, on standard error so that the table can be piped."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )


def out_of_memory(error: Exception) -> str | None:
    """What to do about it in one line, where the error is for want of memory."""
    # the CPU's allocator has no type of its own
    if not (isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)):
        return None
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return (
        f"the memory must hold the computation, got: {said}. Take smaller batches (--help names the options that say "
        "how large they are), fewer --processes where there are several, or a smaller model."
    )


def mistake_of(error: Exception) -> str | None:
    """One sentence for what a user can mend; None for a bug, which is for its traceback to tell.

    None for everything where the variable LEARNED_INIT_TRACEBACK is set.
    """
    if os.environ.get(TRACEBACK):
        return None
    is_mistake = isinstance(error, (ValueError, TypeError, OSError, DerivativeError))
    return out_of_memory(error) or (str(error) if is_mistake else None)


def tell_warnings() -> None:
    """From now on, a UserWarning is its sentence alone, without the line of code that it comes from."""
    console, show = Console(stderr=True, soft_wrap=True, highlight=False), warnings.showwarning

    def tell(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and file is None:
            console.print(f"warning: {message}", markup=False, style="yellow")
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = tell


def end_well(main: Callable[[], object], *, interrupted: str = GO_ON) -> None:
    """Run a command; a user's mistake ends in one sentence, not in a traceback, Ctrl-C in the shell's own status.

    Bugs of ours that raise a ValueError or a TypeError end in a sentence too. With the variable LEARNED_INIT_TRACEBACK
    set, and not empty, whatever was raised shows its traceback.

    Args:
        main: The command.
        interrupted: What is said after Ctrl-C.
    """
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        with warnings.catch_warnings():
            tell_warnings()
            main()
    except KeyboardInterrupt:
        console.print(interrupted, markup=False)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if (sentence := mistake_of(error)) is None:
            raise
        console.print(f"error: {sentence}", markup=False, style="red")
        sys.exit(2)
