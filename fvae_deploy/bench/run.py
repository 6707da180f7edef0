"""`fvae bench`: compare throughput, share of the ceiling, peak memory and error of engines.

Every configuration runs in a separate process, so that peak memory can be attributed to it; each
round runs all of them in turn. Peers are the same weights in their authors' implementation: the
published formulation of LeanVAE, or diffusers' VAEs with and without `enable_tiling`. With a
peer, errors are relative to its untiled result. On a GPU, peers also run in the precisions of the
engines, and speeds are relative to the peer in the same precision.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.bench.worker import in_process
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import QUANTISED, Manifest
from fvae_deploy.stream.plan import plan

DIRECTIONS = ("encode", "decode")


@dataclass(frozen=True)
class Case:
    """A configuration to measure: an engine or a peer, its precision, memory budget and device."""

    engine: str
    precision: str = "fp32"
    memory: int | None = None  # bytes that tiles are planned for; None: the whole plane
    device: str = "cpu"

    @property
    def ceiling(self) -> tuple[str, str]:
        """Device and precision of the ceiling that its speed is compared with."""
        half = "bf16" if self.device == "cpu" else "fp16"
        return self.device, half if self.precision in QUANTISED else self.precision


@dataclass(frozen=True)
class Work:
    """The clip to measure on, and how often it is measured."""

    size: int = 512  # side of a slice in pixels
    slices: int = 17
    k: int = 1  # latent frames per step
    rounds: int = 3
    repeats: int = 3  # timed passes per process, after the first; 0: only the first is timed


def bench(
    bundle: Path,
    manifest: Manifest,
    cases: list[Case],
    work: Work,
    *,
    weights: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Measure all cases in turn, `work.rounds` times; returns one row of medians per case.

    `weights` are the peers'; the first peer among the cases is the yardstick. The size is rounded
    up to whole latent cells. A row holds

    - slices and voxels per second through encode and decode together;
    - GFLOP/s (two per multiply-add, counted from the network), and their share of the machine's
      `ceiling`, None if that cannot be measured;
    - how the case ran: tiles per stage, stages spilled to a file, directions in lean mode;
    - peak MiB beyond the libraries, weights included, and peak MiB of torch on a GPU;
    - the speed relative to the yardstick, in the same precision if that was measured;
    - mean and largest error against the yardstick, in standard deviations of its result.

    Raises PlanError for a budget that cannot be met and EngineError for a case that fails.
    """
    side = -(-work.size // manifest.geometry.spatial)
    jobs = {
        case: {d: _job(bundle, manifest, case, work, d, side, weights) for d in DIRECTIONS}
        for case in cases
    }
    ceilings = {key: ceiling(*key) for key in {case.ceiling for case in cases}}
    with tempfile.TemporaryDirectory(prefix="fvae-bench-") as folder:
        results = _run_rounds(cases, jobs, work.rounds, folder, progress)
        yardstick = next((i for i, case in enumerate(cases) if _is_peer(case)), None)
        table = []
        for i, case in enumerate(cases):
            row: dict[str, Any] = {"engine": _label(case, jobs[case]), "precision": case.precision}
            row |= {"device": case.device, "memory": case.memory} | _run_modes(jobs[case])
            row |= _row(manifest, results[case], work, side, ceilings[case.ceiling])
            for direction in DIRECTIONS:
                mean, largest = _errors(folder, direction, i, yardstick)
                row |= {f"{direction}_error_mean": mean, f"{direction}_error_max": largest}
            table.append(row)
    _add_relative_speed(table, yardstick)
    return table


Results = dict[Case, dict[str, list[dict[str, Any]]]]  # of every round, by case and direction


def _run_rounds(
    cases: list[Case],
    jobs: dict[Case, dict[str, dict[str, Any]]],
    rounds: int,
    folder: str,
    progress: Callable[[str], None],
) -> Results:
    """Run every job once per round, all cases in turn; their output goes to files in `folder`."""
    results: Results = {case: {direction: [] for direction in DIRECTIONS} for case in cases}
    for number in range(rounds):
        for i, case in enumerate(cases):
            label = f"{_label(case, jobs[case])} {case.precision}"
            for direction in DIRECTIONS:
                progress(f"round {number + 1} of {rounds}: {label} {direction}")
                job = jobs[case][direction] | {"result": f"{folder}/{i}.{direction}.npy"}
                results[case][direction].append(in_process(**job))
    return results


def _add_relative_speed(table: list[dict[str, Any]], yardstick: int | None) -> None:
    """Add each row's speed relative to the yardstick, in the same precision if there is one."""
    for row in table:
        row["times_reference"] = None
        if yardstick is not None:
            name, precision = table[yardstick]["engine"], row["precision"]
            same = [r for r in table if (r["engine"], r["precision"]) == (name, precision)]
            peer = (same or [table[yardstick]])[0]
            row["times_reference"] = row["slices_per_second"] / peer["slices_per_second"]


def ceiling(device: str = "cpu", precision: str = "fp32") -> float | None:
    """Measure the best speed of several large matrix products, in FLOP/s.

    On a CPU OpenVINO multiplies in this precision; without OpenVINO, or if it does not support the
    precision, numpy in float32. On a GPU torch multiplies; without torch, or if it does not support
    the device, the result is None.
    """
    engine = "openvino" if device == "cpu" else "torch"
    try:
        job = {"engine": engine, "precision": precision, "device": device}
        return float(in_process(task="ceiling", **job)["flops"])
    except EngineError:
        if device != "cpu":
            return None
    a = np.random.default_rng(0).random((2048, 2048), dtype=np.float32)
    a @ a
    return float(max(2 * 2048**3 / _timed(lambda: a @ a) for _ in range(5)))


def macs_per_cell(manifest: Manifest, direction: str, first: bool) -> int:
    """Return the multiply-adds of a direction for one latent cell of one latent frame."""
    parts = (manifest.stage_part(stage, first) for stage in manifest.stages(direction))
    return sum(part.mac_per_cell * part.scale**2 for part in parts)


def _job(
    bundle: Path,
    manifest: Manifest,
    case: Case,
    work: Work,
    direction: str,
    side: int,
    weights: Path | None,
) -> dict[str, Any]:
    """Return the job description for the process of one measurement."""
    job: dict[str, Any] = {
        "task": "window",
        "bundle": str(bundle),
        "engine": case.engine,
        "precision": case.precision,
        "device": case.device,
        "direction": direction,
        "side": side,
        "slices": work.slices,
        "k": work.k,
        "repeats": work.repeats,
        "weights": str(weights) if _is_peer(case) else None,
        "memory": case.memory,
        "tiles": {},
        "segments": {},
        "spilled": [],
        "lean": False,
    }
    if _is_peer(case):
        return job
    planned = plan(
        manifest,
        (direction,),
        (side, side),
        engine=case.engine,
        precision=case.precision,
        memory=case.memory,
        k=work.k,
        segments=case.memory is not None,
    )
    whole = all(grid.count == 1 for grid in planned.grids.values())
    job["lean"] = planned.lean if case.memory else planned.lean or not whole
    job["tiles"] = dict.fromkeys(planned.grids, 1)
    if case.memory:  # without a budget the whole plane is run, even if memory is short
        job["tiles"] = {name: grid.count for name, grid in planned.grids.items()}
        job["segments"] = {name: len(way.tiles) for name, way in planned.pieces.items()}
        job["spilled"] = sorted(planned.spilled)
    return job


def _run_modes(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return how a case runs: tiles and segments per stage, and what is spilled or lean."""
    return {
        "tiles": {stage: n for job in jobs.values() for stage, n in job["tiles"].items()},
        "segments": {stage: n for job in jobs.values() for stage, n in job["segments"].items()},
        "spilled": [stage for job in jobs.values() for stage in job["spilled"]],
        "lean": [direction for direction, job in jobs.items() if job["lean"]],
    }


def _label(case: Case, jobs: dict[str, dict[str, Any]]) -> str:
    """Return a case's name in the table; with a budget it tells how the plan cuts the plane."""
    if not case.memory:
        return case.engine
    modes = _run_modes(jobs)
    if modes["segments"]:
        return f"{case.engine} in segments"
    return f"{case.engine} {'tiled' if any(n > 1 for n in modes['tiles'].values()) else 'whole'}"


def _is_peer(case: Case) -> bool:
    return case.engine == "reference" or case.engine.startswith("diffusers")


def _row(
    manifest: Manifest,
    directions: dict[str, list[dict[str, Any]]],
    work: Work,
    side: int,
    peak_flops: float | None,
) -> dict[str, Any]:
    """Return the table row of one case, with medians over the rounds."""
    seconds = {d: statistics.median(r["seconds"] for r in rows) for d, rows in directions.items()}
    total = sum(seconds.values())
    pixels = side * manifest.geometry.spatial
    rows = [row for rows in directions.values() for row in rows]
    frames = rows[0]["frames"]
    macs = sum(
        n * macs_per_cell(manifest, direction, first)
        for direction in DIRECTIONS
        for n, first in zip(frames, (True, False), strict=True)
    )
    flops = 2 * side * side * macs / total
    return {
        "slice": [pixels, pixels],
        "slices": work.slices,
        "encode_seconds": seconds["encode"],
        "decode_seconds": seconds["decode"],
        "slices_per_second": work.slices / total,
        "voxels_per_second": work.slices * pixels**2 / total,
        "gflop_per_second": flops / 1e9,
        "share_of_ceiling": flops / peak_flops if peak_flops else None,
        "ceiling_gflop_per_second": peak_flops / 1e9 if peak_flops else None,
        "peak_mib": max(row["peak_bytes"] for row in rows) / 2**20,
        "peak_gpu_mib": max(row["peak_gpu_bytes"] for row in rows) / 2**20,
        "spread": max(row["spread"] for row in rows),
    }


def _errors(
    folder: str, direction: str, case: int, yardstick: int | None
) -> tuple[float | None, float | None]:
    """Return mean and largest error against the yardstick, in standard deviations of its result."""
    if yardstick is None:
        return None, None
    result, expected = (np.load(f"{folder}/{i}.{direction}.npy") for i in (case, yardstick))
    assert result.shape == expected.shape
    error: NDArray[np.float32] = np.abs(result - expected)
    return float(error.mean() / expected.std()), float(error.max() / expected.std())


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
