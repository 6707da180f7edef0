"""The maps of a stage that runs in segments.

A map is written and read in strips of rows. In memory it is an array; in a file, whose rows lie one
after the other, every strip is one read or write. The file has no name, so that it disappears with
the process, however it ends.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.bundle import TensorSpec

Array = NDArray[Any]


class MapStore:
    """One map of a plane of (h, w) latent cells."""

    def __init__(self, spec: TensorSpec, plane: tuple[int, int], folder: Path | None) -> None:
        self._shape = spec.sized(1, *plane)
        self._rows_axis = next(
            i for i, size in enumerate(spec.shape) if str(size).rpartition("*")[2] == "h"
        )
        self._folder = folder
        self._file: BinaryIO | None = None
        self._array: Array | None = None
        self._type = np.dtype(np.float32)

    def read(self, start: int, stop: int) -> Array:
        """Return rows [start, stop), in the order of the map's axes."""
        if self._array is not None:
            return self._array[self._at(start, stop)]
        assert self._file is not None
        row = self._row_shape()
        strip = np.empty((stop - start, *row), self._type)
        self._file.seek(start * math.prod(row) * self._type.itemsize)
        self._file.readinto(strip.view(np.uint8).reshape(-1).data)  # type: ignore[attr-defined]
        return np.moveaxis(strip, 0, self._rows_axis)

    def write(self, start: int, rows: Array) -> None:
        """Write rows from `start` on."""
        stop = start + rows.shape[self._rows_axis]
        if self._folder is None:
            if self._array is None:
                self._array = np.empty(self._shape, rows.dtype)
            self._array[self._at(start, stop)] = rows
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        self._type = rows.dtype
        strip = np.ascontiguousarray(np.moveaxis(rows, self._rows_axis, 0))
        self._file.seek(start * math.prod(self._row_shape()) * self._type.itemsize)
        left = strip.view(np.uint8).reshape(-1).data
        while left:  # a system call writes at most 2 GiB
            left = left[self._file.write(left) :]

    def whole(self) -> Array:
        """Return the whole map."""
        return self.read(0, self._shape[self._rows_axis])

    def close(self) -> None:
        """Free the memory or the file."""
        self._array = None
        if self._file is not None:
            self._file.close()

    def _at(self, start: int, stop: int) -> tuple[slice, ...]:
        return (*[slice(None)] * self._rows_axis, slice(start, stop))

    def _row_shape(self) -> tuple[int, ...]:
        return self._shape[: self._rows_axis] + self._shape[self._rows_axis + 1 :]
