"""Latents checked while they are encoded: decoded at once, and what the bound lacks is stored."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import LatentError
from fvae_deploy.storage.latents import LatentReader, LatentWriter
from fvae_deploy.stream.arrays import LatentFrames, ModelFrames
from fvae_deploy.stream.bound import Bound, restored
from fvae_deploy.stream.codec import pad_frames
from fvae_deploy.stream.intensity import to_hu
from fvae_deploy.stream.run import Run
from fvae_deploy.stream.schedule import Step
from fvae_deploy.volume.base import HuFrames


class Checker:
    """Decodes the steps of an encode from `target` on, and stores their residuals.

    The steps before `target` that the decoder must have seen are read from the store.
    """

    def __init__(self, run: Run, writer: LatentWriter, bound: Bound, target: int) -> None:
        self._run, self._writer, self._bound = run, writer, bound
        self._stream = run.stream("decode")
        entry = run.entry(target, "decode") if target < len(run.steps) else target
        for step in run.steps[entry:target]:
            self._stream.run(pad_frames(writer.read(*step.latents), step.frames), step.first)

    def decode(self, step: Step, z: LatentFrames) -> ModelFrames:
        """Return the frames [C, t, H, W] that the latents of a step [D, k, h, w] decode to."""
        z = z[:, : step.latents[1] - step.latents[0]]
        return self._stream.run(pad_frames(self._writer.as_stored(z), step.frames), step.first)

    def store(self, step: Step, original: HuFrames, decoded: ModelFrames) -> None:
        """Store the residuals of a step, its slices shared among its latent frames."""
        base = base_of(self._run, step, decoded)
        slices = self._bound.residuals(original, base, step.slices[0])
        start, stop = step.latents
        for frame in range(stop - start):
            part = [len(slices) * n // (stop - start) for n in (frame, frame + 1)]
            self._writer.write_residuals(start + frame, slices[slice(*part)])

    def close(self) -> None:
        """Delete the states of the decoder."""
        self._stream.close()

    @property
    def seconds(self) -> float:
        """Time spent in decoding."""
        return self._stream.seconds


def base_of(
    run: Run, step: Step, decoded: ModelFrames, *, clamp_first: bool = False
) -> NDArray[np.float32]:
    """Return the slices of a decoded step [C, t, H, W] in HU [t, x, y]."""
    x, y, _ = run.geometry.shape
    return to_hu(decoded[:, step.shown], run.intensity, x, y, clamp_first=clamp_first)


def bound_of(store: LatentReader) -> Bound:
    """Return the bound of a store that has one."""
    info = store.info
    assert info.max_error is not None
    assert info.margin is not None
    return Bound(info.max_error, info.margin)


def checked(run: Run, store: LatentReader, step: Step, base: HuFrames) -> HuFrames:
    """Return the voxels [t, x, y] of a step within the store's bound, from its base, in int16.

    Raises LatentError if they are not those that were compared with the original.
    """
    residuals = store.residuals(*step.latents)
    voxels = restored(base, residuals) if len(residuals) == len(base) else None
    if voxels is not None:
        return voxels
    info, engine = store.info, run.codec.engine
    now, before = f"{engine.name} {engine.precision}", f"{info.engine} {info.precision}"
    remedy = f"decode with --engine {info.engine} --precision {info.precision}"
    if now == before:
        remedy = "encode the CT again if the store was changed"
    raise LatentError(
        f"expected the voxels that were checked to lie within {info.max_error:g} HU, found others "
        f"in slices {step.slices[0]} to {step.slices[1] - 1} of {store.path} with {now} (encoded "
        f"with {before}; margin {info.margin:g} HU): {remedy}, or pass --no-residual to decode "
        "without the bound"
    )
