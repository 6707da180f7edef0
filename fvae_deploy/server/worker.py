"""The worker process: one engine that runs the jobs of the store one after the other.

    python -m fvae_deploy.server.worker FOLDER SETTINGS

It exits when its standard input closes, so it never outlives the server, even a killed one. The
state of an interrupted job is in the store and in the .partial files beside its output.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import shutil
import sqlite3
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy import api
from fvae_deploy.errors import FvaeError, LatentError, OutputError, UsageError, of_system
from fvae_deploy.generation.networks import Networks
from fvae_deploy.parse import slice_range
from fvae_deploy.server import requests
from fvae_deploy.server.settings import WorkerSettings
from fvae_deploy.server.store import Job, Store
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.rss import current_rss, reset_peak
from fvae_deploy.volume.open import open_volume

TICK = 0.2  # minimum seconds between two writes of a job's progress
IDLE = 0.05  # seconds between polls for a queued job
PAUSES = (1, 5, 15, 60, 300)  # seconds before a job is tried again whose disk was full
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS),
    *(errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.ENODEV),
}


@dataclass(frozen=True)
class Engines:
    """What stays open between jobs: the VAE, and the generator once a job has needed it."""

    codec: Codec
    networks: Networks


class CancelledError(FvaeError):
    """The job was cancelled while running."""


def main() -> None:
    """Run jobs until standard input closes; print an error as one line and exit."""
    try:
        serve(Path(sys.argv[1]), WorkerSettings.from_json(sys.argv[2]))
    except FvaeError as error:
        print(f"fvae: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def serve(folder: Path, settings: WorkerSettings) -> None:
    """Open the engine, then run jobs without end."""
    threading.Thread(target=_exit_with_server, daemon=True).start()
    os.nice(10)  # the server process has priority
    with (folder / "worker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the worker of a killed server may still be exiting
        store = Store(folder)
        store.recover(settings.attempts)
        options = settings.options
        with (
            open_codec(
                options.model or api.MODEL,
                engine=options.engine,
                precision=options.precision,
                device=options.device,
                threads=options.threads,
            ) as codec,
            Networks() as networks,
        ):
            facts = {
                "pid": os.getpid(),
                "model": codec.manifest.name,
                "engine": codec.engine.name,
                "precision": codec.engine.precision,
            }
            while True:
                reset_peak()
                # Libraries that an earlier job loaded do not count against the next job's budget.
                store.set_worker(facts | {"baseline": current_rss()})
                while (job := store.claim()) is None:
                    time.sleep(IDLE)
                run_job(store, job, Engines(codec, networks), settings)


def _exit_with_server() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def run_job(store: Store, job: Job, engines: Engines, settings: WorkerSettings) -> None:
    """Run one job and record in the store how it ended."""
    folder, state = store.files / job.id, "failed"
    try:
        result, report = _patiently(store, job, folder, engines, settings)
    except CancelledError as error:
        kind, message, state = "cancelled", str(error), "cancelled"
    except FvaeError as error:
        kind, message = type(error).__name__, str(error).replace(f"{folder}/", "")
    except MemoryError:
        kind = "MemoryError"
        message = "expected enough memory, found none left: set a smaller memory option"
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        kind = "OSError"
        message = (
            f"expected to write to the server's disk, found {reason}: ask the operator to check it"
        )
    else:
        store.finish(job.id, result, report)
        clear(folder, store.get(job.id))
        return
    clear(folder, None)  # first: on a full disk, the store may need the space for this message
    store.fail(job.id, kind, message, state)


def _patiently(
    store: Store, job: Job, folder: Path, engines: Engines, settings: WorkerSettings
) -> tuple[str, dict[str, Any]]:
    """Run a job; while the disk fails, wait and then continue from what is stored."""
    for pause in (*PAUSES, None):
        try:
            result, report = _resume_or_restart(store, job, folder, engines, settings)
            _to_disk(folder / result)
            return result, report
        except (FvaeError, OSError, sqlite3.OperationalError) as error:
            if pause is None or not _is_of_disk(error):
                raise
        _wait(store, job, pause)
    raise AssertionError("unreachable")


def _is_of_disk(error: BaseException) -> bool:
    """Return whether an error comes from a disk that is full, or away for a while."""
    cause = of_system(error)
    return isinstance(error, sqlite3.OperationalError) or (
        cause is not None and cause.errno in DISK_ERRORS
    )


def _wait(store: Store, job: Job, seconds: float) -> None:
    """Wait; raises CancelledError if the job was cancelled or deleted."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(min(TICK, seconds))
        with suppress(sqlite3.OperationalError):
            current = store.get(job.id)
            if current is None or current.cancel:
                raise CancelledError("cancelled while running")


