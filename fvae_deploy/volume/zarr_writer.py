"""Writer for volumes in Zarr v3, which are OME-NGFF 0.5 images too.

A volume is a group. Its arrays "0", "1", ... are levels (z, y, x), with 4 slices per chunk, zstd
and its checksum; "0" is the volume itself. Attributes of the group:

    ome           the multiscales of OME-NGFF 0.5
    fvae_volume   2, the version of this layout; 1 was an array (x, y, z) at the root
    affine        4 x 4, maps voxel indices x, y, z of level 0 to RAS millimetres
    spacing       millimetres along x, y, z
    units         "HU"
    nifti_header  the header of a NIfTI source in base64
"""

from __future__ import annotations

import base64
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from numpy.typing import NDArray

from fvae_deploy.errors import OutputError
from fvae_deploy.volume.base import FrameWriter, Geometry, HuFrames
from fvae_deploy.volume.ngff import describe
from fvae_deploy.volume.publish import foreign, publish_folder
from fvae_deploy.volume.zarr_paths import is_store

_DEPTH = 4  # slices per chunk: 2 MiB of int16 at 512 x 512
_OWN = r"(\d+/)?(zarr\.json|c(/\d+)+)"  # files of either layout; \d+ is a level
_SMALL = 64  # pixels: a level as small as this in plane needs no coarser one

Factor = tuple[int, int, int]  # voxels along x, y and z


class ZarrWriter(FrameWriter):
    """Writes a Zarr v3 group, which gets its name only when complete.

    With `pyramid`, coarser levels are computed as slices arrive; a voxel of them is the mean of
    those it covers. Slices at the end that fill no voxel of a level are in none of its voxels. An
    older volume that fvae wrote is replaced at the end; nothing else is ever replaced. Raises
    VolumeError if the path cannot be written.
    """

    def __init__(
        self, path: Path | str, geometry: Geometry, dtype: str = "int16", pyramid: bool = False
    ) -> None:
        super().__init__(Path(path), geometry, dtype)
        steps = pyramid_steps(geometry) if pyramid else []
        try:
            self._reserve(folder=True)
            self._finest = _create(self._partial, geometry, self._dtype, steps)
        except OSError as error:
            self.abort()
            raise self._write_error(error) from error

    def _check_replaceable(self) -> None:
        if not os.path.lexists(self.path):
            return
        found = foreign(self.path, _OWN) if _is_volume(self.path) else self.path
        if found is not None:
            raise OutputError(
                "expected a new name or a volume that fvae wrote, found something else at "
                f"{found}: choose another name"
            )

    def _append(self, frame: HuFrames) -> None:
        self._finest.append(frame.T)

    def _publish(self) -> None:
        publish_folder(self._partial, self.path)

    def _discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def _create(path: Path, geometry: Geometry, dtype: np.dtype[Any], steps: list[Factor]) -> _Level:
    """Create the group and the arrays of all levels; return the finest level."""
    factors = [(1, 1, 1)]
    for step in steps:
        factors.append(_times(factors[-1], step))
    group = zarr.create_group(str(path), attributes=_attributes(geometry, factors))
    level: _Level | None = None
    for number in reversed(range(1, len(factors))):
        step = steps[number] if number < len(steps) else (1, 1, 1)
        level = _Level(group, number, _over(geometry.shape, factors[number]), dtype, step, level)
    return _Level(group, 0, geometry.shape, dtype, steps[0] if steps else (1, 1, 1), level)


class _Level:
    """One array of a volume, written slice by slice; passes means of slices to the next level."""

    def __init__(
        self,
        group: zarr.Group,
        number: int,
        shape: Factor,
        dtype: np.dtype[Any],
        step: Factor,
        coarser: _Level | None,
    ) -> None:
        nx, ny, nz = shape
        self._shape, self._step, self._coarser = shape, step, coarser
        self._count = 0
        self._layer = np.empty((min(_DEPTH, nz), ny, nx), dtype)  # the chunk being filled
        # Of the voxels that one slice of `coarser` covers. In float64 the means stay exact.
        self._sum = np.zeros((ny // step[1], nx // step[0]))
        self._array = group.create_array(
            str(number),
            shape=(nz, ny, nx),
            chunks=(len(self._layer), ny, nx),
            dtype=dtype,
            compressors=[zarr.codecs.ZstdCodec(level=1, checksum=True)],
            fill_value=0,
            dimension_names=("z", "y", "x"),
            config={"write_empty_chunks": True},  # to tell a lost chunk from zeros
        )

    def append(self, plane: NDArray[Any]) -> None:
        """Store a slice [y, x], in the stored type or as the float64 means of a finer level."""
        whole = self._layer.dtype.kind == "i" and plane.dtype.kind == "f"
        self._layer[self._count % len(self._layer)] = np.rint(plane) if whole else plane
        stop = self._count + 1
        filled = stop % len(self._layer) or len(self._layer)
        if filled == len(self._layer) or stop == self._shape[2]:
            self._array[stop - filled : stop] = self._layer[:filled]
        self._count = stop
        if self._coarser is not None:
            self._pass_on(plane, self._coarser)

    def _pass_on(self, plane: NDArray[Any], coarser: _Level) -> None:
        x, y, z = self._step
        ny, nx = self._sum.shape
        for row in range(y):
            for column in range(x):
                self._sum += plane[row : ny * y : y, column : nx * x : x]
        if self._count % z == 0:
            coarser.append(self._sum / (x * y * z))
            self._sum[:] = 0


def pyramid_steps(geometry: Geometry) -> list[Factor]:
    """Return how many voxels of each level become one of the next, along x, y and z.

    Every level has half the pixels in plane. Along z a level is halved too where that keeps its
    voxels closer to cubes, so thick slices stay until pixels are as large. The last level has at
    most 64 pixels in plane; a smaller volume gets one coarser level.
    """
    shape, spacing = geometry.shape, geometry.spacing
    steps: list[Factor] = []
    while max(shape[:2]) > (_SMALL if steps else 1):
        plane = math.sqrt(spacing[0] * spacing[1])
        wanted = (2, 2, 2 if spacing[2] < math.sqrt(2) * plane else 1)
        x, y, z = (min(n, step) for n, step in zip(shape, wanted, strict=True))
        step = (x, y, z)
        steps.append(step)
        shape, (sx, sy, sz) = _over(shape, step), spacing
        spacing = (sx * x, sy * y, sz * z)
    return steps


def _times(a: Factor, b: Factor) -> Factor:
    return a[0] * b[0], a[1] * b[1], a[2] * b[2]


def _over(shape: Factor, factor: Factor) -> Factor:
    return shape[0] // factor[0], shape[1] // factor[1], shape[2] // factor[2]


def _is_volume(path: Path) -> bool:
    """Return True for a store that ZarrWriter wrote, in this layout or the older one."""
    try:
        return is_store(path) and zarr.open(str(path), mode="r").attrs.get("fvae_volume") in (1, 2)
    except Exception:  # zarr raises many exception types for other data
        return False


def _attributes(geometry: Geometry, factors: list[Factor]) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "ome": describe(geometry, factors),
        "fvae_volume": 2,
        "affine": geometry.affine.tolist(),
        "spacing": list(geometry.spacing),
        "units": "HU",
    }
    if geometry.nifti_header is not None:
        attributes["nifti_header"] = base64.b64encode(geometry.nifti_header).decode()
    return attributes
