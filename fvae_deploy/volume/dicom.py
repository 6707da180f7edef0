"""Reader for a folder of DICOM slices, which decodes one slice at a time.

All headers are read first, without pixels. The slices must form one complete CT series and are
sorted along the normal of the slice plane. The affine is computed from the slice positions, so
a tilted gantry gives a sheared affine and not a resampled volume.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.base import Geometry, HuFrames, slab_ranges
from fvae_deploy.volume.options import ReadOptions

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_DEFAULTS = {  # used if the element is missing in a slice
    "RescaleSlope": 1,
    "RescaleIntercept": 0,
    "BitsStored": 16,
    "PixelRepresentation": 0,
    "SliceThickness": 0,
    "SpacingBetweenSlices": 0,
}
_TAGS = [
    *_GEOMETRY,
    *_DEFAULTS,
    "ImageType",
    "Modality",
    "NumberOfFrames",
    "PhotometricInterpretation",
    "SamplesPerPixel",
    "SeriesDescription",
    "SeriesInstanceUID",
]


class DicomReader:
    """One CT series in a folder or in its direct subfolders.

    Axis x is the column index, y the row index, z runs along the normal of the slices. Frames are
    int16 if the bits, slope and intercept of every slice guarantee whole numbers within int16,
    else float32. Files that are not DICOM, DICOMDIR files and localizers are ignored; so are other
    modalities next to a CT series.

    Raises VolumeError if the folder does not contain one complete, evenly spaced CT series.
    """

    def __init__(self, path: Path | str, options: ReadOptions | None = None) -> None:
        self.path, options = Path(path), options or ReadOptions()
        self.remarks: tuple[str, ...] = ()
        chosen = _choose_series(_scan(self.path), options.series, self.path)
        slices = [_Slice.from_header(file, header) for file, header in chosen]
        _check_consistent(slices)
        normal = np.cross(slices[0].orientation[:3], slices[0].orientation[3:])
        self._slices = sorted(slices, key=lambda slice_: float(slice_.position @ normal))
        columns, rows = slices[0].shape
        affine = _affine(self._slices, normal)
        files = tuple(slice_.path for slice_ in self._slices)
        self.geometry = Geometry((columns, rows, len(slices)), affine, dicom_files=files)
        self._dtype = np.int16 if all(slice_.is_whole for slice_ in slices) else np.float32

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield frames [t, x, y] in HU from slice `start` on; the last depth repeats.

        Only the slices of the requested slab are decoded. Raises VolumeError with the file name
        if pixels are truncated or cannot be decoded.
        """
        columns, rows, count = self.geometry.shape
        for indices in slab_ranges(count, depths, start):
            slab = np.empty((len(indices), rows, columns), self._dtype)
            for plane, index in zip(slab, indices, strict=True):
                plane[:] = self._slices[index].decode()
            yield slab.transpose(0, 2, 1)

    def close(self) -> None:
        """Do nothing: no file stays open between slices."""


