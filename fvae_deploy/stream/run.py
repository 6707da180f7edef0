"""One volume planned for a codec: its plan, its steps, and the slabs that are read for them.

Every verb of `pipeline` plans a Run, gets its steps from `read` and its networks from `stream`,
and returns an Outcome.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from fvae_deploy.engines.base import BuiltAhead
from fvae_deploy.errors import BundleError, VolumeError
from fvae_deploy.export.manifest import Intensity, Manifest
from fvae_deploy.stream import schedule
from fvae_deploy.stream.arrays import ModelFrames
from fvae_deploy.stream.bound import Bound
from fvae_deploy.stream.codec import Codec, pad_frames
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.stream.plan import Plan, plan
from fvae_deploy.stream.schedule import Step
from fvae_deploy.stream.stages import CausalStream
from fvae_deploy.stream.within import StepProgress
from fvae_deploy.version import __version__
from fvae_deploy.volume.base import Geometry, HuFrames, Reader

T = TypeVar("T")
Progress = Callable[[int], None]  # called with the number of slices just finished
logger = logging.getLogger("fvae")


@dataclass(frozen=True)
class Outcome:
    """Results of a run, for the report."""

    plan: Plan
    options: RunOptions
    shape: tuple[int, int, int]  # of the volume
    slices: int  # computed by this run
    resumed: int  # slices taken over from an interrupted run
    clipping: ClippingTally
    seconds: dict[str, float]  # by activity, with "total"
    bound: Bound | None = None  # on the error of every voxel
    sizes: tuple[int, int] | None = None  # bytes of latents and residuals, if stored
    added_error: dict[str, Any] | None = None  # of small latents in HU, if measured


class Stopwatch:
    """Measures wall-clock seconds by activity, and in total since its creation."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def timed(self, activity: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and add up the time spent waiting for them."""
        iterator = iter(items)
        self._seconds[activity] = 0.0
        while True:
            begin = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                break
            finally:
                self._seconds[activity] += time.perf_counter() - begin
            yield item

    def seconds(self, **measured: float) -> dict[str, float]:
        """Return the seconds of all activities, of those in `measured`, and in total."""
        return {**self._seconds, **measured, "total": time.perf_counter() - self._begin}


