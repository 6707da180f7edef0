"""Reader and writer for NIfTI files, which are streamed slice by slice.

nibabel parses the header. The voxels are streamed here, because nibabel reads a `.nii.gz` either
as a whole or through an index (5 to 10 times slower). On disk x varies fastest, so a slice is an
array (y, x) and a frame [x, y] is its transpose: a view, which costs nothing. A consumer that
needs C order makes one converting copy (512x512x4 int16 to float32: 1.8 ms). Copying here first
would take 2.0 ms in total; a consumer that accepts any order needs only 0.2 ms.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from isal import igzip_lib, igzip_threaded
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import FrameWriter, Geometry, HuFrames, check_finite, slab_ranges
from fvae_deploy.volume.publish import publish_file

_gzip: Any = igzip_threaded  # has no type annotations
_BLOCK = 1 << 20  # bytes decompressed at a time, so that a false header cannot exhaust memory
_DEFLATE_LIMIT = 1032  # maximum expansion ratio of deflate
_REAL = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
_HEADERS: dict[int, Any] = {348: Nifti1Header, 540: Nifti2Header}  # by size in bytes
_SINGLE = {348: b"n+1\0", 540: b"n+2\0\r\n\x1a\n"}  # magic if header and voxels are in one file
_PAIR = {348: b"ni1\0", 540: b"ni2\0\r\n\x1a\n"}

# nibabel repairs harmless faults (a zoom of 0, an unknown xform code) and logs each: hide that.
_silent = logging.Logger("fvae.nifti", level=logging.CRITICAL + 1)


class _Stream(Protocol):
    def readinto(self, target: memoryview, /) -> int: ...

    def seek(self, offset: int, /) -> Any: ...


class NiftiReader:
    """A `.nii` or `.nii.gz` file, NIfTI-1 or NIfTI-2, in either byte order.

    Frames are int16 if the header guarantees whole numbers within int16 (by its data type, slope
    and intercept), else float32; all slabs of a volume have the same type. Trailing dimensions of
    1 are dropped, and a 2-D image is a volume of one slice. The file is open only while slabs are
    being read.

    Raises VolumeError if the file cannot be read as one volume of finite numbers.
    """

    remarks: tuple[str, ...] = ()

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with _reading(self.path):
            if not self.path.is_file():
                raise VolumeError(f"expected a file, found no file at {self.path}: check the path")
            size = self.path.stat().st_size
            if size == 0:
                raise VolumeError(f"expected a volume, found {self.path} empty: copy it again")
            self._layout = self._read_layout(size)
        self.geometry = Geometry(self._layout.shape, self._layout.affine, self._layout.header)

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        layout = self._layout
        nx, ny, nz = layout.shape
        with _reading(self.path), self.path.open("rb", buffering=0) as file:
            # Uncompressed files are not memory-mapped: mapped pages count as resident memory,
            # which must not grow with the number of slices.
            stream = _Gunzip(file) if self._is_gzip else file
            stream.seek(layout.offset + start * layout.frame_bytes)
            for slices in slab_ranges(nz, depths, start):
                stored = np.empty((len(slices), ny, nx), layout.dtype)
                _fill(stream, stored)
                if slices.stop == nz and isinstance(stream, _Gunzip):
                    stream.finish()
                yield layout.to_hu(stored, slices.start, self.path).transpose(0, 2, 1)

    def close(self) -> None:
        """Do nothing: the file is closed after each pass over its slabs."""

    @property
    def _is_gzip(self) -> bool:
        return self.path.name.lower().endswith(".gz")

    def _read_layout(self, size: int) -> _Layout:
        with self.path.open("rb", buffering=0) as file:
            zipped = file.read(2) == b"\x1f\x8b"
            if zipped != self._is_gzip:
                kind, suffix = ("gzip", ".nii.gz") if zipped else ("no gzip", ".nii")
                raise VolumeError(
                    f"expected data that match the suffix, found {kind} data in {self.path}: "
                    f"if it is NIfTI, rename it to end in {suffix}"
                )
            file.seek(0)
            start = np.zeros(540, np.uint8)  # stays 0 after the end of a small NIfTI-1 file
            _fill(_Gunzip(file) if zipped else file, start, short=True)
        layout = _parse(start.tobytes(), self.path)
        available = size * _DEFLATE_LIMIT if zipped else size
        needed = layout.offset + layout.frame_bytes * layout.shape[2]
        if needed > available:
            raise VolumeError(
                f"expected {needed} bytes for {'x'.join(map(str, layout.shape))} voxels of "
                f"{layout.dtype.name}, found at most {available} in {self.path}, which is "
                "truncated or has a damaged header: copy it again"
            )
        return layout


class NiftiWriter(FrameWriter):
    """Writes a `.nii` or `.nii.gz` file, which gets its name only when complete.

    The header of a NIfTI source (`geometry.nifti_header`) is kept bit for bit, except for the
    fields that describe the new voxels. Header extensions are dropped. The bytes of a `.nii.gz`
    depend only on header and voxels. Raises VolumeError if the path cannot be written.
    """

    def __init__(self, path: Path | str, geometry: Geometry, dtype: str = "int16") -> None:
        super().__init__(Path(path), geometry, dtype)
        header = _header_for(geometry, self._dtype, self.path)
        self._dtype = self._dtype.newbyteorder(header.endianness)
        self._file: Any = None
        try:
            if self.path.exists() and not self.path.is_file():
                raise VolumeError(
                    f"expected an output file, found a folder or device at {self.path}: "
                    "choose another name"
                )
            self._reserve(folder=False)
            if self.path.name.endswith(".gz"):
                # Level 1 takes half the time of level 2 for 4 % more bytes. It runs in a thread.
                self._file = _gzip.open(self._partial, "wb", 1, threads=1)
            else:
                self._file = self._partial.open("wb")
            self._file.write(header.binaryblock + bytes(4))  # 4 zero bytes: no extensions
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


@dataclass(frozen=True)
class _Layout:
    """The header fields that are needed to read the voxels."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: NDArray[np.float64]
    header: bytes

    @property
    def frame_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def is_whole(self) -> bool:
        """True if every value that the data type can store is a whole number within int16."""
        if self.dtype.kind == "f" or not (self.slope.is_integer() and self.inter.is_integer()):
            return False
        limits = np.iinfo(self.dtype)
        ends = [limit * self.slope + self.inter for limit in (limits.min, limits.max)]
        return min(ends) >= -32768 and max(ends) <= 32767

    def to_hu(self, stored: HuFrames, first: int, path: Path) -> HuFrames:
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
        check_finite(values, first, path)
        return values


