"""NIfTI files, read and written as a stream of slices.

nibabel understands the header; the voxels are streamed here, because nibabel reads a `.nii.gz`
either whole or through an index (5 to 10 times slower). On disk x varies fastest, so a slice is
an array (y, x) and a frame [x, y] is its transpose: a view, which costs nothing. A consumer that
needs C order makes one converting copy (512x512x4 int16 to float32: 1.8 ms; copying here first
would make it 2.0 ms, and 0.2 ms suffices where the order does not matter).
"""

from __future__ import annotations

import logging
import os
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

_gzip: Any = igzip_threaded  # its functions carry no types
_BLOCK = 1 << 20  # bytes decompressed at a time, so that a header that lies cannot claim memory
_DEFLATE_LIMIT = 1032  # deflate expands no byte to more than this many
_REAL = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
_HEADERS: dict[int, Any] = {348: Nifti1Header, 540: Nifti2Header}  # by the bytes they take
_SINGLE = {348: b"n+1\0", 540: b"n+2\0\r\n\x1a\n"}  # magic of header and voxels in one file
_PAIR = {348: b"ni1\0", 540: b"ni2\0\r\n\x1a\n"}

# nibabel repairs harmless faults (a zoom of 0, an unknown xform code) and logs each: not news here.
_silent = logging.Logger("fvae.nifti", level=logging.CRITICAL + 1)


class _Stream(Protocol):
    def readinto(self, target: memoryview, /) -> int: ...

    def seek(self, offset: int, /) -> Any: ...


class NiftiReader:
    """A `.nii` or `.nii.gz` file, NIfTI-1 or NIfTI-2, of either byte order.

    HuFrames are int16 if the header alone promises whole numbers within int16 (its integer type,
    slope and intercept), else float32; all slabs of a volume have the same type. Trailing
    dimensions of 1 are dropped and a plane is a volume of one slice. A file is open only while
    its slabs are being drawn.

    Raises VolumeError for whatever cannot be read as one volume of finite numbers.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with _reading(self.path):
            if not self.path.is_file():
                raise VolumeError(f"expected a file, found a folder or device: {self.path}")
            size = self.path.stat().st_size
            if size == 0:
                raise VolumeError(f"expected a volume, {self.path} is empty: copy it again")
            self._layout = self._read_layout(size)
        self.geometry = Geometry(self._layout.shape, self._layout.affine, self._layout.header)

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        layout = self._layout
        nx, ny, nz = layout.shape
        with _reading(self.path), self.path.open("rb", buffering=0) as file:
            # Plain files are read, not mapped: mapped pages count as resident memory, which
            # must not grow with the number of slices.
            stream = _Gunzip(file) if self._is_gzip else file
            stream.seek(layout.offset + start * layout.frame_bytes)
            for slices in slab_ranges(nz, depths, start):
                stored = np.empty((len(slices), ny, nx), layout.dtype)
                _fill(stream, stored)
                if slices.stop == nz and isinstance(stream, _Gunzip):
                    stream.finish()
                yield layout.to_hu(stored, slices.start, self.path).transpose(0, 2, 1)

    def close(self) -> None:
        """Release the file: nothing is held between slabs."""

    @property
    def _is_gzip(self) -> bool:
        return self.path.name.lower().endswith(".gz")

    def _read_layout(self, size: int) -> _Layout:
        with self.path.open("rb", buffering=0) as file:
            zipped = file.read(2) == b"\x1f\x8b"
            if zipped != self._is_gzip:
                found, suffix = ("gzip", ".nii.gz") if zipped else ("no gzip", ".nii")
                raise VolumeError(
                    f"expected data that fit the name, found {found} data in {self.path}: "
                    f"if it is NIfTI, rename it to end in {suffix}"
                )
            file.seek(0)
            start = np.zeros(540, np.uint8)  # zeros follow where a small NIfTI-1 file ends
            _fill(_Gunzip(file) if zipped else file, start, short=True)
        layout = _parse(start.tobytes(), self.path)
        held = size * _DEFLATE_LIMIT if zipped else size
        need = layout.offset + layout.frame_bytes * layout.shape[2]
        if need > held:
            raise VolumeError(
                f"expected {need} bytes for {'x'.join(map(str, layout.shape))} voxels of "
                f"{layout.dtype.name}, {self.path} can hold {held}: it is truncated or its header "
                "is damaged, copy it again"
            )
        return layout


class NiftiWriter(FrameWriter):
    """Writes a `.nii` or `.nii.gz` file that appears under its name only when whole.

    The header of a NIfTI source (`geometry.nifti_header`) is kept bit for bit but for what the
    new voxels change, and for its extensions, which are dropped. The bytes of a `.nii.gz` depend
    on nothing but header and voxels. Raises VolumeError when the place cannot be written.
    """

    def __init__(self, path: Path | str, geometry: Geometry, dtype: str = "int16") -> None:
        super().__init__(Path(path), geometry, dtype)
        header = _header_for(geometry, self._dtype, self.path)
        self._dtype = self._dtype.newbyteorder(header.endianness)
        self._file: Any = None
        try:
            if self.path.exists() and not self.path.is_file():
                raise VolumeError(f"expected an output file, found a folder or device: {self.path}")
            if self.path.name.endswith(".gz"):
                # Level 1: half the time of level 2 for 4 % more bytes; in a thread of its own.
                self._file = _gzip.open(self._partial, "wb", 1, threads=1)
            else:
                self._file = self._partial.open("wb")
            self._file.write(header.binaryblock + bytes(4))  # 4 zero bytes: no extensions
        except OSError as error:
            self.abort()
            raise self._refused(error) from error

    def _append(self, frame: HuFrames) -> None:
        self._file.write(np.ascontiguousarray(frame.T).view(np.uint8).data.cast("B"))

    def _publish(self) -> None:
        self._file.close()
        os.replace(self._partial, self.path)

    def _discard(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a full disk complains once more
                self._file.close()
        with suppress(OSError):
            self._partial.unlink()


@dataclass(frozen=True)
class _Layout:
    """What a header says about the voxels that follow it."""

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
        """Whether every value that could be stored is a whole number within int16."""
        if self.dtype.kind == "f" or not (self.slope.is_integer() and self.inter.is_integer()):
            return False
        limits = np.iinfo(self.dtype)
        ends = [limit * self.slope + self.inter for limit in (limits.min, limits.max)]
        return min(ends) >= -32768 and max(ends) <= 32767

    def to_hu(self, stored: HuFrames, first: int, path: Path) -> HuFrames:
        """Scale stored slices, of which the first is slice `first` of the volume."""
        values: HuFrames
        if (self.slope, self.inter) == (1.0, 0.0):
            with np.errstate(over="ignore", invalid="ignore"):
                values = stored.astype(np.int16 if self.is_whole else np.float32, copy=False)
        else:
            values = np.empty(stored.shape, np.int16 if self.is_whole else np.float32)
            with np.errstate(over="ignore", invalid="ignore"):
                for index, plane in enumerate(stored):  # float64 of a slice, never of a volume
                    values[index] = plane.astype(np.float64) * self.slope + self.inter
        check_finite(values, first, path)
        return values


class _Gunzip:
    """Sequential gzip decompression, of several members if need be.

    Unlike `igzip.open` it accepts trailing bytes that are not gzip, as gunzip does.
    """

    def __init__(self, file: BinaryIO | Any) -> None:
        self._file = file
        self._member = igzip_lib.IgzipDecompressor(flag=igzip_lib.DECOMP_GZIP)

    def readinto(self, target: memoryview, /) -> int:
        """Fill at least one byte of `target`, unless the data end; return the number filled."""
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
        """Go forward to `offset` from the beginning, by decompressing what lies between."""
        scratch = memoryview(bytearray(_BLOCK))
        while offset > 0:
            count = self.readinto(scratch[: min(offset, _BLOCK)])
            if count == 0:
                raise EOFError
            offset -= count

    def finish(self) -> None:
        """Read on a little after the last voxel: only a member's end shows its checksum."""
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
    """Turn what can go wrong below into the one error a user sees."""
    try:
        yield
    except EOFError as error:
        raise VolumeError(
            f"expected as many voxels as the header promises, {path} ends before: copy it again"
        ) from error
    except igzip_lib.IsalError as error:  # type: ignore[misc]
        raise VolumeError(
            f"expected sound gzip data, found damage in {path} ({error}): copy it again"
        ) from error
    except OSError as error:
        raise VolumeError(
            f"expected to read {path}, found: {error.strerror or error}; check its permissions"
        ) from error
    except MemoryError as error:
        raise VolumeError(
            f"expected slices that fit in memory, {path} has larger ones: is its header damaged?"
        ) from error


