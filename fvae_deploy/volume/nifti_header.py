"""NIfTI headers: read into a grid in millimetres, and made or moved for an output.

A header has up to two forms, matrices from voxel indices to space: the sform is any affine, the
qform a rotation with voxel sizes. Their codes say what space that is; 0 says that a form is not
set. nibabel parses; lengths in metres or micrometres are converted here, as ITK does.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry

Affine = NDArray[np.float64]  # [4, 4]


class _Nifti2Header(Nifti2Header):
    """A header whose quaternion may be as long as the rounding of any writer makes it.

    Half a turn leaves no room for rounding, and nibabel allows NIfTI-2 less than the numbers that
    it writes need, far less than a quaternion taken over from NIfTI-1 does.
    """

    def get_qform_quaternion(self) -> Any:
        """Return the unit quaternion, [4] with the real part first; ValueError if it is none."""
        header: Any = self
        read: Any = Nifti2Header.get_qform_quaternion
        try:
            return read(header)
        except ValueError:
            header = header.copy()
            _shorten_quaternion(header)
            return read(header)


def _shorten_quaternion(header: Any) -> None:
    """Give the stored quaternion a length of 1 where rounding has made it a little longer."""
    names = ("quatern_b", "quatern_c", "quatern_d")
    vector = np.array([header[name] for name in names], np.longdouble)
    square = vector @ vector
    if 1 < square < 1 + Nifti1Header.quaternion_threshold:
        for name, value in zip(names, vector / np.sqrt(square), strict=True):
            header[name] = value


_HEADERS: dict[int, Any] = {348: Nifti1Header, 540: _Nifti2Header}  # by size in bytes
_SINGLE = {348: b"n+1\0", 540: b"n+2\0\r\n\x1a\n"}  # magic if header and voxels are in one file
_PAIR = {348: b"ni1\0", 540: b"ni2\0\r\n\x1a\n"}
_REAL = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
_MILLIMETRES = {1: 1e3, 3: 1e-3}  # per metre and micrometre; all other codes are taken as mm
_UNITS = {1: "metres", 3: "micrometres"}
_SAME = 1e-3  # of the shortest voxel edge: forms that agree within this are the same

# nibabel repairs harmless faults (a zoom of 0, an unknown xform code) and logs each: hide that.
_silent = logging.Logger("fvae.nifti", level=logging.CRITICAL + 1)


@dataclass(frozen=True)
class Parsed:
    """What a header says about the voxels; `affine` maps their indices to RAS millimetres."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float
    affine: Affine
    block: bytes
    remarks: tuple[str, ...]


def parse(block: bytes, path: Path, pair: bool | None = False) -> Parsed:
    """Parse a header from the first 540 bytes of a file, in either byte order.

    `pair` expects the header of two files; None accepts both kinds. Raises VolumeError if it is
    not valid.
    """
    raw, found = _header(block, path)
    if pair is not None and found != pair:
        raise VolumeError(
            f"expected the header of a .hdr/.img pair, found a whole volume in {path}: rename it "
            "to end in .nii"
            if pair
            else "expected header and voxels in one file, found the header of a .hdr/.img pair in "
            f"{path}: rename its files to end in .hdr and .img"
        )
    size, shape, dtype = raw.sizeof_hdr, _shape(raw, path), _dtype(raw, path)
    offset, least = float(raw["vox_offset"]), 0 if found else size + 4
    if not (offset == 0 or (offset >= least and offset.is_integer())):
        raise VolumeError(
            f"expected voxels at byte {least} or later, found vox_offset {offset:g} in {path}: "
            "write the file again with a correct header"
        )
    try:
        with np.errstate(all="ignore"):
            header = _checked(raw)
            slope, inter = header.get_slope_inter()
            affine = np.asarray(header.get_best_affine(), np.float64)
            affine[:3] *= _unit(header)
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
    return Parsed(
        shape=shape,
        dtype=dtype,
        offset=int(offset) or least,
        slope=1.0 if slope is None else float(slope),
        inter=0.0 if inter is None else float(inter),
        affine=affine,
        block=block[:size],
        remarks=_remarks(header, shape),
    )