class _Gunzip:
    """Sequential decompression of one or more gzip members.

    Unlike `igzip.open`, but like gunzip, it accepts trailing bytes that are not gzip data.
    """

    def __init__(self, file: BinaryIO | Any) -> None:
        self._file = file
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    def readinto(self, target: memoryview, /) -> int:
        """Fill part of `target` and return the number of bytes, which is 0 only at the end."""
        while True:
            data = b""
            if self._member.eof:
                data = self._member.unused_data
                if len(data) < 2:
                    data += self._file.read(_BLOCK)
                if data[:2] != b"\x1f\x8b":
                    return 0
                self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)
            elif self._member.needs_input:
                data = self._file.read(_BLOCK >> 3)
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

    def finish(self) -> None:
        """Read past the last voxel, because the checksum is checked only at a member's end."""
        self.readinto(memoryview(bytearray(_BLOCK)))


def _fill(stream: _Stream, array: NDArray[Any], short: bool = False) -> None:
    target = array.reshape(-1).view(np.uint8).data
    while len(target):
        count = stream.readinto(target[:_BLOCK])
        if not count:
            if short:
                return
            raise EOFError
        target = target[count:]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
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


def promised_bytes(block: bytes, path: Path) -> int:
    """Return the uncompressed size of a file in bytes, computed from its first 540 bytes.

    A file that is shorter passes all its bytes. Raises VolumeError if the header is not valid.
    """
    layout = _parse(block.ljust(540, b"\0"), path)
    return layout.offset + layout.frame_bytes * layout.shape[2]


