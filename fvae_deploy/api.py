"""The verbs on files: each opens its inputs, streams, and reports. The command line calls these.

Options are a `RunOptions`, or its fields as keywords. To share one engine between many scans, pass
an opened `codec`: it stays open, and the options that would open one are ignored.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fvae_deploy.errors import UsageError, VolumeError
from fvae_deploy.storage.latents import LatentReader, partial_path
from fvae_deploy.storage.records import check_record
from fvae_deploy.stream import pipeline
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.encoding import encode_directions
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.pipeline import silent
from fvae_deploy.stream.report import plan_report, run_report
from fvae_deploy.stream.rss import begin_measuring
from fvae_deploy.stream.run import Outcome, Progress, Run
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import check_geometry, check_output, open_volume, protect_input
from fvae_deploy.volume.publish import recover

MODEL = "tiny"  # the default
ENCODED = ("max_error", "latent_dtype")  # options of latents that are stored
INPUT = ("any_range", "series", "level", "skip_unreadable")  # options of a CT that is read


def encode(
    ct: str | Path | Reader,
    output: str | Path,
    options: RunOptions | None = None,
    *,
    codec: Codec | None = None,
    progress: Progress = silent,
    **keywords: Any,
) -> dict[str, Any]:
    """Encode a CT into a latent store (Zarr v3) and return the run report.

    `keywords` are the fields of `RunOptions`. A Reader passed as `ct` is closed. Raises FvaeError
    with the remedy.
    """
    options, output = RunOptions.of(options, keywords), Path(output)
    options.check_unused("encode", "dtype", "rounding", "pyramid", "no_residual")
    if output.suffix != ".zarr":
        raise UsageError(f"expected an output ending in .zarr, found {output.name}: rename it")
    return _run_on_ct("encode", pipeline.encode, ct, output, options, codec, progress)


def decode(
    latents: str | Path,
    output: str | Path,
    options: RunOptions | None = None,
    *,
    slices: tuple[int, int] | None = None,
    codec: Codec | None = None,
    progress: Progress = silent,
    **keywords: Any,
) -> dict[str, Any]:
    """Decode a latent store, or slices [a, b) of it, to a volume in HU; return the run report.

    `keywords` are the fields of `RunOptions`; `model` defaults to the built-in model named in
    the store. Raises FvaeError with the remedy.
    """
    options, output = RunOptions.of(options, keywords), Path(output)
    options.check_unused("decode", "protocol", "step", "hu_window", *ENCODED, *INPUT)
    protect_input(output, latents)
    store = LatentReader(Path(latents))
    check_output(
        output,
        overwrite=options.overwrite or options.resume,
        geometry=store.info.geometry,
    )
    with _codec(codec, options, store.info.model) as opened:
        if is_done(output, options, lambda: pipeline.decode_facts(opened, store, options, slices)):
            return skipped("decode", output)
        baseline = begin_measuring()
        outcome = pipeline.decode(opened, store, output, options, slices, progress)
        return run_report("decode", store.path, output, opened, outcome, baseline)


def reconstruct(
    ct: str | Path | Reader,
    output: str | Path,
    options: RunOptions | None = None,
    *,
    codec: Codec | None = None,
    progress: Progress = silent,
    **keywords: Any,
) -> dict[str, Any]:
    """Encode and decode a CT in one stream, HU in and HU out; return the run report.

    Parameters are those of `encode`.
    """
    options, output = RunOptions.of(options, keywords), Path(output)
    options.check_unused("reconstruct", "max_error", "no_residual", "latent_dtype")
    return _run_on_ct("reconstruct", pipeline.reconstruct, ct, output, options, codec, progress)


def _run_on_ct(
    verb: str,
    run: Callable[[Codec, Reader, Path, RunOptions, Progress], Outcome],
    ct: str | Path | Reader,
    output: Path,
    options: RunOptions,
    codec: Codec | None,
    progress: Progress,
) -> dict[str, Any]:
    """Encode or reconstruct a CT; return the run report."""
    with contextlib.closing(_open(ct, options)) as reader:
        protect_input(output, reader.path, reader.geometry.files)
        check_output(
            output,
            overwrite=options.overwrite or options.resume,
            geometry=reader.geometry if verb == "reconstruct" else None,
        )
        with _codec(codec, options) as opened:
            if is_done(output, options, lambda: pipeline.facts_on(opened, reader, verb, options)):
                return skipped(verb, output)
            baseline = begin_measuring()
            outcome = run(opened, reader, output, options, progress)
            facts = (verb, reader.path, output, opened, outcome, baseline)
            return run_report(*facts, reader.remarks)


def dry_run(
    verb: str,
    source: str | Path | Reader,
    output: str | Path,
    options: RunOptions | None = None,
    *,
    codec: Codec | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Return the plan of encode, decode or reconstruct, JSON-ready; nothing is computed.

    Raises the errors that the run itself would raise before its first slice.
    """
    options, output = RunOptions.of(options, keywords), Path(output)
    store = LatentReader(Path(source)) if verb == "decode" else None  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(_codec(codec, options, store.info.model if store else MODEL))
        if store:
            run = pipeline.plan_decode(opened, store, output, options)
            check_geometry(output, run.geometry)
        else:
            reader = stack.enter_context(contextlib.closing(_open(source, options)))
            directions: tuple[str, ...] = ("encode", "decode")
            if verb == "encode":
                directions = encode_directions(options)
            if verb == "reconstruct":
                check_geometry(output, reader.geometry)
            run = Run.of(opened, reader.geometry, directions, options, output.parent)
        return {
            "command": verb,
            "dry_run": True,
            "input": str(source if isinstance(source, str | Path) else source.path),
            "output": str(output),
            "output_exists": output.exists(),
            "model": {"name": opened.manifest.name, "identity": opened.manifest.identity},
            "engine": opened.engine.name,
            "precision": opened.engine.precision,
            "volume": {"shape": list(run.geometry.shape)},
            "plan": plan_report(run.plan),
            "description": run.plan.describe(),
            "seconds_at_100_gflops": round(run.plan.step_seconds * len(run.steps), 1),
        }


def skipped(command: str, output: Path) -> dict[str, Any]:
    """Return the report of a run that was skipped because its output exists."""
    return {"command": command, "output": str(output), "skipped": True}


def is_done(output: Path, options: RunOptions, facts: Callable[[], dict[str, Any]]) -> bool:
    """Return whether --resume keeps an output that exists.

    Raises VolumeError if it comes from another input, model or other options, unless there is a
    partial output as well: then an interrupted run with --overwrite goes on to replace it.
    """
    recover(output)
    if not (options.resume and os.path.lexists(output)):
        return False
    try:
        check_record(output, facts())
    except VolumeError:
        if partial_path(output).is_dir():
            return False
        raise
    return True


def _open(ct: str | Path | Reader, options: RunOptions) -> Reader:
    return open_volume(ct, options.reading) if isinstance(ct, str | Path) else ct


def _codec(
    codec: Codec | None, options: RunOptions, model: str = MODEL
) -> contextlib.AbstractContextManager[Codec]:
    """Return the given codec, which stays open, or open one."""
    if codec is not None:
        return contextlib.nullcontext(codec)
    return open_codec(
        options.model or model,
        engine=options.engine,
        precision=options.precision,
        device=options.device,
        threads=options.threads,
    )
