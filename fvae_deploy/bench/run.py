"""`fvae bench`: throughput, share of the ceiling, peak memory and error, side by side.

Every configuration runs in a process of its own, so that its peak memory is its own; rounds
go through all of them in turn. Peers are the same weights as their authors run them: the
published formulation of LeanVAE, or diffusers' VAEs with and without `enable_tiling`. With a
peer, errors are against its untiled result. On a GPU peers also run in the precisions of the
engines, and speeds are relative to the peer in the same precision.
"""

from __future__ import annotations

import dataclasses
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
from fvae_deploy.engines.base import QUANTISED
from fvae_deploy.errors import EngineError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.plan import plan

DIRECTIONS = ("encode", "decode")


@dataclass(frozen=True)
class Case:
    """What is measured: an engine on the whole plane or planned for a budget, or a peer."""

    engine: str
    precision: str = "fp32"
    memory: int | None = None
    device: str = "cpu"

    @property
    def ceiling(self) -> tuple[str, str]:
        """Device and precision of the ceiling that it is held against."""
        return self.device, "fp16" if self.precision in QUANTISED else self.precision


@dataclass(frozen=True)
class Work:
    """On what: slices of size x size pixels, this many, in steps of k latent frames."""

    size: int = 512
    slices: int = 17
    k: int = 1
    rounds: int = 3
    repeats: int = 3  # timed windows a process, after one that compiles; 0: that one is timed


def bench(
    bundle: Path,
    manifest: Manifest,
    cases: list[Case],
    work: Work,
    *,
    weights: Path | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[dict[str, Any]]:
    """Measure every case in turn, `work.rounds` times over; one row of medians each.

    `weights` are a peer's; the first peer among the cases is the yardstick. The size is
    rounded up to whole latent cells. The rows hold slices and voxels per second through
    encode and decode together, GFLOP/s (two per multiply-add, counted from the network), the
    share of the machine's `ceiling` (None where that cannot be measured), how they ran (tiles of
    every stage, stages spilled to a file, directions that were lean), peak MiB beyond the libraries
    (weights included), peak MiB that torch took of a GPU, the speed relative to the yardstick, in
    the same precision where that was measured, and mean and largest error against it in
    deviations of its result. Raises PlanError for a budget that cannot be met and EngineError for
    a case that fails.
    """
    side = -(-work.size // manifest.geometry.spatial)
    jobs = {
        case: {d: _job(bundle, manifest, case, work, d, side, weights) for d in DIRECTIONS}
        for case in cases
    }
    labels = {case: _label(case, jobs[case]) for case in cases}
    tops = {of: ceiling(*of) for of in {case.ceiling for case in cases}}
    found: dict[Case, dict[str, list[dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory(prefix="fvae-bench-") as folder:
        for number in range(work.rounds):
            for i, case in enumerate(cases):
                for direction in DIRECTIONS:
                    progress(
                        f"round {number + 1} of {work.rounds}: {labels[case]} {case.precision} "
                        f"{direction}"
                    )
                    job = jobs[case][direction] | {"result": f"{folder}/{i}.{direction}.npy"}
                    rows = found.setdefault(case, {d: [] for d in DIRECTIONS})
                    rows[direction].append(in_process(**job))
        truth = next((i for i, case in enumerate(cases) if _is_peer(case)), None)
        table = []
        for i, case in enumerate(cases):
            row: dict[str, Any] = {"engine": labels[case], "precision": case.precision}
            row |= {"device": case.device, "memory": case.memory} | _how(jobs[case])
            row |= _row(manifest, found[case], work, side, tops[case.ceiling])
            for direction in DIRECTIONS:
                mean, most = _errors(folder, direction, i, truth)
                row |= {f"{direction}_error_mean": mean, f"{direction}_error_max": most}
            table.append(row)
    for row in table:
        row["times_reference"] = None
        if truth is not None:
            name, precision = table[truth]["engine"], row["precision"]
            same = [r for r in table if (r["engine"], r["precision"]) == (name, precision)]
            yardstick = (same or [table[truth]])[0]
            row["times_reference"] = row["slices_per_second"] / yardstick["slices_per_second"]
    return table


def ceiling(device: str = "cpu", precision: str = "fp32") -> float | None:
    """Measure a ceiling in FLOP/s: the best of several large matrix products.

    On a CPU OpenVINO's in this precision, numpy's in float32 where it is not there or does not
    compute in it; on a GPU torch's, None where torch is not there or does not know the device.
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
    """Multiply-adds of a direction for one latent cell of one latent frame."""
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
    """Say what the process of one measurement is told."""
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
        "tiles": {},
        "grids": {},
        "spilled": [],
        "lean": False,
    }
    if _is_peer(case):
        return job
    made = plan(
        manifest,
        (direction,),
        (side, side),
        engine=case.engine,
        precision=case.precision,
        memory=case.memory,
        k=work.k,
    )
    whole = all(grid.count == 1 for grid in made.grids.values())
    job["lean"] = made.lean if case.memory else made.lean or not whole
    job["tiles"] = dict.fromkeys(made.grids, 1)
    if case.memory:  # else on the whole plane, whatever is free
        job["tiles"] = {name: grid.count for name, grid in made.grids.items()}
        job["grids"] = {name: dataclasses.astuple(grid) for name, grid in made.grids.items()}
        job["spilled"] = sorted(made.spilled)
    return job


def _how(jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Say how a case runs: tiles of every stage, stages spilled, directions that are lean."""
    return {
        "tiles": {stage: n for job in jobs.values() for stage, n in job["tiles"].items()},
        "spilled": [stage for job in jobs.values() for stage in job["spilled"]],
        "lean": [direction for direction, job in jobs.items() if job["lean"]],
    }


def _label(case: Case, jobs: dict[str, dict[str, Any]]) -> str:
    """Name a case in the table; one with a budget by what the plan made of it."""
    if not case.memory:
        return case.engine
    tiled = any(n > 1 for n in _how(jobs)["tiles"].values())
    return f"{case.engine} {'tiled' if tiled else 'whole'}"


def _is_peer(case: Case) -> bool:
    return case.engine == "reference" or case.engine.startswith("diffusers")


def _row(
    manifest: Manifest,
    directions: dict[str, list[dict[str, Any]]],
    work: Work,
    side: int,
    top: float | None,
) -> dict[str, Any]:
    """Medians over the rounds of one case."""
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
        "share_of_ceiling": flops / top if top else None,
        "ceiling_gflop_per_second": top / 1e9 if top else None,
        "peak_mib": max(row["peak_bytes"] for row in rows) / 2**20,
        "peak_gpu_mib": max(row["peak_gpu_bytes"] for row in rows) / 2**20,
        "spread": max(row["spread"] for row in rows),
    }


def _errors(
    folder: str, direction: str, case: int, truth: int | None
) -> tuple[float | None, float | None]:
    """Mean and largest difference from the yardstick's result, in its deviations."""
    if truth is None:
        return None, None
    found, expected = (np.load(f"{folder}/{i}.{direction}.npy") for i in (case, truth))
    assert found.shape == expected.shape
    apart: NDArray[np.float32] = np.abs(found - expected)
    return float(apart.mean() / expected.std()), float(apart.max() / expected.std())


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
