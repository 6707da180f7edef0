"""The run report: model, engine, machine, plan, time, memory, and clipped voxels."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

from fvae_deploy.errors import OutputError
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.parse import show_bytes
from fvae_deploy.stream.codec import Codec
from fvae_deploy.stream.plan import Plan
from fvae_deploy.stream.rss import peak_rss
from fvae_deploy.stream.run import Outcome
from fvae_deploy.version import __version__
from fvae_deploy.volume.publish import new_file

PACKAGES = ("numpy", "nibabel", "pydicom", "zarr", "isal", "openvino", "onnxruntime", "torch")


def run_report(
    command: str,
    source: Path,
    target: Path,
    codec: Codec,
    outcome: Outcome,
    baseline: int,
    remarks: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Return the facts of one run, JSON-ready.

    `baseline` is the resident memory of interpreter and libraries before the first step.
    Peak memory is given in total and beyond that baseline. `remarks` are those of the reader.
    """
    manifest, plan = codec.manifest, outcome.plan
    peak, total = peak_rss(), outcome.seconds["total"]
    return {
        "fvae": __version__,
        "command": command,
        "input": str(source),
        "output": str(target),
        "model": {
            "name": manifest.name,
            "source": dataclasses.asdict(manifest.source),
            "weights_sha256": manifest.files["weights.safetensors"],
        },
        "engine": codec.engine.name,
        "precision": codec.engine.precision,
        "device": codec.device,
        "engine_chosen_because": codec.why,
        "kernels": getattr(codec.engine, "kernels", None),
        "plan": plan_report(plan),
        "protocol": outcome.options.protocol_of(manifest.geometry),
        "as_published": outcome.options.as_published(manifest),
        "volume": {
            "shape": list(outcome.shape),
            "slices": outcome.slices,
            "resumed": outcome.resumed,
        },
        "clipped": _clipped(outcome, manifest),
        **_bound_report(outcome),
        "seconds": {name: round(value, 4) for name, value in outcome.seconds.items()},
        "slices_per_second": outcome.slices / total,
        "memory": {
            "peak_rss_bytes": peak,
            "baseline_bytes": baseline,
            "beyond_baseline_bytes": max(peak - baseline, 0),
        },
        "remarks": list(remarks),
        "machine": machine(),
    }


def _clipped(outcome: Outcome, manifest: Manifest) -> dict[str, Any]:
    """Return how many voxels were outside the HU window."""
    tally, intensity = outcome.clipping, outcome.options.intensity(manifest.intensity)
    clipped = tally.below + tally.above
    return {
        "voxels": clipped,
        "share": clipped / tally.voxels if tally.voxels else 0.0,
        "below": tally.below,
        "above": tally.above,
        "minimum_hu": tally.minimum if tally.voxels else None,
        "maximum_hu": tally.maximum if tally.voxels else None,
        "window_hu": [intensity.hu_min, intensity.hu_max],
    }


def _bound_report(outcome: Outcome) -> dict[str, Any]:
    """Return the facts of a bound on the error of voxels, and of the bytes of a latent store."""
    facts: dict[str, Any] = {}
    if outcome.sizes is not None:
        latents, residual = (8 * size / math.prod(outcome.shape) for size in outcome.sizes)
        bits = {"latents": latents, "residual": residual, "total": latents + residual}
        facts["latent_dtype"] = outcome.options.stored_as
        facts["bits_per_voxel"] = {name: round(value, 4) for name, value in bits.items()}
    if outcome.added_error is not None:
        facts["added_error"] = outcome.added_error
    if outcome.bound is not None:
        facts["bound"] = {
            "max_error_hu": outcome.bound.max_error,
            "margin_hu": outcome.bound.margin,
            "checked": True,
        }
    return facts


def plan_report(plan: Plan) -> dict[str, Any]:
    """Return the facts of a plan, JSON-ready."""
    return {
        "latent_frames_per_step": plan.k,
        "tiles": {d: grid.count for d, grid in plan.grids.items()},
        "tile_cells": {d: list(grid.extent) for d, grid in plan.grids.items()},
        "tile_borders": {
            d: {"plane": [grid.height, grid.width], "at": list(grid.borders)}
            for d, grid in plan.grids.items()
        },
        "tile_overhead": {d: round(grid.overhead, 3) for d, grid in plan.grids.items()},
        "states_in_a_file": sorted(plan.spilled),
        "lean": plan.lean,
        "segments": {
            stage: {
                "most_tiles": pieces.most,
                "tile_cells": [list(tile) for tile in pieces.tiles],
                "maps_in_a_file": sorted(pieces.filed),
                "whole": list(pieces.whole),
            }
            for stage, pieces in plan.pieces.items()
        },
        "predicted_bytes": plan.predicted_bytes,
        "budget_bytes": plan.budget_bytes,
    }


def cores() -> tuple[int, ...]:
    """Return the numbers of the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def machine() -> dict[str, Any]:
    """Return the facts of this machine and the versions of the packages in use."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(cores()),
        "python": platform.python_version(),
        "packages": versions,
    }


def summary(report: dict[str, Any]) -> str:
    """Return a summary of a run report in one or two lines."""
    x, y, _ = report["volume"]["shape"]
    clipped, memory = report["clipped"], report["memory"]
    slices, resumed = report["volume"]["slices"], report["volume"]["resumed"]
    before = f" (and {resumed} from an interrupted run)" if resumed else ""
    lines = [
        f"{slices} slices{before} of {x}x{y} in {report['seconds']['total']:.1f} s, "
        f"{report['slices_per_second']:.1f} slices/s with {report['engine']} "
        f"{report['precision']}; peak {show_bytes(memory['beyond_baseline_bytes'])} beyond "
        f"{show_bytes(memory['baseline_bytes'])} of libraries"
    ]
    bound, bits = report.get("bound"), report.get("bits_per_voxel")
    if bits:
        parts = f": latents {bits['latents']:.2f}, residual {bits['residual']:.2f}" if bound else ""
        lines.append(f"{bits['total']:.2f} bits a voxel{parts}")
    if added := report.get("added_error"):
        lines.append(
            f"latents in {report['latent_dtype']} add {added['mean_hu']:.2g} HU on average, "
            f"{added['max_hu']:.2g} HU at most, measured on {added['slices']} slices"
        )
    if bound:
        lines.append(
            f"every voxel within {bound['max_error_hu']:g} HU, checked; other engines may differ "
            f"by {bound['margin_hu']:.2g} HU before rounding"
        )
    elif clipped["voxels"]:
        low, high = clipped["window_hu"]
        lines.append(
            f"clipped to [{low:g}, {high:g}] HU: {100 * clipped['share']:.2f} % of voxels, "
            f"which ranged from {clipped['minimum_hu']:g} to {clipped['maximum_hu']:g}"
        )
    lines += report.get("remarks", [])
    return "\n".join(lines)


def write_json(content: Any, path: Path) -> None:
    """Write JSON completely or not at all; raises OutputError if the path is not writable."""
    try:
        with new_file(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"expected to write {path}, found {error.strerror or error}: choose another path"
        ) from error


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
