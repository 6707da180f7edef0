"""The commands about deployment: build, triton, selftest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import Report
from fvae_deploy.cli.output_options import choice
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.optional import require

if TYPE_CHECKING:
    from rich.table import Table

    from fvae_deploy.export.to_tensorrt import Row

app = typer.Typer(cls=Verbs)
PACKAGES = ("tensorrt_rtx", "tensorrt")
Bundle = Annotated[str, typer.Argument(help="Built-in model or folder of a bundle.")]
Targets = Annotated[
    str,
    typer.Option("--target", "-t", help="GPU architectures, comma-separated, such as sm_86,sm_89."),
]
Precisions = Annotated[
    str,
    typer.Option(
        "--precision", "-p", help="One or more of fp32, fp16, bf16, int8, fp8, comma-separated."
    ),
]
Sizes = Annotated[
    list[str] | None,
    typer.Option(
        "--size",
        help="Slice size in pixels that the engines accept; may be repeated. [default: 512,512; "
        "for a generator, the size of its windows]",
    ),
]
Calibrate = Annotated[
    list[Path] | None,
    typer.Option("--calibrate", help="CT for the calibration of int8 and fp8; may be repeated."),
]
Package = Annotated[
    str,
    choice(
        "--package",
        names=lambda: PACKAGES,
        help="tensorrt_rtx builds without a GPU; tensorrt builds on the GPU.",
    ),
]


@command(app, "Make")
def build(
    model: Bundle,
    target: Targets,
    terminal: Terminal,
    precision: Precisions = "fp16",
    size: Sizes = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Also accept all smaller slices (slower engines).")
    ] = False,
    step: Annotated[int, typer.Option("--step", min=1, help="Latent frames per step.")] = 1,
    memory: Annotated[
        str, typer.Option("--memory", help="GPU memory budget for the choice of tiles.")
    ] = "8GiB",
    calibrate: Calibrate = None,
    package: Package = "tensorrt_rtx",
    report: Report = None,
) -> None:
    """Build TensorRT engines for a bundle, and store them beside it.

    The default package, tensorrt_rtx, needs no GPU.

    Example: `fvae build tiny --target sm_86,sm_89,sm_120 --precision fp16`
    """
    require("onnx", extra="tensorrt")
    from fvae_deploy.make.engines import make_engines, row_facts
    from fvae_deploy.stream.report import machine

    targets, precisions = (_names(text) for text in (target, precision))
    if not precisions:
        raise UsageError(
            f"expected --precision such as fp16,bf16, found {precision!r}: name at least one"
        )
    with terminal.progress_bars(dict.fromkeys(precisions, "parts")) as begin:
        rows = make_engines(
            model,
            targets,
            precisions,
            package=package,
            planes=[_plane(text) for text in size or ()],
            any_size=any_size,
            step=step,
            memory=memory,
            calibration=calibrate or (),
            begin=begin,
        )
    facts = {"machine": machine(), "model": model, "rows": [row_facts(row) for row in rows]}
    terminal.report(facts, report)
    terminal.show(_built_table(model, rows))


@command(app, "Deploy")
def triton(
    model: Bundle,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new repository.")],
    terminal: Terminal,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            help="GPU architecture of TensorRT engines to serve, such as sm_89. [default: serve "
            "with ONNX Runtime]",
        ),
    ] = "",
    precision: Annotated[
        str, typer.Option("--precision", "-p", help="Precision of the TensorRT engines.")
    ] = "fp16",
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    Example: `fvae triton tiny -o models`
    """
    require("onnx", extra="tensorrt")
    from fvae_deploy.export.to_triton import write_repository
    from fvae_deploy.make.engines import open_bundle

    path, manifest = open_bundle(model)
    names = write_repository(path, manifest, output, target=target, precision=precision)
    terminal.print(f"{output}: {', '.join(names)}; not tested with a Triton server")


@command(app, "Develop")
def selftest(
    terminal: Terminal,
    gpu: Annotated[
        bool, typer.Option("--gpu", help="Test on the GPU of this machine. [default: on the CPU]")
    ] = False,
    suites: Annotated[
        bool,
        typer.Option(help="Also run the tests in the checkout: engines, golden files, kernels."),
    ] = True,
    report: Report = None,
) -> None:
    """Test the engines on this machine: builds, parity, tiles, speed, and test suites.

    Engines that are not installed are skipped and listed. The exit code is 5 if a check fails, or
    with --gpu if there is no GPU.

    Example: `fvae selftest --gpu --json selftest.json`
    """
    from fvae_deploy.selftest import selftest as run

    results = run(gpu, suites=suites, progress=terminal.say)
    terminal.report(results, report)
    failed = [row["name"] for row in results["checks"] if row["passed"] is False]
    terminal.show(_checks_table(results["checks"]))
    if any("parity" in row and row["parity"] is None for row in results["checks"]):
        terminal.print(
            "A float32 result is compared with that of another engine, of which none is installed: "
            "pip install 'fvae-deploy[cpu]'"
        )
    if failed:
        raise EngineError(
            f"expected {len(results['checks'])} checks to pass, found that {', '.join(failed)} "
            "failed: please report it, with the JSON file that --json writes"
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _plane(text: str) -> tuple[int, int]:
    """Parse "512,512"; raises UsageError for anything else."""
    try:
        height, width = (int(n) for n in text.split(","))
    except ValueError:
        raise UsageError(
            f"expected --size as two numbers, found {text!r}: write it like 512,512"
        ) from None
    return height, width


def _built_table(model: str, rows: list[Row]) -> Table:
    """Return the table of the built engines."""
    from rich.table import Table

    first = rows[0].built
    table = Table(title=f"{model}: built with {first.package} {first.version}, not run")
    for column in ("part", "sizes", "target", "precision"):
        table.add_column(column)
    for column in ("MiB", "seconds", "peak MiB"):
        table.add_column(column, justify="right")
    table.add_column("sha256")
    for row in rows:
        table.add_row(
            row.built.part,
            row.built.variant,
            row.built.target,
            row.built.precision,
            f"{row.built.bytes / 2**20:.1f}",
            f"{row.seconds:.1f}",
            f"{row.peak_bytes / 2**20:.0f}",
            row.built.sha256[:12],
        )
    return table


def _checks_table(checks: list[dict[str, Any]]) -> Table:
    """Return the table of the checks."""
    from rich.table import Table

    table = Table(title="checks on this machine")
    for column in ("check", "passed", "seconds", "max HU", "encode slices/s", "decode slices/s"):
        table.add_column(column, overflow="fold")
    for row in checks:
        speed = row.get("throughput", {})
        passed = "yes" if row["passed"] else row.get("left_out") or row.get("error", "no")
        table.add_row(
            row["name"],
            passed,
            f"{row['seconds']:.1f}",
            f"{row['parity']['hu_max']:.2g}" if row.get("parity") else "-",
            *(
                f"{speed[direction]['slices_per_second']:.1f}" if speed else "-"
                for direction in ("encode", "decode")
            ),
        )
    return table
