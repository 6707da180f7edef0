"""Which latent cells of a CT are drawn anew, and how far that is seen in the decoded CT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.manifest import Manifest
from fvae_deploy.generation.stitch import Block
from fvae_deploy.stream import schedule

LEAST = 1e-3  # changed share of a pixel that counts; below, it is rounding
Cells = NDArray[np.bool_]  # [h, w]
Shares = NDArray[np.float32]  # [h, w]


@dataclass(frozen=True)
class Region:
    """The changed cells [h, w] of each latent frame that has some; other frames are left out."""

    cells: Mapping[int, Cells]
    slices: tuple[tuple[int, int], ...]  # of every latent frame, half-open
    reach: int  # cells beside a changed one that its content can be seen in
    memory: int  # latent frames after a changed one that its content can be seen in

    def changed(self, block: Block) -> NDArray[np.bool_]:
        """Return the changed cells of a block as [T, 1, h, w]."""
        shape = next(iter(self.cells.values())).shape
        frames = range(block.start, block.stop)
        return np.stack([self.cells.get(n, np.zeros(shape, np.bool_)) for n in frames])[:, None]

    def visible(self) -> list[tuple[int, int]]:
        """Return the runs of slices in which the change can be seen, half-open."""
        runs: list[tuple[int, int]] = []
        for frame in sorted(self.cells):
            last = min(frame + self.memory, len(self.slices) - 1)
            start, stop = self.slices[frame][0], self.slices[last][1]
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
            else:
                runs.append((start, stop))
        return runs

    def weight(self, frame: int) -> Shares | None:
        """Return how much of a change is let through in a frame: 1 where it is, 0 beyond reach.

        None for a frame in which no change can be seen.
        """
        found: Shares | None = None
        for back in range(self.memory + 1):
            cells = self.cells.get(frame - back)
            if cells is None:
                continue
            faded = _faded(cells, self.reach) * np.float32(_fade(back, self.memory + 1))
            found = faded if found is None else np.maximum(found, faded)
        return found

    def frame_of(self, index: int) -> int:
        """Return the latent frame that shows a slice."""
        starts = [start for start, _ in self.slices]
        return int(np.searchsorted(starts, index, side="right")) - 1


def region_of(shares: Iterable[NDArray[Any] | None], depth: int, vae: Manifest) -> Region:
    """Find the changed cells, from the changed share of every pixel [X, Y] in every slice.

    None is a slice without a change. `depth` slices are encoded as one causal stream; the shares
    may be those of fewer.
    """
    geometry = vae.geometry
    steps = schedule.steps(depth, "causal", 1, geometry)
    slices = tuple(step.slices for step in steps for _ in range(*step.latents))
    cells: dict[int, Cells] = {}
    for index, share in enumerate(shares):
        touched = None if share is None else share > LEAST
        if touched is not None and touched.any():
            x, y = (n // geometry.spatial for n in touched.shape)
            pooled = touched.reshape(x, geometry.spatial, y, geometry.spatial).any(axis=(1, 3))
            for number, (start, stop) in enumerate(slices):
                if start <= index < stop:
                    cells[number] = cells.get(number, np.zeros((x, y), np.bool_)) | pooled
    return Region(cells, slices, _reach(vae), vae.context("decode"))


def _reach(vae: Manifest) -> int:
    """Return how many latent cells to the side the decoder reaches; the plane if it has no end."""
    reach = 0
    for stage in vae.stages("decode"):
        part = vae.stage_part(stage, first=False)
        if part.halo is None:
            return 1 << 16
        reach += -(-part.halo // part.scale)
    return reach


def _fade(distance: int, reach: int) -> float:
    """Return 1 up to a distance of 1, then less, and 0 from `reach` on."""
    return 1.0 if distance <= 1 else max(0.0, (reach - distance) / (reach - 1))


def _faded(cells: Cells, reach: int) -> Shares:
    """Return 1 in the cells and less towards `reach` cells beside them, where it is 0."""
    reach = min(reach, sum(cells.shape))
    shares = cells.astype(np.float32)
    grown = cells
    for distance in range(1, reach):
        padded = np.pad(grown, 1)
        rows = padded[:-2] | padded[1:-1] | padded[2:]
        wider = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
        shares[wider & ~grown] = _fade(distance, reach)
        grown = wider
    return shares
