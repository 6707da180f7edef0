"""Runs one direction of a network over a volume: stage by stage, tile by tile, with state.

    encode, Wan2.1    x --encode0--> 1/2 --encode1--> 1/4 --encode2--> 1/8 --encode3--> z
                      tiles          tiles            tiles            whole (attention)

Every stage has its own grid, in its own cells. Stages at high resolution run in tiles with a
small halo of their own; stages at low resolution mostly run on the whole plane. The map between
two stages is assembled in full. Every tile has its own causal state, in memory or, if the
budget requires it, in an unnamed file.
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fvae_deploy.engines.base import Engine
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import CLOCK, MIDDLE, TensorSpec
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.arrays import FeatureMap
from fvae_deploy.stream.pieces import Pieces
from fvae_deploy.stream.segments import SegmentStream
from fvae_deploy.stream.tiles import Grid


def whole_grids(
    manifest: Manifest, directions: Sequence[str], plane: tuple[int, int]
) -> dict[str, Grid]:
    """Return a grid of one tile for every stage, for a plane of (h, w) latent cells."""
    grids = {}
    for direction in directions:
        for stage in manifest.stages(direction):
            scale = manifest.stage_part(stage, first=False).scale
            h, w = (scale * n for n in plane)
            grids[stage] = Grid(h, w, (h, w), 0)
    return grids


class States:
    """The causal states of a stage's tiles, in memory or in an unnamed file."""

    def __init__(
        self, engine: Engine, specs: Sequence[TensorSpec], grid: Grid, spill: Path | None
    ) -> None:
        self._engine, self._specs = engine, specs
        self._kept: dict[int, dict[str, Any]] = {}
        extent = (min(grid.extent[0], grid.height), min(grid.extent[1], grid.width))
        self._shapes = {spec.name: spec.sized(1, *extent) for spec in specs}
        # An unnamed file disappears with the process, however it ends.
        self._file = tempfile.TemporaryFile(dir=spill) if spill and specs else None  # noqa: SIM115
        self._bytes = sum(4 * int(np.prod(shape)) for shape in self._shapes.values())  # at most
        self._types: dict[int, list[np.dtype[Any]]] = {}  # of the tiles in the file

    def take(self, tile: int) -> dict[str, Any]:
        """Remove and return a tile's state, or zeros if none is stored."""
        if self._file is None or tile not in self._types:
            state = self._kept.pop(tile, None)
            return state if state is not None else self._zeros()
        self._file.seek(tile * self._bytes)
        state = {}
        for (name, shape), kind in zip(self._shapes.items(), self._types[tile], strict=True):
            state[name] = np.empty(shape, kind)
            self._file.readinto(state[name].view(np.uint8))
        return state

    def put(self, tile: int, values: Sequence[Any]) -> None:
        """Store a tile's next state, in the order of the specs."""
        if self._file is None:
            names = (spec.name for spec in self._specs)
            self._kept[tile] = dict(zip(names, values, strict=True))
            return
        self._file.seek(tile * self._bytes)
        self._types[tile] = []
        for value in values:
            array = np.ascontiguousarray(self._engine.host(value))
            self._types[tile].append(array.dtype)
            self._file.write(array.view(np.uint8).data)

    def close(self) -> None:
        """Delete all states, and the file if there is one."""
        self._kept.clear()
        if self._file is not None:
            self._file.close()

    def _zeros(self) -> dict[str, FeatureMap]:
        return {name: np.zeros(shape, np.float32) for name, shape in self._shapes.items()}


