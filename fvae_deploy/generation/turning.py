"""Masks whose axes run otherwise than in training, turned for the network and back for the file.

Slices of one order are needed in another one. They go through a temporary file on the disk, in
which every plane of the other order is made of rows that lie in one piece; memory is that of one
plane, whatever the length.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import ConditionError
from fvae_deploy.export.generator import OPPOSITE
from fvae_deploy.volume.base import Geometry, HuFrames, Writer

Array = NDArray[Any]


@dataclass(frozen=True)
class Turn:
    """Another order of axes: axis i is axis `order[i]` of before, reversed if `flips[i]`."""

    order: tuple[int, int, int]
    flips: tuple[bool, bool, bool]

    def geometry(self, before: Geometry) -> Geometry:
        """Return the turned grid, in the same place."""
        x, y, z = (before.shape[axis] for axis in self.order)
        step = np.zeros((4, 4))
        step[3, 3] = 1
        for axis, (source, flip) in enumerate(zip(self.order, self.flips, strict=True)):
            step[source, axis] = -1 if flip else 1
            step[source, 3] = before.shape[source] - 1 if flip else 0
        return Geometry((x, y, z), before.affine @ step)

    @property
    def inverse(self) -> Turn:
        """The turn back."""
        at = [self.order.index(axis) for axis in range(3)]
        return Turn(
            (at[0], at[1], at[2]), (self.flips[at[0]], self.flips[at[1]], self.flips[at[2]])
        )


def turn_to(actual: str, trained: str, path: Path) -> Turn | None:
    """Return the turn from axes such as "PSR" to those of training; None where none is needed.

    None is needed where training knew no orientation, and where planes are only mirrored. Raises
    ConditionError for axes that do not run along the body.
    """
    if not trained:
        return None
    if not all(any(code in (t, OPPOSITE[t]) for code in actual) for t in trained):
        raise ConditionError(
            f"expected axes along the body, found {actual} in {path}: correct the mask's affine"
        )
    order = [next(n for n, code in enumerate(actual) if code in (t, OPPOSITE[t])) for t in trained]
    flips = [actual[n] != t for n, t in zip(order, trained, strict=True)]
    if order == [0, 1, 2] and not flips[2]:
        return None
    return Turn((order[0], order[1], order[2]), (flips[0], flips[1], flips[2]))


class TurnedFrames:
    """Frames [x, y] of a volume, written in order and read as planes of a turned volume."""

    def __init__(self, shape: tuple[int, int, int], turn: Turn, dtype: Any) -> None:
        self._shape, self._turn, self._dtype = shape, turn, np.dtype(dtype)
        self._across = turn.order[2]  # the axis of before that becomes the slices
        self._file = tempfile.TemporaryFile(prefix="fvae-turn-")  # noqa: SIM115 - closed by close

    def write(self, frame: Array) -> None:
        """Append the next frame."""
        rows = frame if self._across == 2 else np.moveaxis(frame, self._across, 0)
        self._file.write(np.ascontiguousarray(rows, self._dtype).data)

    def plane(self, index: int) -> Array:
        """Return plane [X, Y] of the turned volume; all frames must have been written."""
        across, (first, second, _) = self._across, self._turn.order
        if self._turn.flips[2]:
            index = self._shape[across] - 1 - index
        if across == 2:
            axes, shape = (0, 1), self._shape[:2]
            plane = self._read(index * math.prod(shape), math.prod(shape)).reshape(shape)
        else:
            other = 1 - across
            count, length = self._shape[2], self._shape[other]
            starts = ((z * self._shape[across] + index) * length for z in range(count))
            axes, plane = (2, other), np.stack([self._read(start, length) for start in starts])
        if axes != (first, second):
            plane = plane.T
        return np.flip(plane, tuple(n for n in (0, 1) if self._turn.flips[n]))

    def _read(self, start: int, count: int) -> Array:
        self._file.seek(start * self._dtype.itemsize)
        return np.frombuffer(self._file.read(count * self._dtype.itemsize), self._dtype)

    def planes(self, start: int = 0) -> Iterator[Array]:
        """Yield all planes from `start` on."""
        for index in range(start, self._shape[self._across]):
            yield self.plane(index)

    def close(self) -> None:
        """Remove the temporary file."""
        self._file.close()


class TurningWriter(Writer):
    """A writer whose frames are turned back before they reach the file; see `Writer`.

    `shape` is that of the frames it gets, `turn` leads from them to the file.
    """

    def __init__(self, inner: Writer, shape: tuple[int, int, int], turn: Turn) -> None:
        self.path = inner.path
        self._inner, self._shape, self._turn = inner, shape, turn
        self._frames: TurnedFrames | None = None

    def write(self, frames: HuFrames) -> None:
        """Append frames [t, X, Y] in HU, int16 or float32."""
        if self._frames is None:
            self._frames = TurnedFrames(self._shape, self._turn, frames.dtype)
        for frame in frames:
            self._frames.write(frame)

    def commit(self) -> None:
        """Write the file in its own order and give it its name."""
        if self._frames is not None:
            for plane in self._frames.planes():
                self._inner.write(np.ascontiguousarray(plane)[None])
            self._frames.close()
        self._inner.commit()

    def abort(self) -> None:
        """Remove the partial output."""
        if self._frames is not None:
            self._frames.close()
        self._inner.abort()
