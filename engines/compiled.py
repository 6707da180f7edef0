"""A cache of compiled graphs on disk, for small networks, so that a program starts faster.

    FOLDER/KEY.graph     sha256 of the rest, a line of JSON, and the graph as OpenVINO exports it

A key names everything that a compiled graph depends on; a file is used only if its hash is right.
Whatever goes wrong, the graph is compiled as without a cache: the results have the same bits.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUFFIX, BEGUN = ".graph", ".begun"
LIMIT = 128 << 20  # bytes of all files; those that were used longest ago are deleted
SMALL = 32 << 20  # bytes of weights; graphs of larger networks are compiled while others compute
ABANDONED = 3600.0  # seconds after which a file that was begun belongs to no process any more

logger = logging.getLogger("fvae")


class CompiledGraphs:
    """The files of one folder; any number of processes may use it at the same time."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self._folder, self._limit = folder, limit

    def load(self, facts: dict[str, Any]) -> tuple[dict[str, Any], memoryview] | None:
        """Return what `store` was given for the same facts; None if it is missing or damaged."""
        path = self._path(facts)
        try:
            content = bytearray(path.read_bytes())
        except OSError:
            return None
        digest, rest = content[:32], memoryview(content)[32:]
        if hashlib.sha256(rest).digest() != digest:
            logger.info("compiled graph %s is damaged: compiling again", path)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used now
        length = content.index(b"\n", 32) - 32
        return json.loads(bytes(rest[:length])), rest[length + 1 :]

    def store(
        self, facts: dict[str, Any], notes: dict[str, Any], export: Callable[[], bytes]
    ) -> None:
        """Keep what `export` returns, with notes; does nothing if the folder cannot be written."""
        begun = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            number, name = tempfile.mkstemp(suffix=BEGUN, dir=self._folder)
            begun = Path(name)
            with open(number, "wb") as file:
                rest = json.dumps(notes).encode() + b"\n" + export()
                file.write(hashlib.sha256(rest).digest())
                file.write(rest)
            begun.replace(self._path(facts))
            self._shrink()
        except (OSError, RuntimeError) as error:
            logger.info("compiled graph not kept in %s: %s", self._folder, error)
        finally:
            if begun is not None:
                with contextlib.suppress(OSError):
                    begun.unlink(missing_ok=True)

    def _path(self, facts: dict[str, Any]) -> Path:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{key[:40]}{SUFFIX}"

    def _shrink(self) -> None:
        """Delete the files that were used longest ago, until all together fit the limit."""
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has just deleted it
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, size, _ in files)
        for used, size, path in sorted(files):
            abandoned = path.suffix == BEGUN and time.time() - used > ABANDONED
            if abandoned or (path.suffix == SUFFIX and total > self._limit):
                path.unlink(missing_ok=True)
                total -= size


def processor() -> str:
    """Return what names this processor and its instructions; "" where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0].splitlines()
    except OSError:
        return ""
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features")
    facts = (line.partition(":") for line in lines)
    return "; ".join(value.strip() for name, _, value in facts if name.strip() in names)
