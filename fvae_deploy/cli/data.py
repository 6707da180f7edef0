"""The commands that make data: augment, phantom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import ENGINE_OPTIONS, Overwrite, Report
from fvae_deploy.errors import UsageError
from fvae_deploy.parse import voxels
from fvae_deploy.stream.options import RunOptions

app = typer.Typer(cls=Verbs)
FINDINGS = "Adding findings"
AddFindings = Annotated[
    list[str] | None,
    typer.Option(
        "--add-findings",
        metavar="LESION",
        help="Instead of reconstructions, add cases with a lesion drawn into the CT, in words: "
        "'nodule 20mm'; repeatable. --model is then a generator.",
        rich_help_panel=FINDINGS,
    ),
]
Organs = Annotated[
    Path | None,
    typer.Option(
        "--organs",
        help="Folder of organ labels, named as the cases. [default: the dataset's labels if they "
        "name the lungs, else TotalSegmentator finds them]",
        rich_help_panel=FINDINGS,
    ),
]
FindingClass = Annotated[
    str | None,
    typer.Option(
        "--finding-class",
        help="Class of the lesions in dataset.json, new or existing. [default: the finding's name]",
        rich_help_panel=FINDINGS,
    ),
]
Guidance = Annotated[
    float,
    typer.Option(
        "--guidance",
        help="Above 1, lesions are drawn more strongly, at twice the cost.",
        rich_help_panel=FINDINGS,
    ),
]
FindingSeed = Annotated[
    int,
    typer.Option(
        "--seed", min=0, help="Random seed of places and noise.", rich_help_panel=FINDINGS
    ),
]


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
    drawn = f"{output}: {size[2]} slices of {size[0]}x{size[1]}"
    terminal.print(drawn if patient is None else f"{drawn}. Report: {who.report()}")


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
    add_findings: AddFindings = None,
    organs: Organs = None,
    finding_class: FindingClass = None,
    guidance: Guidance = 1.0,
    seed: FindingSeed = 0,
    report: Report = None,
) -> None:
    """Add reconstructed images, or CTs with added findings, to an nnU-Net dataset.

    To continue an interrupted run, run the same command again.

    Example: `fvae augment --nnunet Dataset001_Liver -o Dataset101_LiverFvae`
    """
    if add_findings:
        if instead:
            raise UsageError(
                "expected --instead or --add-findings, found both: leave one of them out"
            )
        given = {"findings": add_findings, "organs": organs, "finding_class": finding_class}
        how = {"guidance": guidance, "seed": seed}
        _add_findings(nnunet, output, options, terminal, report, given, how)
        return
    unused = {
        "organs": organs is not None,
        "finding-class": finding_class is not None,
        "seed": seed != 0,
        "guidance": guidance != 1,
    }
    for name, given_too in unused.items():
        if given_too:
            raise UsageError(
                f"expected --{name} with --add-findings, found no finding to add: leave it out"
            )
    from fvae_deploy.batch.nnunet import augment as run

    with terminal.progress_bars({"augment": "images"}) as begin:
        result = run(nnunet, output, options, instead=instead, progress=begin)
    terminal.report(result, report)
    terminal.print(
        f"{output}: {result['cases']} training cases, {result['reconstructed']} images "
        f"reconstructed in {result['seconds']:.1f} s"
    )


def _add_findings(
    nnunet: Path,
    output: Path,
    options: RunOptions,
    terminal: Terminal,
    report: Path | None,
    given: dict[str, Any],
    how: dict[str, Any],
) -> None:
    """Add cases with findings."""
    from fvae_deploy.batch.added_findings import FindingOptions, add_findings
    from fvae_deploy.generation.options import GenerationOptions

    wanted, sampling = FindingOptions(**given), GenerationOptions(check=True, **how)
    with terminal.progress_bars({"augment": "cases"}) as begin:
        result = add_findings(
            nnunet, output, options, wanted, sampling, say=terminal.say, progress=begin
        )
    terminal.report(result, report)
    classes = ", ".join(f"{name} ({number})" for name, number in result["classes"].items())
    terminal.print(
        f"{output}: {result['cases']} training cases, {result['with_findings']} of them with "
        f"findings as {classes}, {len(result['left_out'])} left out"
    )
