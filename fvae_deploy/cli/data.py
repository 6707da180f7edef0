"""The commands that make data: generate, augment, phantom."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from fvae_deploy.cli.output_options import choice
from fvae_deploy.errors import UsageError
from fvae_deploy.parse import voxels
from fvae_deploy.stream.options import RunOptions

if TYPE_CHECKING:
    from fvae_deploy.generation.options import GenerationOptions

app = typer.Typer(cls=Verbs)
SAMPLING = "Sampling"
Mask = Annotated[
    Path | None, typer.Option("--mask", help="Organ label map, with TotalSegmentator's numbers.")
]
Generated = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        help="CT to write: .nii, .nii.gz, .nrrd, .mha, .zarr or .dcm; with --jobs, a folder.",
    ),
]
Findings = Annotated[
    list[str] | None,
    typer.Option(
        "--findings",
        help="A finding as text, or a text file; repeatable. [default: text of a normal scan]",
    ),
]
WholeReport = Annotated[
    str | None,
    typer.Option("--report", help="A whole report instead of --findings: text, or a text file."),
]
DiseaseMask = Annotated[
    list[str] | None,
    typer.Option(
        "--disease-mask",
        "--disease",
        metavar="FILE[=FINDINGS]",
        help="Where findings are, on the grid of --mask; repeatable. FILE: a label map with the "
        "generator's numbers. FILE=emphysema: one finding. FILE=nodule,linear or "
        "FILE=0:nodule,2:linear: channels of a 4-D file, or labels.",
    ),
]
BodyLabel = Annotated[
    int | None,
    typer.Option(
        "--body-label",
        help="Label of the body outside all organs, for published generators.",
    ),
]
Published = Annotated[
    bool,
    typer.Option(
        "--published",
        help="Do everything as the published code does; see docs/generation.md.",
        rich_help_panel=SAMPLING,
    ),
]
AsPublished = Annotated[
    str | None,
    typer.Option(
        "--as-published",
        metavar="NAMES",
        help="Do only these as published: none, or some of stretch, text, cut, any-affine, steps, "
        "stitch, noise, clamp, truncate, grid, affine. [default: the generator's]",
        rich_help_panel=SAMPLING,
    ),
]
Labels = Annotated[
    Path | None,
    typer.Option("--labels", help='JSON file for other label numbers, such as {"3": "liver"}.'),
]
Jobs = Annotated[
    Path | None,
    typer.Option(
        "--jobs",
        help="Batch mode: a CSV or JSONL list with the columns mask, output, findings, report, "
        "disease_mask and seed.",
    ),
]
Vae = Annotated[
    str | None,
    typer.Option(
        "--vae", help="Bundle of the VAE. [default: the built-in VAE that the generator names]"
    ),
]
Scheduler = Annotated[
    str | None,
    choice(
        "--scheduler",
        names=lambda: SCHEDULERS,
        help="Sampling algorithm. [default: the generator's]",
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
        help="Share of fresh noise per step of ddim; 0 adds none. [default: the generator's]",
        rich_help_panel=SAMPLING,
    ),
]
Guidance = Annotated[
    float,
    typer.Option(
        "--guidance",
        help="Classifier-free guidance: above 1 follows the text more closely, at twice the cost.",
        rich_help_panel=SAMPLING,
    ),
]
Stitch = Annotated[
    str | None,
    choice(
        "--stitch",
        names=lambda: STITCHES,
        help="Long volumes: joint denoises all windows together; reference denoises one after the "
        "other, as published. [default: joint]",
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, help="Random seed of the noise.", rich_help_panel=SAMPLING)
]


@command(app, "Run", ("generator", *ENGINE_OPTIONS, "dtype", "resume", "overwrite"))
def generate(
    output: Generated,
    options: RunOptions,
    terminal: Terminal,
    mask: Mask = None,
    findings: Findings = None,
    whole_report: WholeReport = None,
    disease_mask: DiseaseMask = None,
    labels: Labels = None,
    body_label: BodyLabel = None,
    jobs: Jobs = None,
    vae: Vae = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    eta: Eta = None,
    guidance: Guidance = 1.0,
    stitch: Stitch = None,
    seed: Seed = 0,
    published: Published = False,
    as_published: AsPublished = None,
    dry_run: DryRun = False,
    report: Report = None,
) -> None:
    """Generate a CT from an organ mask and a text of findings.

    Example: `fvae generate --mask organs.nii.gz --findings "nodule in the right lung" -o g.nii.gz`
    """
    given: dict[str, Any] = {
        "findings": findings,
        "report": whole_report,
        "disease_mask": disease_mask,
    }
    _check_source(mask, jobs, given)
    from fvae_deploy.generation.options import GenerationOptions
    from fvae_deploy.generation.pipeline import generate as run

    sampling = GenerationOptions(
        labels=labels,
        body_label=body_label,
        published=published,
        as_published=as_published,
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
        result = run(mask, output, options, sampling, progress=begin, dry_run=dry_run, **given)
    terminal.finish(result, report)


def _check_source(mask: Path | None, jobs: Path | None, given: dict[str, Any]) -> None:
    """Raise UsageError unless there is a mask or a list, and findings only with a mask."""
    if (mask is None) == (jobs is None):
        raise UsageError(
            "expected either --mask or --jobs, found both or neither: pass one of them"
        )
    if jobs is not None and any(given.values()):
        raise UsageError("expected findings in the --jobs list, found options: move them there")


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
