"""Progress within a step: a window in segments may take an hour, and counts as it goes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fvae_deploy.stream.pieces import Pieces


class StepProgress:
    """Tells how many slices are done, also while a step runs in segments.

    A step is as far as its multiply-adds are done; `tick` is called with whole slices.
    """

    def __init__(self, tick: Callable[[int], None], pieces: Mapping[str, Pieces]) -> None:
        self._tick = tick
        total = sum(way.mac for way in pieces.values())
        self._weights = {stage: way.mac / total for stage, way in pieces.items()}
        self._slices = self._told = 0
        self._done = 0.0

    def begin(self, slices: int) -> None:
        """Begin a step that finishes so many slices."""
        self._slices, self._told, self._done = slices, 0, 0.0

    def add(self, stage: str, share: float) -> None:
        """Add a share of a stage's work in this step."""
        self._done += self._weights[stage] * share
        self._tell(min(int(self._slices * self._done), self._slices - 1))

    def end(self) -> None:
        """End the step."""
        self._tell(self._slices)

    def _tell(self, slices: int) -> None:
        if slices > self._told:
            self._tick(slices - self._told)
            self._told = slices
