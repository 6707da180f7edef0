"""Reader and writer for volumes in Zarr: arrays (x, y, z) with a few slices per chunk.

They are written as Zarr v3 with zstd and its checksum. Within a chunk x varies fastest, as in
NIfTI (by a transpose codec), so that a frame is contiguous. Attributes of the array:

    fvae_volume   1, the version of this layout
    affine        4 x 4, maps voxel indices to RAS millimetres
    spacing       millimetres along x, y, z
    units         "HU"
    nifti_header  the header of a NIfTI source in base64
"""

from __future__ import annotations

import base64
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import (
    FrameWriter,
    Geometry,
    HuFrames,
    check_finite,
    publish_folder,
    slab_ranges,
)
from fvae_deploy.volume.options import ReadOptions

_DEPTH = 4  # slices per chunk: 2 MiB of int16 at 512 x 512
_METADATA = ("zarr.json", ".zarray", ".zgroup")  # every Zarr store has one of these files


class ZarrReader:
    """An array (x, y, z) in Zarr v2 or v3, or a group that contains exactly one 3-D array.

    Frames are int16 if the stored type guarantees whole numbers within int16, else float32. The
    reader needs memory for one slab and one layer of chunks. Without an `affine` attribute the
    affine is the identity: 1 mm voxels.

    Raises VolumeError for stores without such an array and for damaged or missing chunks.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, path: Path | str, options: ReadOptions | None = None) -> None:
        self.path = Path(path)
        with _reading(self.path):
            self._array, attributes = _open(self.path)
        kind, size = self._array.dtype.kind, self._array.dtype.itemsize
        shape = self._array.shape
        if kind not in "iuf" or min(shape) < 1:
            raise VolumeError(
                f"expected a 3-D array of numbers, found {shape} of {self._array.dtype} in "
                f"{self.path}: convert it, for example to int16"
            )
        self._whole = (kind == "i" and size <= 2) or (kind == "u" and size == 1)
        self.geometry = _geometry(shape, attributes, self.path)

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for damaged chunks and for values that are not finite.
        """
        nx, ny, nz = self.geometry.shape
        layer: NDArray[Any] = np.empty((0, ny, nx))
        first = 0  # index in the volume of the first slice of `layer`
        thickness = (self._array.shards or self._array.chunks)[2]
        for slices in slab_ranges(nz, depths, start):
            slab = np.empty((len(slices), ny, nx), np.int16 if self._whole else np.float32)
            for plane, z in zip(slab, slices, strict=True):
                if not first <= z < first + len(layer):
                    first = z - z % thickness
                    layer = self._layer(first, min(first + thickness, nz))
                with np.errstate(over="ignore"):
                    plane[:] = layer[z - first]
            check_finite(slab, slices.start, self.path)
            yield slab.transpose(0, 2, 1)

    def close(self) -> None:
        """Do nothing: no file stays open between slabs."""

    def _layer(self, start: int, stop: int) -> NDArray[Any]:
        with _reading(self.path):
            return np.asarray(self._array[:, :, start:stop]).transpose(2, 1, 0)


