"""What storing latents in fewer bits adds to the error, measured on slices in the middle of a run.

    steps to encode      | . . . . . . | entry ....... | sample |  . . . . |
    kept as computed                   |    latents    |
    decoded twice, at the end          | warming up    | compared in HU

The cost is bounded: the decoder runs over its own context and a few slices, twice.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.storage.latents import LatentWriter
from fvae_deploy.stream.arrays import LatentFrames
from fvae_deploy.stream.checked import base_of
from fvae_deploy.stream.codec import pad_frames
from fvae_deploy.stream.run import Run

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

    `run` is a decode of the volume that is being encoded, from step `target` on.
    """

    def __init__(self, run: Run, target: int) -> None:
        self._run, self._kept = run, dict[int, LatentFrames]()
        self._first, self._steps = target, range(0)
        if target == len(run.steps):
            return
        first = (target + len(run.steps)) // 2
        entry = max(run.entry(first, "decode"), target)
        end = run.steps[first].slices[0] + SLICES
        stop = next((i for i, s in enumerate(run.steps) if s.slices[1] >= end), len(run.steps) - 1)
        self._first, self._steps = first, range(entry, stop + 1)

    def keep(self, index: int, z: LatentFrames) -> None:
        """Take the latents of a step as they were computed."""
        if index in self._steps:
            start, stop = self._run.steps[index].latents
            self._kept[index] = z[:, : stop - start].copy()

    def measure(self, writer: LatentWriter) -> AddedError | None:
        """Decode the sample as computed and as stored; None if this run computed nothing."""
        if not self._steps:
            return None
        computed = self._decode(self._kept)
        stored = self._decode({i: writer.as_stored(z) for i, z in self._kept.items()})
        difference = np.abs(computed - stored)
        if not difference.size:
            return None
        return AddedError(float(difference.mean()), float(difference.max()), len(difference))

    def _decode(self, latents: dict[int, LatentFrames]) -> NDArray[np.float32]:
        with contextlib.closing(self._run.stream("decode")) as stream:
            frames = []
            for index in self._steps:
                step = self._run.steps[index]
                decoded = stream.run(pad_frames(latents[index], step.frames), step.first)
                if index >= self._first:
                    frames.append(base_of(self._run, step, decoded))
        return np.concatenate(frames)
