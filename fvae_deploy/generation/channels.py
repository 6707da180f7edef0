"""NIfTI files of four dimensions, one channel a mask, read slice by slice.

Channels come first, as in the published data, or last, as most programs write them. Files of
vectors have a fourth dimension of 1 before their channels.
"""

from __future__ import annotations

import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError, VolumeError


def has_channels(path: Path) -> bool:
    """Return whether this is a NIfTI file with more than three dimensions that are not 1."""
    if not path.name.lower().endswith((".nii", ".nii.gz")) or not path.is_file():
        return False
    try:
        with _reading(path):
            return any(n > 1 for n in _opened(path).shape[3:])
    except VolumeError:
        return False  # whatever is wrong is said by the reader of volumes


class Channels:
    """A file with channels; `settle` finds out which dimension they are.

    Raises VolumeError for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _reading(path):
            image = _opened(path)
            self.affine: NDArray[np.float64] = np.asarray(image.affine, np.float64)
            self.shape: tuple[int, ...] = tuple(image.shape)
        self.count = 0
        self._first = False

    def settle(self, grid: tuple[int, int, int]) -> None:
        """Find the dimension of the channels, given the grid that the others must have.

        Raises ConditionError where none or both fit.
        """
        first, last = self.shape[1:] == grid, self.shape[:3] == grid and self._tail() is not None
        if first == last:
            found = "which fits both ways" if first else "which fits neither way"
            size, shape = "x".join(map(str, grid)), "x".join(map(str, self.shape))
            remedy = "split it into files of one finding" if first else "resample it"
            raise ConditionError(
                f"expected channels x {size} or {size} x channels as the organ mask, found "
                f"{shape}, {found}, in {self.path}: {remedy}"
            )
        self._first = first
        self.count = self.shape[0] if first else self.shape[-1]

    def _tail(self) -> tuple[int, ...] | None:
        """Return the indices between z and the channels, or None if there are other dimensions."""
        between = self.shape[3:-1]
        return (0,) * len(between) if all(n == 1 for n in between) else None

    def planes(self, start: int, channels: Sequence[int]) -> Generator[NDArray[Any]]:
        """Yield these channels of every slice from `start` on: [C, x, y].

        Raises VolumeError for a truncated or damaged file.
        """
        with _reading(self.path):
            # One file object for each channel that lies apart: none of them ever goes back.
            images = [_opened(self.path) for _ in (channels if not self._first else (0,))]
            depth = self.shape[3] if self._first else self.shape[2]
            for z in range(start, depth):
                if self._first:
                    stack = np.asarray(images[0].dataobj[..., z])[list(channels)]
                else:
                    at = [(slice(None), slice(None), z, *(self._tail() or ()), c) for c in channels]
                    stack = np.stack(
                        [image.dataobj[i] for image, i in zip(images, at, strict=True)]
                    )
                yield stack

    def close(self) -> None:
        """Do nothing: files are open only while planes are being read."""


def _opened(path: Path) -> Any:
    import nibabel

    return nibabel.load(path, mmap=False, keep_file_open=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert the errors of damaged or unreadable files into VolumeError."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, ImageFileError, HeaderDataError) as error:
        reason = " ".join((str(error) or type(error).__name__).split())
        raise VolumeError(
            f"expected an intact NIfTI file, found damage in {path} ({reason}): copy it again"
        ) from error
