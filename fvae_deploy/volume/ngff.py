"""OME-NGFF 0.4 and 0.5: the metadata `multiscales` of images in Zarr.

A multiscale image is a group with one array per level. Its metadata name the axes, with units,
and say by scale and translation where the voxels of each level lie along them. The anatomical
direction of an axis is optional (RFC 4, `orientation`); without it x, y, z are taken as running
to the left, to the back and to the head (LPS), as in DICOM and ITK.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.axes import LPS, NO_UNIT, Direction, Grid, Vector, millimetres
from fvae_deploy.volume.base import Geometry

ORIENTATIONS: dict[str, Direction] = {
    "left-to-right": (0, 1),
    "right-to-left": (0, -1),
    "posterior-to-anterior": (1, 1),
    "anterior-to-posterior": (1, -1),
    "inferior-to-superior": (2, 1),
    "superior-to-inferior": (2, -1),
}


@dataclass(frozen=True)
class Axis:
    """One axis of a multiscale image."""

    name: str
    kind: str | None
    unit: object
    orientation: object


@dataclass(frozen=True)
class Multiscale:
    """The metadata of one multiscale image.

    `datasets` are the path and the transformations of each level, in no particular order;
    `common` are the transformations that follow those of every level.
    """

    path: Path
    version: str
    axes: tuple[Axis, ...]
    datasets: tuple[tuple[str, Any], ...]
    common: Any

    def grid(self, dataset: str, dimensions: Sequence[int]) -> Grid:
        """Return the grid of a level; `dimensions` are those of x, y and z.

        Raises VolumeError for a level without a scale, for scales that are not positive, and for
        other transformations than scale, translation and identity.
        """
        own = dict(self.datasets)[dataset]
        kinds = [t.get("type") for t in own or [] if isinstance(t, dict)]
        wide = [t.get("type") for t in self.common or [] if isinstance(t, dict)]
        scaled = "scale" in kinds or "identity" in kinds
        if not scaled and (len(self.datasets) > 1 or "scale" not in wide):
            raise VolumeError(
                f"expected a scale of level {dataset!r}, found none in {self.path} (OME-NGFF "
                f"{self.version}): add it to the coordinateTransformations"
            )
        scale, translation = np.ones(len(self.axes)), np.zeros(len(self.axes))
        for transformation in [*(own or []), *(self.common or [])]:
            kind, vector = _vector(transformation, len(self.axes), self.path)
            if kind == "scale":
                scale, translation = scale * vector, translation * vector
            elif kind == "translation":
                translation = translation + vector
        spatial = list(dimensions)
        if not (scale[spatial] > 0).all():
            raise VolumeError(
                f"expected positive scales, found {scale[spatial].tolist()} along x, y and z of "
                f"level {dataset!r} in {self.path}: correct them"
            )
        unit = np.array(millimetres([self.axes[d].unit for d in spatial], self.path))
        directions = tuple(
            self._direction(d, default) for d, default in zip(spatial, LPS, strict=True)
        )
        if {row for row, _ in directions} != {0, 1, 2}:
            found = ", ".join(str(self.axes[d].orientation) for d in spatial)
            raise VolumeError(
                f"expected an orientation of its own for x, y and z, found {found} in "
                f"{self.path}: correct them"
            )
        a, b, c = directions
        return Grid(_three(scale[spatial] * unit), _three(translation[spatial] * unit), (a, b, c))

    def remarks(self, dimensions: Sequence[int]) -> list[str]:
        """Return what was assumed, in sentences."""
        axes = [self.axes[d] for d in dimensions]
        remarks = []
        if any(axis.unit is None for axis in axes):
            remarks.append(NO_UNIT)
        known = [axis.orientation for axis in axes]
        if known == [None] * 3:
            remarks.append(FRAME)
        else:
            used = [str(o or _LPS_NAMES[i]) for i, o in enumerate(known)]
            remarks.append(
                f"The axes x, y and z run {used[0]}, {used[1]} and {used[2]}; the translation is "
                "taken along them."
            )
        return remarks

    def _direction(self, dimension: int, default: Direction) -> Direction:
        orientation = self.axes[dimension].orientation
        if orientation is None:
            return default
        if not isinstance(orientation, str) or orientation not in ORIENTATIONS:
            raise VolumeError(
                f"expected an orientation such as right-to-left, found {orientation!r} in "
                f"{self.path}: correct it, or remove it to read the axes as LPS"
            )
        return ORIENTATIONS[orientation]


_LPS_NAMES = ("right-to-left", "anterior-to-posterior", "inferior-to-superior")
FRAME = (
    "The axes name no anatomical directions; x, y and z are taken as running to the left, to the "
    "back and to the head (LPS, as in DICOM and ITK)."
)


def multiscales(attributes: dict[str, Any], path: Path) -> list[Multiscale]:
    """Return the multiscale images that the attributes of a group describe; [] if none.

    Raises VolumeError for other versions than 0.4 and 0.5 and for metadata without axes or levels.
    """
    ome = attributes.get("ome", {})
    if not isinstance(ome, dict):
        raise _malformed(ome, path)
    inner = ome.get("multiscales")
    outer = attributes.get("multiscales")
    if inner is not None and outer is not None and inner != outer:
        raise VolumeError(
            f"expected one description of the image, found different multiscales in `ome` and "
            f"beside it in {path}: remove the wrong one"
        )
    entries = outer if inner is None else inner
    if entries is None:
        return []
    if not isinstance(entries, list) or not entries or not all(type(e) is dict for e in entries):
        raise _malformed(entries, path)
    version = ome.get("version") if inner is not None else None
    return [_multiscale(entry, version, inner is not None, path) for entry in entries]


def _multiscale(entry: dict[str, Any], version: object, inner: bool, path: Path) -> Multiscale:
    version = str(version or entry.get("version") or ("0.5" if inner else "0.4"))
    if not version.startswith(("0.4", "0.5")):
        raise VolumeError(
            f"expected OME-NGFF 0.4 or 0.5, found version {version} in {path}: convert it to 0.5, "
            "for example with ngff-zarr"
        )
    axes, datasets = entry.get("axes"), entry.get("datasets")
    common = entry.get("coordinateTransformations")
    if not isinstance(axes, list) or not axes or not isinstance(datasets, list) or not datasets:
        raise _malformed(entry, path)
    if not isinstance(common, list | None):
        raise _malformed(common, path)
    return Multiscale(
        path,
        version,
        tuple(_axis(axis, path) for axis in axes),
        tuple(_dataset(dataset, path) for dataset in datasets),
        common,
    )


def _axis(axis: object, path: Path) -> Axis:
    if not isinstance(axis, dict) or not isinstance(axis.get("name"), str):
        raise _malformed(axis, path)
    kind = axis.get("type")
    orientation = axis.get("orientation") or axis.get("anatomicalOrientation")
    if isinstance(orientation, dict):
        orientation = orientation.get("value")
    return Axis(axis["name"], None if kind is None else str(kind), axis.get("unit"), orientation)


def _dataset(dataset: object, path: Path) -> tuple[str, Any]:
    if not isinstance(dataset, dict) or not isinstance(dataset.get("path"), str):
        raise _malformed(dataset, path)
    transformations = dataset.get("coordinateTransformations")
    if not isinstance(transformations, list | None):
        raise _malformed(transformations, path)
    return dataset["path"].strip("/"), transformations


def _vector(transformation: object, size: int, path: Path) -> tuple[str, NDArray[np.float64]]:
    """Return the kind of a transformation and its numbers, one per axis."""
    kind = transformation.get("type") if isinstance(transformation, dict) else None
    if kind == "identity":
        return "identity", np.zeros(size)
    if kind not in ("scale", "translation") or not isinstance(transformation, dict):
        raise VolumeError(
            f"expected scale, translation or identity, found the transformation {kind!r} in "
            f"{path}: resample the image to a grid along its axes"
        )
    values = transformation.get(kind)
    if isinstance(values, list) and all(type(value) in (int, float) for value in values):
        with suppress(OverflowError):
            vector = np.array([float(value) for value in values])
            if len(vector) == size and np.isfinite(vector).all():
                return kind, vector
    raise VolumeError(
        f"expected {size} finite numbers, one per axis, found the {kind} {str(values)[:80]} in "
        f"{path}: correct it"
    )


def _malformed(found: object, path: Path) -> VolumeError:
    text = " ".join(str(found).split())[:80]
    return VolumeError(
        f"expected multiscales with named axes and datasets, found {text} in {path}: correct the "
        "metadata, or convert the image to OME-NGFF 0.5 anew"
    )


def _three(values: NDArray[np.float64]) -> Vector:
    x, y, z = values.tolist()
    return x, y, z


def describe(geometry: Geometry, factors: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """Return the metadata `ome` (0.5) of a volume whose levels are stored as "0", "1", ...

    `factors` are the voxels of the volume that a voxel of each level covers along x, y and z. A
    volume whose axes run along those of the body is described exactly, with orientations. For an
    oblique one, which OME-NGFF 0.5 cannot hold, the scale is exact and the translation is the
    position of the first voxel in LPS, without its rotation.
    """
    grid, names = _grid_of(geometry.affine)
    axes = [
        {"name": name, "type": "space", "unit": "millimeter"}
        | ({"orientation": {"type": "anatomical", "value": names[axis]}} if names else {})
        for axis, name in reversed(list(enumerate("xyz")))
    ]
    datasets = []
    for level, factor in enumerate(factors):
        scale = [s * f for s, f in zip(grid.scale, factor, strict=True)]
        shift = [
            t + s * (f - 1) / 2
            for t, s, f in zip(grid.translation, grid.scale, factor, strict=True)
        ]
        transformations = [
            {"type": "scale", "scale": scale[::-1]},
            {"type": "translation", "translation": shift[::-1]},
        ]
        datasets.append({"path": str(level), "coordinateTransformations": transformations})
    image: dict[str, Any] = {"name": "CT", "axes": axes, "datasets": datasets}
    if len(factors) > 1:
        image["type"] = "mean"
    return {"version": "0.5", "multiscales": [image]}


def _grid_of(affine: NDArray[np.float64]) -> tuple[Grid, list[str]]:
    """Return the grid of an affine, and the orientations of x, y and z; [] if it is oblique."""
    scale = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    cosines = affine[:3, :3] / scale
    rows = np.abs(cosines).argmax(axis=0).tolist()
    aligned = np.abs(cosines)[rows, range(3)].min() > 1 - 1e-12 and set(rows) == {0, 1, 2}
    if not aligned:
        return Grid(_three(scale), _three(affine[:3, 3] * (-1, -1, 1))), []
    signs = np.sign(cosines[rows, range(3)]).astype(int).tolist()
    by_direction = {direction: name for name, direction in ORIENTATIONS.items()}
    a, b, c = zip(rows, signs, strict=True)
    grid = Grid(_three(scale), _three(affine[rows, 3] * signs), (a, b, c))
    return grid, [by_direction[direction] for direction in grid.directions]
