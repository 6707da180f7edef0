"""Small pictures of the worst components of error, cut out of both volumes in a second reading."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.quality.picture import LUNG, SOFT
from fvae_deploy.report.pictures import thumbnail
from fvae_deploy.report.survey import Survey, clipped_to
from fvae_deploy.volume.open import open_volume

SHOWN = 12
SIDE = 44.0  # mm
BONE = (400.0, 1800.0)  # level and width, HU


def add_thumbnails(worst: list[dict[str, Any]], found: Survey, reconstruction: Path) -> list[str]:
    """Return a picture of each of the worst components, as data URIs, in order."""
    shown = worst[:SHOWN]
    wanted = {one["voxel"][2] for one in shown}
    before, after = (slices(path, wanted) for path in (found.copy, reconstruction))
    pictures = []
    for one in shown:
        x, y, z = one["voxel"]
        pair = [
            _cut(clipped_to(frames[z], found.window), x, y, found.geometry.spacing)
            for frames in (before, after)
        ]
        pair = [upright(frame, found.geometry.orientation) for frame in pair]
        level, width = _window(float(np.median(pair[0])))
        pictures.append(thumbnail(pair[0], pair[1], level, width))
    return pictures


def slices(path: Path, wanted: set[int]) -> dict[int, NDArray[Any]]:
    """Read some slices [x, y] of a volume in HU, in one pass."""
    found: dict[int, NDArray[Any]] = {}
    if not wanted:
        return found
    with contextlib.closing(open_volume(path, any_range=True)) as reader:
        first = min(wanted)
        for z, slab in enumerate(reader.slabs(1, start=first), first):
            if z in wanted:
                found[z] = slab[0]
            if z == max(wanted):
                break
    return found


def _cut(frame: NDArray[Any], x: int, y: int, spacing: tuple[float, float, float]) -> NDArray[Any]:
    """Cut a square around a voxel; what lies outside the slice repeats its edge."""
    reach = [max(4, round(SIDE / 2 / mm)) for mm in spacing[:2]]
    padded = np.pad(frame, [(r, r) for r in reach], mode="edge")
    return padded[x : x + 2 * reach[0] + 1, y : y + 2 * reach[1] + 1]


def upright(frame: NDArray[Any], orientation: str) -> NDArray[Any]:
    """Turn a square [x, y] so that the patient's left is at the right, and the back below.

    Slices that are not axial are shown as they are stored.
    """
    if orientation[0] in "AP" and orientation[1] in "LR":
        frame, orientation = frame.T, orientation[1] + orientation[0]
    if orientation[0] == "R":
        frame = frame[::-1]
    return frame[:, ::-1] if orientation[1] == "A" else frame


def _window(hu: float) -> tuple[float, float]:
    if hu < -400:
        return LUNG
    return BONE if hu > 250 else SOFT
