"""Works out the axes of an array in Zarr and where its voxels lie, from all that the store says."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.axes import NO_UNIT, Grid, Vector, millimetres, spatial_axes
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.cf import spacing_of
from fvae_deploy.volume.ngff import FRAME
from fvae_deploy.volume.zarr_image import Image

Names = tuple[str, ...] | None
Dimensions = tuple[int, int, int]

_LAYOUTS = (1, 2)  # values of `fvae_volume` that can be read
_UNPLACED = "The store does not tell the voxel size; 1 mm and the identity as affine are assumed."
_UNNAMED = "The dimensions have no names; they are taken as x, y, z."


def axes_of(image: Image, level: int, path: Path) -> tuple[Names, Dimensions]:
    """Return the names of the dimensions, None if there are none, and which are x, y and z.

    Dimensions without names are x, y, z. Raises VolumeError for names that contradict each other
    and for dimensions that are not those of one volume.
    """
    array = image.levels[level]
    names = _names(image, array, path)
    if names is None:
        if array.ndim != 3:
            raise VolumeError(
                f"expected a 3-D array, found {array.ndim}-D {'x'.join(map(str, array.shape))} "
                f"without names of its dimensions in {path}: split it first, or name them"
            )
        return None, (0, 1, 2)
    kinds: list[str | None] = [None] * array.ndim
    if image.multiscale is not None:
        kinds = [axis.kind for axis in image.multiscale.axes]
    return names, spatial_axes(names, kinds, array.shape, path)


def _names(image: Image, array: Any, path: Path) -> Names:
    found: dict[str, list[Any]] = {}
    if image.multiscale is not None:
        found["multiscales"] = [axis.name for axis in image.multiscale.axes]
    named = getattr(array.metadata, "dimension_names", None)
    if named and any(name is not None for name in named):
        found["dimension_names"] = list(named)
    attribute = array.attrs.get("_ARRAY_DIMENSIONS")
    if attribute is not None:
        found["_ARRAY_DIMENSIONS"] = attribute if isinstance(attribute, list) else [attribute]
    if not found:
        return None
    if len({tuple(str(name).lower() for name in names) for names in found.values()}) > 1:
        texts = [f"{key} {', '.join(map(str, names))}" for key, names in found.items()]
        raise VolumeError(
            f"expected the same axes everywhere, found {' but '.join(texts)} in {path}: correct "
            "the metadata"
        )
    names = tuple(str(name) for name in next(iter(found.values())))
    if len(names) != array.ndim:
        raise VolumeError(
            f"expected {array.ndim} names of dimensions, found {', '.join(names)} in {path}: "
            "correct the metadata"
        )
    return names


def place(
    image: Image, level: int, names: Names, dimensions: Dimensions, path: Path
) -> tuple[Geometry, list[str]]:
    """Return the geometry of a level, and what was assumed, in sentences.

    An `affine`, of the array or of the finest level, goes before scale and translation, which
    cannot hold rotations. Raises VolumeError if the two contradict each other.
    """
    array = image.levels[level]
    shape = (array.shape[dimensions[0]], array.shape[dimensions[1]], array.shape[dimensions[2]])
    own = dict(array.attrs)
    attributes = image.attributes | own
    is_ours, header = _is_ours(attributes, path), _header(attributes, path)
    grid, remarks = _grid(image, level, names, dimensions, path)
    if "affine" in attributes:
        affine = _affine(attributes, path)
        if grid is not None:
            finest = _grid(image, 0, names, dimensions, path)[0] or grid
            reference = grid if "affine" in own else finest
            _check_spacing(affine, reference.scale, path)
            affine = affine if reference is grid else affine @ grid.indices_in(finest)
        note = "The attribute affine is taken as a map from voxel indices x, y, z to RAS mm."
        return Geometry(shape, affine, None if level else header), [] if is_ours else [note]
    if "spacing" in attributes:
        raise VolumeError(
            f"expected an affine beside the attribute spacing, found none in {path}: add the "
            "affine, 4 x 4, from voxel indices x, y, z to RAS millimetres"
        )
    return Geometry(shape, np.eye(4) if grid is None else grid.affine), remarks


def _grid(
    image: Image, level: int, names: Names, dimensions: Dimensions, path: Path
) -> tuple[Grid | None, list[str]]:
    """Return the grid of a level along its axes, None if nothing tells it, and remarks."""
    if image.multiscale is not None:
        grid = image.multiscale.grid(image.names[level], dimensions)
        if level > 0:
            _check_extent(image, level, grid, dimensions, path)
        return grid, image.multiscale.remarks(dimensions)
    if names is None:
        return None, [_UNNAMED, _UNPLACED]
    if (found := _coordinates(image, [names[d] for d in dimensions], path)) is None:
        return None, [_UNPLACED]
    (sx, tx, ux), (sy, ty, uy), (sz, tz, uz) = found
    remarks = [FRAME]
    if None in (ux, uy, uz):
        remarks.insert(0, NO_UNIT)
    fx, fy, fz = millimetres((ux, uy, uz), path)
    return Grid((sx * fx, sy * fy, sz * fz), (tx * fx, ty * fy, tz * fz)), remarks


def _coordinates(
    image: Image, names: list[str], path: Path
) -> list[tuple[float, float, object]] | None:
    """Return step, start and unit of each axis from arrays of its name, as xarray writes them.

    None if there are no such arrays.
    """
    found: list[tuple[float, float, object]] = []
    lacking = []
    for name in names:
        array = None if image.group is None else image.group.get(name)
        if isinstance(array, zarr.Array) and array.ndim == 1 and array.dtype.kind in "iuf":
            values = np.asarray(array[...], np.float64)
            unit = array.attrs.get("units", array.attrs.get("unit"))
            found.append((*spacing_of(values, name, path), unit))
        else:
            lacking.append(name)
    if found and lacking:
        raise VolumeError(
            f"expected coordinates along x, y and z, found none along {', '.join(lacking)} in "
            f"{path}: add them"
        )
    return found or None


def _check_extent(image: Image, level: int, grid: Grid, dimensions: Dimensions, path: Path) -> None:
    """Raise VolumeError if a coarser level does not cover what the finest one covers."""
    finest = image.multiscale.grid(image.names[0], dimensions) if image.multiscale else grid
    for axis, dimension in enumerate(dimensions):
        coarse = image.levels[level].shape[dimension] * grid.scale[axis]
        fine = image.levels[0].shape[dimension] * finest.scale[axis]
        if abs(coarse - fine) > 2 * grid.scale[axis]:
            raise VolumeError(
                f"expected level {level} to cover {fine:g} mm along {'xyz'[axis]} as the finest "
                f"level does, found {coarse:g} mm in {path}: correct its scale"
            )


def _check_spacing(affine: NDArray[np.float64], scale: Vector, path: Path) -> None:
    spacing = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if not np.allclose(spacing, np.abs(scale), rtol=1e-3, atol=0):
        found = " but ".join(str(np.round(v, 6).tolist()) for v in (spacing, scale))
        raise VolumeError(
            f"expected the same voxel size in affine and scale, found {found} mm along x, y, z in "
            f"{path}: correct one of them"
        )


def _is_ours(attributes: dict[str, Any], path: Path) -> bool:
    """Return whether fvae wrote the volume; raises VolumeError for a layout of a later fvae."""
    layout = attributes.get("fvae_volume")
    if layout is not None and layout not in _LAYOUTS:
        raise VolumeError(
            f"expected fvae_volume {' or '.join(map(str, _LAYOUTS))}, found {layout} in {path}: "
            "read it with a newer fvae"
        )
    return layout is not None


def _affine(attributes: dict[str, Any], path: Path) -> NDArray[np.float64]:
    try:
        affine = np.asarray(attributes["affine"], np.float64)
        valid = affine.shape == (4, 4) and affine[3].tolist() == [0, 0, 0, 1]
        if valid and np.isfinite(affine).all() and np.linalg.det(affine) != 0:
            return affine
    except (TypeError, ValueError, OverflowError):
        pass
    raise VolumeError(
        f"expected an affine of 4 x 4 numbers that can be inverted, with 0 0 0 1 as its last row, "
        f"found another one in {path}: correct it"
    )


def _header(attributes: dict[str, Any], path: Path) -> bytes | None:
    text = attributes.get("nifti_header")
    if text is None:
        return None
    try:
        header = base64.b64decode(text, validate=True)
        if len(header) in (348, 540):
            return header
    except (TypeError, ValueError):
        pass
    raise VolumeError(
        f"expected a NIfTI header of 348 or 540 bytes in base64, found another nifti_header in "
        f"{path}: correct or remove it"
    )
