"""Choose the reader or writer of a path, and protect files that must not be replaced."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.errors import OutputError, UsageError, VolumeError
from fvae_deploy.volume.base import Geometry, Reader, Writer
from fvae_deploy.volume.options import ReadOptions
from fvae_deploy.volume.publish import check_name, recover, write_remedy
from fvae_deploy.volume.suffixes import FILES, ITK, NIFTI, OUTPUTS
from fvae_deploy.volume.zarr_paths import is_zarr

_PERPENDICULAR = 1e-4  # largest cosine between the axes of a DICOM slice; ITK allows 1e-3
_DICOM_ROWS = 65535


def open_volume(path: Path | str, options: ReadOptions | None = None, **keywords: Any) -> Reader:
    """Open a NIfTI, NRRD or MetaImage file, a Zarr store, or DICOM slices in a folder or archive.

    `keywords` are the fields of `ReadOptions`. Raises VolumeError if the path cannot be read as a
    CT volume.
    """
    path, options = Path(path), dataclasses.replace(options or ReadOptions(), **keywords)
    if not os.path.exists(path):  # unlike Path.exists, also False for a name that is too long
        raise VolumeError(f"expected a volume at {path}, found nothing: check the path")
    name = "" if path.is_dir() else path.name.lower()  # of folders, the contents decide
    if name.endswith(NIFTI):
        from fvae_deploy.volume.nifti import NiftiReader

        return NiftiReader(path)
    if name.endswith(ITK):
        from fvae_deploy.volume.itk import ItkReader

        return ItkReader(path)
    if is_zarr(path):
        from fvae_deploy.volume.zarr import ZarrReader

        return ZarrReader(path, options)
    from fvae_deploy.volume.dicom import DicomReader, dicom_source

    source = dicom_source(path)
    if source is None:
        raise VolumeError(
            f"expected a folder of DICOM slices or {', '.join(FILES)} or .zarr, found "
            f"{path.name}: convert it first, for example with dcm2niix"
        )
    return DicomReader(source, options)


def create_volume(
    path: Path | str,
    geometry: Geometry,
    dtype: str = "int16",
    note: str = "",
    kind: str = "",
    pyramid: bool = False,
) -> Writer:
    """Create a volume of this geometry, stored as int16 or float32, in the format of its suffix.

    float32 frames written to an int16 volume are rounded to the nearest integer and clipped.
    `.dcm` is a folder of DICOM slices; `note` goes into their DerivationDescription, `kind` into
    their SeriesDescription. `pyramid` adds coarser levels to a .zarr volume. An existing volume is
    replaced when the new one is committed: call `check_output` first to refuse that. Raises
    VolumeError if the suffix is unknown, the format cannot hold the geometry, or the path cannot
    be written.
    """
    path = Path(path)
    if dtype not in ("int16", "float32"):
        raise VolumeError(f"expected dtype int16 or float32, found {dtype}: choose one of them")
    name = path.name.lower()
    if pyramid and not name.endswith(".zarr"):
        raise VolumeError(
            f"expected an output named .zarr for --pyramid, found {path.name}: rename it, or leave "
            "the option out"
        )
    check_geometry(path, geometry)
    if name.endswith((".nii", ".nii.gz")):
        from fvae_deploy.volume.nifti import NiftiWriter

        return NiftiWriter(path, geometry, dtype)
    if name.endswith((".nrrd", ".mha")):
        from fvae_deploy.volume.itk import ItkWriter

        return ItkWriter(path, geometry, dtype)
    if name.endswith(".zarr"):
        from fvae_deploy.volume.zarr_writer import ZarrWriter

        return ZarrWriter(path, geometry, dtype, pyramid)
    if name.endswith(".dcm"):
        from fvae_deploy.volume.dicom_writer import DicomWriter

        return DicomWriter(path, geometry, dtype, note, kind)
    raise VolumeError(
        f"expected an output named {', '.join(OUTPUTS[:-1])} or {OUTPUTS[-1]}, found {path.name}: "
        "rename it"
    )


def check_geometry(path: Path | str, geometry: Geometry) -> None:
    """Raise VolumeError if the format of an output cannot hold this geometry."""
    affine = np.asarray(geometry.affine, np.float64)
    edges = np.linalg.norm(affine[:3, :3], axis=0) if affine.shape == (4, 4) else np.zeros(3)
    if (
        not np.isfinite(affine).all()
        or not edges.all()
        or abs(np.linalg.det(affine[:3, :3] / edges)) < 1e-9
    ):
        raise VolumeError(
            f"expected an affine of 4 x 4 finite numbers that can be inverted, found "
            f"{affine.tolist()} for {path}: correct the geometry of the source"
        )
    if not Path(path).name.lower().endswith(".dcm") or geometry.dicom_files:
        return  # slices of a DICOM source keep its positions
    cosine = abs(affine[:3, 0] @ affine[:3, 1]) / (edges[0] * edges[1])
    if cosine > _PERPENDICULAR:
        degrees = np.degrees(np.arccos(cosine))
        raise VolumeError(
            f"expected perpendicular rows and columns, since DICOM holds no others, found "
            f"{degrees:.3g} degrees between x and y for {path}: write .nii.gz, .nrrd or .mha, or "
            "resample the source first"
        )
    if max(geometry.shape[:2]) > _DICOM_ROWS:
        raise VolumeError(
            f"expected at most {_DICOM_ROWS} rows and columns, since DICOM holds no more, found "
            f"{geometry.shape[0]}x{geometry.shape[1]} for {path}: write .nii.gz, .nrrd or .mha"
        )


def check_output(path: Path | str, *, overwrite: bool, geometry: Geometry | None = None) -> None:
    """Raise VolumeError if the output exists and `overwrite` is False, or cannot be written.

    Call this before any work. Its name may be too long, and its format may not hold `geometry`.
    With `overwrite` nothing else is checked here: the writers replace an older output only when
    the new one is complete, and never replace folders of another kind.
    """
    if geometry is not None:
        check_geometry(path, geometry)
    try:
        check_name(Path(path))
    except OSError as error:
        remedy = write_remedy(error)
        raise OutputError(f"expected to write {path}, found: {error.strerror}: {remedy}") from None
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
    target = Path(os.path.realpath(output))  # unlike resolve, it accepts a circle of links
    for original in {Path(os.path.realpath(file)) for file in (source, *files)}:
        if target == original or target in original.parents:
            raise UsageError(
                f"expected an output apart from the input, found {output}: choose another name"
            )
