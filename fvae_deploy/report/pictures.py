"""Three planes at several positions for the page, in HU, and small pictures of findings.

Planes reach the page as 16-bit HU, so that its windows can be changed there. Each row is stored as
differences along it, which compress well; the page adds them up again.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.quality.picture import Plane, ThreePlanes, error_colours, window
from fvae_deploy.report.blocks import Block
from fvae_deploy.volume.base import Geometry

POSITIONS = 5
LONGEST = 512  # pixels of a plane along each axis: longer volumes are shown in every second slice
Blobs = dict[str, str]  # name -> base64 of compressed rows; shared planes are stored once
Gallery = dict[str, list[dict[str, Any]]]  # by method: scan, facts and picture of findings


@dataclass(frozen=True)
class Pictures:
    """All pictures of a page: planes of the worst scans, their pixels, and findings."""

    planes: list[dict[str, Any]]
    blobs: Blobs
    gallery: Gallery


class Planes:
    """Collects three planes at several positions from blocks of a pair; memory is bounded."""

    def __init__(self, geometry: Geometry, names: tuple[str, str]) -> None:
        self.steps = tuple(-(-n // LONGEST) for n in geometry.shape)
        self.shape = geometry.shape
        small = tuple(-(-n // step) for n, step in zip(geometry.shape, self.steps, strict=True))
        affine = geometry.affine.copy()
        affine[:3, :3] *= self.steps
        coarse = Geometry((small[0], small[1], small[2]), affine)
        self.views = [
            ThreePlanes(Path("report.png"), coarse, _at(coarse.shape, position), names)
            for position in range(min(POSITIONS, *small))
        ]

    def add(self, block: Block) -> None:
        """Copy the lines of the planes from the core of a block."""
        sx, sy, sz = self.steps
        skip = -block.start % sz
        pair = [block.core(name)[skip::sz, ::sx, ::sy] for name in ("original", "reconstruction")]
        if len(pair[0]):
            for view in self.views:
                view.add((block.start + skip) // sz, *pair)

    def result(self, blobs: Blobs) -> list[list[dict[str, Any]]]:
        """Return the planes of each position for the page; their pixels go into `blobs`."""
        positions = []
        for view in self.views:
            planes = []
            for plane in view.planes():
                axis = {"Sagittal": 0, "Coronal": 1, "Axial": 2}[plane.name]
                axis = _axis(view, plane, axis)
                planes.append(
                    {
                        "name": plane.name,
                        "slice": plane.index * self.steps[axis] + 1,
                        "count": self.shape[axis],
                        "right": plane.right,
                        "down": plane.down,
                        "mm": list(plane.spacing),
                        "size": list(plane.original.shape),
                        "original": _store(plane.original, blobs),
                        "error": _store(plane.reconstruction - plane.original, blobs),
                    }
                )
            positions.append(planes)
        return positions


def _axis(view: ThreePlanes, plane: Plane, usual: int) -> int:
    """Return the axis of the volume that a plane is normal to."""
    codes = view.geometry.orientation
    letters = {"Sagittal": "LR", "Coronal": "AP", "Axial": "SI"}[plane.name]
    return next((axis for axis, code in enumerate(codes) if code in letters), usual)


def _at(shape: tuple[int, ...], position: int) -> tuple[int, int, int]:
    """Return the voxel that the planes of a position go through, from 20 to 80 % of the way."""
    share = 0.2 + 0.6 * position / max(POSITIONS - 1, 1)
    x, y, z = (min(int(n * share), n - 1) for n in shape)
    return x, y, z


def _store(values: NDArray[Any], blobs: Blobs) -> str:
    """Store a plane [row, column] in HU, rounded; return its name."""
    whole = np.rint(values).astype("<i2")
    rows = np.diff(whole, axis=1, prepend=np.int16(0)).astype("<i2")
    packed = zlib.compress(rows.tobytes(), 9)
    name = hashlib.sha256(packed).hexdigest()[:16]
    blobs[name] = base64.b64encode(packed).decode()
    return name


def thumbnail(
    original: NDArray[Any], reconstruction: NDArray[Any], level: float, width: float
) -> str:
    """Return original, reconstruction and error side by side as a data URI of a PNG.

    Arrays are squares [x, y] in HU, and shown with x to the right and y down.
    """
    from PIL import Image

    side = 132
    grey = [Image.fromarray(window(hu.T, level, width)).convert("RGB")
            for hu in (original, reconstruction)]  # fmt: skip
    error = reconstruction.astype(np.float32) - original
    panels = [*grey, Image.fromarray(error_colours(error.T))]
    whole = Image.new("RGB", (3 * side + 8, side), (255, 255, 255))
    for number, panel in enumerate(panels):
        whole.paste(panel.resize((side, side), Image.Resampling.BICUBIC), (number * (side + 4), 0))
    stream = io.BytesIO()
    whole.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
