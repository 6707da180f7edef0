"""What every reader and writer of volumes offers, and the choice by suffix."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import VolumeError

Frames = NDArray[Any]  # [t, x, y] in HU, int16 or float32


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of a volume lie.

    `affine` maps voxel indices (i, j, k) to RAS millimetres, as nibabel does.
    `nifti_header` is the source's own header when it was NIfTI (348 or 540 bytes), so that
    qform, sform, zooms and units reach the output bit for bit; None otherwise.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    nifti_header: bytes | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in millimetres along x, y and z."""
        x, y, z = np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0)).tolist()
        return x, y, z

    @property
    def orientation(self) -> str:
        """Axis codes such as "LPS": the direction in which each axis grows."""
        import nibabel

        return "".join(code or "?" for code in nibabel.aff2axcodes(self.affine))


class Reader(Protocol):
    """A volume to be read from front to back."""

    path: Path
    geometry: Geometry

    def slabs(self, *depths: int, start: int = 0) -> Iterator[Frames]:
        """Yield the frames from `start` on, in slabs of the given depths.

        The last depth repeats until the volume ends; the last slab may be shorter.
        Raises VolumeError for truncated or damaged data and for values that are not finite.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class Writer(Protocol):
    """A volume to be written from front to back; it appears under its name only when whole."""

    path: Path

    def write(self, frames: Frames) -> None:
        """Append frames [t, x, y] in HU, int16 or float32."""
        ...

    def commit(self) -> None:
        """Finish, check that every frame came, and give the file its final name."""
        ...

    def abort(self) -> None:
        """Remove what was written; nothing is left under the final or a temporary name."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Commit after success, abort after an error."""
        ...


def open_volume(path: Path | str, series: str | None = None) -> Reader:
    """Open a .nii, .nii.gz, Zarr array or folder of DICOM slices.

    `series` chooses a DICOM series by its SeriesInstanceUID (or a unique end of it) where
    the folder holds several. Raises VolumeError with the remedy.
    """
    path = Path(path)
    if not path.exists():
        raise VolumeError(f"expected a CT at {path}, found nothing: check the path")
    if path.name.endswith((".nii", ".nii.gz")):
        from fvae_deploy.volume.nifti import NiftiReader

        return NiftiReader(path)
    if path.name.endswith(".zarr"):
        from fvae_deploy.volume.zarr import ZarrReader

        return ZarrReader(path)
    if path.is_dir():
        from fvae_deploy.volume.dicom import DicomReader

        return DicomReader(path, series)
    raise VolumeError(
        f"expected .nii, .nii.gz, .zarr or a folder of DICOM slices, found {path.name}: "
        "convert it first, for example with dcm2niix"
    )


def create_volume(path: Path | str, geometry: Geometry, dtype: str = "int16") -> Writer:
    """Create a .nii, .nii.gz or .zarr volume of this geometry, stored as int16 or float32.

    float32 frames written to an int16 volume are rounded to the nearest and clipped.
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
    raise VolumeError(f"expected an output named .nii, .nii.gz or .zarr, found {path.name}")
