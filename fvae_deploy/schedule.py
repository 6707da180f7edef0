"""Which slices and latent frames meet in which step, as pure integer arithmetic.

A stream is a first step of one slice and further steps of `4k` slices, `k` latent frames:

    causal, 14 slices, k = 1      | 0 | 1 2 3 4 | 5 6 7 8 | 9 10 11 12 | 13 . . . |
    latent frames                 | 0 |    1    |    2    |      3     |     4    |

Missing slices at the end are the last one repeated; what they decode to is cropped. The
`windows` protocol starts anew every 65 slices and pads the last window to 17 latent frames.

Since the network's memory is finite (`context` latent frames), a stream may also be entered
in the middle: `enter` says how far to back up so that what follows is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

PROTOCOLS = ("causal", "windows")


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


def steps(slices: int, protocol: str, k: int, temporal: int = 4, window: int = 65) -> list[Step]:
    """Plan the whole stream of a volume of `slices` slices.

    `k` latent frames a step; `temporal` slices a latent frame. Raises ValueError for an
    unknown protocol or numbers below 1.
    """
    if protocol not in PROTOCOLS or slices < 1 or k < 1:
        raise ValueError(f"no such stream: {slices} slices, protocol {protocol}, k = {k}")
    if protocol == "causal":
        return _run(0, slices, 0, 1 + -(-(slices - 1) // temporal), k, temporal)
    frames = 1 + (window - 1) // temporal
    planned: list[Step] = []
    for number, start in enumerate(range(0, slices, window)):
        stop = min(start + window, slices)
        planned += _run(start, stop, number * frames, frames, k, temporal)
    return planned


def _run(start: int, stop: int, latent: int, frames: int, k: int, temporal: int) -> list[Step]:
    """One causal run over slices [start, stop) that gives `frames` latent frames."""
    planned = [Step(True, (start, start + 1), (latent, latent + 1), 1, 1)]
    for done in range(1, frames, k):
        begin = min(start + 1 + temporal * (done - 1), stop)
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
