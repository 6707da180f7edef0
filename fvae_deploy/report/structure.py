"""Structure that a reconstruction invents or loses: errors that stand out from those around them.

Errors are smoothed (Gaussian, 1.5 mm) to the size of the smallest lesions. Where both volumes have
an edge, one that moves by 0.2 voxels explains an error of 0.2 of its gradient g (per voxel, the
largest within 1.5 mm). Each voxel is compared with a frame around it in the slice, from 5 to 12 mm
away, in which voxels count by n² / (n² + (0.2 g)²): n is the noise of the smoothed scan, so edges
count little. The frame's mean is subtracted, and its deviation is the local noise, at least n.

    z = (e - mean of the frame) / sqrt(max(deviation of the frame, n)² + (0.2 g)²)

What exceeds 5 sigmas and 10 HU is structure, in connected components that are followed through all
slabs. The worst have the largest product of z and diameter; those outside the body come last. A
component is lost where the original stands out from its surroundings more than the reconstruction
does, by the deviations of a square of ±5 mm around it, and invented otherwise.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.organs import organ_name
from fvae_deploy.report.blocks import Block
from fvae_deploy.report.survey import STRUCTURE, Survey
from fvae_deploy.report.tissues import NAMES, OUTSIDE, OUTSIDE_NAME

SIGMAS = 5.0
LEAST = 10.0  # HU
SMALLEST = 8.0  # mm³
INNER, OUTER = 5.0, 12.0  # mm from the voxel to the frame around it
KEPT = 40  # components
EDGE = 0.2  # voxels that an edge may move

Badness = tuple[bool, float, int]  # inside the body; z by diameter; minus the order of discovery
Volume = NDArray[np.float32]  # [t, x, y]


@dataclass
class Component:
    """A connected set of voxels whose errors stand out."""

    voxels: int
    total: float  # sum of their smoothed errors, HU
    peak: float  # the largest |z|
    facts: dict[str, Any] = field(default_factory=dict)  # of the voxel with that z

    def merge(self, other: Component) -> None:
        """Take in a component of the slab before or after."""
        self.voxels += other.voxels
        self.total += other.total
        if other.peak > self.peak:
            self.peak, self.facts = other.peak, other.facts


class Structure:
    """Finds components block by block; only those that reach the last slice stay open."""

    def __init__(self, found: Survey, labelled: bool) -> None:
        self.geometry, self.labelled = found.geometry, labelled
        # The survey smooths slices alone; smoothing along z leaves this share of their noise.
        share = _left_along_z(found.geometry.spacing[2])
        self.noise = max(share * (found.smooth_noise or 0.0), 1.0)
        self.open: dict[int, Component] = {}  # by the label in `last`
        self.last: NDArray[np.int64] | None = None  # labels of the last slice, signs apart
        self.worst: list[tuple[Badness, Component]] = []  # a heap, its least first
        self.number, self.order = 0, count()
        self.counts: dict[str, int] = {}  # components by organ

    def add(self, block: Block) -> None:
        """Find the components of a block's core, and join them with those before."""
        from scipy import ndimage

        a, b = (block.arrays[n].astype(np.float32) for n in ("original", "reconstruction"))
        z, e, contrast, fuller = stand_out(a, b, self.geometry.spacing, self.noise, block.inner)
        labels = np.zeros(z.shape, np.int32)
        total = 0
        for sign in (1, -1):
            marked = (sign * z > SIGMAS) & (np.abs(e) > LEAST)
            found, some = ndimage.label(marked, np.ones((3, 3, 3)))
            labels[found > 0] = found[found > 0] + total
            total += some
        here = self._components(block, labels, total, (z, e, *contrast, fuller))
        self._join(labels, here)

    def _components(
        self,
        block: Block,
        labels: NDArray[np.int32],
        total: int,
        maps: tuple[Volume, ...],
    ) -> dict[int, Component]:
        z, e, before, after, fuller = maps
        place = np.flatnonzero(labels)
        which = labels.ravel()[place]
        sizes = np.bincount(which, minlength=total + 1)
        sums = np.bincount(which, e.ravel()[place], total + 1)
        order = np.lexsort((np.abs(z.ravel()[place]), which))
        ends = np.cumsum(sizes)[1:] - 1  # the voxel with the largest |z| of each
        organs, tissue = block.core("organs"), block.core("tissue")
        pair = block.core("original"), block.core("reconstruction")
        found = {}
        for label, at in enumerate(place[order][ends] if total else [], start=1):
            t, x, y = (int(n) for n in np.unravel_index(at, labels.shape))
            voxel = t, x, y
            facts = {
                "voxel": [x, y, block.start + t],
                "original_hu": float(pair[0][voxel]),
                "reconstruction_hu": float(pair[1][voxel]),
                "error_hu": float(e[voxel]),
                "contrast_before_hu": float(before[voxel]),
                "contrast_after_hu": float(after[voxel]),
                "fuller": bool(fuller[voxel] > 0),
                "organ": int(organs[voxel]),
                "tissue": int(tissue[voxel]),
            }
            size, peak = int(sizes[label]), float(np.abs(z[voxel]))
            found[label] = Component(size, float(sums[label]), peak, facts)
        return found

    def _join(self, labels: NDArray[np.int32], here: dict[int, Component]) -> None:
        """Unite what touches across the border of two blocks, and close what ended before it."""
        numbered = {label: self._next() for label in here}
        alive = {numbered[label]: one for label, one in here.items()}
        parent = {key: key for key in (*alive, *self.open)}

        def root(key: int) -> int:
            while parent[key] != key:
                parent[key] = parent[parent[key]]
                key = parent[key]
            return key

        touched = set()
        mapping = np.zeros(max(here, default=0) + 1, np.int64)
        for label, key in numbered.items():
            mapping[label] = key
        first, final = mapping[labels[0]], mapping[labels[-1]]
        signs = {key: one.total > 0 for key, one in (*alive.items(), *self.open.items())}
        if self.last is not None:
            for before, after in _touching(self.last, first):
                if signs[before] == signs[after]:
                    parent[root(before)] = root(after)
                    touched.add(before)
        united: dict[int, Component] = {}
        for key, one in (*alive.items(), *self.open.items()):
            if (top := root(key)) in united:
                united[top].merge(one)
            else:
                united[top] = one
        still = {root(int(key)) for key in np.unique(final) if key}
        for key, one in united.items():
            if key not in still:
                self._close(one)
        self.open = {key: united[key] for key in still}
        known = np.unique(final)
        lookup = {int(key): root(int(key)) for key in known if key}
        self.last = np.zeros(final.shape, np.int64)
        for key, top in lookup.items():
            self.last[final == key] = top

    def _next(self) -> int:
        self.number += 1
        return self.number

    def _volume(self, one: Component) -> float:
        return one.voxels * float(np.prod(self.geometry.spacing))

    def _diameter(self, one: Component) -> float:
        """Return the diameter in mm of a ball of the component's volume."""
        return float((6 * self._volume(one) / np.pi) ** (1 / 3))

    def _close(self, one: Component) -> None:
        if self._volume(one) < SMALLEST:
            return
        name = self._organ(one)
        self.counts[name] = self.counts.get(name, 0) + 1
        inside = one.facts["tissue"] != OUTSIDE
        badness = (inside, one.peak * self._diameter(one), -next(self.order))
        heapq.heappush(self.worst, (badness, one))
        if len(self.worst) > KEPT:
            heapq.heappop(self.worst)

    def _organ(self, one: Component) -> str:
        organ, tissue = one.facts["organ"], one.facts["tissue"]
        if self.labelled and organ:
            return organ_name(organ).replace("_", " ")
        return NAMES.get(tissue, OUTSIDE_NAME)

    def result(self) -> dict[str, Any]:
        """Return how many components were found, by organ too, and the worst ones, worst first."""
        for one in self.open.values():
            self._close(one)
        self.open = {}
        return {
            "found": sum(self.counts.values()),
            "by_organ": self.counts,
            "worst": [self._facts(one) for _, one in sorted(self.worst, reverse=True)],
        }

    def _facts(self, one: Component) -> dict[str, Any]:
        facts = {name: one.facts[name] for name in one.facts if name not in ("organ", "tissue")}
        position = self.geometry.affine @ [*facts["voxel"], 1]
        return {
            "kind": "invented" if facts.pop("fuller") else "lost",
            "organ": self._organ(one),
            "inside": one.facts["tissue"] != OUTSIDE,
            "sigmas": one.peak,
            **facts,
            "mean_error_hu": one.total / one.voxels,
            "volume_mm3": self._volume(one),
            "diameter_mm": self._diameter(one),
            "position_mm": position[:3].tolist(),
        }


