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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fvae_deploy.errors import LatentError, UsageError, VolumeError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.storage.fingerprint import fingerprint_of
from fvae_deploy.storage.journal import journal_of
from fvae_deploy.storage.latents import LatentInfo, LatentReader, LatentWriter
from fvae_deploy.stream import schedule
from fvae_deploy.stream.codec import Codec, pad_frames
from fvae_deploy.stream.run import Frames, Outcome, Run
from fvae_deploy.stream.schedule import Step
from fvae_deploy.stream.threads import Behind, ahead
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Geometry, Reader
from fvae_deploy.volume.open import create_volume

KIND = "reconstruction"
Progress = Callable[[int], None]  # called with the number of slices just finished


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
    progress: Progress = lambda slices: None,
) -> Outcome:
    """Encode a volume into a latent store at `path`.

    With `resume`, latent frames of an interrupted run are kept and the rest is computed; the
    bytes are those of an undisturbed run. A run that is stopped leaves `path.partial`; one
    that fails on its input leaves nothing but what an earlier run had left.
    """
    begin = time.perf_counter()
    run = Run.of(codec, reader.geometry, ("encode",), protocol, memory, k, path.parent)
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
        fvae_version=__version__,
        tile=run.tile,
    )
    total = schedule.latent_frames(run.steps)
    shape = (manifest.geometry.latent_channels, total, *run.plane)
    writer = LatentWriter(path, info, shape, resume, _state(reader))
    target = next((i for i, s in enumerate(run.steps) if s.latents[1] > writer.done), None)
    kept = run.steps[target].slices[0] if target is not None else run.outcome.slices
    run.outcome.kept, run.outcome.slices = kept, run.outcome.slices - kept
    try:
        progress(kept)
        if target is not None:
            entry = run.entry(target, "encode")

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
    finally:
        writer.close()
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
    resume: bool = False,
    progress: Progress = lambda slices: None,
    onto: Onto | None = None,
) -> Outcome:
    """Decode a latent store, or its slices [a, b) alone, into a volume at `path`.

    Only the latent frames that the slices depend on are decoded; the result equals the crop
    of the whole. With `resume` slabs are kept in `path.partial` as they come, and those of a run
    that was stopped are taken up. With `onto` the volume is written on another plane. Raises
    LatentError when the store is of another model.
    """
    begin = time.perf_counter()
    info, manifest = store.info, codec.manifest
    if info.identity != manifest.identity:
        raise LatentError(
            f"expected latents of model {manifest.name} ({manifest.identity}), found latents of "
            f"{info.model} ({info.identity}): choose that model with --model"
        )
    run = Run.of(codec, info.geometry, ("decode",), info.protocol, memory, info.k, path.parent)
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
    onto = onto or Onto(_cropped(info.geometry, a, b), note=_note(manifest))
    state = fingerprint_of(store.path)
    with (
        journal_of(path, run.facts("decode", state, info.geometry, a, b), resume) as journal,
        create_volume(path, onto.geometry, dtype, onto.note, onto.kind) as writer,
    ):
        out = run.decoded(writer, (a, b), journal, onto.resample)
        progress(out.kept)
        entry = run.entry(out.begin, "decode")

        def latents() -> Iterator[tuple[Step, Frames]]:
            for step in run.steps[entry : out.stop]:
                yield step, pad_frames(store.read(*step.latents), step.frames)

        with (
            contextlib.closing(run.stream("decode")) as stream,
            contextlib.closing(ahead(latents())) as slabs,
            Behind(out) as sink,
        ):
            for i, (step, z) in enumerate(run.timed("read", slabs), start=entry):
                x = stream.run(z, step.first)
                if i >= out.first:
                    sink.put((i, x))
                    progress(out.slices(i))
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
    resume: bool = False,
    any_range: bool = False,
    progress: Progress = lambda slices: None,
) -> Outcome:
    """Encode and decode in one stream, with no latent on disk: `path` is D(E(x)) in HU.

    `resume` is that of `decode`.
    """
    begin = time.perf_counter()
    geometry, slices = reader.geometry, reader.geometry.shape[2]
    run = Run.of(codec, geometry, ("encode", "decode"), protocol, memory, k, path.parent)
    state = _state(reader)
    with (
        journal_of(path, run.facts("reconstruct", state, geometry, 0, slices), resume) as journal,
        create_volume(path, geometry, dtype, _note(codec.manifest), KIND) as writer,
    ):
        out = run.decoded(writer, (0, slices), journal)
        progress(out.kept)
        begins = run.entry(out.begin, "decode")
        entry = run.entry(begins, "encode")
        with (
            contextlib.closing(run.stream("encode")) as encoder,
            contextlib.closing(run.stream("decode")) as decoder,
            contextlib.closing(ahead(run.read(reader, entry, out.stop))) as slabs,
            Behind(out) as sink,
        ):
            for i, (step, x) in enumerate(run.timed("read", slabs), start=entry):
                z = encoder.run(x, step.first)
                if i < begins:
                    continue
                x = decoder.run(z, step.first)
                if i >= out.first:
                    sink.put((i, x))
                    progress(out.slices(i))
        if not any_range and not out.kept:
            try:
                run.outcome.tally.check_is_ct()
            except VolumeError:
                if journal:
                    journal.done()  # to go on with it would be to skip the check
                raise
        run.outcome.seconds["encode"] = encoder.seconds
        run.outcome.seconds["decode"] = decoder.seconds
        run.outcome.seconds["write"] = sink.waited
    run.outcome.seconds["total"] = time.perf_counter() - begin
    return run.outcome


@dataclass(frozen=True)
class Onto:
    """The grid that a decoded volume is written on, how HU [t, x, y] come onto it, what it is."""

    geometry: Geometry
    resample: Callable[[Frames], Frames] = lambda hu: hu
    note: str = ""
    kind: str = KIND


def _note(manifest: Manifest) -> str:
    return f"encoded and decoded by a frozen VAE, {manifest.name} {manifest.identity}"


def _state(reader: Reader) -> str:
    return fingerprint_of(reader.path, reader.geometry.dicom_files)


def _cropped(geometry: Geometry, a: int, b: int) -> Geometry:
    """Return the geometry of slices [a, b): same axes, origin moved along z."""
    x, y, z = geometry.shape
    if (a, b) == (0, z):
        return geometry
    affine = geometry.affine.copy()
    affine[:3, 3] += a * affine[:3, 2]
    return Geometry((x, y, b - a), affine, geometry.nifti_header)
