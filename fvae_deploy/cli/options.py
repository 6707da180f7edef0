"""The arguments and options of the verbs, and how their texts are read."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fvae_deploy.errors import StoppedError, UsageError
from fvae_deploy.version import __version__


class TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP: from `kill`, a batch system, `docker stop`, a terminal that closes."""


class Verbs(TyperGroup):
    """The verbs; by itself typer ends in silence on Ctrl-C, Python at once on SIGTERM."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""

        def end(number: int, frame: object) -> None:
            raise TerminatedError(number)

        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores one
                    before[number] = signal.signal(number, end)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            error = StoppedError(
                "stopped; with --resume encode and generate go on where they were, decode and "
                "reconstruct where they were begun with it"
            )
            if isinstance(stop, TerminatedError):
                error.exit_code = 128 + stop.args[0]
            raise error from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def show_version(asked: bool) -> None:
    """Print the version and stop."""
    if asked:
        print(f"fvae {__version__}")
        raise typer.Exit


def writable(path: Path | None) -> Path | None:
    """Refuse a report that could not be written, or over a scan, before the work and not after."""
    if path and path.suffix != ".json":  # so it is neither input nor output
        raise UsageError(f"expected a report named .json, found {path}: rename it")
    if path and not path.absolute().parent.is_dir():
        raise UsageError(f"expected a folder for {path}, found none: create it")
    return path


Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
]
CT = Annotated[Path, typer.Argument(help="A .nii or .nii.gz file, a folder of DICOM, a .zarr.")]
CTs = Annotated[
    Path,
    typer.Argument(
        help="A .nii or .nii.gz file, a folder of DICOM, a .zarr, dicomweb+https://…; "
        "many: a folder, .csv, .jsonl."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", help="Many scans on Ray: its address, or local:N for N workers here."),
]
Model = Annotated[str, typer.Option("--model", "-m", help="Built-in name or bundle folder.")]
Engine = Annotated[
    str, typer.Option("--engine", "-e", help="auto, openvino, onnxruntime, torch or tensorrt.")
]
Precision = Annotated[
    str, typer.Option("--precision", "-p", help="fp32, bf16 or fp16; in tensorrt also int8 or fp8.")
]
Device = Annotated[
    str,
    typer.Option("--device", help="cpu; cuda, or tensorrt with onnxruntime, gpu with openvino."),
]
Protocol = Annotated[
    str | None,
    typer.Option(
        "--protocol",
        help="causal: one seamless stream; windows: 65 slices at a time [default: the model's].",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory", help="Budget beyond the libraries, as 700MiB [default: 60 % of what is free]."
    ),
]
StepFrames = Annotated[
    int | None,
    typer.Option("--step", min=1, help="Latent frames a step (4 slices each) [default: 1]."),
]
Series = Annotated[
    str | None, typer.Option("--series", help="DICOM SeriesInstanceUID, or a unique end of it.")
]
AnyRange = Annotated[
    bool, typer.Option("--any-range", help="Accept volumes with no value below 0 HU.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Keep slices in OUTPUT.partial as they come, and go on from those of a stopped run; "
        "of many, pass those that are there.",
    ),
]
Dtype = Annotated[str, typer.Option("--dtype", help="int16 (rounded) or float32.")]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--run-report", callback=writable, help="Write the facts of the run to this JSON."
    ),
]
NumbersFile = Annotated[
    Path | None, typer.Option("--json", callback=writable, help="Write the numbers here.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")]
