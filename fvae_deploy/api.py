"""The verbs on files: open everything, stream, report. The command line calls these.

Many scans share one engine: where a model is named, an opened codec will do too, and stays open.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from fvae_deploy.parse import parse_bytes
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.stream import pipeline as stream
from fvae_deploy.stream.codec import Codec, open_codec
from fvae_deploy.stream.pipeline import Progress
from fvae_deploy.stream.report import run_report
from fvae_deploy.stream.rss import current_rss
from fvae_deploy.volume.base import Reader
from fvae_deploy.volume.open import open_volume, protect_input


def _nothing(slices: int) -> None:
    """No progress shown."""


def encode(
    ct: str | Path | Reader,
    output: str | Path,
    *,
    model: str | Path | Codec = "tiny",
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    protocol: str | None = None,
    memory: str | int | None = None,
    k: int | None = None,
    series: str | None = None,
    resume: bool = False,
    any_range: bool = False,
    progress: Progress = _nothing,
) -> dict[str, Any]:
    """Encode a CT into a latent store (Zarr v3) and return the run report.

    `memory` bounds what the run takes beyond interpreter and libraries ("700MiB", bytes);
    `k` is the number of latent frames a step. A reader is closed. Raises FvaeError with the remedy.
    """
    with (
        contextlib.closing(_opened(ct, series)) as reader,
        _codec(model, engine, precision, device) as codec,
    ):
        protect_input(output, reader.path, reader.geometry.dicom_files)
        baseline = current_rss()
        outcome = stream.encode(
            codec,
            reader,
            Path(output),
            protocol=protocol,
            memory=_bytes(memory),
            k=k,
            resume=resume,
            any_range=any_range,
            progress=progress,
        )
        return run_report("encode", reader.path, Path(output), codec, outcome, baseline)


def decode(
    latents: str | Path,
    output: str | Path,
    *,
    model: str | Path | Codec | None = None,
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    memory: str | int | None = None,
    slices: tuple[int, int] | None = None,
    dtype: str = "int16",
    resume: bool = False,
    progress: Progress = _nothing,
) -> dict[str, Any]:
    """Decode a latent store, or slices [a, b) of it, to a volume in HU; return the report.

    `model` defaults to the built-in of the name that the store gives. With `resume` slices are
    kept in `output.partial` as they come, and those of a stopped run taken up. Raises FvaeError.
    """
    protect_input(output, latents)
    store = LatentReader(Path(latents))
    with _codec(model or store.info.model, engine, precision, device) as codec:
        baseline = current_rss()
        outcome = stream.decode(
            codec,
            store,
            Path(output),
            slices=slices,
            memory=_bytes(memory),
            dtype=dtype,
            resume=resume,
            progress=progress,
        )
        return run_report("decode", Path(latents), Path(output), codec, outcome, baseline)


def reconstruct(
    ct: str | Path | Reader,
    output: str | Path,
    *,
    model: str | Path | Codec = "tiny",
    engine: str = "auto",
    precision: str = "fp32",
    device: str = "cpu",
    protocol: str | None = None,
    memory: str | int | None = None,
    k: int | None = None,
    series: str | None = None,
    dtype: str = "int16",
    resume: bool = False,
    any_range: bool = False,
    progress: Progress = _nothing,
) -> dict[str, Any]:
    """Encode and decode a CT in one stream, HU in and HU out; return the run report.

    `resume` is that of `decode`.
    """
    with (
        contextlib.closing(_opened(ct, series)) as reader,
        _codec(model, engine, precision, device) as codec,
    ):
        protect_input(output, reader.path, reader.geometry.dicom_files)
        baseline = current_rss()
        outcome = stream.reconstruct(
            codec,
            reader,
            Path(output),
            protocol=protocol,
            memory=_bytes(memory),
            k=k,
            dtype=dtype,
            resume=resume,
            any_range=any_range,
            progress=progress,
        )
        return run_report("reconstruct", reader.path, Path(output), codec, outcome, baseline)


def _opened(ct: str | Path | Reader, series: str | None) -> Reader:
    return open_volume(ct, series) if isinstance(ct, str | Path) else ct


def _codec(
    model: str | Path | Codec, engine: str, precision: str, device: str
) -> contextlib.AbstractContextManager[Codec]:
    if isinstance(model, Codec):
        return contextlib.nullcontext(model)
    return open_codec(model, engine=engine, precision=precision, device=device)


def _bytes(memory: str | int | None) -> int | None:
    return parse_bytes(memory) if isinstance(memory, str) else memory
