"""Fingerprints of files, and how two runs differ: what tells whether work may be continued."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path


def fingerprint_of(path: Path, files: Iterable[Path] = ()) -> str:
    """Say what tells that files changed: their sizes and times; of all in a folder by default."""
    if not files:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest, count, total, last = sha256(), 0, 0, 0.0
    for file in files:
        if file.is_file():
            found, name = file.stat(), file.relative_to(path).as_posix()
            digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode())
            count, total, last = count + 1, total + found.st_size, max(last, found.st_mtime)
    changed = datetime.fromtimestamp(last, UTC).isoformat(" ", "seconds")
    return f"{total} bytes in {count} files, changed {changed} ({digest.hexdigest()[:8]})"


def difference(name: str, found: object, wanted: object) -> str:
    """Tell what a stopped run was of, and what is asked for now."""
    if name == "input":
        return f"an input that changed since or another one ({found}, now {wanted})"
    return f"{'--step' if name == 'k' else name} {found!r} instead of {wanted!r}"
