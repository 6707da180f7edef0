"""The choice of a reader or writer by a path's suffix, or by what a folder holds."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.volume.base import Geometry, Reader, Writer


def open_volume(path: Path | str, series: str | None = None) -> Reader:
    """Open a .nii, .nii.gz, Zarr array or folder of DICOM slices.

    `series` chooses a DICOM series by its SeriesInstanceUID (or a unique end of it) where
    the folder holds several. Raises VolumeError with the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"expected a volume at {path}, found nothing: check the path")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        from fvae_deploy.volume.nifti import NiftiReader

        return NiftiReader(path)
    if path.name.endswith(".zarr"):
        from fvae_deploy.volume.zarr import ZarrReader

        return ZarrReader(path)
    if path.is_dir():
        from fvae_deploy.volume.dicom import DicomReader

        return DicomReader(path, series)
    with suppress(OSError), path.open("rb") as file:
        if file.read(132)[128:] == b"DICM":
            raise VolumeError(
                f"expected a folder of DICOM slices, found {path.name}, one slice: give its folder"
            )
    raise VolumeError(
        f"expected .nii, .nii.gz, .zarr or a folder of DICOM slices, found {path.name}: "
        "convert it first, for example with dcm2niix"
    )


def create_volume(
    path: Path | str, geometry: Geometry, dtype: str = "int16", note: str = "", kind: str = ""
) -> Writer:
    """Create a .nii, .nii.gz, .zarr or .dcm volume of this geometry, stored as int16 or float32.

    float32 frames written to an int16 volume are rounded to the nearest and clipped. `.dcm` is a
    folder of DICOM slices, in which `note` says how they were made and `kind` what they are.
    Raises VolumeError when the suffix is unknown or the place cannot be written.
    """
    path = Path(path)
    if dtype not in ("int16", "float32"):
        raise VolumeError(f"expected dtype int16 or float32, found {dtype}")
    if path.name.endswith((".nii", ".nii.gz")):
        from fvae_deploy.volume.nifti import NiftiWriter

        return NiftiWriter(path, geometry, dtype)
    if path.name.endswith(".zarr"):
        from fvae_deploy.volume.zarr import ZarrWriter

        return ZarrWriter(path, geometry, dtype)
    if path.name.endswith(".dcm"):
        from fvae_deploy.volume.dicom_writer import DicomWriter

        return DicomWriter(path, geometry, dtype, note, kind)
    raise VolumeError(f"expected an output named .nii, .nii.gz, .zarr or .dcm, found {path.name}")


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise VolumeError where an output exists already, unless it may be replaced."""
    if not overwrite and os.path.lexists(path):
        raise VolumeError(
            f"expected a new output, found {path} exists: choose another name or pass --overwrite"
        )


def protect_input(output: Path | str, source: Path | str, files: Iterable[Path] = ()) -> None:
    """Refuse an output that would replace its input, or a folder that holds some of it.

    An original scan may be the only one. Raises UsageError.
    """
    target = Path(output).resolve()
    for place in {Path(source).resolve(), *(file.resolve() for file in files)}:
        if target == place or target in place.parents:
            raise UsageError(f"expected an output apart from the input, found {output}: rename it")
