"""Reader and writer for the formats of ITK: NRRD (.nrrd, .nhdr) and MetaImage (.mha, .mhd).

SimpleITK reads the grid and the type of the voxels from the header. It would read the voxels of
compressed files and of every NRRD as a whole, so they are streamed here (`raw.py`), from where the
header says that they lie. What ITK leaves out is read from the header too: units of length, and
whether the axes have anatomical names. Written files are not compressed; they need no SimpleITK.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.optional import require
from fvae_deploy.volume.base import Geometry, HuFrames
from fvae_deploy.volume.raw import RawWriter, Voxels, reading

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # to RAS, and back
_HEADER_LIMIT = 1 << 20  # bytes
_TYPES = {  # by SimpleITK's names
    "8-bit signed integer": "i1",
    "8-bit unsigned integer": "u1",
    "16-bit signed integer": "i2",
    "16-bit unsigned integer": "u2",
    "32-bit signed integer": "i4",
    "32-bit unsigned integer": "u4",
    "64-bit signed integer": "i8",
    "64-bit unsigned integer": "u8",
    "32-bit float": "f4",
    "64-bit float": "f8",
}
_MILLIMETRES = {
    **dict.fromkeys(("", "?", "???", "mm", "millimeter", "millimeters", "millimetre"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers"), 1e-3),
    **dict.fromkeys(("cm", "centimeter", "centimeters"), 10.0),
    **dict.fromkeys(("m", "meter", "meters", "metre"), 1e3),
}
_SPACES = {  # NRRD's names of spaces with anatomical axes, without time
    "right-anterior-superior",
    "ras",
    "left-anterior-superior",
    "las",
    "left-posterior-superior",
    "lps",
}


@dataclass(frozen=True)
class _Header:
    """What the text of a header says beside the grid."""

    data: Path  # the file of the voxels
    start: int  # first byte of the voxels; -1 if they end with the file
    compressed: bool
    order: str  # "<" or ">"
    millimetres: float  # in the unit of length
    remarks: tuple[str, ...] = ()
    anatomy: str = ""  # where the axes grow to, as the header says: "LPS"


class ItkReader:
    """A `.nrrd`, `.nhdr`, `.mha` or `.mhd` file, raw or compressed by gzip or zlib.

    Frames are int16 if the type of the voxels guarantees whole numbers within int16, else float32.
    Raises EngineError if SimpleITK is not installed, and VolumeError if the file cannot be read as
    one volume of finite numbers.
    """

    def __init__(self, path: Path | str) -> None:
        require("SimpleITK", extra="itk")
        self.path = Path(path)
        with reading(self.path):
            header = _read_header(self.path)
        detached = header.data != self.path
        if detached and not header.data.is_file():
            raise VolumeError(
                f"expected the voxels of {self.path} in {header.data}, found no file: copy it there"
            )
        shape, affine, dtype = _grid(self.path, _is_nrrd(self.path))
        affine[:3] *= header.millimetres
        if not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
            raise VolumeError(
                f"expected an invertible affine, found {affine[:3].tolist()} in {self.path}: "
                "correct spacing and directions"
            )
        with reading(header.data):
            self._voxels = _voxels(header, shape, dtype, self.path)
            self._voxels.check_size()
        self.geometry = Geometry(
            shape, _LPS @ affine, pair=(self.path, header.data) if detached else ()
        )
        self.remarks = (*header.remarks, *_contradiction(header, self.geometry))

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        return self._voxels.slabs(*depths, start=start)

    def close(self) -> None:
        """Do nothing: the file is closed after each pass over its slabs."""


class ItkWriter(RawWriter):
    """Writes a `.nrrd` or `.mha` file, not compressed, which gets its name only when complete.

    Axes and positions are written in LPS, with all digits. Raises VolumeError if the path cannot
    be written.
    """

    def __init__(self, path: Path | str, geometry: Geometry, dtype: str = "int16") -> None:
        path = Path(path)
        text = _nrrd_text if _is_nrrd(path) else _meta_text
        header = text(geometry.shape, _LPS @ geometry.affine, dtype).encode("ascii")
        super().__init__(path, geometry, np.dtype(dtype).newbyteorder("<").str, header, False)


def _is_nrrd(path: Path) -> bool:
    return path.suffix.lower() in (".nrrd", ".nhdr")


def _voxels(header: _Header, shape: tuple[int, int, int], dtype: str, path: Path) -> Voxels:
    voxels = Voxels(
        header.data,
        shape,
        np.dtype(header.order + dtype),
        start=max(header.start, 0),
        compressed=header.compressed,
        sole=True,
    )
    if header.start >= 0:
        return voxels
    start = header.data.stat().st_size - voxels.end
    if header.compressed or start < 0:
        raise VolumeError(
            f"expected {voxels.end} bytes at the end of {header.data}, found a shorter or "
            f"compressed file for {path}: copy it again"
        )
    return Voxels(header.data, shape, voxels.dtype, start=start, sole=True)


def _grid(path: Path, nrrd: bool) -> tuple[tuple[int, int, int], NDArray[np.float64], str]:
    """Return shape, affine (LPS, in the file's unit) and type of the voxels, as ITK reads them."""
    import SimpleITK

    itk: Any = SimpleITK  # has no type annotations
    reader = itk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        *_, reason = (line for line in str(error).splitlines() if line.strip())
        raise VolumeError(
            f"expected a header that ITK can read, found a damaged one in {path} "
            f"({reason.strip()[-200:]}): write the file again"
        ) from error
    kind = itk.GetPixelIDValueAsString(reader.GetPixelID())
    size = tuple(int(n) for n in reader.GetSize())
    if len(size) != 3 or kind not in _TYPES or min(size) < 1:
        raise VolumeError(
            f"expected a 3-D volume with one number per voxel, found {len(size)}-D "
            f"{'x'.join(map(str, size))} of {kind} in {path}: split it first, for example with "
            "SimpleITK"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) @ np.diag(reader.GetSpacing())
    affine[:3, 3] = reader.GetOrigin()
    return (size[0], size[1], size[2]), affine, _TYPES[kind]


def _contradiction(header: _Header, geometry: Geometry) -> tuple[str, ...]:
    """Say if a header names other anatomical axes than its matrix has."""
    found = geometry.orientation
    if header.anatomy in ("", found):
        return ()
    return (
        f"AnatomicalOrientation says that the axes grow to {header.anatomy}, TransformMatrix that "
        f"they grow to {found}; the matrix is used, as in ITK.",
    )


def _read_header(path: Path) -> _Header:
    """Read where the voxels lie, and what ITK leaves out, from the text of a header."""
    with path.open("rb") as file:
        block = file.read(_HEADER_LIMIT)
    return _nrrd_header(block, path) if _is_nrrd(path) else _meta_header(block, path)


def _nrrd_header(block: bytes, path: Path) -> _Header:
    """Read the fields of an NRRD header; an empty line ends it, and the voxels may follow."""
    if not block.startswith(b"NRRD000"):
        raise _damaged(path, "NRRD", "no NRRD header")
    end = re.search(rb"\n\r?\n", block)
    text = block[: end.start() if end else len(block)].decode("utf-8", "replace")
    fields = {}
    for line in text.splitlines()[1:]:
        name, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):  # := is free text
            fields[name.strip().lower().replace(" ", "")] = value.strip()
    encoding = fields.get("encoding", "").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise _unsupported(path, "encoding raw or gzip", encoding or "none")
    data, skip = path, end.end() if end else len(block)
    name = fields.get("datafile", "")
    if name:
        if name.startswith("LIST") or re.search(r"%\d*[di]", name):
            raise _unsupported(path, "one file of voxels", f"several ({name})")
        data, skip = path.parent / name, 0
    elif end is None:
        raise _damaged(path, "NRRD", "no end of its header")
    skipped = _whole(fields.get("byteskip", "0"), path)
    if fields.get("lineskip", "0") != "0" or skipped < -1 or (skipped and encoding != "raw"):
        raise _unsupported(path, "no line skip, and byte skip with raw data", "others")
    units = re.findall(r'"([^"]*)"', fields.get("spaceunits") or fields.get("units", ""))
    factor, remarks = _unit({unit.strip().lower() for unit in units} - {""}, path)
    space = fields.get("space", "")
    if space.lower() not in _SPACES:
        remarks += (
            f"The NRRD header names no anatomical space (found {space or 'none'}); its axes are "
            "taken as left, posterior, superior, as in ITK.",
        )
    order = ">" if fields.get("endian", "").lower() == "big" else "<"
    start = -1 if skipped < 0 else skip + skipped
    return _Header(data, start, encoding != "raw", order, factor, remarks)


