"""The verbs about Triton kernels: check, test, bench."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.kernels.chips import CHIPS
from fvae_deploy.options import Debug, NumbersFile, Verbs, require

if TYPE_CHECKING:
    from rich.table import Table

    from fvae_deploy.kernels.aot import Compiled

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    help="Check, test or time the Triton kernels.\n\nExample: fvae kernels check",
)

Chosen = Annotated[
    str | None, typer.Option("--kernel", "-k", help="Only these kernels, with commas between.")
]


@app.command()
def check(
    target: Annotated[
        str, typer.Option("--target", "-t", help="Chips, with commas between.")
    ] = ",".join(CHIPS),
    kernel: Chosen = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="All blocks that a launch may take, not the default alone."),
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="[default: one for every core]")
    ] = None,
    json_file: NumbersFile = None,
    debug: Debug = False,
) -> None:
    """Compile all kernels ahead of time, and read registers and instructions. Needs no GPU.

    Exit code 5 where a kernel spills, takes too much shared memory, or lacks the matrix
    instructions or wide loads of a chip. Bytes, operations and rooflines are counted.

    Example: fvae kernels check --target sm_89 --kernel attention --json kernels.json
    """
    require("torch", "triton", extra="kernels")
    from rich.console import Console
    from rich.progress import track

    from fvae_deploy.kernels.aot import check, planned
    from fvae_deploy.kernels.dispatch import KERNELS

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # said aloud: Triton warns else
    kernels, targets = _names(kernel) or list(KERNELS), _names(target)
    if not targets:
        raise UsageError(f"expected chips among {', '.join(CHIPS)}, found none: name one")
    work = planned(kernels, targets, every)
    compiling = check(work, jobs or os.cpu_count() or 1)
    screen = Console(stderr=True)
    shown = track(
        compiling, "compile", total=len(work), console=screen, disable=not screen.is_terminal
    )
    found = list(shown)
    _write(json_file, found)
    Console().print(_compiled_table(found))
    wrong = [c for c in found if c.wrong]
    if wrong:
        first = wrong[0]
        raise EngineError(
            f"expected {len(found)} sound kernels, found {len(wrong)} that are not: "
            f"{first.kernel} ({first.spec}) for {first.target} {', '.join(first.wrong)}"
        )


@app.command("test")
def try_all(debug: Debug = False) -> None:
    """Run all kernels on the GPU that is here against their references.

    Example: fvae kernels test
    """
    require("torch", "triton", extra="kernels")
    import torch
    from rich.console import Console
    from rich.table import Table

    from fvae_deploy.kernels.optional import INTERPRETED
    from fvae_deploy.kernels.timing import require_gpu
    from fvae_deploy.kernels.trials import TOLERANCE, TRIALS, worst

    if not INTERPRETED:
        require_gpu()
    device = "cpu" if INTERPRETED else "cuda"
    where = "interpreted" if INTERPRETED else torch.cuda.get_device_name()
    table, failed = Table(title=f"largest error, {where}"), []
    table.add_column("")
    for dtype in TOLERANCE:
        table.add_column(str(dtype).removeprefix("torch."))
    for trial in TRIALS:
        errors = {dtype: worst(trial, device, dtype) for dtype in TOLERANCE}
        table.add_row(trial.name, *(f"{e:.1e}" for e in errors.values()))
        failed += [trial.name for dtype, e in errors.items() if not e <= TOLERANCE[dtype]]
    Console().print(table)
    if failed:
        raise EngineError(
            f"expected kernels to equal their references, found: {failed[0]} does not"
        )


@app.command()
def bench(json_file: NumbersFile = None, debug: Debug = False) -> None:
    """Time all kernels on the GPU that is here, beside its roofline.

    Example: fvae kernels bench --json speeds.json
    """
    require("torch", "triton", extra="kernels")
    import torch
    from rich.console import Console
    from rich.table import Table

    from fvae_deploy.kernels.timing import timed

    found = list(timed())
    _write(json_file, found)
    table = Table(title=torch.cuda.get_device_name())
    for column in ("kernel", "launch", "ms", "TFLOP/s", "GB/s", "of the roofline"):
        table.add_column(column)
    for t in found:
        table.add_row(
            t.kernel,
            t.spec,
            f"{t.seconds * 1e3:.3f}",
            f"{t.flops / t.seconds / 1e12:.1f}",
            f"{t.moved / t.seconds / 1e9:.0f}",
            f"{t.roofline / t.seconds:.0%}" if t.roofline else "-",
        )
    Console().print(table)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _write(path: Path | None, rows: list[Any]) -> None:
    if path is not None:
        rows = [dataclasses.asdict(row) for row in rows]
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _compiled_table(found: list[Compiled]) -> Table:
    """Draw what was compiled; counted columns say so."""
    from rich.table import Table

    table = Table(title="compiled ahead of time, work and bytes counted; nothing was run")
    for column in ("kernel", "launch", "target"):
        table.add_column(column)
    for column in ("blocks", "registers", "spills", "shared KiB", "matrix", "128 bit"):
        table.add_column(column, justify="right")
    for column in ("GFLOP", "MB", "plain graph MB", "roofline ms"):
        table.add_column(column, justify="right")
    for c in found:
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
