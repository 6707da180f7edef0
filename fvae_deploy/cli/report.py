"""The command report: what reconstructions keep of CTs, as a page, JSON and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.cli.options import COMPUTE, ENGINE_OPTIONS
from fvae_deploy.stream.options import RunOptions

app = typer.Typer(cls=Verbs)
INPUT = ("series", "level", "skip_unreadable", "any_range")

CTs = Annotated[
    list[Path],
    typer.Argument(
        metavar="CT",
        help="CTs: files, folders of DICOM slices, .zarr stores, folders of scans, or lists (.csv, "
        ".jsonl) with the columns ct, reconstruction, method, labels, reconstruction_labels and "
        "series.",
    ),
]
Page = Annotated[
    Path,
    typer.Option("--output", "-o", help="Page to write (.html); a .json and a .csv go beside it."),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Built-in model or folder of a bundle; repeatable. [default: tiny]",
        rich_help_panel=COMPUTE,
    ),
]
Reconstructions = Annotated[
    list[Path] | None,
    typer.Option(
        "--reconstruction",
        "-r",
        help="Judge this reconstruction in place of a model; one for each CT, in order.",
    ),
]
Labels = Annotated[
    list[Path] | None,
    typer.Option("--labels", help="Organ label map; one for each CT, in order."),
]
LabelsAfter = Annotated[
    list[Path] | None,
    typer.Option(
        "--reconstruction-labels",
        help="Label map made from the reconstruction; its surfaces are compared with --labels.",
    ),
]
Segment = Annotated[
    bool,
    typer.Option("--segment", help="Let TotalSegmentator label the organs of both volumes."),
]


@command(app, "Inspect", (*ENGINE_OPTIONS, "hu_window", "protocol", "step", *INPUT, "overwrite"))
def report(
    cts: CTs,
    output: Page,
    options: RunOptions,
    terminal: Terminal,
    model: Models = None,
    reconstruction: Reconstructions = None,
    labels: Labels = None,
    reconstruction_labels: LabelsAfter = None,
    segment: Segment = False,
) -> None:
    """Judge reconstructions of CTs, on one page to read offline, and as JSON and CSV.

    Example: `fvae report ct.nii.gz --labels organs.nii.gz --model tiny --model wan21 -o r.html`
    """
    from fvae_deploy.cli.tables import report_table
    from fvae_deploy.report.cases import find_cases
    from fvae_deploy.report.files import Files
    from fvae_deploy.report.run import Request, check_all_judged
    from fvae_deploy.report.run import report as run
    from fvae_deploy.volume.open import protect_input

    for path in Files(output).all:  # a list may be named as the table beside the page
        for source in cts:
            protect_input(path, source)
    given = (reconstruction or (), labels or (), reconstruction_labels or ())
    cases, damaged = find_cases(cts, *given)
    request = Request(tuple(model or ("tiny",)), options, segment)
    with terminal.progress_bars() as begin:
        content = run(cases, output, request, damaged=damaged, say=terminal.say, progress=begin)
    terminal.show(report_table(content))
    terminal.print(f"report: {output}, with {output.stem}.json and {output.stem}.csv beside it")
    check_all_judged(content)
