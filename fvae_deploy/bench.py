"""`fvae bench`: throughput, share of the machine's ceiling and peak memory, engine by engine.

Every configuration runs in a process of its own, so that its peak memory is its own. The
peer `reference` is the published formulation of LeanVAE (wavelet convolutions, padded 3-D
depthwise convolutions, layer by layer in eager torch) on the same weights and window.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy import schedule
from fvae_deploy.codec import pad_frames
from fvae_deploy.engines.base import open_engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.rss import current_rss, peak_rss, reset_peak
from fvae_deploy.stages import CausalStream, StageStream, whole_grids

WINDOW = 17  # slices
REFERENCE = "reference"
DIRECTIONS = ("encode", "decode")


def measure(
    bundle: Path,
    engine: str,
    precision: str,
    direction: str,
    side: int,
    *,
    k: int = 1,
    repeats: int = 3,
    weights: Path | None = None,
) -> dict[str, Any]:
    """Run windows of 17 slices of side x side latent cells, one direction, in a fresh process.

    `weights` is the checkpoint that the engine `reference` runs. Returns `seconds` (of the
    median window), `spread` (max / min), `first_seconds` (the first window, compiling
    included), `peak_bytes` beyond the libraries' baseline and `baseline_bytes`. Raises
    EngineError with the process's last line when it fails.
    """
    return _in_process(
        task="window",
        bundle=str(bundle),
        engine=engine,
        precision=precision,
        direction=direction,
        side=side,
        k=k,
        repeats=repeats,
        weights=str(weights) if weights else None,
    )


def measure_stages(
    bundle: Path, engine: str, precision: str, direction: str, side: int
) -> dict[str, int]:
    """Bytes that each stage of a direction adds at its peak, run one after the other.

    On a plane of side x side latent cells, a first step and two further ones; in a fresh
    process. Raises EngineError when it fails.
    """
    found = _in_process(
        task="stages",
        bundle=str(bundle),
        engine=engine,
        precision=precision,
        direction=direction,
        side=side,
    )
    return {stage: int(count) for stage, count in found.items()}


def _in_process(**job: Any) -> dict[str, Any]:
    """Run a job in a process of its own, so that its memory is its own."""
    command = [sys.executable, "-m", "fvae_deploy.bench", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, no message"]
        name = f"{job['engine']} {job['precision']}"
        raise EngineError(f"engine {name} failed in its own process: {lines[-1]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def ceiling() -> float:
    """Measure the float32 ceiling in FLOP/s: the best of several large matrix products."""
    a = np.random.default_rng(0).random((2048, 2048), dtype=np.float32)
    a @ a
    return float(max(2 * 2048**3 / _timed(lambda: a @ a) for _ in range(5)))


def bench(
    bundle: Path,
    manifest: Manifest,
    candidates: list[tuple[str, str]],
    *,
    size: int = 512,
    k: int = 1,
    rounds: int = 3,
    weights: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Measure every (engine, precision) in turn, `rounds` times over; one row of medians each.

    `size` is the side of a slice in pixels, rounded up to whole latent cells. The rows hold
    slices and voxels per second through encode and decode together, GFLOP/s (two per
    multiply-add, counted from the network), the share of the machine's float32 ceiling, peak
    MiB beyond the libraries, and, with the peer `reference`, the speed relative to it.
    """
    geometry = manifest.geometry
    side = -(-size // geometry.spatial)
    top = ceiling()
    found: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for number in range(rounds):
        for engine, precision in candidates:
            for direction in DIRECTIONS:
                progress(f"round {number + 1} of {rounds}: {engine} {precision} {direction}")
                row = measure(bundle, engine, precision, direction, side, k=k, weights=weights)
                rows = found.setdefault((engine, precision), {d: [] for d in DIRECTIONS})
                rows[direction].append(row)
    table = [
        {"engine": e, "precision": p, **_row(manifest, directions, side, top)}
        for (e, p), directions in found.items()
    ]
    peer = next((row for row in table if row["engine"] == REFERENCE), None)
    for row in table:
        row["times_reference"] = (
            row["slices_per_second"] / peer["slices_per_second"] if peer else None
        )
    return table


def _row(
    manifest: Manifest, directions: dict[str, list[dict[str, Any]]], side: int, top: float
) -> dict[str, Any]:
    """Medians over the rounds of one configuration."""
    seconds = {d: statistics.median(r["seconds"] for r in rows) for d, rows in directions.items()}
    total = sum(seconds.values())
    pixels = side * manifest.geometry.spatial
    latents = 1 + (WINDOW - 1) // manifest.geometry.temporal
    macs = sum(macs_per_cell(manifest, direction) for direction in DIRECTIONS)
    flops = 2 * latents * side * side * macs / total
    rows = [row for rows in directions.values() for row in rows]
    return {
        "slice": [pixels, pixels],
        "slices": WINDOW,
        "encode_seconds": seconds["encode"],
        "decode_seconds": seconds["decode"],
        "slices_per_second": WINDOW / total,
        "voxels_per_second": WINDOW * pixels**2 / total,
        "gflop_per_second": flops / 1e9,
        "share_of_ceiling": flops / top,
        "ceiling_gflop_per_second": top / 1e9,
        "peak_mib": max(row["peak_bytes"] for row in rows) / 2**20,
        "spread": max(row["spread"] for row in rows),
    }


def macs_per_cell(manifest: Manifest, direction: str) -> int:
    """Multiply-adds of a direction for one latent cell of one latent frame."""
    parts = (manifest.stage_part(stage, first=False) for stage in manifest.stages(direction))
    return sum(part.mac_per_cell * part.scale**2 for part in parts)


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _window(job: dict[str, Any]) -> dict[str, Any]:
    """Body of the process that `measure` starts."""
    bundle, direction, side = Path(job["bundle"]), job["direction"], job["side"]
    manifest = Manifest.load(bundle, verify=False)
    geometry = manifest.geometry
    if job["engine"] == REFERENCE:
        from fvae_deploy.export.peer import reference_window

        x = _noise(manifest, direction, side)
        window = reference_window(Path(job["weights"]), direction, x, WINDOW)
        baseline = current_rss()
    else:
        opened = open_engine(bundle, manifest, job["engine"], "cpu", job["precision"])
        baseline = current_rss()
        grids = whole_grids(manifest, (direction,), (side, side))
        stream = CausalStream(opened, manifest, direction, grids)
        steps = schedule.steps(WINDOW, geometry.protocols[0], job["k"], geometry)
        x = _noise(manifest, direction, side)

        def window() -> None:
            for step in steps:
                frames = step.depth if direction == "encode" else step.frames
                stream.run(pad_frames(x, frames), step.first)

    first = _timed(window)
    seconds = [_timed(window) for _ in range(job["repeats"])]
    return {
        "seconds": statistics.median(seconds),
        "spread": max(seconds) / min(seconds),
        "first_seconds": first,
        "baseline_bytes": baseline,
        "peak_bytes": peak_rss() - baseline,
    }


def _stages(job: dict[str, Any]) -> dict[str, int]:
    """Body of the process that `measure_stages` starts."""
    bundle, direction, side = Path(job["bundle"]), job["direction"], job["side"]
    manifest = Manifest.load(bundle, verify=False)
    opened = open_engine(bundle, manifest, job["engine"], "cpu", job["precision"])
    causal = manifest.geometry.first_slices == 1
    random, found, streams = np.random.default_rng(0), {}, []
    for name, grid in whole_grids(manifest, (direction,), (side, side)).items():
        before = current_rss()
        reset_peak()
        stream = StageStream(opened, manifest, name, grid, None)
        for first in (True, False, False) if causal else (True, True):
            shape = manifest.stage_part(name, first).inputs[0].sized(1, grid.height, grid.width)
            stream.run(random.standard_normal(shape[1:], dtype=np.float32), first)
        found[name] = max(0, peak_rss() - before)
        streams.append(stream)  # its states stay, as in a run of all stages
    return found


def _noise(manifest: Manifest, direction: str, side: int) -> Any:
    """One frame [C, 1, H, W] or latent frame [D, 1, h, w]."""
    g = manifest.geometry
    shape = (
        (g.channels, 1, side * g.spatial, side * g.spatial)
        if direction == "encode"
        else (g.latent_channels, 1, side, side)
    )
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 0.2


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    print(json.dumps((_window if job["task"] == "window" else _stages)(job)))