@dataclass(frozen=True)
class _Slice:
    """The header values that locate and decode one slice; lengths in mm, directions in LPS."""

    path: Path
    shape: tuple[int, int]  # columns, rows
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]  # along a row, then down a column
    spacing: tuple[float, float]  # between columns, between rows
    thickness: float
    bits: int
    signed: bool
    slope: float
    intercept: float

    @classmethod
    def from_header(cls, path: Path, header: dict[str, Any]) -> _Slice:
        """Check the header of one slice; raises VolumeError for missing or unusable values."""
        for name in _GEOMETRY:
            if header.get(name) in (None, "", []):
                raise VolumeError(
                    f"expected {name} in every slice, found none in {path}: "
                    "export the series again with its geometry"
                )
        for name, required in (
            ("PhotometricInterpretation", "MONOCHROME2"),
            ("SamplesPerPixel", 1),
        ):
            if header.get(name, required) != required:
                raise VolumeError(
                    f"expected {name} {required}, found {_one_line(header[name])} in {path}: "
                    "export the series as plain CT"
                )
        numbers = {
            name: _numbers(header, name, size, path)
            for name, size in zip(_GEOMETRY, (3, 6, 2, 1, 1), strict=True)
        }
        for name, default in _DEFAULTS.items():
            present = header.get(name) not in (None, "")
            numbers[name] = _numbers(header if present else {name: default}, name, 1, path)
        between_rows, between_columns = numbers["PixelSpacing"].tolist()
        columns, rows, slope, intercept, bits, signed, thickness, spacing = (
            float(numbers[name][0]) for name in ("Columns", "Rows", *_DEFAULTS)
        )
        if not (min(columns, rows) >= 1 and slope != 0 and 1 <= bits <= 32):
            raise VolumeError(
                f"expected pixels of 1 to 32 bits and a RescaleSlope other than 0, found "
                f"{columns:g}x{rows:g} pixels of {bits:g} bits, slope {slope:g} in {path}: "
                "export the series again"
            )
        return cls(
            path=path,
            shape=(int(columns), int(rows)),
            position=numbers["ImagePositionPatient"],
            orientation=numbers["ImageOrientationPatient"],
            spacing=(between_columns, between_rows),
            thickness=thickness or spacing,
            bits=int(bits),
            signed=signed == 1,
            slope=slope,
            intercept=intercept,
        )

    @property
    def is_whole(self) -> bool:
        """True if every value that the stored bits can hold is a whole number within int16."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        ends = [n * self.slope + self.intercept for n in (low, low + (1 << self.bits) - 1)]
        whole = self.slope.is_integer() and self.intercept.is_integer()
        return whole and min(ends) >= -32768 and max(ends) <= 32767

    def decode(self) -> NDArray[Any]:
        """Decode to HU [y, x], float64; raises VolumeError if the pixels cannot be decoded."""
        try:
            stored = pydicom.dcmread(self.path).pixel_array
        except Exception as error:  # pydicom and its plugins raise many exception types
            raise VolumeError(
                f"expected the pixels of one slice, could not decode {self.path} "
                f"({_one_line(error)}): copy it again"
            ) from error
        if stored.shape != self.shape[::-1]:
            raise VolumeError(
                f"expected {self.shape[::-1]} pixels, found {stored.shape} in {self.path}: "
                "export the series again"
            )
        values: NDArray[Any] = stored * self.slope + self.intercept
        # pydicom masks the bits above BitsStored, but not in JPEG 2000 data.
        if self.is_whole and not (values.min() >= -32768 and values.max() <= 32767):
            raise VolumeError(
                f"expected pixels of {self.bits} bits, found larger values in {self.path}: "
                "correct BitsStored"
            )
        return values


def _numbers(header: dict[str, Any], name: str, size: int, path: Path) -> NDArray[np.float64]:
    try:
        values = np.atleast_1d(np.asarray(header[name], np.float64))
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise VolumeError(
            f"expected {size} finite numbers in {name}, found {_one_line(header[name])} in "
            f"{path}: export the series again"
        )
    return values


def _one_line(value: object) -> str:
    """Format a header value or an exception on one line, for error messages."""
    return " ".join(str(value).split())


_Header = tuple[Path, dict[str, Any]]


def _scan(folder: Path) -> dict[str, list[_Header]]:
    """Return the headers of all DICOM images in a folder, grouped by SeriesInstanceUID."""
    series: dict[str, list[_Header]] = {}
    try:
        entries = sorted(folder.iterdir())
        nested = [file for entry in entries if entry.is_dir() for file in sorted(entry.iterdir())]
        files = [file for file in entries + nested if file.is_file() and file.name != "DICOMDIR"]
    except OSError as error:
        raise VolumeError(
            f"expected to list {folder}, found: {error.strerror or error}: check its permissions"
        ) from error
    any_dicom = False
    for file in files:
        header = _read(file)
        any_dicom = any_dicom or header is not None
        if header is not None and "LOCALIZER" not in header.get("ImageType", ()):
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((file, header))
    if not series:
        content = "only localizers" if any_dicom else "no DICOM file"
        raise VolumeError(
            f"expected a folder of DICOM slices, found {content} in {folder}: check the path"
        )
    return series


def _read(file: Path) -> dict[str, Any] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd values; the values used are checked later
            data = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS])
            header = {name: data[name].value for name in _TAGS if name in data}
            header["syntax"] = UID(str(data.file_meta.get("TransferSyntaxUID", "")))
    except InvalidDicomError:
        return None
    except OSError as error:
        raise VolumeError(
            f"expected to read {file}, found: {error.strerror or error}: check its permissions"
        ) from error
    except Exception as error:  # a damaged element can raise almost any exception type
        raise VolumeError(
            f"expected an intact DICOM header, found a damaged one in {file} ({_one_line(error)}): "
            "copy it again"
        ) from error
    return header


def _choose_series(
    series: dict[str, list[_Header]], wanted: str | None, folder: Path
) -> list[_Header]:
    def modality(uid: str) -> str:
        return _one_line(series[uid][0][1].get("Modality") or "unknown")

    listing = "; ".join(
        f"...{_one_line(uid[-12:])} {_one_line(slices[0][1].get('SeriesDescription', ''))} "
        f"({len(slices)} {modality(uid)})"
        for uid, slices in series.items()
    )
    if wanted is None:
        uids = [uid for uid in series if modality(uid) == "CT"] or list(series)
    else:
        uids = [uid for uid in series if uid == wanted]
        uids = uids or [uid for uid in series if uid.endswith(wanted)]
    if len(uids) != 1:
        raise VolumeError(
            f"expected one series, found {len(uids) or 'none'} "
            f"{'to choose from' if wanted is None else f'ending in {wanted}'} in {folder}: "
            f"{listing}: choose one with --series"
        )
    chosen = series[uids[0]]
    for file, header in chosen:
        if header.get("Modality") != "CT":
            raise VolumeError(
                f"expected modality CT, found {modality(uids[0])} in {file}: fvae reads CT only"
            )
        if header.get("NumberOfFrames") not in (None, "", 1):
            raise VolumeError(
                f"expected one slice per file, found multi-frame CT in {file}: "
                "convert it with dcm2niix"
            )
        _check_decoder(file, header["syntax"])
    return chosen


def _check_decoder(file: Path, syntax: UID) -> None:
    try:
        available = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):  # unknown to pydicom, or not a transfer syntax
        raise VolumeError(
            f"expected a transfer syntax that can be decoded, found {syntax.name or 'none'} in "
            f"{file}: convert the series with dcm2niix"
        ) from None
    if not available:
        raise VolumeError(
            f"expected a decoder for {syntax.name} to read {file}, found none: "
            "pip install 'pylibjpeg[libjpeg,openjpeg,rle]'"
        )


def _check_consistent(slices: list[_Slice]) -> None:
    first = slices[0]
    for other in slices[1:]:
        for quantity, one, two in (
            ("size", first.shape, other.shape),
            ("pixel spacing", first.spacing, other.spacing),
            ("orientation", first.orientation, other.orientation),
        ):
            if not np.allclose(one, two, rtol=1e-4, atol=1e-4):
                raise VolumeError(
                    f"expected the same {quantity} in all slices, found "
                    f"{np.asarray(one).tolist()} in {first.path.name} and "
                    f"{np.asarray(two).tolist()} in {other.path.name}: put each series into its "
                    "own folder"
                )


def _affine(slices: list[_Slice], normal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the RAS affine of sorted slices; raises VolumeError if the spacing is uneven."""
    first, last = slices[0], slices[-1]
    if len(slices) > 1:
        _check_spacing(slices, normal)
        step = (last.position - first.position) / (len(slices) - 1)
    elif first.thickness > 0:
        step = normal * first.thickness
    else:
        raise VolumeError(
            f"expected SliceThickness in a single slice, found none in {first.path}: "
            "add it, or pass the whole series"
        )
    lps = np.eye(4)
    lps[:3, 0] = first.orientation[:3] * first.spacing[0]
    lps[:3, 1] = first.orientation[3:] * first.spacing[1]
    lps[:3, 2], lps[:3, 3] = step, first.position
    if not abs(np.linalg.det(lps)) > 0:
        raise VolumeError(
            f"expected an invertible affine, found {lps[:3].tolist()} in {first.path}: "
            "export the series again with its geometry"
        )
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def _check_spacing(slices: list[_Slice], normal: NDArray[np.float64]) -> None:
    depths = np.array([slice_.position @ normal for slice_ in slices])
    gaps = np.diff(depths)
    median = float(np.median(gaps))
    tolerance = max(0.01, 0.01 * median)
    for (one, two), depth, gap in zip(pairwise(slices), depths, gaps, strict=False):
        if gap < 1e-3:
            raise VolumeError(
                f"expected one slice at each position, found {one.path.name} and {two.path.name} "
                f"both at {depth:.3f} mm: remove one, or choose one with --series"
            )
        if abs(gap - median) > tolerance:
            fault = "missing slices" if gap > 1.5 * median else "uneven spacing"
            raise VolumeError(
                f"expected slices {median:.3f} mm apart, found {fault}, a gap of {gap:.3f} mm "
                f"after {depth:.3f} mm between {one.path.name} and {two.path.name}: export the "
                "complete series"
            )
    positions = np.stack([slice_.position for slice_ in slices])
    line = np.linspace(positions[0], positions[-1], len(slices))
    distances = np.abs(positions - line).max(axis=1)
    worst = int(distances.argmax())
    if distances[worst] > 0.1 * median:  # small deviations of single gaps may add up to this
        raise VolumeError(
            f"expected all slice positions on one line, found {slices[worst].path.name} "
            f"{distances[worst]:.3f} mm away from it: put each series into its own folder"
        )