def _parse(block: bytes, path: Path) -> _Layout:
    """Parse the first 540 bytes of a file into the layout of its voxels."""
    header = _header(block, path)
    size = header.sizeof_hdr
    shape = _shape(header, path)
    code = int(header["datatype"])
    dtype = _dtype(header, code)
    if dtype is None:
        raise VolumeError(
            f"expected integers or real numbers of at most 64 bits, found NIfTI data type {code} "
            f"in {path}: convert it, for example to int16"
        )
    offset = float(header["vox_offset"])
    if not (offset == 0 or (offset >= size + 4 and offset.is_integer())):
        raise VolumeError(
            f"expected voxels at byte {size + 4} or later, found vox_offset {offset:g} in {path}: "
            "write the file again with a correct header"
        )
    try:
        with np.errstate(all="ignore"):
            header.check_fix(logger=_silent, error_level=40)
            slope, inter = header.get_slope_inter()
            affine = np.asarray(header.get_best_affine(), np.float64)
            singular = not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0
    except (HeaderDataError, ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise VolumeError(
            f"expected a valid NIfTI header, found a damaged one in {path} ({error}): write the "
            "file again"
        ) from error
    if singular:
        raise VolumeError(
            f"expected an invertible affine, found {affine[:3].tolist()} in {path}: "
            "correct sform or qform"
        )
    return _Layout(
        shape=shape,
        dtype=dtype,
        offset=int(offset) or size + 4,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        affine=affine,
        header=block[:size],
    )


def _header(block: bytes, path: Path) -> Any:
    for size, kind in _HEADERS.items():
        for order in ("<", ">"):
            if struct.unpack_from(order + "i", block)[0] != size:
                continue
            magic = block[344:348] if size == 348 else block[4:12]
            if magic == _SINGLE[size]:
                return kind(block[:size], endianness=order, check=False)
            if magic == _PAIR[size]:
                raise VolumeError(
                    f"expected header and voxels in one file, found a .hdr/.img pair in {path}: "
                    "convert it to .nii"
                )
    raise VolumeError(f"expected a NIfTI file, found no NIfTI header in {path}: copy it again")


def _shape(header: Any, path: Path) -> tuple[int, int, int]:
    ndim, *dims = (int(n) for n in header["dim"])
    used = dims[:ndim] if 1 <= ndim <= 7 else []
    text = "x".join(map(str, used)) or f"{ndim} dimensions"
    if len(used) < 2 or min(used) < 1:
        raise VolumeError(f"expected a 3-D volume, found {text} in {path}: check its header")
    if any(n > 1 for n in used[3:]):
        raise VolumeError(
            f"expected a 3-D volume, found {len(used)}-D {text} in {path}: split it first, "
            "for example with nibabel.four_to_three"
        )
    x, y, z = (*used, 1)[:3]
    return x, y, z


def _dtype(header: Any, code: int) -> np.dtype[Any] | None:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        return None
    return dtype if dtype.str[1:] in _REAL and code else None


def _header_for(geometry: Geometry, dtype: np.dtype[Any], path: Path) -> Any:
    """Return a header for this geometry, based on the header of a NIfTI source if there is one."""
    if geometry.nifti_header is None:
        large = max(geometry.shape) > np.iinfo(np.int16).max
        header = _HEADERS[540 if large else 348]()
        header.set_data_shape(geometry.shape)
        header.set_xyzt_units("mm")
        moved = True
    else:
        block = geometry.nifti_header.ljust(540, b"\0")
        header = _header(block, path)
        moved = not np.array_equal(_parse(block, path).affine, geometry.affine)
        if header["dim"][0] != 3 or tuple(header["dim"][1:4]) != geometry.shape:
            header["dim"] = (3, *geometry.shape, 1, 1, 1, 1)
    if moved:
        for set_affine in (header.set_sform, header.set_qform):
            set_affine(geometry.affine, code="scanner")
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    header["magic"] = _SINGLE[header.sizeof_hdr]
    return header
