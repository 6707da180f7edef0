"""Run one measurement in a separate process, so that peak memory can be attributed to it.

`python -m fvae_deploy.bench.worker JOB`, with a JSON object as JOB; the last line of output is
JSON.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import load, open_engine
from fvae_deploy.engines.pages import trim
from fvae_deploy.errors import EngineError, FvaeError
from fvae_deploy.export.check import clip
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream import schedule
from fvae_deploy.stream.codec import pad_frames
from fvae_deploy.stream.plan import plan
from fvae_deploy.stream.rss import current_rss, peak_rss, reset_peak
from fvae_deploy.stream.stages import CausalStream, StageStream, whole_grids

TILE_BYTES = 8 << 20  # of the maps alive in the smaller tile that measures a segment


def in_process(**job: Any) -> dict[str, Any]:
    """Run a job in a fresh process; raises EngineError with its last line if it fails.

    The task `window` passes one clip through one direction and returns `seconds` (of the
    median pass), `spread` (max / min), `first_seconds` (compiling included), `peak_bytes`
    beyond the libraries, `peak_gpu_bytes` of torch on a GPU, and `frames`, the latent frames of
    first and of later steps. The task `ceiling` returns `flops` per second. The task `stages`
    returns, on a plane of side x side latent cells, the bytes that each stage adds at its peak,
    and those that it keeps between runs besides its states. The task `segments` returns the same
    for each segment of a direction, on two tiles.
    """
    command = [sys.executable, "-m", "fvae_deploy.bench.worker", json.dumps(job)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        lines = lines or [f"exit code {process.returncode}, no message"]
        name = f"{job['engine']} {job['precision']}"
        raise EngineError(f"engine {name} failed in its own process: {lines[-1]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def window(job: dict[str, Any]) -> dict[str, Any]:
    """Pass one clip, or latents, through one direction; the result is saved to a file."""
    manifest = Manifest.load(Path(job["bundle"]), verify=False)
    planned = schedule.steps(
        job["slices"], manifest.geometry.protocols[0], job["k"], manifest.geometry
    )
    if job["direction"] == "decode":
        planned = schedule.decoding(planned, manifest.geometry.temporal, manifest.lag)
    x = _data(manifest, job["direction"], job["side"], planned)
    reset_peak()  # making the clip does not count
    run, baseline = (_peer if job["weights"] else _engine)(job, manifest, planned, x)
    first, result = _timed(run)
    if job["repeats"]:
        _reset_gpu_peak()  # choosing kernels in the first pass does not count
    seconds = [_timed(run)[0] for _ in range(job["repeats"])] or [first]
    if job["direction"] == "decode":
        result = result.clip(manifest.intensity.model_min, manifest.intensity.model_max)
    np.save(job["result"], result)
    return {
        "seconds": statistics.median(seconds),
        "spread": max(seconds) / min(seconds),
        "first_seconds": first,
        "frames": [sum(s.frames for s in planned if s.first == first) for first in (True, False)],
        "peak_bytes": peak_rss() - baseline,
        "peak_gpu_bytes": _peak_gpu(),
    }


def ceiling(job: dict[str, Any]) -> dict[str, Any]:
    """Multiply large matrices several times and return the best speed."""
    n, run = (_openvino_product if job["device"] == "cpu" else _torch_product)(job)
    run()
    return {"flops": 2 * n**3 / min(_timed(run)[0] for _ in range(10))}


def _openvino_product(job: dict[str, Any]) -> tuple[int, Callable[[], Any]]:
    """Multiply by a constant, as networks do; OpenVINO can then choose its memory layout."""
    engine, n = load("openvino"), 2048
    if job["precision"] not in engine.precisions():
        raise EngineError(f"expected {job['precision']} on this CPU, found none: use fp32")
    from openvino import opset13

    a = np.random.default_rng(0).random((n, n), dtype=np.float32)
    parameter = opset13.parameter([n, n], np.float32)
    product = opset13.matmul(parameter, opset13.constant(a), False, False)
    compiled = engine.CORE.compile_model(
        engine.ov.Model([product], [parameter]),
        "CPU",
        {"INFERENCE_PRECISION_HINT": engine.TYPES[job["precision"]], "NUM_STREAMS": 1},
    )
    request = compiled.create_infer_request()
    return n, lambda: request.infer([a], share_inputs=True, share_outputs=True)


def _torch_product(job: dict[str, Any]) -> tuple[int, Callable[[], Any]]:
    """Multiply on a GPU with torch."""
    import torch

    from fvae_deploy.engines.eager import DTYPES
    from fvae_deploy.kernels.dispatch import compute_in_float32

    compute_in_float32()
    n = 8192
    a = torch.randn(n, n, dtype=DTYPES[job["precision"]], device=job["device"])

    def run() -> Any:
        a @ a
        torch.cuda.synchronize()

    return n, run


def _reset_gpu_peak() -> None:
    """Reset the peak of torch's memory on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _peak_gpu() -> int:
    """Return the peak bytes of torch's tensors on a GPU; 0 if torch did not use one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


Run = Callable[[], NDArray[np.float32]]


def _engine(
    job: dict[str, Any], manifest: Manifest, planned: list[schedule.Step], x: Any
) -> tuple[Run, int]:
    """Return a function that passes x through an engine, and the memory before it was opened."""
    direction = job["direction"]
    load(job["engine"])
    baseline = current_rss()
    opened = open_engine(
        Path(job["bundle"]), manifest, job["engine"], job["device"], job["precision"]
    )
    plane = (job["side"], job["side"])
    grids, how = whole_grids(manifest, (direction,), plane), {"lean": job["lean"]}
    if job["memory"] is not None:
        names = {"engine": job["engine"], "precision": job["precision"]}
        memory = {"memory": job["memory"], "k": job["k"], "segments": True}
        chosen = plan(manifest, (direction,), plane, **names, **memory)
        grids, how["pieces"], how["spilled"] = chosen.grids, chosen.pieces, chosen.spilled

    def run() -> NDArray[np.float32]:
        spill = Path(tempfile.gettempdir())
        stream = CausalStream(opened, manifest, direction, grids, folder=spill, **how)
        results = []
        for step in planned:
            span, size = (
                (step.slices, step.depth) if direction == "encode" else (step.latents, step.frames)
            )
            y = stream.run(pad_frames(x[:, slice(*span)], size), step.first, step.clock)
            results.append(y[:, step.shown] if direction == "decode" and manifest.lag else y)
        stream.close()
        return np.concatenate(results, axis=1)

    return run, baseline


def _peer(
    job: dict[str, Any], manifest: Manifest, planned: list[schedule.Step], x: Any
) -> tuple[Run, int]:
    """Return a function that passes x through a peer, and the memory before it was loaded."""
    from fvae_deploy.export.peer import peer_window

    baseline, intensity = current_rss(), manifest.intensity
    run = peer_window(
        Path(job["weights"]),
        job["engine"],
        job["direction"],
        x,
        job["precision"],
        job["device"],
        gray=manifest.geometry.channels == 1,
        limits=(intensity.model_min, intensity.model_max) if manifest.averaging.clamped else None,
    )
    return run, baseline


def _data(
    manifest: Manifest, direction: str, side: int, planned: list[schedule.Step]
) -> NDArray[np.float32]:
    """Make a clip that resembles CT, or unit noise as latents, in whole steps: [C, T, H, W]."""
    g = manifest.geometry
    if direction == "encode":
        slices = sum(step.depth for step in planned)
        shape = (slices, side * g.spatial, side * g.spatial)
        return clip(shape, manifest.intensity, 0)[None].repeat(g.channels, axis=0)
    frames = sum(step.frames for step in planned if step.latents[0] < step.latents[1])
    shape4 = (g.latent_channels, frames, side, side)
    return np.random.default_rng(0).standard_normal(shape4, dtype=np.float32)


def stages(job: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Run a few steps of each stage in turn; returns the bytes that it adds and keeps.

    `most` is the peak with compiling, `last` the peak of the last step, which compiles nothing,
    `kept` what stays after the steps.
    """
    bundle, direction, side = Path(job["bundle"]), job["direction"], job["side"]
    manifest = Manifest.load(bundle, verify=False)
    opened = open_engine(bundle, manifest, job["engine"], "cpu", job["precision"])
    causal = manifest.geometry.first_slices == 1
    random, results = np.random.default_rng(0), {}
    for name, grid in whole_grids(manifest, (direction,), (side, side)).items():
        trim()
        before = current_rss()
        stream = StageStream(opened, manifest, name, grid, lean=True)
        peaks = []
        for first in (True, False, False) if causal else (True, True):
            reset_peak()
            shape = manifest.stage_part(name, first).inputs[0].sized(1, grid.height, grid.width)
            stream.run(random.standard_normal(shape[1:], dtype=np.float32), first)
            peaks.append(max(0, peak_rss() - before))
        stream.close()
        del stream
        reset_peak()
        kept = max(0, current_rss() - before)
        results[name] = {"most": max(peaks), "last": peaks[-1], "kept": kept}
    return results


