r"""Long volumes from a network that sees a window of latent frames.

`joint` (the default) denoises overlapping windows together: at every step the predictions for
a frame are averaged over the windows that hold it, so all of them draw the same volume and no
window ends anywhere.

    frames     0         8         16        24        32
    window 0   ################\\
    window 1             //########\\
    window 2                       //##########            the last one ends with the volume

The weight rises from 0 at a window's first frame: in training that frame began a volume and
coded one slice, in the middle of a causal stream it codes four.

`chained` is the published way: windows one after the other, each later one held at its first
frame to the last frame of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.sampler import Sampler

Array = NDArray[np.float32]
Predict = Callable[[Array, int, int], Array]  # x of a window, where it is, time -> prediction
Noise = Callable[..., Array]  # what it is for, as whole numbers -> unit noise
Journal = Callable[[str, Callable[[], Array]], Array]  # what was computed under a name before


def starts(frames: int, window: int) -> list[int]:
    """First frames of windows that overlap by half; the last one ends with the volume."""
    if frames < window:
        raise ValueError(f"expected at least {window} frames, found {frames}")
    stride = max(1, window // 2)
    found = list(range(0, frames - window, stride))
    return [*found, frames - window]


def weights(start: int, frames: int, window: int) -> Array:
    """Weight of each frame of a window: it falls to both sides, but not to the volume's ends."""
    index = np.arange(window, dtype=np.float32)
    rising = index if start else np.full(window, window, np.float32)
    falling = window - index if start + window < frames else np.full(window, window, np.float32)
    return np.minimum(rising, falling)


def joint(
    predict: Predict,
    sampler: Sampler,
    noise: Noise,
    shape: tuple[int, ...],
    window: int,
    journal: Journal,
) -> Array:
    """Denoise a latent volume of this shape [T, D, h, w], T at least the window.

    Memory is that of a few latent volumes, whatever the image.
    """
    frames = shape[0]
    windows = starts(frames, window)
    x = sampler.start(noise(0))

    def merged(x: Array, t: int) -> Array:
        total = np.zeros(shape, np.float32)
        weight = np.zeros((frames, 1, 1, 1), np.float32)
        for start in windows:
            cut = slice(start, start + window)
            share = weights(start, frames, window)[:, None, None, None]
            total[cut] += share * predict(x[cut], start, t)
            weight[cut] += share
        return total / weight

    for index, t in enumerate(sampler.timesteps):
        prediction = journal(f"step{index}", partial(merged, x, t))
        x = sampler.step(index, prediction, x, noise(1 + index) if sampler.eta else None)
    return x


def chained(
    predict: Predict,
    sampler: Callable[[], Sampler],
    noise: Noise,
    windows: int,
    journal: Journal,
) -> Iterator[Array]:
    """Denoise windows one after the other, as published; yields [T, D, h, w].

    After every step the last frame of the window before is written over the first, noised.
    The published code takes the noise level from the number of the step, counted from the
    end, where it means the step's time: the frame is almost clean throughout. That is kept.
    """
    before: Array | None = None
    for number in range(windows):
        way = sampler()
        steps = len(way.timesteps)
        levels = [way.signal(-1), *(way.signal(n) for n in reversed(range(steps)))]
        x = _held(way.start(noise(number, 0)), before, levels[0], noise(number, 0, 0))
        for index, t in enumerate(way.timesteps, start=1):
            name = f"window{number}-step{index - 1}"
            prediction = journal(name, partial(predict, x, number, t))
            x = way.step(index - 1, prediction, x, noise(number, index) if way.eta else None)
            x = _held(x, before, levels[index], noise(number, index, 0))
        before = x[-1].copy()
        yield x


def _held(x: Array, before: Array | None, level: float, noise: Array) -> Array:
    """Write the last frame of the window before over the first one, noised to this level."""
    if before is None:
        return x
    first = np.float32(level**0.5) * before + np.float32((1 - level) ** 0.5) * noise[0]
    return np.concatenate([first[None], x[1:]])


@dataclass(frozen=True)
class Piece:
    """A window of the published order: its first slice, and the slices that are taken of it."""

    start: int
    taken: range


def pieces(first: int, total: int, window: int) -> list[Piece]:
    """Windows in order over slices [first, total); the last one ends with the volume.

    A volume shorter than a window is one that goes on beyond its end.
    """
    count = max(1, -(-(total - first) // window))
    found = []
    for number in range(count):
        begin = first + number * window
        end = min(begin + window, total)
        start = max(first, total - window) if number == count - 1 else begin
        found.append(Piece(start, range(begin, end)))
    return found


def replaced(windows: int, total: int, temporal: int, frames: int, shift: int) -> list[range]:
    """List the slices that the published second pass replaces: 16 on each side of a boundary.

    The published code puts the boundary between windows after 64 i + 1 slices, where its
    windows meet after 65 i; that is kept. What would reach beyond the second pass is left.
    """
    side = 4 * temporal
    found = []
    for number in range(1, windows):
        boundary = number * temporal * (frames - 1) + 1
        cut = range(max(0, boundary - side), min(boundary + side, total))
        if cut.start >= shift:
            found.append(cut)
    return found
