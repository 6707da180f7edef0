"""Headers of DICOM files: what one file says about its images, without decoding pixels.

A file holds one slice, or the frames of an enhanced multi-frame CT, whose values lie in functional
groups (PS3.3 C.7.6.16). Both become `Image`, one for each slice.
"""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom._uid_dict import UID_dictionary
from pydicom.datadict import dictionary_has_tag
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from fvae_deploy.errors import printable

HEAD = 132  # bytes at the start of a file that tell whether it is DICOM
_NEEDED = (
    "SOPClassUID SOPInstanceUID SeriesInstanceUID Modality ImageType NumberOfFrames "
    "PhotometricInterpretation SamplesPerPixel Rows Columns BitsAllocated BitsStored HighBit "
    "PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleSlope RescaleIntercept "
    "RescaleType ModalityLUTSequence ImagePositionPatient ImageOrientationPatient PixelSpacing "
    "SliceThickness SpacingBetweenSlices"
)
_TELLING = (  # what tells slices of one series apart; the series is read without them too
    "TemporalPositionIdentifier AcquisitionNumber StackID ConvolutionKernel KVP AcquisitionTime "
    "ContentTime InstanceNumber ImagesInAcquisition NumberOfSlices NumberOfSeriesRelatedInstances "
    "SeriesDescription SeriesNumber"
)
_GROUPS = ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"]
_MACROS = {  # functional groups of a frame: element -> its name in a single-frame header
    "PlanePositionSequence": {"ImagePositionPatient": "ImagePositionPatient"},
    "PlaneOrientationSequence": {"ImageOrientationPatient": "ImageOrientationPatient"},
    "PixelMeasuresSequence": {
        name: name for name in ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices")
    },
    "PixelValueTransformationSequence": {
        name: name for name in ("RescaleSlope", "RescaleIntercept", "RescaleType")
    },
    "CTImageFrameTypeSequence": {"FrameType": "ImageType"},
    "FrameContentSequence": {
        "FrameAcquisitionNumber": "AcquisitionNumber",
        "TemporalPositionIndex": "TemporalPositionIdentifier",
        "FrameAcquisitionDateTime": "AcquisitionTime",
        "StackID": "StackID",
    },
}
_CT = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # Secondary Capture, and with .1 to .4 its multi-frames
_SCREENS = {"SCREEN SAVE", "CSA REPORT", "DOSE REPORT", "DOSE_INFO", "PROTOCOL"}
_CUT = "could not decode its pixels, which are cut"
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"  # of encapsulated pixel data
_MARKED = (*JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes)
_EOI, _PADDED = b"\xff\xd9", 16  # what their pictures end with; bytes that are read to find it


class DamagedError(Exception):
    """A DICOM file that cannot be read; `series` is its SeriesInstanceUID as far as it is known."""

    def __init__(self, reason: str, series: str | None = None) -> None:
        super().__init__(reason)
        self.series = series


@dataclass(frozen=True)
class Image:
    """The header of one slice: a file, or a frame of one."""

    path: Path
    values: dict[str, Any]
    syntax: UID
    offset: int | None  # bytes before the first pixel; None if pydicom has to find them
    frame: int | None = None  # in a multi-frame file, from 0

    @property
    def name(self) -> str:
        """The name of the slice in messages."""
        return self.path.name + ("" if self.frame is None else f" (frame {self.frame + 1})")

    @property
    def where(self) -> str:
        """The path of the slice in messages."""
        return str(self.path) + ("" if self.frame is None else f" (frame {self.frame + 1})")


def one_line(value: object) -> str:
    """Format a header value or an exception on one line, for messages."""
    return " ".join(printable(str(value)).split())


def image_type(values: dict[str, Any]) -> tuple[str, ...]:
    """Return the values of ImageType in capitals."""
    value = values.get("ImageType") or ()
    return tuple(str(v).upper() for v in ([value] if isinstance(value, str) else value))


