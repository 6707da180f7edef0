"""The first reading of an original: a plain copy to read again quickly, and its noise.

The noise of a scan is the most frequent standard deviation of small squares of soft tissue: a
square that holds an edge has a larger one, so it does not decide (the global noise index of
Christianson et al., Am J Roentgenol 2015).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.quality.fidelity import SLAB_VOXELS, WINDOW, Window
from fvae_deploy.report.tissues import SOFT, Spacing, tissues
from fvae_deploy.volume.base import Geometry, Reader
from fvae_deploy.volume.open import create_volume

SQUARE = 7.0  # mm, the side of the squares
BIN, BINS = 0.25, 800  # HU; standard deviations of up to 200 HU are counted
STRUCTURE = 1.5  # mm: the Gaussian that errors are smoothed with when structure is looked for
FEWEST = 200  # squares; with fewer the noise is not known


@dataclass(frozen=True)
class Survey:
    """What is known about an original: a copy of it, its noise and where soft tissue is.

    `noise` is in HU, None where there is too little soft tissue. `smooth_noise` is what is left
    of it in slices smoothed by 1.5 mm. `soft` counts the squares of soft tissue in each slice.
    """

    copy: Path
    geometry: Geometry
    window: Window
    dtype: str
    clipped: float
    noise: float | None
    smooth_noise: float | None
    soft: tuple[int, ...]


def survey(
    reader: Reader,
    copy: Path,
    progress: Callable[[int], None],
    window: tuple[float, float] = WINDOW,
) -> Survey:
    """Read an original once; write its copy, clipped to a window in HU, to `copy` (.nii)."""
    geometry = Geometry(reader.geometry.shape, reader.geometry.affine)
    nx, ny, nz = geometry.shape
    depth = max(1, SLAB_VOXELS // (nx * ny))
    counts = [np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)]
    soft: list[int] = []
    clipped = 0
    with contextlib.ExitStack() as stack:
        writer = None
        for slab in reader.slabs(depth):
            if writer is None:
                dtype = "float32" if slab.dtype.kind == "f" else "int16"
                writer = stack.enter_context(create_volume(copy, geometry, dtype))
            clipped += int(np.count_nonzero((slab < window[0]) | (slab > window[1])))
            frames = clipped_to(slab, window)
            writer.write(frames)
            for frame, kind in zip(frames, tissues(frames, geometry.spacing), strict=True):
                plain, smooth = deviations(frame, kind, geometry.spacing)
                for total, values in zip(counts, (plain, smooth), strict=True):
                    total += _histogram(values)
                soft.append(len(plain))
            progress(len(slab))
    noise, smooth_noise = (_mode(total) for total in counts)
    share = clipped / (nx * ny * nz)
    return Survey(copy, geometry, window, dtype, share, noise, smooth_noise, tuple(soft))


def clipped_to(frames: NDArray[Any], window: Window) -> NDArray[Any]:
    """Clip frames to a window in HU; int16 stays int16, anything else becomes float32."""
    low, high = window
    if frames.dtype.kind == "f":
        kept: NDArray[Any] = np.clip(frames, low, high).astype(np.float32, copy=False)
    else:
        kept = np.clip(frames, math.ceil(low), math.floor(high)).astype(np.int16, copy=False)
    return kept


def deviations(
    frame: NDArray[Any], kind: NDArray[np.uint8], spacing: Spacing
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the standard deviations of squares of soft tissue, of a slice and of it smoothed."""
    from scipy import ndimage

    hu = frame.astype(np.float32)
    size = tuple(max(3, round(SQUARE / mm)) for mm in spacing[:2])
    inside = ndimage.minimum_filter((kind == SOFT).astype(np.uint8), size) > 0
    pair = []
    for values in (hu, smoothed(hu, spacing)):
        mean = ndimage.uniform_filter(values, size)
        square = ndimage.uniform_filter(values * values, size)
        deviation = np.sqrt(np.maximum(square - mean * mean, 0))
        pair.append(deviation[inside])
    return pair[0], pair[1]


def smoothed(hu: NDArray[np.float32], spacing: Spacing) -> NDArray[np.float32]:
    """Smooth a slice [x, y] in its plane."""
    from scipy import ndimage

    sigma = [STRUCTURE / mm for mm in spacing[:2]]
    result: NDArray[np.float32] = ndimage.gaussian_filter(hu, sigma, truncate=3.0)
    return result


def _histogram(values: NDArray[np.float32]) -> NDArray[np.int64]:
    index = np.minimum((values / BIN).astype(np.intp), BINS - 1)
    return np.bincount(index, minlength=BINS)


def _mode(counts: NDArray[np.int64]) -> float | None:
    """Return the most frequent standard deviation, from counts smoothed over 7 bins."""
    if counts.sum() < FEWEST:
        return None
    soft = np.convolve(counts[:-1], np.hanning(9)[1:-1], mode="same")
    return float((np.argmax(soft) + 0.5) * BIN)
