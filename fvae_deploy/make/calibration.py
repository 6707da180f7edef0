"""Run a VAE on CTs, for quantisation to take its scales from.

TensorRT's engines need the inputs of every part. Convolutions in int8 on a CPU need samples of what
each of them reads (see `export/int8.py`).
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.engines.base import Engine
from fvae_deploy.errors import BundleError, VolumeError
from fvae_deploy.export.int8 import Layer, chosen
from fvae_deploy.export.manifest import Manifest
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.volume.base import HuFrames
from fvae_deploy.volume.open import open_volume

if TYPE_CHECKING:
    from fvae_deploy.engines.int8 import Observer

SLICES = 17  # taken from the middle of each CT: the first latent frame and four steps
PLANE = 256  # of a slice, the middle of at most so many pixels a side is sampled for int8
PIXELS = 256  # samples of a layer's input in each run of its part


class Recorder:
    """An engine that keeps copies of the inputs of its parts."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.name, self.precision = engine.name, engine.precision
        self.host, self.release, self.close = engine.host, engine.release, engine.close
        self.recorded: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the inputs, then run the part."""
        self.recorded[part].append({n: np.array(self.host(v)) for n, v in inputs.items()})
        return self._engine.run(part, inputs)


def record(bundle: Path, cts: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Encode and decode the middle of each CT; returns the inputs of every part.

    Raises VolumeError for a volume that is not a CT in HU.
    """
    with open_codec(bundle, engine="onnxruntime") as codec:
        recorder = Recorder(codec.engine)
        codec.engine = recorder
        for clip in _clips(codec.manifest, cts):
            codec.decode(codec.encode(clip))
        return dict(recorder.recorded)


def calibrate(
    bundle: Path, cts: Sequence[Path], progress: Callable[[str], None]
) -> dict[str, dict[str, Layer]]:
    """Encode and decode the middle of each CT; returns the ranges of the layers for int8.

    Layers whose predicted error is too large stay float. Raises BundleError if all do, and
    VolumeError for a volume that is not a CT in HU.
    """
    from fvae_deploy.engines.int8 import Observer

    with open_codec(bundle, engine="openvino") as codec:
        observer = Observer(bundle)
        codec.engine = sampler = Sampler(codec.engine, codec.manifest, observer)
        for clip in _clips(codec.manifest, cts, PLANE):
            codec.decode(codec.encode(clip))
        name = codec.manifest.name
    layers, floats = {}, 0
    for part, by_name in sampler.samples.items():
        ranges = {
            n: chosen(np.concatenate(x, 1), observer.weights[part][n]) for n, x in by_name.items()
        }
        layers[part] = {n: layer for n, layer in ranges.items() if layer is not None}
        floats += len(ranges) - len(layers[part])
    count = sum(map(len, layers.values()))
    if not count:
        raise BundleError(
            f"expected convolutions of {name} that int8 makes faster and represents well, found "
            "none: leave out --calibrate"
        )
    progress(f"int8: {count} convolutions, {floats} more stay float for their error")
    return layers


class Sampler(Recorder):
    """An engine that samples what the convolutions of its parts read."""

    def __init__(self, engine: Engine, manifest: Manifest, observer: Observer) -> None:
        super().__init__(engine)
        self._manifest, self._observer = manifest, observer
        self.samples: dict[str, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Sample, then run the part."""
        arrays = {name: np.asarray(self.host(value)) for name, value in inputs.items()}
        found = self._observer.sample(self._manifest.part(part), arrays, PIXELS)
        for name, pixels in found.items():
            self.samples[part][name].append(pixels)
        return self._engine.run(part, inputs)


def check_cts(cts: Sequence[Path]) -> None:
    """Read the middle of each CT; raises VolumeError for one that cannot be calibrated with."""
    for path in cts:
        _middle(path)


def _middle(path: Path) -> HuFrames:
    """Return the middle slices of a CT; raises VolumeError if they are not HU of a body."""
    with contextlib.closing(open_volume(path)) as reader:
        z = reader.geometry.shape[2]
        count = min(z, SLICES)
        frames = next(reader.slabs(count, start=(z - count) // 2))
    low, high = float(frames.min()), float(frames.max())
    if low == high:
        raise VolumeError(
            f"expected a CT of a body to calibrate with, found {low:g} HU everywhere in the middle "
            f"of {path}: choose another CT"
        )
    tally = ClippingTally(frames.size, minimum=low, maximum=high)
    tally.check_is_ct("Calibrate with a CT in HU")
    return frames


def _clips(
    manifest: Manifest, cts: Sequence[Path], most: int | None = None
) -> Iterator[NDArray[np.float32]]:
    """Yield the middle slices of each CT as the network's input [C, T, H, W].

    With `most`, the middle of larger slices. Raises VolumeError as `check_cts`.
    """
    geometry = manifest.geometry
    for frames in map(_middle, cts):
        for axis in (1, 2):
            excess = max(0, frames.shape[axis] - (most or frames.shape[axis]))
            frames = frames.take(
                range(excess // 2, frames.shape[axis] - (excess - excess // 2)), axis
            )
        height, width = (-(-n // geometry.spatial) * geometry.spatial for n in frames.shape[1:])
        clip = to_model(frames, manifest.intensity, height, width, ClippingTally())
        yield clip.repeat(geometry.channels, axis=0)
