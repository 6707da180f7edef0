"""A volume as a new, derived CT series: a folder of slices, 000001.dcm and so on.

Where the source was DICOM, patient, study, frame of reference and position are those of its
slices, which every slice refers to (PS3.3 C.7.6.1, C.12.4); else the series is of a new study of
nobody. What is copied is listed here: nothing else of the source's headers goes in.
"""

from __future__ import annotations

import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from fvae_deploy.errors import VolumeError
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import FrameWriter, Geometry, HuFrames, publish_folder

_PATIENT = "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge"
_PATIENT += " PatientSize PatientWeight PatientIdentityRemoved DeidentificationMethod"
_STUDY = "StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName"
_STUDY += " StudyDescription"
_PLACE = "FrameOfReferenceUID PositionReferenceIndicator PatientPosition BodyPartExamined"
_PLACE += " Laterality ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness"
_PLACE += " SpacingBetweenSlices SliceLocation GantryDetectorTilt"
_SCAN = "AcquisitionDate AcquisitionTime AcquisitionNumber KVP ContrastBolusAgent"
_SCAN += " WindowCenter WindowWidth LossyImageCompression LossyImageCompressionRatio"
_SCAN += " LossyImageCompressionMethod SpecificCharacterSet"
_COPIED = f"{_PATIENT} {_STUDY} {_PLACE} {_SCAN}".split()
_EQUIPMENT = "Manufacturer InstitutionName StationName ManufacturerModelName DeviceSerialNumber"
_EQUIPMENT = f"{_EQUIPMENT} SoftwareVersions"
_READ = [*_COPIED, *_EQUIPMENT.split(), "SOPClassUID", "SOPInstanceUID", "ImageType"]
_READ += ["SeriesNumber", "SeriesDescription"]
_EMPTY = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
    "PositionReferenceIndicator",
    "PatientPosition",
    "AcquisitionNumber",
    "KVP",
]


