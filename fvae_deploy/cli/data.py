"""The commands that make data: augment, phantom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import ENGINE_OPTIONS, Overwrite, Report
from fvae_deploy.parse import voxels
from fvae_deploy.stream.options import RunOptions

app = typer.Typer(cls=Verbs)


@command(app, "Make")
def phantom(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="CT to write: .nii, .nii.gz, .nrrd, .mha, .zarr or .dcm."
        ),
    ],
    terminal: Terminal,
    shape: Annotated[
        str, typer.Option("--shape", help="Number of voxels along x,y,z.")
    ] = "512,512,300",
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Also write the organ label map here.")
    ] = None,
    disease_mask: Annotated[
        Path | None,
        typer.Option("--disease-mask", help="Also write the label map of findings here."),
    ] = None,
    patient: Annotated[
        int | None,
        typer.Option(
            "--patient",
            min=0,
            help="Seed of another anatomy with other findings. [default: a standard one]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed of the noise.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a deterministic synthetic CT of a torso in HU.

    Example: `fvae phantom -o ct.nii.gz --shape 256,256,200 --labels organs.nii.gz`
    """
    from fvae_deploy.phantom.patient import STANDARD, varied
    from fvae_deploy.phantom.torso import write_phantom

    size = voxels(shape)
    who = STANDARD if patient is None else varied(patient)
    with terminal.progress_bar(size[2], "phantom") as advance:
        write_phantom(
            output,
            size,
            labels=labels,
            seed=seed,
            progress=advance,
            patient=who,
            findings=disease_mask,
            overwrite=overwrite,
        )
    if patient is not None:
        terminal.print(who.report())


@command(app, "Run", ("model", *ENGINE_OPTIONS, "hu_window", "published", "protocol"))
def augment(
    nnunet: Annotated[
        Path, typer.Option("--nnunet", help="nnU-Net dataset to read, named DatasetXXX_NAME.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Dataset to write, named DatasetYYY_NAME."),
    ],
    options: RunOptions,
    terminal: Terminal,
    instead: Annotated[
        bool,
        typer.Option("--instead", help="Write reconstructions only, without the originals."),
    ] = False,
    report: Report = None,
) -> None:
    """Add reconstructed images to an nnU-Net dataset as an additional training view.

    To continue an interrupted run, run the same command again.

    Example: `fvae augment --nnunet Dataset001_Liver -o Dataset101_LiverFvae`
    """
    from fvae_deploy.batch.nnunet import augment as run

    with terminal.progress_bars({"augment": "images"}) as begin:
        result = run(nnunet, output, options, instead=instead, progress=begin)
    terminal.report(result, report)
    terminal.print(
        f"{output}: {result['cases']} training cases, {result['reconstructed']} images "
        f"reconstructed in {result['seconds']:.1f} s"
    )