@dataclass(frozen=True)
class Run:
    """One volume planned for a codec; nothing is read or computed yet."""

    codec: Codec
    geometry: Geometry
    plan: Plan
    steps: list[Step]
    plane: tuple[int, int]  # latent cells
    options: RunOptions
    folder: Path  # for the file of states that do not fit in memory
    clipping: ClippingTally = field(
        default_factory=ClippingTally
    )  # of the slabs that `read` has read

    @classmethod
    def of(
        cls,
        codec: Codec,
        geometry: Geometry,
        directions: tuple[str, ...],
        options: RunOptions,
        folder: Path,
    ) -> Self:
        """Plan the run.

        Raises UsageError for a protocol or step that the network lacks, and BundleError if it
        cannot do as published.
        """
        manifest, network = codec.manifest, codec.manifest.geometry
        protocol = options.protocol_of(network)
        if options.published:
            _check_channels(manifest)
        k = manifest.check_step(options.step)
        x, y, z = geometry.shape
        plane = (-(-x // network.spatial), -(-y // network.spatial))
        chosen = plan(
            manifest,
            directions,
            plane,
            engine=codec.engine.name,
            precision=codec.engine.precision,
            memory=options.memory_bytes,
            k=k,
            extents=_extents(codec, directions),
            segments=not isinstance(codec.engine, BuiltAhead),
        )
        logger.info("plan: %s", chosen.describe())
        steps = schedule.steps(z, protocol, k, network)
        if "decode" in directions:
            steps = schedule.decoding(steps, network.temporal, manifest.lag)
        return cls(codec, geometry, chosen, steps, plane, options, folder)

    def stream(self, direction: str, progress: StepProgress | None = None) -> CausalStream:
        """Open one direction of the codec as a causal stream."""
        self.codec.settle({**self.plan.grids, **self.plan.pieces}, self.plan.k)
        return CausalStream(
            self.codec.engine,
            self.codec.manifest,
            direction,
            self.plan.grids,
            self.plan.spilled,
            self.folder,
            lean=self.plan.lean,
            pieces=self.plan.pieces,
            **({"advance": progress.add} if progress else {}),
        )

    @property
    def protocol(self) -> str:
        """The protocol, causal or windows."""
        return self.options.protocol_of(self.codec.manifest.geometry)

    @property
    def intensity(self) -> Intensity:
        """How HU become the model's range."""
        return self.options.intensity(self.codec.manifest.intensity)

    @property
    def tile(self) -> tuple[int, ...]:
        """Tile extents, stage by stage; other tiles give other rounding errors."""
        tiles = (n for grid in self.plan.grids.values() for n in grid.extent)
        cut = (n for pieces in self.plan.pieces.values() for tile in pieces.tiles for n in tile)
        return (*tiles, *cut)

    def facts(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the facts that identify this run, from those of its output (`facts_of`).

        Slabs are reused only if all match.
        """
        return {"fvae": __version__, **facts, "tile": list(self.tile)}

    def entry(self, target: int, direction: str) -> int:
        """Return the index of the step to start at so that step `target` is exact."""
        entry = schedule.enter(self.steps, target, self.codec.manifest.context(direction))
        while self.steps[entry].slices[0] == self.steps[entry].slices[1]:
            entry -= 1  # a step that repeats the last slice needs the step that reads this slice
        return entry

    def read(
        self, reader: Reader, entry: int, stop: int | None = None, *, any_range: bool
    ) -> Iterator[tuple[Step, HuFrames, ModelFrames]]:
        """Yield the steps from `entry` to `stop`, their frames in HU and in the model's range.

        The steps before `entry` are read too, so that `clipping` covers the volume of a resumed
        run. Unless `any_range`, raises VolumeError before the first step if the volume is no CT.
        """
        network, intensity = self.codec.manifest.geometry, self.intensity
        height, width = (network.spatial * n for n in self.plane)
        steps = self.steps[:stop]
        depths = [s.slices[1] - s.slices[0] for s in steps if s.slices[1] > s.slices[0]]
        last: ModelFrames | None = None
        slab: HuFrames
        with contextlib.closing(reader.slabs(*depths)) as slabs:  # type: ignore[type-var]
            for index, step in enumerate(steps):
                if step.slices[1] > step.slices[0]:
                    slab = next(slabs)
                    _check_there(reader)
                    x = to_model(slab, intensity, height, width, self.clipping)
                    if index == 0 and not any_range:
                        self._check_is_ct(reader, len(slab))
                    last = x[:, -1:]
                else:  # beyond the end of the volume
                    assert last is not None
                    slab, x = slab[:0], last
                if index < entry:
                    continue
                x = pad_frames(x, step.depth)
                if network.channels > 1:
                    x = np.repeat(x, network.channels, axis=0)
                yield step, slab, x

    def _check_is_ct(self, reader: Reader, depth: int) -> None:
        """Raise VolumeError if a volume is no CT, of which the first `depth` slices are tallied.

        Those of a CT nearly always contain air. If not, slices are read ahead until some do: only
        a volume without any is read whole, once, before hours of computing.
        """
        tally, intensity = copy.deepcopy(self.clipping), self.intensity
        x, y, _ = reader.geometry.shape
        with contextlib.closing(reader.slabs(depth, start=depth)) as slabs:  # type: ignore[type-var]
            while not tally.shows_air:
                slab = next(slabs, None)
                if slab is None:
                    break
                to_model(slab, intensity, x, y, tally)
        if not tally.shows_air:
            tally.check_is_ct()

    def outcome(self, slices: int, resumed: int, seconds: dict[str, float]) -> Outcome:
        """Return the results of the finished run."""
        shape, tally = self.geometry.shape, self.clipping
        return Outcome(self.plan, self.options, shape, slices, resumed, tally, seconds)


def facts_of(
    codec: Codec,
    geometry: Geometry,
    command: str,
    source: str,
    slices: tuple[int, int],
    options: RunOptions,
) -> dict[str, Any]:
    """Return the facts that identify an output; the same facts give the same values.

    `source` is the fingerprint of the input. Values are the same up to the rounding of other
    tiles.
    """
    manifest = codec.manifest
    intensity = options.intensity(manifest.intensity)
    return {
        "command": command,
        "input": source,
        "model": manifest.identity,
        "engine": codec.engine.name,
        "precision": codec.engine.precision,
        "protocol": options.protocol_of(manifest.geometry),
        "k": manifest.check_step(options.step),
        "shape": list(geometry.shape),
        "affine": geometry.affine.tolist(),
        "slices": list(slices),
        "dtype": options.dtype,
        "truncated": options.truncates,
        "hu_window": [intensity.hu_min, intensity.hu_max],
        "level": options.level,
        "any_range": options.any_range,
        "max_error": options.max_error,
        "no_residual": options.no_residual or None,
        "latent_dtype": options.stored_as if command == "encode" else None,
        "pyramid": options.pyramid,
    }


def _check_channels(manifest: Manifest) -> None:
    """Raise BundleError for gray weights, which average before they clamp, unlike the scripts."""
    if manifest.averaging.hu_max is not None and not manifest.averaging.clamped:
        raise BundleError(
            f"expected a bundle whose channels are clamped as published, found {manifest.name} "
            "with gray weights: export it without --channels gray"
        )


def _check_there(reader: Reader) -> None:
    """Raise VolumeError if the input has vanished, with its mount: Zarr would read zeros then."""
    if getattr(reader, "drawn", False):  # it was never on a disk
        return
    try:
        reader.path.stat()
    except OSError as error:
        raise VolumeError(
            f"expected {reader.path} to stay until the end, found: {error.strerror or error}: "
            "make it available again, then continue with --resume"
        ) from error


def _extents(codec: Codec, directions: tuple[str, ...]) -> dict[str, tuple[tuple[int, int], ...]]:
    """Return the tile sizes by stage that the engine was built for; empty if it takes any size."""
    engine, manifest = codec.engine, codec.manifest
    if not isinstance(engine, BuiltAhead):
        return {}
    stages = [stage for direction in directions for stage in manifest.stages(direction)]
    return {stage: engine.extents(manifest.stage_part(stage, first=False).name) for stage in stages}
