"""What the command line shows: progress, tables, summaries. rich is imported on use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


@contextmanager
def progress_bar(slices: int, verb: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar with slices/s and time left, on a terminal that is not quiet."""
    with progress_bars(quiet) as begin:
        yield begin(verb, slices)


@contextmanager
def progress_bars(
    quiet: bool, units: Mapping[str, str] = MappingProxyType({})
) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
    """Show a bar for each stage that is begun, on a terminal that is not quiet.

    Yields a function of a stage's name and length that returns its progress. Stages count
    slices, those named in `units` something else.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda stage, length: lambda done: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            unit = units.get(task.description, "slices")
            return Text(f"{unit}, {task.speed:.3g}/s" if task.speed else unit)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:

        def begin(stage: str, length: int) -> Callable[[int], None]:
            task = bar.add_task(stage, total=length)
            return lambda done: bar.advance(task, done)

        yield begin


def say(quiet: bool) -> Callable[[str], None]:
    """Make a function that tells what is being done, unless quiet."""

    def tell(message: str) -> None:
        if not quiet:
            print(message, file=sys.stderr)

    return tell


def finish(report: dict[str, Any], path: Path | None, quiet: bool) -> None:
    """Write the run report where one is wanted, and tell people the same."""
    from fvae_deploy.stream.report import summary, write_json

    if path:
        write_json(report, path)
    if not quiet:
        print(f"{report['output']}: {summary(report)}")


def show(renderable: Any) -> None:
    """Print a rich table, plainly where the output is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 110).print(renderable)