def is_dicom(head: bytes) -> bool:
    """Return whether a file that begins with these bytes is DICOM.

    Files without preamble are recognised by their first element, which belongs to group 0002 or
    0008.
    """
    if head[128:HEAD] == b"DICM":
        return True
    if len(head) < 8:
        return False
    group, element, kind, length = *struct.unpack("<HH", head[:4]), head[4:6], head[4:8]
    if group == 2:
        return element <= 2 and kind in (b"UL", b"OB", b"UI")
    if group != 8 or not (element == 0 or dictionary_has_tag((group << 16) | element)):
        return False
    return (kind.isalpha() and kind.isupper()) or struct.unpack("<I", length)[0] <= 1024


def read_images(path: Path) -> list[Image] | str:
    """Return the images of a DICOM file, or what it is if it holds no slices of a CT.

    Raises DamagedError if the file is damaged or cut, also if only its pixels are; OSError if it
    cannot be opened.
    """
    with path.open("rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd values; the values used are checked later
                data = pydicom.dcmread(
                    file,
                    stop_before_pixels=True,
                    specific_tags=[*_NEEDED.split(), *_TELLING.split(), *_GROUPS],
                    force=True,
                )
                values = dict(_values(data))
                stated = str(data.file_meta.get("MediaStorageSOPClassUID") or "")
                syntax = _syntax(data)
        except OSError:
            raise
        except Exception as error:  # a damaged element can raise almost any exception type
            raise DamagedError(f"its header is damaged: {one_line(error)}") from error
        deflated = syntax == DeflatedExplicitVRLittleEndian
        start = None if deflated else _pixels_start(file, *data.original_encoding)
        if kind := _kind(values, stated, has_pixels=deflated or start is not None):
            return kind
        if start is None and not deflated:  # the last value, of whatever element, may be cut too
            raise DamagedError("could not decode its pixels: the file ends before them")
        series = str(values["SeriesInstanceUID"]) if values.get("SeriesInstanceUID") else None
        try:
            images = _images(path, data, values, syntax, start and start[0])
            if start is not None and syntax.is_transfer_syntax:  # others are refused later
                _check_pixels(file, values, syntax, *start)
        except DamagedError as error:
            error.series = series
            raise
    return images


@dataclass(frozen=True)
class Listed:
    """An image that a DICOMDIR lists."""

    parts: tuple[str, ...]  # of its path below the folder of the DICOMDIR
    instance: str  # SOPInstanceUID
    series: str | None


def read_directory(path: Path) -> list[Listed] | None:
    """Return the images that a DICOMDIR lists; None if it is damaged."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(path)
            records = {one.seq_item_tell: one for one in data.DirectoryRecordSequence}
            owners: dict[int, str] = {}
            for one in records.values():
                at = int(one.get("OffsetOfReferencedLowerLevelDirectoryEntity") or 0)
                while one.DirectoryRecordType == "SERIES" and at in records and at not in owners:
                    owners[at] = str(one.get("SeriesInstanceUID") or "")
                    at = int(records[at].get("OffsetOfTheNextDirectoryRecord") or 0)
            return [
                Listed(
                    _parts(one.ReferencedFileID),
                    str(one.get("ReferencedSOPInstanceUIDInFile") or ""),
                    owners.get(at) or None,
                )
                for at, one in records.items()
                if one.DirectoryRecordType == "IMAGE" and one.get("ReferencedFileID")
            ]
    except Exception:  # as in read_images; the caller reports it, the slices are found without it
        return None


def _parts(file_id: Any) -> tuple[str, ...]:
    parts = [file_id] if isinstance(file_id, str) else file_id
    return tuple(str(part) for part in parts if str(part) not in ("", ".", ".."))


def _values(data: Dataset) -> Iterator[tuple[str, Any]]:
    for name in _NEEDED.split():
        if name in data:
            yield name, data[name].value
    for name in _TELLING.split():
        try:
            if name in data and data[name].value not in (None, ""):
                yield name, data[name].value
        except Exception:  # as above; the slice can be read without this element
            continue


def _syntax(data: Dataset) -> UID:
    """Return the transfer syntax; without file meta it follows from how the header was written."""
    stated = data.file_meta.get("TransferSyntaxUID")
    if stated:
        return UID(str(stated))
    implicit, little = data.original_encoding
    if not little:
        return ExplicitVRBigEndian
    return ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian


def _kind(values: dict[str, Any], stated: str, *, has_pixels: bool) -> str:
    """Return what a file without slices of a CT is; empty for a slice, or what should be one.

    `stated` is the SOP class in the file meta. A file may end within the UID of its class, so that
    one without pixels has to name it twice, or to be of a class that exists.
    """
    named = str(values.get("SOPClassUID") or "")
    sop_class = named or stated
    intact = named == stated if named and stated else sop_class in UID_dictionary
    types = set(image_type(values))
    if sop_class == MediaStorageDirectoryStorage:
        return "DICOMDIR"
    if types & {"LOCALIZER", "SCOUT"}:
        return "localizer"
    if sop_class == _CAPTURE or sop_class.startswith(f"{_CAPTURE}.") or types & _SCREENS:
        return "secondary capture"
    if not has_pixels and intact and sop_class not in _CT:
        return "DICOM object without slices"
    return ""


def _pixels_start(
    file: BinaryIO, implicit: bool | None, little: bool | None
) -> tuple[int, int] | None:
    """Return where the pixel data begin and their length; None if the file ends before them.

    pydicom stops at the element; its tag, VR and length come next.
    """
    order, size = "<" if little else ">", 8 if implicit else 12
    head = file.read(size)
    if len(head) < size or head[:2] != struct.pack(f"{order}H", 0x7FE0):
        return None
    return file.tell(), struct.unpack(f"{order}I", head[-4:])[0]


def _check_pixels(
    file: BinaryIO, values: dict[str, Any], syntax: UID, start: int, length: int
) -> None:
    """Raise DamagedError if the file ends before its pixels do; nothing is decoded."""
    size = file.seek(0, 2)
    if length == 0xFFFFFFFF:
        file.seek(start)
        ends: list[bytes] = []  # of the items: a table, then one or more for each frame
        while (tag := file.read(4)) == _ITEM:
            step = file.read(4)
            if len(step) < 4 or file.seek(struct.unpack("<I", step)[0], 1) > size:
                break
            last = min(_PADDED, struct.unpack("<I", step)[0])
            file.seek(-last, 1)
            ends.append(file.read(last))
        if tag != _END:
            raise DamagedError(_CUT)
        # Decoders fill up a picture that is cut within an item that is whole.
        frames = [end for end in ends[1:] if end]  # some writers add an empty item
        if len(frames) != (values.get("NumberOfFrames") or 1):
            frames = frames[-1:]
        marked = frames and all(end.rstrip(b"\0").endswith(_EOI) for end in frames)
        if syntax in _MARKED and not marked:
            raise DamagedError(f"{_CUT}: they have no end marker")
        return
    counts = [values.get(name) for name in ("Rows", "Columns", "BitsAllocated")]
    counts += [values.get(name) or 1 for name in ("NumberOfFrames", "SamplesPerPixel")]
    known = [n for n in counts if isinstance(n, int)]
    there, needed = min(length, size - start), length
    if len(known) == len(counts) and not syntax.is_compressed:
        needed = max(needed, math.prod(known) // 8)
    if there < needed:
        raise DamagedError(f"{_CUT}: {there} bytes of {needed}")


def _images(
    path: Path, data: Dataset, values: dict[str, Any], syntax: UID, offset: int | None
) -> list[Image]:
    """Return one Image for a file of one slice, and one for each frame of an enhanced one."""
    if _GROUPS[1] not in data:
        return [Image(path, values, syntax, offset)]
    try:
        shared = (data.get(_GROUPS[0]) or [Dataset()])[0]
        frames = list(data[_GROUPS[1]].value)
        merged = [values | dict(_frame_values(shared, frame)) for frame in frames]
        promised = int(values.get("NumberOfFrames") or 1)
    except Exception as error:  # as in read_images
        raise DamagedError(f"its functional groups are damaged: {one_line(error)}") from error
    if promised != len(frames):
        raise DamagedError(f"it has {promised} frames, but functional groups for {len(frames)}")
    return [
        Image(path, each | {"NumberOfFrames": 1}, syntax, offset, index)
        for index, each in enumerate(merged)
    ]


def _frame_values(shared: Dataset, frame: Dataset) -> Iterator[tuple[str, Any]]:
    for macro, names in _MACROS.items():
        item = (frame.get(macro) or shared.get(macro) or [Dataset()])[0]
        for name, target in names.items():
            if name in item:
                yield target, item[name].value
