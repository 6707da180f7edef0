"""Shows progress, summaries and reports on the command line. rich is imported on use."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fvae_deploy.errors import printable

LOGGER = logging.getLogger("fvae")
STDOUT = Path("-")  # as the name of a report


@dataclass
class Terminal:
    """The output of a command; one object per invocation of the command line."""

    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    stdout_taken: bool = False  # by a JSON report: everything else goes to stderr

    def set_up(self, quiet: bool, verbose: bool, debug: bool) -> None:
        """Apply the options of a command, in addition to those given before its name."""
        self.quiet, self.verbose = self.quiet or quiet, self.verbose or verbose
        self.debug = self.debug or debug
        if self.verbose:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
            self.close()
            LOGGER.addHandler(handler)
            LOGGER.setLevel(logging.DEBUG)

    def close(self) -> None:
        """Stop logging."""
        for handler in [*LOGGER.handlers]:
            LOGGER.removeHandler(handler)
        LOGGER.setLevel(logging.NOTSET)

    def say(self, message: str) -> None:
        """Print progress on stderr, unless quiet."""
        if not self.quiet:
            print(_lines(message), file=sys.stderr)

    def print(self, message: str) -> None:
        """Print a readable result, unless quiet."""
        if not self.quiet:
            print(_lines(message), file=sys.stderr if self.stdout_taken else sys.stdout)

    def show(self, renderable: Any) -> None:
        """Print a rich table, in a fixed width if the output is not a terminal, unless quiet."""
        if self.quiet:
            return
        from rich.console import Console

        stream = sys.stderr if self.stdout_taken else sys.stdout
        width = None if stream.isatty() or "COLUMNS" in os.environ else 110
        # Brackets and colons in cells are text, such as [cpu] in a remedy or a scan's name.
        console = Console(width=width, stderr=self.stdout_taken, markup=False, emoji=False)
        console.print(renderable)

    def report(self, content: Any, path: Path | None) -> None:
        """Write a JSON report to a file, or to stdout if `path` is "-"."""
        if path == STDOUT:
            self.stdout_taken = True
            print(json.dumps(content, indent=1))
        elif path is not None:
            from fvae_deploy.stream.report import write_json

            write_json(content, path)

    def finish(self, report: dict[str, Any], path: Path | None) -> None:
        """Write a run's report, and print its summary."""
        from fvae_deploy.stream.report import summary

        self.report(report, path)
        if "skipped" in report:
            self.print(f"{report['output']} exists: skipped")
        elif "dry_run" in report:
            self._show_plan(report)
        else:
            self.print(f"{report['output']}: {summary(report)}")

    def _show_plan(self, report: dict[str, Any]) -> None:
        from fvae_deploy.parse import show_bytes

        plans = report["plan"]
        plans = [plans] if "predicted_bytes" in plans else list(plans.values())
        peak = max(plan["predicted_bytes"] for plan in plans)
        budget = min(plan["budget_bytes"] for plan in plans)
        shape = "x".join(map(str, report["volume"]["shape"]))
        self.print(
            f"{report['output']}: {report['command']} of {shape} voxels with {report['engine']} "
            f"{report['precision']}\n"
            f"  tiles: {report['description']}\n"
            f"  predicted memory: {show_bytes(peak)} of a budget of {show_bytes(budget)}"
        )
        if "seconds_at_100_gflops" in report:
            seconds = report["seconds_at_100_gflops"]
            self.print(f"  arithmetic: {seconds:g} s at 100 GFLOP/s, without reading and writing")
        for remark in report.get("remarks", []):
            self.print(f"  {remark}")
        if report["output_exists"]:
            self.print("  the output exists: pass --overwrite to replace it, --resume to keep it")

    @contextmanager
    def progress_bar(self, slices: int, verb: str) -> Iterator[Callable[[int], None]]:
        """Show a bar with slices/s and the time left, on a terminal only, unless quiet."""
        with self.progress_bars() as begin:
            yield begin(verb, slices)

    @contextmanager
    def progress_bars(
        self, units: Mapping[str, str] = MappingProxyType({})
    ) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
        """Show a bar for each stage that begins, on a terminal only, unless quiet.

        Yields a function that takes a stage's name and length and returns its progress
        callback. `units` names what a stage counts, if not slices.
        """
        if self.quiet or not sys.stderr.isatty():
            yield lambda stage, length: lambda done: None
            return
        with _bars(units) as begin:
            yield begin


@contextmanager
def _bars(units: Mapping[str, str]) -> Iterator[Callable[[str, int], Callable[[int], None]]]:
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
        TextColumn("{task.description}", markup=False),
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


def _lines(message: str) -> str:
    """Return a message without control characters but its line breaks."""
    return "\n".join(map(printable, message.split("\n")))
