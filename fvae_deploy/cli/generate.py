"""The command generate."""

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
MASK = "Mask"
CHANGE = "Changing a CT"
SOURCES = ("mask", "patient", "like")
Mask = Annotated[
    Path | None, typer.Option("--mask", help="Organ label map, with TotalSegmentator's numbers.")
]
Patient = Annotated[
    int | None,
    typer.Option(
        "--patient",
        min=0,
        help="Instead of --mask: draw the organs of a patient by this seed.",
        rich_help_panel=MASK,
    ),
]
Lesion = Annotated[
    list[str] | None,
    typer.Option(
        "--lesion",
        help="Place a lesion in the mask, in words: 'nodule 8mm right upper lobe'; repeatable. It "
        "is also the text, unless --findings or --report is given.",
    ),
]
Like = Annotated[
    Path | None,
    typer.Option(
        "--like",
        help="Instead of --mask: a CT whose organs TotalSegmentator finds, where it is installed.",
        rich_help_panel=MASK,
    ),
]
Change = Annotated[
    str | None,
    typer.Option(
        "--change",
        metavar="FILE[=FINDINGS]|lesion",
        help="Draw only this region of the CT --like anew; FINDINGS as in --disease-mask, or those "
        "of --findings. lesion: where --lesion places one. Organs: --mask, --patient, or "
        "TotalSegmentator.",
        rich_help_panel=CHANGE,
    ),
]
KeepOriginal = Annotated[
    bool,
    typer.Option(
        "--keep-original",
        help="With --change: keep the CT's own voxels elsewhere, instead of a reconstruction.",
        rich_help_panel=CHANGE,
    ),
]
LabelsOut = Annotated[
    Path | None,
    typer.Option(
        "--labels-out",
        help="With --change: also write a label map of what was added, with the generator's "
        "numbers.",
        rich_help_panel=CHANGE,
    ),
]
Shape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help="With --patient: number of voxels along x,y,z. [default: a window of the generator]",
        rich_help_panel=MASK,
    ),
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
    str | None,
    typer.Option(
        "--labels",
        metavar="NAME|FILE",
        help="Other label numbers: totalsegmentator, maisi, btcv, amos, an nnU-Net dataset.json, "
        'or a JSON file such as {"3": "liver"}. [default: totalsegmentator]',
    ),
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


Check = Annotated[
    bool | None,
    typer.Option(
        "--check/--no-check",
        help="Refuse a sample that fails its checks (HU of organs, noise, seams), or check "
        "nothing. [default: refuse with --jobs or --tries, else only tell]",
        rich_help_panel=SAMPLING,
    ),
]
Tries = Annotated[
    int,
    typer.Option(
        "--tries",
        min=1,
        help="Draw a sample that fails its checks again, with the next seed; so many in all.",
        rich_help_panel=SAMPLING,
    ),
]


@command(app, "Run", ("generator", *ENGINE_OPTIONS, "dtype", "resume", "overwrite"))
def generate(
    output: Generated,
    options: RunOptions,
    terminal: Terminal,
    mask: Mask = None,
    patient: Patient = None,
    like: Like = None,
    shape: Shape = None,
    findings: Findings = None,
    whole_report: WholeReport = None,
    disease_mask: DiseaseMask = None,
    lesion: Lesion = None,
    change: Change = None,
    keep_original: KeepOriginal = False,
    labels_out: LabelsOut = None,
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
    check: Check = None,
    tries: Tries = 1,
    published: Published = False,
    as_published: AsPublished = None,
    dry_run: DryRun = False,
    report: Report = None,
) -> None:
    """Generate a CT from an organ mask and a text of findings.

    Example: `fvae generate --patient 7 --findings "pleural effusion on the left" -o made.nii.gz`
    """
    given: dict[str, Any] = {
        "mask": mask, "patient": patient, "like": like, "findings": findings, "lesions": lesion,
        "shape": None if shape is None else voxels(shape), "report": whole_report,
        "disease_mask": disease_mask, "change": change, "labels_out": labels_out,
    }  # fmt: skip
    _check_source(jobs, given)
    from fvae_deploy.generation.options import GenerationOptions
    from fvae_deploy.generation.pipeline import generate as run

    sampling = GenerationOptions(
        labels=labels, body_label=body_label, published=published, as_published=as_published,
        vae=vae, sampler=scheduler, steps=steps, eta=eta, guidance=guidance, stitch=stitch,
        seed=seed, check=True if check is None and jobs is not None else check, tries=tries,
    )  # fmt: skip
    if jobs is not None:
        how = {"dry_run": dry_run, "keep": keep_original}
        _run_list(jobs, output, options, sampling, terminal, report, **how)
        return
    given |= {"keep_original": keep_original, "dry_run": dry_run}
    with terminal.progress_bars({"denoise": "windows"}) as begin:
        result = run(given.pop("mask"), output, options, sampling, progress=begin, **given)
    terminal.finish(result, report)


def _check_source(jobs: Path | None, given: dict[str, Any]) -> None:
    """Raise UsageError unless there is one source of masks; a list has its own findings."""
    sources = [name for name in SOURCES if given[name] is not None]
    if given["change"] is None and len(sources) + (jobs is not None) != 1:
        found = [f"--{name}" for name in sources] + ["--jobs"] * (jobs is not None)
        raise UsageError(
            f"expected one of {', '.join(f'--{name}' for name in SOURCES)} or --jobs, found "
            f"{' and '.join(found) or 'none'}: pass one of them"
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
    *,
    dry_run: bool,
    keep: bool,
) -> None:
    """Generate all rows of a list."""
    from fvae_deploy.batch.generations import (
        check_all_generated,
        read_generations,
        run_generations,
    )

    rows = read_generations(jobs, output, sampling.seed, keep_original=keep)
    with terminal.progress_bars({"denoise": "windows"}) as begin:
        results = run_generations(rows, options, sampling, terminal.say, begin, dry_run=dry_run)
    if dry_run:
        for result in results:
            if "error" not in result:
                terminal.finish(result, None)
    terminal.report(results, report)
    check_all_generated(results)
