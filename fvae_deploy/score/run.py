"""Scores generated CTs: every CT of both sets examined, then all metrics, page, JSON and CSV.

A CT that fails is reported, and the others go on; the files are written at the end, at once.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fvae_deploy.batch.run import SCAN_ERRORS
from fvae_deploy.errors import BundleError, EngineError, UsageError, VolumeError
from fvae_deploy.quality.fidelity import WINDOW
from fvae_deploy.report.cases import Case
from fvae_deploy.report.files import Files
from fvae_deploy.report.run import Begin, silent
from fvae_deploy.report.segment import check_installed
from fvae_deploy.score.adapters import Adapters, open_adapter
from fvae_deploy.score.cases import Beside, check_apart, find_beside, read_texts
from fvae_deploy.score.examine import Lens, Seen, Source, examine
from fvae_deploy.score.features import LatentFeatures
from fvae_deploy.score.grid import Spacing, common_spacing
from fvae_deploy.score.metrics import metrics
from fvae_deploy.score.nearest import Near, closest, curve, near
from fvae_deploy.score.networks import FeatureNetwork, open_features, open_i3d
from fvae_deploy.score.page import page
from fvae_deploy.score.remarks import left_out, remarks
from fvae_deploy.score.table import table
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.report import machine
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import open_volume, protect_input
from fvae_deploy.volume.options import ReadOptions

ROUNDS = 200
LATENTS = "tiny"


@dataclass(frozen=True)
class Request:
    """What is compared beside the two sets, and by which networks; see docs/score.md."""

    options: RunOptions = field(default_factory=RunOptions)
    real_labels: Path | None = None
    generated_labels: Path | None = None
    masks: Path | None = None
    segment: bool = False
    features: str | None = None
    i3d: Path | None = None
    clip: str | None = None
    clip_weights: Path | None = None
    classifier: str | None = None
    classifier_weights: Path | None = None
    texts: Path | None = None
    spacing: Spacing | None = None
    rounds: int = ROUNDS


def score(
    real: Sequence[Case],
    generated: Sequence[Case],
    output: Path,
    request: Request,
    *,
    damaged: Sequence[tuple[Path, str]] = (),
    say: Callable[[str], None] = lambda message: None,
    progress: Begin = silent,
) -> dict[str, Any]:
    """Compare two sets of CTs; write the page `output` (.html) with a JSON and a CSV beside it.

    Returns the content of the JSON. CTs that fail are in it with their error. Raises UsageError
    for sets that overlap and for label maps or texts that match no CT, VolumeError if fewer than
    two CTs of a set can be read, BundleError or EngineError for networks that cannot be used.
    """
    files = _checked(real, generated, output, request)
    sources = _sources(real, generated, request)
    with contextlib.ExitStack() as stack:
        codec = stack.enter_context(_open_codec(request.options))
        folder = tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".fvae-score-")
        work = Path(stack.enter_context(folder))
        lens = _lens(codec, sources, read_texts(request.texts, [*real, *generated]), request)
        failed = [{"name": p.name, "path": str(p), "error": reason} for p, reason in damaged]
        sides = [
            _examine_all(one, role, lens, request, work, failed, say, progress)
            for one, role in zip(sources, ("REAL", "GENERATED"), strict=True)
        ]
    distances = near(*([one.coarse for one in side] for side in sides))
    names = {"latents": lens.latents.name}
    names |= {"pictures": lens.pictures.name} if lens.pictures else {}
    names |= {"clip": lens.clips.name} if lens.clips else {}
    rows = metrics(sides[0], sides[1], distances, names, request.rounds, progress)
    content: dict[str, Any] = {
        "fvae": __version__,
        "command": "score",
        "window_hu": list(WINDOW),
        "spacing_mm": list(lens.spacing),
        "networks": _networks(codec, lens, request),
        "bootstrap": {"rounds": request.rounds, "interval_percent": 95},
        "metrics": [row.to_dict() for row in rows],
        "left_out": left_out(rows, names),
        "remarks": remarks(sides[0], sides[1], rows, names),
        "nearest": _nearest(distances, sides),
        "real": [_case(one) for one in sides[0]],
        "generated": [_case(one) for one in sides[1]],
        "failed": failed,
        "machine": machine(),
    }
    files.write(content, table(content), page(content, sides[0], sides[1]))
    return content


def check_all_scored(content: dict[str, Any]) -> None:
    """Raise VolumeError if a CT could not be read."""
    if failed := content["failed"]:
        raise VolumeError(
            f"expected every CT in the score, found {len(failed)} that failed, first "
            f"{failed[0]['path']} ({failed[0]['error']}): correct them or leave them out; the "
            "score is of the others"
        )


def _checked(
    real: Sequence[Case], generated: Sequence[Case], output: Path, request: Request
) -> Files:
    """Return the files to write; raises what can be known before any work."""
    files = Files(output)
    files.check(request.options.overwrite)
    check_apart(real, generated)
    given = (request.i3d, request.texts, request.clip_weights, request.classifier_weights,
             request.masks, request.real_labels, request.generated_labels)  # fmt: skip
    for path in files.all:
        for source in (*(case.ct for case in (*real, *generated)), *filter(None, given)):
            protect_input(path, source)
    if request.segment:
        check_installed()
    networks = request.clip or request.classifier
    if bool(networks) != bool(request.texts):
        raise UsageError(
            "expected --texts together with --clip or --classifier, found only "
            f"{'--texts' if request.texts else '--clip or --classifier'}: give both"
        )
    return files


def _sources(
    real: Sequence[Case], generated: Sequence[Case], request: Request
) -> tuple[list[Source], list[Source]]:
    """Return both sets with what lies beside them.

    The label maps of real CTs are also masks, which shows how well real CTs keep to theirs by the
    same segmenter. Not where label maps of the generated CTs are given: those come from a
    segmenter that the real ones were not seen by. Generated CTs without one then have no mask
    either, since thresholds would judge them.
    """
    labels = {case.name: case.labels for case in real if case.labels is not None}
    labels |= find_beside(request.real_labels, real, "--real-labels")
    made = {case.name: case.labels for case in generated if case.labels is not None}
    made |= find_beside(request.generated_labels, generated, "--generated-labels")
    masks = find_beside(request.masks, generated, "--masks")
    apart = bool(made) or not masks
    if made:
        masks = {name: mask for name, mask in masks.items() if name in made}
    return [
        Source(
            case.name, case.ct, case.series,
            labels=labels.get(case.name) if apart else None,
            mask=None if apart else labels.get(case.name),
        )
        for case in real
    ], [
        Source(case.name, case.ct, case.series, made.get(case.name), masks.get(case.name))
        for case in generated
    ]  # fmt: skip


def _open_codec(options: RunOptions) -> Codec:
    return open_codec(
        options.model or LATENTS,
        engine=options.engine,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
    )


def _lens(
    codec: Codec,
    sources: tuple[list[Source], list[Source]],
    texts: dict[str, Beside],
    request: Request,
) -> Lens:
    """Open the networks, and find the common spacing."""
    pictures = open_features(request.features) if request.features else None
    clips = open_i3d(request.i3d) if request.i3d else None
    clip = classifier = None
    if request.clip:
        clip = open_adapter(request.clip, request.clip_weights, "--clip")
    if request.classifier:
        classifier = open_adapter(request.classifier, request.classifier_weights, "--classifier")
    spacing = request.spacing
    if spacing is None:
        spacing = common_spacing(*(_geometries(side, request.options) for side in sources))
    return Lens(
        spacing, LatentFeatures(codec), pictures, clips,
        Adapters(clip, classifier, texts), request.segment,
    )  # fmt: skip


def _geometries(sources: list[Source], options: RunOptions) -> list[Geometry]:
    """Return the grids of the CTs that can be opened; if none can, raises the first error."""
    found, errors = [], []
    for source in sources:
        try:
            with contextlib.closing(open_volume(source.ct, _reading(source, options))) as reader:
                found.append(reader.geometry)
        except SCAN_ERRORS as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _reading(source: Source, options: RunOptions) -> ReadOptions:
    return replace(options, series=source.series or options.series).reading


def _examine_all(
    sources: list[Source],
    role: str,
    lens: Lens,
    request: Request,
    work: Path,
    failed: list[dict[str, Any]],
    say: Callable[[str], None],
    progress: Begin,
) -> list[Seen]:
    """Examine the CTs of one set; those that fail are added to `failed`."""
    seen: list[Seen] = []
    tick = progress(role, len(sources))
    for source in sources:
        try:
            seen.append(examine(source, lens, _reading(source, request.options), work))
        except (BundleError, EngineError):
            raise  # of a network, which would fail for every CT
        except SCAN_ERRORS as error:
            failed.append({"name": source.name, "path": str(source.ct), "error": str(error)})
            say(f"{role}: {source.name} failed: {error}")
        finally:
            for path in work.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        tick(1)
    say(f"{role}: {len(seen)} of {len(sources)} CTs read")
    if len(seen) < 2:
        raise VolumeError(
            f"expected at least 2 CTs of {role} that can be read, found {len(seen)} of "
            f"{len(sources)}, first {failed[-1]['path']} ({failed[-1]['error']}): correct them"
        )
    return seen


def _networks(codec: Codec, lens: Lens, request: Request) -> dict[str, Any]:
    """Return the names of the networks, with the SHA-256 of their files."""
    found: dict[str, Any] = {
        "latents": {
            "name": codec.manifest.name,
            "sha256": codec.manifest.files["weights.safetensors"],
            "engine": codec.engine.name,
            "precision": codec.engine.precision,
        }
    }
    named: dict[str, FeatureNetwork | None] = {"pictures": lens.pictures, "clip": lens.clips}
    for kind, network in named.items():
        if network is not None:
            found[kind] = {"name": network.name, "sha256": network.sha256}
    for name in ("clip", "classifier"):
        if factory := getattr(request, name):
            weights = getattr(request, f"{name}_weights")
            found[f"adapter {name}"] = {
                "name": factory,
                "weights": None if weights is None else str(weights),
            }
    return found


def _nearest(distances: Near, sides: Sequence[Sequence[Seen]]) -> dict[str, Any]:
    """Return the closest pairs, and how distances to the nearest real CT are distributed."""
    return {
        "threshold_hu": distances.threshold,
        "real_to_real": curve(distances.to_another),
        "generated_to_real": curve(distances.to_real),
        "pairs": [
            {
                "generated": sides[1][g].name,
                "real": sides[0][r].name,
                "distance_hu": float(distances.across[g, r]),
            }
            for g, r in closest(distances)
        ],
    }


def _case(one: Seen) -> dict[str, Any]:
    return {
        "name": one.name,
        "path": one.path,
        **one.facts,
        "noise_hu": one.noise,
        "clip_score": one.judgement.similarity,
        "adherence": one.adherence,
    }
