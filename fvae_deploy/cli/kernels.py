"""The commands about Triton kernels: check, test, bench."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import Report
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.optional import require

if TYPE_CHECKING:
    from rich.table import Table

    from fvae_deploy.kernels.aot import Compiled
    from fvae_deploy.kernels.timing import Timed
    from fvae_deploy.kernels.trials import TrialResult

Row = TypeVar("Row")
app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    help="Check, test or time the Triton kernels.\n\nExample: `fvae kernels check`",
)

Chosen = Annotated[
    str | None, typer.Option("--kernel", "-k", help="Only these kernels, comma-separated.")
]
Every = Annotated[
    bool, typer.Option("--all", help="Try all block sizes of a launch, not only the default.")
]


@command(app, "Kernels")
def check(
    terminal: Terminal,
    target: Annotated[
        str, typer.Option("--target", "-t", help="GPU architectures, comma-separated.")
    ] = ",".join(CHIPS),
    kernel: Chosen = None,
    every: Every = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Number of processes. [default: one per core]"),
    ] = None,
    report: Report = None,
) -> None:
    """Compile all kernels ahead of time, and check registers and instructions. Needs no GPU.

    The exit code is 5 if a kernel spills registers, takes too much shared memory, or lacks the
    matrix instructions or wide loads of its chip. Bytes, operations and rooflines are counted,
    not measured.

    Example: `fvae kernels check --target sm_89 --kernel attention --json kernels.json`
    """
    require("torch", "triton", extra="kernels")
    from rich.console import Console
    from rich.progress import track

    from fvae_deploy.kernels.aot import check, planned
    from fvae_deploy.kernels.dispatch import KERNELS

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton warns unless it is set
    kernels = _parse_names(kernel, KERNELS, "kernels") or list(KERNELS)
    targets = _parse_names(target, CHIPS, "GPU architectures")
    if not targets:
        raise UsageError(
            f"expected GPU architectures among {', '.join(CHIPS)}, found none: name one"
        )
    work = planned(kernels, targets, every)
    compiling = check(work, jobs or os.cpu_count() or 1)
    screen = Console(stderr=True)
    shown = track(
        compiling, "compile", total=len(work), console=screen, disable=not screen.is_terminal
    )
    rows = list(shown)
    terminal.report([dataclasses.asdict(row) for row in rows], report)
    terminal.show(_compiled_table(rows))
    wrong = [row for row in rows if row.wrong]
    if wrong:
        first = wrong[0]
        raise EngineError(
            f"expected {len(rows)} kernels to pass, found {len(wrong)} that do not: "
            f"{first.kernel} ({first.spec}) for {first.target} {', '.join(first.wrong)}"
        )


@command(app, "Kernels", name="test")
def try_all(
    terminal: Terminal,
    kernel: Chosen = None,
    every: Every = False,
    report: Report = None,
) -> None:
    """Run all kernels on this machine's GPU and compare them with their references.

    The exit code is 5 if a kernel differs from its reference or does not run; the others are
    still tested.

    Example: `fvae kernels test`
    """
    require("torch", "triton", extra="kernels")
    import torch

    from fvae_deploy.kernels.dispatch import KERNELS, Kernels
    from fvae_deploy.kernels.optional import INTERPRETED
    from fvae_deploy.kernels.timing import require_gpu
    from fvae_deploy.kernels.trials import run_trials

    kernels = _parse_names(kernel, KERNELS, "kernels")
    if not INTERPRETED:
        require_gpu()
    device = "cpu" if INTERPRETED else "cuda"
    where = "interpreted" if INTERPRETED else torch.cuda.get_device_name()
    target = Kernels(device, "triton").target
    rows, fatal = _collect(run_trials(kernels, device, target, every))
    terminal.report([dataclasses.asdict(row) for row in rows], report)
    terminal.show(_trials_table(rows, where))
    if fatal:
        raise fatal
    failed = [row for row in rows if not row.passed]
    if failed:
        first = failed[0]
        raise EngineError(
            f"expected {len(rows)} trials to match their references, found {len(failed)} that do "
            f"not: {first.trial} in {first.type}{first.failure and ', '}{first.failure}"
        )


@command(app, "Kernels")
def bench(terminal: Terminal, kernel: Chosen = None, report: Report = None) -> None:
    """Time all kernels on this machine's GPU with all block sizes; compare with torch.

    The exit code is 5 if a kernel does not run; the others are still timed. The column "x torch"
    is the time that torch's operations (cuDNN, cuBLAS, scaled_dot_product_attention) take on the
    same tensors, divided by the time of the fastest block sizes. The JSON lists all block sizes.

    Example: `fvae kernels bench --json speeds.json`
    """
    require("torch", "triton", extra="kernels")
    import torch

    from fvae_deploy.kernels.dispatch import KERNELS
    from fvae_deploy.kernels.timing import require_gpu, timed

    kernels = _parse_names(kernel, KERNELS, "kernels")
    require_gpu()
    rows, fatal = _collect(timed(kernels))
    terminal.report([dataclasses.asdict(row) for row in rows], report)
    terminal.show(_timed_table(rows, torch.cuda.get_device_name()))
    if fatal:
        raise fatal
    failed = [(row, row.failures[0]) for row in rows if row.failures]
    if failed:
        row, failure = failed[0]
        raise EngineError(
            f"expected {len(rows)} launches to run with all blocks, found {len(failed)} that do "
            f"not: {row.kernel} ({row.spec}) with {failure}"
        )


def _collect(rows: Iterator[Row]) -> tuple[list[Row], EngineError | None]:
    """Return the rows up to the end or an EngineError, and that error or None."""
    collected = []
    try:
        for row in rows:
            collected.append(row)
    except EngineError as error:
        return collected, error
    return collected, None


def _parse_names(text: str | None, known: Collection[str], kind: str) -> list[str]:
    """Parse comma-separated names; raises UsageError for an unknown name."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(f"expected {kind} among {', '.join(known)}, found {name!r}")
    return names


