"""The pipeline: read -> tile -> run -> stitch -> write. Its memory is independent of the length.

    reader thread            this thread                 writer thread
    slabs of HU    --2-->    engine, step by step  --2-->  slabs of HU, or latent frames
    to the model's range     (tiles inside)              to HU, file

Reading and writing overlap with the engine's work; each queue holds two slabs. An
exception in any thread stops all three and is raised once. Outputs get their final name only
when they are complete; an interrupted run leaves OUTPUT.partial, from which it can be resumed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvae_deploy.errors import LatentError, UsageError, VolumeError, of_input
from fvae_deploy.storage.fingerprint import fingerprint_of
from fvae_deploy.storage.journal import Journal, journal_of
from fvae_deploy.storage.latent_info import LatentInfo
from fvae_deploy.storage.latents import LatentReader, LatentWriter
from fvae_deploy.storage.records import record
from fvae_deploy.stream import schedule
from fvae_deploy.stream.added_error import Sample
from fvae_deploy.stream.arrays import LatentFrames, ModelFrames
from fvae_deploy.stream.bound import Bound
from fvae_deploy.stream.checked import base_of, bound_of, checked
from fvae_deploy.stream.codec import Codec, alone, pad_frames
from fvae_deploy.stream.decoded import DecodedSlices
from fvae_deploy.stream.encoding import encode_directions, encode_steps
from fvae_deploy.stream.intensity import to_int16
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.run import Outcome, Progress, Run, Stopwatch, facts_of
from fvae_deploy.stream.schedule import Step
from fvae_deploy.stream.threads import Behind, ahead
from fvae_deploy.stream.within import StepProgress
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Geometry, HuFrames, Reader, Writer
from fvae_deploy.volume.open import check_output, create_volume

KIND = "reconstruction"


def silent(slices: int) -> None:
    """Show no progress."""


@alone
def encode(
    codec: Codec, reader: Reader, path: Path, options: RunOptions, progress: Progress = silent
) -> Outcome:
    """Encode a volume into a latent store at `path`.

    With `options.resume`, the latent frames of an interrupted run are kept and the rest is
    computed; the bytes are those of an uninterrupted run. An interrupted run leaves
    `path.partial`, and so does one that fails on the disk or the network. A run whose input is bad
    leaves only what an earlier run stored.
    """
    clock = Stopwatch()
    run = Run.of(codec, reader.geometry, encode_directions(options), options, path.parent)
    bound, decoding = None, None
    if options.max_error is not None:
        bound = Bound.of(options.max_error, codec.manifest, run.intensity)
    if options.latent_dtype not in (None, "float32"):  # what it adds is measured at the end
        decoding = Run.of(codec, reader.geometry, ("decode",), options, path.parent)
    shape = (
        codec.manifest.geometry.latent_channels,
        schedule.latent_frames(run.steps),
        *run.plane,
    )
    facts, slices = run.facts(facts_on(codec, reader, "encode", options)), reader.geometry.shape[2]
    writer = LatentWriter(path, _latent_info(run, bound), shape, options.resume, facts["input"])
    ends = [step.latents[1] for step in run.steps]
    target = next((i for i, end in enumerate(ends) if end > writer.done), len(ends))
    resumed = run.steps[target].slices[0] if target < len(ends) else slices
    sample = Sample(decoding, run.steps[target:]) if decoding else None
    try:
        _check_no_output(path, options)
        progress(resumed)
        seconds = encode_steps(run, reader, writer, target, clock, progress, options, bound, sample)
        if not options.any_range:
            run.clipping.check_is_ct()
        if changed := _change(reader, facts["input"]):
            writer.discard()
            raise changed
        added = sample.measure(writer) if sample else None
        if added is not None:
            writer.note(added_error=added.to_dict())
        sizes = writer.sizes
        writer.commit(lambda: record(path, facts, writer.partial))
    except VolumeError as error:
        # After a faulty input there is nothing to resume, unless an earlier run stored frames.
        if of_input(error) and not isinstance(error, LatentError) and not writer.done:
            writer.discard()
        raise
    finally:
        writer.close()
    outcome = run.outcome(slices - resumed, resumed, clock.seconds(**seconds))
    return dataclasses.replace(
        outcome,
        bound=bound,
        sizes=sizes,
        added_error=added.to_dict() if added else None,
    )


@dataclass(frozen=True)
class Target:
    """The grid that a decoded volume is written on, with the note and kind stored in the file.

    `resample` resamples HU [t, x, y] to that grid; `wrap` puts another writer around the file's.
    `clamp_first` is that of `intensity.to_hu`.
    """

    geometry: Geometry
    resample: Callable[[HuFrames], HuFrames] = lambda hu: hu
    note: str = ""
    kind: str = KIND
    clamp_first: bool = False
    wrap: Callable[[Writer], Writer] = lambda writer: writer


@alone
def decode(
    codec: Codec,
    store: LatentReader,
    path: Path,
    options: RunOptions,
    slices: tuple[int, int] | None = None,
    progress: Progress = silent,
    target: Target | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """Decode a latent store, or only its slices [a, b), into a volume at `path`.

    Only the latent frames that the slices depend on are decoded; the result equals the crop
    of the whole. Slabs are kept in `path.partial` until the run succeeds; with `options.resume`
    those of an interrupted run are reused. With `target` the volume is written on another plane.
    `journal` is that of a larger run that contains this one; it then stores the slabs.
    Raises LatentError if the store belongs to another model.
    """
    clock = Stopwatch()
    run = plan_decode(codec, store, path, options)
    a, b = slices or (0, store.info.slices)
    if not 0 <= a < b <= store.info.slices:
        raise UsageError(f"expected slices within 0:{store.info.slices}, found {a}:{b}")
    target = target or Target(run.geometry.cropped(a, b), note=_note(run))
    facts = run.facts(decode_facts(codec, store, options, (a, b)))
    with (
        contextlib.nullcontext(journal)
        if journal
        else _journal(path, facts, options) as slab_journal,
        target.wrap(
            create_volume(
                path, target.geometry, options.dtype, target.note, target.kind, options.pyramid
            )
        ) as writer,
    ):
        bounded = _bounded(store, options)
        convert = _to_hu(run, target, bounded)
        out = DecodedSlices(writer, run.steps, (a, b), convert, slab_journal)
        progress(out.resumed)
        entry = run.entry(out.begin, "decode")
        within = StepProgress(progress, run.plan.pieces)

        def latents() -> Iterator[tuple[Step, LatentFrames]]:
            for step in run.steps[entry : out.stop]:
                yield step, pad_frames(store.read(*step.latents), step.frames)

        with (
            contextlib.closing(run.stream("decode", within)) as stream,
            contextlib.closing(ahead(latents())) as slabs,
            Behind(out) as sink,
        ):
            for i, (step, z) in enumerate(clock.timed("read", slabs), start=entry):
                within.begin(out.slices(i) if i >= out.first else 0)
                x = stream.run(z, step.first, step.clock)
                if i >= out.first:
                    sink.put((i, x))
                within.end()
    seconds = clock.seconds(engine=stream.seconds, write=sink.waited)
    outcome = run.outcome(out.computed, out.resumed, seconds)
    return dataclasses.replace(outcome, bound=bound_of(bounded) if bounded else None)


def plan_decode(codec: Codec, store: LatentReader, path: Path, options: RunOptions) -> Run:
    """Plan a decode; raises LatentError if the store is damaged or belongs to another model."""
    info, manifest = store.info, codec.manifest
    if info.identity != manifest.identity:
        raise LatentError(
            f"expected latents of model {manifest.name} ({manifest.identity}), found latents of "
            f"{info.model} ({info.identity}): choose that model with --model"
        )
    options = decode_options(store, options)
    run = Run.of(codec, info.geometry, ("decode",), options, path.parent)
    frames = schedule.latent_frames(run.steps)
    expected = (manifest.geometry.latent_channels, frames, *run.plane)
    if store.shape != expected:
        raise LatentError(
            f"expected latents {expected} for a volume {info.geometry.shape}, found "
            f"{store.shape}: the store is damaged, encode the CT again"
        )
    return run


def decode_options(store: LatentReader, options: RunOptions) -> RunOptions:
    """Return the options with the protocol, step and HU window of the store.

    Raises UsageError if the scan was not encoded as published, but is to be decoded so.
    """
    info = store.info
    if options.published and info.protocol != "windows":
        raise UsageError(
            f"expected latents in windows with --published, found {info.protocol} latents in "
            f"{store.path}: encode the CT with --published too"
        )
    return dataclasses.replace(
        options, protocol=info.protocol, step=info.k, hu_window=info.hu_window
    )


@alone
def reconstruct(
    codec: Codec, reader: Reader, path: Path, options: RunOptions, progress: Progress = silent
) -> Outcome:
    """Encode and decode in one stream, with no latents on disk: `path` is D(E(x)) in HU.

    `options.resume` works as in `decode`.
    """
    clock = Stopwatch()
    geometry, slices = reader.geometry, reader.geometry.shape[2]
    run = Run.of(codec, geometry, ("encode", "decode"), options, path.parent)
    facts = run.facts(facts_on(codec, reader, "reconstruct", options))
    with (
        _journal(path, facts, options) as journal,
        create_volume(path, geometry, options.dtype, _note(run), KIND, options.pyramid) as writer,
    ):
        out = DecodedSlices(writer, run.steps, (0, slices), _to_hu(run, Target(geometry)), journal)
        progress(out.resumed)
        within = StepProgress(progress, run.plan.pieces)
        decode_entry = run.entry(out.begin, "decode")
        encode_entry = run.entry(decode_entry, "encode")
        with (
            contextlib.closing(run.stream("encode", within)) as encoder,
            contextlib.closing(run.stream("decode", within)) as decoder,
            contextlib.closing(
                ahead(run.read(reader, encode_entry, any_range=options.any_range))
            ) as slabs,
            Behind(out) as sink,
        ):
            for i, (step, _, x) in enumerate(clock.timed("read", slabs), start=encode_entry):
                within.begin(out.slices(i) if i >= out.first else 0)
                if step.latents[0] < step.latents[1]:
                    z = encoder.run(x, step.first)
                if i < decode_entry:
                    continue
                x = decoder.run(z, step.first, step.clock)
                if i >= out.first:
                    sink.put((i, x))
                within.end()
        if not options.any_range:
            run.clipping.check_is_ct()
        if changed := _change(reader, facts["input"]):
            journal.done()
            raise changed
    seconds = clock.seconds(encode=encoder.seconds, decode=decoder.seconds, write=sink.waited)
    return run.outcome(out.computed, out.resumed, seconds)


def _bounded(store: LatentReader, options: RunOptions) -> LatentReader | None:
    """Return the store if its bound is to hold; raises UsageError if values are truncated then."""
    if store.info.max_error is None or options.no_residual:
        return None
    if options.truncates:
        raise UsageError(
            f"expected whole HU within {store.info.max_error:g} HU as {store.path} has them, found "
            "--rounding truncate or --published: leave it out, or pass --no-residual"
        )
    return store


def _to_hu(
    run: Run, target: Target, bounded: LatentReader | None = None
) -> Callable[[Step, ModelFrames], HuFrames]:
    """Return the function that converts a decoded step to HU of its dtype on the output's grid.

    Rounded here and not in the writer, so that the journal holds half the bytes. With the store of
    the residuals, every voxel is within its bound.
    """
    whole, truncate = run.options.dtype == "int16", run.options.truncates

    def convert(step: Step, x: ModelFrames) -> HuFrames:
        hu = base_of(run, step, x, clamp_first=target.clamp_first)
        if bounded is not None:
            return checked(run, bounded, step, hu).astype(run.options.dtype, copy=False)
        hu = target.resample(hu)
        return to_int16(hu, truncate=truncate) if whole else hu

    return convert


def _latent_info(run: Run, bound: Bound | None) -> LatentInfo:
    """Return the metadata of this run's latent store."""
    manifest = run.codec.manifest
    return LatentInfo(
        model=manifest.name,
        identity=manifest.identity,
        engine=run.codec.engine.name,
        precision=run.codec.engine.precision,
        protocol=run.protocol,
        k=run.plan.k,
        slices=run.geometry.shape[2],
        geometry=run.geometry,
        hu_window=(run.intensity.hu_min, run.intensity.hu_max),
        fvae_version=__version__,
        tile=run.tile,
        max_error=bound.max_error if bound else None,
        margin=bound.margin if bound else None,
        latent_dtype=run.options.stored_as,
    )


