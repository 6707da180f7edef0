"""One volume's way through a codec: its steps, tiles and plane, and what comes in and out.

Every verb of `stream` makes a Run and takes steps from `read`, networks from `stream`, and hands
what they give to `decoded` or a latent store.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import BuiltAhead
from fvae_deploy.errors import UsageError
from fvae_deploy.storage.journal import Journal
from fvae_deploy.stream import schedule
from fvae_deploy.stream.codec import Codec, pad_frames
from fvae_deploy.stream.decoded import Decoded
from fvae_deploy.stream.intensity import ClippingTally, to_hu, to_model
from fvae_deploy.stream.plan import Plan, plan
from fvae_deploy.stream.schedule import Step
from fvae_deploy.stream.stages import CausalStream
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Geometry, Reader, Writer

T = TypeVar("T")
Frames = NDArray[np.float32]  # [C, T, H, W] in the model's range, or latents [D, k, h, w]


@dataclass
class Outcome:
    """What a run did: for the report."""

    plan: Plan
    slices: int  # that this run computed
    kept: int = field(default=0, kw_only=True)  # that a stopped one had left
    shape: tuple[int, int, int]
    tally: ClippingTally = field(default_factory=ClippingTally)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Run:
    """One volume's way through the codec: its steps, its plane and what happened."""

    codec: Codec
    steps: list[Step]
    plane: tuple[int, int]  # latent cells
    protocol: str
    folder: Path  # for states that are not kept in memory
    outcome: Outcome

    @classmethod
    def of(
        cls,
        codec: Codec,
        geometry: Geometry,
        directions: tuple[str, ...],
        protocol: str | None,
        memory: int | None,
        k: int | None,
        folder: Path,
    ) -> Run:
        """Plan it; raises UsageError for a protocol or step that the network has not."""
        manifest, of = codec.manifest, codec.manifest.geometry
        protocol = protocol or of.protocols[0]
        if protocol not in of.protocols:
            raise UsageError(
                f"expected protocol {' or '.join(of.protocols)}, found {protocol!r}: "
                f"{manifest.name} has no other"
            )
        k = manifest.check_step(k)
        x, y, z = geometry.shape
        plane = (-(-x // of.spatial), -(-y // of.spatial))
        made = plan(
            manifest,
            directions,
            plane,
            engine=codec.engine.name,
            precision=codec.engine.precision,
            memory=memory,
            k=k,
            extents=_extents(codec, directions),
        )
        codec.settle(made.grids, k)
        planned = schedule.steps(z, protocol, k, of)
        return cls(codec, planned, plane, protocol, folder, Outcome(made, z, (x, y, z)))

    def stream(self, direction: str) -> CausalStream:
        """Open one direction of the codec as a causal stream."""
        plan = self.outcome.plan
        return CausalStream(
            self.codec.engine,
            self.codec.manifest,
            direction,
            plan.grids,
            plan.spilled,
            self.folder,
            lean=plan.lean,
        )

    @property
    def tile(self) -> tuple[int, ...]:
        """Extents, stage by stage; other ones round differently."""
        return tuple(n for grid in self.outcome.plan.grids.values() for n in grid.extent)

    def facts(
        self, command: str, source: str, geometry: Geometry, a: int, b: int
    ) -> dict[str, Any]:
        """Say what tells this run from others whose slabs are not its own."""
        return {
            "fvae": __version__,
            "command": command,
            "input": source,
            "model": self.codec.manifest.identity,
            "engine": self.codec.engine.name,
            "precision": self.codec.engine.precision,
            "protocol": self.protocol,
            "k": self.outcome.plan.k,
            "tile": list(self.tile),
            "shape": list(geometry.shape),
            "affine": geometry.affine.tolist(),
            "slices": [a, b],
        }

    def entry(self, target: int, direction: str) -> int:
        """Index of the step at which to start so that step `target` comes out exact."""
        entry = schedule.enter(self.steps, target, self.codec.manifest.context(direction))
        while self.steps[entry].slices[0] == self.steps[entry].slices[1]:
            entry -= 1  # a step that repeats the last slice needs one that reads it
        return entry

    def read(
        self, reader: Reader, entry: int, stop: int | None = None
    ) -> Iterator[tuple[Step, Frames]]:
        """Yield the steps from `entry` to `stop` with their frames in the model's range."""
        geometry, intensity = self.codec.manifest.geometry, self.codec.manifest.intensity
        height, width = (geometry.spatial * n for n in self.plane)
        steps = self.steps[entry:stop]
        depths = [s.slices[1] - s.slices[0] for s in steps if s.slices[1] > s.slices[0]]
        last: Frames | None = None
        with contextlib.closing(reader.slabs(*depths, start=steps[0].slices[0])) as slabs:  # type: ignore[type-var]
            for step in steps:
                if step.slices[1] > step.slices[0]:
                    slab = next(slabs)
                    x = to_model(slab, intensity, height, width, self.outcome.tally)
                    last = x[:, -1:]
                else:  # beyond the end of the volume
                    assert last is not None
                    x = last
                x = pad_frames(x, step.depth)
                yield step, np.repeat(x, geometry.channels, axis=0) if geometry.channels > 1 else x

    def decoded(
        self,
        writer: Writer,
        wanted: tuple[int, int],
        journal: Journal | None,
        resample: Callable[[Frames], Frames] = lambda hu: hu,
    ) -> Decoded:
        """Make the consumer of decoded steps, and note how many slices it leaves to compute."""
        x_size, y_size, _ = self.outcome.shape
        intensity = self.codec.manifest.intensity

        def frames(x: Frames) -> Frames:
            return resample(to_hu(x, intensity, x_size, y_size))

        out = Decoded(writer, self.steps, wanted, frames, journal)
        self.outcome.kept = out.kept
        self.outcome.slices = wanted[1] - wanted[0] - out.kept
        return out

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Pass items through, adding up the time spent waiting for them."""
        waited, iterator = 0.0, iter(items)
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                break
            finally:
                waited += time.perf_counter() - begin
                self.outcome.seconds[name] = waited
            yield item


def _extents(codec: Codec, directions: tuple[str, ...]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Tiles of the stages of an engine that was built ahead of time, for some sizes alone."""
    engine, of = codec.engine, codec.manifest
    if not isinstance(engine, BuiltAhead):
        return {}
    stages = [stage for direction in directions for stage in of.stages(direction)]
    return {stage: engine.extents(of.stage_part(stage, first=False).name) for stage in stages}