def header_for(geometry: Geometry, dtype: np.dtype[Any], path: Path) -> Any:
    """Return a header for this geometry, based on the header of a NIfTI source if there is one.

    That one is kept bit for bit, except for the fields that describe the new voxels. Where the
    grid has moved, each form is moved in its own space and keeps its code.
    """
    large = max(geometry.shape) > np.iinfo(np.int16).max
    block = geometry.nifti_header
    if block is None or (large and len(block) == 348):
        header = _HEADERS[540 if large else 348]()
        header.set_data_shape(geometry.shape)
        header.set_xyzt_units("mm")
        header.set_sform(geometry.affine, code="scanner")
        _set_qform(header, geometry.affine, 1, geometry.shape)
    else:
        block = block.ljust(540, b"\0")
        header, _ = _header(block, path)
        if not np.array_equal(parse(block, path, pair=None).affine, geometry.affine):
            _move(header, geometry)
        forms = header["sform_code"], header["qform_code"]
        if header["dim"][0] < 3 and not any(forms):  # then the third voxel size did not count
            header["pixdim"][3] = geometry.spacing[2] / _unit(header)
        if header["dim"][0] != 3 or tuple(header["dim"][1:4]) != geometry.shape:
            header["dim"] = (3, *geometry.shape, 1, 1, 1, 1)
    header.set_data_dtype(dtype)
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["cal_min"], header["cal_max"] = 0, 0
    header["vox_offset"] = header.sizeof_hdr + 4
    header["magic"] = _SINGLE[header.sizeof_hdr]
    return header


def _move(header: Any, geometry: Geometry) -> None:
    """Move the forms of a source's header by as many of its voxels as the grid has moved."""
    source = _checked(header)
    unit, own = _unit(source), np.asarray(source.get_best_affine(), np.float64)
    affine = np.diag([1 / unit, 1 / unit, 1 / unit, 1.0]) @ geometry.affine
    move = np.linalg.inv(own) @ affine  # from indices in the output to indices in the source
    whole = np.rint(move)
    move = np.where(np.abs(move - whole) < 1e-6, whole, move)
    shifted = np.array_equal(move[:3, :3], np.eye(3))
    sform = affine if source["sform_code"] else source.get_sform() @ move
    header["srow_x"], header["srow_y"], header["srow_z"] = sform[:3]
    if not shifted:
        header["pixdim"][1:4] = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    code = int(header["qform_code"])
    try:
        qform = source.get_qform() @ move
    except (HeaderDataError, ValueError):  # a quaternion that is none, beside a valid sform
        header["qform_code"] = 0
        return
    if shifted:
        header["qoffset_x"], header["qoffset_y"], header["qoffset_z"] = qform[:3, 3]
    elif code and not _set_qform(header, qform, code, geometry.shape) and not header["sform_code"]:
        header.set_sform(qform, code=code)


def _set_qform(header: Any, affine: Affine, code: int, shape: tuple[int, int, int]) -> bool:
    """Set the qform, with code 0 if it cannot place all voxels as this affine does.

    It holds no shear, and a quaternion in float32 cannot hold every rotation well enough: then
    readers follow the sform, instead of placing the volume beside it.
    """
    header.set_qform(affine, code=code)
    _shorten_quaternion(header)
    held = distance(header.get_qform(), affine, shape) <= _tolerance(header, affine, shape)
    if not held:
        header["qform_code"] = 0
    return held


def distance(one: Affine, other: Affine, shape: tuple[int, int, int]) -> float:
    """Return how far two affines place the same voxel apart, at most, in their unit."""
    return float(np.linalg.norm((one - other)[:3] @ _corners(shape), axis=0).max())


