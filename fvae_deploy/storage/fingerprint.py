"""Fingerprints of input files, and texts that say how two runs differ, for --resume."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path


def fingerprint_of(path: Path, files: Iterable[Path] = ()) -> str:
    """Return a fingerprint of files by name, size and mtime; by default of all in the folder.

    An archive stands for the files that were unpacked from it to another place.
    """
    files = tuple(files)
    packed = path.is_file() and all(file.parent != path.parent for file in files)
    if not files or packed:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest, count, total, last = sha256(), 0, 0, 0.0
    for file in files:
        if file.is_file():
            stat, name = file.stat(), Path(os.path.relpath(file, path)).as_posix()
            digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            count, total, last = count + 1, total + stat.st_size, max(last, stat.st_mtime)
    changed = datetime.fromtimestamp(last, UTC).isoformat(" ", "seconds")
    return f"{total} bytes in {count} files, changed {changed} ({digest.hexdigest()[:8]})"


def difference(name: str, before: object, now: object) -> str:
    """Return a text on how a setting of an interrupted run differs from that of this run."""
    if name == "input":
        return f"an input that changed since then or is a different one ({before}, now {now})"
    return f"{'--step' if name == 'k' else name} {before!r} instead of {now!r}"
