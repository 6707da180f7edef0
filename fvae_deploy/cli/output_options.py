"""The options of what is written, and how an option is declared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from fvae_deploy.errors import UsageError
from fvae_deploy.stream.options import LATENT_DTYPE, LATENT_DTYPES, ROUNDINGS

OUTPUT = "Output"


def choice(*flags: str, names: Callable[[], Sequence[str]], **rest: Any) -> Any:
    """Return an option that accepts one of some names, with completion."""

    def check(value: str | None) -> str | None:
        if value is not None and value not in names():
            raise UsageError(f"expected {flags[0]} as one of {', '.join(names())}, found {value!r}")
        return value

    return typer.Option(
        *flags,
        metavar="|".join(names()),
        autocompletion=lambda: list(names()),
        callback=check,
        **rest,
    )


@dataclass(frozen=True)
class Common:
    """An option that many commands share: the field of RunOptions it sets, type and default."""

    field: str
    kind: Any
    default: Any


OUTPUT_OPTIONS = {
    "dtype": Common(
        "dtype",
        Annotated[
            str,
            choice(
                "--dtype",
                names=lambda: ("int16", "float32"),
                help="Voxel type of the output.",
                rich_help_panel=OUTPUT,
            ),
        ],
        "int16",
    ),
    "rounding": Common(
        "rounding",
        Annotated[
            str,
            choice(
                "--rounding",
                names=lambda: ROUNDINGS,
                help="How int16 values are made; truncate goes towards zero, as published scripts "
                "do.",
                rich_help_panel=OUTPUT,
            ),
        ],
        "nearest",
    ),
    "pyramid": Common(
        "pyramid",
        Annotated[
            bool,
            typer.Option(
                "--pyramid",
                help="Write a .zarr output with coarser levels for viewers.",
                rich_help_panel=OUTPUT,
            ),
        ],
        False,
    ),
    "latent_dtype": Common(
        "latent_dtype",
        Annotated[
            str | None,
            choice(
                "--latent-dtype",
                names=lambda: LATENT_DTYPES,
                help="How latents are stored; the error that it adds is measured. "
                f"[default: {LATENT_DTYPE}, not measured]",
                rich_help_panel=OUTPUT,
            ),
        ],
        None,
    ),
    "max_error": Common(
        "max_error",
        Annotated[
            float | None,
            typer.Option(
                "--max-error",
                min=0,
                help="Store residuals too, so that no decoded voxel is further off, in HU; 0 is "
                "lossless.",
                rich_help_panel=OUTPUT,
            ),
        ],
        None,
    ),
    "no_residual": Common(
        "no_residual",
        Annotated[
            bool,
            typer.Option(
                "--no-residual",
                help="Decode the latents alone, without the bound of --max-error.",
                rich_help_panel=OUTPUT,
            ),
        ],
        False,
    ),
    "resume": Common(
        "resume",
        Annotated[
            bool,
            typer.Option(
                "--resume",
                help="Continue an interrupted run, and skip outputs that exist.",
                rich_help_panel=OUTPUT,
            ),
        ],
        False,
    ),
    "overwrite": Common(
        "overwrite",
        Annotated[
            bool,
            typer.Option(
                "--overwrite",
                help="Replace outputs that exist.",
                rich_help_panel=OUTPUT,
            ),
        ],
        False,
    ),
}
