r"""Long volumes from a network that sees only a window of latent frames.

`joint` (the default) denoises overlapping windows together: at every step the predictions for
a frame are averaged over all windows that contain it. So all windows draw the same volume, and
there are no seams.

    frames     0         8         16        24        32
    window 0   ################\\
    window 1             //########\\
    window 2                       //##########            the last one ends with the volume

A window's weight rises from 0 at its first frame: in training that frame began a volume and
coded one slice, but in the middle of a causal stream it codes four.

`chained` is the published method: windows one after the other, each one starting from the last
frame of the window before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.sampler import Sampler

Array = NDArray[np.float32]
Predict = Callable[[Array, int, int], Array]  # x of a window, its place, time -> prediction
Noise = Callable[..., Array]  # whole numbers that identify the use -> unit noise
# Returns the array stored under this name, or computes and stores it.
Journal = Callable[[str, Callable[[], Array]], Array]


def starts(frames: int, window: int) -> list[int]:
    """Return the first frames of windows that overlap by half and end with the volume."""
    if frames < window:
        raise ValueError(f"expected at least {window} frames, found {frames}")
    stride = max(1, window // 2)
    return [*range(0, frames - window, stride), frames - window]


def weights(start: int, frames: int, window: int) -> Array:
    """Return the weight of each frame in a window: it falls to both sides, except at volume ends.

    `start` is the window's first frame in a volume of `frames` frames.
    """
    index = np.arange(window, dtype=np.float32)
    rising = index if start else np.full(window, window, np.float32)
    falling = window - index if start + window < frames else np.full(window, window, np.float32)
    return np.minimum(rising, falling)


@dataclass(frozen=True)
class Block:
    """Latent frames [start, stop) of a volume of `frames`, and the first frames of its windows."""

    start: int
    stop: int
    frames: int
    windows: tuple[int, ...]


def whole_block(frames: int, window: int) -> Block:
    """Return all frames of a volume with all windows."""
    return Block(0, frames, frames, tuple(starts(frames, window)))


def blocks(changed: Collection[int], frames: int, window: int) -> list[Block]:
    """Return the runs of overlapping windows that contain changed frames.

    What is known of a window without changed frames does not depend on it, so leaving it out
    changes nothing.
    """
    found: list[Block] = []
    for start in starts(frames, window):
        if not any(start <= frame < start + window for frame in changed):
            continue
        if found and start < found[-1].stop:
            last = found.pop()
            found.append(Block(last.start, start + window, frames, (*last.windows, start)))
        else:
            found.append(Block(start, start + window, frames, (start,)))
    return found


@dataclass(frozen=True)
class Known:
    """What a block shows where it is not changed: latents [T, D, h, w], changed [T, 1, h, w]."""

    latents: Array
    changed: NDArray[np.bool_]


def joint(
    predict: Predict,
    sampler: Sampler,
    noise: Noise,
    shape: tuple[int, ...],
    block: Block,
    journal: Journal,
    known: Known | None = None,
) -> Array:
    """Denoise a block of latent frames, of this shape [T, D, h, w], in all its windows.

    Where it is known, every prediction is replaced by the one that leads there: from noise to the
    known latents, by the sampler's own steps. Takes the memory of a few such arrays.
    """
    x = sampler.start(noise(0))
    window = block.stop - block.windows[-1]

    def average(x: Array, t: int) -> Array:
        total = np.zeros(shape, np.float32)
        weight = np.zeros((shape[0], 1, 1, 1), np.float32)
        for start in block.windows:
            inside = slice(start - block.start, start - block.start + window)
            share = weights(start, block.frames, window)[:, None, None, None]
            total[inside] += share * predict(x[inside], start, t)
            weight[inside] += share
        # The first frame of a block has no weight, unless the volume begins there: it is known.
        return np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)

    for index, t in enumerate(sampler.timesteps):
        prediction = journal(f"step{index}", partial(average, x, t))
        if known is not None:
            prediction = np.where(
                known.changed, prediction, sampler.towards(index, known.latents, x)
            )
        x = sampler.step(index, prediction, x, noise(1 + index) if sampler.eta else None)
    return x if known is None else np.where(known.changed, x, known.latents)


def chained(
    predict: Predict,
    sampler: Callable[[], Sampler],
    noise: Noise,
    windows: int,
    journal: Journal,
) -> Iterator[Array]:
    """Denoise windows one after the other, as published; yields [T, D, h, w].

    After every step, the first frame is replaced by the last frame of the window before, with
    noise added. The published code takes the noise level at the step's number, counted from the
    end, instead of the step's time, so this frame is almost free of noise throughout. That quirk
    is kept. The last window ends with the volume and may overlap the one before: then the held
    frame comes from another place than where it is put, as published.

    Noise is drawn in the published order: at the start and after every step that of the window,
    then that of the held frame, whether it is used or not.
    """
    before: Array | None = None
    for number in range(windows):
        run = sampler()
        steps = len(run.timesteps)
        levels = [run.signal(-1), *(run.signal(n) for n in reversed(range(steps)))]
        x = run.start(noise(number, 0))
        x = _replace_first_frame(x, before, levels[0], partial(noise, number, 0, 0))
        for index, t in enumerate(run.timesteps, start=1):
            name = f"window{number}-step{index - 1}"
            prediction = journal(name, partial(predict, x, number, t))
            x = run.step(index - 1, prediction, x, noise(number, index))
            x = _replace_first_frame(x, before, levels[index], partial(noise, number, index, 0))
        before = x[-1].copy()
        yield x


def _replace_first_frame(
    x: Array, before: Array | None, level: float, noise: Callable[[], Array]
) -> Array:
    """Replace the first frame by `before`, noised to this share of signal; no-op for None."""
    if before is None:
        return x
    first = np.float32(level**0.5) * before + np.float32((1 - level) ** 0.5) * noise()[0]
    return np.concatenate([first[None], x[1:]])


@dataclass(frozen=True)
class Piece:
    """A window of the published order: its first slice, and the slices that it contributes."""

    start: int
    taken: range


def pieces(first: int, total: int, window: int) -> list[Piece]:
    """Return windows in order over slices [first, total); the last one ends with the volume.

    A volume shorter than a window gets one window, which extends beyond its end.
    """
    count = max(1, -(-(total - first) // window))
    order = []
    for number in range(count):
        begin = first + number * window
        end = min(begin + window, total)
        start = max(first, total - window) if number == count - 1 else begin
        order.append(Piece(start, range(begin, end)))
    return order


def replaced(windows: int, total: int, temporal: int, frames: int, shift: int) -> list[range]:
    """Return the slices that the published second pass replaces: 16 on each side of a boundary.

    The published code places the boundary between windows after 64 i + 1 slices, although its
    windows meet after 65 i; that is kept. A range that begins before the second pass does (at
    slice `shift`) is left out.
    """
    side = 4 * temporal
    ranges = []
    for number in range(1, windows):
        boundary = number * temporal * (frames - 1) + 1
        around = range(max(0, boundary - side), min(boundary + side, total))
        if around.start >= shift:
            ranges.append(around)
    return ranges
