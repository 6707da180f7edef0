"""The interfaces of volume readers and writers, and the code that all formats share."""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import OutputError, VolumeError
from fvae_deploy.volume.publish import Partial, hidden, write_remedy

HuFrames = NDArray[Any]  # [t, x, y] in HU, int16 or float32


@dataclass(frozen=True)
class Geometry:
    """The voxel grid of a volume: its shape and its position in space.

    `affine` maps voxel indices (i, j, k) to RAS millimetres, as in nibabel.
    `nifti_header` is the raw header of a NIfTI source (348 or 540 bytes), kept so that qform,
    sform, zooms and units reach the output bit for bit; None for other sources. Lengths in it
    have the header's own unit. Where `affine` differs from the header's, the volume is another
    part of the header's grid: the writer of NIfTI moves the forms by that difference.
    `dicom_files` lists the slices of a DICOM source in order, because a derived series must
    refer to them. `pair` names header and voxel file of a source that has two.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    nifti_header: bytes | None = None
    dicom_files: tuple[Path, ...] = ()
    pair: tuple[Path, ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the source, if these are not only its path."""
        return self.dicom_files or self.pair

    def cropped(self, start: int, stop: int) -> Geometry:
        """Return the geometry of slices [start, stop): same axes, origin moved along z."""
        x, y, z = self.shape
        if (start, stop) == (0, z):
            return self
        affine = self.affine.copy()
        affine[:3, 3] += start * affine[:3, 2]
        return dataclasses.replace(
            self,
            shape=(x, y, stop - start),
            affine=affine,
            dicom_files=self.dicom_files[start:stop],
        )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimetres along x, y and z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return x, y, z

    @property
    def orientation(self) -> str:
        """Axis codes such as "LPS": the anatomical direction in which each index grows."""
        from nibabel.orientations import aff2axcodes

        codes = aff2axcodes(self.affine)  # type: ignore[no-untyped-call]
        return "".join(code or "?" for code in codes)


class Reader(Protocol):
    """A volume that is read in slabs along z."""

    path: Path
    geometry: Geometry

    @property
    def remarks(self) -> tuple[str, ...]:
        """What a user should know about how the volume was read, in sentences for the report."""
        ...

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield the frames from `start` on, in slabs of the given depths.

        The last depth repeats to the end of the volume; the last slab may be shorter.
        Each slab is an array of its own, which later ones leave alone.
        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class Primed:
    """A reader whose first slices are read ahead, so that a stream starts without waiting.

    It can be created in one thread while another thread computes.
    """

    def __init__(self, reader: Reader, slices: int = 8) -> None:
        self.path, self.geometry, self._reader = reader.path, reader.geometry, reader
        self._rest = reader.slabs(1)
        self._first = list(islice(self._rest, slices))

    @property
    def remarks(self) -> tuple[str, ...]:
        """The reader's remarks."""
        return self._reader.remarks

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield the reader's slabs; the first call from slice 0 uses the slices read ahead."""
        if start or not self._first:
            yield from self._reader.slabs(*depths, start=start)
            return
        planes = chain(self._first, self._rest)
        self._first = []
        for indices in slab_ranges(self.geometry.shape[2], depths, 0):
            yield np.concatenate([*islice(planes, len(indices))])

    def close(self) -> None:
        """Release the file."""
        self._first = []
        self._rest.close()  # type: ignore[attr-defined]
        self._reader.close()


