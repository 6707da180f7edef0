"""The verbs on images in memory, of nibabel or SimpleITK, or pairs of array and affine.

    recon = fvae.reconstruct_image(image, model="tiny")  # an image of the same kind
    fvae.encode_image(image, "ct.zarr")
    image = fvae.decode_image("ct.zarr")  # a nibabel image

An image goes through temporary files, so the results are those of the verbs on files, bit for bit,
and only the images themselves are in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import nibabel as typed_nibabel
import numpy as np

from fvae_deploy import api
from fvae_deploy.errors import UsageError, VolumeError

nibabel: Any = typed_nibabel  # most of its functions have no types
Image = TypeVar("Image")


@dataclass(frozen=True)
class _Kind:
    """How images of a library become files, and files become such images."""

    suffix: str
    write: Callable[[Any, Path], None]
    read: Callable[[Path], Any]


def reconstruct_image(image: Image, **options: Any) -> Image:
    """Encode and decode a CT; return an image of the same kind in the same place.

    Parameters
    ----------
    image
        A CT in HU: a nibabel image, a SimpleITK image, or a pair of an array [x, y, z] and its
        affine, which maps voxel indices to RAS millimetres, as in nibabel.
    options
        Those of `reconstruct`, such as `model` and `memory`; not `resume` and `overwrite`.

    Raises
    ------
    UsageError
        For an object of another kind; other FvaeErrors as `reconstruct` raises them.
    """
    kind = _kind(image)
    with _file(kind, image) as source:
        target = source.with_name(f"result{kind.suffix}")
        api.reconstruct(source, target, **options)
        result: Image = kind.read(target)
        return result


def encode_image(image: Any, output: str | Path, **options: Any) -> dict[str, Any]:
    """Encode a CT into a latent store, and return the run report.

    `image` is that of `reconstruct_image`, `options` are those of `encode`. Raises FvaeError.
    """
    with _file(_kind(image), image) as source:
        return api.encode(source, output, **options)


def decode_image(latents: str | Path, **options: Any) -> typed_nibabel.Nifti1Image:
    """Decode a latent store, and return the CT in HU as a nibabel image.

    `options` are those of `decode`, such as `slices`. Raises FvaeError.
    """
    with tempfile.TemporaryDirectory(prefix="fvae-") as folder:
        target = Path(folder) / "result.nii"
        api.decode(latents, target, **options)
        image: typed_nibabel.Nifti1Image = _read_nifti(target)
        return image


@contextmanager
def _file(kind: _Kind, image: Any) -> Iterator[Path]:
    """Write an image to a temporary file; raises VolumeError if it cannot be written."""
    with tempfile.TemporaryDirectory(prefix="fvae-") as folder:
        path = Path(folder) / f"image{kind.suffix}"
        try:
            kind.write(image, path)
        except Exception as error:  # nibabel and SimpleITK raise many kinds
            raise VolumeError(
                f"expected an image of one CT, found one that cannot be written: {error}: "
                "check its shape, type and affine"
            ) from None
        yield path


def _kind(image: Any) -> _Kind:
    """Return how to treat an image; raises UsageError for other objects."""
    if isinstance(image, nibabel.spatialimages.SpatialImage):
        return _Kind(".nii", _write_nifti, _read_nifti)
    if type(image).__module__.partition(".")[0] == "SimpleITK":
        import SimpleITK

        return _Kind(
            ".mha",
            lambda image, path: SimpleITK.WriteImage(image, str(path)),
            lambda path: SimpleITK.ReadImage(str(path)),
        )
    if isinstance(image, tuple) and len(image) == 2:
        return _Kind(".nii", _write_pair, _read_pair)
    raise UsageError(
        "expected a nibabel or SimpleITK image, or a pair of array and affine, found "
        f"{type(image).__name__}: convert it, or pass a path to the verbs on files"
    )


def _write_nifti(image: Any, path: Path) -> None:
    """Write a nibabel image with its values as they are, without a scale."""
    values = np.asanyarray(image.dataobj)
    header, kind = None, nibabel.Nifti1Image
    if isinstance(image.header, nibabel.Nifti1Header):  # NIfTI-2 as well
        header = image.header.copy()
        header.set_data_dtype(values.dtype)
        header.set_slope_inter(1, 0)
    if isinstance(header, nibabel.Nifti2Header):
        kind = nibabel.Nifti2Image
    kind(values, image.affine, header, dtype=values.dtype).to_filename(path)


def _read_nifti(path: Path) -> Any:
    """Read a NIfTI file into memory."""
    image = nibabel.load(path)
    return type(image)(np.array(image.dataobj), image.affine, image.header)


def _write_pair(pair: Any, path: Path) -> None:
    values, affine = (np.asarray(each) for each in pair)
    nibabel.Nifti1Image(values, affine, dtype=values.dtype).to_filename(path)


def _read_pair(path: Path) -> Any:
    image = _read_nifti(path)
    return image.dataobj, image.affine