class ZarrWriter(FrameWriter):
    """Writes a Zarr v3 array, which gets its name only when complete.

    An older volume that fvae wrote is replaced at the end; nothing else is ever replaced.
    Raises VolumeError if the path cannot be written.
    """

    def __init__(
        self, path: Path | str, geometry: Geometry, dtype: str = "int16", pyramid: bool = False
    ) -> None:
        super().__init__(Path(path), geometry, dtype)
        if os.path.lexists(self.path) and not _is_volume(self.path):
            raise VolumeError(
                "expected a new name or a volume that fvae wrote, found something else at "
                f"{self.path}: choose another name"
            )
        nx, ny, nz = geometry.shape
        self._layer = np.empty((min(_DEPTH, nz), ny, nx), self._dtype)  # the chunk being filled
        try:
            # A killed process with the same id may have left this folder.
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
            self._array = zarr.create_array(
                str(self._partial),
                shape=geometry.shape,
                chunks=(nx, ny, len(self._layer)),
                dtype=dtype,
                filters=[zarr.codecs.TransposeCodec(order=(2, 1, 0))],
                compressors=[zarr.codecs.ZstdCodec(level=1, checksum=True)],
                fill_value=0,
                attributes=_attributes(geometry),
                config={"write_empty_chunks": True},  # to tell a lost chunk from zeros
            )
        except OSError as error:
            self.abort()
            raise self._write_error(error) from error

    def _append(self, frame: HuFrames) -> None:
        self._layer[self._count % len(self._layer)] = frame.T
        stop = self._count + 1
        filled = stop % len(self._layer) or len(self._layer)
        if filled == len(self._layer) or stop == self.geometry.shape[2]:
            self._array[:, :, stop - filled : stop] = self._layer[:filled].transpose(2, 1, 0)

    def _publish(self) -> None:
        publish_folder(self._partial, self.path)

    def _discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)


def _is_store(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in _METADATA)


def _is_volume(path: Path) -> bool:
    """Return True for a store that ZarrWriter wrote."""
    try:
        return _is_store(path) and "fvae_volume" in zarr.open_array(str(path), mode="r").attrs
    except Exception:  # zarr raises many exception types for other data
        return False


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except VolumeError:
        raise
    except Exception as error:  # damage makes zarr raise many exception types
        reason = " ".join(str(error).split())[:200]
        raise VolumeError(
            f"expected an intact Zarr store, found damage in {path} ({reason}): copy it again"
        ) from error


def _open(path: Path) -> tuple[Any, dict[str, Any]]:
    if not _is_store(path):
        raise VolumeError(
            f"expected a Zarr store, found no {' or '.join(_METADATA)} in {path}: check the path"
        )
    # With Fortran order in memory a frame is contiguous, which halves the time of reading.
    with zarr.config.set({"array.order": "F"}):
        node = zarr.open(str(path), mode="r")
    attributes = dict(node.attrs)
    if "fvae_latents" in attributes:
        raise VolumeError(f"expected a CT, found latents in {path}: use fvae decode")
    if isinstance(node, zarr.Group):
        arrays = [array for _, array in node.arrays() if array.ndim == 3]
        if len(arrays) != 1:
            raise VolumeError(
                f"expected one 3-D array, found {len(arrays)} in {path}: pass the path of one array"
            )
        node = arrays[0]
        attributes |= dict(node.attrs)
    array: Any = node
    if array.ndim != 3:
        raise VolumeError(
            f"expected a 3-D array, found {array.ndim}-D {'x'.join(map(str, array.shape))} in "
            f"{path}: split it first"
        )
    if "fvae_volume" in attributes and array.nchunks_initialized < array.nchunks:
        raise VolumeError(
            f"expected {array.nchunks} chunks, found {array.nchunks_initialized} in {path}: "
            "copy it again"
        )
    return array, attributes


def _attributes(geometry: Geometry) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "fvae_volume": 1,
        "affine": geometry.affine.tolist(),
        "spacing": list(geometry.spacing),
        "units": "HU",
    }
    if geometry.nifti_header is not None:
        attributes["nifti_header"] = base64.b64encode(geometry.nifti_header).decode()
    return attributes


def _geometry(shape: tuple[int, int, int], attributes: dict[str, Any], path: Path) -> Geometry:
    try:
        affine = np.asarray(attributes.get("affine", np.eye(4)), np.float64)
        text = attributes.get("nifti_header")
        header = None if text is None else base64.b64decode(text, validate=True)
        valid = affine.shape == (4, 4) and np.isfinite(affine).all() and np.linalg.det(affine) != 0
    except (TypeError, ValueError):
        valid, header = False, None
    if not valid or (header is not None and len(header) not in (348, 540)):
        raise VolumeError(
            "expected an affine of 4 x 4 numbers that can be inverted and a NIfTI header of 348 or "
            f"540 bytes, found other attributes in {path}: correct them"
        )
    return Geometry(shape, affine, header)