def _compiled_table(rows: list[Compiled]) -> Table:
    """Return the table of the compiled kernels."""
    from rich.table import Table

    table = Table(title="compiled ahead of time, work and bytes counted; nothing was run")
    for column in ("kernel", "launch", "target"):
        table.add_column(column)
    for column in ("blocks", "registers", "spills", "shared KiB", "matrix", "128 bit"):
        table.add_column(column, justify="right")
    for column in ("GFLOP", "MB", "plain graph MB", "roofline ms"):
        table.add_column(column, justify="right")
    for c in rows:
        table.add_row(
            c.kernel,
            c.spec,
            c.target,
            str(c.choice),
            str(c.registers),
            str(c.spills),
            f"{c.shared / 1024:.0f}/{c.limit >> 10}",
            " ".join(f"{name} {n}" for name, n in c.matrix.items()) or "-",
            str(c.vector_loads),
            f"{c.flops / 1e9:.1f}",
            f"{c.moved / 1e6:.1f}",
            f"{c.plain / 1e6:.1f}",
            f"{c.roofline * 1e3:.3f}",
            style="red" if c.wrong else None,
        )
    return table


def _trials_table(results: list[TrialResult], where: str) -> Table:
    """Return the table of the largest errors, with a row per trial and a column per type."""
    from rich.table import Table

    table = Table(title=f"largest error, {where}")
    table.add_column("")
    rows: dict[str, dict[str, TrialResult]] = {}
    for result in results:
        rows.setdefault(result.trial, {})[result.type] = result
    types = list(dict.fromkeys(result.type for result in results))
    for name in types:
        table.add_column(name, overflow="fold")
    for trial, row in rows.items():
        cells = (row.get(name) for name in types)
        texts = ("-" if f is None else f.failure or f"{f.error:.1e}" for f in cells)
        style = None if all(f.passed for f in row.values()) else "red"
        table.add_row(trial, *texts, style=style)
    return table


def _timed_table(rows: list[Timed], card: str) -> Table:
    """Return the table of the fastest blocks of every launch, with the default and torch."""
    from rich.table import Table

    table = Table(title=f"{card}: fastest blocks, default blocks, and torch's operations")
    for column in ("kernel", "launch"):
        table.add_column(column)
    for column in ("ms", "default ms", "torch ms", "x torch"):
        table.add_column(column, justify="right")
    for column in ("TFLOP/s", "GB/s", "of the roofline", "blocks"):
        table.add_column(column, justify="right")
    table.add_column("failed", overflow="fold")
    for t in rows:
        best, default = t.best, t.tried[0].seconds
        if best is None or best.seconds is None:
            table.add_row(t.kernel, t.spec, *"-" * 8, "; ".join(t.failures), style="red")
            continue
        failed = "; ".join(
            [*t.failures, *([f"torch: {t.torch.failure}"] if t.torch.failure else [])]
        )
        table.add_row(
            t.kernel,
            t.spec,
            f"{best.seconds * 1e3:.3f}",
            f"{default * 1e3:.3f}" if default else "-",
            f"{t.torch.seconds * 1e3:.3f}" if t.torch.seconds else "-",
            f"{t.torch.seconds / best.seconds:.2f}" if t.torch.seconds else "-",
            f"{t.flops / best.seconds / 1e12:.1f}",
            f"{t.moved / best.seconds / 1e9:.0f}",
            f"{t.roofline / best.seconds:.0%}" if t.roofline else "-",
            str(best.blocks) if best.blocks else "-",
            failed,
            style="red" if t.failures else None,
        )
    return table
