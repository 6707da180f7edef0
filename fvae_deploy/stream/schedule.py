"""Assigns slices and latent frames to steps, in pure integer arithmetic.

A stream has a first step of one slice, then steps of `4k` slices, which are `k` latent frames:

    causal, 14 slices, k = 1      | 0 | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 . . . |
    latent frames                 | 0 |    1    |    2    |      3     |     4    |

At the end, the last slice is repeated in place of missing slices; what they decode to is cropped.
The `windows` protocol restarts every 65 slices and pads the last window to 17 latent frames. A
network without causal state processes each window as one first step.

The network remembers only `context` latent frames, so a stream may also start in the middle:
`enter` returns the step to start at so that the step of interest is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Rhythm(Protocol):
    """The part of a network's geometry that the schedule needs; see `manifest.Geometry`."""

    @property
    def temporal(self) -> int:
        """Slices per latent frame."""

    @property
    def window(self) -> int:
        """Slices per window."""

    @property
    def first_slices(self) -> int:
        """Slices in the first step."""

    @property
    def first_frames(self) -> int:
        """Latent frames in the first step."""

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that the network supports."""


@dataclass(frozen=True)
class Step:
    """One run of a `first` or `step` part.

    `slices` and `latents` are half-open ranges of existing slices and latent frames. The part
    itself takes `depth` slices and `frames` latent frames, padding included.
    """

    first: bool
    slices: tuple[int, int]
    latents: tuple[int, int]
    depth: int
    frames: int


def steps(slices: int, protocol: str, k: int, geometry: Rhythm) -> list[Step]:
    """Plan the whole stream of a volume of `slices` slices.

    `k` is the number of latent frames per step. `geometry` gives the size of the first step and
    the slices per latent frame after it. Raises ValueError for a protocol that this geometry
    does not support, or numbers below 1.
    """
    if protocol not in geometry.protocols or slices < 1 or k < 1:
        raise ValueError(
            f"expected protocol {' or '.join(geometry.protocols)}, slices and k from 1 on, "
            f"found {protocol}, {slices} and {k}"
        )

    def frames(count: int) -> int:
        rest = max(0, count - geometry.first_slices)
        return geometry.first_frames + -(-rest // geometry.temporal)

    if protocol == "causal":
        return _run(0, slices, 0, frames(slices), k, geometry)
    planned: list[Step] = []
    whole = frames(geometry.window)
    for number, start in enumerate(range(0, slices, geometry.window)):
        stop = min(start + geometry.window, slices)
        planned += _run(start, stop, number * whole, whole, k, geometry)
    return planned


def _run(start: int, stop: int, latent: int, frames: int, k: int, geometry: Rhythm) -> list[Step]:
    """Return the steps of one run over slices [start, stop), which has `frames` latent frames."""
    depth, head, temporal = geometry.first_slices, geometry.first_frames, geometry.temporal
    begin = min(start + depth, stop)
    planned = [Step(True, (start, begin), (latent, latent + head), depth, head)]
    for done in range(head, frames, k):
        begin = min(start + depth + temporal * (done - head), stop)
        end = min(begin + temporal * k, stop)
        last = min(done + k, frames)
        planned.append(Step(False, (begin, end), (latent + done, latent + last), temporal * k, k))
    return planned


def latent_frames(planned: list[Step]) -> int:
    """Return the number of latent frames of a stream."""
    return planned[-1].latents[1]


def enter(planned: list[Step], target: int, context: int) -> int:
    """Return the index of the step to start at so that step `target` is exact.

    It lies at least `context` latent frames earlier, or is the first step of the run, which needs
    no earlier state.
    """
    index = target
    while not planned[index].first:
        if planned[target].latents[0] - planned[index].latents[0] >= context:
            break
        index -= 1
    return index
