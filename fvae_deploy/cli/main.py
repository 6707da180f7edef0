"""The command line: the verbs on scans; an error becomes one line and an exit code.

Large packages are imported on use.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli import data, deploy, generate, hub, kernels, networks, report, score, serve
from fvae_deploy.cli.batch import Spread, is_batch, only_scan, run_batch
from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import (
    CT,
    ENGINE_OPTIONS,
    Debug,
    DryRun,
    Extension,
    ListSeries,
    Overwrite,
    Quiet,
    Ray,
    Report,
    Verbose,
    Version,
    Workers,
    or_list,
)
from fvae_deploy.cli.streams import failure, make_lasting
from fvae_deploy.errors import FvaeError, UsageError
from fvae_deploy.parse import hu_window as parse_window
from fvae_deploy.parse import slice_range
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.dicomweb import is_remote, local_copies

app = typer.Typer(
    cls=Verbs,
    name="fvae",
    help="Run frozen foundation VAEs on CT: exact, fast, in bounded memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
INPUT = ("series", "level", "skip_unreadable", "any_range")
MODE = ("hu_window", "published", "protocol", "step")
STORED = ("dtype", "rounding", "pyramid")
OUTPUTS = ("resume", "overwrite")


@app.callback()
def _root(
    ctx: typer.Context,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
    version: Version = False,
) -> None:
    ctx.ensure_object(Terminal).set_up(quiet, verbose, debug)


@command(
    app,
    "Run",
    ("model", *ENGINE_OPTIONS, *MODE, *INPUT, "latent_dtype", "max_error", *OUTPUTS),
)
def encode(
    ct: CT,
    options: RunOptions,
    terminal: Terminal,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=or_list,
            help="Latent store to write (.zarr); batch mode: a folder. [required]",
        ),
    ] = None,
    list_: ListSeries = False,
    ray: Ray = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    report: Report = None,
) -> None:
    """Encode a CT into a small latent store, or a folder of CTs in batch mode.

    Example: `fvae encode ct.nii.gz -o ct.zarr --memory 2GiB`; batch: `fvae encode scans -o latents`
    """
    if list_:
        _list(ct, terminal, report)
        return
    assert output is not None  # or --list
    spread = Spread(ray, workers)
    if is_batch(ct, output):
        run_batch("encode", ct, output, ".zarr", options, terminal, spread, report, dry_run)
        return
    _run_one("encode", ct, output, options, terminal, spread, report, dry_run)


@command(
    app,
    "Run",
    ("model of the store", *ENGINE_OPTIONS, "published", *STORED, "no_residual", *OUTPUTS),
)
def decode(
    latents: Annotated[
        Path,
        typer.Argument(
            help="A latent store of fvae encode (.zarr); batch mode: a folder of them, or a list."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="CT to write: .nii, .nii.gz, .nrrd, .mha, .zarr or .dcm; batch mode: a folder.",
        ),
    ],
    options: RunOptions,
    terminal: Terminal,
    slices: Annotated[
        str | None, typer.Option("--slices", help="Decode only slices a to b-1, given as a:b.")
    ] = None,
    extension: Extension = ".nii.gz",
    ray: Ray = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    report: Report = None,
) -> None:
    """Decode a latent store, or some of its slices, to a CT in HU.

    Example: `fvae decode ct.zarr -o crop.nii.gz --slices 100:140`; batch: `fvae decode lat -o cts`
    """
    wanted, spread = slice_range(slices) if slices else None, Spread(ray, workers)
    if is_batch(latents, output):
        if wanted:
            raise UsageError(
                "expected one latent store with --slices, found a batch: leave --slices out"
            )
        run_batch("decode", latents, output, extension, options, terminal, spread, report, dry_run)
        return
    spread.check_one_scan(latents)
    from fvae_deploy import api
    from fvae_deploy.storage.latents import LatentReader

    latents = only_scan("decode", latents, output)
    if dry_run:
        terminal.finish(api.dry_run("decode", latents, output, options), report)
        return
    total = wanted[1] - wanted[0] if wanted else LatentReader(latents).info.slices
    with terminal.progress_bar(total, "decode") as advance:
        result = api.decode(latents, output, options, slices=wanted, progress=advance)
    terminal.finish(result, report)


@command(
    app,
    "Run",
    ("model", *ENGINE_OPTIONS, *MODE, *INPUT, *STORED, *OUTPUTS),
)
def reconstruct(
    ct: CT,
    options: RunOptions,
    terminal: Terminal,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=or_list,
            help="CT to write: .nii, .nii.gz, .nrrd, .mha, .zarr or .dcm (a folder of slices); "
            "batch mode: a folder. [required]",
        ),
    ] = None,
    list_: ListSeries = False,
    extension: Extension = ".nii.gz",
    ray: Ray = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    report: Report = None,
) -> None:
    """Encode and decode a CT in one stream: HU in, HU out, no latents on disk.

    Example: `fvae reconstruct dicom_folder -o r.nii.gz`; batch: `fvae reconstruct scans -o recons`
    """
    if list_:
        _list(ct, terminal, report)
        return
    assert output is not None  # or --list
    spread = Spread(ray, workers)
    if is_batch(ct, output):
        run_batch("reconstruct", ct, output, extension, options, terminal, spread, report, dry_run)
        return
    if options.resume and is_remote(output):
        raise UsageError(
            "expected an output on disk with --resume, found a URL: choose a local path"
        )
    _run_one("reconstruct", ct, output, options, terminal, spread, report, dry_run)


def _run_one(
    verb: str,
    ct: Path,
    output: Path,
    options: RunOptions,
    terminal: Terminal,
    spread: Spread,
    report: Path | None,
    dry_run: bool,
) -> None:
    """Encode or reconstruct one CT, which may come from a DICOMweb server."""
    spread.check_one_scan(ct)
    from fvae_deploy import api
    from fvae_deploy.volume.open import open_volume

    with local_copies(only_scan(verb, ct, output), output, push=not dry_run) as (source, target):
        if dry_run:
            result = api.dry_run(verb, source, target, options)
        else:
            run = api.encode if verb == "encode" else api.reconstruct
            reader = open_volume(source, options.reading)
            with terminal.progress_bar(reader.geometry.shape[2], verb) as advance:
                result = run(reader, target, options, progress=advance)
    terminal.finish(result | {"input": str(ct), "output": str(output)}, report)


def _list(ct: Path, terminal: Terminal, report: Path | None) -> None:
    """Print the DICOM series in a folder or archive."""
    from fvae_deploy.cli.tables import series_table
    from fvae_deploy.volume.dicom import dicom_source, list_series

    source = dicom_source(ct) if ct.exists() else None
    if source is None:
        raise UsageError(
            f"expected a folder or an archive of DICOM files to list, found {ct}: check the path"
        )
    series, remarks = list_series(source)
    facts = [one.facts() for one in series]
    terminal.report({"input": str(ct), "series": facts, "remarks": list(remarks)}, report)
    terminal.show(series_table(facts))
    for remark in remarks:
        terminal.print(remark)


Clipped = Annotated[
    str,
    typer.Option(
        "--hu-window",
        metavar="LOW:HIGH",
        help="Clip both volumes to these HU, whose width is the data range of PSNR and SSIM. Two "
        "numbers, or ct, soft, lung, bone or wide.",
    ),
]


@command(app, "Inspect")
def compare(
    original: Annotated[Path, typer.Argument(help="The original volume.")],
    reconstruction: Annotated[Path, typer.Argument(help="A volume on the same grid.")],
    terminal: Terminal,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help="Organ label map; adds the errors of each organ."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", help="Draw original, reconstruction and error to this file."),
    ] = None,
    hu_window: Clipped = "ct",
    ssim: Annotated[bool, typer.Option(help="Compute SSIM (slow).")] = True,
    names: Annotated[
        str, typer.Option("--names", help="Names of the two volumes in the picture.")
    ] = "Original,Reconstruction",
    overwrite: Overwrite = False,
    report: Report = None,
) -> None:
    """Compare two volumes: PSNR, SSIM, MAE, 99th percentile, maximum and bias in HU.

    Example: `fvae compare ct.nii.gz recon.nii.gz --labels organs.nii.gz --png errors.png`
    """
    from fvae_deploy.cli.tables import comparison_table
    from fvae_deploy.quality.fidelity import compare as run
    from fvae_deploy.volume.open import check_output, open_volume

    window = parse_window(hu_window)
    first, comma, second = names.partition(",")
    if not comma:
        raise UsageError(
            f"expected --names as two names, found {names!r}: write it like First,Second"
        )
    if png:
        check_output(png, overwrite=overwrite)
    whole = open_volume(original)
    whole.close()
    with terminal.progress_bar(whole.geometry.shape[2], "compare") as advance:
        found = run(
            original,
            reconstruction,
            labels=labels,
            picture=png,
            progress=advance,
            ssim=ssim,
            names=(first.strip(), second.strip()),
            hu_window=window,
        )
    terminal.report(found.to_dict(), report)
    terminal.show(comparison_table(found))
    _tell_window(reconstruction, window, terminal)
    if png:
        terminal.print(f"picture: {png}")


def _tell_window(reconstruction: Path, window: tuple[float, float], terminal: Terminal) -> None:
    """Say so if a reconstruction lacks some of the HU that it is compared in."""
    from fvae_deploy.storage.records import recorded

    low, high = recorded(reconstruction).get("hu_window", window)
    if low > window[0] or high < window[1]:
        terminal.print(
            f"{reconstruction} was made with the HU window {low:g}:{high:g}; voxels outside it "
            f"were clipped. Compare with --hu-window {low:g}:{high:g}"
        )


app.add_typer(report.app)
app.add_typer(score.app)
app.add_typer(generate.app)
app.add_typer(data.app)
app.add_typer(serve.app)
app.add_typer(networks.app)
app.add_typer(deploy.app)
app.add_typer(hub.app)
app.add_typer(
    kernels.app,
    name="kernels",
    rich_help_panel="Develop",
)


def main() -> None:
    """Run the command line; every FvaeError becomes one line and an exit code.

    A stdout that cannot be written never ends a run. It changes the exit code of one that is done.
    """
    make_lasting()
    terminal = Terminal()
    try:
        code = _run(terminal)
        if code == 0 and (failed := failure()) is not None:
            code, message = failed
            if message:
                _say(message)
    finally:
        terminal.close()
    sys.exit(code)


def _run(terminal: Terminal) -> int:
    """Run the command; return the exit code."""
    try:
        app(obj=terminal)
    except SystemExit as end:  # typer ends every command so
        if isinstance(end.code, str):
            raise
        return end.code or 0
    except (FvaeError, MemoryError, OSError) as error:
        if terminal.debug:
            raise
        message, code = _explain(error)
        _say(message)
        return code
    return 0


def _explain(error: FvaeError | MemoryError | OSError) -> tuple[str, int]:
    """Return the message and the exit code of an error."""
    if isinstance(error, FvaeError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "out of memory: lower --memory, or close other programs", 6
    where = f" ({error.filename})" if error.filename else ""
    remedy = "check that the path is writable and the disk is not full"
    return f"{error.strerror or error}{where}: {remedy}", 3


def _say(message: str) -> None:
    print(f"fvae: {' '.join(message.split())}", file=sys.stderr)


if __name__ == "__main__":
    main()
