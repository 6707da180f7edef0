"""Parity: the error of an engine's results against the reference's, on one clip.

The clip has the features of a CT: smooth tissue, sharp edges next to saturated regions, and noise.
White noise alone would measure the engine mostly at frequencies that no volume has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import EngineError
from fvae_deploy.export.bundle import Part, TensorSpec
from fvae_deploy.export.generator import GeneratorManifest, NoiseParity, timestep_embedding
from fvae_deploy.export.manifest import Intensity, Manifest, Parity

Array = NDArray[np.float32]


class Runner(Protocol):
    """The methods of an engine that parity needs; every engine has them."""

    name: str
    precision: str

    def run(self, part: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Compute one part."""
        ...

    def host(self, state: Any) -> Any:
        """Return a state as an array."""
        ...


def parity(
    reference: Runner,
    engine: Runner,
    manifest: Manifest,
    seed: int = 0,
    size: tuple[int, int] = (9, 12),
    steps: int = 2,
) -> Parity:
    """Compare two engines: encode one clip in both, decode the reference's latents in both.

    Parameters
    ----------
    reference, engine
        The same bundle opened twice; the reference in float32 torch.
    size
        Latent cells along H and W.
    steps
        Latent frames after the first.

    Returns
    -------
    Parity
        Largest error of the latents, in standard deviations of the reference's latents; mean and
        largest error of the decoded frames in HU, both clamped to the model's range first.

    Raises EngineError if results are not finite.
    """
    geometry, intensity = manifest.geometry, manifest.intensity
    steps = steps if geometry.first_slices == 1 else 0
    slices = geometry.first_slices + geometry.temporal * steps
    shape = (slices, size[0] * geometry.spatial, size[1] * geometry.spatial)
    x = clip(shape, intensity, seed)[None, None].repeat(geometry.channels, axis=1)
    z = stream(reference, manifest, "encode", x)
    latent = np.abs(stream(engine, manifest, "encode", x) - z)
    decoded = [
        np.clip(stream(e, manifest, "decode", z), intensity.model_min, intensity.model_max)
        for e in (reference, engine)
    ]
    gain = (intensity.hu_max - intensity.hu_min) / (intensity.model_max - intensity.model_min)
    hu = gain * np.abs(decoded[1].astype(np.float64) - decoded[0])
    return Parity(
        engine=engine.name,
        precision=engine.precision,
        latent_max=float(latent.max() / z.std()),
        hu_mean=float(hu.mean()),
        hu_max=float(hu.max()),
    )


def noise_parity(
    reference: Runner, engine: Runner, manifest: GeneratorManifest, seed: int = 0
) -> NoiseParity:
    """Compare one denoising step in two engines, on random noise, mask and context.

    Errors are in standard deviations of the reference's result. Raises EngineError if they are
    not finite.
    """
    random = np.random.default_rng(seed)
    side = 4 * manifest.multiple
    shape = (4, manifest.channels, side, side)
    width = manifest.part("context").inputs[0].sized()[1]
    context = random.standard_normal((8, width), dtype=np.float32)
    x, mask = (random.standard_normal(shape, dtype=np.float32) for _ in range(2))
    results = []
    time = timestep_embedding(500, manifest.width)
    for runner in (reference, engine):
        outputs = runner.run("context", {"context": context})
        text = {name: np.array(runner.host(value)) for name, value in outputs.items()}
        inputs = {"x": x, "mask_latent": mask, "time": time, **text}
        results.append(runner.run("denoise", inputs)["noise"].astype(np.float64))
    error = np.abs(results[1] - results[0]) / results[0].std()
    if not np.isfinite(error).all():
        raise EngineError(
            f"expected finite values from a step in {engine.name} {engine.precision}, found NaN or "
            "infinite ones: use another precision or engine for this network"
        )
    return NoiseParity(engine.name, engine.precision, float(error.mean()), float(error.max()))


def stream(engine: Runner, manifest: Manifest, direction: str, data: Array) -> Array:
    """Run a whole clip or latent [1, C, T, H, W] untiled, in steps of one latent frame.

    Raises EngineError if the result is not finite.
    """
    geometry = manifest.geometry
    encode = direction == "encode"
    head = geometry.first_slices if encode else geometry.first_frames
    stride = geometry.temporal if encode else 1
    lag = 0 if encode else manifest.lag
    starts = (0, *range(head, data.shape[2], stride))
    states: dict[str, list[Any]] = {}
    results = []
    for number in range(len(starts) + lag // geometry.temporal):
        start = starts[min(number, len(starts) - 1)]
        x = np.ascontiguousarray(data[:, :, start : start + (stride if start else head)])
        for stage in manifest.stages(direction):
            part = manifest.stage_part(stage, first=not number)
            clock = number, number - len(starts) + 1
            if not manifest.busy(stage, clock):
                (x,) = _zeros(part, x, part.outputs[:1])
                continue
            state = states.pop(stage, None) or _zeros(part, x, part.state_inputs)
            given = (x, *[np.array(clock)] * part.looks_ahead, *state)
            names = (spec.name for spec in part.inputs)
            outputs = engine.run(part.name, dict(zip(names, given, strict=False)))
            x, *states[stage] = (outputs[spec.name] for spec in part.outputs)
        results.append(x.copy())  # the engine may overwrite it in the next run
    result = np.concatenate(results, axis=2)
    if lag:
        result = result[:, :, lag : lag + geometry.slices(data.shape[2])]
    if not np.isfinite(result).all():
        raise EngineError(
            f"expected finite values from {direction} in {engine.name} {engine.precision}, found "
            "NaN or infinite ones: use another precision or engine for this network"
        )
    return result


def _zeros(part: Part, x: Array, specs: Sequence[TensorSpec]) -> list[Array]:
    """Return zeros in place of a part's tensors, for data x."""
    h, w = (n // part.inputs[0].factor("h") for n in x.shape[-2:])
    return [np.zeros(spec.sized(1, h, w), np.float32) for spec in specs]


def clip(shape: tuple[int, int, int], intensity: Intensity, seed: int) -> Array:
    """Make a clip [T, H, W] in the model's range: a drifting ellipse of tissue, air, noise."""
    random = np.random.default_rng(seed)
    t, y, x = np.meshgrid(
        np.linspace(0, shape[0] / 32, shape[0]),
        np.linspace(-1, 1, shape[1]),
        np.linspace(-1, 1, shape[2]),
        indexing="ij",
    )
    tissue = np.zeros(shape)
    for _ in range(12):  # up to 3 periods across the plane
        pitch, phase = random.uniform(-3, 3, 3) * np.pi, random.uniform(0, 2 * np.pi)
        tissue += 0.2 * np.cos(pitch[0] * t + pitch[1] * y + pitch[2] * x + phase)
    tissue = np.where(tissue > 0.6, 1.0, tissue)  # bone: sharp edges inside the body
    body = ((y - 0.1 * t) / 0.8) ** 2 + ((x + 0.1 * t) / 0.9) ** 2 < 1
    values = np.where(body, tissue, -1.0) + 0.03 * random.standard_normal(shape)
    share = (np.clip(values, -1, 1) + 1) / 2
    span = intensity.model_max - intensity.model_min
    return (intensity.model_min + span * share).astype(np.float32)
