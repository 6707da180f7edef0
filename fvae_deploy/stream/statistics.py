"""Passes over the maps of a stage that runs in segments: statistics of tiles, merged in float64.

Deviations are taken from the mean of an eighth of a piece, summed 64 at a time in the type of the
map, and all further sums are in float64. So a mean is exact to 1e-8 deviations, and a variance to
1e-7.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.export.program import Pass

Array = NDArray[Any]
CHUNK = 1 << 17  # elements at a time, so that they stay in the cache
RUN = 64  # elements summed in the type of the map
SAMPLE = 8  # of so many rows, one counts for the mean from which deviations are taken


class Moments:
    """Count, mean and sum of squared deviations of tiles, merged with the formula of Chan et al."""

    def __init__(self, count: int = 0, mean: Any = 0.0, squares: Any = 0.0) -> None:
        self.count, self.mean, self.squares = count, mean, squares

    def merge(self, other: Moments) -> None:
        """Merge the moments of further elements."""
        total = self.count + other.count
        apart = other.mean - self.mean
        self.mean = self.mean + apart * (other.count / total)
        self.squares = self.squares + other.squares + apart**2 * (self.count * other.count / total)
        self.count = total


def moments(x: Array, axes: tuple[int, ...]) -> Moments:
    """Return the moments of x over `axes`.

    Axes that lie side by side in memory are reduced first, the others in float64.
    """
    first, last = max(_runs(axes), key=lambda run: math.prod(x.shape[run[0] : run[1]]))
    before, inside, after = x.shape[:first], x.shape[first:last], x.shape[last:]
    flat = x.reshape(math.prod(before), math.prod(inside), math.prod(after))
    found = [_of_matrix(matrix) for matrix in flat]
    count = flat.shape[1]
    mean = np.stack([one.mean for one in found]).reshape((*before, *after))
    squares = np.stack([one.squares for one in found]).reshape((*before, *after))
    rest = tuple(a if a < first else a - (last - first) for a in axes if not first <= a < last)
    if rest:
        centre = mean.mean(rest, keepdims=True)
        squares = squares.sum(rest) + count * ((mean - centre) ** 2).sum(rest)
        count *= math.prod(mean.shape[a] for a in rest)
        mean = centre.reshape(squares.shape)
    return Moments(count, mean, squares)


def _runs(axes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of neighbouring axes."""
    start = end = axes[0]
    for axis in axes[1:]:
        if axis != end + 1:
            yield start, end + 1
            start = axis
        end = axis
    yield start, end + 1


def _of_matrix(x: Array) -> Moments:
    """Return the moments of every column of x [n, columns]."""
    total = Moments()
    step = max(RUN, CHUNK // x.shape[1] // RUN * RUN)
    memory = np.empty_like(x[:step])
    for start in range(0, len(x), step):
        chunk = x[start : start + step]
        count = len(chunk)
        sample = chunk[::SAMPLE]
        shift = (_sums(sample) / len(sample)).astype(x.dtype)
        apart = np.subtract(chunk, shift, out=memory[:count])
        rest = _sums(apart)
        np.multiply(apart, apart, out=apart)
        squares = np.maximum(_sums(apart) - rest**2 / count, 0)
        total.merge(Moments(count, shift.astype(np.float64) + rest / count, squares))
    return total


def _sums(x: Array) -> Array:
    """Return the sums of the columns of x [n, columns] in float64."""
    if x.shape[1] == 1:
        return np.asarray(x.sum(axis=0, dtype=np.float64))
    whole = len(x) // RUN * RUN
    runs = np.ones((1, RUN), x.dtype) @ x[:whole].reshape(-1, RUN, x.shape[1])
    rest = np.ones(len(x) - whole, x.dtype) @ x[whole:]
    return np.asarray(runs.sum(axis=(0, 1), dtype=np.float64) + rest)


class Passes:
    """The passes over one map, or over a map and another, tile by tile."""

    def __init__(self, passes: tuple[Pass, ...]) -> None:
        self._passes = passes
        self._moments: dict[tuple[Any, ...], Moments] = {}
        self._found: dict[str, Array] = {}
        self._type: np.dtype[Any] = np.dtype(np.float32)

    def add(self, tiles: dict[str, Array]) -> None:
        """Take in a tile of every map that these passes read."""
        done = set()
        for each in self._passes:
            tile = tiles[each.source]
            self._type = tile.dtype
            if each.kind == "product":
                self._merge(each, _product(tile, tiles[each.other], *each.axes), np.add)
                continue
            tile, axes = _grouped(tile, each)
            if each.kind in ("mean", "variance"):
                key = (each.source, each.axes, each.split, each.groups)
                if key not in done:
                    self._moments.setdefault(key, Moments()).merge(moments(tile, axes))
                done.add(key)
            elif each.kind == "sum":
                self._merge(each, tile.sum(axis=axes, dtype=np.float64), np.add)
            else:
                largest = each.kind == "max"
                value = tile.max(axis=axes) if largest else tile.min(axis=axes)
                self._merge(each, value, np.maximum if largest else np.minimum)

    def _merge(self, each: Pass, value: Array, merge: Any) -> None:
        known = self._found.get(each.name)
        self._found[each.name] = value if known is None else merge(known, value)

    def results(self) -> dict[str, Array]:
        """Return the small arrays of all passes, in the type of their maps."""
        results = {}
        for each in self._passes:
            if each.kind in ("mean", "variance"):
                found = self._moments[each.source, each.axes, each.split, each.groups]
                mean = each.kind == "mean"
                value = np.asarray(found.mean if mean else found.squares / found.count)
            else:
                value = np.asarray(self._found[each.name])
            results[each.name] = value.astype(self._type)
        return results


def _grouped(tile: Array, each: Pass) -> tuple[Array, tuple[int, ...]]:
    """Return a tile whose channels are split into groups, and the axes that a pass reduces."""
    if each.groups == 1:
        return tile, tuple(sorted(each.axes))
    at, shape = each.split, tile.shape
    tile = tile.reshape(*shape[:at], each.groups, -1, *shape[at + 1 :])
    return tile, tuple(sorted([at + 1, *(a + (a > at) for a in each.axes)]))


def _product(a: Array, b: Array, batch: int, rows: int) -> Array:
    """Multiply matrices [i, plane] and [plane, j] of every batch, in float64."""
    shared = a.shape[batch + rows :]
    columns = b.shape[batch + len(shared) :]
    count = math.prod(a.shape[:batch])
    left = a.reshape(count, -1, math.prod(shared)).astype(np.float64)
    result = left @ b.reshape(count, math.prod(shared), -1).astype(np.float64)
    return result.reshape(*a.shape[: batch + rows], *columns)
