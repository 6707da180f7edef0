"""What storing latents in fewer bits adds to the error, measured on slices in the middle of a run.

    steps to encode      | . . . . . . | entry ....... | sample |  . . . . |
    kept as computed                   |    latents    |
    decoded twice, at the end          | warming up    | compared in HU

The cost is bounded: the decoder runs over its own context and a few slices, twice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.storage.latents import LatentWriter
from fvae_deploy.stream.arrays import LatentFrames
from fvae_deploy.stream.checked import base_of
from fvae_deploy.stream.codec import pad_frames
from fvae_deploy.stream.run import Run
from fvae_deploy.stream.schedule import Step

SLICES = 8  # to compare, at least, if the volume has as many


@dataclass(frozen=True)
class AddedError:
    """Differences in HU between slices decoded from latents as computed and as stored."""

    mean: float
    largest: float
    slices: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the numbers, JSON-ready."""
        return {"mean_hu": self.mean, "max_hu": self.largest, "slices": self.slices}


class Sample:
    """Keeps latents of some steps as they were computed, for `measure`.

    `run` is a decode of the volume that is being encoded, in the steps `encoded`.
    """

    def __init__(self, run: Run, encoded: Sequence[Step]) -> None:
        self._run, self._kept = run, dict[tuple[int, int], LatentFrames]()  # by their frames
        self._first, self._steps = 0, range(0)
        begin = encoded[0].latents[0] if encoded else math.inf
        left = [i for i, step in enumerate(run.steps) if step.latents[0] >= begin]
        shown = [i for i in left if run.steps[i].decoded[0] < run.steps[i].decoded[1]]
        if not shown:
            return
        self._first = shown[len(shown) // 2]
        entry = max(run.entry(self._first, "decode"), left[0])
        end = run.steps[self._first].decoded[0] + SLICES
        stop = next((i for i in shown if run.steps[i].decoded[1] >= end), shown[-1])
        self._steps = range(entry, stop + 1)

    def keep(self, step: Step, z: LatentFrames) -> None:
        """Take the latents of a step as they were computed."""
        if any(self._run.steps[i].latents == step.latents for i in self._steps):
            self._kept[step.latents] = z[:, : step.latents[1] - step.latents[0]].copy()

    def measure(self, writer: LatentWriter) -> AddedError | None:
        """Decode the sample as computed and as stored; None if this run computed nothing."""
        if not self._kept:
            return None
        computed = self._decode(self._kept)
        stored = self._decode({at: writer.as_stored(z) for at, z in self._kept.items()})
        difference = np.abs(computed - stored)
        if not difference.size:
            return None
        return AddedError(float(difference.mean()), float(difference.max()), len(difference))

    def _decode(self, latents: dict[tuple[int, int], LatentFrames]) -> NDArray[np.float32]:
        with contextlib.closing(self._run.stream("decode")) as stream:
            frames = []
            none = next(iter(latents.values()))[:, :0]
            for index in self._steps:
                step = self._run.steps[index]
                z = pad_frames(latents.get(step.latents, none), step.frames)
                decoded = stream.run(z, step.first, step.clock)
                if index >= self._first:
                    frames.append(base_of(self._run, step, decoded))
        return np.concatenate(frames)
