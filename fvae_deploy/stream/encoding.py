"""The steps of an encode: read -> encode -> latents, and with a bound -> decode -> residuals."""

from __future__ import annotations

import contextlib

from fvae_deploy.storage.latents import LatentWriter
from fvae_deploy.stream.added_error import Sample
from fvae_deploy.stream.arrays import LatentFrames, ModelFrames
from fvae_deploy.stream.bound import Bound
from fvae_deploy.stream.checked import Checker
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.run import Progress, Run, Stopwatch
from fvae_deploy.stream.schedule import Step
from fvae_deploy.stream.threads import Behind, ahead
from fvae_deploy.stream.within import StepProgress
from fvae_deploy.volume.base import HuFrames, Reader


def encode_directions(options: RunOptions) -> tuple[str, ...]:
    """Return the halves of the network that an encode needs: with a bound, the decoder too."""
    return ("encode",) if options.max_error is None else ("encode", "decode")


def encode_steps(
    run: Run,
    reader: Reader,
    writer: LatentWriter,
    target: int,
    clock: Stopwatch,
    tick: Progress,
    options: RunOptions,
    bound: Bound | None,
    sample: Sample | None,
) -> dict[str, float]:
    """Compute and store the steps from `target` on; return the seconds spent.

    With a bound each step is decoded too, and what the voxels lack is stored. `sample` keeps some
    latents as they were computed.
    """
    entry = run.entry(target, "encode") if target < len(run.steps) else target
    progress = StepProgress(tick, run.plan.pieces)
    checker = Checker(run, writer, bound, target) if bound else None

    def store(item: tuple[Step, HuFrames, LatentFrames, ModelFrames | None]) -> None:
        step, slab, z, decoded = item
        writer.write(step.latents[0], z[:, : step.latents[1] - step.latents[0]])
        if checker and decoded is not None:
            checker.store(step, slab, decoded)

    with (
        contextlib.closing(run.stream("encode", progress)) as stream,
        contextlib.closing(checker) if checker else contextlib.nullcontext(),
        contextlib.closing(ahead(run.read(reader, entry, any_range=options.any_range))) as slabs,
        Behind(store) as sink,
    ):
        for i, (step, slab, x) in enumerate(clock.timed("read", slabs), start=entry):
            progress.begin(step.slices[1] - step.slices[0] if i >= target else 0)
            z = stream.run(x, step.first)
            if i >= target:
                if sample:
                    sample.keep(step, z)
                sink.put((step, slab, z, checker.decode(step, z) if checker else None))
            progress.end()
    decoding = {"decode": checker.seconds} if checker else {}
    return {"engine": stream.seconds, **decoding, "write": sink.waited}
