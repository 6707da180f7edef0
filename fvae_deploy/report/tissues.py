"""Body, air, fat, soft tissue and bone by thresholds: the segmenter that always runs.

A slice is smoothed (Gaussian, 1 mm), so that its noise does not decide. The body is what exceeds
-300 HU in pieces of at least 5 cm², with its holes filled. Inside the body, smoothed HU decide:
air below -500, fat from -200 to -20, bone above 200, soft tissue from -20 to 200. What lies
between air and fat, such as the borders of the lungs, counts as soft tissue.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

OUTSIDE, AIR, FAT, SOFT, BONE = range(5)
NAMES = {
    AIR: "lung and air",
    FAT: "fat",
    SOFT: "soft tissue",
    BONE: "bone",
}
OUTSIDE_NAME = "outside the body"
SURFACES = {"body": (AIR, FAT, SOFT, BONE), "lung and air": (AIR,), "bone": (BONE,)}
SMOOTH = 1.0  # mm
SMALLEST_BODY = 500.0  # mm²

Spacing = tuple[float, float, float]  # mm along x, y, z


def tissues(frames: NDArray[Any], spacing: Spacing) -> NDArray[np.uint8]:
    """Return the tissue of each voxel of frames [t, x, y] in HU; slices do not depend on others."""
    result = np.zeros(frames.shape, np.uint8)
    for frame, out in zip(frames, result, strict=True):
        out[:] = _tissues_of_a_slice(frame, spacing)
    return result


def _tissues_of_a_slice(frame: NDArray[Any], spacing: Spacing) -> NDArray[np.uint8]:
    from scipy import ndimage

    sigma = tuple(SMOOTH / mm for mm in spacing[:2])
    hu = ndimage.gaussian_filter(frame.astype(np.float32), sigma, truncate=3.0)
    body = _filled(_large(hu > -300, SMALLEST_BODY / (spacing[0] * spacing[1])))
    kind = np.full(hu.shape, SOFT, np.uint8)
    kind[hu < -500] = AIR
    kind[(hu >= -200) & (hu < -20)] = FAT
    kind[hu > 200] = BONE
    kind[~body] = OUTSIDE
    return kind


def _large(mask: NDArray[np.bool_], least: float) -> NDArray[np.bool_]:
    """Return the connected pieces of a mask [x, y] with at least this many pixels."""
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= least
    keep[0] = False
    kept: NDArray[np.bool_] = keep[labels]
    return kept


def _filled(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Fill the holes of a mask [x, y]: what is not connected with the border outside."""
    from scipy import ndimage

    labels, count = ndimage.label(~mask)
    outside = np.zeros(count + 1, bool)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        outside[edge] = True
    outside[0] = False
    filled: NDArray[np.bool_] = ~outside[labels]
    return filled
