"""Batch mode: many scans through one engine; the next scan is opened while one is computed.

A scan that fails is reported, and the batch continues. With --resume, scans whose output exists are
skipped if it comes from the same input, model and options, and interrupted ones are continued.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel  # noqa: F401 - before the threads start: importing it in two at a time fails

from fvae_deploy import api
from fvae_deploy.batch.scans import Scan
from fvae_deploy.errors import FvaeError, VolumeError
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.rss import reset_peak
from fvae_deploy.stream.threads import ahead
from fvae_deploy.volume.base import Primed
from fvae_deploy.volume.open import check_output, open_volume
from fvae_deploy.volume.publish import make_folders

SCAN_ERRORS = (
    FvaeError,
    OSError,
    MemoryError,
)  # errors of one scan, after which the batch continues
Begin = Callable[
    [str, int], Callable[[int], None]
]  # a stage and its length -> its progress callback
Input = Primed | LatentReader | Exception | None


def silent(stage: str, length: int) -> Callable[[int], None]:
    """Show no progress."""
    return lambda done: None


@dataclass(frozen=True)
class ScanResult:
    """The result of one scan: a run report, an error, or that it was skipped."""

    scan: Scan
    report: dict[str, Any] | None = None
    error: str | None = None
    error_kind: str | None = None

    @classmethod
    def failed(cls, scan: Scan, error: BaseException) -> ScanResult:
        """Return the result of a scan that raised this error."""
        return cls(scan, error=str(error), error_kind=type(error).__name__)

    @property
    def skipped(self) -> bool:
        """Whether the scan was skipped because its output existed."""
        return self.report is not None and "skipped" in self.report

    def describe(self) -> str:
        """Return the result in one line of text."""
        if self.error is not None:
            return f"{self.scan.source} failed: {self.error}"
        if self.report is None or self.skipped:
            return f"{self.scan.output} exists: skipped"
        seconds, speed = self.report["seconds"]["total"], self.report["slices_per_second"]
        text = f"{self.scan.output} in {seconds:.1f} s, {speed:.1f} slices/s"
        if bound := self.report.get("bound"):
            text += f", every voxel within {bound['max_error_hu']:g} HU, checked"
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the result, JSON-ready."""
        facts: dict[str, Any] = {"input": str(self.scan.source), "output": str(self.scan.output)}
        if self.error is not None:
            return facts | {"error": self.error, "error_kind": self.error_kind}
        if self.skipped:
            return facts | {"skipped": True}
        return facts | {"report": self.report}


def run_scans(
    verb: str,
    scans: list[Scan],
    options: RunOptions,
    *,
    say: Callable[[str], None] = lambda message: None,
    progress: Begin = silent,
) -> list[ScanResult]:
    """Encode, decode or reconstruct scans one after the other; return the result of each.

    Raises BundleError or EngineError if the bundle or engine for all scans cannot be opened.
    """
    results: list[ScanResult] = []
    with (
        open_for_batch(verb, scans, options) as codec,
        contextlib.closing(ahead(_open_scans(verb, scans, options), 1)) as inputs,
    ):
        for number, (scan, opened) in enumerate(inputs, start=1):
            result = run_scan(verb, scan, opened, codec, options, progress)
            say(f"{number} of {len(scans)}: {result.describe()}")
            results.append(result)
    return results


class Worker:
    """One of several that run the scans of a batch: one engine, one scan at a time."""

    def __init__(self, verb: str, scans: list[Scan], options: RunOptions) -> None:
        self._verb, self._options = verb, options
        self._codec = open_for_batch(verb, scans, options)

    def run(self, scan: Scan) -> ScanResult:
        """Run one scan."""
        opened = open_scan(self._verb, scan, self._options)
        return run_scan(self._verb, scan, opened, self._codec, self._options, silent)


def open_for_batch(verb: str, scans: list[Scan], options: RunOptions) -> Codec:
    """Open the codec of a batch; for decode, with the model named in the first readable store."""
    model = options.model or api.MODEL
    if verb == "decode" and options.model is None:
        for scan in scans:
            with contextlib.suppress(*SCAN_ERRORS):
                model = LatentReader(scan.source).info.model
                break
    return open_codec(
        model,
        engine=options.engine,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
    )


def run_scan(
    verb: str, scan: Scan, opened: Input, codec: Codec, options: RunOptions, progress: Begin
) -> ScanResult:
    """Run one scan that `open_scan` opened; the result contains errors of this scan."""
    if isinstance(opened, Exception):
        return ScanResult.failed(scan, opened)
    reset_peak()
    try:
        _make_folder(scan.output.parent)
        if opened is None:
            slices = 0
        elif isinstance(opened, LatentReader):
            slices = opened.info.slices
        else:
            slices = opened.geometry.shape[2]
        tick = progress(scan.output.name, slices)
        if verb == "decode":
            report = api.decode(scan.source, scan.output, options, codec=codec, progress=tick)
        else:
            run = api.encode if verb == "encode" else api.reconstruct
            source = opened if isinstance(opened, Primed) else scan.source
            report = run(source, scan.output, scan.options(options), codec=codec, progress=tick)
    except SCAN_ERRORS as error:
        return ScanResult.failed(scan, error)
    return ScanResult(scan, report)


def open_scan(verb: str, scan: Scan, options: RunOptions) -> Input:
    """Open a scan and read its first slices.

    Returns None if the output exists: with --resume, `run_scan` then checks how it was made.
    Errors are returned, not raised.
    """
    try:
        if os.path.lexists(scan.output):
            if options.resume:
                return None
            check_output(scan.output, overwrite=options.overwrite)
        if verb == "decode":
            return LatentReader(scan.source)
        return Primed(open_volume(scan.source, scan.options(options).reading))
    except SCAN_ERRORS as error:
        return error


def _open_scans(
    verb: str, scans: Iterable[Scan], options: RunOptions
) -> Iterator[tuple[Scan, Input]]:
    for scan in scans:
        yield scan, open_scan(verb, scan, options)


def _make_folder(folder: Path) -> None:
    try:
        make_folders(folder)
    except OSError as error:
        raise VolumeError(
            f"expected a folder for results at {folder}, found {error.strerror}: choose another "
            "folder"
        ) from None


def summary(verb: str, results: list[ScanResult], seconds: float) -> dict[str, Any]:
    """Return the counts, the time and the results of all scans, JSON-ready."""
    reports = [r.report for r in results if r.report is not None and not r.skipped]
    slices = sum(report["volume"]["slices"] for report in reports)
    return {
        "command": verb,
        "done": len(reports),
        "failed": sum(result.error is not None for result in results),
        "skipped": sum(result.skipped for result in results),
        "slices": slices,
        "seconds": round(seconds, 3),
        "slices_per_second": round(slices / seconds, 3),
        "scans": [result.to_dict() for result in results],
    }


def check_all_done(results: list[ScanResult]) -> None:
    """Raise VolumeError if a scan failed."""
    failed = [result for result in results if result.error is not None]
    if failed:
        raise VolumeError(
            f"expected {len(results)} results, found {len(failed)} failed, first "
            f"{failed[0].scan.source} ({failed[0].error}): correct them and run again with --resume"
        )
