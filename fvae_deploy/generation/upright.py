"""Frames of a volume with slices along the body as in training, turned through a file if needed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.turning import Turn, TurnedFrames

Array = NDArray[Any]
Frames = Callable[[int], Generator[Array]]  # first slice -> frames [x, y] from there on


class Upright:
    """The frames of a volume of this shape in the order that `turn` leads to; None: in its own."""

    def __init__(
        self, frames: Frames, shape: tuple[int, int, int], turn: Turn | None, dtype: Any
    ) -> None:
        self._frames, self._shape, self._turn = frames, shape, turn
        self._dtype = np.dtype(dtype)
        self._turned: TurnedFrames | None = None

    def planes(self, start: int = 0) -> Generator[Array]:
        """Yield the planes from `start` on."""
        if self._turn is None:
            with contextlib.closing(self._frames(start)) as frames:
                yield from frames
            return
        if self._turned is None:
            turned = TurnedFrames(self._shape, self._turn, self._dtype)
            try:
                with contextlib.closing(self._frames(0)) as frames:
                    for frame in frames:
                        turned.write(frame)
            except BaseException:
                turned.close()
                raise
            self._turned = turned
        yield from self._turned.planes(start)

    def close(self) -> None:
        """Remove the turned frames."""
        if self._turned is not None:
            self._turned.close()
            self._turned = None
