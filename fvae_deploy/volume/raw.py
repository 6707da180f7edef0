"""Voxels that lie in a file as one run of bytes, plain or compressed, as NIfTI, NRRD and MHA have.

On disk x varies fastest, so a slice is an array (y, x) and a frame [x, y] is its transpose: a view,
which costs nothing. A consumer that needs C order makes one converting copy (512x512x4 int16 to
float32: 1.8 ms). Copying here first would take 2.0 ms in total; a consumer that accepts any order
needs only 0.2 ms.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from isal import igzip_lib, igzip_threaded
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import FrameWriter, Geometry, HuFrames, check_finite, slab_ranges
from fvae_deploy.volume.publish import publish_file

_gzip: Any = igzip_threaded  # has no type annotations
_BLOCK = 1 << 20  # bytes decompressed at a time, so that a false header cannot exhaust memory
_DEFLATE_LIMIT = 1032  # maximum expansion ratio of deflate
_GZIP = b"\x1f\x8b"  # how every member begins


@dataclass(frozen=True)
class Voxels:
    """Where the voxels of a volume lie, and how stored numbers become HU.

    `start` is the byte of `file` where they, or the compressed data, begin; `offset` counts the
    bytes before the first voxel after decompression. `sole` says that nothing may follow the last
    voxel: then other sizes than those of the header are found.
    """

    file: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    start: int = 0
    offset: int = 0
    compressed: bool = False
    slope: float = 1.0
    inter: float = 0.0
    sole: bool = False

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored slice."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes after decompression up to the end of the last voxel."""
        return self.offset + self.frame_bytes * self.shape[2]

    @property
    def is_whole(self) -> bool:
        """True if every value that the data type can store is a whole number within int16."""
        if self.dtype.kind == "f" or not (self.slope.is_integer() and self.inter.is_integer()):
            return False
        limits = np.iinfo(self.dtype)
        ends = [limit * self.slope + self.inter for limit in (limits.min, limits.max)]
        return min(ends) >= -32768 and max(ends) <= 32767

    def check_size(self) -> None:
        """Raise VolumeError if the file is too short for these voxels, or too long where `sole`."""
        stored = self.file.stat().st_size - self.start
        available = stored * _DEFLATE_LIMIT if self.compressed else stored
        voxels = f"{'x'.join(map(str, self.shape))} voxels of {self.dtype.name}"
        if self.end > available:
            raise VolumeError(
                f"expected {self.end} bytes for {voxels}, found at most {max(available, 0)} in "
                f"{self.file}, which is truncated or has a damaged header: copy it again"
            )
        if self.sole and not self.compressed and self.end < available:
            raise self._excess(f"{available}")

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        nx, ny, nz = self.shape
        with reading(self.file), self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            # Uncompressed files are not memory-mapped: mapped pages count as resident memory,
            # which must not grow with the number of slices.
            stream = Inflate(file) if self.compressed else file
            skipped = self.offset + start * self.frame_bytes
            stream.seek(skipped if self.compressed else self.start + skipped)
            for slices in slab_ranges(nz, depths, start):
                stored = np.empty((len(slices), ny, nx), self.dtype)
                fill(stream, stored)
                if slices.stop == nz and isinstance(stream, Inflate) and stream.finish():
                    self._check_end()
                yield self._to_hu(stored, slices.start).transpose(0, 2, 1)

    def _check_end(self) -> None:
        if self.sole:
            raise self._excess("more")

    def _excess(self, found: str) -> VolumeError:
        return VolumeError(
            f"expected {self.end} bytes for {'x'.join(map(str, self.shape))} voxels of "
            f"{self.dtype.name}, found {found} in {self.file}: correct sizes and type in the header"
        )

    def _to_hu(self, stored: HuFrames, first: int) -> HuFrames:
        """Scale stored slices to HU; `first` is the index of the first one in the volume."""
        values: HuFrames
        if (self.slope, self.inter) == (1.0, 0.0):
            with np.errstate(over="ignore", invalid="ignore"):
                values = stored.astype(np.int16 if self.is_whole else np.float32, copy=False)
        else:
            values = np.empty(stored.shape, np.int16 if self.is_whole else np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                for index, plane in enumerate(stored):  # float64 for one slice at a time
                    values[index] = plane.astype(np.float64) * self.slope + self.inter
        check_finite(values, first, self.file)
        return values


class RawWriter(FrameWriter):
    """Writes a header and, after it, the frames; the file gets its name only when complete.

    `dtype` may have a byte order, such as ">i2". With `compressed` the file is gzip data whose
    bytes depend only on header and voxels. Raises VolumeError if the path cannot be written.
    """

    def __init__(
        self, path: Path | str, geometry: Geometry, dtype: str, header: bytes, compressed: bool
    ) -> None:
        super().__init__(Path(path), geometry, dtype)
        self._file: Any = None
        try:
            if os.path.exists(self.path) and not self.path.is_file():
                raise VolumeError(
                    f"expected an output file, found a folder or device at {self.path}: "
                    "choose another name"
                )
            self._reserve(folder=False)
            if compressed:
                # Level 1 takes half the time of level 2 for 4 % more bytes. It runs in a thread.
                self._file = _gzip.open(self._partial, "wb", 1, threads=1)
            else:
                self._file = self._partial.open("wb")
            self._file.write(header)
        except OSError as error:
            self.abort()
            raise self._write_error(error) from error

    def _append(self, frame: HuFrames) -> None:
        self._file.write(np.ascontiguousarray(frame.T).view(np.uint8).data.cast("B"))

    def _publish(self) -> None:
        self._file.close()
        publish_file(self._partial, self.path)

    def _discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # on a full disk, closing fails again
                self._file.close()


class _Stream(Protocol):
    def readinto(self, target: memoryview, /) -> int: ...

    def seek(self, offset: int, /) -> Any: ...


class Inflate:
    """Sequential decompression of one or more gzip members, or of one zlib stream.

    Unlike `igzip.open`, but like gunzip, it accepts trailing bytes that are not gzip data.
    """

    def __init__(self, file: BinaryIO | Any) -> None:
        self._file = file
        self._start = file.read(2)
        self._member = _member(self._start)

    def readinto(self, target: memoryview, /) -> int:
        """Fill part of `target` and return the number of bytes, which is 0 only at the end."""
        while True:
            data = b""
            if self._member.eof:
                data = self._member.unused_data
                if len(data) < 2:
                    data += self._file.read(_BLOCK)
                if data[:2] != _GZIP:
                    return 0
                self._member = _member(data)
            elif self._member.needs_input:
                data, self._start = self._start, b""
                data += self._file.read(_BLOCK >> 3)
                if not data:
                    raise EOFError
            plain = self._member.decompress(data, min(len(target), _BLOCK))
            if plain:
                target[: len(plain)] = plain
                return len(plain)

    def seek(self, offset: int, /) -> None:
        """Skip `offset` bytes from the beginning by decompressing them."""
        scratch = memoryview(bytearray(_BLOCK))
        while offset > 0:
            count = self.readinto(scratch[: min(offset, _BLOCK)])
            if count == 0:
                raise EOFError
            offset -= count

    def finish(self) -> int:
        """Read past the last voxel, because the checksum is checked only at a member's end.

        Return the number of bytes found there.
        """
        return self.readinto(memoryview(bytearray(_BLOCK)))


def _member(data: bytes) -> Any:
    kind = igzip_lib.DECOMP_GZIP if data[:2] == _GZIP else igzip_lib.DECOMP_ZLIB
    return igzip_lib.IgzipDecompressor(flag=kind)


def fill(stream: _Stream, array: NDArray[Any], short: bool = False) -> None:
    """Fill an array from a stream; raises EOFError if it ends before, unless `short`."""
    target = array.reshape(-1).view(np.uint8).data
    while len(target):
        count = stream.readinto(target[:_BLOCK])
        if not count:
            if short:
                return
            raise EOFError
        target = target[count:]


def is_gzip(path: Path) -> bool:
    """Return whether a file begins as gzip data do."""
    with path.open("rb", buffering=0) as file:
        return file.read(2) == _GZIP


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Convert the errors of damaged or unreadable files into VolumeError."""
    try:
        yield
    except EOFError as error:
        raise VolumeError(
            f"expected all voxels that the header announces, found {path} truncated: copy it again"
        ) from error
    except igzip_lib.IsalError as error:  # type: ignore[misc]
        raise VolumeError(
            f"expected intact gzip data, found damage in {path} ({error}): copy it again"
        ) from error
    except OSError as error:
        raise VolumeError(
            f"expected to read {path}, found: {error.strerror or error}: check its permissions"
        ) from error
    except MemoryError as error:
        raise VolumeError(
            f"expected slices that fit in memory, found larger ones in {path}: check its header"
        ) from error
