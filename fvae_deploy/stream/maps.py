"""The maps of a stage that runs in segments, and the passes over them.

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
from fvae_deploy.export.program import Pass

Array = NDArray[Any]
CHUNK = 1 << 18  # elements that are converted to float64 at a time, so that they stay in the cache


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


class Moments:
    """Count, mean and sum of squared deviations of strips, merged in float64."""

    def __init__(self, strip: Array) -> None:
        rows = len(strip)
        self.count, self.mean, self.squares = 0, np.zeros(rows), np.zeros(rows)
        self.add(strip)

    def add(self, strip: Array) -> None:
        """Merge a strip [K, N]: K statistics over N further elements each."""
        count = strip.shape[1]
        for start in range(0, count, CHUNK):
            piece = strip[:, start : start + CHUNK]
            for row in range(0, len(piece), step := max(1, CHUNK // piece.shape[1])):
                values = piece[row : row + step].astype(np.float64)
                mean = values.mean(axis=1)
                values -= mean[:, None]
                squares = np.einsum("kn,kn->k", values, values)
                self._merge(slice(row, row + step), start, piece.shape[1], mean, squares)
        self.count += count

    def _merge(self, rows: slice, before: int, count: int, mean: Array, squares: Array) -> None:
        """Merge one group's moments into those of `before` more elements than counted so far."""
        known = self.count + before
        total = known + count
        apart = mean - self.mean[rows]
        self.mean[rows] += apart * (count / total)
        self.squares[rows] += squares + apart**2 * (known * count / total)


class Passes:
    """The passes over one map, or over a map and another, strip by strip."""

    def __init__(self, passes: tuple[Pass, ...]) -> None:
        self._passes = passes
        self._moments: dict[tuple[Any, ...], Moments] = {}
        self._found: dict[str, Array] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._type: np.dtype[Any] = np.dtype(np.float32)

    def add(self, strips: dict[str, Array]) -> None:
        """Take in a strip of every map that these passes read."""
        done = set()
        for each in self._passes:
            strip = strips[each.source]
            self._type = strip.dtype
            if each.kind == "product":
                self._merge(each, _product(strip, strips[each.other], *each.axes), np.add)
                continue
            flat, self._shapes[each.name] = _flattened(strip, each)
            if each.kind in ("mean", "variance"):
                key = (each.source, each.axes, each.split, each.groups)
                if key not in self._moments:
                    self._moments[key] = Moments(flat)
                elif key not in done:
                    self._moments[key].add(flat)
                done.add(key)
            elif each.kind == "sum":
                self._merge(each, flat.sum(axis=1, dtype=np.float64), np.add)
            else:
                largest = each.kind == "max"
                value = flat.max(axis=1) if largest else flat.min(axis=1)
                self._merge(each, value, np.maximum if largest else np.minimum)

    def _merge(self, each: Pass, value: Array, merge: Any) -> None:
        known = self._found.get(each.name)
        self._found[each.name] = value if known is None else merge(known, value)

    def results(self) -> dict[str, Array]:
        """Return the small arrays of all passes, in the type of their maps."""
        results = {}
        for each in self._passes:
            if each.kind in ("mean", "variance"):
                moments = self._moments[each.source, each.axes, each.split, each.groups]
                mean = each.kind == "mean"
                value = moments.mean if mean else moments.squares / moments.count
            else:
                value = self._found[each.name]
            shape = self._shapes.get(each.name, value.shape)
            results[each.name] = value.reshape(shape).astype(self._type)
        return results


def _flattened(strip: Array, each: Pass) -> tuple[Array, tuple[int, ...]]:
    """Return a strip as [K, N], of which a pass reduces the last axis, and the shape of K."""
    axes = list(each.axes)
    if each.groups > 1:
        at, shape = each.split, strip.shape
        strip = strip.reshape(*shape[:at], each.groups, -1, *shape[at + 1 :])
        axes = [at + 1, *(a + (a > at) for a in axes)]
    kept = [a for a in range(strip.ndim) if a not in axes]
    shape = tuple(strip.shape[a] for a in kept)
    return strip.transpose(*kept, *axes).reshape(math.prod(shape), -1), shape


def _product(a: Array, b: Array, batch: int, rows: int) -> Array:
    """Multiply matrices [i, plane] and [plane, j] of every batch, in float64."""
    shared = a.shape[batch + rows :]
    columns = b.shape[batch + len(shared) :]
    count = math.prod(a.shape[:batch])
    left = a.reshape(count, -1, math.prod(shared)).astype(np.float64)
    result = left @ b.reshape(count, math.prod(shared), -1).astype(np.float64)
    return result.reshape(*a.shape[: batch + rows], *columns)
