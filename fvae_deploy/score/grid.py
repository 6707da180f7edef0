"""The common grid on which all CTs are compared: axes L, P, S and one spacing.

The axes of a CT are exchanged and reversed so that they run to the left, to the back and to the
head; small angles between a scanner's axes and the body's stay. Then each axis is resampled with a
triangle as wide as the coarser of the two pixels, so what is thinned out is averaged first. A CT
whose axis has the common spacing already keeps its values. Slices are a stream: memory is that of
a few.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.turning import Turn, TurnedFrames
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import open_volume

AXES = "LPS"
SIDES = {"L": "LR", "P": "AP", "S": "IS"}
SLAB = 8  # slices

Frame = NDArray[np.float32]  # [x, y] in HU
Spacing = tuple[float, float, float]  # mm along L, P, S


def turn_of(geometry: Geometry) -> Turn:
    """Return the turn that brings the axes of a CT to L, P, S."""
    codes = geometry.orientation
    order = [next(n for n, code in enumerate(codes) if code in SIDES[axis]) for axis in AXES]
    flips = [codes[n] != axis for n, axis in zip(order, AXES, strict=True)]
    return Turn((order[0], order[1], order[2]), (flips[0], flips[1], flips[2]))


def common_spacing(real: Sequence[Geometry], generated: Sequence[Geometry]) -> Spacing:
    """Return the spacing of the coarser set: of each axis the larger of the sets' medians."""
    medians = [
        np.median([turn_of(geometry).geometry(geometry).spacing for geometry in one], axis=0)
        for one in (real, generated)
    ]
    x, y, z = np.round(np.maximum(*medians), 4).tolist()
    return x, y, z


class CommonGrid:
    """One CT on the common grid."""

    def __init__(self, geometry: Geometry, spacing: Spacing) -> None:
        self.turn = turn_of(geometry)
        turned = self.turn.geometry(geometry)
        self.before = turned.shape
        counts = [
            max(1, round(n * own / mm))
            for n, own, mm in zip(turned.shape, turned.spacing, spacing, strict=True)
        ]
        self.shape = counts[0], counts[1], counts[2]
        self.spacing = spacing

    @property
    def resampled(self) -> bool:
        """Whether the CT has another number of voxels on the common grid."""
        return self.shape != self.before

    def slices(self, path: Path) -> Iterator[Frame]:
        """Yield the slices [x, y] of the volume at `path` in HU, from the feet to the head."""
        x, y, z = (triangles(n, m) for n, m in zip(self.before, self.shape, strict=True))
        in_plane = self.before[:2] != self.shape[:2]
        frames = (
            (x @ frame.astype(np.float32) @ y.T if in_plane else frame.astype(np.float32))
            for frame in self._turned(path)
        )
        yield from frames if self.before[2] == self.shape[2] else blended(frames, z)

    def _turned(self, path: Path) -> Iterator[NDArray[Any]]:
        with contextlib.closing(open_volume(path, any_range=True)) as reader:
            if self.turn.order == (0, 1, 2) and not self.turn.flips[2]:
                axes = tuple(n for n in (0, 1) if self.turn.flips[n])
                for slab in reader.slabs(SLAB):
                    for frame in slab:
                        yield np.flip(frame, axes)
                return
            frames: TurnedFrames | None = None
            try:
                for slab in reader.slabs(SLAB):
                    if frames is None:
                        frames = TurnedFrames(reader.geometry.shape, self.turn, slab.dtype)
                    for frame in slab:
                        frames.write(frame)
                if frames is not None:
                    yield from frames.planes()
            finally:
                if frames is not None:
                    frames.close()


def triangles(before: int, after: int) -> NDArray[np.float32]:
    """Return the weights [after, before] that resample an axis; each row adds up to 1."""
    if before == after:
        return np.eye(before, dtype=np.float32)
    scale = before / after
    centres = (np.arange(after) + 0.5) * scale - 0.5
    away = np.abs(np.arange(before) - centres.clip(0, before - 1)[:, None])
    weights = np.maximum(1 - away / max(scale, 1.0), 0)
    found: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return found


def blended(frames: Iterable[Frame], weights: NDArray[np.float32]) -> Iterator[Frame]:
    """Resample a stream of slices along z with weights [after, before]; memory is a few slices."""
    last = [int(np.flatnonzero(row)[-1]) for row in weights]
    open_: dict[int, Frame] = {}
    done = 0
    for z, frame in enumerate(frames):
        for target in np.flatnonzero(weights[:, z]).tolist():
            part = weights[target, z] * frame
            open_[target] = open_[target] + part if target in open_ else part
        while done < len(last) and last[done] <= z:
            yield open_.pop(done)
            done += 1
