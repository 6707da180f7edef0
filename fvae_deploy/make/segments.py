"""Whether an engine's segments give what its whole stage gives, and what memory they take."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import numpy as np

from fvae_deploy.bench.run import DIRECTIONS
from fvae_deploy.bench.worker import in_process
from fvae_deploy.engines.base import Engine
from fvae_deploy.export.manifest import Manifest, Memory
from fvae_deploy.stream.pieces import ways
from fvae_deploy.stream.segments import SegmentStream
from fvae_deploy.stream.stages import StageStream, whole_grids

PLANE = (4, 5)  # latent cells
TOLERANCE = 1e-3  # of the largest value


def segments_agree(engine: Engine, manifest: Manifest, stage: str) -> bool:
    """Run a stage of noise whole, and in the smallest tiles with its maps in a file; compare.

    Of a stage with states, three steps are compared.
    """
    direction = "encode" if stage.startswith("encode") else "decode"
    grid = whole_grids(manifest, (direction,), PLANE)[stage]
    first, step = (manifest.program(stage, first) for first in (True, False))
    assert first is not None
    assert step is not None
    *_, smallest = ways(step, PLANE, first=first if step.past else None)
    random = np.random.default_rng(0)
    agree = True
    with (
        contextlib.closing(StageStream(engine, manifest, stage, grid)) as whole,
        contextlib.closing(
            SegmentStream(engine, manifest, stage, smallest, Path(tempfile.gettempdir()))
        ) as segments,
    ):
        for number in range(3 if step.past else 1):
            part = manifest.stage_part(stage, first=number == 0)
            h, w = (part.scale * n for n in PLANE)
            shape = part.inputs[0].sized(1, h, w)[1:]
            x = random.standard_normal(shape, dtype=np.float32)
            clock = number, number - 2
            expected = whole.run(x, number == 0, clock).copy()
            found = segments.run(x, number == 0, clock)
            most = TOLERANCE * np.abs(expected).max()
            agree &= bool(np.abs(found - expected).max() <= most)
    for program in (first, step):
        for each in program.parts:
            engine.release(each.name, compiled=True)
    return agree


def segment_memory(folder: Path, engine: str) -> list[Memory]:
    """Return an upper bound of every segment's memory as a line through the peaks on two tiles."""
    lines = []
    for direction in DIRECTIONS:
        job = {"task": "segments", "bundle": str(folder), "engine": engine, "precision": "fp32"}
        for name, (small, large) in in_process(**job, direction=direction).items():
            cells = large["cells"] - small["cells"]
            per_cell = max(1, -(-(large["last"] - small["last"]) // max(1, cells)))
            fixed = max(0, small["last"] - per_cell * small["cells"])
            keeping = max(0, -(-(large["kept"] - small["kept"]) // max(1, cells)))
            kept = max(0, *(tile["kept"] - keeping * tile["cells"] for tile in (small, large)))
            compiling = small["most"]
            line = Memory(engine, "fp32", name, fixed, per_cell, kept, compiling, keeping)
            excess = max(0, large["most"] - line.bytes(large["cells"]))
            lines.append(dataclasses.replace(line, fixed=fixed + excess))
    return lines
