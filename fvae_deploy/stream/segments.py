"""Runs a stage in segments: tiles through each part, with maps between the segments.

    x --segment 0--> map --segment 1--> map ... --> result
      tiles           |  in memory or in an unnamed file, until its last use
                      +--> passes: means and variances of the whole map, in float64

Results are those of the whole stage. A group norm takes the statistics of the whole map; the keys
of an attention are read whole for every tile of queries. States are maps that wait for the next
step. While the engine computes a tile, one thread reads the next, and another writes the last and
takes it into the passes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.engines.base import Engine
from fvae_deploy.export.bundle import CLOCK, MIDDLE, TensorSpec
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.program import Segment
from fvae_deploy.stream.arrays import FeatureMap
from fvae_deploy.stream.maps import Array, MapStore, at
from fvae_deploy.stream.pieces import Costs, Pieces
from fvae_deploy.stream.statistics import Passes
from fvae_deploy.stream.threads import Behind, ahead
from fvae_deploy.stream.tiles import Grid, Tile

Kept = list[tuple[str, tuple[slice, ...], Array]]  # names of maps, places in them, and elements


class SegmentStream:
    """One stage, run in segments; the counterpart of `StageStream`.

    `advance` is called with the share of a run's work that was done since the last call.
    """

    def __init__(
        self,
        engine: Engine,
        manifest: Manifest,
        stage: str,
        pieces: Pieces,
        folder: Path | None,
        advance: Callable[[float], None] = lambda share: None,
    ) -> None:
        self._engine, self._manifest, self._stage, self._ways = engine, manifest, stage, pieces
        self._states: list[MapStore] = []
        self._select(first=True)
        self._folder, self._advance = folder, advance
        self._share = 1.0  # of a run's work that one of its passes through the segments is
        self.seconds = 0.0

    def run(self, x: FeatureMap, first: bool, clock: tuple[int, int] = MIDDLE) -> FeatureMap:
        """Map frames x [C, T, H, W] to the result, slice by slice or the whole window.

        `first` starts a new run of a stage with states; `clock` is that of the step.
        """
        begin = time.perf_counter()
        if first:
            self.close()
        self._select(first)
        data = self._part.inputs[0]
        each = [x[:, i : i + 1] for i in range(x.shape[1])] if data.factor("k") else [x]
        self._share = 1 / len(each)
        result = np.concatenate([self._one(piece, clock) for piece in each], axis=1)
        self.seconds += time.perf_counter() - begin
        return result

    def close(self) -> None:
        """Delete the states; all other maps are gone after every run."""
        for store in self._states:
            store.close()
        self._states = []

    def _select(self, first: bool) -> None:
        """Turn to the segments of the first step, or of a later one."""
        program = self._manifest.program(self._stage, first)
        assert program is not None
        self._program, self._part = program, self._manifest.stage_part(self._stage, first)
        self._pieces = self._ways.first if first and self._ways.first else self._ways

    def _one(self, x: FeatureMap, clock: tuple[int, int] = MIDDLE) -> FeatureMap:
        program, plane = self._program, self._pieces.plane
        state = _State(self, plane)
        state.small[CLOCK] = np.array(clock)
        try:
            spec = program.map(program.data)
            assert spec is not None
            source = MapStore(spec, plane, None)
            data = x.reshape(spec.sized(1, *plane))
            source.write((slice(None),) * data.ndim, data)
            state.maps[program.data] = source
            state.pass_over({program.data: data})
            state.finish_passes()
            self._continue(state)
            pairs = zip(program.segments, self._pieces.tiles, strict=True)
            for number, (segment, extent) in enumerate(pairs):
                self._segment(state, segment, extent)
                self._free(state, number)
            h, w = (self._part.scale * n for n in plane)
            shape = self._part.outputs[0].sized(1, h, w)[1:]
            self._states = [state.maps.pop(name) for name in program.next]
            return state.maps[program.result].whole().reshape(shape).copy()
        finally:
            state.close()

    def _continue(self, state: _State) -> None:
        """Take the states of the step before, or zeros if there was none."""
        past, self._states = self._states, []
        for i, name in enumerate(self._program.past):
            store = past[i] if past else self.store(name, [])
            assert store is not None
            state.maps[name] = store
            if not past:
                store.write_zeros()
            if any(p.source == name for p in self._program.passes):
                state.pass_over({name: store.whole()})
                state.finish_passes()

    def _free(self, state: _State, number: int) -> None:
        """Free the maps that are done, but keep memory for later maps, as far as there is room.

        The system clears memory that is new, page by page.
        """
        for name in self._program.segments[number].done:
            memory = state.maps.pop(name).close()
            if memory is not None:
                state.spares.append(memory)
        found, state.spares = state.spares, []
        room = self._pieces.spare[min(number + 1, len(self._pieces.spare) - 1)]
        for after, segment in enumerate(self._program.segments[number + 1 :]):
            for size in map(self._size, segment.outputs):
                fitting = next((i for i, memory in enumerate(found) if memory.size == size), None)
                if fitting is None or (after and 4 * size > room):
                    continue
                room -= 4 * size if after else 0  # what the next segment writes is counted there
                state.spares.append(found.pop(fitting))

    def _size(self, name: str) -> int:
        """Return the elements of a map that is written to memory; 0 for anything else."""
        spec = None if name in self._pieces.filed else self._program.map(name)
        return math.prod(spec.sized(1, *self._pieces.plane)) if spec else 0

    def _segment(self, state: _State, segment: Segment, extent: tuple[int, int]) -> None:
        """Run one segment over tiles of `extent` cells."""
        part = segment.part
        wholes = {
            spec.name: state.whole(spec, name)
            for spec, name in zip(part.inputs, segment.inputs, strict=True)
            if not spec.factor("h")
        }
        height, width = (part.scale * n for n in self._pieces.plane)
        grid = Grid(height, width, extent, part.halo or 0)
        maps = {
            spec: state.maps[name]
            for spec, name in zip(part.inputs, segment.inputs, strict=True)
            if spec.name not in wholes
        }

        def read(tile: Tile) -> tuple[Tile, dict[str, Array]]:
            found = {
                s.name: m.read(at(s, tile.rows.read, tile.columns.read)) for s, m in maps.items()
            }
            return tile, {name: np.ascontiguousarray(value) for name, value in found.items()}

        work = Costs(segment, self._pieces.plane, None).mac * grid.cells / max(1, self._pieces.mac)
        tiles: Iterable[tuple[Tile, dict[str, Array]]] = map(read, grid.tiles)
        with contextlib.ExitStack() as stack:
            take: Callable[[Kept], None] = state.take
            if grid.count > 1:
                tiles = stack.enter_context(contextlib.closing(ahead(tiles, 1)))
                take = stack.enter_context(Behind(state.take, 1)).put
            for tile, inputs in tiles:
                outputs = self._engine.run(part.name, wholes | inputs)
                take(self._kept(state, segment, tile, outputs))
                self._advance(self._share * work)
        state.finish_passes()
        self._engine.release(part.name, compiled=part.name not in self._pieces.keep)

    def _kept(
        self, state: _State, segment: Segment, tile: Tile, outputs: Mapping[str, Any]
    ) -> Kept:
        """Return what a tile keeps of every map: its name, its place and the elements."""
        kept, part = [], segment.part
        keep = tile.rows.keep, tile.columns.keep
        for spec, name in zip(part.outputs, segment.outputs, strict=True):
            value = self._engine.host(outputs[spec.name])
            if not spec.factor("h"):
                state.small[name] = np.array(value)
                continue
            rows, columns = tile.rows, tile.columns
            sizes = (stop - start for start, stop in (rows.read, columns.read))
            value = value.reshape(spec.sized(1, *sizes))[at(spec, rows.crop, columns.crop)]
            kept.append((name, at(spec, *keep), value))
        return kept

    def store(self, name: str, spares: list[Array]) -> MapStore | None:
        """Return a new store for a map, in spare memory if it fits; None if nothing reads it."""
        spec = self._program.map(name)
        if spec is None:
            return None
        if name in self._pieces.filed:
            return MapStore(spec, self._pieces.plane, self._folder)
        size = math.prod(spec.sized(1, *self._pieces.plane))
        fitting = [i for i, memory in enumerate(spares) if memory.size == size]
        spare = spares.pop(fitting[0]) if fitting else None
        return MapStore(spec, self._pieces.plane, None, spare)

    def passes(self, names: Mapping[str, Any]) -> Passes:
        """Return the passes over these maps."""
        found = (p for p in self._program.passes if p.source in names)
        return Passes(tuple(found))


class _State:
    """The maps and small arrays of one run."""

    def __init__(self, stream: SegmentStream, plane: tuple[int, int]) -> None:
        self._stream, self._plane = stream, plane
        self.maps: dict[str, MapStore] = {}
        self.small: dict[str, Array] = {}
        self.spares: list[Array] = []  # memory of the maps that the last segment was done with
        self._passes: Passes | None = None

    def whole(self, spec: TensorSpec, name: str) -> Array:
        """Return a small array, or a whole map with its cells in a row."""
        if name in self.small:
            return self.small[name]
        value = self.maps[name].whole()
        return np.ascontiguousarray(value).reshape(spec.sized(1, 1, 1, math.prod(self._plane)))

    def take(self, tiles: Kept) -> None:
        """Write tiles of the maps that are read later, and take them into the passes."""
        for name, index, tile in tiles:
            store = self.maps.get(name) or self._stream.store(name, self.spares)
            if store is not None:
                self.maps[name] = store
                store.write(index, tile)
        self.pass_over({name: tile for name, _, tile in tiles})

    def pass_over(self, tiles: dict[str, Array]) -> None:
        """Take tiles into the passes over their maps."""
        self._passes = self._passes or self._stream.passes(tiles)
        self._passes.add(tiles)

    def finish_passes(self) -> None:
        """Keep the results of the passes over the maps that are complete now."""
        if self._passes is not None:
            self.small |= self._passes.results()
            self._passes = None

    def close(self) -> None:
        """Free all maps."""
        for store in self.maps.values():
            store.close()
