"""Lesions placed in an organ mask, by seed and in the memory of a few slices.

The mask is read twice. First, the voxels of the wanted lobes with the smallest hash of seed and
position become candidates. Then the candidate whose ball lies best within the lobes is taken. The
hash is that of the position on axes L, P, S, so the place does not depend on the orientation of
the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError
from fvae_deploy.generation.labels import Labels
from fvae_deploy.generation.lesions import LOBES, Lesion, sentence
from fvae_deploy.organs import organ_label
from fvae_deploy.volume.base import Geometry

Planes = Callable[[int], Generator[Labels]]  # first slice -> organ labels [x, y] from there on
Array = NDArray[np.float64]
CANDIDATES = 96
ENOUGH = 0.75  # share of a ball that must lie in the wanted lobes
FEW = 8  # voxels
SPREAD = 0.6  # of the lung's height, up to which a layer reaches
LEFT = frozenset(organ_label(name) for name in LOBES["left"].values())


class Grid:
    """Positions of voxels along the body's axes."""

    def __init__(self, geometry: Geometry) -> None:
        self.shape, self.spacing = geometry.shape, geometry.spacing
        self._codes = geometry.orientation

    def index(self, axis: str, at: tuple[Array, ...]) -> Array:
        """Return positions in voxels, counted towards `axis`: L, P or S."""
        opposite = {"L": "R", "P": "A", "S": "I"}[axis]
        for n, code in enumerate(self._codes):
            if code in (axis, opposite):
                return at[n] if code == axis else self.shape[n] - 1 - at[n]
        raise ConditionError(
            f"expected a mask with axes along the body, found {self._codes}: correct its affine"
        )

    def mm(self, axis: str, at: tuple[Array, ...]) -> Array:
        """Return positions in mm, counted towards `axis`."""
        n = next(n for n, code in enumerate(self._codes) if code in (axis, *_OPPOSITE[axis]))
        return self.index(axis, at) * self.spacing[n]

    def hash(self, at: tuple[Array, ...], seed: int) -> NDArray[np.uint64]:
        """Return a hash of positions and seed, the same in every orientation of the file."""
        start = (seed * int(_MIX[0]) + int(_MIX[1])) % 2**64
        mixed = np.full(np.broadcast(*at).shape, start, np.uint64)
        for axis in "LPS":
            mixed = (mixed ^ self.index(axis, at).astype(np.uint64)) * _MIX[1]
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX[2]
            mixed ^= mixed >> np.uint64(32)
        return mixed


