"""Places for test lesions in an original, and the lesions: balls and discs of known size and HU.

The places lie in even soft tissue of a part of the scan that is small enough to hold in memory, at
least 24 mm apart, so that a lesion does not reach into the surroundings of another one.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.report.survey import Survey
from fvae_deploy.report.tissues import OUTSIDE, SOFT, Spacing, tissues
from fvae_deploy.volume.open import open_volume

SIZES = (3.0, 5.0, 7.0, 10.0)  # mm, diameters
CONTRASTS = (10.0, 20.0, 40.0, 60.0)  # HU above the surroundings
SHAPES = ("ball", "disc")
DISC = 6.0  # mm, the height of a disc
SLICES, SIDE = 17, 320  # of the part of the scan, in voxels
APART = 24.0  # mm
CLEAR = 9.0  # mm of soft tissue around the middle of a place, in the slice
SPREAD = 16.0  # mm, between the places of radiomics
MARGIN = 16.0  # mm to the edge of the part
MOST = 64  # places
UNEVEN = 2.5  # times the smoothed scan's noise: the largest deviation around a place
FINE = 4  # parts of a voxel along each axis, for the edges of a lesion

Volume = NDArray[np.float32]  # [t, x, y] in HU
Place = tuple[int, int, int]  # t, x, y in a part


@dataclass(frozen=True)
class Part:
    """A part of a scan, [t, x, y] in HU from voxel `origin` (t, x, y) on, and the places in it."""

    hu: Volume
    origin: Place
    spacing: Spacing
    places: tuple[Place, ...]  # in even soft tissue
    spread: tuple[Place, ...]  # anywhere in the body, for radiomics


def choose_part(found: Survey) -> Part:
    """Cut out the part of a scan with most soft tissue, and find its even places."""
    nx, ny, nz = found.geometry.shape
    depth = min(SLICES, nz)
    amount = np.convolve(found.soft, np.ones(depth), mode="valid")
    first = int(np.argmax(amount))
    with contextlib.closing(open_volume(found.copy)) as reader:
        hu = next(reader.slabs(depth, start=first)).astype(np.float32)
    kind = tissues(hu, found.geometry.spacing)
    soft = kind == SOFT
    ranges = []
    for axis, size in ((1, nx), (2, ny)):
        profile = soft.sum(axis=tuple({0, 1, 2} - {axis}))
        side = min(SIDE, size)
        start = int(np.argmax(np.convolve(profile, np.ones(side), mode="valid")))
        ranges.append(slice(start, start + side))
    where = slice(None), *ranges
    hu, soft, kind = hu[where], soft[where], kind[where]
    places = even_places(hu, soft, found.geometry.spacing, found.smooth_noise or 0.0)
    spread = spread_places(kind != OUTSIDE, found.geometry.spacing)
    origin = first, ranges[0].start, ranges[1].start
    return Part(hu, origin, found.geometry.spacing, places, spread)


def even_places(
    hu: Volume, soft: NDArray[np.bool_], spacing: Spacing, noise: float
) -> tuple[Place, ...]:
    """Return places whose surroundings are soft tissue and even, the most even ones first."""
    from scipy import ndimage

    wide = [2 * max(1, round(CLEAR / mm)) + 1 for mm in spacing[:2]]
    tall = 2 * max(0, round(DISC / 2 / spacing[2])) + 1
    smooth = ndimage.gaussian_filter(hu, [0, *(1.5 / mm for mm in spacing[:2])], truncate=3.0)
    mean = ndimage.uniform_filter(smooth, [1, *wide])
    square = ndimage.uniform_filter(smooth * smooth, [1, *wide])
    uneven = np.sqrt(np.maximum(square - mean * mean, 0))
    clear = ndimage.minimum_filter(soft.astype(np.uint8), [min(tall, len(hu)), *wide]) > 0
    margin = [tall // 2 if len(hu) > tall else 0, *(round(MARGIN / mm) for mm in spacing[:2])]
    inside = np.zeros(hu.shape, bool)
    inside[tuple(slice(m, n - m) for m, n in zip(margin, hu.shape, strict=True))] = True
    candidates = np.argwhere(clear & inside & (uneven <= UNEVEN * noise))
    order = np.argsort(uneven[tuple(candidates.T)], kind="stable")
    step = np.array([spacing[2], *spacing[:2]])
    chosen: list[Place] = []
    left = candidates[order]
    while len(left) and len(chosen) < MOST:
        t, x, y = (int(n) for n in left[0])
        chosen.append((t, x, y))
        left = left[np.linalg.norm((left - left[0]) * step, axis=1) >= APART]
    return tuple(chosen)


def spread_places(body: NDArray[np.bool_], spacing: Spacing) -> tuple[Place, ...]:
    """Return random places in the body, always the same: 16 mm apart, 8 mm below the skin."""
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(body, sampling=(spacing[2], *spacing[:2]))
    candidates = np.argwhere(depth >= SPREAD / 2)
    np.random.default_rng(0).shuffle(candidates)
    step = np.array([spacing[2], *spacing[:2]])
    chosen: list[Place] = []
    while len(candidates) and len(chosen) < MOST:
        t, x, y = (int(n) for n in candidates[0])
        chosen.append((t, x, y))
        far = np.linalg.norm((candidates - candidates[0]) * step, axis=1) >= SPREAD
        candidates = candidates[far]
    return tuple(chosen)


def plant(
    part: Part, lesions: list[tuple[Place, str, float, float]], hu: Volume | None = None
) -> Volume:
    """Return a part with lesions added: place, shape, diameter in mm and HU of each."""
    result = (part.hu if hu is None else hu).copy()
    for place, shape, size, contrast in lesions:
        share, where = lesion(part.hu.shape, part.spacing, place, shape, size)
        result[where] += contrast * share
    return result


def lesion(
    shape_of_part: tuple[int, ...], spacing: Spacing, place: Place, shape: str, size: float
) -> tuple[Volume, tuple[slice, ...]]:
    """Return the share of each voxel that a lesion fills, and where these voxels are."""
    step = (spacing[2], *spacing[:2])
    height = DISC if shape == "disc" else size
    reach = [int(mm / 2 / s + 1.5) for mm, s in zip((height, size, size), step, strict=True)]
    where = tuple(
        slice(max(p - r, 0), min(p + r + 1, n))
        for p, r, n in zip(place, reach, shape_of_part, strict=True)
    )
    fine = (np.arange(FINE) + 0.5) / FINE - 0.5
    axes = [
        ((np.arange(w.start, w.stop) - p)[:, None] + fine).ravel() * s
        for w, p, s in zip(where, place, step, strict=True)
    ]
    t, x, y = np.meshgrid(*axes, indexing="ij", sparse=True)
    if shape == "disc":
        filled = (x * x + y * y <= size * size / 4) & (np.abs(t) <= height / 2)
    else:
        filled = x * x + y * y + t * t <= size * size / 4
    sizes = [n for w in where for n in (w.stop - w.start, FINE)]
    share: Volume = filled.reshape(sizes).mean(axis=(1, 3, 5), dtype=np.float32)
    return share, where


def spots(volume: NDArray[Any], part: Part, places: list[Place], reach: float) -> Volume:
    """Cut the square of ±`reach` mm around each place out of its slice: [n, x, y]."""
    rx, ry = (round(reach / mm) for mm in part.spacing[:2])
    cut = [volume[t, x - rx : x + rx + 1, y - ry : y + ry + 1] for t, x, y in places]
    result: Volume = np.stack(cut).astype(np.float32)
    return result
