"""Long volumes as the published generator makes them: two passes of chained windows.

See `stitch.chained` for one pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import PlanError
from fvae_deploy.generation.request import KIND, Request, normal, stored
from fvae_deploy.generation.stitch import Journal, Piece, chained, pieces, replaced
from fvae_deploy.parse import show_bytes
from fvae_deploy.stream.codec import pad_frames
from fvae_deploy.stream.intensity import ClippingTally, to_hu, to_int16, to_model
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.plan import Plan, plan
from fvae_deploy.stream.run import Outcome
from fvae_deploy.stream.tiles import Grid
from fvae_deploy.volume.open import create_volume

Array = NDArray[np.float32]
SHIFT = 32  # first slice of the second pass


def window_plan(request: Request, options: RunOptions) -> Plan:
    """Plan the tiles of one window; raises PlanError where its states do not fit in memory."""
    vae, engine = request.codec.manifest, request.codec.engine
    across, down, _ = request.mask.geometry.shape
    chosen = plan(
        vae,
        ("encode", "decode"),
        (across // vae.geometry.spatial, down // vae.geometry.spatial),
        engine=engine.name,
        precision=engine.precision,
        memory=options.memory_bytes,
        k=1,
    )
    if chosen.spilled:
        raise PlanError(
            "expected memory for the states of one window with --stitch reference, found "
            f"{show_bytes(chosen.budget_bytes)}: raise --memory, or use --stitch joint"
        )
    return chosen


def passes_of(request: Request) -> list[list[Piece]]:
    """Return the windows of the first pass, and of the second one if there are boundaries."""
    total, window = request.mask.geometry.shape[2], request.window_slices
    first = pieces(0, total, window)
    return [first, pieces(SHIFT, total, window)] if len(first) > 1 else [first]


def as_published(request: Request, journal: Journal, output: Path, options: RunOptions) -> Outcome:
    """Chain windows, twice, and put the second pass over the boundaries of the first.

    Raises PlanError where the memory budget does not hold the states of a window.
    """
    vae = request.codec.manifest
    across, down, total = request.mask.geometry.shape
    chosen = window_plan(request, options)
    orders = passes_of(request)
    tick = request.progress("denoise", sum(map(len, orders)) * request.steps)
    frames = request.denoiser.manifest.window
    over = replaced(len(orders[0]), total, vae.geometry.temporal, frames, SHIFT)
    passes = [
        _pass(request, journal, number, orders, chosen.grids, tick) for number in range(len(orders))
    ]
    slices = request.mask.mask.shape[2]
    parts = request.sampling.as_published
    begin = time.perf_counter()
    volume = create_volume(output, request.mask.written, options.dtype, request.note, KIND)
    with request.wrap(volume) as writer:
        for index in range(slices):
            source = passes[1] if any(index in cut for cut in over) else passes[0]
            _, frame = next(each for each in source if each[0] == index)
            hu = to_hu(frame[:, None], vae.intensity, across, down, clamp_first="clamp" in parts)
            hu = request.mask.result(hu)
            int16 = options.dtype == "int16"
            writer.write(to_int16(hu, truncate="truncate" in parts) if int16 else hu)
    seconds = {"denoise": time.perf_counter() - begin}
    shape = request.mask.written.shape
    return Outcome(chosen, options, shape, slices, 0, ClippingTally(), seconds)


def _pass(
    request: Request,
    journal: Journal,
    number: int,
    orders: list[list[Piece]],
    grids: Mapping[str, Grid],
    tick: Callable[[int], None],
) -> Iterator[tuple[int, Array]]:
    """Yield every slice of a pass with its number: [C, H, W] in the model's range."""
    order, window = orders[number], request.window_slices
    manifest, vae = request.denoiser.manifest, request.codec.manifest
    across, down, _ = request.mask.geometry.shape

    @lru_cache(maxsize=1)  # every step of a window reads the same mask
    def mask_at(place: int) -> Array:
        start = order[place].start
        if request.mask.stretched:
            painted = request.mask.in_range(vae.intensity, window, start)
        else:
            slab = next(request.mask.slabs(window, start=start))
            painted = to_model(slab, vae.intensity, across, down, ClippingTally())
        x = pad_frames(painted, window)
        z = request.codec.encode(np.repeat(x, vae.geometry.channels, axis=0), grids=grids)
        return normal(z, manifest.mask)

    shape = mask_at(0).shape
    predict = request.predictor(mask_at, tick)

    def recorded(name: str, compute: Callable[[], Array]) -> Array:
        return journal(f"pass{number}-{name}", compute)

    noise = request.noise(shape, 1 + number, len(orders[0]) if number else 0)
    windows = chained(predict, request.sampler, noise, len(order), recorded)
    for piece, x in zip(order, windows, strict=True):
        frames = request.codec.decode(stored(x, manifest.latent), grids=grids)
        for index in piece.taken:
            yield index, frames[:, index - piece.start]
