"""Writer for a derived CT series: a folder of slices named 000001.dcm, 000002.dcm and so on.

If the source was DICOM, the patient, study, frame of reference and slice positions are copied from
it, and every slice refers to its source slice (PS3.3 C.7.6.1, C.12.4). For other sources the
series belongs to a new study with empty patient data. Only the elements listed in this file are
copied from the headers of the source.
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

from fvae_deploy.errors import OutputError, VolumeError
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import FrameWriter, Geometry, HuFrames
from fvae_deploy.volume.publish import foreign, publish_folder

_PATIENT = "PatientName PatientID IssuerOfPatientID PatientBirthDate PatientSex PatientAge"
_PATIENT += " PatientSize PatientWeight PatientIdentityRemoved DeidentificationMethod"
_STUDY = "StudyInstanceUID StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName"
_STUDY += " StudyDescription"
_POSITION = "FrameOfReferenceUID PositionReferenceIndicator PatientPosition BodyPartExamined"
_POSITION += " Laterality ImagePositionPatient ImageOrientationPatient PixelSpacing SliceThickness"
_POSITION += " SpacingBetweenSlices SliceLocation GantryDetectorTilt"
_SCAN = "AcquisitionDate AcquisitionTime AcquisitionNumber KVP ContrastBolusAgent"
_SCAN += " WindowCenter WindowWidth LossyImageCompression LossyImageCompressionRatio"
_SCAN += " LossyImageCompressionMethod SpecificCharacterSet"
_COPIED = f"{_PATIENT} {_STUDY} {_POSITION} {_SCAN}".split()
_EQUIPMENT = "Manufacturer InstitutionName StationName ManufacturerModelName DeviceSerialNumber"
_EQUIPMENT = f"{_EQUIPMENT} SoftwareVersions"
_READ = [*_COPIED, *_EQUIPMENT.split(), "SOPClassUID", "SOPInstanceUID", "ImageType"]
_READ += ["SeriesNumber", "SeriesDescription"]
_OWN = r"\d{6,}\.dcm"  # files that the writer writes
_REQUIRED = [  # may be empty, but must be present
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
    """Writes a folder of slices, which gets its name only when complete.

    The dtype int16 stores HU directly. The dtype float32 is stored as uint16 with a slope and an
    intercept per slice, so that each slice uses all 16 bits. `kind` describes the series in one or
    two words, `note` says how it was computed. Raises VolumeError if the path cannot be written,
    or exists and is not a folder that contains only .dcm files.
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
        self._kind, self._note = kind, ": ".join(filter(None, [f"fvae {__version__}", note]))
        self._now = datetime.now()
        self._series = generate_uid()
        self._new_uids = {"StudyInstanceUID": generate_uid(), "FrameOfReferenceUID": generate_uid()}
        try:
            self._reserve(folder=True)
        except OSError as error:
            self.abort()
            raise self._write_error(error) from error

    def _check_replaceable(self) -> None:
        if not self.path.exists():
            return
        found = foreign(self.path, _OWN) if self.path.is_dir() else self.path
        if found is not None:
            raise OutputError(
                "expected a new name or a folder with only slices named as fvae names them "
                f"(000001.dcm) to replace, found something else at {found}: choose another name"
            )

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
        """Return the header of source slice k, or one computed from the affine if there is none."""
        files = self.geometry.dicom_files
        if files:
            try:
                return pydicom.dcmread(files[k], stop_before_pixels=True, specific_tags=[*_READ])
            except Exception as error:  # a damaged element can raise almost any exception
                raise VolumeError(
                    f"expected an intact DICOM header, found damage in {files[k]}: copy it again"
                ) from error
        data = Dataset()
        lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.geometry.affine
        spacing = self.geometry.spacing
        position = lps[:3, 3] + k * lps[:3, 2]
        axes = np.concatenate([lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]])
        data.ImagePositionPatient = [_ds(n) for n in position]
        data.ImageOrientationPatient = [_ds(n) for n in axes]
        data.PixelSpacing = [_ds(spacing[1]), _ds(spacing[0])]
        # Along the normal, also where a tilted gantry shifts the slices.
        normal = np.cross(lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1])
        data.SliceThickness = data.SpacingBetweenSlices = _ds(abs(float(normal @ lps[:3, 2])))
        return data

    def _header(self, source: Dataset) -> Dataset:
        """Return the header of the next slice, without the pixels."""
        data = Dataset()
        for name in _COPIED:
            if name in source:
                data[name] = source[name]
        for name in _REQUIRED:
            if name not in data:
                setattr(data, name, "")
        for name, uid in self._new_uids.items():  # anonymisation may have emptied them
            if not data.get(name):
                setattr(data, name, uid)
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = CTImageStorage
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        data.SeriesInstanceUID = self._series
        data.Modality = "CT"
        data.SeriesNumber = int(source.get("SeriesNumber") or 0) + 1000
        description = str(source.get("SeriesDescription", ""))
        data.SeriesDescription = f"{description[:44]} fvae {self._kind}".strip()
        data.InstanceNumber = self._count + 1
        image_type = list(source.get("ImageType", []))
        data.ImageType = ["DERIVED", "SECONDARY", *(image_type[2:3] or ["AXIAL"])]
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
        """List the scanner, if the source names it, and fvae."""
        fvae = Dataset()
        fvae.PurposeOfReferenceCodeSequence = Sequence([_code("109102", "Processing Equipment")])
        fvae.Manufacturer, fvae.ManufacturerModelName = "fvae", "fvae-deploy"
        fvae.SoftwareVersions = __version__
        fvae.ContributionDateTime = self._now.strftime("%Y%m%d%H%M%S")
        fvae.ContributionDescription = self._note[:1024]
        if "Manufacturer" not in source:
            return [fvae]
        scanner = Dataset()
        purpose = _code("109101", "Acquisition Equipment")
        scanner.PurposeOfReferenceCodeSequence = Sequence([purpose])
        for name in _EQUIPMENT.split():
            if name in source:
                scanner[name] = source[name]
        return [scanner, fvae]


def _put_pixels(data: Dataset, frame: HuFrames) -> None:
    """Store a frame [x, y] in HU, with its pixel format, rescale values and display window."""
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
    """Format a number as a DICOM decimal string of at most 16 characters."""
    return format_number_as_ds(float(value) + 0.0)


def _code(value: str, meaning: str) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", meaning
    return item
