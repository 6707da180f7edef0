"""Looks at a mask before the work and compares it with what the generator was trained on.

Refused is what no anatomy has, because then the affine or the labels are wrong: organs upside
down, the spine in front, or left and right exchanged. Everything else is a remark, because a mask
may be unusual on purpose: another field of view or spacing, few slices, a body that is cut off, a
missing spine, labels outside the rib cage. The mask is read once, slice by slice.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError
from fvae_deploy.export.generator import Range, Training
from fvae_deploy.generation.labels import Labels
from fvae_deploy.generation.placing import Grid
from fvae_deploy.organs import ORGANS, organ_name
from fvae_deploy.volume.base import Geometry

TOLERANCE = 0.12  # of the field of view and spacing: bodies differ by that much
FAR = 15.0  # mm between the centres of organs, to call their order wrong
GAP = 60.0  # mm along the body without a vertebra
TOUCHING = 20  # voxels of an organ at the border of the plane
STRAY, MARGIN = 20, 10.0  # voxels, and mm outside the rib cage
TOP = max(ORGANS) + 1


def _named(*beginnings: str) -> NDArray[np.int64]:
    return np.array([n for n, name in ORGANS.items() if name.startswith(beginnings)])


SPINE = _named("vertebrae", "sacrum")
CAGE = _named("vertebrae", "sacrum", "rib_", "hip_", "sternum", "autochthon", "costal")
OUTER = _named("humerus", "scapula", "clavicula", "femur", "gluteus", "skull", "brain")
ABOVE, BELOW = _named("lung_", "heart"), _named("kidney", "colon", "urinary", "hip_", "liver")
FRONT = _named("heart", "liver", "sternum", "small_bowel", "stomach", "trachea")


class Survey:
    """What is known of a mask after one look at all its slices."""

    def __init__(self, planes: Iterable[Labels], geometry: Geometry, path: Path) -> None:
        self._geometry, self._path, self._grid = geometry, path, Grid(geometry)
        self._counts, self._centres = np.zeros(TOP), np.zeros((3, TOP))
        self._touching = np.zeros(TOP)
        self._along = [np.zeros((TOP, n)) for n in geometry.shape[:2]]  # voxels by place
        self._spine: list[bool] = []
        self._organs: list[bool] = []
        x, y = geometry.shape[:2]
        self._at = np.arange(x)[:, None], np.arange(y)[None, :]
        for z, labels in enumerate(planes):
            self._add(z, np.where(labels < TOP, labels, 0))

    def _add(self, z: int, labels: Labels) -> None:
        counts = np.bincount(labels.ravel(), minlength=TOP)
        counts[0] = 0
        self._counts += counts
        self._organs.append(bool(counts.any()))
        self._spine.append(bool(counts[SPINE].any()))
        if not counts.any():
            return
        at = tuple(np.asarray(n, np.float64) for n in (*self._at, np.array(z)))
        for row, axis in enumerate("LPS"):
            mm = np.broadcast_to(self._grid.mm(axis, at), labels.shape)
            self._centres[row] += np.bincount(labels.ravel(), mm.ravel(), TOP)
        border = (labels[0], labels[-1], labels[:, 0], labels[:, -1])
        self._touching += np.bincount(np.concatenate(border), minlength=TOP)
        for place, histogram in zip(self._at, self._along, strict=True):
            size = histogram.shape[1]
            flat = np.bincount((labels * size + place).ravel(), minlength=TOP * size)
            histogram += flat.reshape(TOP, size)

    def _stray(self) -> NDArray[np.float64]:
        """Return the voxels of each label beside ribs, hips and spine, or behind them.

        Nothing is known where a mask has no ribs or hips on both sides. In front of the ribs, a
        belly may be large.
        """
        stray = np.zeros(TOP)
        pairs = [(_named(f"{bone}_left"), _named(f"{bone}_right")) for bone in ("rib", "hip")]
        if not any(all(self._counts[side].any() for side in pair) for pair in pairs):
            return stray
        for axis, histogram in enumerate(self._along):
            code = self._geometry.orientation[axis]
            places = np.flatnonzero(histogram[CAGE].any(axis=0))
            if code in "SI":
                continue
            margin = int(MARGIN / self._geometry.spacing[axis]) + 1
            low, high = max(0, int(places[0]) - margin), int(places[-1]) + margin + 1
            before, after = histogram[:, :low].sum(1), histogram[:, high:].sum(1)
            stray += (before if code != "P" else 0) + (after if code != "A" else 0)
        stray[[0, *CAGE, *OUTER]] = 0
        return stray

    def _centre(self, organs: NDArray[np.int64], axis: str) -> float | None:
        """Return the mean position of organs in mm towards L, P or S; None for too few voxels."""
        count = self._counts[organs].sum()
        if count < STRAY:
            return None
        return float(self._centres["LPS".index(axis)][organs].sum() / count)

    def check(self) -> None:
        """Raise ConditionError for an order of organs that no anatomy has."""
        left, right = (
            np.array([n for n, name in ORGANS.items() if name.startswith(pair) and side in name])
            for side in ("left", "right")
            for pair in [("lung_", "kidney_l", "kidney_r", "rib_", "hip_", "femur", "autochthon")]
        )
        for first, second, axis, words in (
            (ABOVE, BELOW, "S", "lungs and heart above the abdomen, found them below"),
            (SPINE, FRONT, "P", "the spine behind the organs, found it in front"),
            (left, right, "L", "organs of the left side on the left, found them on the right"),
        ):
            a, b = self._centre(first, axis), self._centre(second, axis)
            if a is not None and b is not None and a < b - FAR:
                raise ConditionError(
                    f"expected {words} in {self._path}: correct its affine, or the numbers of its "
                    "labels with --labels"
                )
        if not self._counts.any():
            raise ConditionError(
                f"expected organs in the mask, found 0 everywhere in {self._path}: check the file, "
                "or the numbers of its labels with --labels"
            )

    def remarks(self, training: Training, name: str) -> list[str]:
        """Return sentences on what differs from training, and what to change."""
        return [*self._of_grid(training, name), *self._of_body(name)]

    def _of_grid(self, training: Training, name: str) -> list[str]:
        x, y, z = self._geometry.shape
        across, down, thick = self._geometry.spacing
        side, found = max(x * across, y * down), []
        field = training.field_of_view
        if not _near(side, field.low, field.high):
            change = "pad" if side < field.low else "crop"
            found.append(
                f"The field of view is {side:.0f} mm, {name} was trained on {_span(field)} mm, so "
                f"the body has another size than in training: {change} the mask to "
                f"{field.low if side < field.low else field.high:g} mm."
            )
        if not _near(thick, training.spacing.low, training.spacing.high):
            wanted = training.spacing.low if thick < training.spacing.low else training.spacing.high
            found.append(
                f"The slices are {thick:.3g} mm apart, {name} was trained on "
                f"{_span(training.spacing)} mm: resample the mask along the body to {wanted:.3g} "
                "mm."
            )
        if z < training.slices.low:
            found.append(
                f"The mask has {z} slices, {name} was trained on {training.slices.low:g} and more: "
                f"the last one is repeated. Give at least {training.slices.low:g}."
            )
        return found

    def _of_body(self, name: str) -> list[str]:
        found = []
        touching = 1 + np.flatnonzero(self._touching[1:] >= TOUCHING)
        if len(touching):
            found.append(
                f"The body is cut off: {_list(touching)} reach the border of the plane. Use a mask "
                "with a larger field of view."
            )
        gap, at = _longest(self._organs, self._spine)
        if not any(self._spine):
            found.append(
                f"The mask has no spine, which {name} saw in every patient: add the vertebrae."
            )
        elif gap * self._geometry.spacing[2] > GAP and self._geometry.orientation[2] in "SI":
            found.append(
                f"The mask has no spine in the slices {at} to {at + gap - 1}: add the vertebrae."
            )
        stray = np.flatnonzero(self._stray() >= STRAY)
        if len(stray):
            found.append(
                f"There are labels outside the body: {_list(stray)} more than {MARGIN:g} mm beside "
                "or behind ribs, hips and spine. Remove them from the mask."
            )
        return found


def _near(value: float, low: float, high: float) -> bool:
    return low * (1 - TOLERANCE) <= value <= high * (1 + TOLERANCE)


def _span(limits: Range) -> str:
    low, high = limits.low, limits.high
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _list(labels: NDArray[np.int64]) -> str:
    names = [organ_name(int(n)).replace("_", " ") for n in labels]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _longest(organs: list[bool], spine: list[bool]) -> tuple[int, int]:
    """Return length and start of the longest run of slices with organs and without a spine."""
    best, start, run = (0, 0), 0, 0
    for index, (here, bone) in enumerate(zip(organs, spine, strict=True)):
        run = run + 1 if here and not bone else 0
        start = index if run == 1 else start
        best = max(best, (run, start), key=lambda each: each[0])
    return best
