"""An engine in numpy alone, so that tests run the whole pipeline without a runtime.

Its network is linear, local and causal, with state, a halo of one cell and a context of one
latent frame. With m the mean over a block of 4 frames (1 at the start) x 8 x 8 pixels, and box
the zero-padded 3x3 mean over cells:

    encode   z = (m[t], m[t - 1], box(m)[t])
    decode   cell[t] = z0[t] + (box(z1)[t] + z2[t] - 2 z0[t - 1]) / 16

The decoder multiplies each pixel of a block by its own factor near 1 (GRAIN), so that frames or
pixels in the wrong order are detected. The state before the first frame is zero.

`register` adds the engine to the table of engines. It is not part of the package.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fvae_deploy.engines.base import ENGINES, Entry, check_inputs
from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import SCHEMA, Dimension, Network, Part, Source, TensorSpec, sha256
from fvae_deploy.export.manifest import Geometry, Intensity, LatentNormalisation, Manifest

TEMPORAL, SPATIAL, LATENTS = 4, 8, 3
CHILD_PROCESS = Path(__file__).parent / "child_process"  # its sitecustomize.py registers, too
GRAIN = (np.arange(TEMPORAL * SPATIAL**2).reshape(TEMPORAL, SPATIAL, SPATIAL) - 127.5) / 4096


def register(patch: pytest.MonkeyPatch) -> None:
    """Add the engine to the table, here and in every Python process started from now on."""
    patch.setitem(ENGINES, "fake", Entry(__name__, ("numpy",), ""))
    patch.setenv("PYTHONPATH", str(CHILD_PROCESS), prepend=os.pathsep)


class FakeEngine:
    """See `fvae_deploy.engines.base.Engine`."""

    name = "fake"

    def __init__(self, manifest: Manifest, device: str, precision: str) -> None:
        if manifest.network.family != "fake":
            raise EngineError(
                f"expected a network of family fake, found {manifest.network.family}: "
                "use another engine"
            )
        if (device, precision) != ("cpu", "fp32"):
            raise EngineError(
                f"expected device cpu and precision fp32, found {device} and {precision}: "
                "use --device cpu --precision fp32"
            )
        self.precision = precision
        self._manifest = manifest

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part, internally in double precision."""
        spec = self._manifest.part(part)
        check_inputs(spec, inputs)
        data, *state = (np.asarray(inputs[tensor.name]) for tensor in spec.inputs)
        compute, block = COMPUTE[part.split("_")[0]], 1 if part.endswith("first") else TEMPORAL
        past = state[0][..., 0] if state else None
        try:
            result, following = compute(data[0], past, block)
        except ValueError as error:
            raise EngineError(f"the state of {part} does not fit its data: {error}") from None
        if part.startswith("decode"):
            result = result.repeat(self._manifest.geometry.channels, axis=0)
        named = zip(spec.outputs, (result[None], following[..., None]), strict=True)
        return {t.name: np.ascontiguousarray(value, dtype=np.float32) for t, value in named}

    def host(self, state: Any) -> Any:
        """Return a state, which is already an array."""
        return state

    def release(self, part: str, compiled: bool) -> None:
        """Do nothing: there is no memory to release."""

    def close(self) -> None:
        """Do nothing: there is no memory to release."""


def open(
    bundle: Path, manifest: Manifest, device: str, precision: str, threads: int | None
) -> FakeEngine:
    """Open a bundle of `write_fake_bundle`; raises EngineError for another, or without a CPU."""
    return FakeEngine(manifest, device, precision)


def precisions(device: str = "cpu") -> list[str]:
    """Return the only precision, fp32."""
    return ["fp32"] if device == "cpu" else []


def encode(x: NDArray[Any], past: NDArray[Any] | None, block: int) -> tuple[NDArray[Any], ...]:
    """Frames x [C, T, H, W] and past m [1, h, w] -> z [3, T / block, h, w], next past."""
    _, t, height, width = x.shape
    cells = (t // block, block, height // SPATIAL, SPATIAL, width // SPATIAL, SPATIAL)
    # Rounded here, so that the state holds exactly the values of the latents.
    mean = x.mean(axis=0, dtype=np.float64).reshape(cells).mean(axis=(1, 3, 5))
    mean = mean.astype(np.float32)
    history = np.concatenate([np.zeros_like(mean[:1]) if past is None else past, mean])
    return np.stack([mean, history[:-1], box(mean)]), history[-1:]


def decode(z: NDArray[Any], past: NDArray[Any] | None, block: int) -> tuple[NDArray[Any], ...]:
    """Latents z [3, k, h, w] and past z0 [1, h, w] -> x [1, k * block, H, W], next past."""
    history = np.concatenate([np.zeros_like(z[0, :1]) if past is None else past, z[0]])
    cells = z[0] + (box(z[1]) + z[2] - 2.0 * history[:-1]) / 16
    k, h, w = cells.shape
    x = cells[:, None, :, None, :, None] * (1 + GRAIN[:block, None, :, None, :])
    return x.reshape(1, k * block, h * SPATIAL, w * SPATIAL), history[-1:]


COMPUTE = {"encode": encode, "decode": decode}


def box(plane: NDArray[Any]) -> NDArray[Any]:
    """Mean over the 3x3 cells around each cell, zeros beyond the border; keeps [k, h, w]."""
    _, h, w = plane.shape
    padded = np.pad(plane.astype(np.float64), ((0, 0), (1, 1), (1, 1)))
    mean: NDArray[Any] = np.mean(
        [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], axis=0
    )
    return mean


def write_fake_bundle(folder: Path, channels: int = 1) -> Manifest:
    """Write a bundle that only the fake engine opens; returns its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "weights.safetensors"
    weights.write_bytes(struct.pack("<Q", 2) + b"{}")  # a safetensors file of no tensors
    manifest = Manifest(
        schema=SCHEMA,
        kind=Manifest.KIND,
        fvae_version="0.1.0",
        name="fake",
        description="Block means, for tests of the pipeline",
        licence="Apache-2.0",
        source=Source("fake_engine", "1", sha256(weights)),
        network=Network("fake", {}),
        geometry=Geometry(TEMPORAL, SPATIAL, LATENTS, channels, window=65),
        intensity=Intensity(hu_min=-1000.0, hu_max=1000.0, model_min=-1.0, model_max=1.0),
        latent=LatentNormalisation((0.0,) * LATENTS, (1.0,) * LATENTS),
        precision="fp32",
        parts=tuple(_parts(channels)),
        files={weights.name: sha256(weights)},
    )
    manifest.save(folder)
    return manifest


def _parts(channels: int) -> Iterator[Part]:
    past, following = TensorSpec("past0", (1, "h", "w", 1)), TensorSpec("next0", (1, "h", "w", 1))
    plane: tuple[Dimension, ...] = (f"{SPATIAL}*h", f"{SPATIAL}*w")
    for direction in ("encode", "decode"):
        for kind, frames, k in (("first", 1, 1), ("step", f"{TEMPORAL}*k", "k")):
            x = TensorSpec("x", (1, channels, frames, *plane))
            z = TensorSpec("z", (1, LATENTS, k, "h", "w"))
            data, result = (x, z) if direction == "encode" else (z, x)
            state = (past,) if kind == "step" else ()
            name, inputs, outputs = f"{direction}_{kind}", (data, *state), (result, following)
            yield Part(name, "", inputs, outputs, scale=1, halo=1, context=1, mac_per_cell=512)
