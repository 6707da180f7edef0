"""Surfaces of segmentations before and after: Dice, normalised surface Dice, Hausdorff distance.

    Dice = 2 |A ∩ B| / (|A| + |B|)
    surface of a mask: its voxels with one of six neighbours outside it, or outside the volume
    NSD at t = the share of both surfaces' voxels that lie within t mm of the other surface
    HD95 = the larger of the two directions' 95th percentiles of these distances in mm

These are the definitions of MONAI. Volumes are read in blocks, so a distance is known up to the
halo of a block: what is farther counts as "more than" that, and a HD95 beyond it is not a number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.organs import organ_name
from fvae_deploy.report.blocks import Block
from fvae_deploy.report.survey import Survey
from fvae_deploy.report.tissues import SURFACES

TOLERANCES = (1.0, 2.0)  # mm
PERCENTILE = 95.0
DIGITS = 6  # of a distance in mm, as a key

Mask = NDArray[np.bool_]


class Agreement:
    """Running overlap and surface distances of two masks."""

    def __init__(self, step: tuple[float, float, float], limit: float) -> None:
        self.step, self.limit = step, limit  # mm along t, x, y; mm that distances are known to
        self.voxels = [0, 0]
        self.common = 0
        self.distances: tuple[dict[float, int], dict[float, int]] = ({}, {})

    def add(self, a: Mask, b: Mask, inner: slice, ends: tuple[bool, bool]) -> None:
        """Add masks [t, x, y] with a halo along z.

        `inner` are the slices that count; `ends` says whether the arrays begin and end where the
        volume does, whose border is a surface.
        """
        for number, mask in enumerate((a, b)):
            self.voxels[number] += int(np.count_nonzero(mask[inner]))
        self.common += int(np.count_nonzero(a[inner] & b[inner]))
        box = _box(a | b, round(self.limit / min(self.step[1:])) + 2)
        if box is None:
            return
        edges = [_edges(mask[box], ends) for mask in (a, b)]
        for number, (own, other) in enumerate((edges, edges[::-1])):
            where = np.nonzero(own[inner])
            if where[0].size:
                values = self._distances(other)[inner][where]
                for value, count in zip(*np.unique(values, return_counts=True), strict=True):
                    key = round(float(value), DIGITS)
                    found = self.distances[number]
                    found[key] = found.get(key, 0) + int(count)

    def _distances(self, edge: Mask) -> NDArray[Any]:
        """Return the distance of every voxel to a surface; infinite beyond the limit."""
        from scipy import ndimage

        if not edge.any():
            return np.full(edge.shape, np.inf)
        distances: NDArray[Any] = ndimage.distance_transform_edt(~edge, sampling=self.step)
        distances[distances > self.limit - 1e-6] = np.inf
        return distances

    def result(self) -> dict[str, Any] | None:
        """Return Dice, NSD and HD95; None if both masks are empty."""
        total = sum(self.voxels)
        if not total:
            return None
        surface = sum(sum(found.values()) for found in self.distances)
        near = {
            f"nsd_{tolerance:g}mm": sum(
                count
                for found in self.distances
                for value, count in found.items()
                if value <= tolerance
            )
            / surface
            for tolerance in TOLERANCES
        }
        worst = max(percentile(found, PERCENTILE) for found in self.distances)
        return {
            "voxels_before": self.voxels[0],
            "voxels_after": self.voxels[1],
            "dice": 2 * self.common / total,
            **near,
            "hd95_mm": worst if math.isfinite(worst) else None,
            "distances_known_to_mm": self.limit,
        }


def percentile(counts: dict[float, int], share: float) -> float:
    """Return a percentile of counted values as numpy does, with linear interpolation.

    Infinite if there are no values, or the percentile touches an infinite one.
    """
    if not counts:
        return math.inf
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    place = share / 100 * (int(ends[-1]) - 1)
    low, high = math.floor(place), math.ceil(place)
    below, above = (values[int(np.searchsorted(ends, k, side="right"))] for k in (low, high))
    if math.isinf(above):
        return math.inf
    return below + (above - below) * (place - low)


def _box(mask: Mask, margin: int) -> tuple[slice, ...] | None:
    """Return the rectangle of the slices that holds a mask and a margin around it."""
    if not mask.any():
        return None
    ranges = [slice(None)]
    for axes in ((0, 2), (0, 1)):
        found = np.flatnonzero(mask.any(axis=axes))
        ranges.append(slice(max(int(found[0]) - margin, 0), int(found[-1]) + margin + 1))
    return tuple(ranges)


def _edges(mask: Mask, ends: tuple[bool, bool]) -> Mask:
    """Return the voxels of a mask with a neighbour outside it."""
    from scipy import ndimage

    # Where the volume goes on beyond the arrays, the outermost slice is repeated: it lies in the
    # halo, whose last slice is not counted.
    padded = np.pad(mask, 1)
    if not ends[0]:
        padded[0] = padded[1]
    if not ends[1]:
        padded[-1] = padded[-2]
    inner = ndimage.binary_erosion(padded)[1:-1, 1:-1, 1:-1]
    edges: Mask = mask & ~inner
    return edges


class Surfaces:
    """Running agreement of the tissues' surfaces, or of organs, block by block.

    For thresholds, the original with fresh noise shows how well the segmenter repeats itself.
    """

    def __init__(self, found: Survey, limit: float) -> None:
        self.geometry = found.geometry
        x, y, z = found.geometry.spacing
        self.step, self.limit = (z, x, y), limit
        self.parts: dict[tuple[str, str], Agreement] = {}

    def add(self, block: Block) -> None:
        """Add a block."""
        arrays = block.arrays
        depth = len(arrays["tissue"])
        ends = block.first == 0, block.first + depth == self.geometry.shape[2]
        for name, kinds in SURFACES.items():
            masks = {
                key: np.isin(arrays[key], kinds)
                for key in ("tissue", "tissue_after", "tissue_again")
            }
            for what in ("after", "again"):
                pair = masks["tissue"], masks[f"tissue_{what}"]
                self._part(name, what).add(*pair, block.inner, ends)
        for what in ("after", "again"):
            if f"organs_{what}" in arrays:
                before, after = arrays["organs"], arrays[f"organs_{what}"]
                for label in np.union1d(np.unique(before), np.unique(after)).tolist():
                    if label > 0:
                        name = organ_name(int(label)).replace("_", " ")
                        pair = before == label, after == label
                        self._part(name, what).add(*pair, block.inner, ends)

    def _part(self, name: str, what: str) -> Agreement:
        if (name, what) not in self.parts:
            self.parts[name, what] = Agreement(self.step, self.limit)
        return self.parts[name, what]

    def result(self) -> list[dict[str, Any]]:
        """Return the agreement of each surface, and of its repetition."""
        names = dict.fromkeys(name for name, _ in self.parts)
        found = []
        for name in names:
            row: dict[str, Any] = {"name": name, "segmenter": "thresholds"}
            if name not in SURFACES:
                row["segmenter"] = "label maps"
            for what in ("after", "again"):
                part = self.parts.get((name, what))
                row[what] = part.result() if part else None
            if row["after"] is not None:
                found.append(row)
        return found