_OPPOSITE = {"L": "R", "P": "A", "S": "I"}
_MIX = tuple(np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Placed:
    """A lesion in its place: `inside` tells which voxels (x, y, z) of its lobes it fills."""

    lesion: Lesion
    side: str
    organs: tuple[int, ...]  # labels that it may cover
    inside: Callable[[tuple[Array, ...]], NDArray[np.bool_]]
    centre: tuple[int, int, int] | None = None  # voxel; None for a layer


class LesionMask:
    """Placed lesions as a mask of findings beside the organ mask, drawn while it is read.

    Raises ConditionError where the mask lacks the lobes, or room for a lesion.
    """

    def __init__(
        self, lesions: Sequence[Lesion], planes: Planes, geometry: Geometry, path: Path, seed: int
    ) -> None:
        self.path = path
        self.remarks: tuple[str, ...] = ()
        self._planes, self._depth = planes, geometry.shape[2]
        self._at = tuple(
            a.astype(np.float64) for a in np.meshgrid(*map(np.arange, geometry.shape[:2]),
                                                      indexing="ij", sparse=True)
        )  # fmt: skip
        grid = Grid(geometry)
        self.placed = [
            self._place(lesion, grid, seed * 1009 + number) for number, lesion in enumerate(lesions)
        ]

    @property
    def sentences(self) -> list[str]:
        """The lesions as sentences of a report, each once."""
        return list(dict.fromkeys(sentence(each.lesion, each.side) for each in self.placed))

    def close(self) -> None:
        """Do nothing: there is no file."""

    def planes(self, start: int) -> Generator[Labels]:
        """Yield the number of the finding in every voxel, [x, y], from slice `start` on."""
        with contextlib.closing(self._planes(start)) as organs:
            for z in range(start, self._depth):
                labels = next(organs)
                found = np.zeros(labels.shape, np.int64)
                for each in self.placed:
                    where = np.isin(labels, each.organs) & each.inside(self._position(z))
                    found[where] = each.lesion.finding.number
                yield found

    def _position(self, z: int) -> tuple[Array, ...]:
        return (*self._at, np.array(float(z)))

    def _regions(self, organs: tuple[int, ...]) -> Generator[tuple[int, Labels, Array]]:
        """Yield the slices that contain these organs: number, voxels inside as rows of (x, y)."""
        with contextlib.closing(self._planes(0)) as planes:
            for z in range(self._depth):
                labels = next(planes)
                inside = np.isin(labels, organs)
                if inside.any():
                    yield z, np.where(inside, labels, 0), np.argwhere(inside).astype(np.float64)

    def _place(self, lesion: Lesion, grid: Grid, seed: int) -> Placed:
        keys, voxels = self._candidates(lesion, grid, seed)
        labels = voxels[:, 3]
        side = "left" if int(labels[0]) in LEFT else "right"
        of_side = tuple(o for o in lesion.organs if (o in LEFT) == (side == "left"))
        if lesion.shape == "layer":
            whole = tuple(organ_label(name) for name in LOBES[side].values())
            return Placed(lesion, side, of_side, self._layer(lesion, grid, whole, keys[0]))
        radius = lesion.size / 2
        # A cloud is an ellipsoid; its radii in mm along L, P and S follow from the hash.
        stretch = np.ones(3)
        if lesion.shape == "cloud":
            stretch = np.random.default_rng(int(keys[0])).uniform(0.8, 1.2, 3)
        best = self._roomiest(voxels, lesion, grid, radius)
        x, y, z, label = (int(n) for n in voxels[best])
        side = "left" if label in LEFT else "right"
        of_side = tuple(o for o in lesion.organs if (o in LEFT) == (side == "left"))
        centre = tuple(np.array(float(n)) for n in (x, y, z))

        def inside(at: tuple[Array, ...]) -> NDArray[np.bool_]:
            square: Array = sum(  # type: ignore[assignment]
                ((grid.mm(axis, at) - grid.mm(axis, centre)) / (radius * s)) ** 2
                for axis, s in zip("LPS", stretch, strict=True)
            )
            return square <= 1

        return Placed(lesion, side, of_side, inside, (x, y, z))

    def _candidates(
        self, lesion: Lesion, grid: Grid, seed: int
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the voxels of the lobes with the smallest hashes: keys, rows of x, y, z, label."""
        keys, rows = np.empty(0, np.uint64), np.empty((0, 4), np.int64)
        for z, labels, at in self._regions(lesion.organs):
            position = (at[:, 0], at[:, 1], np.full(len(at), float(z)))
            hashes = grid.hash(position, seed)
            x, y = at.T.astype(np.int64)
            new = np.stack([x, y, np.full(len(at), z), labels[x, y]], axis=1)
            keys, rows = np.concatenate([keys, hashes]), np.concatenate([rows, new])
            order = np.argsort(keys, kind="stable")[:CANDIDATES]
            keys, rows = keys[order], rows[order]
        if not len(rows):
            raise ConditionError(
                f"expected the lobes for {lesion.text!r} in {self.path}, found no voxel of them: "
                "choose another place, or a mask with the lobes of the lungs"
            )
        return keys, rows

    def _roomiest(
        self, voxels: NDArray[np.int64], lesion: Lesion, grid: Grid, radius: float
    ) -> int:
        """Return the first candidate whose ball lies in the lobes, or the one with most room."""
        counts, totals = np.zeros(len(voxels)), np.zeros(len(voxels))
        reach = np.array([int(radius / mm) for mm in grid.spacing])
        sizes = np.array(grid.spacing)
        offsets = np.stack(
            np.meshgrid(*(np.arange(-r, r + 1) for r in reach), indexing="ij"), -1
        ).reshape(-1, 3)
        ball = offsets[((offsets * sizes) ** 2).sum(1) <= radius**2]
        totals[:] = len(ball)
        width, height = grid.shape[:2]
        for z, labels, _ in self._regions(lesion.organs):
            for n, (x, y, middle, _) in enumerate(voxels):
                if abs(z - middle) > reach[2]:
                    continue
                disc = ball[ball[:, 2] == z - middle]
                px, py = disc[:, 0] + x, disc[:, 1] + y
                ok = (px >= 0) & (px < width) & (py >= 0) & (py < height)
                counts[n] += np.count_nonzero(labels[px[ok], py[ok]])
        share = counts / totals
        best = int(np.argmax(share >= share.max() - 1e-9))
        if lesion.shape == "ball" and share[best] < ENOUGH:
            raise ConditionError(
                f"expected room for {lesion.text!r} in {self.path}, found at best "
                f"{share[best]:.0%} of a ball of {lesion.size:g} mm inside: make it smaller or "
                "choose a larger place"
            )
        if counts[best] < FEW:
            self.remarks += (
                f"The lesion {lesion.text!r} has only {int(counts[best])} voxels: the network may "
                "not draw it. Make it larger, or use a mask with smaller voxels.",
            )
        return best

    def _layer(
        self, lesion: Lesion, grid: Grid, lung: tuple[int, ...], key: np.uint64
    ) -> Callable[[tuple[Array, ...]], NDArray[np.bool_]]:
        """Return fluid at the back of a lung, thickest at its base: `size` mm at most."""
        back, low, high = -np.inf, np.inf, -np.inf
        for z, _, at in self._regions(lung):
            position = (at[:, 0], at[:, 1], np.full(len(at), float(z)))
            heights = grid.mm("S", position)
            back = max(back, float(grid.mm("P", position).max()))
            low, high = min(low, float(heights.min())), max(high, float(heights.max()))
        drawn = np.random.default_rng(int(key)).uniform(0.9, 1.1)
        reach = max(SPREAD * drawn * (high - low), 1.0)

        def inside(at: tuple[Array, ...]) -> NDArray[np.bool_]:
            up = np.clip((grid.mm("S", at) - low) / reach, 0, 1)
            thick = lesion.size * (1 - up**2)
            return (grid.mm("P", at) > back - thick) & (thick > 0)

        return inside
