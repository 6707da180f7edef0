"""How the plane of a mask lies in the plane that the model was trained on, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.volume.base import HuFrames


@dataclass(frozen=True)
class Fit:
    """The mask's longer side, in mm, fills the model's square, so anatomy keeps its proportions.

    A plane of the model's own size is used unchanged.
    """

    mask: tuple[int, int]  # voxels
    spacing: tuple[float, float]  # mm
    plane: tuple[int, int]  # the model's pixels
    mirrored: tuple[int, ...] = ()  # axes to flip for the model

    def _positions(self, axis: int) -> NDArray[np.float64]:
        """Return the positions of the model's pixel centres, in voxels of the mask."""
        side = max(n * mm for n, mm in zip(self.mask, self.spacing, strict=True))
        pixel = float(side) / self.plane[axis]
        margin = (side - self.mask[axis] * self.spacing[axis]) / 2
        centres = (np.arange(self.plane[axis], dtype=np.float64) + 0.5) * pixel - margin
        positions: NDArray[np.float64] = centres / self.spacing[axis] - 0.5
        return positions

    def _nearest(self, axis: int) -> NDArray[np.int64]:
        """Return the voxel whose label each of the model's pixels gets; it may lie outside."""
        return np.rint(self._positions(axis) - 1e-9).astype(np.int64)

    def labels(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Resample labels or other values [x, y] to the model's plane, nearest neighbour.

        Outside the mask they are 0.
        """
        nearest = [self._nearest(axis) for axis in (0, 1)]
        inside = [(i >= 0) & (i < n) for i, n in zip(nearest, self.mask, strict=True)]
        rows, columns = (i.clip(0, n - 1) for i, n in zip(nearest, self.mask, strict=True))
        sampled = mask[np.ix_(rows, columns)]
        labels: NDArray[Any] = np.where(inside[0][:, None] & inside[1][None, :], sampled, 0)
        return np.flip(labels, self.mirrored)

    def image(self, frames: HuFrames, outside: float) -> HuFrames:
        """Resample HU or shares [t, x, y] to the model's plane by area, `outside` beyond the mask.

        A plane of the model's own size is returned unchanged.
        """
        image: HuFrames = frames.astype(np.float32)
        if not all(self._is_same(axis) for axis in (0, 1)):
            rows, columns = (self._areas(axis) for axis in (0, 1))
            image = np.matmul(np.matmul(rows, image), columns.T)
            covered = np.outer(rows.sum(axis=1), columns.sum(axis=1)) > 0
            image[:, ~covered] = outside
        return np.ascontiguousarray(np.flip(image, tuple(1 + axis for axis in self.mirrored)))

    def unflipped(self, frames: HuFrames) -> HuFrames:
        """Return frames [t, X, Y] of the model with axes that run as those of the mask."""
        return np.flip(frames, tuple(1 + axis for axis in self.mirrored))

    def volume(self, frames: HuFrames) -> HuFrames:
        """Resample frames [t, X, Y] of the model to the mask's plane, linearly: [t, x, y]."""
        rows, columns = (self._weights(axis) for axis in (0, 1))
        resampled: HuFrames = np.matmul(np.matmul(rows, self.unflipped(frames)), columns.T)
        return resampled

    def grid(self, affine: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the affine of the model's plane, unflipped, from that of the mask."""
        to_voxels = np.eye(4)
        for axis in (0, 1):
            positions, last = self._positions(axis), self.plane[axis] - 1
            # A single pixel covers what there is.
            step = (positions[-1] - positions[0]) / last if last else float(self.mask[axis])
            to_voxels[axis, axis], to_voxels[axis, 3] = step, positions[0]
        return affine @ to_voxels

    def _is_same(self, axis: int) -> bool:
        """Return whether the model's pixels are the mask's voxels."""
        count = self.mask[axis]
        return count == self.plane[axis] and np.allclose(
            self._positions(axis), np.arange(count), rtol=0, atol=1e-9
        )

    def _areas(self, axis: int) -> NDArray[np.float32]:
        """Return the share of each voxel in each of the model's pixels: [pixels, voxels].

        Where voxels are larger than pixels, this is linear interpolation.
        """
        positions, count = self._positions(axis), self.mask[axis]
        step = abs(positions[-1] - positions[0]) / max(1, len(positions) - 1)
        half = max(1.0, step if len(positions) > 1 else float(count)) / 2
        voxel = np.arange(count)
        low = np.maximum(positions[:, None] - half, voxel - 0.5)
        high = np.minimum(positions[:, None] + half, voxel + 0.5)
        shares = np.clip(high - low, 0, None)
        nearest = np.rint(positions - 1e-9)  # as in `labels`, so that both have the same border
        shares[(nearest < 0) | (nearest >= count)] = 0
        total = shares.sum(axis=1, keepdims=True)
        normalised: NDArray[np.float32] = (shares / np.where(total > 0, total, 1)).astype(
            np.float32
        )
        return normalised

    def _weights(self, axis: int) -> NDArray[np.float32]:
        """Return the linear interpolation as a matrix [voxels of the mask, model's pixels]."""
        count = self.plane[axis]
        position = np.interp(np.arange(self.mask[axis]), self._positions(axis), np.arange(count))
        low = np.floor(position).astype(int).clip(0, count - 1)
        share = (position - low).astype(np.float32)
        matrix = np.zeros((self.mask[axis], count), np.float32)
        row = np.arange(self.mask[axis])
        matrix[row, low] = 1 - share
        matrix[row, np.minimum(low + 1, count - 1)] += share
        return matrix


class Stretched(Fit):
    """As published: each axis fills the model's plane by itself, whatever its spacing.

    Labels are those of voxel floor(i n / N), where N pixels meet n voxels: torch's "nearest".
    The image that belongs to them was interpolated between pixel centres, and so is the result.
    """

    def _positions(self, axis: int) -> NDArray[np.float64]:
        n, count = self.mask[axis], self.plane[axis]
        return (np.arange(count, dtype=np.float64) + 0.5) * (n / count) - 0.5

    def _nearest(self, axis: int) -> NDArray[np.int64]:
        return np.arange(self.plane[axis], dtype=np.int64) * self.mask[axis] // self.plane[axis]