def _meta_header(block: bytes, path: Path) -> _Header:
    """Read the fields of a MetaImage header; ElementDataFile is the last one."""
    end = re.search(rb"^[ \t]*ElementDataFile[ \t]*[=:][^\n]*(\n|$)", block, re.MULTILINE)
    if end is None:
        raise _damaged(path, "MetaImage", "no ElementDataFile")
    fields = {}
    for line in block[: end.end()].decode("utf-8", "replace").splitlines():
        name, _, value = line.replace(":", "=", 1 if "=" not in line else 0).partition("=")
        fields[name.strip()] = value.strip()
    missing = [name for name in ("NDims", "DimSize", "ElementType") if not fields.get(name)]
    if missing:
        raise _damaged(path, "MetaImage", f"no {missing[0]}")
    scale = [fields.get(f"ElementToIntensityFunction{end}") for end in ("Slope", "Offset")]
    if any(_number(text) != usual for text, usual in zip(scale, (1, 0), strict=True) if text):
        raise _unsupported(path, "stored values in HU", "a slope or offset, which ITK ignores")
    if not _is_true(fields.get("BinaryData", "True")):
        raise _unsupported(path, "binary data", "text")
    name = fields["ElementDataFile"]
    if not name or name.startswith("LIST") or "%" in name:
        raise _unsupported(path, "one file of voxels", f"several ({name})")
    local = name.lower() == "local"
    skip = _whole(fields.get("HeaderSize", "0"), path)
    compressed = _is_true(fields.get("CompressedData", "False"))
    if skip < -1 or (skip and (local or compressed)):
        raise _unsupported(path, "a HeaderSize only of raw data in a file of their own", f"{skip}")
    order = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "False"))
    factor, remarks = _unit({fields.get("DistanceUnits", "").lower()} - {""}, path)
    opposite = str.maketrans("RLAPIS", "LRPASI")  # ITK names where axes come from
    anatomy = fields.get("AnatomicalOrientation", "").upper().translate(opposite)
    return _Header(
        path if local else path.parent / name,
        end.end() if local else skip,
        compressed,
        ">" if _is_true(order) else "<",
        factor,
        remarks,
        anatomy if re.fullmatch("[RLAPIS]{3}", anatomy) else "",
    )