def promised_bytes(block: bytes, path: Path) -> int:
    """Size of the file, unpacked, that begins with these bytes (540 of them, where it has them).

    Raises VolumeError unless they are a sound header.
    """
    layout = _parse(block.ljust(540, b"\0"), path)
    return layout.offset + layout.frame_bytes * layout.shape[2]


def _parse(block: bytes, path: Path) -> _Layout:
    """Read the first 540 bytes of a file: everything that reading its voxels needs."""
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
            f"expected voxels from byte {size + 4} on, found vox_offset {offset:g} in {path}: "
            "its header is damaged, write it anew"
        )
    try:
        with np.errstate(all="ignore"):
            header.check_fix(logger=_silent, error_level=40)
            slope, inter = header.get_slope_inter()
            affine = np.asarray(header.get_best_affine(), np.float64)
            singular = not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0
    except (HeaderDataError, ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        raise VolumeError(
            f"expected a sound NIfTI header, found a damaged one in {path} ({error}): write it anew"
        ) from error
    if singular:
        raise VolumeError(
            f"expected an affine that can be inverted, found {affine[:3].tolist()} in {path}: "
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
                    f"expected header and voxels in one file, {path} is the header of a .hdr/.img "
                    "pair: convert the pair to .nii"
                )
    raise VolumeError(f"expected a NIfTI file, {path} does not begin as one: copy it again")


def _shape(header: Any, path: Path) -> tuple[int, int, int]:
    ndim, *dims = (int(n) for n in header["dim"])
    used = dims[:ndim] if 1 <= ndim <= 7 else []
    text = "x".join(map(str, used)) or f"{ndim} dimensions"
    if len(used) < 2 or min(used) < 1:
        raise VolumeError(f"expected a 3-D volume, found {text} in {path}: is its header damaged?")
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
    """Make the header of a file with this geometry, from the source's own if there is one."""
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
        for place in (header.set_sform, header.set_qform):
            place(geometry.affine, code="scanner")
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    header["magic"] = _SINGLE[header.sizeof_hdr]
    return header