class DicomWriter(FrameWriter):
    """Writes a folder of slices that appears under its name only when whole.

    Stored as int16 in HU, or where the dtype is float32 as uint16 with a slope and an intercept a
    slice, so that each uses all 16 bits. `kind` says in a word or two what they are, `note` how
    they were made. Raises VolumeError when the place cannot be written, or holds anything but such
    a folder.
    """

    def __init__(
        self,
        path: Path | str,
        geometry: Geometry,
        dtype: str = "int16",
        note: str = "",
        kind: str = "",
    ) -> None:
        super().__init__(Path(path), geometry, dtype)
        if self.path.exists() and not _is_series(self.path):
            raise VolumeError(
                f"expected a new name or a folder of .dcm to replace, found something else at "
                f"{self.path}: choose another name"
            )
        self._kind, self._note = kind, ": ".join(filter(None, [f"fvae {__version__}", note]))
        self._now = datetime.now()
        self._series = generate_uid()
        self._alone = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
        try:
            shutil.rmtree(self._partial, ignore_errors=True)  # of a killed process of the same id
            self._partial.mkdir()
        except OSError as error:
            self.abort()
            raise self._refused(error) from error

    def _append(self, frame: HuFrames) -> None:
        source = self._source(self._count)
        data = self._header(source)
        _put_pixels(data, frame)
        name = f"{self._count + 1:06}.dcm"
        data.save_as(self._partial / name, enforce_file_format=True)

    def _publish(self) -> None:
        publish_folder(self._partial, self.path)

    def _discard(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)

    def _source(self, k: int) -> Dataset:
        """Read what is wanted of the source's slice, or make it up from the affine."""
        files = self.geometry.dicom_files
        if files:
            try:
                return pydicom.dcmread(files[k], stop_before_pixels=True, specific_tags=[*_READ])
            except Exception as error:  # a damaged element can raise almost any kind
                raise VolumeError(
                    f"expected a sound DICOM header, found damage in {files[k]}: copy it again"
                ) from error
        data = Dataset()
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.geometry.affine
        spacing = self.geometry.spacing
        place = lps[:3, 3] + k * lps[:3, 2]
        axes = np.concatenate([lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]])
        data.ImagePositionPatient = [_ds(n) for n in place]
        data.ImageOrientationPatient = [_ds(n) for n in axes]
        data.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]
        data.SliceThickness = _ds(spacing[2])
        return data

    def _header(self, source: Dataset) -> Dataset:
        """Make everything but the pixels."""
        data = Dataset()
        for name in _COPIED:
            if name in source:
                data[name] = source[name]
        for name in _EMPTY:
            if name not in data:
                setattr(data, name, "")
        for name, uid in self._alone.items():  # what was anonymised may have left it empty
            if not data.get(name):
                setattr(data, name, uid)
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.SeriesInstanceUID = self._series
        data.Modality = "CT"
        data.SeriesNumber = int(source.get("SeriesNumber") or 0) + 1000
        about = str(source.get("SeriesDescription", ""))
        data.SeriesDescription = f"{about[:44]} fvae {self._kind}".strip()
        data.InstanceNumber = self._count + 1
        kinds = list(source.get("ImageType", []))
        data.ImageType = ["DERIVED", "SECONDARY", *(kinds[2:3] or ["AXIAL"])]
        data.DerivationDescription = self._note[:1024]
        data.SeriesDate = data.ContentDate = data.InstanceCreationDate = self._now.strftime(
            "%Y%m%d"
        )
        data.SeriesTime = data.ContentTime = data.InstanceCreationTime = self._now.strftime(
            "%H%M%S"
        )
        data.Manufacturer, data.ManufacturerModelName = "fvae", "fvae-deploy"
        data.SoftwareVersions, data.DeviceSerialNumber = __version__, "0"
        data.ContributingEquipmentSequence = Sequence(self._equipment(source))
        if source.get("SOPInstanceUID"):
            item = Dataset()
            item.ReferencedSOPClassUID = source.get("SOPClassUID") or CTImageStorage
            item.ReferencedSOPInstanceUID = source.SOPInstanceUID
            purpose = _code("121322", "Source image for image processing operation")
            item.PurposeOfReferenceCodeSequence = Sequence([purpose])
            data.SourceImageSequence = Sequence([item])
        return data

    def _equipment(self, source: Dataset) -> list[Dataset]:
        """Name the scanner, where it is known, and fvae."""
        made = Dataset()
        made.PurposeOfReferenceCodeSequence = Sequence([_code("109102", "Processing Equipment")])
        made.Manufacturer, made.ManufacturerModelName = "fvae", "fvae-deploy"
        made.SoftwareVersions = __version__
        made.ContributionDateTime = self._now.strftime("%Y%m%d%H%M%S")
        made.ContributionDescription = self._note[:1024]
        if "Manufacturer" not in source:
            return [made]
        scanner = Dataset()
        purpose = _code("109101", "Acquisition Equipment")
        scanner.PurposeOfReferenceCodeSequence = Sequence([purpose])
        for name in _EQUIPMENT.split():
            if name in source:
                scanner[name] = source[name]
        return [scanner, made]


def _put_pixels(data: Dataset, frame: HuFrames) -> None:
    """Store a frame [x, y] of HU, and how its numbers are to be read."""
    slope, intercept, signed = 1.0, 0.0, 1
    pixels: Any = frame.T
    if frame.dtype.kind == "f":
        low, high = float(frame.min()), float(frame.max())
        signed = 0
        slope = float(_ds(max(high - low, 1.0) / 65535 * (1 + 1e-9)))
        intercept = float(_ds(low))
        pixels = np.clip(np.rint((frame.T.astype(np.float64) - intercept) / slope), 0, 65535)
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = signed
    data.RescaleSlope, data.RescaleIntercept, data.RescaleType = _ds(slope), _ds(intercept), "HU"
    if "WindowCenter" not in data or "WindowWidth" not in data:
        data.WindowCenter, data.WindowWidth = "40", "400"
    data.PixelData = np.ascontiguousarray(pixels, "<i2" if signed else "<u2").tobytes()
    data["PixelData"].VR = "OW"


def _ds(value: float) -> str:
    """Write a decimal string, of at most 16 characters."""
    return format_number_as_ds(float(value) + 0.0)


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item


def _is_series(path: Path) -> bool:
    return path.is_dir() and all(entry.suffix == ".dcm" for entry in path.iterdir())
