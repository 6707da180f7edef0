"""The verbs about GPUs: build, triton, selftest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fvae_deploy.cli.console import progress_bars, say, show
from fvae_deploy.cli.options import Debug, NumbersFile, Quiet, StepFrames, Verbs
from fvae_deploy.errors import EngineError, UsageError
from fvae_deploy.optional import require

if TYPE_CHECKING:
    from rich.table import Table

    from fvae_deploy.export.to_tensorrt import Row

app = typer.Typer(cls=Verbs)


@app.command()
def build(
    model: Annotated[str, typer.Argument(help="Built-in name or bundle folder.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="GPU architectures, as sm_86,sm_89,sm_120.")
    ],
    precision: Annotated[
        str, typer.Option("--precision", "-p", help="fp32, fp16, bf16, int8 or fp8, or several.")
    ] = "fp16",
    size: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            help="Slices, as 512,512; may be repeated [default: 512,512; a generator's windows].",
        ),
    ] = None,
    any_size: Annotated[
        bool, typer.Option("--any-size", help="Engines for all smaller slices, too; slower.")
    ] = False,
    step: StepFrames = 1,
    memory: Annotated[
        str, typer.Option("--memory", help="The GPU memory that tiles are planned for.")
    ] = "8GiB",
    calibrate: Annotated[
        list[Path] | None,
        typer.Option("--calibrate", help="For int8 and fp8: a CT; may be repeated."),
    ] = None,
    package: Annotated[
        str,
        typer.Option("--package", help="tensorrt_rtx (needs no GPU), or tensorrt on the GPU."),
    ] = "tensorrt_rtx",
    json_file: NumbersFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Build TensorRT engines of all parts beside the bundle, ahead of time. Needs no GPU.

    Example: `fvae build tiny --target sm_86,sm_89,sm_120 --precision fp16`
    """
    require("onnx")
    from fvae_deploy.make.engines import make_engines, row_facts
    from fvae_deploy.stream.report import machine, write_json

    planes = [_plane(text) for text in size or ()]
    targets, precisions = (
        [n.strip() for n in t.split(",") if n.strip()] for t in (target, precision)
    )
    if not precisions:
        raise UsageError(f"expected --precision as fp16,bf16, found {precision!r}: name one")
    with progress_bars(quiet, dict.fromkeys(precisions, "parts")) as begin:
        rows = make_engines(
            model,
            targets,
            precisions,
            package=package,
            planes=planes,
            any_size=any_size,
            step=step or 1,
            memory=memory,
            calibration=calibrate or (),
            begin=begin,
        )
    if json_file:
        content = {"machine": machine(), "model": model, "rows": [row_facts(r) for r in rows]}
        write_json(content, json_file)
    if not quiet:
        show(_built_table(model, rows))


@app.command()
def triton(
    model: Annotated[str, typer.Argument(help="Built-in name or bundle folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new repository.")],
    target: Annotated[
        str, typer.Option("--target", "-t", help="Serve the TensorRT engines built for sm_…")
    ] = "",
    precision: Annotated[str, typer.Option("--precision", "-p", help="Of those engines.")] = "fp16",
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server.

    Example: `fvae triton tiny -o models`
    """
    require("onnx")
    from fvae_deploy.export.to_triton import write_repository
    from fvae_deploy.make.engines import open_bundle

    path, manifest = open_bundle(model)
    names = write_repository(path, manifest, output, target=target, precision=precision)
    if not quiet:
        print(f"{output}: {', '.join(names)}; no server was tried")


@app.command()
def selftest(
    gpu: Annotated[
        bool, typer.Option("--gpu", help="On the GPU that is here; else on the CPU.")
    ] = False,
    suites: Annotated[
        bool, typer.Option(help="The checkout's tests too: contract, goldens, kernels.")
    ] = True,
    json_file: NumbersFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Build, compare, tile, time and test on this machine, and write one JSON of it.

    Engines that are not installed are left out, and named. Exit code 5 where there is no GPU, or
    a check does not pass.

    Example: `fvae selftest --gpu --json selftest.json`
    """
    from fvae_deploy.selftest import selftest as run
    from fvae_deploy.stream.report import write_json

    found = run(gpu, suites=suites, progress=say(quiet))
    if json_file:
        write_json(found, json_file)
    failed = [row["name"] for row in found["checks"] if row["passed"] is False]
    if not quiet:
        show(_checks_table(found["checks"]))
    if failed:
        raise EngineError(
            f"expected {len(found['checks'])} checks to pass, found that {', '.join(failed)} did "
            "not: send the JSON of --json as an issue"
        )


def _plane(text: str) -> tuple[int, int]:
    """Read "512,512"; raises UsageError for anything else."""
    try:
        height, width = (int(n) for n in text.split(","))
    except ValueError:
        raise UsageError(f"expected --size as 512,512, found {text!r}") from None
    return height, width


def _built_table(model: str, rows: list[Row]) -> Table:
    """Lay out what was built."""
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
    """Lay out what was checked."""
    from rich.table import Table

    table = Table(title="on this machine")
    for column in ("check", "passed", "seconds", "largest HU", "slices/s there", "and back"):
        table.add_column(column)
    for row in checks:
        speed = row.get("throughput", {})
        passed = "yes" if row["passed"] else row.get("left_out") or row.get("error", "no")
        table.add_row(
            row["name"],
            passed[:60],
            f"{row['seconds']:.1f}",
            f"{row['parity']['hu_max']:.2g}" if "parity" in row else "-",
            *(
                f"{speed[direction]['slices_per_second']:.1f}" if speed else "-"
                for direction in ("encode", "decode")
            ),
        )
    return table
