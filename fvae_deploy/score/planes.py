"""What is cut out of a CT on the common grid: slices in three planes, a clip, a coarse volume."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.score.grid import CommonGrid, Frame, triangles

SLICES = 16  # of each plane, evenly spread over the middle 60 %
MIDDLE = (0.2, 0.8)
CLIP = 17  # slices, from the feet on
COARSE = 16  # cells of the coarse volume along each axis
SMALL = 132  # pixels: sides of small pictures

PLANES = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Cuts:
    """Parts of one CT in HU.

    `slices` are [n, rows, columns] by plane, upright: the patient's left at the right, the back
    below in axial ones, the head at the top in others. `clip` is [17, rows, columns], axial, None
    for a shorter CT; `coarse` is [16, 16, 16], means of cells that fill the volume; `pictures` are
    the middle axial, coronal and sagittal slice, each [132, 132] in int16: across, down.
    """

    slices: dict[str, Frame]
    clip: Frame | None
    coarse: Frame
    pictures: tuple[NDArray[np.int16], ...]


def places(count: int) -> list[int]:
    """Return the slices of a plane that are taken out of `count`."""
    low, high = (share * (count - 1) for share in MIDDLE)
    return sorted(set(np.linspace(low, high, min(SLICES, count)).round().astype(int).tolist()))


def cut(grid: CommonGrid, stream: Iterable[Frame]) -> Cuts:
    """Cut the parts out of the slices of a CT, which are read once."""
    nx, ny, nz = grid.shape
    at = [places(n) for n in grid.shape]
    axial = []
    coronal = np.empty((len(at[1]), nx, nz), np.float32)
    sagittal = np.empty((len(at[0]), ny, nz), np.float32)
    clip: list[Frame] = []
    x, y, z = (_cells(n) for n in grid.shape)
    coarse = np.zeros((COARSE, COARSE, COARSE), np.float32)
    middle: dict[str, Frame] = {
        "coronal": np.empty((nx, nz), np.float32),
        "sagittal": np.empty((ny, nz), np.float32),
    }
    for index, frame in enumerate(stream):
        if index in at[2]:
            axial.append(frame)
        if index == nz // 2:
            middle["axial"] = frame
        coronal[:, :, index] = frame[:, at[1]].T
        sagittal[:, :, index] = frame[at[0]]
        middle["coronal"][:, index], middle["sagittal"][:, index] = (
            frame[:, ny // 2],
            frame[nx // 2],
        )
        if index < CLIP:
            clip.append(frame)
        coarse += (x @ frame @ y.T)[:, :, None] * z[:, index]
    return Cuts(
        {
            "axial": np.stack(axial).transpose(0, 2, 1),
            "coronal": coronal.transpose(0, 2, 1)[:, ::-1],
            "sagittal": sagittal.transpose(0, 2, 1)[:, ::-1],
        },
        np.stack(clip).transpose(0, 2, 1) if len(clip) == CLIP else None,
        coarse,
        tuple(_small(plane, middle[plane], grid) for plane in PLANES),
    )


def _cells(count: int) -> NDArray[np.float32]:
    """Return the weights [16, count] that average an axis in cells of equal length."""
    if count <= COARSE:
        return triangles(count, COARSE)
    edges = np.linspace(0, count, COARSE + 1)
    index = np.arange(count)
    overlap = np.minimum(index + 1, edges[1:, None]) - np.maximum(index, edges[:-1, None])
    weights = np.maximum(overlap, 0)
    cells: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return cells


def _small(plane: str, picture: Frame, grid: CommonGrid) -> NDArray[np.int16]:
    """Return a slice as a square [132, 132] to scale, the head at the top, with air around."""
    x, y, z = grid.spacing
    steps = {"axial": (x, y), "coronal": (x, z), "sagittal": (y, z)}[plane]
    if plane != "axial":
        picture = picture[:, ::-1]
    sides = [n * mm for n, mm in zip(picture.shape, steps, strict=True)]
    first, second = (max(1, round(SMALL * side / max(sides))) for side in sides)
    scaled = triangles(picture.shape[0], first) @ picture @ triangles(picture.shape[1], second).T
    square = np.full((SMALL, SMALL), -1000, np.int16)
    a, b = (SMALL - first) // 2, (SMALL - second) // 2
    square[a : a + first, b : b + second] = np.rint(scaled)
    return square
