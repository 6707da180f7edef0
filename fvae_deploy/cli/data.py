"""The verbs that make data: phantom, generate, augment."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fvae_deploy.cli.console import finish, progress_bar, progress_bars, say
from fvae_deploy.cli.options import (
    Debug,
    Device,
    Dtype,
    Engine,
    Memory,
    Model,
    Precision,
    Protocol,
    Quiet,
    ReportFile,
    Verbs,
)
from fvae_deploy.errors import UsageError
from fvae_deploy.optional import require
from fvae_deploy.parse import voxels

app = typer.Typer(cls=Verbs)


@app.command()
def generate(
    mask: Annotated[
        Path | None, typer.Option("--mask", help="Organ labels, as TotalSegmentator numbers them.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help=".nii, .nii.gz or .zarr; with --jobs a folder."),
    ] = None,
    findings: Annotated[
        str | None,
        typer.Option("--findings", help="Text, or a file of it [default: a normal scan]."),
    ] = None,
    disease_mask: Annotated[
        Path | None, typer.Option("--disease-mask", help="Findings 1 to 18 on the mask's grid.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", help='JSON for masks numbered otherwise: {"3": "liver"}.'),
    ] = None,
    jobs: Annotated[
        Path | None,
        typer.Option("--jobs", help="CSV or JSONL: mask, output, findings, disease_mask, seed."),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Built-in generator or bundle folder.")
    ] = "tiny-ldm",
    vae: Annotated[
        str | None, typer.Option("--vae", help="Bundle of its VAE [default: the built-in one].")
    ] = None,
    sampler: Annotated[
        str | None, typer.Option("--scheduler", help="ddim, dpmsolver++ or unipc.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="[default: the generator's]")
    ] = None,
    eta: Annotated[
        float | None, typer.Option("--eta", min=0, max=1, help="Of ddim: 0 adds no noise.")
    ] = None,
    guidance: Annotated[
        float, typer.Option("--guidance", help="Above 1: closer to the text, twice the work.")
    ] = 1.0,
    stitch: Annotated[
        str, typer.Option("--stitch", help="joint: windows together; reference: as published.")
    ] = "joint",
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    engine: Engine = "auto",
    precision: Precision = "fp32",
    device: Device = "cpu",
    memory: Memory = None,
    dtype: Dtype = "int16",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what a stopped run left.")
    ] = False,
    run_report: ReportFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Generate a CT from an organ mask and findings in words.

    Example: `fvae generate --mask organs.nii.gz --findings "nodule in the right lung" -o g.nii.gz`
    """
    require("tokenizers", extra="generate")
    from fvae_deploy.batch.generations import check_all_made, read_jobs, run_jobs

    options: dict[str, Any] = {
        "labels": labels,
        "model": model,
        "vae": vae,
        "sampler": sampler,
        "steps": steps,
        "eta": eta,
        "guidance": guidance,
        "stitch": stitch,
        "engine": engine,
        "precision": precision,
        "device": device,
        "memory": memory,
        "dtype": dtype,
        "resume": resume,
    }
    if output is None:
        raise UsageError("expected --output, found none: name the CT to make")
    if (mask is None) == (jobs is None):
        raise UsageError("expected either --mask or --jobs, found both or neither")
    units = {"denoise": "windows"}
    if jobs is not None:
        if findings or disease_mask:
            raise UsageError("expected findings and disease masks in --jobs, found them as options")
        with progress_bars(quiet, units) as begin:
            results = run_jobs(read_jobs(jobs, output, seed), options, say(quiet), begin)
        if run_report:
            from fvae_deploy.stream.report import write_json

            write_json(results, run_report)
        check_all_made(results)
        return
    from fvae_deploy.generation.pipeline import generate as run

    assert mask is not None
    with progress_bars(quiet, units) as begin:
        report = run(
            mask,
            output,
            findings=findings,
            disease_mask=disease_mask,
            seed=seed,
            progress=begin,
            **options,
        )
    finish(report, run_report, quiet)


@app.command()
def phantom(
    output: Annotated[Path, typer.Option("--output", "-o", help=".nii, .nii.gz or .zarr.")],
    shape: Annotated[str, typer.Option("--shape", help="x,y,z in voxels.")] = "512,512,300",
    labels: Annotated[
        Path | None, typer.Option("--labels", help="Also write the organ label map here.")
    ] = None,
    disease_mask: Annotated[
        Path | None, typer.Option("--disease-mask", help="Also write the findings' labels here.")
    ] = None,
    patient: Annotated[
        int | None,
        typer.Option("--patient", min=0, help="Draw another patient, findings and all, by seed."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the noise.")] = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a deterministic synthetic torso in HU, slab by slab.

    Example: `fvae phantom -o ct.nii.gz --shape 256,256,200 --labels organs.nii.gz`
    """
    from fvae_deploy.phantom.patient import STANDARD, varied
    from fvae_deploy.phantom.torso import write_phantom

    x, y, z = voxels(shape)
    who = STANDARD if patient is None else varied(patient)
    with progress_bar(z, "phantom", quiet) as advance:
        write_phantom(
            output,
            (x, y, z),
            labels=labels,
            seed=seed,
            progress=advance,
            patient=who,
            findings=disease_mask,
        )
    if patient is not None and not quiet:
        print(who.report())


@app.command()
def augment(
    nnunet: Annotated[Path, typer.Option("--nnunet", help="A dataset: DatasetXXX_NAME.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The dataset to make: DatasetYYY_NAME.")
    ],
    instead: Annotated[
        bool, typer.Option("--instead", help="Reconstructions alone, not beside the originals.")
    ] = False,
    model: Model = "tiny",
    engine: Engine = "auto",
    precision: Precision = "fp32",
    device: Device = "cpu",
    protocol: Protocol = None,
    memory: Memory = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Add reconstructed images to an nnU-Net dataset as a further training view.

    Example: `fvae augment --nnunet Dataset001_Liver -o Dataset101_LiverFvae`

    A stopped run goes on when it is given again.
    """
    from fvae_deploy.batch.nnunet import augment as run

    with progress_bars(quiet, {"augment": "images"}) as begin:
        found = run(
            nnunet,
            output,
            instead=instead,
            progress=begin,
            model=model,
            engine=engine,
            precision=precision,
            device=device,
            protocol=protocol,
            memory=memory,
        )
    if not quiet:
        print(
            f"{output}: {found['cases']} training cases, {found['reconstructed']} images "
            f"reconstructed in {found['seconds']:.1f} s"
        )
