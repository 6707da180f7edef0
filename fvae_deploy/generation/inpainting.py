"""A region of a CT drawn anew: its latents are denoised, all others stay those of the CT.

    CT --encoded--> latents ---------------+--> latents, the region replaced --decoded--> CT
    organs and finding --> mask latents ---+
    text --> context ----------------------+

Only windows with changed frames are denoised, and only their latents are in memory. At every step
the known cells are led along the sampler's own way to the latents of the CT, so the region is drawn
to fit them; at the end they have the CT's bits. Without `keep` everything is decoded. With it, the
CT's own voxels are kept: the decoded change is added to them, which fades over the decoder's reach,
and within the region itself it replaces them. Beyond that reach they are the CT's, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.adding import AddingWriter
from fvae_deploy.generation.changing import Change
from fvae_deploy.generation.coding import encoded
from fvae_deploy.generation.fit import Stretched
from fvae_deploy.generation.labels import frames_of
from fvae_deploy.generation.request import KIND, Request, normal, stored
from fvae_deploy.generation.stitch import Block, Known, blocks, joint
from fvae_deploy.storage.journal import Journal
from fvae_deploy.storage.latents import LatentReader, LatentWriter
from fvae_deploy.stream import pipeline
from fvae_deploy.stream.intensity import to_int16
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.pipeline import Target
from fvae_deploy.stream.run import Outcome
from fvae_deploy.volume.base import Writer
from fvae_deploy.volume.open import create_volume, open_volume

Array = NDArray[np.float32]
COPIED = 16  # latent frames that are copied at once


def inpaint(request: Request, journal: Journal, output: Path, options: RunOptions) -> Outcome:
    """Draw the region of `request.change` anew and write the CT."""
    change, folder = request.change, journal.folder
    assert change is not None
    begin = time.perf_counter()
    ct = encoded(request, change.plane, folder / "ct.zarr", options, ct=True)
    masks = [encoded(request, request.mask, folder / "mask.zarr", options)]
    if request.plain is not None:
        masks.append(encoded(request, request.plain, folder / "plain.zarr", options))
    ready = time.perf_counter()
    latents = _drawn(request, change, ct, masks, journal)
    request.networks.sampled()
    drawn = time.perf_counter()
    if change.keep:
        outcome = _kept(request, change, (ct, latents), folder, output, options)
    else:
        outcome = _decoded(request, latents, journal, output, options)
    seconds = outcome.seconds | {"mask": ready - begin, "denoise": drawn - ready}
    return dataclasses.replace(outcome, shape=request.mask.written.shape, seconds=seconds)


def _drawn(
    request: Request,
    change: Change,
    ct: LatentReader,
    masks: list[LatentReader],
    journal: Journal,
) -> LatentReader:
    """Return the latents of the CT with the region drawn anew, as a store."""
    path = journal.folder / "latents.zarr"
    writer = LatentWriter(path, ct.info, ct.shape)
    try:
        done = 0
        order = blocks(change.region.cells.keys(), ct.shape[1], request.denoiser.manifest.window)
        tick = request.progress("denoise", sum(len(b.windows) for b in order) * request.steps)
        for block in order:
            _copy(ct, writer, done, block.start)
            writer.write(block.start, _block(request, change, block, ct, masks, journal, tick))
            done = block.stop
        _copy(ct, writer, done, ct.shape[1])
        writer.commit()
    finally:
        writer.close()
    return LatentReader(path)


def _block(
    request: Request,
    change: Change,
    block: Block,
    ct: LatentReader,
    masks: list[LatentReader],
    journal: Journal,
    tick: Callable[[int], None],
) -> Array:
    """Denoise one block; returns its latents [D, T, h, w]."""
    manifest = request.denoiser.manifest
    original = ct.read(block.start, block.stop)
    known = Known(normal(original, manifest.latent), change.region.changed(block))
    conditions = [normal(each.read(block.start, block.stop), manifest.mask) for each in masks]

    def inside(start: int) -> slice:
        return slice(start - block.start, start - block.start + manifest.window)

    predict = request.predictor(
        lambda start: conditions[0][inside(start)],
        tick,
        (lambda start: conditions[1][inside(start)]) if conditions[1:] else None,
    )
    shape = known.latents.shape
    x = joint(
        predict,
        request.sampler(),
        request.noise(shape, block.start),
        shape,
        block,
        lambda name, compute: journal.kept(f"block{block.start}-{name}", compute),
        known,
    )
    return np.where(known.changed.transpose(1, 0, 2, 3), stored(x, manifest.latent), original)


def _copy(source: LatentReader, target: LatentWriter, start: int, stop: int) -> None:
    for first in range(start, stop, COPIED):
        target.write(first, source.read(first, min(first + COPIED, stop)))


def _decoded(
    request: Request, latents: LatentReader, journal: Journal, output: Path, options: RunOptions
) -> Outcome:
    """Decode all latents into the output."""
    slices, parts = request.mask.mask.shape[2], request.sampling.as_published
    return pipeline.decode(
        request.codec,
        latents,
        output,
        dataclasses.replace(options, rounding="truncate") if "truncate" in parts else options,
        (0, slices),
        request.progress("decode", slices),
        Target(
            request.mask.written,
            request.mask.result,
            request.note,
            KIND,
            clamp_first="clamp" in parts,
            wrap=lambda writer: _wrapped(request, writer),
        ),
        journal,
    )


def _kept(
    request: Request,
    change: Change,
    stores: tuple[LatentReader, LatentReader],
    folder: Path,
    output: Path,
    options: RunOptions,
) -> Outcome:
    """Put the decoded change into the CT's own voxels; `stores` are its latents before and after.

    Only slices in which the change can be seen are decoded.
    """
    total, parts = request.mask.mask.shape[2], request.sampling.as_published
    runs = [(a, min(b, total)) for a, b in change.region.visible() if a < total]
    tick = request.progress("decode", 2 * sum(b - a for a, b in runs))
    own = RunOptions(memory=options.memory, dtype="float32")
    files = [(folder / f"before{a}.nii", folder / f"after{a}.nii") for a, _ in runs]
    begin = time.perf_counter()
    for (a, b), pair in zip(runs, files, strict=True):
        for store, path in zip(stores, pair, strict=True):
            if path.exists():  # from an interrupted run
                tick(b - a)
                continue
            target = Target(store.info.geometry.cropped(a, b), clamp_first="clamp" in parts)
            pipeline.decode(request.codec, store, path, own, (a, b), tick, target)
    decoded = time.perf_counter()
    volume = create_volume(output, request.mask.written, options.dtype, request.note, KIND)
    with _wrapped(request, volume) as writer:
        for frame in _put_together(request, change, runs, files):
            writer.write(to_int16(frame) if options.dtype == "int16" else frame)
    seconds = {"decode": decoded - begin, "write": time.perf_counter() - decoded}
    run = pipeline.plan_decode(request.codec, stores[1], output, own)
    return dataclasses.replace(run.outcome(total, 0, seconds), options=options)


def _put_together(
    request: Request,
    change: Change,
    runs: list[tuple[int, int]],
    files: list[tuple[Path, Path]],
) -> Iterator[Array]:
    """Yield the CT's frames [1, x, y] with the change in them, float32, in the network's order."""
    with contextlib.ExitStack() as stack:
        frames, found = (
            stack.enter_context(contextlib.closing(each.planes()))
            for each in (change.plane.upright, change.planes)
        )
        run, pair = iter(zip(runs, files, strict=True)), None
        start = stop = 0
        for index, (original, findings) in enumerate(zip(frames, found, strict=True)):
            whole = original.astype(np.float32)[None]
            if index >= stop and runs and index < runs[-1][1]:
                (start, stop), paths = next(run)
                pair = [_frames(stack, path) for path in paths]
            if pair is None or not start <= index < stop:
                yield whole
                continue
            before, after = (next(each) for each in pair)
            yield _changed(request, change, index, whole, findings, (before, after))


def _frames(stack: contextlib.ExitStack, path: Path) -> Iterator[Array]:
    """Open a decoded volume; returns its frames [X, Y]."""
    reader = stack.enter_context(contextlib.closing(open_volume(path)))
    return stack.enter_context(contextlib.closing(frames_of(reader, 0)))


def _changed(
    request: Request,
    change: Change,
    index: int,
    original: Array,
    findings: NDArray[np.int16],
    decoded: tuple[Array, Array],
) -> Array:
    """Return a frame [1, x, y] with its change, from the decoded planes before and after it."""
    weight = change.region.weight(change.region.frame_of(index))
    assert weight is not None
    mask, plane = request.mask, request.mask.fit.plane
    smooth = Stretched(plane, (1, 1), weight.shape).volume(weight[None])
    share = mask.fit.image((findings > 0)[None], 0)
    before, after, let_through, inside = (
        mask.result(each) for each in (decoded[0][None], decoded[1][None], smooth, share)
    )
    changed = original + let_through * (after - before) - inside * (original - before)
    return np.where((let_through > 0) | (inside > 0), changed, original)


def _wrapped(request: Request, writer: Writer) -> Writer:
    """Return the writer of the result, which also writes the labels of what was added."""
    assert request.change is not None
    return request.wrap(AddingWriter(writer, request.change))
