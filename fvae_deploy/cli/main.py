"""The command line: parse, call, print, exit code. Everything heavy is imported on use."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fvae_deploy.cli import data as makers
from fvae_deploy.cli import deploy as gpu
from fvae_deploy.cli import kernels as smithy
from fvae_deploy.cli import networks as workbench
from fvae_deploy.cli import serve as serving
from fvae_deploy.cli.batch import are_many, run_many
from fvae_deploy.cli.console import finish, progress_bar, show
from fvae_deploy.cli.options import (
    CT,
    AnyRange,
    CTs,
    Debug,
    Device,
    Dtype,
    Engine,
    Memory,
    Model,
    NumbersFile,
    Precision,
    Protocol,
    Quiet,
    Ray,
    ReportFile,
    Resume,
    Series,
    StepFrames,
    Verbs,
    Version,
)
from fvae_deploy.errors import FvaeError, UsageError
from fvae_deploy.parse import slice_range
from fvae_deploy.volume.dicomweb import at_hand, is_remote

app = typer.Typer(
    cls=Verbs,
    name="fvae",
    help="Run frozen foundation VAEs on CT: exact, fast, in bounded memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _root(version: Version = False) -> None:
    """Hold the options that stand before the verb."""


@app.command()
def encode(
    ct: CTs,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Latent store to make: .zarr; of many, a folder.")
    ],
    model: Model = "tiny",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    device: Device = "cpu",
    protocol: Protocol = None,
    memory: Memory = None,
    step: StepFrames = None,
    series: Series = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what a stopped run left.")
    ] = False,
    any_range: AnyRange = False,
    ray: Ray = None,
    run_report: ReportFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Encode a CT into a small latent store, or many into a folder of them.

    Example: `fvae encode ct.nii.gz -o ct.zarr --memory 2GiB`; many: `fvae encode scans -o latents`
    """
    options: dict[str, Any] = {
        "model": model,
        "engine": engine,
        "precision": precision,
        "device": device,
        "protocol": protocol,
        "memory": memory,
        "k": step,
        "any_range": any_range,
    }
    if are_many(ct, output):
        run_many("encode", ct, output, ".zarr", options, resume, ray, run_report, quiet)
        return
    if not output.name.endswith(".zarr"):
        raise UsageError(f"expected an output named .zarr, found {output.name}")
    if ray is not None:
        raise UsageError("expected many scans with --ray, found one: leave --ray out")
    from fvae_deploy.api import encode as run
    from fvae_deploy.volume.open import open_volume

    with at_hand(ct, output) as (source, target):
        reader = open_volume(source, series)
        with progress_bar(reader.geometry.shape[2], "encode", quiet) as advance:
            report = run(reader, target, resume=resume, progress=advance, **options)
    finish(report, run_report, quiet)


