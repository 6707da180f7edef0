"""Masks of findings that are read often and are 0 nearly everywhere: kept compressed in memory."""

from __future__ import annotations

import zlib
from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import numpy as np

from fvae_deploy.generation.labels import Labels


class Findings(Protocol):
    """Numbers of findings in every voxel, slice by slice."""

    path: Path

    def planes(self, start: int) -> Generator[Labels]:
        """Yield the number of the finding in every voxel, [x, y], from slice `start` on."""
        ...


class Remembered:
    """Findings whose slices are kept from the first whole reading on; empty ones take nothing."""

    def __init__(self, findings: Findings) -> None:
        self.path, self._findings = findings.path, findings
        self._kept: list[bytes | None] | None = None
        self._shape: tuple[int, ...] = ()

    def planes(self, start: int) -> Generator[Labels]:
        """Yield the number of the finding in every voxel, [x, y], from slice `start` on."""
        if self._kept is not None:
            for kept in self._kept[start:]:
                yield self._plane(kept)
            return
        read: list[bytes | None] = []
        for plane in self._findings.planes(start):
            self._shape = plane.shape
            read.append(zlib.compress(plane.astype(np.int32).tobytes(), 1) if plane.any() else None)
            yield plane
        if start == 0:
            self._kept = read

    def _plane(self, kept: bytes | None) -> Labels:
        if kept is None:
            return np.zeros(self._shape, np.int64)
        stored = np.frombuffer(zlib.decompress(kept), np.int32)
        return stored.reshape(self._shape).astype(np.int64)