def badness(facts: dict[str, Any]) -> tuple[bool, float]:
    """Return how bad a finding is, for sorting."""
    return facts["inside"], facts["sigmas"] * facts["diameter_mm"]


def _touching(before: NDArray[Any], after: NDArray[Any]) -> list[tuple[int, int]]:
    """Return the pairs of labels in two slices that touch, corners included."""
    found: set[tuple[int, int]] = set()
    nx, ny = before.shape
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            one = before[max(dx, 0) : nx + min(dx, 0), max(dy, 0) : ny + min(dy, 0)]
            two = after[max(-dx, 0) : nx + min(-dx, 0), max(-dy, 0) : ny + min(-dy, 0)]
            both = (one > 0) & (two > 0)
            found |= set(zip(one[both].tolist(), two[both].tolist(), strict=True))
    return sorted(found)


def _left_along_z(mm: float) -> float:
    """Return the share of white noise that smoothing leaves along slices of this distance."""
    from scipy import ndimage

    impulse = np.zeros(65)
    impulse[32] = 1
    return float(np.linalg.norm(ndimage.gaussian_filter1d(impulse, STRUCTURE / mm, truncate=3.0)))


def stand_out(
    a: Volume, b: Volume, spacing: tuple[float, float, float], noise: float, inner: slice
) -> tuple[Volume, Volume, tuple[Volume, Volume], Volume]:
    """Return z, the smoothed error, and how much original and reconstruction stand out, in HU.

    The last volume is positive where the reconstruction has more structure than the original.

    `a` and `b` have a halo along z; results are of the slices `inner`.
    """
    from scipy import ndimage

    sigma = [STRUCTURE / mm for mm in (spacing[2], *spacing[:2])]
    smooth = [ndimage.gaussian_filter(v, sigma, truncate=3.0) for v in (a, b)]
    # The widest reach of an edge: at the ridge of a thin wall the gradient itself is 0.
    edge = np.minimum(*(_gradient(v)[inner] for v in smooth)) * EDGE**2
    edge = ndimage.maximum_filter(edge, [1, *(2 * round(STRUCTURE / mm) + 1 for mm in spacing[:2])])
    before, after = (v[inner] for v in smooth)
    e = after - before
    weight = noise**2 / (noise**2 + edge)
    share, mean, square = (_frame(v, spacing) for v in (weight, weight * e, weight * e * e))
    mean /= share
    deviation = np.maximum(square / share - mean * mean, noise**2)
    z = (e - mean) / np.sqrt(deviation + edge)
    contrast = before - _frame(before, spacing), after - _frame(after, spacing)
    return z, e - mean, contrast, _variance(after, spacing) - _variance(before, spacing)