@app.command()
def decode(
    latents: Annotated[Path, typer.Argument(help="A latent store made by fvae encode.")],
    output: Annotated[Path, typer.Option("--output", "-o", help=".nii, .nii.gz or .zarr.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="[default: the one the store names]")
    ] = None,
    engine: Engine = "auto",
    precision: Precision = "fp32",
    device: Device = "cpu",
    memory: Memory = None,
    slices: Annotated[
        str | None, typer.Option("--slices", help="Only slices a:b, as 100:140.")
    ] = None,
    dtype: Dtype = "int16",
    resume: Resume = False,
    run_report: ReportFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Decode a latent store, or some of its slices, to a CT in HU.

    Example: `fvae decode ct.zarr -o crop.nii.gz --slices 100:140`
    """
    from fvae_deploy.api import decode as run
    from fvae_deploy.storage.latents import LatentReader

    wanted = slice_range(slices) if slices else None
    total = wanted[1] - wanted[0] if wanted else LatentReader(latents).info.slices
    with progress_bar(total, "decode", quiet) as advance:
        report = run(
            latents,
            output,
            model=model,
            engine=engine,
            precision=precision,
            device=device,
            memory=memory,
            slices=wanted,
            dtype=dtype,
            resume=resume,
            progress=advance,
        )
    finish(report, run_report, quiet)


@app.command()
def reconstruct(
    ct: CTs,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help=".nii, .nii.gz, .zarr, .dcm (slices); of many, a folder."
        ),
    ],
    model: Model = "tiny",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    device: Device = "cpu",
    protocol: Protocol = None,
    memory: Memory = None,
    step: StepFrames = None,
    series: Series = None,
    dtype: Dtype = "int16",
    any_range: AnyRange = False,
    resume: Resume = False,
    ending: Annotated[
        str, typer.Option("--ending", help="Of many: how results are named.")
    ] = ".nii.gz",
    ray: Ray = None,
    run_report: ReportFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Encode and decode a CT in one stream: HU in, HU out, no latent on disk.

    Example: `fvae reconstruct dicom_folder -o r.nii.gz`; many: `fvae reconstruct scans -o recons`
    """
    options: dict[str, Any] = {
        "model": model,
        "engine": engine,
        "precision": precision,
        "device": device,
        "protocol": protocol,
        "memory": memory,
        "k": step,
        "dtype": dtype,
        "any_range": any_range,
    }
    if are_many(ct, output):
        run_many("reconstruct", ct, output, ending, options, resume, ray, run_report, quiet)
        return
    if ray is not None:
        raise UsageError("expected many scans with --ray, found one: leave --ray out")
    if resume and is_remote(output):
        raise UsageError("expected an output on disk with --resume, found a URL: push it later")
    from fvae_deploy.api import reconstruct as run
    from fvae_deploy.volume.open import open_volume

    with at_hand(ct, output) as (source, target):
        reader = open_volume(source, series)
        with progress_bar(reader.geometry.shape[2], "reconstruct", quiet) as advance:
            report = run(reader, target, resume=resume, progress=advance, **options)
    report |= {"input": str(ct), "output": str(output)}
    finish(report, run_report, quiet)


@app.command()
def compare(
    original: CT,
    reconstruction: Annotated[Path, typer.Argument(help="A volume on the same grid.")],
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Organ label map: errors per organ.")
    ] = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Draw original, reconstruction and error.")
    ] = None,
    json: NumbersFile = None,
    ssim: Annotated[bool, typer.Option(help="SSIM takes most of the time.")] = True,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare two volumes: PSNR, SSIM, MAE, p99, maximum and bias in HU.

    Example: `fvae compare ct.nii.gz recon.nii.gz --labels organs.nii.gz --png errors.png`
    """
    from fvae_deploy.cli.tables import comparison_table
    from fvae_deploy.quality.fidelity import compare as run
    from fvae_deploy.stream.report import write_json
    from fvae_deploy.volume.open import open_volume

    whole = open_volume(original)
    whole.close()
    with progress_bar(whole.geometry.shape[2], "compare", quiet) as advance:
        found = run(
            original, reconstruction, labels=labels, picture=png, progress=advance, ssim=ssim
        )
    if json:
        write_json(found.to_dict(), json)
    if not quiet:
        show(comparison_table(found))
        if png:
            print(f"picture: {png}")


app.add_typer(makers.app)
app.add_typer(workbench.app)
app.add_typer(serving.app)
app.add_typer(gpu.app)
app.add_typer(smithy.app, name="kernels")


def main() -> None:
    """Run the command line; every FvaeError becomes one line and an exit code."""
    try:
        app()
    except FvaeError as error:
        _fail(error, str(error), error.exit_code)
    except MemoryError as error:
        _fail(error, "out of memory: lower --memory, or close other programs", 6)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _fail(error, f"{error.strerror or error}{where}: check the place and its space", 3)


def _fail(error: BaseException, message: str, code: int) -> None:
    if "--debug" in sys.argv:
        raise error
    print(f"fvae: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
