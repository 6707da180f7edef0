"""Measures of a CT against the mask it was generated from, slice by slice, on the model's plane.

    organ 5       mean HU of a label, findings with the palette's offset
    air           share of lungs and trachea below -500 HU
    soft tissue   share of solid organs from -200 to 300 HU
    bone          share of spine, ribs, hips and sternum above 100 HU
    noise         HU, from second differences within liver, spleen and back muscles
    blockiness    step across the borders of the VAE's cells, over the step inside cells, there
    seam          largest step between slices, over the median of such steps at the same place
                  within a latent frame

Memory is that of a few slices, and two numbers per slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.labels import Labels
from fvae_deploy.organs import ORGANS

Plane = NDArray[np.float64]
AIR, BONE = -500.0, 100.0
SOFT = (-200.0, 300.0)
LEAST = 1000  # voxels of a label or class, for a mean
AIR_ORGANS = ("lung_", "trachea")
BONES = ("vertebrae", "rib_", "hip_", "sternum", "sacrum")
SOLID = ("liver", "spleen", "kidney_l", "kidney_r", "heart", "autochthon", "iliopsoas", "aorta")
EVEN = ("liver", "spleen", "autochthon")  # without walls or cavities
TOP = 1024  # labels above are counted as the last one


def _members(names: tuple[str, ...]) -> NDArray[np.bool_]:
    """Return a table of labels whose names begin so."""
    table = np.zeros(TOP, np.bool_)
    table[[number for number, name in ORGANS.items() if name.startswith(names)]] = True
    return table


CLASSES = {"air": _members(AIR_ORGANS), "soft tissue": _members(SOLID), "bone": _members(BONES)}


_EVEN = _members(EVEN)


def lungs() -> set[str]:
    """Return the names of the measures that a finding in a lung changes."""
    return {"air", *(f"organ {n}" for n, name in ORGANS.items() if name.startswith("lung_"))}


class Measures:
    """The measures of one volume, fed with slices in order.

    `cell` is the side of the VAE's cells in pixels, `temporal` the slices of a latent frame.
    """

    def __init__(self, cell: int, temporal: int) -> None:
        self._cell, self._temporal = cell, temporal
        self._counts, self._sums = np.zeros(TOP), np.zeros(TOP)
        self._inside = {name: np.zeros(2) for name in CLASSES}  # within thresholds, all
        self._second = np.zeros(2)
        self._across, self._within = np.zeros(2), np.zeros(2)  # sums of steps, their number
        self._steps: list[float] = []
        self._before: tuple[Plane, Labels] | None = None

    def add(self, hu: Plane, labels: Labels) -> None:
        """Add a slice [X, Y] in HU with its labels."""
        hu, labels = hu.astype(np.float64), labels.clip(max=TOP - 1)
        self._counts += np.bincount(labels.ravel(), minlength=TOP)
        self._sums += np.bincount(labels.ravel(), hu.ravel(), minlength=TOP)
        within = {
            "air": hu < AIR,
            "soft tissue": (hu > SOFT[0]) & (hu < SOFT[1]),
            "bone": hu > BONE,
        }
        for name, members in CLASSES.items():
            here = members[labels]
            self._inside[name] += (np.count_nonzero(here & within[name]), np.count_nonzero(here))
        for axis in (0, 1):
            self._in_plane(np.moveaxis(hu, axis, 0), np.moveaxis(labels, axis, 0))
        if self._before is not None:
            earlier, there = self._before
            same = (labels == there) & (labels > 0)
            count = np.count_nonzero(same)
            step = float(np.abs(hu - earlier)[same].mean()) if count >= LEAST / 10 else math.nan
            self._steps.append(step)
        self._before = hu, labels

    def _in_plane(self, hu: Plane, labels: Labels) -> None:
        """Add second differences and steps along the first axis."""
        even = (labels[1:] == labels[:-1]) & _EVEN[labels[1:]]
        straight = even[1:] & even[:-1]
        second = (hu[2:] - 2 * hu[1:-1] + hu[:-2])[straight]
        self._second += (np.square(second).sum(), second.size)
        step = np.abs(np.diff(hu, axis=0))
        border = (np.arange(1, len(hu)) % self._cell == 0)[:, None]
        for sums, where in ((self._across, even & border), (self._within, even & ~border)):
            sums += (step[where].sum(), np.count_nonzero(where))

    def result(self) -> dict[str, float]:
        """Return the measures for which there were voxels enough."""
        found = {
            f"organ {label}": self._sums[label] / self._counts[label]
            for label in np.flatnonzero(self._counts >= LEAST)
            if label > 0
        }
        for name, (inside, every) in self._inside.items():
            if every >= LEAST:
                found[name] = inside / every
        if self._second[1] >= LEAST:
            found["noise"] = math.sqrt(self._second[0] / self._second[1] / 6)
        if min(self._across[1], self._within[1]) >= LEAST and self._within[0] > 0:
            inside = self._within[0] / self._within[1]
            found["blockiness"] = self._across[0] / self._across[1] / inside
        seam = self._seam()
        if seam is not None:
            found["seam"] = seam
        return {name: float(value) for name, value in found.items()}

    def _seam(self) -> float | None:
        """Return the largest step over the median of those at the same place in a latent frame."""
        ratios = []
        for phase in range(self._temporal):
            steps = np.array(self._steps[phase :: self._temporal])
            steps = steps[np.isfinite(steps)]
            if len(steps) >= 4 and np.median(steps) > 0:
                ratios.append(float(steps.max() / np.median(steps)))
        return max(ratios, default=None)


def spread(every: Iterable[dict[str, float]], least: int) -> dict[str, tuple[float, float]]:
    """Return lowest and highest value of each measure that at least `least` volumes have."""
    values: dict[str, list[float]] = {}
    for measures in every:
        for name, value in measures.items():
            values.setdefault(name, []).append(value)
    return {name: (min(found), max(found)) for name, found in values.items() if len(found) >= least}