def _note(run: Run) -> str:
    manifest, window = run.codec.manifest, run.intensity
    text = f"encoded and decoded by a frozen VAE, {manifest.name} {manifest.identity}"
    if window != manifest.intensity:
        text += f", clipped to {window.hu_min:g} to {window.hu_max:g} HU"
    return text


def facts_on(codec: Codec, reader: Reader, verb: str, options: RunOptions) -> dict[str, Any]:
    """Return the facts that identify what `verb` writes for a CT."""
    slices = (0, reader.geometry.shape[2])
    return facts_of(codec, reader.geometry, verb, _fingerprint(reader), slices, options)


def decode_facts(
    codec: Codec, store: LatentReader, options: RunOptions, slices: tuple[int, int] | None
) -> dict[str, Any]:
    """Return the facts that identify what `decode` writes for a latent store."""
    options, slices = decode_options(store, options), slices or (0, store.info.slices)
    source = fingerprint_of(store.path)
    return facts_of(codec, store.info.geometry, "decode", source, slices, options)


def _fingerprint(reader: Reader) -> str:
    return fingerprint_of(reader.path, reader.geometry.files)


def _change(reader: Reader, before: str) -> VolumeError | None:
    """Return an error if the input changed while it was read: no slab can be trusted then."""
    now = _fingerprint(reader)
    if now == before:
        return None
    return VolumeError(
        f"expected {reader.path} to stay the same until the end, found a change ({before}, now "
        f"{now}): run again when nothing writes to it"
    )


@contextlib.contextmanager
def _journal(path: Path, facts: dict[str, Any], options: RunOptions) -> Iterator[Journal]:
    """Keep slabs in a journal until the output is complete, and then how it was made."""
    with journal_of(path, facts, options.resume) as journal:
        _check_no_output(path, options)
        yield journal
        record(path, facts)


def _check_no_output(path: Path, options: RunOptions) -> None:
    """Raise VolumeError if another run has written the output before this one had its lock.

    A resumed run may replace it: it continues one that had --overwrite.
    """
    check_output(path, overwrite=options.overwrite or options.resume)
