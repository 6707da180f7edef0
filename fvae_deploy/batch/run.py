"""Many scans through one engine: the next is opened and its first slices read meanwhile.

A scan that fails is told, noted and passed. What is there already is passed with `resume`, and
one that was stopped goes on where it was.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fvae_deploy import api
from fvae_deploy.batch.scans import Scan
from fvae_deploy.errors import FvaeError, VolumeError
from fvae_deploy.storage.fingerprint import difference
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.rss import reset_peak
from fvae_deploy.stream.threads import ahead
from fvae_deploy.volume.base import Primed
from fvae_deploy.volume.open import open_volume

ONES_OWN = (FvaeError, OSError, MemoryError)  # what fails with one scan and not with the next
Begin = Callable[[str, int], Callable[[int], None]]  # a stage and its length -> its progress
ENGINE = ("model", "engine", "precision", "device")
Outcome = dict[str, Any]  # of a scan: ct, output and its report, or an error, or that it was passed


def run_scans(
    verb: str,
    scans: list[Scan],
    options: dict[str, Any],
    *,
    resume: bool = False,
    say: Callable[[str], None] = lambda message: None,
    progress: Begin = lambda stage, length: lambda done: None,
) -> list[Outcome]:
    """Encode or reconstruct scans, one after the other; returns what became of each.

    `options` are those of `api.encode` or `api.reconstruct`. Raises what concerns all of them:
    a bundle or an engine that cannot be opened.
    """
    options = dict(options)
    opened = {name: options.pop(name) for name in ENGINE if name in options}
    results: list[Outcome] = []
    with (
        open_codec(**opened) as codec,
        contextlib.closing(ahead(_opened(scans, resume), 1)) as readers,
    ):
        for number, (scan, reader) in enumerate(readers, start=1):
            found = run_scan(verb, scan, reader, codec, options, resume, progress)
            say(f"{number} of {len(scans)}: {tell(found)}")
            results.append(found)
    return results


def run_scan(
    verb: str,
    scan: Scan,
    reader: Primed | Exception | None,
    codec: Codec,
    options: dict[str, Any],
    resume: bool,
    progress: Begin,
) -> Outcome:
    """Run one scan that `open_scan` opened; what is wrong with it alone goes into the outcome."""
    facts: Outcome = {"ct": str(scan.ct), "output": str(scan.output)}
    if reader is None:
        problem = _differs(scan.output, codec, options) if verb == "encode" else None
        return facts | ({"error": problem, "kind": "LatentError"} if problem else {"passed": True})
    if isinstance(reader, Exception):
        return facts | {"error": str(reader), "kind": type(reader).__name__}
    tick = progress(scan.output.name, reader.geometry.shape[2])
    reset_peak()
    try:
        _ready(scan.output.parent)
        run = api.encode if verb == "encode" else api.reconstruct
        report = run(reader, scan.output, model=codec, resume=resume, progress=tick, **options)
    except ONES_OWN as error:
        return facts | {"error": str(error), "kind": type(error).__name__}
    return facts | {"report": report}


def _differs(output: Path, codec: Codec, options: dict[str, Any]) -> str | None:
    """Tell how latents that are there differ from what is asked for."""
    try:
        found = LatentReader(output).info
    except FvaeError as error:
        return str(error)
    of = codec.manifest
    wanted = {
        "identity": of.identity,
        "engine": codec.engine.name,
        "precision": codec.engine.precision,
        "protocol": options.get("protocol") or of.geometry.protocols[0],
        "k": of.check_step(options.get("k")),
    }
    for name, value in wanted.items():
        if (there := getattr(found, name)) != value:
            return (
                f"expected {output} to be of the same run, found {difference(name, there, value)}: "
                "remove it, or choose another folder"
            )
    return None


def open_scan(scan: Scan, resume: bool) -> Primed | Exception | None:
    """Open a scan and read its first slices; None where its result is there already."""
    if resume and scan.output.exists():
        return None
    try:
        return Primed(open_volume(scan.ct, scan.series))
    except ONES_OWN as error:
        return error


def _opened(
    scans: Iterable[Scan], resume: bool
) -> Iterator[tuple[Scan, Primed | Exception | None]]:
    for scan in scans:
        yield scan, open_scan(scan, resume)


def _ready(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(
            f"expected a place for results at {folder}, found {error.strerror}: choose another"
        ) from None


def tell(found: Outcome) -> str:
    """Say in a line what became of a scan."""
    if "report" in found:
        report = found["report"]
        seconds, speed = report["seconds"]["total"], report["slices_per_second"]
        return f"{found['output']} in {seconds:.1f} s, {speed:.1f} slices/s"
    return (
        f"{found['ct']} failed: {found['error']}"
        if "error" in found
        else f"{found['output']} is there"
    )


def summary(verb: str, results: list[Outcome], begin: float) -> dict[str, Any]:
    """Add up what became of all scans, JSON-ready; `begin` is of `time.perf_counter`."""
    done = [found["report"] for found in results if "report" in found]
    seconds = time.perf_counter() - begin
    slices = sum(report["volume"]["slices"] for report in done)
    return {
        "command": verb,
        "done": len(done),
        "failed": sum("error" in found for found in results),
        "passed": sum("passed" in found for found in results),
        "slices": slices,
        "seconds": round(seconds, 3),
        "slices_per_second": round(slices / seconds, 3),
        "scans": results,
    }


def check_all_done(found: dict[str, Any]) -> None:
    """Raise VolumeError where a scan failed."""
    if found["failed"]:
        first = next(scan for scan in found["scans"] if "error" in scan)
        raise VolumeError(
            f"expected {len(found['scans'])} results, found {found['failed']} failed, at first "
            f"{first['ct']} ({first['error']}): correct them and go on with --resume"
        )
