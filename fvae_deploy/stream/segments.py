"""Runs a stage in segments: strips of rows through each part, with maps between the segments.

    x --segment 0--> map --segment 1--> map ... --> result
      strips          |  in memory or in an unnamed file, until its last use
                      +--> passes: means and variances of the whole map, in float64

Results are those of the whole stage. A group norm takes the statistics of the whole map; the keys
of an attention are read whole for every strip of queries.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.engines.base import Engine
from fvae_deploy.export.bundle import TensorSpec
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.export.program import Segment
from fvae_deploy.stream.arrays import FeatureMap
from fvae_deploy.stream.maps import Array, MapStore
from fvae_deploy.stream.pieces import Pieces
from fvae_deploy.stream.statistics import Passes
from fvae_deploy.stream.tiles import spans


class SegmentStream:
    """One stage without state, run in segments; the counterpart of `StageStream`."""

    def __init__(
        self, engine: Engine, manifest: Manifest, stage: str, pieces: Pieces, folder: Path | None
    ) -> None:
        program = manifest.program(stage)
        assert program is not None
        self._engine, self._program, self._pieces = engine, program, pieces
        self._part = manifest.stage_part(stage, first=False)
        self._folder = folder
        self.seconds = 0.0

    def run(self, x: FeatureMap, first: bool) -> FeatureMap:
        """Map frames x [C, T, H, W] to the result, slice by slice or the whole window."""
        begin = time.perf_counter()
        data = self._part.inputs[0]
        each = [x[:, i : i + 1] for i in range(x.shape[1])] if data.factor("k") else [x]
        result = np.concatenate([self._one(piece) for piece in each], axis=1)
        self.seconds += time.perf_counter() - begin
        return result

    def close(self) -> None:
        """Do nothing: maps are gone after every run."""

    def _one(self, x: FeatureMap) -> FeatureMap:
        program, plane = self._program, self._pieces.plane
        state = _State(self, plane)
        try:
            spec = program.map(program.data)
            assert spec is not None
            source = MapStore(spec, plane, None)
            source.write(0, x.reshape(spec.sized(1, *plane)))
            state.maps[program.data] = source
            state.pass_over({program.data: source.whole()}, last=True)
            for segment, rows in zip(program.segments, self._pieces.rows, strict=True):
                self._segment(state, segment, rows)
                for name in segment.done:
                    state.maps.pop(name).close()
            h, w = (self._part.scale * n for n in plane)
            shape = self._part.outputs[0].sized(1, h, w)[1:]
            return state.maps[program.result].whole().reshape(shape)
        finally:
            state.close()

    def _segment(self, state: _State, segment: Segment, rows: int) -> None:
        """Run one segment over strips of `rows` cells."""
        part = segment.part
        height, width = (part.scale * n for n in self._pieces.plane)
        wholes = {
            spec.name: state.whole(spec, name)
            for spec, name in zip(part.inputs, segment.inputs, strict=True)
            if not spec.factor("h")
        }
        strips = spans(height, rows, part.halo or 0)
        for number, strip in enumerate(strips):
            inputs = dict(wholes)
            for spec, name in zip(part.inputs, segment.inputs, strict=True):
                if spec.name not in wholes:
                    start, stop = (spec.factor("h") * n for n in strip.read)
                    inputs[spec.name] = np.ascontiguousarray(state.maps[name].read(start, stop))
            outputs = self._engine.run(part.name, inputs)
            kept = {}
            for spec, name in zip(part.outputs, segment.outputs, strict=True):
                value = self._engine.host(outputs[spec.name])
                factor = spec.factor("h")
                if not factor:
                    state.small[name] = np.array(value)
                    continue
                value = value.reshape(spec.sized(1, strip.read[1] - strip.read[0], width))
                kept[name] = value[_rows(spec, *(factor * n for n in strip.crop))]
                state.write(name, factor * strip.keep[0], kept[name])
            state.pass_over(kept, last=number == len(strips) - 1)
        self._engine.release(part.name, compiled=not self._pieces.keep)

    def store(self, name: str) -> MapStore | None:
        """Return a new store for a map; None if nothing reads it."""
        spec = self._program.map(name)
        if spec is None:
            return None
        folder = self._folder if name in self._pieces.filed else None
        return MapStore(spec, self._pieces.plane, folder)

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
        self._passes: Passes | None = None

    def write(self, name: str, start: int, rows: Array) -> None:
        """Write rows of a map, unless it only goes through passes."""
        store = self.maps.get(name) or self._stream.store(name)
        if store is not None:
            self.maps[name] = store
            store.write(start, rows)

    def whole(self, spec: TensorSpec, name: str) -> Array:
        """Return a small array, or a whole map with its cells in a row."""
        if name in self.small:
            return self.small[name]
        value = self.maps[name].whole()
        return np.ascontiguousarray(value).reshape(spec.sized(1, 1, 1, math.prod(self._plane)))

    def pass_over(self, strips: dict[str, Array], last: bool) -> None:
        """Take strips into the passes over their maps; after the last one, keep the results."""
        self._passes = self._passes or self._stream.passes(strips)
        self._passes.add(strips)
        if last:
            self.small |= self._passes.results()
            self._passes = None

    def close(self) -> None:
        """Free all maps."""
        for store in self.maps.values():
            store.close()


def _rows(spec: TensorSpec, start: int, stop: int) -> tuple[slice, ...]:
    """Return the index of rows in a tensor."""
    axis = next(i for i, size in enumerate(spec.shape) if str(size).rpartition("*")[2] == "h")
    return (*[slice(None)] * axis, slice(start, stop))
