"""One generation as requested: networks, conditions and sampling options."""

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
from fvae_deploy.generation.changing import Change
from fvae_deploy.generation.conditions import PaintedMask
from fvae_deploy.generation.denoiser import Denoiser
from fvae_deploy.generation.networks import Networks
from fvae_deploy.generation.noise import TorchNoise, unit_noise
from fvae_deploy.generation.sampler import Sampler
from fvae_deploy.generation.stitch import Noise, Predict
from fvae_deploy.stream.codec import Codec
from fvae_deploy.volume.base import Writer

KIND = "synthetic CT"
Array = NDArray[np.float32]
# A stage and its length -> a function to call with the amount of work done since the last call.
Progress = Callable[[str, int], Callable[[int], None]]


@dataclass(frozen=True)
class Sampling:
    """Sampling options; see `sampler` and `stitch`."""

    sampler: str
    steps: int
    eta: float
    guidance: float
    stitch: str
    seed: int
    centred_noise: bool
    as_published: tuple[str, ...] = ()  # names of PARTS


@dataclass(frozen=True)
class Request:
    """One generation: its networks, conditions and sampling options."""

    networks: Networks
    denoiser: Denoiser
    codec: Codec
    mask: PaintedMask
    text: str
    sampling: Sampling
    contexts: tuple[Array, ...]  # of the text; with guidance, also of the empty text
    progress: Progress
    remarks: tuple[str, ...] = ()  # about the conditions, in sentences
    wrap: Callable[[Writer], Writer] = lambda writer: writer  # around the writer of the result
    change: Change | None = None  # of a CT, instead of a whole one
    plain: PaintedMask | None = None  # the mask without the change's finding, for guidance

    def close(self) -> None:
        """Release what was turned; networks and files are closed by who opened them."""
        for each in (self.mask, self.plain, self.change):
            if each is not None:
                each.close()

    def sampler(self) -> Sampler:
        """Return a new sampler at the start of the noise schedule."""
        options = self.sampling
        schedule = self.denoiser.manifest.schedule
        strided = "steps" in options.as_published
        return Sampler(schedule, options.sampler, options.steps, options.eta, strided=strided)

    @property
    def steps(self) -> int:
        """Number of steps that a window takes."""
        return len(self.sampler().timesteps)

    def noise(self, shape: tuple[int, ...], number: int, earlier: int = 0) -> Noise:
        """Return the source of noise [T, D, h, w] for pass `number` over the volume.

        `earlier` windows were denoised in the pass before.
        """
        options = self.sampling
        if "noise" in options.as_published:
            return TorchNoise(
                shape,
                options.seed,
                skipped=earlier,
                steps=self.steps,
                centred=options.centred_noise,
            )
        return partial(unit_noise, shape, options.seed, number, centred=options.centred_noise)

    @property
    def note(self) -> str:
        """Provenance to store in the volume, for readers who have nothing but the file."""
        manifest = self.denoiser.manifest
        name = f"{manifest.name} {manifest.identity}"
        if self.change is not None:
            return f"a region of this CT was drawn by {name}: no patient's scan"
        return f"drawn by {name} from an organ mask: no patient's scan"

    @property
    def window_slices(self) -> int:
        """Number of slices that a window of the network covers."""
        return self.codec.manifest.geometry.slices(self.denoiser.manifest.window)

    def facts(self) -> dict[str, Any]:
        """Return everything that the result depends on, to recognise the same request again."""
        return {
            "generator": self.denoiser.manifest.identity,
            "vae": self.codec.manifest.identity,
            "engine": self.denoiser.engine.name,
            "precision": self.denoiser.engine.precision,
            "findings": self.text,
            "mask": _fingerprint(self.mask),
            **asdict(self.sampling),
            "as_published": list(self.sampling.as_published),
            **(self.change.facts() if self.change is not None else {}),
        }

    def predictor(
        self,
        mask_at: Callable[[int], Array],
        tick: Callable[[int], None],
        mask_without: Callable[[int], Array] | None = None,
    ) -> Predict:
        """Return the function that predicts for a window of the volume.

        `mask_at` returns the mask latent of a window, and `mask_without` the one that guidance
        compares with; None: the same. `tick` is called after every prediction.
        """
        guidance = np.float32(self.sampling.guidance)

        def predict(x: Array, place: int, t: int) -> Array:
            masks = (mask_at, mask_without or mask_at)
            prediction, *unconditional = (
                self.denoiser.denoise(x, mask_latent=mask(place), t=t, context=context)
                for context, mask in zip(self.contexts, masks, strict=False)
            )
            for without in unconditional:
                prediction = without + guidance * (prediction - without)
            tick(1)
            return prediction

        return predict


def normal(latents: Array, by: LatentNormalisation) -> Array:
    """Normalise stored latents [D, T, h, w] for the network: [T, D, h, w]."""
    shift, scale = (np.array(n, np.float32)[:, None, None] for n in (by.shift, by.scale))
    return (latents.transpose(1, 0, 2, 3) - shift) * scale


def stored(x: Array, by: LatentNormalisation) -> Array:
    """Undo `normal`: [T, D, h, w] to latents [D, T, h, w] as they are stored."""
    shift, scale = (np.array(n, np.float32)[:, None, None] for n in (by.shift, by.scale))
    return np.ascontiguousarray((x / scale + shift).transpose(1, 0, 2, 3), np.float32)


def check_parts(sampling: Sampling, codec: Codec) -> None:
    """Raise BundleError if the VAE cannot do what is to be done as published."""
    manifest = codec.manifest
    one = manifest.geometry.channels == 1 and not manifest.averaging.clamped
    if "clamp" in sampling.as_published and one:
        raise BundleError(
            f"expected a VAE that clamps each of three channels, found {manifest.name}, which "
            "makes one without a clamp: export one with --channels published, or name the other "
            "parts with --as-published"
        )


def _fingerprint(mask: PaintedMask) -> str:
    """Return a hash of the painted mask. This also checks every slice before any work."""
    grids = mask.geometry.shape, mask.mask.affine.tolist()
    digest = hashlib.sha256(repr(grids).encode())
    if mask.native is not mask.mask:
        digest.update(repr((mask.native.shape, mask.native.affine.tolist())).encode())
    for slab in mask.slabs(16):
        digest.update(slab.tobytes())
    mask.check_body_found()
    return digest.hexdigest()
