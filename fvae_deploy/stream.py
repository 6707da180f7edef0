"""The pipeline: read -> tile -> run -> stitch -> write, in memory independent of the length.

    reader thread            this thread                 writer thread
    slabs of HU    --2-->    engine, step by step  --2-->  slabs of HU, or latent frames
    to the model's range     (tiles inside)              to HU, file

Reader and writer work while the engine does; the queues between them hold two slabs. An
exception anywhere stops all three and surfaces once. Outputs appear under their name only
when they are whole.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fvae_deploy import schedule
from fvae_deploy.codec import Codec, pad_frames
from fvae_deploy.engines.base import BuiltAhead
from fvae_deploy.errors import LatentError, UsageError, VolumeError
from fvae_deploy.intensity import Tally, to_hu, to_model
from fvae_deploy.latents import LatentInfo, LatentReader, LatentWriter
from fvae_deploy.overlap import Behind, ahead
from fvae_deploy.plan import Plan, plan
from fvae_deploy.schedule import Step
from fvae_deploy.stages import CausalStream
from fvae_deploy.volume import Geometry, Reader, Writer, create_volume

T = TypeVar("T")
Progress = Callable[[int], None]  # called with the number of slices just finished
Frames = NDArray[np.float32]  # [C, T, H, W] in the model's range, or latents [D, k, h, w]


@dataclass
class Outcome:
    """What a run did: for the report."""

    plan: Plan
    slices: int  # that this run computed
    shape: tuple[int, int, int]
    tally: Tally = field(default_factory=Tally)
    seconds: dict[str, float] = field(default_factory=dict)


def encode(
    codec: Codec,
    reader: Reader,
    path: Path,
    *,
    protocol: str | None = None,
    memory: int | None = None,
    k: int | None = None,
    resume: bool = False,
    any_range: bool = False,
    version: str = "",
    progress: Progress = lambda slices: None,
) -> Outcome:
    """Encode a volume into a latent store at `path`.

    With `resume`, latent frames of an interrupted run are kept and the rest is computed; the
    bytes are those of an undisturbed run. The last kept frames are computed once more: they
    tell another volume of the same geometry. A run that is stopped leaves `path.partial`; one
    that fails on its input leaves nothing but what an earlier run had left.
    """
    begin = time.perf_counter()
    run = _Run.of(codec, reader.geometry, ("encode",), protocol, memory, k, path.parent)
    manifest = codec.manifest
    info = LatentInfo(
        model=manifest.name,
        identity=manifest.identity,
        engine=codec.engine.name,
        precision=codec.engine.precision,
        protocol=run.protocol,
        k=run.outcome.plan.k,
        slices=reader.geometry.shape[2],
        geometry=reader.geometry,
        hu_window=(manifest.intensity.hu_min, manifest.intensity.hu_max),
        fvae_version=version,
        tile=tuple(n for grid in run.outcome.plan.grids.values() for n in grid.extent),
    )
    total = schedule.latent_frames(run.steps)
    shape = (manifest.geometry.latent_channels, total, *run.plane)
    writer = LatentWriter(path, info, shape, resume)
    target = next((i for i, s in enumerate(run.steps) if s.latents[1] > writer.done), None)
    try:
        if target is not None:
            last = max(target - 1, 0)
            entry = schedule.enter(run.steps, last, manifest.context("encode"))
            while run.steps[entry].slices[0] == run.steps[entry].slices[1]:
                entry -= 1  # a step that repeats the last slice needs one that reads it
            kept = run.steps[target].slices[0]
            run.outcome.slices -= kept
            progress(kept)

            def store(item: tuple[Step, Frames]) -> None:
                step, z = item
                writer.write(step.latents[0], z[:, : step.latents[1] - step.latents[0]])

            with (
                contextlib.closing(run.stream("encode")) as stream,
                contextlib.closing(ahead(run.read(reader, entry))) as slabs,
                Behind(store) as sink,
            ):
                for i, (step, x) in enumerate(run.timed("read", slabs), start=entry):
                    z = stream.run(x, step.first)
                    if i >= target:
                        sink.put((step, z))
                        progress(step.slices[1] - step.slices[0])
                    elif i == last:
                        writer.check(step.latents[0], z[:, : step.latents[1] - step.latents[0]])
            run.outcome.seconds["engine"] = stream.seconds
            run.outcome.seconds["write"] = sink.waited
        if not any_range and target == 0:
            run.outcome.tally.check_is_ct()
        writer.commit()
    except VolumeError as error:
        # Where the input is at fault there is nothing to resume, unless an earlier run left it.
        if not isinstance(error, LatentError) and not writer.done:
            writer.discard()
        raise
    run.outcome.seconds["total"] = time.perf_counter() - begin
    return run.outcome


def decode(
    codec: Codec,
    store: LatentReader,
    path: Path,
    *,
    slices: tuple[int, int] | None = None,
    memory: int | None = None,
    dtype: str = "int16",
    progress: Progress = lambda slices: None,
    onto: Onto | None = None,
) -> Outcome:
    """Decode a latent store, or its slices [a, b) alone, into a volume at `path`.

    Only the latent frames that the slices depend on are decoded; the result equals the crop
    of the whole. With `onto` it is written on another plane. Raises LatentError when the store
    is of another model.
    """
    begin = time.perf_counter()
    info, manifest = store.info, codec.manifest
    if info.identity != manifest.identity:
        raise LatentError(
            f"expected latents of model {manifest.name} ({manifest.identity}), found latents of "
            f"{info.model} ({info.identity}): choose that model with --model"
        )
    run = _Run.of(codec, info.geometry, ("decode",), info.protocol, memory, info.k, path.parent)
    expected = (
        manifest.geometry.latent_channels,
        schedule.latent_frames(run.steps),
        *run.plane,
    )
    if store.shape != expected:
        raise LatentError(
            f"expected latents {expected} for a volume {info.geometry.shape}, found "
            f"{store.shape}: the store is damaged, encode the CT again"
        )
    a, b = slices or (0, info.slices)
    if not 0 <= a < b <= info.slices:
        raise UsageError(f"expected slices within 0:{info.slices}, found {a}:{b}")
    target = next(i for i, s in enumerate(run.steps) if s.slices[1] > a)
    stop = next(i for i, s in enumerate(run.steps) if s.slices[1] >= b) + 1
    entry = schedule.enter(run.steps, target, manifest.context("decode"))
    run.outcome.slices = b - a

    def latents() -> Iterator[tuple[Step, Frames]]:
        for step in run.steps[entry:stop]:
            yield step, pad_frames(store.read(*step.latents), step.frames)

    onto = onto or Onto(_cropped(info.geometry, a, b))
    with create_volume(path, onto.geometry, dtype) as writer:
        with (
            contextlib.closing(run.stream("decode")) as stream,
            contextlib.closing(ahead(latents())) as slabs,
            Behind(run.writing(writer, a, b, onto.resample)) as sink,
        ):
            for i, (step, z) in enumerate(run.timed("read", slabs), start=entry):
                x = stream.run(z, step.first)
                if i >= target:
                    sink.put((step, x))
                    progress(min(step.slices[1], b) - max(step.slices[0], a))
        run.outcome.seconds["engine"] = stream.seconds
        run.outcome.seconds["write"] = sink.waited
    run.outcome.seconds["total"] = time.perf_counter() - begin
    return run.outcome


def reconstruct(
    codec: Codec,
    reader: Reader,
    path: Path,
    *,
    protocol: str | None = None,
    memory: int | None = None,
    k: int | None = None,
    dtype: str = "int16",
    any_range: bool = False,
    progress: Progress = lambda slices: None,
) -> Outcome:
    """Encode and decode in one stream, with no latent on disk: `path` is D(E(x)) in HU."""
    begin = time.perf_counter()
    geometry = reader.geometry
    run = _Run.of(codec, geometry, ("encode", "decode"), protocol, memory, k, path.parent)
    note = f"{codec.manifest.name} {codec.manifest.identity}"
    with create_volume(path, geometry, dtype, note) as writer:
        with (
            contextlib.closing(run.stream("encode")) as encoder,
            contextlib.closing(run.stream("decode")) as decoder,
            contextlib.closing(ahead(run.read(reader, 0))) as slabs,
            Behind(run.writing(writer, 0, geometry.shape[2])) as sink,
        ):
            for step, x in run.timed("read", slabs):
                sink.put((step, decoder.run(encoder.run(x, step.first), step.first)))
                progress(step.slices[1] - step.slices[0])
        if not any_range:
            run.outcome.tally.check_is_ct()
        run.outcome.seconds["encode"] = encoder.seconds
        run.outcome.seconds["decode"] = decoder.seconds
        run.outcome.seconds["write"] = sink.waited
    run.outcome.seconds["total"] = time.perf_counter() - begin
    return run.outcome


@dataclass(frozen=True)
class Onto:
    """The grid that a decoded volume is written on, and how HU [t, x, y] come onto it."""

    geometry: Geometry
    resample: Callable[[Frames], Frames] = lambda hu: hu


@dataclass
class _Run:
    """One volume's way through the codec: its steps, its plane and what happened."""

    codec: Codec
    steps: list[Step]
    plane: tuple[int, int]  # latent cells
    protocol: str
    folder: Path  # for states that are not kept in memory
    outcome: Outcome

    @classmethod
    def of(
        cls,
        codec: Codec,
        geometry: Geometry,
        directions: tuple[str, ...],
        protocol: str | None,
        memory: int | None,
        k: int | None,
        folder: Path,
    ) -> _Run:
        manifest, of = codec.manifest, codec.manifest.geometry
        protocol = protocol or of.protocols[0]
        if protocol not in of.protocols:
            raise UsageError(
                f"expected protocol {' or '.join(of.protocols)}, found {protocol!r}: "
                f"{manifest.name} has no other"
            )
        k = manifest.check_step(k)
        x, y, z = geometry.shape
        plane = (-(-x // of.spatial), -(-y // of.spatial))
        made = plan(
            manifest,
            directions,
            plane,
            engine=codec.engine.name,
            precision=codec.engine.precision,
            memory=memory,
            k=k,
            extents=_extents(codec, directions),
        )
        codec.settle(made.grids, k)
        planned = schedule.steps(z, protocol, k, of)
        return cls(codec, planned, plane, protocol, folder, Outcome(made, z, (x, y, z)))

    def stream(self, direction: str) -> CausalStream:
        plan = self.outcome.plan
        return CausalStream(
            self.codec.engine,
            self.codec.manifest,
            direction,
            plan.grids,
            plan.spilled,
            self.folder,
            lean=plan.lean,
        )

    def read(self, reader: Reader, entry: int) -> Iterator[tuple[Step, Frames]]:
        """Yield every step from `entry` on with its frames in the model's range."""
        geometry, intensity = self.codec.manifest.geometry, self.codec.manifest.intensity
        height, width = (geometry.spatial * n for n in self.plane)
        steps = self.steps[entry:]
        depths = [s.slices[1] - s.slices[0] for s in steps if s.slices[1] > s.slices[0]]
        last: Frames | None = None
        with contextlib.closing(reader.slabs(*depths, start=steps[0].slices[0])) as slabs:  # type: ignore[type-var]
            for step in steps:
                if step.slices[1] > step.slices[0]:
                    slab = next(slabs)
                    x = to_model(slab, intensity, height, width, self.outcome.tally)
                    last = x[:, -1:]
                else:  # beyond the end of the volume
                    assert last is not None
                    x = last
                x = pad_frames(x, step.depth)
                yield step, np.repeat(x, geometry.channels, axis=0) if geometry.channels > 1 else x

    def writing(
        self,
        writer: Writer,
        a: int,
        b: int,
        resample: Callable[[Frames], Frames] = lambda hu: hu,
    ) -> Callable[[tuple[Step, Frames]], None]:
        """Make a consumer of decoded steps that writes their slices within [a, b)."""
        x_size, y_size, _ = self.outcome.shape
        intensity = self.codec.manifest.intensity

        def write(item: tuple[Step, Frames]) -> None:
            step, x = item
            start, stop = max(step.slices[0], a), min(step.slices[1], b)
            if stop > start:
                taken = x[:, start - step.slices[0] : stop - step.slices[0]]
                writer.write(resample(to_hu(taken, intensity, x_size, y_size)))

        return write

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Pass items through, adding up the time spent waiting for them."""
        waited, iterator = 0.0, iter(items)
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                break
            finally:
                waited += time.perf_counter() - begin
                self.outcome.seconds[name] = waited
            yield item


def _extents(codec: Codec, directions: tuple[str, ...]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Tiles of the stages of an engine that was built ahead of time, for some sizes alone."""
    engine, of = codec.engine, codec.manifest
    if not isinstance(engine, BuiltAhead):
        return {}
    stages = [stage for direction in directions for stage in of.stages(direction)]
    return {stage: engine.extents(of.stage_part(stage, first=False).name) for stage in stages}


def _cropped(geometry: Geometry, a: int, b: int) -> Geometry:
    """Return the geometry of slices [a, b): same axes, origin moved along z."""
    x, y, z = geometry.shape
    if (a, b) == (0, z):
        return geometry
    affine = geometry.affine.copy()
    affine[:3, 3] += a * affine[:3, 2]
    return Geometry((x, y, b - a), affine, geometry.nifti_header)
