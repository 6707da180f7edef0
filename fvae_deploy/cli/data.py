"""The commands that make data: generate, augment, phantom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import (
    ENGINE_OPTIONS,
    SCHEDULERS,
    STITCHES,
    DryRun,
    Overwrite,
    Report,
    choice,
)
from fvae_deploy.errors import UsageError
from fvae_deploy.parse import voxels
from fvae_deploy.stream.options import RunOptions

if TYPE_CHECKING:
    from fvae_deploy.generation.options import GenerationOptions

app = typer.Typer(cls=Verbs)
SAMPLING = "Sampling"
Mask = Annotated[
    Path | None, typer.Option("--mask", help="Organ labels, numbered as by TotalSegmentator.")
]
Generated = Annotated[
    Path, typer.Option("--output", "-o", help=".nii, .nii.gz, .zarr or .dcm; with --jobs a folder.")
]
Findings = Annotated[
    str | None,
    typer.Option("--findings", help="Text, or a file that holds it. [default: a normal scan]"),
]
DiseaseMask = Annotated[
    Path | None,
    typer.Option("--disease-mask", help="Labels of findings, 1 to 18, on the grid of the mask."),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help='JSON for masks with other numbers, such as {"3": "liver"}.'),
]
Jobs = Annotated[
    Path | None,
    typer.Option(
        "--jobs",
        help="Batch mode: a CSV or JSONL list with the columns mask, output, findings, "
        "disease_mask, seed.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae", help="Bundle of the generator's VAE. [default: the built-in one of its name]"
    ),
]
Scheduler = Annotated[
    str | None,
    choice(
        "--scheduler",
        names=lambda: SCHEDULERS,
        help="Sampler. [default: the generator's]",
        rich_help_panel=SAMPLING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        min=1,
        help="Denoising steps. [default: the generator's]",
        rich_help_panel=SAMPLING,
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(
        "--eta",
        min=0,
        max=1,
        help="Fresh noise per step of ddim; 0 adds none. [default: the generator's]",
        rich_help_panel=SAMPLING,
    ),
]
Guidance = Annotated[
    float,
    typer.Option(
        "--guidance",
        help="Classifier-free guidance: above 1 follows the text more closely, at twice the work.",
        rich_help_panel=SAMPLING,
    ),
]
Stitch = Annotated[
    str,
    choice(
        "--stitch",
        names=lambda: STITCHES,
        help="Long volumes: joint denoises all windows together; reference chains them, as "
        "published.",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of the noise.", rich_help_panel=SAMPLING)
]


@command(app, "Run", ("generator", *ENGINE_OPTIONS, "dtype", "resume", "overwrite"))
def generate(
    output: Generated,
    options: RunOptions,
    terminal: Terminal,
    mask: Mask = None,
    findings: Findings = None,
    disease_mask: DiseaseMask = None,
    labels: Labels = None,
    jobs: Jobs = None,
    vae: Vae = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = 1.0,
    stitch: Stitch = "joint",
    seed: Seed = 0,
    dry_run: DryRun = False,
    report: Report = None,
) -> None:
    """Generate a CT from an organ mask and findings in words.

    Example: `fvae generate --mask organs.nii.gz --findings "nodule in the right lung" -o g.nii.gz`
    """
    if (mask is None) == (jobs is None):
        raise UsageError("expected either --mask or --jobs, found both or neither: give one")
    if jobs is not None and (findings or disease_mask):
        raise UsageError("expected findings and disease masks in --jobs, found them as options")
    from fvae_deploy.generation.options import GenerationOptions
    from fvae_deploy.generation.pipeline import generate as run

    sampling = GenerationOptions(
        labels=labels,
        vae=vae,
        sampler=scheduler,
        steps=steps,
        eta=eta,
        guidance=guidance,
        stitch=stitch,
        seed=seed,
    )
    if jobs is not None:
        _run_list(jobs, output, options, sampling, terminal, report, dry_run)
        return
    assert mask is not None
    with terminal.progress_bars({"denoise": "windows"}) as begin:
        found = run(
            mask,
            output,
            options,
            sampling,
            findings=findings,
            disease_mask=disease_mask,
            progress=begin,
            dry_run=dry_run,
        )
    terminal.finish(found, report)


def _run_list(
    jobs: Path,
    output: Path,
    options: RunOptions,
    sampling: GenerationOptions,
    terminal: Terminal,
    report: Path | None,
    dry_run: bool,
) -> None:
    """Generate all rows of a list."""
    from fvae_deploy.batch.generations import (
        check_all_generated,
        read_generations,
        run_generations,
    )

    rows = read_generations(jobs, output, sampling.seed)
    with terminal.progress_bars({"denoise": "windows"}) as begin:
        results = run_generations(rows, options, sampling, terminal.say, begin, dry_run=dry_run)
    if dry_run:
        for result in results:
            if "error" not in result:
                terminal.finish(result, None)
    terminal.report(results, report)
    check_all_generated(results)


@command(app, "Make")
def phantom(
    output: Annotated[Path, typer.Option("--output", "-o", help=".nii, .nii.gz, .zarr or .dcm.")],
    terminal: Terminal,
    shape: Annotated[str, typer.Option("--shape", help="Voxels along x,y,z.")] = "512,512,300",
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Also write the organ label map here.")
    ] = None,
    disease_mask: Annotated[
        Path | None, typer.Option("--disease-mask", help="Also write the labels of findings here.")
    ] = None,
    patient: Annotated[
        int | None,
        typer.Option(
            "--patient", min=0, help="Draw another patient with other findings, by this seed."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the noise.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a deterministic synthetic torso in HU, slab by slab.

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


@command(app, "Run", ("model", *ENGINE_OPTIONS, "protocol"))
def augment(
    nnunet: Annotated[
        Path, typer.Option("--nnunet", help="An nnU-Net dataset, named DatasetXXX_NAME.")
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The dataset to write, named DatasetYYY_NAME."),
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

    An interrupted run continues when the command is given again.

    Example: `fvae augment --nnunet Dataset001_Liver -o Dataset101_LiverFvae`
    """
    from fvae_deploy.batch.nnunet import augment as run

    with terminal.progress_bars({"augment": "images"}) as begin:
        found = run(nnunet, output, options, instead=instead, progress=begin)
    terminal.report(found, report)
    terminal.print(
        f"{output}: {found['cases']} training cases, {found['reconstructed']} images "
        f"reconstructed in {found['seconds']:.1f} s"
    )
