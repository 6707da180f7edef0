"""What every reader and writer of volumes offers, and the choice by suffix."""

from __future__ import annotations

import os
import shutil
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

HuFrames = NDArray[Any]  # [t, x, y] in HU, int16 or float32


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a volume lie.

    `affine` maps voxel indices (i, j, k) to RAS millimetres, as nibabel does.
    `nifti_header` is the source's own header when it was NIfTI (348 or 540 bytes), so that
    qform, sform, zooms and units reach the output bit for bit; None otherwise.
    `dicom_files` are the source's slices, in order, when it was DICOM: a derived series refers
    to them.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    nifti_header: bytes | None = None
    dicom_files: tuple[Path, ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimetres along x, y and z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return x, y, z

    @property
    def orientation(self) -> str:
        """Axis codes such as "LPS": the direction in which each axis grows."""
        from nibabel.orientations import aff2axcodes

        codes = aff2axcodes(self.affine)  # type: ignore[no-untyped-call]
        return "".join(code or "?" for code in codes)


class Reader(Protocol):
    """A volume to be read from front to back."""

    path: Path
    geometry: Geometry

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield the frames from `start` on, in slabs of the given depths.

        The last depth repeats until the volume ends; the last slab may be shorter.
        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class Primed:
    """A reader whose first slices are read already, so that a stream begins at once.

    Made in one thread while another computes; `slabs` is that of the reader.
    """

    def __init__(self, reader: Reader, slices: int = 8) -> None:
        self.path, self.geometry, self._reader = reader.path, reader.geometry, reader
        self._rest = reader.slabs(1)
        self._held = list(islice(self._rest, slices))

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield what the reader would; once from the slices that are held."""
        if start or not self._held:
            yield from self._reader.slabs(*depths, start=start)
            return
        planes = chain(self._held, self._rest)
        self._held = []
        for indices in slab_ranges(self.geometry.shape[2], depths, 0):
            yield np.concatenate([*islice(planes, len(indices))])

    def close(self) -> None:
        """Release the file."""
        self._held = []
        self._rest.close()  # type: ignore[attr-defined]
        self._reader.close()


class Writer(Protocol):
    """A volume to be written from front to back; it appears under its name only when whole."""

    path: Path

    def write(self, frames: HuFrames) -> None:
        """Append frames [t, x, y] in HU, int16 or float32."""
        ...

    def commit(self) -> None:
        """Finish, check that every frame came, and give the file its final name."""
        ...

    def abort(self) -> None:
        """Remove what was written; nothing is left under the final or a temporary name."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit after success, abort after an error."""
        ...


def slab_ranges(count: int, depths: tuple[int, ...], start: int) -> Iterator[range]:
    """Split the slices from `start` to `count` into ranges of the given depths.

    The last depth repeats; the last range may be shorter. Raises VolumeError when `start`
    lies outside the volume, ValueError when a depth is not positive.
    """
    if not depths or min(depths) < 1:
        raise ValueError(f"expected slab depths of at least 1, found {depths}")
    if not 0 <= start <= count:
        raise VolumeError(
            f"expected a first slice from 0 to {count}, found {start}: choose one that exists"
        )
    for depth in chain(depths, repeat(depths[-1])):
        if start >= count:
            return
        yield range(start, min(start + depth, count))
        start += depth


def check_finite(planes: HuFrames, first: int, path: Path) -> None:
    """Raise VolumeError naming the first slice that holds NaN or infinity."""
    if planes.dtype.kind == "f":
        for index, plane in enumerate(planes, first):
            if not np.isfinite(plane).all():
                raise VolumeError(
                    f"expected finite values, found NaN or infinity in slice {index} of {path}: "
                    "replace them, for example with -1024"
                )


class FrameWriter(ABC):
    """What every Writer shares: it checks frames, counts them, and leaves all or nothing.

    A format adds `_append` (one frame), `_publish` (finish under the final name) and `_discard`
    (remove everything).
    """

    def __init__(self, path: Path, geometry: Geometry, dtype: str) -> None:
        # Through a link, so that the link stays and what it points at is replaced.
        self.path = Path(os.path.realpath(path))
        self.geometry = geometry
        self._dtype = np.dtype(dtype)
        self._count = 0
        self._open = True
        # Hidden and beside the target: a rename within one folder is atomic.
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        if not self.path.parent.is_dir():
            raise VolumeError(
                f"expected a folder {self.path.parent} to write {self.path.name} into, "
                "found none: create it first"
            )

    @abstractmethod
    def _append(self, frame: HuFrames) -> None:
        """Store one frame [x, y], already of the stored dtype."""

    @abstractmethod
    def _publish(self) -> None:
        """Finish the partial output and give it its final name."""

    @abstractmethod
    def _discard(self) -> None:
        """Remove the partial output; called once, also after `_append` failed."""

    def write(self, frames: HuFrames) -> None:
        """Append frames [t, x, y] in HU, int16 or float32; `frames` itself is not changed."""
        if not self._open:
            raise VolumeError(f"expected {self.path} to be open, found it closed: create it anew")
        nx, ny, nz = self.geometry.shape
        if frames.ndim != 3 or frames.shape[1:] != (nx, ny) or self._count + len(frames) > nz:
            raise VolumeError(
                f"expected at most {nz - self._count} more slices of {nx}x{ny}, found frames of "
                f"shape {frames.shape}: the geometry must be that of what is written"
            )
        if frames.dtype not in (np.int16, np.float32):
            raise VolumeError(f"expected int16 or float32 frames, found {frames.dtype}: convert it")
        failed: OSError | None = None
        try:
            # One frame at a time: temporaries stay small, and the bytes of a compressed file
            # do not depend on how its frames were grouped.
            for frame in frames:
                self._append(self._stored(frame))
                self._count += 1
        except OSError as error:
            failed = error
        self._end(failed)

    def commit(self) -> None:
        """Finish, check that every frame came, and give the output its final name."""
        if not self._open:
            return
        if self._count != self.geometry.shape[2]:
            self.abort()
            raise VolumeError(
                f"expected {self.geometry.shape[2]} slices for {self.path}, found {self._count}: "
                "nothing was written"
            )
        failed: OSError | None = None
        try:
            self._publish()
        except OSError as error:
            failed = error
        self._end(failed)
        self._open = False

    def _end(self, failed: OSError | None) -> None:
        """Abort after an error, and say so.

        Not while it is being handled: a compressor with a thread raises the same error once more
        as it closes, which would then be its own context, and contextlib never sees the end.
        """
        if failed is not None:
            self.abort()
            raise self._refused(failed) from failed

    def abort(self) -> None:
        """Remove what was written; nothing is left under the final or a temporary name."""
        if self._open:
            self._open = False
            self._discard()

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

    def _refused(self, error: OSError) -> OutputError:
        return OutputError(
            f"expected room and permission to write {self.path}, found: {error.strerror or error}; "
            "free some space or choose another folder"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.commit()
        else:
            self.abort()


def publish_folder(partial: Path, path: Path) -> None:
    """Give a folder its final name, in place of an older one.

    It cannot be replaced in one step: the old one moves aside and comes back if the new one
    cannot take its place.
    """
    aside = partial.with_suffix(".old")
    if path.exists():
        path.rename(aside)
    try:
        partial.rename(path)
    except OSError:
        if aside.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
