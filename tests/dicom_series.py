"""CT series as scanners write them, of random values, for tests of what is read from them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from fvae_deploy.errors import VolumeError
from fvae_deploy.volume.open import open_volume

ROWS, COLUMNS = 4, 6
ABSENT = object()


def stored(k: int) -> np.ndarray:
    """Return the stored pixels of slice k, 12 bits."""
    return np.random.default_rng(k).integers(0, 4000, (ROWS, COLUMNS)).astype(np.uint16)


def put(
    path: Path,
    k: int,
    pixels: np.ndarray | None = None,
    syntax: UID = ExplicitVRLittleEndian,
    **changes: object,
) -> FileDataset:
    """Write slice k of a valid CT series, with the elements in `changes` replaced."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
    meta.TransferSyntaxUID = syntax
    pixels = stored(k) if pixels is None else pixels
    elements = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": f"1.2.3.{k + 1}",
        "SeriesInstanceUID": "1.2.840.1111",
        "SeriesDescription": "thorax",
        "Modality": "CT",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "ImagePositionPatient": [-100.0, -90.0, 2.5 * k],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [0.75, 0.5],
        "SliceThickness": 3,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": pixels.astype(
            pixels.dtype.newbyteorder("<" if syntax.is_little_endian else ">")
        ).tobytes(),
    }
    data = FileDataset(
        path,
        {},
        file_meta=meta,
        preamble=bytes(128),
        is_implicit_VR=syntax.is_implicit_VR,
        is_little_endian=syntax.is_little_endian,
    )
    for name, value in (elements | changes).items():
        if value is not ABSENT:
            setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return data


def series(folder: Path, count: int = 5, **changes: object) -> Path:
    """Write a series of `count` slices, 2.5 mm apart."""
    folder.mkdir(parents=True, exist_ok=True)
    # Names are in reverse order, so that sorting by name would be wrong.
    for k in range(count):
        put(folder / f"{count - k}.dcm", k, **changes)
    return folder


def values(folder: Path, *depths: int, start: int = 0, **options: Any) -> np.ndarray:
    """Return frames [t, x, y] as fvae reads them."""
    with contextlib.closing(open_volume(folder, **options)) as reader:
        return np.concatenate(list(reader.slabs(*(depths or (2,)), start=start)))


def refusal(folder: Path, series: str | None = None, **options: Any) -> str:
    """Return the message with which a folder is refused."""
    with pytest.raises(VolumeError) as caught:
        values(folder, series=series, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return frames [t, x, y] and RAS affine as SimpleITK reads them."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    lps = np.eye(4)
    lps[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    frames = SimpleITK.GetArrayFromImage(image).transpose(0, 2, 1)
    return frames, np.diag([-1.0, -1, 1, 1]) @ lps


def write_series(folder: Path, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Write `shape` (columns, rows, slices) as files; returns the HU [x, y, z]."""
    folder.mkdir(parents=True, exist_ok=True)
    columns, rows, count = shape
    values = np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(count):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
        elements = {
            "SOPClassUID": CTImageStorage,
            "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
            "StudyInstanceUID": study,
            "SeriesInstanceUID": series,
            "FrameOfReferenceUID": frame,
            "PatientName": "Doe^Jane",
            "PatientID": "4711",
            "PatientBirthDate": "19700101",
            "PatientSex": "F",
            "StudyDate": "20240102",
            "StudyTime": "101112",
            "StudyID": "1",
            "AccessionNumber": "A1",
            "ReferringPhysicianName": "Roe^Richard",
            "Modality": "CT",
            "Manufacturer": "Scanners",
            "ManufacturerModelName": "One",
            "DeviceSerialNumber": "12",
            "SeriesNumber": 3,
            "SeriesDescription": "thorax",
            "InstanceNumber": k + 1,
            "AcquisitionNumber": 1,
            "KVP": 120,
            "PatientPosition": "HFS",
            "PositionReferenceIndicator": "",
            "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
            "ImagePositionPatient": [-100.0, -90.0, 2.5 * k],
            "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
            "PixelSpacing": [0.75, 0.5],
            "SliceThickness": 2.5,
            "Rows": rows,
            "Columns": columns,
            "BitsAllocated": 16,
            "BitsStored": 16,
            "HighBit": 15,
            "PixelRepresentation": 1,
            "SamplesPerPixel": 1,
            "PhotometricInterpretation": "MONOCHROME2",
            "RescaleSlope": 1,
            "RescaleIntercept": 0,
            "RescaleType": "HU",
            "WindowCenter": 40,
            "WindowWidth": 400,
            "PixelData": np.ascontiguousarray(values[:, :, k].T).tobytes(),
        }
        for name, value in elements.items():
            setattr(data, name, value)
        # Named against their order, so that sorting by name would be wrong.
        data.save_as(folder / f"IM{count - k:04}", enforce_file_format=True)
    return values