def clear(folder: Path, job: Job | None) -> None:
    """Remove all files but the result: scans are kept only as long as their job needs them."""
    with suppress(FileNotFoundError):  # deleted at the same time by another process
        for path in folder.iterdir():
            if job is None or path.name != job.result:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _resume_or_restart(
    store: Store, job: Job, folder: Path, engines: Engines, settings: WorkerSettings
) -> tuple[str, dict[str, Any]]:
    """Resume a job that a dead worker left; start it again if another version had begun it."""
    try:
        return _perform(store, job, folder, engines, settings)
    except (LatentError, UsageError):
        partial = [path for path in folder.glob("*.partial") if path.is_dir()]
        if not partial:
            raise
    for path in partial:
        shutil.rmtree(path)
    return _perform(store, job, folder, engines, settings)


def _perform(
    store: Store, job: Job, folder: Path, engines: Engines, settings: WorkerSettings
) -> tuple[str, dict[str, Any]]:
    """Run the verb; return the file name of the result and the run report."""
    request = requests.parse(job.verb, job.options)
    options = request.run_options(settings.options)
    source, name = _input(job, folder), f"result.{request.extension}"
    output = folder / ("latents.zarr" if job.verb == "encode" else name)
    _remove(output)  # from a worker that died before it could record the result
    begin = _progress(store, job)
    if isinstance(request, requests.GenerateOptions):
        report = _generate(job, folder, source, output, begin, request, options, settings, engines)
    elif isinstance(request, requests.DecodeOptions):
        slices = slice_range(request.slices) if request.slices else None
        tick = begin("decode", None)
        report = api.decode(
            source, output, options, slices=slices, codec=engines.codec, progress=tick
        )
    else:
        assert isinstance(request, requests.CtOptions)
        run = api.encode if job.verb == "encode" else api.reconstruct
        reader = open_volume(source, options.reading)
        tick = begin(job.verb, reader.geometry.shape[2])
        report = run(reader, output, options, codec=engines.codec, progress=tick)
        if output.is_dir():
            name = "result.zip"
            _pack(output, folder / name)
    report["input"], report["output"] = f"input.{job.kind}", name
    return name, report


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _generate(
    job: Job,
    folder: Path,
    mask: Path,
    output: Path,
    begin: Callable[[str, int], Callable[[int], None]],
    request: requests.GenerateOptions,
    options: RunOptions,
    settings: WorkerSettings,
    engines: Engines,
) -> dict[str, Any]:
    from fvae_deploy.generation.options import GenerationOptions
    from fvae_deploy.generation.pipeline import generate

    disease = next((folder / "input").glob("disease.nii*"), None)
    findings = folder / "input" / "findings.txt"
    report = generate(
        mask,
        output,
        dataclasses.replace(options, model=settings.generator),
        GenerationOptions(
            steps=request.steps,
            eta=request.eta,
            guidance=request.guidance,
            stitch=request.stitch,
            seed=request.seed,
        ),
        findings=str(findings) if findings.is_file() else None,  # a path: text could name a file
        disease_mask=disease,
        progress=begin,
        networks=engines.networks,
    )
    report["generator"]["disease_mask"] = disease and disease.name
    return report


def _input(job: Job, folder: Path) -> Path:
    if job.kind in ("nii", "nii.gz"):
        return folder / f"input.{job.kind}"
    if job.kind == "generation":
        return next((folder / "input").glob("mask.nii*"))
    return folder / "input" / "latents.zarr" if job.kind == "latents" else folder / "input"


def _progress(store: Store, job: Job) -> Callable[[str, int | None], Callable[[int], None]]:
    """Return a function that starts a stage and returns the stage's progress callback.

    The callback raises CancelledError if the job was cancelled.
    """

    def begin(stage: str, length: int | None) -> Callable[[int], None]:
        done, last_write = 0, 0.0

        def tick(count: int) -> None:
            nonlocal done, last_write
            done += count
            if time.monotonic() - last_write >= TICK or done == length:
                last_write = time.monotonic()
                if store.tick(job.id, stage, done, length):
                    raise CancelledError("cancelled while running")

        tick(0)
        return tick

    return begin


def _pack(folder: Path, target: Path) -> None:
    """Move a folder into a zip; the same files give the same bytes."""
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(path.relative_to(folder).as_posix())
                entry.file_size = path.stat().st_size
                with path.open("rb") as file, archive.open(entry, "w") as packed:
                    shutil.copyfileobj(file, packed, 1 << 20)
    partial.rename(target)
    shutil.rmtree(folder)


def _to_disk(path: Path) -> None:
    """Flush a result and its directory entry to disk, before its job is marked as done."""
    for target in (path, path.parent):
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise OutputError(
                f"expected to write {path}, found {error.strerror}: ask the operator to check the "
                "disk"
            ) from error
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
