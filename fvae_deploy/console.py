"""What the command line shows: progress, tables, summaries. rich is imported on use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from fvae_deploy.export.generator import GeneratorManifest
    from fvae_deploy.export.known import KnownModel
    from fvae_deploy.export.manifest import Manifest


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
    from fvae_deploy.report import summary, write_json

    if path:
        write_json(report, path)
    if not quiet:
        print(f"{report['output']}: {summary(report)}")


def show(renderable: Any) -> None:
    """Print a rich table, plainly where the output is no terminal."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 110).print(renderable)


def parity_table(manifest: Manifest) -> Table:
    """Lay out the parity that the export measured."""
    from rich.table import Table

    table = Table(title=f"parity of {manifest.name} with float32 torch, measured at export")
    for column in ("engine", "precision", "latent max (deviations)", "mean HU", "max HU"):
        table.add_column(column)
    for row in manifest.parity:
        numbers = (f"{row.latent_max:.1e}", f"{row.hu_mean:.2g}", f"{row.hu_max:.2g}")
        table.add_row(row.engine, row.precision, *numbers)
    return table


def noise_table(manifest: GeneratorManifest) -> Table:
    """Lay out a generator's parity that the export measured."""
    from rich.table import Table

    table = Table(title=f"one step of {manifest.name} against float32 torch, measured at export")
    for column in ("engine", "precision", "mean error (deviations)", "max error"):
        table.add_column(column)
    for row in manifest.parity:
        table.add_row(row.engine, row.precision, f"{row.mean:.1e}", f"{row.max:.1e}")
    return table


def models_table(known: Iterable[KnownModel]) -> Table:
    """Lay out the published models that fvae knows."""
    from rich.table import Table

    table = Table(
        title="published models (hub ids as their authors give them, not downloaded here)"
    )
    for column in ("name", "weights", "voxels a cell", "channels", "HU as", "window", "licence"):
        table.add_column(column, overflow="fold")
    for model in known:
        low, high = model.model_range
        table.add_row(
            model.name,
            model.hub or "their own checkout: docs/any-vae.md",
            f"{model.temporal}x{model.spatial}x{model.spatial}",
            str(model.latent_channels),
            f"{low:g} to {high:g}",
            str(model.window or "-"),
            model.licence.partition(":")[0],
        )
    return table


def bench_table(rows: list[dict[str, Any]]) -> Table:
    """Lay out the rows of a benchmark."""
    from rich.table import Table

    table = Table(title=f"encode and decode, slices of {'x'.join(map(str, rows[0]['slice']))}")
    for column in ("engine", "precision", "slices/s", "GFLOP/s", "ceiling"):
        table.add_column(column)
    memory = ["peak MiB", "GPU MiB"] if any(row["peak_gpu_mib"] for row in rows) else ["peak MiB"]
    for column in (*memory, "× peer", "error z mean, max", "error x mean, max"):
        table.add_column(column)
    for row in rows:
        times, share = row["times_reference"], row["share_of_ceiling"]
        errors = [
            "-"
            if row[f"{direction}_error_max"] is None
            else f"{row[f'{direction}_error_mean']:.1e}, {row[f'{direction}_error_max']:.1e}"
            for direction in ("encode", "decode")
        ]
        table.add_row(
            row["engine"],
            row["precision"],
            f"{row['slices_per_second']:.3g}",
            f"{row['gflop_per_second']:.0f}",
            "-" if share is None else f"{100 * share:.0f} %",
            *(f"{row[key]:.0f}" for key in ("peak_mib", "peak_gpu_mib")[: len(memory)]),
            f"{times:.2f}" if times else "-",
            *errors,
        )
    return table


def scans_table(found: dict[str, Any]) -> Table:
    """Lay out what became of many scans."""
    from rich.table import Table

    counts = f"{found['done']} done, {found['passed']} there before, {found['failed']} failed"
    table = Table(title=f"{found['command']}: {counts} in {found['seconds']:.1f} s")
    for column in ("scan", "slices", "seconds", "slices/s", "peak MiB", ""):
        table.add_column(column, overflow="fold")
    for scan in found["scans"]:
        name = Path(scan["ct"]).name
        if "report" in scan:
            of = scan["report"]
            peak = of["memory"]["beyond_baseline_bytes"] >> 20
            numbers = (
                of["volume"]["slices"],
                of["seconds"]["total"],
                of["slices_per_second"],
                peak,
            )
            table.add_row(name, *(f"{n:.4g}" for n in numbers), "done")
        else:
            table.add_row(name, *4 * ["-"], scan.get("error", "there before"))
    return table
