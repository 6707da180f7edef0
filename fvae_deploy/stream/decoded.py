"""Writes decoded steps into a volume: converts them to HU, crops, journals and writes them.

    interrupted    | 0 | 1 | 2 | 3 |          to the writer and to OUTPUT.partial
    resumed        | 0   1   2   3 | 4 | 5 |  journalled steps go to the writer at once

The journal's facts (`Run.facts`) make sure that its steps belong to the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fvae_deploy.storage.journal import Journal
from fvae_deploy.stream.arrays import ModelFrames
from fvae_deploy.stream.schedule import Step
from fvae_deploy.volume.base import HuFrames, Writer


class DecodedSlices:
    """Receives the steps `begin` to `stop` in order and writes their slices within [a, b).

    `to_hu` converts a step's decoded frames [C, t, H, W] to HU [t, x, y], padding left out. The
    journal already contains the slabs of the steps before `first`.
    """

    def __init__(
        self,
        writer: Writer,
        steps: Sequence[Step],
        wanted: tuple[int, int],
        to_hu: Callable[[Step, ModelFrames], HuFrames],
        journal: Journal,
    ) -> None:
        self._writer, self._steps, self._wanted = writer, steps, wanted
        self._to_hu, self._journal = to_hu, journal
        target = next(i for i, s in enumerate(steps) if s.decoded[1] > wanted[0])
        self.stop = next(i for i, s in enumerate(steps) if s.decoded[1] >= wanted[1]) + 1
        self.first = self._resume(target)
        self.begin = min(self.first, self.stop - 1)  # where to decode from: at least one step
        end = steps[self.first - 1].decoded[1] if self.first > target else wanted[0]
        self.resumed = min(end, wanted[1]) - wanted[0]  # slices

    @property
    def computed(self) -> int:
        """Number of slices that this run computes."""
        return self._wanted[1] - self._wanted[0] - self.resumed

    def _resume(self, index: int) -> int:
        """Write what an interrupted run journalled; return the first step that is missing."""
        while index < self.stop:
            if self.slices(index):
                slab = self._journal.found(_name(index))
                if slab is None:
                    break
                self._writer.write(slab)
            index += 1
        return index

    def __call__(self, item: tuple[int, ModelFrames]) -> None:
        """Take the next step as (index, frames)."""
        index, x = item
        if not self.slices(index):  # the decoder looks ahead, and has nothing yet
            return
        (begin, end), (a, b) = self._steps[index].decoded, self._wanted
        start, stop = max(begin, a), min(end, b)
        hu = self._to_hu(self._steps[index], x)[start - begin : stop - begin]
        self._journal.keep(_name(index), hu)
        self._writer.write(hu)

    def slices(self, index: int) -> int:
        """Return the number of slices that a step adds."""
        (start, stop), (a, b) = self._steps[index].decoded, self._wanted
        return max(0, min(stop, b) - max(start, a))


def _name(index: int) -> str:
    return f"slab{index}"
