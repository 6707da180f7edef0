"""Record the inputs of a VAE's parts on CTs, from which quantisation takes its scales."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fvae_deploy.engines.base import Engine
from fvae_deploy.stream.codec import open_codec
from fvae_deploy.stream.intensity import ClippingTally, to_model
from fvae_deploy.volume.open import open_volume

SLICES = 17  # taken from the middle of each CT: the first latent frame and four steps


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
        geometry = codec.manifest.geometry
        for path in cts:
            reader, tally = open_volume(path), ClippingTally()
            x, y, z = reader.geometry.shape
            count = min(z, SLICES)
            frames = next(reader.slabs(count, start=(z - count) // 2))
            reader.close()
            height, width = (-(-n // geometry.spatial) * geometry.spatial for n in (x, y))
            clip = to_model(frames, codec.manifest.intensity, height, width, tally)
            tally.check_is_ct()
            codec.decode(codec.encode(clip.repeat(geometry.channels, axis=0)))
        return dict(recorder.recorded)
