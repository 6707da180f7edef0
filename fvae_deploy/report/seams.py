"""Seams: whether the error jumps more across borders of the computation than elsewhere.

For every line between two rows, columns or slices, the mean size of the error's step across it is
summed up. A seam's strength is the mean over its borders divided by the mean over the lines up to 3
away from them that are no borders themselves: 1 means that nothing is to be seen.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.report.blocks import Block
from fvae_deploy.volume.base import Geometry

CELL, FRAME = 8, 4  # voxels of a latent cell, slices of a latent frame, of most networks
WINDOW = 65  # slices that published scripts take at once
AROUND = 3  # lines

Profile = NDArray[np.float64]


class Seams:
    """Running mean steps of the error across all lines; a number for each line."""

    def __init__(self, geometry: Geometry) -> None:
        nx, ny, nz = geometry.shape
        self.shape = nx, ny, nz
        self.lines = [np.zeros(n - 1) for n in self.shape]

    def add(self, block: Block) -> None:
        """Add the core of a block, and its last slice's step to the next one."""
        a, b = (block.arrays[name] for name in ("original", "reconstruction"))
        first, last = block.inner.start, block.inner.stop
        e = b[first : last + 1].astype(np.float32) - a[first : last + 1]
        core = e[: last - first]
        nx, ny, nz = self.shape
        self.lines[0] += np.abs(np.diff(core, axis=1)).sum((0, 2), np.float64) / (ny * nz)
        self.lines[1] += np.abs(np.diff(core, axis=2)).sum((0, 1), np.float64) / (nx * nz)
        steps = np.abs(np.diff(e, axis=0)).mean((1, 2), np.float64)
        self.lines[2][block.start : block.start + len(steps)] = steps

    def result(self, cost: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Return each kind of border with its strength; `cost` knows the run and its model."""
        facts = cost or {}
        cell, frame = facts.get("cell", CELL), facts.get("frame", FRAME)
        nx, ny, nz = self.shape
        kinds: list[tuple[str, int, Iterable[int]]] = []
        if cell > 1:
            kinds += [
                (f"latent cells, {cell} voxels, along x", 0, range(cell - 1, nx - 1, cell)),
                (f"latent cells, {cell} voxels, along y", 1, range(cell - 1, ny - 1, cell)),
            ]
        if frame > 1:
            kinds.append((f"latent frames, {frame} slices", 2, range(0, nz - 1, frame)))
        kinds.append((f"windows of {WINDOW} slices", 2, range(WINDOW - 1, nz - 1, WINDOW)))
        for axis, name in enumerate("xy"):
            borders = facts.get("tile_borders", ([], []))[axis]
            kinds.append((f"tiles, along {name}", axis, [border - 1 for border in borders]))
        return [
            {"border": name, **strength(self.lines[axis], borders)} for name, axis, borders in kinds
        ]


def strength(lines: Profile, borders: Iterable[int]) -> dict[str, Any]:
    """Return the mean step across borders and beside them, in HU, and their ratio.

    Line k lies between k and k + 1. None where there are no such borders.
    """
    chosen = sorted({k for k in borders if 0 <= k < len(lines)})
    beside = {k + d for k in chosen for d in range(-AROUND, AROUND + 1)} - set(chosen)
    others = [k for k in sorted(beside) if 0 <= k < len(lines)]
    if not chosen or not others:
        return {"borders": len(chosen), "across_hu": None, "beside_hu": None, "ratio": None}
    across, near = float(lines[chosen].mean()), float(lines[others].mean())
    return {
        "borders": len(chosen),
        "across_hu": across,
        "beside_hu": near,
        "ratio": across / near if near else None,
    }


def tile_borders(plan: dict[str, Any], plane: tuple[int, int], cell: int) -> list[list[int]]:
    """Return the borders of all tiles of a run's plan along x and y, in voxels.

    `plane` is the size of a slice, `cell` the voxels of a latent cell.
    """
    found: list[set[int]] = [set(), set()]
    for grids in plan["tile_borders"].values():
        for axis, (count, borders) in enumerate(zip(grids["plane"], grids["at"], strict=True)):
            padded = -(-plane[axis] // cell) * cell
            found[axis] |= {round(border * padded / count) for border in borders}
    return [sorted(k for k in some if 0 < k < n) for some, n in zip(found, plane, strict=True)]
