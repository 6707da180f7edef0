"""Makes a report: every scan through every model, judged, then cohort, page, JSON and CSV.

A scan that fails is reported, and the others go on, as in batch mode.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fvae_deploy.batch.run import SCAN_ERRORS
from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.parse import hu_window
from fvae_deploy.quality.fidelity import WINDOW, check_same_place
from fvae_deploy.report.cases import Case
from fvae_deploy.report.cohort import summarise
from fvae_deploy.report.detectability import detectability
from fvae_deploy.report.files import Files, table
from fvae_deploy.report.jpegls import JpegLs
from fvae_deploy.report.judge import Judged, judge
from fvae_deploy.report.lesions import choose_part
from fvae_deploy.report.organs import Organs
from fvae_deploy.report.page import page
from fvae_deploy.report.pictures import Blobs, Gallery, Pictures
from fvae_deploy.report.radiomics import Radiomics
from fvae_deploy.report.segment import check_installed
from fvae_deploy.report.structure import badness
from fvae_deploy.report.survey import Survey, survey
from fvae_deploy.report.through import reconstruct, reconstruct_part
from fvae_deploy.report.thumbnails import SHOWN
from fvae_deploy.report.verdict import verdicts
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.report import machine
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import open_volume, protect_input

NEEDED = (-900, 300)  # HU: a window must hold these, for air and bone to be told
Begin = Callable[[str, int], Callable[[int], None]]  # a stage and its length -> its progress


def silent(stage: str, length: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda done: None


@dataclass(frozen=True)
class Request:
    """What a report is made of, beside its scans."""

    models: tuple[str, ...] = ("tiny",)
    options: RunOptions = field(default_factory=RunOptions)
    segment: bool = False


def report(
    cases: Sequence[Case],
    output: Path,
    request: Request,
    *,
    damaged: Sequence[tuple[Path, str]] = (),
    say: Callable[[str], None] = lambda message: None,
    progress: Begin = silent,
) -> dict[str, Any]:
    """Judge all scans; write the page `output` (.html) with a JSON and a CSV beside it.

    Returns the content of the JSON. Scans that fail are in it with their error; `check_all_judged`
    raises VolumeError for them. Raises UsageError if there is nothing to judge, OutputError if the
    files cannot be written, BundleError or EngineError if a model cannot be opened.
    """
    files = _checked(cases, output, request)
    groups = _by_scan(cases)
    scans: dict[str, dict[str, Any]] = {}
    blobs: Blobs = {}
    pictures: dict[str, dict[str, Any]] = {}
    gallery: Gallery = {}
    with contextlib.ExitStack() as stack:
        codecs = _open_models(cases, request, stack)
        folder = tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".fvae-report-")
        work = Path(stack.enter_context(folder))
        for number, group in enumerate(groups, start=1):
            name = group[0].name
            try:
                facts, judged = _judge_scan(group, codecs, request, work, progress)
            except SCAN_ERRORS as error:
                scans[name] = {"name": name, "path": str(group[0].ct), "error": str(error)}
                say(f"{number} of {len(groups)}: {name} failed: {error}")
                continue
            finally:
                _empty(work)
            scans[name] = facts
            for one in judged:
                _keep_worst(pictures, one)
                _keep_findings(gallery, one)
            say(f"{number} of {len(groups)}: {name} judged")
    content: dict[str, Any] = {
        "fvae": __version__,
        "command": "report",
        "window_hu": list(window_of(request)),
        "scans": [*scans.values(), *_untaken(damaged)],
        "methods": _methods(scans.values()),
        "machine": machine(),
    }
    content["cohort"] = summarise(content["scans"], content["methods"])
    content["verdicts"] = verdicts(content["scans"], content["methods"])
    for picture in pictures.values():
        picture["positions"] = picture.pop("planes").result(blobs)
    shown = Pictures(list(pictures.values()), blobs, gallery)
    files.write(content, table(content), page(content, shown))
    return content


def _checked(cases: Sequence[Case], output: Path, request: Request) -> Files:
    """Return the files to write; raises what can be known before any work."""
    window_of(request)
    files = Files(output)
    files.check(request.options.overwrite)
    for case in cases:
        for path in files.all:
            protect_input(path, case.ct)
    if request.segment:
        check_installed()
    return files


def window_of(request: Request) -> tuple[float, float]:
    """Return the HU that are compared: --hu-window, or -1000 to 1000."""
    low, high = WINDOW
    if request.options.hu_window is not None:
        low, high = hu_window(request.options.hu_window)
    if low > NEEDED[0] or high < NEEDED[1]:
        raise UsageError(
            f"expected --hu-window from {NEEDED[0]} HU or less to {NEEDED[1]} HU or more, in which "
            f"air and bone can be told, found {low:g}:{high:g}: use fvae compare --hu-window, "
            "which needs neither"
        )
    return low, high


def check_all_judged(content: dict[str, Any]) -> None:
    """Raise VolumeError if a scan could not be judged."""
    failed = [scan for scan in content["scans"] if "error" in scan]
    if failed:
        raise VolumeError(
            f"expected every scan in the report, found {len(failed)} of {len(content['scans'])} "
            f"that failed, first {failed[0]['path']} ({failed[0]['error']}): correct them or leave "
            "them out; the report holds the others"
        )


def _open_models(
    cases: Sequence[Case], request: Request, stack: contextlib.ExitStack
) -> dict[str, Codec]:
    """Open the models that the scans without a given reconstruction need, by name."""
    if all(case.reconstruction for case in cases):
        return {}
    options, codecs = request.options, dict[str, Codec]()
    for model in request.models:
        codec = stack.enter_context(
            open_codec(
                model,
                engine=options.engine,
                precision=options.precision,
                device=options.device,
                threads=options.threads,
            )
        )
        name = codec.manifest.name
        if name in codecs:
            name = str(model)
        if name in codecs:
            raise UsageError(f"expected different models, found {model} twice: name it once")
        codecs[name] = codec
    return codecs


def _by_scan(cases: Sequence[Case]) -> list[list[Case]]:
    """Group the rows of the same scan, which have different methods."""
    groups: dict[tuple[str, Path, str | None], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.name, case.ct, case.series), []).append(case)
    return list(groups.values())


def _judge_scan(
    group: list[Case],
    codecs: dict[str, Codec],
    request: Request,
    work: Path,
    progress: Begin,
) -> tuple[dict[str, Any], list[Judged]]:
    """Judge all reconstructions of one scan; return its facts and what the pictures need."""
    first = group[0]
    options = replace(request.options, series=first.series or request.options.series)
    with contextlib.closing(open_volume(first.ct, options.reading)) as reader:
        _check_places(reader, group)
        slices = reader.geometry.shape[2]
        tick = progress(f"{first.name}: read", slices)
        found = survey(reader, work / "original.nii", tick, window_of(request))
        remarks = list(reader.remarks)
    part, jpegls = choose_part(found), JpegLs(found)
    stability, organs = Radiomics(part, found.window), Organs(found, request.segment, work)
    judged: list[Judged] = []

    def begin(stage: str) -> Callable[[int], None]:
        return progress(stage, slices)

    for case in group:
        for method, cost, made, codec in _made(case, codecs, options, work, begin):
            tick = progress(f"{first.name}: {method}", slices)
            one = judge(
                first.name, method, organs.maps(case, made), found, made, cost, jpegls, tick
            )
            one.numbers["radiomics"] = stability.compare(made)
            if codec is not None:
                through = partial(reconstruct_part, codec, options, found, work)
                one.numbers["low_contrast"] = detectability(part, through)
            judged.append(one)
    return _facts(first, found, remarks, judged, organs.source(first)), judged


def _check_places(reader: Reader, group: list[Case]) -> None:
    """Raise VolumeError if something given lies on another grid than the original."""
    for case in group:
        for path, role in (
            (case.reconstruction, "reconstruction"),
            (case.labels, "labels"),
            (case.reconstruction_labels, "labels of the reconstruction"),
        ):
            if path is not None:
                with contextlib.closing(open_volume(path, any_range=True)) as other:
                    check_same_place(reader, other, role)


def _made(
    case: Case,
    codecs: dict[str, Codec],
    options: RunOptions,
    work: Path,
    begin: Callable[[str], Callable[[int], None]],
) -> Iterator[tuple[str, dict[str, Any] | None, Path, Codec | None]]:
    """Yield each reconstruction of a scan: method, what it took, its path, and its model."""
    if case.reconstruction is not None:
        yield case.method, None, case.reconstruction, None
        return
    for name, codec in codecs.items():
        cost, made = reconstruct(case, codec, options, work, begin(f"{name}: run"))
        yield name, cost, made, codec


def _facts(
    case: Case, found: Survey, remarks: list[str], judged: Sequence[Judged], organs: str
) -> dict[str, Any]:
    return {
        "name": case.name,
        "path": str(case.ct),
        "shape": list(found.geometry.shape),
        "spacing_mm": list(found.geometry.spacing),
        "noise_hu": found.noise,
        "clipped": found.clipped,
        "remarks": remarks,
        "labels": organs,
        "methods": [one.numbers for one in judged],
    }


def _untaken(damaged: Sequence[tuple[Path, str]]) -> list[dict[str, Any]]:
    return [
        {"name": path.name, "path": str(path), "error": f"no readable scan: {reason}"}
        for path, reason in damaged
    ]


def _methods(scans: Any) -> list[str]:
    """Return the names of all methods, in order of appearance."""
    names = [one["method"] for scan in scans for one in scan.get("methods", [])]
    return list(dict.fromkeys(names))


def _keep_worst(pictures: dict[str, dict[str, Any]], one: Judged) -> None:
    """Keep the pictures of the scan with the largest mean error of each method."""
    method, mae = one.numbers["method"], one.numbers["errors"]["mae"]
    if method not in pictures or mae > pictures[method]["mae"]:
        pictures[method] = {"method": method, "scan": one.scan, "mae": mae, "planes": one.planes}


def _keep_findings(gallery: Gallery, one: Judged) -> None:
    """Keep the pictures of the worst findings of each method over all scans."""
    found = gallery.setdefault(one.numbers["method"], [])
    worst = one.numbers["structure"]["worst"]
    found += [
        {"scan": one.scan, "facts": facts, "picture": picture}
        for facts, picture in zip(worst, one.thumbnails, strict=False)
    ]
    found.sort(key=lambda entry: badness(entry["facts"]), reverse=True)
    del found[SHOWN:]


def _empty(work: Path) -> None:
    """Remove the copies of one scan."""
    import shutil

    for path in work.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
