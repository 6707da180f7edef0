"""Small CTs with a body, made from nothing, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.report.survey import Survey, survey
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume

SPACING = (1.0, 1.0, 2.0)
AFFINE = np.diag([-1.0, -1.0, 2.0, 1.0])


def body(
    shape: tuple[int, int, int] = (20, 160, 140), noise: float = 10.0, seed: int = 0
) -> NDArray[np.int16]:
    """A cylinder of soft tissue [t, x, y] with a ring of fat, a bone, a lung, and noise in HU."""
    t, nx, ny = shape
    x, y = np.meshgrid(np.arange(nx) - nx / 2, np.arange(ny) - ny / 2, indexing="ij")
    r = np.hypot(x / (0.42 * nx), y / (0.42 * ny))
    plane = np.full((nx, ny), -1000.0)
    plane[r < 1] = -90
    plane[r < 0.9] = 50
    plane[np.hypot(x, y + 0.25 * ny) < 0.06 * ny] = 600
    plane[np.hypot(x - 0.24 * nx, y) < 0.09 * ny] = -850
    volume = np.repeat(plane[None], t, axis=0)
    volume += np.random.default_rng(seed).normal(0, noise, shape)
    return np.rint(volume.clip(-1000, 1000)).astype(np.int16)


def ball(
    shape: tuple[int, ...], place: tuple[int, int, int], size: float, spacing: Any = SPACING
) -> NDArray[np.float64]:
    """The share of each voxel [t, x, y] in a ball of this diameter in mm, roughly."""
    axes = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij", sparse=True)
    steps = (spacing[2], spacing[0], spacing[1])
    r = np.sqrt(sum(((a - p) * s) ** 2 for a, p, s in zip(axes, place, steps, strict=True)))
    return np.clip((size / 2 - r) / np.mean(steps) + 0.5, 0, 1)


def store(path: Path, frames: NDArray[Any], affine: NDArray[Any] = AFFINE) -> Path:
    """Write frames [t, x, y] as a volume and return its path."""
    t, x, y = frames.shape
    with create_volume(path, Geometry((x, y, t), affine), frames.dtype.name) as writer:
        writer.write(frames)
    return path


def surveyed(path: Path) -> Survey:
    """Read a volume as the report does first."""
    return survey(open_volume(path), path.with_name("copy.nii"), lambda done: None)
