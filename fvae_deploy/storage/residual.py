"""Residuals: what turns the decoded base into voxels within a bound, one file per latent frame.

    residual/7    CRC-32 of "7 20.0" (frame, bound in HU) and the rest; then slice after slice:
                  unit | CRC-32 of its voxels | bytes of counts | bytes of marks | counts | marks

Counts and marks of a slice [x, y] are stored as bits, compressed with zstd. `stream/bound.py` says
what they mean. All numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_HEAD = struct.Struct("<HIII")
_LEVEL = 15  # of zstd; a tenth smaller than at 9, at 40 ms for a slice of 512x512


@dataclass(frozen=True)
class SliceResidual:
    """The residual of one slice: `counts` [x, y] times `unit` HU, and `marks` [x, y] of rounding.

    `check` is the CRC-32 of the voxels that it leads to, as int16 in C order.
    """

    unit: int
    counts: NDArray[np.int32]
    marks: NDArray[np.bool_]
    check: int


class ResidualFiles:
    """The residuals in the folder of a latent store, for slices of (x, y) voxels.

    The bound `max_error` in HU is part of the checksums, so that no other one can be claimed.
    """

    def __init__(self, store: Path, plane: tuple[int, int], max_error: float) -> None:
        self.folder, self._plane, self._max_error = store / "residual", plane, max_error

    def write(self, frame: int, slices: Iterable[SliceResidual]) -> None:
        """Store the slices of a latent frame; raises OSError."""
        self.folder.mkdir(exist_ok=True)
        body = b"".join(map(_packed, slices))
        path = self._path(frame)
        partial = path.with_name(f"{frame}.partial")  # a name that a resumed run clears away
        try:
            partial.write_bytes(self._check(frame, body).to_bytes(4, "little") + body)
            partial.rename(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)

    def read(self, frame: int) -> list[SliceResidual]:
        """Return the slices of a latent frame; raises OSError or ValueError for damage."""
        content = self._path(frame).read_bytes()
        body = content[4:]
        if len(content) < 4 or self._check(frame, body) != int.from_bytes(content[:4], "little"):
            raise ValueError("a checksum that does not fit the content")
        found = []
        while body:
            unit, check, *sizes = _HEAD.unpack_from(body)
            ends = _HEAD.size + sizes[0], _HEAD.size + sizes[0] + sizes[1]
            counts = _unpacked_counts(body[_HEAD.size : ends[0]], self._plane)
            marks = _unpacked_marks(body[ends[0] : ends[1]], self._plane)
            found.append(SliceResidual(unit, counts, marks, check))
            body = body[ends[1] :]
        return found

    def _check(self, frame: int, body: bytes) -> int:
        seed = f"{frame} {self._max_error!r}".encode()
        return zlib.crc32(body, zlib.crc32(seed))

    def _path(self, frame: int) -> Path:
        return self.folder / str(frame)


def size_of(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if there is none."""
    return sum(
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(folder)
        for name in names
    )


def _packed(residual: SliceResidual) -> bytes:
    counts, marks = _packed_counts(residual.counts), _packed_marks(residual.marks)
    return _HEAD.pack(residual.unit, residual.check, len(counts), len(marks)) + counts + marks


def _packed_counts(counts: NDArray[np.int32]) -> bytes:
    """Pack whole numbers plane by plane of their bits: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    zigzag = ((counts << 1) ^ (counts >> 31)).view(np.uint32).ravel()
    planes = int(zigzag.max()).bit_length()
    bits = [np.packbits((zigzag >> n & 1).astype(bool)) for n in range(planes)]
    return _compress(b"".join(plane.tobytes() for plane in bits))


def _unpacked_counts(packed: bytes, plane: tuple[int, int]) -> NDArray[np.int32]:
    voxels = plane[0] * plane[1]
    bits = np.frombuffer(_decompress(packed), np.uint8).reshape(-1, -(-voxels // 8))
    zigzag = np.zeros(voxels, np.uint32)
    for n, row in enumerate(bits):
        zigzag |= np.unpackbits(row, count=voxels).astype(np.uint32) << np.uint32(n)
    counts = (zigzag >> 1).view(np.int32) ^ -(zigzag & 1).view(np.int32)
    return counts.reshape(plane)


def _packed_marks(marks: NDArray[np.bool_]) -> bytes:
    """Pack the gaps between marked voxels, of which there are few: all low bytes first."""
    gaps = np.diff(np.flatnonzero(marks), prepend=0).astype("<u4")
    return _compress(gaps.view(np.uint8).reshape(-1, 4).T.tobytes())


def _unpacked_marks(packed: bytes, plane: tuple[int, int]) -> NDArray[np.bool_]:
    content = np.frombuffer(_decompress(packed), np.uint8).reshape(4, -1)
    gaps = np.ascontiguousarray(content.T).view("<u4").ravel()
    marks = np.zeros(plane[0] * plane[1], np.bool_)
    marks[np.cumsum(gaps, dtype=np.int64)] = True
    return marks.reshape(plane)


def _compress(content: bytes) -> bytes:
    from numcodecs import Zstd

    return bytes(Zstd(_LEVEL).encode(content)) if content else b""


def _decompress(content: bytes) -> bytes:
    from numcodecs import Zstd

    return bytes(Zstd().decode(content)) if content else b""
