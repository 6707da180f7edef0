"""The organ mask of a random patient as a volume that is drawn while it is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fvae_deploy.errors import UsageError
from fvae_deploy.phantom.patient import varied
from fvae_deploy.phantom.torso import FIELD_OF_VIEW, Torso, lps_affine
from fvae_deploy.volume.base import Geometry, HuFrames, slab_ranges


class DrawnLabels:
    """The organs of `varied(seed)` in TotalSegmentator's numbers; see `volume.base.Reader`.

    Any `shape` (x, y, z) samples the same 360 x 360 x 450 mm with axes LPS. The same seed and shape
    give the same labels as `fvae phantom --patient`. Memory is that of one slice. Raises UsageError
    for a negative seed and for a shape below 8 x 8 x 1.
    """

    remarks: tuple[str, ...] = ()
    drawn = True  # there is no file that could vanish

    def __init__(self, seed: int, shape: Sequence[int]) -> None:
        nx, ny, nz = shape
        if min(nx, ny) < 8 or nz < 1:
            raise UsageError(
                f"expected at least 8x8x1 voxels, found {nx}x{ny}x{nz}: enlarge the shape"
            )
        if seed < 0:
            raise UsageError(f"expected a patient's seed of at least 0, found {seed}: correct it")
        self.path = Path(f"patient {seed}")
        x, y, z = (mm / n for mm, n in zip(FIELD_OF_VIEW, (nx, ny, nz), strict=True))
        affine = lps_affine((nx, ny, nz), (x, y, z)).astype(np.float32)  # as a file holds it
        self.geometry = Geometry((nx, ny, nz), affine.astype(np.float64))
        self._torso = Torso((nx, ny, nz), (x, y, z), seed, varied(seed))

    def slabs(self, *depths: int, start: int = 0) -> Iterator[HuFrames]:
        """Yield labels [t, x, y], int16, from `start` on; see `Reader.slabs`."""
        for each in slab_ranges(self.geometry.shape[2], depths, start):
            yield np.stack([self._torso.slice(k).organs for k in each]).astype(np.int16)

    def close(self) -> None:
        """Do nothing: there is no file."""
