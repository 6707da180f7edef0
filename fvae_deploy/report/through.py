"""Sends scans, and parts of scans with test lesions, through a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy import api
from fvae_deploy.report.cases import Case
from fvae_deploy.report.lesions import Volume
from fvae_deploy.report.seams import tile_borders
from fvae_deploy.report.survey import Survey
from fvae_deploy.stream.codec import Codec
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.base import Geometry
from fvae_deploy.volume.open import create_volume, open_volume


def reconstruct(
    case: Case, codec: Codec, options: RunOptions, work: Path, tick: Callable[[int], None]
) -> tuple[dict[str, Any], Path]:
    """Encode and decode a scan; return what it took, and the path of the reconstruction."""
    latents, made = work / "latents.zarr", work / "reconstruction.nii"
    given = dataclasses.replace(options, model=None, resume=False, overwrite=True)
    encoded = api.encode(case.ct, latents, given, codec=codec)
    reading = dataclasses.replace(
        given, protocol=None, step=None, hu_window=None, series=None, level=0, any_range=False,
        skip_unreadable=False,
    )  # fmt: skip
    decoded = api.decode(latents, made, reading, codec=codec, progress=tick)
    size = sum(path.stat().st_size for path in latents.rglob("*") if path.is_file())
    runs = {"encode": encoded, "decode": decoded}
    geometry = codec.manifest.geometry
    plane = encoded["volume"]["shape"][0], encoded["volume"]["shape"][1]
    borders = [tile_borders(run["plan"], plane, geometry.spatial) for run in runs.values()]
    return {
        "bytes": size,
        "seconds": {verb: run["seconds"]["total"] for verb, run in runs.items()},
        "peak_bytes": max(run["memory"]["beyond_baseline_bytes"] for run in runs.values()),
        "engine": f"{decoded['engine']} {decoded['precision']}",
        "cell": geometry.spatial,
        "frame": geometry.temporal,
        "tile_borders": [sorted({*x, *y}) for x, y in zip(*borders, strict=True)],
    }, made


def reconstruct_part(
    codec: Codec, options: RunOptions, found: Survey, work: Path, hu: Volume
) -> Volume:
    """Reconstruct a part of a scan, [t, x, y] in HU; volumes of whole HU stay whole."""
    t, x, y = hu.shape
    geometry = Geometry((x, y, t), found.geometry.affine)
    source, made = work / "part.nii", work / "part-reconstruction.nii"
    with create_volume(source, geometry, found.dtype) as writer:
        writer.write(hu)
    given = dataclasses.replace(
        options, model=None, resume=False, overwrite=True, dtype="float32", any_range=True,
        series=None, level=0,
    )  # fmt: skip
    api.reconstruct(source, made, given, codec=codec)
    with contextlib.closing(open_volume(made)) as reader:
        result: Volume = np.concatenate(list(reader.slabs(8)))
    return result