def _tolerance(header: Any, affine: Affine, shape: tuple[int, int, int]) -> float:
    """Return a thousandth of the shortest edge of a voxel, and how exact stored numbers are."""
    edge = np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).min()
    epsilon = np.finfo(header["srow_x"].dtype).eps
    return float(_SAME * edge + epsilon * np.abs(affine[:3] @ _corners(shape)).max())


def _corners(shape: tuple[int, int, int]) -> NDArray[np.float64]:
    """Return the homogeneous indices of the eight corner voxels, [4, 8]."""
    return np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in shape))], float).T


def _remarks(header: Any, shape: tuple[int, int, int]) -> tuple[str, ...]:
    """Say what of the position is not certain, or was converted."""
    remarks = []
    units = int(header["xyzt_units"]) & 7
    if units in _UNITS:
        remarks.append(
            f"The lengths in the NIfTI header are in {_UNITS[units]}; they were converted to mm."
        )
    codes = int(header["sform_code"]), int(header["qform_code"])
    if codes == (0, 0):
        remarks.append(
            "The NIfTI header has neither sform nor qform, so orientation and position are not "
            "known. As in nibabel, x is taken to grow to the left and the middle voxel to lie at "
            "the origin; ITK takes x to grow to the left, y to the back, and the first voxel to "
            "lie at the origin."
        )
    elif codes[1] == 0:
        sizes = np.sqrt((header.get_sform()[:3, :3] ** 2).sum(axis=0)), header["pixdim"][1:4]
        if not np.allclose(*sizes, rtol=1e-2):
            sform, pixdim = (" x ".join(f"{mm:.3g}" for mm in s * _unit(header)) for s in sizes)
            remarks.append(
                f"The sform has voxels of {sform} mm, pixdim {pixdim} mm; the sform is used, as in "
                "nibabel. ITK uses pixdim."
            )
    elif codes[0] > 0:
        sform = header.get_sform()
        try:
            apart = distance(header.get_qform(), sform, shape)
        except (HeaderDataError, ValueError):
            remarks.append("The quaternion of the qform is not valid; the sform is used.")
        else:
            edge = np.sqrt((sform[:3, :3] ** 2).sum(axis=0)).min()
            if apart > 0.1 * edge:
                remarks.append(
                    f"sform and qform place voxels up to {apart * _unit(header):.3g} mm apart; the "
                    "sform is used, as in nibabel. ITK may use the qform."
                )
    return tuple(remarks)


def _unit(header: Any) -> float:
    """Return the millimetres in the header's unit of length; an unknown unit is taken as mm."""
    return _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)


def _checked(raw: Any) -> Any:
    """Return a copy of a header in which nibabel has repaired harmless faults."""
    header = raw.copy()
    header.check_fix(logger=_silent, error_level=40)
    return header


def _header(block: bytes, path: Path) -> tuple[Any, bool]:
    """Return the header as it is, and whether it belongs to a pair of files."""
    for size, kind in _HEADERS.items():
        for order in ("<", ">"):
            if struct.unpack_from(order + "i", block)[0] != size:
                continue
            magic = block[344:348] if size == 348 else block[4:12]
            if magic in (_SINGLE[size], _PAIR[size]):
                return kind(block[:size], endianness=order, check=False), magic == _PAIR[size]
            if size == 348 and path.name.lower().endswith((".hdr", ".hdr.gz")):
                raise VolumeError(
                    f"expected a NIfTI header, found one of Analyze 7.5 in {path}, which does not "
                    "tell left from right: convert it to .nii with a program that knows its origin"
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


def _dtype(header: Any, path: Path) -> np.dtype[Any]:
    code = int(header["datatype"])
    try:
        dtype: np.dtype[Any] | None = header.get_data_dtype()
    except (HeaderDataError, KeyError):
        dtype = None
    if not code or dtype is None or dtype.str[1:] not in _REAL:
        raise VolumeError(
            f"expected integers or real numbers of at most 64 bits, found NIfTI data type {code} "
            f"in {path}: convert it, for example to int16"
        )
    return dtype
