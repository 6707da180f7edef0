"""Reader and writer for NIfTI files, which are streamed slice by slice.

nibabel parses the header (`nifti_header.py`). The voxels are streamed here (`raw.py`), because
nibabel reads a `.nii.gz` either as a whole or through an index (5 to 10 times slower).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry, HuFrames
from fvae_deploy.volume.nifti_header import header_for, parse
from fvae_deploy.volume.raw import Inflate, RawWriter, Voxels, fill, is_gzip, reading

_PAIR = (".hdr", ".hdr.gz", ".img", ".img.gz")
_BEGINNING = 540  # bytes, which hold the header of both versions


class NiftiReader:
    """A `.nii`, `.nii.gz` or `.nii.bgz` file, or a pair of `.hdr` and `.img`.

    It may be NIfTI-1 or -2, in either byte order. Frames are int16 if the header guarantees whole
    numbers within int16 (by its data type, slope and intercept), else float32; all slabs of a
    volume have the same type. Trailing dimensions of 1 are dropped, and a 2-D image is a volume of
    one slice. The file is open only while slabs are being read.

    Raises VolumeError if the file cannot be read as one volume of finite numbers.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        pair = self.path.name.lower().endswith(_PAIR)
        head, data = _pair(self.path) if pair else (self.path, self.path)
        with reading(head):
            if not head.is_file():
                raise VolumeError(f"expected a file, found no file at {head}: check the path")
            if head.stat().st_size == 0:
                raise VolumeError(f"expected a volume, found {head} empty: copy it again")
            header = parse(_beginning(head), head, pair)
        with reading(data):
            self._voxels = Voxels(
                data,
                header.shape,
                header.dtype,
                offset=header.offset,
                compressed=_is_compressed(data),
                slope=header.slope,
                inter=header.inter,
            )
            self._voxels.check_size()
        self.remarks = header.remarks
        self.geometry = Geometry(
            header.shape, header.affine, header.block, pair=(head, data) if pair else ()
        )

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        return self._voxels.slabs(*depths, start=start)

    def close(self) -> None:
        """Do nothing: the file is closed after each pass over its slabs."""


class NiftiWriter(RawWriter):
    """Writes a `.nii` or `.nii.gz` file, which gets its name only when complete.

    The header of a NIfTI source (`geometry.nifti_header`) is kept bit for bit, except for the
    fields that describe the new voxels. Header extensions are dropped. The bytes of a `.nii.gz`
    depend only on header and voxels. Raises VolumeError if the path cannot be written.
    """

    def __init__(self, path: Path | str, geometry: Geometry, dtype: str = "int16") -> None:
        path = Path(path)
        header = header_for(geometry, np.dtype(dtype), path)
        stored = np.dtype(dtype).newbyteorder(header.endianness)
        block = header.binaryblock + bytes(4)  # 4 zero bytes: no extensions
        super().__init__(path, geometry, stored.str, block, path.name.lower().endswith(".gz"))


def promised_bytes(block: bytes, path: Path) -> int:
    """Return the uncompressed size of a file in bytes, computed from its first 540 bytes.

    A file that is shorter passes all its bytes. Raises VolumeError if the header is not valid.
    """
    header = parse(block.ljust(_BEGINNING, b"\0"), path)
    return Voxels(path, header.shape, header.dtype, offset=header.offset).end


def _beginning(path: Path) -> bytes:
    """Return the first bytes of a file, decompressed; zeros follow the end of a shorter one."""
    compressed = _is_compressed(path)
    with path.open("rb", buffering=0) as file:
        start = np.zeros(_BEGINNING, np.uint8)
        fill(Inflate(file) if compressed else file, start, short=True)
    return start.tobytes()


def _is_compressed(path: Path) -> bool:
    """Return whether a file is gzip data; raises VolumeError if its suffix says otherwise."""
    zipped, parts = is_gzip(path), path.name.lower().split(".")
    if zipped != parts[-1].endswith("gz"):
        kind, suffix = ("gzip", f".{parts[-1]}.gz") if zipped else ("no gzip", f".{parts[-2]}")
        raise VolumeError(
            f"expected data that match the suffix, found {kind} data in {path}: "
            f"if it is NIfTI, rename it to end in {suffix}"
        )
    return zipped


def _pair(path: Path) -> tuple[Path, Path]:
    """Return the header and the voxels of a pair, given either; both may be compressed."""
    stem = path.name[: -len(next(s for s in _PAIR if path.name.lower().endswith(s)))]
    found = []
    for kind in ("hdr", "img"):
        ends = (f".{kind}", f".{kind}.gz")
        names = [stem + end for end in (*ends, *(end.upper() for end in ends))]
        files = [path] if path.name in names else []
        files += [path.with_name(name) for name in names if path.with_name(name).is_file()]
        if not files:
            raise VolumeError(
                f"expected a pair of .hdr and .img, found no {names[0]} beside {path}: copy it "
                "there"
            )
        found.append(files[0])
    return found[0], found[1]
