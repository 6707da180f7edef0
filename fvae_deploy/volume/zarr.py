"""Reader for volumes in Zarr v2 and v3, on disk or in a ZIP file.

Which dimension is x, y and z, and where the voxels lie, is read from the first of these that the
store has: the attribute `affine` (fvae's own), OME-NGFF multiscales, and the coordinates of named
dimensions (xarray). What the reader had to assume is in its remarks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import HuFrames, check_finite, slab_ranges
from fvae_deploy.volume.cf import packing_of
from fvae_deploy.volume.options import ReadOptions
from fvae_deploy.volume.zarr_geometry import axes_of, place
from fvae_deploy.volume.zarr_image import Image, find_image, open_store, reading


class ZarrReader:
    """An array in Zarr, or the chosen level of the one image in a group.

    Frames are int16 if the stored type guarantees whole numbers within int16, else float32. The
    reader needs memory for one slab and one layer of chunks. Without anything that tells the
    voxel size, the affine is the identity: 1 mm voxels.

    Raises VolumeError for stores without such an array, for axes that are not x, y and z, for
    contradictory metadata, and for damaged or missing chunks.
    """

    def __init__(self, path: Path | str, options: ReadOptions | None = None) -> None:
        self.path = Path(path)
        self._archive: Any = None
        try:
            with reading(self.path):
                node, self._archive = open_store(self.path)
                self._open(find_image(node, self.path), (options or ReadOptions()).level)
        except BaseException:
            self.close()
            raise

    def _open(self, image: Image, number: int) -> None:
        level = image.level(number, self.path)
        array = image.levels[level]
        kind, size, shape = array.dtype.kind, array.dtype.itemsize, array.shape
        if kind not in "iuf" or min(shape, default=0) < 1:
            raise VolumeError(
                f"expected a 3-D array of numbers, found {shape} of {array.dtype} in "
                f"{self.path}: convert it, for example to int16"
            )
        remarks: list[str] = []
        if image.multiscale is not None and len(image.levels) > 1:
            count = len(image.levels)
            remarks.append(
                f"The image has {count} levels; level {level} was read, 0 is the finest."
            )
        names, self._dimensions = axes_of(image, level, self.path)
        attributes = dict(array.attrs)
        legacy = array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes
        fill = array.metadata.fill_value if legacy else None
        self._packing = packing_of(attributes, array.dtype, fill, self.path)
        small = (kind == "i" and size <= 2) or (kind == "u" and size == 1)
        self._whole = small and self._packing.is_plain
        x, _, z = self._dimensions
        # In this order in memory a frame is contiguous, which halves the time of reading.
        self._array = array.with_config({"order": "F" if x < z else "C"})
        remarks += self._packing.remarks()
        remarks += _missing_chunks(array, "fvae_volume" in image.attributes | attributes, self.path)
        self.geometry, assumed = place(image, level, names, self._dimensions, self.path)
        self.remarks: tuple[str, ...] = (*remarks, *assumed)

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for damaged chunks and for values that are not finite.
        """
        nx, ny, nz = self.geometry.shape
        layer: NDArray[Any] = np.empty((0, ny, nx))
        first = 0  # index in the volume of the first slice of `layer`
        thickness = self._array.chunks[self._dimensions[2]]
        for slices in slab_ranges(nz, depths, start):
            slab = np.empty((len(slices), ny, nx), np.int16 if self._whole else np.float32)
            for plane, z in zip(slab, slices, strict=True):
                if not first <= z < first + len(layer):
                    first = z - z % thickness
                    layer = self._layer(first, min(first + thickness, nz))
                with np.errstate(over="ignore"):
                    plane[:] = self._packing.unpack(layer[z - first])
            check_finite(slab, slices.start, self.path)
            yield slab.transpose(0, 2, 1)

    def close(self) -> None:
        """Close the ZIP file; of a folder, no file stays open between slabs."""
        if self._archive is not None:
            self._archive.close()

    def _layer(self, start: int, stop: int) -> NDArray[Any]:
        """Return the slices from `start` to `stop` as they are stored, [z, y, x]."""
        x, y, z = self._dimensions
        chosen: list[slice | int] = [0] * self._array.ndim
        chosen[x] = chosen[y] = slice(None)
        chosen[z] = slice(start, stop)
        with reading(self.path):
            stored = np.asarray(self._array[tuple(chosen)])
        order = sorted(self._dimensions)
        return stored.transpose(order.index(z), order.index(y), order.index(x))


def _missing_chunks(array: Any, own: bool, path: Path) -> list[str]:
    """Return a remark on chunks that are not stored; refuse those whose values are unknown.

    By the rules of Zarr such chunks hold the fill value, so programs leave them out. Volumes
    that fvae wrote have all chunks.
    """
    extents = array.shards or array.chunks  # of a file, in voxels
    files = math.prod(-(-n // extent) for n, extent in zip(array.shape, extents, strict=True))
    stored = array.nchunks_initialized * math.prod(array.chunks) // math.prod(extents)
    if stored >= files:
        return []
    if own:
        raise VolumeError(f"expected {files} chunks, found {stored} in {path}: copy it again")
    fill = array.metadata.fill_value
    if fill is None or not np.isfinite(fill):
        raise VolumeError(
            f"expected {files} chunks, found {stored} in {path} and no finite fill value for the "
            "others: copy it again, or set the fill value to that of air"
        )
    return [
        f"{files - stored} of {files} chunks are not stored; by the rules of Zarr their voxels "
        f"have the stored value {fill}."
    ]
