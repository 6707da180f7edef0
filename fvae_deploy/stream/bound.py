"""A bound on the error of every voxel, which holds with every engine or ends in an error.

    encode    latents --decode--> base, float HU --round--> whole HU + unit * counts = voxels
                                                    marks   residual                   CRC-32

The original shows where the base is too far off, and the residual brings those voxels back. This
relies on the same whole HU when the base is decoded again, but engines, tiles and machines round
differently. So voxels whose base lies within `margin` of a half are marked, and rounded down by
both sides. Bases that differ by at most `margin` then lead to the same voxels, to the last bit, and
the CRC-32 of the voxels that were compared with the original shows that they do.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.export.manifest import Intensity, Manifest
from fvae_deploy.storage.residual import SliceResidual
from fvae_deploy.volume.base import HuFrames

LEAST, MOST = 1 / 128, 1 / 16  # HU, of the margin: about 2 and 12 % of voxels are marked
PARITY = 4  # margin beyond the largest difference between engines that export measured
INT16 = np.iinfo(np.int16)


@dataclass(frozen=True)
class Bound:
    """No voxel differs from the original by more than `max_error` HU.

    `margin`, in HU, is how far the base of another engine may lie from this one's.
    """

    max_error: float
    margin: float

    @classmethod
    def of(cls, max_error: float, manifest: Manifest, intensity: Intensity) -> Bound:
        """Return the bound, with a margin by what was measured between engines at export.

        That was with the model's HU window; differences grow with the width of the window. Raises
        UsageError for a decoder that looks ahead: its slices come long after the original ones.
        """
        if manifest.lag:
            raise UsageError(
                f"expected --max-error with a decoder that does not look ahead, found "
                f"{manifest.name}, which returns slices {manifest.lag} late: encode without "
                "--max-error, or choose another --model"
            )
        own = manifest.intensity
        wider = (intensity.hu_max - intensity.hu_min) / (own.hu_max - own.hu_min)
        measured = [row.hu_max for row in manifest.parity if row.precision == "fp32"]
        margin = max(PARITY * max(measured, default=0.0), LEAST) * wider
        step = np.spacing(np.float32(max(abs(intensity.hu_min), abs(intensity.hu_max))))
        return cls(max_error, min(max(margin, 8 * float(step)), MOST))

    def residuals(self, original: HuFrames, base: HuFrames, first: int) -> list[SliceResidual]:
        """Return what corrects the base [t, x, y] of an original [t, x, y], slice by slice.

        `first` is the number of the first slice. Raises VolumeError for values outside int16, and
        for fractions of HU where the bound is below a half.
        """
        return [
            self._residual(values, decoded, number)
            for number, (values, decoded) in enumerate(zip(original, base, strict=True), first)
        ]

    def _residual(
        self, original: NDArray[Any], base: NDArray[np.float32], number: int
    ) -> SliceResidual:
        values = original.astype(np.float64)
        if values.min() < INT16.min or values.max() > INT16.max:
            raise VolumeError(
                f"expected values from {INT16.min} to {INT16.max} with --max-error, found "
                f"{values.min():g} to {values.max():g} in slice {number}: encode without "
                "--max-error, or clip them"
            )
        below = base - np.floor(base) - np.float32(0.5)
        marks: NDArray[np.bool_] = np.abs(below) <= self.margin
        whole = _rounded(base, marks)
        error = values - whole
        unit = self._unit(original, number)
        counts = np.where(np.abs(error) <= self.max_error, 0, np.rint(error / unit))
        residual = SliceResidual(unit, counts.astype(np.int32), marks, 0)
        voxels = _voxels(whole, residual)
        worst = float(np.abs(values - voxels).max())
        if worst > self.max_error:
            raise VolumeError(
                f"expected every voxel within {self.max_error:g} HU, found one {worst:g} HU off in "
                f"slice {number}: report this as a defect of fvae"
            )
        return SliceResidual(unit, residual.counts, marks, _check(voxels))

    def _unit(self, original: NDArray[Any], number: int) -> int:
        """Return the largest step between whole numbers that keeps all values within the bound."""
        if original.dtype.kind == "i" or np.array_equal(original, np.rint(original)):
            return 2 * math.floor(self.max_error) + 1
        if self.max_error < 0.5:
            raise VolumeError(
                f"expected whole HU for a bound of {self.max_error:g} HU, found fractions in slice "
                f"{number}: pass --max-error 0.5 or more, or round the CT to whole HU"
            )
        return math.floor(2 * self.max_error)


def restored(base: HuFrames, residuals: Sequence[SliceResidual]) -> NDArray[np.int16] | None:
    """Return the voxels [t, x, y] from the base of any engine; None if they are not the same ones.

    They are the same if each base lies within the margin of the one that was encoded with.
    """
    voxels = np.empty(base.shape, np.int16)
    for values, decoded, residual in zip(voxels, base, residuals, strict=True):
        values[...] = _voxels(_rounded(decoded, residual.marks), residual)
        if _check(values) != residual.check:
            return None
    return voxels


def _rounded(base: NDArray[np.float32], marks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Return whole HU: down at the marks, to the nearest elsewhere."""
    whole: NDArray[np.int32] = np.where(marks, np.floor(base), np.rint(base)).astype(np.int32)
    return whole


def _voxels(whole: NDArray[np.int32], residual: SliceResidual) -> NDArray[np.int16]:
    moved = whole + residual.unit * residual.counts
    voxels: NDArray[np.int16] = np.clip(moved, INT16.min, INT16.max).astype(np.int16)
    return voxels


def _check(voxels: NDArray[np.int16]) -> int:
    return zlib.crc32(np.ascontiguousarray(voxels, dtype="<i2").data)