class StageStream:
    """One stage, run step by step and tile by tile; a lean one releases memory after each run."""

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        stage: str,
        grid: Grid,
        *,
        lean: bool = False,
        spill: Path | None = None,
    ) -> None:
        self._engine, self._manifest, self._stage = engine, manifest, stage
        self._grid, self._tiles = grid, grid.tiles
        part = manifest.stage_part(stage, first=False)
        self._lean = lean and part.heavy
        self._states = States(engine, part.state_inputs, grid, spill)
        self.seconds = 0.0

    def run(self, x: FeatureMap, first: bool, clock: tuple[int, int] = MIDDLE) -> FeatureMap:
        """Advance by one step: the whole map x [C, T, H, W] -> the whole result.

        `clock` is that of the step. The result is valid until the next call.
        """
        begin = time.perf_counter()
        part = self._manifest.stage_part(self._stage, first)
        if self._lean and not first:
            self._engine.release(f"{self._stage}_first", compiled=True)
        data, result = part.inputs[0], part.outputs[0]
        stateless = not part.state_inputs
        given = {CLOCK: np.array(clock)} if part.looks_ahead else {}
        scale_in, scale_out = data.factor("h"), result.factor("h")
        whole: FeatureMap | None = None
        for i, tile in enumerate(self._tiles):
            rows, columns = tile.rows, tile.columns
            piece = x[None, :, :, _times(scale_in, rows.read), _times(scale_in, columns.read)]
            state = {} if stateless else self._states.take(i)
            piece = np.ascontiguousarray(piece)
            outputs = self._engine.run(part.name, {data.name: piece, **given, **state})
            self._states.put(i, [outputs.pop(spec.name) for spec in part.state_outputs])
            y: FeatureMap = outputs[result.name][0]
            if len(self._tiles) == 1:
                whole = y
                break
            if whole is None:
                plane = (scale_out * self._grid.height, scale_out * self._grid.width)
                whole = np.empty((*y.shape[:2], *plane), y.dtype)
            crop = _times(scale_out, rows.crop), _times(scale_out, columns.crop)
            keep = _times(scale_out, rows.keep), _times(scale_out, columns.keep)
            whole[:, :, *keep] = y[:, :, *crop]
        if self._lean:
            self._engine.release(part.name, compiled=False)
        self.seconds += time.perf_counter() - begin
        assert whole is not None
        return whole

    def close(self) -> None:
        """Delete the states."""
        self._states.close()


class CausalStream:
    """All stages of one direction, fed step by step.

    States of the stages in `spilled` are stored in a file in `folder`, not in memory. With `lean`,
    heavy stages release their working memory after every run, for the next stage to use. Stages in
    `pieces` run in segments, and call `advance` with their name and the share of a step's work that
    they did since the last call.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        direction: str,
        grids: Mapping[str, Grid],
        spilled: Collection[str] = (),
        folder: Path | None = None,
        *,
        lean: bool = False,
        pieces: Mapping[str, Pieces] = MappingProxyType({}),
        advance: Callable[[str, float], None] = lambda stage, share: None,
    ) -> None:
        self._engine, self._manifest, self._grids = engine, manifest, grids
        self.stages: dict[str, StageStream | SegmentStream] = {
            stage: SegmentStream(
                engine, manifest, stage, pieces[stage], folder, functools.partial(advance, stage)
            )
            if stage in pieces
            else StageStream(
                engine,
                manifest,
                stage,
                grids[stage],
                lean=lean,
                spill=folder if stage in spilled else None,
            )
            for stage in manifest.stages(direction)
        }

    def run(self, x: FeatureMap, first: bool, clock: tuple[int, int] = MIDDLE) -> FeatureMap:
        """Advance by one step: x [C, T, H, W] -> z [D, k, h, w], or the other way round.

        `first` starts a new run; `clock` is that of the step (see `schedule.Step`), for networks
        that look ahead. Another step without an earlier state starts from zeros; results
        are then exact after the direction's `context` latent frames. Raises EngineError if the
        result is not finite.
        """
        for name, stage in self.stages.items():
            if self._manifest.busy(name, clock):
                x = stage.run(x, first, clock)
                continue
            grid = self._grids[name]
            result = self._manifest.stage_part(name, first).outputs[0]
            x = np.zeros(result.sized(1, grid.height, grid.width)[1:], np.float32)
        if not np.isfinite(x).all():
            raise EngineError(
                f"expected finite values from {self._engine.name} {self._engine.precision}, found "
                "NaN or infinite ones: use --precision fp32, or another engine"
            )
        return x.copy()  # the engine may overwrite its array in the next run

    def close(self) -> None:
        """Delete the states and their files."""
        for stage in self.stages.values():
            stage.close()

    @property
    def seconds(self) -> float:
        """Time spent in the engine and on tiles, in all stages."""
        return sum(stage.seconds for stage in self.stages.values())


def _times(factor: int, span: tuple[int, int]) -> slice:
    """Return the slice of cells [a, b) in a tensor with `factor` elements per cell."""
    return slice(factor * span[0], factor * span[1])
