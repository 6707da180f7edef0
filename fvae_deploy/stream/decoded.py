"""Decoded steps on their way into a volume: to HU, cut to what is wanted, kept, written.

    with a journal, stopped    | 0 | 1 | 2 | 3 |          to the writer and to OUT.partial
    gone on with               | 0   1   2   3 | 4 | 5 |  what is there to the writer at once

The journal's facts say whether what is there is of this very run: `Run.facts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.storage.journal import Journal
from fvae_deploy.stream.schedule import Step
from fvae_deploy.volume.base import Writer

Frames = NDArray[np.floating[Any]]


class Decoded:
    """Takes the steps `begin` to `stop` in their order and writes their slices within [a, b).

    `frames` makes HU [t, x, y] of a decoded step [C, t, H, W]. With a journal the slabs of the
    steps before `first` are there already.
    """

    def __init__(
        self,
        writer: Writer,
        steps: Sequence[Step],
        wanted: tuple[int, int],
        frames: Callable[[Frames], Frames],
        journal: Journal | None = None,
    ) -> None:
        self._writer, self._steps, self._wanted = writer, steps, wanted
        self._frames, self._journal = frames, journal
        target = next(i for i, s in enumerate(steps) if s.slices[1] > wanted[0])
        self.stop = next(i for i, s in enumerate(steps) if s.slices[1] >= wanted[1]) + 1
        self.first = self._take_up(target)
        self.begin = min(self.first, self.stop - 1)  # where to decode from: a step at least
        taken = steps[self.first - 1].slices[1] if self.first > target else wanted[0]
        self.kept = min(taken, wanted[1]) - wanted[0]  # slices

    def _take_up(self, index: int) -> int:
        """Write what a stopped run kept; returns the first step that it lacks."""
        while self._journal and index < self.stop:
            slab = self._journal.found(_name(index))
            if slab is None:
                break
            self._writer.write(slab)
            index += 1
        return index

    def __call__(self, item: tuple[int, Frames]) -> None:
        """Take the next step, and its number."""
        index, x = item
        step, (a, b) = self._steps[index], self._wanted
        start, stop = max(step.slices[0], a), min(step.slices[1], b)
        hu = self._frames(x[:, start - step.slices[0] : stop - step.slices[0]])
        if self._journal:
            self._journal.keep(_name(index), hu)
        self._writer.write(hu)

    def slices(self, index: int) -> int:
        """Count the slices that a step adds."""
        (start, stop), (a, b) = self._steps[index].slices, self._wanted
        return min(stop, b) - max(start, a)


def _name(index: int) -> str:
    return f"step{index}"
