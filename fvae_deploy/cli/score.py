"""The command score: generated CTs against real ones, as a page, JSON and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fvae_deploy.cli.command import Verbs, command
from fvae_deploy.cli.console import Terminal
from fvae_deploy.stream.options import RunOptions

app = typer.Typer(cls=Verbs)
INPUT = ("series", "level", "skip_unreadable", "any_range")
BESIDE = "Label maps, matched by name"
NETWORKS = "Networks of yours (code: use only what you trust)"
SETS = "CTs: a folder, a list (.csv, .jsonl), or a pattern in quotes such as 'made/*.nii.gz'."

Real = Annotated[str, typer.Argument(metavar="REAL", help=f"Real {SETS}")]
Generated = Annotated[str, typer.Argument(metavar="GENERATED", help=f"Generated {SETS}")]
Page = Annotated[
    Path,
    typer.Option("--output", "-o", help="Page to write (.html); a .json and a .csv go beside it."),
]
RealLabels = Annotated[
    Path | None,
    typer.Option("--real-labels", help="Organ label maps of REAL.", rich_help_panel=BESIDE),
]
GeneratedLabels = Annotated[
    Path | None,
    typer.Option(
        "--generated-labels",
        help="Label maps that a segmenter made of GENERATED.",
        rich_help_panel=BESIDE,
    ),
]
Masks = Annotated[
    Path | None,
    typer.Option(
        "--masks", help="Organ masks that GENERATED were made from.", rich_help_panel=BESIDE
    ),
]
Segment = Annotated[
    bool,
    typer.Option(
        "--segment", help="Let TotalSegmentator label the organs.", rich_help_panel=BESIDE
    ),
]
I3d = Annotated[
    Path | None,
    typer.Option("--i3d", help="I3D as TorchScript, for FVD.", rich_help_panel=NETWORKS),
]
Features = Annotated[
    str | None,
    typer.Option(
        "--features",
        metavar="FILE|module:factory|inception",
        help="Network of pictures, for FID in three planes.",
        rich_help_panel=NETWORKS,
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--clip",
        metavar="module:factory",
        help="Adapter with image() and text(), for CLIP scores.",
        rich_help_panel=NETWORKS,
    ),
]
Classifier = Annotated[
    str | None,
    typer.Option(
        "--classifier",
        metavar="module:factory",
        help="Adapter with findings(), for the AUC of the 18 findings.",
        rich_help_panel=NETWORKS,
    ),
]
ClipWeights = Annotated[
    Path | None,
    typer.Option("--clip-weights", help="Passed to its factory.", rich_help_panel=NETWORKS),
]
ClassifierWeights = Annotated[
    Path | None,
    typer.Option("--classifier-weights", help="Passed to its factory.", rich_help_panel=NETWORKS),
]
Texts = Annotated[
    Path | None,
    typer.Option(
        "--texts",
        help="Table (.csv, .jsonl) with the columns ct, text, and findings with 0 or 1.",
        rich_help_panel=NETWORKS,
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        metavar="X,Y,Z",
        help="Common spacing in mm. [default: of each axis the larger median of the two sets]",
    ),
]
Rounds = Annotated[
    int, typer.Option("--bootstrap", min=20, help="Draws of cases for the intervals.")
]


@command(app, "Inspect", ("model", "engine", "precision", "device", "threads", *INPUT, "overwrite"))
def score(
    real: Real,
    generated: Generated,
    output: Page,
    options: RunOptions,
    terminal: Terminal,
    real_labels: RealLabels = None,
    masks: Masks = None,
    generated_labels: GeneratedLabels = None,
    segment: Segment = False,
    features: Features = None,
    i3d: I3d = None,
    clip: Clip = None,
    clip_weights: ClipWeights = None,
    classifier: Classifier = None,
    classifier_weights: ClassifierWeights = None,
    texts: Texts = None,
    spacing: Spacing = None,
    bootstrap: Rounds = 200,
) -> None:
    """Compare a set of generated CTs with a set of real ones, on one page, as JSON and CSV.

    Example: `fvae score real/ made/ --real-labels organs/ --masks masks/ -o score.html`
    """
    from fvae_deploy.cli.tables import score_table
    from fvae_deploy.parse import millimetres
    from fvae_deploy.report.files import Files
    from fvae_deploy.score.cases import find_set
    from fvae_deploy.score.run import Request, check_all_scored
    from fvae_deploy.score.run import score as run
    from fvae_deploy.volume.open import protect_input

    request = Request(
        options, real_labels, generated_labels, masks, segment, features, i3d, clip, clip_weights,
        classifier, classifier_weights, texts,
        None if spacing is None else millimetres(spacing), bootstrap,
    )  # fmt: skip
    for path in Files(output).all:  # a list may be named as the table beside the page
        for source in (real, generated):
            protect_input(path, source)
    first, damaged = find_set(real, "REAL")
    second, more = find_set(generated, "GENERATED")
    units = {"REAL": "CTs", "GENERATED": "CTs", "metrics": "parts"}
    with terminal.progress_bars(units) as begin:
        content = run(
            first, second, output, request,
            damaged=[*damaged, *more], say=terminal.say, progress=begin,
        )  # fmt: skip
    terminal.show(score_table(content))
    for remark in content["remarks"]:
        terminal.print(remark)
    for line in content["left_out"]:
        terminal.print(f"left out: {line}")
    terminal.print(f"score: {output}, with {output.stem}.json and {output.stem}.csv beside it")
    check_all_scored(content)
