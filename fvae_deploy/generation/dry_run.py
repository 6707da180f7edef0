"""The plan of a generation: tiles, memory and arithmetic, from the figures of both bundles."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fvae_deploy.generation.published import passes_of, window_plan
from fvae_deploy.generation.request import Request
from fvae_deploy.generation.stitch import starts
from fvae_deploy.stream import schedule
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.pieces import MAC_SECOND
from fvae_deploy.stream.plan import Plan
from fvae_deploy.stream.report import plan_report
from fvae_deploy.stream.run import Run


def dry_run_report(
    request: Request, mask: str | Path, output: Path, options: RunOptions
) -> dict[str, Any]:
    """Return the plan, JSON-ready; nothing is computed."""
    if request.sampling.stitch == "joint":
        plans, seconds = _joint(request, output, options)
    else:
        plans, seconds = _reference(request, options)
    engine = request.codec.engine
    return {
        "command": "generate",
        "dry_run": True,
        "input": str(mask),
        "output": str(output),
        "output_exists": output.exists(),
        "engine": engine.name,
        "precision": engine.precision,
        "volume": {"shape": list(request.mask.written.shape)},
        "plan": {name: plan_report(plan) for name, plan in plans.items()},
        "description": "; ".join(f"{name}: {plan.describe()}" for name, plan in plans.items()),
        "seconds_at_100_gflops": round(seconds, 1),
        "sampling": dataclasses.asdict(request.sampling)
        | {"as_published": list(request.sampling.as_published)},
        "remarks": list(request.remarks),
    }


def _joint(request: Request, output: Path, options: RunOptions) -> tuple[dict[str, Plan], float]:
    own = RunOptions(memory=options.memory, protocol="causal")
    runs = {
        direction: Run.of(request.codec, request.mask.geometry, (direction,), own, output.parent)
        for direction in ("encode", "decode")
    }
    frames = schedule.latent_frames(runs["encode"].steps)
    windows = len(starts(frames, request.denoiser.manifest.window))
    seconds = sum(run.plan.step_seconds * len(run.steps) for run in runs.values())
    plans = {direction: run.plan for direction, run in runs.items()}
    return plans, seconds + windows * _window_seconds(request)


def _reference(request: Request, options: RunOptions) -> tuple[dict[str, Plan], float]:
    plan = window_plan(request, options)
    windows = sum(map(len, passes_of(request)))
    coding = plan.step_seconds * request.denoiser.manifest.window
    return {"encode and decode": plan}, windows * (coding + _window_seconds(request))


def _window_seconds(request: Request) -> float:
    """Return the seconds to denoise one window, at the nominal speed of plans."""
    manifest = request.denoiser.manifest
    part = manifest.part("denoise")
    height, width, _ = request.mask.geometry.shape
    side = request.codec.manifest.geometry.spatial * part.inputs[0].factor("h")  # pixels per cell
    cells = (height // side) * (width // side) * manifest.window
    calls = request.steps * len(request.contexts)
    return calls * part.mac_per_cell * cells / MAC_SECOND
