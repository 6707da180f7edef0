"""One generation as it was asked for: networks, conditions, and how to sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.errors import BundleError
from fvae_deploy.export.manifest import LatentNormalisation
from fvae_deploy.generation.conditions import PaintedMask
from fvae_deploy.generation.denoiser import Denoiser
from fvae_deploy.generation.sampler import Sampler, unit_noise
from fvae_deploy.generation.stitch import Noise, Predict
from fvae_deploy.stream.codec import Codec

KIND = "synthetic CT"
Array = NDArray[np.float32]
Progress = Callable[[str, int], Callable[[int], None]]  # a stage and its length -> its progress


@dataclass(frozen=True)
class Sampling:
    """How to sample; see `fvae_deploy.sampler`."""

    sampler: str
    steps: int
    eta: float
    guidance: float
    stitch: str
    seed: int
    centred_noise: bool


@dataclass(frozen=True)
class Request:
    """One generation: the networks, the conditions and how to sample."""

    denoiser: Denoiser
    codec: Codec
    mask: PaintedMask
    text: str
    sampling: Sampling
    contexts: tuple[Array, ...]  # of the text, and with guidance of none
    progress: Progress

    def sampler(self) -> Sampler:
        """Begin a run through the noise schedule."""
        of = self.sampling
        return Sampler(self.denoiser.manifest.schedule, of.sampler, of.steps, of.eta)

    def noise(self, shape: tuple[int, ...], number: int) -> Noise:
        """Make the noise of the volume, or of a pass over it: [T, D, h, w] for any use."""
        of = self.sampling
        return partial(unit_noise, shape, of.seed, number, centred=of.centred_noise)

    @property
    def note(self) -> str:
        """How the volume is made: for who finds it alone."""
        manifest = self.denoiser.manifest
        return f"drawn by {manifest.name} {manifest.identity} from an organ mask: no patient's scan"

    @property
    def window_slices(self) -> int:
        """Slices that a window of the network stands for."""
        return self.codec.manifest.geometry.slices(self.denoiser.manifest.window)

    def facts(self) -> dict[str, Any]:
        """Say what tells this request from others."""
        return {
            "generator": self.denoiser.manifest.identity,
            "vae": self.codec.manifest.identity,
            "engine": self.denoiser.engine.name,
            "precision": self.denoiser.engine.precision,
            "findings": self.text,
            "mask": _fingerprint(self.mask),
            **asdict(self.sampling),
        }

    def predictor(self, mask_at: Callable[[int], Array], tick: Callable[[int], None]) -> Predict:
        """Make the function that predicts for a window, whose mask latent `mask_at` gives."""
        guidance = np.float32(self.sampling.guidance)

        def predict(x: Array, place: int, t: int) -> Array:
            mask = mask_at(place)
            found, *base = (
                self.denoiser.denoise(x, mask_latent=mask, t=t, context=context)
                for context in self.contexts
            )
            for without in base:
                found = without + guidance * (found - without)
            tick(1)
            return found

        return predict


def normal(latents: Array, by: LatentNormalisation) -> Array:
    """Latents [D, T, h, w] of the store as the network sees them, [T, D, h, w]."""
    shift, scale = (np.array(n, np.float32)[:, None, None] for n in (by.shift, by.scale))
    return (latents.transpose(1, 0, 2, 3) - shift) * scale


def stored(x: Array, by: LatentNormalisation) -> Array:
    """Undo `normal`."""
    shift, scale = (np.array(n, np.float32)[:, None, None] for n in (by.shift, by.scale))
    return np.ascontiguousarray((x / scale + shift).transpose(1, 0, 2, 3), np.float32)


def check_vae(denoiser: Denoiser, codec: Codec) -> None:
    """Raise BundleError where a VAE is not the one that a generator makes latents of."""
    m, of = denoiser.manifest, codec.manifest.geometry
    side = of.spatial * m.multiple
    if m.channels != of.latent_channels or any(n % side for n in m.plane):
        raise BundleError(
            f"expected a VAE of {m.channels} latent channels whose planes of "
            f"{m.plane[0]}x{m.plane[1]} come in cells that divide by {m.multiple}, found "
            f"{codec.manifest.name} of {of.latent_channels} and {of.spatial} pixels a cell: give "
            f"--vae {m.vae}"
        )
    if codec.manifest.name == m.vae and m.vae_identity not in ("", codec.manifest.identity):
        raise BundleError(
            f"expected {m.vae} of weights {m.vae_identity}, found {codec.manifest.identity}: "
            "give the bundle that this generator was trained with as --vae"
        )


def _fingerprint(mask: PaintedMask) -> str:
    """Hash what the network is shown; so every slice is checked before any work."""
    digest = hashlib.sha256(repr((mask.geometry.shape, mask.mask.affine.tolist())).encode())
    for slab in mask.slabs(16):
        digest.update(slab.tobytes())
    return digest.hexdigest()
