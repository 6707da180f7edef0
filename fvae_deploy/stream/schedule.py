"""Which slices and latent frames meet in which step, as pure integer arithmetic.

A stream is a first step of one slice and further steps of `4k` slices, `k` latent frames:

    causal, 14 slices, k = 1      | 0 | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 . . . |
    latent frames                 | 0 |    1    |    2    |      3     |     4    |

Missing slices at the end are the last one repeated; what they decode to is cropped. The
`windows` protocol starts anew every 65 slices and pads the last window to 17 latent frames. A
network without causal state takes each window as one first step.

Since the network's memory is finite (`context` latent frames), a stream may also be entered
in the middle: `enter` says how far to back up so that what follows is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Rhythm(Protocol):
    """What of a network's geometry concerns the order of slices; see the manifest's."""

    @property
    def temporal(self) -> int:
        """Slices of a latent frame."""

    @property
    def window(self) -> int:
        """Slices of a window."""

    @property
    def first_slices(self) -> int:
        """Slices of the first step."""

    @property
    def first_frames(self) -> int:
        """Latent frames of the first step."""

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols that the network can follow."""


@dataclass(frozen=True)
class Step:
    """One run of a `first` or `step` part.

    `slices` and `latents` are half-open ranges of what is really there; the part itself takes
    `depth` slices and gives `frames` latent frames.
    """

    first: bool
    slices: tuple[int, int]
    latents: tuple[int, int]
    depth: int
    frames: int


def steps(slices: int, protocol: str, k: int, geometry: Rhythm) -> list[Step]:
    """Plan the whole stream of a volume of `slices` slices.

    `k` latent frames a step; `geometry` says what the first step takes and how many slices
    make a latent frame after it. Raises ValueError for a protocol that this geometry has not,
    or numbers below 1.
    """
    if protocol not in geometry.protocols or slices < 1 or k < 1:
        raise ValueError(f"no such stream: {slices} slices, protocol {protocol}, k = {k}")

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
    """One run over slices [start, stop) that gives `frames` latent frames."""
    head, made, temporal = geometry.first_slices, geometry.first_frames, geometry.temporal
    begin = min(start + head, stop)
    planned = [Step(True, (start, begin), (latent, latent + made), head, made)]
    for done in range(made, frames, k):
        begin = min(start + head + temporal * (done - made), stop)
        end = min(begin + temporal * k, stop)
        last = min(done + k, frames)
        planned.append(Step(False, (begin, end), (latent + done, latent + last), temporal * k, k))
    return planned


def latent_frames(planned: list[Step]) -> int:
    """Latent frames that a stream gives."""
    return planned[-1].latents[1]


def enter(planned: list[Step], target: int, context: int) -> int:
    """Index of the step at which to start so that step `target` comes out exact.

    Backs up over `context` latent frames, or to the first step of the run, where the true
    state is known.
    """
    index = target
    while not planned[index].first:
        if planned[target].latents[0] - planned[index].latents[0] >= context:
            break
        index -= 1
    return index