def _variance(values: Volume, spacing: tuple[float, float, float]) -> Volume:
    """Return the variance of a square around each voxel, slice by slice."""
    from scipy import ndimage

    size = [1, *(2 * max(1, round(INNER / mm)) + 1 for mm in spacing[:2])]
    mean = ndimage.uniform_filter(values, size)
    variance: Volume = ndimage.uniform_filter(np.square(values - mean), size)
    return variance


def _gradient(values: Volume) -> Volume:
    """Return the squared gradient in HU per voxel, squared; without z in a single slice."""
    axes = [axis for axis, size in enumerate(values.shape) if size > 1]
    total = np.zeros_like(values)
    for axis in axes:
        total += np.square(np.gradient(values, axis=axis))
    return total


def _frame(values: Volume, spacing: tuple[float, float, float]) -> Volume:
    """Return the mean over a square frame around each voxel, slice by slice."""
    from scipy import ndimage

    large, small = (
        [1, *(2 * max(least, round(reach / mm)) + 1 for mm in spacing[:2])]
        for reach, least in ((OUTER, 2), (INNER, 1))
    )
    whole, hole = (ndimage.uniform_filter(values, size) for size in (large, small))
    n, m = float(np.prod(large)), float(np.prod(small))
    result: Volume = (whole * n - hole * m) / (n - m)
    return result
