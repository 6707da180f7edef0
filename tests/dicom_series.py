"""A CT series as a scanner writes it, of random HU, for tests of what is read from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


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
