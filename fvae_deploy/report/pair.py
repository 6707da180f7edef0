"""One original against one reconstruction: every section sees the same stream of blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.quality.fidelity import SLAB_VOXELS
from fvae_deploy.report.blocks import Arrays, Block, blocks
from fvae_deploy.report.survey import Survey, clipped_to
from fvae_deploy.report.tissues import tissues
from fvae_deploy.volume.base import Geometry, Reader
from fvae_deploy.volume.open import open_volume

HALO = 8.0  # mm that filters along z may see beyond a block
MOST_SLICES = 16  # of a halo: thinner slices make it shorter


class Section(Protocol):
    """A part of the report that is computed while the volumes are read."""

    def add(self, block: Block) -> None:
        """Take a block with the arrays of `stream`."""
        ...


def halo_of(geometry: Geometry) -> int:
    """Return the slices of a halo."""
    return min(max(1, int(HALO / geometry.spacing[2])), MOST_SLICES)


def run_sections(
    found: Survey,
    reconstruction: Path,
    maps: dict[str, Path],
    sections: list[Section],
    progress: Callable[[int], None],
) -> None:
    """Read a pair once and pass its blocks to all sections.

    Blocks hold `original` and `reconstruction` in HU, clipped to the window; `tissue` and
    `tissue_after`, the thresholds' tissues of both; `tissue_again`, those of the original with
    fresh noise; `organs`, the label map in `maps`, or the tissues without one; and other label
    maps by their names in `maps`.
    """
    geometry = found.geometry
    nx, ny, nz = geometry.shape
    halo = halo_of(geometry)
    depth = max(1, SLAB_VOXELS // (nx * ny))
    with contextlib.ExitStack() as stack:
        readers = [
            stack.enter_context(contextlib.closing(open_volume(path, any_range=True)))
            for path in (found.copy, reconstruction, *maps.values())
        ]
        for block in blocks(
            stream(readers, found, depth, tuple(maps)), max(depth, 2 * halo), halo, nz
        ):
            for section in sections:
                section.add(block)
            progress(block.stop - block.start)


def stream(
    readers: list[Reader], found: Survey, depth: int, maps: tuple[str, ...]
) -> Iterator[Arrays]:
    """Yield slabs of a pair with their tissues, and of label maps."""
    spacing = found.geometry.spacing
    z = 0
    for slabs in zip(*(reader.slabs(depth) for reader in readers), strict=True):
        a, b = (clipped_to(slab, found.window) for slab in slabs[:2])
        tissue = tissues(a, spacing)
        yield {
            "original": a,
            "reconstruction": b,
            "tissue": tissue,
            "tissue_after": tissues(b, spacing),
            "tissue_again": tissues(with_noise(a, z, found.noise or 0.0), spacing),
            "organs": tissue,
            **dict(zip(maps, slabs[2:], strict=True)),
        }
        z += len(a)


def with_noise(frames: NDArray[Any], first: int, deviation: float) -> NDArray[np.float32]:
    """Add the noise of a second scan: of this deviation in HU, as coarse as a pixel's Gaussian.

    It depends on the number of the slice alone, so results do not depend on the slabs.
    """
    from scipy import ndimage

    result = frames.astype(np.float32)
    if deviation:
        for z, frame in enumerate(result, first):
            white = np.random.default_rng(z).standard_normal(frame.shape, np.float32)
            noise = ndimage.gaussian_filter(white, 0.8)
            frame += noise * (deviation / max(float(noise.std()), 1e-6))
    return result
