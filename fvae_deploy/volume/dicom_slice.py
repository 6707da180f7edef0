"""One slice of a CT: the checked values of its header, and its pixels in HU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.dicom_header import Image, one_line

AIR = -1024  # HU given to pixels outside the scanned circle
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_PIXELS = (  # without them stored bits cannot be read
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
)
_DEFAULTS = {  # used if the element is missing
    "RescaleSlope": 1,
    "RescaleIntercept": 0,
    "SliceThickness": 0,
    "SpacingBetweenSlices": 0,
}
_HU = ("", "HU", "HU_MOD", "US")  # RescaleType; US is unspecified, as many writers leave it


@dataclass(frozen=True)
class Slice:
    """The header values that locate and decode one slice; lengths in mm, directions in LPS."""

    image: Image
    shape: tuple[int, int]  # columns, rows
    position: NDArray[np.float64]
    orientation: NDArray[np.float64]  # along a row, then down a column
    spacing: tuple[float, float]  # between columns, between rows
    thickness: float
    bits: int
    signed: bool
    slope: float
    intercept: float
    padding: tuple[int, int] | None  # the first and the last stored value that mean no pixel

    @property
    def path(self) -> Path:
        """The file of the slice."""
        return self.image.path

    @property
    def name(self) -> str:
        """The name of the slice in messages."""
        return self.image.name

    @classmethod
    def of(cls, image: Image) -> Slice:
        """Check the header of one slice; raises VolumeError for missing or unusable values."""
        header, where = image.values, image.where
        _check_kind(header, where)
        names = (*GEOMETRY, "BitsStored", "PixelRepresentation")
        sizes = zip(names, (3, 6, 2, 1, 1, 1, 1), strict=True)
        numbers = {name: _numbers(header, name, size, where) for name, size in sizes}
        for name, default in _DEFAULTS.items():
            present = header.get(name) not in (None, "")
            numbers[name] = _numbers(header if present else {name: default}, name, 1, where)
        between_rows, between_columns = numbers["PixelSpacing"].tolist()
        columns, rows, bits, signed, slope, intercept, thickness, spacing = (
            float(numbers[name][0])
            for name in ("Columns", "Rows", "BitsStored", "PixelRepresentation", *_DEFAULTS)
        )
        if not (min(columns, rows) >= 1 and slope != 0 and 1 <= bits <= 32):
            raise VolumeError(
                f"expected pixels of 1 to 32 bits and a RescaleSlope other than 0, found "
                f"{columns:g}x{rows:g} pixels of {bits:g} bits, slope {slope:g} in {where}: "
                "export the series again"
            )
        return cls(
            image=image,
            shape=(int(columns), int(rows)),
            position=numbers["ImagePositionPatient"],
            orientation=numbers["ImageOrientationPatient"],
            spacing=(between_columns, between_rows),
            thickness=thickness or spacing,
            bits=int(bits),
            signed=signed == 1,
            slope=slope,
            intercept=intercept,
            padding=_padding(header, signed == 1, where),
        )

    @property
    def is_whole(self) -> bool:
        """True if every value that the stored bits can hold is a whole number within int16."""
        low = -(1 << (self.bits - 1)) if self.signed else 0
        ends = [n * self.slope + self.intercept for n in (low, low + (1 << self.bits) - 1)]
        whole = self.slope.is_integer() and self.intercept.is_integer()
        return whole and min(ends) >= -32768 and max(ends) <= 32767

    def decode(self) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return HU [y, x], float64, and which pixels were padding and became AIR, or None.

        Raises VolumeError if the pixels cannot be decoded.
        """
        try:
            raw, stored = self._read()
        except Exception as error:  # pydicom and its plugins raise many exception types
            raise VolumeError(
                f"expected the pixels of one slice, could not decode {self.image.where} "
                f"({one_line(error)}): copy it again"
            ) from error
        if stored.shape != self.shape[::-1]:
            raise VolumeError(
                f"expected {self.shape[::-1]} pixels, found {stored.shape} in {self.image.where}: "
                "export the series again"
            )
        values: NDArray[Any] = stored * self.slope + self.intercept
        padded = None
        if self.padding is not None:
            low, high = self.padding
            padded = (raw >= low) & (raw <= high) | (stored >= low) & (stored <= high)
            values[padded] = AIR
        # pydicom does not mask the bits above BitsStored in JPEG 2000 data.
        if self.is_whole and not (values.min() >= -32768 and values.max() <= 32767):
            raise VolumeError(
                f"expected pixels of {self.bits} bits, found larger values in {self.image.where}: "
                "correct BitsStored"
            )
        return values, padded

    def _read(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the pixels [y, x] with all their bits, and with those above BitsStored ignored.

        Padding may lie outside BitsStored. Pixels that are not compressed are read here, since
        pydicom gives only the second.
        """
        image = self.image
        bits, samples = image.values.get("BitsAllocated"), image.values.get("SamplesPerPixel") or 1
        if image.syntax.is_compressed or image.offset is None or bits not in (8, 16, 32):
            # pydicom decodes one frame of a file, but inflates deflated files only as a whole.
            source = pydicom.dcmread(image.path) if image.offset is None else image.path
            plugin = _plugin(image.syntax)
            pixels = pixel_array(source, index=image.frame, raw=True, decoding_plugin=plugin)
            return pixels, pixels
        columns, rows = self.shape
        order = "<" if image.syntax.is_little_endian else ">"
        kind = np.dtype(f"{order}{'i' if self.signed else 'u'}{bits // 8}")
        count = rows * columns * samples
        with image.path.open("rb") as file:
            file.seek(image.offset + (image.frame or 0) * count * kind.itemsize)
            content = file.read(count * kind.itemsize)
        if len(content) < count * kind.itemsize:
            raise ValueError(f"{len(content)} bytes of {count * kind.itemsize}")
        raw = np.frombuffer(content, kind).reshape(rows, columns).astype(kind.newbyteorder("="))
        unused = bits - self.bits
        return raw, (raw << unused) >> unused if unused > 0 else raw


def _plugin(syntax: UID) -> str:
    """Return pylibjpeg if it decodes a transfer syntax, else "", for any that pydicom finds.

    pydicom would prefer GDCM where that is installed, and GDCM 3.2 ends the process on damaged
    JPEG 2000 data, with no error that could be caught.
    """
    plugins = get_decoder(syntax).available_plugins if syntax.is_compressed else ()
    return "pylibjpeg" if "pylibjpeg" in plugins else ""


def check_decoder(image: Image) -> None:
    """Raise VolumeError if no installed package decodes the pixels."""
    syntax = image.syntax
    try:
        available = not syntax.is_compressed or get_decoder(syntax).is_available
    except (NotImplementedError, ValueError):  # unknown to pydicom, or not a transfer syntax
        raise VolumeError(
            f"expected a transfer syntax that can be decoded, found {syntax.name or 'none'} in "
            f"{image.path}: convert the series with dcm2niix"
        ) from None
    if not available:
        raise VolumeError(
            f"expected a decoder for {syntax.name} to read {image.path}, found none: "
            "pip install 'pylibjpeg[libjpeg,openjpeg,rle]'"
        )


def check_units(images: list[Image], *, any_range: bool) -> tuple[str, ...]:
    """Raise VolumeError unless stored values become HU in the same way in all slices.

    Returns a remark if the headers do not say how.
    """
    for image in images:
        if image.values.get("ModalityLUTSequence"):
            raise VolumeError(
                "expected RescaleSlope and RescaleIntercept, found a ModalityLUTSequence in "
                f"{image.where}: export the series as plain CT"
            )
        unit = one_line(image.values.get("RescaleType") or "").upper()
        if unit not in _HU and not any_range:
            raise VolumeError(
                f"expected values in HU, found RescaleType {unit} in {image.where}: convert them "
                "to HU, or pass --any-range to take them as they are"
            )
    absent = []
    for name in ("RescaleSlope", "RescaleIntercept"):
        without = [image for image in images if image.values.get(name) in (None, "")]
        if without and len(without) < len(images):
            raise VolumeError(
                f"expected {name} in every slice, found none in {without[0].where}, as in "
                f"{len(without)} of {len(images)} slices: export the series again"
            )
        absent += [name] if without else []
    if not absent:
        return ()
    return (
        f"No slice has {' or '.join(absent)}: "
        f"{'stored values were taken as HU' if len(absent) == 2 else 'the default was taken'}.",
    )


def _check_kind(header: dict[str, Any], where: str) -> None:
    for name in (*GEOMETRY, *_PIXELS):
        if header.get(name) in (None, "", []):
            raise VolumeError(
                f"expected {name} in every slice, found none in {where}: "
                "export the series again with its geometry and pixel format"
            )
    for name, required in (("PhotometricInterpretation", "MONOCHROME2"), ("SamplesPerPixel", 1)):
        if header.get(name, required) != required:
            raise VolumeError(
                f"expected {name} {required}, found {one_line(header[name])} in {where}: "
                "export the series as plain CT"
            )
    stored, highest = header.get("BitsStored"), header.get("HighBit")
    if isinstance(stored, int) and isinstance(highest, int) and highest != stored - 1:
        raise VolumeError(
            f"expected HighBit {stored - 1} with BitsStored {stored}, found {highest} in {where}: "
            "export the series again"
        )


def _padding(header: dict[str, Any], signed: bool, where: str) -> tuple[int, int] | None:
    """Return the range of stored values that mean padding.

    Writers often give an unsigned value for signed pixels or the reverse; only the bits count.
    """
    ends: list[int] = []
    bits = header.get("BitsAllocated") or 16
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        value = header.get(name)
        if isinstance(value, bytes):  # an element of unknown type
            value = int.from_bytes(value, "little")
        if value in (None, "", []) or (name == "PixelPaddingRangeLimit" and not ends):
            continue
        if not isinstance(value, int):
            raise VolumeError(
                f"expected one whole number in {name}, found {one_line(value)} in {where}: "
                "export the series again"
            )
        value &= (1 << bits) - 1
        ends.append(value - (1 << bits) if signed and value >> (bits - 1) else value)
    return (min(ends), max(ends)) if ends else None


def _numbers(header: dict[str, Any], name: str, size: int, where: str) -> NDArray[np.float64]:
    try:
        values = np.atleast_1d(np.asarray(header[name], np.float64))
    except (TypeError, ValueError):
        values = np.full(1, np.nan)
    if values.shape != (size,) or not np.isfinite(values).all():
        raise VolumeError(
            f"expected {size} finite numbers in {name}, found {one_line(header[name])} in "
            f"{where}: export the series again"
        )
    return values
