"""The options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fvae_deploy.cli.console import STDOUT
from fvae_deploy.cli.output_options import OUTPUT, OUTPUT_OPTIONS, Common, choice
from fvae_deploy.engines.base import ENGINES, PRECISIONS, offered
from fvae_deploy.errors import UsageError
from fvae_deploy.export.manifest import QUANTISED
from fvae_deploy.version import __version__

COMPUTE = "Model and engine"
INPUT = "Input"


def _report(path: Path | None) -> Path | None:
    """Return the path; raises UsageError, before any work, if no report can be written there."""
    if path is None or path == STDOUT:
        return path
    if path.suffix != ".json":  # so it can replace neither an input nor an output
        raise UsageError(f"expected a report ending in .json, or -, found {path}: rename it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"expected a folder for {path}, found none: create it")
    return path


def engine_pairs(text: str) -> list[tuple[str, str]]:
    """Parse "openvino:bf16,torch": engines with their precisions, fp32 where none is named.

    Raises UsageError for an unknown engine or precision.
    """
    pairs = []
    for item in text.split(","):
        engine, _, precision = item.strip().partition(":")
        if engine not in ENGINES:
            raise UsageError(
                f"expected --engines among {', '.join(ENGINES)}, found {engine!r}: name them, as "
                "openvino:fp32"
            )
        if (precision or "fp32") not in offered(engine):
            raise UsageError(
                f"expected a precision of {engine} among {', '.join(offered(engine))}, found "
                f"{precision!r}"
            )
        pairs.append((engine, precision or "fp32"))
    return pairs


def or_list(ctx: typer.Context, output: Path | None) -> Path | None:
    """Return the output; without one, the usage is shown unless --list is given."""
    if output is None and not ctx.params.get("list_"):
        ctx.fail("Missing option '--output' / '-o'.")
    return output


def _version(requested: bool) -> None:
    """Print the version and exit."""
    if requested:
        print(f"fvae {__version__}")
        raise typer.Exit


DEVICES = ("cpu", "cuda", "gpu", "tensorrt")
PROTOCOLS = ("causal", "windows")
SCHEDULERS = ("ddim", "dpmsolver++", "unipc")
STITCHES = ("joint", "reference")


def _model(default: str, environment: str | None) -> Any:
    return Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar=environment,
            help=f"Built-in model, folder of a bundle, or hf:OWNER/NAME. [default: {default}]",
            rich_help_panel=COMPUTE,
        ),
    ]


COMMON = {
    "model": Common("model", _model("tiny", "FVAE_MODEL"), None),
    "model of the store": Common("model", _model("the model that the store names", None), None),
    "generator": Common("model", _model("tiny-ldm", "FVAE_GENERATOR"), None),
    "engine": Common(
        "engine",
        Annotated[
            str,
            choice(
                "--engine",
                "-e",
                names=lambda: ("auto", *ENGINES),
                envvar="FVAE_ENGINE",
                help="Inference engine; auto takes the first one installed that supports "
                "--precision.",
                rich_help_panel=COMPUTE,
            ),
        ],
        "auto",
    ),
    "precision": Common(
        "precision",
        Annotated[
            str,
            choice(
                "--precision",
                "-p",
                names=lambda: (*PRECISIONS, *QUANTISED),
                envvar="FVAE_PRECISION",
                help="Numeric precision of the network. int8 needs a bundle from fvae export "
                "--calibrate; on a GPU, int8 and fp8 need engines from fvae build.",
                rich_help_panel=COMPUTE,
            ),
        ],
        "fp32",
    ),
    "device": Common(
        "device",
        Annotated[
            str,
            typer.Option(
                "--device",
                metavar="|".join(DEVICES),
                autocompletion=lambda: list(DEVICES),
                envvar="FVAE_DEVICE",
                help="cpu; cuda or cuda:N (NVIDIA GPU); gpu or another device of OpenVINO; "
                "tensorrt (ONNX Runtime).",
                rich_help_panel=COMPUTE,
            ),
        ],
        "cpu",
    ),
    "threads": Common(
        "threads",
        Annotated[
            int | None,
            typer.Option(
                "--threads",
                min=1,
                envvar="FVAE_THREADS",
                help="CPU threads of the engine. [default: all cores]",
                rich_help_panel=COMPUTE,
            ),
        ],
        None,
    ),
    "memory": Common(
        "memory",
        Annotated[
            str | None,
            typer.Option(
                "--memory",
                envvar="FVAE_MEMORY",
                help="Memory budget beyond the libraries, such as 700MiB. "
                "[default: 60 % of the free memory]",
                rich_help_panel=COMPUTE,
            ),
        ],
        None,
    ),
    "hu_window": Common(
        "hu_window",
        Annotated[
            str | None,
            typer.Option(
                "--hu-window",
                metavar="LOW:HIGH",
                help="HU that become the model's range: two numbers, ct (-1000:1000), soft "
                "(-175:250), lung, bone or wide (-1024:3071); others are clipped. [default: the "
                "model's]",
                rich_help_panel=COMPUTE,
            ),
        ],
        None,
    ),
    "published": Common(
        "published",
        Annotated[
            bool,
            typer.Option(
                "--published",
                help="Work as the published scripts do: --protocol windows and --rounding "
                "truncate.",
                rich_help_panel=COMPUTE,
            ),
        ],
        False,
    ),
    "protocol": Common(
        "protocol",
        Annotated[
            str | None,
            choice(
                "--protocol",
                names=lambda: PROTOCOLS,
                help="causal: one seamless stream; windows: 65 slices at a time. "
                "[default: the model's]",
                rich_help_panel=COMPUTE,
            ),
        ],
        None,
    ),
    "step": Common(
        "step",
        Annotated[
            int | None,
            typer.Option(
                "--step",
                min=1,
                help="Latent frames per step, of 4 slices each. [default: 1]",
                rich_help_panel=COMPUTE,
            ),
        ],
        None,
    ),
    "series": Common(
        "series",
        Annotated[
            str | None,
            typer.Option(
                "--series",
                help="SeriesInstanceUID of a DICOM series, or a unique end of it; UID#2 is its "
                "second part.",
                rich_help_panel=INPUT,
            ),
        ],
        None,
    ),
    "level": Common(
        "level",
        Annotated[
            int,
            typer.Option(
                "--level",
                min=0,
                help="Level of a multi-resolution Zarr store; 0 is the finest.",
                rich_help_panel=INPUT,
            ),
        ],
        0,
    ),
    "skip_unreadable": Common(
        "skip_unreadable",
        Annotated[
            bool,
            typer.Option(
                "--skip-unreadable",
                help="Leave out DICOM files that cannot be read, with a warning.",
                rich_help_panel=INPUT,
            ),
        ],
        False,
    ),
    "any_range": Common(
        "any_range",
        Annotated[
            bool,
            typer.Option(
                "--any-range",
                help="Accept values that are not HU.",
                rich_help_panel=INPUT,
            ),
        ],
        False,
    ),
    **OUTPUT_OPTIONS,
}
ENGINE_OPTIONS = ("engine", "precision", "device", "threads", "memory")

Version = Annotated[
    bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log details to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")]
CT = Annotated[
    Path,
    typer.Argument(
        help="A NIfTI, NRRD or MetaImage file, a folder of DICOM slices, a .zarr store, or "
        "dicomweb+https://…; batch mode: a folder of scans, or a list (.csv, .jsonl)."
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", help="Batch mode on Ray: address of a cluster, or local:N for N local workers."
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Batch mode in this many processes, each with a share of the cores. With --memory, "
        "the budget of each.",
    ),
]
Extension = Annotated[
    str, typer.Option("--extension", help="Batch mode: file extension of the outputs.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print the plan (tiles, memory, time) and stop.",
        rich_help_panel=OUTPUT,
    ),
]
ListSeries = Annotated[
    bool,
    typer.Option(
        "--list",
        help="Print the DICOM series in the input and stop.",
        rich_help_panel=INPUT,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--json",
        callback=_report,
        help="Write a JSON report to this file; - for stdout.",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = COMMON["overwrite"].kind
