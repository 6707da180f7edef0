"""The axes of an array: which dimension is x, y and z, and where voxels lie along them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError

Vector = tuple[float, float, float]
Direction = tuple[int, int]  # row of RAS, and 1 or -1: along it or against it

LPS: tuple[Direction, Direction, Direction] = ((0, -1), (1, -1), (2, 1))
_NOT_SPACE = {"t": "time", "time": "time", "c": "channel", "channel": "channel"}

_METRES = {
    "femtometer": 1e-15, "picometer": 1e-12, "angstrom": 1e-10, "nanometer": 1e-9,
    "micrometer": 1e-6, "millimeter": 1e-3, "centimeter": 1e-2, "decimeter": 1e-1, "meter": 1.0,
    "kilometer": 1e3, "inch": 0.0254, "foot": 0.3048, "yard": 0.9144,
}  # fmt: skip
_SHORT = {
    "pm": "picometer", "å": "angstrom", "nm": "nanometer", "um": "micrometer", "µm": "micrometer",
    "μm": "micrometer", "micron": "micrometer", "mm": "millimeter", "cm": "centimeter",
    "dm": "decimeter", "m": "meter", "km": "kilometer", "in": "inch", "inches": "inch",
    "ft": "foot", "feet": "foot", "yd": "yard",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """Where voxels lie along x, y and z: at `scale * index + translation` millimetres.

    A scale may be negative, never 0. `directions` says how each axis runs through the body.
    """

    scale: Vector
    translation: Vector
    directions: tuple[Direction, Direction, Direction] = LPS

    @property
    def affine(self) -> NDArray[np.float64]:
        """The matrix from voxel indices to RAS millimetres."""
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (row, sign) in enumerate(self.directions):
            affine[row, axis] = sign * self.scale[axis]
            affine[row, 3] = sign * self.translation[axis]
        return affine

    def indices_in(self, other: Grid) -> NDArray[np.float64]:
        """Return the matrix from voxel indices of this grid to those of `other`."""
        matrix = np.eye(4)
        for axis in range(3):
            matrix[axis, axis] = self.scale[axis] / other.scale[axis]
            shift = self.translation[axis] - other.translation[axis]
            matrix[axis, 3] = shift / other.scale[axis]
        return matrix


def millimetres(units: Sequence[object], path: Path) -> Vector:
    """Return the millimetres of the units of x, y and z; None, no unit, is taken as millimetre.

    Raises VolumeError for what is no unit of length, and for axes without a unit beside axes in
    other units than millimetres.
    """
    x, y, z = (1.0 if unit is None else _millimetres(unit, path) for unit in units)
    if None in units and {x, y, z} != {1.0}:
        raise VolumeError(
            f"expected a unit for each of x, y and z, found {', '.join(map(str, units))} in "
            f"{path}: add those that are missing"
        )
    return x, y, z


def _millimetres(unit: object, path: Path) -> float:
    name = str(unit).strip().lower()
    name = _SHORT.get(name, name)
    name = name.removesuffix("s").replace("metre", "meter")
    if name not in _METRES:
        raise VolumeError(
            f"expected a unit of length such as millimeter or micrometer, found {unit!r} in "
            f"{path}: correct the unit"
        )
    return 1.0 if name == "millimeter" else _METRES[name] * 1000


NO_UNIT = "Axes that have no unit are taken to be in millimetres."


def spatial_axes(
    names: Sequence[str], kinds: Sequence[str | None], shape: Sequence[int], path: Path
) -> tuple[int, int, int]:
    """Return the dimensions of x, y and z; time and channel axes of size 1 may stand beside them.

    `kinds` are the types of OME-NGFF ("space", "time", "channel"), None where there is none.
    Raises VolumeError with the axes found.
    """
    found = ", ".join(f"{name} ({size})" for name, size in zip(names, shape, strict=True))
    refusal = f"expected the axes x, y and z, and t and c of size 1, found {found} in {path}: "
    lower = [name.lower() for name in names]
    for name, kind, size in zip(lower, kinds, shape, strict=True):
        if lower.count(name) > 1:
            raise VolumeError(f"{refusal}give each axis a name of its own")
        if name in "xyz" and name:
            if kind not in (None, "space"):
                raise VolumeError(f"{refusal}axis {name} has the type {kind}, correct it to space")
        elif (kind or _NOT_SPACE.get(name)) not in ("time", "channel"):
            raise VolumeError(f"{refusal}rename the axes")
        elif size != 1:
            raise VolumeError(f"{refusal}write one {name} as a volume of its own")
    if not {"x", "y", "z"} <= set(lower):
        raise VolumeError(f"{refusal}a volume needs all three")
    return lower.index("x"), lower.index("y"), lower.index("z")
