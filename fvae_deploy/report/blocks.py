"""Streams of slices cut into blocks that overlap, so that filters along z see their neighbours.

slices   0 1 2 3 4 5 6 7 8 9
block    [core   ] halo           every slice is in the core of exactly one block
             halo [core    ]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]  # by name: [t, x, y], all of the same slices


@dataclass(frozen=True)
class Block:
    """Slices [start, stop) of several volumes, with their neighbours from `first` on."""

    start: int
    stop: int
    first: int
    arrays: Arrays

    @property
    def inner(self) -> slice:
        """Where the core lies in the arrays."""
        return slice(self.start - self.first, self.stop - self.first)

    def core(self, name: str) -> NDArray[Any]:
        """Return the slices [start, stop) of one volume."""
        return self.arrays[name][self.inner]


def blocks(slabs: Iterable[Arrays], depth: int, halo: int, count: int) -> Iterator[Block]:
    """Cut a stream of slabs, of any depths, into blocks of `depth` slices and a halo on each side.

    `count` is the number of slices; halos end at the ends of the volume.
    """
    waiting: dict[str, list[NDArray[Any]]] = {}
    first, read = 0, 0  # the first slice that is kept, the slices read so far
    start = 0
    stream = iter(slabs)
    while start < count:
        stop = min(start + depth, count)
        while read < min(stop + halo, count):
            slab = next(stream)
            for name, frames in slab.items():
                waiting.setdefault(name, []).append(frames)
            read += len(next(iter(slab.values())))
        arrays = {name: np.concatenate(parts) for name, parts in waiting.items()}
        below = max(start - halo, 0) - first
        above = min(stop + halo, count) - first
        yield Block(start, stop, first + below, {n: a[below:above] for n, a in arrays.items()})
        start = stop
        keep = max(start - halo, 0) - first
        waiting = {name: [a[keep:]] for name, a in arrays.items()}
        first += keep