def segments(job: dict[str, Any]) -> dict[str, list[dict[str, int]]]:
    """Run every segment of one direction on a small and a large tile; returns what it adds.

    Of each tile: its `cells`, and the bytes as `stages` returns them. Segments that see the whole
    plane are left out.
    """
    bundle = Path(job["bundle"])
    manifest = Manifest.load(bundle, verify=False)
    opened = open_engine(bundle, manifest, job["engine"], "cpu", job["precision"])
    programs = (p for p in manifest.programs if p.stage.startswith(job["direction"]))
    results: dict[str, list[dict[str, int]]] = {}
    distinct = {s.part.name: s for program in programs for s in program.segments}
    for segment in distinct.values():
        part = segment.part
        if part.halo is None or any(spec.factor("n") for spec in part.inputs):
            continue
        least = math.isqrt(TILE_BYTES // max(1, segment.cell_bytes))
        for side in (max(2 * part.halo + 1, least, 4) * factor for factor in (1, 2)):
            inputs = {s.name: np.ones(s.sized(1, side, side), np.float32) for s in part.inputs}
            trim()
            before, peaks = current_rss(), []
            for _ in range(2):
                reset_peak()
                opened.run(part.name, inputs)
                peaks.append(max(0, peak_rss() - before))
            opened.release(part.name, compiled=False)
            reset_peak()
            kept = max(0, current_rss() - before)
            opened.release(part.name, compiled=True)
            row = {"cells": side**2, "most": max(peaks), "last": peaks[-1], "kept": kept}
            results.setdefault(part.name, []).append(row)
    return results


def _timed(run: Run) -> tuple[float, NDArray[np.float32]]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    tasks = {"window": window, "stages": stages, "segments": segments, "ceiling": ceiling}
    try:
        print(json.dumps(tasks[job["task"]](job)))
    except FvaeError as error:
        sys.exit(str(error))
