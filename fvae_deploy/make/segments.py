"""Whether an engine's segments give what its whole stage gives, before a bundle offers them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from fvae_deploy.engines.base import Engine
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.program import Program
from fvae_deploy.stream.pieces import ways
from fvae_deploy.stream.segments import SegmentStream
from fvae_deploy.stream.stages import StageStream, whole_grids

PLANE = (4, 5)  # latent cells
TOLERANCE = 1e-3  # of the largest value


def segments_agree(engine: Engine, manifest: Manifest, program: Program) -> bool:
    """Run a stage of noise whole, and in the smallest strips with its maps in a file; compare."""
    stage = program.stage
    part = manifest.stage_part(stage, first=False)
    h, w = (part.scale * n for n in PLANE)
    shape = part.inputs[0].sized(1, h, w)[1:]
    x = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    direction = "encode" if stage.startswith("encode") else "decode"
    grid = whole_grids(manifest, (direction,), PLANE)[stage]
    expected = StageStream(engine, manifest, stage, grid).run(x, True).copy()
    *_, smallest = ways(program, PLANE)
    folder = Path(tempfile.gettempdir())
    found = SegmentStream(engine, manifest, stage, smallest, folder).run(x, True)
    for each in program.segments:
        engine.release(each.part.name, compiled=True)
    return bool(np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max())
