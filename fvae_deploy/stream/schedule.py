"""Assigns slices and latent frames to steps, in pure integer arithmetic.

A stream has a first step of one slice, then steps of `4k` slices, which are `k` latent frames:

    causal, 14 slices, k = 1      | 0 | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 . . . |
    latent frames                 | 0 |    1    |    2    |      3     |     4    |

At the end, the last slice is repeated in place of missing slices; what they decode to is cropped.
The `windows` protocol restarts every 65 slices and pads the last window to 17 latent frames. A
network without causal state processes each window as one first step.

The network remembers only `context` latent frames, so a stream may also start in the middle:
`enter` returns the step to start at so that the step of interest is exact.

A decoder that looks ahead returns slices late, by `lag` of them, since it must have seen the latent
frames after them. `decoding` adds steps without latent frames at the end of every run, in which the
decoder returns the rest:

    14 slices, a lag of 7    step     | 0 | 1 |  2  |   3   |    4    |  5   |
    latent frames                     | 0 | 1 |  2  |   3   |    4    |      |
    decoded slices                    |   | 0 | 1-4 |  5-8  |  9-12   |  13  |
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    itself takes `depth` slices and `frames` latent frames, padding included. The decoder returns
    the slices `decoded`, after `skipped` frames that are to be discarded. `clock` counts the steps
    since the first of the run, and since the one with its last latent frame (below 0 before it).
    """

    first: bool
    slices: tuple[int, int]
    latents: tuple[int, int]
    depth: int
    frames: int
    decoded: tuple[int, int]
    skipped: int = 0
    clock: tuple[int, int] = (0, 0)

    @property
    def shown(self) -> slice:
        """The frames of the decoder's result that are the slices `decoded`."""
        return slice(self.skipped, self.skipped + self.decoded[1] - self.decoded[0])


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
    slices = start, begin
    planned = [Step(True, slices, (latent, latent + head), depth, head, slices)]
    for done in range(head, frames, k):
        begin = min(start + depth + temporal * (done - head), stop)
        end = min(begin + temporal * k, stop)
        latents = latent + done, latent + min(done + k, frames)
        planned.append(Step(False, (begin, end), latents, temporal * k, k, (begin, end)))
    return planned


def decoding(planned: list[Step], temporal: int, lag: int) -> list[Step]:
    """Return the steps of a decoder whose slices come `lag` late, of one latent frame each.

    `temporal` are the slices that it returns in each step. Without a lag the steps are unchanged.
    """
    if not lag:
        return planned
    firsts = [index for index, step in enumerate(planned) if step.first]
    found: list[Step] = []
    for begin, end in zip(firsts, [*firsts[1:], len(planned)], strict=True):
        found += _late(planned[begin:end], temporal, lag)
    return found


def _late(run: list[Step], temporal: int, lag: int) -> Iterator[Step]:
    """Yield the steps of one run, and those that follow until its last slice is decoded."""
    start, stop, frames = run[0].slices[0], run[-1].slices[1], len(run)
    end = replace(run[-1], first=False, slices=(stop, stop), latents=(run[-1].latents[1],) * 2)
    for number in range(max(frames, (stop - start - 1 + lag) // temporal + 1)):
        step = run[number] if number < frames else end
        low = start + number * temporal - lag
        a, b = (min(max(n, start), stop) for n in (low, low + temporal))
        clock = number, number - (frames - 1)
        skipped = a - low if a < b else 0
        yield replace(step, decoded=(a, b), skipped=skipped, clock=clock)


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
