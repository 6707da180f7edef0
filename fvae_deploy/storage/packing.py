"""How latents are stored: as float32 or float16, or as whole numbers with a scale.

int16   steps of a 170th of the standard deviation of its channel in its latent frame
int8    steps of a 127th of the largest magnitude of its channel in its latent frame
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from fvae_deploy.errors import VolumeError

STEPS = 170  # a standard deviation in int16: under 0.5 HU with tiny, at a quarter of the bytes
_LEVEL = 7  # of zstd in Blosc; 9 is 5 % smaller and takes ten times as long


def pack(z: NDArray[np.float32], dtype: str) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Return latents [D, k, h, w] as they are stored, and their scales [D, k] if they have any.

    Raises VolumeError for values beyond float16.
    """
    if np.dtype(dtype).kind == "f":
        if dtype == "float16" and np.abs(z).max(initial=0) > np.finfo(np.float16).max:
            raise VolumeError(
                f"expected latents up to {np.finfo(np.float16).max:g} for float16, found "
                f"{np.abs(z).max():g}: pass --latent-dtype float32"
            )
        return z.astype(dtype), None
    most = np.iinfo(dtype).max
    scales = np.abs(z).max(axis=(2, 3)) / most
    if dtype == "int16":
        scales = np.maximum(scales, z.std(axis=(2, 3), dtype=np.float64) / STEPS)
    scales = np.where(scales < np.finfo(np.float32).tiny, 1, scales).astype(np.float32)
    whole = np.rint(z / scales[:, :, None, None])
    return np.clip(whole, -most, most).astype(dtype), scales


def unpack(values: NDArray[Any], scales: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return latents [D, k, h, w] from what `pack` returned."""
    z = values.astype(np.float32)
    return z if scales is None else z * scales[:, :, None, None]


def compressors(dtype: str) -> tuple[Any, ...]:
    """Return the codecs of a chunk: bytes of a kind together, zstd, and a checksum.

    float32 is stored as it is: its random low bits would save a tenth at best.
    """
    if dtype == "float32":
        return (Crc32cCodec(),)
    size = np.dtype(dtype).itemsize
    shuffle = BloscShuffle.shuffle if size > 1 else BloscShuffle.noshuffle
    blosc = BloscCodec(typesize=size, cname="zstd", clevel=_LEVEL, shuffle=shuffle)
    return blosc, Crc32cCodec()
