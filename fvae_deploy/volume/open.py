"""Choose the reader or writer of a path, and protect files that must not be replaced."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.volume.base import Geometry, Reader, Writer
from fvae_deploy.volume.options import ReadOptions
from fvae_deploy.volume.publish import recover
from fvae_deploy.volume.zarr_paths import is_zarr


def open_volume(path: Path | str, options: ReadOptions | None = None, **keywords: Any) -> Reader:
    """Open a .nii or .nii.gz file, a Zarr store or a folder of DICOM slices.

    `keywords` are the fields of `ReadOptions`. Raises VolumeError if the path cannot be read as a
    CT volume.
    """
    path, options = Path(path), dataclasses.replace(options or ReadOptions(), **keywords)
    if not path.exists():
        raise VolumeError(f"expected a volume at {path}, found nothing: check the path")
    if path.name.lower().endswith((".nii", ".nii.gz")):
        from fvae_deploy.volume.nifti import NiftiReader

        return NiftiReader(path)
    if is_zarr(path):
        from fvae_deploy.volume.zarr import ZarrReader

        return ZarrReader(path, options)
    if path.is_dir():
        from fvae_deploy.volume.dicom import DicomReader

        return DicomReader(path, options)
    with suppress(OSError), path.open("rb") as file:
        if file.read(132)[128:] == b"DICM":
            raise VolumeError(
                f"expected a folder of DICOM slices, found the single slice {path.name}: "
                "give its folder"
            )
    raise VolumeError(
        f"expected .nii, .nii.gz, .zarr or a folder of DICOM slices, found {path.name}: "
        "convert it first, for example with dcm2niix"
    )


def create_volume(
    path: Path | str,
    geometry: Geometry,
    dtype: str = "int16",
    note: str = "",
    kind: str = "",
    pyramid: bool = False,
) -> Writer:
    """Create a .nii, .nii.gz, .zarr or .dcm volume of this geometry, stored as int16 or float32.

    float32 frames written to an int16 volume are rounded to the nearest integer and clipped.
    `.dcm` is a folder of DICOM slices; `note` goes into their DerivationDescription, `kind` into
    their SeriesDescription. `pyramid` adds coarser levels to a .zarr volume. An existing volume is
    replaced when the new one is committed: call `check_output` first to refuse that. Raises
    VolumeError if the suffix is unknown or the path cannot be written.
    """
    path = Path(path)
    if dtype not in ("int16", "float32"):
        raise VolumeError(f"expected dtype int16 or float32, found {dtype}: choose one of them")
    if pyramid and not path.name.endswith(".zarr"):
        raise VolumeError(
            f"expected an output named .zarr for --pyramid, found {path.name}: rename it, or leave "
            "the option out"
        )
    if path.name.endswith((".nii", ".nii.gz")):
        from fvae_deploy.volume.nifti import NiftiWriter

        return NiftiWriter(path, geometry, dtype)
    if path.name.endswith(".zarr"):
        from fvae_deploy.volume.zarr_writer import ZarrWriter

        return ZarrWriter(path, geometry, dtype, pyramid)
    if path.name.endswith(".dcm"):
        from fvae_deploy.volume.dicom_writer import DicomWriter

        return DicomWriter(path, geometry, dtype, note, kind)
    raise VolumeError(
        f"expected an output named .nii, .nii.gz, .zarr or .dcm, found {path.name}: rename it"
    )


def check_output(path: Path | str, *, overwrite: bool) -> None:
    """Raise VolumeError if the output exists and `overwrite` is False.

    Call this before any work. With `overwrite` nothing is checked here: the writers replace an
    older output only when the new one is complete, and never replace folders of another kind.
    """
    recover(Path(path))
    if not overwrite and os.path.lexists(path):
        raise VolumeError(
            f"expected a new output, found that {path} exists: choose another name or pass "
            "--overwrite"
        )


def protect_input(output: Path | str, source: Path | str, files: Iterable[Path] = ()) -> None:
    """Raise UsageError if the output would replace the input or a folder that contains it.

    `files` are further input files. An original scan may have no second copy, so `--overwrite`
    does not allow this.
    """
    target = Path(output).resolve()
    for original in {Path(source).resolve(), *(file.resolve() for file in files)}:
        if target == original or target in original.parents:
            raise UsageError(
                f"expected an output apart from the input, found {output}: choose another name"
            )