class Writer(ABC):
    """A volume that is written in order along z; it gets its name only when complete.

    As a context manager it commits after success and aborts after any error, Ctrl-C during
    `commit` included.
    """

    path: Path

    @abstractmethod
    def write(self, frames: HuFrames) -> None:
        """Append frames [t, x, y] in HU, int16 or float32."""

    @abstractmethod
    def commit(self) -> None:
        """Check that all frames were written, finish the file and give it its final name."""

    @abstractmethod
    def abort(self) -> None:
        """Remove the partial output, so that no temporary file stays behind."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.commit()
        except BaseException:
            self.abort()
            raise


def slab_ranges(count: int, depths: tuple[int, ...], start: int) -> Iterator[range]:
    """Split the slices from `start` to `count` into ranges of the given depths.

    The last depth repeats; the last range may be shorter. Raises VolumeError if `start` lies
    outside the volume, ValueError if a depth is not positive.
    """
    if not depths or min(depths) < 1:
        raise ValueError(f"expected slab depths of at least 1, found {depths}")
    if not 0 <= start <= count:
        raise VolumeError(
            f"expected a first slice from 0 to {count}, found {start}: choose one in this range"
        )
    for depth in chain(depths, repeat(depths[-1])):
        if start >= count:
            return
        yield range(start, min(start + depth, count))
        start += depth


def check_finite(planes: HuFrames, first: int, path: Path) -> None:
    """Raise VolumeError with the index of the first slice that contains NaN or infinity."""
    if planes.dtype.kind == "f":
        for index, plane in enumerate(planes, first):
            if not np.isfinite(plane).all():
                raise VolumeError(
                    f"expected finite values, found NaN or infinity in slice {index} of {path}: "
                    "replace them, for example with -1024"
                )


class FrameWriter(Writer):
    """Base class of all writers: checks and counts frames, and never leaves half an output.

    A format calls `_reserve` before it writes, and implements `_append` (store one frame),
    `_publish` (finish and rename) and `_discard` (close files; what is left is then removed).
    """

    def __init__(self, path: Path, geometry: Geometry, dtype: str) -> None:
        # Resolve symbolic links, so that the target is replaced and the link stays.
        self.path = Path(os.path.realpath(path))
        self.geometry = geometry
        self._dtype = np.dtype(dtype)
        self._count = 0
        self._open = True
        # In the same folder as the output, because a rename within one folder is atomic.
        self._partial = hidden(self.path)
        self._reserved: Partial | None = None
        if not self.path.parent.is_dir():
            raise VolumeError(
                f"expected a folder {self.path.parent} to write {self.path.name} into, "
                "found none: create it first"
            )

    def _reserve(self, *, folder: bool) -> None:
        """Create the partial output, a file or folder that no other run touches; OSError."""
        self._check_replaceable()
        self._reserved = Partial(self.path, folder=folder)
        self._partial = self._reserved.path

    def _check_replaceable(self) -> None:
        """Raise OutputError if something at the path must not be replaced.

        Called before the first frame and again at the end, hours later.
        """

    @abstractmethod
    def _append(self, frame: HuFrames) -> None:
        """Store one frame [x, y] that already has the stored dtype."""

    @abstractmethod
    def _publish(self) -> None:
        """Finish the partial output and rename it to its final name."""

    @abstractmethod
    def _discard(self) -> None:
        """Close or remove the partial output; called at most once, also after `_append` failed."""

    def write(self, frames: HuFrames) -> None:
        """Append frames [t, x, y] in HU, int16 or float32; `frames` itself is not changed."""
        if not self._open:
            raise VolumeError(
                f"expected {self.path} to be open, found it closed: create a new writer"
            )
        nx, ny, nz = self.geometry.shape
        if frames.ndim != 3 or frames.shape[1:] != (nx, ny) or self._count + len(frames) > nz:
            raise VolumeError(
                f"expected at most {nz - self._count} more slices of {nx}x{ny}, found frames of "
                f"shape {frames.shape}: create the writer with the geometry of these frames"
            )
        if frames.dtype not in (np.int16, np.float32):
            raise VolumeError(
                f"expected int16 or float32 frames, found {frames.dtype}: convert them first"
            )
        failed: OSError | None = None
        try:
            # One frame at a time: temporary arrays stay small, and the bytes of a compressed
            # file do not depend on how the frames were grouped.
            for frame in frames:
                self._append(self._stored(frame))
                self._count += 1
        except OSError as error:
            failed = error
        self._raise_failure(failed)

    def commit(self) -> None:
        """Check that all frames were written, and give the output its final name."""
        if not self._open:
            return
        if self._count != self.geometry.shape[2]:
            self.abort()
            raise VolumeError(
                f"expected {self.geometry.shape[2]} slices for {self.path}, found {self._count}: "
                "the partial output was removed, write all slices before commit"
            )
        failed: OSError | None = None
        try:
            self._check_replaceable()
            self._publish()
        except OSError as error:
            failed = error
        except OutputError:
            self.abort()
            raise
        self._raise_failure(failed)
        self._open = False
        self._release()

    def _raise_failure(self, failed: OSError | None) -> None:
        """Abort and raise a VolumeError if writing failed.

        Call this outside the `except` block: a compressor with its own thread raises the same
        error again on close. The error would become its own context, and contextlib would loop
        endlessly over the chain of contexts.
        """
        if failed is not None:
            self.abort()
            raise self._write_error(failed) from failed

    def abort(self) -> None:
        """Remove the partial output, so that no temporary file stays behind."""
        if self._open:
            self._open = False
            self._discard()
            self._release()

    def _release(self) -> None:
        """Remove the partial output, if it still has its hidden name."""
        if self._reserved is not None:
            self._reserved.discard()

    def _stored(self, frame: HuFrames) -> HuFrames:
        if frame.dtype.kind == "f":
            if not np.isfinite(frame).all():
                raise VolumeError(
                    f"expected finite values, found NaN or infinity in slice {self._count} "
                    f"for {self.path}: use fp32 if the model overflowed in half precision"
                )
            if self._dtype.kind == "i":
                limits = np.iinfo(self._dtype)
                frame = np.rint(frame)
                np.clip(frame, limits.min, limits.max, out=frame)
        return frame.astype(self._dtype, copy=False)

    def _write_error(self, error: OSError) -> OutputError:
        return OutputError(
            f"expected to write {self.path}, found: {error.strerror or error}: "
            f"{write_remedy(error)}"
        )
