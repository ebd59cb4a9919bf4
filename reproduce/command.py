"""What every command shares: presets, progress, and how it ends."""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TypeVar

import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.record import Run, open_run

Config = TypeVar("Config")
INTERRUPTED = 130  # the shell's own status for Ctrl-C


def parse(presets: Mapping[str, Config], description: str, args: list[str] | None = None) -> Config:
    """`--preset NAME` chooses where the other options' defaults come from; every other option overrides it."""
    chooser = ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", default="quick")
    chosen, _ = chooser.parse_known_args(args)
    # An unknown preset goes on to tyro, whose message lists the ones there are.
    default = presets.get(chosen.preset, presets["quick"])
    return tyro.cli(type(default), default=default, args=args, description=description)


def begin(experiment: str, config: Any, console: Console) -> Run:
    """The run folder, new or resumed; the numbers in it do not depend on where data and folder are, nor on `quiet`."""
    asked = asdict(replace(config, data_dir=None, output=None, quiet=False))
    folder = open_run(experiment, asked, seed=0, output=config.output)
    console.print(f"Loading data ({config.data}); from the hub this may take a minute the first time.")
    return folder


def make_progress(*, quiet: bool) -> Progress:
    """Work done and time left, on standard error so that the table can be piped."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=quiet,
        transient=True,
    )


def end_well(main: Callable[[], object]) -> None:
    """Run a command; a user's mistake ends in one sentence, not in a traceback, Ctrl-C in the shell's own status."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        main()
    except KeyboardInterrupt:
        console.print("Interrupted. The same command with --output and the run folder named above goes on from here.")
        sys.exit(INTERRUPTED)
    except (ValueError, TypeError, OSError) as error:
        console.print(f"error: {error}", markup=False, style="red")
        sys.exit(2)