def _unit(units: set[str], path: Path) -> tuple[float, tuple[str, ...]]:
    """Return the millimetres in a unit of length, and a remark if they are not 1."""
    factors = {_MILLIMETRES.get(unit) for unit in units} or {1.0}
    factor = factors.pop()
    if factors or factor is None:
        raise _unsupported(path, "lengths in mm, um, cm or m", ", ".join(sorted(units)))
    if factor == 1:
        return 1.0, ()
    return factor, (f"The lengths in the header are in {units.pop()}; they were converted to mm.",)


def _is_true(text: str) -> bool:
    return text[:1] in ("T", "t", "1")


def _number(text: str | None) -> float:
    try:
        return float(text or "")
    except ValueError:
        return float("nan")


def _whole(text: str, path: Path) -> int:
    try:
        return int(text)
    except ValueError:
        raise _damaged(path, "valid", f"{text!r} for a number of bytes") from None


def _damaged(path: Path, kind: str, found: str) -> VolumeError:
    return VolumeError(f"expected a {kind} file, found {found} in {path}: copy it again")


def _unsupported(path: Path, expected: str, found: str) -> VolumeError:
    return VolumeError(
        f"expected {expected}, found {found} in {path}: convert it to .nii.gz, for example with "
        "SimpleITK"
    )


def _nrrd_text(shape: tuple[int, ...], lps: NDArray[np.float64], dtype: str) -> str:
    """Return an NRRD header with its empty line; `lps` maps voxel indices to LPS millimetres."""

    def vector(values: Any) -> str:
        return f"({','.join(map(repr, (values + 0.0).tolist()))})"

    return "\n".join(
        [
            "NRRD0004",
            f"type: {'short' if dtype == 'int16' else 'float'}",
            "dimension: 3",
            "space: left-posterior-superior",
            f"sizes: {' '.join(map(str, shape))}",
            f"space directions: {' '.join(vector(axis) for axis in lps[:3, :3].T)}",
            "kinds: domain domain domain",
            'space units: "mm" "mm" "mm"',
            "endian: little",
            "encoding: raw",
            f"space origin: {vector(lps[:3, 3])}",
            "\n",
        ]
    )


def _meta_text(shape: tuple[int, ...], lps: NDArray[np.float64], dtype: str) -> str:
    """Return a MetaImage header; `lps` maps voxel indices to LPS millimetres."""

    def numbers(values: Any) -> str:
        return " ".join(map(repr, (values + 0.0).tolist()))

    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return "\n".join(
        [
            "ObjectType = Image",
            "NDims = 3",
            "BinaryData = True",
            "BinaryDataByteOrderMSB = False",
            "CompressedData = False",
            # Row by row the directions of x, y and z.
            f"TransformMatrix = {numbers((lps[:3, :3] / spacing).T.ravel())}",
            f"Offset = {numbers(lps[:3, 3])}",
            f"ElementSpacing = {numbers(spacing)}",
            f"DimSize = {' '.join(map(str, shape))}",
            f"ElementType = {'MET_SHORT' if dtype == 'int16' else 'MET_FLOAT'}",
            "ElementDataFile = LOCAL",
            "",
        ]
    )
