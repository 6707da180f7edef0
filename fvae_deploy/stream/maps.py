"""The maps of a stage that runs in segments.

A map is written and read in tiles. In memory it is an array; in a file, the elements of a cell lie
together, cell by cell and row by row: a strip of rows is one read or write, a tile is one for every
row. The file has no name, so that it disappears with the process, however it ends.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.bundle import TensorSpec

Array = NDArray[Any]
Range = tuple[int, int]


def at(spec: TensorSpec, rows: Range, columns: Range) -> tuple[slice, ...]:
    """Return the index of a tile of cells in a tensor."""
    index = []
    for dimension in spec.shape:
        factor, _, symbol = str(dimension).rpartition("*")
        span = {"h": rows, "w": columns}.get(symbol)
        size = int(factor or 1)
        index.append(slice(size * span[0], size * span[1]) if span else slice(None))
    return tuple(index)


class MapStore:
    """One map of a plane of (h, w) latent cells; tiles are given in cells of `scale` each.

    With a folder, the map is in a file. `spare` is memory of as many elements, of a map that is
    done.
    """

    def __init__(
        self,
        spec: TensorSpec,
        plane: tuple[int, int],
        folder: Path | None,
        spare: Array | None = None,
    ) -> None:
        self.spec = spec
        self._shape = spec.sized(1, *plane)
        symbols = [str(size).rpartition("*")[2] for size in spec.shape]
        places = [symbols.index(symbol) for symbol in ("h", "w") if symbol in symbols]
        self._order = [*places, *(i for i in range(len(symbols)) if i not in places)]
        self._lines = len(places)  # axes of the file that count places
        self._folder = folder
        self._file: BinaryIO | None = None
        self._array: Array | None = None
        self._spare, self._own = spare, False
        self._type = np.dtype(np.float32)

    @property
    def in_file(self) -> bool:
        """Whether reading and writing takes the disk."""
        return self._folder is not None

    def read(self, index: tuple[slice, ...]) -> Array:
        """Return a tile, in the order of the map's axes: a view where the map is in memory."""
        if self._array is not None:
            return self._array[index]
        assert self._file is not None
        tile = np.empty([len(range(*s.indices(n))) for s, n in self._ordered(index)], self._type)
        for offset, line in self._parts(index, tile):
            left = line
            while left:
                count = os.preadv(self._file.fileno(), [left], offset + len(line) - len(left))
                if not count:
                    raise OSError("expected a tile of a map in the file, found its end")
                left = left[count:]
        return tile.transpose(np.argsort(self._order))

    def write(self, index: tuple[slice, ...], tile: Array) -> None:
        """Write a tile."""
        if self._folder is None:
            if self._array is None:
                if tile.shape == self._shape:
                    self._array = tile
                    return
                self._array = self._memory(tile.dtype)
            self._array[index] = tile
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
            self._type = tile.dtype
        ordered = np.ascontiguousarray(tile.transpose(self._order))
        for offset, line in self._parts(index, ordered):
            left = line
            while left:  # a system call writes at most 2 GiB
                written = os.pwrite(self._file.fileno(), left, offset + len(line) - len(left))
                left = left[written:]

    def write_zeros(self) -> None:
        """Write the whole map as zeros."""
        self.write((slice(None),) * len(self._shape), np.zeros(self._shape, np.float32))

    def whole(self) -> Array:
        """Return the whole map."""
        return self.read((slice(None),) * len(self._shape))

    def close(self) -> Array | None:
        """Free the file; returns the memory, None where it is the engine's or there is none."""
        array, self._array = self._array, None
        if self._file is not None:
            self._file.close()
        return array if self._own else None

    def _memory(self, kind: np.dtype[Any]) -> Array:
        """Return memory for the map, that of another map if it fits."""
        spare, self._spare, self._own = self._spare, None, True
        if spare is not None and spare.dtype == kind:
            return spare.reshape(self._shape)
        return np.empty(self._shape, kind)

    def _ordered(self, index: tuple[slice, ...]) -> list[tuple[slice, int]]:
        """Return the index and the size of every axis in the order of the file."""
        return [(index[axis], self._shape[axis]) for axis in self._order]

    def _parts(self, index: tuple[slice, ...], tile: Array) -> list[tuple[int, memoryview]]:
        """Return where in the file each run of a tile lies, and its bytes in the array."""
        ranges = [s.indices(n)[:2] for s, n in self._ordered(index)]
        sizes = [n for _, n in self._ordered(index)]
        row = math.prod(sizes[1:]) * self._type.itemsize
        raw = tile.reshape(-1).view(np.uint8).data
        start, stop = ranges[0]
        if self._lines < 2 or ranges[1] == (0, sizes[1]):
            return [(start * row, raw)]
        column = math.prod(sizes[2:]) * self._type.itemsize
        length = (ranges[1][1] - ranges[1][0]) * column
        return [
            (r * row + ranges[1][0] * column, raw[i * length : (i + 1) * length])
            for i, r in enumerate(range(start, stop))
        ]
