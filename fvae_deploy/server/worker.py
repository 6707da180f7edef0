"""The worker: a process with one engine that takes jobs from the store, one after the other.

    python -m fvae_deploy.server.worker FOLDER SETTINGS

It ends when its standard input does, so it never outlives the server, however that went. What
it was at is found in the store and in the files beside the output.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sqlite3
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fvae_deploy import api
from fvae_deploy.errors import FvaeError, LatentError, UsageError, VolumeError
from fvae_deploy.parse import parse_bytes, slice_range
from fvae_deploy.server.store import Job, Store
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.rss import current_rss, reset_peak
from fvae_deploy.volume.open import open_volume

TICK = 0.2  # seconds between notes of how far a job is, at least
IDLE = 0.05  # seconds between looks for a job


class CancelledError(FvaeError):
    """The job was cancelled while it ran."""


def main() -> None:
    """Serve until standard input ends; what keeps an engine from opening is told in one line."""
    try:
        serve(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except FvaeError as error:
        print(f"fvae: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def serve(folder: Path, options: dict[str, Any]) -> None:
    """Open the engine, then take jobs for ever."""
    threading.Thread(target=_live_as_long_as_the_server, daemon=True).start()
    os.nice(10)  # answers to requests come first
    with (folder / "worker.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one that a killed server left may still be ending
        store = Store(folder)
        store.recover(options["attempts"])
        with open_codec(
            options["model"],
            engine=options["engine"],
            precision=options["precision"],
            device=options["device"],
        ) as codec:
            facts = {
                "pid": os.getpid(),
                "model": codec.manifest.name,
                "engine": codec.engine.name,
                "precision": codec.engine.precision,
            }
            while True:
                reset_peak()
                # What a job leaves, a generation's libraries for one, is not the next one's.
                store.set_worker(facts | {"baseline": current_rss()})
                while (job := store.claim()) is None:
                    time.sleep(IDLE)
                work(store, job, codec, options)


def _live_as_long_as_the_server() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def work(store: Store, job: Job, codec: Codec, options: dict[str, Any]) -> None:
    """Do one job, and note in the store how it ended."""
    folder, state = store.files / job.id, "failed"
    try:
        result, report = _go_on(store, job, folder, codec, options)
        _to_disk(folder / result)
    except CancelledError as error:
        kind, message, state = "cancelled", str(error), "cancelled"
    except FvaeError as error:
        kind, message = type(error).__name__, str(error).replace(f"{folder}/", "")
    except MemoryError:
        kind, message = "MemoryError", "expected enough memory, found none left: ask for less"
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        kind, message = "OSError", f"expected a disk that works, found {reason}: ask for room on it"
    else:
        store.finish(job.id, result, report)
        clear(folder, store.get(job.id))
        return
    clear(folder, None)  # first: a full disk has no room to say so
    store.fail(job.id, kind, message, state)


def clear(folder: Path, job: Job | None) -> None:
    """Remove all but the result: a scan is kept no longer than its job runs."""
    with suppress(FileNotFoundError):  # the job is being deleted, or another clears it
        for path in folder.iterdir():
            if job is None or path.name != job.result:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _go_on(
    store: Store, job: Job, folder: Path, codec: Codec, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Do the job, from where a worker that died left it; from the start if of another version."""
    try:
        return _perform(store, job, folder, codec, options)
    except (LatentError, UsageError):
        left = [path for path in folder.glob("*.partial") if path.is_dir()]
        if not left:
            raise
    for path in left:
        shutil.rmtree(path)
    return _perform(store, job, folder, codec, options)


def _perform(
    store: Store, job: Job, folder: Path, codec: Codec, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Run the verb; returns the name of the result and the run's report."""
    asked = dict(job.options)
    ending = asked.pop("format", "nii.gz")
    wanted = asked.pop("memory", None)
    limit = int(options["memory"])
    asked["memory"] = min(parse_bytes(wanted), limit) if wanted else limit
    source, result = _input(job, folder), f"result.{ending}"
    begin = _progress(store, job)
    if job.verb == "encode":
        store_path = folder / "latents.zarr"
        reader = open_volume(source, asked.pop("series", None))
        tick = begin("encode", reader.geometry.shape[2])
        report = api.encode(reader, store_path, model=codec, resume=True, progress=tick, **asked)
        result = "result.zip"
        _pack(store_path, folder / result)
    elif job.verb == "decode":
        tick = begin("decode", None)
        slices = slice_range(asked.pop("slices")) if "slices" in asked else None
        report = api.decode(
            source, folder / result, model=codec, slices=slices, resume=True, progress=tick, **asked
        )
    elif job.verb == "reconstruct":
        reader = open_volume(source, asked.pop("series", None))
        tick = begin("reconstruct", reader.geometry.shape[2])
        report = api.reconstruct(
            reader, folder / result, model=codec, resume=True, progress=tick, **asked
        )
        if ending == "dcm":
            _pack(folder / result, folder / "result.zip")
            result = "result.zip"
    else:
        report = _generate(job, folder, source, folder / result, begin, asked, options)
    report["input"], report["output"] = f"input.{job.kind}", result
    return result, report


def _generate(
    job: Job,
    folder: Path,
    mask: Path,
    output: Path,
    begin: Callable[[str, int], Callable[[int], None]],
    asked: dict[str, Any],
    options: dict[str, Any],
) -> dict[str, Any]:
    from fvae_deploy.generation.pipeline import generate

    disease = next((folder / "input").glob("disease.nii*"), None)
    words = folder / "input" / "findings.txt"
    report = generate(
        mask,
        output,
        findings=str(words) if words.is_file() else None,  # as text it could name a file
        disease_mask=disease,
        model=options["generator"],
        engine=options["engine"],
        precision=options["precision"],
        device=options["device"],
        resume=True,
        progress=begin,
        **asked,
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
    """Make the function that begins a stage; its progress raises where the job is cancelled."""

    def begin(stage: str, length: int | None) -> Callable[[int], None]:
        done, noted = 0, 0.0

        def tick(count: int) -> None:
            nonlocal done, noted
            done += count
            if time.monotonic() - noted >= TICK or done == length:
                noted = time.monotonic()
                if store.tick(job.id, stage, done, length):
                    raise CancelledError("cancelled while it ran")

        tick(0)
        return tick

    return begin


def _pack(store: Path, target: Path) -> None:
    """Put a folder into a zip, the same bytes for the same files."""
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(store.rglob("*")):
            if path.is_file():
                entry = zipfile.ZipInfo(path.relative_to(store).as_posix())
                entry.file_size = path.stat().st_size
                with path.open("rb") as file, archive.open(entry, "w") as packed:
                    shutil.copyfileobj(file, packed, 1 << 20)
    partial.rename(target)
    shutil.rmtree(store)


def _to_disk(path: Path) -> None:
    """Wait until a result and its name are on disk: then only is its job done."""
    for place in (path, path.parent):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            raise VolumeError(f"expected to write {path}, found {error.strerror}") from None
        finally:
            os.close(descriptor)


if __name__ == "__main__":
    main()
