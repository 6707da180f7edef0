"""Volumes to latents in the folder of a journal, so that an interrupted run finds them again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fvae_deploy.generation.request import Request, normal
from fvae_deploy.storage.latent_info import LatentInfo
from fvae_deploy.storage.latents import LatentReader
from fvae_deploy.stream import pipeline
from fvae_deploy.stream.options import RunOptions
from fvae_deploy.volume.base import Reader

Array = NDArray[np.float32]


def encoded(
    request: Request, reader: Reader, store: Path, options: RunOptions, *, ct: bool = False
) -> LatentReader:
    """Encode a volume on the network's plane into a store, unless that exists.

    Only a CT is checked to be one.
    """
    if not store.exists():
        own = RunOptions(
            memory=options.memory, any_range=not ct, protocol="causal", latent_dtype="float32"
        )
        tick = request.progress("encode" if ct else "mask", reader.geometry.shape[2])
        pipeline.encode(request.codec, reader, store, own, tick)
    return LatentReader(store)


def encoded_mask(
    request: Request, fingerprint: str, folder: Path, options: RunOptions
) -> tuple[Array, LatentInfo]:
    """Return the mask's latents, normalised [T, D, h, w], and what their store says of them.

    They are those of the generation before if the painted mask, by its fingerprint, is the same.
    """

    def encode() -> tuple[Array, LatentInfo]:
        store = encoded(request, request.mask, folder / "mask.zarr", options)
        latents = store.read(0, store.shape[1])
        return normal(latents, request.denoiser.manifest.mask), store.info

    masks: tuple[Array, LatentInfo] = request.networks.mask((fingerprint, options.memory), encode)
    return masks
